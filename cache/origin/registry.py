"""Which origin serves a url."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from cache.origin import urls
from cache.origin.local_origin import LocalOrigin
from cache.origin.options import OriginOptions
from cache.origin.ports import Origin

_DEFAULT = OriginOptions()
_origins: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, OriginOptions], Origin]] = WeakKeyDictionary()


def origin_for(url: str, options: OriginOptions = _DEFAULT) -> Origin:
    """The origin of a url: one per store (bucket, host) and event loop, made on first use. Call it from a running event loop.

    s3, gs, az, abfs, http and https are read through obstore, file:// and plain paths directly, everything else, and any url with
    `fsspec+` before its scheme (`fsspec+s3://…` for s3fs), through fsspec. Raises OriginMisconfigured for an unknown scheme.
    """
    location = urls.parse(url)
    of_this_loop = _origins.setdefault(asyncio.get_running_loop(), {})
    key = (location.root, options)
    if key not in of_this_loop:
        of_this_loop[key] = _make(location, options)
    return of_this_loop[key]


async def close_origins() -> None:
    """Closes all origins of the running event loop."""
    for origin in _origins.pop(asyncio.get_running_loop(), {}).values():
        await origin.close()


def _make(location: urls.Location, options: OriginOptions) -> Origin:
    # Imported when first needed: obstore takes 20 ms and s3fs with botocore half a second, and a process often needs one of them only.
    if location.scheme == "file" and not location.via_fsspec:
        return LocalOrigin()
    if not location.via_fsspec and not (location.scheme == "s3" and options.prefer_s3fs):
        from cache.origin import obstore_origin

        if location.scheme in obstore_origin.SCHEMES:
            return obstore_origin.ObstoreOrigin(location, options)
    if location.scheme == "s3":
        from cache.origin.s3fs_origin import S3fsOrigin

        return S3fsOrigin(location, options)
    from cache.origin.fsspec_origin import FsspecOrigin

    return FsspecOrigin(location, options)
