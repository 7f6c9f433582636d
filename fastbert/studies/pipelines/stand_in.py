"""Tiny encoders with random weights in place of models that a pipeline has not trained yet, so that tasks are opened
and checked with them before the first job."""

from dataclasses import replace
from pathlib import Path

import torch

from fastbert.data.tokenizer import WordPiece
from fastbert.data.tokenizer_files import SPECIAL_TOKENS
from fastbert.hub.export import export_model
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder

WIDTH = 16


def write_stand_in(config: EncoderConfig, folder: Path) -> str:
    """Writes an encoder with the position encoding and the positions of `config`, one layer, and a vocabulary of single
    characters; returns its folder."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    tokens = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    small = replace(config.scaled(min(WIDTH, config.width), 1), vocab_size=len(tokens))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {f"encoder.{name}": value for name, value in Encoder(small).state_dict().items()}
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    WordPiece(tuple(tokens)).build().save(str(tokenizer / "tokenizer.json"))
    export_model(small, weights, tokenizer, folder / "model")
    return str(folder / "model")


def block_parameters(config: EncoderConfig) -> float:
    """Number of weights of the matrices of all blocks, about."""
    return float(config.layers * config.width * (4 * config.width + 2 * config.ffn))
