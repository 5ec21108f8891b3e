"""The life of a block, as a table of what may happen.

ABSENT      not on disk (or not known to be)
FETCHING    a worker is writing it; nobody may read it
UNVERIFIED  on disk since before this daemon started, or since before the disk failed; nobody may read it until its checksum was seen
VERIFYING   a worker is reading it back; nobody may read it
RESIDENT    readable without asking
CHECKING    readable, and being read back once more
"""

from __future__ import annotations

import enum
from typing import Final


class BlockState(enum.Enum):
    ABSENT = "absent"
    FETCHING = "fetching"
    UNVERIFIED = "unverified"
    VERIFYING = "verifying"
    RESIDENT = "resident"
    CHECKING = "checking"

    @property
    def is_readable(self) -> bool:
        return self in (BlockState.RESIDENT, BlockState.CHECKING)

    @property
    def is_busy(self) -> bool:
        """A worker has it in hand: its extent must stay."""
        return self in (BlockState.FETCHING, BlockState.VERIFYING, BlockState.CHECKING)


class BlockMove(enum.Enum):
    FETCH = "fetch"
    LANDED = "landed"
    FAILED = "failed"
    FOUND = "found on disk"
    CHECK = "check"
    SOUND = "sound"
    ROTTEN = "rotten"
    EVICT = "evict"
    DOUBT = "doubt"


_S, _M = BlockState, BlockMove

TRANSITIONS: Final[dict[tuple[BlockState, BlockMove], BlockState]] = {
    (_S.ABSENT, _M.FETCH): _S.FETCHING,
    (_S.ABSENT, _M.FOUND): _S.UNVERIFIED,
    (_S.ABSENT, _M.EVICT): _S.ABSENT,
    (_S.FETCHING, _M.LANDED): _S.RESIDENT,
    (_S.FETCHING, _M.FAILED): _S.ABSENT,
    (_S.UNVERIFIED, _M.CHECK): _S.VERIFYING,
    (_S.UNVERIFIED, _M.EVICT): _S.ABSENT,
    (_S.VERIFYING, _M.SOUND): _S.RESIDENT,
    (_S.VERIFYING, _M.ROTTEN): _S.ABSENT,
    (_S.RESIDENT, _M.CHECK): _S.CHECKING,
    (_S.RESIDENT, _M.EVICT): _S.ABSENT,
    (_S.RESIDENT, _M.DOUBT): _S.UNVERIFIED,
    (_S.CHECKING, _M.SOUND): _S.RESIDENT,
    (_S.CHECKING, _M.ROTTEN): _S.ABSENT,
}


class IllegalBlockMove(AssertionError):
    """A bug in the machine, not in the world: the message names block, state and move."""


def moved(state: BlockState, move: BlockMove, what: object) -> BlockState:
    """The state after a move; raises IllegalBlockMove when the table has none."""
    try:
        return TRANSITIONS[state, move]
    except KeyError:
        raise IllegalBlockMove(f"{what} is {state.value}: it cannot {move.value}") from None
