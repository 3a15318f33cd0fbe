"""What is where on a lab's rig, read from one YAML file, `robot.yaml`; units are in the names.

    instruction: Perform Needle insertion task
    arm: {address: 192.168.0.100, trf: [0, 0, 120, 0, 0, 0]}
    cameras:
      View1_left: {source: zmq}
      View5: {source: depthai}
    sensor: {port: 9999}
    limits: {workspace_mm: [[150, 200], [-25, 25], [126, 170]], speed_mm_s: 5, force_mN: 100}

Unknown keys, values in other units and limits that cannot hold are refused with a sentence.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from annotated_types import Ge, Gt, Le
from pydantic import TypeAdapter, ValidationError

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, settings
from vla_lib.robots.kinematics import REACH_MM, SHOULDER_MM
from vla_lib.runtime.safety import SafetyLimits

Port = Annotated[int, Ge(0), Le(65535)]
Frame = tuple[float, float, float, float, float, float]
ZERO: Frame = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
VIEW_KEY = re.compile(r"View[1-4]_(left|right)|View5")
S = TypeVar("S", bound=Settings)

# (least, greatest) that a limit of this arm at this task may be. Guesses with wide margins: they catch other units.
PLAUSIBLE = {
    "speed_mm_s": (0.05, 100.0),
    "turn_deg_s": (0.5, 180.0),
    "force_mN": (1.0, 5000.0),
    "retreat_mm": (0.5, 100.0),
    "retreat_speed_mm_s": (0.5, 50.0),
    "follow_mm": (0.05, 20.0),
    "follow_deg": (0.1, 45.0),
    "vl_age_s": (0.1, 10.0),
    "picture_age_s": (0.05, 5.0),
    "sensor_age_s": (0.01, 1.0),
    "state_age_s": (0.02, 1.0),
    "ahead_s": (0.005, 0.2),
    "hold_s": (0.1, 5.0),
    "watchdog_s": (0.1, 2.0),
}
LEAST_SIDE_MM, GREATEST_MM = 2.0, 1000.0  # of the workspace box: below, it looks like metres


class FileSettings(Settings):
    """Settings of a file: a refused value is named as the file writes it."""

    written = staticmethod(str)


@settings
class ArmSettings(FileSettings):
    """The arm, or the host that publishes its state."""

    address: str  # IP address of the arm (ADDRESS:PORT elsewhere); of a state stream HOST:PORT
    source: Literal["meca500", "state stream"] = "meca500"
    wrf: Frame = ZERO  # world frame of the recordings, from the base: mm, degrees
    trf: Frame = ZERO  # the tool's tip, from the flange: mm, degrees
    joint_margin_deg: Annotated[float, Gt(0), Le(30)] = 2.0  # how near to a joint's limit the policy may go
    singularity_deg: Annotated[float, Gt(0), Le(30)] = 3.0  # how near to a stretched elbow or wrist (a guess)
    shoulder_mm: Annotated[float, Gt(0), Le(100)] = 10.0  # how near the wrist may come to the first axis (a guess)

    def __post_init__(self) -> None:
        if max(map(abs, self.wrf[:3] + self.trf[:3])) > GREATEST_MM:
            raise UserError(f"arm.wrf {self.wrf} or arm.trf {self.trf} lies over a metre away; give mm.")


@settings
class CameraSettings(FileSettings):
    """One view's camera."""

    source: Literal["zmq", "depthai", "opencv"]
    # zmq: as its host names it, default by the lab's serials; depthai: id or address; opencv: number, device or file
    name: str = ""
    width: Annotated[int, Gt(0)] = 1280
    height: Annotated[int, Gt(0)] = 720
    hz: Annotated[float, Gt(0), Le(120)] = 5.0


@settings
class SensorSettings(FileSettings):
    """Where the sensor's datagrams come in."""

    port: Port = 9999
    host: str = "0.0.0.0"


@settings
class RobotSettings(FileSettings):
    """A lab's rig. `limits` holds the values of SafetyLimits."""

    instruction: str  # the task in the words of the training data
    arm: ArmSettings
    cameras: dict[str, CameraSettings]  # view key, as prepared episodes name it -> its camera
    limits: dict[str, Any]
    sensor: SensorSettings | None = None
    zmq_port: Port = 5555

    @classmethod
    def load(cls, path: str | Path) -> "RobotSettings":
        """Read a file. Raises UserError that names file and key."""
        path = Path(path).expanduser()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no robot file {path}; docs/INFERENCE_GUIDE.md shows one.") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it.") from None
        try:
            return cls.of_mapping(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def of_mapping(cls, content: Any) -> "RobotSettings":
        """From what YAML gave. Raises UserError."""
        top = _mapping(content, "The file")
        _known(top, [field.name for field in fields(cls)], "")
        given = dict(top)
        given["arm"] = _section(ArmSettings, top.get("arm"), "arm")
        cameras = _mapping(top.get("cameras"), "cameras")
        if not cameras:
            raise UserError("cameras is empty; name the views that the policy was trained on.")
        if strange := [str(view) for view in cameras if not VIEW_KEY.fullmatch(str(view))]:
            raise UserError(f"cameras.{strange[0]} is no view of prepared episodes; those are View1_left to View5.")
        given["cameras"] = {str(v): _section(CameraSettings, one, f"cameras.{v}") for v, one in cameras.items()}
        if top.get("sensor") is not None:
            given["sensor"] = _section(SensorSettings, top["sensor"], "sensor")
        given["limits"] = dict(_mapping(top.get("limits"), "limits"))
        made = cls(**given)
        made.safety()
        return made

    def safety(self, **defaults: Any) -> SafetyLimits:
        """The limits of a run; `defaults` hold where the file says nothing. Raises UserError."""
        names = {field.name: field for field in fields(SafetyLimits)}
        _known(self.limits, list(names), "limits.")
        given = {"sensor_required": self.sensor is not None} | defaults | self.limits
        if missing := [n for n, one in names.items() if one.default is MISSING and n not in given]:
            raise UserError(f"limits.{missing[0]} is missing; give it.")
        try:
            limits = TypeAdapter(SafetyLimits).validate_python(given)
        except ValidationError as error:
            one = error.errors()[0]
            raise UserError(f"limits.{one['loc'][0]} is {one['input']!r}; {one['msg'].lower()}.") from None
        for name, (least, most) in PLAUSIBLE.items():
            if not least <= getattr(limits, name) <= most:
                unit = name.rsplit("_", 1)[-1] if not name.endswith("_s") or name.count("_") == 1 else name
                raise UserError(
                    f"limits.{name} is {getattr(limits, name):g}; between {least:g} and {most:g} is possible here: is "
                    f"it in another unit than the name says ({unit})?"
                )
        self._check_box(limits)
        return limits

    def _check_box(self, limits: SafetyLimits) -> None:
        box = np.array(limits.workspace_mm)
        if (sides := np.ptp(box, axis=1)).min() < LEAST_SIDE_MM or np.abs(box).max() > GREATEST_MM:
            raise UserError(
                f"limits.workspace_mm has sides of {', '.join(f'{side:g}' for side in sides)} and reaches "
                f"{np.abs(box).max():g} from the base; it is in mm (metres look like this)."
            )
        if limits.follow_mm < 0.1 * limits.speed_mm_s:
            raise UserError(
                f"limits.follow_mm is {limits.follow_mm:g}, less than a tenth of a second's way at speed_mm_s "
                f"{limits.speed_mm_s:g}: every arm lags that much; raise it or go slower."
            )
        if self.arm.source != "meca500" or any(self.arm.wrf):
            return
        nearest = np.clip(SHOULDER_MM, box[:, 0], box[:, 1])
        reach = REACH_MM + float(np.linalg.norm(self.arm.trf[:3]))
        if (away := float(np.linalg.norm(nearest - SHOULDER_MM))) > reach:
            raise UserError(
                f"limits.workspace_mm begins {away:.0f} mm from the shoulder, and the tool reaches {reach:.0f} mm: is "
                "it in the base frame?"
            )


def _section(kind: type[S], content: Any, where: str) -> S:
    values = _mapping(content, where)
    _known(values, [field.name for field in fields(kind)], f"{where}.")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must hold keys and values, but it is {content!r}.")
    return content


def _known(values: Mapping[str, Any], names: list[str], where: str) -> None:
    for name in map(str, values):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.6)
            remedy = f"is {where}{near[0]} meant?" if near else f"there are {', '.join(names)}."
            raise UserError(f"{where}{name} is no setting; {remedy}")
