"""What `python -m services.up` can be told."""

import argparse
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from shared.config import ConfigError, bundled_model
from shared.shapes import SHAPES


@dataclass(frozen=True, slots=True)
class Options:
    counts: dict[str, int]  # processes per stage
    host: str
    port: int
    model: str
    shape: str  # empty, or the shape of a model of random weights
    dtype: str
    redis_url: str  # empty: start a broker of our own
    ask: str
    verbose: bool


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser("services.up", description="Start and supervise a whole mesh on this machine.")
    for stage in ("tokenizers", "engines", "streamers"):
        parser.add_argument(f"--{stage}", type=_count, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port of the API, the WebSocket and the page (default 8000)")
    parser.add_argument("--model", default="", help="a GGUF file or a hub-style directory (default SmolLM2-135M-Instruct)")
    parser.add_argument("--model-shape", choices=SHAPES, default="", help="random weights of this shape, to measure a GPU")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--ask", default="", metavar="QUESTION", help="print a streamed answer and exit")
    parser.add_argument("--verbose", action="store_true", help="show what every process logs")
    given = parser.parse_args(arguments)
    return Options(
        counts={"tokenizer": given.tokenizers, "engine": given.engines, "streamer": given.streamers},
        host=given.host,
        port=_free_port(given.host) if given.ask else given.port,
        model=str(Path(given.model).resolve()) if given.model else bundled_model(),
        shape=given.model_shape,
        dtype=given.dtype,
        redis_url=os.environ.get("REDIS_URL", ""),
        ask=given.ask,
        verbose=given.verbose,
    )


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("must be from 1 to 64")
    return value


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Streamers share the port, so none of them would notice a stranger on it. Raises ConfigError."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose another with PORT= or --port") from error
