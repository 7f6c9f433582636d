"""Matrices in a weight: for optimizers that update whole matrices (Muon, LAMB), a fused weight is several matrices."""

import re
from collections.abc import Iterable

from torch import Tensor

_HIDDEN = re.compile(r"(?:.*\.)?(?:blocks\.\d+\.(?:attention|feed_forward)\.\w+|positions\.(?:query|key))\.weight")


def is_hidden(name: str, parameter: Tensor) -> bool:
    """True for the matrices of attention and feed-forward layers, and for TUPE's projections of positions to queries
    and keys, in any network of an objective."""
    return parameter.ndim == 2 and _HIDDEN.fullmatch(name) is not None


def matrix_counts(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Number of matrices stacked in each parameter.

    In a block, `attention.qkv` contains three, for queries, keys and values, and `feed_forward.up` contains two if it
    is gated, which is the case if its number of rows is twice the number of columns of `feed_forward.down`. All others
    contain one.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    counts = {}
    for name, shape in shapes.items():
        down = shapes.get(name.replace(".feed_forward.up.", ".feed_forward.down."), ())
        gated = name.endswith(".feed_forward.up.weight") and len(down) == 2 and shape[0] == 2 * down[1]
        counts[name] = 3 if name.endswith(".attention.qkv.weight") else 2 if gated else 1
    return counts
