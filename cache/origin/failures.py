"""What a store's answer means: status, S3 error code or the client library's words → one of our errors, with advice. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cache.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectNotFound,
    OriginError,
    OriginMisconfigured,
    OriginThrottled,
    OriginUnavailable,
)


@dataclass(frozen=True)
class Failure:
    """What is known of one failed request. `status` is None when no HTTP answer came; `detail` is one line for people."""

    operation: str
    url: str
    detail: str
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "TemporaryRedirect",
}
_BAD_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure", "MissingSecurityHeader"}
_THROTTLED = {
    "SlowDown",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "ServerBusy",
}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "InvalidBucketName", "AccountNotFound"}

_CREDENTIALS = (
    "Check the credentials this process sees (AWS_ACCESS_KEY_ID / AWS_PROFILE / the pod's role, GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_*) and that they allow reading and listing there; for a public bucket set AWS_SKIP_SIGNATURE=true."
)


def error_of(failure: Failure) -> OriginError:
    """The error to raise. The S3 code wins over the status, because servers use several statuses for one code."""
    by_code = _by_code(failure)
    return by_code if by_code is not None else _by_status(failure)


def _by_code(f: Failure) -> OriginError | None:
    what = f"{f.operation} {f.url}"
    if f.code in _EXPIRED:
        return AccessDenied(
            f"{what}: the credentials have expired ({f.code})",
            url=f.url,
            advice="Renew them (aws sso login, or the secret that the pod mounts); "
            "restart the cache daemon if they came from its environment.",
        )
    if f.code in _WRONG_REGION:
        region = _expected_region(f.detail)
        return OriginMisconfigured(
            f"{what}: the bucket is in another region ({f.detail})",
            url=f.url,
            advice=f"Set AWS_REGION={region or 'the region of the bucket'} where the cache daemon is started.",
        )
    if f.code == "RequestTimeTooSkewed":
        return AccessDenied(
            f"{what}: this machine's clock is too far from the store's ({f.detail})",
            url=f.url,
            advice="Set the clock (NTP, chrony).",
        )
    if f.code in _BAD_KEYS:
        return AccessDenied(
            f"{what}: the store does not accept the credentials ({f.detail})", url=f.url, advice=_CREDENTIALS
        )
    if f.code in _NO_BUCKET:
        return OriginMisconfigured(
            f"{what}: the bucket does not exist ({f.code})",
            url=f.url,
            advice="Check the bucket's name, and AWS_ENDPOINT_URL if it is not on AWS: the name is looked up at that endpoint only.",
        )
    if f.code in ("NoSuchKey", "NoSuchVersion", "BlobNotFound"):
        return _not_found(f)
    if f.code in _THROTTLED and f.status != 404:
        return _throttled(f)
    return None


def _by_status(f: Failure) -> OriginError:
    what = f"{f.operation} {f.url}"
    match f.status:
        case 404 | 410:
            return _not_found(f)
        case 401 | 403 | 407:
            return AccessDenied(f"{what}: not allowed ({f.detail})", url=f.url, advice=_CREDENTIALS)
        case 412:
            return ObjectChanged(
                f"{what}: the object is no longer the one that was opened ({f.detail})",
                url=f.url,
                advice="Open it again to read the new version; shards that jobs are reading should get new names, not new contents.",
            )
        case 416:
            return ObjectChanged(
                f"{what}: the object is shorter than when it was opened ({f.detail})",
                url=f.url,
                advice="Open it again to read the new version; shards that jobs are reading should get new names, not new contents.",
            )
        case 429 | 503:
            return _throttled(f)
        case 301 | 307 | 308:
            return OriginMisconfigured(
                f"{what}: the store redirects elsewhere ({f.detail})",
                url=f.url,
                advice="Set AWS_REGION to the bucket's region (or AWS_ENDPOINT_URL to the address that it redirects to).",
            )
        case 408 | 425:
            return OriginUnavailable(f"{what}: {f.detail}", url=f.url, advice="Trying again may help.")
        case int(status) if status >= 500:
            return OriginUnavailable(
                f"{what}: the store failed ({f.detail})", url=f.url, advice="Trying again may help."
            )
        case int():
            return OriginMisconfigured(
                f"{what}: the store refuses the request ({f.detail})",
                url=f.url,
                advice="Check the region (AWS_REGION), the endpoint (AWS_ENDPOINT_URL) and the url.",
            )
        case None:
            return OriginUnavailable(
                f"{what}: no answer ({f.detail})",
                url=f.url,
                advice="Check that the endpoint (AWS_ENDPOINT_URL, or the host in the url) is right and reachable from here; "
                "trying again may help.",
            )


def ignores_ranges(operation: str, url: str) -> OriginError:
    return OriginMisconfigured(
        f"{operation} {url}: asked for a range, the server answered with something else (no 206 Partial Content)",
        url=url,
        advice="Either a proxy or login page answers in place of the store (check the endpoint), "
        "or the server cannot serve ranges, which the cache needs.",
    )


def cut_short(url: str, start: int, end: int, got_bytes: int) -> OriginError:
    return OriginUnavailable(
        f"GET {url} [{start}, {end}): the body ended after {got_bytes} of {end - start} bytes",
        url=url,
        advice="Trying again may help.",
    )


def beyond_end(url: str, start: int, end: int, size_bytes: int) -> OriginError:
    return ObjectChanged(
        f"GET {url} [{start}, {end}): the object has only {size_bytes} bytes",
        url=url,
        advice="It was longer when it was opened, or the range was never right. Open it again.",
    )


def nothing_below(url: str) -> OriginError:
    return ObjectNotFound(
        f"list {url}: no objects below it",
        url=url,
        advice="Check the prefix; it is taken as a directory (a whole name up to a /).",
    )


def changed(url: str, pinned: str, found: str) -> OriginError:
    return ObjectChanged(
        f"{url} changed: it was opened at etag {pinned} and is now at {found}",
        url=url,
        advice="Open it again to read the new version; shards that jobs are reading should get new names, not new contents.",
    )


def no_version(url: str) -> OriginError:
    return OriginMisconfigured(
        f"HEAD {url}: the answer has neither ETag nor Last-Modified, so a change of the object could not be noticed",
        url=url,
        advice="Is it really an object store that answers there, not a proxy or a login page? Else let the server send an ETag.",
    )


def _not_found(f: Failure) -> OriginError:
    hint = "" if "%" not in f.url or f.url.startswith("http") else " The url is taken literally: %20 is not a blank."
    return ObjectNotFound(f"{f.operation} {f.url}: no such object", url=f.url, advice=f"Check the name.{hint}")


def _throttled(f: Failure) -> OriginError:
    return OriginThrottled(
        f"{f.operation} {f.url}: the store asks to slow down ({f.detail})",
        url=f.url,
        retry_after_s=f.retry_after_s,
        advice="The cache slows down by itself; if this lasts, spread the objects over more prefixes or ask for a higher limit.",
    )


def _expected_region(detail: str) -> str:
    match = re.search(r"expecting '([a-z0-9-]+)'", detail) or re.search(r"<Region>([a-z0-9-]+)</Region>", detail)
    return match.group(1) if match else ""
