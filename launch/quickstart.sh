#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on short sums with SMT: 2 ranks, ZeRO-2, bf16. Prints exact-match accuracy on
# held-out tasks before and after, and where the adapter lies. Run it again at will: set-up, model and tasks are kept.
#
#   launch/quickstart.sh            STEPS=120 EVAL_ITEMS=128 RANKS=2 OUTPUT=outputs/quickstart may be set before it
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

steps="${STEPS:-120}"
items="${EVAL_ITEMS:-128}"
ranks="${RANKS:-2}"
output="${OUTPUT:-outputs/quickstart}"
# bash leaves a command out whose arithmetic fails, and goes on with the next.
for given in STEPS="$steps" EVAL_ITEMS="$items" RANKS="$ranks"; do
  [[ "${given#*=}" =~ ^[1-9][0-9]{0,5}$ ]] || {
    echo "quickstart.sh: error: $given: expected a whole number from 1 to 999999" >&2
    exit 2
  }
done
held_out=289  # tasks in the test file
(( items <= held_out )) || items="$held_out"
smt_environment quickstart

cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
# For evaluation too: more threads hardly help a model this small, and beside other jobs they wait for each other.
export OMP_NUM_THREADS=$(( cores > ranks ? cores / ranks : 1 )) TOKENIZERS_PARALLELISM=false

# step TITLE SECONDS COMMAND...: says what comes and how long it will take, does it, and says how long it took. SECONDS
# were measured on 2 cores whose AVX2 alone was used, without bf16 instructions, beside nothing else.
step() {
  local title="$1" expected="$2" began=$SECONDS
  shift 2
  echo "== $title: about $(minutes "$expected") on 2 cores with AVX2, longer beside other jobs"
  "$@"
  echo "== took $(minutes $(( SECONDS - began )))"
  took+="${took:+, }${title%%:*} $(minutes $(( SECONDS - began )))"
}

minutes() {
  echo "$(( $1 / 60 )) min $(( $1 % 60 )) s"
}

evaluate() {
  python launch/evaluate_model.py --model_name_or_path "$output/data/model" --eval_file "$output/data/test.json" \
    --max_items "$items" --max_new_tokens 24 "$@"
}

took=""
step "1/4 model and tasks" 30 python launch/prepare_quickstart.py --folder "$output/data"
step "2/4 before: the better of the plain and the chat prompt" $(( 15 + items / 2 )) \
  evaluate --prompt_style best --output "$output/before.json"
step "3/4 fine-tuning: $steps steps on $ranks ranks, ZeRO-2, bf16" $(( 60 + steps * 3 )) \
  deepspeed --num_gpus "$ranks" launch/train.py configs/recipes/quickstart.yaml \
  --model_name_or_path "$output/data/model" --train_file "$output/data/train.json" --output_dir "$output/adapter" \
  --max_steps "$steps"
step "4/4 after" $(( 15 + items / 4 )) \
  evaluate --prompt_style chat --adapter "$output/adapter" --output "$output/after.json"

echo
python launch/report_quickstart.py --before "$output/before.json" --after "$output/after.json"
echo "took: $took; together $(minutes "$SECONDS")"
echo "adapter: $output/adapter"
