"""The scheduler: who computes what in the next merge step. Pure policy: no torch, no clock, no I/O.

There are no phases. A step hands out a token budget so that each sequence's `computed` catches up with its `total`: decode,
chunked prefill, prefix hits, resumption and preemption are the same arithmetic. Sequences that owe one token come first, so
decode is never starved by prefill, and the budget bounds a step's time.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from services.engine.pages import NoPages, Pages
from services.engine.plan import Draw, Plan, Row, Sampled
from services.engine.sequence import Sequence
from shared.blocks import extend
from shared.fields import pack_ids


@dataclass(slots=True)
class _Share:
    """What one sequence gets of a step being planned."""

    sequence: Sequence
    chunk: int
    copy: tuple[int, int] | None = None


class Scheduler:
    def __init__(self, pages: Pages, token_budget: int, max_running: int) -> None:
        if token_budget < max_running:
            raise ValueError("the token budget must hold one token of every running sequence")
        self.pages, self.token_budget, self.max_running = pages, token_budget, max_running
        self.running: list[Sequence] = []  # in order of arrival
        self.waiting: deque[Sequence] = deque()
        self.planned: list[Sequence] = []  # the sequences of the newest plan's rows
        self._draws: list[tuple[Sequence, int]] = []  # and of its draws, with how many forks come before
        self._arrivals = 0
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def open(self) -> int:
        """Sequences here now or to be forked: what intake must leave room for."""
        return sum(1 + sequence.unforked for sequence in (*self.running, *self.waiting))

    def add(self, sequence: Sequence) -> None:
        if self.pages.blocks_for(sequence.limit) >= self.pages.blocks:
            raise ValueError("the sequence cannot fit into the page pool even alone")
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def cancel(self, request: str, choice: int | None = None) -> list[Sequence]:
        """Drop a request's sequences, or one choice of them, and free their pages at once."""
        found = [s for s in (*self.running, *self.waiting) if s.request == request and choice in (None, s.choice)]
        for sequence in found:
            sequence.finish = sequence.finish or "cancelled"
            self._leave(sequence)
        return found

    def _leave(self, sequence: Sequence) -> None:
        (self.running if sequence.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.blocks)
        sequence.blocks = []
        sequence.running = False
        sequence.cached = sequence.computed = sequence.published = 0

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide the next step. An empty plan means that nothing can be computed now."""
        budget = self.token_budget
        shares: list[_Share] = []
        for sequence in self._by_need():
            chunk = min(sequence.owed, budget)
            if not chunk or not sequence.running:
                continue
            share = _Share(sequence, chunk)
            if self._grow(share):
                shares.append(share)
                budget -= chunk
        # Growing may have preempted a younger sequence that had its place in this step already.
        return self._freeze([share for share in shares if share.sequence.running])

    def _by_need(self) -> Iterator[Sequence]:
        """Running sequences that owe one token, then those that owe more, then new ones as they are admitted."""
        now = list(self.running)
        before = self.preemptions
        yield from (sequence for sequence in now if sequence.owed == 1)
        yield from (sequence for sequence in now if sequence.owed > 1)
        while self.preemptions == before and (admitted := self._admit()) is not None:
            yield admitted

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones if its prompt fits. Strictly first come, first served."""
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        if self._places() < 1 + sequence.unforked:
            return None
        found = self.pages.match(sequence.hashes[: (sequence.total - 1) // self.pages.block_size])
        needed = self.pages.blocks_for(sequence.total + 1) - len(found)
        reserve = len(self.running)  # a block each for those that run, so that admission does not cause preemption
        if self.pages.free - self.pages.idle(found) < needed + reserve:
            return None
        self.waiting.popleft()
        self.pages.take(found)
        sequence.blocks = found
        sequence.cached = sequence.computed = len(found) * self.pages.block_size
        sequence.published = len(found)
        sequence.running = True
        insort(self.running, sequence, key=lambda other: other.arrival)
        return sequence

    def _places(self) -> int:
        return self.max_running - sum(1 + sequence.unforked for sequence in self.running)

    def _grow(self, share: "_Share") -> bool:
        """Make the pages of a share writable, preempting the youngest if need be. False: it was preempted itself."""
        sequence = share.sequence
        try:
            self._unshare(share)
            while len(sequence.blocks) < self.pages.blocks_for(sequence.computed + share.chunk):
                sequence.blocks.append(self._allocate(sequence))
        except NoPages:
            return False
        return True

    def _unshare(self, share: "_Share") -> None:
        """Copy on write: the block that the next token goes to may still be read by another sequence."""
        blocks, at = share.sequence.blocks, share.sequence.computed // self.pages.block_size
        if at < len(blocks) and self.pages.shared(blocks[at]):
            mine = self._allocate(share.sequence)
            share.copy = (blocks[at], mine)
            self.pages.release([blocks[at]])
            blocks[at] = mine

    def _allocate(self, sequence: Sequence) -> int:
        while True:
            try:
                return self.pages.allocate()
            except NoPages:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    raise

    def _preempt(self, sequence: Sequence) -> None:
        """Recompute later: a preempted sequence goes back to the head of the queue, where its arrival puts it."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _freeze(self, shares: list["_Share"]) -> Plan:
        shares.sort(key=lambda share: share.chunk > 1)
        rows: list[Row] = []
        draws: list[Draw] = []
        self.planned, self._draws = [share.sequence for share in shares], []
        for share in shares:
            sequence, end = share.sequence, share.sequence.computed + share.chunk
            blocks = tuple(sequence.blocks[: self.pages.blocks_for(end)])
            rows.append(Row(tuple(sequence.tokens[sequence.computed : end]), sequence.computed, blocks))
            sequence.computed = end
            if end == sequence.total:
                draws += self._draws_of(sequence, len(rows) - 1)
        return Plan(tuple(rows), tuple(draws), tuple(share.copy for share in shares if share.copy is not None))

    def _draws_of(self, sequence: Sequence, row: int) -> list[Draw]:
        history = sequence.penalized
        first = Draw(
            row=row,
            choice=sequence.choice,
            position=sequence.output_length,
            sampling=sequence.sampling,
            prompt=tuple(sequence.tokens[: sequence.prompt_length]) if history else (),
            output=tuple(sequence.output) if history else (),
            allow_stop=sequence.output_length + 1 >= sequence.sampling.min_tokens,
        )
        choices = range(1 + sequence.unforked)
        self._draws += [(sequence, nth) for nth in choices]
        return [first, *(replace(first, choice=sequence.choice + nth) for nth in choices[1:])]

    # -- folding the answer back -----------------------------------------------------------------------------------

    def commit(self, sampled: Seq[Sampled]) -> list[tuple[Sequence, Sampled]]:
        """Take the newest plan's tokens. Returns each sequence that advanced, forks included, with its token."""
        for sequence in self.planned:
            self._publish(sequence)
        drawn = [(pair, token) for pair, token in zip(self._draws, sampled, strict=True) if not pair[0].done]
        # Forks first: they start from their leader as it was before it advances.
        advanced = [(self._fork(leader, nth) if nth else leader, token) for (leader, nth), token in drawn]
        for sequence, token in advanced:
            self._advance(sequence, token)
        return advanced

    def _advance(self, sequence: Sequence, sampled: Sampled) -> None:
        sequence.unforked = 0
        if sampled.token < 0:
            sequence.broken = True
        else:
            sequence.append(sampled.token)
            sequence.check()
        if sequence.done:
            self._leave(sequence)

    def _fork(self, leader: Sequence, nth: int) -> Sequence:
        """Another choice of the same prompt, sharing all of its pages."""
        twin = replace(
            leader,
            choice=leader.choice + nth,
            tokens=list(leader.tokens),
            hashes=list(leader.hashes),
            blocks=list(leader.blocks),
            unforked=0,
        )
        self.pages.take(twin.blocks)
        self.running.insert(self.running.index(leader) + nth, twin)
        return twin

    def _publish(self, sequence: Sequence) -> None:
        """Tell the pool of blocks that have become full, extending the hash chain over the output."""
        size = self.pages.block_size
        full = sequence.computed // size if sequence.blocks else 0
        for at in range(sequence.published, full):
            if at == len(sequence.hashes):
                parent = sequence.hashes[-1] if sequence.hashes else sequence.root
                sequence.hashes.append(extend(parent, pack_ids(sequence.tokens[at * size : (at + 1) * size])))
            self.pages.publish(sequence.blocks[at], sequence.hashes[at])
        sequence.published = max(sequence.published, full)
