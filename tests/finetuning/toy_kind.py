"""A kind of task in one file: one to three stars for a text. `register` is its line in `KINDS`."""

from fastbert.finetuning.heads import PooledHead
from fastbert.finetuning.kinds import KINDS
from fastbert.finetuning.kinds.number import Number


class WholeHead(PooledHead):
    """Reads the hidden states of all tokens."""

    reads = None

    def forward(self, hidden, row_keys):
        assert hidden.shape[1] > 1
        return super().forward(hidden, row_keys)


class Stars(Number):
    name = "stars"
    plural = "stars"
    metrics = usual_metrics = ("spearman",)

    def read(self, row):
        return None if row.label is None else float(len(row.label))

    def shown(self, label):
        return "*" * int(label)

    def new_head(self, width, dropout):
        return WholeHead(width, 1, dropout)

    def losses(self, logits, targets):
        return (logits.squeeze(-1) - targets).abs()

    def score_losses(self, scores, labels):
        return abs(scores - labels)

    def prediction(self, scores):
        return "*" * max(1, min(3, round(float(scores))))

    def answer(self, scores):
        return {"stars": self.prediction(scores)}


def register() -> None:
    KINDS.register("stars", "tests.finetuning.toy_kind:Stars")
