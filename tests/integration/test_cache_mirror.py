"""`preload --as-files`: a prefix as real files, whole or not there, resumed without fetching anything twice, with a true exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cache.errors import CacheConfigError
from cache.mirror import OWN_FOLDER, RANGE_BYTES, mirror, relative_path
from cache.preload import PreloadResult
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import wait_until
from tests.integration.test_cache_serving import run_cache

DATA = {"0.tar": random_bytes(2 * RANGE_BYTES + 5), "deep/1.tar": random_bytes(1000, 1), "empty": b""}


def a_prefix(folder: Path) -> Path:
    for name, content in DATA.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and OWN_FOLDER not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_prefix_becomes_a_directory_and_the_second_time_nothing_is_fetched(tmp_path: Path) -> None:
    source, target = a_prefix(tmp_path / "source"), tmp_path / "target"
    first = run_cache("preload", str(source), "--as-files", str(target), "--json")
    assert first.returncode == 0, first.stderr
    assert files_in(target) == DATA and json.loads(first.stdout)["verified_bytes"] == sum(map(len, DATA.values()))
    assert [path.name for path in (target / OWN_FOLDER).iterdir()] == ["done.jsonl"]
    (target / "deep/1.tar").write_bytes(random_bytes(1000, 2))
    (source / "new").write_bytes(b"new")
    again = json.loads(run_cache("preload", str(source), "--as-files", str(target), "--json").stdout)
    assert again["is_complete"] and again["origin_bytes"] == 1003, "what had been changed here, and what is new"
    assert files_in(target) == DATA | {"new": b"new"}


def test_killed_in_the_middle_it_goes_on_with_the_ranges_that_are_here(
    counting_origin: CountingOrigin, tmp_path: Path
) -> None:
    data = random_bytes(3 * RANGE_BYTES)
    url = counting_origin.put("o", data)
    counting_origin.hold("o", from_byte=2 * RANGE_BYTES)
    command = [sys.executable, "-m", "cache", "preload", url, "--as-files", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stopped:
        wait_until(
            lambda: sum(p.stat().st_size for p in tmp_path.glob(f"{OWN_FOLDER}/*.ranges")) == 16, "two ranges are here"
        )
        stopped.kill()
    assert files_in(tmp_path) == {}, "half a file is never seen as one"
    counting_origin.release()
    (ranges,) = tmp_path.glob(f"{OWN_FOLDER}/*.ranges")
    with ranges.open("ab") as torn:
        torn.write(b"abc")
    done = json.loads(run_cache("preload", url, "--as-files", str(tmp_path), "--json").stdout)
    assert done["is_complete"] and done["origin_bytes"] == RANGE_BYTES
    assert files_in(tmp_path) == {"o": data}


def test_an_object_overwritten_while_it_is_copied_fails_by_name_and_never_becomes_a_file(
    counting_origin: CountingOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.mirror.RANGE_BYTES", 50_000)
    url = counting_origin.put("o", random_bytes(500_000))
    counting_origin.hold("o", from_byte=50_000)
    results: list[PreloadResult] = []
    running = threading.Thread(target=lambda: results.append(mirror(url, tmp_path, jobs=2, verify=True)))
    running.start()
    wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob(f"{OWN_FOLDER}/*.ranges")), "a range is here")
    counting_origin.put("o", random_bytes(500_000, 9))
    counting_origin.release()
    running.join()
    (result,) = results
    assert not result.is_complete and list(result.failures) == [url]
    assert files_in(tmp_path) == {}
    assert mirror(url, tmp_path, jobs=2, verify=True).is_complete
    assert files_in(tmp_path) == {"o": random_bytes(500_000, 9)}


def test_a_file_of_somebody_else_is_left_alone_and_said(tmp_path: Path) -> None:
    source, target = a_prefix(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    (target / "0.tar").write_text("mine")
    result = run_cache("preload", str(source), "--as-files", str(target))
    assert result.returncode == 1 and "was not made by preload" in result.stdout and "INCOMPLETE" in result.stdout
    assert files_in(target) == DATA | {"0.tar": b"mine"}


def test_what_cannot_be_a_path_is_refused() -> None:
    """A key is any text: `../../etc/passwd` must not become a path."""
    for key in ("../x", "a/../../x", "a//b", f"{OWN_FOLDER}/done.jsonl"):
        with pytest.raises(CacheConfigError):
            relative_path("s3://b/p", f"s3://b/p/{key}")
