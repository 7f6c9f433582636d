"""transformers' ModernBERT as the oracle of rope, geglu and missing biases: the same weights, the same numbers.

Its attention is global in every layer here. The first block's attention has no LayerNorm there, since the embeddings
have just passed one; ours has one in every block, and the test takes it out.
"""

import pytest
import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from fastbert.model.config import EncoderConfig
from fastbert.model.encoder import Encoder
from fastbert.model.heads import MLMHead

BASE, T = 500.0, 20


def modernbert() -> ModernBertForMaskedLM:
    rope = {"rope_type": "default", "rope_theta": BASE}
    config = ModernBertConfig(
        **{"vocab_size": 60, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "max_position_embeddings": 32, "layer_types": ["full_attention"] * 3},
        **{"rope_parameters": {"full_attention": rope, "sliding_attention": dict(rope)}, "norm_eps": 1e-5},
        **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    )
    model = ModernBertForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def ours_of(theirs: ModernBertForMaskedLM) -> tuple[Encoder, MLMHead]:
    config = EncoderConfig(
        **{"vocab_size": 60, "layers": 3, "width": 48, "heads": 4, "ffn": 40, "max_positions": 32},
        **{"type_vocab_size": 0, "position": "rope", "rope_base": BASE, "feed_forward": "geglu", "bias": False},
        **{"norm": "pre", "norm_eps": 1e-5, "dropout": 0.0, "attention_dropout": 0.0},
    )
    encoder = Encoder(config)
    encoder.blocks[0].attention_norm = nn.Identity()
    head = MLMHead(config, encoder.words)
    names = {
        "model.embeddings.tok_embeddings": "words",
        "model.embeddings.norm": "embedding_norm",
        "model.final_norm": "final_norm",
    }
    parts = {
        **{"attn_norm": "attention_norm", "attn.Wqkv": "attention.qkv", "attn.Wo": "attention.out"},
        **{"mlp_norm": "feed_forward_norm", "mlp.Wi": "feed_forward.up", "mlp.Wo": "feed_forward.down"},
    }
    names |= {f"model.layers.{i}.{a}": f"blocks.{i}.{b}" for i in range(3) for a, b in parts.items()}
    weights = {name.rsplit(".", 1)[0]: tensor for name, tensor in theirs.state_dict().items() if "weight" in name}
    encoder.load_state_dict({f"{ours}.weight": weights[name] for name, ours in names.items() if name in weights})
    head.load_state_dict(
        {
            **{f"{name}.weight": weights[f"head.{name}"] for name in ("dense", "norm")},
            **{"decoder.weight": weights["decoder"], "decoder.bias": theirs.decoder.bias},
        }
    )
    return encoder, head


@pytest.mark.parametrize("restarted", [False, True])
def test_hidden_states_logits_and_gradients_are_modernberts(restarted: bool) -> None:
    theirs = modernbert()
    encoder, head = ours_of(theirs)
    ids = torch.randint(4, 60, (2, T), generator=torch.Generator().manual_seed(1))
    index = torch.arange(T).expand(2, -1)
    mask = index < torch.tensor([[T], [13]])
    positions = torch.where(index < 8, index, index - 7) if restarted else None
    hidden = encoder(ids, attention_mask=mask, position_ids=positions)
    given = {"attention_mask": mask.long(), **({} if positions is None else {"position_ids": positions})}
    expected = theirs.model(ids, **given).last_hidden_state
    torch.testing.assert_close(hidden[mask], expected[mask], rtol=1e-5, atol=1e-5)
    logits, their_logits = head(hidden)[mask], theirs(ids, **given).logits[mask]
    assert their_logits.std() > 1
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=2e-5)
    logits.square().mean().backward()
    their_logits.square().mean().backward()
    for block, layer in zip(encoder.blocks, theirs.model.layers, strict=True):
        for mine, other in ((block.attention.qkv, layer.attn.Wqkv), (block.feed_forward.up, layer.mlp.Wi)):
            scale = other.weight.grad.abs().max().item()
            torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-5 * scale)
