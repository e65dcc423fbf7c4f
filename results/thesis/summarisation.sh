#!/usr/bin/env bash
# Summaries of Reddit posts (TL;DR) with a small model: SFT, six ways to learn from pairs, greedy
# summaries of held-out posts. The recipe is that of a master's thesis,
# github.com/martimfasantos/MSc-Thesis; README.md has its numbers and the differences.
#
#   results/thesis/summarisation.sh MODEL GPUS [flags for every training command]
#   results/thesis/summarisation.sh tinyllama 4
#   results/thesis/summarisation.sh gemma 4 --fsdp --gradient-checkpointing
#   DRY_RUN=1 results/thesis/summarisation.sh tinyllama 4              # prints the commands only
#
# The same command continues a script that was killed; finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."

stop() {
  echo "error: $1" >&2
  echo "usage: results/thesis/summarisation.sh tinyllama|gemma GPUS [flags for training]" >&2
  exit 2
}

model=${1:-}
case $model in
  tinyllama) base=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T ;;
  gemma) base=google/gemma-2-2b ;;
  *) stop "MODEL must be tinyllama or gemma, got '$model'" ;;
esac
batch=64 # 1 a device, 16 times accumulated, 4 devices
gpus=${2:-}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || stop "GPUS must be a number, 1 or more, got '$gpus'"
((batch % gpus == 0)) || stop "a batch of $batch rows cannot be divided among $gpus GPUs"
shift 2

runs=runs/thesis/summarisation/$model
# Every setting is given, because the models here may have no preset. Only --micro-batch-size is left
# to the scripts.
shared=(
  --dataset tldr --batch-size "$batch" --schedule cosine --warmup-ratio 0.1 --max-grad-norm 1
  --max-length 2048 --max-prompt-length 256 --eval-every 500 --save-every 500 "$@"
)
demonstrations=(--epochs 1 --lr 1e-5 --optimizer adamw --no-train-on-prompt "${shared[@]}")
pairs=(--epochs 3 --lr 1e-7 --optimizer rmsprop --beta 0.1 "${shared[@]}")

run() {
  printf '%q ' "$@"
  echo
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

train() { # NAME SCRIPT FLAGS
  run torchrun --nproc_per_node="$gpus" "$2" --output-dir "$runs/$1" "${@:3}"
}

evaluate() { # NAME MODEL
  run python evaluate.py --model "$2" --baseline "$runs/sft" --dataset tldr \
    --reward results/thesis/deberta_reward.py:score --text-metrics \
    --temperature 0 --max-new-tokens 128 --prompts 2048 \
    --json "$runs/$1.json" --markdown "$runs/$1.md"
}

train sft sft.py --model "$base" "${demonstrations[@]}"

sft=$runs/sft
train dpo dpo.py --model "$sft" "${pairs[@]}"
train dpo-gamma dpo.py --model "$sft" "${pairs[@]}" --gamma 0.5
train simpo simpo.py --model "$sft" "${pairs[@]}" --gamma-beta-ratio 5 # gamma 0.5
train slic-dpo slic.py --model "$sft" "${pairs[@]}" --reference-normalised --delta 1 \
  --target-weight 0

# As published these two begin with the base model, so they are not to be compared with the others.
train cpo cpo.py --model "$base" "${pairs[@]}" --nll-weight 1
# 0.04: weight 1 on a mean over tokens is 1/27 on a sum of 27, about what a summary here has.
train slic slic.py --model "$base" "${pairs[@]}" --delta 1 --target-weight 0.04

evaluate base "$base"
for name in dpo dpo-gamma simpo slic-dpo cpo slic; do
  evaluate "$name" "$runs/$name"
done
