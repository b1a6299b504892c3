"""The kinds of fields that messages are made of, each with its range; and token ids as bytes. Pure."""

import sys
from array import array
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

MAX_MESSAGE_BYTES = 4 << 20
MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_CHAT_MESSAGES = 1024


def pack_ids(ids: Iterable[int]) -> bytes:
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> "array[int]":
    ids = array("i")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def _whole_ids(packed: bytes) -> bytes:
    if len(packed) % 4:
        raise ValueError("packed token ids must be a multiple of 4 bytes")
    return packed


RequestId = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Tenant = Annotated[str, Field(min_length=1, max_length=64)]
Partition = Annotated[str, Field(min_length=1, max_length=64)]
EntryId = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Epoch = tuple[int, int, int]  # (generation, and the two halves of the `work` entry's id): a total order of attempts
Ids = Annotated[bytes, Field(max_length=MAX_MESSAGE_BYTES), AfterValidator(_whole_ids)]
Count = Annotated[int, Field(ge=0)]
ChoiceIndex = Annotated[int, Field(ge=0, lt=MAX_CHOICES)]
Given = Annotated[tuple[Ids, ...], Field(max_length=MAX_CHOICES)]

# Sampling ranges, the same on the wire and at the door (README, "Limits").
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=1 << 20)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
