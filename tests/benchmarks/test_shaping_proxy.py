"""The proxy that tests and benchmarks trust: what passes is untouched, what breaks breaks as told, what is counted is what left."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.proxy_process import ProxyProcess
from benchmarks.shaping import Behaviour, Counters, Request, TokenBucket, fault_of, repeated_bytes
from cache.errors import OriginError, OriginMisconfigured, OriginThrottled, OriginUnavailable
from cache.origin.options import OriginOptions
from cache.origin.registry import close_origins, origin_for
from tests.weed import use_endpoint

DATA = bytes(range(256)) * 4096  # 1 MiB


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        start, _, last = self.headers.get("Range", f"bytes=0-{len(DATA) - 1}").removeprefix("bytes=").partition("-")
        body = DATA[int(start) : int(last) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        for name, value in {
            "ETag": '"e"',
            "Last-Modified": "Mon, 23 Nov 2026 18:00:00 GMT",
            "Content-Length": str(len(body)),
            "Content-Range": f"bytes {start}-{last}/{len(DATA)}",
            "X-Host": self.headers["Host"],
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (body[: len(body) // 2], body[len(body) // 2 :], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections broken on purpose are no news
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def shared_proxy(upstream: str) -> Iterator[ProxyProcess]:
    with ProxyProcess(upstream) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: ProxyProcess) -> ProxyProcess:
    shared_proxy.set()
    shared_proxy.reset_counters()
    return shared_proxy


@contextmanager
def connected(proxy: ProxyProcess) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def fetch(proxy: ProxyProcess, start: int, end: int, options: OriginOptions | None = None) -> bytes | OriginError:
    """A range through the proxy with the real client, or its error."""

    async def main() -> bytes | OriginError:
        url = f"{proxy.endpoint}/bucket/key"
        try:
            return bytes(await origin_for(url, options or OriginOptions()).get_range(url, '"e"', start, end))
        except OriginError as e:
            return e
        finally:
            await close_origins()

    return asyncio.run(main())


def test_what_passes_is_untouched_and_connections_are_kept(proxy: ProxyProcess) -> None:
    """The Host header is part of an S3 signature: another one would make every signed request fail."""
    with connected(proxy) as connection:
        for _ in range(3):
            connection.request("GET", "/bucket/key", headers={"Range": "bytes=5-500004"})
            answer = connection.getresponse()
            assert answer.headers["X-Host"] == f"127.0.0.1:{proxy.port}"
            assert answer.read() == DATA[5:500005]
    assert proxy.counters()["connections"] == 1


def test_chunked_bodies_pass_in_both_directions(proxy: ProxyProcess) -> None:
    with connected(proxy) as connection:
        for _ in range(2):
            connection.request("PUT", "/x", body=iter([b"abc", b"defg" * 5000]), encode_chunked=True)
            assert connection.getresponse().read() == b"abc" + b"defg" * 5000


def test_expect_100_continue_is_answered(proxy: ProxyProcess) -> None:
    """botocore sends it with every PUT and waits."""
    with connected(proxy) as connection:
        connection.putrequest("PUT", "/x")
        connection.putheader("Content-Length", "3")
        connection.putheader("Expect", "100-continue")
        connection.endheaders(b"abc")
        assert connection.getresponse().read() == b"abc"


def test_objects_that_are_kept_are_served_as_the_upstream_serves_them(proxy: ProxyProcess) -> None:
    """From memory: the same bytes, version and heads, ranges and faults."""
    proxy.keep(["/kept/key"])

    def get(**headers: str) -> tuple[int, dict[str, str], bytes]:
        with connected(proxy) as connection:
            connection.request("GET", "/kept/key", headers={name.replace("_", "-"): v for name, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()

    status, headers, body = get()
    assert (status, body, headers["ETag"]) == (200, DATA, '"e"')
    status, headers, body = get(Range="bytes=100-299", If_Match='"e"')
    assert (status, body) == (206, DATA[100:300])
    assert (headers["ETag"], headers["Content-Length"]) == ('"e"', "200")
    assert headers["Content-Range"] == f"bytes 100-299/{len(DATA)}"
    assert fetch(proxy, 0, 100_000) == DATA[:100_000]
    proxy.change(cut_share=1.0)
    with pytest.raises(http.client.IncompleteRead):
        get(Range="bytes=0-99999")


def test_many_connections_at_once_are_each_served_right(proxy: ProxyProcess) -> None:
    def one(i: int) -> bool:
        return fetch(proxy, i * 1000, i * 1000 + 70_000) == DATA[i * 1000 : i * 1000 + 70_000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(32)))
    assert proxy.bytes_from_origin() == 32 * 70_000


BROKEN: dict[str, tuple[dict[str, Any], Callable[[bytes | OriginError], bool]]] = {
    "throttle": ({"retry_after_s": 3}, lambda got: isinstance(got, OriginThrottled)),
    "reset": ({}, lambda got: type(got) is OriginUnavailable),
    "cut": ({}, lambda got: type(got) is OriginUnavailable),
    "stall": ({"stall_s": 60}, lambda got: type(got) is OriginUnavailable),
    "trickle": ({"trickle_rate": 100}, lambda got: type(got) is OriginUnavailable),
    "html": ({}, lambda got: type(got) is OriginMisconfigured),
    "flip": ({}, lambda got: isinstance(got, bytes) and _bits_that_differ(got, DATA[:100_000]) == 1),
}


def _bits_that_differ(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_reaches_the_client_as_what_it_is(proxy: ProxyProcess, fault: str) -> None:
    """And only as often as told: the second try of the same range passes."""
    settings, expected = BROKEN[fault]
    proxy.set(**{f"{fault}_share": 1.0}, **settings, faults_per_range=1)
    # Only what never ends needs to be given up soon; a busy machine must not look like a fault.
    quick = OriginOptions(read_timeout_s=0.4, request_timeout_s=1) if fault in ("stall", "trickle") else OriginOptions()
    assert expected(fetch(proxy, 0, 100_000, quick))
    assert fetch(proxy, 0, 100_000) == DATA[:100_000]
    assert proxy.counters()["faults"] == {fault: 1}


def test_faults_meet_only_what_they_match(proxy: ProxyProcess) -> None:
    proxy.set(reset_share=1.0, match="^GET /other/")
    assert fetch(proxy, 0, 10) == DATA[:10]


def test_counters_prove_that_each_byte_left_once(proxy: ProxyProcess) -> None:
    """What "once per cluster" is tested with."""
    fetch(proxy, 0, 1000)
    fetch(proxy, 1000, 3000)
    counted = proxy.counters()
    assert counted["objects"]["/bucket/key"] == {
        "requests": 2,
        "bytes": 3000,
        "repeated_bytes": 0,
        "ranges": [[0, 1000], [1000, 3000]],
    }
    fetch(proxy, 500, 1500)
    assert proxy.counters()["objects"]["/bucket/key"]["repeated_bytes"] == 1000
    proxy.reset_counters()
    assert proxy.bytes_from_origin() == 0


def test_a_setting_that_does_not_exist_is_refused(proxy: ProxyProcess) -> None:
    """A test that misspells its fault would pass for the wrong reason."""
    with pytest.raises(ValueError, match="cut_shar"):
        proxy.set(cut_shar=1.0)
    with pytest.raises(ValueError, match="add up to 1"):
        proxy.set(cut_share=0.7, reset_share=0.7)


@pytest.mark.s3
def test_signed_s3_requests_pass(weed: Any, shared_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients, put, head, get and list, through the proxy to a real S3 server."""
    with ProxyProcess(weed.endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.endpoint)

        async def main() -> None:
            for scheme in ("s3", "fsspec+s3"):
                url = f"{scheme}://{shared_bucket}/through/{scheme}"
                origin = origin_for(url)
                info = await origin.put(url, DATA)
                assert bytes(await origin.get_range(url, info.etag, 7, 700_000)) == DATA[7:700_000]
                assert [i async for i in origin.list(url)] == [info]
            await close_origins()

        asyncio.run(main())
        assert proxy.counters()["requests"]["LIST"] >= 2


REQUESTS = st.builds(Request, st.sampled_from(["GET", "HEAD"]), st.text(min_size=1, max_size=5).map("/b/".__add__))


@given(st.integers(), st.lists(REQUESTS, min_size=1, max_size=20))
def test_faults_depend_on_the_seed_and_the_request_not_on_the_order(seed: int, requests: list[Request]) -> None:
    """Requests of several connections arrive in any order; a run must be repeatable all the same."""
    behaviour = Behaviour(cut_share=0.3, reset_share=0.3, seed=seed)
    forward = [fault_of(behaviour, request, 0) for request in requests]
    assert forward == [fault_of(behaviour, request, 0) for request in reversed(requests)][::-1]


def test_shares_are_the_shares_of_requests() -> None:
    behaviour = Behaviour(cut_share=0.2, flip_share=0.1)
    faults = [fault_of(behaviour, Request("GET", f"/b/{i}"), 0)[0] for i in range(4000)]
    assert abs(faults.count("cut") / 4000 - 0.2) < 0.03 and abs(faults.count("flip") / 4000 - 0.1) < 0.03


@given(
    rate=st.floats(1e3, 1e9),
    sends=st.lists(st.tuples(st.integers(1, 300_000), st.floats(0, 2)), min_size=1, max_size=50),
)
def test_a_bucket_never_exceeds_its_rate_by_more_than_the_burst(rate: float, sends: list[tuple[int, float]]) -> None:
    """Idle time must not be saved up: an origin does not get faster because nobody asked for a while."""
    bucket, now, burst = TokenBucket(rate, burst_bytes=100_000), 1000.0, 100_000
    done: list[tuple[float, int]] = []
    for num_bytes, pause_s in sends:
        now += bucket.reserve(num_bytes, now)
        done.append((now, num_bytes))
        now += pause_s
    for i, (begin, _) in enumerate(done):
        sent = sum(n for _, n in done[i:-1])  # the last piece is only now going out
        assert sent <= burst + rate * (done[-1][0] - begin) * (1 + 1e-6) + 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=12))
def test_repeated_bytes_are_all_bytes_less_the_distinct_ones(spans: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in spans]
    everything = [byte for start, end in ranges for byte in range(start, end)]
    assert repeated_bytes(ranges) == len(everything) - len(set(everything))


def test_a_client_that_leaves_is_counted_with_what_it_took() -> None:
    """Bytes of cancelled and hedged requests have left the origin too."""
    counters = Counters()
    counters.begin(Request("GET", "/b/k", (100, 200)), 206).body_bytes += 30
    assert counters.as_dict()["objects"]["/b/k"]["ranges"] == [(100, 130)]
