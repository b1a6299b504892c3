"""Storing pages by blocking calls in a thread of its own."""

from collections.abc import Sequence

from services.engine.prefix_client import CacheDown
from services.engine.prefix_source import Offer, Source
from shared.page import Buffer, Label, head
from shared.stats import Stats

WRITE_S = 5.0


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

    def write(self, offer: Offer, at: int, label: Label, payload: Buffer, payload_sum: int) -> bool:
        try:
            offer.client.limit(WRITE_S)
            offer.client.write(offer.lease, at, head(label, len(payload), payload_sum), payload)
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
