"""How many requests one origin is given at once: found out from what it does, not configured. Pure; `now` is an argument.

Three forces, judged window by window:
- *More.* While the window was full and more requests brought more bytes per second, more are tried (slow start, as TCP does it).
- *Fewer.* What more requests do not speed up, fewer may not slow down: then they only queued, and a reader that needs a block now would
  queue behind them. Given back until goodput falls.
- *503.* Above the share of refusals that this origin shows anyway, the number is cut (multiplicative decrease), again and again, and grows
  in small steps once they end. A store that is pushed too hard refuses what is too much: half as many requests end that.
  Where refusals remain they do not come from our load (a flaky proxy refuses one in ten whatever is asked): the cuts
  are undone and that share is tolerated, else such an origin would be driven down to a crawl.

Goodput comes from Little's law (requests in flight x bytes of one / time of one), over requests that began in the window: counting what
lands per second is noise, because requests that began together land together.

Sources: Jacobson 1988 (slow start, AIMD); Little 1961; the gradient idea from Netflix's concurrency-limits.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOOR = 2
SEED = 16
"""Blocks at once before anything is known: by Little's law 16 x 4 MiB at 100 ms are 640 MiB/s."""

LARGE_BYTES = 1 << 20

GROWTH = 1.5
PROBE = 1.25
WORTH_IT = 0.12
"""More requests are kept when the goodput grew by at least this share of what they would bring on an idle link."""

SHRINK = 0.8
HARMLESS = 0.98
"""Fewer requests are kept when at least this part of the goodput is left."""

CUT = 0.5
MIN_THROTTLE_WINDOW = 60
"""Answers that a share of refusals is judged by; fewer would take chance for overload."""

TOLERATED_SHARE = 0.02
RANDOM_SHARE = 0.35
"""Half as many requests that leave this part of the refusals, or more, were no cure: where up to half of what is asked is too much, they
leave none. (A smaller cut would leave some of them either way, and sixty answers could not tell.)"""

MOST_TOLERATED = 0.5
"""Who refuses more than this means it."""

CHANCE = 0.1
"""By how much the share of some sixty answers may be above what it is in the long run."""

RARE_SHARE = 0.25

HOLD_S = 10.0


@dataclass
class _Window:
    start_s: float
    num: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """Of requests that began since the window did, of about the full size: small ones say more of latency than of bandwidth."""
    is_full: bool = False
    """The limit was reached: what was measured says something about the limit."""


@dataclass
class _Answers:
    num: int = 0
    """Requests that went out. (Not those that were answered: refusals come at once, and all else after them.)"""
    num_refusals: int = 0


@dataclass
class _Cutting:
    """Refusals are being answered by cuts: the limit and the share of refusals before the first, and what was answered since."""

    limit: float
    share: float
    num: int = 0
    num_refusals: int = 0


class Concurrency:
    """The limit for one origin. `cap`: what the configuration allows at most."""

    def __init__(self, cap: int, *, seed: int = SEED) -> None:
        self.cap = max(cap, 1)
        self.floor = min(FLOOR, self.cap)
        self.reason = "nothing is known yet"
        """Why the limit is what it is, for people."""
        self._limit = float(min(seed, self.cap))
        self._window = _Window(0.0)
        self._trying: float | None = None
        """While a step is being tried: the limit before it."""
        self._goodput = 0.0
        """Before that step, or since we settled."""
        self._is_settled = False
        self._hold_until_s = 0.0
        self._next_is_up = True
        self._answers = _Answers()
        self._tolerated = TOLERATED_SHARE
        self._last_answers = (0, 0)
        """Of the window before: how many, and how many of them were refusals."""
        self._cutting: _Cutting | None = None

    @property
    def limit(self) -> int:
        return int(self._limit)

    def started(self, in_flight: int, now: float) -> None:
        """A request went out; `in_flight` with it."""
        if self._window.start_s == 0.0:
            self._window.start_s = now
        self._window.is_full |= in_flight >= self.limit
        self._answers.num += 1

    def ended(self, now: float, num_bytes: int, seconds: float = 0.0, *, throttled: bool = False) -> None:
        """A request is over. `seconds`: what it took, 0 where that says nothing; `throttled`: it was refused with 429 or 503."""
        answers = self._answers
        answers.num_refusals += throttled
        if answers.num >= max(MIN_THROTTLE_WINDOW, 3 * self.limit):
            self._judge_refusals(answers, now)
            self._last_answers = answers.num, answers.num_refusals
            self._answers = _Answers()
        window = self._window
        if num_bytes >= LARGE_BYTES and 0 < seconds <= now - window.start_s:
            window.num, window.num_bytes, window.seconds = (
                window.num + 1,
                window.num_bytes + num_bytes,
                window.seconds + seconds,
            )
            if window.num >= max(12, 1.5 * self.limit):
                if window.is_full and self._cutting is None:
                    self._judge(self.limit * window.num_bytes / window.seconds, now)
                else:
                    self._trying = None
                self._window = _Window(now)

    @property
    def is_cut(self) -> bool:
        """Refusals are being answered by fewer requests."""
        return self._cutting is not None

    @property
    def refusals_are_rare(self) -> bool:
        """Whether one more request would hardly be one too many."""
        answers, (num, num_refusals) = self._answers, self._last_answers
        return answers.num_refusals + num_refusals <= 1 + RARE_SHARE * (answers.num + num)

    def _judge_refusals(self, answers: _Answers, now: float) -> None:
        share = answers.num_refusals / answers.num
        cutting = self._cutting
        if cutting is None:
            if share > self._tolerated and self._limit > self.floor:
                self._cutting = _Cutting(self._limit, share)
                self._set(self._limit * CUT, f"cut: {share:.0%} of the answers were refusals")
            elif share < self._tolerated / 3:
                self._tolerated = max(TOLERATED_SHARE, self._tolerated * 0.8)
            return
        cutting.num, cutting.num_refusals = cutting.num + answers.num, cutting.num_refusals + answers.num_refusals
        since = cutting.num_refusals / cutting.num
        if since > max(RANDOM_SHARE * cutting.share, TOLERATED_SHARE) and max(since, cutting.share) < MOST_TOLERATED:
            self._cutting = None
            self._tolerated = min(MOST_TOLERATED, max(since, cutting.share) + CHANCE)
            self._set(cutting.limit, f"{since:.0%} refusals whatever is asked: not caused by our load")
            self._settle(0.0, now)
        elif share <= self._tolerated:
            self._cutting = None
            self.reason = "cut, and the refusals have ended"
            self._settle(0.0, now)
        else:
            self._set(self._limit * CUT, f"cut again: {share:.0%} of the answers were refusals")

    def _judge(self, goodput: float, now: float) -> None:
        before, self._trying = self._trying, None
        if before is not None and before < self._limit:
            if goodput < self._goodput * (1 + WORTH_IT * (self._limit / before - 1)):
                self._set(before, "more brought nothing")
                self._settle(max(goodput, self._goodput), now)
                self._next_is_up = False
            else:
                self._try(self._limit * (PROBE if self._is_settled else GROWTH), goodput, "more bring more", now)
        elif before is not None:
            if goodput < self._goodput * HARMLESS:
                self._set(before, "fewer brought less")
                self._settle(self._goodput, now)
            else:
                self._try(self._limit * SHRINK, max(goodput, self._goodput), "fewer bring as much", now)
        elif not self._is_settled:
            self._try(self._limit * GROWTH, goodput, "more may bring more", now)
        elif now >= self._hold_until_s or goodput < 0.7 * self._goodput:
            step = PROBE if self._next_is_up else SHRINK
            self._next_is_up = not self._next_is_up
            self._try(self._limit * step, goodput, "looking again", now)
        elif not self._next_is_up:
            self._next_is_up = True
            self._try(self._limit * SHRINK, goodput, "fewer may bring as much", now)

    def _try(self, limit: float, goodput: float, reason: str, now: float) -> None:
        before = self._limit
        self._set(limit if abs(limit - before) >= 1 else before + (1 if limit > before else -1), reason)
        self._goodput = goodput
        if self._limit == before:
            self._settle(goodput, now)
        else:
            self._trying = before

    def _settle(self, goodput: float, now: float) -> None:
        self._trying = None
        self._is_settled = True
        self._goodput = goodput
        self._hold_until_s = now + HOLD_S

    def _set(self, limit: float, reason: str) -> None:
        self._limit = min(max(limit, float(self.floor)), float(self.cap))
        self.reason = reason
