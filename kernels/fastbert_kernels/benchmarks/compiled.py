"""Every kernel in every configuration, compiled for GPUs that this machine need not have: registers, spills, shared
memory, tensor-core instructions."""

from collections.abc import Callable, Iterator

import torch
from triton.runtime.errors import OutOfResources

from fastbert_kernels import configurations, linear_cross_entropy, sample_candidates
from fastbert_kernels.attention.triton_launch import attention_forward
from fastbert_kernels.benchmarks.measuring import ResultRows, Settings
from fastbert_kernels.compilation import compile_target
from fastbert_kernels.configurations import CANDIDATES, TENSOR_CLASSES, Tiles

CAPABILITIES = (80, 89, 90, 100, 120)
EXAMPLES = {
    TENSOR_CLASSES[0]: (torch.bfloat16, 64),
    TENSOR_CLASSES[1]: (torch.bfloat16, 128),
    TENSOR_CLASSES[2]: (torch.float32, 64),
}
HEADS = 12
STORED_MIB = 32


def attend(
    length: int, dtype: torch.dtype, size: int, p: float = 0.0, untied: bool = False, biased: bool = True
) -> None:
    """Attention and its backward pass: with a learned bias, with the components of TUPE's bias, or without a bias."""
    q, k, v = torch.zeros(2, length, 3, HEADS, size, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(1, HEADS, length, length, requires_grad=True) if biased and not untied else None
    parts = [None] * 4
    if untied:
        parts = [torch.zeros(HEADS, length, size, dtype=dtype, requires_grad=True) for _ in range(2)]
        parts += [torch.zeros(HEADS, 2), torch.zeros(HEADS, 2 * length - 1)]
    keys = torch.zeros(2, dtype=torch.int32) if p else None
    out, _ = attention_forward(q, k, v, bias, *parts, None, None, None, keys, 0.125, p, length)
    out.backward(torch.zeros_like(out))


def attend_stored(kernel: str, name: str, length: int) -> None:
    """Attention with dropout in the default configurations, except that the gradient of the scores is stored."""
    tiles = configurations.default(kernel, name)._replace(stored=STORED_MIB)
    configurations.use({kernel: {name: tiles}})
    attend(length, *EXAMPLES[name], 0.1)


def loss(dtype: torch.dtype, words: int) -> None:
    hidden = torch.zeros(4, 32, dtype=dtype, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64)
    linear_cross_entropy(hidden, torch.zeros(words, 32, dtype=dtype), torch.zeros(words, dtype=dtype), target)


def sample(dtype: torch.dtype, words: int) -> None:
    sample_candidates(torch.zeros(4, 32, dtype=dtype), torch.zeros(words, 32, dtype=dtype), 9, seed=0)


def calls() -> Iterator[tuple[str, str, str, Tiles | None, Callable[[], None]]]:
    """Case, kernel ("" for all), class of tensors, configuration (None for the defaults), call."""
    for name, (dtype, size) in EXAMPLES.items():
        for length, p in ((512, 0.0), (512, 0.1), (509, 0.1), (128, 0.1), (111, 0.1)):
            if length > 128 or name == TENSOR_CLASSES[0]:
                case = f"{name}, T {length}, bias" + (f", dropout {p}" if p else "")
                yield case, "", name, None, lambda n=length, d=dtype, s=size, p=p: attend(n, d, s, p)
            if p and (length > 128 or name == TENSOR_CLASSES[0]):
                kernel, case = "keys" if length > 128 else "short", f"{name}, T {length}, bias, dropout {p}, stored"
                yield case, "", name, None, lambda k=kernel, name=name, n=length: attend_stored(k, name, n)
        yield f"{name}, T 512", "", name, None, lambda d=dtype, s=size: attend(512, d, s, biased=False)
        yield f"{name}, T 512, TUPE", "", name, None, lambda d=dtype, s=size: attend(512, d, s, untied=True)
    for kernel, choices in CANDIDATES.items():
        length = 128 if kernel == "short" else 512
        for tiles in (tiles for tiles in choices if tiles.stored in (0, STORED_MIB)):  # the size changes no code
            case = f"{TENSOR_CLASSES[0]}, T {length}, bias"
            yield case, kernel, TENSOR_CLASSES[0], tiles, lambda n=length: attend(n, *EXAMPLES[TENSOR_CLASSES[0]])
    for dtype, words in (
        (torch.bfloat16, 32768),
        (torch.float32, 32768),
        (torch.bfloat16, 30522),
        (torch.bfloat16, 250112),
    ):
        name = f"{dtype}".removeprefix("torch.")
        yield f"loss, {name}, V {words}", "", "", None, lambda d=dtype, w=words: loss(d, w)
        yield f"candidates, {name}, V {words}", "", "", None, lambda d=dtype, w=words: sample(d, w)


def compiled(settings: Settings) -> ResultRows:
    """Compile all calls; a configuration that needs more shared memory than the GPU has is a row too."""
    capabilities = (90,) if settings.toy else CAPABILITIES
    rows = ResultRows("kernels-compiled", settings, steps=len(capabilities) * sum(1 for _ in calls()))
    for capability in capabilities:
        for case, kernel, tensors, tiles, call in calls():
            rows.step()
            if rows.over:
                continue
            if tiles is not None:
                configurations.use({kernel: {tensors: tiles}})
            key = {"capability": capability, "case": case, "tiles": list(tiles) if tiles else "default"}
            try:
                with compile_target(capability) as gpu:
                    try:
                        call()
                    except OutOfResources as error:
                        rows.add(**key, kernel=kernel, failed=f"{error}")
                        continue
                    for one in gpu.resources():
                        if one.kernel.startswith((kernel, "stored")):
                            rows.add(**key, **vars(one))
            finally:
                configurations.use({})
    return rows
