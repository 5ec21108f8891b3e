"""file:// origins: what is particular about files; and the spelling of urls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ObjectChanged, ObjectNotFound, OriginError, OriginMisconfigured
from cache.origin import urls
from cache.origin.aws_profile import profile_settings, wants_profile
from cache.origin.local_origin import LocalOrigin
from cache.origin.options import OriginOptions
from cache.origin.registry import origin_for


def test_a_file_changed_in_place_while_it_is_read_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before the read has passed already when a writer comes: only a look afterwards can see it."""
    path = tmp_path / "a"
    path.write_bytes(b"old bytes")
    origin, url = LocalOrigin(), f"file://{path}"
    pread = os.pread

    def read_then_be_overtaken(fd: int, length: int, offset: int) -> bytes:
        data = pread(fd, length, offset)
        path.write_bytes(b"new bytes")
        os.utime(path, ns=(1, 1))
        return data

    async def main() -> None:
        info = await origin.head(url)
        monkeypatch.setattr(os, "pread", read_then_be_overtaken)
        with pytest.raises(ObjectChanged):
            await origin.get_range(url, info.etag, 0, 9)

    asyncio.run(main())


def test_put_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    """A reader that has the old file open goes on reading old bytes; no staging file stays behind."""

    async def main() -> None:
        origin, url = LocalOrigin(), f"file://{tmp_path}/d/a"
        await origin.put(url, b"old")
        old = os.open(tmp_path / "d/a", os.O_RDONLY)
        await origin.put(url, b"new")
        assert os.pread(old, 10, 0) == b"old"
        os.close(old)
        assert os.listdir(tmp_path / "d") == ["a"]
        assert (tmp_path / "d/a").stat().st_mode & 0o777 == 0o666 & ~_umask()

    asyncio.run(main())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: os.mkfifo(p)], ids=["directory", "fifo"])
def test_what_is_not_a_file_is_not_an_object(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A fifo must not be opened: the open would wait for a writer for ever."""
    make(tmp_path / "x")
    origin, url = LocalOrigin(), f"file://{tmp_path}/x"

    async def main() -> None:
        for request in (origin.head(url), origin.get_range(url, '"e"', 0, 1)):
            with pytest.raises(ObjectNotFound):
                await request

    asyncio.run(main())


def test_a_link_to_a_parent_does_not_make_a_list_endless(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_bytes(b"1")
    (tmp_path / "d/up").symlink_to(tmp_path)
    (tmp_path / "d/dangling").symlink_to("nowhere")

    async def main() -> list[str]:
        return [info.url async for info in LocalOrigin().list(f"file://{tmp_path}/d")]

    assert f"file://{tmp_path}/d/a" in asyncio.run(main())


def test_a_url_that_looks_encoded_gets_a_hint(tmp_path: Path) -> None:
    async def main() -> OriginError:
        with pytest.raises(ObjectNotFound) as caught:
            await LocalOrigin().head(f"file://{tmp_path}/a%20b")
        return caught.value

    assert "literally" in asyncio.run(main()).advice


def test_plain_and_relative_paths_are_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    here = f"file://{tmp_path}"
    assert urls.canonical_url("a b%20/../c") == f"{here}/c"
    assert urls.canonical_url("./x#1?") == f"{here}/x#1?"
    assert urls.canonical_url("~/data") == "file:///home/me/data"
    assert urls.canonical_url("file:///a/./b/") == "file:///a/b"
    assert urls.canonical_url("file:/a") == urls.canonical_url("file://localhost/a") == "file:///a"


@pytest.mark.parametrize("url", ["", "s3://", "s3:///key", "file://otherhost/x"])
def test_a_url_that_names_nothing_is_refused_with_advice(url: str) -> None:
    with pytest.raises(OriginMisconfigured) as caught:
        urls.parse(url)
    assert caught.value.advice


@given(
    scheme=st.sampled_from(["s3", "gs", "fsspec+s3"]),
    key=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda k: not k.startswith("/")),
)
def test_a_key_of_any_text_comes_back_unchanged(scheme: str, key: str) -> None:
    """Nothing in a key is decoded, encoded or normalised on the way."""
    location = urls.parse(f"{scheme}://bucket/{key}")
    assert (location.bucket, location.key) == ("bucket", key)
    assert location.url_of(location.key) == f"{scheme}://bucket/{key}"


def test_two_names_of_one_scheme_are_one_object() -> None:
    """s3a:// and s3:// must share what is cached."""
    assert urls.canonical_url("s3a://b/k") == urls.canonical_url("S3://b/k") == "s3://b/k"
    assert urls.canonical_url("gcs://b/k") == "gs://b/k"


def test_one_origin_serves_a_bucket_in_one_loop() -> None:
    """Connections are what an origin is: a second one for the same bucket would open them all again."""

    async def main() -> object:
        assert origin_for("s3://b/x") is origin_for("s3://b/y")
        assert origin_for("s3://b/x") is not origin_for("s3://c/x")
        return origin_for("s3://b/x")

    assert asyncio.run(main()) is not asyncio.run(main())


def test_s3fs_can_be_asked_for_by_url_and_by_option() -> None:
    async def main() -> None:
        by_url = origin_for("fsspec+s3://b/x")
        by_option = origin_for("s3://b/x", OriginOptions(prefer_s3fs=True))
        assert type(by_url) is type(by_option) is not type(origin_for("s3://b/x"))

    asyncio.run(main())


def test_an_unknown_scheme_says_what_is_built_in() -> None:
    async def main() -> None:
        with pytest.raises(OriginMisconfigured, match="install its fsspec package"):
            origin_for("gopher://host/x")

    asyncio.run(main())


@pytest.mark.parametrize("url", ["s3://b/a//b", "s3://b/a/../b", "s3://b/a/", "http://h/x?sig=1"])
def test_a_name_that_obstore_would_bend_is_refused_with_the_way_out(url: str) -> None:
    """obstore drops a trailing slash in silence: the bytes of another object would be read under this name."""

    async def main() -> None:
        with pytest.raises(OriginMisconfigured, match="fsspec"):
            await origin_for(url).head(url)

    asyncio.run(main())


def test_keys_in_the_environment_win_over_a_profile() -> None:
    """As in every AWS tool; and a pod's role must not be lost because an image contains a ~/.aws."""
    for settled in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"):
        assert not wants_profile({settled: "x", "AWS_PROFILE": "p"}, lambda path: True)
    assert wants_profile({}, lambda path: path.endswith("/.aws/config"))
    assert not wants_profile({}, lambda path: False)


def test_a_profile_brings_keys_region_and_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = K\naws_secret_access_key = S\n")
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-west-7\nendpoint_url = http://store:9000\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    settings = profile_settings()
    assert (settings["region"], settings["endpoint"]) == ("eu-west-7", "http://store:9000")
    credential = settings["credential_provider"]()
    assert (credential["access_key_id"], credential["secret_access_key"]) == ("K", "S")
