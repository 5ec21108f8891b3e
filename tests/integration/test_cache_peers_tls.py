"""TLS between daemons, with real certificates: bytes travel encrypted, and who has another authority's certificate is no peer."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.seaweed import free_ports
from tests.counting_origin import CountingOrigin
from tests.daemon import CacheDaemon, wait_until
from tests.integration.test_cache_peers import OpenCache, members, put_objects, read_all, together

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


def authority(folder: Path) -> Path:
    """A directory with a CA and a certificate of it."""
    folder.mkdir()
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key, request = str(folder / "ca.pem"), str(folder / "ca-key.pem"), str(folder / "request.pem")
    openssl("req", "-x509", *curve, "-subj", "/CN=ca", "-days", "2", "-keyout", ca_key, "-out", ca)
    openssl("req", *curve, "-subj", "/CN=node", "-keyout", str(folder / "key.pem"), "-out", request)
    signed = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-out", str(folder / "cert.pem"))
    openssl("x509", "-req", "-in", request, *signed)
    return folder


def test_peers_with_certificates_of_one_authority_share_and_another_is_none(
    tmp_path: Path, counting_origin: CountingOrigin, open_cache: OpenCache
) -> None:
    """All three have the same key: it is the certificate that keeps the third out."""
    objects = put_objects(counting_origin)
    total = sum(map(len, objects.values()))
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs")
    ports, key = free_ports(3), tmp_path / "key"
    key.write_text("0123456789abcdef" * 2)
    key.chmod(0o600)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    with ExitStack() as stack:
        daemons = []
        for port, folder in zip(ports, (ours, ours, theirs), strict=True):
            options = ["--peers", addresses, "--peer-listen", f"127.0.0.1:{port}", "--peer-key-file", str(key)]
            options += ["--peer-tls-cert", str(folder / "cert.pem"), "--peer-tls-key", str(folder / "key.pem")]
            options += ["--peer-tls-ca", str(folder / "ca.pem")]
            daemons.append(stack.enter_context(CacheDaemon(options=tuple(options))))
        *friends, stranger = daemons
        together(friends)
        wait_until(lambda: "does not answer" in stranger.log, "the stranger says that nobody speaks with it")
        for daemon in friends:
            read_all(open_cache(daemon.socket), objects)
        assert counting_origin.bytes_sent == total
        assert members(stranger) == 1
        read_all(open_cache(stranger.socket), objects)
        assert counting_origin.bytes_sent == 2 * total
