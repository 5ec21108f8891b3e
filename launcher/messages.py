"""What the launcher says, as pure text: first the failure, with the values, then what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.gang import policy
from launcher.gang.causes import cause, exception_line, why_collateral
from launcher.gang.events import (
    CacheFailed,
    CacheServing,
    FabricFound,
    Failure,
    NodeFailed,
    NodeLost,
    Notice,
    Notices,
    PlacementWaiting,
    RankExited,
    RankHung,
)
from launcher.gang.sayings import some_ranks
from launcher.gang.world import World

_MAX_COLLATERAL_LINES = 8
_MAX_CAUSE = 120
"""Of what is only a consequence; libraries put whole essays into one line."""


def began(num_ranks_asked: str, cluster: str, run_dir: str) -> str:
    return f"{num_ranks_asked} on {cluster}; run directory {run_dir}"


def hostname(node_id: str, world: World | None) -> str:
    nodes = world.nodes if world else ()
    return next((node.hostname for node in nodes if node.node_id == node_id), node_id)


def failure_line(failure: Failure, world: World | None, max_cause: int = 2000) -> str:
    """One line: who, where, why (an exception's words up to `max_cause` characters), and the log that says more."""
    host = hostname(failure.node_id, world)
    match failure:
        case RankExited(rank=rank, stderr_log=log):
            return f"rank {rank} on {host} failed: {cause(failure, max_cause)}" + (f"; log {log}" if log else "")
        case RankHung(rank=rank, reason=reason):
            return f"rank {rank} on {host} hangs: {reason}" if rank is not None else f"the job hangs: {reason}"
        case NodeFailed(reason=reason):
            return f"node {host} failed: {reason}"
        case NodeLost(reason=reason):
            return f"node {host} lost: {reason}"


def failure_report(failure: Failure, world: World | None) -> str:
    """The failure's line, then its traceback, or the last words on standard error."""
    lines = [failure_line(failure, world)]
    if isinstance(failure, RankExited):
        details = failure.exception.traceback if failure.exception else failure.last_lines
        lines += [f"  {line}" for line in details.rstrip().splitlines()]
    return "\n".join(lines)


def collateral_report(root: Failure, is_new_root: bool, collateral: Sequence[Failure], world: World | None) -> str:
    """What else ended badly, in order of time: those that are only a consequence folded by why, the others one by one. Empty when there is
    nothing to add to the first report."""
    lines = []
    if is_new_root:
        lines.append(f"the root cause is an earlier failure: {failure_report(root, world)}")
    others = sorted(collateral, key=policy.happened_at_s)
    if others:
        lines.append("after that, as a consequence or on being stopped:")
        folded: dict[str, list[Failure]] = {}
        for failure in others:
            folded.setdefault(why_collateral(failure, root), []).append(failure)
        own = folded.pop("", [])
        lines += [f"  {_collateral_line(failure, root, world)}" for failure in own[:_MAX_COLLATERAL_LINES]]
        if len(own) > _MAX_COLLATERAL_LINES:
            lines.append(f"  … and {len(own) - _MAX_COLLATERAL_LINES} more (journal.jsonl has them all)")
        lines += [f"  {_folded_line(why, failures, root, world)}" for why, failures in folded.items()]
    return "\n".join(lines)


def _folded_line(why: str, failures: Sequence[Failure], root: Failure, world: World | None) -> str:
    """`ranks 0-6: lost its peer: …`, with the words of the first."""
    first = failures[0]
    where = f" on {hostname(first.node_id, world)}" if len(failures) == 1 else ""
    exception = first.exception if isinstance(first, RankExited) else None
    words = f": {exception_line(exception, _MAX_CAUSE)}" if exception else ""
    log = f"; log {first.stderr_log}" if isinstance(first, RankExited) and exception and first.stderr_log else ""
    return f"{some_ranks(sorted(ranks_of(failures)))}{where}: {why}{words}{log}{_after(first, root)}"


def ranks_of(failures: Sequence[Failure]) -> list[int]:
    return [failure.rank for failure in failures if isinstance(failure, RankExited)]


def _collateral_line(failure: Failure, root: Failure, world: World | None) -> str:
    return failure_line(failure, world, _MAX_CAUSE) + _after(failure, root)


def _after(failure: Failure, root: Failure) -> str:
    after_s = policy.happened_at_s(failure) - policy.happened_at_s(root)
    return f" ({after_s:+.2f} s)" if abs(after_s) < 1e6 else ""


def summary(exit_code: int, reason: str, duration_s: float, num_attempts: int, run_dir: str) -> str:
    """The last line: how it ended, after how long, and where everything lies."""
    attempts = f"{num_attempts} attempts" if num_attempts > 1 else "1 attempt" if num_attempts else "no attempt"
    if exit_code == 0:
        restarts = f", after {num_attempts - 1} restart{'s' if num_attempts > 2 else ''}" if num_attempts > 1 else ""
        return f"done in {duration(duration_s)}{restarts}"
    return f"exit code {exit_code}: {reason}; {attempts}, {duration(duration_s)}; run directory {run_dir}"


def duration(seconds: float) -> str:
    """
    >>> duration(4.21), duration(71), duration(90061)
    ('4.2 s', '1 min 11 s', '25 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def notice(event: Notices, world: World | None) -> str:
    """A sentence for something that does not move the gang."""
    match event:
        case PlacementWaiting(reason=reason, deadline_in_s=left_s):
            return f"waiting for nodes: {reason} (giving up in {duration(left_s)})"
        case CacheServing(already_running=already, resident_bytes=resident, capacity_bytes=capacity, node_id=node_id):
            how = "was already running" if already else "serves"
            held = f"{size(resident)} of {size(capacity)} filled"
            return f"cache {how} on {hostname(node_id, world)}: {held}"
        case CacheFailed(reason=reason, node_id=node_id):
            return f"no cache on {hostname(node_id, world)}, its ranks read the origin directly: {reason}"
        case FabricFound(severity=severity, id=id_, hosts=hosts, evidence=evidence, cure=cure):
            where = f" on {some(hosts)}" if hosts else ""
            return f"fabric: {severity.lower()} {id_}{where}: {evidence}. To do: {cure}"
        case Notice(text=text, node_id=node_id):
            return f"{hostname(node_id, world)}: {text}" if node_id else text


def some(names: Sequence[str], most: int = 4) -> str:
    """
    >>> some(["a", "b"]), some("abcdefg")
    ('a, b', 'a, b, c, d and 3 more')
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def size(size_bytes: float) -> str:
    """
    >>> size(0), size(100 * 2**20), size(1.5 * 2**40)
    ('0 B', '100 MiB', '1.5 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} TiB"
