"""The program itself against a real server on loopback: figures, counts, exit codes, Ctrl-C."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.bench.__main__ import main
from tests.bench.sse_server import Behaviour, SseServer


async def start(*words: object) -> asyncio.subprocess.Process:
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.bench", *map(str, words),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, "COLUMNS": "200"},
    )  # fmt: skip


async def bench(*words: object) -> tuple[int, str, str]:
    process = await start(*words)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def figures(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


async def test_closed_loop_measures_what_the_server_does(tmp_path: Path) -> None:
    async with SseServer(Behaviour(first=0.1, gap=0.02)) as server:
        words = ["closed", "--url", server.url, "--users", 4, "--requests", 12, "--warmup", 2, "--api-key", "s3cret"]
        code, out, err = await bench(*words, "--input-tokens", 33, "--output-tokens", 11, "--json", tmp_path / "f.json")
    assert (code, err) == (0, "")
    found = figures(tmp_path / "f.json")
    summary = found["summary"]
    assert (summary["sent"], summary["succeeded"], summary["failures"]) == (12, 12, {})
    assert (summary["input_tokens"], summary["output_tokens"]) == (12 * 33, 12 * 11)
    assert 0.1 <= summary["ttft"]["p50"] < 0.2
    assert 0.02 <= summary["tpot"]["p50"] < 0.035
    assert summary["qps"] * summary["elapsed"] == pytest.approx(12)
    assert summary["throughput"] * summary["elapsed"] == pytest.approx(132)
    assert len(server.asked) == 14 and len({tuple(body["prompt"]) for body in server.asked}) == 14
    assert all(len(body["prompt"]) == 33 and body["ignore_eos"] and body["model"] == "small" for body in server.asked)
    assert [row["index"] for row in found["requests"]] == list(range(12))
    assert "s3cret" not in (tmp_path / "f.json").read_text() and "--users 4" in found["command"]
    assert {"date", "host", "spec"} <= set(found)
    assert "output tokens/s" in out and "TTFT" in out and "QPS" in out


@pytest.mark.parametrize(("more", "connections"), [([], 1), (["--fresh"], 5)])
async def test_a_connection_is_kept_unless_each_request_is_to_have_its_own(more: list[str], connections: int) -> None:
    async with SseServer(Behaviour(first=0.01, gap=0)) as server:
        code, _out, _err = await bench("closed", "--url", server.url, "--requests", 5, "--output-tokens", 2, *more)
    assert (code, len(server.connections)) == (0, connections)


async def test_same_question_at_the_same_moment_from_two_processes() -> None:
    async with SseServer(Behaviour(first=0.5, gap=0)) as server:
        words = ["same", "--url", server.url, "--users", 6, "--requests", 12, "--processes", 2, "--output-tokens", 3]
        code, _out, _err = await bench(*words, "--endpoint", "chat")
    prompts = [body["messages"][0]["content"] for body in server.asked]
    assert code == 0 and len(prompts) == 12
    assert len(set(prompts[:6])) == len(set(prompts[6:])) == 1 and prompts[0] != prompts[6]
    assert server.moments[5] - server.moments[0] < 0.4 < server.moments[6] - server.moments[5]


async def test_open_loop_and_failures_by_kind(tmp_path: Path) -> None:
    async with SseServer(Behaviour(first=0.01, gap=0, statuses=[429, 503, 429])) as server:
        words = ["open", "--url", server.url, "--rate", 100, "--requests", 20, "--output-tokens", 2]
        code, out, _err = await bench(*words, "--model", "x", "--json", tmp_path / "f.json")
    found = figures(tmp_path / "f.json")
    assert found["summary"]["failures"] == {"http 429": 2, "http 503": 1}
    assert "not now" in found["summary"]["examples"]["http 429"]
    assert found["summary"]["succeeded"] == 17
    assert code == 1 and "http 429" in out  # 15 % of failures are more than a p95 forgives


async def test_trace_is_replayed_with_shared_prefixes(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * n, "input_length": 1024, "output_length": 10 + n, "hash_ids": [0, 1 + n]} for n in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    async with SseServer(Behaviour(first=0.0, gap=0)) as server:
        words = ["trace", tmp_path / "t.jsonl", "--url", server.url, "--input-scale", 0.125, "--time-scale", 2]
        code, _out, err = await bench(*words)
    assert (code, err) == (0, "")
    assert [body["max_tokens"] for body in server.asked] == [10, 11, 12, 13]
    assert len({tuple(body["prompt"][:64]) for body in server.asked}) == 1
    assert len({tuple(body["prompt"][64:]) for body in server.asked}) == 4
    assert server.moments[3] - server.moments[0] == pytest.approx(0.6, abs=0.1)


async def test_prompts_of_a_file_and_other_fields(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    async with SseServer(Behaviour(first=0, gap=0, usage=False, api_key="k")) as server:
        words = ["closed", "--url", server.url, "--requests", 3, "--prompts", tmp_path / "p.txt", "--api-key", "k"]
        extra = [
            "--no-ignore-eos",
            "--body",
            '{"temperature":0.5,"stream_options":null}',
            "--json",
            tmp_path / "f.json",
        ]
        code, _out, _err = await bench(*words, *extra, "--output-tokens", 5)
    assert code == 0 and [body["prompt"] for body in server.asked] == ["one", "two", "one"]
    assert all(body["temperature"] == 0.5 and not {"ignore_eos", "stream_options"} & set(body) for body in server.asked)
    assert figures(tmp_path / "f.json")["summary"]["output_tokens"] == 15  # counted by chunks


async def test_every_fault_is_counted_and_nothing_succeeded(tmp_path: Path) -> None:
    endings = ["cut", "error", "malformed", "abort", "hang"]
    async with SseServer(Behaviour(first=0, gap=0, statuses=[401], endings=endings)) as server:
        words = ["closed", "--url", server.url, "--requests", 6, "--timeout", 0.5, "--json", tmp_path / "f.json"]
        code, out, err = await bench(*words, "--model", "x")
    kinds = ["http 401", "cut short", "error in stream", "malformed stream", "disconnected", "timeout"]
    assert (code, err) == (3, "") and all(kind in out for kind in kinds)
    assert figures(tmp_path / "f.json")["summary"]["failures"] == dict.fromkeys(kinds, 1)


async def test_a_slow_server_misses_the_slo() -> None:
    async with SseServer(Behaviour(first=0.1, gap=0.01)) as server:
        words = ["closed", "--url", server.url, "--requests", 2, "--output-tokens", 3]
        assert (await bench(*words, "--slo-ttft", 0.05))[0] == 1
        assert (await bench(*words, "--slo-tpot", 0.005))[0] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required"),
        (["closed"], "--requests or --duration"),
        (["closed", "--requests", "0"], "not in 1 to"),
        (["open", "--requests", "1", "--rate", "-1"], "--rate"),
        (["same", "--url", "ftp://x"], "no http(s) URL"),
        (["same", "--users", "2", "--processes", "3"], "at least as many users"),
        (["same", "--body", "[1]"], "JSON object"),
        (["same", "--vocab", "9:1"], "LOW:HIGH"),
        (["trace", "absent.csv"], "absent.csv"),
    ],
)
def test_usage_errors(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2 and says in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["same", "--url", "http://127.0.0.1:9/v1"]) == 3
    assert "no answer from" in capsys.readouterr().err


async def test_interrupt_prints_what_there_is(tmp_path: Path) -> None:
    async with SseServer(Behaviour(first=0.05, gap=0)) as server:
        words = ["closed", "--url", server.url, "--users", 2, "--duration", 60, "--output-tokens", 2]
        process = await start(*words, "--json", tmp_path / "f.json")
        await asyncio.wait_for(server.enough.wait(), 20)
        server.behaviour.first = 30  # what comes now is under way when we interrupt
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130 and b"Traceback" not in err and b"interrupted" in out
    summary = figures(tmp_path / "f.json")["summary"]
    assert summary["succeeded"] >= 4 and summary["interrupted"] == 2 and summary["failures"] == {}
