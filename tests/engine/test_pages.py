"""Pages that leave a device and come back, to other blocks or another device, are the same to the byte."""

import json
from pathlib import Path

from services.engine.forward import Forward
from tests.engine.generate import generate

RECORD = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())[3]


def test_exported_and_adopted(smollm2_path: Path) -> None:
    """A second device goes on from the first one's pages as the first one does; float32, so to the token."""
    first, second = (Forward(smollm2_path, "float32", num_blocks=64, block_size=16) for _ in range(2))
    prompt = RECORD["prompt_ids"]
    full = len(prompt) // 16
    there, here = list(range(1, 20)), list(range(40, 59))
    output = generate(first, [prompt], [there], 16, 8)
    payloads, sums = first.ferry.export(there[:full])
    assert {len(payload) for payload in payloads} == {first.ferry.page_bytes}
    assert first.ferry.page_kind == second.ferry.page_kind
    memory = memoryview(bytearray(b"".join(payloads)))
    places = range(0, len(memory), first.ferry.page_bytes)
    assert second.ferry.bring(memory, places, here[:full]).sums() == sums
    assert second.ferry.export(here[:full])[1] == sums
    assert generate(second, [prompt], [here], 16, 8, computed=16 * full) == output
