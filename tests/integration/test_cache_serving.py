"""The daemon as a program: its start, its end, its door and its account of itself; and the preload's true exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.blocks import FETCH_BYTES
from cache.client import Cache
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until

OpenCache = Callable[[str], Cache]
DATA = random_bytes(2 * FETCH_BYTES + 5)


def run_cache(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_sigterm_ends_it_with_readers_connected_and_waiting(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """2 s is what the launcher and Kubernetes are promised; a little more is granted to a busy machine."""
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", DATA))
    obj.read(0, 10)
    counting_origin.hold("p")
    cache.open(counting_origin.put("p", DATA)).prefetch()
    wait_until(lambda: cache_daemon.status()["in_flight_blocks"] > 0, "something is under way")
    workers = cache_daemon.worker_pids()
    assert cache_daemon.stop() == 0
    assert not Path(cache_daemon.socket).exists()
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)
    assert obj.read(0, 100) == DATA[:100]


def test_a_second_daemon_on_a_directory_says_who_serves_it(cache_daemon: CacheDaemon) -> None:
    other = str(cache_daemon.root / "other")
    result = run_cache("serve", "--dir", str(cache_daemon.dir), "--capacity", "64MiB", "--socket", other, "--announce")
    assert result.returncode == 0
    said = json.loads(result.stdout)
    assert (said["already_running"], said["pid"], said["socket"]) == (True, cache_daemon.pid, cache_daemon.socket)
    assert not Path(other).exists() and cache_daemon.status()
    assert "its capacity is" in result.stderr and "64 MiB was asked for" in result.stderr


def test_a_socket_that_a_living_program_has_is_left_alone(tmp_path: Path) -> None:
    """It may be anything: a Docker socket, a frozen daemon."""
    folder = Path(os.path.relpath(tmp_path)) if len(str(tmp_path)) > 80 else tmp_path
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as program:
        program.bind(str(path))
        program.listen()
        result = run_cache("serve", "--dir", str(tmp_path / "c"), "--capacity", "64MiB", "--socket", str(path))
        assert result.returncode == 2 and "another program listens" in result.stderr
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_socket_that_a_dead_daemon_left_is_replaced(cache_daemon: CacheDaemon) -> None:
    cache_daemon.kill()
    assert Path(cache_daemon.socket).exists()
    assert cache_daemon.start().announced["already_running"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capacity", "64MiB", "--socket", "/tmp/" + "x" * 110], "the kernel allows 107"),
        (["--capacity", "64 apples"], "is not a number of bytes"),
        (["--capacity", "1MiB"], "too small"),
        (["--capacity", "64MiB", "--metrics", "nonsense"], "is not an address"),
        (["--capacity", "64MiB", "--socket", "/proc/version"], "is not a socket"),
    ],
)
def test_a_wrong_configuration_is_said_in_a_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run_cache("serve", "--dir", str(tmp_path / "c"), *arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_only_this_user_can_connect_and_look(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    assert open_cache(cache_daemon.socket).open(counting_origin.put("o", DATA)).fetch()
    paths = [Path(cache_daemon.socket), cache_daemon.dir / "extents", *cache_daemon.extent_files]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths} == {0}


def test_the_metrics_page_counts_what_happened(counting_origin: CountingOrigin, open_cache: OpenCache) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with CacheDaemon(options=("--metrics", f"127.0.0.1:{port}")) as daemon:
        cache = open_cache(daemon.socket)
        with cache.open(counting_origin.put("o", DATA)) as obj:
            obj.read(0, len(DATA))
            obj.read(0, 10)
        cache.close()
        wait_until(lambda: daemon.status()["readers"].get("hits", 0) > 0, "the reader's account has come")
        page = _get(port, "/metrics")
        samples = dict(re.findall(r"^(\w+) ([0-9.e+]+)$", page, re.MULTILINE))
        assert float(samples["railhead_cache_demand_fetches_total"]) == 3
        assert float(samples["railhead_cache_fetched_bytes_total"]) == len(DATA)
        assert float(samples["railhead_cache_reader_hits_total"]) >= 1
        assert float(samples["railhead_cache_capacity_bytes"]) == 256 * 2**20
        assert all(line.startswith("#") or re.fullmatch(r"\w+(\{.*\})? \S+", line) for line in page.splitlines())
        assert _get(port, "/healthz") == "ok\n"
        assert json.loads(_get(port, "/status"))["counters"]["demand_fetches"] == 3


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_status_speaks_to_people_and_to_programs(cache_daemon: CacheDaemon) -> None:
    as_json = run_cache("status", "--socket", cache_daemon.socket, "--json")
    assert as_json.returncode == 0 and json.loads(as_json.stdout)["capacity_bytes"] == 256 * 2**20
    page = run_cache("status", "--dir", str(cache_daemon.dir))
    assert page.returncode == 0 and "0 B of 256 MiB" in page.stdout
    cache_daemon.kill()
    gone = run_cache("status", "--socket", cache_daemon.socket)
    assert gone.returncode == 3 and "no cache daemon answers" in gone.stderr


def test_a_complete_preload_is_resident_verified_and_exits_with_0(cache_daemon: CacheDaemon, tmp_path: Path) -> None:
    for idx in range(3):
        (tmp_path / f"shard-{idx}").write_bytes(random_bytes(FETCH_BYTES + idx, idx))
    result = run_cache("preload", str(tmp_path), "--socket", cache_daemon.socket, "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["is_complete"] and said["verified_bytes"] == said["total_bytes"] == 3 * FETCH_BYTES + 3
    again = json.loads(run_cache("preload", str(tmp_path), "--socket", cache_daemon.socket, "--json").stdout)
    assert again["is_complete"] and again["origin_bytes"] == 0, "the second one takes nothing from the origin"


def test_what_the_origin_no_longer_has_can_be_evicted(cache_daemon: CacheDaemon, tmp_path: Path) -> None:
    """Data that was deleted or made private is what one most wants to be rid of."""
    data = tmp_path / "data"
    data.mkdir()
    for idx in range(2):
        (data / f"shard-{idx}").write_bytes(random_bytes(1000, idx))
    assert run_cache("preload", str(data), "--socket", cache_daemon.socket).returncode == 0
    (data / "shard-0").unlink()
    (data / "shard-1").unlink()
    gone = run_cache("evict", str(data), "--socket", cache_daemon.socket)
    assert gone.returncode == 0 and "2 objects evicted" in gone.stdout, gone
    assert cache_daemon.status()["used_bytes"] == 0
    again = run_cache("evict", str(data), "--socket", cache_daemon.socket)
    assert "not here" in again.stdout


def test_a_preload_says_what_is_missing_or_too_big(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(random_bytes(3 * FETCH_BYTES))
    with CacheDaemon(capacity="10MiB") as daemon:
        missing = run_cache("preload", str(tmp_path / "nothing"), "--socket", daemon.socket)
        assert missing.returncode == 1 and "nothing" in missing.stderr and "Traceback" not in missing.stderr
        too_big = run_cache("preload", str(tmp_path), "--socket", daemon.socket)
        assert too_big.returncode == 1 and "capacity is 10 MiB" in too_big.stderr
        assert daemon.status()["counters"]["fetched_blocks"] == 0, "half of it would help nobody"


def start_preload(daemon: CacheDaemon, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cache", "preload", url, "--socket", daemon.socket],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_preload_whose_daemon_dies_is_incomplete(cache_daemon: CacheDaemon, counting_origin: CountingOrigin) -> None:
    url = counting_origin.put("o", DATA)
    counting_origin.hold("o", from_byte=FETCH_BYTES)
    with start_preload(cache_daemon, url) as preload:
        wait_until(lambda: cache_daemon.status()["waiting_requests"] > 0, "the preload waits")
        cache_daemon.kill()
        output, errors = preload.communicate(timeout=60)
    assert preload.returncode == 1 and "INCOMPLETE" in output, errors


def test_ctrl_c_ends_a_preload_that_waits_for_a_slow_origin(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin
) -> None:
    url = counting_origin.put("o", DATA)
    counting_origin.hold("o")
    with start_preload(cache_daemon, url) as preload:
        wait_until(lambda: cache_daemon.status()["waiting_requests"] > 0, "the preload waits")
        preload.send_signal(signal.SIGINT)
        try:
            _, errors = preload.communicate(timeout=15)
        finally:
            preload.kill()
    assert preload.returncode == 130 and "Traceback" not in errors
    assert counting_origin.num_gets == 0, "it ended before the origin answered"


def test_fsspec_readers_read_through_the_cache(
    cache_daemon: CacheDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("RAILHEAD_CACHE_SOCKET", cache_daemon.socket)
    table = pa.table({"x": list(range(10_000)), "y": [f"row {i}" for i in range(10_000)]})
    pq.write_table(table, tmp_path / "t.parquet")
    with fsspec.open(f"nodecache::file://{tmp_path}/t.parquet") as file:
        assert pq.read_table(file).equals(table)
    assert cache_daemon.status()["counters"]["fetched_blocks"] == 1
    Cache(cache_daemon.socket).close()
