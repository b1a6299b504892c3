"""From a valid body to an open session: the model's name, admission, limits that need the vocabulary, and the record."""

import secrets
import time

from aiohttp import web

from services.streamer.admission import admit
from services.streamer.mesh import Mesh
from services.streamer.schema import BadRequest, Generation
from services.streamer.service import Streamer, new_request_id
from services.streamer.session import Session
from shared.messages import Submit

TENANT = "local"  # there are no keys yet, so everybody is one tenant


class Door:
    def __init__(self, streamer: Streamer, mesh: Mesh) -> None:
        self.streamer, self.mesh = streamer, mesh
        context = streamer.vocab.context
        self.context = min(streamer.config.max_context or context, context)
        self.sockets: set[web.WebSocketResponse] = set()

    @property
    def served(self) -> str:
        return self.streamer.config.served_name

    async def open(self, body: Generation) -> Session:
        """Raises BadRequest, Overloaded, BusDown."""
        self._check_model(body.model)
        streamer = self.streamer
        submit = Submit(
            request=new_request_id(),
            tenant=TENANT,
            partition=streamer.partition,
            log_from=streamer.log_position(),
            generation=0,
            given=(),
            ends=(),
            prompt=body.prompt_wanted(),
            sampling=body.sampling(seed=secrets.randbits(63)),
            max_tokens=body.tokens_wanted(),
            deadline_ms=int(1000 * (time.time() + streamer.config.request_timeout_s)),
        )
        if submit.sampling.min_tokens > (submit.max_tokens or submit.sampling.min_tokens):
            raise BadRequest("min_tokens is larger than max_tokens", "min_tokens")
        if self.mesh.missing:
            await self.mesh.look()  # the picture is up to a second old: look again before refusing
        admit(streamer.config, len(streamer.sessions), self.mesh.queues, self.mesh.missing)
        return await streamer.open(streamer.new_record(submit, body.stops()))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "default", self.served):
            raise BadRequest(f"the model {name!r} is not served here; {self.served!r} is", "model", "model_not_found", 404)
