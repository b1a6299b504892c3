"""Correctness on a GPU that tests on a CPU cannot see, as a report.

python -m tests.bench.gpu_parity golden MODEL.gguf     SmolLM2 in bfloat16 through the mesh, against the golden records
python -m tests.bench.gpu_parity kill MODEL.gguf       the same 40 times over on two engines, one of which is killed
python -m tests.bench.gpu_parity logits llama-3.1-8b   our logits and transformers' on the same random weights
"""

import asyncio
import json
import signal
import sys
from typing import Any

from tests.mesh.harness import RunningMesh
from tests.mesh.test_golden import GOLDEN, answer

ROUNDS = 40


async def golden(model: str, engines: int, kill: bool) -> None:
    env = {"HEADRACE_ENGINE_DEVICE": "cuda:0", "HEADRACE_ENGINE_GPU_SHARE": str(0.8 / engines)}
    async with RunningMesh({"engine": engines}, env=env, model=model) as mesh:
        await mesh.until_ready(120)
        records = GOLDEN * (ROUNDS if kill else 1)
        asking = [asyncio.create_task(answer(mesh, record)) for record in records]
        if kill:
            await asyncio.sleep(0.5)
            mesh.kill("engine-0", signal.SIGKILL)
        replies = await asyncio.gather(*asking)
        takeovers = sum(beat.counters.get("takeovers", 0) for beat in await mesh.bus.members())
    parts = [parting(record, reply["choices"][0]["token_ids"]) for record, reply in zip(records, replies, strict=True)]
    parted = [part for part in parts if part is not None]
    row = {"what": "kill" if kill else "golden", "records": len(records), "identical": len(parts) - len(parted)}
    say({**row, "takeovers": takeovers, "parted at": sorted({(part["token"], part["margin"]) for part in parted})})


def parting(record: dict[str, Any], ids: list[int]) -> dict[str, Any] | None:
    """Where an answer parts from its record, and how close the reference's two best logits were there."""
    pairs = enumerate(zip(ids, record["output_ids"], strict=False))
    at = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
    return None if at is None else {"token": at, "of": len(record["output_ids"]), "margin": record["margins"][at]}


def logits(shape: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from services.engine.gpu import build
    from services.engine.gpu.build import GPU, assemble, open_device
    from services.engine.plan import Plan, Row
    from shared.config import EngineConfig
    from shared.shapes import SHAPES
    from tests.engine.generate import answers, draw

    torch.manual_seed(0)
    hub = {"model_type": "llama", **SHAPES[shape]}
    with torch.device("cuda"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hub), dtype=torch.bfloat16).eval()
    state = theirs.state_dict()

    class Shared:
        """The parameters of transformers' model, by name."""

        def __init__(self, *_: object) -> None: ...

        def has(self, name: str) -> bool:
            return name in state

        def matrix(self, name: str, *_: int) -> torch.Tensor:
            return state[name]

        def vector(self, name: str, _: int) -> torch.Tensor:
            return state[name].float()

    build.Random = Shared
    build.assemble = lambda spec, source, makers, paired: assemble(spec, source, makers, paired=False)
    config = EngineConfig(id="parity", model_shape=shape, max_context=2048, kv_tokens=4096)
    gpu = open_device(config, torch.device("cuda:0"), GPU.over(8, 0, 0))
    seen: list[torch.Tensor] = []
    head = gpu.model.parameters.head
    object.__setattr__(gpu.model.parameters, "head", lambda x: seen.append(head(x)) or seen[-1])
    ids = torch.randint(0, 1000, (700,)).tolist()
    blocks = tuple(range(1, 46))
    answers(gpu, Plan((Row(tuple(ids[:600]), 0, blocks[:38], 0),), (draw(0),), ()))
    answers(gpu, Plan((Row(tuple(ids[600:699]), 600, blocks[:44], 0, 38),), (draw(0, 1),), ()))
    answers(gpu, Plan((Row((ids[699],), 699, blocks[:44], 0, 44),), (draw(0, 2),), ()))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids], device="cuda")).logits[0].float()
        exact = theirs.float()(torch.tensor([ids], device="cuda")).logits[0]
    for name, at, mine in zip(("prefill", "chunk over a prefix", "decode"), (599, 698, 699), seen, strict=True):
        ours, other, true = mine[0], wanted[at], exact[at]
        say({
            "what": f"logits, {name}", "to transformers": relative(ours, other), "to float32": relative(ours, true),
            "transformers to float32": relative(other, true),
        })  # fmt: skip


def relative(got: Any, wanted: Any) -> float:
    return round(float((got - wanted).norm() / wanted.norm()), 5)


def say(row: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    what, model = sys.argv[1:]
    if what == "logits":
        logits(model)
    else:
        asyncio.run(golden(model, 2 if what == "kill" else 1, what == "kill"))
