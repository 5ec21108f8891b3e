"""The local disk's own health, as a state machine: what it still may be used for, and why. No I/O; `now` is an argument.

OK              everything
SUSPICIOUS      something failed once or was slow: used for what readers wait for, nothing is fetched ahead
READ_ONLY       it takes no new files (full, quota, inodes, mounted read-only, errors on writing, too slow): what is here is served, the
                rest comes from the origin
OUT_OF_SERVICE  it cannot be read either: nothing is served from it before it was read back and compared
PROBATION       a probe (a file written, synced, read back) went well: used for what readers wait for, until that went well for a while

Idea: juicefs `pkg/chunk/disk_cache_state.go`. New here: what is written and what is read fail apart, and each state says its reason.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

FIRST_PAUSE_S = 5.0
"""After the disk refused something it is left in peace for this long before it is probed; twice as long after each probe that fails."""

MAX_PAUSE_S = 300.0

FORGIVE_S = 60.0
"""A failure is forgotten when nothing else went wrong for this long."""

MAX_FAILURES = 3
"""So many failures within FORGIVE_S are no accident."""

PROBATION_S = 30.0
PROBATION_SUCCESSES = 5

SLOW_S = 2.0
"""A write, read-back or probe of one block (4 MiB) that takes longer is slower than any origin worth caching (2 MB/s)."""

AT_ONCE: Final = frozenset({"full", "quota", "inodes", "read-only", "gone"})
"""Kinds of which one is proof: the disk said no, and will say it again."""

MAX_HISTORY = 32


class Health(enum.Enum):
    OK = "ok"
    SUSPICIOUS = "suspicious"
    READ_ONLY = "read-only"
    OUT_OF_SERVICE = "out of service"
    PROBATION = "probation"


_OK, _SUSPICIOUS, _READ_ONLY, _OUT, _PROBATION = Health

TRANSITIONS: Final[frozenset[tuple[Health, Health]]] = frozenset(
    {
        (_OK, _SUSPICIOUS),
        (_OK, _READ_ONLY),
        (_SUSPICIOUS, _OK),
        (_SUSPICIOUS, _READ_ONLY),
        (_SUSPICIOUS, _OUT),
        (_READ_ONLY, _OUT),
        (_READ_ONLY, _PROBATION),
        (_OUT, _PROBATION),
        (_PROBATION, _OK),
        (_PROBATION, _READ_ONLY),
        (_PROBATION, _OUT),
    }
)

_BADNESS: Final = {_OK: 0, _SUSPICIOUS: 1, _PROBATION: 1, _READ_ONLY: 2, _OUT: 3}


@dataclass(frozen=True)
class Change:
    """From one state to the next, and why; `at_s` is the daemon's clock."""

    before: Health
    after: Health
    reason: str
    at_s: float


class DiskHealth:
    """Told of every failure, success and probe. What it has become is asked for by the may_… properties."""

    def __init__(self) -> None:
        self.state = Health.OK
        self.reason = "nothing has failed"
        self.kind = ""
        """Of the failure that led to this state."""
        self.since_s = 0.0
        self.history: deque[Change] = deque(maxlen=MAX_HISTORY)
        self.failures: Counter[str] = Counter()
        """By kind, since the daemon started."""
        self._failed_reads: deque[float] = deque(maxlen=MAX_FAILURES)
        self._failed_writes: deque[float] = deque(maxlen=MAX_FAILURES)
        self._pause_s = FIRST_PAUSE_S
        self._probe_at_s: float | None = None
        self._num_successes = 0

    @property
    def may_write(self) -> bool:
        """New files may be made, blocks fetched into them."""
        return self.state in (Health.OK, Health.SUSPICIOUS, Health.PROBATION)

    @property
    def may_fill(self) -> bool:
        """Blocks may be written into files that are there, whose space is reserved."""
        return self.may_write or (self.state is Health.READ_ONLY and self.kind in ("full", "quota", "inodes"))

    @property
    def may_prefetch(self) -> bool:
        """What nobody waits for may be written or read back, too."""
        return self.state is Health.OK

    @property
    def may_read(self) -> bool:
        return self.state is not Health.OUT_OF_SERVICE

    def failed(self, kind: str, message: str, now: float, *, on_read: bool = False) -> bool:
        """Something went wrong; True when the state changed. `kind`: DiskError's. `on_read`: it was a read that failed."""
        self.failures[kind] += 1
        self._num_successes = 0
        recent = self._failed_reads if on_read else self._failed_writes
        recent.append(now)
        is_proven = now - recent[0] <= FORGIVE_S and len(recent) == MAX_FAILURES
        target = Health.SUSPICIOUS
        if kind in AT_ONCE:
            target = Health.READ_ONLY
        elif is_proven or self.state is Health.PROBATION:
            target = Health.OUT_OF_SERVICE if on_read else Health.READ_ONLY
        if _BADNESS[target] <= _BADNESS[self.state]:
            return False
        self.kind = kind
        return self._become(target, message, now)

    def worked(self, now: float) -> bool:
        """A file was made, a block written or read back, in good time; True when the state changed."""
        if self.state is not Health.PROBATION:
            return False
        self._num_successes += 1
        if self._num_successes < PROBATION_SUCCESSES:
            return False
        return self._become(Health.OK, f"{PROBATION_SUCCESSES} uses went well after the probe", now)

    def probed(self, error: str | None, now: float) -> bool:
        """The probe that `takes_probe` started has ended; `error`: what went wrong. True when the state changed."""
        if self.may_write:
            return False
        if error is None:
            return self._become(Health.PROBATION, "a file could be written and read back again", now)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._probe_at_s = now + self._pause_s
        self.reason = error
        return False

    def takes_probe(self, now: float) -> bool:
        """True once when it is time to try the disk again: the caller starts a probe."""
        if self._probe_at_s is None or now < self._probe_at_s:
            return False
        self._probe_at_s = None
        return True

    def time_passed(self, now: float) -> bool:
        """True when the state changed."""
        if self.state is Health.SUSPICIOUS and now >= self._forgiven_s():
            return self._become(Health.OK, f"nothing else failed for {FORGIVE_S:g} s", now)
        if self.state is Health.PROBATION and now >= self.since_s + PROBATION_S:
            return self._become(Health.OK, f"nothing failed for {PROBATION_S:g} s after the probe", now)
        return False

    def next_deadline_s(self) -> float | None:
        if self.state is Health.SUSPICIOUS:
            return self._forgiven_s()
        if self.state is Health.PROBATION:
            return self.since_s + PROBATION_S
        return self._probe_at_s

    def _forgiven_s(self) -> float:
        return max([*self._failed_reads, *self._failed_writes]) + FORGIVE_S

    def _become(self, after: Health, reason: str, now: float) -> bool:
        assert (self.state, after) in TRANSITIONS, (self.state, after, list(self.history))
        was_in_trouble = self.state is Health.PROBATION
        self.history.append(Change(self.state, after, reason, now))
        self.state, self.reason, self.since_s = after, reason, now
        self._num_successes = 0
        if after in (Health.READ_ONLY, Health.OUT_OF_SERVICE):
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S) if was_in_trouble else self._pause_s
            self._probe_at_s = now + self._pause_s
        elif after is Health.OK:
            self._failed_reads.clear()
            self._failed_writes.clear()
            self._pause_s = FIRST_PAUSE_S
            self._probe_at_s = None
        return True
