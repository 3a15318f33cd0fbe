"""`vla`: runs notebooks headless, the demo and JupyterLab; lists the front doors and the runs."""

import argparse
import ast
import os
import signal
import sys
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.core.frontdoor import EXIT_BAD_INPUT
from vla_lib.core.run_folder import PROJECT

EXIT_CANCELLED = 130
FRONT_DOORS = ("simulate", "preprocess", "build_vl_cache", "train_async", "train_diffusion", "evaluate", "bench")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one command. Exit status: 0 done, 1 failed, 2 bad input, 130 cancelled."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _cancelled)
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

    run = commands.add_parser("run", help="run a notebook headless into a run folder")
    run.add_argument("notebook", help="path or name, e.g. 04_train_async")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter (repeatable)"
    )
    run.set_defaults(command=_run)

    runs = commands.add_parser("runs", help="list the runs, newest last")
    runs.add_argument("name", nargs="?", default="", help="only runs of this notebook, e.g. 04_train_async")
    runs.set_defaults(command=_runs)

    cache = commands.add_parser("cache", help="list, verify or remove VL feature caches")
    cache.add_argument("action", choices=["ls", "verify", "rm"])
    cache.add_argument("binding", nargs="?", default="", help="the cache's id (verify: all without it)")
    cache.add_argument("--dataset-root", type=Path, default=PROJECT / "runs" / "demo-data")
    cache.set_defaults(command=_cache)

    demo = commands.add_parser("demo", help="record a data set, run notebooks 01, 02, 03, 04, 06 on it, print the result")
    demo.add_argument("--dataset-root", type=Path, default=None, help="use this data instead of recording some")
    demo.add_argument("--vl-model", default="tiny", help="VL model: hub name, folder, or tiny (default: %(default)s)")
    demo.add_argument("--nproc-per-node", type=int, default=2, help="processes of torchrun (default: %(default)s)")
    help_text = "long: 400 episodes, 100 unseen phantoms, about an hour; small: a few seconds-long episodes, as the tests use"
    demo.add_argument("--size", choices=["demo", "long", "small"], default="demo", help=help_text)
    demo.set_defaults(command=_demo)

    lab = commands.add_parser("lab", help="open JupyterLab on the notebooks")
    lab.add_argument("--port", type=int, default=8888)
    lab.add_argument("--no-browser", action="store_true", help="do not open a browser (a remote machine)")
    lab.set_defaults(command=_lab)
    return parser


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
    from vla_lib.workbench.notebook import shown

    repeated = [name for name in {name for name, _ in arguments.parameters} if sum(name == other for other, _ in arguments.parameters) > 1]
    if repeated:
        raise UserError(f"Parameter {repeated[0]} is given twice; give it once.")
    result = run_notebook(arguments.notebook, dict(arguments.parameters), text=True)
    if result.error:
        print(f"error: {result.error}", file=sys.stderr)
    print(f"{result.state}: {shown(result.page if result.page.exists() else result.path)}")
    return result.exit_status


def _runs(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import runs

    frame = runs.table(arguments.name)
    print(frame[["run", "state", "duration_s"]].to_string(index=False) if len(frame) else "no runs yet")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import cache_commands

    return cache_commands.run(arguments.action, arguments.dataset_root, arguments.binding)


def _demo(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import demo

    return demo.run(arguments.dataset_root, arguments.vl_model, arguments.nproc_per_node, arguments.size)


def _lab(arguments: argparse.Namespace) -> int:
    from vla_lib.workbench import lab

    command = lab.command(PROJECT / "notebooks", arguments.port, not arguments.no_browser)
    os.execve(command[0], command, lab.environment())


if __name__ == "__main__":
    main()
