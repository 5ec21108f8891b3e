"""The shaping proxy as a process of its own, for tests and benchmarks."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.parentage import ends_with_us

_ROOT = Path(__file__).resolve().parent.parent


class ProxyProcess:
    """`python -m benchmarks.shaping_proxy` in front of a server, steered over its control port. Use as a context manager.

    >>> with ProxyProcess("http://127.0.0.1:8333", first_byte_s=0.03) as proxy:      # doctest: +SKIP
    ...     run_something(AWS_ENDPOINT_URL=proxy.endpoint)
    ...     assert proxy.counters()["objects"]["/bucket/key"]["repeated_bytes"] == 0
    """

    def __init__(self, upstream: str, **behaviour: Any) -> None:
        self._upstream = upstream.removeprefix("http://")
        self._initial = behaviour
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.control_port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> ProxyProcess:
        command = [sys.executable, "-m", "benchmarks.shaping_proxy", "--upstream", self._upstream]
        self._process = subprocess.Popen(
            ends_with_us(command), cwd=_ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with {self._process.wait()}; its error is above")
        announced = json.loads(line)
        self.port, self.control_port = announced["port"], announced["control_port"]
        if self._initial:
            self.set(**self._initial)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()

    def set(self, **behaviour: Any) -> None:
        """Behaves so from the next request on; what is not named goes back to its default."""
        self._control("PUT", "/behaviour", behaviour)

    def change(self, **behaviour: Any) -> None:
        """Changes only what is named."""
        self._control("PATCH", "/behaviour", behaviour)

    def keep(self, paths: Iterable[str]) -> None:
        """From now on these objects are served from the proxy's memory (see Behaviour.keeps_objects), until `set` says otherwise."""
        self.set(keeps_objects=True)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            for path in paths:
                connection.request("GET", quote(path), headers={"Range": "bytes=0-0"})
                answer = connection.getresponse()
                answer.read()
                if answer.status != 206:
                    raise ValueError(f"GET {path}: {answer.status}")
        finally:
            connection.close()
        self.reset_counters()

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self._control("GET", "/counters")
        return counters

    def bytes_from_origin(self) -> int:
        """Bytes of objects that went to clients since the counters were reset."""
        return int(self.counters()["bytes_out"].get("GET", 0))

    def reset_counters(self) -> None:
        self._control("DELETE", "/counters")

    def _control(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.control_port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        # No proxies from the environment: this is loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            with e:
                raise ValueError(f"{method} {path}: {e.read().decode()}") from e
