"""Every kernel in every configuration, compiled for GPUs that need not be there: registers, spills, shared memory,
tensor-core instructions."""

from collections.abc import Callable, Iterator

import torch
from triton.runtime.errors import OutOfResources

from fastbert_kernels import configurations, linear_cross_entropy, sample_candidates
from fastbert_kernels.attention.triton_launch import attention_forward
from fastbert_kernels.benchmarks.measuring import ResultRows, Settings
from fastbert_kernels.compilation import pretended_gpu
from fastbert_kernels.configurations import CANDIDATES, KINDS, Tiles

CAPABILITIES = (80, 90, 100)
OF_KIND = {KINDS[0]: (torch.bfloat16, 64), KINDS[1]: (torch.bfloat16, 128), KINDS[2]: (torch.float32, 64)}
HEADS = 12


def attend(
    length: int, dtype: torch.dtype, size: int, p: float = 0.0, untied: bool = False, biased: bool = True
) -> None:
    """A call of attention and its backward pass: with a learned bias, or TUPE's parts of one, or none."""
    q, k, v = torch.zeros(2, length, 3, HEADS, size, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(1, HEADS, length, length, requires_grad=True) if biased and not untied else None
    parts = [None] * 4
    if untied:
        parts = [torch.zeros(HEADS, length, size, dtype=dtype, requires_grad=True) for _ in range(2)]
        parts += [torch.zeros(HEADS, 2), torch.zeros(HEADS, 2 * length - 1)]
    keys = torch.zeros(2, dtype=torch.int32) if p else None
    out, _ = attention_forward(q, k, v, bias, *parts, None, None, None, keys, 0.125, p, length)
    out.backward(torch.zeros_like(out))


def lose(dtype: torch.dtype, words: int) -> None:
    hidden = torch.zeros(4, 32, dtype=dtype, requires_grad=True)
    target = torch.zeros(4, dtype=torch.int64)
    linear_cross_entropy(hidden, torch.zeros(words, 32, dtype=dtype), torch.zeros(words, dtype=dtype), target)


def sample(dtype: torch.dtype, words: int) -> None:
    sample_candidates(torch.zeros(4, 32, dtype=dtype), torch.zeros(words, 32, dtype=dtype), 9, seed=0)


def calls() -> Iterator[tuple[str, str, str, Tiles | None, Callable[[], None]]]:
    """Case, kernel (or all), kind, configuration (or the defaults), call."""
    for of, (dtype, size) in OF_KIND.items():
        for length, p in ((512, 0.0), (512, 0.1), (509, 0.1), (128, 0.1), (111, 0.1)):
            if length > 128 or of == KINDS[0]:
                case = f"{of}, T {length}, bias" + (f", dropout {p}" if p else "")
                yield case, "", of, None, lambda n=length, d=dtype, s=size, p=p: attend(n, d, s, p)
        yield f"{of}, T 512", "", of, None, lambda d=dtype, s=size: attend(512, d, s, biased=False)
        yield f"{of}, T 512, TUPE's parts", "", of, None, lambda d=dtype, s=size: attend(512, d, s, untied=True)
    for kernel, choices in CANDIDATES.items():
        length = 128 if kernel == "short" else 512
        for tiles in choices:
            case = f"{KINDS[0]}, T {length}, bias"
            yield case, kernel, KINDS[0], tiles, lambda n=length: attend(n, *OF_KIND[KINDS[0]])
    for dtype, words in (
        (torch.bfloat16, 32768),
        (torch.float32, 32768),
        (torch.bfloat16, 30522),
        (torch.bfloat16, 250112),
    ):
        name = f"{dtype}".removeprefix("torch.")
        yield f"loss, {name}, V {words}", "", "", None, lambda d=dtype, w=words: lose(d, w)
        yield f"candidates, {name}, V {words}", "", "", None, lambda d=dtype, w=words: sample(d, w)


def compiled(settings: Settings) -> ResultRows:
    """Compiles them all; a configuration that a GPU has not the shared memory for is a row too."""
    capabilities = CAPABILITIES[1:2] if settings.toy else CAPABILITIES
    rows = ResultRows("kernels-compiled", settings, steps=len(capabilities) * sum(1 for _ in calls()))
    for capability in capabilities:
        for case, kernel, of, tiles, call in calls():
            rows.step()
            if rows.over:
                continue
            if tiles is not None:
                configurations.use({kernel: {of: tiles}})
            what = {"capability": capability, "case": case, "tiles": list(tiles) if tiles else "default"}
            try:
                with pretended_gpu(capability) as gpu:
                    try:
                        call()
                    except OutOfResources as error:
                        rows.add(**what, kernel=kernel, refused=f"{error}")
                        continue
                    for one in gpu.resources():
                        if one.kernel.startswith(kernel):
                            rows.add(**what, **vars(one))
            finally:
                configurations.use({})
    return rows
