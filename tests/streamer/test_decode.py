"""Detokenizing: any token sequence, any stop strings; the pieces joined are the whole, and nothing leaks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.streamer.decode import TextStream
from shared.config import bundled_model
from shared.vocab import Vocab, load_vocab

texts = st.text(max_size=40) | st.sampled_from(["👩‍👩‍👧‍👦 ok", "naïve café", "日本語のテスト", "🇫🇷🏳️‍🌈", "a\r\n\tb  c"])


@pytest.fixture(scope="module")
def vocab() -> Vocab:
    return load_vocab(bundled_model())


def pieces(vocab: Vocab, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(vocab.tokenizer, stop)
    out: list[str] = []
    for id in ids:
        out.append(stream.push(id))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_text_comes_back_whole(vocab: Vocab, text: str) -> None:
    ids = vocab.tokenizer.encode(text, add_special_tokens=False).ids
    parts = pieces(vocab, ids)
    assert "".join(parts) == vocab.tokenizer.decode(ids).rstrip("\ufffd")
    if vocab.tokenizer.decode(ids) == text and "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_any_ids_come_back_as_the_whole_decode(vocab: Vocab, ids: list[int]) -> None:
    """Random ids are mostly broken UTF-8: all is told, but for a character that is cut off at the end."""
    assert "".join(pieces(vocab, ids)) == vocab.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc", max_size=40), stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_strings_never_leak(vocab: Vocab, text: str, stops: list[str]) -> None:
    ids = vocab.tokenizer.encode(text, add_special_tokens=False).ids
    shown = ""
    for part in pieces(vocab, ids, tuple(stops)):
        shown += part
        assert not any(stop in shown for stop in stops)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert len(shown) >= min(ends) - max(map(len, stops))
