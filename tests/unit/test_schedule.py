"""The scheduler and the page pool under random traffic: nothing leaks, budgets hold, nobody starves, the KV is right.

A tiny device stands in for the model: what it keeps per block and slot depends on the token that was computed there, on its
position and on all that its row had before it. A page that is reused too early, a missing copy, a wrong prefix hit or a part
that saw another part changes every token that follows.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain as joined
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.engine.pages import Pages
from services.engine.parts import Packed, pack
from services.engine.plan import PENDING, Plan, Row, Sampled
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared.blocks import chain
from shared.fields import pack_ids
from shared.layout import Placement
from shared.messages import Sampling

BLOCK = 4
ROOT = b"root"
# Parts of prompts, as runs: shorter than a block, longer, a whole block, around a parameter. Prompts begin behind all of them.
MODULES: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...] = (
    ((0, (1, 2, 3)),),
    ((3, (1, 1, 2, 0, 2)),),
    ((8, (0, 1, 2, 3)),),
    ((12, (2, 2, 2)), (18, (1, 0, 3, 3, 1, 2))),
)
HEAD = (3, 2, 1, 0, 1)
START = 24


class Device:
    """Pages whose content is what was computed at each slot; the next token is a function of the whole context.

    It works `ahead` plans ahead: so many may be run before the answers to the first one are needed. Of a block table it
    keeps what it was told before, and believes nothing twice.
    """

    def __init__(self, ahead: int = 0) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        self.ahead = ahead
        self.answers: deque[list[Sampled]] = deque()
        self.newest: dict[int, int] = {}  # the token drawn last, by slot
        self.tables: dict[int, list[int]] = {}

    def run(self, plan: Plan) -> list[Sampled] | None:
        if plan.rows:
            self.answers.append(self._compute(plan))
        return self.answers.popleft() if len(self.answers) > self.ahead or not plan.rows else None

    def _compute(self, plan: Plan) -> list[Sampled]:
        copied = [self.slots.get(divmod(source, BLOCK), -1) for source, _ in plan.copies]
        self.slots |= {divmod(target, BLOCK): state for (_, target), state in zip(plan.copies, copied, strict=True)}
        contexts = [self._row(row) for row in plan.rows]
        drawn = {draw.slot: next_token(contexts[draw.row], draw.choice) for draw in plan.draws}
        assert len(drawn) == len(plan.draws), "two draws have one slot"
        self.newest |= drawn
        return [Sampled(token) for token in drawn.values()]

    def _row(self, row: Row) -> tuple[int, ...]:
        """The context of its last token."""
        table = self.tables.setdefault(row.slot, [])
        table[row.told :] = row.blocks[row.told :]
        assert tuple(table) == row.blocks, "the device was not told of a block"
        context = [self.slots.get((table[at // BLOCK], at % BLOCK), -1) for at in range(row.start)]
        tokens = (self.newest[row.slot] if token == PENDING else token for token in row.tokens)
        context = seen(zip(row.positions or range(row.start, row.end), tokens, strict=True), context)
        for at in range(row.start, row.end):
            self.slots[table[at // BLOCK], at % BLOCK] = context[at]
        return tuple(context)


def seen(tokens: Iterable[tuple[int, int]], context: list[int]) -> list[int]:
    """A context with more tokens, each at its position: what is kept of a token depends on all before it."""
    context = list(context)
    for position, token in tokens:
        context.append(hash((token, position, *context)))
    return context


def next_token(context: tuple[int, ...], choice: int) -> int:
    return hash((context, choice)) % 50


def expected(prompt: list[int], modules: list[int], choice: int, out: int, stop: int, min_tokens: int) -> list[int]:
    context: list[int] = []
    loose: list[int] = []
    head = seen(enumerate(HEAD), []) if modules else []
    parts = [head] + [seen(joined(*(enumerate(ids, first) for first, ids in MODULES[at])), head) for at in modules]
    for nth, part in enumerate(parts):
        first = len(head) if nth else 0  # of its own tokens
        for at in range(first, len(part)):
            whole = at // BLOCK * BLOCK >= first and at // BLOCK < len(part) // BLOCK
            (context if whole else loose).append(part[at])
    start = START if modules else 0
    context = seen(enumerate(prompt, start), context + loose)
    tokens: list[int] = []
    while len(tokens) < out:
        tokens.append(next_token(tuple(context), choice))
        if tokens[-1] == stop and len(tokens) >= min_tokens:
            break
        context = seen([(start + len(prompt) + len(tokens) - 1, tokens[-1])], context)
    return tokens


def commit(scheduler: Scheduler, device: Device, plan: Plan) -> list[tuple[Sequence, Sampled]]:
    answers = device.run(plan) if plan.rows or device.answers else None
    return scheduler.commit(answers) if answers is not None else []


BASE = [at % 5 for at in range(20)]  # what some prompts begin with
request = st.tuples(
    st.one_of(
        st.lists(st.integers(0, 3), min_size=1, max_size=30),  # few symbols: shared prefixes are common
        st.builds(
            lambda shared, own: BASE[:shared] + own, st.integers(12, 20), st.lists(st.integers(0, 3), min_size=1, max_size=9)
        ),
    ),
    st.integers(1, 12),  # output tokens
    st.integers(1, 3),  # n
    st.integers(0, 6),  # steps before it arrives
    st.none() | st.integers(0, 12),  # cancelled so many steps after its arrival
    st.integers(0, 4),  # min_tokens
    st.lists(st.integers(0, len(MODULES) - 1), unique=True, max_size=3),
)


def sequence_of(name: str, prompt: list[int], out: int, n: int, min_tokens: int, modules: Seq[int] = ()) -> Sequence:
    packed = Packed(list(prompt), (), (), ROOT, chain(ROOT, pack_ids(prompt), BLOCK))
    if modules:
        parts = tuple(tuple((first, len(ids)) for first, ids in MODULES[module]) for module in modules)
        placement = Placement(head=len(HEAD), parts=parts, rest=((START, len(prompt)),))
        tokens = [token for module in modules for _, ids in MODULES[module] for token in ids]
        packed = pack([*HEAD, *tokens, *prompt], placement, ROOT, BLOCK)
    return Sequence(
        request=name,
        choice=0,
        tokens=packed.tokens,
        prompt_length=len(packed.tokens),
        limit=len(packed.tokens) + out,
        sampling=Sampling(stop_ids=(7,), min_tokens=min_tokens, n=n),
        hashes=packed.hashes,
        root=packed.root,
        parts=packed.parts,
        runs=packed.runs,
        unforked=n - 1,
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(request, min_size=1, max_size=12), st.integers(26, 44), st.integers(9, 24), st.integers(0, 2))
def test_random_traffic(requests: list, blocks: int, budget: int, ahead: int) -> None:  # type: ignore[type-arg]
    pages = Pages(blocks, BLOCK)
    scheduler, device = Scheduler(pages, budget, max_running=9, prefill_budget=2 * budget), Device(ahead)
    assume(
        all(scheduler.fits(sequence_of("", prompt, out, n, least, parts)) for prompt, out, n, _, _, least, parts in requests)
    )
    outputs: dict[tuple[str, int], list[int]] = {}
    cancelled: set[str] = set()
    arrivals: dict[str, int] = {}
    for step in range(2000):
        for name, (prompt, out, n, after, cancel, least, modules) in enumerate(requests):
            if step == after:
                arrivals[str(name)] = step
                scheduler.add(sequence_of(str(name), prompt, out, n, least, modules))
            if cancel is not None and step == after + cancel:
                assert not any(sequence.apart for sequence in scheduler.cancel(str(name)))
                cancelled.add(str(name))
        if step > 20 and not scheduler.busy:
            break
        plan = scheduler.plan()
        assert plan.tokens <= (budget if not all(draw.begins for draw in plan.draws) else 2 * budget)
        assert [len(row.tokens) > 1 for row in plan.rows] == sorted(len(row.tokens) > 1 for row in plan.rows)
        assert plan.rows or device.answers or not scheduler.busy, "busy, yet nothing can be computed"
        for sequence, sampled in commit(scheduler, device, plan):
            outputs.setdefault((sequence.request, sequence.choice), []).append(sampled.token)
    assert not scheduler.busy, "somebody starved"
    assert pages.free == blocks - 1, "a page leaked"
    for name, (prompt, out, n, _, _, least, modules) in enumerate(requests):
        if str(name) in cancelled:
            continue
        for choice in range(n):
            wanted = expected(prompt, modules, choice, out, 7, least)
            assert outputs[str(name), choice] == wanted, (name, choice)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=200))
def test_pages_never_hand_out_a_block_in_use(moves: list[tuple[bool, int]]) -> None:
    pages = Pages(8, BLOCK)
    held: list[int] = []
    for take, pick in moves:
        if take and pages.free:
            block = pages.allocate()
            assert block not in held
            assert block != 0
            held.append(block)
        elif held and not take:
            pages.release([held.pop(pick % len(held))])
        assert pages.free + len(held) == 7


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_common_beginning_is_computed_once(ahead: int) -> None:
    """Whoever begins alike waits for the first of them, and holds up nobody else."""
    scheduler, device = Scheduler(Pages(400, BLOCK), token_budget=16, max_running=16), Device(ahead)
    common = list(range(40))
    for name in range(8):
        scheduler.add(sequence_of(f"alike{name}", [*common, 100 + name], 3, 1, 3))
    scheduler.add(sequence_of("other", [200, 201], 3, 1, 3))
    computed, firsts = 0, list[str]()
    while scheduler.busy:
        plan = scheduler.plan()
        computed += sum(len(row.tokens) for row in plan.rows if row.start < len(common))
        firsts += [s.request for s, _ in commit(scheduler, device, plan) if len(s.tokens) == s.prompt_length + 1]
    assert computed == len(common) + 1 + 2 + 2, "the last chunk, and two tokens of the other's output"
    assert firsts == ["alike0", "other", *(f"alike{name}" for name in range(1, 8))]


def test_decode_is_not_starved_by_prefill() -> None:
    """While long prompts are prefilled in chunks, every running sequence gets its token in every step."""
    scheduler, device = Scheduler(Pages(400, BLOCK), token_budget=16, max_running=16), Device()
    for name in range(8):
        scheduler.add(sequence_of(f"short{name}", [name], 40, 1, 40))
    commit(scheduler, device, scheduler.plan())
    for name in range(4):
        scheduler.add(sequence_of(f"long{name}", list(range(200)), 4, 1, 4))
    for _ in range(30):
        advanced = {s.request for s, _ in commit(scheduler, device, scheduler.plan())}
        assert {f"short{name}" for name in range(8)} <= advanced


def test_a_sequence_needs_room_for_its_parts_as_well() -> None:
    """13 + 5 tokens are 5 blocks; its parts, filled up, have a head's block and two of loose tokens besides."""
    parted, plain = sequence_of("a", [1], 4, 1, 0, modules=[2, 1]), sequence_of("b", [1] * 15, 4, 1, 0)
    assert len(parted.tokens) == len(plain.tokens) == 15
    assert [Scheduler(Pages(blocks, BLOCK), 9, 9).fits(plain) for blocks in (5, 6)] == [False, True]
    needed = 5 + parted.aside
    assert [Scheduler(Pages(blocks, BLOCK), 9, 9).fits(parted) for blocks in (needed, needed + 1)] == [False, True]


def test_what_is_lent_comes_back() -> None:
    """Also from a sequence that is cancelled, or preempted, before it had a share of a step."""
    pages = Pages(60, BLOCK)
    scheduler, device = Scheduler(pages, 9, max_running=9), Device()
    scheduler.add(sequence_of("a", [1], 9, 1, 9, modules=[0, 1]))
    while not any(sequence.request == "a" and sequence.begun for sequence in scheduler.running):
        commit(scheduler, device, scheduler.plan())
    scheduler.add(sequence_of("long", [2] * 30, 1, 1, 1))
    scheduler.add(sequence_of("b", [1], 9, 1, 9, modules=[1, 0]))
    commit(scheduler, device, scheduler.plan())
    [lender] = [sequence for sequence in scheduler.running if sequence.request == "b"]
    assert lender.lent and not lender.told
    scheduler.cancel("b")
    while scheduler.busy:
        commit(scheduler, device, scheduler.plan())
    assert pages.free == 59


def test_first_come_first_served() -> None:
    scheduler, device = Scheduler(Pages(12, BLOCK), token_budget=9, max_running=9), Device()
    for name in range(6):
        scheduler.add(sequence_of(str(name), [name] * 20, 4, 1, 4))
    order: list[str] = []
    while scheduler.busy:
        order += [s.request for s, _ in commit(scheduler, device, scheduler.plan()) if s.done]
    assert all(int(a) <= int(b) for a, b in pairwise(order))
