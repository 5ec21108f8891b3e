"""The agent's time is over before the launcher's, however late messages are: no rank runs twice."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

ray = pytest.importorskip("ray")

from launcher.cluster.ray.lease import LEASE_SHARE, Lease, Terms  # noqa: E402
from launcher.cluster.ray.lifelines import Lifelines  # noqa: E402

delays = st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8), st.floats(0, 1)), min_size=1, max_size=12)


@given(delays, st.integers(0, 11), st.booleans())
def test_whatever_the_delays_the_agent_has_ended_before_the_launcher_gives_it_up(
    delays: list[tuple[float, float, float]], cut_at: int, is_answer_lost: bool
) -> None:
    """Polls and answers take as long as they like; at some point the link is cut, in either direction."""
    terms = Terms(4.0)
    lease, now, heard_s, num_heard = Lease(terms, 0.0), 0.0, None, 0
    for number, (there_s, back_s, pause_s) in enumerate(delays):
        asked_s = now
        now += there_s  # the poll arrives; a launcher that has lost patience meanwhile has given up already
        if number == cut_at and not is_answer_lost:
            break
        lease.heard(num_heard)
        lease.answered(number + 1, now)
        if number == cut_at:
            break
        now += back_s
        if heard_s is not None and now > heard_s + terms.silence_s:
            break
        heard_s, num_heard = now, num_heard + 1
        now += pause_s
        assert asked_s <= now
    if heard_s is not None:
        gives_up_s = heard_s + terms.silence_s
        assert lease.ends_s <= gives_up_s - terms.silence_s * (1 - LEASE_SHARE) + 1e-9


def test_an_agent_that_is_asked_in_time_keeps_its_lease() -> None:
    terms, now = Terms(4.0), 0.0
    lease = Lease(terms, now)
    for number in range(100):
        lease.heard(number)
        now += terms.poll_s
        lease.answered(number + 1, now)
        assert lease.ends_s - now >= terms.lease_s - terms.poll_s


def test_the_end_of_a_process_is_told_at_once_by_its_kernel() -> None:
    """Nobody accepts the connection; the kernel resets it when the listening socket's last holder is dead."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[listener.fileno()])
    lifelines, ended = Lifelines(), threading.Event()
    try:
        lifelines.connect("node", "127.0.0.1", port, ended.set)
        assert not ended.wait(0.05)
        process.kill()
        assert ended.wait(30)
    finally:
        lifelines.close()
        process.kill()
        process.wait()
