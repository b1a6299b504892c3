"""Fetching pages by blocking calls in a thread of its own: the event loop and the device never wait here."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from services.engine.plan import Cargo, Ferry, Landed
from services.engine.prefix import Worth
from services.engine.prefix_client import CONNECT_S, CacheDown, Client, Lease, Pages
from shared.page import HEAD_BYTES, BadPage, Label, claim
from shared.stats import Stats

MEET_S = 20.0  # before the first request, for one that answers the call: it takes a tenth of a second a gigabyte to begin
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0
Item = TypeVar("Item")
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
        client = self._client or self.connect(min(patience_s, CONNECT_S))
        client.limit(patience_s)
        return client

    def connect(self, patience_s: float) -> Client:
        """Raises CacheDown. A GPU takes its time to lock the cache's memory, whatever the patience."""
        client = self._client = Client(self.address, self._space, self._page_bytes, patience_s)
        self._rest_s = FIRST_REST_S
        if self._reader is not None and client.memory is not None:
            self._pinned = self._reader.pin(client.memory)
        return client

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
    """What one cache has of a chain, or has room for; until when it may take, and whether there is no more to be had."""

    source: Source
    client: Client
    lease: Lease
    deadline: float = 0.0
    over: bool = False


class Piece(NamedTuple):
    """Pages of these labels: the sums that their headers claim, why the next header is not its label's, what is on its way."""

    labels: Sequence[Label]
    claims: Sequence[int]
    why: str
    cargo: Cargo


class Fetcher:
    """Called from one thread."""

    def __init__(self, sources: Sequence[Source], ferry: Ferry, worth: Worth, stats: Stats) -> None:
        self._sources, self._ferry, self._worth, self._stats = sources, ferry, worth, stats

    def connect(self) -> None:
        """To all that are there, before the first request: also to one that is still claiming its memory."""
        for source in self._sources:
            with contextlib.suppress(CacheDown):
                source.connect(MEET_S)

    def hopes(self, pages: int) -> bool:
        """Whether so many pages would be worth fetching, if a cache had them all."""
        hoped = any(self._worth.gain_s(source.address, pages) > 0 for source in self._sources)
        if not hoped:
            for source in self._sources:
                self._worth.fetch(source.address).doubt()
        return hoped

    def find(self, labels: Sequence[Label]) -> Offer | None:
        """The cache from which fetching these pages saves the most; it may take as long as it saves."""
        deadline = time.monotonic() + self._worth.prefill_s(len(labels))
        offer = self._best(labels, deadline)
        if offer is not None:
            offer.deadline = deadline
        return offer

    def bring(self, offer: Offer, labels: Sequence[Label], blocks: Sequence[int]) -> int:
        """Fill blocks with an offer's pages. How many of the first ones hold what their labels say; no others do.

        Several pieces are on their way at once. When this returns, none is: the blocks are the caller's again.
        """
        started, good = time.monotonic(), 0
        for piece in ahead(self._pieces(offer, labels, blocks), self._ferry.ahead - 1):
            sums = piece.cargo.sums()
            if not offer.over:
                good += self._verified(offer, piece, sums)
        if good:
            took = time.monotonic() - started
            self._stats.observe("prefix_fetch", took)
            self._worth.fetch(offer.source.address).note(good * self._ferry.page_bytes, took)
        return good

    def _pieces(self, offer: Offer, labels: Sequence[Label], blocks: Sequence[int]) -> Iterator[Piece]:
        """Those whose headers are right, begun one by one; until one is not, or time is over."""
        for first in range(0, len(labels), self._ferry.portion):
            now = time.monotonic()
            if offer.over or now >= offer.deadline:
                return
            some = labels[first : first + self._ferry.portion]
            try:
                offer.client.limit(offer.deadline - now)
                pages = offer.client.read(offer.lease, first, len(some))
            except CacheDown as error:
                return self._failed(offer.source, error)
            claims, why = _claims(pages, some)
            places, where = [slot + HEAD_BYTES for slot in pages.slots[: len(claims)]], blocks[first : first + len(claims)]
            yield Piece(some, claims, why, self._ferry.bring(pages.memory, places, where) if claims else Landed(()))
            if why:
                return

    def _verified(self, offer: Offer, piece: Piece, sums: Sequence[int]) -> int:
        """How many pages arrived as they should be, before the first one that did not: none behind that one is used."""
        good = next((at for at, pair in enumerate(zip(piece.claims, sums, strict=True)) if pair[0] != pair[1]), len(sums))
        why = "checksum" if good < len(sums) else piece.why
        if why:
            offer.over = True
            self._spoiled(offer, piece.labels[good], why)
        return good

    def _spoiled(self, offer: Offer, label: Label, why: str) -> None:
        """The cache is told, and gives this page to nobody again."""
        self._stats.counters["prefix_spoiled"] += 1
        log.warning("prefix cache %s: a page did not verify (%s)", offer.source.address, why)
        try:
            offer.client.spoiled([label.hash])
        except CacheDown as error:
            self._failed(offer.source, error)

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


def _claims(pages: Pages, labels: Sequence[Label]) -> tuple[list[int], str]:
    """The sums that the payloads must have, up to the first header that is not what it should be, and why it is not."""
    claims: list[int] = []
    for at, label in enumerate(labels):
        try:
            claims.append(claim(pages.header(at), label, pages.size))
        except BadPage as bad:
            return claims, str(bad)
    return claims, ""


def ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items: each is handed out when the `count` after it have been begun as well."""
    begun: deque[Item] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun
