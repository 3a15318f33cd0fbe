"""One trunk, two heads: VL tokens, robot state and a sensor window in, a chunk of actions (mm, degrees) out."""

from vla_lib.policy.config import FUSIONS, HEADS, PolicyConfig

__all__ = ["FUSIONS", "HEADS", "Policy", "PolicyConfig"]


def __getattr__(name: str):  # Policy needs torch; the settings do not
    if name == "Policy":
        from vla_lib.policy.policy import Policy

        return Policy
    raise AttributeError(name)
