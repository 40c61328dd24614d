#!/usr/bin/env bash
# The demo. Until training exists it is the real run of runs/smollm2.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/smollm2.sh" "$@"
