"""What the shaping proxy decides: which fault a request meets, when bytes may go, what has been counted. No sockets, no clock.

Every draw depends on the seed and on the request itself (method, key, range, how often it came), never on the order in which requests
of several connections arrive: the same run meets the same faults.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote


@dataclass(frozen=True)
class Behaviour:
    """How the proxy treats requests. Rates are in bytes per second, `None` is unlimited; shares are of the requests that `match` meets,
    at most one fault per request, together at most 1."""

    first_byte_s: float = 0.0
    """Seconds from a request's end to the first byte of its answer; a slower upstream is not made slower still."""

    rate_per_connection: float | None = None
    rate_total: float | None = None

    throttle_share: float = 0.0
    """503 SlowDown with Retry-After: `retry_after_s`, without asking the upstream."""
    retry_after_s: float = 1.0

    reset_share: float = 0.0
    """The connection is reset (RST) in place of an answer."""

    cut_share: float = 0.0
    """The connection closes in the middle of the body."""

    stall_share: float = 0.0
    """In the middle of the body nothing comes for `stall_s`; then it goes on."""
    stall_s: float = 30.0

    flip_share: float = 0.0
    """One bit of the body is turned over; only a checksum can see it."""

    trickle_share: float = 0.0
    """The body comes at `trickle_rate`."""
    trickle_rate: float = 2048.0

    html_share: float = 0.0
    """200 with a login page, as from a captive proxy."""

    match: str = ""
    """Faults meet only requests whose "METHOD /path" contains this regular expression."""

    faults_per_range: int | None = None
    """The same request (method, key, range) meets at most so many faults: 1 makes every first retry succeed."""

    keeps_objects: bool = False
    """Objects are read from the upstream once, whole, and served from memory from then on (benchmarks/object_memory.py). Not for objects
    that change."""

    seed: int = 0

    def __post_init__(self) -> None:
        shares = {name: share for name, share in dataclasses.asdict(self).items() if name.endswith("_share")}
        if any(share < 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares must not be negative and add up to 1 at most: {shares}")
        for name in ("rate_per_connection", "rate_total"):
            rate = getattr(self, name)
            if rate is not None and rate <= 0:
                raise ValueError(f"{name} is {rate}; it must be greater than 0, or None for unlimited")
        re.compile(self.match)

    def changed_by(self, values: dict[str, Any]) -> Behaviour:
        """This with some fields set anew; ValueError names an unknown one."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ValueError(f"no such setting: {', '.join(unknown)}")
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class Request:
    """One request as the proxy sees it. `range` is half-open; its end is None where the request left it open."""

    method: str
    target: str
    range: tuple[int, int | None] | None = None

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def kind(self) -> str:
        """The method, or LIST for a listing of a bucket.

        >>> Request("GET", "/b?list-type=2&prefix=x").kind, Request("GET", "/b/x").kind
        ('LIST', 'GET')
        """
        query = self.target.partition("?")[2]
        is_list = self.method == "GET" and ("list-type=" in query or "prefix=" in query or "delimiter=" in query)
        return "LIST" if is_list else self.method


FAULTS = ("throttle", "reset", "cut", "stall", "flip", "trickle", "html")


def fault_of(behaviour: Behaviour, request: Request, nth: int) -> tuple[str, float]:
    """The fault that this request meets the nth time it comes ("" for none), and a number in [0, 1) that places it in the body.

    >>> fault_of(Behaviour(reset_share=1.0), Request("GET", "/b/k"), 0)[0]
    'reset'
    """
    draw = random.Random(f"{behaviour.seed}|{request.method}|{request.target}|{request.range}|{nth}")
    choice, place = draw.random(), draw.random()
    if not re.search(behaviour.match, f"{request.method} {request.path}"):
        return "", place
    for name in FAULTS:
        share = getattr(behaviour, f"{name}_share")
        if choice < share:
            return name, place
        choice -= share
    return "", place


class TokenBucket:
    """Bytes at a rate. Who wants to send reserves, waits as long as told, and sends; turns are given in order of asking."""

    def __init__(self, rate: float | None, burst_bytes: int = 128 * 1024) -> None:
        self.rate = rate
        self._burst_bytes = burst_bytes
        self._free_at = 0.0

    def reserve(self, num_bytes: int, now: float) -> float:
        """Seconds to wait before these bytes may go.

        >>> bucket = TokenBucket(rate=1000, burst_bytes=1000)
        >>> bucket.reserve(1000, now=50.0), bucket.reserve(500, now=50.0), bucket.reserve(500, now=50.0)
        (0.0, 0.0, 0.5)
        """
        if self.rate is None:
            return 0.0
        # An idle bucket is full: it may be ahead of its rate by the burst, and never by more.
        self._free_at = max(self._free_at, now - self._burst_bytes / self.rate)
        wait_s = max(0.0, self._free_at - now)
        self._free_at += num_bytes / self.rate
        return wait_s


@dataclass
class Answer:
    """One answer on its way to a client. `body_bytes` is what has gone out so far, also when the client then leaves."""

    request: Request
    status: int
    body_bytes: int = 0


class Counters:
    """What went through: requests by kind and status, body bytes out by key and range, faults. A reset forgets answers under way."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.answers: list[Answer] = []
        self.faults: Counter[str] = Counter()
        self.connections = 0

    def begin(self, request: Request, status: int) -> Answer:
        """Books an answer; whoever sends it counts its bytes up. Status 0 stands for none (the connection was reset)."""
        answer = Answer(request, status)
        self.answers.append(answer)
        return answer

    def as_dict(self) -> dict[str, Any]:
        requests: Counter[str] = Counter()
        statuses: Counter[str] = Counter()
        bytes_out: Counter[str] = Counter()
        ranges: dict[str, list[tuple[int, int]]] = {}
        for answer in self.answers:
            request = answer.request
            requests[request.kind] += 1
            statuses[str(answer.status)] += 1
            bytes_out[request.kind] += answer.body_bytes
            if request.kind == "GET" and answer.status in (200, 206) and answer.body_bytes:
                start = request.range[0] if request.range and answer.status == 206 else 0
                ranges.setdefault(request.path, []).append((start, start + answer.body_bytes))
        return {
            "requests": dict(requests),
            "statuses": dict(statuses),
            "faults": dict(self.faults),
            "bytes_out": dict(bytes_out),
            "connections": self.connections,
            "objects": {path: _account(found) for path, found in sorted(ranges.items())},
        }


def _account(ranges: list[tuple[int, int]]) -> dict[str, Any]:
    return {
        "requests": len(ranges),
        "bytes": sum(end - start for start, end in ranges),
        "repeated_bytes": repeated_bytes(ranges),
        "ranges": ranges,
    }


def repeated_bytes(ranges: list[tuple[int, int]]) -> int:
    """Bytes that went out more than once, each counted as often as it was repeated.

    >>> repeated_bytes([(0, 10), (10, 20)]), repeated_bytes([(0, 10), (5, 20), (5, 6)])
    (0, 6)
    """
    covered, last = 0, 0
    for start, end in sorted(ranges):
        covered += max(0, end - max(start, last))
        last = max(last, end)
    return sum(end - start for start, end in ranges) - covered
