"""The loss and the sampling of distinct words compared with compiled PyTorch, in the shapes of BERT-Base with 32,768
words: 9,728 masked positions (512 rows of 128 tokens), and 65,536 tokens of a meta controller with 1/4 of the width."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import linear_cross_entropy, sample_candidates
from fastbert_kernels.benchmarks.measuring import FAILURES, ResultRows, Settings, failure, peak_mib, timed


def plain_loss(hidden: Tensor, embedding: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, embedding, bias).float(), target)


def gumbel(hidden: Tensor, embedding: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sample k distinct words by the largest sums of logits and Gumbel noise, the usual way in PyTorch."""
    logits = F.linear(hidden, embedding, bias).float()
    noise = -torch.empty_like(logits).exponential_().log()
    ids = (logits + noise).topk(k).indices
    return ids, logits.log_softmax(-1).gather(1, ids)


def vocabulary(settings: Settings) -> ResultRows:
    """Measure times (of forward and backward for the loss) and peak memory."""
    device, found = settings.device, ResultRows("vocabulary", settings)
    words, width, small, masked, tokens = (300, 16, 16, 64, 32) if settings.toy else (32768, 768, 192, 9728, 65536)
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": torch.bfloat16}
    bias = torch.zeros(words, device=device, dtype=torch.bfloat16)

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if device.type == "cuda" else function

    hidden = torch.randn(masked, width, **options).requires_grad_()
    embedding = (torch.randn(words, width, **options) / width**0.5).requires_grad_()
    target = torch.randint(0, words, (masked,), device=device)
    for name, function in (
        ("fastbert", linear_cross_entropy),
        ("compiled", compiled(plain_loss)),
        ("eager", plain_loss),
    ):

        def step(function: Callable = function) -> Any:
            return torch.autograd.grad(function(hidden, embedding, bias, target), (hidden, embedding))

        add(found, settings, step, operation="loss", contestant=name, rows=masked, words=words, width=width)
    states = torch.randn(tokens, small, **options)
    table = torch.randn(words, small, **options) / small**0.5
    ours = functools.partial(sample_candidates, states, table, 9, seed=0, bias=bias)
    for name, call in (("fastbert", ours), ("compiled", functools.partial(compiled(gumbel), states, table, bias, 9))):
        add(found, settings, call, operation="candidates", contestant=name, rows=tokens, words=words, width=small)
    return found


def add(found: ResultRows, settings: Settings, call: Callable, **row: Any) -> None:
    if found.over:
        return
    try:
        with torch.enable_grad() if row["operation"] == "loss" else torch.no_grad():
            call()
            found.add(**row, **timed(call, settings.device, settings.rounds), peak_mib=peak_mib(call, settings.device))
    except FAILURES as error:  # such as out of memory
        found.add(**row, failed=failure(error))
