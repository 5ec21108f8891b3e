"""Why nothing moves, and whose doing it is: from where ranks stand in their code, and whether anything changes there. Pure.

In a synchronous job one rank that does not come stops all, and all have the same number of steps. What tells them apart is that the others
stand in a collective (or in backward, where gradients are reduced), and it does not. Whoever may be at work (`work.py`) is not accused.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.gang.observations import RankSample, RankStack
from launcher.gang.work import innermost_is, is_between_two, is_collective

Frames = tuple[str, ...]

MIN_LOOKS = 3
RECENT_S = 30.0
_WORKING_BYTES_PER_S = 1 << 20
"""A rank that reads or writes so much is doing something, wherever it stands: a checkpoint, a download."""
_BUSY_CPU = 0.5


class Kind(enum.Enum):
    """What is the matter."""

    FROZEN = "is stopped (state T: SIGSTOP)"
    SPINNING = "spins in one place"
    AWAY = "stays in one place that is no collective"
    DEVICE = "waits for a disk or a file system (state D)"
    DATA = "waits for its data loader"
    FETCHING = "waits for its data loader, which is at work"
    GONE = "has ended"
    ASTRAY = "waits in another place than the others"
    ALL_WAIT = "wait for each other"
    STILL = "stand still, each in one place"
    WORKING = "is at work elsewhere"
    QUIET = "are quiet together"
    IMPORTING = "is stuck in an import"


_CULPABLE = (Kind.SPINNING, Kind.AWAY, Kind.DEVICE, Kind.DATA, Kind.FETCHING)
"""In the order in which they are accused: whoever sleeps elsewhere may wait for the one that computes (a lock file)."""


@dataclass(frozen=True)
class Diagnosis:
    """`culprits`: whom it is about; empty if nobody stands out. `is_certain`: others wait for them, and nothing else moves."""

    kind: Kind
    culprits: tuple[int, ...] = ()
    is_certain: bool = True


@dataclass
class Looks:
    """What was seen of one rank since it became quiet."""

    frames: list[Frames] = field(default_factory=list)
    work: str = ""
    """What its last stack is known to take its time for."""
    recent: deque[RankSample] = field(default_factory=deque)
    places: set[Frames] = field(default_factory=set)
    """The functions of each look."""

    def see(self, sample: RankSample) -> None:
        self.recent.append(sample)
        while self.recent[-1].age_s - self.recent[0].age_s > RECENT_S:
            self.recent.popleft()

    def see_stack(self, stack: RankStack) -> None:
        if stack.frames:
            self.frames.append(stack.frames)
            self.places.add(_functions(stack.frames))
            self.work = stack.work

    def is_still(self) -> bool:
        """Looked at often enough, and always in the same functions. (Not the same lines: a loop of two lines is one place.)"""
        return len(self.frames) >= MIN_LOOKS and len(self.places) == 1

    def cpu(self) -> float:
        """CPU seconds per second of the process itself."""
        return self._rate(lambda sample: sample.cpu_s)

    def is_busy(self) -> bool:
        """It computes, or would if the machine let it."""
        num_running = sum(sample.state == "R" for sample in self.recent)
        return self.cpu() >= _BUSY_CPU or 2 * num_running > len(self.recent)

    def is_on_device(self) -> bool:
        """It is in uninterruptible sleep whenever it is seen."""
        return 2 * sum(sample.state == "D" for sample in self.recent) > len(self.recent)

    def is_active(self) -> bool:
        """It reads, writes, or has children that compute."""
        bytes_per_s = self._rate(lambda sample: sample.io_bytes) + self._rate(lambda sample: sample.child_io_bytes)
        return bytes_per_s >= _WORKING_BYTES_PER_S or self._rate(lambda sample: sample.child_cpu_s) >= _BUSY_CPU

    def _rate(self, of: Callable[[RankSample], float | None]) -> float:
        """Zero for a rank that was seen once."""
        first = next(((sample.age_s, value) for sample in self.recent if (value := of(sample)) is not None), None)
        last = next(
            ((sample.age_s, value) for sample in reversed(self.recent) if (value := of(sample)) is not None), None
        )
        if first is None or last is None or last[0] <= first[0]:
            return 0.0
        return (last[1] - first[1]) / (last[0] - first[0])


def diagnose(
    looks: Mapping[int, Looks],
    quiet: Collection[int],
    moving: Collection[int],
    gone: Collection[int],
    frozen: Collection[int],
    bystanders: Collection[int] = (),
) -> Diagnosis | None:
    """`quiet`, `moving` and `bystanders` (ranks that have not stepped at all while others have: a coordinator, an actor) are those that are
    alive. None: nobody is to blame (some wait, and whom they wait for is on the way)."""
    if frozen:
        is_all = len(frozen) == len(quiet) + len(moving) + len(bystanders)
        return Diagnosis(Kind.FROZEN, tuple(sorted(frozen)), is_certain=not is_all)
    waiting = waiting_ranks({rank: looks[rank].frames[-1] for rank in quiet if rank in looks and looks[rank].frames})
    others = [rank for rank in sorted(quiet) if rank not in waiting]
    if not others:
        return None if moving else _all_wait(looks, waiting, gone, bystanders)
    kinds = {rank: _kind_of(looks.get(rank, Looks())) for rank in others}
    if not waiting and not moving:
        return _nobody_waits(kinds, has_bystanders=bool(bystanders))
    for kind in (*_CULPABLE, Kind.WORKING):
        culprits = tuple(rank for rank in others if kinds[rank] is kind)
        if culprits:
            return Diagnosis(kind, culprits, is_certain=bool(waiting) and not moving)
    return Diagnosis(Kind.QUIET, is_certain=False)


def _all_wait(
    looks: Mapping[int, Looks], waiting: Collection[int], gone: Collection[int], bystanders: Collection[int]
) -> Diagnosis:
    are_at_work = any(
        looks[rank].work
        or looks[rank].is_active()
        or (innermost_is(looks[rank].frames[-1], "_engine_run_backward") and looks[rank].is_busy())
        for rank in waiting
    )
    if are_at_work or any(not is_collective(looks[rank].frames[-1]) for rank in bystanders if _has_frames(looks, rank)):
        return Diagnosis(Kind.QUIET, is_certain=False)
    if any(not _has_frames(looks, rank) for rank in bystanders):
        return Diagnosis(Kind.QUIET, is_certain=False)
    if gone:
        return Diagnosis(Kind.GONE, tuple(sorted(gone)))
    astray = _astray({rank: looks[rank].frames for rank in waiting})
    return Diagnosis(Kind.ASTRAY, astray) if astray else Diagnosis(Kind.ALL_WAIT)


def _astray(frames: Mapping[int, Sequence[Frames]]) -> tuple[int, ...]:
    """Whoever called another collective than most, or from another line. Not where ranks send to each other (pipelines): their places
    differ by design."""
    if any(len(looks) < MIN_LOOKS or len(set(looks[-MIN_LOOKS:])) > 1 for looks in frames.values()):
        return ()
    last = {rank: looks[-1] for rank, looks in frames.items()}
    if any(is_between_two(where) for where in last.values()):
        return ()
    ((most, number),) = Counter(last.values()).most_common(1)
    return tuple(sorted(rank for rank, where in last.items() if where != most)) if 2 * number > len(last) else ()


def _has_frames(looks: Mapping[int, Looks], rank: int) -> bool:
    return rank in looks and bool(looks[rank].frames)


def _nobody_waits(kinds: Mapping[int, Kind], *, has_bystanders: bool) -> Diagnosis:
    """All quiet, and no frame says that somebody waits for somebody: between two phases of a job it looks just so."""
    if has_bystanders or any(kind not in _CULPABLE for kind in kinds.values()):
        return Diagnosis(Kind.QUIET, is_certain=False)
    if len(set(kinds.values())) > 1 or (len(kinds) > 1 and Kind.SPINNING not in kinds.values()):
        return Diagnosis(Kind.STILL, is_certain=False)
    return Diagnosis(next(iter(kinds.values())), tuple(sorted(kinds)), is_certain=False)


def _kind_of(looks: Looks) -> Kind:
    if looks.recent and looks.recent[-1].waiting_s is not None:
        return Kind.FETCHING if looks.is_active() else Kind.DATA
    if not looks.frames:
        return Kind.QUIET
    if looks.work or looks.is_active() or not looks.is_still():
        return Kind.WORKING
    if looks.is_on_device():
        return Kind.DEVICE
    return Kind.SPINNING if looks.is_busy() else Kind.AWAY


def waiting_ranks(frames: Mapping[int, Frames]) -> frozenset[int]:
    """Those that stand where ranks wait for each other. Where no frame says so (`loss.item()` waits for the GPU, which waits for the
    others), the majority that stands in one place is taken to wait."""
    by_frame = frozenset(rank for rank, where in frames.items() if is_collective(where))
    if by_frame or len(frames) < 3:
        return by_frame
    groups = group(frames)
    return frozenset(groups[0][1]) if len(groups[0][1]) * 2 > len(frames) and len(groups) > 1 else by_frame


def group(frames: Mapping[int, Frames], depth: int = 3) -> list[tuple[Frames, list[int]]]:
    """Ranks that stand in the same place (the innermost frames), largest group first."""
    counted = Counter(where[:depth] for where in frames.values())
    ranks: dict[Frames, list[int]] = {}
    for rank in sorted(frames):
        ranks.setdefault(frames[rank][:depth], []).append(rank)
    return [(where, ranks[where]) for where, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]


def _functions(frames: Frames) -> Frames:
    """Names alone: py-spy and faulthandler shorten paths differently."""
    return tuple(frame.partition(" (")[0] for frame in frames)
