"""/v1/prompt_schemas: register, look at and delete a tenant's prompt schemas."""

from typing import Any

from aiohttp import web

from services.streamer.api import read_body
from services.streamer.body import parse_body
from services.streamer.gate import KEY
from services.streamer.prompt_modules import Schema
from services.streamer.prompt_schemas import Schemas


class PromptApi:
    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/prompt_schemas", self._register),
            web.get("/v1/prompt_schemas", self._list),
            web.get("/v1/prompt_schemas/{name}", self._one),
            web.delete("/v1/prompt_schemas/{name}", self._delete),
        ]

    async def _register(self, request: web.Request) -> web.Response:
        schema = parse_body(Schema, await read_body(request))
        await self._schemas.put(request[KEY].tenant, schema)
        return web.json_response(_shown(schema), status=201)

    async def _list(self, request: web.Request) -> web.Response:
        found = await self._schemas.all(request[KEY].tenant)
        return web.json_response({"object": "list", "data": [_shown(schema) for schema in found.values()]})

    async def _one(self, request: web.Request) -> web.Response:
        return web.json_response(_shown(await self._schemas.find(request[KEY].tenant, request.match_info["name"])))

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await self._schemas.drop(request[KEY].tenant, name)
        return web.json_response({"object": "prompt_schema", "name": name, "deleted": True})


def _shown(schema: Schema) -> dict[str, Any]:
    return {"object": "prompt_schema"} | schema.model_dump(exclude_defaults=True)
