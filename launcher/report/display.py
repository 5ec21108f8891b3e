"""Shows a job while it runs: the live line on a terminal, or a sentence now and then. A thin shell around `live`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

from launcher.gang.tally import GangProgress
from launcher.journal import Entry
from launcher.report.live import LiveView
from launcher.spec import ProgressDisplay


class Screen(Protocol):
    """`console.Console`."""

    def say(self, text: str) -> None: ...

    def show_line(self, parts: Sequence[str]) -> None: ...


class Onlooker(Protocol):
    """Whoever is told how a job goes, in the controller's thread."""

    def entry(self, entry: Entry) -> None: ...

    def progress(self, progress: GangProgress, now: float) -> None: ...


class Onlookers:
    """Several as one."""

    def __init__(self, *each: Onlooker) -> None:
        self._each = each

    def entry(self, entry: Entry) -> None:
        for one in self._each:
            one.entry(entry)

    def progress(self, progress: GangProgress, now: float) -> None:
        for one in self._each:
            one.progress(progress, now)


class Display:
    """Called from the controller's thread only."""

    def __init__(
        self, wish: ProgressDisplay, screen: Screen, environ: Mapping[str, str], stdout_fd: int = 1, stderr_fd: int = 2
    ) -> None:
        self._how = choose(wish, os.isatty(stdout_fd), os.isatty(stderr_fd), environ)
        self._screen = screen
        self._view = LiveView()

    def entry(self, entry: Entry) -> None:
        """The journal has got this."""
        if self._how is ProgressDisplay.OFF:
            return
        if self._view.see(entry) and self._how is ProgressDisplay.LIVE:
            self._screen.show_line(self._view.parts(entry.mono_s))

    def progress(self, progress: GangProgress, now: float) -> None:
        """How far the gang is."""
        if self._how is ProgressDisplay.OFF:
            return
        sentence = self._view.look(progress, now)
        if self._how is ProgressDisplay.LIVE:
            self._screen.show_line(self._view.parts(now))
        elif sentence:
            self._screen.say(sentence)


def choose(wish: ProgressDisplay, is_out: bool, is_err: bool, environ: Mapping[str, str]) -> ProgressDisplay:
    """A line that is painted over needs a terminal that can, on standard error. By itself it also wants standard output there: what goes
    through a pipe (`| tee log`) comes back to the same terminal behind our back, and would be printed over the line.

    >>> auto, live, xterm = ProgressDisplay.AUTO, ProgressDisplay.LIVE, {"TERM": "xterm"}
    >>> [choose(auto, out, err, xterm).value for out, err in ((True, True), (False, True), (True, False))]
    ['live', 'plain', 'plain']
    >>> choose(auto, True, True, {"TERM": "dumb"}).value, choose(live, False, True, {}).value, choose(live, True, False, {}).value
    ('plain', 'live', 'plain')
    """
    if wish is ProgressDisplay.LIVE:
        return ProgressDisplay.LIVE if is_err else ProgressDisplay.PLAIN
    if wish is not ProgressDisplay.AUTO:
        return wish
    can = is_out and is_err and environ.get("TERM", "dumb") not in ("", "dumb")
    return ProgressDisplay.LIVE if can else ProgressDisplay.PLAIN


def is_coloured(environ: Mapping[str, str]) -> bool:
    """https://no-color.org: any value that is not empty."""
    return not environ.get("NO_COLOR")
