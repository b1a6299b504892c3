"""What becomes of a step's shares: rows and draws for the device, and the memory of whose they are until it answers. Pure."""

from dataclasses import dataclass, field

from services.engine.parts import positions
from services.engine.plan import PENDING, Draw, Row
from services.engine.sequence import Sequence

PENDING_ROW = (PENDING,)


@dataclass(slots=True)
class Share:
    """What one sequence gets of a step being planned."""

    sequence: Sequence
    chunk: int
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flight:
    """Whose rows, and whose draws, a plan has that is not committed yet."""

    planned: tuple[Sequence, ...]
    drawing: tuple[Sequence, ...]


def take_row(share: Share, block_size: int) -> Row:
    """The row of a share; what it computes counts as computed from here on."""
    sequence, start, end = share.sequence, share.sequence.computed, share.sequence.computed + share.chunk
    tokens = tuple(sequence.tokens[start:end]) or PENDING_ROW
    held, told = -(-end // block_size), sequence.told
    if held != told:  # else the last row's still holds
        sequence.table = tuple(sequence.blocks[:held])
    sequence.computed, sequence.told = end, held
    return Row(tokens, start, sequence.table, sequence.slot, told, positions(sequence.runs, start, end))


def take_draw(sequence: Sequence, row: int) -> Draw:
    """One more token for a sequence; it counts from here on."""
    begins, sampling = not sequence.begun, sequence.sampling
    position = len(sequence.tokens) + sequence.pending - sequence.prompt_length
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    if begins and sequence.penalized:
        prompt = tuple(sequence.tokens[: sequence.prompt_length])
        output = tuple(sequence.tokens[sequence.prompt_length :])
    sequence.pending += 1
    sequence.begun = True
    allow_stop = position + 1 >= sampling.min_tokens
    return Draw(row, sequence.choice, position, sampling, prompt, output, allow_stop, sequence.slot, begins)
