#!/usr/bin/env bash
# Runs launch/train.py on all nodes of a hostfile, by pdsh over ssh without a password. Start it once, on the first
# node, in a folder that all nodes share; arguments go to train.py:
#
#   configs/nodes/deepspeed_pdsh.sh --deepspeed configs/deepspeed/zero3.json --model_name_or_path M ...
#
#   HOSTFILE       the nodes and their GPUs (configs/nodes/hostfile)
#   NODES          use only the first so many of HOSTFILE (all)
#   GPUS_PER_NODE  ranks on each node, instead of HOSTFILE's slots (its slots)
#   HEAD_NODE      the first node's address (what `hostname -I` says there)
#   PORT           free on the first node (29500)
#
# The other nodes get PYTHON*, NCCL* and UCX* of this environment; lines NAME=value in ~/.deepspeed_env add to them.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# -1 and an empty address are the launcher's own defaults.
exec deepspeed --hostfile "${HOSTFILE:-$root/configs/nodes/hostfile}" --launcher pdsh \
  --num_nodes "${NODES:--1}" --num_gpus "${GPUS_PER_NODE:--1}" \
  --master_addr "${HEAD_NODE:-}" --master_port "${PORT:-29500}" "$root/launch/train.py" "$@"
