"""What a program's source says of its imports: torch is in memory beforehand only if the program cannot tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.node.imports import find_module, read_program


def outlook(tmp_path: Path, text: str, **others: str) -> tuple[bool, str, str]:
    for name, other in others.items():
        path = tmp_path / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(other)
    (tmp_path / "train.py").write_text(text)
    found = read_program(str(tmp_path / "train.py"), [])
    return found.wants_torch, found.early_setting, found.any_setting


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch import nn",
        "def main():\n    import torch",
        "from transformers import Trainer",
        "import lightning as L",
    ],
)
def test_a_program_that_imports_torch_wants_it(tmp_path: Path, text: str) -> None:
    assert outlook(tmp_path, text) == (True, "", "")


@pytest.mark.parametrize("text", ["print(1)", "import json, numpy", "torch = 1", "x = = 1", "import torches"])
def test_a_program_that_does_not_is_left_without(tmp_path: Path, text: str) -> None:
    """Thirty-two trivial ranks must not wait for a second's import."""
    assert outlook(tmp_path, text) == (False, "", "")


def test_torch_is_seen_behind_the_programs_own_modules(tmp_path: Path) -> None:
    assert outlook(tmp_path, "from model import Net", model="from layers.mlp import MLP", layers__mlp="import torch")[0]
    assert outlook(tmp_path, "import pkg.net", pkg__net="from .deep import x", pkg__deep="import torch")[0]


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['OMP_NUM_THREADS'] = '4'",
        "os.environ.setdefault('TORCH_LOGS', 'dynamo')",
        "os.putenv('MKL_NUM_THREADS', '1')",
        "environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'",
        "os.environ.update(settings)",
        "del os.environ['LD_PRELOAD']",
        "load_dotenv()",
    ],
)
def test_a_variable_set_before_the_import_of_torch_forbids_an_earlier_import(tmp_path: Path, line: str) -> None:
    """OMP_NUM_THREADS set at the top of a script is common, and torch reads it once."""
    wants, early, anywhere = outlook(tmp_path, f"import os\n{line}\nimport torch\n")
    assert wants
    assert early.startswith("train.py:2 sets")
    assert anywhere == early
    wants, early, anywhere = outlook(tmp_path, f"import os\nimport torch\n{line}\n")
    assert (wants, early) == (True, "")
    assert anywhere.startswith("train.py:3 sets")


def test_a_variable_set_in_the_programs_own_module_counts(tmp_path: Path) -> None:
    assert outlook(
        tmp_path, "import setup_env\nimport torch", setup_env="import os\nos.environ['OMP_NUM_THREADS'] = '4'"
    )[1]


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "MASTER_PORT", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM"])
def test_variables_that_are_read_late_may_be_set_at_any_time(tmp_path: Path, name: str) -> None:
    assert outlook(tmp_path, f"import os\nos.environ['{name}'] = '0'\nimport torch") == (True, "", "")


def test_modules_are_found_as_python_m_would(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text("")
    (tmp_path / "pkg" / "__main__.py").write_text("")
    assert find_module("pkg.train", [str(tmp_path)]) == str(tmp_path / "pkg" / "train.py")
    assert find_module("pkg", [str(tmp_path)]) == str(tmp_path / "pkg" / "__main__.py")
    assert find_module("no.such", [str(tmp_path)]) is None
