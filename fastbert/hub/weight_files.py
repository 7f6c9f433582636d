"""Weights of a Hugging Face folder, by name: model.safetensors, several such files with an index, or
pytorch_model.bin. Nothing in the folder is executed."""

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastbert.errors import UserError, abbreviated, brief
from fastbert.hub.export import SETTINGS
from fastbert.hub.names import FLOATS, FLOATS_ONLY
from fastbert.inputs import input_errors, open_input, raise_refusal
from fastbert.records import read_json
from fastbert.training.tensors import HASH, read_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the shard of each tensor, in a folder whose weights are in several files."""
# Errors that torch.load raises for damaged files, found by experiment.
_UNPICKLING = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    TypeError,
    AttributeError,
    OverflowError,
)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the weights of a Hugging Face folder, and the metadata of their file; several files have none.

    Raises:
        UserError: there are no weights, a file of them is missing, cannot be read, is damaged, or holds something else.
    """
    path = folder / WEIGHTS
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if SETTINGS in metadata and HASH not in metadata:  # both are written together
            raise UserError(f"{path} is damaged (its hash is missing); copy, download or export it again")
        return tensors, metadata
    if (folder / INDEX).is_file():
        return _of_shards(folder), {}
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise UserError(
            f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} with its files, nor pytorch_model.bin in one "
            "file; copy or download the model again"
        )
    return _unpickled(path), {}


def shards(folder: Path) -> dict[str, list[str]]:
    """File of each shard -> the names of its tensors, from the index in `folder`.

    Raises:
        UserError: the index is damaged, or names a file outside the folder or one that is not safetensors.
    """
    path = folder / INDEX
    found: dict[str, list[str]] = {}
    for tensor, file in read_json(path, "index of the weights", {"weight_map": {str: str}})["weight_map"].items():
        found.setdefault(file, []).append(tensor)
    if not found:
        raise UserError(f"{path} names no weights; copy or download the model again")
    for file in found:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{path} names the file {brief(file)}, and weights are read from .safetensors files next to it only; "
                "save the model again"
            )
    return found


def missing_shards(folder: Path) -> list[str]:
    """Files that the index in `folder` names and that are not there. Raises the errors of `shards`."""
    return [file for file in sorted(shards(folder)) if not (folder / file).is_file()]


def read_stored(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Reads those of the tensors `names` that the safetensors files in `folder` have."""
    files = [WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(shards(folder))
    found = {}
    for path in (folder / file for file in files):
        with input_errors(path), safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in names if name in set(file.keys())}
    return found


def _of_shards(folder: Path) -> dict[str, Tensor]:
    """Reads all shards; each tensor must be in the one that the index names, and in no other."""
    if missing := missing_shards(folder):
        raise UserError(f"{folder} lacks {abbreviated(missing)}, which {INDEX} names; copy or download the model again")
    tensors: dict[str, Tensor] = {}
    for file, expected in sorted(shards(folder).items()):
        found, _ = read_tensors(folder / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{folder / file} and another shard both have {abbreviated(twice)}; save the model again")
        if lacking := sorted(set(expected) - found.keys()):
            raise UserError(
                f"{folder / file} lacks {abbreviated(lacking)}, which {INDEX} expects in it; copy or download the "
                "model again"
            )
        tensors |= found
    return tensors


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Reads a file of `torch.save`: weights by name."""
    with open_input(path, "weights") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:  # torch.save does not compress: only a zip bomb expands
                    if sum(entry.file_size for entry in archive.infolist()) > size:
                        raise UserError(f"{path} is damaged: it holds more than its {size:,} bytes; download it again")
            file.seek(0)
            with warnings.catch_warnings():  # about the pickle protocol, which the user cannot change
                warnings.simplefilter("ignore")
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except _UNPICKLING as error:
            raise_refusal(error, path)
            # Only the first sentence: the next ones advise loading the file with any code in it.
            reason = brief((str(error) or type(error).__name__).splitlines()[0].split(". ")[0], str)
            raise UserError(
                f"{path} is damaged or holds more than tensors ({reason}); download it again, preferably as "
                "model.safetensors"
            ) from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__} and not weights by name; give a model's folder")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} holds more than weights by name, at {brief(name)}; save its state dict alone")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def joined(tensors: dict[str, Tensor], names: tuple[str, ...], folder: Path) -> Tensor:
    """Concatenates the tensors `names` along dimension 0.

    Raises:
        UserError: they are not floating-point numbers, or differ in shape.
    """
    parts = [tensors[name] for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.dtype not in FLOATS:
            raise UserError(f"the weights in {folder} do not fit: {name} holds {str(part.dtype)[6:]} {FLOATS_ONLY}")
        if not part.ndim or part.shape != parts[0].shape:
            raise UserError(
                f"the weights in {folder} do not fit: {abbreviated([f'{n} {list(tensors[n].shape)}' for n in names])}"
            )
    return torch.cat(parts)
