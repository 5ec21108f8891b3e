"""`python -m launcher render | submit | status | logs | stop | list`: reads argv, files and the environment; prints; holds no judgement."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, SpecError
from launcher.k8s.helptext import help_text
from launcher.k8s.manifest import Rendered, to_yaml
from launcher.k8s.manifest import render as render_job
from launcher.k8s.options import KubeJob
from launcher.k8s.request import Request, cut, located, to_job, with_job_file


def render(argv: Sequence[str]) -> int:
    """Prints the manifests of a job. Connects to nothing."""
    request = _with_file(cut(argv, {"output": False}))
    if request.wants_help:
        print(help_text("render"))
        return EXIT_OK
    text = to_yaml(_render(request)[1])
    path = request.texts("output")
    if path:
        Path(path[-1].value).write_text(text)
    else:
        sys.stdout.write(text)
    return EXIT_OK


def _render(request: Request) -> tuple[KubeJob, Rendered]:
    job = to_job(request, os.environ, _Reader(request))
    try:
        return job, render_job(job)
    except SpecError as error:
        raise located(error, request) from error


def _with_file(request: Request) -> Request:
    path = request.texts("file")
    if not path:
        return request
    return with_job_file(request, _read_text(path[-1].value), path[-1].value)


class _Reader:
    """Reads `--ship` files: those of a job file relative to it, those of the command line relative to where we are."""

    def __init__(self, request: Request) -> None:
        path = request.texts("file")
        self._folder = os.path.dirname(path[-1].value) if path else ""
        self._of_file = {
            name
            for given in request.texts("ship")
            if not given.source.startswith("--")
            for name in given.value.split(",")
        }

    def __call__(self, path: str) -> str:
        return _read_text(os.path.join(self._folder, path) if path in self._of_file else path)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise SpecError(
            f"cannot read {path}: {error.strerror}", advice="is the path right? (it starts where the command runs)"
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no text file", advice="put it into the image") from error
