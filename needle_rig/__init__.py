"""The simulated rig: phantom, needle, five cameras, arm, tissue, OCT sensor, a demonstrator, and a recorder of raw episodes.

    rig = SimRig(seed=0); observation, info = rig.reset(seed=1); observation, reward, terminated, truncated, info = rig.step(action)

Lengths are mm, forces mN, angles degrees (radians only where a name says so), times seconds.
"""

from needle_rig.rig import SimRig
from needle_rig.world import VIEWS, World, sample_world

__all__ = ["VIEWS", "SimRig", "World", "sample_world"]
