"""`python -m cache index` and `audit`: commands about data sets, which need no daemon."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click


@click.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option(
    "--format",
    "format_name",
    default="tar",
    show_default=True,
    help="tar, mds or parquet (whose own indices are spread over their shards).",
)
@click.option(
    "--socket",
    envvar="RAILHEAD_CACHE_SOCKET",
    type=click.Path(path_type=Path),
    help="Read through this daemon. [default: $RAILHEAD_CACHE_SOCKET, else the origin]",
)
def index(urls: tuple[str, ...], format_name: str, socket: Path | None) -> None:
    """Write the index of shards beside them, so that training starts without reading their headers.

    Each URL is the prefix that training names; it must be writable from here. Run it again when shards were added or
    replaced: only those are read.
    """
    from cache.client import Cache
    from cache.client.formats.named import BY_NAME
    from cache.client.publishing import publish_index
    from cache.daemon.config import format_bytes

    if format_name not in BY_NAME:
        raise click.BadParameter(f"{format_name!r} is none of {', '.join(BY_NAME)}", param_hint="--format")
    with Cache(socket or "") as cache:
        for url in urls:
            done = publish_index(cache, url, BY_NAME[format_name])
            click.echo(
                f"{done.url}: {done.num_samples:,} samples of {done.num_shards:,} shards in {format_bytes(done.num_bytes)} "
                f"({done.num_built:,} shards read)"
            )


@click.command()
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The verdict as one JSON object.")
def audit(directories: tuple[Path, ...], as_json: bool) -> None:
    """Prove from the ranks' records that every sample came exactly once.

    DIR: where `ElasticLoader(…, records=DIR)` wrote, of all nodes and all starts of one training. Exit code 0: every sample of every
    finished epoch exactly once, through restarts and resizing; 1: some were lost or came twice, named with step and rank; 2: nothing to
    audit.
    """
    from cache.client.records import read_records
    from cache.errors import FormatError
    from cache.order.audit import judge

    try:
        order, stretches = read_records(directories)
    except FormatError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    verdict = judge(order, stretches)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(verdict)))
        sys.exit(1 if verdict.findings else 0)
    for epoch in verdict.epochs:
        worlds = " and ".join(map(str, epoch.world_sizes)) or "no"
        click.echo(
            f"epoch {epoch.epoch}: {epoch.num_steps:,} of {epoch.of_steps:,} steps, {epoch.num_samples:,} different samples, by {worlds} "
            f"rank{'' if worlds == '1' else 's'}{'' if epoch.is_finished else ' (unfinished)'}"
        )
    click.echo(f"{verdict.num_void:,} steps were done again after a resume")
    for note in verdict.notes:
        click.echo(f"note: {note}")
    for finding in verdict.findings:
        click.echo(f"WRONG: {finding}")
    click.echo(f"{len(verdict.findings)} findings" if verdict.findings else "every sample exactly once")
    sys.exit(1 if verdict.findings else 0)
