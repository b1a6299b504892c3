"""The scheduler: who computes what in the next merge step. Pure policy: no torch, no clock, no I/O.

There are no phases. A step hands out a token budget so that each sequence's `computed` catches up with its `total`: decode,
chunked prefill, prefix hits, resumption and preemption are the same arithmetic. Sequences that owe one token come first, so
decode is never starved by prefill, and the budget bounds a step's time.

Several plans may be in flight. A drawn token counts into `total` at once and is told by `commit`, in the order of the plans;
that a token was a stop is found then, so its sequence may have a row too many in the plans behind. Pages that are released
meanwhile may be handed out again: the device runs plans in order, so a late row writes before their new owner does.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from heapq import heappop, heappush

from services.engine.apart import block_copies, first, loose_copies, loose_slots
from services.engine.flight import Flight, Share, take_draw, take_row
from services.engine.pages import NoPages, Pages
from services.engine.plan import Draw, Plan, Row, Sampled
from services.engine.sequence import Sequence
from shared.blocks import extend
from shared.fields import pack_ids


class Scheduler:
    """`token_budget` is for steps in which somebody decodes, `prefill_budget` for steps in which nobody waits for a token."""

    def __init__(self, pages: Pages, token_budget: int, max_running: int, prefill_budget: int = 0) -> None:
        if token_budget < max_running:
            raise ValueError("the token budget must hold one token of every running sequence")
        self.pages, self.token_budget, self.max_running = pages, token_budget, max_running
        self.prefill_budget = max(prefill_budget, token_budget)
        self.running: list[Sequence] = []  # in order of arrival
        self.waiting: deque[Sequence] = deque()
        self._flights: deque[Flight] = deque()
        self._slots = list(range(max_running))  # a heap of the free ones: those in use lie close together
        self._arrivals = 0
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self._flights)

    @property
    def in_flight(self) -> int:
        """Plans that are not committed yet."""
        return len(self._flights)

    @property
    def planned(self) -> tuple[Sequence, ...]:
        """The sequences of the newest plan's rows."""
        return self._flights[-1].planned if self._flights else ()

    @property
    def open(self) -> int:
        """Sequences here now or to be forked: what intake must leave room for."""
        return sum(1 + sequence.unforked for sequence in (*self.running, *self.waiting))

    def add(self, sequence: Sequence) -> None:
        if not self.fits(sequence):
            raise ValueError("the sequence cannot fit into the page pool even alone")
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def fits(self, sequence: Sequence) -> bool:
        """Into the page pool, if it were alone."""
        return self.pages.blocks_for(sequence.limit) + sequence.aside < self.pages.blocks

    def cancel(self, request: str, choice: int | None = None) -> list[Sequence]:
        """Drop a request's sequences, or one choice of them, and free their pages at once."""
        found = [s for s in (*self.running, *self.waiting) if s.request == request and choice in (None, s.choice)]
        for sequence in found:
            sequence.finish = sequence.finish or "cancelled"
            self._leave(sequence)
        return [sequence for sequence in found if not sequence.apart]

    def _leave(self, sequence: Sequence) -> None:
        (self.running if sequence.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.running:
            heappush(self._slots, sequence.slot)
        self.pages.release(sequence.blocks)
        self._give_back(sequence)
        sequence.blocks = []
        sequence.running = sequence.begun = False
        sequence.cached = sequence.computed = sequence.published = sequence.told = 0

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence.lent)
        sequence.lent, sequence.loose = [], []

    # -- planning --------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide the next step. One without rows means that nothing can be computed now; it is never committed."""
        decoding = any(sequence.owed == 1 and sequence.begun for sequence in self.running)
        budget = self.token_budget if decoding else self.prefill_budget
        shares: list[Share] = []
        for sequence, owed in self._by_need():
            chunk = min(owed, budget)
            if not chunk or not sequence.running or sequence.certain_end:
                continue
            share = Share(sequence, chunk)
            if self._has_room(sequence, chunk) or self._grow(share):
                shares.append(share)
                budget -= chunk
        # Growing may have preempted a younger sequence that had its place in this step already.
        return self._freeze([share for share in shares if share.sequence.running])

    def _by_need(self) -> Iterator[tuple[Sequence, int]]:
        """With what they owe: running sequences that owe one token, then those that owe more, then new ones, once admitted."""
        now = [(sequence, sequence.owed) for sequence in self.running]
        before = self.preemptions
        yield from [pair for pair in now if pair[1] == 1]
        yield from [pair for pair in now if pair[1] > 1]
        while self.preemptions == before and (admitted := self._admit()) is not None:
            yield admitted, admitted.owed

    def _admit(self) -> Sequence | None:
        """Move one to the running ones if its prompt fits. First come, first served, but for who waits for what is computed."""
        sequence = first(self.waiting, self.running, self.pages)
        if sequence is None or sequence.pending or self._free_slots() < 1 + sequence.unforked:
            return None
        found = self.pages.match(sequence.hashes[: (sequence.total - 1) // self.pages.block_size])
        loose = loose_slots(sequence, self.pages)
        lent = list(dict.fromkeys(slot // self.pages.block_size for slot in loose))
        needed = self.pages.blocks_for(sequence.total + 1) - len(found)
        reserve = len(self.running)  # a block each for those that run, so that admission does not cause preemption
        if self.pages.free - self.pages.idle((*found, *lent)) < needed + reserve:
            return None
        self.waiting.remove(sequence)
        self.pages.take((*found, *lent))
        sequence.blocks, sequence.lent, sequence.loose = found, lent, loose
        sequence.cached = sequence.computed = max(len(found) * self.pages.block_size, sequence.parted)
        sequence.published = len(found)
        sequence.running, sequence.slot = True, heappop(self._slots)
        insort(self.running, sequence, key=lambda other: other.arrival)
        return sequence

    def _free_slots(self) -> int:
        return self.max_running - sum(1 + sequence.unforked for sequence in self.running)

    def _has_room(self, sequence: Sequence, chunk: int) -> bool:
        """Most decode rows write into a block that is theirs already."""
        at = sequence.computed // self.pages.block_size
        return chunk == 1 and at < len(sequence.blocks) and not self.pages.shared(sequence.blocks[at])

    def _grow(self, share: Share) -> bool:
        """Make the pages of a share writable, preempting the youngest if need be. False: it was preempted itself."""
        sequence = share.sequence
        try:
            self._unshare(share)
            while len(sequence.blocks) < self.pages.blocks_for(sequence.computed + share.chunk):
                sequence.blocks.append(self._allocate(sequence))
            share.copies += loose_copies(sequence, self.pages.block_size)
        except NoPages:
            return False
        return True

    def _unshare(self, share: Share) -> None:
        """Copy on write: the block that the next token goes to may still be read by another sequence."""
        blocks, at = share.sequence.blocks, share.sequence.computed // self.pages.block_size
        if at < len(blocks) and self.pages.shared(blocks[at]):
            mine = self._allocate(share.sequence)
            share.copies += block_copies(blocks[at], mine, self.pages.block_size)
            self.pages.release([blocks[at]])
            blocks[at] = mine
            share.sequence.told = min(share.sequence.told, at)

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

    def _freeze(self, shares: list[Share]) -> Plan:
        if not shares:
            return Plan((), (), ())
        shares.sort(key=lambda share: share.chunk > 1)
        rows: list[Row] = []
        draws: list[Draw] = []
        drawing: list[Sequence] = []
        for share in shares:
            rows.append(take_row(share, self.pages.block_size))
            if share.sequence.lent:
                self._give_back(share.sequence)
            if share.chunk > 1:  # plans run in order: whoever comes into a later one reads what this one writes
                self._publish(share.sequence)
            if share.sequence.computed == share.sequence.total and not share.sequence.apart:
                mine = self._drawing(share.sequence)
                drawing += mine
                draws += [take_draw(sequence, len(rows) - 1) for sequence in mine]
        self._flights.append(Flight(tuple(share.sequence for share in shares), tuple(drawing)))
        return Plan(tuple(rows), tuple(draws), tuple(copy for share in shares for copy in share.copies))

    def _drawing(self, leader: Sequence) -> list[Sequence]:
        """Who draws from a row: its sequence, and the choices that part from it here, sharing all of its pages."""
        twins = [self._fork(leader, nth) for nth in range(1, 1 + leader.unforked)]
        leader.unforked = 0
        return [leader, *twins]

    # -- folding the answer back -----------------------------------------------------------------------------------

    def commit(self, sampled: Seq[Sampled]) -> list[tuple[Sequence, Sampled]]:
        """Take the tokens of the oldest plan in flight. Returns each sequence that advanced with its token."""
        flight = self._flights.popleft()
        size = self.pages.block_size
        for sequence in flight.planned:
            if sequence.computed >= (sequence.published + 1) * size:
                self._publish(sequence)
            if sequence.apart and sequence.running and not sequence.owed:
                self._leave(sequence)
        drawn = [pair for pair in zip(flight.drawing, sampled, strict=True) if not pair[0].done]
        for sequence, token in drawn:
            self._advance(sequence, token)
        return drawn

    def _advance(self, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.token < 0:
            sequence.broken = True
        else:
            sequence.append(sampled.token)
        if sequence.done:
            sequence.check()
            self._leave(sequence)

    def _fork(self, leader: Sequence, nth: int) -> Sequence:
        """Another choice of the same prompt, sharing all of its pages."""
        twin = leader.fork(leader.choice + nth, heappop(self._slots))
        self.pages.take(twin.blocks)
        self.running.insert(self.running.index(leader) + nth, twin)
        return twin

    def _publish(self, sequence: Sequence) -> None:
        """Tell the pool of blocks that have become full, extending the hash chain over the output."""
        size = self.pages.block_size
        full = min(sequence.computed, len(sequence.tokens)) // size if sequence.blocks else 0
        for at in range(sequence.published, full):
            if at == len(sequence.hashes):
                sequence.hashes.append(extend(sequence.parent, pack_ids(sequence.tokens[at * size : (at + 1) * size])))
            self.pages.publish(sequence.blocks[at], sequence.hashes[at])
        sequence.published = max(sequence.published, full)
