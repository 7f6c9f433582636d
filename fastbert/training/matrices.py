"""Which matrices a weight holds: a fused one is several to an optimizer that looks at whole matrices (Muon, LAMB)."""

import re
from collections.abc import Iterable

from torch import Tensor

_HIDDEN = re.compile(r"(?:.*\.)?(?:blocks\.\d+\.(?:attention|feed_forward)\.\w+|positions\.(?:query|key))\.weight")


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix of attention or feed-forward in a block, or one of TUPE's that make queries and keys of
    positions, of any of an objective's networks."""
    return parameter.ndim == 2 and _HIDDEN.fullmatch(name) is not None


def matrix_counts(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """How many matrices lie one below the other in each parameter.

    In a block `attention.qkv` holds three, for queries, keys and values, and `feed_forward.up` two where it has twice
    the rows that `feed_forward.down` has columns: those of a gated unit. Everything else is one.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    counts = {}
    for name, shape in shapes.items():
        down = shapes.get(name.replace(".feed_forward.up.", ".feed_forward.down."), ())
        gated = name.endswith(".feed_forward.up.weight") and len(down) == 2 and shape[0] == 2 * down[1]
        counts[name] = 3 if name.endswith(".attention.qkv.weight") else 2 if gated else 1
    return counts
