"""What a resumed request has said already: read from the token log, after the claim that makes it ours."""

from services.engine.job import Job
from shared.bus import Bus
from shared.messages import Step
from shared.tokenlog import Follower


async def catch_up(bus: Bus, job: Job) -> bool:
    """Claim first, then read the log up to the claim: what it tells is what this attempt continues.

    False: the log ends in a conflict, a higher epoch or an end, and the request is not ours to continue. Raises BusDown.
    """
    work, stream = job.work, bus.names.tokens(job.work.partition)
    mine = await bus.append(stream, Step(records=(job.claim(),)))
    follower = Follower(work.generation, work.sampling.n, work.given, work.ends)
    said, _ = await bus.told(stream, work.request, work.log_from, mine)
    ours = follower.continues(job.epoch, (record for _, record in said))
    job.choices = follower.choices
    job.lost = min(
        work.tries, follower.fruitless - 1
    )  # engines that died, and without a token: one that had one did not die of it
    return ours
