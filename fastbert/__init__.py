"""fastbert: pretraining BERT-class encoders at a fraction of the usual cost."""

import sys

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036 (from a checkout) before anything is imported that an older Python cannot read
    sys.stderr.write("error: fastbert needs Python 3.11 or newer, and this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)
