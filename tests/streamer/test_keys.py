"""API keys: what a line says, and that only the key itself opens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.streamer.gate import is_loopback, load_keys
from services.streamer.keys import ANYBODY, LOCAL, Limits, digest, main, parse_keys
from shared.config import ConfigError, StreamerConfig


def test_a_new_key_opens_and_nothing_else_does() -> None:
    key, line = re.fullmatch(r"key:  (\S+)\nline: (.*)\n", main("acme")).groups()  # type: ignore[union-attr]
    keys = parse_keys(f"# ours\n{line} requests=5 tokens=60000\n; other {digest('x')} streams=2")
    found = keys.find(key)
    assert found is not None
    assert (found.tenant, found.limits) == ("acme", Limits(requests=5, tokens=60000))
    assert keys.named(found.name) is found
    assert key not in found.name
    assert [keys.find(wrong) for wrong in ("", key[:-1], key + "x", line, found.digest, "x" * 10_000)] == [None] * 6


@pytest.mark.parametrize("text", ["", "none", " none\n", "# nothing\n\n"])
def test_nobody_needs_a_key(text: str) -> None:
    assert parse_keys(text).find("") == ANYBODY
    assert ANYBODY.tenant == LOCAL


@pytest.mark.parametrize("line", ["acme", "acme 1234", f"a/b {'0' * 64}", f"a {'0' * 64} tokens=0", f"a {'0' * 64} speed=1"])
def test_a_wrong_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="key 2"):
        parse_keys(f"ok {'1' * 64}\n{line}")


@given(st.text(max_size=200))
def test_any_text_is_keys_or_a_clear_error(text: str) -> None:
    try:
        keys = parse_keys(text)
    except ValueError as error:
        assert "key " in str(error)
    else:
        assert keys.required or keys.find("anything") == ANYBODY


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_machines_do_not_get_in_unasked(host: str) -> None:
    with pytest.raises(ConfigError, match="KEYS_FILE"):
        load_keys(StreamerConfig(id="s", host=host))
    assert not load_keys(StreamerConfig(id="s", host=host, keys="none")).required
    assert load_keys(StreamerConfig(id="s", host=host, keys=f"t {'0' * 64}")).required


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.1.evil.org", False)]
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) == local
