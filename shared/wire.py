"""What every message is."""

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """A frozen message, strict about types on every reading."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
