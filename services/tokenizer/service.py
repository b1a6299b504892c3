"""The tokenizer's loop: requests in, work for engines out. Takes whatever has arrived as one batch."""

import asyncio
import logging
import time
from pathlib import Path

from services.tokenizer.encode import Encoder
from services.tokenizer.public import BadPrefixes, read
from shared.bus import BusDown
from shared.config import ConfigError, TokenizerConfig
from shared.messages import Fail, Message, Step, Submit, Work
from shared.readers import Delivery, Group
from shared.run import Life
from shared.shapes import context_of
from shared.vocab import load_vocab

RETRY_S = 0.5
SWEEP_EVERY_S = 1.0  # how often to look for entries of tokenizers that went silent
log = logging.getLogger("headrace")


async def main(life: Life[TokenizerConfig]) -> None:
    config = life.config
    life.detail = "reading the vocabulary"
    encoder = await asyncio.to_thread(_encoder, config)
    group = Group(life.bus, life.bus.names.submit, "tokenizers", config.id)
    life.mark_ready(encoder.detail)
    swept = 0.0
    while not life.stopping.is_set():
        try:
            arrived = await group.read(config.batch)
            if time.monotonic() - swept > SWEEP_EVERY_S:
                swept = time.monotonic()
                arrived += await group.stale(config.batch)
            await _serve(life, group, encoder, arrived)
        except BusDown as error:
            log.warning("%s: %s", config.id, error)
            await asyncio.sleep(RETRY_S)
    await group.close()


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
    answers = await asyncio.to_thread(encoder.encode, submits, int(1000 * time.time()))
    onward = [_onward(life, submit, answer) for submit, answer in zip(submits, answers, strict=True)]
    await group.hand_on([delivery.entry for delivery in arrived], onward)


def _onward(life: Life[TokenizerConfig], submit: Submit, answer: Work | Fail) -> tuple[str, Message]:
    """Where an answer goes: work to the engines, a refusal straight to the client's token log."""
    names, counters = life.bus.names, life.stats.counters
    if isinstance(answer, Fail):
        counters["refused"] += 1
        return names.tokens(submit.partition), Step(records=(answer,))
    counters["requests"] += 1
    counters["prompt_tokens"] += len(answer.prompt) // 4
    return names.work, answer
