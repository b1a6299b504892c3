"""Templates and encoding: the golden prompts come out id by id, bad requests are refused alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer.encode import Encoder
from services.tokenizer.template import BadChat, ChatTemplate
from shared.blocks import chain, root
from shared.config import bundled_model
from shared.fields import pack_ids, unpack_ids
from shared.messages import ChatMessage, Fail, Sampling, Submit, Work
from shared.vocab import Vocab, VocabFiles, load_vocab

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())
LATE = 10**14


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return load_vocab(bundled_model())


@pytest.fixture(scope="module")
def encoder(vocab: Vocab) -> Encoder:
    return Encoder(vocab, 100, "float32", 16)


def submit(prompt: Any, sampling: Sampling | None = None, **more: Any) -> Submit:
    fields: dict[str, Any] = {"generation": 0, "max_tokens": None, "deadline_ms": LATE} | more
    return Submit(
        request="r", tenant="t", partition="p", log_from="0-0", given=(), ends=(), prompt=prompt,
        sampling=sampling or Sampling(), **fields,
    )  # fmt: skip


def test_golden_prompts(vocab: Vocab) -> None:
    chats = [tuple(ChatMessage(**message) for message in record["messages"]) for record in GOLDEN]
    works = Encoder(vocab, 8192, "float32", 16).encode([submit(chat) for chat in chats], 0)
    for work, record in zip(works, GOLDEN, strict=True):
        assert isinstance(work, Work)
        assert list(unpack_ids(work.prompt)) == record["prompt_ids"]
        start = root(vocab.fingerprint, "float32", 16, "t")
        assert work.blocks == b"".join(chain(start, work.prompt, 16))


def test_a_batch_is_answered_in_order_and_bad_ones_alone(encoder: Encoder) -> None:
    chat = (ChatMessage(role="user", content="hi"),)
    batch = [
        submit("one two"),
        submit(pack_ids([5, 6])),
        submit(chat),
        submit("x " * 200),
        submit(""),
        submit("late", deadline_ms=1),
    ]
    kinds = [answer.code if isinstance(answer, Fail) else "work" for answer in encoder.encode(batch, 10)]
    assert kinds == ["work", "work", "work", "prompt_too_long", "bad_prompt", "deadline_exceeded"]


def test_max_tokens(encoder: Encoder) -> None:
    room, exact, over = encoder.encode([submit(pack_ids(range(40)), max_tokens=n) for n in (None, 60, 61)], 0)
    assert isinstance(room, Work)
    assert room.max_tokens == 60
    assert isinstance(exact, Work)
    assert isinstance(over, Fail)


def test_stop_ids(encoder: Encoder, vocab: Vocab) -> None:
    samplings = [Sampling(), Sampling(stop_ids=(7,)), Sampling(ignore_eos=True, stop_ids=(7,))]
    works = encoder.encode([submit("x", sampling) for sampling in samplings], 0)
    assert [work.sampling.stop_ids for work in works if isinstance(work, Work)] == [vocab.stop_ids, (7, *vocab.stop_ids), (7,)]


def test_a_new_generation_resumes(encoder: Encoder) -> None:
    [work] = encoder.encode([submit("x", generation=2)], 0)
    assert isinstance(work, Work)
    assert work.resume


def with_template(vocab: Vocab, template: str) -> ChatTemplate:
    files = VocabFiles(vocab.tokenizer.to_str(), template, vocab.bos, vocab.eos, vocab.stop_ids, 10, "f")
    return ChatTemplate(Vocab(files))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception('no system role') }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_the_sandbox_holds(vocab: Vocab, template: str) -> None:
    with pytest.raises(BadChat):
        with_template(vocab, template).render([ChatMessage(role="user", content="x")])


def test_a_model_without_a_template(vocab: Vocab) -> None:
    with pytest.raises(BadChat, match="completions"):
        with_template(vocab, "").render([ChatMessage(role="user", content="x")])


def test_a_template_that_is_none(vocab: Vocab) -> None:
    with pytest.raises(ValueError, match="compile"):
        with_template(vocab, "{% for %}")
