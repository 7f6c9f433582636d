"""Sampling with replacement, from samples without replacement and their probabilities.

Samples without replacement are the distinct words of a sequence of independent samples, in the order in which they
first occur. So the sequence is recovered: each of its words is one of those that have occurred, with their
probabilities, or else the next distinct one. This is exact and needs no further pass over the distribution.
"""

import torch
from torch import Tensor

from fastbert_kernels.hashing import combine
from fastbert_kernels.sampling.reference import unit_interval

REPEATS = -1  # combined with a row's key; the samples without replacement use 0 to K - 1


@torch.no_grad()
def with_replacement(ids: Tensor, log_probabilities: Tensor, keys: Tensor) -> Tensor:
    """Independent samples from the distribution that `ids` were sampled from.

    Args:
        ids: int64 [N, K], distinct words in sampling order (`sample_candidates`, `sample_distinct`).
        log_probabilities: [N, K], of these words under the whole distribution.
        keys: int32 [N], the keys that the words were sampled with.

    Returns:
        int64 [N, K], in sampling order; the first is that of `ids`.
    """
    k = ids.shape[1]
    indices = torch.arange(k, dtype=torch.int32, device=ids.device)
    noise = unit_interval(combine(combine(keys, REPEATS)[:, None], indices))
    ends = log_probabilities.double().exp().cumsum(1)
    # The distinct word whose interval contains the noise; beyond all that have occurred, the next one occurs.
    found = (ends[:, None] <= noise[:, :, None]).sum(2)  # [N, K], 0 to K
    occurred = torch.zeros_like(found[:, 0])
    chosen = []
    for index in found.unbind(1):
        index = torch.minimum(index, occurred)
        occurred = torch.maximum(occurred, index + 1)
        chosen.append(index)
    return ids.gather(1, torch.stack(chosen, 1))
