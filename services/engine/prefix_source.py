"""Fetching and storing pages, by blocking calls in threads of their own: the event loop and the device never wait here."""

import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.engine.plan import Ferry
from services.engine.prefix import Worth
from services.engine.prefix_client import CacheDown, Client, Lease, Page
from shared.host import usable_cores
from shared.page import Buffer, Label, head, verify
from shared.stats import Stats

CONNECT_S = 0.5  # or less, where patience is less
WRITE_S = 5.0
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0
CHECKERS = 8
log = logging.getLogger("headrace")


class Source:
    """One cache, for one thread. After trouble it is left alone for a while, each time for longer.

    `reader` is what will copy from the cache's memory.
    """

    def __init__(self, address: str, space: bytes, page_bytes: int, reader: Ferry | None) -> None:
        self.address, self._space, self._page_bytes, self._reader = address, space, page_bytes, reader
        self._client: Client | None = None
        self._pinned = False
        self._rest_s, self._until = FIRST_REST_S, 0.0

    def client(self, patience_s: float) -> Client:
        """Raises CacheDown."""
        if time.monotonic() < self._until:
            raise CacheDown("left alone after trouble")
        if self._client is None:
            self._client = Client(self.address, self._space, self._page_bytes, min(patience_s, CONNECT_S))
            self._rest_s = FIRST_REST_S
            if self._reader is not None and self._client.memory is not None:
                self._pinned = self._reader.pin(self._client.memory)
        self._client.limit(patience_s)
        return self._client

    def trouble(self, error: CacheDown) -> None:
        if time.monotonic() >= self._until:
            log.warning("prefix cache %s: %s", self.address, error)
            self._until = time.monotonic() + self._rest_s
            self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
        self.close()

    def close(self) -> None:
        if self._client is None:
            return
        if self._pinned and self._reader is not None and self._client.memory is not None:
            self._reader.unpin(self._client.memory)
        self._pinned = False
        self._client.close()
        self._client = None


@dataclass(slots=True)
class Offer:
    """What one cache has of a chain, or has room for; how long its pages took so far; and whether there are no more."""

    source: Source
    client: Client
    lease: Lease
    deadline: float = 0.0
    reading_s: float = 0.0
    copying_s: float = 0.0
    over: bool = False

    @property
    def current(self) -> bool:
        """Payloads in the cache's memory are still what was verified: they stay as they are until the lease ends."""
        return self.client.memory is None or time.monotonic() < self.lease.until


def _trouble(page: Page, label: Label) -> str:
    return verify(*page, label)


class Fetcher:
    """Called from one thread."""

    def __init__(self, sources: Sequence[Source], worth: Worth, stats: Stats) -> None:
        self._sources, self._worth, self._stats = sources, worth, stats
        self._checkers = ThreadPoolExecutor(min(CHECKERS, usable_cores()), "verify")

    def connect(self) -> None:
        """Before the first request: a GPU takes its time to lock a cache's memory. One that is not there yet is no trouble."""
        for source in self._sources:
            with contextlib.suppress(CacheDown):
                source.client(CONNECT_S)

    def find(self, labels: Sequence[Label]) -> Offer | None:
        """The cache from which fetching these pages saves the most; it may take as long as it saves."""
        deadline = time.monotonic() + self._worth.prefill_s(len(labels))
        offer = self._best(labels, deadline)
        if offer is not None:
            offer.deadline = deadline
        return offer

    def piece(self, offer: Offer, first: int, labels: Sequence[Label]) -> list[memoryview]:
        """The verified payloads of these pages, from the `first` of the offer on; fewer where one is bad or time is over."""
        started = time.monotonic()
        if not labels or offer.over or started >= offer.deadline:
            return []
        try:
            offer.client.limit(offer.deadline - started)
            payloads = self._verified(offer, offer.client.read(offer.lease, first, len(labels)), labels)
        except CacheDown as error:
            self._failed(offer.source, error)
            payloads = []
        offer.over = len(payloads) < len(labels)
        offer.reading_s += time.monotonic() - started
        return payloads

    def _best(self, labels: Sequence[Label], deadline: float) -> Offer | None:
        """Ask the caches in turn, our host's first; the last ones only while something is missing."""
        best: Offer | None = None
        for source in self._sources:
            if best is not None and len(best.lease.slots) == len(labels):
                break
            offer = self._ask(source, labels, deadline)
            if offer is not None and (best is None or self._gain(offer) > self._gain(best)):
                best, offer = offer, best
            if offer is not None:
                self.release(offer)
        if best is not None and self._gain(best) <= 0:
            self._stats.counters["prefix_declined"] += 1
            self._worth.fetch(best.source.address).doubt()
            self.release(best)
            return None
        return best

    def _gain(self, offer: Offer) -> float:
        return self._worth.gain_s(offer.source.address, len(offer.lease.slots))

    def _ask(self, source: Source, labels: Sequence[Label], deadline: float) -> Offer | None:
        try:
            client = source.client(deadline - time.monotonic())
            lease = client.find([label.hash for label in labels])
        except CacheDown as error:
            self._failed(source, error)
            return None
        return Offer(source, client, lease) if lease.slots else None

    def _verified(self, offer: Offer, pages: Sequence[Page], labels: Sequence[Label]) -> list[memoryview]:
        """The payloads before the first page that is not what it should be; the cache is told of that one."""
        why = list(self._checkers.map(_trouble, pages, labels))
        bad = next((at for at, trouble in enumerate(why) if trouble), None)
        if bad is None:
            return [payload for _, payload in pages]
        self._stats.counters["prefix_spoiled"] += 1
        log.warning("prefix cache %s: a page did not verify (%s)", offer.source.address, why[bad])
        offer.client.spoiled([labels[bad].hash])
        return [payload for _, payload in pages[:bad]]

    def release(self, offer: Offer) -> None:
        try:
            offer.client.limit(CONNECT_S)
            offer.client.release(offer.lease)
        except CacheDown as error:
            self._failed(offer.source, error)

    def _failed(self, source: Source, error: CacheDown) -> None:
        self._stats.counters["prefix_failures"] += 1
        source.trouble(error)

    def close(self) -> None:
        for source in self._sources:
            source.close()
        self._checkers.shutdown()


class Storer:
    """Writes pages to one cache. Called from one thread; trouble means that they are not stored, and no more."""

    def __init__(self, source: Source, stats: Stats) -> None:
        self._source, self._stats = source, stats

    def reserve(self, hashes: Sequence[bytes]) -> Offer | None:
        """Room for what the cache does not have of a chain; None where there is nothing to write."""
        try:
            client = self._source.client(WRITE_S)
            lease = client.reserve(hashes)
        except CacheDown as error:
            self._failed(error)
            return None
        return Offer(self._source, client, lease) if lease.number else None

    def write(self, offer: Offer, at: int, label: Label, payload: Buffer) -> bool:
        try:
            offer.client.limit(WRITE_S)
            offer.client.write(offer.lease, at, head(label, payload), payload)
        except CacheDown as error:
            self._failed(error)
            return False
        return True

    def commit(self, offer: Offer, pages: int) -> None:
        try:
            self._stats.counters["prefix_stored_pages"] += offer.client.commit(offer.lease, pages)
        except CacheDown as error:
            self._failed(error)

    def _failed(self, error: CacheDown) -> None:
        self._stats.counters["prefix_failures"] += 1
        self._source.trouble(error)

    def close(self) -> None:
        self._source.close()
