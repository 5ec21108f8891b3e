#!/usr/bin/env bash
# Sets everything up, then lint, formatting, types, import contracts and the whole test suite. Arguments go to pytest.
# Up to three tests that fail are run once more, alone; see tests/second_look.py.
#   bash tests/run.sh                 everything
#   bash tests/run.sh -m 'not ray'    without the tests that start a Ray cluster
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash .ci/setup
bin="${RAILHEAD_VENV:-$root/.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
exec "$bin/python" -m tests.second_look "$@"
