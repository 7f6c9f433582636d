"""Scores of a few candidate words for each row: products with gathered rows of the embedding, which are not saved.

Plain indexing would save N x K x D numbers for the backward pass and write the same number of gradients. Here both
gradients are sums of weighted rows. An embedding bag computes them without writing the summands, in a fixed order.

Shapes: N rows, K candidates, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = {"cpu": 256, "cuda": 8192}
"""Number of rows whose candidates are gathered at a time."""


def candidate_scores(hidden: Tensor, embedding: Tensor, ids: Tensor) -> Tensor:
    """score[n, j] = <hidden[n], embedding[ids[n, j]]>, differentiable in hidden and embedding.

    Args:
        hidden: [N, D].
        embedding: [V, D]; the result has its dtype.
        ids: int64 [N, K].

    Returns:
        [N, K].

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    if hidden.dim() != 2 or embedding.dim() != 2 or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must be [N, D], [V, D]")
    if ids.dim() != 2 or len(ids) != len(hidden) or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 [N, K], N = {len(hidden)}, not {ids.dtype} {tuple(ids.shape)}")
    if not hidden.is_floating_point() or not embedding.is_floating_point():
        raise ValueError(f"hidden and embedding must be floating-point, not {hidden.dtype} and {embedding.dtype}")
    if not hidden.device == embedding.device == ids.device:
        raise ValueError(
            f"hidden ({hidden.device}), embedding ({embedding.device}) and ids ({ids.device}) must be on one device"
        )
    return _CandidateScores.apply(hidden.to(embedding.dtype), embedding, ids)


class _CandidateScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, embedding, ids)
        size = ROWS.get(hidden.device.type, ROWS["cuda"])
        chunks = zip(hidden.split(size), ids.split(size), strict=True)
        return torch.cat([(F.embedding(words, embedding) @ rows[:, :, None])[..., 0] for rows, words in chunks])

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, embedding, ids = ctx.saved_tensors
        if ids.numel() == 0:
            return torch.zeros_like(hidden), torch.zeros_like(embedding), None
        grad = grad.to(embedding.dtype).contiguous()
        to_hidden = F.embedding_bag(ids, embedding, mode="sum", per_sample_weights=grad)
        words, order = ids.flatten().sort(stable=True)
        # One bag per word: the rows in which it is a candidate.
        starts = torch.searchsorted(words, torch.arange(len(embedding), device=ids.device))
        rows, weights = order // ids.shape[1], grad.flatten()[order]
        to_embedding = F.embedding_bag(rows, hidden, starts, mode="sum", per_sample_weights=weights)
        return to_hidden, to_embedding, None
