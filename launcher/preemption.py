"""For training scripts: save and go when the node is told to go, all ranks after the same step. Three lines:

    from launcher import preemption
    ...
    for step in range(start, num_steps):
        train(step)
        if preemption.requested(step):   # the same answer on every rank, for the same step
            save(step)
            preemption.exit_saved()

The launcher sends SIGTERM (or the signal that it was sent) to every rank when it is told to stop, when a node is drained or preempted, and
when it starts again with more nodes. A rank that has imported this module does not die of it: it is asked by `requested` to save.

How ranks agree without a collective of their own. Each call of `requested` costs nothing until the signal has come. Then, through the
attempt's store: a rank says that it has *noticed*; when all have, it *announces* its step; when all have, the decision is made. Ranks that
are in step meet within one call and stop right there: the decision is the step that all announced, taken by one compare-and-set. A rank
that has waited LINGER_S for the others takes the other decision by the same compare-and-set, "later", and goes on; all then stop after the
step that follows the last one announced. Nobody can have passed that: a rank that has announced step s waits at s + 1 until all have, and,
as every step has a collective, nobody ends step s + 2 without it. Nobody waits for ever: a rank in a call after the last one
noticed knows of the signal, so it announces there.

Without the launcher (or in a thread other than the main one) this module does nothing: `requested` is False.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from launcher.errors import EXIT_RESUMABLE

MARKER = "saves-itself"
"""File in a rank's directory that tells the agent not to expect that SIGTERM ends this rank."""
LINGER_S = 2.0
"""How long a rank waits in one call for the others. Ranks that work in step arrive together, so it is hardly ever spent."""
_POLL_S = 0.005
_LATER = "later"
_KEY = "railhead/preemption/"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Agreement:
    """One rank's part in agreeing on a step. `store` is a TCPStore (or anything with its add, get, set and compare_set)."""

    def __init__(self, store: Any, rank: int, world_size: int, linger_s: float = LINGER_S) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._linger_s = linger_s
        self._announced: int | None = None
        self._has_noticed = False
        self._stop_after: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether all ranks stop after this step. Called after each step, once this rank has been told to stop."""
        if self._stop_after is None:
            self._stop_after = self._agree(step)
        return self._stop_after is not None and step >= self._stop_after

    def _agree(self, step: int) -> int | None:
        if not self._has_noticed:
            self._has_noticed = True
            self._store.add(_KEY + "noticed", 1)
        may_hold = self._announced is not None  # this is the call after the one in which we announced
        if not may_hold:
            if not self._have_all("noticed", self._linger_s):
                return None
            self._announced = step
            self._store.set(f"{_KEY}step/{self._rank}", str(step))
            self._store.add(_KEY + "announced", 1)
        if self._have_all("announced", None if may_hold else self._linger_s):
            steps = [int(self._store.get(f"{_KEY}step/{rank}")) for rank in range(self._world_size)]
            together = str(steps[0]) if len(set(steps)) == 1 else _LATER
            return int(told) if (told := self._decide(together)) != _LATER else max(steps) + 1
        return int(told) if (told := self._decide(_LATER)) != _LATER else None

    def _decide(self, proposal: str) -> str:
        """The first proposal of all ranks holds."""
        told: bytes = self._store.compare_set(_KEY + "decision", "", proposal)
        return told.decode() or proposal

    def _have_all(self, what: str, timeout_s: float | None) -> bool:
        """Whether every rank has said it, within `timeout_s` (None: as long as it takes; the launcher's grace ends it)."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._store.add(_KEY + what, 0) < self._world_size:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True


class _Listener:
    """This process's ear for the signal."""

    def __init__(self) -> None:
        self.is_told = False
        self._num_calls = 0
        self._agreement: Agreement | None = None

    def listen(self) -> None:
        """Takes the signals that nobody else has taken, and says so to the agent."""
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if "RAILHEAD_RUN_DIR" not in os.environ or not error_file:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        taken = [signum for signum in _STOP_SIGNALS if signal.getsignal(signum) is signal.SIG_DFL]
        for signum in taken:
            signal.signal(signum, self._hear)
        if signal.SIGTERM in taken:
            try:
                with open(os.path.join(os.path.dirname(error_file), MARKER), "w") as file:
                    file.write(f"{os.getpid()}\n")
            except OSError:
                pass  # a full disk; after a failure this rank then has the whole grace
        # A data loader's worker shall die of SIGTERM as ever.
        os.register_at_fork(after_in_child=lambda: self._forget(taken))

    def requested(self, step: int | None) -> bool:
        self._num_calls += 1
        if not self.is_told:
            return False
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return True
        if self._agreement is None:
            self._agreement = Agreement(_connect(), int(os.environ["RANK"]), world_size)
        return self._agreement.is_due(self._num_calls if step is None else step)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self.is_told = True

    def _forget(self, signals: list[signal.Signals]) -> None:
        for signum in signals:
            if signal.getsignal(signum) == self._hear:
                signal.signal(signum, signal.SIG_DFL)


def _connect() -> Any:
    """A connection of our own to the attempt's store: on the process group's, a blocked call of another thread would hold us up."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stub lacks it

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


def requested(step: int | None = None) -> bool:
    """Whether this is the step after which all ranks save and end. Call it on every rank after each step, from the main thread.

    step: a number that is the same on all ranks for the same step and grows by one; None: calls are counted. Every step has a collective
    among all ranks (as data-parallel training has); while accumulating gradients without one, count the optimizer's steps.
    """
    return _listener.requested(step)


def exit_saved() -> NoReturn:
    """Ends this rank and tells the launcher that its state is saved: the job goes on from there, here or when it is run again."""
    sys.exit(EXIT_RESUMABLE)


_listener = _Listener()
_listener.listen()
