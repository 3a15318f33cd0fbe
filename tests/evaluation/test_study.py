"""Evaluation of several checkpoints: what is tried, what is refused, contact apart; no model runs here
(tests/workbench/test_flow.py runs all of it)."""

import dataclasses

import numpy as np
import pytest
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.evaluation.open_loop import phases
from vla_lib.evaluation.rollout import rig_of, rig_refusal, rig_settings
from vla_lib.evaluation.settings import EvaluateSettings
from vla_lib.evaluation.sim_robot import CHANGES, DEFAULT_TASK, SimRobot, instruction_of, make_rig
from vla_lib.evaluation.study import variants
from vla_lib.policy.config import PolicyConfig
from vla_lib.runtime.clock import SimulatedClock
from vla_lib.runtime.expert import hidden
from vla_lib.runtime.runner import RunnerSettings
from vla_lib.training.checkpoint import save_checkpoint


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint's record (no weights) trained on a recording of the rig below tmp_path/data."""
    plan = {"picture_width": 160, "picture_height": 90, "camera_hz": 4.0}
    write_json(tmp_path / "data" / "simulation.json", {"plan": plan, "episodes": []})

    def write(name, source="tiny", views=("View5",), root=tmp_path / "data", latency_ms=0.0, **changes):
        config = PolicyConfig("regression", views, 8, (0,), (0,), (0,), **changes)
        content = {
            "front_door": "train_async",
            "policy_config": config.record(),
            "policy": {},
            "split": {},
            "step": 0,
            "epoch": 0,
            "metrics": {},
        }
        settings = {"dataset_root": str(root), "vlm_latency_ms": latency_ms}
        path = tmp_path / name
        save_checkpoint(path, content | {"binding": {"views": list(views), "source": source}, "settings": settings})
        return path

    return write


def test_checkpoints_are_named_and_the_first_is_tried_in_all_ways(write, tmp_path):
    given = (f"all={write('a.pt')}", f"blind={write('b.pt', vl_enabled=False, latency_ms=200.0)}")
    how = {"vlm_jitter_ms": 20.0, "expert_latency_ms": 30.0, "expert_jitter_ms": 5.0, "ddim_steps": 10}
    how |= {"execution": "chunk of n", "chunk_steps": 2, "max_time_s": 9.0}
    settings = EvaluateSettings(given, closed_loop_seeds=2, masked=True, latency_sweep=True, **how)
    found = variants(settings)
    more = ("VL masked", "sensor masked", "VLM delay 0 ms", "VLM delay 381 ms", "VLM delay 600 ms")
    assert list(found) == ["all", "blind", *(f"all, {name}" for name in more)]
    how |= {"picture_width": 160, "camera_hz": 4.0}
    assert all({name: getattr(variant, name) for name in how} == how for variant in found.values())
    # each as trained, unless told otherwise
    assert [variant.vlm_latency_ms for variant in found.values()] == [0, 200, 0, 0, 0, 381, 600]
    assert found["all, VLM delay 0 ms"] == found["all"]  # tried once
    how_disturbed = {"masked": False, "latency_sweep": False, "disturbed": True}
    disturbed = variants(dataclasses.replace(settings, checkpoints=(given[1],), **how_disturbed))
    names = {name.removeprefix("blind, "): variant for name, variant in disturbed.items() if name != "blind"}
    assert set(CHANGES) < set(names) and names["light halved"].disturbance == "light halved"
    assert names["pictures at 2 Hz"].camera_hz == 2 and names["hiccups of 100 ms"].hiccup_ms == 100
    assert len(set(disturbed.values())) == len(disturbed) == 13  # each is another variant
    settings = dataclasses.replace(settings, latency_sweep=False)
    blind = variants(dataclasses.replace(settings, checkpoints=(given[1],)))
    assert list(blind) == ["blind", "blind, sensor masked"]  # there is no VL to mask


def test_a_checkpoint_that_the_rig_cannot_judge_is_told_in_a_sentence(write, tmp_path):
    assert rig_refusal(write("good.pt")) == "" and rig_settings(write("good.pt")).picture_height == 90
    assert "the view Wrist, which the simulated rig does not have" in rig_refusal(write("views.pt", views=("Wrist",)))
    assert "VLM of" in rig_refusal(write("vlm.pt", source=str(tmp_path / "Qwen-gone")))
    (tmp_path / "lab").mkdir()
    lab = write("lab.pt", root=tmp_path / "lab")
    assert "was not recorded on the simulated rig" in rig_refusal(lab)
    with pytest.raises(UserError, match="not recorded on the simulated rig"):
        variants(EvaluateSettings((str(lab),), closed_loop_seeds=1))
    with pytest.raises(UserError, match="which is not there; give the folder of its dataset with --dataset-root"):
        rig_refusal(write("gone.pt", root=tmp_path / "gone"))


def test_trap_16_the_rig_speaks_and_shows_the_task_that_was_recorded(write, tmp_path):
    root = tmp_path / "data"
    assert (rig_settings(write("a.pt")).task, rig_settings(write("a.pt")).instruction) == (
        DEFAULT_TASK,
        instruction_of(DEFAULT_TASK),
    )
    plan = read_json(root / "simulation.json")["plan"]
    tasks = (DEFAULT_TASK, "Silicone_block", "Silicone_block")
    write_json(root / "simulation.json", {"plan": plan, "episodes": [{"task": task, "seed": 1} for task in tasks]})
    (root / "datasets.yaml").write_text('New_dataset*: {instruction: "Push into the {task}"}\n')
    found = variants(EvaluateSettings((str(write("a.pt")),), closed_loop_seeds=1))["a"]
    assert (found.task, found.instruction) == ("Silicone_block", "Push into the Silicone block")
    rig = make_rig(**rig_of(found, RunnerSettings()))
    robot = SimRobot(rig, SimulatedClock(), seed=0, instruction=found.instruction)
    assert robot.read_observation().instruction == found.instruction and rig.world.task == "Silicone_block"


def test_what_cannot_be_evaluated_is_refused(write, tmp_path):
    path = write("a.pt")
    for given, told in (
        ({"checkpoints": ()}, "no checkpoint to evaluate"),
        ({"checkpoints": (tmp_path / "b.pt",)}, "no checkpoint .*b.pt"),
        ({"checkpoints": (path, path)}, "Two checkpoints are called a; name them apart"),
        ({"checkpoints": (path,), "closed_loop_seeds": -1}, "--closed-loop-seeds is -1"),
        ({"checkpoints": (path,), "dataset_root": tmp_path / "none"}, "no dataset root"),
        (
            {"checkpoints": (path,), "execution": "all"},
            "--execution is 'all'; it should be 'first action' or 'chunk of n'",
        ),
        (
            {"checkpoints": (path,), "vlm_jitter_ms": float("nan")},
            "--vlm-jitter-ms is nan; it should be greater than or equal to 0",
        ),
    ):
        with pytest.raises(UserError, match=told):
            EvaluateSettings(**given)


class Recorded:
    """What `phases` reads of a prepared episode: 20 steps of 65 samples after 1 s of rest at -2 mN, pushed from step 10
    on."""

    has_sensor, sensor_hz = True, 650.0
    sensor_index = 650 + 65 * np.arange(20)

    def __init__(self, push_mN):
        noise = np.random.default_rng(0).normal(scale=0.8, size=650 + 65 * 20)
        self.sensor_force = (-2.0 + noise + push_mN * (np.arange(len(noise)) > 650 + 65 * 9)).astype(np.float32)

    def __len__(self):
        return 20


def test_contact_is_told_by_the_force_above_the_episodes_own_rest():
    assert phases(Recorded(20.0)).tolist() == ["free"] * 10 + ["contact"] * 10
    assert set(phases(Recorded(2.0))) == {"free"}
    late, none = Recorded(20.0), Recorded(20.0)
    late.sensor_index = np.concatenate([[0, 0], late.sensor_index[2:]])
    assert phases(late).tolist() == ["unknown"] * 2 + ["free"] * 8 + ["contact"] * 10
    none.has_sensor = False
    assert set(phases(none)) == {"unknown"}


def test_a_hidden_input_is_missing_as_in_training():
    observation = {
        "vl_tokens": torch.ones(2, 3, 4),
        "vl_mask": torch.ones(2, 3, dtype=torch.bool),
        "sensor": torch.ones(2, 5, 1026),
    }
    observation["sensor_mask"] = torch.ones(2, dtype=torch.bool)
    blind, numb = hidden(observation, "vl"), hidden(observation, "sensor")
    assert not blind["vl_mask"].any() and blind["sensor"] is observation["sensor"]
    assert not numb["sensor"].any() and not numb["sensor_mask"].any() and numb["vl_mask"].all()
    assert set(hidden({"vl_mask": observation["vl_mask"]}, "sensor")) == {"vl_mask"}  # a policy without a sensor
