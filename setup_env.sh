# Sourced by run_pretrain.sh and run_tests.sh with the name of an extra of setup.py: creates .venv and installs fastbert
# with that extra. An existing .venv is reused; it is installed again when setup.py, constraints.txt or this file changes.
#
# The extra `test` also puts the oldest supported Triton (that of torch 2.11) into a separate folder next to the one of
# constraints.txt: tests/kernels/test_compilation.py compiles with both.
oldest_triton=3.6.0
cpu_index=https://download.pytorch.org/whl/cpu
python=${PYTHON:-python3}

# Runs a command; on a terminal, shows meanwhile how long it has run and how large .venv is.
with_progress() {
  local what=$1 start=$SECONDS pid status=0
  shift
  if [[ ! -t 2 ]]; then
    echo "  $what ..." >&2
    "$@"
    return
  fi
  "$@" &
  pid=$!
  trap 'kill "$pid" 2>/dev/null' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    printf '\r\033[K  %s: %d s, .venv has %s' "$what" $((SECONDS - start)) "$(du -sh .venv 2>/dev/null | cut -f1)B" >&2
    sleep 1
  done
  wait "$pid" || status=$?
  trap - INT TERM
  printf '\r\033[K  %s: %d s, .venv has %s\n' "$what" $((SECONDS - start)) "$(du -sh .venv 2>/dev/null | cut -f1)B" >&2
  return $status
}

pip_install() {
  .venv/bin/python -P -m pip install --quiet --disable-pip-version-check "$@"
}

has_gpu() {
  [[ $(uname -s) != Linux || -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg ]] || command -v nvidia-smi >/dev/null
}

# Installs torch by its exact version: the CPU build (0.2 GB to download; the CUDA build has several GB) where there is
# no GPU and an index has it.
install_torch() {
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if ! has_gpu; then
    pip_install "$torch+cpu" 2>/dev/null && return
    pip_install --retries 0 --timeout 15 --extra-index-url "$cpu_index" "$torch+cpu" 2>/dev/null && return
  fi
  pip_install "$torch"
}

if [[ ! -x .venv/bin/python ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: fastbert needs Python 3.11 or newer as $python; set PYTHON=/path/to/python3" >&2
    exit 2
  }
  "$python" -m venv .venv || {
    echo "error: $python cannot create a virtual environment (on Debian: apt-get install python3-venv)" >&2
    exit 2
  }
fi
stamp=.venv/installed-$1
wanted=$(cat setup.py constraints.txt setup_env.sh | cksum)
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
  echo "installing into .venv, once: 1 to 3 minutes, about 2 GB on disk without CUDA" >&2
  pip_install --upgrade pip
  # Earlier versions were installed under the name fastbert, that of another project on PyPI, and would hide this one.
  .venv/bin/python -P -m pip -qq --disable-pip-version-check uninstall --yes fastbert
  rm -rf fastbert.egg-info
  with_progress "torch" install_torch
  with_progress "fastbert and the other packages" pip_install -c constraints.txt -e ".[$1]"
  if [[ $1 == test ]]; then
    target=.venv/triton-${oldest_triton%.*}
    rm -rf "$target"
    with_progress "Triton $oldest_triton" pip_install --no-deps --target "$target" "triton==$oldest_triton"
  fi
  echo "$wanted" >"$stamp"
fi
