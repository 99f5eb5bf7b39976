#!/usr/bin/env bash
# Sets up ./.venv and runs lint and tests.
#
#   tests/run.sh                  the default tier: each kind of promise, at a size for every day
#   tests/run.sh --all            everything: all engines, world sizes and examples
#   tests/run.sh --rest           what the default tier leaves out: the tests marked slow
#   tests/run.sh [--all | --rest] ARGUMENTS    go to pytest: tests/run.sh -k merge
#
# -k chooses within the tier. An -m of your own takes the place of the tier's. -n 0 runs all in one process, as --pdb
# wants it.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' tests/run.sh
}

# For the tests that look at pages. On CI it must be there; elsewhere those tests say why they skip.
install_browser() {
  command -v chromium >/dev/null && command -v chromedriver >/dev/null && return 0
  [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  echo "installing chromium and its driver"
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
}

set_up() {
  install_browser
  smt_environment test quickstart docs
  python tests/compiled_ops.py .pytest_cache/d/torch_extensions  # where tests/conftest.py looks for it
}

# What pytest gets in every tier: a worker for the files that start ranks, one for all others (tests/beside.py).
options=(-n 2 --dist loadgroup)
tier="the default tier"
case "${1:-}" in
  --help | -h) usage; exit ;;
  --all) tier="all tests"; shift ;;
  --rest) tier="the rest"; options+=(-m slow); shift ;;
  *) options+=(-m "not slow") ;;
esac
case " $* " in
  *" -m"* | *" --markexpr"*) tier="what -m chooses" ;;  # pytest takes the last
esac

set_up
ruff check .
ruff format --check .

code=0
SECONDS=0
python -m pytest "${options[@]}" "$@" || code=$?
echo "$tier took $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ "$tier" = "the default tier" ]; then
  echo "left out: the tests marked slow. tests/run.sh --rest runs them, tests/run.sh --all everything"
fi
exit "$code"
