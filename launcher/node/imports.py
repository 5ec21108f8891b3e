"""What a program will import, and which environment it sets first: read from its source, before it runs. Pure but for reading those files.

The fork server has torch in memory before the program begins. That is right if the program wants torch at all, and if it does not
first set a variable that torch reads when it is imported. Where the source leaves a doubt, nothing is imported in advance: such a
rank is forked from a bare interpreter and imports torch itself.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_FILES = 60
_MAX_BYTES = 1 << 20
TORCH_USERS = frozenset(
    # one string, or the formatter would make a page of it
    """
    accelerate composer deepspeed diffusers fairscale fastai flash_attn ignite lightning lightning_fabric litdata megatron nemo peft
    pytorch_lightning sentence_transformers streaming timm torch torchao torchaudio torchdata torchmetrics torchtext torchtitan torchtune
    torchvision transformers trl vllm xformers
    """.split()  # noqa: SIM905
)
"""Packages that import torch."""
_HARMLESS = frozenset(
    """
    CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES CUBLAS_WORKSPACE_CONFIG LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR
    MASTER_PORT NODE_RANK PYTHONHASHSEED RANK TOKENIZERS_PARALLELISM WORLD_SIZE
    """.split()  # noqa: SIM905
)
_HARMLESS_PREFIXES = ("NCCL_", "GLOO_", "WANDB_", "MLFLOW_", "COMET_", "RAILHEAD_", "AWS_")
"""Variables that are read when they are needed, not when something is imported."""


@dataclass(frozen=True)
class Outlook:
    """What the source says."""

    wants_torch: bool = False
    early_setting: str = ""
    """`train.py:3 sets OMP_NUM_THREADS`: before torch is imported; empty if nothing is."""
    any_setting: str = ""
    """The same, anywhere."""


def read_program(path: str, search: Sequence[str]) -> Outlook:
    """The outlook of the program at `path` with the modules of its own that it imports, found in the directories `search`."""
    wants_torch, early, anywhere = False, "", ""
    todo, seen = [os.path.realpath(path)], set[str]()
    while todo and len(seen) < _MAX_FILES:
        path = todo.pop(0)
        if path in seen:
            continue
        seen.add(path)
        tree = _parse(path)
        if tree is None:
            continue
        found = _read_file(tree, os.path.basename(path))
        wants_torch |= found.wants_torch
        early, anywhere = early or found.early_setting, anywhere or found.any_setting
        for name in _imported(tree):
            todo += _own_files(name, [os.path.dirname(path), *search])
    return Outlook(wants_torch, early, anywhere)


def _parse(path: str) -> ast.Module | None:
    try:
        with open(path, "rb") as file:
            return ast.parse(file.read(_MAX_BYTES))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None  # the rank will say so


def _read_file(tree: ast.Module, name: str) -> Outlook:
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and TORCH_USERS & {top for top, *_ in map(_split, _names(node))}
    ]
    top_level = [
        node.lineno
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and TORCH_USERS & {top for top, *_ in map(_split, _names(node))}
    ]
    settings = [(line, variable) for line, variable in _settings(tree) if not _is_harmless(variable)]
    first = min(top_level, default=1 << 30)
    early = next(
        (f"{name}:{line} sets {variable or 'the environment'}" for line, variable in settings if line < first), ""
    )
    anywhere = next((f"{name}:{line} sets {variable or 'the environment'}" for line, variable in settings), "")
    return Outlook(bool(lines), early, anywhere)


def _is_harmless(variable: str) -> bool:
    return variable in _HARMLESS or variable.startswith(_HARMLESS_PREFIXES)


def _settings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and variable (empty: not a literal) of each change of the environment."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from _target(target)
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                yield from _target(target)
            case ast.Delete(targets=targets):
                for target in targets:
                    yield from _target(target)
            case ast.Call(
                func=ast.Attribute(attr="setdefault" | "pop" | "update" | "__setitem__" | "clear", value=owner),
                args=args,
            ):
                if _is_environ(owner):
                    yield node.lineno, _literal(args[0]) if args else ""
            case ast.Call(func=ast.Attribute(attr="putenv" | "unsetenv"), args=args):
                yield node.lineno, _literal(args[0]) if args else ""
            case ast.Call(func=ast.Name(id="load_dotenv") | ast.Attribute(attr="load_dotenv")):
                yield node.lineno, ""


def _target(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        yield node.lineno, _literal(node.slice)


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def _literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _names(node)


def _names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names; of `from a import b` both `a` and `a.b`, which may be a module too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        base = "." * node.level + (node.module or "")
        if node.module:
            yield base
        yield from (f"{base}.{alias.name}" if node.module else f"{base}{alias.name}" for alias in node.names)


def _split(name: str) -> list[str]:
    return name.lstrip(".").split(".")


def _own_files(name: str, directories: Sequence[str]) -> list[str]:
    """Files of the module and of the packages that it is in, if it is the program's own.

    A relative name is looked for as if it were absolute, from the file's directory and from those above it that `directories` have:
    enough for reading, and too much does no harm.
    """
    parts = _split(name)
    found = []
    for directory in directories:
        for length in range(1, len(parts) + 1):
            base = os.path.join(directory, *parts[:length])
            found += [path for path in (f"{base}.py", os.path.join(base, "__init__.py")) if os.path.isfile(path)]
        if found:
            break
    return [os.path.realpath(path) for path in found]


def find_module(name: str, directories: Sequence[str]) -> str | None:
    """The file that `python -m name` would run, without importing anything; None if that takes more than looking."""
    for directory in directories:
        base = os.path.join(directory, *name.split("."))
        for path in (os.path.join(base, "__main__.py"), f"{base}.py"):
            if os.path.isfile(path):
                return path
    return None
