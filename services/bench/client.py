"""One streaming request to an OpenAI-compatible server. What came of it is a Timing, whatever the server did."""

import asyncio
import time
from typing import Self

import aiohttp
import orjson

from services.bench.load import Job
from services.bench.prompts import Question
from services.bench.spec import Spec
from services.bench.timing import DETAIL, Meter, StreamFailed, Timing

PATHS = {"completions": "/completions", "chat": "/chat/completions"}


def body_of(spec: Spec, question: Question) -> bytes:
    """The request's JSON. Output lengths are forced, or two servers would not have done the same work."""
    body: dict[str, object] = {
        "model": spec.model,
        "max_tokens": question.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if spec.ignore_eos:
        body["ignore_eos"] = True
    if spec.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": question.prompt}]
    else:
        body["prompt"] = question.prompt
    body.update(spec.body or {})
    return orjson.dumps({key: value for key, value in body.items() if value is not None})


def failure_of(error: Exception) -> StreamFailed:
    """The kind under which a broken connection is counted."""
    if isinstance(error, StreamFailed):
        return error
    if isinstance(error, TimeoutError):
        return StreamFailed("timeout")
    if isinstance(error, aiohttp.ClientConnectorError):
        return StreamFailed("cannot connect", str(error))
    return StreamFailed("disconnected", f"{type(error).__name__}: {error}")


class Client:
    """Connections to one server, as many as the caller has requests under way (which the caller bounds)."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._url = spec.url.rstrip("/") + PATHS[spec.endpoint]
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if spec.api_key:
            headers["Authorization"] = f"Bearer {spec.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=spec.fresh),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=spec.timeout),
            auto_decompress=False,
            read_bufsize=1 << 18,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, job: Job, due: float, origin: float) -> Timing:
        """`due` and `origin` are on the monotonic clock, which all processes of a host share."""
        body = body_of(self._spec, job.question)
        start = time.monotonic()
        late = max(0.0, start - due)
        status = 0
        try:
            async with self._session.post(self._url, data=body) as response:
                status = response.status
                if status != 200:
                    said = await response.content.read(4 * DETAIL)
                    raise StreamFailed(f"http {status}", said.decode(errors="replace"))
                meter = Meter()
                async for data in response.content.iter_any():
                    meter.feed(data, time.monotonic())
            return meter.timing(job.index, start, late, origin)
        except (aiohttp.ClientError, StreamFailed, TimeoutError, OSError) as error:
            failure = failure_of(error)
            return Timing(job.index, start - origin, late, status, failure.kind, failure.detail)

    async def first_model(self) -> str | None:
        """The first model that the server lists, None when it lists none that we can read."""
        url = self._spec.url.rstrip("/") + "/models"
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=30)) as response:
            if response.status != 200:
                return None
            try:
                listed = orjson.loads(await response.read())
                return str(listed["data"][0]["id"])
            except (orjson.JSONDecodeError, LookupError, TypeError):
                return None


async def find_model(spec: Spec) -> str | None:
    """What to ask for when nobody named a model."""
    async with Client(spec) as client:
        return await asyncio.wait_for(client.first_model(), spec.timeout)
