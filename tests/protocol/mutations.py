"""The protocol's rules, each of which can be switched off: what the test must see when one is missing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from services.engine.job import Job
from services.streamer import attempts
from services.streamer.restore import restore
from services.streamer.service import Streamer
from shared.bus import FIELD, Bus
from shared.codec import encode_step
from shared.messages import Claim, End, LogRecord, Record, Step, Tokens
from shared.readers import Group
from shared.tokenlog import Choice, Follower, Verdict, counts_of
from tests.protocol.actors import Engine
from tests.protocol.kernel import SimBus

Patch = tuple[str, Any]


class NoEpoch(Follower):
    """Tokens and ends count whoever wrote them."""

    def read(self, record: LogRecord) -> Verdict:
        return super().read(record.model_copy(update={"epoch": self.epoch}) if isinstance(record, Tokens | End) else record)


class NoHash(Follower):
    """An overlap is dropped and the rest taken, whatever it continues."""

    def _tokens(self, choice: Choice, record: Tokens) -> Verdict:
        if record.first > len(choice.ids):
            return Verdict.CONFLICT
        fresh = record.ids[4 * (len(choice.ids) - record.first) :]
        choice.extend(fresh)
        return Verdict.NEWS if fresh else Verdict.NOTHING


class NeitherEpochNorHash(NoEpoch, NoHash):
    pass


class NoGap(Follower):
    """Tokens that start beyond what was read are taken all the same."""

    def _tokens(self, choice: Choice, record: Tokens) -> Verdict:
        if record.first <= len(choice.ids):
            return super()._tokens(choice, record)
        choice.extend(record.ids)
        return Verdict.NEWS


class AnyClaim(Follower):
    """The newest claim in the log wins, not the highest."""

    def _claim(self, claim: Claim) -> Verdict:
        self.epoch = (0, 0, 0)
        return super()._claim(claim)


class NoConflict(Follower):
    """What cannot be followed is skipped."""

    def read(self, record: LogRecord) -> Verdict:
        verdict = super().read(record)
        return Verdict.NOTHING if verdict is Verdict.CONFLICT else verdict


def follower(cls: type[Follower]) -> list[Patch]:
    return [("services.streamer.session.Follower", cls), ("services.engine.catch_up.Follower", cls)]


async def _nothing(*_: object) -> None:
    pass


async def _all_held(self: Group, entries: list[str]) -> set[str]:
    return set(entries)


async def _own_claim_only(bus: Bus, job: Job) -> bool:
    """The engine continues from what the record says, and does not read the log."""
    await bus.append(bus.names.tokens(job.work.partition), Step(records=(job.claim(),)))
    job.choices = Follower(0, job.work.sampling.n, job.work.given, job.work.ends).choices
    return True


async def _take_over_as_it_is(self: Engine, deliveries: list[Any]) -> None:
    """The entry of a lost engine is worked on under its old epoch."""
    for delivery in deliveries:
        await self.begin(Job(Job(delivery.message, delivery.entry, 0.0).handed_on(crashed=False), delivery.entry, 0.0))


async def _acknowledge_first(self: Engine) -> None:
    while True:
        await self.kernel.until(lambda: bool(self.said or self.acks))
        acks, self.acks = self.acks, []
        await self.group.ack(acks)
        await self.kernel.sleep(50)
        await _publish_said(self)


async def _publish_said(self: Engine) -> None:
    said, self.said = self.said, []
    if said:
        await self.bus.run([("XADD", self.bus.names.tokens("p"), "*", FIELD, encode_step(said))])


def _same_generation(mine: Record, now: Record | None, *rest: Any) -> Record | None:
    record = attempts.restored(mine, now, *rest)
    return record and record.model_copy(update={"submit": record.submit.model_copy(update={"generation": 1})})


def _restored_anyway(mine: Record, now: Record | None, *rest: Any) -> Record | None:
    return attempts.restored(mine, None, *rest)


def _attached_anyway(seen: Record, now: Record | None, clock_ms: int) -> Record | None:
    return seen


def _count_agrees(text: str, choices: list[Choice]) -> bool:
    counts = counts_of(text, len(choices))
    return all(count <= len(choice.ids) for count, choice in zip(counts, choices, strict=True))


async def _set(self: SimBus, key: str, before: bytes | None, commands: list[Any]) -> bool:
    await self.run(commands, atomic=True)
    return True


async def _no_incarnation(self: Bus) -> str:
    return ""


async def _to_the_end(self: Streamer) -> None:
    """A streamer that meets another broker reads on behind all that it has, though it has not read all of that."""
    for stream in list(self.tail.positions):
        self.tail.positions[stream] = await self.bus.last_entry(stream)
    for session in list(self.sessions.values()):
        if not session.done:
            await restore(self, session)


ENGINE = "tests.protocol.actors.Engine"
STREAMER = "services.streamer.service"
RULES: dict[str, list[Patch]] = {
    "epoch": follower(NoEpoch),
    "hash": follower(NoHash),
    "gap": follower(NoGap),
    "claim order": follower(AnyClaim),
    "conflict": follower(NoConflict),
    "restore": [(f"{STREAMER}.restore", _nothing), ("services.streamer.attach.restore", _nothing)],
    "generation": [("services.streamer.restore.restored", _same_generation)],
    "restore's comparison": [("services.streamer.restore.restored", _restored_anyway)],
    "connection number": [("services.streamer.attach.attached", _attached_anyway)],
    "compare and set": [("tests.protocol.kernel.SimBus.swap", _set)],
    "catching up": [("tests.protocol.actors.catch_up", _own_claim_only)],
    "re-issue": [(f"{ENGINE}.reissue", _take_over_as_it_is)],
    "lease refresh": [("shared.readers.Group.refresh", _all_held)],
    "acknowledge last": [(f"{ENGINE}.publish", _acknowledge_first)],
    "cursor's hash": [("services.streamer.attach.agrees", _count_agrees)],
    "incarnation": [("shared.bus.Bus.incarnation", _no_incarnation)],
    "look after": [(f"{STREAMER}.Streamer.look_after", _nothing)],
    "read on": [(f"{STREAMER}.Streamer.restore_all", _to_the_end)],
}


RULES |= {"epoch and hash": follower(NeitherEpochNorHash)}
PAIRS = {
    "incarnation and look after": ("incarnation", "look after"),
    "incarnation, conflict and look after": ("incarnation", "conflict", "look after"),
    "acknowledge last and look after": ("acknowledge last", "look after"),
}


@contextmanager
def without(rule: str) -> Iterator[None]:
    with ExitStack() as stack:
        for target, other in [change for name in PAIRS.get(rule, (rule,)) for change in RULES[name]]:
            stack.enter_context(patch(target, other))
        yield
