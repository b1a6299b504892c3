"""What becomes of a step's shares: rows and draws for the device, and the memory of whose they are until it answers. Pure."""

from dataclasses import dataclass

from services.engine.plan import PENDING, Draw, Row
from services.engine.sequence import Sequence


@dataclass(slots=True)
class Share:
    """What one sequence gets of a step being planned."""

    sequence: Sequence
    chunk: int
    copy: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Flight:
    """Whose rows, and whose draws, a plan has that is not committed yet."""

    planned: tuple[Sequence, ...]
    drawing: tuple[Sequence, ...]


def take_row(share: Share, block_size: int) -> Row:
    """The row of a share; what it computes counts as computed from here on."""
    sequence, start, end = share.sequence, share.sequence.computed, share.sequence.computed + share.chunk
    tokens = tuple(sequence.tokens[start:end]) or (PENDING,)
    blocks = tuple(sequence.blocks[: -(-end // block_size)])
    row = Row(tokens, start, blocks, sequence.slot, min(sequence.told, len(blocks)))
    sequence.computed, sequence.told = end, len(blocks)
    return row


def take_draw(sequence: Sequence, row: int) -> Draw:
    """One more token for a sequence; it counts from here on."""
    history = sequence.penalized and not sequence.begun
    draw = Draw(
        row=row,
        choice=sequence.choice,
        position=sequence.output_length,
        sampling=sequence.sampling,
        prompt=tuple(sequence.tokens[: sequence.prompt_length]) if history else (),
        output=tuple(sequence.tokens[sequence.prompt_length :]) if history else (),
        allow_stop=sequence.output_length + 1 >= sequence.sampling.min_tokens,
        slot=sequence.slot,
        begins=not sequence.begun,
    )
    sequence.pending += 1
    sequence.begun = True
    return draw
