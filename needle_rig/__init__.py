"""The simulated rig: phantom, needle, five cameras, arm, tissue, OCT sensor; a gymnasium environment and a recorder.

    import gymnasium, needle_rig

    rig = gymnasium.make("needle_rig/NeedleInsertion-v0"); observation, info = rig.reset(seed=1)
    observation, reward, terminated, truncated, info = rig.step(action)

`python -m needle_rig --dataset-root OUT` records demonstrations as raw episodes. Lengths are mm, forces mN, angles
degrees (radians only where a name says so), times seconds. Nothing here imports vla_lib: what writes the truth of a
test shares neither code nor assumptions with what reads it.
"""

import gymnasium

from needle_rig.environment import NeedleInsertion
from needle_rig.world import VIEWS, RigError, World, sample_world

__all__ = ["VIEWS", "NeedleInsertion", "RigError", "World", "sample_world"]

gymnasium.register("needle_rig/NeedleInsertion-v0", entry_point="needle_rig.environment:NeedleInsertion")
