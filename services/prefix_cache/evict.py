"""What a page is worth keeping: the one worth least goes first. Pure.

Time is counted in pages that engines wanted to write, so that a rate of traffic means nothing. A page is as good as it is
young since it was last read; reads before count as up to half a cache's turnover each, three at most; and the further a
page is from its chain's root the less, because what many prompts share is at their beginning. A newcomer that is worth
less than all others gets no room: a long prompt that nobody repeats does not wash out what is used. Nothing stays for its
past alone: after 1.5 turnovers unread, a page is worth less than any newcomer at a root, after 4.5 less than any at all. The
numbers are from tests/bench/eviction.py.
"""

from services.prefix_cache.index import Page

READ = 0.5  # of a turnover, for each read
READS = 3
STEP = 150.0  # pages, for each page before it in its chain
DEEP = 3.0  # turnovers at most, for all of them


def worth(page: Page, clock: int, slots: int) -> float:
    return clock + READ * slots * min(page.reads, READS) - min(STEP * page.depth, DEEP * slots)
