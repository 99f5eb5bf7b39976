#!/usr/bin/env bash
# Runs launch/train.py under torchrun. Start it on every node, with the same values; arguments go to train.py:
#
#   HEAD_NODE=node1 configs/nodes/torchrun.sh --engine fsdp2 --model_name_or_path M --train_file T.json ...
#
#   NODES          number of nodes (2)
#   GPUS_PER_NODE  ranks on each node (8)
#   HEAD_NODE      one of the nodes, by a name or address that all reach (needed if NODES is above 1)
#   PORT           free on HEAD_NODE (29500)
#   MAX_RESTARTS   times that all ranks are started again after a failure; give --resume_from_checkpoint auto (0)
#   RUN_ID         the same on all nodes; another one for another run on the same PORT (smt_dist)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

nodes="${NODES:-2}"
if [ "$nodes" = 1 ]; then
  HEAD_NODE="${HEAD_NODE:-localhost}"
fi
head_node="${HEAD_NODE:?the first node, by a name or address that every node reaches}"

# A store for each try: in torch 2.13 restarted ranks otherwise read the addresses of those that are gone, and may hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$nodes" --nproc_per_node "${GPUS_PER_NODE:-8}" --max-restarts "${MAX_RESTARTS:-0}" \
  --rdzv_backend c10d --rdzv_endpoint "$head_node:${PORT:-29500}" --rdzv_id "${RUN_ID:-smt_dist}" \
  "$root/launch/train.py" "$@"
