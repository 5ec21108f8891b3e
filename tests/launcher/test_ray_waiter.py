"""One thread waits for all nodes: in order, never early, and for nothing after it is closed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("ray")

from launcher.cluster.ray.waiter import Waiter

PATIENCE_S = 60.0


class Ref:
    """Like an ObjectRef, as far as it is used."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.answer


def test_answers_and_errors_are_dealt_with_in_one_thread_in_the_order_in_which_they_come() -> None:
    waiter, first, second, over = Waiter("test"), Ref(), Ref(), threading.Event()
    found: list[object] = []

    def note(answer: Future[Any]) -> None:
        error = answer.exception()
        found.append((answer.result() if error is None else str(error), threading.current_thread().name))
        if len(found) == 2:
            over.set()

    waiter.when(first, note)
    waiter.when(second, note)
    second.answer.set_exception(ValueError("no"))
    first.answer.set_result(1)
    assert over.wait(PATIENCE_S)
    assert found == [("no", "test"), (1, "test")]
    waiter.close()


def test_what_is_to_come_later_comes_in_its_order_and_not_before() -> None:
    """Silence is a lost node: a deadline that comes early would be a node that was not lost."""
    waiter, over = Waiter("test"), threading.Event()
    began_s = time.monotonic()
    came: dict[str, float] = {}

    def note(name: str) -> None:
        came[name] = time.monotonic()
        if len(came) == 2:
            over.set()

    waiter.after(0.2, lambda: note("late"))
    waiter.after(0.05, lambda: note("early"))
    assert over.wait(PATIENCE_S)
    assert list(came) == ["early", "late"]
    assert came["early"] - began_s >= 0.05
    assert came["late"] - began_s >= 0.2
    waiter.close()


def test_nothing_is_called_after_it_is_closed() -> None:
    waiter, ref = Waiter("test"), Ref()
    found: list[object] = []
    waiter.when(ref, found.append)
    waiter.close()
    ref.answer.set_result(1)
    waiter.after(0.0, lambda: found.append("timer"))
    assert found == []
