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
    prefix_cache_mb: int  # 0: none
    trace: str  # a folder; empty: no traces


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
    parser.add_argument(
        "--prefix-cache",
        type=_megabytes,
        default=0,
        metavar="SIZE",
        help="memory that engines share for prompts, as 512M or 8G",
    )
    parser.add_argument("--trace", default="", metavar="DIR", help="write there what every process did and when")
    parser.add_argument("--verbose", action="store_true", help="show what every process logs")
    given = parser.parse_args(arguments)
    return Options(
        counts={"tokenizer": given.tokenizers, "engine": given.engines, "streamer": given.streamers}
        | ({"prefix_cache": 1} if given.prefix_cache else {}),
        host=given.host,
        port=_free_port(given.host) if given.ask else given.port,
        model=str(Path(given.model).resolve()) if given.model else bundled_model(),
        shape=given.model_shape,
        dtype=given.dtype,
        redis_url=os.environ.get("REDIS_URL", ""),
        ask=given.ask,
        verbose=given.verbose,
        prefix_cache_mb=given.prefix_cache,
        trace=str(Path(given.trace).resolve()) if given.trace else "",
    )


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("must be from 1 to 64")
    return value


def _megabytes(text: str) -> int:
    """512M or 8G; 0 is none."""
    number, unit = text[:-1], text[-1:].upper()
    if text == "0":
        return 0
    if unit not in ("M", "G") or not number.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number with M or G, or 0")
    return int(number) * (1024 if unit == "G" else 1)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Streamers share the port, so none of them would notice a stranger on it. Raises ConfigError."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose another with PORT= or --port") from error
