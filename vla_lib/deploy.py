"""Deployment's front door: a checkpoint drives a lab's rig, in stages that open one after the other.

python -m vla_lib.deploy --robot robot.yaml --checkpoint PATH --operator NAME --until preflight
"""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.evaluation.deployment import DeploySettings


def main(settings: DeploySettings) -> dict[str, Any]:
    """Run the session on the terminal; Ctrl-C stops the robot. Returns what each stage came to."""
    # not above: they import torch, and `--help` needs none
    from vla_lib.workbench.deploy_views import on_terminal

    return on_terminal(settings)


if __name__ == "__main__":
    frontdoor.start(DeploySettings, main)
