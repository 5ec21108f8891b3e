"""Facts on disk: one JSON file per node in a folder, as `doctor --save` writes them and a run directory keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.fabric.codec import from_json, to_json
from launcher.fabric.facts import FactsError, NodeFacts
from launcher.fabric.findings import Finding, Severity

RECORD_AGAIN = "Record facts on each node with: python -m launcher doctor --save DIR"


@dataclass(frozen=True)
class Recorded:
    """Facts from files, and a finding for each file that could not be used."""

    nodes: tuple[NodeFacts, ...]
    findings: tuple[Finding, ...]


def names_of(nodes: Sequence[NodeFacts]) -> list[str]:
    """What to call each node: its host name, with its position where several have the same."""
    names = [facts.hostname for facts in nodes]
    return [f"{name}-{idx}" if names.count(name) > 1 else name for idx, name in enumerate(names)]


def save(nodes: Sequence[NodeFacts], folder: Path) -> list[Path]:
    """Writes the facts of each node to `folder`/HOST.json (made if need be); the files. OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for called, facts in zip(names_of(nodes), nodes, strict=True):
        name = _file_name(called)
        target = folder / f"{name}.json"
        # Complete or absent: another process may read the folder while it is written.
        partial = folder / f".{name}.partial"
        partial.write_text(to_json(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
        written.append(target)
    return written


def load(path: Path) -> Recorded:
    """Facts from a file, or from all *.json of a folder. FactsError if not one of them can be used."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
    elif path.exists():
        files = [path]
    else:
        raise FactsError(f"{path} does not exist.\n{RECORD_AGAIN}")
    nodes: list[NodeFacts] = []
    broken: list[FactsError] = []
    for file in files:
        try:
            nodes.append(from_json(_content(file), source=str(file)))
        except FactsError as error:
            broken.append(error)
    if not nodes:
        why = f"\n{broken[0]}" if broken else f"\n{RECORD_AGAIN}"
        raise FactsError(f"{path} holds no facts that can be used ({len(files)} files ending in .json).{why}")
    return Recorded(tuple(nodes), tuple(_unreadable(error) for error in broken))


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FactsError(f"{file} cannot be read ({error}).\n{RECORD_AGAIN}") from error


def _unreadable(error: FactsError) -> Finding:
    what, _, cure = str(error).partition("\n")
    return Finding(
        "facts-unreadable",
        Severity.ERROR,
        (),
        what,
        "this node is not part of the picture; what is wrong on it stays unseen",
        cure or RECORD_AGAIN,
    )


def _file_name(hostname: str) -> str:
    return "".join(char if char.isalnum() or char in "-._" else "_" for char in hostname).strip(".") or "node"
