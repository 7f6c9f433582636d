"""Another model's predictions as votes: the JSON lines of `fastbert predict`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbert.data.columns import Columns
from fastbert.data.tables import read_rows
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.rows import number_in
from fastbert.finetuning.weak.label_models import ABSTAIN


@dataclass(frozen=True)
class Predictions:
    """Votes read from files."""

    name: str
    """Name of the function."""
    files: Mapping[str, str]
    by_split: Mapping[str, np.ndarray]

    def votes(self, split: str, count: int) -> np.ndarray:
        """int64 [count]; raises a UserError if the file has another number of predictions."""
        votes = self.by_split[split]
        if len(votes) != count:
            raise UserError(
                f"function {brief(self.name)}: {self.files[split]} has {len(votes)} predictions, and {split} has "
                f"{count} examples; predict this split of the task again"
            )
        return votes


def read_predictions(path: Path, labels: Mapping[str, int], confidence: float, may_abstain: bool) -> np.ndarray:
    """Votes, int64 [N]: the predicted label if its probability is at least `confidence`.

    Args:
        labels: predicted label -> id.
        may_abstain: predictions of other labels abstain; otherwise they raise an error.

    Raises:
        UserError: a line is not a prediction of classes, the lines are not in order, or a label is unknown.
    """
    votes = []
    columns = Columns((), "label", others=("index", "probabilities"), remedy="give the output of fastbert predict")
    for _, where, (label, index, probabilities) in read_rows(path, columns):
        if index != len(votes):
            raise UserError(f"{where}: the index is {brief(index)}, not {len(votes)}; give all predictions in order")
        sure = number_in(probabilities.get(label)) if isinstance(probabilities, dict) else None
        if not isinstance(label, str) or sure is None:
            raise UserError(f"{where} is not a prediction of classes by fastbert predict; write the file with it")
        if label not in labels and not may_abstain:
            raise UserError(f"{where}: unknown label {brief(label)}; {nearest(label, labels)}; or map it with values")
        votes.append(labels[label] if label in labels and sure >= confidence else ABSTAIN)
    return np.array(votes, np.int64)
