"""The guide's whole flow on a dataset: a root and parameters in; inspect, preprocess, cache, train, evaluate, a table and a report out.

    vla run-all --dataset-root ROOT --vl-model Qwen/Qwen2.5-VL-3B-Instruct --nproc-per-node 4 -p epochs 10 -p 06_evaluate.batch_size 32

Each step is its notebook, headless, in a run folder of its own; what is up to date is skipped, the first failure ends the flow.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder, read_record
from vla_lib.episodes import find_episodes
from vla_lib.workbench import runs, up_to_date
from vla_lib.workbench.flow import Flow, StepFailed
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path, read_parameters, resolve

INSPECT, PREPARE, CACHE, EVALUATE = "01_inspect_episodes", "02_detect_hz", "03_cache_vl_features", "06_evaluate"
ASYNC, DIFFUSION = "04_train_async", "05_train_diffusion"
OF_THE_FLOW = ("dataset_root", "cache_id", "checkpoint", "compare_with", "resume_run")  # steps hand these on


@dataclass(frozen=True)
class Plan:
    """What is to be done: the data, each notebook's parameters that differ from its defaults, and whether the diffusion policy is trained too."""

    root: Path
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    diffusion: bool = False

    @property
    def trainings(self) -> tuple[str, ...]:
        """The training notebooks; the first one's policy is in question, the other is compared with it."""
        return (ASYNC, DIFFUSION) if self.diffusion else (ASYNC,)

    @property
    def notebooks(self) -> tuple[str, ...]:
        """The steps in order."""
        return (INSPECT, PREPARE, CACHE, *self.trainings, EVALUATE)

    def parameters(self, notebook: str, **handed_on: Any) -> dict[str, Any]:
        """What a notebook is told."""
        return {"dataset_root": str(self.root), **self.given.get(notebook, {}), **handed_on}

    def values(self, notebook: str) -> dict[str, Any]:
        """All parameters of a notebook."""
        return resolve(notebook_path(notebook), self.parameters(notebook))


def assign(words: Mapping[str, str], notebooks: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Command-line parameters, `NAME` or `NOTEBOOK.NAME`, to the notebooks that take them, as values of their types.

    A bare NAME goes to every step that has it, which must mean the same there (have the same default). Raises UserError for an unknown or
    ambiguous name, a wrong type, and what the steps hand on among themselves.
    """
    known = {notebook: read_parameters(notebook_path(notebook)) for notebook in notebooks}
    found: dict[str, dict[str, Any]] = {}
    for word, text in words.items():
        notebook, dot, name = word.rpartition(".")
        takers = [one for one in notebooks if name in known[one] and notebook in ("", one)]
        if name in OF_THE_FLOW:
            raise UserError(f"{name} is handed from step to step; leave it out (the data are named by --dataset-root).")
        if dot and notebook not in notebooks:
            raise UserError(f"{notebook} is no step of this flow; the steps are {', '.join(notebooks)}.")
        if not takers:
            has = sorted({name for one in notebooks if notebook in ("", one) for name in known[one]} - set(OF_THE_FLOW))
            raise UserError(
                f"{notebook or 'No step'} has {'no' if dot else 'a'} parameter {name}; there are {', '.join(has)}."
            )
        if len({repr(known[one][name].default) for one in takers}) > 1:
            choices = ", ".join(f"{one}.{name}" for one in takers)
            raise UserError(f"{name} means different things in {len(takers)} steps; say which one: {choices}.")
        for one in takers:
            if name in found.setdefault(one, {}):
                raise UserError(f"Parameter {name} of {one} is given twice; give it once.")
            found[one][name] = resolve(notebook_path(one), {name: text}, text=True)[name]
    return found


def check(plan: Plan) -> None:
    """Everything that can be refused before the first step. Raises UserError with the remedy."""
    from vla_lib import build_vl_cache, preprocess, train_async, train_diffusion
    from vla_lib.features.vlm import open_checkpoint

    preprocess.Settings(**up_to_date.preprocess_settings(plan.values(PREPARE)))
    cache = plan.values(CACHE)
    build_vl_cache.Settings(**up_to_date.cache_settings(cache))
    for notebook in plan.trainings:
        door = train_async if notebook == ASYNC else train_diffusion
        door.Settings(**up_to_date.training_settings(plan.values(notebook), door.Settings))
    for notebook in (CACHE, *plan.trainings):
        if (processes := plan.values(notebook)["nproc_per_node"]) < 1:
            raise UserError(f"nproc_per_node is {processes}; give 1 or more processes.")
    open_checkpoint(cache["vl_model"])


def check_data(plan: Plan) -> None:
    """Raises UserError where the root holds no recording, holds other roots (their episodes would get other names), or another flow works on it."""
    if not plan.root.is_dir():
        raise UserError(f"There is no dataset root {plan.root}; give the folder that holds the datasets.")
    if not find_episodes(plan.root):
        raise UserError(
            f"{plan.root} holds no recorded episode (a folder with a robot log, one or two levels below a dataset folder)."
        )
    for inner in sorted(
        {path.parent for path in plan.root.glob("*/cache")}
        | {path.parent for path in plan.root.glob("*/simulation.json")}
    ):
        raise UserError(
            f"{inner} is a dataset root of its own, with its cache; give that folder, not the one above it."
        )
    for path in (*runs.find_runs("run-all"), *runs.find_runs("demo")):
        record = read_record(path)
        if record["state"] == "running" and record["parameters"].get("dataset_root") == str(plan.root):
            raise UserError(
                f"{path.name} works on {plan.root} already (process {record['pid']}); wait for it, or stop it with Ctrl-C there."
            )


def run(plan: Plan) -> int:
    """Check everything, then `carry_out`."""
    check_data(plan)
    check(plan)
    return carry_out("run-all", f"VLA workbench: {plan.root.name}", plan)


def carry_out(name: str, title: str, plan: Plan, before: Callable[[], Any] | None = None) -> int:
    """Do `before` (the demo's recording), then the steps; prints the table, the summary and the report's path.

    Returns 0, 1 where a step fails, 2 where it refuses its input, 130 where it was cancelled.
    """
    folder = RunFolder.create(name, {"dataset_root": str(plan.root), "diffusion": plan.diffusion, "given": plan.given})
    flow = Flow(folder)
    state, error, exit_status = "failed", None, 1
    try:
        if before is not None:
            start = time.monotonic()
            before()
            flow.note("recording", time.monotonic() - start)
        steps(flow, plan)
        state, exit_status = "done", 0
    except StepFailed as failure:
        state, error, exit_status = failure.result.state, str(failure), failure.result.exit_status
    except UserError as refusal:
        error, exit_status = str(refusal), 2
    except KeyboardInterrupt:
        state, error, exit_status = (
            "cancelled",
            "interrupted; the same command begins again with the step that was stopped",
            130,
        )
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:
        folder.finish(state, error)
        summary, notes = summarise(flow)
        page = flow.report(title, summary, notes)
        if error:
            print(f"\nerror: {error}", flush=True)
        if flow.steps:
            print(f"\n{_printed(flow.table())}")
        print(f"\n{_printed(summary)}\n")
        for note in notes:
            print(note)
        print(f"\nreport: {shown(page)}", flush=True)
    return exit_status


def steps(flow: Flow, plan: Plan) -> None:
    """The guide's steps, each handed what the ones before it made."""
    flow.run(INSPECT, plan.parameters(INSPECT))
    flow.run(PREPARE, plan.parameters(PREPARE))
    cache = flow.run(CACHE, plan.parameters(CACHE))["binding_id"]  # an older cache may lie beside the new one
    trained = [
        _checkpoint(notebook, plan, flow.run(notebook, plan.parameters(notebook, cache_id=cache)))
        for notebook in plan.trainings
    ]
    flow.run(
        EVALUATE,
        plan.parameters(EVALUATE, checkpoint=str(trained[0]), compare_with=[str(path) for path in trained[1:]]),
    )


def _checkpoint(notebook: str, plan: Plan, results: dict[str, Any]) -> Path:
    from vla_lib import train_async, train_diffusion

    door = train_async if notebook == ASYNC else train_diffusion
    settings = door.Settings(**up_to_date.training_settings(plan.values(notebook), door.Settings))
    newest = Path(results["checkpoint"])
    best = newest.with_name(settings.checkpoints.best)
    return best if best.exists() else newest  # without held-out episodes there is no best one


def summarise(flow: Flow) -> tuple[pd.DataFrame, list[str]]:
    """The closing table (what, value) and the lines below it, from the steps' results files."""
    results = flow.results()
    rows: list[tuple[str, str]] = []
    prepared, cached, evaluated = (results.get(name, {}) for name in (PREPARE, CACHE, EVALUATE))
    rows += [(f"rate of {name}", f"{value:.1f} Hz") for name, value in prepared.get("rates_hz", {}).items()]
    if prepared:
        rows.append(
            ("episodes prepared", f"{prepared['prepared']} of {prepared['episodes']}, {prepared['steps']} action steps")
        )
    if cached:
        rows.append(("VL feature cache", f"{cached['ticks']} ticks, {cached['bytes'] / 1e6:.0f} MB"))
    for name, kind in ((ASYNC, "async"), (DIFFUSION, "diffusion")):
        if trained := results.get(name, {}):
            rows.append(
                (
                    f"training ({kind})",
                    f"{trained['step']} optimiser steps, {trained['parameters'] / 1e6:.2f} M parameters",
                )
            )
    notes = []
    for name, found in evaluated.get("metrics", {}).items():
        rows.append(
            (
                f"held-out RMS error, {name}",
                f"{found['translation_rmse_mm']:.3f} mm, {found['rotation_rmse_deg']:.3f} deg a step",
            )
        )
    for name, found in evaluated.get("compared_with", {}).items():
        errors = f"{found['translation_rmse_mm']:.3f} mm, {found['rotation_rmse_deg']:.3f} deg a step"
        rows.append((f"held-out RMS error, {name}", errors))
    if "beats" in evaluated:
        lost_to = [name for name, won in evaluated["beats"].items() if not won]
        verdict = f"does NOT beat {', '.join(lost_to)}" if lost_to else "beats the zero, mean and persistence baselines"
        count = evaluated["held_out_episodes"]
        notes.append(
            f"On {count} held-out episode{'s' * (count != 1)} the policy {verdict} (RMS errors of translation and of rotation)."
        )
    if "successes" in evaluated:
        low, high = (100 * value for value in evaluated["interval_95"])
        told = f"{evaluated['successes']} of {evaluated['rollouts']} unseen phantoms"
        rows.append(
            (
                "closed-loop success",
                f"{told} ({100 * evaluated['success_rate']:.0f} %, 95 % interval {low:.0f} to {high:.0f} %)",
            )
        )
    rows.append(("time in all", clock(sum(step.seconds for step in flow.steps))))
    return pd.DataFrame(rows, columns=["what", "value"]), notes


def _printed(frame: pd.DataFrame) -> str:
    """A table whose text stands left."""
    widths = {name: max([len(name), *frame[name].map(len)]) for name in frame.columns}
    lines = [[name.ljust(width) for name, width in widths.items()]]
    lines += [
        [text.ljust(width) for text, width in zip(row, widths.values(), strict=True)]
        for row in frame.itertuples(index=False)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
