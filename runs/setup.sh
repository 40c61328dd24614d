# Sourced by the other scripts here: goes to the repository's root, makes .venv once and installs what is pinned.
# PYTHON=python3.12 bash runs/test.sh takes another interpreter. Arguments: further requirement files.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $1" >&2; exit 2; }

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || fail "$PYTHON is not installed; install it with: apt-get install python3 python3-venv"

if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        || fail "Python 3.11 to 3.13 is needed, $PYTHON is $("$PYTHON" -V 2>&1); name another one with PYTHON=…"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "Python's venv module is missing; install it with: apt-get install python3-venv"
    "$PYTHON" -m venv .venv
fi
. .venv/bin/activate

# install FILE [pip options]: once for each content of FILE; the pins of requirements.txt hold for every file
install() {
    local stamp; stamp=".venv/installed-$(sha256sum "$1" requirements.txt | sha256sum | cut -c1-16)"
    [ -f "$stamp" ] && return
    echo "installing $1 …"
    python -m pip install --quiet --disable-pip-version-check --constraint requirements.txt --requirement "$@"
    touch "$stamp"
}

install requirements.txt
