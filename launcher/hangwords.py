"""What is said of ranks that hold up a job, as pure text."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.gang.diagnosis import Diagnosis, Kind
from launcher.gang.health import GivenUp, GoesOn, Named, Noticed
from launcher.gang.stragglers import Straggling
from launcher.gang.world import World
from launcher.spec import OnHang

_MAX_GROUPS = 4
_MAX_FRAMES = 4


def named(finding: Named, world: World, stacks: str, on_hang: OnHang) -> str:
    """Who holds up the job, where everybody stands, what will become of it."""
    lines = [
        f"{_matter(finding.diagnosis, world)}; nothing has moved for {finding.quiet_s:.0f} s (limit {finding.limit_s:.0f} s)"
    ]
    for frames, ranks in finding.groups[:_MAX_GROUPS]:
        lines.append(f"  {ranks_text(ranks)}: {' ← '.join(frames[:_MAX_FRAMES])}")
    if len(finding.groups) > _MAX_GROUPS:
        rest = sum(len(ranks) for _, ranks in finding.groups[_MAX_GROUPS:])
        lines.append(f"  … and {rest} more ranks elsewhere")
    lines.append(f"  stacks of all threads: {stacks}")
    if on_hang is OnHang.REPORT:
        lines.append("  the job is left alone (--on-hang report)")
    elif finding.gives_up_in_s is None:
        lines.append("  the job is left alone, for it may be at work (--hang-timeout SECONDS sets a limit)")
    elif finding.gives_up_in_s > 0:
        lines.append(
            f"  given up in {finding.gives_up_in_s:.0f} s if nothing changes (--hang-timeout, --on-hang {on_hang.value})"
        )
    return "\n".join(lines)


def noticed(finding: Noticed, world: World) -> str:
    """A line: who computes, where, and that this is no alarm."""
    culprits = finding.diagnosis.culprits
    computes, them = ("compute", "them") if len(culprits) > 1 else ("computes", "it")
    others = world.world_size - len(culprits)
    wait = "others wait" if others > 1 else "other waits"
    where = " ← ".join(finding.where[:_MAX_FRAMES])
    return (
        f"{ranks_text(culprits)} {_on_hosts(culprits, world)} {computes} in one place, and {others} {wait} for {them} since "
        f"{finding.quiet_s:.0f} s: {where} (called a hang after {finding.named_at_s:.0f} s)"
    )


def _on_hosts(culprits: Sequence[int], world: World) -> str:
    hosts = sorted({world.member(rank).node.hostname for rank in culprits})
    return f"on {hosts[0]}" if len(hosts) == 1 else f"on {len(hosts)} nodes"


def _matter(diagnosis: Diagnosis, world: World) -> str:
    kind, culprits, is_certain = diagnosis.kind, diagnosis.culprits, diagnosis.is_certain
    if kind is Kind.ALL_WAIT:
        return f"all {world.world_size} ranks wait for each other"
    if kind is Kind.STILL:
        return f"all {world.world_size} ranks {kind.value}"
    if not culprits:
        return "all ranks are quiet together, and nobody stands out"
    who = f"{ranks_text(culprits)} {_on_hosts(culprits, world)}"
    others = world.world_size - len(culprits)
    pronoun = "it" if len(culprits) == 1 else "them"
    waits = f", and {others} other{'s wait' if others > 1 else ' waits'} for {pronoun}" if others and is_certain else ""
    words = kind.value if len(culprits) == 1 else _PLURAL[kind]
    return f"{who} {words}{waits}"


_PLURAL = {
    Kind.FROZEN: "are stopped (state T: SIGSTOP)",
    Kind.SPINNING: "spin in one place",
    Kind.AWAY: "stay in one place that is no collective",
    Kind.DEVICE: "wait for a disk or a file system (state D)",
    Kind.DATA: "wait for their data loaders",
    Kind.FETCHING: "wait for their data loaders, which are at work",
    Kind.ASTRAY: "wait in other places than most",
    Kind.STILL: "stand still",
    Kind.IMPORTING: "are stuck in an import",
    Kind.GONE: "have ended",
    Kind.WORKING: "are at work elsewhere",
    Kind.QUIET: "are quiet",
    Kind.ALL_WAIT: "wait for each other",
}


def given_up(finding: GivenUp, world: World) -> str:
    """The reason of the failure: `spins in one place, and 3 others wait for it, for 300 s`."""
    kind, culprits = finding.diagnosis.kind, finding.diagnosis.culprits
    if not culprits:
        return f"{_matter(finding.diagnosis, world)}, for {finding.quiet_s:.0f} s"
    others = world.world_size - len(culprits) if finding.diagnosis.is_certain else 0
    words = kind.value if len(culprits) == 1 else f"{_PLURAL[kind]} (with {ranks_text(culprits[1:])})"
    waits = f", {others} other{'s wait' if others > 1 else ' waits'}" if others else ""
    place = f": {finding.place}" if finding.place else ""
    return f"{words}{place}{waits}, for {finding.quiet_s:.0f} s"


def goes_on(finding: GoesOn, world: World) -> str:
    who = ranks_text(finding.diagnosis.culprits) if finding.diagnosis.culprits else "the job"
    goes = "go" if len(finding.diagnosis.culprits) > 1 else "goes"
    return f"{who} {goes} on after {finding.quiet_s:.0f} s; so long is not taken for a hang again"


def straggling(finding: Straggling, world: World) -> str:
    host = world.member(finding.rank).node.hostname
    if finding.has_ended:
        return f"rank {finding.rank} on {host} keeps up with the others again"
    why = ", most of it waiting for data" if finding.is_data else ""
    lost = 100 * (finding.own_s - finding.others_s) / finding.step_s
    return (
        f"rank {finding.rank} on {host} makes the others wait: {1000 * finding.own_s:.0f} ms of its own in each step{why}, "
        f"the others {1000 * finding.others_s:.0f} ms; about {lost:.0f} % of each step is lost to it"
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """
    >>> ranks_text([3]), ranks_text([0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
