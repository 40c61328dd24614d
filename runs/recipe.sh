# Sourced by the recipes for GPUs. Options of each: --nodes N (run it on each of N machines that share this directory, with
# MASTER=HOST:PORT and, as NODE, 0 to N-1), --gpus N of each machine, --print (show every command, run none).
# Environment: PROBLEMS, a file of training problems; CRITIC, the Critic of TIRGen, a directory or URLs.

NODES=1 GPUS=${GPUS:-8} PRINT=
while [ $# -gt 0 ]; do
    case $1 in
        --nodes) NODES=${2:-}; [ $# = 1 ] || shift ;;
        --gpus) GPUS=${2:-}; [ $# = 1 ] || shift ;;
        --print) PRINT=1 ;;
        *) echo "error: $1 is not an option of this script; there are --nodes N, --gpus N and --print" >&2; exit 2 ;;
    esac
    shift
done
NODE=${NODE:-0} MASTER=${MASTER:-localhost:29500}
if ! [[ "$NODES $GPUS $NODE" =~ ^[1-9][0-9]*\ [1-9][0-9]*\ [0-9]+$ ]] || [ "$NODE" -ge "$NODES" ]; then
    echo "error: --nodes is '$NODES', --gpus '$GPUS' and NODE '$NODE'; nodes and gpus must be 1 or more," \
        "NODE below nodes" >&2
    exit 2
fi
if [ -z "$PRINT" ]; then
    if [ -z "${PROBLEMS:-}" ] || [ -z "${CRITIC:-}" ]; then
        echo "error: set PROBLEMS to a file of training problems (JSON lines with id, question and answer) and CRITIC to the" \
            "Critic of TIRGen, a directory or URLs of servers separated by commas; --print shows what would be run" >&2
        exit 2
    fi
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
    install runs/requirements-benchmarks.txt
else
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

run() { if [ -n "$PRINT" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# train SCRIPT options: one process a GPU, on all machines; a rank that dies restarts the job from its last checkpoint
train() {
    if [ $((NODES * GPUS)) = 1 ]; then run python "$@"; return; fi
    local rendezvous=(--standalone)
    [ "$NODES" = 1 ] || rendezvous=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id thor)
    run torchrun "${rendezvous[@]}" --nproc-per-node "$GPUS" --max-restarts 3 "$@"
}

# each_gpu FUNCTION: with the GPU's number among all machines' as its argument, side by side; fails if one of them does
each_gpu() {
    local gpu pids=() failed=0
    for ((gpu = 0; gpu < GPUS; gpu++)); do
        if [ -n "$PRINT" ]; then "$1" $((NODE * GPUS + gpu)); continue; fi
        CUDA_VISIBLE_DEVICES=$gpu "$1" $((NODE * GPUS + gpu)) & pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

# all_nodes NAME: waits until every machine has come to this point of the run in OUT
all_nodes() {
    [ -z "$PRINT" ] && [ "$NODES" != 1 ] || return 0
    touch "$OUT/.$1-$NODE"
    for ((node = 0; node < NODES; node++)); do until [ -e "$OUT/.$1-$node" ]; do sleep 10; done; done
}

# tirgen options: a shard of the problems on each GPU, then together; skipped when the data is there
tirgen() {
    TIRGEN=(--critic "${CRITIC:-http://critic:8000}" --problems "${PROBLEMS:-problems.jsonl}" --device cuda "$@")
    if [ -z "$PRINT" ]; then
        mkdir -p "$OUT/shards"
        [ ! -f "$OUT/data/sft.jsonl" ] || return 0
    fi
    one() { run python tirgen.py "${TIRGEN[@]}" --shard $(($1 + 1))/$((NODES * GPUS)) --out "$OUT/shards/$1"; }
    each_gpu one
    all_nodes tirgen
    [ "$NODE" = 0 ] || { all_nodes merged; return; }
    run python tirgen.py "${TIRGEN[@]}" --merge "$(seq -s, -f "$OUT/shards/%g" 0 $((NODES * GPUS - 1)))" \
        --out "$OUT/data"
    all_nodes merged
}

# evaluate MODEL options: the benchmarks of the paper, one a GPU of the first machine
evaluate() {
    EVALUATE=("$@") BENCHMARKS=(math-500 aime-2024 aime-2025 amc-2023 minerva olympiadbench)
    [ "$NODE" = 0 ] || return 0
    two() {
        local number
        for ((number = $1; number < ${#BENCHMARKS[@]}; number += GPUS)); do
            run python evaluate.py --model "${EVALUATE[0]}" --benchmark "${BENCHMARKS[$number]}" --device cuda --dtype bfloat16 \
                --samples 4 --temperature 0.6 "${EVALUATE[@]:1}" --out "$OUT/${BENCHMARKS[$number]}.json"
        done
    }
    each_gpu two
}
