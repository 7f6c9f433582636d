"""An encoder with a head for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fastbert.finetuning.batches import TaskBatch
from fastbert.finetuning.foreign_heads import ForeignHead
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.hub.load import Pretrained
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder, initialize
from fastbert.model.foreign import ForeignConfig, ForeignEncoder


class TaskModel(nn.Module):
    """An encoder with a head for each task.

    Args:
        config: configuration of the encoder, with the dropout for training; one of another architecture has the
            architecture's heads.
        kinds: the kind of each task.
    """

    def __init__(
        self, config: EncoderConfig | ForeignConfig, kinds: Mapping[str, TaskKind], kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.kinds = dict(kinds)
        heads = {name: kind.new_head(config.width, config.dropout) for name, kind in self.kinds.items()}
        if isinstance(config, ForeignConfig):
            self.encoder = ForeignEncoder(config)
            heads = {name: ForeignHead(config, head) for name, head in heads.items()}
        else:
            self.encoder = Encoder(config, kernels)
        self.heads = nn.ModuleDict({module_name(name): head for name, head in heads.items()})

    def head(self, name: str) -> nn.Module:
        return self.heads[module_name(name)]

    def forward(self, batch: TaskBatch, heads: Sequence[str], row_keys: Tensor | None = None) -> list[Tensor]:
        """Logits of each head, all of tasks of one kind; with dropout if `row_keys` (int32 [B]) are given."""
        layers = [self.head(name) for name in heads]
        hidden = self.hidden(batch, layers[0].reads, row_keys)
        return [one(hidden, row_keys) for one in layers]

    def hidden(self, batch: TaskBatch, reads: slice | None, row_keys: Tensor | None = None) -> Tensor:
        """Hidden states of the tokens that a head `reads`, [B, T, D], or [B, 1, D] of [CLS] (of another architecture:
        the state of the text)."""
        return self.encoder(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            row_keys=row_keys,
            only=reads,
        )


def module_name(task: str) -> str:
    """Name of a task's head in a `ModuleDict`, which accepts neither dots nor the names of its methods."""
    return "task_" + "".join(c if c.isalnum() else f"%{ord(c):x}_" for c in task)


def new_task_model(
    pretrained: Pretrained,
    kinds: Mapping[str, TaskKind],
    seed: int,
    *,
    dropout: float,
    attention_dropout: float,
    kernels: str,
) -> TaskModel:
    """Builds the pretrained encoder with new heads. The initial weights of a head depend only on (seed, the task's
    name, their name in the head), not on other heads.

    The pooler of the pretrained model is not used: it was trained for another purpose, or not at all.
    """
    config = replace(pretrained.config, dropout=dropout, attention_dropout=attention_dropout)
    model = TaskModel(config, kinds, kernels)
    model.encoder.load_state_dict(encoder_weights(pretrained))
    for name in kinds:
        initialize(nn.ModuleDict({module_name(name): model.head(name)}), seed, config.initializer_std)
    return model


def encoder_weights(pretrained: Pretrained) -> dict[str, Tensor]:
    prefix = "encoder."
    return {name.removeprefix(prefix): w for name, w in pretrained.weights.items() if name.startswith(prefix)}
