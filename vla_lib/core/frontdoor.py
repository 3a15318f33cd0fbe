"""A front door: a stage's settings as flags with `--help`, its `main`, errors in one sentence, exit statuses."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vla_lib.core.errors import UserError
from vla_lib.core.processes import allow_open_files, die_with_launcher, end

S = TypeVar("S")

EXIT_BAD_INPUT = 2


def parse(settings_class: type[S], argv: Sequence[str] | None = None) -> S:
    """Settings from flags (dashes and underscores are the same). Exits 2 on an unknown flag or a wrong type; raises
    UserError where the settings' own validation refuses them."""
    import tyro

    return tyro.cli(settings_class, args=argv, use_underscores=False, description=settings_class.__doc__)


def start(settings_class: type[S], main: Callable[[S], Any], argv: Sequence[str] | None = None) -> None:
    """Run a front door as a program: parse, run `main`, turn a UserError into one line on stderr and exit status 2.

    As a rank of torchrun it dies with its launcher, leaves its error where the launcher reports the first failing
    rank's from, and keeps nobody waiting at its end: a cancelled job is to be gone in seconds."""
    allow_open_files()
    rank = "TORCHELASTIC_RUN_ID" in os.environ
    if rank:
        from torch.distributed.elastic.multiprocessing.errors import record

        die_with_launcher()
        main = record(main)
    try:
        main(parse(settings_class, argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt as stopped:
        print(f"cancelled: {stopped}" if str(stopped) else "cancelled", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    if rank:
        end()
