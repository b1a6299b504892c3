"""A bad network between an engine and a cache on another host: bytes pass, until they are spoiled, slow, stuck or cut off."""

import contextlib
import socket
import threading
import time
from typing import Literal

Fault = Literal["", "flip", "slow", "stall", "cut"]
AFTER = 20_000  # bytes of a transfer that pass before the fault
SLOW_S = 0.2  # for each piece
PIECE = 4096


class Proxy:
    """Listens on `address`, with two threads for each connection; faults hit what the cache sends."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._healed = threading.Event()
        self._ends: list[socket.socket] = [self._door]
        self.breaks("")
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.breaks("")
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def breaks(self, fault: Fault) -> None:
        """From here on; what is stuck goes on when it changes."""
        self._healed.set()
        self._healed = threading.Event()
        self.fault, self.passed = fault, 0

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                engine, _ = self._door.accept()
                self._ends.append(engine)
                try:
                    cache = socket.create_connection(self._target)
                except OSError:  # it is still starting
                    engine.shutdown(socket.SHUT_RDWR)
                    continue
                self._ends.append(cache)
                threading.Thread(target=self._pass, args=(engine, cache, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(cache, engine, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, bad: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if bad and self.fault and self.passed > AFTER:
                    data = self._hurt(data)
                self.passed += len(data) if bad else 0
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _hurt(self, data: bytes) -> bytes:
        if self.fault == "cut":
            raise ConnectionResetError
        if self.fault == "flip":
            return bytes([data[0] ^ 4]) + data[1:]
        if self.fault == "slow":
            time.sleep(SLOW_S)
        else:
            self._healed.wait()
        return data
