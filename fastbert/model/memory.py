"""Main memory of a training on a CPU, estimated in closed form from its sizes: for the order of jobs, before they run.

`fastbert pretrain --dry-run` measures it instead. Peaks of 15 small trainings (2 to 6 layers of 32 to 512, up to 8,192
tokens in a forward pass) were 0.5 to 2.2 GB, between 0.8 and 1.2 times the estimate.
"""

from collections.abc import Iterable

from fastbert.model.config import EncoderConfig
from fastbert.model.flops import inner_matrices

PROCESS = 500 * 10**6  # bytes of a process that has imported everything
PREDICTED = 0.15  # fraction of the tokens with logits over the vocabulary


def training_memory(
    parameters: int, networks: Iterable[EncoderConfig], tokens: int, copies: int, predicts_words: bool
) -> int:
    """Bytes of main memory of a process that trains in fp32.

    Args:
        parameters: number of parameters of all networks.
        networks: their configurations.
        tokens: tokens in a forward pass.
        copies: numbers that are stored for each parameter: weight, gradient, two moments, and copies of weights.
        predicts_words: there are logits over the vocabulary.
    """
    numbers = float(copies * parameters)
    for config in networks:
        # Outputs of the products, norms and sums of a block; kernels store no attention weights.
        block = 8 * config.width + (2 + inner_matrices(config)) * config.ffn
        words = PREDICTED * config.vocab_size if predicts_words else 0
        numbers += tokens * (config.layers * block + words)
    return PROCESS + round(4 * numbers)
