"""How `vla lab` starts JupyterLab: so that saved notebooks keep their widgets.

Defaults that differ from JupyterLab's own are in `labconfig/default_setting_overrides.json`; what a person has set
counts more.
"""

import os
import socket
import sys
from pathlib import Path

from vla_lib.core.errors import UserError


def command(folder: Path, port: int, browser: bool = True) -> list[str]:
    """The command line of JupyterLab on `folder`. Raises UserError where the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"Port {port} is in use; give another one: make lab ARGS='--port {port + 1}'.") from None
    words = [sys.executable, "-m", "jupyterlab", str(folder), f"--port={port}", "--ServerApp.port_retries=0"]
    words += [] if browser else ["--no-browser"]
    return words + (["--allow-root"] if os.geteuid() == 0 else [])


def environment() -> dict[str, str]:
    """This process's environment, with the workbench's defaults of JupyterLab."""
    paths = [str(Path(__file__).parent), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    return {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}
