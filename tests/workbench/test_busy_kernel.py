"""A kernel whose cell awaits: it answers what a notebook asks that is opened again."""

from jupyter_client.manager import KernelManager

CELL = """
import asyncio, ipywidgets
from vla_lib.workbench.busy_kernel import answering
slider = ipywidgets.IntSlider(value=3)
print("awaiting")
with answering():
    while slider.value == 3:
        await asyncio.sleep(0.05)
print("over")
"""
CONTROL = {"comm_id": "control", "target_name": "jupyter.widget.control", "data": {}}


def test_a_kernel_says_what_it_is_and_what_it_has_while_its_cell_awaits(tmp_path):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()

    def ask(kind: str, content: dict, metadata: dict | None = None) -> str:
        message = client.session.msg(kind, content, metadata=metadata)
        client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def until(channel: str, kind: str, asked: str) -> dict:
        while (message := getattr(client, f"get_{channel}_msg")(timeout=60))["msg_type"] != kind or (
            asked and message["parent_header"].get("msg_id") != asked
        ):
            pass
        return message["content"]

    try:
        client.wait_for_ready(timeout=120)
        cell = client.execute(CELL)
        assert until("iopub", "stream", cell)["text"] == "awaiting\n"
        for kind in ("kernel_info_request", "comm_info_request"):
            asked = ask(kind, {})
            said = until("shell", kind.replace("request", "reply"), asked)
            assert [until("iopub", "status", asked)["execution_state"] for _ in range(2)] == ["busy", "idle"]
            assert until("iopub", "status", cell) == {"execution_state": "busy"}  # the cell still runs
        assert set(comm["target_name"] for comm in said["comms"].values()) == {"jupyter.widget"}
        ask("comm_open", CONTROL, {"version": "1.0.0"})
        ask("comm_msg", {"comm_id": "control", "data": {"method": "request_states"}})
        states = until("iopub", "comm_msg", "")["data"]["states"]
        (slider,) = [name for name, state in states.items() if state["model_name"] == "IntSliderModel"]
        second = client.execute("print(slider.value)")
        ask("comm_msg", {"comm_id": slider, "data": {"method": "update", "state": {"value": 4}, "buffer_paths": []}})
        assert until("iopub", "stream", cell)["text"] == "over\n"
        assert until("iopub", "stream", second)["text"] == "4\n"  # a cell that was waiting
        info = ask("kernel_info_request", {})
        assert until("shell", "kernel_info_reply", info)["status"] == "ok"  # as before
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
