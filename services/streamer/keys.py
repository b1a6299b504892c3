"""API keys: who may ask, as which tenant, and how much. Pure. Only hashes are kept: `python -m services.streamer.keys TENANT`.

One key a line (or between semicolons): the tenant, the SHA-256 of the key in hex, and limits, as in
`acme 9f86d0… requests=5 tokens=60000 streams=32`: requests a second, tokens a minute, streams at once. What is not named is
not limited.
"""

import hashlib
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass

OPEN = "none"  # as the setting: nobody needs a key
LOCAL = "local"  # the tenant of everybody where nobody needs a key
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"(requests|tokens|streams)=([1-9][0-9]{0,8})")
MAX_KEY_CHARS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """0 is no limit."""

    requests: int = 0  # a second
    tokens: int = 0  # a minute
    streams: int = 0  # at once

    def __bool__(self) -> bool:
        return bool(self.requests or self.tokens or self.streams)


@dataclass(frozen=True, slots=True)
class Key:
    tenant: str
    digest: str
    limits: Limits

    @property
    def name(self) -> str:
        """What logs and the broker may know of it."""
        return f"{self.tenant}:{self.digest[:8]}"


ANYBODY = Key(LOCAL, "", Limits())


class Keys:
    """Found by their hash, so how long a look-up takes tells nothing of a key that exists."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.digest: key for key in keys}

    @property
    def required(self) -> bool:
        return bool(self._keys)

    def find(self, presented: str) -> Key | None:
        if not self.required:
            return ANYBODY
        if not presented or len(presented) > MAX_KEY_CHARS:
            return None
        return self._keys.get(digest(presented))

    def named(self, name: str) -> Key | None:
        """The key that a ticket was given to, if it is still one."""
        return next((key for key in self._keys.values() if key.name == name), None)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> Keys:
    """Raises ValueError with the line that is wrong (and never the key)."""
    if text.strip() == OPEN:
        return Keys(())
    lines = [line.strip() for line in text.replace(";", "\n").splitlines()]
    return Keys([_key(at, line.split()) for at, line in enumerate(lines, 1) if line and not line.startswith("#")])


def _key(at: int, words: list[str]) -> Key:
    tenant, hashed, *limits = [*words, "", ""][: max(len(words), 2)]
    if not _TENANT.fullmatch(tenant) or not _DIGEST.fullmatch(hashed):
        raise ValueError(f"key {at}: give a tenant and the SHA-256 of a key, 64 hex digits")
    found = [_LIMIT.fullmatch(word) for word in limits]
    if not all(found):
        raise ValueError(f"key {at}: a limit is requests=N, tokens=N or streams=N")
    return Key(tenant, hashed, Limits(**{match[1]: int(match[2]) for match in found if match}))


def main(tenant: str) -> str:
    """A new key and the line that makes it valid."""
    key = f"hr-{secrets.token_urlsafe(32)}"
    return f"key:  {key}\nline: {tenant} {digest(key)}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not _TENANT.fullmatch(sys.argv[1]):
        sys.exit("usage: python -m services.streamer.keys TENANT")
    sys.stdout.write(main(sys.argv[1]))
