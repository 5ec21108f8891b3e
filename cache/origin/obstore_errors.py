"""obstore's exceptions as ours. Its types tell little (most are GenericError), its text tells all; pinned by the tests."""

from __future__ import annotations

import re

from obstore.exceptions import NotSupportedError, PermissionDeniedError, PreconditionError, UnauthenticatedError

from cache.errors import OriginError, OriginMisconfigured
from cache.origin import failures
from cache.origin.failures import Failure

_STATUS = re.compile(r"status code: (\d{3}) ?([^:]*):?\s*(.*)", re.DOTALL)


def error_of(operation: str, url: str, error: Exception) -> OriginError:
    """What an exception of obstore means."""
    text = str(error).split("\n\nDebug source:")[0]
    debug = str(error)
    if (
        isinstance(error, NotSupportedError)
        or "non-partial response" in text
        or re.search(r"Requested \d+\.\.\d+, got", text)
    ):
        return failures.ignores_ranges(operation, url)
    if "Received redirect without LOCATION" in text:
        return failures.error_of(
            Failure(operation, url, "redirect without a location", status=301, code="PermanentRedirect")
        )
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return OriginMisconfigured(f"{operation} {url}: {first_line(error)}", url=url, advice="Check the url.")
    if "Header missing from response" in text:
        return OriginMisconfigured(
            f"{operation} {url}: the answer lacks a header that the cache needs ({first_line(error)})",
            url=url,
            advice="Is it really an object store that answers there? Else let the server send Content-Length and ETag.",
        )
    match = _STATUS.search(text)
    if match:
        body = match.group(3)
        code = re.search(r"<Code>([^<]*)</Code>", body)
        said = re.search(r"<Message>([^<]*)</Message>", body)
        detail = " ".join(
            filter(None, [match.group(1), match.group(2).strip(), code and code.group(1), said and said.group(1)])
        )
        return failures.error_of(Failure(operation, url, detail, int(match.group(1)), code.group(1) if code else ""))
    for kind, status in _STATUS_OF_TYPE:
        if isinstance(error, kind):
            return failures.error_of(Failure(operation, url, first_line(error), status))
    return failures.error_of(Failure(operation, url, _transport_detail(debug) or first_line(error)))


_STATUS_OF_TYPE: list[tuple[type[Exception], int]] = [
    (FileNotFoundError, 404),
    (PreconditionError, 412),
    (PermissionDeniedError, 403),
    (UnauthenticatedError, 401),
]


def _transport_detail(debug: str) -> str:
    """What happened below HTTP, from the nested error that obstore prints."""
    if "TimedOut" in debug or "kind: Timeout" in debug:
        return "timed out"
    for pattern in (r'error: "([^"]+)"', r'message: "([^"]+)"', r"kind: (ConnectionReset|UnexpectedEof|BrokenPipe)"):
        match = re.search(pattern, debug)
        if match:
            return match.group(1)
    if "IncompleteMessage" in debug or "IncompleteBody" in debug:
        return "the connection closed in the middle of the answer"
    return ""


def first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
