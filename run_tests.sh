#!/usr/bin/env bash
# Sets up .venv once and runs the checks: ./run_tests.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh test
.venv/bin/ruff check .
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
