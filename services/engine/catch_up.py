"""What a resumed request has said already: read from the token log, after the claim that makes it ours."""

from services.engine.job import Job
from shared.bus import Bus
from shared.messages import LogRecord, Step
from shared.tokenlog import Follower

CLAIMS = 3  # a broker that restarts between the two calls may have lost the claim


async def catch_up(bus: Bus, job: Job) -> bool:
    """Claim first, then read the log up to the claim: what it tells is what this attempt continues.

    False: the log ends in a conflict, a higher epoch or an end, and the request is not ours to continue. Raises BusDown.
    """
    work, stream = job.work, bus.names.tokens(job.work.partition)
    follower = Follower(work.generation, work.sampling.n, work.given, work.ends)
    claim, said = job.claim(), list[LogRecord]()
    for _ in range(CLAIMS):
        mine = await bus.append(stream, Step(records=(claim,)))
        said = [record for _, record in (await bus.told(stream, work.request, work.log_from, mine))[0]]
        if claim in said:
            break
    ours = follower.continues(job.epoch, said)
    job.choices = follower.choices
    job.lost = min(work.tries, follower.fruitless - 1)  # of engines that died, those that had no token from it
    return ours
