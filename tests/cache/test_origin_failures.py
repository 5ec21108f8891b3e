"""What servers answer when something is wrong, and what the person then reads. Real clients against canned answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cache.errors import (
    AccessDenied,
    CacheConfigError,
    ObjectChanged,
    ObjectNotFound,
    OriginError,
    OriginMisconfigured,
    OriginThrottled,
    OriginUnavailable,
)
from cache.origin.options import OriginOptions
from cache.origin.ports import Origin
from cache.origin.registry import close_origins, origin_for
from tests.weed import use_endpoint

# For servers that never end their answer. All others get the defaults, so that a busy machine is not taken for a stalled server.
QUICK = OriginOptions(connect_timeout_s=2, read_timeout_s=0.3, request_timeout_s=0.8)
RANGE = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-4/10\r\n"
DATE = b"Last-Modified: Mon, 23 Nov 2026 18:00:00 GMT\r\n"


def answer(status: str, code: str = "", message: str = "", headers: str = "") -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    # The server closes after each answer and says so: a client that kept the connection would send its next request into the void.
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}".encode()


class CannedServer:
    """Answers each request with the same bytes (HEAD: without the body) and counts requests."""

    def __init__(self, reply: bytes, then: str) -> None:
        self.reply = reply
        self.then = then
        self.requests: list[bytes] = []
        self.endpoint = ""

    @asynccontextmanager
    async def run(self) -> AsyncIterator[CannedServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._over = asyncio.Event()
        async with server:
            yield self
            self._over.set()
            await close_origins()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request)
            head, _, body = self.reply.partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n" if head else b"")
            writer.write(b"" if request.startswith(b"HEAD") else body)
            await writer.drain()
            if self.then == "hold":
                await self._over.wait()
            elif self.then == "trickle":
                while not self._over.is_set():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            if self.then == "reset":
                writer.transport.abort()
            writer.close()


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    request: Callable[[Origin, str], object],
    reply: bytes,
    then: str = "close",
) -> tuple[OriginError, CannedServer]:
    """The error of one request against a server with this answer. `{endpoint}` in the url is the server's."""

    async def main() -> tuple[OriginError, CannedServer]:
        async with CannedServer(reply, then).run() as server:
            use_endpoint(monkeypatch, server.endpoint)
            full = url.format(endpoint=server.endpoint)
            with pytest.raises(OriginError) as caught:
                await request(origin_for(full, QUICK if then in ("hold", "trickle") else OriginOptions()), full)  # type: ignore[misc]
            return caught.value, server

    return asyncio.run(main())


def get(origin: Origin, url: str) -> object:
    return origin.get_range(url, '"e"', 2, 5)


def head(origin: Origin, url: str) -> object:
    return origin.head(url)


CLIENTS = {"obstore": "s3://bucket/key", "s3fs": "fsspec+s3://bucket/key", "http": "{endpoint}/bucket/key"}
S3_CLIENTS = ["obstore", "s3fs"]
OF_S3 = {
    "no such key": (answer("404 N", "NoSuchKey"), ObjectNotFound, "no such object"),
    "no such bucket": (answer("404 N", "NoSuchBucket"), OriginMisconfigured, "bucket does not exist"),
    "forbidden": (answer("403 F", "AccessDenied", "Access Denied"), AccessDenied, "not allowed"),
    "wrong secret": (answer("403 F", "SignatureDoesNotMatch"), AccessDenied, "does not accept the credentials"),
    "expired token": (answer("400 B", "ExpiredToken"), AccessDenied, "have expired"),
    "clock skew": (answer("403 F", "RequestTimeTooSkewed"), AccessDenied, "clock"),
    "other region, redirect": (answer("301 M", "PermanentRedirect"), OriginMisconfigured, "another region"),
    "other region, 400": (
        answer("400 B", "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
        OriginMisconfigured,
        "AWS_REGION=eu-west-1",
    ),
    "changed": (answer("412 P", "PreconditionFailed"), ObjectChanged, "no longer the one"),
    "shorter": (answer("416 R", "InvalidRange"), ObjectChanged, "shorter than when"),
    "slow down": (answer("503 S", "SlowDown"), OriginThrottled, "slow down"),
    "too many": (answer("429 T", "TooManyRequests"), OriginThrottled, "slow down"),
    "internal error": (answer("500 I", "InternalError"), OriginUnavailable, "store failed"),
    "bad gateway": (answer("502 B"), OriginUnavailable, "store failed"),
}


# botocore follows redirects to another region by itself, and would follow this server's for ever.
ASKED = [
    (client, case) for client in S3_CLIENTS for case in OF_S3 if (client, case) != ("s3fs", "other region, redirect")
]


@pytest.mark.parametrize(("client", "case"), ASKED)
def test_an_s3_error_says_what_it_is(monkeypatch: pytest.MonkeyPatch, client: str, case: str) -> None:
    """The type decides about retrying, the text is what a person has at three in the morning."""
    reply, kind, words = OF_S3[case]
    error, server = outcome(monkeypatch, CLIENTS[client], get, reply)
    assert type(error) is kind
    assert words in str(error) and "bucket/key" in str(error) and error.advice
    assert len(server.requests) == 1, "an origin must not retry by itself"


@pytest.mark.parametrize("case", ["no such bucket", "expired token", "other region, 400"])
def test_a_failed_head_still_tells_the_reason(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The answer to a HEAD has no body: wrong bucket, expired token and wrong region would all be "400" or "404"."""
    reply, kind, words = OF_S3[case]
    error, server = outcome(monkeypatch, CLIENTS["obstore"], head, reply)
    assert type(error) is kind and words in str(error)
    assert len(server.requests) == 2


@pytest.mark.parametrize("client", CLIENTS)
def test_a_login_page_is_not_an_object(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """A captive proxy answers 200 with HTML to everything; its page must never be trained on."""
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 18\r\n\r\n<html>login</html>"
    error, _ = outcome(monkeypatch, CLIENTS[client], get, page)
    assert type(error) is OriginMisconfigured and "proxy or login page" in error.advice
    error, _ = outcome(monkeypatch, CLIENTS[client], head, page)
    assert type(error) is OriginMisconfigured and "neither ETag nor Last-Modified" in str(error)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_ignores_ranges_is_refused(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    whole = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 10\r\n' + DATE + b"\r\n0123456789"
    error, _ = outcome(monkeypatch, CLIENTS[client], get, whole)
    assert type(error) is OriginMisconfigured and "206" in str(error)


@pytest.mark.parametrize("client", CLIENTS)
def test_another_range_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    other = b'HTTP/1.1 206 P\r\nContent-Range: bytes 3-5/10\r\nETag: "e"\r\nContent-Length: 3\r\n' + DATE + b"\r\n345"
    error, _ = outcome(monkeypatch, CLIENTS[client], get, other)
    assert type(error) is OriginMisconfigured


@pytest.mark.parametrize("client", CLIENTS)
def test_a_range_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Some servers ignore If-Match: the answer's own etag is compared as well."""
    other = RANGE + b'ETag: "new"\r\nContent-Length: 3\r\n' + DATE + b"\r\n234"
    error, _ = outcome(monkeypatch, CLIENTS[client], get, other)
    assert type(error) is ObjectChanged and '"new"' in str(error)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("then", ["close", "reset", "hold"])
def test_a_body_that_ends_early_or_stalls_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, client: str, then: str
) -> None:
    """Two bytes of three, then nothing: an error, in bounded time, never two bytes."""
    error, _ = outcome(
        monkeypatch, CLIENTS[client], get, RANGE + b'ETag: "e"\r\nContent-Length: 3\r\n' + DATE + b"\r\n23", then
    )
    assert type(error) is OriginUnavailable and error.is_retryable


@pytest.mark.parametrize("client", CLIENTS)
def test_a_body_that_only_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """A byte now and then keeps every read timeout happy; the deadline of the whole request ends it."""
    long = b'HTTP/1.1 206 P\r\nContent-Range: bytes 2-4/10\r\nETag: "e"\r\nContent-Length: 300\r\n' + DATE + b"\r\n2"
    error, _ = outcome(monkeypatch, CLIENTS[client], get, long.replace(b"2-4/10", b"2-4/1000"), "trickle")
    assert isinstance(error, OriginUnavailable | OriginMisconfigured)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("then", ["close", "reset", "hold"])
def test_no_answer_at_all_is_unavailable(monkeypatch: pytest.MonkeyPatch, client: str, then: str) -> None:
    error, _ = outcome(monkeypatch, CLIENTS[client], get, b"", then)
    assert type(error) is OriginUnavailable
    assert ("timed out" in str(error)) == (then == "hold")


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_refused_connection_names_the_endpoint_setting(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # discard: nobody listens there

    async def main() -> OriginError:
        with pytest.raises(OriginError) as caught:
            await origin_for(CLIENTS[client], QUICK).head(CLIENTS[client])
        await close_origins()
        return caught.value

    error = asyncio.run(main())
    assert type(error) is OriginUnavailable and "AWS_ENDPOINT_URL" in error.advice


@pytest.mark.parametrize("client", CLIENTS)
def test_an_upload_may_take_longer_than_a_read_timeout(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """While a body is being sent nothing comes back: no reason to give the connection up. The server takes the body in its own time."""
    body, read_timeout_s = bytes(2**22), 1.0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                if request.startswith(b"PUT"):
                    if b"100-continue" in request.lower():
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    await asyncio.sleep(read_timeout_s * 2)
                    await reader.readexactly(len(body))
                writer.write(b'HTTP/1.1 200 OK\r\nETag: "e"\r\n' + DATE)
                writer.write(b"Content-Length: %d\r\n\r\n" % (0 if request.startswith(b"PUT") else len(body)))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> int:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**16)
        async with server:
            endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            use_endpoint(monkeypatch, endpoint)
            url = CLIENTS[client].format(endpoint=endpoint)
            info = await origin_for(url, OriginOptions(read_timeout_s=read_timeout_s)).put(url, body)
            await close_origins()
            return info.size_bytes

    assert asyncio.run(main()) == len(body)


def test_retry_after_is_passed_on_where_the_library_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore hides response headers of failures; s3fs shows them."""
    reply = answer("503 S", "SlowDown", headers="Retry-After: 7\r\n")
    error, _ = outcome(monkeypatch, CLIENTS["s3fs"], get, reply)
    assert isinstance(error, OriginThrottled) and error.retry_after_s == 7
    error, _ = outcome(monkeypatch, CLIENTS["obstore"], get, reply)
    assert isinstance(error, OriginThrottled) and error.retry_after_s is None


def test_a_weak_etag_is_compared_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """If-Match never matches a weak etag (RFC 9110): sent, it would make every range of such a server fail."""

    async def main() -> bytes:
        async with CannedServer(
            RANGE + b'ETag: W/"e"\r\nContent-Length: 3\r\n' + DATE + b"\r\n234", "close"
        ).run() as server:
            url = f"{server.endpoint}/x"
            data = bytes(await origin_for(url).get_range(url, 'W/"e"', 2, 5))
            assert b"if-match" not in server.requests[0].lower()
            return data

    assert asyncio.run(main()) == b"234"


@pytest.mark.parametrize("name", ["connect_timeout_s", "read_timeout_s", "max_idle_connections"])
def test_an_option_that_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(CacheConfigError, match=name):
        OriginOptions(**{name: 0})
