"""`python -m cache index`: commands about data sets, which need no daemon."""

from __future__ import annotations

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
