"""Who waits for which blocks: requests of readers, from their arrival to their one answer. No I/O, no decisions."""

from __future__ import annotations

from dataclasses import dataclass

from cache.blocks import ExtentId, extent_of
from cache.errors import CacheError
from cache.residency import messages as m

BlockKey = tuple[str, int]
"""Content id and block index within the object."""


@dataclass
class Want:
    event: m.BlocksWanted
    missing: set[int]
    cause: str

    @property
    def extent(self) -> ExtentId:
        return ExtentId(self.event.content_id, extent_of(self.event.first))


@dataclass
class Check:
    event: m.CheckAsked
    missing: set[int]
    num_rotten: int = 0


class Waiting:
    """Open requests. `add` and what removes them keep one invariant: a block has waiters if and only if an open want misses it."""

    def __init__(self) -> None:
        self.wants: dict[int, Want] = {}
        self.checks: dict[int, Check] = {}
        self.answered: dict[int, Want] = {}
        """Wants whose answer is on its way; their extent stays until they are settled."""
        self._by_block: dict[BlockKey, list[int]] = {}

    def add(self, want: Want) -> None:
        self.wants[want.event.request_id] = want
        for block in want.missing:
            self._by_block.setdefault((want.event.content_id, block), []).append(want.event.request_id)

    def is_wanted(self, key: BlockKey) -> bool:
        return key in self._by_block

    def is_object_wanted(self, content_id: str) -> bool:
        return any(want.event.content_id == content_id for want in self.wants.values())

    def count_for(self, extent: ExtentId) -> int:
        return sum(want.extent == extent for want in self.wants.values())

    def arrived(self, key: BlockKey, generation: int) -> list[tuple[Want, m.Answer]]:
        """A block became readable: the wants that this completes, each with its answer."""
        done = []
        for request_id in self._by_block.pop(key, []):
            want = self.wants[request_id]
            want.missing.discard(key[1])
            if not want.missing:
                del self.wants[request_id]
                done.append((want, m.Answer(request_id, generation, want.cause)))
        return done

    def lost(self, key: BlockKey) -> None:
        """A readable block turned out to be rotten: the open wants that counted on it wait for it again."""
        content_id, block = key
        for request_id, want in self.wants.items():
            event = want.event
            if event.content_id == content_id and event.first <= block < event.end and block not in want.missing:
                want.missing.add(block)
                self._by_block.setdefault(key, []).append(request_id)

    def failed(self, key: BlockKey, error: CacheError) -> list[tuple[Want, m.Answer]]:
        """A block will not come: every want that misses it ends with the error."""
        request_ids = list(self._by_block.get(key, []))
        return [(self.drop(request_id), m.Answer(request_id, cause="error", error=error)) for request_id in request_ids]

    def drop(self, request_id: int) -> Want:
        """Ends a want without an answer; it is returned with the blocks that it still missed."""
        want = self.wants.pop(request_id)
        for block in want.missing:
            key = (want.event.content_id, block)
            waiting = self._by_block[key]
            waiting.remove(request_id)
            if not waiting:
                del self._by_block[key]
        return want

    def answered_of(self, client_id: str) -> list[int]:
        return [request_id for request_id, want in self.answered.items() if want.event.client_id == client_id]

    def of_client(self, client_id: str) -> list[int]:
        return [request_id for request_id, want in self.wants.items() if want.event.client_id == client_id]

    def drop_checks_of(self, client_id: str) -> list[Check]:
        gone = [request_id for request_id, check in self.checks.items() if check.event.client_id == client_id]
        return [self.checks.pop(request_id) for request_id in gone]

    def is_check_wanted(self, extent: ExtentId, block: int) -> bool:
        return any(check.event.extent == extent and block in check.missing for check in self.checks.values())

    def checked(self, extent: ExtentId, generation: int, block: int, is_sound: bool) -> list[tuple[Check, m.Answer]]:
        """A block was read back: the checks that this completes, each with its answer."""
        done = []
        for request_id, check in list(self.checks.items()):
            if check.event.extent == extent and block in check.missing:
                check.missing.discard(block)
                check.num_rotten += not is_sound
                if not check.missing:
                    del self.checks[request_id]
                    cause = "sound" if check.num_rotten == 0 else f"{check.num_rotten} rotten"
                    done.append((check, m.Answer(request_id, generation, cause)))
        return done
