#!/usr/bin/env bash
# Translation with a small model on MT-pref: SFT on the chosen translations, seven ways to learn
# from pairs, greedy translations. The recipe is that of a master's thesis,
# github.com/martimfasantos/MSc-Thesis; README.md has its numbers and the differences.
#
#   results/thesis/translation.sh MODEL GPUS [flags for every training command]
#   results/thesis/translation.sh tinyllama 2
#   results/thesis/translation.sh eurollm 4 --fsdp --gradient-checkpointing
#   TEST=wmt23-en-de.jsonl results/thesis/translation.sh eurollm 4     # {"prompt", "completion"}
#   DRY_RUN=1 results/thesis/translation.sh tinyllama 2                # prints the commands only
#
# TEST: rows to translate; default: the held-out rows of MT-pref. The same command continues a script
# that was killed; finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."

stop() {
  echo "error: $1" >&2
  echo "usage: results/thesis/translation.sh tinyllama|gemma|eurollm GPUS [flags for training]" >&2
  exit 2
}

model=${1:-}
case $model in # batch: 1 a device, times accumulation, times devices
  tinyllama) base=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T batch=64 ;; # 32 x 2
  gemma) base=google/gemma-2-2b-it batch=64 ;;                                   # 16 x 4
  eurollm) base=utter-project/EuroLLM-1.7B-Instruct batch=128 ;;                 # 32 x 4
  *) stop "MODEL must be tinyllama, gemma or eurollm, got '$model'" ;;
esac
gpus=${2:-}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || stop "GPUS must be a number, 1 or more, got '$gpus'"
((batch % gpus == 0)) || stop "a batch of $batch rows cannot be divided among $gpus GPUs"
test=${TEST:-mt-pref} rows=(--dataset mt-pref)
if [[ $test != mt-pref ]]; then
  [[ -f $test ]] || stop "TEST: there is no file $test in $PWD"
  rows=(--dataset "$test" --eval-dataset "$test") # all of it
fi
shift 2

runs=runs/thesis/translation/$model
# Every setting is given, because the models here may have no preset. Only --micro-batch-size is left
# to the scripts.
shared=(
  --dataset mt-pref --batch-size "$batch" --schedule cosine --warmup-ratio 0.1 --max-grad-norm 1
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
  local file
  file=$runs/$1-$(basename "$test" .jsonl)
  run python evaluate.py --model "$2" --baseline "$runs/sft" "${rows[@]}" --text-metrics \
    --temperature 0 --max-new-tokens 256 --prompts 4096 \
    --json "$file.json" --markdown "$file.md" --export rows --output "$file.jsonl"
}

train sft sft.py --model "$base" "${demonstrations[@]}"

sft=$runs/sft
train dpo dpo.py --model "$sft" "${pairs[@]}"
train dpo-gamma dpo.py --model "$sft" "${pairs[@]}" --gamma 0.5
train simpo simpo.py --model "$sft" "${pairs[@]}" --gamma-beta-ratio 5 # gamma 0.5
train slic-dpo slic.py --model "$sft" "${pairs[@]}" --reference-normalised --delta 1 \
  --target-weight 0
train sft-cpo cpo.py --model "$sft" "${pairs[@]}" --nll-weight 1

# As published these two begin with the model as it was before SFT, so they are not to be compared
# with the others. 0.04: weight 1 on a mean over tokens is one over their number on a sum; `length/
# chosen` in a run's metrics says how many there are.
train cpo cpo.py --model "$base" "${pairs[@]}" --nll-weight 1
train slic slic.py --model "$base" "${pairs[@]}" --delta 1 --target-weight 0.04

evaluate base "$base"
for name in dpo dpo-gamma simpo slic-dpo sft-cpo cpo slic; do
  evaluate "$name" "$runs/$name"
done
