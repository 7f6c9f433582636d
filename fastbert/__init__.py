"""fastbert: pretraining BERT-class encoders at a fraction of the usual cost."""

import sys

__version__ = "0.1.0"

# A checkout can be run by any Python: this comes before whatever an older one cannot read, and in words that it can.
if sys.version_info < (3, 11):  # noqa: UP036 (pip's own check does not see a checkout)
    message = "error: fastbert needs Python 3.11 or newer, and this is {}.{}\n"
    sys.stderr.write(message.format(*sys.version_info[:2]))
    sys.exit(2)
