"""`python -m cache`: serve, preload, and the commands of people (people_commands, status_command). Translates flags; holds no judgement.

Exit codes: 0 done; 1 not everything could be done (the output says what); 2 wrong usage or configuration; 3 no daemon answers; 130 Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cache.cli_options import (
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_NO_DAEMON,
    EXIT_USAGE,
    bytes_of,
    dir_option,
    find_socket,
    socket_option,
)
from cache.daemon.config import AT_ONCE, AT_ONCE_WITH_PEERS, DaemonConfig, Share, parse_address, parse_share
from cache.daemon.peerconfig import peer_config
from cache.data_commands import audit, index
from cache.errors import CacheConfigError, CacheError, DaemonUnavailable
from cache.people_commands import evict, ls, pin, resize, unpin
from cache.status_command import status
from cache.verify_command import verify

DEFAULT_SOCKET_NAME = "cache.sock"


def _share(ctx: click.Context, param: click.Parameter, value: str) -> Share:
    return parse_share(value)


def _address(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, int] | None:
    return None if value is None else parse_address(value)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line, for collectors."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _log_to_stderr(style: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else logging.Formatter("cache: %(message)s"))
    logger = logging.getLogger("railhead.cache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="railhead", message="%(package)s %(version)s")
def cli() -> None:
    """Object-store shards on this node's disk, ahead of the order in which training reads them."""


@cli.command()
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), required=True, help="Node-local directory for the cache."
)
@click.option(
    "--capacity", callback=bytes_of, metavar="SIZE", required=True, help="Hard bound on its size: 200GB, 1.5TiB, …"
)
@click.option(
    "--socket", type=click.Path(path_type=Path), help=f"Unix socket to serve. [default: DIR/{DEFAULT_SOCKET_NAME}]"
)
@click.option("--max-files", default=1_000_000, show_default=True, help="Hard bound on the number of files (inodes).")
@click.option(
    "--keep-free",
    callback=_share,
    default="1%",
    show_default=True,
    metavar="SIZE|%",
    help="Leave this much of the disk to its other users, whatever --capacity says.",
)
@click.option(
    "--keep-free-files", callback=_share, default="1%", show_default=True, metavar="N|%", help="The same in inodes."
)
@click.option(
    "--scrub-rate",
    callback=bytes_of,
    default="8MiB",
    show_default=True,
    metavar="SIZE",
    help="Read this much per second back from the disk and compare it, while readers need nothing. 0: never.",
)
@click.option("--workers", default=2, show_default=True, help="Fetch worker processes.")
@click.option(
    "--max-in-flight",
    type=int,
    help=f"Fetches under way at once, at most.  [default: {AT_ONCE}, with peers {AT_ONCE_WITH_PEERS}]",
)
@click.option(
    "--metadata-ttl", default=10.0, show_default=True, help="Seconds for which what HEAD said of an object is believed."
)
@click.option(
    "--metrics",
    callback=_address,
    metavar="HOST:PORT",
    help="Serve /metrics, /healthz and /status over HTTP here. [default: not]",
)
@click.option(
    "--peers",
    metavar="dns:SERVICE:PORT|file:PATH|HOST:PORT,…",
    help="Other nodes' daemons, with which this one shares what it fetches: a name that resolves to all, a file that lists "
    "them and may change, or the list itself.",
)
@click.option("--peer-listen", metavar="ADDR:PORT", help="Where other daemons reach this one.")
@click.option(
    "--peer-key-file",
    type=click.Path(path_type=Path),
    help="Key that all peers share (16 random bytes or more). Needed unless --peer-listen is loopback.",
)
@click.option("--peer-tls-cert", type=click.Path(path_type=Path), help="Certificate (PEM) for TLS between peers.")
@click.option("--peer-tls-key", type=click.Path(path_type=Path), help="Its key.")
@click.option("--peer-tls-ca", type=click.Path(path_type=Path), help="CA that all peers' certificates are from.")
@click.option("--announce", is_flag=True, help="Print one JSON line on standard output once readers can connect.")
@click.option("--exit-with-parent", is_flag=True, help="Drain and exit when the process that started the daemon dies.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def serve(
    directory: Path,
    capacity: int,
    socket: Path | None,
    max_files: int,
    keep_free: Share,
    keep_free_files: Share,
    scrub_rate: int,
    workers: int,
    max_in_flight: int | None,
    metadata_ttl: float,
    metrics: tuple[str, int] | None,
    peers: str | None,
    peer_listen: str | None,
    peer_key_file: Path | None,
    peer_tls_cert: Path | None,
    peer_tls_key: Path | None,
    peer_tls_ca: Path | None,
    announce: bool,
    exit_with_parent: bool,
    log_format: str,
) -> None:
    """Serve readers of this node until SIGTERM or Ctrl-C. What is resident stays for the next start."""
    from cache.daemon.server import serve as run_daemon

    _log_to_stderr(log_format)
    config = DaemonConfig(
        dir=directory.absolute(),
        capacity_bytes=capacity,
        socket=(socket or directory / DEFAULT_SOCKET_NAME).absolute(),
        max_files=max_files,
        keep_free=keep_free,
        keep_free_files=keep_free_files,
        scrub_bytes_per_s=scrub_rate,
        num_workers=workers,
        max_in_flight=max_in_flight,
        metadata_ttl_s=metadata_ttl,
        metrics=metrics,
        peers=peer_config(peers, peer_listen, peer_key_file, (peer_tls_cert, peer_tls_key, peer_tls_ca)),
        exit_with_parent=exit_with_parent,
    )
    sys.exit(run_daemon(config, announce=announce))


@cli.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@socket_option
@dir_option
@click.option(
    "--capacity",
    callback=bytes_of,
    metavar="SIZE",
    help="With --dir: start a daemon there for as long as the preload takes.",
)
@click.option("--jobs", default=16, show_default=True, help="Objects waited for at once.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Read everything back and compare checksums."
)
@click.option(
    "--as-files",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Real files in DIR instead of blocks in a cache: for programs that read paths. Needs no daemon; goes on where it was stopped.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def preload(
    urls: tuple[str, ...],
    socket: Path | None,
    directory: Path | None,
    capacity: int | None,
    jobs: int,
    verify: bool,
    as_files: Path | None,
    as_json: bool,
) -> None:
    """Fetch all objects below the URLs. Exit code 0 if and only if every byte is resident (and verified)."""
    from cache.preload import preload as run_preload

    _log_to_stderr("text")
    if as_files is not None:
        from cache.mirror import mirror

        if len(urls) != 1 or directory is not None or capacity is not None:
            raise click.UsageError("--as-files takes one URL, and neither --dir nor --capacity: no daemon is asked")
        result = mirror(urls[0], as_files.absolute(), jobs=jobs, verify=verify)
    else:
        with _daemon_for(socket, directory, capacity) as path:
            result = run_preload(path, urls, jobs=jobs, verify=verify)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        click.echo(result.summary())
    sys.exit(0 if result.is_complete else EXIT_INCOMPLETE)


@contextmanager
def _daemon_for(socket: Path | None, directory: Path | None, capacity: int | None) -> Iterator[str]:
    """The socket of a daemon; with --dir and --capacity one of our own if none serves there yet."""
    if directory is None or capacity is None:
        yield find_socket(socket, directory)
        return
    with tempfile.TemporaryDirectory(prefix="railhead-") as folder:
        command = [sys.executable, "-m", "cache", "serve", "--dir", str(directory), "--capacity", str(capacity)]
        command += ["--socket", str(Path(folder) / DEFAULT_SOCKET_NAME), "--announce", "--exit-with-parent"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                if not line:
                    raise CacheConfigError("the cache daemon did not start", advice="its message is above")
                yield json.loads(line)["socket"]
            finally:
                process.terminate()
                process.wait()


for command in (status, ls, verify, evict, pin, unpin, resize, index, audit):
    cli.add_command(command)


def main() -> None:
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CacheConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except DaemonUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NO_DAEMON)
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INCOMPLETE)
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
