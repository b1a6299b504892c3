"""The tokenizer's loop: requests in, work for engines out. Takes whatever has arrived as one batch."""

import asyncio
import logging
import time

from services.tokenizer.encode import Encoder
from shared.bus import BusDown
from shared.config import ConfigError, TokenizerConfig
from shared.messages import Fail, Message, Step, Submit
from shared.readers import Delivery, Group
from shared.run import Life
from shared.vocab import load_vocab

RETRY_S = 0.5
log = logging.getLogger("headrace")


async def main(life: Life[TokenizerConfig]) -> None:
    config = life.config
    life.detail = "reading the vocabulary"
    vocab = await asyncio.to_thread(load_vocab, config.model)
    context = min(config.max_context or vocab.context, vocab.context)
    try:
        encoder = Encoder(vocab, context, config.dtype, config.block_size)
    except ValueError as error:
        raise ConfigError(f"{config.model}: {error}") from error
    group = Group(life.bus, life.bus.names.submit, "tokenizers", config.id)
    life.mark_ready(f"{vocab.size} tokens, context {context}")
    while not life.stopping.is_set():
        try:
            arrived = await group.read(config.batch) or await group.stale(config.batch)
            await _serve(life, group, encoder, arrived)
        except BusDown as error:
            log.warning("%s: %s", config.id, error)
            await asyncio.sleep(RETRY_S)
    await group.close()


async def _serve(life: Life[TokenizerConfig], group: Group, encoder: Encoder, arrived: list[Delivery]) -> None:
    """Encode a batch and hand it on. An entry is acknowledged in the transaction that writes its work."""
    submits = [delivery.message for delivery in arrived if isinstance(delivery.message, Submit)]
    if not submits:
        return
    now_ms = int(1000 * time.time())
    answers = await asyncio.to_thread(encoder.encode, submits, now_ms)
    names = life.bus.names
    onward: list[tuple[str, Message]] = []
    for submit, answer in zip(submits, answers, strict=True):
        refused = isinstance(answer, Fail)
        onward.append((names.tokens(submit.partition), Step(records=(answer,))) if refused else (names.work, answer))
        life.stats.counters["refused" if refused else "requests"] += 1
        life.stats.counters["prompt_tokens"] += 0 if refused else len(answer.prompt) // 4
    await group.hand_on([delivery.entry for delivery in arrived], onward)
