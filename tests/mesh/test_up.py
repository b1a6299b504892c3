"""`python -m services.up` as a user runs it: one question, bad starts, a stage that dies, and an end that leaves nothing."""

import asyncio
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from aiohttp import ClientError, ClientSession

from tests.mesh.client import generate
from tests.mesh.harness import free_port


@asynccontextmanager
async def up(*arguments: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.up", *arguments, env=os.environ | env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: asyncio.subprocess.Process, within_s: float) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), within_s)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def until_ready(url: str, within_s: float = 60) -> None:
    async with asyncio.timeout(within_s), ClientSession() as client:
        while True:
            try:
                async with client.get(f"{url}/readyz") as response:
                    if response.status == 200:
                        return
            except ClientError:
                pass
            await asyncio.sleep(0.2)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files that no other mesh uses; its path is short, as those of Unix sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def contents(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_one_question(scratch: Path) -> None:
    async with up("--ask", "What is the capital of France?", "--dtype", "float32", TMPDIR=str(scratch)) as process:
        code, out, err = await ended(process, 90)
    assert code == 0, err
    assert out == "The capital of France is Paris.\n"
    assert not contents(scratch)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/nowhere/model.gguf"), "no model at"),
        (("--model", "README.md"), "README.md"),
        (("--model", "tests"), "config.json"),
        (("--port", "99999999"), "another with PORT="),
        (("--engines", "0"), "must be from 1 to 64"),
        (("--dtype", "int3"), "invalid choice"),
    ],
)
async def test_what_cannot_work_is_one_clear_error(arguments: tuple[str, ...], words: str) -> None:
    async with up("--port", str(free_port()), *arguments) as process:
        code, _, err = await ended(process, 30)
    assert code == 2
    assert words in re.sub(r"\s+", " ", err)
    assert "Traceback" not in err


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with up("--port", str(taken.getsockname()[1])) as process:
            code, _, err = await ended(process, 30)
    assert code == 2
    assert "cannot listen" in err


async def test_no_broker() -> None:
    async with up("--port", str(free_port()), REDIS_URL="redis://127.0.0.1:1/0") as process:
        code, _, err = await ended(process, 30)
    assert code == 2
    assert "no broker answers" in err
    assert "Traceback" not in err


async def test_a_life(scratch: Path) -> None:
    """Ready, two streamers on one port, a stage that is killed comes back, Ctrl-C ends everything within seconds."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    stages = ("--streamers", "2", "--tokenizers", "2", "--dtype", "float32")
    async with up("--port", str(port), *stages, TMPDIR=str(scratch)) as process:
        await until_ready(url)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 6, "broker, two tokenizers, one engine, two streamers"
        engine = next(child for child in family if "services.engine" in child.cmdline())
        streaming = asyncio.create_task(
            generate(
                url, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=120, temperature=0, ignore_eos=True
            )
        )
        await asyncio.sleep(1.5)
        engine.kill()
        answer = await asyncio.wait_for(streaming, 90)
        assert answer.done["usage"]["completion_tokens"] == 120
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        code, _, err = await ended(process, 20)
        assert code == 0, err
        assert time.monotonic() - started < 12
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not contents(scratch)
    socket.create_server(("127.0.0.1", port)).close()


async def test_a_supervisor_that_is_killed_takes_its_processes_along() -> None:
    port = free_port()
    async with up("--port", str(port), "--dtype", "float32") as process:
        await until_ready(f"http://127.0.0.1:{port}")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
