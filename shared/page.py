"""A page in a prefix cache: a header of HEAD_BYTES that says what the payload is, and the payload. Pure.

Whoever loads a page compares all of the header with what was asked for, and the payload with its checksum: a cache may
lose pages, or be handed back the wrong ones, and nothing but time is lost.
"""

import struct
from dataclasses import dataclass

import xxhash

from shared.blocks import HASH_BYTES

HEAD_BYTES = 4096  # a memory page, so that payloads lie on whole memory pages
_MAGIC = b"HRPAGE01"
_FIELDS = struct.Struct(f"<8s{HASH_BYTES}s{HASH_BYTES}sQQI")  # magic, space, hash, payload bytes, checksum, id bytes
_CHECK = struct.Struct("<Q")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Label:
    """What a page claims to be: keys and values of the tokens `ids` (packed), at the end of the chain `hash`."""

    space: bytes  # everything else that shapes the bytes
    hash: bytes
    ids: bytes


def slot_bytes(page_bytes: int) -> int:
    """Header and payload, in whole memory pages."""
    return HEAD_BYTES + -(-page_bytes // HEAD_BYTES) * HEAD_BYTES


def head(label: Label, payload: Buffer) -> bytes:
    """The header that goes before a payload."""
    fields = _FIELDS.pack(_MAGIC, label.space, label.hash, len(payload), checksum(payload), len(label.ids))
    packed = fields + label.ids
    return packed + _CHECK.pack(checksum(packed))


def checksum(data: Buffer) -> int:
    """XXH3: 5 GB/s of memory on a core here where zlib's CRC-32 has 2.6, and threads may share the work."""
    return xxhash.xxh3_64_intdigest(data)


def verify(header: Buffer, payload: Buffer, label: Label) -> str:
    """Why this is not the page with that label; empty when it is."""
    length = _FIELDS.size + len(label.ids)
    if len(header) < length + _CHECK.size:
        return "truncated"
    packed = bytes(header[:length])
    if _CHECK.unpack_from(header, length)[0] != checksum(packed):
        return "header"
    magic, space, hash, size, payload_sum, _ = _FIELDS.unpack_from(packed)
    claims = {"magic": magic, "space": space, "hash": hash, "tokens": packed[_FIELDS.size :], "length": size}
    meant = {"magic": _MAGIC, "space": label.space, "hash": label.hash, "tokens": label.ids, "length": len(payload)}
    if wrong := [name for name in claims if claims[name] != meant[name]]:
        return wrong[0]
    return "" if payload_sum == checksum(payload) else "checksum"
