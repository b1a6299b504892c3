"""The compose files against shared/config.py: no unknown variable, none forgotten, and the defaults that are documented."""

import re
from pathlib import Path

import pytest

from shared.config import MeshConfig
from shared.health import CONFIGS

FOLDER = Path(__file__).parents[2] / "compose"
FILES = [FOLDER / name for name in ("Dockerfile", "docker-compose.yml", "docker-compose.gpu.yml", ".env.example")]
# The compose file itself settles these.
SETTLED = {
    "HEADRACE_ID",
    "HEADRACE_REDIS_URL",
    "HEADRACE_STREAMER_HOST",
    "HEADRACE_STREAMER_PORT",
    "HEADRACE_STREAMER_KEYS",
    "HEADRACE_PREFIX_CACHE_SOCKET",
    "HEADRACE_ENGINE_PREFIX_CACHES",
}


def known() -> dict[str, str]:
    """Every variable that a stage understands, with its default as one writes it."""
    fields = {f"HEADRACE_{name}".upper(): field for name, field in MeshConfig.model_fields.items()}
    for stage, cls in CONFIGS.items():
        own = cls.model_fields.keys() - MeshConfig.model_fields.keys()
        fields |= {f"HEADRACE_{stage}_{name}".upper(): cls.model_fields[name] for name in own}
    return {name: "" if field.is_required() or field.default_factory else str(field.default) for name, field in fields.items()}


def settings() -> dict[str, str]:
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (FOLDER / ".env.example").read_text(), re.MULTILINE))


def passed_on() -> set[str]:
    """What docker-compose.yml hands to the stages from the outside."""
    return set(re.findall(r"^ +(HEADRACE_[A-Z_]+):$", (FOLDER / "docker-compose.yml").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_is_known(path: Path) -> None:
    assert set(re.findall(r"HEADRACE_[A-Z_]*[A-Z]", path.read_text())) <= known().keys()


def test_every_variable_can_be_set() -> None:
    assert passed_on() == known().keys() - SETTLED
    assert {name for name in settings() if name.startswith("HEADRACE_")} == passed_on()


def test_the_documented_defaults_are_the_real_ones() -> None:
    here, defaults = settings(), known()
    assert {name: here[name] for name in passed_on()} == {name: defaults[name] for name in passed_on()}
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", (FOLDER / "docker-compose.yml").read_text()))
    assert {name: here[name] for name in used} == used


def test_every_stage_has_a_health_check() -> None:
    text = (FOLDER / "docker-compose.yml").read_text()
    assert set(re.findall(r'"shared.health", "([a-z_]+)"', text)) == CONFIGS.keys() - {"streamer"}


def test_containers_are_confined() -> None:
    """Every service: a read-only root, no capabilities but the three that Redis' entry point needs, no new privileges."""
    text = (FOLDER / "docker-compose.yml").read_text()
    stage, _, services = text.partition("\nservices:\n")
    stage, redis = stage.partition("x-light")[0], services.partition("\n  tokenizer:")[0]
    for place in (stage, redis):
        for rule in ("read_only: true", "cap_drop: [ALL]", 'security_opt: ["no-new-privileges:true"]'):
            assert rule in place, rule
    assert re.findall(r"cap_add: (.*)", text) == ["[CHOWN, SETGID, SETUID]"]
    assert "privileged" not in text.replace("no-new-privileges", "")
    assert "mesh: { internal: true }" in text
    assert re.findall(r"networks: (.*)", services) == ["[mesh]"] * 4 + ["[mesh, edge]"]
    assert re.findall(r"^ +ports: (.*)", services, re.MULTILINE) == ['["${PUBLISH:-127.0.0.1:8000-8009}:8000"]']


def test_each_stage_is_its_own_user_of_the_broker() -> None:
    urls = re.findall(r"HEADRACE_REDIS_URL: redis://([a-z]+):", (FOLDER / "docker-compose.yml").read_text())
    users = re.findall(r"^user ([a-z]+) on >", (FOLDER / "users.acl").read_text(), re.MULTILINE)
    assert urls == ["tokenizer", "engine", "prefix", "streamer"]
    assert set(users) == {*urls, "operator"}


def test_redis_reads_back_what_it_wrote() -> None:
    """Redis 7.0 loads its file as the default user: transactions that this one may not do are dropped. Nobody can be it."""
    first = (FOLDER / "users.acl").read_text().splitlines()[0].split()
    assert first[:3] == ["user", "default", "off"] and {"resetpass", "allkeys", "+@all"} <= set(first)
