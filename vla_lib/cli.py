"""`vla`: runs notebooks headless, one or many; the lab book of runs, the whole flow, the demo, JupyterLab, a look at the machine; lists the front doors."""

import argparse
import ast
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.core.frontdoor import EXIT_BAD_INPUT
from vla_lib.core.run_folder import PROJECT, runs_root

EXIT_CANCELLED = 130
FRONT_DOORS = ("preprocess", "build_vl_cache", "train_async", "train_diffusion", "evaluate")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one command. Exit status: 0 done, 1 failed, 2 bad input, 130 cancelled."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _cancelled)
    if os.environ.get("VLA_RUNS"):  # kernels and jobs, which work in other folders, mean the same one
        os.environ["VLA_RUNS"] = str(runs_root())
    try:
        raise SystemExit(arguments.command(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CANCELLED) from None
    except BrokenPipeError:  # `vla runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _cancelled(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vla",
        description=__doc__,
        epilog="front doors, each with --help and each under torchrun where it trains or caches:\n" + _front_doors(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    parameters = argparse.ArgumentParser(add_help=False)
    parameters.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter (repeatable)",
    )
    notebook = argparse.ArgumentParser(add_help=False, parents=[parameters])
    notebook.add_argument("notebook", help="path or name, e.g. 04_train_async")
    run = commands.add_parser("run", parents=[notebook], help="run a notebook headless into a run folder")
    run.add_argument("--run-dir", type=Path, default=None, help="this run folder instead of a new one below runs/")
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep", parents=[notebook], help="run a notebook with every combination of some parameters' values"
    )
    sweep.add_argument("--grid", nargs="+", required=True, metavar="NAME=VALUE,VALUE", help="values of a parameter")
    sweep.add_argument("--parallel", type=int, default=1, help="runs at a time (default: %(default)s)")
    sweep.set_defaults(command=_sweep)

    night = commands.add_parser(
        "night", help="run a YAML list of notebooks: - {name: wide, notebook: 04_train_async, parameters: {lr: 1e-4}}"
    )
    night.add_argument("jobs", type=Path, help="the YAML file")
    night.add_argument("--parallel", type=int, default=1, help="runs at a time (default: %(default)s)")
    night.set_defaults(command=_night)

    _add_runs(commands)
    rerun = commands.add_parser("rerun", help="repeat a run of a notebook, saying what has changed since")
    rerun.add_argument("run", help="name of the run, or its beginning or end")
    rerun.set_defaults(command=_rerun)
    doctor = commands.add_parser("doctor", help="look at the machine, and say what to do")
    doctor.set_defaults(command=_doctor)

    cache = commands.add_parser("cache", help="list, verify or remove VL feature caches")
    cache.add_argument("action", choices=["ls", "verify", "rm"])
    cache.add_argument("binding", nargs="?", default="", help="the cache's id (verify: all without it)")
    cache.add_argument("--dataset-root", type=Path, default=PROJECT / "runs" / "demo-data")
    cache.set_defaults(command=_cache)

    _add_flows(commands, parameters)
    lab = commands.add_parser("lab", help="open JupyterLab on the notebooks")
    lab.add_argument("--port", type=int, default=8888)
    lab.add_argument("--no-browser", action="store_true", help="do not open a browser (a remote machine)")
    lab.set_defaults(command=_lab)
    return parser


def _add_flows(commands: argparse._SubParsersAction, parameters: argparse.ArgumentParser) -> None:
    run_all = commands.add_parser(
        "run-all",
        parents=[parameters],
        help="the guide's whole flow on a dataset (inspect, preprocess, cache, train, evaluate); what is up to date is skipped",
        description="-p NAME VALUE goes to every step with that parameter, -p NOTEBOOK.NAME VALUE to one step.",
    )
    run_all.add_argument("--dataset-root", type=Path, required=True, help="folder of the datasets")
    run_all.add_argument(
        "--diffusion", action="store_true", help="train the diffusion policy too, and compare it with the async one"
    )
    run_all.set_defaults(command=_run_all)
    demo = commands.add_parser("demo", help="record a dataset on the simulated rig, then the whole flow on it")
    help_text = "demo: 144 episodes, about 10 minutes; small: a few seconds-long episodes, as the tests use"
    demo.add_argument("--size", choices=["demo", "small"], default="demo", help=help_text)
    demo.set_defaults(command=_demo)
    for flow, processes in ((run_all, 1), (demo, 2)):
        flow.add_argument(
            "--vl-model", default="tiny", help="VL model: hub name, folder, or tiny (default: %(default)s)"
        )
        flow.add_argument(
            "--nproc-per-node", type=int, default=processes, help="processes of torchrun (default: %(default)s)"
        )


def _add_runs(commands: argparse._SubParsersAction) -> None:
    runs = commands.add_parser("runs", help="the lab book: list runs, show, compare, open or remove them")
    runs.set_defaults(command=_runs, action="ls", name="", state="", sort="")
    actions = runs.add_subparsers(dest="action", metavar="ACTION")
    ls = actions.add_parser("ls", help="list the runs, newest last (also without ACTION)")
    ls.add_argument("name", nargs="?", default="", help="only runs of this notebook, e.g. 04_train_async")
    ls.add_argument(
        "--state",
        default="",
        choices=["running", "done", "failed", "cancelled", "lost"],
        help="only runs in this state",
    )
    ls.add_argument("--sort", default="", help="sort by this column of the table")
    for action, runs_of, told in (
        ("show", 1, "what is known of a run"),
        ("diff", 2, "in what two runs differ"),
        ("open", 1, "a run's page"),
    ):
        one = actions.add_parser(action, help=told)
        one.add_argument("runs", nargs=runs_of, metavar="RUN", help="name of the run, or its beginning or end")
    rm = actions.add_parser("rm", help="remove run folders, checkpoints included")
    rm.add_argument("runs", nargs="+", metavar="RUN")
    rm.add_argument("--yes", action="store_true", help="really")


def _front_doors() -> str:
    lines = []
    for name in FRONT_DOORS:
        path = Path(__file__).with_name(f"{name}.py")
        if path.exists():
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
            lines.append(f"  python -m vla_lib.{name:<16} {summary}")
    return "\n".join(lines)


def _run(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench.headless import run_notebook

    result = run_notebook(arguments.notebook, _parameters(arguments), text=True, run_dir=arguments.run_dir)
    if result.error:
        print(f"error: {result.error}", file=sys.stderr)
    print(result.told)
    return result.exit_status


def _parameters(arguments: argparse.Namespace) -> dict[str, str]:
    names = [name for name, _ in arguments.parameters]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Parameter {name} is given twice; give it once.")
    return dict(arguments.parameters)


def _sweep(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import queue

    return queue.run(
        "sweep", queue.grid(arguments.notebook, arguments.grid, _parameters(arguments)), arguments.parallel
    )


def _night(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import queue

    return queue.run("night", queue.read_list(arguments.jobs), arguments.parallel)


def _rerun(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import run_commands

    return run_commands.rerun(arguments.run)


def _doctor(_arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import doctor

    return doctor.run()


def _runs(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import run_commands

    if arguments.action in (None, "ls"):
        return run_commands.ls(arguments.name, arguments.state, arguments.sort)
    if arguments.action == "rm":
        return run_commands.rm(arguments.runs, arguments.yes)
    return {"show": run_commands.show, "diff": run_commands.diff, "open": run_commands.open_page}[arguments.action](
        *arguments.runs
    )


def _cache(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import cache_commands

    return cache_commands.run(arguments.action, arguments.dataset_root, arguments.binding)


def _run_all(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import run_all

    plan = run_all.Plan(arguments.dataset_root.expanduser().resolve(), diffusion=arguments.diffusion)
    words = {"vl_model": _model(arguments), "nproc_per_node": str(arguments.nproc_per_node)}
    given = _parameters(arguments)
    if twice := words.keys() & given.keys():
        raise UserError(f"{min(twice)} has a flag of its own; say --{min(twice).replace('_', '-')}.")
    return run_all.run(replace(plan, given=run_all.assign(words | given, plan.notebooks)))


def _demo(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import demo

    return demo.run(_model(arguments), arguments.nproc_per_node, arguments.size)


def _model(arguments: argparse.Namespace) -> str:
    folder = Path(arguments.vl_model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else arguments.vl_model  # notebooks run in a folder of their own


def _lab(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import lab

    command = lab.command(PROJECT / "notebooks", arguments.port, not arguments.no_browser)
    os.execve(command[0], command, lab.environment())


if __name__ == "__main__":
    main()
