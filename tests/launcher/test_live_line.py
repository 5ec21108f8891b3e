"""The live line on a real pseudo-terminal: it is there, it is below, and it never touches what ranks have printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.console import Console, _Paper
from launcher.gang.events import LogChunk
from launcher.gang.tally import GangProgress
from launcher.journal import Entry
from launcher.report.display import Display, choose
from launcher.report.live import LiveView
from launcher.spec import ProgressDisplay, Stream
from tests.launcher.launched import wait_until
from tests.launcher.report.journals import MONO_S, Story
from tests.launcher.screens import Terminal

LINE = ("step 12 of 40", "31 samples/s", "1 restart")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    one = Terminal()
    yield one
    one.close()


def console_on(terminal: Terminal, **more: bool) -> Console:
    return Console(lambda rank, local_rank: f"[rank{rank}] ", terminal.fd, terminal.fd, **more)


def shown(terminal: Terminal, rows: list[str]) -> None:
    wait_until(lambda: terminal.rows() == rows, f"{rows} on the screen, there is {terminal.rows()}")


def test_the_line_stands_below_whatever_is_printed_and_is_gone_at_the_end(terminal: Terminal) -> None:
    console = console_on(terminal)
    console.say("2 ranks on this machine")
    console.show_line(LINE)
    shown(terminal, ["launcher: 2 ranks on this machine", "step 12 of 40 · 31 samples/s · 1 restart"])
    for idx in range(3):
        console.log(LogChunk(0, 0, Stream.STDOUT, b"loss %d\n" % idx))
    printed = ["launcher: 2 ranks on this machine", "[rank0] loss 0", "[rank0] loss 1", "[rank0] loss 2"]
    shown(terminal, [*printed, "step 12 of 40 · 31 samples/s · 1 restart"])
    console.show_line(["step 13 of 40"])
    shown(terminal, [*printed, "step 13 of 40"])
    console.close()
    shown(terminal, printed)


def test_a_progress_bar_goes_on_in_its_own_row_at_the_bottom_of_the_screen_too(terminal: Terminal) -> None:
    """tqdm returns to the beginning of its line and never ends it, so ours may not use that row, nor move it."""
    console = console_on(terminal)
    for idx in range(20):
        console.log(LogChunk(0, 0, Stream.STDERR, b"line %d\n" % idx))
    for percent in range(0, 101, 10):
        console.log(LogChunk(0, 0, Stream.STDERR, b"\r%3d%%|####" % percent))
        console.show_line([f"step {percent}"])
        wait_until(
            lambda percent=percent: terminal.rows()[-2:] == [f"[rank0] {percent:3}%|####", f"step {percent}"],  # type: ignore[misc]
            "bar and line",
        )
    console.log(LogChunk(0, 0, Stream.STDERR, b"\n"))
    console.close()
    wait_until(lambda: terminal.rows()[-2:] == ["[rank0] line 19", "[rank0] 100%|####"], "the bar alone")


def test_what_others_say_does_not_overwrite_a_progress_bar(terminal: Terminal) -> None:
    """The bar has returned to the beginning of its row, which is still its own."""
    console = console_on(terminal)
    console.log(LogChunk(0, 0, Stream.STDERR, b" 98%|#########\r"))
    console.log(LogChunk(0, 0, Stream.STDOUT, b"bye\n"))
    console.log(LogChunk(0, 0, Stream.STDERR, b" 99%|#########\r"))
    console.log(LogChunk(0, 0, Stream.STDERR, b"100%|#########\r"))
    console.say("done")
    console.close()
    shown(terminal, ["[rank0]  98%|#########", "[rank0] bye", "[rank0] 100%|#########", "launcher: done"])


def test_a_narrow_terminal_gets_what_fits_and_a_change_of_width_is_followed(terminal: Terminal) -> None:
    console = console_on(terminal)
    for columns, expected in (
        (40, "step 12 of 40 · 31 samples/s"),
        (20, "step 12 of 40"),
        (12, "step 12 of…"),
        (8, ""),
    ):
        terminal.resize(columns, 12)
        console.show_line([*LINE, f"{columns}"])
        shown(terminal, [expected] if expected else [])
    terminal.resize(80, 12)
    console.show_line(LINE)
    shown(terminal, ["step 12 of 40 · 31 samples/s · 1 restart"])
    console.close()


def test_a_line_that_the_terminal_has_folded_is_cleared_whole() -> None:
    """A terminal that became narrower shows it in two rows, with the cursor still at its beginning."""
    terminal = Terminal(30, 6)
    os.write(terminal.fd, b"step 12 of 40 and so on, and on; folded here\r\x1b[A")
    paper = _Paper(lambda rank, local_rank: "", terminal.fd, terminal.fd, False)
    paper.has_line = True
    paper.write_words("done\n")
    shown(terminal, ["done"])
    terminal.close()


def test_without_colour_no_colour_is_written(terminal: Terminal) -> None:
    console = console_on(terminal)
    console.show_line(LINE)
    shown(terminal, [" · ".join(LINE)])
    console.close()
    assert b"m" not in terminal.written.replace(b"samples", b"")


def test_where_standard_error_is_no_terminal_there_is_no_line(terminal: Terminal, tmp_path: Path) -> None:
    with open(tmp_path / "err", "wb") as err:
        console = Console(lambda rank, local_rank: "", terminal.fd, err.fileno())
        console.show_line(LINE)
        console.say("hello")
        console.close()
    assert (tmp_path / "err").read_bytes() == b"launcher: hello\n"
    assert terminal.rows() == []


pieces = st.one_of(
    st.sampled_from([b"\n", b"\r", b"a line\n", b"half", b"\r50%|###", "größer ".encode(), b"x" * 45, b"\r\n"]),
    st.none(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), pieces), min_size=1, max_size=25))
def test_what_ranks_print_looks_the_same_with_the_line_and_without(output: list[tuple[int, bytes | None]]) -> None:
    """The promise, for any mixture of lines, halves and returns from two ranks, on a screen that scrolls."""
    seen = []
    for with_line in (True, False):
        terminal = Terminal(40, 5)
        paper = _Paper(lambda rank, local_rank: f"[{rank}] ", terminal.fd, terminal.fd, True)
        for rank, data in output:
            if data is None:
                paper.write_words("launcher: words\n")
            else:
                paper.write_chunk(LogChunk(rank, rank, Stream.STDERR, data))
            if with_line:
                paper.keep_line(LINE)
        if with_line:
            paper.keep_line(())
        os.write(terminal.fd, b"\n.\n")
        wait_until(lambda terminal=terminal: terminal.rows()[-1:] == ["."], "all to be shown")  # type: ignore[misc]
        seen.append(terminal.everything())
        terminal.close()
    assert seen[0] == seen[1]


TRAIN = """
import pathlib, time, torch
from launcher import expect_steps
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
expect_steps(1000)
print("training", flush=True)
while True:
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    time.sleep(0.01)
    if pathlib.Path("enough").exists():
        break
print("trained")
"""


def test_a_job_on_a_terminal_has_a_line_while_it_runs_and_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    terminal = Terminal(100, 20)
    environ = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "train.py"],
        cwd=tmp_path,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=terminal.fd,
        stderr=terminal.fd,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(row.startswith("step ") and " of 1,000" in row for row in terminal.rows()), "the line")
        assert terminal.rows()[-1].startswith("step "), "below all else"
        wait_until(lambda: "[rank0] training" in terminal.rows(), "its output")
        (tmp_path / "enough").touch()
        assert process.wait(60) == 0
        wait_until(lambda: terminal.rows()[-1].startswith("launcher: done in"), "the summary as the last thing")
    finally:
        process.kill()
        process.wait()
        terminal.close()
    assert not [row for row in terminal.everything() if row.startswith("step ")]
    assert [row for row in terminal.everything() if "rank0" in row] == ["[rank0] training", "[rank0] trained"]


def test_output_that_goes_through_a_pipe_gets_sentences() -> None:
    """`| tee log` shows it on the same terminal, over any line of ours."""
    xterm = {"TERM": "xterm"}
    assert choose(ProgressDisplay.AUTO, False, True, xterm) is ProgressDisplay.PLAIN
    assert choose(ProgressDisplay.AUTO, True, True, xterm) is ProgressDisplay.LIVE
    assert choose(ProgressDisplay.AUTO, True, True, {"TERM": "dumb"}) is ProgressDisplay.PLAIN


def test_a_line_that_is_not_wanted_is_not_shown_and_where_there_is_no_terminal_there_are_sentences() -> None:
    said: list[object] = []

    class Screen:
        def say(self, text: str) -> None:
            said.append(text)

        def show_line(self, parts: Sequence[str]) -> None:
            said.append(tuple(parts))

    expected = {ProgressDisplay.OFF: [], ProgressDisplay.AUTO: ["step 12 · 8.0 samples/s · data wait 0 %"]}
    with open(os.devnull, "wb") as nowhere:
        for wish, words in expected.items():
            display = Display(wish, Screen(), {"TERM": "xterm"}, nowhere.fileno(), nowhere.fileno())
            for entry in Story().begin().attempt(1, 0).entries:
                display.entry(entry)
            for steps in (1, 12):
                display.progress(progress(steps), MONO_S + 9 + steps)
            assert said == words


# --- what is said where there is no terminal ------------------------------------------------------------------------------------------


def view_of(story: Story) -> LiveView:
    view = LiveView()
    for entry in story.entries:
        view.see(entry)
    return view


def progress(steps: int | None, attempt: int = 0, **more: int) -> GangProgress:
    return GangProgress(attempt, 2, 2, steps, samples=(steps or 0) * 8, step_s=1.0, step_age_s=0.0, **more)  # type: ignore[arg-type]


def test_plain_lines_come_when_the_pace_is_known_and_every_five_minutes() -> None:
    view = view_of(Story().begin().attempt(1, 0))
    said = {}
    for second in range(5, 1000):
        words = view.look(progress(second - 9 if second > 9 else None, total_steps=2000), MONO_S + second)
        if words:
            said[second] = words
    assert list(said) == [20, 320, 620, 920]
    assert said[20] == "step 11 of 2,000 · 8.0 samples/s · 33 min left · data wait 0 %"


def test_a_restart_is_said_once_it_trains_again_with_what_it_took() -> None:
    story = Story().begin().attempt(1, 0).fail(100, 0).attempt(101, 1)
    view = view_of(story)
    assert view.look(progress(None, 1), MONO_S + 103) is None
    said = view.look(progress(3, 1, total_steps=500, done_steps=60), MONO_S + 104.5)
    assert said == "attempt 1 trains again after 4.5 s: step 63"
    assert view.look(progress(4, 1), MONO_S + 105.5) is None


def test_the_line_says_what_is_done_where_there_is_no_step_to_count() -> None:
    story = Story()
    view = LiveView()

    def parts(at_s: float) -> list[str]:
        while story.entries:
            view.see(story.entries.pop(0))
        return list(view.parts(MONO_S + at_s))

    story.begin().tell(0.1, "PlacementWaiting", reason="2 GPUs are held by others")
    assert parts(0.1) == ["waiting for nodes"]
    story.tell(1, "OpenStore", attempt=0)
    story.attempt(1, 0)
    view.look(progress(None), MONO_S + 4)
    assert parts(65) == ["no step yet", "1 min"]
    view.look(progress(7, stragglers=(1,)), MONO_S + 70)  # type: ignore[arg-type]
    assert parts(70)[:2] == ["slow: rank 1", "step 7"]
    story.fail(80, 0)
    assert parts(81) == ["restarting"]
    story.attempt(82, 1)
    assert parts(90) == ["no step yet", "2 min", "1 restart"]
    story.end(99)
    assert parts(99) == []


def test_thousands_of_ranks_that_end_at_once_do_not_paint_thousands_of_lines() -> None:
    """The controller has to answer within a second meanwhile."""
    story = Story().begin().attempt(1, 0)
    for rank in range(8192):
        story.tell(50, "RankExited", attempt=0, rank=rank, steps=9)
        story.tell(50, "StopAttempt", attempt=0, node_id=f"n{rank}", grace_s=30.0, signum=15)
    story.fail(51, 0).attempt(52, 1).end(60)
    view = LiveView()
    assert sum(view.see(entry) for entry in story.entries) < 12


def test_a_month_of_progress_is_not_kept_in_memory() -> None:
    view = LiveView()
    for entry in Story().begin().attempt(1, 0).entries:
        view.see(entry)
    for second in range(2, 3000):
        view.look(progress(second), MONO_S + second)
        view.see(Entry("GangProgress", 0.0, MONO_S + second, {"attempt": 0, "steps": second}))
    assert len(view._points) <= 62
    assert view._run.attempt is not None and view._run.attempt.points == []
