#!/usr/bin/env bash
# THOR-7B with the published hyper-parameters: Qwen2.5-Math-7B on one machine of 8 GPUs of 80 GB, or on several (--nodes 4):
# cold-start data, cold start, hierarchical RL, evaluation. NOT RUN so far: no such machine was to be had; what fits is
# calculated (docs/scale.md). The same command continues a run that was stopped, stage by stage.
#     PROBLEMS=problems.jsonl CRITIC=http://host:8000 bash runs/qwen2.5-math-7b.sh                # published: DeepScaleR-Preview, Qwen3-32B
#     NODE=0 MASTER=host:29500 PROBLEMS=… CRITIC=… bash runs/qwen2.5-math-7b.sh --nodes 4         # on each machine, NODE from 0 to 3
# Published, but not asked for below since the model reads 4,096 tokens and no more: cold-start sequences of up to 20,000 and
# answers of up to 16,000 tokens. Not published: the number of rounds. Eight of 5,120 problems are one pass over 40,000.

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
MODEL=${MODEL:-models/Qwen2.5-Math-7B} OUT=${OUT:-out/qwen2.5-math-7b}

tirgen --actor "$MODEL" --tries 8 --max_rounds 5 --max_tokens 3200 --step_tokens 1024 --temperature 0.6 --top_k 30 --top_p 1 \
    --dtype bfloat16 --context 4096 --slots 64 --concurrency 128
train train_sft.py --model "$MODEL" --data "$OUT/data/sft.jsonl" --out "$OUT/sft" --epochs 3 --batch 128 --lr 2e-6 \
    --schedule constant --warmup 0.05 --max_length 4096 --micro_tokens 16384 --dtype bfloat16 --checkpoint_layers True \
    --replicas "$NODES" --device cuda
# 5,120 problems x 16 trajectories a round, in 40 optimizer steps of 128 problems
train train_rl.py --model "$OUT/sft/latest" --problems "${PROBLEMS:-problems.jsonl}" --out "$OUT/rl" --rounds 8 \
    --problems_per_round 5120 --updates_per_round 40 --samples 16 --branches 16 --temperature 1.0 --lr 1e-6 \
    --clip_low 0.2 --clip_high 0.28 --dual_clip 3.0 --nll_weight 0.01 --step_weight 1.0 --suffix_tokens 100 \
    --max_response_tokens 3200 --max_code_rounds 5 --min_group_fraction 0.5 --pack_tokens 16384 --slots 64 \
    --dtype bfloat16 --checkpoint_layers True --replicas "$NODES" --device cuda
evaluate "$OUT/rl/latest" --max_response_tokens 3200 --max_code_rounds 10 --max_corrections 4 --kv_gb 40
