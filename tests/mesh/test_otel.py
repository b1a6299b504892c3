"""A request's trace, as a collector gets it. Without `headrace[otel]` there is nothing to test but that it says so."""

import asyncio
import importlib.util
import os
import sys

import pytest
from aiohttp import web

from shared.run import EXIT_USAGE
from tests.mesh.client import generate
from tests.mesh.harness import RunningMesh, free_port
from tests.mesh.test_chain import body, check

INSTALLED = importlib.util.find_spec("opentelemetry") is not None


@pytest.mark.skipif(not INSTALLED, reason="needs headrace[otel]")
async def test_a_request_is_one_trace() -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def collect(request: web.Request) -> web.Response:
        await got.put(await request.read())
        return web.Response(content_type="application/x-protobuf")

    app, port = web.Application(), free_port()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    async with RunningMesh({}, chain=True, env=env) as mesh:
        check(answer := await generate(mesh.url, **body([1, 2], 50, user="a secret")), [1, 2], 50)
        sent = await asyncio.wait_for(got.get(), 20)
    await runner.cleanup()
    spans = ExportTraceServiceRequest.FromString(sent).resource_spans[0].scope_spans[0].spans
    root = next(span for span in spans if span.name == "request")
    assert {span.name for span in spans} == {"request", "tokenize", "queue", "prefill", "decode"}
    assert {(span.trace_id, span.parent_span_id) for span in spans if span is not root} == {(root.trace_id, root.span_id)}
    assert all(
        root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano <= root.end_time_unix_nano for s in spans
    )
    told = {field.key: field.value for field in root.attributes}
    assert told["request"].string_value == answer.request
    assert told["prompt_tokens"].int_value == 2
    assert b"secret" not in sent


@pytest.mark.skipif(INSTALLED, reason="headrace[otel] is installed")
async def test_a_streamer_says_what_is_missing() -> None:
    async with RunningMesh({}, chain=True) as mesh:
        env = os.environ | mesh.env | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "HEADRACE_ID": "other"}
        command = (sys.executable, "-m", "services.streamer")
        process = await asyncio.create_subprocess_exec(*command, env=env, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
    assert process.returncode == EXIT_USAGE
    assert b"install headrace[otel]" in said
