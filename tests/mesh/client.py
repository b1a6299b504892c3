"""A WebSocket client as a user would write it, keeping what it received."""

from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType


@dataclass
class Answer:
    """What one request's client has. `ids` are the token ids received, per choice."""

    request: str = ""
    cursor: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    frames: int = 0
    terminals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> dict[str, Any]:
        assert len(self.terminals) == 1, self.terminals
        return self.terminals[0]

    def take(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "accepted":
            self.request = frame["request"]
        elif frame["type"] == "token":
            self.frames += 1
            choice = frame["choice"]
            self.texts[choice] = self.texts.get(choice, "") + frame["text"]
            self.ids.setdefault(choice, []).extend(frame.get("token_ids", ()))
            self.cursor = frame["cursor"]
        else:
            self.terminals.append(frame)


class Client:
    """One socket."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> "Client":
        self._session = ClientSession()
        self.ws: ClientWebSocketResponse = await self._session.ws_connect(f"{self._url}/v1/ws")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, type: str, id: str, **fields: Any) -> None:
        await self.ws.send_json({"type": type, "id": id, **fields})

    async def frame(self) -> dict[str, Any]:
        message = await self.ws.receive(timeout=60)
        assert message.type is WSMsgType.TEXT, message
        frame: dict[str, Any] = message.json()
        return frame

    async def follow(self, answer: Answer, frames: int | None = None) -> Answer:
        """Read the socket's one request until its terminal frame, or until so many token frames more have come."""
        wanted = None if frames is None else answer.frames + frames
        while not answer.terminals and (wanted is None or answer.frames < wanted):
            answer.take(await self.frame())
        return answer


async def generate(url: str, **body: Any) -> Answer:
    async with Client(url) as client:
        await client.send("generate", "a", **body)
        return await client.follow(Answer())
