"""The attempt's store: a port that listens at once, a host that serves torch's clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from launcher.errors import NodeError
from launcher.node import store, store_host

HOST_PROGRAM = str(Path(store_host.__file__))


@pytest.fixture(params=["extension only", "whole torch", "fallback"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    listener, address = store.bind("127.0.0.1", None)
    argv = [sys.executable, "-P", HOST_PROGRAM, str(listener.fileno()), address.host, str(address.port)]
    env = dict(os.environ)
    if request.param == "whole torch":
        argv.append("whole")
    if request.param == "fallback":  # a torch whose extension cannot be had alone: the first try fails on the way to it
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class No:\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'torch._C' and not hasattr(sys.modules['torch'], '__version__'): raise ImportError(name)\n"
            "if sys.argv[-1:] != ['whole']: sys.meta_path.insert(0, No())\n"
        )
        env["PYTHONPATH"] = str(tmp_path)
    with listener:
        process = subprocess.Popen(argv, pass_fds=[listener.fileno()], env=env)
    yield address.host, address.port
    loaded_whole_torch = Path(f"/proc/{process.pid}/cmdline").read_text().endswith("whole\0")
    process.kill()
    process.wait()
    assert loaded_whole_torch == (request.param != "extension only"), "another way was taken than the one to be tested"


def test_torchs_client_finds_the_store_that_listened_before_it_was_hosted(address: tuple[str, int]) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    clients = [TCPStore(*address, is_master=False, timeout=timedelta(seconds=60)) for _ in range(2)]
    clients[0].set("key", "value")
    assert clients[1].get("key") == b"value"
    assert clients[1].add("counter", 2) == 2
    assert clients[0].add("counter", 3) == 5


def test_a_port_that_is_taken_is_said_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NodeError, match=f"cannot listen at 127.0.0.1, port {port}") as caught:
            store.bind("127.0.0.1", port)
    assert "leave out --master-port" in caught.value.advice


def test_an_address_that_is_not_ours_is_said() -> None:
    with pytest.raises(NodeError, match=r"cannot listen at 203\.0\.113\.7") as caught:
        store.bind("203.0.113.7", None)
    assert "--master-addr" in caught.value.advice
