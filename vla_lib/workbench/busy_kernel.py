"""A kernel whose cell awaits something long: it can still be asked what it is and which widgets it has.

ipykernel delivers widget messages while a cell awaits, but lets every other question wait for the cell's end. A
notebook that is opened again asks those questions before it draws a widget, so it would show `Loading widget...` for as
long as the job runs. There is no public way: this module alone uses private names of ipykernel (`shell_channel_thread`,
`set_on_recv_callback`, `shell_main`); test_busy_kernel.py watches them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from IPython import get_ipython

QUESTIONS = ("kernel_info_request", "comm_info_request")


@contextmanager
def answering() -> Iterator[None]:
    """Inside, with awaits, this kernel answers `QUESTIONS` at once. Does nothing where no such kernel runs (a script,
    another kernel)."""
    kernel: Any = getattr(get_ipython(), "kernel", None)
    manager = getattr(getattr(kernel, "shell_channel_thread", None), "manager", None)
    if manager is None:
        yield
        return

    def tell(state: str, about: dict[str, Any]) -> None:
        kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent=about, ident=b"status")

    async def receive(subshell: str | None, message: list[Any]) -> None:
        idents, frames = kernel.session.feed_identities(message, copy=False)
        kind = kernel.session.deserialize(frames, content=False, copy=False)["header"]["msg_type"]
        if kind not in QUESTIONS or subshell is not None:
            await kernel.shell_main(subshell, message)
            return
        question = kernel.session.deserialize(frames, copy=False)
        tell("busy", question)
        await kernel.shell_handlers[kind](manager.get_subshell_to_shell_channel_socket(None), idents, question)
        tell("idle", question)  # an answer counts once its kernel says that it is done with it
        tell("busy", kernel.get_parent("shell"))  # the cell is not

    manager.set_on_recv_callback(receive)
    try:
        yield
    finally:
        manager.set_on_recv_callback(kernel.shell_main)
