"""Ranges over plain HTTP: what an answer means, before any byte of it is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ObjectChanged, ObjectNotFound, OriginError, OriginThrottled, OriginUnavailable
from cache.origin.plain_http import Head, NotPlain, PlainTarget, check_partial, parse_head, refusal, request_bytes

URL = "http://store/b/k"
TARGET = PlainTarget.of(URL)


def _partial(start: int, end: int, *, size: int = 100, etag: str = '"e"', length: int | None = None) -> Head:
    length = end - start if length is None else length
    return Head(206, {"content-length": str(length), "content-range": f"bytes {start}-{end - 1}/{size}", "etag": etag})


def test_the_request_pins_the_version_and_names_the_range() -> None:
    request = request_bytes(TARGET, '"e"', 10, 20)
    assert b"GET /b/k HTTP/1.1\r\nHost: store\r\n" in request
    assert b'Range: bytes=10-19\r\nIf-Match: "e"\r\n' in request


def test_a_weak_etag_is_compared_and_not_sent() -> None:
    """If-Match never matches a weak etag (RFC 9110, 13.1.1): sent, it would be a refusal of every range."""
    assert b"If-Match" not in request_bytes(TARGET, 'W/"e"', 0, 1)


def test_no_header_can_be_smuggled_in() -> None:
    with pytest.raises(NotPlain):
        request_bytes(TARGET, '"e"\r\nX: y', 0, 1)
    with pytest.raises(NotPlain):
        PlainTarget.of("http://store/a b")


def test_a_right_answer_passes() -> None:
    check_partial(URL, '"e"', 10, 20, _partial(10, 20))


def test_another_version_is_an_error_even_where_if_match_was_ignored() -> None:
    with pytest.raises(ObjectChanged):
        check_partial(URL, '"e"', 10, 20, _partial(10, 20, etag='"new"'))


@pytest.mark.parametrize(
    "head",
    [
        Head(200, {"content-length": "100", "etag": '"e"'}),
        Head(206, {"etag": '"e"', "content-range": "bytes 10-19/100"}),
        _partial(11, 21),
        Head(206, {"content-length": "10", "content-range": "bytes 10-19/100"}),
    ],
)
def test_whatever_else_comes_is_left_to_the_stores_own_client(head: Head) -> None:
    with pytest.raises(NotPlain):
        check_partial(URL, '"e"', 10, 20, head)


def test_an_object_that_became_shorter_has_changed() -> None:
    with pytest.raises(ObjectChanged):
        check_partial(URL, '"e"', 10, 20, _partial(10, 15, size=15))


def test_refusals_are_the_errors_that_they_mean() -> None:
    busy = refusal(URL, Head(503, {"retry-after": "7"}), b"<Error><Code>SlowDown</Code></Error>", 0.0)
    assert isinstance(busy, OriginThrottled)
    assert busy.retry_after_s == 7.0
    dates = {"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT", "date": "Thu, 01 Jan 1970 00:00:08 GMT"}
    stepped = refusal(URL, Head(503, dates), b"<Error><Code>SlowDown</Code></Error>", -5 * 3600.0)
    assert isinstance(stepped, OriginThrottled) and stepped.retry_after_s == 2.0, "by the store's clock, not by ours"
    assert isinstance(refusal(URL, Head(404, {}), b"", 0.0), ObjectNotFound)
    assert isinstance(refusal(URL, Head(412, {}), b"", 0.0), ObjectChanged)
    assert isinstance(refusal(URL, Head(500, {}), b"", 0.0), OriginUnavailable)


@pytest.mark.parametrize("status", [200, 301, 307, 400, 401, 403])
def test_what_the_stores_client_may_know_better_is_asked_of_it(status: int) -> None:
    """Redirects it follows; for expired or missing credentials it has the chain, and the words for people."""
    assert isinstance(refusal(URL, Head(status, {}), b"", 0.0), NotPlain)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_no_answer(raw: bytes) -> None:
    try:
        head = parse_head(raw)
    except NotPlain:
        return
    assert 100 <= head.status <= 999
    found = refusal(URL, head, raw, 0.0)
    assert isinstance(found, OriginError | NotPlain)
