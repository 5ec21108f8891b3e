"""Which neighbouring blocks one fetch brings. Pure.

A fetch that somebody waits for brings what he waits for: a sample of 192 KiB comes in a third of the time of 4 MiB, and under a full
shuffle the first batches would otherwise wait for nearly the whole data set. A fetch ahead of its reader brings its neighbours too, the
more of them the farther ahead it is, since few large requests cost less than many small ones.
"""

from __future__ import annotations

from collections.abc import Callable

from cache.blocks import BLOCKS_PER_EXTENT, BLOCKS_PER_FETCH

VISITS_PER_BLOCK_AHEAD = 64
"""A fetch may be as long as what its reader reads in 1/64 of the time that is left. With some thirty under way at once, all of them
together are done before the block is needed, even where the origin is no faster than the reader."""


def reach(distance: float, num_own_blocks: int) -> int:
    """How many blocks a fetch may bring for a use `distance` visits away, of which each takes about `num_own_blocks`; a power of two.

    >>> [reach(distance, 2) for distance in (0, 32, 200, 1000)]
    [1, 1, 4, 16]
    """
    blocks = min(distance * num_own_blocks / VISITS_PER_BLOCK_AHEAD, BLOCKS_PER_FETCH)
    size = 1
    while size * 2 <= blocks:
        size *= 2
    return size


def run_around(block: int, size: int, own_end: int, may_come: Callable[[int], bool]) -> range:
    """The longest run of blocks that `may_come` and holds `block`, within the aligned group of `size` blocks around it; beyond that it
    goes on to `own_end`, where the sample that it is for ends. Never more than BLOCKS_PER_FETCH, never beyond the extent.

    Aligned groups, so that runs that were fetched at different times leave no crumbs between them.

    >>> run_around(6, 4, 7, lambda block: block != 5)
    range(6, 8)
    >>> run_around(7, 4, 10, lambda block: True)
    range(4, 10)
    """
    extent_start = block // BLOCKS_PER_EXTENT * BLOCKS_PER_EXTENT
    low = block // size * size
    high = min(max(low + size, own_end), extent_start + BLOCKS_PER_EXTENT)
    first = block
    while first > low and may_come(first - 1):
        first -= 1
    end = block + 1
    while end < min(high, first + BLOCKS_PER_FETCH) and may_come(end):
        end += 1
    return range(first, end)
