#!/usr/bin/env bash
# Sets up .venv once and pretrains: ./run_pretrain.sh [config.yaml] [options of `fastbert pretrain`]
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh demo
if [[ $# -eq 0 || $1 == -* ]]; then
  # Without a configuration: the embedded default. A resumed run brings its own.
  [[ " $* " == *" --resume"* ]] || set -- configs/pretrain/tiny.yaml "$@"
fi
exec .venv/bin/fastbert pretrain "$@"
