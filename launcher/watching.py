"""What a training script may say to the launcher that watches it. Nothing has to be said; without the launcher all of it does nothing.

    from launcher import expect_steps, pause_watch

    expect_steps(10_000, done=resumed_at)      # the live line shows when it ends, and the report what a restart cost
    with pause_watch():                        # this takes as long as it takes: no rank is taken for hung meanwhile
        evaluate(model)

    count_step(samples=len(batch))             # where no torch optimizer steps: JAX, NumPy, a captured CUDA graph

Light to import (no torch, no ray), safe in any thread and process; only a rank's main process is heard.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from launcher.node import progress
from launcher.node.progress import (
    H_TOLD_AT_S,
    H_TOLD_SAMPLES,
    H_TOLD_STEP_S,
    H_TOLD_STEPS,
    W_DONE_STEPS,
    W_NUM_PAUSES,
    W_PAUSED_SINCE_NS,
    W_PID,
    W_TOTAL_STEPS,
)

_lock = threading.Lock()
_depth = 0
_page: progress.Page | None = None
_page_pid = 0


@contextlib.contextmanager
def pause_watch() -> Iterator[None]:
    """Within it, the job is not judged: neither this rank nor those that wait for it. May be nested, and used in several threads."""
    _change_depth(+1)
    try:
        yield
    finally:
        _change_depth(-1)


def expect_steps(total: int, *, done: int = 0) -> None:
    """How many optimizer steps the whole job takes, and how many of them are behind it as this attempt begins (what was resumed)."""
    if not 0 <= done <= total:
        raise ValueError(f"expect_steps({total}, done={done}): not 0 <= done <= total")
    page = _own_page()
    if page is not None:
        page.words[W_DONE_STEPS] = done
        page.words[W_TOTAL_STEPS] = total


def count_step(samples: int = 0) -> None:
    """A step of training is over. For loops whose steps are not seen by themselves; from the first call on, only what is told here counts.

    `samples`: how many went into it, on this rank. Costs a microsecond. To be called from one thread.
    """
    page = _own_page()
    if page is None:
        return
    hot, now_s = page.hot, time.monotonic()
    if hot[H_TOLD_AT_S]:
        hot[H_TOLD_STEP_S] = now_s - hot[H_TOLD_AT_S]
    hot[H_TOLD_AT_S] = now_s
    hot[H_TOLD_SAMPLES] += samples
    hot[H_TOLD_STEPS] += 1.0  # last, as in instrument.py


def _change_depth(change: int) -> None:
    global _depth
    page = _own_page()
    with _lock:
        _depth += change
        if page is None:
            return
        if change > 0 and _depth == 1:
            page.words[W_NUM_PAUSES] += 1
            page.words[W_PAUSED_SINCE_NS] = time.monotonic_ns()
        elif _depth == 0:
            page.words[W_PAUSED_SINCE_NS] = 0


def _own_page() -> progress.Page | None:
    """This process's page; None for a process that is not the main one of a rank."""
    global _page, _page_pid
    if _page_pid != os.getpid():
        _page, _page_pid = _find_page(), os.getpid()
    return _page


def _find_page() -> progress.Page | None:
    try:
        run_dir, attempt, rank = (os.environ[name] for name in ("RAILHEAD_RUN_DIR", "RAILHEAD_ATTEMPT", "RANK"))
        page = progress.open_page(os.path.join(run_dir, f"attempt_{attempt}", f"rank_{rank}"), writable=True)
    except (KeyError, OSError, ValueError):
        return None
    return page if page.words[W_PID] == os.getpid() else None
