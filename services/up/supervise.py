"""Processes: started, restarted with backoff when they die, ended in order. None of them outlives the supervisor."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.run import EXIT_USAGE

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
STEADY_S = 30.0  # alive for this long, a process has its short pause back
GRACE_S = 8.0  # from SIGTERM to SIGKILL
_PR_SET_PDEATHSIG = 1
log = logging.getLogger("headrace")


class Unusable(Exception):
    """A process says that its configuration cannot work: restarting would not help."""


def _die_with_parent() -> None:
    """Linux: the kernel ends this process when the supervisor is gone, even by SIGKILL. Elsewhere SIGTERM must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(slots=True)
class Child:
    """One process and its restarts."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    async def keep_alive(self) -> None:
        """Run until `end`. Raises Unusable, OSError."""
        pause, loop = FIRST_PAUSE_S, asyncio.get_running_loop()
        while not self.ending.is_set():
            started = loop.time()
            # A session of its own: Ctrl-C in the terminal reaches the supervisor only, which ends the others in order.
            self.process = await asyncio.create_subprocess_exec(
                *self.command, env=dict(self.env), start_new_session=True, preexec_fn=_die_with_parent
            )
            code = await self.process.wait()
            if self.ending.is_set():
                return
            if code == EXIT_USAGE:
                raise Unusable(self.name)
            pause = FIRST_PAUSE_S if loop.time() - started > STEADY_S else pause
            self.restarts += 1
            log.warning("%s ended with %s; starting it again in %.1f s", self.name, code, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def kill_stuck(self) -> None:
        assert self.process is not None
        log.warning("%s shows itself no more: killed", self.name)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> None:
        self.ending.set()
        process = self.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), GRACE_S)
        except TimeoutError:
            log.warning("%s did not end in %s s: killed", self.name, GRACE_S)
            process.kill()
            await process.wait()


def stage_child(stage: str, number: int, env: Mapping[str, str]) -> Child:
    name = f"{stage}-{number}"
    return Child(name, [sys.executable, "-m", f"services.{stage}"], {**os.environ, **env, "HEADRACE_ID": name})
