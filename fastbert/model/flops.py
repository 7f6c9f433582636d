"""Parameters and floating-point operations in closed form: a multiply and an add count as two, products only.

The convention is torch's FLOP counter's, which the tests hold it against; softmax, norms and sums are left out.
"""

from fastbert.model.config import EncoderConfig
from fastbert.model.positions import POSITIONS


def encoder_parameters(config: EncoderConfig) -> int:
    d, f = config.width, config.ffn
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    norms = 2 * d + (2 * d if config.norm == "pre" else 0)
    embeddings = (config.vocab_size + config.type_vocab_size) * d
    return embeddings + norms + config.layers * block + POSITIONS[config.position].parameters_of(config)


def mlm_head_parameters(config: EncoderConfig) -> int:
    """Without the tied embedding."""
    return config.width**2 + config.width + 2 * config.width + config.vocab_size


def replaced_head_parameters(config: EncoderConfig) -> int:
    return config.width**2 + config.width + config.width + 1


def encoder_flops(config: EncoderConfig, batch: int, length: int) -> int:
    """One forward pass over [B, T]; the position bias is computed once for the batch."""
    d, f, t = config.width, config.ffn, length
    block = 2 * t * (4 * d * d + 2 * d * f) + 4 * t * t * d
    return batch * config.layers * block + POSITIONS[config.position].flops(config, length)


def mlm_head_flops(config: EncoderConfig, places: int) -> int:
    """One forward pass over `places` masked places."""
    return 2 * places * (config.width**2 + config.width * config.vocab_size)


TRAINING = 3
"""A backward pass costs two forward passes: the gradients of both factors of every product."""
