"""Output: every rank has its files, the terminal shows the chosen ranks, and not a byte is lost, folded or changed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.console import Console
from launcher.gang.events import LogChunk
from launcher.node.lines import LineAssembler
from launcher.spec import LogOptions, Stream, StreamChoice
from tests.launcher.launched import launch

# --- lines --------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b"\r", b"\n", b"\r\n", "é…🙂".encode()])), st.booleans())
def test_no_byte_is_lost_or_reordered_however_it_arrives(pieces: list[bytes], goes_quiet: bool) -> None:
    lines = LineAssembler(max_held_bytes=16)
    shown = b""
    for piece in pieces:
        shown += lines.feed(piece)
        if goes_quiet:
            shown += lines.flush(at_end=False)
    assert shown + lines.flush() == b"".join(pieces)


@given(st.text(), st.integers(1, 5))
def test_a_character_is_never_cut(text: str, step: int) -> None:
    data, lines = text.encode(), LineAssembler(max_held_bytes=8)
    for start in range(0, len(data), step):
        lines.feed(data[start : start + step]).decode()
        lines.flush(at_end=False).decode()
    lines.flush().decode()


def test_a_carriage_return_waits_to_see_whether_a_newline_follows() -> None:
    lines = LineAssembler()
    assert lines.feed(b"dos line\r") == b""
    assert lines.feed(b"\nnext") == b"dos line\r\n"


# --- console ------------------------------------------------------------------------------------------------------------------------------


class Paper:
    """A console that writes into two files."""

    def __init__(self, directory: Path) -> None:
        self.out, self.err = directory / "out", directory / "err"
        self.fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (self.out, self.err)]
        self.console = Console(lambda rank, local_rank: f"[{rank}] ", *self.fds)

    def close(self) -> tuple[bytes, bytes]:
        self.console.end_output()
        self.console.close(30)
        for fd in self.fds:
            os.close(fd)
        return self.out.read_bytes(), self.err.read_bytes()


@pytest.fixture
def paper(tmp_path: Path) -> Paper:
    return Paper(tmp_path)


def test_lines_of_two_ranks_are_not_torn_into_each_other(paper: Paper) -> None:
    for half in (b"one ", b"line\n"):
        for rank in (0, 1):
            paper.console.log(LogChunk(rank, rank, Stream.STDOUT, half))
    assert paper.close()[0] == b"[0] one line\n[1] one line\n"


def test_a_last_line_without_newline_is_there_and_our_words_begin_a_new_one(paper: Paper) -> None:
    paper.console.log(LogChunk(0, 0, Stream.STDERR, b"the end"))
    paper.console.end_output()
    paper.console.say("done")
    assert paper.close()[1] == b"[0] the end\nlauncher: done\n"


def test_a_progress_bar_keeps_its_returns_and_gets_its_prefix_each_time(paper: Paper) -> None:
    paper.console.log(LogChunk(0, 0, Stream.STDERR, b"\r10%\r20%\x1b[0m\n"))
    assert paper.close()[1] == b"[0] \r[0] 10%\r[0] 20%\x1b[0m\n"


def test_a_reader_that_goes_away_stops_nobody(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    console = Console(lambda rank, local_rank: "", write_fd, write_fd)
    for _ in range(100):
        console.log(LogChunk(0, 0, Stream.STDOUT, b"x" * 100_000 + b"\n"))
    console.close(30)
    os.close(write_fd)


# --- whose output is shown ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LogOptions(), {0: "BOTH"}),
        (LogOptions(show_ranks=frozenset({1, 3})), {1: "BOTH", 3: "BOTH"}),
        (LogOptions(show_all=True), {0: "BOTH", 1: "BOTH", 2: "BOTH", 3: "BOTH"}),
        (LogOptions(redirects=StreamChoice(Stream.BOTH)), {}),
        (LogOptions(redirects=StreamChoice(Stream.STDOUT)), dict.fromkeys(range(4), "STDERR")),
        (LogOptions(tee=StreamChoice(Stream.BOTH)), dict.fromkeys(range(4), "BOTH")),
        (
            LogOptions(redirects=StreamChoice(Stream.BOTH), tee=StreamChoice(Stream.STDOUT)),
            dict.fromkeys(range(4), "STDOUT"),
        ),
        (LogOptions(local_ranks_filter=frozenset({1})), {1: "BOTH", 3: "BOTH"}),
        (LogOptions(redirects=StreamChoice(by_local_rank=((0, Stream.BOTH),))), {1: "BOTH", 3: "BOTH"}),
    ],
)
def test_the_terminal_shows_rank_0_or_what_torchruns_options_say(options: LogOptions, expected: dict[int, str]) -> None:
    """Two nodes of two ranks."""
    shown = {rank: options.shown(rank, rank % 2) for rank in range(4)}
    assert {rank: stream.name for rank, stream in shown.items() if stream} == expected


# --- end to end ---------------------------------------------------------------------------------------------------------------------------

FAST_WRITER = """
import os, sys
line = "line %d " + "é" * 20
sys.stdout.write("".join((line + "\\n") % i for i in range(100_000)))
sys.stdout.write("no newline at the end")
"""


def test_a_hundred_thousand_lines_arrive_in_order_to_the_last_byte(tmp_path: Path) -> None:
    with launch(tmp_path, FAST_WRITER) as launched:
        code, out, err = launched.finish()
    expected = [f"[rank0] line {i} " + "é" * 20 for i in range(100_000)]
    assert code == 0, err
    assert out.split("\n") == [*expected, "[rank0] no newline at the end"]
    assert err.splitlines()[-1].startswith("launcher: done in "), "the summary comes last"


def test_bytes_that_are_no_text_pass_through(tmp_path: Path) -> None:
    script = r"""
import os, time
os.write(1, b"torn \xc3"); time.sleep(0.4); os.write(1, b"\xa9 invalid \xff\xfe ansi \x1b[31mred\x1b[0m\n" + b"z" * 300_000 + b"\n")
os.write(2, b"err\r\n")
"""
    with launch(tmp_path, script) as launched:
        _, out, err = launched.finish()
    raw = out.encode("utf-8", "surrogateescape")
    assert raw == b"[rank0] torn \xc3\xa9 invalid \xff\xfe ansi \x1b[31mred\x1b[0m\n[rank0] " + b"z" * 300_000 + b"\n"
    assert "[rank0] err\r\n" in err


def test_every_rank_has_its_own_files_with_everything_and_nothing_else(tmp_path: Path) -> None:
    script = 'import os, sys\nprint("out", os.environ["RANK"])\nprint("err", os.environ["RANK"], file=sys.stderr)'
    with launch(tmp_path, script, "--nproc-per-node", "3") as launched:
        _, out, err = launched.finish()
        for rank in range(3):
            directory = launched.run_dir / "attempt_0" / f"rank_{rank}"
            assert (directory / "stdout.log").read_text() == f"out {rank}\n"
            assert (directory / "stderr.log").read_text() == f"err {rank}\n"
    assert out == "[rank0] out 0\n"
    assert "[rank0] err 0\n" in err
    assert "err 1" not in err


def test_torchruns_tee_prefix_and_duplicates_are_honoured(tmp_path: Path) -> None:
    script = 'import os\nprint("loss 1 of", os.environ["RANK"])\nprint("noise")'
    options = ["--nproc-per-node", "2", "--role", "trainer", "-t", "3", "--duplicate-stdout-filters", "loss,nothing"]
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name} ${local_rank}/${rank}>"}
    with launch(tmp_path, script, *options, env=env) as launched:
        _, out, _ = launched.finish()
        filtered = (launched.run_dir / "attempt_0" / "filtered_stdout.log").read_text()
    expected = [f"<trainer {rank}/{rank}>{text}" for rank in range(2) for text in (f"loss 1 of {rank}", "noise")]
    assert sorted(out.splitlines()) == sorted(expected)
    assert sorted(filtered.splitlines()) == [line for line in sorted(expected) if "loss" in line]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_loses_words_and_not_the_training(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        script = 'for i in range(20_000): print("line", i)\nopen("trained", "w").close()'
        with launch(tmp_path, script, "--log-dir", str(small), "--nproc-per-node", "2") as launched:
            code, _, err = launched.finish()
        assert code == 0, err
        assert (tmp_path / "trained").exists()
        assert err.count("is full: output is being lost") == 1, "it is said, once"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
