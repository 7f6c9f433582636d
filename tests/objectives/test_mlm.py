import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fastbert.data.batches import Batch
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.model.encoder import initialize
from fastbert.model.options import EncoderOptions
from fastbert.model.positions import POSITIONS
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions

V = 40
VOCABULARY = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(V - 5))))


def batch(rows: int = 4, length: int = 16, first_row: int = 0) -> Batch:
    ids = torch.randint(5, V, (64, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    indices = torch.arange(first_row, first_row + rows)
    return Batch(ids[indices], indices)


def build(position: str = "absolute", dropout: float = 0.0, options: MLMOptions | None = None, **changes) -> MLM:
    config = EncoderOptions(
        layers=2, width=32, heads=2, position=position, dropout=dropout, attention_dropout=dropout, **changes
    ).resolve(V, 16)
    objective = MLM(config, options or MLMOptions(), VOCABULARY)
    initialize(objective, 0, 0.05)
    return objective.train()


def test_loss_and_gradients_equal_transformers_bert() -> None:
    """The same weights and the same masked rows in BertForMaskedLM, which computes its head everywhere."""
    ours = build().double()
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_act="gelu",
    )
    theirs = BertForMaskedLM(config).double()
    bert, encoder = theirs.bert, ours.encoder
    pairs = [
        (bert.embeddings.word_embeddings.weight, encoder.words.weight),
        (bert.embeddings.position_embeddings.weight, encoder.positions.table.weight),
        (bert.embeddings.token_type_embeddings.weight, encoder.types.weight),
        (bert.embeddings.LayerNorm.weight, encoder.embedding_norm.weight),
        (theirs.cls.predictions.transform.dense.weight, ours.head.dense.weight),
        (theirs.cls.predictions.transform.dense.bias, ours.head.dense.bias),
        (theirs.cls.predictions.bias, ours.head.decoder.bias),
    ]
    for layer, block in zip(bert.encoder.layer, encoder.blocks, strict=True):
        pairs += [
            (layer.attention.output.dense.weight, block.attention.out.weight),
            (layer.intermediate.dense.weight, block.feed_forward.up.weight),
            (layer.output.dense.weight, block.feed_forward.down.weight),
        ]
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
        for layer, block in zip(bert.encoder.layer, encoder.blocks, strict=True):
            split = block.attention.qkv.weight.chunk(3)
            own = layer.attention.self
            for module, weight in zip((own.query, own.key, own.value), split, strict=True):
                module.weight.copy_(weight)
                module.bias.zero_()
    inputs = ours.sample(batch(), seed=1, step=2)
    labels = torch.full_like(inputs.input_ids, -100).scatter(1, inputs.positions, inputs.targets)
    expected = theirs(input_ids=inputs.input_ids, labels=labels).loss
    loss = ours(inputs)["mlm"] / inputs.counts["mlm"]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_large_batch(sizes: list[int], dropout: float) -> None:
    """Gradients of the mean over all masked positions, even where rows have unequal numbers of them."""
    gradients = []
    for split in ([4], sizes):
        objective = build("tupe-r", dropout).double()
        inputs, first = [], 0
        for rows in split:
            part = batch(rows, first_row=first)
            part.input_ids[part.row_indices == 2, 3:] = 3  # a row with two words only
            inputs.append(objective.sample(part, seed=5, step=7))
            first += rows
        count = sum(part.counts["mlm"] for part in inputs)
        for part in inputs:
            (objective(part)["mlm"] / count).backward()
        gradients.append([p.grad for p in objective.parameters() if p.grad is not None])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_overfits_one_batch(position: str, norm: str) -> None:
    objective = build(position, norm=norm)
    inputs = objective.sample(batch(8), seed=0, step=0)
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = objective(inputs)["mlm"] / inputs.counts["mlm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_evaluation_counts_right_answers() -> None:
    objective = build().eval()
    inputs = objective.sample(batch(), seed=0, step=0, purpose="validation-mask")
    assert inputs.dropout_keys is None
    assert (inputs.input_ids.gather(1, inputs.positions) == VOCABULARY.ids["[MASK]"]).all()
    sums = objective(inputs)
    guesses = objective.logits(inputs).argmax(-1)
    assert sums["accuracy"] == (guesses == inputs.targets.flatten()).sum()
    assert inputs.counts["accuracy"] == inputs.targets.numel()


def test_options_change_what_is_masked() -> None:
    rows = batch()
    inputs = {
        name: build(options=options).sample(rows, 0, 0)
        for name, options in {
            "default": MLMOptions(),
            "rate": MLMOptions(mask_rate=0.4),
            "all [MASK]": MLMOptions(mask_token_fraction=1.0, random_token_fraction=0.0),
            "no [MASK]": MLMOptions(mask_token_fraction=0.0, random_token_fraction=1.0),
        }.items()
    }
    assert inputs["rate"].positions.shape[1] == 6 and inputs["default"].positions.shape[1] == 2
    assert (inputs["all [MASK]"].input_ids.gather(1, inputs["all [MASK]"].positions) == 4).all()
    assert (inputs["no [MASK]"].input_ids != 4).all()
    assert (inputs["default"].input_ids == 4).any()


@pytest.mark.parametrize(
    "changes", [{"mask_rate": 0.0}, {"mask_rate": 0.95}, {"mask_token_fraction": 1.2}, {"random_token_fraction": 0.3}]
)
def test_fractions_that_do_not_add_up_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(changes))} must"):
        MLMOptions(**changes)
