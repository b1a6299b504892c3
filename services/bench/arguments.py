"""The command line of the bench, turned into a Spec. Every number has its range here."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from services.bench.spec import Spec

MAX_USERS = 65536

EPILOG = """exit codes: 0 the SLO was met; 1 the p95 of TTFT or TPOT misses it (a failed request counts as late);
2 wrong usage; 3 nothing succeeded, or a client process died; 130 interrupted (what there is was printed)."""


@dataclass(frozen=True)
class Request:
    """What was asked for: the run, and where its figures go."""

    spec: Spec
    json: str | None
    timeline: Path | None
    trace_dir: Path | None


def whole(low: int, high: int = 1 << 31) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return integer


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to 1e9, exclusive")
    return value


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not 0 <= int(low) < int(high):
        raise argparse.ArgumentTypeError("give LOW:HIGH with 0 <= LOW < HIGH")
    return int(low), int(high)


def address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no http(s) URL such as http://127.0.0.1:8000/v1")
    return text


def fields(text: str) -> dict[str, object]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("give a JSON object")
    return value


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    server = common.add_argument_group("server")
    server.add_argument("--url", type=address, default="http://127.0.0.1:8000/v1", help="base URL of its API")
    server.add_argument("--model", help="default: the first one that the server lists")
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    server.add_argument("--timeout", type=positive, default=600.0, help="seconds for a whole answer")
    server.add_argument("--body", type=fields, help="JSON object merged over each request (null takes a field away)")
    server.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false", help="answers may end early")
    server.add_argument("--fresh", action="store_true", help="a connection for each request: some servers close theirs unasked")
    run = common.add_argument_group("run")
    run.add_argument("--requests", type=whole(1), help="how many in all")
    run.add_argument("--warmup", type=whole(0), default=0, help="requests beforehand that nobody counts")
    run.add_argument("--processes", type=whole(1, 256), default=1, help="client processes")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--slo-ttft", type=positive, default=2.0, help="limit for the p95 of TTFT, seconds")
    run.add_argument("--slo-tpot", type=positive, default=0.05, help="limit for the p95 of TPOT, seconds")
    run.add_argument("--json", metavar="FILE", help="write all figures and every request there")
    run.add_argument("--timeline", type=Path, metavar="FILE", help="draw there, as HTML, what the mesh did meanwhile")
    run.add_argument("--trace-dir", type=Path, metavar="DIR", help="where the mesh writes its traces (services.up --trace DIR)")
    words = common.add_argument_group("synthetic prompts")
    words.add_argument("--text", action="store_true", help="common words instead of token ids (chat: always)")
    words.add_argument("--vocab", type=span, default=(1000, 30000), metavar="LOW:HIGH", help="range of token ids")
    return common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.bench", description=__doc__, epilog=EPILOG)
    modes = parser.add_subparsers(dest="mode", required=True)
    common = [_common()]

    def mode_of(name: str, help: str) -> argparse.ArgumentParser:
        return modes.add_parser(name, parents=common, help=help, description=help, epilog=EPILOG)

    same = mode_of("same", "all users ask the same question at the same moment, then the next one")
    closed = mode_of("closed", "users who ask again when they are answered")
    opened = mode_of("open", "Poisson arrivals at a rate")
    trace = mode_of("trace", "a recorded trace of requests")
    for mode in (same, closed, opened):
        mode.add_argument("--prompts", metavar="FILE", help="a prompt a line, instead of synthetic ones")
        mode.add_argument("--input-tokens", type=whole(1, 1 << 20), default=128)
        mode.add_argument("--output-tokens", type=whole(1, 1 << 20), default=128)
        mode.add_argument(
            "--common-tokens", type=whole(0), default=0, help="with which every prompt begins, of its input tokens"
        )
    for mode in (same, closed):
        mode.add_argument("--users", type=whole(1, MAX_USERS), default=1)
    for mode in (closed, opened, trace):
        mode.add_argument("--duration", type=positive, help="seconds; what is under way then is waited for")
    for mode in (opened, trace):
        mode.add_argument("--max-inflight", type=whole(1, MAX_USERS), default=1024, help="beyond: failed, unsent")
    opened.add_argument("--rate", type=positive, default=1.0, help="requests per second")
    trace.add_argument("trace", metavar="FILE", help="Azure .csv or Mooncake .jsonl")
    for what in ("input", "output", "time"):
        trace.add_argument(f"--{what}-scale", type=positive, default=1.0, help=f"factor for every {what} length")
    for what in ("input", "output"):
        trace.add_argument(f"--max-{what}", type=whole(1), help=f"longest {what} in tokens, after scaling")
    return parser


def parse(argv: Sequence[str]) -> Request:
    """Ends the program with code 2 and one sentence when something is wrong."""
    parser = _parser()
    chosen = vars(parser.parse_args(argv))
    file, timeline, trace_dir = (chosen.pop(name) for name in ("json", "timeline", "trace_dir"))
    spec = Spec(**chosen)
    if spec.mode in ("same", "closed") and spec.processes > spec.users:
        parser.error(f"{spec.processes} client processes need at least as many users, not {spec.users}")
    if spec.mode in ("closed", "open") and spec.requests is None and spec.duration is None:
        parser.error(f"{spec.mode}: say how long, with --requests or --duration")
    if spec.common_tokens > spec.input_tokens:
        parser.error(f"--common-tokens {spec.common_tokens} are more than --input-tokens {spec.input_tokens}")
    if (timeline is None) != (trace_dir is None):
        parser.error("--timeline and --trace-dir go together")
    if trace_dir is not None and not trace_dir.is_dir():
        parser.error(f"--trace-dir {trace_dir}: no such folder; start the mesh with --trace {trace_dir}")
    return Request(spec, file, timeline, trace_dir)
