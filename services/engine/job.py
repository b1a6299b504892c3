"""A request as this engine holds it: its work entry, its epoch, its place in the token log, and what it cost. Pure."""

from dataclasses import dataclass, field
from functools import cached_property

from services.engine.parts import Packed, pack
from services.engine.plan import Sampled
from services.engine.sequence import Sequence
from shared.blocks import HASH_BYTES
from shared.fields import Epoch, pack_ids, unpack_ids
from shared.messages import Claim, End, ErrorCode, Fail, FinishReason, TokensFields, Work
from shared.tokenlog import Choice, entry_epoch


@dataclass(eq=False)
class Job:
    """Times are seconds of a monotonic clock. `choices` are the outputs as records have told them; `fresh`, per choice, is
    what no record has told yet.
    """

    work: Work
    entry: str
    taken_at: float
    choices: list[Choice] = field(default_factory=list)
    fresh: dict[int, list[Sampled]] = field(default_factory=dict)
    started_at: float = 0.0
    first_token_at: float = 0.0
    counted: bool = False  # how much of its prompt was found computed
    cached_tokens: int = 0
    lost: int = 0  # engines that died with it, one after the other, and had no token from it

    @cached_property
    def epoch(self) -> Epoch:
        return entry_epoch(self.work.generation, self.entry)

    @property
    def prompt_tokens(self) -> int:
        return len(self.work.prompt) // 4

    @property
    def done(self) -> bool:
        return all(choice.end for choice in self.choices)

    def sequences(self, block_size: int) -> list[Sequence]:
        """What the scheduler gets: one sequence to be forked, or, where outputs differ already, one per open choice."""
        open = [at for at, choice in enumerate(self.choices) if choice.end is None]
        if len(open) == self.work.sampling.n and not any(len(choice.ids) for choice in self.choices):
            return [self._sequence(0, len(open) - 1, block_size)]
        return [self._sequence(at, 0, block_size) for at in open]

    def complete(self) -> dict[int, FinishReason]:
        """Choices that were given or read complete, but for the word that they are: an engine was lost in between."""
        found = {at: self._finish(choice) for at, choice in enumerate(self.choices) if choice.end is None}
        return {at: finish for at, finish in found.items() if finish is not None}

    def _finish(self, choice: Choice) -> FinishReason | None:
        sampling, count = self.work.sampling, len(choice.ids)
        if count and choice.ids[-1] in sampling.stop_ids and count >= sampling.min_tokens:
            return "stop"
        return "length" if count >= self.work.max_tokens else None

    def _sequence(self, choice: int, unforked: int, block_size: int) -> Sequence:
        prompt = self._packed(block_size)
        return Sequence(
            request=self.work.request,
            choice=choice,
            tokens=[*prompt.tokens, *self.choices[choice].ids],
            prompt_length=len(prompt.tokens),
            limit=len(prompt.tokens) + self.work.max_tokens,
            sampling=self.work.sampling,
            hashes=prompt.hashes,
            root=prompt.root,
            parts=prompt.parts,
            runs=prompt.runs,
            unforked=unforked,
        )

    def _packed(self, block_size: int) -> Packed:
        work, prompt = self.work, list(unpack_ids(self.work.prompt))
        if work.placement is not None:
            return pack(prompt, work.placement, work.root, block_size)
        hashes = [work.blocks[at : at + HASH_BYTES] for at in range(0, len(work.blocks), HASH_BYTES)]
        return Packed(prompt, (), (), work.root, hashes)

    # -- records for the token log ---------------------------------------------------------------------------------

    def claim(self) -> Claim:
        return Claim(request=self.work.request, epoch=self.epoch, prompt_tokens=self.prompt_tokens)

    def fail(self, code: ErrorCode, text: str) -> Fail:
        return Fail(request=self.work.request, epoch=self.epoch, code=code, text=text)

    def tell(self, choice: int) -> tuple[TokensFields, ...]:
        """The record of all tokens of a choice that none tells yet, if there are any; from here on they count as written."""
        fresh = self.fresh.pop(choice, ())
        if not fresh:
            return ()
        output = self.choices[choice]
        first, digest, packed = len(output.ids), output.digest_at(len(output.ids)), pack_ids(sampled.token for sampled in fresh)
        logprobs = None
        if self.work.sampling.logprobs is not None:
            logprobs = tuple(sampled.logprob for sampled in fresh if sampled.logprob is not None)
        output.extend(packed)
        return (
            {
                "request": self.work.request,
                "epoch": self.epoch,
                "choice": choice,
                "first": first,
                "digest": digest,
                "ids": packed,
                "logprobs": logprobs,
                "kind": "tokens",
            },
        )

    def end(self, choice: int, reason: FinishReason, now: float) -> End:
        output = self.choices[choice]
        output.end = End(
            request=self.work.request,
            epoch=self.epoch,
            choice=choice,
            count=len(output.ids),
            reason=reason,
            cached_tokens=self.cached_tokens,
            tokenize_ms=self.work.tokenize_ms,
            queue_ms=1000 * ((self.started_at or now) - self.taken_at),
            prefill_ms=1000 * ((self.first_token_at or now) - (self.started_at or now)),
            decode_ms=1000 * (now - (self.first_token_at or now)),
        )
        return output.end

    def handed_on(self, crashed: bool) -> Work:
        """The same work for whoever comes next: it will read the output so far from the log."""
        return self.work.model_copy(update={"resume": True, "tries": self.work.tries + crashed})
