"""Clients as the README tells users to write them: they check every token, come back with their cursor, and keep times."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientSession, ClientWebSocketResponse, WSMsgType

from services.streamer.keys import LOCAL
from tests.chain import next_token
from tests.chaos.oracles import foreign, headers, secret
from tests.mesh.harness import RunningMesh

FRAME_S = 30.0  # longer than any promise allows a stream to stall
AGAIN = {"overloaded", "no_broker", "superseded"}  # refusals that say: ask again


@dataclass
class Tally:
    """What one run's clients saw."""

    requests: int = 0
    tokens: int = 0
    resumes: int = 0
    refused: int = 0  # asked again after 429, 503 and the like
    lost: int = 0
    failures: list[str] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)  # each request's longest wait between two frames
    resume_s: list[float] = field(default_factory=list)


@dataclass
class User:
    """One client. `until` is when it begins no new request; the one under way is followed to its end."""

    mesh: RunningMesh
    rng: random.Random
    tally: Tally
    until: float
    lengths: tuple[int, int] = (40, 200)
    streamer: int = 0
    number: int = 0
    tenant: str = LOCAL

    async def run(self) -> None:
        async with ClientSession(headers=headers(self.tenant)) as http:
            while time.monotonic() < self.until:
                await _Request(self, http).run()


class _Request:
    def __init__(self, user: User, http: ClientSession) -> None:
        rng = user.rng
        self.user, self.http = user, http
        self.secret = secret(user.tenant, user.number)
        self.prompt = [41_000 + user.number] + [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, 60))]
        self.count, self.n = rng.randrange(*user.lengths), rng.choice((1, 1, 1, 2))
        self.contexts = [list(self.prompt) for _ in range(self.n)]
        self.request, self.cursor = "", ""
        self.heard = 0.0
        self.stall = 0.0
        self.left = 0.0
        self.over = False

    async def run(self) -> None:
        while not self.over:
            try:
                url = self.user.mesh.url_of(self.user.streamer)
                async with asyncio.timeout(FRAME_S):
                    ws = await self.http.ws_connect(f"{url}/v1/ws")
                await self._follow(ws)
                await ws.close()
            except (ClientError, OSError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    self._fail(f"nothing came for {FRAME_S:.0f} s")
            if not self.over:
                self.user.streamer = (self.user.streamer + 1) % len(self.user.mesh.ports)
                await asyncio.sleep(0.05)

    async def _follow(self, ws: ClientWebSocketResponse) -> None:
        await ws.send_json(self._resume() if self.request else self._generate())
        while not self.over:
            message = await ws.receive(timeout=FRAME_S)
            if message.type is not WSMsgType.TEXT:
                self.left = self.left or time.monotonic()
                return
            if overheard := foreign(message.data, self.user.tenant):
                self._fail(f"{self.user.tenant} was told {overheard}")
            elif not self._take(message.json()):
                await asyncio.sleep(0.2)
                return

    def _generate(self) -> dict[str, Any]:
        body = {"prompt": self.prompt, "max_tokens": self.count, "n": self.n, "ignore_eos": True, "return_token_ids": True}
        return {"type": "generate", "id": self.secret, **body, "stop": self.secret, "user": self.secret}

    def _resume(self) -> dict[str, Any]:
        self.user.tally.resumes += 1
        return {"type": "resume", "id": "a", "request": self.request, "cursor": self.cursor, "return_token_ids": True}

    def _take(self, frame: dict[str, Any]) -> bool:
        """False: begin again on another socket."""
        now = time.monotonic()
        if frame["type"] == "accepted":
            self.request = frame["request"]
            self.heard = self.heard or now
            return True
        if frame["type"] == "error" and frame["code"] in AGAIN:
            self.user.tally.refused += 1
            return False
        self._time(now)
        if frame["type"] == "token":
            self._tokens(frame)
        elif frame["type"] == "done":
            self._end(frame)
        elif frame["code"] == "stream_lost":
            self.over = True
            self.user.tally.lost += 1
        else:
            self._fail(f"{frame['code']}: {frame['message']}")
        return True

    def _time(self, now: float) -> None:
        self.stall, self.heard = max(self.stall, now - self.heard), now
        if self.left:
            self.user.tally.resume_s.append(now - self.left)
            self.left = 0.0

    def _tokens(self, frame: dict[str, Any]) -> None:
        context = self.contexts[frame["choice"]]
        for id in frame["token_ids"]:
            if id != next_token(context, frame["choice"]):
                self._fail(f"a wrong token at {len(context) - len(self.prompt)} of {self.request}")
                return
            context.append(id)
        self.cursor = frame["cursor"]
        self.user.tally.tokens += len(frame["token_ids"])

    def _end(self, frame: dict[str, Any]) -> None:
        told = [len(context) - len(self.prompt) for context in self.contexts]
        if told != [self.count] * self.n or frame["usage"]["completion_tokens"] != sum(told):
            self._fail(f"ended after {told} of {self.count}: {frame}")
            return
        self.over = True
        self.user.tally.requests += 1
        self.user.tally.stalls.append(self.stall)

    def _fail(self, why: str) -> None:
        self.over = True
        self.user.tally.failures.append(why)
