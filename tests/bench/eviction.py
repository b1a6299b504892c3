"""How well the index keeps what will be asked for again: the cache's own policy, LRU, and the clairvoyant optimum.

    python -m tests.bench.eviction TRACE.jsonl [--sizes 0.003 0.01 0.03 0.1 0.2]

Each request of the trace finds its longest prefix and then publishes all of its blocks, as engines do. Sizes are shares of
the distinct blocks. The index is the service's own; the optimum forgets what is needed last, and does not keep what is
never needed again, which for chains is the best that anyone could do: a parent is never needed later than its child.
"""

import argparse
import heapq
import json
import sys
from collections import defaultdict, deque
from pathlib import Path

from services.prefix_cache.evict import worth
from services.prefix_cache.index import Index, Page, Worth

Requests = list[list[bytes]]
NEVER = 1 << 60


def read(path: str) -> Requests:
    with Path(path).open() as lines:
        return [[id.to_bytes(8, "big") for id in json.loads(line)["hash_ids"]] for line in lines]


def replay(requests: Requests, slots: int, policy: Worth) -> int:
    """Blocks found."""
    index, hits = Index(slots, policy), 0
    for keys in requests:
        found = index.find(keys)
        hits += len(found)
        index.unpin(found)
        index.commit([page for page in index.reserve(keys, len(keys)) if page is not None])
    return hits


def optimum(requests: Requests, slots: int) -> int:
    uses: dict[bytes, deque[int]] = defaultdict(deque)
    for at, keys in enumerate(requests):
        for key in keys:
            uses[key].append(at)
    kept: dict[bytes, int] = {}
    queue: list[tuple[int, int, bytes]] = []
    hits = 0
    for keys in requests:
        hits += next((depth for depth, key in enumerate(keys) if key not in kept), len(keys))
        for depth, key in enumerate(keys):
            uses[key].popleft()
            kept[key] = uses[key][0] if uses[key] else NEVER
            heapq.heappush(queue, (-kept[key], -depth, key))
        while len(kept) > slots or (queue and queue[0][0] == -NEVER):
            use, _, key = heapq.heappop(queue)
            if kept.get(key) == -use:
                del kept[key]
    return hits


def lru(page: Page, clock: int, slots: int) -> float:
    return clock


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.2, 1.0])
    given = parser.parse_args()
    requests = read(given.trace)
    asked, distinct = sum(map(len, requests)), len({key for keys in requests for key in keys})
    say(f"{len(requests)} requests, {asked} blocks, {distinct} distinct: at best {1 - distinct / asked:.2%}")
    say("slots, hit rate: lru, ours, optimum; ours / lru, ours / optimum")
    for size in given.sizes:
        slots = int(size * distinct)
        old, ours, best = (
            hits / asked for hits in (replay(requests, slots, lru), replay(requests, slots, worth), optimum(requests, slots))
        )
        say(f"{slots:7d} {old:7.2%} {ours:7.2%} {best:7.2%}   {ours / old:.2f} {ours / best:.2f}")


if __name__ == "__main__":
    main()
