"""How far answers differ whose modules are computed apart: SmolLM2 at float32, greedy, against the prompt written out.

    python -m tests.bench.module_answers [--output 24]

Each row is a way of asking the same questions: `exact behind a gap` (all of the prompt computed together, but tokenized text by
text and at the schema's positions: what these do alone), `scaffold` (all three modules in one), `modules` (the default mode);
`exact` against itself shows that the measuring is right. `first token error` is |logits - exact| / |exact|, `first token kl` is
KL(exact || this) in nats, medians; `same` is the share of output tokens equal to exact's, place by place; `agree` that of
exact's tokens which are the likeliest here, too, behind the same text.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.batch import Batch
from services.engine.forward import Forward
from services.engine.job import Job
from services.engine.pages import Pages
from services.engine.schedule import Scheduler
from services.streamer.prompt_layout import lay_out
from services.streamer.prompt_modules import Schema, Use, beginning, begun
from services.tokenizer.encode import Encoder
from shared.config import bundled_model
from shared.layout import Placement
from shared.messages import ChatMessage, Sampling, Submit, Work
from shared.tokenlog import Choice
from shared.vocab import load_vocab

BLOCK = 16
TEXTS = {
    "role": "You are the guide of a small museum of mills in the town of Veldt. Visitors ask you short questions. Answer with"
    " what the texts say, in one or two friendly sentences, and say so plainly if they do not tell.\n",
    "wind": "The windmill on the dike was built in 1782 by the brothers Aert and Jan. It has four sails of eleven metres and"
    " ground rye until 1923. A storm broke two of its sails in 1916, and the whole town paid for new ones.\n",
    "water": "The water mill stands at the lower lock. Its wheel is of oak, five metres high, and drives a saw that cuts planks"
    " for the shipyard. It stands still from December to February, when the channel is frozen.\n",
    "hours": "The museum is open from ten to five, every day but Monday. A ticket costs six euros; children under twelve pay"
    " nothing. The last tour of the day begins at four, at the door of the windmill.\n",
    "food": "Beside the museum is a bakery that sells bread of the mill's own flour. Its almond cake is known in the whole"
    " province. Dogs may sit outside, under the lime trees, but not come in.\n",
    "way": "From the station it is a walk of twenty minutes along the canal. Bus 14 stops at the bridge every half hour. There"
    " are forty places for cars behind the shipyard, and a stand for bicycles at the lock.\n",
}
ASKED = [
    ("role wind water", "How old is the windmill?"),
    ("role wind hours", "When does the last tour begin, and where?"),
    ("role water way", "Can I park my car near the water mill?"),
    ("role hours food", "May I bring my dog and my two small children?"),
    ("role food way", "Where can I eat something, and how do I get there by bus?"),
    ("role wind food", "What happened to the windmill in 1916?"),
    ("role water hours", "Can I see the saw at work in January?"),
    ("role hours way", "How much is a ticket, and how far is the walk?"),
    ("role wind way", "Who built the windmill?"),
    ("role water food", "What is sold in the bakery?"),
    ("wind water food", "Name everything in these texts that is made of wood."),
    ("water hours way", "Write a short note for a friend who wants to come on a Sunday."),
]


class Listened:
    """A model whose steps' logits, of every token, can be looked at."""

    def __init__(self, forward: Forward) -> None:
        self._model = forward.model
        self.logits: list[Tensor] = []
        forward.model = self  # type: ignore[assignment]

    def __call__(self, step: Batch, pages: Any) -> Tensor:
        self.logits.append(self._model(replace(step, last=torch.arange(len(step.tokens))), pages))
        return self.logits[-1][step.last]


class Asking:
    """Requests as the mesh makes them, from the schema's texts to sequences, and one engine's answers to them."""

    def __init__(self) -> None:
        path = bundled_model()
        self.vocab = load_vocab(path)
        self.encoder = Encoder(self.vocab, self.vocab.context, "float32", BLOCK)
        self.forward = Forward(Path(path), "float32", 512, BLOCK)
        self.listened = Listened(self.forward)

    def tokens(self, text: str) -> int:
        return len(self.vocab.tokenizer.encode(text, add_special_tokens=False).ids)

    def work(self, way: str, modules: list[str], question: str) -> Work:
        chosen = {"all": modules} if way == "scaffold" else {}
        named = [{"name": name, "text": text} for name, text in TEXTS.items()]
        schema = Schema.model_validate({"name": "museum", "modules": named, "scaffolds": chosen})
        use, chat = Use(name="museum", modules=modules), (ChatMessage(role="user", content=question),)
        prompt, layout = lay_out(schema, use, chat, self.tokens, "*here*")
        if way == "exact":
            prompt, layout = begun(beginning(schema, use, self.tokens), chat), None  # type: ignore[assignment]
        [work] = self.encoder.encode([_submit(prompt, layout)], 0)
        assert isinstance(work, Work)
        if way == "exact behind a gap":
            at = work.placement
            assert at is not None
            together = ((0, at.head), *(run for part in at.parts for run in part), *at.rest)
            work = work.model_copy(update={"placement": Placement(head=0, parts=(), rest=together)})
        return work

    def answer(self, work: Work, said: list[int], count: int) -> tuple[list[int], Tensor]:
        """So many tokens behind what has been said, and the logits of each token said and of the one that follows."""
        [sequence] = Job(work, "1-1", 0.0, [Choice()]).sequences(BLOCK)
        total = sequence.total + len(said)
        sequence = replace(sequence, tokens=[*sequence.tokens, *said], limit=total + count)
        limits = self.forward.limits
        scheduler = Scheduler(Pages(512, BLOCK), limits.token_budget, limits.max_running)  # nothing is found: all is computed
        scheduler.add(sequence)
        self.listened.logits.clear()
        while scheduler.busy:
            scheduler.commit(self.forward.run(scheduler.plan()))
        decoded = count - 1
        return sequence.tokens[total:], torch.cat(self.listened.logits)[-len(said) - 1 - decoded :][: len(said) + 1]


def _submit(prompt: Any, layout: Any) -> Submit:
    return Submit(
        request="r", tenant="t", partition="p", log_from="0-0", generation=0, given=(), ends=(), prompt=prompt, layout=layout,
        sampling=Sampling(temperature=0.0, ignore_eos=True), max_tokens=None, deadline_ms=1 << 50,
    )  # fmt: skip


Answer = tuple[list[int], Tensor]


def compare(asking: Asking, way: str, exact: list[Answer]) -> Iterator[tuple[float, float, float, float]]:
    """For each question: error and KL of the first token's distribution, and the shares of equal and agreeing tokens."""
    for (modules, question), (wanted, [logits]) in zip(ASKED, exact, strict=True):
        work = asking.work(way, modules.split(), question)
        found, [theirs] = asking.answer(work, [], len(wanted))
        _, behind = asking.answer(work, wanted[:-1], 1)
        p, q = (each.double().log_softmax(0) for each in (logits, theirs))
        yield (
            float((theirs - logits).norm() / logits.norm()),
            float((p.exp() * (p - q)).sum()),
            sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted),
            sum(a == b for a, b in zip(behind.argmax(1).tolist(), wanted, strict=True)) / len(wanted),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=int, default=24)
    given = parser.parse_args()
    asking = Asking()
    exact = [asking.answer(asking.work("exact", modules.split(), question), [], given.output) for modules, question in ASKED]
    for way in ("exact", "exact behind a gap", "scaffold", "modules"):
        errors, kls, same, agree = zip(*compare(asking, way, exact), strict=True)
        row = {
            "first token error": round(statistics.median(errors), 3),
            "first token kl": round(statistics.median(kls), 3),
            "same": round(statistics.mean(same), 3),
            "agree": round(statistics.mean(agree), 3),
        }
        sys.stdout.write(json.dumps({"way": way, **row}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
