"""What the commands share: which daemon is meant, how it is found, exit codes."""

from __future__ import annotations

from pathlib import Path

import click

from cache.daemon.config import parse_bytes
from cache.errors import DaemonUnavailable
from cache.store.directory import serving_daemon

EXIT_INCOMPLETE, EXIT_USAGE, EXIT_NO_DAEMON, EXIT_INTERRUPTED = 1, 2, 3, 130

socket_option = click.option(
    "--socket",
    envvar="RAILHEAD_CACHE_SOCKET",
    type=click.Path(path_type=Path),
    help="The daemon's Unix socket. [default: $RAILHEAD_CACHE_SOCKET]",
)
dir_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Ask the daemon that serves this directory, instead of --socket.",
)


def bytes_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_bytes(value)


def find_socket(socket: Path | None, directory: Path | None) -> str:
    """Raises DaemonUnavailable, click.UsageError."""
    if directory is not None:
        serving = serving_daemon(directory)
        if serving is None:
            raise DaemonUnavailable(
                f"no cache daemon serves {directory}", advice=f"start one: python -m cache serve --dir {directory} …"
            )
        return serving.socket
    if socket is None:
        raise click.UsageError("which daemon? give --socket or --dir, or set RAILHEAD_CACHE_SOCKET")
    return str(socket)
