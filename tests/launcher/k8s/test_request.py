"""Flags and job files: one meaning, and a mistake is answered with its place and the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode
from launcher.k8s.manifest import render, to_yaml
from launcher.k8s.options import KubeJob
from launcher.k8s.request import cut, with_job_file
from launcher.k8s.resolve import to_job
from launcher.options.intent import understand
from launcher.options.parse import parse

FLAGS = ["--image", "reg/t:1", "--gpus", "8", "--nnodes", "2", "--nproc-per-node", "8"]
FILE = """\
name: resnet
image: reg/t:1
nnodes: 2
nproc_per_node: 8
gpus: 8
env:
  NCCL_DEBUG: INFO
run: train.py --lr 0.1
"""


def read(argv: list[str], text: str | None = None, environ: dict[str, str] | None = None) -> KubeJob:
    request = cut(argv)
    if text is not None:
        request = with_job_file(request, text, "job.yaml")
    return to_job(request, environ or {}, lambda path: f"text of {path}")


def test_a_job_file_and_the_same_flags_render_the_same_manifest() -> None:
    by_flags = read(["--name", "resnet", *FLAGS, "--env", "NCCL_DEBUG=INFO", "train.py", "--lr", "0.1"])
    assert to_yaml(render(read([], FILE))) == to_yaml(render(by_flags))


def test_the_same_flags_mean_the_same_job_here_and_there() -> None:
    """Apart from where it runs: a laptop's run and the cluster's come from one JobSpec."""
    words = ["--nproc-per-node", "2", "--max-restarts", "3", "-r3", "--role", "r", "train.py", "--lr", "-1"]
    here = understand(parse(words, {}), {}, ".").spec
    there = read(["--image", "i", "--gpus", "0", *words]).spec
    assert there == here


def test_a_flag_overrides_the_file() -> None:
    job = read(["--nnodes", "4", "--name", "other", "--env", "NCCL_DEBUG=WARN"], FILE)
    assert (job.spec.max_nodes, job.kube.name, job.spec.env["NCCL_DEBUG"]) == (4, "other", "WARN")


def test_a_program_on_the_command_line_replaces_the_files() -> None:
    assert read(["eval.py", "--k", "1"], FILE).spec.program.args == ("--k", "1")


@pytest.mark.parametrize(
    "run",
    [
        "train.py --lr 0.1",
        "python train.py --lr 0.1",
        "torchrun train.py --lr 0.1",
        "python -m launcher train.py --lr 0.1",
    ],
)
def test_what_people_type_in_front_of_a_script_is_understood(run: str) -> None:
    program = read([], FILE.replace("train.py --lr 0.1", run)).spec.program
    assert (program.target, program.args) == ("train.py", ("--lr", "0.1"))


def test_torchruns_own_flags_in_run_count() -> None:
    assert read([], FILE.replace("train.py", "torchrun --max-restarts 2 train.py")).spec.restarts.max_restarts == 2


MISTAKES = {
    "a misspelt key": (FILE.replace("gpus:", "gpuss:"), "job.yaml:5: no such key: gpuss", "did you mean gpus?"),
    "another tool's word": (
        FILE.replace("nnodes:", "num_nodes:"),
        "job.yaml:3: no such key: num_nodes",
        "did you mean nnodes?",
    ),
    "a key given twice": (FILE + "gpus: 4\n", "job.yaml:9: gpus is there twice, first in line 5", "keep one"),
    "a value of a wrong kind": (
        FILE.replace("gpus: 8", "gpus: many"),
        "job.yaml:5: gpus many: expected a whole number",
        "",
    ),
    "a bad value of the launcher's own": (
        FILE.replace("nnodes: 2", "nnodes: two"),
        "job.yaml:3: nnodes two: expected N or MIN:MAX",
        "",
    ),
    "a wrong quantity": (FILE + "memory: 512GB\n", "job.yaml:9: memory 512GB: expected", "did you mean 512Gi"),
    "a value that fits nothing else": (
        FILE + "cpus: 4\n",
        "job.yaml:9: 8 ranks with 1 CPUs each need 8 CPUs",
        "--cpus 8",
    ),
    "no value": (FILE + "memory:\n", "job.yaml:9: memory has no value", ""),
    "no YAML": (FILE + "note: a: b\n", "job.yaml:9: this is no YAML", "quotes"),
    "a list where pairs belong": ("env:\n  - [1, 2]\n", "job.yaml:2: env takes a list of texts", ""),
    "an open quote in run": (FILE.replace("0.1", "'0.1"), "job.yaml:8: run: No closing quotation", ""),
    "an empty file": ("", "job.yaml: the file is empty", "image, gpus and run"),
    "a queue without a scheduler": (FILE + "queue: q\n", "job.yaml:9: --queue q: whose?", "--scheduler"),
    "a word that is none of the words": (
        FILE + "scheduler: slurm\n",
        "job.yaml:9: scheduler slurm: expected one of none, kueue",
        "",
    ),
}


@pytest.mark.parametrize(("text", "said", "advice"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_job_file_is_shown_with_its_line(
    text: str,
    said: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(text)
    assert main(["render", "--file", "job.yaml"]) == 2
    printed = capsys.readouterr().err
    assert said in printed and advice in printed


FLAG_MISTAKES = {
    "misspelt": (["--imgae", "x"], "did you mean --image?"),
    "misspelt launcher flag": (["--nnode", "2", "--max-restart", "1", "--gpuss", "3"], "did you mean --gpus?"),
    "an address": (["--address", "auto", *FLAGS, "t.py"], "a Ray cluster of its own"),
    "no image": (["--gpus", "0", "t.py"], "--image is missing"),
    "no word on GPUs": (["--image", "i", "t.py"], "how many GPUs"),
    "no program": (FLAGS, "no script to run"),
    "two shipped files of one name": (
        [*FLAGS, "--ship", "a/t.py", "--ship", "b/t.py", "t.py"],
        "two files are called t.py",
    ),
    "an unset variable": ([*FLAGS, "--env", "NOPE", "t.py"], "NOPE is not set here"),
    "a pull policy that is none": ([*FLAGS, "--image-pull-policy", "always", "t.py"], "Always, IfNotPresent or Never"),
    "a version that is none": ([*FLAGS, "--ray-version", "latest", "t.py"], "a version, like 1.5.1"),
    "a host path that is none": ([*FLAGS, "--cache-host-path", "cache", "t.py"], "an absolute path"),
    "the node's root as a cache": ([*FLAGS, "--cache-host-path", "/", "t.py"], "an absolute path"),
    "a value missing at the end": ([*FLAGS, "--queue"], "needs a value"),
}


@pytest.mark.parametrize(("argv", "said"), FLAG_MISTAKES.values(), ids=FLAG_MISTAKES.keys())
def test_a_mistaken_flag_is_answered_with_the_right_one(argv: list[str], said: str) -> None:
    with pytest.raises(SpecError) as refusal:
        read(argv)
    assert said in str(refusal.value)


def test_a_variable_of_this_terminal_goes_along_only_when_asked_for() -> None:
    """A manifest must not depend on who renders it."""
    environ = {"NCCL_DEBUG": "INFO", "WANDB_KEY": "k"}
    assert read([*FLAGS, "t.py"], environ=environ).spec.env == {}
    assert read([*FLAGS, "--env", "WANDB_KEY", "t.py"], environ=environ).spec.env == {"WANDB_KEY": "k"}


def test_a_cache_size_alone_means_a_sidecar() -> None:
    job = read([*FLAGS, "--cache-capacity", "1TiB", "t.py"])
    assert (job.kube.cache.mode, job.capacity_bytes) == (CacheMode.SIDECAR, 2**40)


def test_auto_is_one_rank_for_each_gpu_of_the_pod() -> None:
    assert read([*FLAGS[:-1], "auto", "t.py"]).spec.nproc_per_node == 8


def test_a_script_of_a_commands_name_is_still_run_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cut(["--image", "i", "./render", "x"]).line.target == "./render"
