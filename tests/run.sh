#!/usr/bin/env bash
# Sets up ./.venv and runs lint and tests. Arguments go to pytest: tests/run.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
smt_environment test quickstart

ruff check .
ruff format --check .
exec python -m pytest "$@"
