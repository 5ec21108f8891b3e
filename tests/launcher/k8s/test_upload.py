"""Code on its way to the cluster: the same folder is the same zip, and goes there once."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import SpecError
from launcher.k8s import upload
from launcher.k8s.upload import pack


def folder_of(tmp_path: Path, name: str = "src") -> Path:
    folder = tmp_path / name
    (folder / "lib" / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    for file in ("train.py", "lib/model.py", "lib/__pycache__/model.pyc", ".git/config", ".env"):
        (folder / file).write_text(f"# {file}\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    return folder


def test_the_same_files_give_the_same_name_whenever_they_were_written(tmp_path: Path) -> None:
    """So that a job that is submitted again is the same job, and nothing is sent twice."""
    first, second = folder_of(tmp_path, "a"), folder_of(tmp_path, "b")
    os.utime(second / "train.py", (1, 1))
    assert pack(first, "s3://b/code") == pack(second, "s3://b/code/")
    (second / "train.py").write_text("changed")
    assert pack(first, "s3://b/code").uri != pack(second, "s3://b/code").uri


def test_hidden_files_and_caches_stay_here_and_programs_stay_programs(tmp_path: Path) -> None:
    """A key in .env must not travel."""
    with zipfile.ZipFile(io.BytesIO(pack(folder_of(tmp_path), "s3://b/code").data)) as archive:
        assert archive.namelist() == ["code/run.sh", "code/train.py", "code/lib/model.py"]
        assert archive.getinfo("code/run.sh").external_attr >> 16 == 0o755


def test_it_is_sent_once(tmp_path: Path) -> None:
    package = pack(folder_of(tmp_path), f"file://{tmp_path}/store/code")
    assert upload.upload(package)
    assert not upload.upload(package)
    assert Path(package.uri.removeprefix("file://")).read_bytes() == package.data


def test_more_than_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_BYTES", 20)
    with pytest.raises(SpecError, match="data belongs into the object store"):
        pack(folder_of(tmp_path), "s3://b/code")


def test_render_names_the_zip_and_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    flags = ["--image", "i", "--gpus", "0", "--working-dir", str(folder), "--upload-to", f"file://{tmp_path}/store"]
    assert main(["render", *flags, "train.py"]) == 0
    assert pack(folder, f"file://{tmp_path}/store").uri in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--working-dir", "."], "which the cluster does not see"),
        (["--upload-to", "s3://b"], "of what?"),
        (["--working-dir", "/nowhere", "--upload-to", "s3://b"], "neither a folder here"),
        (["--working-dir", ".", "--upload-to", "b"], "expected the URL of a folder"),
    ],
)
def test_half_a_request_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--image", "i", "--gpus", "0", *flags, "train.py"]) == 2
    assert said in capsys.readouterr().err
