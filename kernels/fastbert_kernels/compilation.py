"""Compiles the Triton kernels for GPUs that need not be there, and reads off what they take: registers, spills, shared
memory, tensor-core instructions."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbert_kernels import triton_attention

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_OF_THEIR_OWN = {
    "LSE": "*fp32",
    "DELTA": "*fp32",
    "DBIAS": "*fp32",
    "CU": "*i32",
    "KEYS": "*i32",
    "PAD": "*i8",
    "SEG": "*i32",
}
_INNER = ("stride_qk", "stride_kk", "stride_vk", "stride_ok", "stride_bn", "stride_dk", "stride_dn")  # 1 for rows


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of local memory of each thread: registers that did not fit."""
    shared: int
    """Bytes of shared memory of each block."""
    tensor_cores: int
    """Matrix instructions in its PTX: wgmma for capability 9.0, tcgen05.mma for 10.0, mma else."""


def attention_resources(
    kernel: str,
    capability: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 64,
    heads: int = 12,
    bias: bool = True,
    packed: bool = False,
    padded: bool = False,
    segmented: bool = False,
    dropout: bool = False,
) -> Resources:
    """Compiles one of `triton_attention.KERNELS` in the configuration that a call with such tensors would get.

    Args:
        capability: 80, 90, 100.
    """
    chosen = triton_attention.blocks(kernel, head_size, dtype)
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    switches = {"HAS_BIAS": bias, "VARLEN": packed, "PADDED": padded, "DROPOUT": dropout}
    switches |= {"SEGMENTED": segmented, "UPCAST": False}
    constants = {"H": heads, "K": head_size, **switches, **chosen, **dict.fromkeys(_INNER, 1)}
    function = triton_attention.KERNELS[kernel]
    names = function.arg_names
    signature = {name: _type(name, constants, dtype) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name.startswith("stride_"))
    }
    source = ASTSource(function, signature, {n: v for n, v in constants.items() if n in names}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    instruction = {9: "wgmma.mma_async", 10: "tcgen05.mma"}.get(capability // 10, "mma.sync")
    count = compiled.asm["ptx"].count(instruction)
    return Resources(registers, stack, compiled.metadata.shared, count)


def _type(name: str, constants: dict[str, object], dtype: torch.dtype) -> str:
    if name in constants:
        return "constexpr"
    if name in ("scale", "kept_scale"):
        return "fp32"
    if name in ("T", "COUNT", "limit") or name.startswith("stride_"):
        return "i32"
    return _OF_THEIR_OWN.get(name, POINTERS[dtype])


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, from the `cuobjdump` in Triton's package."""
    program = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)
