"""Who comes in: API keys, tickets and origins. Denied by default; decided on the matched route, never on the path's text."""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from services.streamer.body import BadRequest
from services.streamer.keys import OPEN, Key, Keys, digest, parse_keys
from services.streamer.quota import Tickets
from shared.config import ConfigError, StreamerConfig

KEY: web.RequestKey[Key] = web.RequestKey("key", Key)
PUBLIC = frozenset({"/", "/page", "/healthz", "/readyz"})  # routes that need no key
SUBPROTOCOL, TICKET = "headrace", "headrace.ticket."  # offered by browsers, one real and one that carries the ticket

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def load_keys(config: StreamerConfig) -> Keys:
    """Raises ConfigError, also where other machines would get in unasked."""
    text = config.keys
    try:
        if config.keys_file:
            text = f"{text}\n{Path(config.keys_file).read_text()}"
        keys = parse_keys(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"HEADRACE_STREAMER_KEYS, _KEYS_FILE: {error}") from error
    if not keys.required and text.strip() != OPEN and not is_loopback(config.host):
        raise ConfigError(
            f"HEADRACE_STREAMER_HOST={config.host} lets other machines in: set HEADRACE_STREAMER_KEYS_FILE (a line comes from "
            f"python -m services.streamer.keys TENANT), or HEADRACE_STREAMER_KEYS={OPEN} where nobody needs a key"
        )
    return keys


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    def __init__(self, config: StreamerConfig, keys: Keys, tickets: Tickets) -> None:
        self._keys, self._tickets = keys, tickets
        self._origins = frozenset(config.origins.split())
        # A name that leads here from outside (DNS rebinding) would make a stranger's page one of ours.
        self._local_names_only = not keys.required and is_loopback(config.host)

    def middleware(self) -> Middleware:
        @web.middleware
        async def gate(request: web.Request, handler: _Handler) -> web.StreamResponse:
            self._check_origin(request)
            resource = request.match_info.route.resource
            if resource is None or resource.canonical not in PUBLIC:
                request[KEY] = await self._key(request)
            return await handler(request)

        return gate

    def _check_origin(self, request: web.Request) -> None:
        """A browser names the page that asks. Others' pages may look at ours, and neither ask nor open a WebSocket."""
        if self._local_names_only and not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            raise BadRequest("this server answers to local names only", None, "forbidden_host", 403)
        origin = request.headers.get("Origin")
        asks = request.method not in ("GET", "HEAD") or "Upgrade" in request.headers
        if origin is not None and asks and urlsplit(origin).netloc != request.host and origin not in self._origins:
            raise BadRequest("pages of this origin may not ask here", None, "forbidden_origin", 403)

    async def _key(self, request: web.Request) -> Key:
        kind, _, presented = request.headers.get("Authorization", "").partition(" ")
        key = self._keys.find(presented.strip() if kind.lower() == "bearer" else "")
        if key is None and (ticket := _ticket(request)):
            key = self._keys.named(await self._tickets.redeem(digest(ticket)))
        if key is None:
            raise BadRequest("no such API key: send Authorization: Bearer KEY", None, "invalid_api_key", 401)
        return key

    async def ticket(self, request: web.Request) -> web.Response:
        """What a browser offers as a WebSocket subprotocol, beside the real one, within half a minute and once."""
        ticket = secrets.token_urlsafe(32)
        await self._tickets.issue(digest(ticket), request[KEY])
        return web.json_response({"protocols": [SUBPROTOCOL, f"{TICKET}{ticket}"], "expires_in": self._tickets.TICKET_S})


def _ticket(request: web.Request) -> str:
    offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    return next((word.strip()[len(TICKET) :] for word in offered if word.strip().startswith(TICKET)), "")
