"""What the test command makes of failures."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import second_look

ONCE = """
from pathlib import Path
import pytest
@pytest.mark.xdist_group("a_group")
@pytest.mark.parametrize("number", range({failing}))
def test_passes_the_second_time(number):
    seen = Path(__file__).with_name(f"seen-{{number}}")
    first = not seen.exists()
    seen.touch()
    assert not first or {always}
def test_passes():
    assert {always} in (True, False)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(second_look, "ROOT", tmp_path)
    monkeypatch.setattr(second_look, "LAST_FAILED", tmp_path / ".pytest_cache/v/cache/lastfailed")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_a_test_that_passes_alone_is_named_and_does_not_fail_the_run(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A neighbour that took the processor must not refuse a sound change, and must not go unnoticed."""
    (project / "test_it.py").write_text(ONCE.format(failing=1, always=False))
    assert second_look.main([]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == (
        "Passed only alone, to be mended all the same: test_it.py::test_passes_the_second_time[0]"
    )


def test_a_test_that_fails_again_fails_the_run(project: Path) -> None:
    (project / "test_it.py").write_text("def test_fails():\n    assert False\n")
    assert second_look.main([]) == 1


def test_many_failures_are_not_looked_at_again(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Four failures at once are no noise."""
    (project / "test_it.py").write_text(ONCE.format(failing=second_look.MOST + 1, always=False))
    assert second_look.main([]) == 1
    assert "second look" not in capfd.readouterr().out


def test_failures_of_an_earlier_run_are_forgotten(project: Path) -> None:
    (project / "test_it.py").write_text("def test_passes():\n    pass\n")
    second_look.LAST_FAILED.parent.mkdir(parents=True)
    second_look.LAST_FAILED.write_text('{"test_gone.py::test_old": true}')
    assert second_look.main([]) == 0


def test_wrong_arguments_are_told_as_pytest_tells_them(project: Path) -> None:
    assert (
        second_look.main(["--no-such-option"])
        == subprocess.run(
            [sys.executable, "-m", "pytest", "--no-such-option"], cwd=project, capture_output=True
        ).returncode
    )
