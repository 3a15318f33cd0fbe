"""The one exception for bad input: a sentence that names what is wrong, where, and what to do."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input or a missing prerequisite, said in one sentence with its remedy.

    Front doors print it as one line on stderr and exit with status 2; notebooks show it as the cell's error.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook: a sentence needs no library frames
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def needing_room(path: Path, remedy: str = "Make room and go on with --resume.") -> Iterator[None]:
    """Inside, `path` is written: a full or read-only disk becomes a UserError with its remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({in_words(error)}). {remedy}") from error


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line (300 letters at most), else the error's type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def in_words(error: BaseException) -> str:
    """An error for a record or a person: a UserError's sentence, `disk full` where that is it, else its type too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full: {error}"
    return f"{error}" if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
