"""What a person can ask of a running daemon: ls, verify, pin, evict, resize, a live status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cache.blocks import FETCH_BYTES
from cache.client import Cache
from tests.counting_origin import CountingOrigin, random_bytes
from tests.daemon import CacheDaemon, wait_until
from tests.integration.test_cache_serving import run_cache

OpenCache = Callable[[str], Cache]
MIB = 2**20


def ask(daemon: CacheDaemon, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cache(command, *arguments, "--socket", daemon.socket)


def shards(folder: Path, count: int, size: int = FETCH_BYTES) -> Path:
    folder.mkdir()
    for idx in range(count):
        (folder / f"shard-{idx}").write_bytes(random_bytes(size + idx, idx))
    return folder


def test_ls_shows_what_is_here_also_after_a_restart(cache_daemon: CacheDaemon, tmp_path: Path) -> None:
    data = shards(tmp_path / "data", 3)
    assert ask(cache_daemon, "preload", str(data)).returncode == 0
    cache_daemon.kill()
    cache_daemon.start()
    listed = ask(cache_daemon, "ls", "--json")
    objects = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(o["url"].rpartition("/")[2], o["on_disk_bytes"]) for o in objects] == [
        (f"shard-{idx}", FETCH_BYTES + idx) for idx in range(3)
    ]
    for_people = ask(cache_daemon, "ls", str(data / "shard-1"))
    assert for_people.returncode == 0 and "100%" in for_people.stdout and for_people.stdout.count("shard-") == 1
    assert "1 object, 4 MiB of their 4 MiB here" in for_people.stderr


def test_verify_finds_what_rotted_before_anybody_read_it(
    counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """After a restart nothing has been opened: verify must read the tables itself, else it would call everything sound. (Without the scrub
    in the background, which may come first.)"""
    with CacheDaemon(options=("--scrub-rate", "0")) as daemon:
        _verify_finds(daemon, counting_origin, open_cache)


def _verify_finds(cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache) -> None:
    data = {f"o{idx}": random_bytes(2 * FETCH_BYTES, idx) for idx in range(3)}
    for name, content in data.items():
        assert open_cache(cache_daemon.socket).open(counting_origin.put(name, content)).fetch()
    cache_daemon.kill()
    cache_daemon.start()
    sound = ask(cache_daemon, "verify", "--json")
    assert sound.returncode == 0 and json.loads(sound.stdout)["verified_bytes"] == 6 * FETCH_BYTES
    cache_daemon.kill()
    _flip(cache_daemon.extent_files[0])
    cache_daemon.start()
    rotten = ask(cache_daemon, "verify")
    assert rotten.returncode == 1 and rotten.stdout.count("ROTTEN") == 1 and "1 rotten: discarded" in rotten.stdout
    assert ask(cache_daemon, "verify").returncode == 0, "it was discarded"
    wait_until(lambda: open_cache(cache_daemon.socket).daemon_status() is not None, "the daemon is found again")
    for name, content in data.items():
        with open_cache(cache_daemon.socket).open(counting_origin.url(name)) as obj:
            assert obj.read(0, len(content)) == content


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(FETCH_BYTES + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_reads_a_directory_without_a_daemon_and_changes_it_only_if_asked(
    counting_origin: CountingOrigin, tmp_path: Path
) -> None:
    """A disk that is suspected is looked at before anybody is served from it; what `--repair` discards is fetched again, and no more."""
    data = {f"o{idx}": random_bytes(2 * FETCH_BYTES, idx) for idx in range(3)}
    with CacheDaemon() as daemon:
        with Cache(daemon.socket) as cache:
            for name, content in data.items():
                assert cache.open(counting_origin.put(name, content)).fetch()
        where = ("--dir", str(daemon.dir))
        assert json.loads(run_cache("verify", "--json", *where).stdout)["is_sound"], "by the daemon, which serves it"
        daemon.stop()
        assert run_cache("verify", *where).stdout == "sound: 24 MiB in 3 objects\n"
        flipped, cut, _ = daemon.extent_files
        _flip(flipped)
        os.truncate(cut, 5)
        before = {path: path.read_bytes() for path in daemon.extent_files}
        for _ in range(2):
            found = run_cache("verify", *where)
            assert found.returncode == 1 and found.stdout.count("left as it is") == 2 and "--repair" in found.stdout
        assert {path: path.read_bytes() for path in daemon.extent_files} == before
        repaired = run_cache("verify", "--repair", "--json", *where)
        assert repaired.returncode == 1 and len(json.loads(repaired.stdout)["rotten"]) == 2
        assert run_cache("verify", *where).returncode == 0
        gets = counting_origin.num_gets
        daemon.start()
        with Cache(daemon.socket) as cache:
            for name, content in data.items():
                with cache.open(counting_origin.url(name)) as obj:
                    assert obj.read(0, len(content)) == content
        assert counting_origin.num_gets - gets == 3, "one block, and one file of two runs"
    assert "holds no cache" in run_cache("verify", "--dir", str(tmp_path)).stderr


def test_pins_hold_against_others_and_over_a_restart(tmp_path: Path) -> None:
    keep, others = shards(tmp_path / "keep", 2), shards(tmp_path / "others", 6)
    with CacheDaemon(capacity="20MiB") as daemon:
        assert ask(daemon, "preload", str(keep)).returncode == 0
        assert "pinned; 8 MiB of 2 objects here now" in ask(daemon, "pin", str(keep)).stdout
        daemon.kill()
        daemon.start()
        assert daemon.status()["pins"] == [f"file://{keep}"]
        for idx in range(6):
            assert ask(daemon, "preload", str(others / f"shard-{idx}")).returncode == 0
        assert daemon.status()["counters"]["evicted_extents"] >= 4
        names = [json.loads(line)["url"] for line in ask(daemon, "ls", "--json", str(keep)).stdout.splitlines()]
        assert len(names) == 2, "used longest ago, and still here"
        stays = ask(daemon, "evict", str(keep))
        assert stays.returncode == 1 and "unpin first" in stays.stdout
        assert ask(daemon, "unpin", str(keep)).returncode == 0
        assert ask(daemon, "unpin", str(keep)).returncode == 1, "it was not pinned any more"
        gone = ask(daemon, "evict", str(keep))
        assert gone.returncode == 0 and "2 objects evicted" in gone.stdout


READER = """
import sys
from cache.client import Cache
cache = Cache(sys.argv[1])
views = [cache.open(url).view(0, 10) for url in sys.argv[2:]]
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_capacity_changed_while_running_is_kept_from_then_on(tmp_path: Path, open_cache: OpenCache) -> None:
    """Also with readers that hold what has to go: nothing new is written until they have let go, and their reads go on."""
    data = shards(tmp_path / "data", 6)
    urls = [str(data / f"shard-{idx}") for idx in range(6)]
    with CacheDaemon(capacity="64MiB") as daemon:
        assert ask(daemon, "preload", str(data)).returncode == 0
        command = [sys.executable, "-c", READER, daemon.socket, *urls[:4]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None and reader.stdout.readline() == b"holding\n"
            cache = open_cache(daemon.socket)
            answer = cache.ask_daemon({"op": "resize", "capacity_bytes": 10 * MIB, "max_files": None})
            assert answer["before_bytes"] == 64 * MIB
            status = daemon.status()
            assert status["capacity_bytes"] == 10 * MIB and 0 < status["used_bytes"] - status["held_bytes"] <= 10 * MIB
            for url in urls:
                with cache.open(url) as obj:
                    assert obj.read(0, 100) == Path(url).read_bytes()[:100], "past the daemon, where there is no room"
                assert daemon.disk_bytes(with_held=False) <= 10 * MIB
                assert daemon.status()["used_bytes"] <= max(10 * MIB, status["used_bytes"]), "nothing is made beside"
            reader.kill()
        shown = ask(daemon, "resize", "--capacity", "10MiB", "--max-files", "1")
        assert shown.returncode == 0 and "the capacity is 10 MiB now" in shown.stdout
        for url in urls:
            assert cache.open(url).read(0, 100) == Path(url).read_bytes()[:100]
            assert daemon.disk_bytes() <= 10 * MIB and len(daemon.extent_files) <= 1
        assert ask(daemon, "resize", "--capacity", "100GB").returncode == 0
        assert ask(daemon, "resize", "--capacity", "1kB").returncode == 2


def test_a_live_status_tells_readers_apart_and_ends_with_its_reader(
    cache_daemon: CacheDaemon, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    cache = open_cache(cache_daemon.socket)
    obj = cache.open(counting_origin.put("o", random_bytes(1000)))
    command = [sys.executable, "-m", "cache", "status", "--watch", "0.2", "--socket", cache_daemon.socket]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        obj.read(0, 10)
        cache.daemon_status()
        seen = ""
        while (
            "order unknown 0" not in seen.replace("order unknown 1", "order unknown 0")
            or f"pid {os.getpid()}" not in seen
        ):
            obj.read(0, 10)
            cache.daemon_status()
            line = watching.stdout.readline()
            assert line, "it ended by itself"
            seen += line
            if "waited" in line and "hit ratio" in line:
                break
        watching.terminate()
        watching.communicate(timeout=30)
    assert "readers got" in seen and f"pid {os.getpid()}" in seen
