"""Real request traces: readers for two public formats, scaling, and prompts sharing prefixes as the trace does. Pure.

Azure (.csv): TIMESTAMP, ContextTokens, GeneratedTokens.
Mooncake (.jsonl): timestamp in ms, input_length, output_length and hash_ids, one id per 512-token block of the prompt;
two requests with the same first k ids had the same first k blocks.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from services.bench.prompts import Question, Vocabulary

MOONCAKE_BLOCK = 512


class BadTrace(ValueError):
    """A trace that we cannot read; the message names the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, `at` seconds after the first. Block i covers tokens i * block_size onward; the last may be short."""

    at: float
    input_tokens: int
    output_tokens: int
    block_size: int = MOONCAKE_BLOCK
    blocks: tuple[int, ...] = ()


def read(name: str, lines: Iterable[str]) -> list[Arrival]:
    """A trace in the order of the file; the format goes by the file's name."""
    if name.endswith(".csv"):
        found = list(_settled(_azure(lines)))
    elif name.endswith(".jsonl"):
        found = list(_settled(_mooncake(lines)))
    else:
        raise BadTrace(f"{name}: a trace is an Azure .csv or a Mooncake .jsonl file")
    if not found:
        raise BadTrace(f"{name}: no request in it")
    return found


def _settled(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """Times counted from the first request. Order is the file's: a time that steps back means 'at once'."""
    first: float | None = None
    latest = 0.0
    for arrival in arrivals:
        first = arrival.at if first is None else first
        latest = max(latest, arrival.at - first)
        yield replace(arrival, at=latest)


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield Arrival(at, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise BadTrace(f"line {number}: not an Azure trace row ({error})") from error


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row["hash_ids"])
            at, tokens, output = row["timestamp"] / 1000, int(row["input_length"]), max(1, int(row["output_length"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadTrace(f"line {number}: not a Mooncake trace row ({error})") from error
        if not blocks or len(blocks) != -(-tokens // MOONCAKE_BLOCK):
            raise BadTrace(f"line {number}: {len(blocks)} hash_ids for {tokens} tokens")
        yield Arrival(at, tokens, output, blocks=blocks)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a trace is made to fit: factors, and upper limits (a longer prompt loses its end, so prefixes stay)."""

    input: float = 1.0
    output: float = 1.0
    time: float = 1.0
    max_input: int | None = None
    max_output: int | None = None


def scale(arrival: Arrival, by: Scaling) -> Arrival:
    """The block is scaled first and the prompt by the block, so that k shared blocks stay exactly k shared blocks."""
    block = max(1, round(arrival.block_size * by.input))
    full, tail = divmod(arrival.input_tokens, arrival.block_size)
    tokens = full * block + (max(1, round(tail * block / arrival.block_size)) if tail else 0)
    if not arrival.blocks:
        tokens = max(1, round(arrival.input_tokens * by.input))
    tokens = min(tokens, by.max_input or tokens)
    output = max(1, round(arrival.output_tokens * by.output))
    output = min(output, by.max_output or output)
    kept = arrival.blocks[: -(-tokens // block)]
    return Arrival(arrival.at * by.time, tokens, output, block, kept)


@lru_cache(maxsize=4096)
def _block(vocabulary: Vocabulary, seed: int, hash_id: int, size: int) -> tuple[int, ...]:
    """A block's units: its id in the vocabulary's base first, so that different ids differ; then noise keyed by it."""
    high, low = divmod(hash_id, vocabulary.size)
    noise = vocabulary.draw(f"{seed}/block/{hash_id}", size)
    return tuple([low, high % vocabulary.size, *noise[2:]][:size])


def question(arrival: Arrival, index: int, vocabulary: Vocabulary, seed: int) -> Question:
    """Equal hash ids become equal blocks; a trace without them gets a prompt of its own for every request."""
    if arrival.blocks:
        units = [unit for block in arrival.blocks for unit in _block(vocabulary, seed, block, arrival.block_size)]
        units = units[: arrival.input_tokens]
    else:
        units = vocabulary.draw(f"{seed}/trace/{index}", arrival.input_tokens)
    return Question(vocabulary.render(units), arrival.output_tokens)
