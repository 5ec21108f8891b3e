"""The image's recipe, without a container engine: what it installs suffices for what it runs, and what manifests call is in it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "k8s" / "Dockerfile").read_text()
HEAVY = ("torch", "ray", "pyarrow", "pynvml", "kubernetes", "rich", "yaml", "launcher")


def stages() -> dict[str, str]:
    """Each stage's text, comments left out and continued lines joined."""
    plain = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM \S+ AS (\S+)$", plain, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_cache_image_installs_all_that_the_daemon_imports(tmp_path: Path) -> None:
    """The daemon starts where everything else cannot be imported."""
    block = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    run = (
        f"{block}import runpy\nsys.argv[0] = 'cache'\nrunpy.run_module('cache', run_name='__main__', alter_sys=True)\n"
    )
    args = [
        "serve",
        "--dir",
        str(tmp_path / "d"),
        "--capacity",
        "64MiB",
        "--socket",
        str(tmp_path / "s"),
        "--announce",
        "--metrics",
        "127.0.0.1:0",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", run, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as daemon:
        assert daemon.stdout is not None and daemon.stderr is not None
        try:
            line = daemon.stdout.readline()
            assert line, daemon.stderr.read().decode()
            assert json.loads(line)["event"] == "serving"
        finally:
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(timeout=20) == 0


def test_everything_that_the_cache_image_installs_is_a_dependency_of_ours() -> None:
    (install,) = re.findall(r"pip install -c constraints.txt ([^&]+)&&", stages()["build-cache"])
    declared = {
        re.split(r"[>\[]", text)[0]
        for text in re.findall(r'^    "([^"]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    }
    assert set(install.split()) <= declared


def test_no_stage_that_runs_runs_as_root_or_brings_a_compiler() -> None:
    assert "USER 1000" in stages()["base"] and "apt-get" not in DOCKERFILE
    for name in ("cache", "job"):
        assert "USER" not in stages()[name]
        assert re.search(rf"^FROM base AS {name}$", DOCKERFILE, re.MULTILINE)


def test_all_files_that_are_copied_are_there_and_not_ignored() -> None:
    ignored = (ROOT / "k8s" / "Dockerfile.dockerignore").read_text()
    copied = [
        word
        for text in stages().values()
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert copied
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}\n" in ignored


@pytest.mark.parametrize("name", ["smoke", "nightly"])
def test_every_command_of_a_sample_is_one_that_the_image_has(name: str) -> None:
    """`python` and `bash` by name, with modules that the image installs."""
    words: set[str] = set()
    modules: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, dict):
            command = (
                [str(word) for word in [*node.get("command", []), *node.get("args", [])]] if "image" in node else []
            )
            if isinstance(node.get("entrypoint"), str):
                command = shlex.split(node["entrypoint"])
            if command:
                words.add(command[0])
                modules.update(command[2:3] if command[1:2] == ["-m"] else [])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(list(yaml.safe_load_all((ROOT / "k8s" / "samples" / f"{name}.yaml").read_text())))
    assert words <= {"python", "bash", "chown"}
    assert modules <= {"launcher", "cache"}
    for module in modules:
        shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, cwd=ROOT, check=False)
        assert shown.returncode == 0
