"""An S3 server that looks at who asks: requests signed with the wrong access key, or for what nobody may read, get S3's own answers."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

ANSWERS = {
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "region": (
        400,
        "AuthorizationHeaderMalformed",
        "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'",
    ),
    "missing": (404, "NoSuchKey", "The specified key does not exist."),
}


class KeyedStore:
    """`objects`: by `/bucket/key`. `key`: the access key that is good now. `refuse`: one of ANSWERS for every request, whoever asks."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.key = "first"
        self.refuse = ""
        self.num_requests = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def keyed_store() -> Iterator[KeyedStore]:
    store = KeyedStore()
    try:
        yield store
    finally:
        store.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    store: KeyedStore


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        store, path = self.server.store, unquote(self.path.partition("?")[0])
        store.num_requests += 1
        signed = re.search(r"Credential=([^/%]+)", f"{self.headers.get('Authorization', '')} {self.path}")
        why = store.refuse or ("expired" if signed is None or signed[1] != store.key else "")
        data = store.objects.get(path)
        if why or data is None:
            status, code, message = ANSWERS[why or "missing"]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self._send(status, {}, body if with_body else b"", len(body))
            return
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Last-Modified": "Mon, 23 Nov 2026 18:00:00 GMT"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, headers, data if with_body else b"", len(data))
            return
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._send(206, headers, data[start:end] if with_body else b"", end - start)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
