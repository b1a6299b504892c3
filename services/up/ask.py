"""One question to a running mesh, its answer printed as it comes."""

from aiohttp import ClientSession
from rich.console import Console


class AskFailed(Exception):
    """The mesh's own words."""


async def ask(url: str, question: str, console: Console) -> None:
    """Raises AskFailed."""
    async with ClientSession() as client, client.ws_connect(f"{url}/v1/ws") as ws:
        chat = [{"role": "user", "content": question}]
        await ws.send_json({"type": "generate", "id": "ask", "messages": chat, "temperature": 0})
        async for message in ws:
            frame = message.json()
            if frame["type"] == "token":
                console.print(frame["text"], end="", markup=False, highlight=False, soft_wrap=True)
            elif frame["type"] == "done":
                console.print()
                return
            elif frame["type"] == "error":
                raise AskFailed(frame["message"])
    raise AskFailed("the mesh closed the connection before the answer was complete")
