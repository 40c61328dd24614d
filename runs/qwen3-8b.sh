#!/usr/bin/env bash
# THOR-Thinking-8B with the published hyper-parameters: Qwen3-8B, a reasoning model, on one machine of 8 GPUs of 141 GB, or on
# several (--nodes 4). NOT RUN so far: no such machine was to be had; what fits is calculated (docs/scale.md). The same
# command continues a run that was stopped, stage by stage.
#     PROBLEMS=problems.jsonl CRITIC=http://host:8000 bash runs/qwen3-8b.sh                # published: DeepScaleR-Preview, Qwen3-32B
#     NODE=0 MASTER=host:29500 PROBLEMS=… CRITIC=… bash runs/qwen3-8b.sh --nodes 4         # on each machine, NODE from 0 to 3
# Not published: the number of rounds, and the length of a response in RL (3,200 tokens are the 7B's, which does not reason;
# 16,000 are those of inference). The cold start's set had 27,652 trajectories. Sequences of 17,000 tokens fit only where
# layers are computed again in the backward pass (docs/scale.md).

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
MODEL=${MODEL:-models/Qwen3-8B} OUT=${OUT:-out/qwen3-8b}

tirgen --actor "$MODEL" --thinking --tries 8 --max_rounds 5 --max_tokens 20000 --step_tokens 4096 --window_tokens 4096 \
    --temperature 0.6 --top_k 30 --top_p 1 --dtype bfloat16 --context 21000 --slots 16 --concurrency 32
train train_sft.py --model "$MODEL" --data "$OUT/data/sft.jsonl" --out "$OUT/sft" --thinking --epochs 3 --batch 128 --lr 2e-6 \
    --schedule constant --warmup 0.05 --max_length 20000 --micro_tokens 20480 --dtype bfloat16 --checkpoint_layers True \
    --replicas "$NODES" --device cuda
# 5,120 problems x 16 trajectories a round, in 40 optimizer steps of 128 problems
train train_rl.py --model "$OUT/sft/latest" --problems "${PROBLEMS:-problems.jsonl}" --out "$OUT/rl" --thinking --rounds 8 \
    --problems_per_round 5120 --updates_per_round 40 --samples 16 --branches 16 --temperature 1.0 --lr 1e-6 \
    --clip_low 0.2 --clip_high 0.28 --dual_clip 3.0 --nll_weight 0.01 --step_weight 1.0 --suffix_tokens 100 \
    --max_response_tokens 16000 --max_code_rounds 5 --min_group_fraction 0.5 --pack_tokens 16896 --slots 16 \
    --dtype bfloat16 --checkpoint_layers True --replicas "$NODES" --device cuda
evaluate "$OUT/rl/latest" --thinking --max_response_tokens 16000 --max_code_rounds 10 --max_corrections 4 --kv_gb 60
