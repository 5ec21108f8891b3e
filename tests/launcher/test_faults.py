"""The catalogue of faults, run for real: whatever happens to a rank, the first line says who, where, why and where to read on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_catalogue import CATALOGUE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_the_catalogue_is_large_and_every_fault_has_a_name() -> None:
    assert len({fault.name for fault in CATALOGUE}) == len(CATALOGUE) >= 40


def test_every_fault_is_named(tmp_path: Path) -> None:
    """All are attempts of one job, so that they share its fork server; hence one test, which lists what is wrong."""
    wrong = [
        f"{found.fault.name}: {'; '.join(found.wrong)}: {found.line}" for found in faults.run(tmp_path) if found.wrong
    ]
    assert not wrong, "\n".join(wrong)
