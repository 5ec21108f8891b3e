"""What the docs say is so."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.k8s.commands import SUBMIT_FLAGS
from launcher.k8s.fabric import FABRICS
from launcher.k8s.flags import BY_NAME as KUBE_FLAGS
from launcher.k8s.jobfile import _ELSEWHERE
from launcher.k8s.lookups import LOOKUP_FLAGS
from launcher.k8s.manifest import render
from launcher.k8s.request import cut, with_job_file
from launcher.k8s.resolve import to_job
from launcher.options.table import BY_NAME as LAUNCHER_FLAGS

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


def test_every_rule_is_explained_and_every_explained_rule_exists() -> None:
    explained = set(
        re.findall(
            r"`([a-z0-9-]+)`",
            "".join(re.findall(r"^\| (`.*?) \|", (DOCS / "kubernetes-rules.md").read_text(), re.MULTILINE)),
        )
    )
    source = "".join(path.read_text() for path in (ROOT / "launcher" / "k8s").glob("rules*.py"))
    written = set(re.findall(r'Violation\(\s*"([a-z0-9-]+)"', source))
    built = {f"duplicate-{kind}" for kind in ("container", "volume")} | {
        f"sidecar-{kind}-waits" for kind in ("startup", "readiness", "liveness")
    }
    assert explained == written | built


def test_the_job_file_in_the_docs_renders() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "kubernetes-jobfile.md").read_text(), re.DOTALL)
    job = to_job(with_job_file(cut([]), example, "job.yaml"), {"WANDB_API_KEY": "k"}, lambda _: "")
    assert render(job).main["metadata"]["name"] == "resnet"


def test_every_fabric_and_every_sample_is_in_the_docs() -> None:
    text = (DOCS / "kubernetes.md").read_text()
    for name in FABRICS:
        assert name == "none" or f"| `{name}` |" in text
    howto = (DOCS / "kubernetes-howto.md").read_text()
    headings = "".join(re.findall(r"^## .*$", howto, re.MULTILINE))
    for path in (ROOT / "k8s" / "samples").glob("*.job.yaml"):
        name = path.name.removesuffix(".job.yaml")
        assert f"`{name}`" in headings and f"`{name}`" in text
        assert f"python -m launcher submit --file k8s/samples/{path.name}" in howto


def test_the_flags_that_the_docs_and_samples_name_exist() -> None:
    """A flag that was renamed is found by whoever copies the line, else."""
    known = {*KUBE_FLAGS, *LAUNCHER_FLAGS, *SUBMIT_FLAGS, *LOOKUP_FLAGS, "help"}
    for path in DOCS.glob("kubernetes*.md"):
        for line in path.read_text().splitlines():
            if "python -m launcher" in line:
                named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", line.partition("train.py")[0]))
                assert named <= known, (path.name, line)


def test_files_that_the_docs_and_messages_name_are_there() -> None:
    texts = [
        path.read_text()
        for path in (
            *DOCS.glob("kubernetes*.md"),
            *(ROOT / "launcher" / "k8s").glob("*.py"),
            ROOT / "k8s" / "README.md",
        )
    ]
    named = {name for text in texts for name in re.findall(r"\b(?:docs|k8s)/[\w/-]+\.(?:md|yaml)\b", text)}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_what_other_tools_call_it_leads_to_a_key_that_exists() -> None:
    known = set(re.findall(r'Flag\(\s*"([a-z-]+)"', (ROOT / "launcher" / "k8s" / "flags.py").read_text()))
    launcher = set(re.findall(r'Option\(\s*"([a-z-]+)"', (ROOT / "launcher" / "options" / "table.py").read_text()))
    assert set(_ELSEWHERE.values()) <= known | launcher | {"run"}
