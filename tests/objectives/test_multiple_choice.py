"""Multiple choice: which candidates stand where, what is right, and the losses against plain indexing."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from fastbert.data.note_words import NoteFrequencies
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.model.note_dictionary import NoteDictionary
from fastbert.model.options import EncoderOptions, NoteDictionaryOptions
from fastbert.objectives.multiple_choice import MultipleChoice
from fastbert.objectives.options import MultipleChoiceOptions
from tests.objectives.conftest import VOCABULARY, V, batch, build

ALONE = [{"shared_bias": True}, {"nota_embedding": True}, {"with_replacement": True}, {"unmasked_fraction": 0.3}]
TOGETHER = {name: value for one in ALONE for name, value in one.items()}


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


@pytest.mark.parametrize("repeats", [False, True])
def test_candidates_follow_the_controller_everywhere(repeats: bool) -> None:
    """Candidates at [CLS], at an unmasked word and at a masked one, compared with the controller's softmax; with
    replacement each of them follows it, the word itself included."""
    objective = build("multiple-choice", options=options(choices=3, with_replacement=repeats))
    rows = batch(1)
    rows.input_ids[:] = batch(1).input_ids[:1]
    count = 3000
    many = type(rows)(rows.input_ids.expand(count, -1).clone(), torch.arange(count))
    inputs = objective.sample(many, 0, 0)
    masked = torch.tensor([3, 7, 8, 9, 12, 14])
    shown = many.input_ids.index_fill(1, masked, 4)  # the same masks in every row
    inputs = type(inputs)(**{**vars(inputs), "input_ids": shown, "positions": masked.expand(count, -1)})
    with torch.no_grad():
        objective.small_head.bias[inputs.original[0, 7]] += 2  # a word that is often sampled at its own position
        hidden = objective.generator_hidden(inputs)
        ids, answers = objective.candidates(inputs, inputs.original, hidden)
        logits = objective.word_logits(hidden[0])
    assert (answers == 2).all()  # [NOTA], also where the word itself is a candidate
    ids = ids.view(count, 16, 2)
    for index in (0, 1, 7):
        scores = logits[index].clone()
        scores[:5] = -torch.inf
        if not repeats:
            scores[inputs.original[0, index]] = -torch.inf
        expected = scores.double().softmax(-1) * count
        there = expected > 0
        for column in range(2 if repeats else 1):
            observed = ids[:, index, column].bincount(minlength=V)
            assert chisquare(observed[there], expected[there]).pvalue > 1e-4 and observed[~there].sum() == 0
        equal = (ids[:, index, 0] == ids[:, index, 1]).float().mean()
        assert equal == pytest.approx((expected / count).square().sum().item() if repeats else 0.0, abs=0.02)


@pytest.mark.parametrize("more", [{}, *ALONE, TOGETHER], ids=str)
def test_losses_and_gradients_equal_plain_indexing(more: dict) -> None:
    """Both losses, their gradients alone and together, and both parts of the main loss."""
    ours = build("multiple-choice", options=options(**more)).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    inputs = ours.sample(batch(), 1, 2)
    filled, ids, answers = candidates_of(ours, inputs)
    sums = ours(inputs)
    parameters = dict(ours.named_parameters())

    words = ours.encoder.words.weight
    small = ours.small(inputs.input_ids).gather(1, inputs.positions[..., None].expand(-1, -1, 8)).flatten(0, 1)
    head, bias = ours.small_head, ours.head.bias if ours.options.shared_bias else ours.small_head.bias
    logits = head.norm(F.gelu(head.dense(small))) @ (words @ ours.small.projection.weight.T).T + bias
    mlm = F.cross_entropy(logits, inputs.targets.flatten())
    head = ours.head
    hidden = head.norm(F.gelu(head.dense(ours.encoder(filled).flatten(0, 1))))
    replaced, offset = (filled != inputs.original).flatten(), 0.0
    if inputs.judged is not None:
        judged = (inputs.judged + 16 * torch.arange(4)[:, None]).flatten()
        hidden, replaced = hidden[judged], replaced[judged]
        offset = math.log((inputs.judged.shape[1] - 6) / (16 - 6))  # the fraction of the unmasked tokens
    nota, nota_bias = (words[:1], head.bias[:1]) if head.none is None else (head.none.weight, head.none.bias)
    rows = torch.cat([words[ids], nota.expand(len(ids), 1, -1)], 1)
    scores = (rows * hidden[:, None]).sum(-1) + torch.cat([head.bias[ids], nota_bias.expand(len(ids), 1) + offset], 1)
    choice = F.cross_entropy(scores, answers)
    torch.testing.assert_close(sums["mlm"] / inputs.counts["mlm"], mlm, rtol=1e-10, atol=0)
    torch.testing.assert_close(sums["choice"] / inputs.counts["choice"], choice, rtol=1e-10, atol=0)

    # No gradient of the choice in the meta controller, except in the embedding (and the bias) that both use.
    shared = {"encoder.words.weight"} | ({"head.bias"} if ours.options.shared_bias else set())
    for name, loss in (("mlm", mlm), ("choice", choice)):
        found = torch.autograd.grad(
            sums[name] / inputs.counts[name], parameters.values(), None, True, allow_unused=True
        )
        plain = torch.autograd.grad(loss, parameters.values(), None, True, allow_unused=True)
        for key, a, b in zip(parameters, found, plain, strict=True):
            other = key.startswith("small" if name == "choice" else ("encoder.", "head."))
            assert (a is None) == (b is None) == (other and key not in shared)
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)

    # Detecting that the word was replaced, and choosing it given that.
    log_odds = scores[:, :-1].logsumexp(1) - scores[:, -1]
    detection = F.binary_cross_entropy_with_logits(log_odds, replaced.double())
    choosing = F.cross_entropy(scores[replaced][:, :-1], answers[replaced])
    for name, value, count in (("detection", detection, len(replaced)), ("choosing", choosing, replaced.sum())):
        total, number = sums[f"{name}_loss"]
        torch.testing.assert_close(total / number, value, rtol=1e-9, atol=0)
        assert number == count
    parts = sums["detection_loss"][0] + sums["choosing_loss"][0]
    torch.testing.assert_close(parts, sums["choice"], rtol=1e-14, atol=0)

    chosen = torch.cat([ids, torch.full_like(ids[:, :1], -1)], 1).gather(1, scores.argmax(1, keepdim=True))[:, 0]
    right = torch.where(replaced, chosen == ids[:, -1], chosen == -1)
    assert sums["replaced"] == (replaced.sum(), 64)
    assert sums["accuracy_replaced"] == ((right & replaced).sum(), replaced.sum())
    assert sums["accuracy_original"] == ((right & ~replaced).sum(), (~replaced).sum())
    p = logits.softmax(-1)
    torch.testing.assert_close(sums["entropy"][0], -(p * p.log()).sum())

    if inputs.judged is None:
        replaced_p, best = ours.predictions(inputs)[1:]
        torch.testing.assert_close(replaced_p.flatten(), 1 - scores.softmax(-1)[:, -1])
        assert torch.equal(best.flatten(), ids.gather(1, scores[:, :-1].argmax(1, keepdim=True))[:, 0])


def test_every_copy_of_the_right_word_is_right() -> None:
    objective = build("multiple-choice", options=options(with_replacement=True))
    inputs = objective.sample(batch(), 0, 0)
    with torch.no_grad():
        objective.head.none.bias -= 100.0  # a word is chosen everywhere
    copies = inputs.original.flatten()[:, None].expand(-1, 4)
    objective.candidates = lambda inputs, filled, hidden: (copies, 4 - (filled != inputs.original).flatten().long())
    sums = objective(inputs)
    assert sums["accuracy_replaced"][0] == sums["accuracy_replaced"][1] > 0 == sums["accuracy_original"][0]


def test_all_masked_tokens_and_a_uniform_fraction_of_the_others_are_judged() -> None:
    objective = build("multiple-choice", options=options(unmasked_fraction=0.3))
    times = torch.zeros(16)
    for step in range(20):
        rows = batch(32)
        rows.input_ids[::4, 3:] = 3  # two words, fewer than the six masked positions
        inputs = objective.sample(rows, 0, step)
        judged, count = inputs.judged, 6 + 3
        assert judged.shape == (32, count) and (judged[:, 1:] > judged[:, :-1]).all()
        assert inputs.counts["choice"] == 32 * count
        assert objective.flops(32, 16) < build("multiple-choice", options=options()).flops(32, 16)
        masked = torch.zeros(32, 16, dtype=torch.bool)
        masked.scatter_(1, inputs.positions, inputs.targets != -100)
        chosen = torch.zeros_like(masked).scatter(1, judged, True)
        assert (chosen | ~masked).all()
        times += (chosen & ~masked).sum(0) / (~masked).sum(0)
    # With whole words, 26 of 64 are masked, and for a part of the rows up to 33.
    whole = build("multiple-choice", options=options(unmasked_fraction=0.3, whole_word=True))
    assert whole.judged_count(64) == objective.judged_count(64) == 26 + 11
    whole.options = replace(whole.options, unmasked_fraction=0.01)
    assert whole.judged_count(64) == 33 + 1
    rest = times[3:] / 20  # nine tokens judged: seven of the fourteen others, or three of ten
    assert ((rest > 0.25) & (rest < 0.45)).all()
    assert torch.equal(objective.sample(rows, 0, 19).judged, inputs.judged)
    assert not torch.equal(objective.sample(rows, 1, 19).judged, inputs.judged)
    # A validation, examples and scores are of all tokens.
    inputs = objective.eval().sample(rows, 0, 0, "validation-mask")
    assert inputs.judged is None and inputs.counts["choice"] == rows.input_ids.numel()
    assert objective.original_log_odds(rows.input_ids).shape == rows.input_ids.shape


@pytest.mark.parametrize("whole_word", [False, True])
def test_odds_are_those_of_all_tokens(whole_word: bool) -> None:
    """With constant scores and no sample that equals the word, the best odds are the frequencies among all tokens, also
    if only a part of the masked positions is used."""
    given = options(unmasked_fraction=0.3, whole_word=whole_word)
    objective = build("multiple-choice", options=given).double()
    rows = batch()
    rows.input_ids[rows.input_ids == 7] = 8
    with torch.no_grad():
        objective.small_head.bias[7] = 100.0  # every sample is w7, which is no word of the rows
        objective.head.norm.weight.zero_()
        objective.head.none.bias[0] = math.log(4) + math.log(10 / 6)  # four words; six of sixteen tokens are masked
    objective(objective.sample(rows, 0, 0))["choice"].backward()
    assert objective.head.none.bias.grad.abs() < 1e-12


def test_no_hidden_state_depends_on_the_row_of_nota() -> None:
    """Neither of a training row nor of real tokens next to padding, so that an export is the same with it."""
    objective = build("multiple-choice", options=options(nota_embedding=True)).eval()
    assert objective.head.nota_id == VOCABULARY.ids["[PAD]"]
    ids = batch().input_ids.clone()
    ids[:, 12:] = 0
    padding = ids != 0
    before = objective.encoder(ids, attention_mask=padding)
    with torch.no_grad():
        objective.encoder.words.weight[0] += 5.0
    torch.testing.assert_close(objective.encoder(ids, attention_mask=padding)[:, :12], before[:, :12])


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
    for changes in (
        {"choices": 1},
        {"controller_width": 0},
        {"controller_layers": 0},
        {"loss_weight": -1.0},
        {"unmasked_fraction": 0.0},
    ):
        with pytest.raises(UserError, match=f"^{next(iter(changes))} must"):
            MultipleChoiceOptions(**changes)
    with pytest.raises(UserError, match="choices 36 is more than the 35 words"):
        build("multiple-choice", options=options(choices=36))
    few = WordPiece(VOCABULARY.tokens[:9])
    with pytest.raises(UserError, match="more than the 4 words"):
        build("multiple-choice", options=options(), vocabulary=few)


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_flops_count_the_contexts_of_notes_where_tokens_are_skipped(fraction: float) -> None:
    objective = build("multiple-choice", options=options(unmasked_fraction=fraction))
    without = objective.flops(8, 16)
    objective.notes = notes = NoteDictionary(
        NoteDictionaryOptions(half_window=2), 3, 32, 0, NoteFrequencies(0.01, 0.01, 0.02)
    )
    contexts = notes.context_flops(objective.config, 8, 16) if fraction < 1 else 0
    assert objective.flops(8, 16) - without - notes.flops(8 * 16) == contexts >= 0
