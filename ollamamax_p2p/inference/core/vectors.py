"""Vectors of length 1."""

from collections.abc import Sequence
from math import sqrt


def shortened(vector: Sequence[float], dimensions: int) -> tuple[float, ...]:
    """The first dimensions of a vector, of Euclidean length 1; 0: all of them. A vector of zeros
    stays one."""
    kept = vector[:dimensions] if dimensions else vector
    length = sqrt(sum(value * value for value in kept))
    return tuple(value / length for value in kept) if length else tuple(kept)
