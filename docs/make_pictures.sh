#!/usr/bin/env bash
# Makes the pictures of README and docs anew, in docs/images:
#
#   smt.svg         what SMT trains of a model's weights; drawn by docs/draw_smt.py
#   selection.png   the selection page of a real run
#   memory.png      the memory report of the same run
#
#   docs/make_pictures.sh           STEPS=6 OUTPUT=outputs/pictures may be set before it
#
# The run: SmolLM2-135M-Instruct on short sums, 2 ranks, FSDP2. Takes a browser (chromium with chromedriver). Model and
# tasks are kept in OUTPUT. The drawing comes out byte for byte the same, the screenshots with what the run measured.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' docs/make_pictures.sh
}

# step TITLE SECONDS COMMAND...: says what comes and how long it takes on 2 cores, does it, and says how long it took.
step() {
  local title="$1" expected="$2" began=$SECONDS
  shift 2
  echo "== $title: about $expected s on 2 cores, longer beside other jobs"
  "$@"
  echo "== took $(( SECONDS - began )) s"
}

# Blocks of 64, chosen as in the paper, so that the page has much to show. The base is in fp32 because in bf16, the dtype
# of its file, each rank's shards are views of the mapped file, which the report counts whole.
train() {
  local smt_config='{
    "block_size": 64,
    "groups": [
      {"name": "attention", "target_modules": "attention", "fraction": 0.01},
      {"name": "mlp", "target_modules": "mlp", "fraction": 0.02}
    ],
    "selection": {"strategy": "no_restriction"},
    "warmup": {"steps": 4}
  }'
  torchrun --standalone --nproc_per_node 2 launch/train.py --engine fsdp2 --dtype float32 --smt_config "$smt_config" \
    --model_name_or_path "$model" --train_file "$output/data/train.json" --output_dir "$output/run" \
    --profile_memory "$output/memory" --prompt_style chat --packing --max_seq_length 128 \
    --per_device_train_batch_size 4 --max_steps "$steps" --learning_rate 5e-4 --logging_steps 1 \
    --save_strategy no --report_to none
}

case "${1:-}" in
  "") ;;
  --help | -h) usage; exit ;;
  *) echo "docs/make_pictures.sh takes no arguments; --help says what it does" >&2; exit 2 ;;
esac
for program in chromium chromedriver; do
  command -v "$program" >/dev/null || { echo "$program is missing: apt-get install chromium chromium-driver" >&2; exit 1; }
done
smt_environment test quickstart

steps="${STEPS:-6}"
output="${OUTPUT:-outputs/pictures}"
model="$output/SmolLM2-135M-Instruct"  # the page shows the folder's name
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

step "1/4 drawing" 1 python docs/draw_smt.py
step "2/4 model and tasks" 30 python launch/prepare_quickstart.py --folder "$output/data"
ln -sfn data/model "$model"
step "3/4 run of $steps steps on 2 ranks, its memory recorded" $(( 100 + steps * 8 )) train
step "4/4 screenshots" 15 python docs/take_screenshots.py --selection "$output/run/selection.html" \
  --memory "$output/memory/memory.html" --folder docs/images
ls -l docs/images
