"""Counter-based noise: a draw's number depends on (seed, choice, position) alone, whatever engine makes it. Pure."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _state(*parts: int) -> int:
    """A state hashed from several numbers in turn."""
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN + (part & _MASK)) & _MASK)
    return state


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1): SplitMix64's output for a state hashed from the three in turn.

    It comes in steps of 2^-52, so that its product with any double is below that double.
    """
    return (_mix((_state(seed, choice, position) + _GOLDEN) & _MASK) >> 12) * 2.0**-52


def stream(seed: int, choice: int) -> int:
    """64 bits that name a choice's stream of noise."""
    return _state(seed, choice)


def seed_at(stream: int, position: int) -> int:
    """64 bits, signed, that seed the noise of one draw of a stream."""
    mixed = _mix((stream + _GOLDEN * (position + 1)) & _MASK)
    return mixed - (1 << 64) if mixed >> 63 else mixed
