"""From a valid body to an open session: the model's name, admission, limits that need the vocabulary, and the record."""

import asyncio
import contextlib
import secrets
import time
from functools import partial

from aiohttp import web

from services.streamer.admission import Overloaded, admit
from services.streamer.attach import attach
from services.streamer.body import BadRequest
from services.streamer.keys import Key
from services.streamer.lengths import Lengths
from services.streamer.mesh import Mesh
from services.streamer.once import Once, mark_of, request_of
from services.streamer.prompt_layout import Prompt, lay_out
from services.streamer.prompt_modules import beginning, begun
from services.streamer.prompt_schemas import Schemas
from services.streamer.quota import Quota
from services.streamer.schema import Generation
from services.streamer.service import Streamer, Taken, Writer, new_request_id
from services.streamer.session import Session, StreamError
from shared.layout import Layout
from shared.messages import Submit

ONCE_TRIES = 3  # to find or to become the request of an idempotency key


class Door:
    def __init__(self, streamer: Streamer, mesh: Mesh) -> None:
        self.streamer, self.mesh = streamer, mesh
        context = streamer.vocab.context
        self.context = min(streamer.config.max_context or context, context)
        self.quota = Quota(streamer.bus)
        self.schemas = Schemas(streamer.bus)
        self.lengths = Lengths(self._tokens)
        self.once = Once(streamer.bus)
        streamer.on_leave = self._leave
        self.sockets: set[web.WebSocketResponse] = set()

    @property
    def served(self) -> str:
        return self.streamer.config.served_name

    async def open(self, body: Generation, key: Key, again: str | None = None) -> Session:
        """`again` is the client's idempotency key. Raises BadRequest, Overloaded, BusDown."""
        self._check_model(body.model)
        if again is None:
            return await self._open(body, key)
        mark = mark_of(key.tenant, again, body)
        for _ in range(ONCE_TRIES):
            held = await self.once.held(mark)
            if held:
                with contextlib.suppress(StreamError):  # its record is gone: it was left for too long, and is computed anew
                    return await self.resume(request_of(held), "", key)
            with contextlib.suppress(Taken):
                return await self._open(body, key, partial(self.once.open, mark, held))
        raise Overloaded("others are asking with the same idempotency key", 429, 1)

    async def _open(self, body: Generation, key: Key, write: Writer | None = None) -> Session:
        streamer = self.streamer
        if self.mesh.missing:
            await self.mesh.look()  # the picture is up to a second old: look again before refusing
        admit(streamer.config, len(streamer.sessions), self.mesh.queues, self.mesh.missing, self.mesh.wait_s())
        prompt, layout = await self._prompt(body, key)
        submit = Submit(
            request=new_request_id(),
            tenant=key.tenant,
            partition=streamer.partition,
            log_from=streamer.log_position(),
            generation=0,
            given=(),
            ends=(),
            prompt=prompt,
            sampling=body.sampling(seed=secrets.randbits(63)),
            max_tokens=body.tokens_wanted(),
            deadline_ms=int(1000 * (time.time() + streamer.config.request_timeout_s)),
            layout=layout,
        )
        if submit.sampling.min_tokens > (submit.max_tokens or submit.sampling.min_tokens):
            raise BadRequest("min_tokens is larger than max_tokens", "min_tokens")
        await self.quota.enter(key, submit.request)
        self.mesh.admitted += 1
        return await streamer.open(streamer.new_record(submit, body.stops()), key, write)

    async def _prompt(self, body: Generation, key: Key) -> tuple[Prompt | bytes, Layout | None]:
        prompt, use = body.prompt_wanted(), body.prompt_schema
        if use is None:
            return prompt, None
        schema = await self.schemas.find(key.tenant, use.name)
        # In a thread: counting the tokens of long texts would hold up everybody's streams.
        if use.mode == "modules":
            return await asyncio.to_thread(lay_out, schema, use, prompt, self.lengths, secrets.token_hex(16))
        return begun(await asyncio.to_thread(beginning, schema, use, self.lengths), prompt), None

    def _tokens(self, text: str) -> int:
        return len(self.streamer.vocab.tokenizer.encode(text, add_special_tokens=False).ids)

    async def resume(self, request: str, cursor: str, key: Key) -> Session:
        """Raises StreamError, Overloaded, BusDown, ValueError."""
        await self.quota.enter(key, request)
        try:
            session = await attach(self.streamer, request, cursor, key.tenant)
        except (StreamError, ValueError):
            await self.quota.leave(key, request, 0)
            raise
        session.key = key
        return session

    def _leave(self, session: Session) -> None:
        if session.key.limits:
            self.streamer.start(self.quota.leave(session.key, session.id, session.fresh_tokens))

    async def renew(self) -> None:
        """Once a second: the places of streams that are served here."""
        await self.quota.renew([(session.key, session.id) for session in self.streamer.sessions.values()])

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "default", self.served):
            raise BadRequest(f"the model {name!r} is not served here; {self.served!r} is", "model", "model_not_found", 404)
