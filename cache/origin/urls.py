"""What a url names: its store, its bucket and its key. Text in, text out; the only look outside is the current and the home directory.

Urls are literal, as in the AWS command line and in fsspec: `%20` in an s3:// or file:// url is those three characters, never a blank. The
exception is http(s), where a url is written percent-encoded and stays so.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from cache.errors import OriginMisconfigured

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
# Names that people use for the same thing; the first form is ours.
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "local": "file", "azure": "az", "adl": "abfs"}
VIA_FSSPEC = "fsspec+"


@dataclass(frozen=True)
class Location:
    """A url taken apart. `root` is the url of the store (bucket, host, file system) without a trailing slash; root + "/" + key is the url.

    `scheme` has no `fsspec+`; `via_fsspec` says whether the url asked for it.
    """

    scheme: str
    root: str
    bucket: str
    key: str
    via_fsspec: bool = False

    def url_of(self, key: str) -> str:
        return f"{self.root}/{key}"


def canonical_url(url: str) -> str:
    """The one spelling of a url that names the same object; a plain path becomes an absolute file:// url.

    Relative paths and `~` mean something only in the process of the person who wrote them: call this there, before the url travels.
    Raises OriginMisconfigured for an empty url or one without a key's place.

    >>> canonical_url("s3a://bucket/a key")
    's3://bucket/a key'
    >>> canonical_url("/data/../data/x%20y")
    'file:///data/x%20y'
    """
    if not url:
        raise OriginMisconfigured(
            "the url is empty", advice="Name an object, for example s3://bucket/train/0.tar or /data/0.tar."
        )
    match = _SCHEME.match(url)
    if match is None:
        if url.startswith("file:/"):  # file:/x, as some tools write it
            return _file_url(url.removeprefix("file:"))
        return _file_url(url)
    scheme, rest = match.group(1).lower(), url[match.end() :]
    via, plain = (VIA_FSSPEC, scheme.removeprefix(VIA_FSSPEC)) if scheme.startswith(VIA_FSSPEC) else ("", scheme)
    plain = _ALIASES.get(plain, plain)
    if plain == "file" and not via:
        return _file_url(_path_of_file_url(rest, url))
    return f"{via}{plain}://{rest}"


def parse(url: str) -> Location:
    """The parts of a url.

    >>> parse("s3://bucket/train/0.tar")
    Location(scheme='s3', root='s3://bucket', bucket='bucket', key='train/0.tar', via_fsspec=False)
    """
    url = canonical_url(url)
    match = _SCHEME.match(url)
    assert match is not None
    scheme, rest = match.group(1), url[match.end() :]
    via_fsspec = scheme.startswith(VIA_FSSPEC)
    plain = scheme.removeprefix(VIA_FSSPEC)
    if plain in ("file", "memory"):  # no bucket: everything after the scheme is a path
        return Location(plain, f"{scheme}://", "", rest.lstrip("/"), via_fsspec)
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise OriginMisconfigured(
            f"{url!r} names no bucket or host",
            url=url,
            advice=f"Write {plain}://BUCKET/KEY, with two slashes before the bucket.",
        )
    return Location(plain, f"{scheme}://{bucket}", bucket, key, via_fsspec)


def http_path(key: str) -> str:
    """The decoded path of an http url's key, which the client encodes again.

    >>> http_path("a%20b/c+d")
    'a b/c+d'
    """
    return unquote(key)


def is_beneath(key: str, prefix: str) -> bool:
    """Whether a key lies below a prefix taken as a directory; below "" lies everything.

    >>> is_beneath("train/0", "train"), is_beneath("train2/0", "train"), is_beneath("train", "train")
    (True, False, False)
    """
    return not prefix or key.startswith(prefix.rstrip("/") + "/")


def _file_url(path: str) -> str:
    return "file://" + os.path.abspath(os.path.expanduser(path))


def _path_of_file_url(rest: str, url: str) -> str:
    if rest.startswith(("/", "~", "./", "../")):
        return rest
    host, slash, path = rest.partition("/")
    if slash and host == "localhost":
        return "/" + path
    raise OriginMisconfigured(
        f"{url!r} names the host {host!r}, and files of other hosts cannot be read",
        url=url,
        advice=f"For a local file write file:///{rest}, with three slashes, or the plain path.",
    )
