"""What a benchmark starts does not outlive it."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTS_A_PROXY = """
import signal
from benchmarks.proxy_process import ProxyProcess
with ProxyProcess("127.0.0.1:9") as proxy:
    print(proxy.pid, flush=True)
    signal.pause()
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_proxy_ends_with_the_benchmark_that_started_it(how: str) -> None:
    """Left behind, it would hold its port, and its server half a gigabyte, until somebody looked."""
    benchmark = subprocess.Popen([sys.executable, "-c", STARTS_A_PROXY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert benchmark.stdout is not None
    with benchmark, benchmark.stdout:
        proxy = psutil.Process(int(benchmark.stdout.readline()))
        getattr(benchmark, how)()
        benchmark.wait(30)
        gone, alive = psutil.wait_procs([proxy], timeout=30)
        for process in alive:
            process.kill()
        assert gone == [proxy]
