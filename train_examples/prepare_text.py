"""The source of Python's standard library, a text that every machine has, as token shards: one byte is one token.

    python train_examples/prepare_text.py --url file:///tmp/text

Every twentieth file is kept for evaluation. The same Python gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, so that its siblings are found
from cache.client.formats.tokens import pack_tokens
from train_examples.publish import publish

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where to write train/ and val/: any url that the cache can read")
    parser.add_argument("--num-shards", type=int, default=4, help="training shards (default: %(default)s)")
    args = parser.parse_args()

    files = source_files(Path(sysconfig.get_paths()["stdlib"]))
    train = text_of(path for idx, path in enumerate(files) if idx % 20)
    val = text_of(path for idx, path in enumerate(files) if not idx % 20)
    manifest = {
        "name": "python standard library",
        "version": 1,
        "python": sys.version.split()[0],
        "num_shards": args.num_shards,
        "train_bytes": len(train),
        "val_bytes": len(val),
    }

    def shards() -> Iterator[tuple[str, bytes]]:
        for shard_idx, part in enumerate(np.array_split(train, args.num_shards)):
            yield f"train/text-{shard_idx:05}.tokens", pack_tokens(part)
        yield "val/text-00000.tokens", pack_tokens(val)

    if publish(args.url, manifest, shards()):
        print(f"wrote {len(train):,} training and {len(val):,} evaluation tokens of {len(files):,} files to {args.url}")
    else:
        print(f"already there: {args.url}")


def source_files(stdlib: Path) -> list[Path]:
    """The library's own .py files, sorted by their path within it."""
    return sorted(
        (path for path in stdlib.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)),
        key=lambda path: path.relative_to(stdlib).as_posix(),
    )


def text_of(files: Iterator[Path]) -> np.ndarray:
    """The bytes of all files, each followed by a zero byte, which ends a text."""
    return np.frombuffer(b"".join(path.read_bytes() + b"\0" for path in files), dtype=np.uint8)


if __name__ == "__main__":
    main()
