"""A whole checkpoint in a second: a policy with random weights, bound to the tiny VLM."""

import pytest
import torch

from vla_lib.features.form import FeatureForm
from vla_lib.features.vlm import load_processor, open_checkpoint
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy
from vla_lib.training.checkpoint import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A policy with random weights on the tiny VLM's features of two views."""
    path = tmp_path_factory.mktemp("checkpoint") / "policy.pt"
    views = ("View1_left", "View5")
    source = open_checkpoint("tiny")
    form = FeatureForm(load_processor(source), views, "grid:2x3", 360, 640)
    binding, layout = form.binding(source, 2, 3, "float32"), form.layout
    places = (tuple(part.tolist()) for part in (layout.view_id, layout.row, layout.col))
    config = PolicyConfig("regression", views, binding["hidden_size"], *places, width=32, layers=1, heads=2)
    policy = Policy(config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weights in policy.parameters():
            weights.normal_(0.0, 0.1, generator=generator)
        policy.normaliser.goal_mean.copy_(torch.tensor([175.0, 0.0, 0.0]))  # its goals lie within the rig's workspace
        policy.normaliser.goal_std.copy_(torch.tensor([5.0, 5.0, 15.0]))
    content = {
        "front_door": "train_async",
        "policy_config": config.record(),
        "policy": policy.state_dict(),
        "binding": binding,
    }
    settings = {"vlm_reuse_count": 3, "vlm_latency_ms": 0.0, "dataset_root": "not at hand"}
    save_checkpoint(
        path, content | {"settings": settings, "split": {"train": [], "val": []}, "step": 0, "epoch": 0, "metrics": {}}
    )
    return path
