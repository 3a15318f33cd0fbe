"""Deployment on a lab's rig, stage by stage: each opens only when the one before has passed in this session.

    session = Deployment(DeploySettings(robot, checkpoint, operator="Kim"))
    session.look(5.0); session.preflight(); session.tick(PERSON); session.start("dry run") ...

Stages of motion run in a process of their own (`LoopProcess`), and each is recorded as a raw episode. A process that
dies leaves the arm standing: its velocity time-out is one and a half action periods.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import runs_root
from vla_lib.core.settings import Settings, settings
from vla_lib.evaluation.closed_loop import read_judged
from vla_lib.evaluation.preflight import PERSON, Check, Seen, as_record, dry_checks, look, rig_checks
from vla_lib.evaluation.rehearsal import Hooks, LoopProcess, Pilot
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import Recording, enter
from vla_lib.robots.settings import RobotSettings
from vla_lib.runtime import safety
from vla_lib.runtime.robot_io import DryRunIO
from vla_lib.runtime.runner import Runner
from vla_lib.runtime.safety import SafetyLimits

Stage = Literal["look", "preflight", "dry run", "first motion", "task"]
STAGES: tuple[Stage, ...] = ("look", "preflight", "dry run", "first motion", "task")
Seconds = Annotated[float, Gt(0)]
# ends of a run with which a stage has passed; a task is over when a person says so
PASSED = ("time limit", safety.OPERATOR)


@settings
class DeploySettings(Settings):
    """Drive a lab's rig with a checkpoint, in stages: look, preflight, dry run, first motion, task."""

    robot: Path  # the rig's robot.yaml
    checkpoint: Path  # the policy; how it was judged lies beside it and holds by default
    operator: str = ""  # who stands by the arm; kept in the record
    until: Stage = "task"  # the last stage of this session
    ticked: tuple[str, ...] = ()  # what the operator has checked by hand, by name; default: asked for on the terminal
    execution: Literal["as judged", "first action", "chunk of n"] = "as judged"
    chunk_steps: Annotated[int, Gt(0)] = 4  # actions of a chunk that `chunk of n` follows
    look_s: Seconds = 5.0  # how long to look before the preflight
    dry_s: Seconds = 60.0  # the preflight's dry run of the whole loop
    first_motion_s: Seconds = 5.0  # length of the first motion, in air
    first_motion_mm_s: Seconds = 1.0  # its greatest speed
    max_time_s: Seconds = 30.0  # longest task
    hold_to_run: bool = False  # the arm moves only while the space bar or a gamepad's button is held (notebook 08)
    device: str = "cpu"  # cpu or cuda
    rollouts_root: Path | None = None  # where rollouts are recorded; default: runs/rollouts
    dataset: str = "rollouts"  # the dataset of the tasks' rollouts

    def __post_init__(self) -> None:
        if not self.checkpoint.is_file():
            raise UserError(f"There is no checkpoint {self.checkpoint}; give the path of its .pt file.")
        if strange := set(self.ticked) - set(PERSON):
            raise UserError(f"There is nothing called {min(strange)} to tick; there are {', '.join(PERSON)}.")

    @property
    def root(self) -> Path:
        """Where rollouts are recorded."""
        return self.rollouts_root or runs_root() / "rollouts"

    def rollout(self) -> RolloutSettings:
        """How the policy is executed: as it was judged, unless said otherwise."""
        judged = read_judged(self.checkpoint)
        how: dict[str, Any] = {"execution": self.execution, "chunk_steps": self.chunk_steps}
        if self.execution == "as judged":
            how = {name: judged[name] for name in ("execution", "chunk_steps", "ddim_steps") if name in judged}
        return RolloutSettings(self.checkpoint, device=self.device, **how)

    def limits(self, robot: RobotSettings, stage: Stage) -> SafetyLimits:
        """robot.yaml's; of the features' age, where it says nothing, the evaluation's; the first motion is slow."""
        judged = read_judged(self.checkpoint).get("limits", {})
        limits = robot.safety(**({"vl_age_s": judged["vl_age_s"]} if "vl_age_s" in judged else {}))
        if stage != "first motion":
            return limits
        return replace(limits, speed_mm_s=min(limits.speed_mm_s, self.first_motion_mm_s))


class Deployment:
    """One session at one rig. `passed`: what has passed, in order; `ticked`: what was checked by hand -> by whom."""

    def __init__(self, settings: DeploySettings):
        self.settings, self.robot = settings, RobotSettings.load(settings.robot)
        self.passed: list[Stage] = []
        self.ticked: dict[str, str] = {}
        self.checks: list[Check] = []
        self.seen: Seen | None = None
        self.last: dict[str, Any] | None = None
        """The record of the newest stage that ran in a process."""

    def need(self, stage: Stage) -> None:
        """Raises UserError where a stage is not open yet."""
        for before in STAGES[: STAGES.index(stage)]:
            if before not in self.passed:
                raise UserError(f"The stage {stage} opens when {before} has passed in this session; run that first.")
        if STAGES.index(stage) >= STAGES.index("dry run") and (
            left := [name for name in PERSON if name not in self.ticked]
        ):
            raise UserError(f"The stage {stage} opens when a person has ticked: {', '.join(left)}.")

    def end(self, stage: Stage, record: dict[str, Any]) -> bool:
        """Take a stage's result; returns whether it has passed. A stage that fails closes those behind it."""
        self.passed = [one for one in self.passed if STAGES.index(one) < STAGES.index(stage)]
        if stage == "look":
            self.seen, ok = record["seen"], True
        elif stage == "preflight":
            self.checks = record["checks"]
            ok = all(check.passed is not False for check in self.checks)
        else:
            ok = record["log"].ended in PASSED
        if ok:
            self.passed.append(stage)
        return ok

    def tick(self, names: Iterable[str], by: str) -> None:
        """A person has checked these lines of PERSON. Raises UserError for an unknown line, and without a name."""
        if not by.strip():
            raise UserError("Who checked it? Give the operator's name.")
        for name in names:
            if name not in PERSON:
                raise UserError(f"There is nothing called {name} to tick; there are {', '.join(PERSON)}.")
            self.ticked[name] = by.strip()

    def start(self, stage: Stage) -> LoopProcess:
        """Start a stage in a process of its own; give its `result` to `end`. Raises UserError where it is not open."""
        self.need(stage)
        if stage == "look":
            raise UserError("Looking needs no process; call look(robot, seconds).")
        return LoopProcess(run_stage, self.settings, stage, as_record(self.checks, self.ticked))


def run_stage(hooks: Hooks, given: DeploySettings, stage: Stage, preflight: dict[str, Any]) -> dict[str, Any]:
    """A stage in the process of its control loop: `log`; of the preflight `checks`, of others `folder`."""
    settings, dry = RobotSettings.load(given.robot), stage == "dry run"
    limits = given.limits(settings, stage)
    with LabRobot(settings) as robot, Pilot(given.rollout()) as pilot:
        seen = look(robot, given.look_s if stage == "preflight" else 0.5)
        pilot.warm_up(seen.newest)
        if stage == "preflight":
            checks = rig_checks(robot, seen, pilot, limits)
            log = pilot.run(DryRunIO(robot), limits, given.dry_s, hooks.watch, hooks.started)
            return {"log": log, "checks": checks + dry_checks(log, pilot)}
        dataset = given.dataset if stage == "task" else f"{given.dataset}_{stage.replace(' ', '_')}"
        about = {"kind": stage, "operator": given.operator, "checkpoint": given.checkpoint, "preflight": preflight}
        about |= {"limits": vars(limits), "execution": given.rollout().record(), "instruction": settings.instruction}
        max_s = {"dry run": given.dry_s, "first motion": given.first_motion_s}.get(stage, given.max_time_s)

        def watch(tick: Any, observation: Any) -> None:
            recording.watch(tick, observation)
            hooks.watch(tick, observation)

        def started(runner: Runner) -> None:
            hooks.started(runner)
            if not dry:
                robot.begin(pilot.settings.period_s)

        with Recording(given.root / dataset, robot, about) as recording:
            try:
                held = hooks.held if given.hold_to_run and not dry else None
                log = pilot.run(DryRunIO(robot) if dry else robot, limits, max_s, watch, started, held=held)
            finally:
                if not dry:
                    with contextlib.suppress(Exception):  # it has been stopped already, by the runner
                        robot.stop("end")
            lost = ""
            try:
                recording.close(log)
            except UserError as error:  # the run is over and safe; its record is told to be incomplete
                lost = str(error)
    row = enter(given.root, given.dataset, settings.instruction) if stage == "task" else ""
    return {"log": log, "folder": recording.folder, "notes": [note for note in (lost, row) if note]}
