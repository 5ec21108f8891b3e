"""The walls of the room: what it may import, and what a start may not pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import launcher.fabric

FOLDER = Path(launcher.fabric.__file__).parent

SHELL = {
    "probe",
    "probe_devices",
    "probe_gpus",
    "probe_host",
    "probe_kernel_log",
    "root",
    "peer",
    "serve",
    "workers",
    "jsonlines",
    "conduct",
    "compute",
    "collective",
    "doctor",
    "recorded",
}
"""Modules that act. All others decide: no files, no sockets, no processes, no clock."""

ACTING = {
    "os",
    "socket",
    "subprocess",
    "threading",
    "time",
    "pathlib",
    "concurrent",
    "ctypes",
    "numpy",
    "torch",
    "pynvml",
}


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_the_room_imports_nothing_else_of_the_launcher() -> None:
    for path in FOLDER.glob("*.py"):
        foreign = {
            name for name in _imports(path) if name.startswith("launcher") and not name.startswith("launcher.fabric")
        }
        assert not foreign, path.name


def test_what_decides_does_not_act() -> None:
    """Rules and checks are functions of facts, so that they can be replayed on another machine's facts."""
    shells = {f"launcher.fabric.{name}" for name in SHELL}
    for path in FOLDER.glob("*.py"):
        if path.stem in SHELL or path.stem == "__init__":
            continue
        imports = _imports(path)
        assert not {name.split(".")[0] for name in imports} & ACTING, path.name
        assert not imports & shells, path.name


def test_a_start_does_not_import_torch_or_ray() -> None:
    """The launcher runs the cheap part at every start; importing torch alone would double its time."""
    code = (
        "import sys; from launcher.fabric.doctor import examine; from launcher.fabric.probe import probe\n"
        "from launcher.fabric.rules import GangRequest\n"
        "examine([probe()], GangRequest(), {})\n"
        "print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
