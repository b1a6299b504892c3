"""SmolLM2 with a shared prefix cache: what was fetched says the same as what was computed, token by token."""

import asyncio

from tests.mesh.client import generate
from tests.prefix_cache.meshes import EngineMesh

SYSTEM = " ".join(f"Rule {at}: name the lock, the level of the water and the hour, in that order." for at in range(16))


async def test_fetched_pages_continue_as_computed_ones() -> None:
    env = {"HEADRACE_DTYPE": "float32", "HEADRACE_MAX_CONTEXT": "1024", "HEADRACE_ENGINE_KV_TOKENS": "2048"}
    async with EngineMesh(1, size_mb=256, chain=False, env=env) as mesh:

        async def ask(question: str) -> tuple[list[int], int]:
            chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            answer = await generate(mesh.url, messages=chat, max_tokens=16, temperature=0, return_token_ids=True)
            return answer.ids[0], answer.done["usage"]["prompt_tokens_details"]["cached_tokens"]

        first, found = await ask("Which rule is the first?")
        assert found == 0
        await asyncio.sleep(2)  # stored in the background
        await mesh.forget()
        again, found = await ask("Which rule is the first?")
        assert found > 256
        assert again == first
