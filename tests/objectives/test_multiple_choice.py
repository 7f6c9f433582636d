"""Multiple choice: which candidates stand where, what is right, and the losses against plain indexing."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.model.options import EncoderOptions
from fastbert.objectives.multiple_choice import MultipleChoice
from fastbert.objectives.options import MultipleChoiceOptions
from tests.objectives.conftest import VOCABULARY, V, batch, build


def options(**changes) -> MultipleChoiceOptions:
    return MultipleChoiceOptions(**({"choices": 5, "mask_rate": 0.4} | changes))


def candidates_of(objective: MultipleChoice, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x^R, candidates [B T, k - 1] and answers."""
    with torch.no_grad():
        hidden = objective.generator_hidden(inputs)
        filled = objective.fill(inputs, objective.masked_log_probabilities(inputs, hidden))
        return filled, *objective.candidates(inputs, filled, hidden)


@pytest.mark.parametrize("choices", [2, 3, 10, V - 5])
def test_candidates_are_those_of_the_paper(choices: int) -> None:
    """100,000 candidates: distinct, never special, never the word itself but where it is the answer."""
    objective = build("multiple-choice", options=options(choices=choices))
    with torch.no_grad():  # a controller that would love to propose the words themselves and special tokens
        objective.small_head.bias[:8] = 3.0
    for step in range(max(1, 100_000 // (32 * 16 * choices)) if choices == 10 else 3):
        inputs = objective.sample(batch(32), 0, step)
        filled, ids, answers = candidates_of(objective, inputs)
        original, replaced = inputs.original.flatten(), (filled != inputs.original).flatten()
        assert ids.shape == (32 * 16, choices - 1)
        assert (ids >= 5).all() and (ids < V).all()
        ordered = ids.sort(1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()
        assert replaced.any() and not replaced.all()
        # Where the word was replaced it is the last but one, the answer; elsewhere [NOTA], the last, is right.
        assert torch.equal(answers, torch.where(replaced, choices - 2, choices - 1))
        assert torch.equal((ids == original[:, None]).any(1), replaced)
        assert torch.equal(ids[replaced, -1], original[replaced])
        if choices == 10:  # candidates have noise of their own: the first is not the sample over again
            assert (ids[replaced, 0] == filled.flatten()[replaced]).float().mean() < 0.5


def test_candidates_follow_the_controller_everywhere() -> None:
    """First candidates at [CLS], at an unmasked word and at a masked one, compared with the controller's softmax."""
    objective = build("multiple-choice", options=options(choices=3))
    rows = batch(1)
    rows.input_ids[:] = batch(1).input_ids[:1]
    count = 3000
    many = type(rows)(rows.input_ids.expand(count, -1).clone(), torch.arange(count))
    inputs = objective.sample(many, 0, 0)
    masked = torch.tensor([3, 7, 8, 9, 12, 14])
    shown = many.input_ids.index_fill(1, masked, 4)  # the same masks in every row
    inputs = type(inputs)(**{**vars(inputs), "input_ids": shown, "positions": masked.expand(count, -1)})
    with torch.no_grad():
        hidden = objective.generator_hidden(inputs)
        ids, _ = objective.candidates(inputs, inputs.original, hidden)
        logits = objective.word_logits(hidden[0])
    ids = ids.view(count, 16, 2)
    for index in (0, 1, 7):
        scores = logits[index].clone()
        scores[:5] = scores[inputs.original[0, index]] = -torch.inf
        expected = scores.double().softmax(-1) * count
        observed = ids[:, index, 0].bincount(minlength=V)
        there = expected > 0
        assert chisquare(observed[there], expected[there]).pvalue > 1e-4 and observed[~there].sum() == 0


def test_losses_and_gradients_equal_plain_indexing() -> None:
    ours = build("multiple-choice", options=options()).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    inputs = ours.sample(batch(), 1, 2)
    filled, ids, answers = candidates_of(ours, inputs)
    sums = ours(inputs)
    parameters = list(ours.parameters())
    weighted = sum(weight * sums[name] / inputs.counts[name] for name, weight in ours.loss_weights.items())
    gradients = torch.autograd.grad(weighted, parameters)

    words = ours.encoder.words.weight
    small = ours.small(inputs.input_ids).gather(1, inputs.positions[..., None].expand(-1, -1, 8)).flatten(0, 1)
    head = ours.small_head
    logits = head.norm(F.gelu(head.dense(small))) @ (words @ ours.small.projection.weight.T).T + head.bias
    mlm = F.cross_entropy(logits, inputs.targets.flatten())
    head = ours.head
    hidden = head.norm(F.gelu(head.dense(ours.encoder(filled).flatten(0, 1))))
    rows = torch.cat([words[ids], head.none.weight.expand(len(ids), 1, -1)], 1)  # [NOTA] has a row of its own
    bias = torch.cat([head.bias[ids], head.none.bias.expand(len(ids), 1)], 1)
    scores = (rows * hidden[:, None]).sum(-1) + bias
    choice = F.cross_entropy(scores, answers)
    torch.testing.assert_close(sums["mlm"] / inputs.counts["mlm"], mlm, rtol=1e-10, atol=0)
    torch.testing.assert_close(sums["choice"] / inputs.counts["choice"], choice, rtol=1e-10, atol=0)
    right = (scores.argmax(-1) == answers).view_as(filled)
    replaced = filled != inputs.original
    assert sums["accuracy_replaced"] == ((right & replaced).sum(), replaced.sum())
    assert sums["accuracy_original"] == ((right & ~replaced).sum(), (~replaced).sum())
    p = logits.softmax(-1)
    torch.testing.assert_close(sums["entropy"][0], -(p * p.log()).sum())
    for a, b in zip(gradients, torch.autograd.grad(mlm + 20.0 * choice, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)

    replaced_p, best = ours.predictions(inputs)[1:]
    torch.testing.assert_close(replaced_p.flatten(), 1 - scores.softmax(-1)[:, -1])
    assert torch.equal(best.flatten(), ids.gather(1, scores[:, :-1].argmax(1, keepdim=True))[:, 0])


def test_rows_of_the_embedding_that_stand_for_no_word_are_no_candidates() -> None:
    """A vocabulary padded to a round number, whose padding the controller likes best."""
    objective = build("multiple-choice", options=options(), vocab_size=64)
    with torch.no_grad():
        objective.small_head.bias[V:] = 20.0
    filled, ids, _ = candidates_of(objective, objective.sample(batch(), 0, 0))
    assert (ids < V).all() and (filled < V).all()


def test_sizes_of_the_controller() -> None:
    config = EncoderOptions(layers=12, width=768).resolve(V, 16)
    paper = MultipleChoiceOptions().networks(config)[1]
    assert (paper.layers, paper.width, paper.heads, paper.ffn) == (12, 256, 4, 1024)
    given = MultipleChoiceOptions(controller_layers=6, controller_width=192).networks(config)[1]
    assert (given.layers, given.width, given.heads) == (6, 192, 3)
    small = MultipleChoiceOptions().networks(EncoderOptions(layers=12, width=256).resolve(V, 16))[1]
    assert (small.layers, small.width, small.heads) == (12, 64, 1)
    odd = MultipleChoiceOptions(controller_width=200).networks(config)[1]
    assert (odd.width, odd.width % odd.heads) == (200, 0)
    same = build("multiple-choice", options=options(controller_width=32))
    assert same.small.projection is None
    assert not MultipleChoiceOptions(controller_width=768).warnings(config)
    assert "wider than the encoder" in MultipleChoiceOptions(controller_width=800).warnings(config)[0]


def test_refused() -> None:
    for changes in ({"choices": 1}, {"controller_width": 0}, {"controller_layers": 0}, {"loss_weight": -1.0}):
        with pytest.raises(UserError, match=f"^{next(iter(changes))} must"):
            MultipleChoiceOptions(**changes)
    with pytest.raises(UserError, match="choices 36 is more than the 35 words"):
        build("multiple-choice", options=options(choices=36))
    few = WordPiece(VOCABULARY.tokens[:9])
    with pytest.raises(UserError, match="more than the 4 words"):
        build("multiple-choice", options=options(), vocabulary=few)
