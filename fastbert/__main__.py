"""`python -m fastbert`: the command line from a checkout that is not installed."""

from fastbert.cli import console_script

console_script()
