# Sourced by launch/quickstart.sh and tests/run.sh. Makes ./.venv with the tested versions, once, and activates it.
# Never pulls a CUDA build of PyTorch onto a machine without a GPU.
#
#   smt_environment EXTRA...     extras of pyproject.toml to install, such as "test"

smt_environment() {
  local root torch_version="2.13.0" wanted stamp
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  local python="${PYTHON:-python3}"

  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    { echo "smt_dist needs Python 3.11 or newer (set PYTHON to it); $python is not" >&2; return 1; }
  command -v g++ >/dev/null ||
    { echo "smt_dist needs g++: DeepSpeed compiles its collectives at first use" >&2; return 1; }

  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return 1
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"

  wanted="$* $(cat "$root/pyproject.toml" "$root/configs/constraints.txt" | cksum)"
  stamp="$root/.venv/.smt_dist_$(echo "$*" | tr ' ' '_')"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "setting up $root/.venv ($*)"
    smt_install_torch "$torch_version" || return 1
    local extras
    extras="$(echo "$*" | tr ' ' ',')"
    python -m pip install --quiet --constraint "$root/configs/constraints.txt" --editable "$root[$extras]" || return 1
    echo "$wanted" > "$stamp"
  fi
}

smt_has_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1
}

smt_install_torch() {
  python -c 'import torch' 2>/dev/null && return 0
  if [ "$(uname)" != Linux ] || smt_has_gpu; then
    python -m pip install --quiet "torch==$1"
  else
    # "+cpu" exists only as a CPU build: it can't turn into gigabytes of CUDA. PyPI doesn't carry it; PyTorch's index does.
    python -m pip install --quiet "torch==$1+cpu" 2>/dev/null ||
      python -m pip install --quiet "torch==$1+cpu" --index-url https://download.pytorch.org/whl/cpu
  fi
}
