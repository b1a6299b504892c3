"""What every request body is: strict about its fields, and refused with the first thing that is wrong."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_TEXT = 1 << 20  # characters; the body's own limit in bytes comes first

_Body = TypeVar("_Body", bound=BaseModel)

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class BadRequest(Exception):
    """A request that cannot be served as it stands: HTTP 400 (or `status`), in OpenAI's error form."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_request", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def encodable(text: str) -> str:
    text.encode()  # lone surrogates, which JSON can spell, are no text; UnicodeEncodeError is a ValueError
    return text


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def parse_body(cls: type[_Body], raw: bytes) -> _Body:
    """Raises BadRequest with the first thing that is wrong."""
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from error


def refusal(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown field: {where}", where, "unknown_field")
    return BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where)
