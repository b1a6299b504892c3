"""A model's vocabulary: tokenizer, chat template, special ids, context length, from a GGUF file or a hub-style directory.

Reading a GGUF's vocabulary takes seconds, so what was read is kept as JSON in the user's cache, by the file's fingerprint.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from shared.config import ConfigError

SAMPLES, SAMPLE_BYTES = 64, 1 << 14
CACHE_VERSION = 1
_GGUF_CONTROL = 3  # token type of special tokens (GGUF specification, `tokenizer.ggml.token_type`)

# The splitting rules that GGUF files name in `tokenizer.ggml.pre`, as llama.cpp defines them.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


@dataclass(frozen=True, slots=True)
class VocabFiles:
    """What there is to know of a vocabulary, as plain data."""

    tokenizer: str  # tokenizers' own JSON
    template: str  # jinja2; empty when the model has none
    bos: str
    eos: str
    stop_ids: tuple[int, ...]
    context: int
    fingerprint: str


class Vocab:
    """The tokenizer with what belongs to it. `fingerprint` names the model's content, not its path."""

    def __init__(self, files: VocabFiles) -> None:
        self.tokenizer = Tokenizer.from_str(files.tokenizer)
        self.template, self.bos, self.eos = files.template, files.bos, files.eos
        self.stop_ids, self.context, self.fingerprint = tuple(files.stop_ids), files.context, files.fingerprint

    @property
    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size())


def load_vocab(path: str) -> Vocab:
    """Read (or recall) the vocabulary of a model. Raises ConfigError with what to do."""
    where = Path(path)
    if not path or not where.exists():
        raise ConfigError(f"no model at {path!r}: give --model (HEADRACE_MODEL) a GGUF file or a hub-style directory")
    mark = fingerprint(where)
    kept = _cache_path(mark)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Vocab(VocabFiles(**json.loads(kept.read_text())))
    try:
        files = _from_directory(where, mark) if where.is_dir() else _from_gguf(where, mark)
        vocab = Vocab(files)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{where}: not a readable model ({type(error).__name__}: {error})") from error
    _keep(kept, files)
    return vocab


def fingerprint(path: Path) -> str:
    """SHA-256 over sizes and evenly spread samples of a model's files: enough to tell models apart, in milliseconds."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name if path.is_dir() else ''}:{size}\0".encode())
        with file.open("rb") as stream:
            for at in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                stream.seek(at)
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()


def _cache_path(mark: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headrace" / f"vocab-{CACHE_VERSION}-{mark[:32]}.json"


def _keep(path: Path, files: VocabFiles) -> None:
    with contextlib.suppress(OSError):  # a read-only home only costs the next start its seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            json.dump(asdict(files), stream)
        os.replace(stream.name, path)


def _from_gguf(path: Path, mark: str) -> VocabFiles:
    from gguf import GGUFReader  # numpy and a slow parse: only when nothing is kept

    fields = GGUFReader(path).fields

    def value(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    kind = value("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(
            f"{path}: its vocabulary is {kind!r}, only byte-level BPE ('gpt2') is read from GGUF; use a directory"
        )
    tokens: list[str] = value("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, _merges(value("tokenizer.ggml.merges"))))
    tokenizer.pre_tokenizer = _splitting(value("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type", [])
    special = [AddedToken(tokens[id], special=True, normalized=False) for id, type in enumerate(types) if type == _GGUF_CONTROL]
    tokenizer.add_special_tokens(special)
    eos = value("tokenizer.ggml.eos_token_id")
    stops = [id for id in (eos, value("tokenizer.ggml.eot_token_id"), value("tokenizer.ggml.eom_token_id")) if id is not None]
    bos = value("tokenizer.ggml.bos_token_id")
    return VocabFiles(
        tokenizer=tokenizer.to_str(),
        template=value("tokenizer.chat_template", ""),
        bos=tokens[bos] if bos is not None else "",
        eos=tokens[eos] if eos is not None else "",
        stop_ids=tuple(sorted(set(stops))),
        context=int(value(f"{value('general.architecture')}.context_length")),
        fingerprint=mark,
    )


def _merges(merges: list[str]) -> list[tuple[str, str]]:
    pairs = (merge.partition(" ") for merge in merges)
    return [(left, right) for left, _, right in pairs]


def _splitting(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if name in ("default", "gpt-2"):
        return plain
    raise ConfigError(f"the GGUF file's splitting rule {name!r} is unknown; use a hub-style directory with tokenizer.json")


def _from_directory(path: Path, mark: str) -> VocabFiles:
    if not (path / "tokenizer.json").exists() or not (path / "config.json").exists():
        raise ConfigError(f"{path}: a model directory needs config.json and tokenizer.json")
    config = json.loads((path / "config.json").read_text())
    extra = _optional_json(path / "tokenizer_config.json")
    generation = _optional_json(path / "generation_config.json")
    template = path / "chat_template.jinja"
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    return VocabFiles(
        tokenizer=(path / "tokenizer.json").read_text(),
        template=template.read_text() if template.exists() else _template(extra.get("chat_template")),
        bos=_token(extra.get("bos_token")),
        eos=_token(extra.get("eos_token")),
        stop_ids=tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),),
        context=int(config["max_position_embeddings"]),
        fingerprint=mark,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _template(value: Any) -> str:
    """Hub files hold one template, or a list of named ones."""
    if isinstance(value, list):
        return str(next((item["template"] for item in value if item.get("name") == "default"), ""))
    return value or ""


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else value or ""
