"""`vla`: runs notebooks headless, one or many; the lab book of runs, the whole flow, the demo, JupyterLab, a look at
the machine."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from vla_lib.core.errors import UserError
from vla_lib.core.frontdoor import EXIT_BAD_INPUT
from vla_lib.core.run_folder import PROJECT, runs_root
from vla_lib.episodes.lerobot_export import ExportSettings
from vla_lib.episodes.lerobot_import import ImportSettings
from vla_lib.workbench import commands, doctor, slurm
from vla_lib.workbench.parameters import describe, notebook_path

EXIT_CANCELLED = 130
FRONT_DOORS = """front doors, each with --help, and each under torchrun where it trains or caches:
  python -m vla_lib.preprocess, build_vl_cache, train_async, train_diffusion, evaluate, deploy; python -m needle_rig"""

Notebook = Annotated[Positional[str], arg(metavar="NOTEBOOK", help="path or name, e.g. 04_train_async")]
AtATime = Annotated[int, arg(help="runs at a time; 0: as many as there are GPUs for, one on a CPU")]
GpusPerRun = Annotated[int, arg(help="GPUs of each run; 0: one a process (nproc_per_node)")]
Model = Annotated[str, arg(help="VL model: hub name, folder, or tiny (random weights)")]
Processes = Annotated[int, arg(help="processes of torchrun")]
OnSlurm = Annotated[slurm.Batch, OmitArgPrefixes]
HERE = slurm.Batch()
Pairs = Annotated[
    tuple[tuple[str, str], ...],
    arg(name="parameter", aliases=("-p",), metavar="NAME VALUE", help="a parameter of the notebook"),
    UseAppendAction,
]


# The heavy modules are imported where a command needs them: `--help` comes at once.
def run(
    notebook: Notebook,
    parameters: Pairs = (),
    run_dir: Path | None = None,
    resume: FlagCreatePairsOff[bool] = False,
    batch: OnSlurm = HERE,
) -> int:
    """Run a notebook headless into a run folder; `vla run NOTEBOOK --help` lists its parameters.

    Args:
        run_dir: this run folder instead of a new one below runs/.
        resume: go on with the run that --run-dir holds, a training from its checkpoint.
    """
    from vla_lib.workbench import headless

    if batch.submits:
        return headless.submit(batch, notebook, once(parameters), run_dir)
    return headless.run_and_print(notebook, once(parameters), text=True, run_dir=run_dir, resume=resume)


def sweep(
    notebook: Notebook,
    grid: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE,VALUE ...", help="every combination of these")] = (),
    search: Annotated[tuple[str, ...], arg(metavar="NAME=LOW..HIGH[:log] ...", help="values that Optuna draws")] = (),
    trials: int = 0,
    seeds: int = 1,
    prune: FlagCreatePairsOff[bool] = False,
    objective: str = "val_action_loss",
    maximize: FlagCreatePairsOff[bool] = False,
    parameters: Pairs = (),
    parallel: AtATime = 0,
    gpus_per_run: GpusPerRun = 0,
    batch: OnSlurm = HERE,
) -> int:
    """Run a notebook with many settings. The same command goes on with a sweep that was stopped or had failures, and
    joins one that runs, from any machine that sees the runs folder.

    Args:
        trials: settings in all, of a search.
        seeds: repetitions of each setting, each with a seed of its own.
        prune: stop runs whose held-out error is above the median of the runs before them.
        objective: the result to make small.
        maximize: make it large instead.
    """
    from vla_lib.workbench import sweeps, worker

    how = {"objective": objective, "maximize": maximize, "prune": prune}
    plan = sweeps.plan_sweep(notebook, grid, once(parameters), search, trials, seeds, **how)
    if batch.submits:
        return worker.submit(batch, plan, parallel)
    return worker.run(plan, parallel, gpus_per_run)


def night(
    jobs: Annotated[Positional[Path], arg(metavar="JOBS", help="the YAML file")],
    parallel: AtATime = 0,
    gpus_per_run: GpusPerRun = 0,
    batch: OnSlurm = HERE,
) -> int:
    """Run a YAML list of notebooks: - {name: wide, notebook: 04_train_async, parameters: {lr: 1e-4}}"""
    from vla_lib.workbench import sweeps, worker

    plan = sweeps.Plan("night", sweeps.read_list(jobs))
    if batch.submits:
        return worker.submit(batch, plan, parallel)
    return worker.run(plan, parallel, gpus_per_run)


def run_all(
    dataset_root: Path,
    diffusion: FlagCreatePairsOff[bool] = False,
    vl_model: Model = "",
    nproc_per_node: Processes = 1,
    parameters: Pairs = (),
    batch: OnSlurm = HERE,
) -> int:
    """The guide's whole flow on a dataset (inspect, preprocess, cache, train, evaluate); what is up to date is skipped.

    -p NAME VALUE goes to every step with that parameter, -p NOTEBOOK.NAME VALUE to one step.

    Args:
        dataset_root: folder of the datasets.
        diffusion: train the diffusion policy too, and compare it with the async one.
    """
    from vla_lib.workbench import run_all as flow

    plan = flow.FlowPlan(dataset_root.expanduser().resolve(), diffusion=diffusion)
    own, given = {"vl_model": _model(vl_model), "nproc_per_node": str(nproc_per_node)}, once(parameters)
    if twice := own.keys() & given.keys():
        raise UserError(f"{min(twice)} has a flag of its own; say --{min(twice).replace('_', '-')}.")
    plan = replace(plan, given=flow.assign(own | given, plan.notebooks))
    plan.check_data()
    plan.check()
    if batch.submits:
        return flow.submit(batch, "run-all", str(plan.root))
    return flow.run("run-all", f"VLA workbench: {plan.root.name}", plan)


def demo(size: Literal["demo", "small"] = "demo", vl_model: Model = "tiny", nproc_per_node: Processes = 2) -> int:
    """Record a dataset on the simulated rig, then the whole flow on it.

    Args:
        size: demo: 240 episodes, about 13 minutes on 2 cores; small: a few seconds-long ones, as the tests use.
    """
    from vla_lib.workbench import demo

    return demo.run(_model(vl_model), nproc_per_node, size)


def export(settings: Annotated[ExportSettings, arg(name="")]) -> int:
    """Write the prepared episodes below a root as a LeRobot dataset (v3.0)."""
    from vla_lib.episodes import lerobot_export

    done = lerobot_export.export(settings)
    print("left out:", *done["left_out"], sep="\n  ") if done["left_out"] else None
    print(f"{done['status']}: {done['episodes']} LeRobot episodes, {done['frames']} frames in {settings.out}")
    return 0


def import_(settings: Annotated[ImportSettings, arg(name="")]) -> int:
    """Bring a LeRobot dataset (v3.0) in below a root, and prepare it."""
    from vla_lib import preprocess
    from vla_lib.episodes import PreprocessSettings, lerobot_import

    done = lerobot_import.bring_in(settings)
    print(f"The states are away from the declared actions by {done['residual']}")
    print(*(f"{camera} is View{number}" for camera, (number, _) in done["views"].items()), sep="\n")
    print(*(f"left out: {text}" for text in done["left_out"]), sep="\n")
    preprocess.main(PreprocessSettings(settings.dataset_root, (done["folder"],), settings.action_hz))
    return 0


def record(
    robot: Path = Path("robot.yaml"),
    dataset_root: Path = PROJECT / "runs" / "recordings",
    dataset: str = "recordings",
    seconds: float = 0.0,
    by: str = "",
) -> int:
    """Record a raw episode of a lab's rig while a person moves the arm.

    Args:
        robot: the file that says what is where.
        dataset_root: where the dataset lies.
        dataset: name of the dataset, a folder.
        seconds: how long; 0: until Ctrl-C.
        by: who judges it.
    """
    from vla_lib.workbench import record

    record.record(robot, dataset_root, dataset, seconds, by)
    return 0


COMMANDS: tuple[Callable[..., int], ...] = (
    run,
    sweep,
    night,
    commands.rerun,
    record,
    doctor.doctor,
    commands.cache,
    run_all,
    demo,
    export,
    import_,
    commands.lab,
)
ACTIONS: tuple[Callable[..., int], ...] = (commands.ls, commands.show, commands.stop, commands.rm)


def parse(words: Sequence[str]) -> "functools.partial[int]":
    """The command that the words ask for, to be called. Exits with status 2 on words that none takes, 0 after
    --help."""
    app, runs = SubcommandApp(), SubcommandApp()
    for command in COMMANDS:
        app.command(name=command.__name__.strip("_").replace("_", "-"))(_later(command))
    for action in ACTIONS:
        runs.command(is_default=action is commands.ls)(_later(action))
    app.command(runs, name="runs", help="The lab book: list runs (also without ACTION), show, stop, remove.")
    try:
        return app.cli(prog="vla", description=f"{__doc__}\n\n{FRONT_DOORS}", args=words)
    except SystemExit as end:
        notebooks = [word for word in words[1:2] if not word.startswith("-")]
        if end.code == 0 and words[0] in ("run", "sweep") and notebooks:
            print(describe(notebook_path(notebooks[0])))
        raise


def main(words: list[str] | None = None) -> None:
    """Parse the command line and run one command. Exit status: 0 done, 1 failed, 2 bad input, 130 cancelled."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.environ.get("VLA_RUNS"):  # kernels and jobs, which work in other folders, mean the same one
        os.environ["VLA_RUNS"] = str(runs_root())
    try:
        words = sys.argv[1:] if words is None else words
        command = parse(words)
        if batch := command.keywords.get("batch"):  # what is submitted are these words
            command = functools.partial(command, batch=replace(batch, words=tuple(words)))
        raise SystemExit(command())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CANCELLED) from None
    except BrokenPipeError:  # `vla runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def once(pairs: Pairs) -> dict[str, str]:
    """-p NAME VALUE pairs by name. Raises UserError where one is given twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Parameter {name} is given twice; give it once.")
    return dict(pairs)


def _later(command: Callable[..., int]) -> Callable[..., Any]:
    """The command as tyro sees it: called while parsing, it only keeps its words, so that its errors are not taken for
    bad words."""

    @functools.wraps(command)
    def keep(*words: Any, **flags: Any) -> "functools.partial[int]":
        return functools.partial(command, *words, **flags)

    return keep


def _model(name: str) -> str:
    folder = Path(name or "-").expanduser()
    return str(folder.resolve()) if folder.is_dir() else name  # notebooks run in a folder of their own


if __name__ == "__main__":
    main()
