"""Random numbers that do not depend on the order of the work.

Each piece of a simulation (a cell of the sky, an exposure, a CCD of an exposure) has a stream of
its own that follows from the seed and the names of the piece. The same survey comes out whatever
the number of processes, and an exposure stays the same when others are added.
"""

import zlib

import numpy as np


def stream(seed: int, *labels: str | int) -> np.random.Generator:
    """Return the generator of one piece of the simulation, by seed and the names of the piece."""
    words = [zlib.crc32(f"{type(label).__name__} {label}".encode()) for label in labels]
    return np.random.default_rng([seed, len(words), *words])
