"""How fast this node's processor multiplies and copies: a node that is slow at that is slow at everything.

Short pieces of work, each several times, the best counts: what else runs on the node for a moment does not matter, a clock
that is held down does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

REPEATS = 5
MATMUL_SIZE = 384
"""A product of two such matrices takes some milliseconds on one core."""

COPY_BYTES = 32 << 20
"""More than the last-level cache of a core's share, so that memory is measured."""


def cpu_seconds() -> dict[str, float]:
    """Seconds for one matrix product and one memory copy; takes about a tenth of a second after numpy's import."""
    import numpy as np

    matrix = np.full((MATMUL_SIZE, MATMUL_SIZE), 0.5, dtype=np.float32)
    source = np.zeros(COPY_BYTES, dtype=np.uint8)
    target = np.ones_like(source)
    return {
        "matmul": _best(lambda: matrix @ matrix),
        "memory copy": _best(lambda: np.copyto(target, source)),
    }


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
