"""Opens a GGUF file: its metadata and its tensors as numpy views of the mapped file. No torch."""

import struct
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType
from gguf.gguf_reader import ReaderTensor

from services.engine.spec import BadModel, ModelSpec, from_gguf

LENGTH = struct.Struct("=Q")


class TensorReader(GGUFReader):
    """A GGUFReader that steps over arrays: the vocabulary, seconds to read and of no use to an engine."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        kind = GGUFValueType(int(self._get(orig_offs, "uint32")[0]))
        return self._past(kind, orig_offs + 4) - orig_offs, [], [], []

    def _past(self, kind: GGUFValueType, at: int) -> int:
        """The offset behind an array of `kind` whose length lies at `at`."""
        raw = self.data.data
        count = int(LENGTH.unpack_from(raw, at)[0])
        end = at + LENGTH.size
        if kind != GGUFValueType.STRING:
            return end + count * int(self.gguf_scalar_to_np[kind]().itemsize)
        for _ in range(count):
            end += LENGTH.size + int(LENGTH.unpack_from(raw, end)[0])
        return end


def open_gguf(path: Path) -> tuple[ModelSpec, dict[str, ReaderTensor]]:
    """The spec and the tensors by name. Raises BadModel for a file that is not a whole GGUF model."""
    try:
        reader = TensorReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise BadModel(f"{path} is not a whole GGUF file ({error}); download it again") from None
    fields = {name: field.contents() for name, field in reader.fields.items() if field.types}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    return from_gguf(fields, shapes), tensors
