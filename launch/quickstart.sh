#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on short sums with SMT: 2 ranks, ZeRO-2, bf16. Prints exact-match accuracy on
# held-out tasks before and after, and where the adapter lies. Run it again at will: set-up, model and tasks are kept.
#
#   launch/quickstart.sh            STEPS=150 EVAL_ITEMS=289 RANKS=2 OUTPUT=outputs/quickstart may be set before it
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
smt_environment quickstart

steps="${STEPS:-150}"
items="${EVAL_ITEMS:-289}"
ranks="${RANKS:-2}"
output="${OUTPUT:-outputs/quickstart}"
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
export TOKENIZERS_PARALLELISM=false
started=$SECONDS

echo "== 1/4 model and tasks"
python launch/prepare_quickstart.py --folder "$output/data"

echo "== 2/4 before: the better of the plain and the chat prompt"
OMP_NUM_THREADS="$cores" python launch/evaluate_model.py --model_name_or_path "$output/data/model" \
  --eval_file "$output/data/test.json" --max_items "$items" --prompt_style best --max_new_tokens 24 \
  --dtype bfloat16 --output "$output/before.json"

echo "== 3/4 fine-tuning: $steps steps on $ranks ranks, ZeRO-2, bf16"
OMP_NUM_THREADS=$(( cores > ranks ? cores / ranks : 1 )) deepspeed --num_gpus "$ranks" \
  launch/train.py configs/recipes/quickstart.yaml --model_name_or_path "$output/data/model" \
  --train_file "$output/data/train.json" --output_dir "$output/adapter" \
  --max_steps "$steps"

echo "== 4/4 after"
OMP_NUM_THREADS="$cores" python launch/evaluate_model.py --model_name_or_path "$output/data/model" \
  --adapter "$output/adapter" --eval_file "$output/data/test.json" --max_items "$items" --prompt_style chat \
  --max_new_tokens 24 --dtype bfloat16 --output "$output/after.json"

python - "$output" "$(( SECONDS - started ))" <<'PYTHON'
import json, sys
output, seconds = sys.argv[1], int(sys.argv[2])
before, after = (json.load(open(f"{output}/{name}.json")) for name in ("before", "after"))
print(f"\nexact match on {after['n']} held-out tasks: {before['accuracy']:.1%} before ({before['prompt_style']} prompt), "
      f"{after['accuracy']:.1%} after; {seconds // 60} min {seconds % 60} s\nadapter: {output}/adapter")
PYTHON
