"""Memory of the labelled examples: which they are, and the logits that DER and SD compare with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.training.tensors import read_tensors, serialized


@dataclass(frozen=True)
class Memory:
    """N labelled examples in the order of their labelling."""

    rows: np.ndarray
    """int64 [N], indices among all texts."""
    logits: np.ndarray
    """float32 [N, L], the logits of each at the end of the round in which it was labelled, without dropout."""

    def __len__(self) -> int:
        return len(self.rows)

    def extended(self, rows: np.ndarray, logits: np.ndarray) -> "Memory":
        """The memory with the examples of a further round."""
        return Memory(np.concatenate([self.rows, rows]), np.concatenate([self.logits, logits]))

    @classmethod
    def empty(cls, outputs: int) -> "Memory":
        """The memory before the first round; `outputs` is the number of logits."""
        return cls(np.zeros(0, np.int64), np.zeros((0, outputs), np.float32))


def write_memory(path: Path, memory: Memory) -> None:
    """Writes a safetensors file with a hash that reveals damage."""
    tensors = {name: torch.from_numpy(getattr(memory, name)) for name in ("rows", "logits")}
    with atomic_file(path) as file:
        file.write(serialized(tensors, {}))


def read_memory(path: Path, texts: int, outputs: int) -> Memory:
    """Reads the memory of a round.

    Args:
        texts: number of all texts.
        outputs: number of logits of the task.

    Raises:
        UserError: it is missing or damaged, or belongs to other texts or another task.
    """
    fix = f"remove {path.parent} to train its round again"
    try:
        found = {name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()}
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    rows, logits = found.get("rows"), found.get("logits")
    fits = rows is not None and logits is not None and rows.dtype == np.int64 and rows.ndim == 1
    if not fits or logits.shape != (len(rows), outputs) or len(set(rows.tolist())) < len(rows):
        raise UserError(f"{path} is damaged: it does not hold rows and their {outputs} logits; {fix}")
    if len(rows) and (rows.min() < 0 or rows.max() >= texts):
        raise UserError(f"{path} has rows of other texts; {fix}")
    return Memory(rows, logits)
