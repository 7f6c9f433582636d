"""The matrices in a weight: a fused weight holds several for optimizers that treat whole matrices (Muon, LAMB)."""

import re
from collections.abc import Iterable

from torch import Tensor

_HIDDEN = re.compile(r"(?:.*\.)?(?:blocks\.\d+\.(?:attention|feed_forward)\.\w+|positions\.(?:query|key))\.weight")


def is_hidden(name: str, parameter: Tensor) -> bool:
    """True for the matrices of attention and feed-forward layers and TUPE's for queries and keys of positions, in any
    network of an objective."""
    return parameter.ndim == 2 and _HIDDEN.fullmatch(name) is not None


def matrix_counts(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """The number of matrices that are stacked in each parameter.

    In a block `attention.qkv` holds three, for queries, keys and values, and `feed_forward.up` two if it has twice as
    many rows as `feed_forward.down` has columns: those of a gated unit. All others are one.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    counts = {}
    for name, shape in shapes.items():
        down = shapes.get(name.replace(".feed_forward.up.", ".feed_forward.down."), ())
        gated = name.endswith(".feed_forward.up.weight") and len(down) == 2 and shape[0] == 2 * down[1]
        counts[name] = 3 if name.endswith(".attention.qkv.weight") else 2 if gated else 1
    return counts
