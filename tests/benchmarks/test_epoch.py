"""The epoch benchmark's judge and page: a benchmark that cannot see wrong bytes proves nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.epoch import Plan
from benchmarks.epoch_bound import Epoch
from benchmarks.epoch_data import Dataset, load, sample, write_tars
from benchmarks.epoch_report import render
from benchmarks.epoch_trial import Audit


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("epoch")
    return write_tars(Dataset(f"file://{directory}/store", str(directory / "local"), 24, 1000, 10))


def audited(dataset: Dataset, batches: Iterable[torch.Tensor]) -> str:
    audit = Audit(dataset)
    for batch in batches:
        audit.take(batch)
    return audit.verdict()


def test_the_audit_sees_wrong_missing_and_repeated_samples(dataset: Dataset) -> None:
    samples = [sample(number, dataset.sample_bytes) for number in range(24)]
    assert audited(dataset, [peers.stack(samples[:10]), peers.stack(samples[10:])]) == "ok"
    flipped = samples[3][:-1] + bytes([samples[3][-1] ^ 1])
    assert audited(dataset, [peers.stack([*samples[:3], flipped, *samples[4:]])]) == "1 wrong, 1 missing"
    assert audited(dataset, [peers.stack([*samples[:-1], samples[0]])]) == "1 missing, 1 repeated"


def test_a_dataset_survives_its_description(dataset: Dataset, tmp_path: Path) -> None:
    """Trials are other processes and get the dataset as a file."""
    dataset.save(tmp_path / "dataset.json")
    assert load(tmp_path / "dataset.json") == dataset


@pytest.mark.parametrize("name", ["memory", "local_files", "local_mmap", "railhead"])
def test_a_loader_hands_out_every_sample_once_in_each_epoch(
    dataset: Dataset, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in another order each time: a loader that does not shuffle has an easier life."""
    monkeypatch.delenv("RAILHEAD_CACHE_SOCKET", raising=False)
    module: Any = peers.module_of(name)
    loader: peers.Loader = module.open_loader(peers.Task(dataset, num_workers=0, batch_size=4, scratch=tmp_path))
    epochs = [[batch.clone() for batch in loader.epoch(number)] for number in range(2)]
    loader.close()
    assert [audited(dataset, epoch) for epoch in epochs] == ["ok", "ok"]
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_the_page_shows_goals_medians_spreads_failures_and_what_was_left_out() -> None:
    def result(loader: str, demand: str, utilisation: float, verdict: str = "ok") -> dict[str, Any]:
        epoch = {"first_batch_s": 1.0, "samples_per_s": 100.0, "cpu_s": 1.0, "daemon_cpu_s": 0.5, "origin_bytes": 2e6}
        epoch |= {"utilisation": utilisation, "verdict": verdict, "elapsed_s": 4.0}
        return {"loader": loader, "num_workers": 0, "demand": demand, "cold": epoch, "warm": epoch, "bare": epoch}

    plan = Plan(loaders=("memory", "railhead", "s3fs", "litdata"), workers=(0,), demands=("half", "none"))
    ours = [
        result("railhead", "half", 0.4),
        result("railhead", "half", 0.8),
        result("railhead", "half", 0.6, "1 wrong"),
    ]
    none = result("railhead", "none", 0.0)
    failed = {"loader": "s3fs", "num_workers": 0, "demand": "half", "error": "it hung"}
    page = render(plan, [*ours, none, result("memory", "half", 0.8), failed], {"litdata": "not here"}, "run it")
    assert "| cold, half: busy ÷ in-memory loader | ≥ 0.99 | 0.98 | 0.97 | 0.75 |" in page
    assert f"| cold, no step: share of the link | ≥ 0.95 | 0.97 | 0.96 | {2720 * 192 * 1024 / 4 / 200e6:.2f} |" in page
    assert "| cold, tight: busy ÷ local files | ≥ 0.97 | 0.96 | 0.77 | – |" in page
    assert "60.0% [40.0%–80.0%]" in page
    assert "cold: 1 wrong; warm: 1 wrong" in page
    assert "failed: it hung" in page
    assert "litdata: left out, not here" in page
    assert "`run it`" in page


def test_the_bound_of_arithmetic_holds_what_can_be_said_by_hand() -> None:
    """Without steps an epoch takes three answers and its bytes; with steps, blocks bring too early what is needed late."""
    epoch = Epoch(640, 192 * 1024, 160, 16, first_byte_s=0.03, rate_total=200e6, seed=3)
    by_bytes, by_blocks = epoch.bound(0.0, 4096), epoch.bound(0.0, 256 * 1024)
    assert by_bytes.elapsed_s == pytest.approx(0.09 + 640 * 192 * 1024 / 200e6, rel=0.03)
    assert by_bytes.first_batch_s < by_blocks.first_batch_s
    tight = 16 * 192 * 1024 / (0.95 * 200e6)
    assert epoch.bound(tight, 256 * 1024).busy < epoch.bound(tight, 4096).busy < 1
