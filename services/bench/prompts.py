"""What is asked: prompts from a file, or synthetic ones of an exact length. Pure.

A question is a function of its index alone, so that any split over client processes asks the same questions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

# Common words that are one token (with their space) in the vocabularies we know, so that N words are about N tokens.
_TEXT = """
the of and to in is was for on that with as by at from his her it an be are this which or had not but have one
two first new also after who their its time other years more when there all some most made world people work
over only part then such three under well very where while through between during before since against city
state many may would could about into been than them they out up can no if so what how will long day man life
house water place small large great old young high low right left road fire light dark red blue green white
black open close early late north south east west air sea land tree river stone gold iron book line
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Question:
    """One request. A list is token ids, for the completions endpoint only."""

    prompt: str | list[int]
    output_tokens: int


Source = Callable[[int], Question]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where synthetic prompts are drawn from: token ids `low` to `high` (exclusive), or words."""

    low: int = 1000
    high: int = 30000
    words: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"a vocabulary needs 0 <= low < high, not {self.low}:{self.high}")

    @property
    def size(self) -> int:
        return len(WORDS) if self.words else self.high - self.low

    def draw(self, key: str, count: int) -> list[int]:
        """`count` units (0 to size - 1), the same ones for the same key everywhere."""
        return random.Random(key).choices(range(self.size), k=count)

    def render(self, units: Sequence[int]) -> str | list[int]:
        if self.words:
            return " ".join([WORDS[unit] for unit in units])
        return [self.low + unit for unit in units]


def synthetic(vocabulary: Vocabulary, input_tokens: int, output_tokens: int, seed: int, common: int = 0) -> Source:
    """Another prompt for every index; the first `common` tokens are the same for all, the others are for nobody else."""
    begin = vocabulary.draw(f"{seed}/common", common)

    def question(index: int) -> Question:
        units = begin + vocabulary.draw(f"{seed}/prompt/{index}", input_tokens - common)
        return Question(vocabulary.render(units), output_tokens)

    return question


def listed(lines: Sequence[str], output_tokens: int) -> Source:
    """The file's prompts in turn, from the start again when they are used up."""
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("the prompts file has no prompt in it")
    return lambda index: Question(prompts[index % len(prompts)], output_tokens)


def shared(source: Source, users: int) -> Source:
    """The same question for all `users` of a round, another one in the next round."""
    of_round = lru_cache(maxsize=1)(source)  # made once, or the last user would ask later than the first
    return lambda index: of_round(index // users)
