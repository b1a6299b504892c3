"""What a container's health check says of a process, against the real broker."""

import subprocess
from collections.abc import Iterator

import pytest

from services.up.broker import Broker
from shared.bus import Bus
from shared.config import MeshConfig
from shared.health import check, trouble
from shared.messages import Beat


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    broker = Broker()
    process = subprocess.Popen(broker.command)
    yield broker.url
    process.terminate()
    process.wait()
    broker.remove()


def config(url: str, id: str) -> MeshConfig:
    return MeshConfig(id=id, redis_url=url, model_name="m")


def beat(stage: str, id: str, ready: bool) -> Beat:
    return Beat(stage=stage, id=id, pid=1, host="h", ready=ready, detail="loading", counters={}, gauges={}, histograms={})


async def test_only_the_own_ready_heartbeat_counts(url: str) -> None:
    bus = Bus(url, "m")
    await bus.incarnation()  # a heartbeat does not wait for a broker that is just starting, this does
    for stage, id, ready in (("engine", "a", True), ("engine", "b", False), ("tokenizer", "c", True)):
        await bus.beat(beat(stage, id, ready))
    assert await trouble("engine", config(url, "a")) == ""
    assert await trouble("engine", config(url, "b")) == "loading"
    assert await trouble("engine", config(url, "c")) == "no heartbeat of engine c"
    await bus.leave("engine", "a")
    assert await trouble("engine", config(url, "a")) == "no heartbeat of engine a"
    await bus.close()


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check([])[0] == check(["redis"])[0] == 2
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://127.0.0.1:1/0")
    assert check(["tokenizer"])[0] == 1
    monkeypatch.setenv("HEADRACE_WRONG", "1")
    assert check(["tokenizer"])[0] == 2
