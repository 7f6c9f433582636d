"""ELECTRA against transformers' own generator and discriminator, on copied weights and the same replaced tokens."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from fastbert.errors import UserError
from fastbert.model.encoder import Encoder
from fastbert.model.options import EncoderOptions
from fastbert.objectives.electra import Electra
from fastbert.objectives.options import ElectraOptions
from tests.objectives.conftest import VOCABULARY, V, batch, build

_BLOCK = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}


def theirs_of(ours: Electra) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    """transformers' two models with shared embeddings, as the paper has them."""
    sizes = {"vocab_size": V, "embedding_size": 32, "max_position_embeddings": 16, "num_hidden_layers": 2}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    models = []
    for kind, config in ((ElectraForMaskedLM, ours.generator_config), (ElectraForPreTraining, ours.config)):
        more = {
            "hidden_size": config.width,
            "num_attention_heads": config.heads,
            "intermediate_size": config.ffn,
        }
        models.append(kind(ElectraConfig(**sizes, **none, **more, pad_token_id=None)).double())
    generator, discriminator = models
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    return generator, discriminator


def pairs_of(
    ours: Electra, generator: ElectraForMaskedLM, discriminator: ElectraForPreTraining
) -> list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]]:
    """Each of our parameters with theirs, several where ours is their concatenation."""
    embeddings, out = discriminator.electra.embeddings, []

    def module(mine, *others) -> None:
        for kind in ("weight", "bias"):
            out.append((getattr(mine, kind), [getattr(other, kind) for other in others]))

    def blocks(mine: Encoder, theirs) -> None:
        for layer, block in zip(theirs.encoder.layer, mine.blocks, strict=True):
            attention = layer.attention.self
            module(block.attention.qkv, attention.query, attention.key, attention.value)
            for name, own in _BLOCK.items():
                module(block.get_submodule(own), layer.get_submodule(name))

    out.append((ours.encoder.words.weight, [embeddings.word_embeddings.weight]))
    out.append((ours.encoder.positions.table.weight, [embeddings.position_embeddings.weight]))
    out.append((ours.encoder.types.weight, [embeddings.token_type_embeddings.weight]))
    module(ours.encoder.embedding_norm, embeddings.LayerNorm)
    blocks(ours.encoder, discriminator.electra)
    module(ours.head.dense, discriminator.discriminator_predictions.dense)
    module(ours.head.output, discriminator.discriminator_predictions.dense_prediction)
    blocks(ours.small, generator.electra)
    if ours.small.projection is not None:
        module(ours.small.projection, generator.electra.embeddings_project)
    module(ours.small_head.dense, generator.generator_predictions.dense)
    module(ours.small_head.norm, generator.generator_predictions.LayerNorm)
    out.append((ours.small_head.decoder.bias, [generator.generator_lm_head.bias]))
    return out


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_losses_and_gradients_equal_transformers_electra(scale: float) -> None:
    ours = build("electra", options=ElectraOptions(generator_scale=scale, mask_rate=0.4)).double()
    generator, discriminator = theirs_of(ours)
    pairs = pairs_of(ours, generator, discriminator)
    assert len(pairs) == len(list(ours.parameters()))
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mine, theirs in pairs:  # biases and norms too: a parameter that is mixed up shows
            mine += 0.1 * torch.randn(mine.shape, generator=noise, dtype=torch.float64)
            for other, part in zip(theirs, mine.chunk(len(theirs)), strict=True):
                other.copy_(part)

    inputs = ours.sample(batch(), seed=1, step=2)
    with torch.no_grad():
        filled, suspicion, _ = ours.predictions(inputs)
    replaced = filled != inputs.original
    assert 0 < replaced.sum() <= inputs.positions.numel()
    labels = torch.full_like(filled, -100).scatter(1, inputs.positions, inputs.targets)
    mlm = generator(input_ids=inputs.input_ids, labels=labels).loss
    logits = discriminator(input_ids=filled).logits
    rtd = F.binary_cross_entropy_with_logits(logits, replaced.double())  # as theirs, which ends in float32
    torch.testing.assert_close(discriminator(input_ids=filled, labels=replaced.double()).loss, rtd.float())
    sums = ours(inputs)
    torch.testing.assert_close(sums["mlm"] / inputs.counts["mlm"], mlm, rtol=1e-10, atol=0)
    torch.testing.assert_close(sums["rtd"] / inputs.counts["rtd"], rtd, rtol=1e-10, atol=0)
    torch.testing.assert_close(suspicion, logits.sigmoid(), rtol=1e-10, atol=0)

    # Each loss alone, so no gradient of the detection is in the generator, except in the embeddings that both use.
    assert ours.loss_weights == {"mlm": 1.0, "rtd": 50.0}
    for name, loss in (("mlm", mlm), ("rtd", rtd)):
        ours.zero_grad()
        generator.zero_grad()
        discriminator.zero_grad()
        (sums[name] / inputs.counts[name]).backward()
        loss.backward()
        reached = {id(mine) for mine, _ in pairs if mine.grad is not None}
        parts = (ours.small, ours.small_head) if name == "mlm" else (ours.encoder, ours.head)
        assert reached == {id(parameter) for part in parts for parameter in part.parameters()}
        for mine, theirs in pairs:
            if mine.grad is not None:
                torch.testing.assert_close(
                    mine.grad, torch.cat([other.grad for other in theirs]), rtol=1e-7, atol=1e-11
                )


def test_a_sample_that_is_the_word_itself_counts_as_original() -> None:
    """A generator that is certain of one word, in rows of that word alone: nothing is replaced."""
    objective = build("electra")
    with torch.no_grad():
        objective.small_head.decoder.bias[7] = 100.0
    rows = batch()
    rows.input_ids[:, 1:] = 7
    inputs = objective.sample(rows, 0, 0)
    sums = objective(inputs)
    assert sums["replaced"][0] == 0 and sums["accuracy_original"][1] == rows.input_ids.numel()
    rows.input_ids[:, 1:] = 8
    inputs = objective.sample(rows, 0, 0)
    filled, suspicion, _ = objective.predictions(inputs)
    replaced, tokens = objective(inputs)["replaced"]
    assert replaced == (filled == 7).sum() == inputs.positions.numel() and tokens == rows.input_ids.numel()
    sums = objective(inputs)
    right = (suspicion > 0.5) == (filled != inputs.original)
    assert sums["accuracy_replaced"][0] == right[filled == 7].sum()
    assert sums["accuracy_original"][0] == right[filled != 7].sum()


def test_sizes_of_the_generator() -> None:
    """The paper's three sizes (its Table 6) are the defaults; other widths count as one of them."""
    for width, scale, expected in (
        (256, None, (64, 1, 256)),
        (768, None, (256, 4, 1024)),
        (1024, None, (256, 4, 1024)),
        (512, None, (128, 2, 512)),
        (576, None, (192, 3, 768)),
        (1536, None, (384, 6, 1536)),
        (768, 0.25, (192, 3, 768)),
        (128, 1.0, (128, 2, 512)),
    ):
        config = EncoderOptions(layers=3, width=width).resolve(V, 16)
        small = Electra(config, ElectraOptions(generator_scale=scale), VOCABULARY).generator_config
        assert (small.width, small.heads, small.ffn) == expected and small.layers == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"generator_scale": 0.0},
        {"generator_scale": 1.5},
        {"loss_weight": 0.0},
        {"mask_rate": 0.95},
        {"mask_token_fraction": 2},
    ],
)
def test_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(changes))} must"):
        ElectraOptions(**changes)
