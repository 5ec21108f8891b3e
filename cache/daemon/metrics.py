"""The daemon over HTTP: /metrics (Prometheus), /healthz, /status (JSON). Read-only, optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cache.errors import CacheConfigError
from cache.residency.health import Health
from cache.residency.on_readers import CAUSES

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

GAUGES = {
    "capacity_bytes": "Bound on the bytes of the cache's files",
    "used_bytes": "Bytes of the cache's files, reserved and held ones included",
    "held_bytes": "Bytes of evicted files that readers still hold open",
    "files": "Extent files, evicted ones that are held included",
    "extents": "Extents on disk",
    "in_flight_blocks": "Blocks being fetched or verified",
    "waiting_requests": "Requests of readers that wait for a block",
    "clients": "Connected reader processes",
    "streams": "Readers with a known order",
    "announced_visits": "Reads that are known in advance",
    "uptime_s": "Seconds since the daemon started",
}
FORECAST = {
    "utilisation": (
        "forecast_utilisation_ratio",
        "Of training's time, what it is expected to compute, given the origin",
    ),
    "need_bytes_per_s": ("forecast_need_bytes_per_second", "What training reads for each second of computing"),
    "here_share": ("forecast_here_ratio", "Of what training will read, what is on this node's disk"),
    "origin_need_bytes_per_s": ("forecast_origin_need_bytes_per_second", "What the origin would have to give"),
    "origin_gives_bytes_per_s": (
        "forecast_origin_gives_bytes_per_second",
        "What the origin gave when it was busy last",
    ),
}
"""Without a value while it is not known."""
DISK_STATE = "1 for the state that the disk's health is in"
COUNTERS = {
    "fetched_blocks": "Blocks fetched from the origin or a peer",
    "borrowed_bytes": "Bytes taken from other nodes",
    "lent_bytes": "Bytes given to other nodes",
    "peer_bypasses": "Fetches that another node should have served and did not",
    "fetched_bytes": "Bytes fetched from the origin",
    "demand_fetches": "Fetches that a reader waited for",
    "prefetches": "Fetches ahead of the readers",
    "delayed_hits": "Reads that waited for a fetch already under way",
    "verified_blocks": "Blocks read back and found sound",
    "rotten_blocks": "Blocks on disk that did not match their checksum and were discarded",
    "retries": "Fetches tried again",
    "failed_blocks": "Fetches given up",
    "evicted_extents": "Extents evicted",
    "evicted_bytes": "Bytes evicted",
    "scrubbed_blocks": "Blocks read back by scrubbing",
    "lost_extents": "Extent files that somebody removed, cut or damaged under the daemon",
    "refused_for_room": "Reads sent to the origin because no room could be made",
}
READERS = {
    "hits": "Reads served without a request to the daemon",
    "misses": "Reads that asked the daemon and waited",
    "direct_reads": "Reads that went to the origin past the daemon",
    "hit_bytes": "Bytes read without a request to the daemon",
    "miss_bytes": "Bytes read after waiting for the daemon",
    "direct_bytes": "Bytes read from the origin past the daemon",
    "wait_s": "Seconds that readers waited for data",
}


WAIT_CAUSES = (*CAUSES[1:], "direct", "open")
WAITS = "Seconds that readers waited for data, by what they waited for"


class HasStatus(Protocol):
    def status(self) -> dict[str, Any]: ...


class _DaemonCollector:
    def __init__(self, daemon: HasStatus) -> None:
        self._daemon = daemon

    def collect(self) -> Iterator[Metric]:
        status = self._daemon.status()
        for key, text in GAUGES.items():
            yield GaugeMetricFamily(f"railhead_cache_{_unit(key)}", text, value=status[key])
        for key, (name, text) in FORECAST.items():
            yield GaugeMetricFamily(f"railhead_cache_{name}", text, value=status["forecast"][key])
        states = GaugeMetricFamily("railhead_cache_disk_state", DISK_STATE, labels=["state"])
        for health in Health:
            states.add_metric([health.value], float(status["disk"]["state"] == health.value))
        yield states
        for key, text in COUNTERS.items():
            yield CounterMetricFamily(f"railhead_cache_{_unit(key)}", text, value=status["counters"][key])
        for key, text in READERS.items():
            yield CounterMetricFamily(f"railhead_cache_reader_{_unit(key)}", text, value=status["readers"].get(key, 0))
        waits = CounterMetricFamily("railhead_cache_reader_wait_by_cause_seconds", WAITS, labels=["cause"])
        for cause in WAIT_CAUSES:
            waits.add_metric([cause.replace(" ", "-")], status["readers"].get(f"wait_s:{cause}", 0.0))
        yield waits


def _unit(key: str) -> str:
    """Prometheus spells units out."""
    return key[: -len("_s")] + "_seconds" if key.endswith("_s") else key


async def start_http(address: tuple[str, int], daemon: HasStatus) -> web.AppRunner:
    """Listens and serves; `cleanup()` of what is returned ends it. Raises CacheConfigError when the port is taken."""
    registry = CollectorRegistry(auto_describe=False)
    collector: Collector = _DaemonCollector(daemon)
    registry.register(collector)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(request: web.Request) -> web.Response:
        return web.json_response(daemon.status())

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/status", status)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, *address).start()
    except OSError as error:
        await runner.cleanup()
        raise CacheConfigError(
            f"cannot serve metrics at {address[0]}:{address[1]}: {error.strerror}",
            advice="choose another --metrics address",
        ) from error
    return runner
