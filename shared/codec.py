"""Messages as bytes: msgpack of the protocol's version and a map with the message's kind. Pure.

Readers validate what they read; what does not validate raises `Malformed` and goes to `dead`.
"""

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from shared.fields import MAX_MESSAGE_BYTES
from shared.messages import LogRecord, Message, TokensFields
from shared.prefix import FRAME_HEAD_BYTES, Talk
from shared.wire import Wire

VERSION = 1


class Malformed(ValueError):
    """A packed message that is not ours: not msgpack, another version, or fields that do not validate."""


_Item = TypeVar("_Item")
_RECORD: TypeAdapter[LogRecord] = TypeAdapter(LogRecord)
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])
_TALK: TypeAdapter[Talk] = TypeAdapter(Annotated[Talk, Field(discriminator="kind")])


def encode(item: Wire) -> bytes:
    """Pack a message. Raises ValueError when it is larger than `MAX_MESSAGE_BYTES`."""
    return _packed(item)


def _packed(body: object) -> bytes:
    packed: bytes = msgpack.packb([VERSION, body], default=vars)  # a message's fields, without a copy of them all
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(packed)} bytes is larger than {MAX_MESSAGE_BYTES}")
    return packed


def encode_step(records: Iterable[LogRecord | TokensFields]) -> bytes:
    """Pack a `Step`. Raises ValueError when it is larger than `MAX_MESSAGE_BYTES`."""
    return _packed({"kind": "step", "records": list(records)})


def frame(item: Wire) -> bytes:
    """A message on a connection: its length, then itself."""
    packed = encode(item)
    return len(packed).to_bytes(FRAME_HEAD_BYTES, "big") + packed


def frame_length(head: bytes) -> int:
    """The length that a frame's head announces. Raises Malformed when it is more than a message may have."""
    length = int.from_bytes(head, "big")
    if length > MAX_MESSAGE_BYTES:
        raise Malformed(f"a frame of {length} bytes")
    return length


def decode(packed: bytes) -> Message:
    """Unpack and validate a message of a stream. Raises Malformed."""
    return _validated(_MESSAGE, _body(packed))


def decode_talk(packed: bytes) -> Talk:
    """Unpack and validate what an engine and a prefix cache say to each other. Raises Malformed."""
    return _validated(_TALK, _body(packed))


def records_of(packed: bytes, request: str) -> list[LogRecord]:
    """What a `Step` says of one request; what it says of others is not looked at. Raises Malformed."""
    if request.encode() not in packed:
        return []
    body = _body(packed)
    records = body.get("records") if isinstance(body, dict) and body.get("kind") == "step" else None
    told = records if isinstance(records, tuple) else ()
    return [_validated(_RECORD, each) for each in told if isinstance(each, dict) and each.get("request") == request]


def _body(packed: bytes) -> Any:
    if len(packed) > MAX_MESSAGE_BYTES:
        raise Malformed(f"larger than {MAX_MESSAGE_BYTES} bytes")
    try:
        version, body = msgpack.unpackb(packed, use_list=False, max_ext_len=0)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise Malformed(f"not a message: {type(error).__name__}") from None
    if version != VERSION:
        raise Malformed(f"protocol version {version!r} is not {VERSION}")
    return body


def _validated(form: "TypeAdapter[_Item]", body: Any) -> _Item:
    try:
        return form.validate_python(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"not a message: {type(error).__name__}") from None
