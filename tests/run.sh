#!/usr/bin/env bash
# Sets up ./.venv and runs lint and tests. Arguments go to pytest: tests/run.sh -k merge
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

# For the tests that look at pages. On CI it must be there; elsewhere those tests say why they skip.
install_browser() {
  command -v chromium >/dev/null && command -v chromedriver >/dev/null && return 0
  [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  echo "installing chromium and its driver"
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
}

install_browser
smt_environment test quickstart

ruff check .
ruff format --check .
exec python -m pytest "$@"
