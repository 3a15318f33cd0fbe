"""robot.yaml: what is where, with units and limits; what cannot be is refused with a sentence that names the key."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.fake_arm import flange
from vla_lib.core.errors import UserError
from vla_lib.robots.kinematics import LIMITS_DEG, STRETCHED_DEG, Reach, axes
from vla_lib.robots.settings import RobotSettings

GOOD = {
    "instruction": "insert",
    "arm": {"address": "192.168.0.100", "trf": [0, 0, 120, 0, 0, 0]},
    "cameras": {"View1_left": {"source": "zmq"}, "View5": {"source": "opencv", "name": "0"}},
    "sensor": {"port": 9999},
    "limits": {"workspace_mm": [[150, 200], [-25, 25], [126, 170]], "speed_mm_s": 5, "force_mN": 100},
}


def changed(path: str, value) -> dict:
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    *inner, last = path.split(".")
    place = content
    for name in inner:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


def test_a_file_says_what_is_where(tmp_path):
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(GOOD))
    settings = RobotSettings.load(tmp_path / "robot.yaml")
    assert settings.arm.trf[2] == 120.0 and settings.cameras["View5"].hz == 5.0 and settings.zmq_port == 5555
    limits = settings.safety(vl_age_s=1.5)
    assert (limits.speed_mm_s, limits.vl_age_s, limits.sensor_required) == (5.0, 1.5, True)
    assert not RobotSettings.of_mapping(changed("sensor", None)).safety().sensor_required


@pytest.mark.parametrize(
    "path, value, sentence",
    (
        ("speed", 5, "speed is no setting"),
        ("limits.speed_mm", 5, "limits.speed_mm is no setting; is limits.speed_mm_s meant?"),
        ("limits.force_N", 0.1, "limits.force_N is no setting; is limits.force_mN meant?"),
        ("limits.force_mN", 0.1, "limits.force_mN is 0.1; between 1 and 5000 .* another unit"),
        ("limits.speed_mm_s", 0.005, "limits.speed_mm_s is 0.005"),
        ("limits.speed_mm_s", "fast", "limits.speed_mm_s is 'fast'"),
        ("limits.speed_mm_s", -1, "speed_mm_s is -1.* above 0"),
        ("limits.workspace_mm", [[0.15, 0.2], [-0.02, 0.02], [0.12, 0.17]], "metres look like this"),
        ("limits.workspace_mm", [[900, 950], [-25, 25], [126, 170]], "the tool reaches"),
        ("limits.workspace_mm", [[200, 150], [-25, 25], [126, 170]], "low below high"),
        ("limits.workspace_mm", None, "limits.workspace_mm is missing"),
        ("limits.follow_mm", 0.2, "every arm lags"),
        ("arm.address", None, "arm: address is missing"),
        ("arm.trf", [0, 0, 120], "arm: trf is"),
        ("arm.trf", [0, 0, 12000, 0, 0, 0], "over a metre away; give mm"),
        ("arm.adress", "x", "arm.adress is no setting; is arm.address meant?"),
        ("cameras", {}, "cameras is empty"),
        ("cameras.Side", {"source": "zmq"}, "cameras.Side is no view of prepared episodes"),
        ("cameras.View1_left.source", "usb", "cameras.View1_left: source is 'usb'"),
        ("sensor.port", 99999, "sensor: port is 99999"),
        ("instruction", None, "instruction is missing"),
        ("limits", [1], r"limits must hold keys and values, but it is \[1\]"),
    ),
)
def test_what_cannot_be_is_refused(path, value, sentence):
    with pytest.raises(UserError, match=sentence):
        RobotSettings.of_mapping(changed(path, value))


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(UserError, match="There is no robot file"):
        RobotSettings.load(tmp_path / "none.yaml")
    (tmp_path / "robot.yaml").write_text("limits: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        RobotSettings.load(tmp_path / "robot.yaml")


def test_the_arms_kinematics_agree_with_its_denavit_hartenberg_table():
    draws = np.random.default_rng(0).uniform(LIMITS_DEG[:, 0], np.minimum(LIMITS_DEG[:, 1], 180), (20, 6))
    for joints in draws:
        np.testing.assert_allclose(axes(joints)[2], flange(joints), atol=1e-9)


def test_the_jacobian_is_that_of_the_tip_in_the_world_frame():
    reach = Reach(wrf=(10, 20, 30, 0, 0, 90), trf=(0, 5, 120, 0, 10, 0))
    joints = np.array([10, 20, -30, 5, 60, 20.0])
    jacobian, step = reach.jacobian(joints), 1e-4
    for k in range(6):
        before, after = reach.tip(joints), reach.tip(joints + step * np.eye(6)[k])
        np.testing.assert_allclose(jacobian[:3, k], (after - before)[:3, 3] / step, atol=1e-3)
        turn = (after @ np.linalg.inv(before))[:3, :3]
        vector = np.degrees([turn[2, 1], turn[0, 2], turn[1, 0]]) / step
        np.testing.assert_allclose(jacobian[3:, k], vector, atol=1e-3)


def test_an_arm_that_gets_straight_is_near_its_elbows_singularity():
    reach = Reach()
    straight = np.array([0, 40, STRETCHED_DEG + 4, 0, 60, 0])
    wrist, shoulder = axes(straight)[1][4], np.array([0, 0, 135.0])
    out = (wrist - shoulder) / np.linalg.norm(wrist - shoulder)
    refused = [reach.refuses(straight, [*(sign * out * 0.2), 0, 0, 0, 1]) for sign in (1, -1)]
    assert refused == ["singularity of the elbow", ""]
    middle = reach.distances(np.array([0, -60, 0, 0, 60, 0]))
    assert min(middle, key=middle.get) == "joint limit 2"


def test_nothing_but_an_opened_robot_needs_its_packages():
    block = "import sys; [sys.modules.__setitem__(m, None) for m in ('mecademicpy', 'depthai', 'cv2', 'zmq', 'torch')]"
    names = [
        f"vla_lib.robots.{path.stem}" for path in (Path(__file__).parents[2] / "vla_lib" / "robots").glob("[a-z]*.py")
    ]
    code = f"{block}; import importlib; [importlib.import_module(n) for n in {names}]"
    subprocess.run([sys.executable, "-c", code], check=True)
