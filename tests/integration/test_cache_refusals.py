"""What the store refuses: each an error that names the url and what to do, at once; and keys that are replaced while the daemon runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.blocks import BLOCK_BYTES
from cache.errors import AccessDenied, CacheError, ObjectNotFound, OriginMisconfigured
from tests.counting_origin import random_bytes
from tests.daemon import CacheDaemon
from tests.fakes.keyed_store import KeyedStore, keyed_store
from tests.integration.test_cache_peers import OpenCache

URL = "s3://lab/train/0.tar"
DATA = random_bytes(40 * BLOCK_BYTES)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KeyedStore]:
    """With no keys in the environment, and AWS's files in a directory of the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with keyed_store() as store:
        store.objects["/lab/train/0.tar"] = DATA
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        yield store


def write_keys(path: Path, access_key: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = s\n")
    part.rename(path)


REFUSALS = [
    ("expired", AccessDenied, "have expired", "Renew them"),
    ("denied", AccessDenied, "not allowed", "Check the credentials"),
    ("region", OriginMisconfigured, "another region", "Set AWS_REGION=eu-west-1"),
    ("missing", ObjectNotFound, "no such object", "Check the name"),
]


@pytest.mark.parametrize(("why", "kind", "what", "advice"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_a_refusal_names_the_url_and_what_to_do(
    why: str,
    kind: type[CacheError],
    what: str,
    advice: str,
    store: KeyedStore,
    tmp_path: Path,
    open_cache: OpenCache,
) -> None:
    """Both when an object is opened and, the bucket's policy having changed meanwhile, when a block of it is read."""
    write_keys(tmp_path / "credentials", "first")
    with CacheDaemon() as daemon, open_cache(daemon.socket).open(URL) as opened:
        assert opened.read(0, 100) == DATA[:100]
        store.refuse = why
        with pytest.raises(kind) as of_open:
            open_cache(daemon.socket).open("s3://lab/train/1.tar")
        with pytest.raises(kind) as of_read:
            opened.read(30 * BLOCK_BYTES, 100)
        store.refuse = ""
        assert opened.read(30 * BLOCK_BYTES, 100) == DATA[30 * BLOCK_BYTES :][:100], (
            "and it works again, without a restart"
        )
    for caught, url in ((of_open.value, "s3://lab/train/1.tar"), (of_read.value, URL)):
        assert url in caught.message
        assert what in caught.message
        assert advice in str(caught)


def test_keys_that_are_replaced_in_the_profile_are_used_without_an_error(
    store: KeyedStore, tmp_path: Path, open_cache: OpenCache
) -> None:
    """Keys of a day, written by a helper of the site: a job of a week must not end with the first of them."""
    write_keys(tmp_path / "credentials", "first")
    with CacheDaemon() as daemon, open_cache(daemon.socket).open(URL) as opened:
        assert opened.read(0, 100) == DATA[:100]
        store.key = "second"
        write_keys(tmp_path / "credentials", "second")
        assert opened.read(30 * BLOCK_BYTES, 100) == DATA[30 * BLOCK_BYTES :][:100]
        store.objects["/lab/train/1.tar"] = DATA[:100]
        with open_cache(daemon.socket).open("s3://lab/train/1.tar") as other:
            assert other.read(0, 100) == DATA[:100]


def test_a_credential_process_is_asked_again_when_its_keys_are_refused(
    store: KeyedStore, tmp_path: Path, open_cache: OpenCache
) -> None:
    """It says for how long they hold, and they may be withdrawn before."""
    keys = tmp_path / "keys.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = /bin/cat {keys}\n")

    def give_out(access_key: str) -> None:
        told = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": "s", "SessionToken": "t"}
        keys.write_text(json.dumps({**told, "Expiration": "2099-01-01T00:00:00Z"}))

    give_out("first")
    with CacheDaemon() as daemon, open_cache(daemon.socket).open(URL) as opened:
        assert opened.read(0, 100) == DATA[:100]
        give_out("second")
        store.key = "second"
        assert opened.read(30 * BLOCK_BYTES, 100) == DATA[30 * BLOCK_BYTES :][:100]
