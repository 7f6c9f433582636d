"""fastbert: pretraining BERT-class encoders at a fraction of the usual cost."""

import sys

__version__ = "0.1.0"

# A checkout can be run by any Python, so this check comes first and uses syntax that an older one can read.
if sys.version_info < (3, 11):  # noqa: UP036 (pip's own check does not see a checkout)
    message = "error: fastbert needs Python 3.11 or newer, and this is {}.{}\n"
    sys.stderr.write(message.format(*sys.version_info[:2]))
    sys.exit(2)
