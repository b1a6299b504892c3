"""Configuration is complete and loud: an unknown or wrong variable is an error that names it."""

import pytest

from shared.config import ConfigError, EngineConfig, StreamerConfig, load, shown


def test_defaults_and_overrides() -> None:
    config = load(EngineConfig, "engine", {"HEADRACE_ENGINE_TOKEN_BUDGET": "128", "HEADRACE_DTYPE": "float32", "PATH": "/bin"})
    assert (config.token_budget, config.dtype, config.block_size) == (128, "float32", 16)


def test_prefix_caches() -> None:
    for given in ("", "/run/a.sock", "/run/a.sock,cache-b:7070,[::1]:7070"):
        assert load(EngineConfig, "engine", {"HEADRACE_ENGINE_PREFIX_CACHES": given}).prefix_caches == given


def test_other_stages_may_share_the_environment() -> None:
    load(StreamerConfig, "streamer", {"HEADRACE_ENGINE_TOKEN_BUDGET": "128", "HEADRACE_STREAMER_PORT": "9000"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEADRACE_TYPO", "1"),
        ("HEADRACE_ENGINE_TOKEN_BUGDET", "128"),
        ("HEADRACE_ENGINE_TOKEN_BUDGET", "many"),
        ("HEADRACE_ENGINE_TOKEN_BUDGET", "-1"),
        ("HEADRACE_BLOCK_SIZE", "17"),
        ("HEADRACE_DTYPE", "int3"),
        ("HEADRACE_ID", "a b"),
        ("HEADRACE_ENGINE_PREFIX_CACHES", "nowhere"),
        ("HEADRACE_ENGINE_PREFIX_CACHES", "/run/a.sock,host:port"),
    ],
)
def test_what_is_wrong_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(EngineConfig, "engine", {variable: value})
    assert variable.removeprefix("HEADRACE_").removeprefix("ENGINE_").lower() in str(error.value).lower()


def test_passwords_are_not_shown() -> None:
    config = load(EngineConfig, "engine", {"HEADRACE_REDIS_URL": "redis://engine:secret@broker:6379/0"})
    assert "secret" not in shown(config)
    assert "broker" in shown(config)
