#!/usr/bin/env bash
# THOR-1.5B: Qwen2.5-Math-1.5B on one GPU of 80 GB (--gpus 8: on eight), with the published hyper-parameters but for a smaller
# round, of 20 to 30 minutes by calculation (docs/scale.md). NOT RUN so far: no GPU was to be had. The same command continues
# a run that was stopped, stage by stage.
#     PROBLEMS=problems.jsonl CRITIC=http://host:8000 bash runs/qwen2.5-math-1.5b.sh

GPUS=${GPUS:-1}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
MODEL=${MODEL:-models/Qwen2.5-Math-1.5B} OUT=${OUT:-out/qwen2.5-math-1.5b}

tirgen --actor "$MODEL" --tries 8 --max_rounds 5 --max_tokens 3200 --step_tokens 1024 --temperature 0.6 --top_k 30 --top_p 1 \
    --dtype bfloat16 --context 4096 --slots 128 --concurrency 256
train train_sft.py --model "$MODEL" --data "$OUT/data/sft.jsonl" --out "$OUT/sft" --epochs 3 --batch 128 --lr 2e-6 \
    --schedule constant --warmup 0.05 --max_length 4096 --micro_tokens 8192 --dtype bfloat16 --device cuda
# 512 problems x 16 trajectories a round, in 4 optimizer steps of 128 problems: a tenth of the published round
train train_rl.py --model "$OUT/sft/latest" --problems "${PROBLEMS:-problems.jsonl}" --out "$OUT/rl" --rounds 80 \
    --problems_per_round 512 --updates_per_round 4 --samples 16 --branches 16 --temperature 1.0 --lr 1e-6 \
    --clip_low 0.2 --clip_high 0.28 --dual_clip 3.0 --nll_weight 0.01 --step_weight 1.0 --suffix_tokens 100 \
    --max_response_tokens 3200 --max_code_rounds 5 --min_group_fraction 0.5 --pack_tokens 8192 --slots 64 \
    --dtype bfloat16 --device cuda
evaluate "$OUT/rl/latest" --max_response_tokens 3200 --max_code_rounds 10 --max_corrections 4 --kv_gb 40
