"""Types of `import fastbert`, for type checkers; `fastbert/__init__.py` imports these when they are used."""

from fastbert.api import FinetuneResult as FinetuneResult
from fastbert.api import LoadedModel as LoadedModel
from fastbert.api import PretrainResult as PretrainResult
from fastbert.api import finetune as finetune
from fastbert.api import load as load
from fastbert.api import pretrain as pretrain
from fastbert.api import resume as resume
from fastbert.errors import UserError as UserError
from fastbert.finetuning.options import FinetuneOptions as FinetuneOptions
from fastbert.pretraining.options import PretrainOptions as PretrainOptions
from fastbert.training.callbacks import Callback as Callback
from fastbert.training.callbacks import TrainingStart as TrainingStart

__version__: str
