"""A folder of code as one zip in an object store, named by its content: `--working-dir ./src --upload-to s3://bucket/code`.

Ray fetches the zip on each node and unpacks it as the job's working directory; it wants a single folder at the top of it.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RequestRefused, SpecError

MAX_BYTES = 200 * 2**20
"""Unpacked. More than this is data, which belongs into the object store as it is."""
_SKIPPED = ("__pycache__", "railhead-runs", "node_modules")
# The oldest time that a zip can hold: the same files give the same bytes, whenever they were written.
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A folder, packed."""

    data: bytes
    uri: str


def pack(folder: Path, upload_to: str) -> Package:
    """The folder's files, without hidden ones and caches. The same content gives the same bytes and the same name. Raises SpecError."""
    if not folder.is_dir():
        raise SpecError(
            f"--working-dir {folder}: neither a folder here nor the URI of a zip",
            advice="for example . or s3://bucket/code.zip",
        )
    if "://" not in upload_to:
        raise SpecError(
            f"--upload-to {upload_to}: expected the URL of a folder in an object store",
            advice="for example s3://bucket/code",
        )
    buffer, total = io.BytesIO(), 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(folder):
            total += path.stat().st_size
            if total > MAX_BYTES:
                raise SpecError(
                    f"--working-dir {folder} holds more than {MAX_BYTES // 2**20} MiB (at {path})",
                    advice="name the folder of the code alone; data belongs into the object store",
                )
            info = zipfile.ZipInfo(f"code/{path.relative_to(folder).as_posix()}", _EPOCH)
            info.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    if not total:
        raise SpecError(f"--working-dir {folder} holds no files", advice="is it the right folder?")
    data = buffer.getvalue()
    name = f"code-{hashlib.sha256(data).hexdigest()[:16]}.zip"
    return Package(data, f"{upload_to.rstrip('/')}/{name}")


def upload(package: Package) -> bool:
    """Puts it where its name says; False: it is there already. With the credentials of this machine. Raises RequestRefused."""
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(package.uri)
        if filesystem.exists(path):
            return False
        if filesystem.protocol in ("file", ("file", "local")):
            filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        filesystem.pipe_file(path, package.data)
    except Exception as error:  # each store has its own exceptions, and any of them means the same here
        raise RequestRefused(
            f"cannot put the code at {package.uri}: {error}",
            advice="may you write there? The credentials are those of this machine",
        ) from error
    return True


def _files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        found += [
            Path(parent, name) for name in sorted(files) if not name.startswith(".") and not name.endswith(".pyc")
        ]
    return found
