"""Numbers of parameters and of floating-point operations, in closed form.

Only matrix products count, a multiply-add as two; softmax, norms and sums are left out. This is the convention of
torch's FLOP counter, with which the tests compare these numbers.
"""

from fastbert.model.config import EncoderConfig
from fastbert.model.positions import POSITIONS


def encoder_parameters(config: EncoderConfig) -> int:
    """Number of parameters of an encoder."""
    d, f, bias = config.width, config.ffn, int(config.bias)
    norm, up = d * (1 + bias), inner_matrices(config) * f

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + bias) * outputs

    block = linear(d, 3 * d) + linear(d, d) + linear(d, up) + linear(f, d) + 2 * norm
    norms = norm * (2 if config.norm == "pre" else 1)
    embeddings = (config.vocab_size + config.type_vocab_size) * d
    return embeddings + norms + config.layers * block + POSITIONS[config.position].parameters_of(config)


def inner_matrices(config: EncoderConfig) -> int:
    """Number of matrices that project from the width to the inner width."""
    return 2 if config.feed_forward == "geglu" else 1


def encoder_flops(config: EncoderConfig, batch: int, length: int, last: int | None = None) -> int:
    """FLOPs of one forward pass over [B, T]; the position bias is computed once for the batch.

    Args:
        last: number of tokens per row for which the last block is computed, all if None; others are only keys and
            values.
    """
    blocks = (config.layers - 1) * block_flops(config, length, length)
    blocks += block_flops(config, length, length if last is None else last)
    return batch * blocks + POSITIONS[config.position].flops(config, length)


def block_flops(config: EncoderConfig, length: int, queries: int) -> int:
    """FLOPs of one forward pass of one block over a row, for `queries` of its tokens; the others are keys and
    values."""
    return query_flops(config, length, queries) + 4 * length * config.width**2


def query_flops(config: EncoderConfig, length: int, queries: int) -> int:
    """FLOPs of one forward pass of one block for `queries` tokens of a row whose keys and values are known."""
    d, f = config.width, config.ffn
    return 2 * queries * (2 * d * d + (inner_matrices(config) + 1) * d * f) + 4 * queries * length * d


def mlm_head_flops(config: EncoderConfig, masked: int) -> int:
    """FLOPs of one forward pass over `masked` positions."""
    return 2 * masked * (config.width**2 + config.width * config.vocab_size)


TRAINING = 3
"""Cost of forward and backward pass in forward passes: the backward pass computes the gradients of both factors of
every product."""
