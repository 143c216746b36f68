#!/bin/bash
# Trains, scores and cuts both bundled models at the same time, each on a GPU of its own, within SECONDS in all:
#   bash training/run.sh GPU_LM GPU_VLM OUT SECONDS
# OUT gets lm-1, lm-2, vlm-1, vlm-2 .safetensors (training/parts.py joins them) and report.json. If one fails, the other goes on.
gpu_lm=$1 gpu_vlm=$2 out=$3 seconds=$4
here=$(cd "$(dirname "$0")" && pwd)
until=$(($(date +%s) + seconds - ${SCORING:-60}))
work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

fit() { # NAME RATE OPTIONS
    timeout -k 5 $((until - $(date +%s) + 25)) \
        python3 "$here/$1.py" --until $until --rate "$2" --seed "${SEED:-11}" --out "$work/$1" ${TRAIN_OPTIONS:-} "${@:3}"
}

one() { # NAME GPU RATE
    export CUDA_VISIBLE_DEVICES=$2
    fit "$1" "$3" || echo "$1: training FAILED"
    # nothing saved, a memory too small perhaps: once more with smaller batches
    [ -d "$work/$1" ] || fit "$1" "$3" --batch-tokens 32768 || echo "$1: training FAILED again"
    [ -d "$work/$1" ] || return
    python3 "$here/parts.py" cut "$work/$1" "$out/$1" || echo "$1: NOTHING to hand back"
    timeout -k 5 $((until - $(date +%s) + ${SCORING:-60} + 10)) \
        python3 "$here/quick.py" "mosaic-$1" --folder "$work/$1" --json "$work/$1-scores.json" ${SCORE_OPTIONS:-} || echo "$1: scoring FAILED"
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || true
one lm "$gpu_lm" "${RATE_LM:-1e-3}" >"$work/lm.txt" 2>&1 &
one vlm "$gpu_vlm" "${RATE_VLM:-8e-4}" >"$work/vlm.txt" 2>&1 &
wait
python3 - "$work" "$out/report.json" <<'PYTHON'
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
files = ("lm/log.json", "vlm/log.json", "lm-scores.json", "vlm-scores.json")
report = {name: json.loads((work / name).read_text()) for name in files if (work / name).exists()}
texts = {name: (work / name).read_text() for name in ("lm.txt", "vlm.txt")}
pathlib.Path(sys.argv[2]).write_text(json.dumps({**report, **texts}, indent=1))
for name, text in texts.items():
    print(f"==== {name}", text[-5500:], sep="\n")
PYTHON
