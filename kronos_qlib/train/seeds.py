"""Seeds that follow from what they are for: the random state of a step is known from its number."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed below 2^56 that follows from all the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
