"""What objects are called now: url → generation. HEAD, shared and believed for a while; while the origin is away, the last one seen."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cache.blocks import ObjectId
from cache.daemon.pool import WorkerPool
from cache.errors import CacheError, ObjectChanged, OriginUnavailable
from cache.residency.machine import Residency
from cache.residency.retry import RetryPolicy

log = logging.getLogger("railhead.cache")

T = TypeVar("T")

MAX_HEADS_AT_ONCE = 64
"""A window of an announced order may name thousands of objects; asking for all at once is how 503s begin."""

MAX_HEADS = 16_384
"""How many answers to HEAD are kept before those that have expired are thrown out."""

MAX_LISTED = 200_000
"""How many objects of listings are believed at once, for as long as a HEAD is."""

HEAD_RETRY = RetryPolicy(max_attempts=5, base_s=0.1, cap_s=2.0)


class Catalogue:
    """Asks the origin through the workers; any task of the event loop may ask at once."""

    def __init__(self, pool: WorkerPool, residency: Residency, metadata_ttl_s: float) -> None:
        self._pool = pool
        self._residency = residency
        self._ttl_s = metadata_ttl_s
        self._heads: dict[str, tuple[float, asyncio.Task[ObjectId]]] = {}
        self._listed: dict[str, tuple[float, ObjectId]] = {}
        self._latest: dict[str, ObjectId] = {}
        self._generations: dict[tuple[str, str], ObjectId] = {}
        self._rng = random.Random()
        self._head_slots = asyncio.Semaphore(MAX_HEADS_AT_ONCE)
        self.all_known: Callable[[], Awaitable[None]] | None = None
        """Waits until `remember` has been called with all that is on the disk: only then is it certain that a generation is not here."""

    async def find(self, url: str, etag: str | None) -> ObjectId:
        """The object as it is now, or at `etag`. Raises OriginError; ObjectChanged when it is no longer at `etag`."""
        known = self._generations.get((url, etag)) if etag is not None else None
        # A generation that is still known here serves those who opened it, also after the origin has a newer one.
        object_id = known if known is not None else await self._head(url)
        if etag is not None and object_id.etag != etag and self.all_known is not None:
            await self.all_known()
            object_id = self._generations.get((url, etag), object_id)
        if etag is not None and object_id.etag != etag:
            raise ObjectChanged(
                f"{url} was {etag} when it was opened and is {object_id.etag} now",
                advice="open it again to read the new generation",
                url=url,
            )
        return object_id

    async def list_objects(self, url: str) -> list[dict[str, Any]]:
        """What lies below a url. What it says of the objects is believed like a HEAD: they are opened next, and each would ask again."""
        asked_s = time.monotonic()
        frame = await self._with_retry(lambda: self._pool.request({"op": "list", "url": url}))
        objects = list(frame.header["objects"])
        if len(self._listed) + len(objects) > MAX_LISTED:
            self._listed = {u: item for u, item in self._listed.items() if asked_s - item[0] < self._ttl_s}
        for info in objects[: MAX_LISTED - len(self._listed)]:
            self._listed[info["url"]] = (asked_s, ObjectId(info["url"], info["etag"], info["size_bytes"]))
        return objects

    async def _head(self, url: str) -> ObjectId:
        """HEAD, shared by all who ask within the time to live. When the origin is away the generation seen last serves on."""
        now = time.monotonic()
        if len(self._heads) > MAX_HEADS:
            self._heads = {u: (s, t) for u, (s, t) in self._heads.items() if not t.done() or now - s < self._ttl_s}
        listed = self._listed.get(url)
        if listed is not None and now - listed[0] < self._ttl_s:
            return self._known_now(listed[1])
        cached = self._heads.get(url)
        if cached is not None and (not cached[1].done() or now - cached[0] < self._ttl_s):
            task = cached[1]
        else:
            task = asyncio.create_task(self._head_origin(url))
            # Who asked may have gone before it fails: then nobody is left to be told, and that is no error of ours.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._heads[url] = (now, task)
        try:
            # Shielded: one reader that goes away must not take the answer from the others.
            object_id = await asyncio.shield(task)
        except OriginUnavailable:
            self._heads.pop(url, None)
            if url not in self._latest and self.all_known is not None:
                await self.all_known()
            known = self._latest.get(url)
            if known is None:
                raise
            log.warning("%s: the origin does not answer; going on with the generation seen last (%s)", url, known.etag)
            return known
        except CacheError:
            self._heads.pop(url, None)
            raise
        return self._known_now(object_id)

    def _known_now(self, object_id: ObjectId) -> ObjectId:
        self._latest[object_id.url] = object_id
        self.remember(object_id)
        return object_id

    def remember(self, object_id: ObjectId) -> None:
        """This generation exists, by HEAD or by what is on the disk."""
        if len(self._generations) > 2 * self._residency.num_objects + 1000:
            # What the machine has forgotten (closed everywhere, nothing on disk) need not be remembered here.
            is_known = self._residency.is_known
            self._generations = {key: oid for key, oid in self._generations.items() if is_known(oid.content_id)}
            self._latest = {url: oid for url, oid in self._latest.items() if is_known(oid.content_id)}
        self._latest[object_id.url] = object_id
        self._generations[object_id.url, object_id.etag] = object_id

    async def _head_origin(self, url: str) -> ObjectId:
        async with self._head_slots:
            frame = await self._with_retry(lambda: self._pool.request({"op": "head", "url": url}))
        info = frame.header["info"]
        return ObjectId(info["url"], info["etag"], info["size_bytes"])

    async def _with_retry(self, request: Callable[[], Awaitable[T]]) -> T:
        attempts = 0
        while True:
            try:
                return await request()
            except CacheError as error:
                attempts += 1
                asked_s = getattr(error, "retry_after_s", None)
                delay_s = HEAD_RETRY.delay_s(attempts, asked_s, self._rng) if error.is_retryable else None
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)

    def forget(self, object_id: ObjectId) -> None:
        """The origin has another generation: the next open must ask."""
        log.warning("%s changed at the origin; it was %s", object_id.url, object_id.etag)
        self._heads.pop(object_id.url, None)
        self._listed.pop(object_id.url, None)
        if self._latest.get(object_id.url) == object_id:
            del self._latest[object_id.url]

    async def close(self) -> None:
        tasks = [task for _, task in self._heads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
