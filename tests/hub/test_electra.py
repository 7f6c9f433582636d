"""Encoders with a discriminator's head: transformers' own ELECTRA where it computes the same, our class elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForPreTraining, ElectraConfig, ElectraForPreTraining, ElectraModel

from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import Pretrained, load_pretrained
from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.heads import ReplacedHead
from tests.hub.conftest import random_models, small_batch, small_config

VARIANTS = {
    "native": {},
    "native, no types": {"type_vocab_size": 0},
    "pre-norm": {"norm": "pre"},
    "relative": {"position": "relative"},
    "tupe-a": {"position": "tupe-a", "cls_attention": "tied"},
    "tupe-r": {"position": "tupe-r", "type_vocab_size": 0},
    "alibi": {"position": "alibi"},
    "rope": {"position": "rope", "feed_forward": "geglu", "bias": False},
}


def discriminator(config: EncoderConfig) -> tuple[Encoder, ReplacedHead, dict[str, torch.Tensor]]:
    """Encoder and head with random parameters, and weights as in an objective's state, with a second network."""
    encoder, _ = random_models(config)
    head = ReplacedHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    named = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return encoder, head, named | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}


@torch.no_grad()
def our_logits(encoder: Encoder, head: ReplacedHead, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return head(encoder(**inputs))


@pytest.mark.parametrize("name", VARIANTS)
def test_exports_open_with_equal_logits(name: str, tokenizer: Path, tmp_path: Path) -> None:
    config, out = small_config(**VARIANTS[name]), tmp_path / "out"
    encoder, head, weights = discriminator(config)
    export_model(config, weights, tokenizer, out)
    model, loading = AutoModelForPreTraining.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    native = name.startswith("native")
    assert type(model).__name__ == ("ElectraForPreTraining" if native else "FastBertForPreTraining")
    assert (out / "modeling_fastbert.py").exists() != native
    model.eval()
    batch = small_batch()
    for names in (("attention_mask", "token_type_ids"), ("position_ids",), ()):
        inputs = {key: batch[key] for key in ("input_ids", *names)}
        real = batch["attention_mask"].bool() if "attention_mask" in names else torch.ones(3, 24, dtype=torch.bool)
        with torch.no_grad():
            theirs = model(**inputs).logits
        ours = our_logits(encoder, head, inputs)
        assert theirs.shape == (3, 24)
        torch.testing.assert_close(theirs[real], ours[real], rtol=1e-5, atol=1e-5)
    # Their loss is the mean over the tokens that are not padding.
    labels = (torch.arange(24) % 5 == 0).long().expand(3, -1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    real, logits = batch["attention_mask"].bool(), our_logits(encoder, head, inputs)
    expected = F.binary_cross_entropy_with_logits(logits[real], labels[real].float())
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected, rtol=1e-5, atol=1e-6)
    # The way back.
    again = load_pretrained(out)
    if native:  # transformers has no word for what only relative positions need
        config = replace(config, relative_buckets=32, relative_max_distance=128)
    assert again.config == config and again.weights.keys() == weights.keys() and not again.has_head
    assert all(torch.equal(again.weights[key], weights[key]) for key in weights)
    card = (out / "README.md").read_text()
    parameters = sum(p.numel() for p in (*encoder.parameters(), *head.parameters()))
    assert "`AutoModelForPreTraining`" in card and f"| parameters | {parameters} |" in card


def hub_electra(folder: Path, kind: type, tokenizer: Path, **changes):
    sizes = {"vocab_size": 40, "hidden_size": 24, "embedding_size": 24, "num_hidden_layers": 2}
    more = {"num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 30}
    model = kind(ElectraConfig(**(sizes | more | changes))).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((tokenizer / "vocab.txt").read_bytes())
    return model


@torch.no_grad()
def test_reads_electras_of_others(tokenizer: Path, tmp_path: Path) -> None:
    batch = small_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    real = batch["attention_mask"].bool()

    def hidden(pretrained: Pretrained) -> torch.Tensor:
        encoder = Encoder(pretrained.config).eval()
        encoder.load_state_dict(
            {n.removeprefix("encoder."): t for n, t in pretrained.weights.items() if n.startswith("encoder.")}
        )
        return encoder(**inputs)

    model = hub_electra(tmp_path / "whole", ElectraForPreTraining, tokenizer)
    pretrained = load_pretrained(tmp_path / "whole")
    head = ReplacedHead(pretrained.config)
    head.load_state_dict({n.removeprefix("head."): t for n, t in pretrained.weights.items() if n.startswith("head.")})
    torch.testing.assert_close(head(hidden(pretrained))[real], model(**inputs).logits[real], rtol=1e-5, atol=1e-5)

    model = hub_electra(tmp_path / "bare", ElectraModel, tokenizer)
    pretrained = load_pretrained(tmp_path / "bare")
    assert not any(name.startswith("head.") for name in pretrained.weights)
    theirs = model(**inputs).last_hidden_state
    torch.testing.assert_close(hidden(pretrained)[real], theirs[real], rtol=1e-5, atol=1e-5)
    again = tmp_path / "exported"  # without a head it is a BERT
    export_model(pretrained.config, pretrained.weights, tokenizer, again)
    assert json.loads((again / "config.json").read_text())["model_type"] == "bert"
    opened = AutoModel.from_pretrained(again).eval()
    torch.testing.assert_close(opened(**inputs).last_hidden_state[real], theirs[real], rtol=1e-5, atol=1e-5)


def test_narrow_embeddings_are_refused_by_name(tokenizer: Path, tmp_path: Path) -> None:
    hub_electra(tmp_path / "small", ElectraForPreTraining, tokenizer, embedding_size=12)
    with pytest.raises(UserError, match="embedding_size 12 and hidden_size 24"):
        load_pretrained(tmp_path / "small")
