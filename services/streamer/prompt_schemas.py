"""The tenants' prompt schemas, in the broker: all of a tenant's under one key, so that their number and size are bounded.

A broker that loses them (or keeps them for longer than nobody uses them) costs a client one registration.
"""

from pydantic import TypeAdapter, ValidationError

from services.streamer.body import BadRequest
from services.streamer.prompt_modules import Schema, check
from shared.bus import Bus

MAX_SCHEMAS = 64  # of a tenant
MAX_BYTES = 256 << 10  # of a tenant's schemas together: each use reads them
KEEP_S = 7 * 24 * 3600  # without being used

_Shelf = dict[str, Schema]
_SHELF: TypeAdapter[_Shelf] = TypeAdapter(_Shelf)


class Schemas:
    """Raises BusDown."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def all(self, tenant: str) -> _Shelf:
        return _read(await self._load(tenant))

    async def find(self, tenant: str, name: str) -> Schema:
        """Raises BadRequest where the tenant has no such schema."""
        schema = (await self.all(tenant)).get(name)
        if schema is None:
            raise _missing(name)
        return schema

    async def put(self, tenant: str, schema: Schema) -> None:
        """In place of the one of this name, if there is one. Raises BadRequest."""
        check(schema)
        while True:
            before = await self._load(tenant)
            if await self._write(tenant, before, _read(before) | {schema.name: schema}):
                return

    async def drop(self, tenant: str, name: str) -> None:
        """Raises BadRequest where the tenant has no such schema."""
        await self.find(tenant, name)
        while True:
            before = await self._load(tenant)
            if await self._write(tenant, before, {key: schema for key, schema in _read(before).items() if key != name}):
                return

    async def _load(self, tenant: str) -> bytes | None:
        """Whoever looks keeps them alive."""
        key = self._bus.names.schemas(tenant)
        packed, _ = await self._bus.run([("GET", key), ("EXPIRE", key, KEEP_S)])
        return bytes(packed) if packed else None

    async def _write(self, tenant: str, before: bytes | None, shelf: _Shelf) -> bool:
        packed = _SHELF.dump_json(shelf, exclude_defaults=True)
        if len(shelf) > MAX_SCHEMAS or len(packed) > MAX_BYTES:
            limit = f"{MAX_SCHEMAS} prompt schemas of {MAX_BYTES} bytes together"
            raise BadRequest(f"a tenant has room for {limit}; delete some", None, "too_many_schemas", 413)
        key = self._bus.names.schemas(tenant)
        return await self._bus.swap(key, before, [("SET", key, packed, "EX", KEEP_S)])


def _read(packed: bytes | None) -> _Shelf:
    """What cannot be read, because another version wrote it, is registered anew."""
    try:
        return _SHELF.validate_json(packed) if packed else {}
    except ValidationError:
        return {}


def _missing(name: str) -> BadRequest:
    return BadRequest(f"there is no prompt schema {name!r}: register it first", "prompt_schema.name", "schema_not_found", 404)
