"""What one daemon believes of another: keys, replays, changed requests, and 10,000 messages that are none."""

from __future__ import annotations

import random
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blocks import ObjectId
from cache.daemon.lending import may_be_fetched
from cache.daemon.peerauth import (
    LIFETIME_S,
    MAX_SKEW_S,
    Ask,
    Nonces,
    authorization,
    check_authorization,
    is_proven,
    proof,
)
from cache.daemon.peerconfig import PeerConfig, peer_config
from cache.daemon.peerserver import Refusal, parse_request
from cache.errors import CacheConfigError

KEY, NONCE, NOW_S = b"k" * 32, "0123456789abcdef", 1_000_000.0
OBJECT = ObjectId("s3://b/train/0.tar", '"e"', 100 << 20)
ASK = Ask("node", OBJECT.content_id, 3, 7)


def _request(ask: Ask = ASK, *, key: bytes = KEY, object_id: ObjectId = OBJECT, now_s: float = NOW_S) -> bytes:
    lines = [
        f"GET {ask.target} HTTP/1.1",
        "Host: x",
        f"Authorization: {authorization(key, ask, NONCE, now_s)}",
        f"X-Railhead-Url: {quote(object_id.url, safe=':/')}",
        f"X-Railhead-Etag: {quote(object_id.etag, safe='')}",
        f"X-Railhead-Size: {object_id.size_bytes}",
    ]
    return "\r\n".join(lines).encode()


def _refused(raw: bytes, *, now_s: float = NOW_S, node: str = "node") -> int:
    with pytest.raises(Refusal) as refused:
        parse_request(raw, KEY, node, now_s)
    return refused.value.status


def test_a_sound_request_says_what_is_wanted() -> None:
    request = parse_request(_request(), KEY, "node", NOW_S)
    assert (request.ask, request.object_id, request.nonce) == (ASK, OBJECT, NONCE)


def test_another_key_is_refused() -> None:
    assert _refused(_request(key=b"x" * 32)) == 401


def test_a_request_for_one_node_is_of_no_use_at_another() -> None:
    assert _refused(_request(), node="other") == 401


@pytest.mark.parametrize("late_s", [LIFETIME_S + MAX_SKEW_S, 10_000.0, -(LIFETIME_S + MAX_SKEW_S + 1), -10_000.0])
def test_a_request_is_good_for_half_a_minute_and_the_clocks_difference(late_s: float) -> None:
    assert _refused(_request(), now_s=NOW_S + late_s) == 401


def test_no_other_object_can_be_slipped_in_under_a_signed_content_id() -> None:
    """The url is not signed by itself: the content id is, and it is the hash of url, etag and size."""
    for other in (ObjectId("s3://b/secret", '"e"', 100 << 20), ObjectId(OBJECT.url, '"f"', 100 << 20)):
        assert _refused(_request(object_id=other)) == 400


def test_blocks_that_the_object_does_not_have_are_refused() -> None:
    for first, end in ((0, 401), (5, 5), (7, 3)):
        assert _refused(_request(Ask("node", OBJECT.content_id, first, end))) == 400


@pytest.mark.parametrize(
    "line", ["GET /etc/passwd HTTP/1.1", "GET /v1/blocks/../../x/0-1 HTTP/1.1", "POST /v1/hello HTTP/1.1", "x"]
)
def test_nothing_but_content_ids_has_a_name_here(line: str) -> None:
    assert _refused(line.encode()) in (400, 404, 405)


def test_a_request_is_answered_once() -> None:
    nonces = Nonces(limit=3)
    assert nonces.is_new("a", NOW_S + 30, NOW_S)
    assert not nonces.is_new("a", NOW_S + 30, NOW_S)
    assert nonces.is_new("b", NOW_S + 30, NOW_S)
    assert nonces.is_new("c", NOW_S + 30, NOW_S)
    assert not nonces.is_new("d", NOW_S + 30, NOW_S), "a flood is refused, not forgotten"
    assert nonces.is_new("d", NOW_S + 500, NOW_S + 400)


def test_an_answer_is_proven_for_its_request_only() -> None:
    good = proof(KEY, ASK, NONCE, "00ff")
    assert is_proven(KEY, ASK, NONCE, "00ff", good)
    assert not is_proven(KEY, ASK, NONCE, "00fe", good)
    assert not is_proven(KEY, ASK, "fedcba9876543210", "00ff", good)
    assert not is_proven(KEY, Ask("node", OBJECT.content_id, 3, 8), NONCE, "00ff", good)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_any_authorization_is_a_sentence_or_sound(header: str) -> None:
    assert isinstance(check_authorization(KEY, ASK, header, NOW_S), str)


def test_ten_thousand_broken_messages_are_refused() -> None:
    """Sound requests with bytes changed, cut, doubled and inserted; and noise. None is believed, none breaks the server."""
    rng, sound = random.Random(7), _request()
    for _ in range(10_000):
        raw = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] ^= 1 << rng.randrange(8)
                case 1:
                    del raw[at : at + rng.randint(1, 20)]
                case 2:
                    raw[at:at] = rng.randbytes(rng.randint(1, 20))
                case _:
                    raw = raw[:at] + raw[at // 2 :]
            if not raw:
                break
        try:
            request = parse_request(bytes(raw), KEY, "node", NOW_S)
        except Refusal:
            continue
        # What is not signed (Host, spaces, the case of names) may differ; what is asked for may not.
        assert (request.ask, request.object_id, request.nonce) == (ASK, OBJECT, NONCE)


def test_only_stores_are_read_for_others() -> None:
    for url in ("s3://b/k", "gs://b/k", "https://data.example/k"):
        assert may_be_fetched(url, on_loopback=False)
    for url in (
        "file:///etc/passwd",
        "fsspec+file:///etc/passwd",
        "memory://x",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/x",
        "http://[::1]/x",
        "http://user@host/x",
        "",
    ):
        assert not may_be_fetched(url, on_loopback=False), url


def test_peers_beyond_loopback_need_a_key() -> None:
    with pytest.raises(CacheConfigError, match="without a key"):
        peer_config("10.0.0.1:7000", "0.0.0.0:7000", None, (None, None, None))
    assert peer_config("127.0.0.1:7000", "127.0.0.1:7000", None, (None, None, None)) is not None


def test_the_command_line_is_read_as_agreed(tmp_path: Path) -> None:
    key = tmp_path / "key"
    found = peer_config("dns:cache-peers:7070", "0.0.0.0:7070", key, (None, None, None))
    assert found == PeerConfig(("0.0.0.0", 7070), (), ("cache-peers", 7070), key)
    found = peer_config("a:1, [::1]:2", "0.0.0.0:7070", key, (None, None, None))
    assert found is not None
    assert found.addresses == (("a", 1), ("::1", 2))
    assert peer_config(None, None, None, (None, None, None)) is None


@pytest.mark.parametrize(
    "flags",
    [
        ("a:1", None, None, (None, None, None)),
        (None, "127.0.0.1:1", None, (None, None, None)),
        ("a", "127.0.0.1:1", None, (None, None, None)),
        ("dns:x", "127.0.0.1:1", None, (None, None, None)),
        ("a:1", "127.0.0.1:1", None, (Path("c"), None, None)),
        (None, None, Path("k"), (None, None, None)),
    ],
)
def test_half_a_configuration_is_refused(flags: tuple[None, None, None, tuple[None, None, None]]) -> None:
    with pytest.raises(CacheConfigError):
        peer_config(*flags)


def test_a_key_is_long_enough_and_not_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "key"
    config = PeerConfig(("0.0.0.0", 1), (("a", 1),), None, path)
    with pytest.raises(CacheConfigError, match="cannot read"):
        config.read_key()
    path.write_text("short\n")
    path.chmod(0o600)
    with pytest.raises(CacheConfigError, match="5 bytes"):
        config.read_key()
    path.write_text("0" * 32 + "\n")
    assert config.read_key() == b"0" * 32
    path.chmod(0o644)
    with pytest.raises(CacheConfigError, match="everybody"):
        config.read_key()
