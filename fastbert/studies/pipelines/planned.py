"""Models of a pipeline before they are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastbert.model.config import EncoderConfig
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.pipelines.options import EncoderEntry


@dataclass(frozen=True)
class Input:
    """Something that a job reads."""

    path: str
    mark: str
    """Id of the job that writes it, or a hash of its contents."""
    job: str | None = None
    """Id of the job that writes it; None if it exists."""

    @property
    def after(self) -> tuple[str, ...]:
        return () if self.job is None else (self.job,)


@dataclass(frozen=True)
class PlannedModel:
    """A model of the pipeline."""

    entry: EncoderEntry
    config: EncoderConfig
    objective: str | None
    """None: unknown, for an existing checkpoint."""
    checkpoints: Mapping[int | None, Input]
    """Seed of the pretraining -> its folder."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Hashes of weights and tokenizer of an existing checkpoint."""
    data: Input | None = None
    """Prepared data, or the folder of a checkpoint, with its tokenizer."""
    has_head: bool = True
    options: PretrainOptions | None = None
    """Options of its pretraining, with the inputs as in the file; None for an existing checkpoint."""
