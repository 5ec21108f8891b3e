"""A job file: YAML whose keys are the flags of `render`, `run` besides them for what runs. Pure: text in, entries with their lines out.

name: resnet
image: registry.example/train:1.4
nnodes: 16
gpus: 8
env:
  NCCL_DEBUG: INFO
run: train.py --lr 0.1
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

import yaml

from launcher.errors import SpecError

RUN_KEY = "run"
# What the same thing is called elsewhere: SkyPilot, Kubernetes, Slurm, torchrun's own spelling.
_ELSEWHERE = {
    "num_nodes": "nnodes",
    "nodes": "nnodes",
    "workers": "nnodes",
    "replicas": "nnodes",
    "accelerators": "gpus",
    "gpu": "gpus",
    "cpu": "cpus",
    "mem": "memory",
    "envs": "env",
    "secrets": "secret-env",
    "workdir": "working-dir",
    "file_mounts": "ship",
    "files": "ship",
    "command": "run",
    "entrypoint": "run",
    "script": "run",
    "tolerations": "toleration",
    "labels": "label",
    "queue_name": "queue",
    "image_id": "image",
    "use_spot": "spot",
    "nproc": "nproc-per-node",
    "retries": "max-restarts",
    "timeout": "deadline",
    "cron": "schedule",
    "spares": "spare-nodes",
    "spare": "spare-nodes",
}


@dataclass(frozen=True)
class Entry:
    """One value of a job file."""

    key: str
    """With dashes, whatever the file has."""
    value: str
    line: int


def read_job_file(text: str, path: str, known: Iterable[str], lists: Iterable[str]) -> list[Entry]:
    """The file's entries in order; one for each item of a key that may be `lists`, and for `run` one for each word.

    Raises SpecError with path and line: for YAML that is none, an unknown key (with the nearest known),
    one given twice, a value of a wrong kind.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        raise SpecError(
            f"{path}:{line}: this is no YAML: {getattr(error, 'problem', None) or error}",
            advice="a value with a colon or a # in it wants quotes; indent with spaces",
        ) from error
    if root is None:
        raise SpecError(f"{path}: the file is empty", advice="it needs at least image, gpus and run")
    if not isinstance(root, yaml.MappingNode):
        raise SpecError(
            f"{path}:1: expected keys and values", advice="for example\n    image: registry.example/train:1.4"
        )
    names, may_repeat = set(known), set(lists)
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value).replace("_", "-")
        if key not in names and key != RUN_KEY:
            raise _unknown(path, line, str(key_node.value), names)
        if key in seen:
            raise SpecError(
                f"{path}:{line}: {key} is there twice, first in line {seen[key]}", advice="keep one of them"
            )
        seen[key] = line
        entries += _entries(path, key, value_node, is_list=key in may_repeat)
    return entries


def _unknown(path: str, line: int, written: str, names: set[str]) -> SpecError:
    key = written.replace("_", "-")
    meant = _ELSEWHERE.get(written) or _ELSEWHERE.get(key.replace("-", "_"))
    close = [meant] if meant else difflib.get_close_matches(key, [*names, RUN_KEY], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return SpecError(
        f"{path}:{line}: no such key: {written}",
        advice=f"{hint}Keys are the flags of `python -m launcher render --help`",
    )


def _entries(path: str, key: str, node: yaml.Node, *, is_list: bool) -> list[Entry]:
    line = node.start_mark.line + 1
    if key == RUN_KEY:
        return [Entry(key, word, line) for word in _run_words(path, node)]
    if isinstance(node, yaml.ScalarNode):
        return [Entry(key, _scalar(path, key, node), line)]
    if isinstance(node, yaml.MappingNode):
        pairs = [(k, v) for k, v in node.value]
        items = [_pair(path, key, k, v) for k, v in pairs]
    else:
        items = [_item(path, key, item) for item in node.value]
    if is_list:
        return items
    # Launcher flags and others that take one text with commas.
    return [Entry(key, ",".join(item.value for item in items), line)]


def _pair(path: str, key: str, name: yaml.Node, value: yaml.Node) -> Entry:
    line = name.start_mark.line + 1
    if not isinstance(name, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
        raise SpecError(
            f"{path}:{line}: {key} takes NAME: VALUE pairs", advice="write each value as one text or number"
        )
    if value.tag.endswith(":null"):
        return Entry(key, name.value, line)  # NAME alone: the value it has in this terminal
    return Entry(key, f"{name.value}={_scalar(path, key, value)}", line)


def _item(path: str, key: str, item: yaml.Node) -> Entry:
    line = item.start_mark.line + 1
    if isinstance(item, yaml.ScalarNode):
        return Entry(key, _scalar(path, key, item), line)
    fields = {k.value: v.value for k, v in item.value} if isinstance(item, yaml.MappingNode) else {}
    if key == "toleration" and "key" in fields and set(fields) <= {"key", "operator", "value", "effect"}:
        value = f"={fields['value']}" if "value" in fields else ""
        effect = f":{fields['effect']}" if "effect" in fields else ""
        return Entry(key, f"{fields['key']}{value}{effect}", line)
    raise SpecError(f"{path}:{line}: {key} takes a list of texts", advice="one text in each line, after a dash")


def _scalar(path: str, key: str, node: yaml.ScalarNode) -> str:
    if node.tag.endswith(":null"):
        raise SpecError(
            f"{path}:{node.start_mark.line + 1}: {key} has no value", advice="give one, or leave the key out"
        )
    if node.tag.endswith(":bool"):
        return "true" if node.value.lower() in ("true", "yes", "on") else "false"
    return str(node.value)


def _run_words(path: str, node: yaml.Node) -> list[str]:
    """A line as a shell would cut it, or a list of words. What a person would type in front of a script is dropped by the reader."""
    if isinstance(node, yaml.SequenceNode):
        return [str(item.value) for item in node.value]
    try:
        words = shlex.split(str(node.value), comments=True) if isinstance(node, yaml.ScalarNode) else []
    except ValueError as error:
        raise SpecError(
            f"{path}:{node.start_mark.line + 1}: run: {error}", advice="close the quotes, or give a list of words"
        ) from error
    if not words:
        raise SpecError(f"{path}:{node.start_mark.line + 1}: run is empty", advice="for example run: train.py --lr 0.1")
    return words
