"""Chained hashes of prompt blocks: the name under which a block's keys and values may be shared. Pure.

A block's hash covers all tokens before it, and the chain's root covers everything else that shapes the bytes: two equal
hashes mean equal KV. Computed where tokens are born (the tokenizer), extended by the engine as sequences grow.
"""

import hashlib

HASH_BYTES = 16
LAYOUT_VERSION = 1


def root(fingerprint: str, dtype: str, block_size: int, tenant: str) -> bytes:
    """The chain's start. The tenant is part of it, so that no tier can drop it (and no tenant can probe another's cache)."""
    parts = ("headrace", str(LAYOUT_VERSION), fingerprint, dtype, str(block_size), tenant)
    return hashlib.sha256("\0".join(parts).encode()).digest()[:HASH_BYTES]


def extend(parent: bytes, block: bytes) -> bytes:
    """The hash of one full block (packed token ids) that follows `parent`."""
    return hashlib.sha256(parent + block).digest()[:HASH_BYTES]


def branch(root: bytes, *parts: bytes) -> bytes:
    """Another chain's start, which depends on this one and on what shapes that chain's bytes beside its tokens."""
    return hashlib.sha256(b"\0".join((b"headrace-branch", root, *(str(len(part)).encode() + part for part in parts)))).digest()[
        :HASH_BYTES
    ]


def chain(start: bytes, ids: bytes, block_size: int) -> list[bytes]:
    """Hashes of every full block of `ids` (packed int32), in order."""
    width = 4 * block_size
    hashes: list[bytes] = []
    parent = start
    for at in range(0, len(ids) - width + 1, width):
        parent = extend(parent, ids[at : at + width])
        hashes.append(parent)
    return hashes
