#!/usr/bin/env bash
# Trains a Llama of 7B parameters on a machine with 24 GiB, three times: on 2 ranks under fsdp2, on 1 rank, and on 1 rank
# with the paper's score in passes. Watches the memory of all processes. Flags go to launch/benchmarks/capacity.py.
#
#   launch/benchmarks/capacity.sh
#   launch/benchmarks/capacity.sh --layers 2 --hidden_size 256 --intermediate_size 704 --heads 4
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/environment.sh
smt_environment quickstart

python launch/benchmarks/capacity.py --ranks 2 "$@"
python launch/benchmarks/capacity.py --ranks 1 "$@"
python launch/benchmarks/capacity.py --ranks 1 --score abs_mean --passes 2 --warmup_steps 1 --steps 2 "$@"
