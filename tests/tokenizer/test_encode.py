"""Templates and encoding: the golden prompts come out id by id, bad requests are refused alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.tokenizer.encode import Encoder
from services.tokenizer.public import BadPrefixes, read
from services.tokenizer.template import BadChat, ChatTemplate
from shared.blocks import chain, root
from shared.config import bundled_model
from shared.fields import pack_ids, unpack_ids
from shared.layout import Layout, Placement
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
    fields: dict[str, Any] = {"tenant": "t", "generation": 0, "max_tokens": None, "deadline_ms": LATE} | more
    return Submit(
        request="r", partition="p", log_from="0-0", given=(), ends=(), prompt=prompt,
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


def hashes(vocab: Vocab, tenant: str, prompt: Any, public: tuple[str, ...]) -> tuple[bytes, list[bytes]]:
    [work] = Encoder(vocab, 8192, "float32", 8, public).encode([submit(prompt, tenant=tenant)], 0)
    assert isinstance(work, Work)
    return work.prompt, [work.blocks[at : at + 16] for at in range(0, len(work.blocks), 16)]


SYSTEM = "You are a clerk of the water board. Answer in one sentence, and name the lock, the level and the hour. " * 2
ASKED = "How high does the water stand at the third lock this morning, and who will open the gate for us? " * 2


@pytest.mark.parametrize("chat", [True, False])
def test_public_prefixes_are_shared_and_nothing_else(vocab: Vocab, chat: bool) -> None:
    """Tenants share the blocks that lie in the declared text; everything behind, and all of other prompts, is their own."""
    prompt: Any = SYSTEM + ASKED
    if chat:
        prompt = (ChatMessage(role="system", content=SYSTEM), ChatMessage(role="user", content=ASKED))
    (ids, one), (_, other) = (hashes(vocab, tenant, prompt, ("Another prompt.", SYSTEM)) for tenant in ("a", "b"))
    same = [a == b for a, b in zip(one, other, strict=True)]
    covered = len(vocab.tokenizer.encode(SYSTEM).ids) // 8
    assert same == sorted(same, reverse=True)
    assert covered - 1 <= sum(same) <= covered + 1 < len(same)
    assert not {*hashes(vocab, "a", ids, ())[1]} & {*hashes(vocab, "b", ids, ())[1]}
    assert hashes(vocab, "a", ids, ())[1][0] != one[0]


def test_the_last_full_block_is_private(vocab: Vocab) -> None:
    """Else a tenant could see, by what an engine adds behind it, whether another has had that answer."""
    ids, blocks = hashes(vocab, "a", SYSTEM, (SYSTEM,))
    others = hashes(vocab, "b", SYSTEM, (SYSTEM,))[1]
    assert blocks[:-1] == others[:-1]
    assert blocks[-1] != others[-1]
    assert len(blocks) == len(ids) // 32


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[""]', "[" + '"x",' * 64 + '"x"]'])
def test_a_bad_file_of_public_prefixes(text: str) -> None:
    with pytest.raises(BadPrefixes):
        read(text)


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


LAYOUT = Layout(
    mark="*here*",
    parts=(((0, "You are a guide. "), (20, "Be kind. ")), ((10, " The sea."),), ((9, ""),)),
    arguments=((16, "two"),),
    end=30,
)


def laid_out(encoder: Encoder, prompt: Any, layout: Layout = LAYOUT) -> Work | Fail:
    [answer] = encoder.encode([submit(prompt, layout=layout)], 0)
    return answer


def test_modules_stand_behind_the_templates_words(encoder: Encoder, vocab: Vocab) -> None:
    """What the template says before them is the head; everything is encoded alone; positions count from behind the template."""
    chat = (ChatMessage(role="system", content="*here*Go on."), ChatMessage(role="user", content="Hi"))
    work = laid_out(encoder, chat)
    assert isinstance(work, Work)
    before, behind = "<|im_start|>system\n", "Go on.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    texts = [before, "You are a guide. ", "Be kind. ", " The sea.", "two", behind]
    ids = [vocab.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert list(unpack_ids(work.prompt)) == [id for each in ids for id in each]
    lengths = [len(each) for each in ids]
    start = lengths[0]
    assert work.placement == Placement(
        head=start,
        parts=(((start, lengths[1]), (start + 20, lengths[2])), ((start + 10, lengths[3]),)),
        rest=((start + 16, lengths[4]), (start + 30, lengths[5])),
    )
    assert work.blocks == b"" and work.max_tokens == 100 - start - 30 - lengths[5]


def test_a_plain_prompt_has_no_template(encoder: Encoder) -> None:
    work = laid_out(encoder, "*here*Go on.", LAYOUT.model_copy(update={"arguments": ()}))
    assert isinstance(work, Work)
    assert work.placement is not None
    assert not work.placement.head
    assert [part[0][0] for part in work.placement.parts] == [0, 10]
    assert work.placement.rest[0][0] == 30


@pytest.mark.parametrize(
    ("prompt", "change", "code", "why"),
    [
        ("*here*", {}, "bad_prompt", "nothing stands behind"),
        ("Go on.", {}, "bad_prompt", "no place for the prompt schema's modules"),
        ("*here* and *here*", {}, "bad_prompt", "no place for the prompt schema's modules"),
        ("*here*Go on.", {"parts": (((0, "one two three four five six"),), ((4, " The sea."),))}, "bad_prompt", "reaches from"),
        ("*here*Go on.", {"end": 5}, "bad_prompt", "reaches from"),
        ("*here*Go on.", {"end": 99}, "prompt_too_long", "with all modules of its schema"),
    ],
)
def test_what_does_not_fit_is_refused(encoder: Encoder, prompt: str, change: dict[str, Any], code: str, why: str) -> None:
    answer = laid_out(encoder, prompt, LAYOUT.model_copy(update=change))
    assert isinstance(answer, Fail)
    assert answer.code == code
    assert why in answer.text
