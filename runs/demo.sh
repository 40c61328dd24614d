#!/usr/bin/env bash
# Every stage of the method on a small model trained from scratch, on two CPU cores: a base model, TIRGen with that model
# as the Actor, the cold start, trajectory RL, trajectory and step RL from the same start, evaluation with and without
# self-correction; then the table T1 … T6 and the curves. Everything lies in out/demo afterwards, and the models work in
# generate.py:
#     python generate.py --model out/demo/t5/latest --style base --instruction "" --question "What is the least common multiple of 36 and 87?"
# --quick: a few minutes, small rounds, to see that it works. --hard: a cold start on programs most of which do not run.
# --thinking: the reasoning style (code inside <think>, the box after it), a Qwen3, a chat template; the models work with
#     python generate.py --model out/demo-thinking/t5/latest --thinking --instruction "" --question "…"
# --seed N: another seed. The same command continues a run that was stopped.

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
SEED=0 NAME=demo SLOPPY=0.25 ROUNDS=24 HELD_OUT=400 TEXTS=9600 SOLUTIONS=9600 TIRGEN=2400 PROBLEMS=32 HARD=0
FLAGS=() STYLE=(--style base --instruction "" --threads 1)
while [ $# -gt 0 ]; do
    case $1 in
        --quick) NAME=demo-quick ROUNDS=2 HELD_OUT=22 TEXTS=640 SOLUTIONS=1280 TIRGEN=100 PROBLEMS=8 ;;
        --hard) NAME=demo-hard SLOPPY=0.65 ROUNDS=12 HARD=1 ;;
        --thinking) FLAGS=(--thinking) STYLE=(--style chat --thinking --instruction "" --threads 1) ;;
        --seed) [ $# -gt 1 ] || fail "--seed needs a number"; SEED=$2; shift ;;
        *) fail "$1 is not an option of this script; there are --quick, --hard, --thinking and --seed N" ;;
    esac
    shift
done
[ ${#FLAGS[@]} = 0 ] || NAME=$NAME-thinking
[ "$SEED" = 0 ] || NAME=$NAME-$SEED
OUT=out/$NAME
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
RUN=(--cpu_seconds 1)  # the programs take milliseconds; what loops for ever should not cost ten seconds
SFT=(--epochs 2 --batch 16 --lr 3e-3 --beta2 0.98 --schedule cosine --micro_tokens 8192 --save_every 100 --keep 1 --seed "$SEED")
RL=(--rounds "$ROUNDS" --problems_per_round "$PROBLEMS" --samples 8 --updates_per_round 4 --lr 2.5e-4 --beta2 0.99
    --nll_weight 1 --min_response_tokens 0 --box_within_last 0 --min_group_fraction 0.25 --max_response_tokens 240
    --slots 256 --save_every 4 --seed "$SEED")
EVERY=$((ROUNDS < 8 ? ROUNDS : 8))
CODE=(--suffix_tokens 12 --max_branch_tokens 100 --eval_problems "$OUT/eval.jsonl" --eval_every $EVERY --dump_every $EVERY)
TEACH=(--critic scripted:toy --actor_instruction "" --temperature 0.6 --top_k 0 --tries 1 --step_tokens 60 --max_tokens 240
       --context 400 --slots 128 --concurrency 256 --difficulty_samples 0 --max_trivial_share 1 --one_call_share 1 --seed "$SEED")
# a reasoning Actor writes its thoughts to the end, and the Critic mends no answer: only tries with a right one survive
[ ${#FLAGS[@]} = 0 ] || TEACH+=(--tries 4 --window_tokens 28)
SOLVE=(--samples 2 --max_response_tokens 240 --slots 128 --suffix_tokens 12 --seed "$SEED")
mkdir -p "$OUT"

# stage NAME command…: its output goes to a file; together and join: two stages side by side
stage() {
    local name=$1; shift
    echo "$(date +%T) $name …"
    "$@" > "$OUT/$name.log" 2>&1 && return
    if grep -q "no round had a group to train on" "$OUT/$name.log"; then
        echo "$name: no answer was right, or all were: nothing to learn from, the model stays as it was"
        return
    fi
    tail -n 5 "$OUT/$name.log" >&2
    fail "$name failed; see $OUT/$name.log"
}
together() { set -m; "$@" & BESIDE=$!; set +m; }  # a process group of its own, so that it can be ended with its children
join() { wait "$BESIDE" || exit 2; BESIDE=; }
BESIDE=
trap '[ -z "$BESIDE" ] || { kill -- -"$BESIDE"; wait "$BESIDE"; } 2>/dev/null || true' EXIT

evaluate() { # model, temperature, corrections
    local rounds=3; [ "$1" = t1 ] || [ "$1" = t2 ] && rounds=0
    stage "evaluate-$1-$2-$3" python evaluate.py --model "$OUT/$1/latest" --benchmark "$OUT/held-out.jsonl" "${STYLE[@]}" \
        "${RUN[@]}" "${SOLVE[@]}" --temperature "$2" --max_corrections "$3" --max_code_rounds $rounds --out "$OUT/$1-$2-$3.json"
}
evaluate_all() { for temperature in 1.0 0.6; do for run in "$@"; do evaluate "${run%-*}" $temperature "${run##*-}"; done; done; }

[ -f "$OUT/held-out.jsonl" ] || stage data python -m thor.toy --out "$OUT" --seed "$SEED" --num_texts "$TEXTS" \
    --num_solutions "$SOLUTIONS" --num_tirgen "$TIRGEN" --num_held_out "$HELD_OUT" --sloppy "$SLOPPY" "${FLAGS[@]}"
head -n 64 "$OUT/tune.jsonl" > "$OUT/eval.jsonl"
stage base python train_sft.py --model "$OUT/untrained" --data "$OUT/texts.jsonl" --out "$OUT/t1" "${STYLE[@]}" "${SFT[@]}"
text_lane() {
    stage text-rl python train_rl.py --model "$OUT/t1/latest" --problems "$OUT/train.jsonl" --out "$OUT/t2" \
        "${STYLE[@]}" "${RUN[@]}" "${RL[@]}" --rounds $((ROUNDS / 2)) --max_code_rounds 0 --branches 0
    evaluate_all t1-0 t2-0
}
together text_lane
stage tirgen python tirgen.py --actor "$OUT/t1/latest" --problems "$OUT/tirgen.jsonl" --out "$OUT/tirgen" "${STYLE[@]}" "${RUN[@]}" "${TEACH[@]}"
stage mix python runs/demo_mix.py "$OUT"
stage cold-start python train_sft.py --model "$OUT/t1/latest" --data "$OUT/cold_start.jsonl" --out "$OUT/t3" "${STYLE[@]}" "${SFT[@]}"
join
code_rl() { # stage, model, further options
    stage "$1" python train_rl.py --model "$OUT/t3/latest" --problems "$OUT/train.jsonl" --out "$OUT/$2" "${STYLE[@]}" "${RUN[@]}" \
        "${RL[@]}" "${CODE[@]}" "${@:3}"
    stage "audit-$2" python -m thor.audit "$OUT/$2"
}
trajectory_lane() { # the step level takes longer: meanwhile all that does not need it is evaluated
    code_rl trajectory-rl t4 --branches 0
    evaluate_all t3-0 t3-4 t4-0 t4-4
}
together trajectory_lane
code_rl hierarchical-rl t5 --branches 8 --joint
evaluate_all t5-0 t5-4
join
if [ "$HARD" = 1 ]; then  # trajectory RL once more, for as long as the step level took
    [ -d "$OUT/t4-long" ] || { rm -rf "$OUT/t4-copy"; cp -r "$OUT/t4" "$OUT/t4-copy"; mv "$OUT/t4-copy" "$OUT/t4-long"; }
    code_rl trajectory-rl-longer t4-long --branches 0 --rounds "$(python runs/demo_table.py --out "$OUT" --equal_rounds)"
    evaluate_all t4-long-0 t4-long-4
fi
python runs/demo_table.py "$OUT"
PLAIN=${OUT/-thinking/}
[ "$PLAIN" = "$OUT" ] || [ ! -f "$PLAIN/table.md" ] || python runs/demo_table.py --out "$OUT" --beside "$PLAIN"
echo "every token of the last round of T5, as a page: .venv/bin/python -m thor.report $OUT/t5"
