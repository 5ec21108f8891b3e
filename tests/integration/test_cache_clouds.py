"""Google's and Azure's stores as S3's: cut bodies go on, Retry-After is kept to, refusals are named, new keys are used. Over a server that
speaks as much of their HTTP as reading takes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cache.blocks import BLOCK_BYTES
from cache.client import Cache
from cache.errors import AccessDenied, ObjectChanged, ObjectNotFound, OriginError, OriginThrottled
from cache.origin.plain_http import NotPlain, RangeConnection, refusal, request_bytes
from cache.origin.registry import close_origins, origin_for
from tests.counting_origin import CountingOrigin, Fault, random_bytes
from tests.daemon import CacheDaemon, cache_daemon, open_cache

__all__ = ["cache_daemon", "open_cache"]

OpenCache = Callable[[str], Cache]


@dataclass(frozen=True)
class Cloud:
    scheme: str
    folder: str
    """Where a bucket's keys are on the server."""
    origin: CountingOrigin

    def put(self, key: str, data: bytes) -> str:
        self.origin.put(f"{self.folder}/{key}", data)
        return f"{self.scheme}://bucket/{key}"


@pytest.fixture(scope="session")
def private_key() -> str:
    return subprocess.run(
        ["openssl", "genpkey", "-algorithm", "RSA"], check=True, capture_output=True, text=True
    ).stdout


def write_service_account(path: Path, origin: CountingOrigin, private_key: str) -> None:
    account = {"gcs_base_url": f"http://127.0.0.1:{origin.port}", "private_key": private_key, "private_key_id": "1"}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(account | {"type": "service_account", "client_email": "reader@lab.test"}))
    part.rename(path)


@pytest.fixture(params=["gs", "az", "az-sas"])
def cloud(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    counting_origin: CountingOrigin,
    private_key: str,
) -> Cloud:
    """Ask for it before the daemon, which gets its environment."""
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    if request.param == "gs":
        write_service_account(tmp_path / "account.json", counting_origin, private_key)
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        return Cloud("gs", "bucket", counting_origin)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "lab")
    monkeypatch.setenv("AZURE_ENDPOINT", f"http://127.0.0.1:{counting_origin.port}/lab")
    if request.param == "az":
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"k" * 64).decode())
    else:
        monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=2023-11-03&sp=r&sig=abc%3D")
    return Cloud("az", "lab/bucket", counting_origin)


def test_a_cut_body_goes_on_from_its_last_byte(cloud: Cloud, cache_daemon: CacheDaemon, open_cache: OpenCache) -> None:
    """Through obstore alone a cut answer was fetched again from its beginning."""
    data = random_bytes(8 * BLOCK_BYTES + 12_345)
    url, origin = cloud.put("a dir/o+1", data), cloud.origin
    origin.fault = lambda path, start, end: Fault(after_bytes=100_000) if end - start > 100_000 else None
    with open_cache(cache_daemon.socket).open(url) as f:
        assert f.read(0, len(data)) == data
    assert cache_daemon.status()["fetching"]["resumed_fetches"] > 0
    assert origin.bytes_sent == len(data), "what had come was not asked for again"


def test_what_a_store_says_of_waiting_is_heard(cloud: Cloud) -> None:
    """Through obstore alone nothing was known of Retry-After. (What comes of it: tests/cache/test_haste.py.)"""
    url = cloud.put("o", random_bytes(1000))
    cloud.origin.fault = lambda path, start, end: Fault(refuse=503, headers=(("Retry-After", "7"),))

    async def ask() -> OriginError | NotPlain:
        try:
            target = await origin_for(url).plain_target(url)
            assert target is not None
            connection = RangeConnection(target)
            head = connection.ask(request_bytes(target, '"e"', 0, 10), 5.0)
            connection.close()
            return refusal(url, head, b"", 0.0)
        finally:
            await close_origins()

    cloud.origin.etags[f"{cloud.folder}/o"] = '"e"'
    error = asyncio.run(ask())
    assert isinstance(error, OriginThrottled)
    assert error.retry_after_s == 7.0


def test_refusals_name_the_url_and_pass_when_their_cause_does(
    cloud: Cloud, cache_daemon: CacheDaemon, open_cache: OpenCache
) -> None:
    data = random_bytes(40 * BLOCK_BYTES)
    url, origin = cloud.put("o", data), cloud.origin
    cache = open_cache(cache_daemon.socket)
    with pytest.raises(ObjectNotFound, match=f"{cloud.scheme}://bucket/missing"):
        cache.open(f"{cloud.scheme}://bucket/missing")
    with cache.open(url) as f:
        origin.fault = lambda path, start, end: Fault(refuse=403)
        with pytest.raises(AccessDenied, match=url) as denied:
            f.read(0, 100)
        assert denied.value.advice
        origin.fault = lambda path, start, end: None
        assert f.read(0, 100) == data[:100]
        origin.put(f"{cloud.folder}/o", random_bytes(40 * BLOCK_BYTES, seed=1))
        with pytest.raises(ObjectChanged, match=url):
            f.read(30 * BLOCK_BYTES, 100)


def test_a_service_accounts_new_key_is_used_without_a_restart(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    counting_origin: CountingOrigin,
    private_key: str,
    open_cache: OpenCache,
) -> None:
    """A secret that is replaced in its mounted file: the first refusal has it read again."""
    path, accepted = tmp_path / "account.json", "old@lab.test"
    account = {"gcs_base_url": f"http://127.0.0.1:{counting_origin.port}", "private_key": private_key}
    account |= {"type": "service_account", "private_key_id": "1"}
    path.write_text(json.dumps(account | {"client_email": "old@lab.test"}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(path))
    data = random_bytes(40 * BLOCK_BYTES)
    counting_origin.put("bucket/o", data)
    signers: list[str] = []

    def check(path: str, start: int, end: int) -> Fault | None:
        signer = counting_origin.query.get("X-Goog-Credential", [""])[0].partition("/")[0]
        signers.append(signer)
        return None if signer == accepted else Fault(refuse=403)

    with CacheDaemon() as daemon, open_cache(daemon.socket).open("gs://bucket/o") as f:
        counting_origin.fault = check
        assert f.read(0, 100) == data[:100]
        accepted = "new@lab.test"
        path.write_text(json.dumps(account | {"client_email": "new@lab.test"}))
        assert f.read(30 * BLOCK_BYTES, 100) == data[30 * BLOCK_BYTES :][:100]
    assert signers[0] == "old@lab.test"
    assert signers[-1] == "new@lab.test"
