"""Metrics of the job that this launcher runs: over HTTP, or in a file for node_exporter. Only where asked for; prometheus_client is
imported then alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from launcher.errors import SpecError
from launcher.gang.tally import GangProgress
from launcher.journal import Entry
from launcher.report.goodput import goodput
from launcher.report.live import point_of
from launcher.report.metrics import COUNTERS, GAUGES, LABELS, PREFIX, Value, values
from launcher.report.record import Point, RunRecord
from launcher.report.state import state_of

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_WRITE_EVERY_S = 10.0


class Exporter:
    """address: HOST:PORT to serve on. file: what to write, whole each time. Raises SpecError where that cannot be done.

    `entry` and `progress` are called from the controller's thread; whoever scrapes comes in threads of their own.
    """

    def __init__(
        self, run_dir: str, address: tuple[str, int] | None, file: str | None, say: Callable[[str], None]
    ) -> None:
        from prometheus_client import CollectorRegistry

        self._run_name = os.path.basename(run_dir)
        self._run = RunRecord()
        self._latest: Point | None = None
        self._now_s = 0.0
        self._began_s: float | None = None
        self._lock = threading.Lock()
        self._file = file
        self._written_s = float("-inf")
        self._say = say
        self._has_complained = False
        self._registry: Any = CollectorRegistry()
        self._registry.register(self)
        self._server = self._serve(address) if address is not None else None
        if file is not None:
            self._write(raising=True)

    def entry(self, entry: Entry) -> None:
        with self._lock:
            self._began_s = entry.mono_s if self._began_s is None else self._began_s
            before = self._run.attempt
            self._run.see(entry)
            if self._run.attempt is not before:
                self._latest = None
            self._now_s = max(self._now_s, entry.mono_s - self._began_s)
        if self._run.ending is not None and self._file is not None:
            self._write()

    def progress(self, progress: GangProgress, now: float) -> None:
        with self._lock:
            self._now_s = now - (self._began_s if self._began_s is not None else now)
            self._latest = point_of(progress, self._now_s)
        if self._file is not None and now - self._written_s >= _WRITE_EVERY_S:
            self._written_s = now
            self._write()

    def close(self) -> None:
        """Nothing is served any more; a file stays, with the last word."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            state = state_of(self._run, True)
            good = goodput(self._run, self._now_s)
            found: list[Value] = list(values(self._run, state, good, self._latest))
        for name, words in (*GAUGES.items(), *COUNTERS.items()):
            labels = ["run", LABELS[name]] if name in LABELS else ["run"]
            family = (CounterMetricFamily if name in COUNTERS else GaugeMetricFamily)(
                PREFIX + name, words, labels=labels
            )
            for value in found:
                if value.name == name:
                    family.add_metric([self._run_name, *([value.label] if name in LABELS else [])], value.value)
            if family.samples:
                yield family

    def _serve(self, address: tuple[str, int]) -> tuple[Any, threading.Thread]:
        from prometheus_client import start_http_server

        host, port = address
        try:
            server, thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise SpecError(
                f"--metrics {host}:{port}: {error.strerror}", advice="name another port, or 0 for a free one"
            ) from error
        if port == 0:
            self._say(f"metrics at http://{host}:{server.server_port}/metrics")
        return server, thread

    def _write(self, *, raising: bool = False) -> None:
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(self._file or "", self._registry)
        except OSError as error:
            words = f"--metrics-file {self._file}: {error.strerror}"
            if raising:
                raise SpecError(words, advice="its directory must exist and be writable") from error
            if not self._has_complained:
                self._has_complained = True
                self._say(f"{words}; the job goes on without it")
