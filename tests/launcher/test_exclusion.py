"""Nodes that were slow, broken or lost are left out for a while, and never too many of them; the memory outlives jobs and accidents."""

from __future__ import annotations

import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from launcher.exclusion import KEEP_S, MAX_SHARE, Cause, Verdict, excluded, from_json, remember, to_json
from launcher.exclusion_file import NOWHERE, ExclusionFile

HOSTS = [f"n{idx}" for idx in range(8)]

verdicts = st.lists(
    st.builds(
        Verdict,
        st.sampled_from(HOSTS),
        st.just("slow"),
        st.floats(0, 2 * KEEP_S, allow_nan=False),
        st.sampled_from(Cause),
    ),
    max_size=12,
)


def test_a_slow_node_is_left_out_and_comes_back_after_a_day() -> None:
    history = remember((), [Verdict("n3", "half rate", 1000.0)], now=1000.0)
    assert excluded(history, HOSTS, needed=7, now=2000.0).hosts == {"n3": "half rate"}
    assert excluded(history, HOSTS, needed=7, now=1000.0 + KEEP_S).hosts == {}


def test_a_node_that_the_job_needs_stays_in_and_that_is_said() -> None:
    found = excluded([Verdict("n3", "half rate", 0.0)], HOSTS, needed=8, now=1.0)
    assert found.hosts == {}
    assert "n3 (half rate)" in found.remark


def test_many_slow_nodes_are_one_network() -> None:
    """A switch at half speed must not empty the cluster."""
    history = [Verdict(f"n{idx}", "slow", 0.0) for idx in range(4)]
    found = excluded(history, HOSTS, needed=1, now=1.0)
    assert found.hosts == {}
    assert "look at what they share" in found.remark


@given(verdicts, st.integers(0, 8), st.floats(0, 3 * KEEP_S))
def test_what_remains_is_enough_and_what_is_left_out_is_a_minority(
    history: list[Verdict], needed: int, now: float
) -> None:
    found = excluded(history, HOSTS, needed=needed, now=now)
    assert len(HOSTS) - len(found.hosts) >= needed
    assert len(found.hosts) <= max(1, MAX_SHARE * len(HOSTS))


@given(verdicts)
def test_the_memory_survives_json(history: list[Verdict]) -> None:
    assert from_json(to_json(history)) == tuple(history)


@given(st.text(max_size=30))
def test_a_broken_memory_is_an_empty_one(text: str) -> None:
    assert from_json(text) == ()


def test_a_node_is_left_out_when_it_is_lost_the_second_time_and_at_once_when_its_hardware_fails() -> None:
    """Anything may reboot once; a GPU that has fallen off the bus has not come back by the next job."""
    lost = [Verdict("n1", "lost", at_s, Cause.LOST) for at_s in (10.0, 20.0)]
    assert excluded(lost[:1], HOSTS, needed=1, now=30.0).hosts == {}
    assert excluded(lost, HOSTS, needed=1, now=30.0).hosts == {"n1": "lost"}
    assert excluded([Verdict("n2", "ECC", 10.0, Cause.HARDWARE)], HOSTS, needed=1, now=30.0).hosts == {"n2": "ECC"}


def test_two_nodes_of_one_name_are_never_left_out() -> None:
    """Several raylets on one machine: the name does not say which of them it was."""
    history = [Verdict("n1", "half rate", 0.0)]
    assert excluded(history, ["n1", "n1", *HOSTS[2:]], needed=1, now=1.0).hosts == {}


def test_the_memory_is_shared_by_jobs_that_write_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "state" / "nodes.json")
    writers = [
        threading.Thread(target=ExclusionFile(path, lambda: 1.0).remember, args=([Verdict(host, "slow", 0.5)],))
        for host in HOSTS
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(verdict.host for verdict in ExclusionFile(path, lambda: 2.0).history()) == HOSTS
    assert ExclusionFile(path, lambda: KEEP_S + 1.0).history() == (), "nobody clears lists"


def test_a_memory_that_cannot_be_kept_costs_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = ExclusionFile(str(tmp_path / "file" / "nodes.json"))
    assert "cannot be written" in nowhere.remember([Verdict("n1", "slow", 0.0)])
    assert nowhere.history() == ()
    assert ExclusionFile(NOWHERE).remember([Verdict("n1", "slow", 0.0)]) == ""
    assert ExclusionFile(NOWHERE).history() == ()
