"""A permutation of range(n) that is computed where it is asked, not stored.

An epoch of 10^8 samples as an array of int64 takes 800 MB in every rank; a keyed bijection takes a few integers, and
any part of any epoch can be computed without the rest. The bijection is a Feistel network over the mixed radix a × b
≥ n, a ≈ b ≈ √n, with cycle walking for the few values beyond n (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, methods 2 and 3).

What was weighed against it: `numpy.random.Generator.permutation` is six times faster over a whole epoch, but numpy
promises its streams only within a version (NEP 19), and it cannot start in the middle. Here every operation is
integer arithmetic modulo 2^64, so the order is the same on every machine and with every numpy. The algorithm is
pinned by golden tests: it may get a successor with a name of its own, it must never change.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]

NUM_ROUNDS = 24
"""Four rounds look random in theory (Luby and Rackoff, 1988), but only where the halves are large. Counting all
permutations of 3 to 6 elements over 24,000 keys, the chi-square is 70 standard deviations off at 8 rounds, 6 at 12,
and within noise from 16 on. 24 rounds cost 0.2 µs for a sample, so we did not look for fewer."""

MAX_SAMPLES = 2**62
"""Beyond this, a sum within a round could exceed 64 bits."""


class KeyedPermutation:
    """A bijection of range(n), chosen by the key; equal keys give equal permutations, for ever.

    >>> [int(i) for i in KeyedPermutation(5, key=(7, 0))(range(5))]
    [2, 1, 4, 0, 3]
    """

    def __init__(self, n: int, key: tuple[int | str, ...]) -> None:
        if not 0 <= n <= MAX_SAMPLES:
            raise ValueError(f"a permutation of {n} elements; must be between 0 and {MAX_SAMPLES}")
        self.n = n
        self._a = max(1, math.isqrt(max(n - 1, 0)) + 1)
        self._b = max(1, -(-n // self._a))
        # The key is hashed with its lengths and types visible ("1" is not 1), so that no two keys share rounds by accident.
        digest = hashlib.shake_256(repr(tuple(key)).encode()).digest(8 * NUM_ROUNDS)
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: ArrayLike | range) -> Indices:
        """The images of these positions, in their order. Raises IndexError for a position outside range(n)."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and (int(asked.min()) < 0 or int(asked.max()) >= self.n):
            raise IndexError(f"positions {asked.min()}..{asked.max()} of a permutation of {self.n} elements")
        images = self._encrypt(asked.astype(np.uint64))
        while True:
            beyond = images >= np.uint64(self.n)
            if not beyond.any():
                return images.astype(np.int64)
            images[beyond] = self._encrypt(images[beyond])

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = np.divmod(x, b)
        for round_idx, key in enumerate(self._round_keys):
            if round_idx % 2 == 0:
                left = (left + mix(right, key)) % a
            else:
                right = (right + mix(left, key)) % b
        return np.asarray(left * b + right, dtype=np.uint64)


def mix(x: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """63 well-mixed bits of x under a key: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). The top
    bit is dropped so that adding a half of the network cannot wrap, which would no longer be invertible modulo a."""
    z = x ^ key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(1), dtype=np.uint64)
