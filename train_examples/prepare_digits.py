"""scikit-learn's scanned digits (1,797 images of 8×8) as tar shards in the WebDataset layout: `png` and `cls`.

    python train_examples/prepare_digits.py --url file:///tmp/digits
    python train_examples/prepare_digits.py --url s3://bucket/digits --copies 64 --num-shards 16

A fifth of each class is kept for testing. The training images are written `--copies` times, all but the first shifted
by up to one pixel: a little augmentation, and enough bytes to see a cache at work (8 copies: 27 MB of shards). The
same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, so that its siblings are found
from train_examples.publish import publish

TEST_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where to write train/ and test/: any url that the cache can read")
    parser.add_argument(
        "--copies", type=int, default=8, help="how often each training image is written (default: %(default)s)"
    )
    parser.add_argument("--num-shards", type=int, default=8, help="training shards (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the shifts (default: %(default)s)")
    args = parser.parse_args()

    digits = load_digits()
    pixels = (digits.images * 15).astype(np.uint8)  # scanned with values from 0 to 16
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=TEST_SHARE, stratify=digits.target, random_state=args.seed
    )
    manifest = {"name": "digits", "version": 1, "copies": args.copies, "num_shards": args.num_shards, "seed": args.seed}

    def shards() -> Iterator[tuple[str, bytes]]:
        rng = np.random.default_rng(args.seed)
        samples = [
            (f"{image:04}-{copy:03}", shifted(pixels[image], rng) if copy else pixels[image], digits.target[image])
            for copy in range(args.copies)
            for image in train
        ]
        for shard_idx in range(args.num_shards):
            yield f"train/digits-{shard_idx:05}.tar", tar_of(samples[shard_idx :: args.num_shards])
        yield "test/digits-00000.tar", tar_of([(f"{image:04}", pixels[image], digits.target[image]) for image in test])

    if publish(args.url, manifest, shards(), indexed=("train", "test")):
        print(f"wrote {args.copies * len(train):,} training and {len(test):,} test images to {args.url}")
    else:
        print(f"already there: {args.url}")


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image moved by up to one pixel in each direction; what comes in at the edge is black."""
    down, right = rng.integers(-1, 2, size=2)
    padded = np.pad(image, 1)
    return padded[1 - down : 9 - down, 1 - right : 9 - right]


def tar_of(samples: list[tuple[str, np.ndarray, int]]) -> bytes:
    """A tar archive with `key.png` and `key.cls` of each sample; no times, users or modes that would differ between
    runs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label in samples:
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            for name, data in ((f"{key}.png", png.getvalue()), (f"{key}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


if __name__ == "__main__":
    main()
