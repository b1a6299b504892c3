"""Modules computed apart: an engine at float32 says what their plain definition says, however they are put together."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.forward import Forward
from services.engine.plan import Limits
from tests.engine import reference
from tests.engine.conftest import Writer
from tests.engine.parted import Text, likeliest, scheduler, sequence, serve

COUNT = 5
LIMITS = Limits(max_running=8, token_budget=16, prefill_budget=16)
_draw = random.Random(7)


def words(count: int) -> list[int]:
    return [_draw.randrange(96) for _ in range(count)]


# Shorter than a page, longer, a whole page, around a parameter, as long as two pages, two of a scaffold with another between.
PARTS: list[Text] = [
    [(0, words(3))],
    [(3, words(21))],
    [(24, words(8))],
    [(32, words(5)), (41, words(9))],
    [(50, words(16))],
    [(66, words(7)), (80, words(12))],
]
ARGUMENT, REST = (37, words(2)), (92, words(5))
CHOICES = [(0,), (2,), (4, 1), (0, 2, 3), (0, 1, 2, 3, 4, 5), ()]


HEAD = words(11)


def prompt(choice: tuple[int, ...]) -> tuple[list[Text], Text]:
    return [PARTS[at] for at in choice], [ARGUMENT, REST] if 3 in choice else [REST]


Model = tuple[dict[str, Any], dict[str, Tensor], Forward]


@pytest.fixture(params=["LlamaForCausalLM", "Qwen3ForCausalLM"])
def model(request: pytest.FixtureRequest, hub: Writer) -> Model:
    config = reference.make_config(request.param)
    tensors = reference.make_tensors(config)
    return config, tensors, Forward(hub(config, tensors), "float32", 64, 8, LIMITS)


@pytest.mark.parametrize("headed", [False, True])
def test_as_defined(model: Model, headed: bool) -> None:
    """Alone and together, over pages that held nonsense, with the modules computed anew and found."""
    config, tensors, forward = model
    head = HEAD if headed else []
    with torch.inference_mode():
        forward.pages.all[:, : forward.pages.null].fill_(torch.nan)
    asked = {str(at): prompt(choice) for at, choice in enumerate(CHOICES)}
    asked["ends in the block of loose tokens"] = ([PARTS[0]], [(92, words(1))])
    together = serve(forward, scheduler(forward, 64), [sequence(name, *text, COUNT, head=head) for name, text in asked.items()])
    pool = scheduler(forward, 64)
    for name, text in asked.items():
        found = together[name, 0]
        assert found == likeliest(config, tensors, *text, found, head)
        for _ in range(2):
            assert serve(forward, pool, [sequence(name, *text, COUNT, head=head)]) == {(name, 0): found}


def test_one_module_at_the_start_is_as_exact(model: Model) -> None:
    config, tensors, forward = model
    ids, question = PARTS[1][0][1], REST[1]
    found = serve(forward, scheduler(forward, 64), [sequence("a", [[(0, ids)]], [(len(ids), question)], COUNT)])
    exact = serve(forward, scheduler(forward, 64), [sequence("a", [], [(0, ids + question)], COUNT)])
    assert found == exact
    assert found["a", 0] == likeliest(config, tensors, [], [(0, ids + question)], found["a", 0])


def test_only_what_is_new_is_computed(model: Model) -> None:
    """Wherever the modules stand; the next turn of a talk also finds what was said behind them."""
    _, _, forward = model
    pool = scheduler(forward, 64)
    computed: list[tuple[int, int, int]] = []

    def ask(parts: list[Text], rest: Text) -> list[int]:
        asked = sequence("a", parts, rest, COUNT)
        pool.add(asked)
        tokens = 0
        while pool.busy:
            plan = pool.plan()
            tokens += plan.tokens
            pool.commit(forward.run(plan))
        computed.append((tokens - COUNT + 1, asked.prompt_length - asked.parted, asked.made))
        return asked.tokens[asked.prompt_length :]

    parts, rest = prompt((1, 2, 4))
    said = ask(parts, rest)
    assert computed[-1] == (24 + 8 + 16 + 5, 5, 45), "pages of modules are filled up"
    ask([PARTS[4], PARTS[1]], [(92, words(3))])
    assert computed[-1] == (3, 3, 0)
    ask(parts, [(92, [*REST[1], *said, *words(4)])])
    assert computed[-1] == (14 - 3, 14, 0), "a tail of 5 and the first 3 tokens behind it are a whole page"
    ask([[(4, PARTS[1][0][1])]], rest)
    assert computed[-1] == (24 + 5, 5, 21), "the same text elsewhere is another module"


def test_several_choices_and_a_pool_that_is_too_small(model: Model) -> None:
    """Choices part from one prompt; preempted ones find their modules again, or compute them again."""
    config, tensors, forward = model
    asked = [(f"{at}", prompt(choice)) for at, choice in enumerate(((0, 1, 3), (1, 2, 4), (0, 1, 3, 5)))]
    pool = scheduler(forward, 18)
    found = serve(forward, pool, [sequence(name, *text, 20, n=2) for name, text in asked])
    assert pool.preemptions
    for name, text in asked:
        assert found[name, 0] == found[name, 1] == likeliest(config, tensors, *text, found[name, 0])
