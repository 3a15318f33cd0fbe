"""A training in; a true run.json in its run folder out, where no notebook keeps one there, so that `vla runs` lists it."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import RunFolder
from vla_lib.training.saving import needing_room

if TYPE_CHECKING:
    from vla_lib.training.loop import Trainer


@contextlib.contextmanager
def recorded(trainer: "Trainer") -> Iterator[None]:
    """Inside is trained: the main process opens the record, or opens its own one again, and closes it as done, cancelled or failed."""
    run = _open(trainer) if trainer.main else None
    try:
        yield
    except BaseException as error:
        told = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if run is not None:
            with contextlib.suppress(OSError):  # the error counts, not that the full disk takes no record of it
                run.finish("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", told)
        raise
    if run is not None:
        with needing_room(run.path / "run.json"):
            run.finish(
                "cancelled" if trainer.stopped else "done", f"stopped by {trainer.stopped}" if trainer.stopped else None
            )


def _open(trainer: "Trainer") -> RunFolder | None:
    """The record that this process is to keep; None where it is a notebook's."""
    settings, path = trainer.settings, trainer.run_dir / "run.json"
    with needing_room(path):
        if not path.exists():
            return RunFolder.create(settings.name, settings.record(), path=trainer.run_dir)
        if read_json(path).get("name") == settings.name:
            return RunFolder.resume(trainer.run_dir, settings.record())
    return None
