"""The loss of a peer is told from what the peer died of, whoever's news comes first; a cause is one line that a person can use."""

from __future__ import annotations

import pytest

from launcher.gang.causes import (
    Kind,
    cause,
    exception_in_words,
    exception_line,
    kind,
    unheard_exception,
    why_collateral,
)
from launcher.gang.events import ExceptionRecord, ExitStatus, Failure, NodeFailed, NodeLost, RankExited
from launcher.gang.policy import exit_code_of, root_cause

GLOO = "[/w/third_party/gloo/gloo/transport/tcp/pair.cc:{}] "
IN_TORCH = 'Traceback (most recent call last):\n  File "/x/torch/distributed/distributed_c10d.py", line 3, in f\n'
IN_USER = 'Traceback (most recent call last):\n  File "/x/train.py", line 3, in f\n'


def failed(rank: int, at_s: float, record: ExceptionRecord | None = None, **more: object) -> RankExited:
    status = more.pop("status", ExitStatus(code=1))
    return RankExited(0, "a", rank, rank, 1, status, at_s, exception=record, **more)  # type: ignore[arg-type]


def record(type_name: str, message: str, traceback: str = IN_USER, at_s: float = 0.0) -> ExceptionRecord:
    return ExceptionRecord(type_name, message, traceback, at_s)


@pytest.mark.parametrize(
    "exception",
    [
        record("RuntimeError", GLOO.format(553) + "Connection closed by peer [127.0.0.1]:31380. This is typically…"),
        record("RuntimeError", GLOO.format(537) + "Read error [127.0.0.1]:28557: Connection reset by peer. This…"),
        record("RuntimeError", GLOO.format(78) + "Timed out waiting 1800000ms for recv operation to complete"),
        record("RuntimeError", GLOO.format(9) + "Application timeout caused pair closure"),
        record("RuntimeError", "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 2000 ms"),
        record("DistNetworkError", "failed to recv, got 0 bytes", IN_TORCH),
        record("DistStoreError", "Timed out after 31 seconds waiting for clients. 1/2 clients joined.", IN_TORCH),
        record("DistStoreError", "wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"),
        record("DistBackendError", "NCCL error in: x.cpp:1, remote process exited or there was a network error"),
        record("ConnectionResetError", "[Errno 104] Connection reset by peer", IN_TORCH),
    ],
)
def test_the_loss_of_a_peer_is_never_the_root_while_there_is_another(exception: ExceptionRecord) -> None:
    lost = failed(0, 5.0, exception)
    real = failed(1, 6.0, record("ValueError", "it broke"))
    assert kind(lost) is Kind.LOST_PEER
    assert root_cause([lost, real]) is real
    assert root_cause([lost]) is lost, "but it is one, where there is nothing else"
    assert why_collateral(lost, real) == "lost its peer"


@pytest.mark.parametrize(
    "exception",
    [
        record("ConnectionResetError", "[Errno 104] Connection reset by peer"),  # the program's own socket
        record("OSError", "[Errno 32] Broken pipe"),
        record("RuntimeError", "the gloo backend wants a GPU"),
        record("ValueError", "world size 3 is not divisible by 2", IN_TORCH),
    ],
)
def test_what_only_sounds_like_it_is_a_cause_of_its_own(exception: ExceptionRecord) -> None:
    mine = failed(0, 5.0, exception)
    assert kind(mine) is Kind.EXCEPTION
    assert root_cause([mine, failed(1, 6.0, record("ValueError", "later"))]) is mine


def test_the_watchdog_of_nccl_aborts_without_an_exception_and_is_known_by_its_words() -> None:
    words = "[rank0]:[E1] ProcessGroupNCCL.cpp:632] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"
    assert kind(failed(0, 1.0, status=ExitStatus(signum=6), last_lines=words)) is Kind.LOST_PEER
    assert kind(failed(0, 1.0, status=ExitStatus(signum=6), last_lines="double free or corruption")) is Kind.CRASH


def test_a_rank_that_was_dead_before_we_stopped_anybody_did_not_die_of_us() -> None:
    """Its peer's complaint reaches us sooner than the news of its death: SIGKILL from outside must not pass for ours."""
    lost = failed(0, 5.001, record("RuntimeError", GLOO.format(1) + "Connection closed by peer", at_s=5.001))
    killed = failed(1, 5.0, status=ExitStatus(signum=9))
    stopped = failed(2, 5.3, status=ExitStatus(signum=15))
    assert root_cause([lost, killed, stopped]) is killed
    assert root_cause([lost, stopped]) is lost
    assert why_collateral(stopped, lost) == "stopped by the launcher, signal 15 (SIGTERM)"
    by_kernel = failed(3, 5.4, status=ExitStatus(signum=9), out_of_memory=True, cause="out of memory")
    assert root_cause([lost, stopped, by_kernel]) is by_kernel


@pytest.mark.parametrize(
    ("failure", "line", "what"),
    [
        (failed(0, 0, record("ValueError", "a\nb")), "ValueError: a (exit code 1)", Kind.EXCEPTION),
        (failed(0, 0, record("KeyError", "")), "KeyError (exit code 1)", Kind.EXCEPTION),
        (
            failed(0, 0, cause="sys.exit(3) at train.py:5 in main", status=ExitStatus(code=3)),
            "exit code 3: sys.exit(3) at train.py:5 in main",
            Kind.EXIT_CODE,
        ),
        (
            failed(0, 0, cause="out of memory", status=ExitStatus(signum=9), out_of_memory=True),
            "signal 9 (SIGKILL): out of memory",
            Kind.OUT_OF_MEMORY,
        ),
        (failed(0, 0, status=ExitStatus(signum=11)), "signal 11 (SIGSEGV)", Kind.CRASH),
        (failed(0, 0, status=ExitStatus(signum=10)), "signal 10 (SIGUSR1)", Kind.SIGNAL),
        (NodeLost("a", "no answer", 0.0), "no answer", Kind.NODE_LOST),
        (NodeFailed(0, "a", "no port", 0.0), "no port", Kind.NODE_FAILED),
    ],
)
def test_a_cause_is_one_line_and_has_a_kind(failure: Failure, line: str, what: Kind) -> None:
    assert cause(failure) == line
    assert kind(failure) is what


def test_an_exception_ends_with_1_even_if_our_signal_was_quicker_than_its_clean_up() -> None:
    stopped = failed(1, 5.0, record("ValueError", "it broke"), status=ExitStatus(signum=15))
    assert exit_code_of(stopped) == 1
    assert cause(stopped) == "ValueError: it broke (signal 15 (SIGTERM) while it ended)"
    assert exit_code_of(failed(1, 5.0, status=ExitStatus(signum=15))) == 143


def test_what_a_data_loaders_worker_raised_is_told_as_the_workers() -> None:
    message = (
        "Caught ValueError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
        '  File "/x/worker.py", line 3, in loop\n    data = f()\nValueError: bad sample 7\n'
    )
    expected = "ValueError: bad sample 7, in DataLoader worker process 1"
    assert exception_line(record("ValueError", message), 200) == expected


STDERR = "step 1\nException in thread Thread-1 (work):\nTraceback (most recent call last):\n  File …\n    x()\nValueError: boom\n"


def test_an_exception_on_standard_error_is_named_with_its_place() -> None:
    assert exception_in_words(STDERR) == "ValueError: boom, in thread Thread-1 (work)"
    child = STDERR.replace("Exception in thread Thread-1 (work):", "Process SpawnProcess-1:")
    assert exception_in_words(child) == "ValueError: boom, in process SpawnProcess-1"
    assert exception_in_words("Traceback (most recent call last):\n  File …\nmylib.errors.DeepError: x\n") == (
        "mylib.errors.DeepError: x"
    )


def test_a_line_that_only_speaks_of_errors_is_none() -> None:
    assert exception_in_words("ValueError: is what we print for fun\nall is well\n") == ""
    assert unheard_exception("Traceback (most recent call last):\n  File …\nValueError: caught and logged\n") == ""
    assert unheard_exception(STDERR) == "ValueError: boom, in thread Thread-1 (work)"
