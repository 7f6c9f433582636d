"""Models of transformers with this package's attention against the same models with eager attention."""

import pytest
import torch
import transformers
from fastbert_kernels.transformers_attention import register
from torch import Tensor, nn

register()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
MODELS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig(**SMALL, max_position_embeddings=40)),
    "distilbert": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=40),
    ),
    # Two of three layers attend to a window of 4 tokens to each side.
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(
            **{**SMALL, "num_hidden_layers": 3}, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        ),
    ),
}  # fmt: skip


def build(name: str, implementation: str, dropout: float = 0.0) -> nn.Module:
    """The same weights each time."""
    cls, config = MODELS[name]
    config = type(config).from_dict(config.to_dict())
    for option in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(config, option):
            setattr(config, option, dropout)
    for option in ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout"):
        if hasattr(config, option):
            setattr(config, option, 0.0)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return cls(config).train()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (3, 17), generator=generator)
    mask = torch.arange(17) < torch.tensor([17, 9, 1])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def results(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = model(**given)
    return out.logits, out.loss, torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager_attention(name: str) -> None:
    given = batch()
    real = given["attention_mask"].bool()
    ours, theirs = (results(build(name, kind), given) for kind in ("fastbert", "eager"))
    torch.testing.assert_close(ours[0][real], theirs[0][real], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_custom_masks() -> None:
    """[B, 1, T, T]: bool, and additive."""
    given = batch()
    pairs = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.5
    pairs |= torch.eye(17, dtype=torch.bool)
    added = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    theirs = results(build("bert", "eager"), {**given, "attention_mask": added})
    for mask in (pairs, added):
        ours = results(build("bert", "fastbert"), {**given, "attention_mask": mask})
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)


def test_the_position_bias_of_t5_is_learned() -> None:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    found = []
    for kind in ("fastbert", "eager"):
        config._attn_implementation = kind
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(config).train()
        out = model(**{name: value for name, value in batch().items() if name != "labels"}).last_hidden_state
        table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        real = batch()["attention_mask"].bool()
        found.append((out[real], torch.autograd.grad(out[real].square().sum(), table)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert found[0][1].abs().max() > 1e-6


def test_dropout_repeats_under_a_seed() -> None:
    model, losses = build("bert", "fastbert", dropout=0.3), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(results(model, batch())[1].item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert results(model, batch())[1] == results(model, batch())[1]


def test_saved_and_compiled(tmp_path) -> None:
    model = build("bert", "fastbert").eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="fastbert").eval()
    given = batch()
    plain = model(**given).logits
    assert torch.equal(loaded(**given).logits, plain)
    compiled = torch.compile(build("bert", "fastbert", dropout=0.1), backend="aot_eager", fullgraph=True)
    assert results(compiled, given)[1].isfinite()


def test_unsupported_requests_are_errors() -> None:
    given = batch()
    with pytest.raises(ValueError, match="output_attentions"):
        build("bert", "fastbert")(**given, output_attentions=True)
    llama = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    llama._attn_implementation = "fastbert"
    with pytest.raises(ValueError, match="a key head for each of the 2 query heads, not 1"):
        transformers.LlamaForCausalLM(llama)(input_ids=given["input_ids"])
