"""The tokenizer's loop: requests in, work for engines out. Takes whatever has arrived as one batch."""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

from services.tokenizer.encode import Encoder
from services.tokenizer.public import BadPrefixes, read
from shared import trace
from shared.config import ConfigError, TokenizerConfig
from shared.connection import BusDown
from shared.messages import Fail, Message, Step, Submit, Work
from shared.readers import Delivery, Group
from shared.run import Life
from shared.shapes import context_of
from shared.vocab import load_vocab

RETRY_S = 0.5
AT_ONCE = 4000  # characters that take about a millisecond: a thread's round trip would cost a third of that
log = logging.getLogger("headrace")


async def main(life: Life[TokenizerConfig]) -> None:
    config = life.config
    life.detail = "reading the vocabulary"
    encoder = await asyncio.to_thread(_encoder, config)
    group = Group(life.bus, life.bus.names.submit, "tokenizers", config.id)
    life.mark_ready(encoder.detail)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_take(life, group, encoder))
        tasks.create_task(_take_over(life, group, encoder))
    await group.close()


async def _take(life: Life[TokenizerConfig], group: Group, encoder: Encoder) -> None:
    while not life.stopping.is_set():
        try:
            await _serve(life, group, encoder, await group.read(life.config.batch))
        except BusDown as error:
            log.warning("%s: %s", life.config.id, error)
            await asyncio.sleep(RETRY_S)


async def _take_over(life: Life[TokenizerConfig], group: Group, encoder: Encoder) -> None:
    """What a tokenizer that died had not handed on."""
    while not life.stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(life.stopping.wait(), group.look_again_s)
        with contextlib.suppress(BusDown):
            await _serve(life, group, encoder, await group.stale(life.config.batch))


def _encoder(config: TokenizerConfig) -> Encoder:
    """Raises ConfigError with what to do."""
    vocab = load_vocab(config.model)
    longest = context_of(config.model_shape) if config.model_shape else vocab.context
    context = min(config.max_context or longest, longest)
    try:
        public = read(Path(config.public_prefixes).read_text()) if config.public_prefixes else []
        return Encoder(vocab, context, config.dtype, config.block_size, public)
    except (OSError, BadPrefixes) as error:
        raise ConfigError(f"HEADRACE_TOKENIZER_PUBLIC_PREFIXES={config.public_prefixes}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{config.model}: {error}") from error


async def _serve(life: Life[TokenizerConfig], group: Group, encoder: Encoder, arrived: list[Delivery]) -> None:
    """Encode a batch and hand it on. An entry is acknowledged in the transaction that writes its work."""
    submits = [delivery.message for delivery in arrived if isinstance(delivery.message, Submit)]
    if not submits:
        return
    now_ms = int(1000 * time.time())
    if sum(map(_characters, submits)) <= AT_ONCE:
        answers = _encode(encoder, submits, now_ms)
    else:
        answers = await asyncio.to_thread(_encode, encoder, submits, now_ms)
    onward = [_onward(life, submit, answer) for submit, answer in zip(submits, answers, strict=True)]
    await group.hand_on([delivery.entry for delivery in arrived], onward)


def _encode(encoder: Encoder, submits: list[Submit], now_ms: int) -> list[Work | Fail]:
    with trace.span("tokenizer", "encode", work=(len(submits), 0)):
        return encoder.encode(submits, now_ms)


def _characters(submit: Submit) -> int:
    prompt, layout = submit.prompt, submit.layout
    own = sum(len(message.content) for message in prompt) if isinstance(prompt, tuple) else len(prompt)
    return own + (sum(len(text) for part in (*layout.parts, layout.arguments) for _, text in part) if layout else 0)


def _onward(life: Life[TokenizerConfig], submit: Submit, answer: Work | Fail) -> tuple[str, Message]:
    """Where an answer goes: work to the engines, a refusal straight to the client's token log."""
    names, counters = life.bus.names, life.stats.counters
    if isinstance(answer, Fail):
        counters["refused"] += 1
        return names.tokens(submit.partition), Step(records=(answer,))
    counters["requests"] += 1
    counters["prompt_tokens"] += len(answer.prompt) // 4
    return names.work, answer
