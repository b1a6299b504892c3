"""Messages as bytes: msgpack of the protocol's version and a map with the message's kind. Pure.

Readers validate what they read; what does not validate raises `Malformed` and goes to `dead`.
"""

from collections.abc import Iterable
from typing import Annotated

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from shared.fields import MAX_MESSAGE_BYTES
from shared.messages import LogRecord, Message, TokensFields

VERSION = 1


class Malformed(ValueError):
    """A packed message that is not ours: not msgpack, another version, or fields that do not validate."""


_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def encode(item: Message) -> bytes:
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


def decode(packed: bytes) -> Message:
    """Unpack and validate a message. Raises Malformed."""
    try:
        if len(packed) > MAX_MESSAGE_BYTES:
            raise Malformed(f"larger than {MAX_MESSAGE_BYTES} bytes")
        version, body = msgpack.unpackb(packed, use_list=False, max_ext_len=0)
        if version != VERSION:
            raise Malformed(f"protocol version {version!r} is not {VERSION}")
        return _MESSAGE.validate_python(body)
    except Malformed:
        raise
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise Malformed(f"not a message: {type(error).__name__}") from None
