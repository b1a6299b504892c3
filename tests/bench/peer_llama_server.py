"""llama.cpp's own server as the peer of our CPU figures, for tests.bench.cpu_figures: same file, cores and load generator.

It is built from the sources that the source distribution of llama-cpp-python carries (vendor/llama.cpp):

    cmake -B build -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-server
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import ClientError, ClientSession

from shared.config import bundled_model
from tests.mesh.harness import free_port

CONTEXT = 256  # tokens for each stream; it wants a multiple of this
START_S = 60.0


@asynccontextmanager
async def running(program: str, streams: int, context: int = CONTEXT, more: Sequence[str] = ()) -> AsyncIterator[str]:
    """Its URL, with a slot for each stream, until the caller is done. `more` are options of its own.

    Without its copies of the weights for AMX (--no-repack), as in peer_llamacpp.py.
    """
    port = free_port()
    options = ["--model", bundled_model(), "--port", str(port), "--threads", "2", "--threads-batch", "2", "--no-repack"]
    options += ["--parallel", str(streams), "--ctx-size", str(streams * context), *more]
    silent = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(program, *options, stdout=silent, stderr=silent)
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(START_S):
            await _until_ready(url, process)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    """Raises RuntimeError when it ends instead."""
    async with ClientSession() as http:
        while process.returncode is None:
            try:
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except ClientError:
                pass
            await asyncio.sleep(0.2)
    raise RuntimeError(f"llama-server ended with {process.returncode}")
