"""Whether a GPU's norms, folded into the matrices behind them, cost precision: SmolLM2 on its golden records, on a CPU.

    python -m tests.bench.norm_forms MODEL.gguf

In plain torch with a GPU's arithmetic: operands rounded to bfloat16, sums in float32. At each recorded position, behind the
recorded tokens, the logits of both forms are compared with float32's. One JSON line a form; a flip is another first token.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from services.engine.checkpoint import open_checkpoint
from services.engine.matrix import dense
from services.engine.model import turns
from services.engine.spec import ModelSpec
from services.engine.weights import Makers, Parameters, load

GOLDEN = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"
Round = Callable[[Tensor], Tensor]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


class Plain:
    """`folded`: the norm's weight is in the matrix, its factor behind the product, and residuals are added before rounding."""

    def __init__(self, spec: ModelSpec, parameters: Parameters[Tensor], keep: Round, folded: bool) -> None:
        self.spec, self.parameters, self.keep, self.folded = spec, parameters, keep, folded

    def __call__(self, ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, vocab]"""
        weights, keep = self.parameters, self.keep
        h = keep(weights.embedding[ids])
        turn = turns(torch.arange(len(ids)), weights.frequencies)
        for layer in weights.layers:
            h = self.add(h, self.attend(self.normed(h, layer.qkv, layer.attention_norm), turn), layer.out)
            gate, up = self.normed(h, layer.gate_up, layer.mlp_norm).chunk(2, 1)
            h = self.add(h, keep(gate * gate.sigmoid() * up), layer.down)
        return keep(h * self.factor(h) * keep(weights.norm)) @ keep(weights.head).t()

    def factor(self, h: Tensor) -> Tensor:
        return torch.rsqrt(h.square().mean(-1, keepdim=True) + self.spec.rms_eps)

    def normed(self, h: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        keep = self.keep
        if self.folded:
            return keep(h @ keep(weight * norm).t()) * self.factor(h)
        return keep(keep(h * self.factor(h) * keep(norm)) @ keep(weight).t())

    def add(self, h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ self.keep(weight).t()
        return self.keep(h + (y if self.folded else self.keep(y)))

    def attend(self, qkv: Tensor, turn: Tensor) -> Tensor:
        spec, keep = self.spec, self.keep
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        turned = torch.view_as_complex(heads[:, : -spec.kv_heads].unflatten(-1, (-1, 2)).contiguous()) * turn
        query, key = keep(torch.view_as_real(turned).flatten(-2)).split((spec.heads, spec.kv_heads), 1)
        key, value = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (key, keep(heads[:, -spec.kv_heads :])))
        scores = torch.einsum("thd,shd->hts", query, key) / math.sqrt(spec.head_dim)
        shares = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)
        return keep(torch.einsum("hts,shd->thd", shares, value)).flatten(1)


def main() -> None:
    checkpoint = open_checkpoint(Path(sys.argv[1]))
    whole = Makers(*[lambda matrix, *_: dense(matrix).float()] * 4, lambda weight, _: weight, torch.float32)  # type: ignore[arg-type,return-value]
    parameters = load(checkpoint, whole)
    exact = Plain(checkpoint.spec, parameters, lambda x: x, False)
    forms = {name: Plain(checkpoint.spec, parameters, rounded, name == "folded") for name in ("apart", "folded")}
    found: dict[str, list[Tensor]] = {name: [] for name in forms}
    for record in json.loads(GOLDEN.read_text()):
        ids, at = torch.tensor(record["prompt_ids"] + record["output_ids"][:-1]), len(record["prompt_ids"]) - 1
        wanted = exact(ids)[at:]
        first, second = wanted.topk(2, 1).indices.t().unsqueeze(2)
        gap = wanted.gather(1, first) - wanted.gather(1, second)
        for name, form in forms.items():
            got = form(ids)[at:]
            error = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
            moved = (got.gather(1, first) - got.gather(1, second) - gap).abs().squeeze(1)
            flipped = torch.where(got.argmax(1) == first.squeeze(1), torch.nan, gap.squeeze(1))
            found[name].append(torch.stack((error, moved, flipped)))
    for name, records in found.items():
        error, moved, flipped = torch.cat(records, 1)
        row = {part: [round(float(x.quantile(q)), 4) for q in (0.5, 0.95, 1)] for part, x in (("error", error), ("gap", moved))}
        flips = [round(x, 4) for x in flipped[~flipped.isnan()].tolist()]
        parted = sum(bool((~record[2].isnan()).any()) for record in records)
        sys.stdout.write(json.dumps({"form": name, "positions": len(error), **row, "flips": flips, "parted": parted}) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
