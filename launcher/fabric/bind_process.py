"""Binds the calling process as a Binding says: its CPUs, and the memory node that it prefers.

Called in a rank before it starts threads, so that all of them inherit it. A binding that the kernel refuses is not a reason
to stop a job: the sentence that comes back says what was not done.
"""

from __future__ import annotations

import ctypes
import os
import platform

from launcher.fabric.binding import Binding, cpu_list

SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call, which glibc does not wrap."""

MPOL_PREFERRED = 1
"""Take memory from this node while it has some; MPOL_BIND would kill the rank when the node is full."""

MAX_NODES = 1024


def apply(binding: Binding) -> str:
    """Binds this process; a sentence on what was done, or on why not."""
    if binding.cpus is None:
        return f"not bound: {binding.reason}"
    try:
        os.sched_setaffinity(0, binding.cpus)
    except OSError as error:
        return f"not bound to CPUs {cpu_list(binding.cpus)}: {error}"
    done = f"bound to CPUs {cpu_list(binding.cpus)}"
    if binding.memory_node is None:
        return done
    problem = _prefer_node(binding.memory_node)
    if problem is not None:
        return f"{done}; memory is not: {problem}"
    return f"{done}, memory of node {binding.memory_node} preferred"


def _prefer_node(node: int) -> str | None:
    number = SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"set_mempolicy is not known on {platform.machine()}"
    if not 0 <= node < MAX_NODES:
        return f"there is no memory node {node}"
    mask = (ctypes.c_ulong * (MAX_NODES // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << (node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, MPOL_PREFERRED, mask, ctypes.c_ulong(MAX_NODES)) != 0:
        return os.strerror(ctypes.get_errno())
    return None
