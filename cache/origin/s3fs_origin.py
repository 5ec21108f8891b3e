"""S3 through s3fs: for `fsspec+s3://…` and OriginOptions.prefer_s3fs, where only botocore can authenticate or an s3fs set-up exists.

s3fs brings the session, credentials and options; the requests are made one by one through it, because its own `cat_file` and `info` add
retries, a listing cache and a look for directories, and cannot pin an etag. Promises as much as the obstore origin does, at about three
times the CPU per byte; and it sees response headers, so `retry_after_s` is known.
"""

from __future__ import annotations

import asyncio
import builtins
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiohttp
from botocore import exceptions as boto  # type: ignore[import-untyped]
from s3fs import S3FileSystem

from cache.errors import AccessDenied, ObjectNotFound, OriginError, OriginMisconfigured
from cache.origin import failures, urls
from cache.origin.failures import Failure
from cache.origin.options import OriginOptions
from cache.origin.ports import ObjectInfo, OnlyWhole

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from cache.origin.urls import Location

_WRITE_TIMEOUT_S = 3600.0
# Whatever the client libraries raise below HTTP. Errors of programming (TypeError, …) are not among them and pass through.
_TRANSPORT_ERRORS = (OSError, TimeoutError, aiohttp.ClientError, boto.BotoCoreError, boto.HTTPClientError)


class S3fsOrigin(OnlyWhole):
    """One bucket, from the event loop it was made on."""

    def __init__(self, location: Location, options: OriginOptions) -> None:
        self._options = options
        self._timeout_s = options.request_timeout_s
        self._bucket = location.bucket
        self._fs = _filesystem(options)
        self._writing_fs: S3FileSystem | None = None

    async def head(self, url: str) -> ObjectInfo:
        answer = await self._call("HEAD", url, "head_object", Key=_key(url))
        return ObjectInfo(url, answer["ContentLength"], _etag(answer, url))

    async def get_range(self, url: str, etag: str, start: int, end: int) -> Buffer:
        if start == end:
            return b""
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._call(
                    "GET", url, "get_object", Key=_key(url), Range=f"bytes={start}-{end - 1}", IfMatch=etag
                )
                async with answer["Body"] as body:
                    _require_range(url, etag, start, end, answer)
                    data: bytes = await body.read()
        except _TRANSPORT_ERRORS as e:
            raise _error("GET", url, e) from e
        if len(data) != end - start:
            raise failures.cut_short(url, start, end, len(data))
        return data

    async def list(self, prefix_url: str) -> AsyncIterator[ObjectInfo]:
        location = urls.parse(prefix_url)
        found = await self._below(location)
        if not found:
            if not location.key:
                raise ObjectNotFound(
                    f"list {prefix_url}: the bucket is empty", url=prefix_url, advice="Check its name."
                )
            try:
                found = [await self.head(prefix_url)]
            except ObjectNotFound as e:
                raise failures.nothing_below(prefix_url) from e
        for info in found:
            yield info

    async def _below(self, location: Location) -> builtins.list[ObjectInfo]:
        prefix = location.key.rstrip("/") + "/" if location.key else ""
        url = location.url_of(location.key)
        found: list[ObjectInfo] = []
        page: dict[str, Any] = {}
        while True:
            answer = await self._call("list", url, "list_objects_v2", Prefix=prefix, **page)
            for entry in answer.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles create `dir/` to show a directory
                    item = location.url_of(entry["Key"])
                    found.append(ObjectInfo(item, entry["Size"], _etag(entry, item)))
            if not answer.get("IsTruncated"):
                break
            page = {"ContinuationToken": answer["NextContinuationToken"]}
        return sorted(found, key=lambda info: info.url)

    async def put(self, url: str, data: Buffer) -> ObjectInfo:
        if self._writing_fs is None:
            # A read timeout also runs while a body is being sent, and would cut off uploads that take longer than that.
            self._writing_fs = _filesystem(replace(self._options, read_timeout_s=_WRITE_TIMEOUT_S))
        await self._call("PUT", url, "put_object", Key=_key(url), Body=bytes(data))
        return await self.head(url)

    async def close(self) -> None:
        for fs in (self._fs, self._writing_fs):
            if fs is not None and fs._s3 is not None:
                await fs._s3.close()

    async def _call(self, operation: str, url: str, method: str, **kwargs: Any) -> Mapping[str, Any]:
        is_upload = method == "put_object"
        fs = self._writing_fs if is_upload else self._fs
        assert fs is not None
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S if is_upload else self._timeout_s):
                answer: Mapping[str, Any] = await fs._call_s3(method, Bucket=self._bucket, **kwargs)
                return answer
        except (*_TRANSPORT_ERRORS, boto.ClientError) as e:
            raise _error(operation, url, e) from e


def _filesystem(options: OriginOptions) -> S3FileSystem:
    given = dict(options.storage_options)
    config = {
        "connect_timeout": options.connect_timeout_s,
        "read_timeout": options.read_timeout_s,
        "max_pool_connections": options.max_idle_connections,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        **given.pop("config_kwargs", {}),
    }
    fs = S3FileSystem(
        **given,
        config_kwargs=config,
        asynchronous=True,
        loop=asyncio.get_running_loop(),
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    fs.retries = 1  # the number of tries; the caller decides about more
    return fs


def _key(url: str) -> str:
    key = urls.parse(url).key
    if not key:
        raise OriginMisconfigured(f"{url} names a bucket, not an object", url=url, advice="Add the object's key.")
    return key


def _etag(answer: Mapping[str, Any], url: str) -> str:
    etag = answer.get("ETag")
    if not etag:
        raise failures.no_version(url)
    return str(etag)


def _require_range(url: str, etag: str, start: int, end: int, answer: Mapping[str, Any]) -> None:
    """The answer is the range that was asked for, of the object that was pinned (some servers ignore If-Match or Range)."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("ContentRange", ""))
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 or match is None:
        raise failures.ignores_ranges("GET", url)
    if _etag(answer, url) != etag:
        raise failures.changed(url, etag, _etag(answer, url))
    if match.group(3) != "*" and end > int(match.group(3)):
        raise failures.beyond_end(url, start, end, int(match.group(3)))
    if (int(match.group(1)), int(match.group(2)) + 1) != (start, end):
        raise failures.ignores_ranges("GET", url)


def _error(operation: str, url: str, error: BaseException) -> OriginError:
    """One of our errors. s3fs turns botocore's ClientError into OSErrors of all kinds and keeps the original as the cause."""
    original = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(original, boto.ClientError):
        return _error_of_answer(operation, url, original.response)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return AccessDenied(
            f"{operation} {url}: no credentials ({error})",
            url=url,
            advice="Set AWS_ACCESS_KEY_ID / AWS_PROFILE or the pod's role; for a public bucket set storage_options={'anon': True}.",
        )
    if isinstance(error, boto.ParamValidationError | boto.NoRegionError):
        return OriginMisconfigured(f"{operation} {url}: {error}", url=url, advice="Check the url and AWS_REGION.")
    if isinstance(error, TimeoutError | boto.ReadTimeoutError | boto.ConnectTimeoutError):
        return failures.error_of(Failure(operation, url, "timed out"))
    return failures.error_of(Failure(operation, url, f"{type(error).__name__}: {error}".split("\n", 1)[0]))


def _error_of_answer(operation: str, url: str, answer: Mapping[str, Any]) -> OriginError:
    metadata = answer.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode")
    code = str(answer.get("Error", {}).get("Code", ""))
    message = str(answer.get("Error", {}).get("Message", ""))
    retry_after = str(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
    return failures.error_of(
        Failure(
            operation,
            url,
            " ".join(filter(None, [str(status or ""), code, message])),
            status,
            code,
            retry_after_s=float(retry_after) if retry_after.isdigit() else None,
        )
    )
