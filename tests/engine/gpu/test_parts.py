"""Modules computed apart, on the GPU's device: positions that are not places, and pages put together of others' rows."""

import pytest
import torch

from tests.engine import reference
from tests.engine.conftest import Writer
from tests.engine.gpu.conftest import Opener
from tests.engine.gpu.test_device import EXACT, IDS
from tests.engine.parted import Text, likeliest, scheduler, sequence, serve

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of padding, as in test_device.py

PARTS: list[Text] = [[(0, IDS[:3])], [(3, IDS[3:14])], [(20, IDS[14:19]), (30, IDS[19:24])]]
REST: Text = [(26, IDS[24:26]), (40, IDS[26:31])]


def test_as_defined(hub: Writer, open_gpu: Opener) -> None:
    """Computed anew, and found: beside a plain prompt, working ahead, over pages that held nonsense."""
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    with torch.inference_mode():
        gpu.pages.fill_(torch.nan)
    pool = scheduler(gpu, gpu.blocks)
    for choice in ([0, 1, 2], [2, 0]):
        parts = [PARTS[at] for at in choice]
        asked = {"a": (parts, REST, IDS[50:53]), "b": ([], [(0, IDS[40:45])], [])}
        found = serve(gpu, pool, [sequence(name, parts, rest, 2, head=head) for name, (parts, rest, head) in asked.items()])
        for name, (parts, rest, head) in asked.items():
            wanted = likeliest(config, tensors, parts, rest, found[name, 0], head)
            assert found[name, 0] == wanted if EXACT else found[name, 0][0] == wanted[0]
