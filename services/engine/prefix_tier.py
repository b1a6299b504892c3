"""The shared prefix cache behind the engine's own pages: what is missing here is fetched, what was computed is stored.

Loading goes on beside the steps: a thread has pages put into blocks that nobody else looks at and verifies them there; then the
scheduler finds them like any block that was computed here. Whatever goes wrong is a miss.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.engine.pages import Pages
from services.engine.plan import Device
from services.engine.prefix import LEAST_TOKENS, Worth, labels, whole_chain
from services.engine.prefix_source import Fetcher, Offer
from services.engine.prefix_storer import Storer
from services.engine.sequence import Sequence
from shared.page import Label
from shared.stats import Stats

ASK_S = 0.25  # for an answer, which takes a millisecond on a host and a round trip between hosts
MAX_CHAINS = 64  # waiting to be stored; more are not
HAND_OVER_S = 1.0
REMEMBERED = 4096  # chains that were stored lately
log = logging.getLogger("headrace")


@dataclass(frozen=True, slots=True)
class Chain:
    """What may be stored: full blocks and their tokens."""

    hashes: tuple[bytes, ...]
    tokens: tuple[int, ...]


class PrefixTier:
    def __init__(
        self, pages: Pages, device: Device, thread: ThreadPoolExecutor, space: bytes, fetcher: Fetcher, storer: Storer,
        worth: Worth, stats: Stats,
    ) -> None:  # fmt: skip
        self._pages, self._device, self._space = pages, device, space
        self._fetcher, self._storer, self.worth, self._stats = fetcher, storer, worth, stats
        self._device_thread = thread
        self._fetching = ThreadPoolExecutor(1, "fetch")
        self._storing = ThreadPoolExecutor(1, "store")
        self._chains: asyncio.Queue[Chain] = asyncio.Queue(MAX_CHAINS)
        self._stored: OrderedDict[bytes, None] = OrderedDict()
        self._turn = asyncio.Lock()  # to fetch
        self._asked: asyncio.Future[Offer | None] | None = None  # what the fetching thread was asked last

    def connect(self) -> "asyncio.Future[None]":
        """Before the first request. A cache that is not there is no trouble."""
        return asyncio.get_running_loop().run_in_executor(self._fetching, self._connect)

    def _connect(self) -> None:
        self._device.ferry.make_room()
        self._fetcher.connect()

    # -- loading ---------------------------------------------------------------------------------------------------

    async def load(self, sequence: Sequence) -> None:
        """Bring the blocks that a sequence will need and that are not here, as far as that is faster than prefill."""
        size = self._pages.block_size
        for part in sequence.parts:
            await self._load(part.hashes, part.tokens)
        sequence.hashes = whole_chain(sequence.hashes, sequence.parent, sequence.tokens, size)
        await self._load(sequence.hashes[: (sequence.total - 1) // size], sequence.tokens)

    async def _load(self, hashes: Seq[bytes], tokens: Seq[int]) -> None:
        """In turn, so that what several requests miss comes once; nobody waits longer than computing it takes."""
        missing = self._missing(hashes, self._pages.match(hashes))
        if not missing or not self._fetcher.hopes(missing):
            return
        try:
            async with asyncio.timeout(self.worth.prefill_s(missing)):
                await self._turn.acquire()
        except TimeoutError:
            return
        try:
            await self._fetch(hashes, tokens)
        finally:
            self._turn.release()

    def _missing(self, hashes: Seq[bytes], here: Seq[int]) -> int:
        """How many blocks of a chain are not here; 0 where they are too few to be worth asking."""
        missing = len(hashes) - len(here)
        return missing if missing * self._pages.block_size >= LEAST_TOKENS else 0

    async def _fetch(self, hashes: Seq[bytes], tokens: Seq[int]) -> None:
        here = self._pages.match(hashes)  # others may have brought some meanwhile
        if not 0 < self._missing(hashes, here) <= self._pages.free:
            return
        missing = labels(self._space, hashes, tokens, len(here), self._pages.block_size)
        self._pages.take(here)  # or room for what is missing would be made by forgetting what it follows
        try:
            await self._bring_missing(missing)
        finally:
            self._pages.release(here)

    async def _bring_missing(self, missing: Seq[Label]) -> None:
        offer = await self._find(missing)
        if offer is None:
            return
        try:
            await self._bring(offer, missing[: len(offer.lease.slots)])
        finally:
            self._fetching.submit(self._fetcher.release, offer)

    async def _find(self, missing: Seq[Label]) -> Offer | None:
        """None, too, where the answer takes long, and until it is there: locking the memory of a restarted cache takes a GPU a
        tenth of a second a gigabyte.
        """
        if self._asked is not None and not self._asked.done():
            return None
        asked = self._asked = asyncio.get_running_loop().run_in_executor(self._fetching, self._fetcher.find, missing)
        try:
            await asyncio.wait({asked}, timeout=min(ASK_S, self.worth.prefill_s(len(missing))))
        finally:
            if not asked.done():
                asked.add_done_callback(self._too_late)
        return asked.result() if asked.done() else None

    def _too_late(self, asked: "asyncio.Future[Offer | None]") -> None:
        if not asked.cancelled() and asked.exception() is None and (offer := asked.result()) is not None:
            self._fetching.submit(self._fetcher.release, offer)

    async def _bring(self, offer: Offer, labels: Seq[Label]) -> None:
        """Nobody else has these blocks while they are filled. Then they are free, but known, and last to be taken."""
        if len(labels) > self._pages.free:
            return
        loop, blocks = asyncio.get_running_loop(), [self._pages.allocate() for _ in labels]
        try:
            await loop.run_in_executor(self._device_thread, self._device.ferry.follow)
            good = await loop.run_in_executor(self._fetching, self._fetcher.bring, offer, labels, blocks)
            for block, label in zip(blocks[:good], labels, strict=False):
                self._pages.publish(block, label.hash)
            self._stats.counters["prefix_fetched_tokens"] += good * self._pages.block_size
        finally:
            self._pages.release(blocks)

    # -- storing ---------------------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence, tokens: int) -> None:
        """Store the full blocks of its first tokens, and its parts, in the background; not if too many are waiting."""
        for part in sequence.parts:
            self._offer(part.hashes, part.tokens)
        self._offer(sequence.hashes[: tokens // self._pages.block_size], sequence.tokens)

    def _offer(self, hashes: Seq[bytes], tokens: Seq[int]) -> None:
        full = len(self._pages.match(hashes))
        if not full or hashes[full - 1] in self._stored or full * self._pages.block_size < LEAST_TOKENS:
            return
        chain = Chain(tuple(hashes[:full]), tuple(tokens[: full * self._pages.block_size]))
        try:
            self._chains.put_nowait(chain)
        except asyncio.QueueFull:
            self._stats.counters["prefix_not_stored"] += 1

    async def work(self) -> None:
        """Store what is offered, until cancelled."""
        while True:
            chain = await self._chains.get()
            try:
                await self._store(chain)
            finally:
                self._chains.task_done()

    async def hand_over(self, sequences: Iterable[Sequence]) -> None:
        """Store what running sequences have, so that whoever goes on with them need not compute it again."""
        for sequence in sequences:
            self.offer(sequence, len(sequence.tokens))
        try:
            await asyncio.wait_for(self._chains.join(), HAND_OVER_S)
        except TimeoutError:
            log.warning("not all pages could be stored in time")

    async def _store(self, chain: Chain) -> None:
        run, portion = asyncio.get_running_loop().run_in_executor, self._device.ferry.portion
        while (offer := await run(self._storing, self._storer.reserve, chain.hashes)) is not None:
            wanted = [at for at, slot in enumerate(offer.lease.slots) if slot >= 0]
            written = 0
            while written < len(wanted) and (count := await self._write(offer, chain, wanted[written:][:portion])):
                written += count
            await run(self._storing, self._storer.commit, offer, written)
            if not written or len(offer.lease.slots) == len(chain.hashes):
                break
        self._stored[chain.hashes[-1]] = None
        if len(self._stored) > REMEMBERED:
            self._stored.popitem(last=False)

    async def _write(self, offer: Offer, chain: Chain, wanted: Seq[int]) -> int:
        """Copy some blocks of a chain out of the device, as long as they are here, and into the cache. How many?"""
        run, first = asyncio.get_running_loop().run_in_executor, wanted[0]
        here = self._pages.match(chain.hashes[: wanted[-1] + 1])
        wanted = [at for at in wanted if at < len(here)]
        if not wanted:
            return 0
        meant = labels(self._space, chain.hashes[: wanted[-1] + 1], chain.tokens, first, self._pages.block_size)
        blocks = [here[at] for at in wanted]
        self._pages.take(blocks)
        try:
            await run(self._device_thread, self._device.ferry.follow)
            return await run(self._storing, self._export, offer, wanted, [meant[at - first] for at in wanted], blocks)
        finally:
            self._pages.release(blocks)

    def _export(self, offer: Offer, wanted: Seq[int], meant: Seq[Label], blocks: Seq[int]) -> int:
        payloads, sums = self._device.ferry.export(blocks)
        done = 0
        for at, label, payload, payload_sum in zip(wanted, meant, payloads, sums, strict=True):
            if not self._storer.write(offer, at, label, payload, payload_sum):
                break
            done += 1
        return done

    def close(self) -> None:
        self._fetching.submit(self._fetcher.close)
        self._storing.submit(self._storer.close)
        self._fetching.shutdown()
        self._storing.shutdown()
