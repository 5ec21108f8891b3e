"""A plain HTTP server with ranges, ETag and If-Match, or without them, for tests of HTTP origins. Runs in the test's event loop."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from types import TracebackType
from xml.sax.saxutils import escape

from aiohttp import web


class RangeServer:
    """Serves what is PUT to it. Turn features off to play a poorer server."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.sends_etag = True
        self.sends_last_modified = True
        self.honours_ranges = True
        self.honours_if_match = True
        self.url = ""
        self.lists: str | None = None
        """Whether, and in whose words (google, azure), what lies below `/bucket` can be listed."""

    async def __aenter__(self) -> RangeServer:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        if request.method == "PUT":
            # Each version is a second younger: Last-Modified has no finer grain, and no test should wait for it.
            version = self.objects[path][1] + 1 if path in self.objects else 1_700_000_000.0
            self.objects[path] = (await request.read(), version)
            return web.Response(status=201, headers=self._headers(path))
        if self.lists is not None and request.method == "GET" and "prefix" in request.query:
            return web.Response(text=self._listing(path.rstrip("/"), request.query["prefix"]), content_type="text/xml")
        if path not in self.objects:
            return web.Response(status=404)
        data, modified = self.objects[path]
        headers = self._headers(path)
        if self.honours_if_match and not self._matches(request, headers, modified):
            return web.Response(status=412)
        requested = request.http_range
        if request.method == "GET" and self.honours_ranges and "Range" in request.headers:
            start, end = requested.start, min(requested.stop or len(data), len(data))
            if start >= len(data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return web.Response(status=206, body=data[start:end], headers=headers)
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(data))})
        return web.Response(body=data, headers=headers)

    def _listing(self, bucket: str, prefix: str) -> str:
        """As Google (an S3-like listing) and Azure say what is in a bucket."""
        found = []
        for path in sorted(self.objects):
            key, headers = path.removeprefix(f"{bucket}/"), self._headers(path)
            if not path.startswith(f"{bucket}/{prefix}"):
                continue
            name, size, etag = escape(key), len(self.objects[path][0]), escape(headers["ETag"])
            if self.lists == "azure":
                about = f"<Last-Modified>{headers['Last-Modified']}</Last-Modified><Etag>{etag.strip(chr(34))}</Etag>"
                about += f"<Content-Length>{size}</Content-Length><Content-Type>x</Content-Type><BlobType>BlockBlob</BlobType>"
                found.append(f"<Blob><Name>{name}</Name><Properties>{about}</Properties></Blob>")
            else:
                when = datetime.fromtimestamp(self.objects[path][1], UTC).isoformat()
                found.append(
                    f"<Contents><Key>{name}</Key><LastModified>{when}</LastModified><ETag>{etag}</ETag><Size>{size}</Size></Contents>"
                )
        if self.lists == "azure":
            return f"<EnumerationResults><Blobs>{''.join(found)}</Blobs><NextMarker/></EnumerationResults>"
        return f"<ListBucketResult>{''.join(found)}</ListBucketResult>"

    def _matches(self, request: web.Request, headers: dict[str, str], modified: float) -> bool:
        wanted = request.headers.get("If-Match")
        if wanted is not None and wanted != headers.get("ETag"):
            return False
        since = request.headers.get("If-Unmodified-Since")
        return since is None or modified <= parsedate_to_datetime(since).timestamp()

    def _headers(self, path: str) -> dict[str, str]:
        data, modified = self.objects[path]
        headers = {"Accept-Ranges": "bytes"}
        if self.sends_etag:
            headers["ETag"] = f'"{hashlib.md5(data + str(modified).encode()).hexdigest()}"'
        if self.sends_last_modified:
            headers["Last-Modified"] = formatdate(modified, usegmt=True)
        return headers
