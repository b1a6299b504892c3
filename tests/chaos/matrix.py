"""The matrix: what is done to a mesh, and what it promises. A row is a coroutine that hurts; users stream meanwhile.

The rows are in `processes` and `surroundings`; those that something else holds are named in ELSEWHERE.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tests.chaos.field import Field

TWO = MappingProxyType({"tokenizer": 2, "engine": 2, "streamer": 2})

Fault = Callable[[Field], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    id: str
    what: str
    promise: str
    fault: Fault
    seconds: float = 4.0
    loses: bool = False  # the broker loses data and a streamer may go with it: `stream_lost` is allowed
    fails: int = 0  # stages die by themselves
    counts: Mapping[str, int] = field(default_factory=lambda: TWO)
    env: Mapping[str, str] = field(default_factory=dict)
    proxied: bool = False
    users: int = 16


ROWS: dict[str, Row] = {}
ELSEWHERE = {
    "C5": "python -m tests.chaos.figures", "X3": "tests/mesh/test_bad_input.py",
    "T1": "tests/protocol gives the broker another clock", "V1": "tests/prefix_cache/test_page.py, test_service.py",
    "O2": "tests/mesh/test_gate.py: limits per key", "A1": "tests/mesh/test_users.py",
    "A2": "tests/mesh/test_gate.py", "A3": "tests/prefix_cache/test_tenants.py",
}  # fmt: skip


def row(id: str, what: str, promise: str, **options: object) -> Callable[[Fault], Fault]:
    def keep(fault: Fault) -> Fault:
        ROWS[id] = Row(id, what, promise, fault, **options)  # type: ignore[arg-type]
        return fault

    return keep
