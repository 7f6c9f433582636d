# Sourced by run_pretrain.sh and run_tests.sh with the name of an extra of setup.py: makes .venv and installs fastbert
# with that extra. What is there is reused; setup.py, constraints.txt or this file changing installs again.
#
# The extra `test` also puts the oldest Triton that the kernels promise (torch 2.11 brings it) into a folder of its own
# next to the one of constraints.txt: tests/kernels/test_compilation.py compiles with both.
oldest_triton=3.6.0
python=${PYTHON:-python3}
if [[ ! -x .venv/bin/python ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: fastbert needs Python 3.11 or newer as $python; set PYTHON=/path/to/python3" >&2
    exit 2
  }
  "$python" -m venv .venv || {
    echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
    exit 2
  }
fi
stamp=.venv/installed-$1
wanted=$(cat setup.py constraints.txt setup_env.sh | cksum)
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
  echo "installing into .venv (once; a few minutes) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  # Earlier versions installed themselves as fastbert, the name of another project on PyPI: it would shadow this one.
  .venv/bin/python -P -m pip -qq --disable-pip-version-check uninstall --yes fastbert
  rm -rf fastbert.egg-info
  # torch first and by its exact version, so that no other package picks another build.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
  if [[ $1 == test ]]; then
    target=.venv/triton-${oldest_triton%.*}
    rm -rf "$target"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$target" \
      "triton==$oldest_triton"
  fi
  echo "$wanted" >"$stamp"
fi
