"""Origins over obstore: S3, Google Cloud Storage, Azure and plain HTTP.

Every range is a GET with If-Match, and the etag in the answer is compared too, for servers that ignore If-Match. obstore's own
retries are off. The body is collected by obstore outside the interpreter lock and handed on as it is (`obstore.Bytes` is a buffer): one
copy, from the socket's chunks into one piece of memory.

Every request is a blocking call of obstore in a thread of Python's own, which the interpreter joins at its end. obstore's `async` calls are
never used: they hand their results over in threads that Python does not know, and one that is still in there when the interpreter
ends aborts the process, with its work done (decisions/0088).

Known limits of obstore, met here: it does not show response headers of failures (so `retry_after_s` is always None), and it cannot
name keys with empty or dotted segments (`a//b`, `a/../b`); those are refused with the way out (`fsspec+s3://`).
"""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from cache.errors import AccessDenied, ObjectNotFound, OriginError, OriginMisconfigured
from cache.origin import failures, urls
from cache.origin.aws_profile import profile_settings
from cache.origin.obstore_errors import error_of, first_line
from cache.origin.options import OriginOptions
from cache.origin.plain_http import NotPlain, PlainTarget
from cache.origin.ports import ObjectInfo
from cache.origin.signing import Way, google_base, google_key, sas_token, way_of

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig
    from typing_extensions import Buffer

    from cache.origin.urls import Location

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WRITE_TIMEOUT_S = 3600.0
_SIGNED_FOR = timedelta(minutes=15)
_SIGNATURE_USED_S = 300.0
"""A signature is used for a third of the time that it holds, so that no request with it arrives too late."""
_MAX_SIGNATURES = 4096
_NOT_PLAIN_S = 600.0
"""After an answer that only the store's client understands, how long it is asked without trying the plain way first."""
_RENEW_EVERY_S = 5.0
"""So often refused keys are read anew, at most: an object that nobody may read is no reason to run a program for each try."""
MAX_REQUESTS = 64
"""Threads of one origin, made when needed: each waits for one request. As many as connections are kept open (OriginOptions)."""
SCHEMES = frozenset({"s3", "gs", "az", "abfs", "abfss", "http", "https"})


class ObstoreOrigin:
    """One bucket, container or HTTP host. Needs no closing; obstore's stores are safe from any thread."""

    def __init__(self, location: Location, options: OriginOptions) -> None:
        """Raises OriginMisconfigured when no store can be built for the location."""
        self._is_http = location.scheme in ("http", "https")
        self._location, self._options = location, options
        self._writing_store: ObjectStore | None = None
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="origin")
        self._signed: dict[str, tuple[float, PlainTarget]] = {}
        self._not_plain_until_s = 0.0
        self._renewed_s = float("-inf")
        try:
            self._profile = profile_settings() if location.scheme == "s3" else {}
            self._store = _store(location, options, self._profile)
            self._way = way_of(location.scheme, os.environ, _text_of)
        except (BaseError, ValueError) as e:
            raise OriginMisconfigured(
                f"no client for {location.root}: {first_line(e)}",
                url=location.root,
                advice="Check the url and the store's settings (AWS_*, GOOGLE_*, AZURE_*).",
            ) from e

    async def head(self, url: str) -> ObjectInfo:
        return await self._renewing(partial(self._head, url))

    async def _head(self, url: str) -> ObjectInfo:
        path = self._path(url)
        try:
            meta = await self._in_thread(obstore.head, self._store, path)
        except (BaseError, OSError, ValueError) as e:
            raise await self._explained("HEAD", url, path, e) from e
        return ObjectInfo(url, meta["size"], _etag(meta, url))

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        if start == end:
            return b""
        try:
            return await self._in_thread(self._get, url, etag, start, end)
        except (BaseError, OSError, ValueError) as e:
            raise error_of("GET", url, e) from e

    def _get(self, url: str, etag: str, start: int, end: int) -> Buffer:
        options: GetOptions = {"range": (start, end), **_condition(etag)}
        result = obstore.get(self._store, self._path(url), options=options)
        found = _etag(result.meta, url)
        if found != etag:
            raise failures.changed(url, etag, found)
        if end > result.meta["size"]:
            raise failures.beyond_end(url, start, end, result.meta["size"])
        data = result.bytes()
        if len(data) != end - start:
            raise failures.cut_short(url, start, end, len(data))
        return data

    async def plain_target(self, url: str) -> PlainTarget | None:
        """Where a plain GET of this object goes, signed if need be; None: only `get_range` can read it (signing.py says when)."""
        now_s = time.monotonic()
        if now_s < self._not_plain_until_s or self._way is Way.LIBRARY:
            return None
        path = self._path(url)
        try:
            if self._is_http:
                location = urls.parse(url)
                return PlainTarget.of(location.url_of(location.key))
            kept = self._signed.get(path)
            if kept is not None and now_s < kept[0]:
                return kept[1]
            target = PlainTarget.of(await self._in_thread(self._plain_url, path))
        except (NotPlain, BaseError, OSError, ValueError):
            return None
        if len(self._signed) >= _MAX_SIGNATURES:
            self._signed.clear()
        self._signed[path] = (now_s + _SIGNATURE_USED_S, target)
        return target

    def _plain_url(self, path: str) -> str:
        if self._way is Way.SIGNED:
            assert isinstance(self._store, S3Store | GCSStore | AzureStore)
            return obstore.sign(self._store, "GET", path, _SIGNED_FOR)
        if self._location.scheme == "gs":
            base = google_base(google_key(os.environ, _text_of))
            return f"{base}/{self._location.bucket}/{quote(path)}"
        # obstore knows how the url is written; a signature by nobody shows it, and is cut off.
        nobody = {"access_key_id": "-", "secret_access_key": "-"}
        if self._location.scheme != "s3":
            nobody = {"account_key": "bm9ib2R5"}
        shown = _store(self._location, self._options, {**nobody, "skip_signature": False})
        assert isinstance(shown, S3Store | AzureStore)
        url = obstore.sign(shown, "GET", path, _SIGNED_FOR).partition("?")[0]
        return f"{url}?{sas_token(os.environ)}" if self._way is Way.TOKEN else url

    def forget_signature(self, url: str) -> None:
        """The store did not accept it: the credentials may have changed."""
        self._signed.pop(self._path(url), None)
        self._renew()

    async def _renewing(self, ask: Callable[[], Awaitable[T]]) -> T:
        """`ask`, and once more with new keys where those of a profile were refused: they may have been replaced a moment ago."""
        try:
            return await ask()
        except AccessDenied:
            if not self._renew():
                raise
        return await ask()

    def _renew(self) -> bool:
        """Reads the profile's or the service account's keys anew. False: there are none, or that was done a moment ago."""
        credentials, now_s = self._profile.get("credential_provider"), time.monotonic()
        has_file = credentials is not None or (self._location.scheme == "gs" and google_key(os.environ, _text_of))
        if not has_file or now_s - self._renewed_s < _RENEW_EVERY_S:
            return False
        self._renewed_s = now_s
        if credentials is not None:
            credentials.refused()
        try:
            store = _store(self._location, self._options, self._profile)  # The old one remembers the keys.
        except (BaseError, ValueError):
            return False  # Somebody is writing the file just now.
        self._store, self._way = store, way_of(self._location.scheme, os.environ, _text_of)
        self._signed.clear()
        return True

    def is_not_plain(self) -> None:
        """The store's client could read what the plain way could not."""
        self._not_plain_until_s = time.monotonic() + _NOT_PLAIN_S

    async def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        location = urls.parse(prefix_url)
        found = [] if self._is_http else await self._renewing(partial(self._below, location))
        if not found:
            if not location.key:
                raise ObjectNotFound(
                    f"list {prefix_url}: the bucket is empty", url=prefix_url, advice="Check the bucket's name."
                )
            try:
                found = [await self.head(prefix_url)]
            except ObjectNotFound as e:
                raise _nothing_below(prefix_url, self._is_http) from e
        for info in found:
            yield info

    async def _below(self, location: Location) -> builtins.list[ObjectInfo]:
        prefix = location.key.rstrip("/")
        found: list[ObjectInfo] = []
        try:
            for meta in await self._in_thread(self._listed, prefix):
                url = location.url_of(meta["path"])
                found.append(ObjectInfo(url, meta["size"], _etag(meta, url)))
        except (BaseError, OSError, ValueError) as e:
            raise error_of("list", location.url_of(location.key), e) from e
        found.sort(key=lambda info: info.url)
        return _without_directory_markers(found)

    def _listed(self, prefix: str) -> builtins.list[ObjectMeta]:
        return [meta for chunk in obstore.list(self._store, prefix or None, chunk_size=1000) for meta in chunk]

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        if self._writing_store is None:
            # Seen: a read timeout also runs while a body is being sent, and cut off uploads that took longer than that.
            slow = replace(self._options, read_timeout_s=_WRITE_TIMEOUT_S, request_timeout_s=_WRITE_TIMEOUT_S)
            self._writing_store = _store(self._location, slow, self._profile)
        try:
            # One request whatever the size: multipart would give an etag of another form and two ways to fail. A file, because a buffer
            # of Python's would be let go of by the thread that sends it: one of those that must never enter the interpreter.
            body = io.BytesIO(data)
            await self._in_thread(partial(obstore.put, self._writing_store, self._path(url), body, use_multipart=False))
        except (BaseError, OSError, ValueError) as e:
            raise error_of("PUT", url, e) from e
        return await self.head(url)

    async def close(self) -> None:
        """Requests under way are not waited for here, but at the interpreter's end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _path(self, url: str) -> str:
        key = urls.parse(url).key
        if self._is_http:
            if "?" in key or "#" in key:
                raise OriginMisconfigured(
                    f"{url} has a query or fragment, which plain HTTP origins do not take",
                    url=url,
                    advice="Presigned urls go through fsspec: write fsspec+ before the url. A ? or # in the name is written %3F or %23.",
                )
            key = urls.http_path(key)
        segments = key.split("/")
        if not key or any(segment in ("", ".", "..") for segment in segments):
            raise OriginMisconfigured(
                f"{url} has an empty or dotted part in its key ({key!r})",
                url=url,
                advice="Rename the object, or read it through fsspec, which can name it: write fsspec+ before the url.",
            )
        return key

    async def _explained(self, operation: str, url: str, path: str, error: Exception) -> OriginError:
        """The error of a failed HEAD. Its answer has no body, so wrong bucket, wrong region and expired credentials look alike: one GET
        of one byte asks for the reason. Not a retry: nothing that it brings is used."""
        first = error_of(operation, url, error)
        if self._is_http or not re.search(r"status code: 4(00|03|04)", str(error)):
            return first
        try:
            await self._in_thread(partial(obstore.get, self._store, path, options={"range": (0, 1)}))
        except (BaseError, OSError, ValueError) as reason:
            explained = error_of(operation, url, reason)
            return first if explained.is_retryable else explained
        return first


def _text_of(path: str) -> str:
    return Path(path).read_text()


def _store(location: Location, options: OriginOptions, profile: dict[str, Any]) -> ObjectStore:
    """`profile`: settings that stand before those of the environment: out of the user's AWS profile, say."""
    client: ClientConfig = {
        # Harmless where it is not wanted: without an http:// endpoint from the user, every url that obstore builds is https.
        "allow_http": True,
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.read_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
        "pool_max_idle_per_host": str(options.max_idle_connections),
        "pool_idle_timeout": timedelta(seconds=options.idle_timeout_s),
    }
    retry: RetryConfig = {"max_retries": 0}
    common: dict[str, Any] = {"client_options": client, "retry_config": retry}
    match location.scheme:
        case "s3":
            return S3Store(location.bucket, **common, **profile)
        case "gs":
            return GCSStore(location.bucket, **common, **profile)
        case "az" | "abfs" | "abfss":
            container, at, host = location.bucket.partition("@")
            if at:
                common["account_name"] = host.split(".")[0]
            return AzureStore(container, **common, **profile)
        case _:
            return HTTPStore.from_url(location.root, **common)


def _etag(meta: ObjectMeta, url: str) -> str:
    """The store's etag, or for HTTP servers without one the modification time and size (weaker: it moves in whole seconds)."""
    if tag := meta["e_tag"]:
        # Azure's lists leave the quotes away that its answers have.
        return tag if tag.startswith(('"', "W/")) or not url.startswith(("az", "abfs")) else f'"{tag}"'
    if meta["last_modified"] > _EPOCH and url.startswith("http"):
        return f"mtime:{int(meta['last_modified'].timestamp())}-{meta['size']}"
    raise failures.no_version(url)


def _condition(etag: str) -> GetOptions:
    if etag.startswith("mtime:"):
        modified = int(etag.removeprefix("mtime:").split("-")[0])
        return {"if_unmodified_since": datetime.fromtimestamp(modified, UTC)}
    if etag.startswith("W/"):
        return {}  # If-Match never matches a weak etag (RFC 9110, 13.1.1); the comparison with the answer's etag remains
    return {"if_match": etag}


def _without_directory_markers(found: list[ObjectInfo]) -> list[ObjectInfo]:
    """Leaves out the empty objects `dir/` that consoles create to show a directory; obstore reports them as `dir`."""
    following = [info.url for info in found[1:]] + [""]
    return [
        info
        for info, next_url in zip(found, following, strict=False)
        if info.size_bytes > 0 or not next_url.startswith(info.url + "/")
    ]


def _nothing_below(url: str, is_http: bool) -> OriginError:
    if is_http:
        return ObjectNotFound(
            f"list {url}: no such object, and plain HTTP has no way to list",
            url=url,
            advice="Name the objects one by one, or write fsspec+ before the url to read the server's index page.",
        )
    return failures.nothing_below(url)
