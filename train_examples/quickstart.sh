#!/usr/bin/env bash
# Sets everything up, writes the scanned digits as tar shards, and trains a ResNet on them: two ranks, a cache daemon beside them.
# Run it twice: the second run begins with a warm cache. Arguments go to train_examples/resnet.py.
# RAILHEAD_QUICKSTART_DIR chooses where shards, cache and checkpoints lie (default: .quickstart in the repository).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/.ci/setup"
python="${RAILHEAD_VENV:-$root/.venv}/bin/python"
mkdir -p "${RAILHEAD_QUICKSTART_DIR:-$root/.quickstart}"
dir="$(cd "${RAILHEAD_QUICKSTART_DIR:-$root/.quickstart}" && pwd)"

"$python" "$root/train_examples/prepare_digits.py" --url "file://$dir/data"

# A fresh directory for each run: with the last run's checkpoints there would be nothing left to train.
checkpoints="$(mktemp -d "$dir/checkpoints-XXXXXX")"
trap 'rm -rf "$checkpoints"' EXIT
cd "$dir"
"$python" -m launcher --nproc-per-node 2 --cache-dir "$dir/cache" --cache-capacity 1GiB \
    "$root/train_examples/resnet.py" --data "file://$dir/data" --epochs 3 --checkpoint-dir "$checkpoints" "$@"
