"""Weights of a Hugging Face folder, by name, from either file format. Nothing in the folder is executed."""

import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastbert.errors import UserError, abbreviated, brief
from fastbert.hub.export import SETTINGS
from fastbert.hub.names import FLOATS, FLOATS_ONLY
from fastbert.inputs import open_input, raise_refusal
from fastbert.training.tensors import HASH, read_tensors

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
    """Reads the weights of a Hugging Face folder, and the metadata of their file.

    Raises:
        UserError: there are no weights, or their file cannot be read, is damaged, or holds something else.
    """
    path = folder / "model.safetensors"
    if path.is_file():
        tensors, metadata = read_tensors(path)
        if SETTINGS in metadata and HASH not in metadata:  # both are written together
            raise UserError(f"{path} is damaged (its hash is missing); copy, download or export it again")
        return tensors, metadata
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin (weights in one file)")
    return _unpickled(path), {}


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
