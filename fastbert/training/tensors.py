"""safetensors files with equal bytes for equal tensors, and with a hash that reveals damage.

The library writes metadata in the order of a hash table, which differs between processes; here it is sorted. One of its
entries is a hash over everything else. Files of other programs have no such hash and are read without this check.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastbert.errors import UserError
from fastbert.inputs import input_errors, open_input

HASH = "sha256"
"""Key in the metadata: SHA-256 over the rest of it and over all tensors: names, dtypes, shapes and bytes."""


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash of `tensors`, which must be on the CPU, and `metadata`; the order does not matter."""
    rest = {key: value for key, value in metadata.items() if key != HASH}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def serialized(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a safetensors file with `tensors`, which must be on the CPU, `metadata` and their hash."""
    metadata = {**metadata, HASH: content_hash(tensors, metadata)}
    content = safetensors.torch.save(tensors, metadata=metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    entries["__metadata__"] = dict(sorted(metadata.items()))
    header = json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file. Raises a UserError if it cannot be read, is truncated or damaged."""
    open_input(path, "weights").close()  # safetensors would report missing permissions as damage
    try:
        with input_errors(path), safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: the file cannot be read, is truncated or damaged, or its content does not match its hash.
    """
    metadata = read_metadata(path)
    try:
        with input_errors(path):
            tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from None
    if HASH in metadata and content_hash(tensors, metadata) != metadata[HASH]:
        raise _damaged(path, "its content does not match its hash")
    return tensors, metadata


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}); copy, download or export it again")
