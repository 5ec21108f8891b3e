"""Binding a process: done in a process of its own, which says what the kernel thinks of it."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
from launcher.fabric.bind_process import apply
from launcher.fabric.binding import Binding
print(apply(Binding(0, 0, {cpus}, {node}, "said by a test")))
for line in open("/proc/self/status"):
    if line.startswith("Cpus_allowed_list"):
        print(line.split()[1])
"""


def _bound(cpus: tuple[int, ...] | None, node: int | None) -> list[str]:
    code = CODE.format(cpus=cpus, node=node)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_bound_process_runs_on_these_cpus_only() -> None:
    cpu = max(os.sched_getaffinity(0))
    said, allowed = _bound((cpu,), None)
    assert said == f"bound to CPUs {cpu}"
    assert allowed == str(cpu)


def test_memory_is_preferred_or_the_reason_is_said() -> None:
    cpu = min(os.sched_getaffinity(0))
    said, allowed = _bound((cpu,), 0)
    assert said.startswith(f"bound to CPUs {cpu}")
    assert "memory of node 0 preferred" in said or "memory is not: " in said
    assert allowed == str(cpu)


def test_a_binding_that_the_kernel_refuses_is_a_sentence() -> None:
    before = os.sched_getaffinity(0)
    said, allowed = _bound((4000,), 0)
    assert said.startswith("not bound to CPUs 4000")
    assert len(allowed) > 0
    assert os.sched_getaffinity(0) == before


def test_no_binding_says_why() -> None:
    assert _bound(None, None)[0] == "not bound: said by a test"
