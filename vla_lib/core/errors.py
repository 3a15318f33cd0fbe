"""The one exception for bad input: a sentence that names what is wrong, where, and what to do."""


class UserError(Exception):
    """Bad input or a missing prerequisite, told in one sentence with its remedy.

    Front doors print it as one line on stderr and exit with status 2; notebooks show it as the cell's error.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook: a sentence needs no library frames
        return [f"{type(self).__name__}: {self}"]
