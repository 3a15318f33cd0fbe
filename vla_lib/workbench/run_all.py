"""The guide's whole flow on a dataset: inspect, preprocess, cache, train, evaluate, then a table and a report.

    vla run-all --dataset-root ROOT --vl-model Qwen/Qwen2.5-VL-3B-Instruct --nproc-per-node 4 -p epochs 10

Each step is its notebook, headless, in a run folder of its own; what is up to date is skipped, a failure ends it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder, read_record, read_results, write_results
from vla_lib.core.settings import Settings
from vla_lib.episodes import find_episodes
from vla_lib.episodes.prepare import PreprocessSettings
from vla_lib.features.settings import CacheSettings
from vla_lib.training.settings import AsyncSettings, DiffusionSettings
from vla_lib.workbench import pages, runs, slurm, up_to_date
from vla_lib.workbench.headless import RunResult, run_notebook
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path, read_parameters, resolve

INSPECT, PREPARE, CACHE, EVALUATE = "01_inspect_episodes", "02_detect_hz", "03_cache_vl_features", "06_evaluate"
ASYNC, DIFFUSION = "04_train_async", "05_train_diffusion"
SETTINGS: dict[str, type[Settings]] = {
    PREPARE: PreprocessSettings,
    CACHE: CacheSettings,
    ASYNC: AsyncSettings,
    DIFFUSION: DiffusionSettings,
}
HANDED_ON = ("dataset_root", "cache_id", "checkpoint", "compare_with", "resume_run")  # from step to step


@dataclass(frozen=True)
class FlowPlan:
    """What is to be done: the data, each notebook's parameters that differ from its defaults, and whether the diffusion
    policy is trained too."""

    root: Path
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    diffusion: bool = False

    @property
    def training_notebooks(self) -> tuple[str, ...]:
        """The training notebooks; the first one's policy is in question, the other is compared with it."""
        return (ASYNC, DIFFUSION) if self.diffusion else (ASYNC,)

    @property
    def notebooks(self) -> tuple[str, ...]:
        """The steps in order."""
        return (INSPECT, PREPARE, CACHE, *self.training_notebooks, EVALUATE)

    def parameters(self, notebook: str, **handed_on: Any) -> dict[str, Any]:
        """The parameters that a notebook is given."""
        return {"dataset_root": str(self.root), **self.given.get(notebook, {}), **handed_on}

    def settings(self, notebook: str) -> Any:
        """The settings of the stage that a notebook starts. Raises UserError where a value is refused."""
        values = resolve(notebook_path(notebook), self.parameters(notebook))
        if (processes := values.get("nproc_per_node", 1)) < 1:
            raise UserError(f"nproc_per_node is {processes}; give 1 or more processes.")
        return SETTINGS[notebook].of(values)

    def check(self) -> None:
        """Everything that can be refused before the first step. Raises UserError with the remedy."""
        from vla_lib.features.vlm import open_checkpoint

        stages = {notebook: self.settings(notebook) for notebook in (PREPARE, CACHE, *self.training_notebooks)}
        open_checkpoint(stages[CACHE].model)

    def check_data(self) -> None:
        """Raises UserError where the root holds no recording, holds other roots (their episodes would get other names),
        or another flow works on it."""
        root = self.root
        if not root.is_dir():
            raise UserError(f"There is no dataset root {root}; give the folder that holds the datasets.")
        if not find_episodes(root):
            which = "a folder with a robot log, or an HDF5 file"
            raise UserError(f"{root} holds no recorded episode ({which}).")
        for inner in sorted(
            path.parent for pattern in ("cache", "simulation.json") for path in root.glob(f"*/{pattern}")
        ):
            raise UserError(
                f"{inner} is a dataset root of its own, with its cache; give that folder, not the one above it."
            )
        for path in (*runs.find_runs("run-all"), *runs.find_runs("demo")):
            record = read_record(path)
            if record["state"] == "running" and record["parameters"].get("dataset_root") == str(root):
                works = f"{path.name} works on {root} already (process {record['pid']})"
                raise UserError(f"{works}; wait for it, or stop it with Ctrl-C there.")


def assign(words: Mapping[str, str], notebooks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Command-line parameters, `NAME` or `NOTEBOOK.NAME`, to the notebooks that take them, as values of their types.

    A bare NAME goes to every step that has it, which must mean the same there (have the same default). Raises UserError
    for an unknown or ambiguous name, a wrong type, and what the steps hand on among themselves.
    """
    known = {notebook: read_parameters(notebook_path(notebook)) for notebook in notebooks}
    found: dict[str, dict[str, Any]] = {}
    for word, text in words.items():
        notebook, dot, name = word.rpartition(".")
        takers = [one for one in notebooks if name in known[one] and notebook in ("", one)]
        if name in HANDED_ON:
            raise UserError(f"{name} is handed from step to step; leave it out (the data are named by --dataset-root).")
        if dot and notebook not in notebooks:
            raise UserError(f"{notebook} is no step of this flow; the steps are {', '.join(notebooks)}.")
        if not takers:
            has = sorted({name for one in notebooks if notebook in ("", one) for name in known[one]} - set(HANDED_ON))
            which = f"{notebook} has no" if dot else "No step has a"
            raise UserError(f"{which} parameter {name}; there are {', '.join(has)}.")
        if len({repr(known[one][name].default) for one in takers}) > 1:
            choices = ", ".join(f"{one}.{name}" for one in takers)
            raise UserError(f"{name} means different things in {len(takers)} steps; say which one: {choices}.")
        for one in takers:
            if name in found.setdefault(one, {}):
                raise UserError(f"Parameter {name} of {one} is given twice; give it once.")
            found[one][name] = resolve(notebook_path(one), {name: text}, text=True)[name]
    return found


class Step(NamedTuple):
    """What became of one step: `ran`, `skipped`, `failed`, `cancelled` or `lost`, why, in how long, and the run that
    holds its results."""

    name: str
    state: str
    why: str
    seconds: float
    run: Path | None = None


class StepFailed(UserError):
    """A step failed or was cancelled: the cause first, then where to look."""

    def __init__(self, notebook: str, result: RunResult):
        super().__init__(f"{result.error}\n{notebook} {result.summary}")
        self.result = result


@dataclass
class Flow:
    """The steps of a plan, done one after the other, and what became of them so far, in a run folder of its own."""

    plan: FlowPlan
    folder: RunFolder
    steps: list[Step] = field(default_factory=list)

    def run(self, notebook: str, **handed_on: Any) -> dict[str, Any]:
        """Run a notebook headless, or skip it where what it makes is up to date; returns its results.

        Raises StepFailed where it does not end as done, UserError where its inputs are refused before it starts.
        """
        start, parameters = time.monotonic(), self.plan.parameters(notebook, **handed_on)
        try:
            found = up_to_date.look(notebook, resolve(notebook_path(notebook), parameters))
        except UserError as error:
            self.add(Step(notebook, "failed", str(error), time.monotonic() - start))
            raise
        print(f"=== {notebook} {'skipped' if found.current else 'runs'}: {found.why}", flush=True)
        if found.current:
            self.add(Step(notebook, "skipped", found.why, time.monotonic() - start, found.run))
            return found.facts | (read_results(found.run) if found.run else {})
        noted: dict[str, Any] = {"flow": self.folder.path.name, **found.noted}
        if stopped := self._stopped(notebook):
            noted |= {"run_dir": stopped, "resume": True}
        result = run_notebook(notebook, parameters, **noted)
        took, state = time.monotonic() - start, "ran" if result.state == "done" else result.state
        self.add(Step(notebook, state, (result.error or found.why).splitlines()[0], took, result.path))
        print(f"=== {notebook} after {clock(took)} {result.summary}", flush=True)
        if result.state != "done":
            raise StepFailed(notebook, result)
        return found.facts | read_results(result.path)

    def _stopped(self, notebook: str) -> Path | None:
        """The run of this step that was stopped when the flow's job was requeued."""
        found = [(path, read_record(path)) for path in runs.find_runs(notebook)]
        own = [path for path, known in found if known.get("flow") == self.folder.path.name]
        return next((path for path in own if read_record(path)["state"] in ("cancelled", "lost")), None)

    def run_guide(self) -> None:
        """The guide's steps, each given what the ones before it made."""
        self.run(INSPECT)
        self.run(PREPARE)
        cache = self.run(CACHE)["binding_id"]  # an older cache may lie beside the new one
        chosen = []
        for notebook in self.plan.training_notebooks:
            newest = Path(self.run(notebook, cache_id=cache)["checkpoint"])
            best = newest.with_name(self.plan.settings(notebook).checkpoints.best)
            chosen.append(str(best if best.exists() else newest))  # without held-out episodes there is no best one
        self.run(EVALUATE, checkpoint=chosen[0], compare_with=chosen[1:])

    def add(self, step: Step) -> None:
        """Note what became of a step."""
        self.steps.append(step)
        rows = [
            {"step": s.name, "state": s.state, "why": s.why, "seconds": s.seconds, "run": s.run and s.run.name}
            for s in self.steps
        ]
        write_results(self.folder.path, {"steps": rows})

    def table(self) -> pd.DataFrame:
        """One row a step; `why` where there is something to say."""
        rows = [(s.name, s.state, clock(s.seconds), s.why) for s in self.steps]
        frame = pd.DataFrame(rows, columns=["step", "state", "time", "why"])
        return frame if any(frame["why"]) else frame.drop(columns="why")

    def report(self, title: str) -> Path:
        """Write the flow's `report.html`; returns its path."""
        page, (summary, notes) = self.folder.path / "report.html", summarise(self)
        sections = [pages.Section(s.run, s.why if s.state == "skipped" else "") for s in self.steps if s.run]
        pages.write_report(page, title, [summary, self.table()], sections, notes)
        return page


def run(name: str, title: str, plan: FlowPlan, before: Callable[[], Any] | None = None) -> int:
    """Do `before` (the demo's recording), then the guide's steps; prints the table, the summary and the report's path.

    Returns 0, 1 where a step fails, 2 where it refuses its input, 130 where it was cancelled.
    """
    folder = slurm.taken_up(name, {"dataset_root": str(plan.root), "diffusion": plan.diffusion, "given": plan.given})
    flow = Flow(plan, folder)
    state, error, exit_status = "failed", None, 1
    try:
        if before is not None:
            start = time.monotonic()
            before()
            flow.add(Step("recording", "ran", "", time.monotonic() - start))
        flow.run_guide()
        state, exit_status = "done", 0
    except StepFailed as failure:
        state, error, exit_status = failure.result.state, str(failure), failure.result.exit_status
    except UserError as refusal:
        error, exit_status = str(refusal), 2
    except KeyboardInterrupt:
        state, exit_status = "cancelled", 130
        error = "interrupted; the same command begins again with the step that was stopped"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:
        folder.finish(state, error)
        page, (summary, notes) = flow.report(title), summarise(flow)
        lines = [f"\nerror: {error}"] if error else []
        lines += [f"\n{_printed(flow.table())}"] if flow.steps else []
        lines += [f"\n{_printed(summary)}\n", *notes, f"\nreport: {shown(page)}"]
        print("\n".join(lines), flush=True)
    return exit_status


def submit(batch: slurm.Batch, name: str, root: str) -> int:
    """`vla run-all` on a cluster; what is up to date when it is requeued is skipped."""
    record = RunFolder.create(name, {"dataset_root": root})
    return slurm.submit(batch, name, record, batch.words)


def summarise(flow: Flow) -> tuple[pd.DataFrame, list[str]]:
    """The closing table (what, value) and the lines below it, from the steps' results files."""
    results = {step.name: read_results(step.run) for step in flow.steps if step.run is not None}
    prepared, cached, evaluated = (results.get(name, {}) for name in (PREPARE, CACHE, EVALUATE))
    rows = [(f"rate of {name}", f"{value:.1f} Hz") for name, value in prepared.get("rates_hz", {}).items()]
    notes = []
    if prepared:
        rows.append(("episodes prepared", "{prepared} of {episodes}, {steps} action steps".format(**prepared)))
    if cached:
        rows.append(("VL feature cache", f"{cached['ticks']} ticks, {cached['bytes'] / 1e6:.0f} MB"))
    for name, kind in ((ASYNC, "async"), (DIFFUSION, "diffusion")):
        if trained := results.get(name):
            size = f"{trained['parameters'] / 1e6:.2f} M parameters"
            rows.append((f"training ({kind})", f"{trained['step']} optimiser steps, {size}"))
    for name, found in (evaluated.get("metrics", {}) | evaluated.get("compared_with", {})).items():
        errors = f"{found['translation_rmse_mm']:.3f} mm, {found['rotation_rmse_deg']:.3f} deg a step"
        rows.append((f"held-out RMS error, {name}", errors))
    if "beats" in evaluated:
        held, errors, said = evaluated["held_out_episodes"], evaluated["metrics"], []
        for key in ("translation_rmse_mm", "rotation_rmse_deg"):
            lost_to = [name for name in evaluated["beats"] if errors["policy"][key] >= errors[name][key]]
            verdict = f"does NOT beat {', '.join(lost_to)}" if lost_to else "beats all baselines"
            said.append(f"{verdict} in {key.partition('_')[0]}")
        notes.append(f"On {held} held-out episode{'s' * (held != 1)} the policy {' and '.join(said)} (RMS of a step).")
    if "successes" in evaluated:
        success, low, high = (100 * value for value in (evaluated["success_rate"], *evaluated["interval_95"]))
        share = f"{success:.0f} %, 95 % interval {low:.0f} to {high:.0f} %"
        count = f"{evaluated['successes']} of {evaluated['rollouts']} unseen phantoms"
        rows.append(("closed-loop success", f"{count} ({share})"))
    rows.append(("time in all", clock(sum(step.seconds for step in flow.steps))))
    return pd.DataFrame(rows, columns=["what", "value"]), notes


def _printed(frame: pd.DataFrame) -> str:
    """A table whose text is left-aligned."""
    rows = [list(frame.columns), *frame.itertuples(index=False)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ((f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)
