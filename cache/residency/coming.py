"""Which share of what a reader will read is here: of what it has announced, and of the epoch beyond. Pure; a look at samples, for there may
be a hundred thousand extents and it is taken every few seconds."""

from __future__ import annotations

from collections.abc import Sequence

from cache.blocks import ExtentId
from cache.order.lookahead import Lookahead, Visit
from cache.order.prospect import Group, Prospect
from cache.residency.blockstate import BlockState
from cache.residency.residents import Residents

ON_DISK = (BlockState.UNVERIFIED, BlockState.VERIFYING, BlockState.RESIDENT, BlockState.CHECKING)

NUM_VISITS = 512
"""Announced visits that are looked at, of all readers together (but at least a few of each)."""
MIN_VISITS = 16
SOON = 1 / 8
"""Of an epoch."""
NUM_ROWS = 512
"""Extents of a data set that are looked at."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, lie evenly in [0, 1) and fall into no rhythm with extents of one object."""


def share_here(
    lookahead: Lookahead, prospect: Prospect, residents: Residents, stream_ids: Sequence[str]
) -> dict[str, float | None]:
    """For each reader, of the bytes of what is left of its epoch; None where it has announced nothing more.

    Of what is announced of it and, where the order is known as a function, of the whole data set, whichever is less: right before the
    reader there may be nothing though most of it is here (a first epoch), or everything though most of the rest is not (what was
    fetched ahead).
    """
    num = max(MIN_VISITS, NUM_VISITS // max(1, len(stream_ids)))
    of_table: dict[int, float | None] = {}
    shares: dict[str, float | None] = {}
    for stream_id in stream_ids:
        group = prospect.group_of(stream_id)
        within = None if group is None else max(1, round(_steps_left(group) * group.visits_per_step))
        share = _of_visits(residents, lookahead.sample(stream_id, num, within))
        if group is not None and share is not None:
            if id(group.table) not in of_table:
                of_table[id(group.table)] = _of_table(residents, group)
            beyond = of_table[id(group.table)]
            share = share if beyond is None else min(share, beyond)
        shares[stream_id] = share
    return shares


def _steps_left(group: Group) -> float:
    """Of the epoch, and when it ends soon, of the next one with it. (What is behind the readers is here: to count it as coming, which it
    is in the next epoch, would hide that nothing of what comes before is.)"""
    left = group.num_steps - group.at_step % group.num_steps
    return left if left > SOON * group.num_steps else left + group.num_steps


def _of_visits(residents: Residents, visits: Sequence[Visit]) -> float | None:
    num = num_here = 0
    for visit in visits:
        for block in range(visit.first, visit.end):
            extent = residents.of_block(visit.content_id, block)
            num += 1
            num_here += extent is not None and (extent.needs_table or extent.state(block) in ON_DISK)
    return num_here / num if num else None


def _of_table(residents: Residents, group: Group) -> float | None:
    table, here, total = group.table, 0.0, 0.0
    for row in _rows(len(table.extents)):
        size = float(table.row_bytes[row])
        total += size
        here += size * _of_extent(residents, table.extents[row])
    return here / total if total else None


def _rows(num: int) -> Sequence[int]:
    return range(num) if num <= NUM_ROWS else [int(idx * GOLDEN % 1.0 * num) for idx in range(NUM_ROWS)]


def _of_extent(residents: Residents, key: ExtentId) -> float:
    extent = residents.extents.get(key)
    if extent is None:
        return 0.0
    return 1.0 if extent.needs_table else extent.count(ON_DISK) / len(extent.codes)
