# Sourced by run_pretrain.sh and run_tests.sh with the name of an extra of setup.py: makes .venv and installs fastbert
# with that extra. What is there is reused; setup.py or constraints.txt changing installs again.
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
wanted=$(cat setup.py constraints.txt | cksum)
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
  echo "installing into .venv (once; a few minutes) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  # torch first and by its exact version, so that no other package picks another build.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
  echo "$wanted" >"$stamp"
fi
