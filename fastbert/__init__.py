"""fastbert: pretraining BERT-class encoders at a fraction of the usual cost."""

import sys

__version__ = "0.1.0"

# A checkout can be run by any Python, so this check comes first and uses syntax that an older one can read.
if sys.version_info < (3, 11):  # noqa: UP036 (pip's own check does not see a checkout)
    message = "error: fastbert needs Python 3.11 or newer, and this is {}.{}\n"
    sys.stderr.write(message.format(*sys.version_info[:2]))
    sys.exit(2)

_API = {
    "load": "fastbert.api",
    "pretrain": "fastbert.api",
    "resume": "fastbert.api",
    "finetune": "fastbert.api",
    "LoadedModel": "fastbert.api",
    "PretrainResult": "fastbert.api",
    "FinetuneResult": "fastbert.api",
    "PretrainOptions": "fastbert.pretraining.options",
    "FinetuneOptions": "fastbert.finetuning.options",
    "Callback": "fastbert.training.callbacks",
    "TrainingStart": "fastbert.training.callbacks",
    "UserError": "fastbert.errors",
}
__all__ = list(_API)


def __getattr__(name):
    """The function or class `name`, see docs/python.md. Imported when it is used, because torch takes seconds."""
    if name not in _API:
        raise AttributeError("module {!r} has no attribute {!r}".format(__name__, name))  # noqa: UP032 (old syntax, see above)
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_API[name]), name)
    return found


def __dir__():
    return sorted({*globals(), *_API})
