#!/usr/bin/env bash
# Runs launch/train.py under DeepSpeed's launcher without ssh. Start it on every node; arguments go to train.py:
#
#   NODE_RANK=0 HEAD_NODE=node1 configs/nodes/deepspeed_no_ssh.sh --deepspeed configs/deepspeed/zero3.json ...
#
#   NODE_RANK      0 on HEAD_NODE, 1, 2, ... on the others (0 if NODES is 1)
#   HEAD_NODE      the first node, by a name or address that all reach (needed unless NODES is 1)
#   HOSTFILE       the same on all nodes (configs/nodes/hostfile)
#   NODES          use only the first so many of HOSTFILE (all)
#   GPUS_PER_NODE  ranks on each node, instead of HOSTFILE's slots (its slots)
#   PORT           free on HEAD_NODE (29500)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

if [ "${NODES:-}" = 1 ]; then
  NODE_RANK="${NODE_RANK:-0}" HEAD_NODE="${HEAD_NODE:-127.0.0.1}"
fi

# -1 is the launcher's own default: as HOSTFILE says.
exec deepspeed --hostfile "${HOSTFILE:-$root/configs/nodes/hostfile}" --no_ssh \
  --num_nodes "${NODES:--1}" --num_gpus "${GPUS_PER_NODE:--1}" --node_rank "${NODE_RANK:?this node: 0, 1, ...}" \
  --master_addr "${HEAD_NODE:?the first node, by a name or address that every node reaches}" \
  --master_port "${PORT:-29500}" "$root/launch/train.py" "$@"
