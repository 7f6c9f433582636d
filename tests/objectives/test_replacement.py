"""What both objectives of two networks promise: sharing, counting, micro-batches, randomness, and that they learn."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.data.batches import documents_of
from fastbert.data.tokenizer import WordPiece
from fastbert.model.encoder import Windows
from fastbert.model.kernel_choice import KERNELS
from fastbert.model.positions import POSITIONS
from fastbert.pretraining.evaluation import evaluate
from fastbert.pretraining.finish import summary_lines
from fastbert.randomness import row_keys
from tests.objectives.conftest import OPTIONS, V, batch, build, loss_of
from tests.pretraining.test_loop import NoWaiting

OBJECTIVES = list(OPTIONS)
FURTHER = {"multiple-choice": dict(unmasked_fraction=0.5, shared_bias=True, nota_embedding=True, with_replacement=True)}
"""Options of an objective that are off by default."""
WITH_FURTHER = [(name, {}) for name in OBJECTIVES] + list(FURTHER.items())


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize(("norm", "bias"), [("post", True), ("pre", True), ("pre", False)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parameters_are_shared_and_counted_once(name: str, norm: str, bias: bool, position: str) -> None:
    objective = build(name, position, norm=norm, bias=bias)
    tensors = {p.data_ptr(): p for _, p in objective.named_parameters(remove_duplicate=False)}
    assert objective.parameter_count() == sum(p.numel() for p in tensors.values())
    assert objective.small.words is objective.encoder.words
    shared = {n for n, p in objective.encoder.named_parameters() for q in objective.small.parameters() if p is q}
    embeddings = {"words.weight"}
    if name == "electra":
        embeddings |= {"embedding_norm.weight", "embedding_norm.bias"} if bias else {"embedding_norm.weight"}
        embeddings |= {"types.weight"} if objective.encoder.types is not None else set()
        embeddings |= {"positions.table.weight"} if position in ("absolute", "relative") else set()
    assert shared == embeddings
    # Words of the main network come first, under the name they have with every objective.
    assert "encoder.words.weight" in dict(objective.named_parameters())


@pytest.mark.parametrize("scale", ["small", "equal"])
@pytest.mark.parametrize(("position", "inner"), [("absolute", "gelu"), ("tupe-r", "gelu"), ("rope", "geglu")])
@pytest.mark.parametrize(("name", "further"), WITH_FURTHER)
def test_flops_are_those_that_torch_counts(name: str, further: dict, position: str, inner: str, scale: str) -> None:
    words = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(251))))
    equal = {"electra": {"generator_scale": 1.0}, "multiple-choice": {"controller_width": 32}}[name]
    options = OPTIONS[name](whole_word=position == "rope", **(equal if scale == "equal" else {}), **further)
    objective = build(name, position, options=options, vocabulary=words, vocab_size=256, feed_forward=inner)
    objective.encoder.kernels = KERNELS["reference"]  # torch cannot look into operators of our own
    inputs = objective.sample(batch(), 0, 0)
    with FlopCounterMode(display=False) as counter:
        loss_of(objective, inputs).backward()
    # The candidates' scores are multiplied once more for each of two gradients, in embedding bags that it cannot count.
    judged = 0 if name == "electra" else 16 if inputs.judged is None else inputs.judged.shape[1]
    assert bool(further) == (0 < judged < 16)
    bags = 2 * 2 * 4 * judged * 9 * 32
    assert counter.get_total_flops() + bags == objective.flops(4, 16)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [[1, 3], [2, 2], [1, 1, 1, 1]])
@pytest.mark.parametrize(("name", "further"), WITH_FURTHER)
def test_micro_batches_add_up_to_the_large_batch(name: str, further: dict, sizes: list[int], dropout: float) -> None:
    """The same samples and candidates, and so the same gradients and measures, even where rows have unequal masks."""
    results = []
    for split in ([4], sizes):
        objective = build(name, "tupe-r", dropout, OPTIONS[name](mask_rate=0.3, **further)).double()
        inputs, first = [], 0
        for rows in split:
            part = batch(rows, first_row=first)
            part.input_ids[part.row_indices == 2, 3:] = 3  # a row with two words only
            inputs.append(objective.sample(part, seed=5, step=7))
            first += rows
        counts = {key: sum(part.counts[key] for part in inputs) for key in objective.loss_weights}
        for part in inputs:
            sums = objective(part)
            sum(weight * sums[key] / counts[key] for key, weight in objective.loss_weights.items()).backward()
        measured = objective.after_step(inputs, torch.tensor(True))
        results.append(([p.grad for p in objective.parameters()], measured))
    for whole, parts in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])
    assert 0 < results[0][1]["replaced"] < 1 and 3 < results[0][1]["entropy"] < 3.7


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_depend_on_seed_step_and_row(name: str) -> None:
    objective = build(name, options=OPTIONS[name](mask_rate=0.5)).eval()

    def filled(seed: int = 0, step: int = 0, first: int = 0) -> torch.Tensor:
        rows = batch(4, first_row=first)
        rows.input_ids[:] = batch(1).input_ids  # equal rows: what differs is inputs
        return objective.predictions(objective.sample(rows, seed, step))[0]

    assert torch.equal(filled(), filled())
    for other in (filled(seed=1), filled(step=1), filled(first=4)):
        assert not torch.equal(filled(), other)
    assert not torch.equal(filled()[0], filled()[1])


@pytest.mark.parametrize("name", ["mlm", *OBJECTIVES])
def test_every_key_is_of_its_seed_step_row_and_purpose(name: str) -> None:
    """No two of them are equal, so no mask, sample or dropout of one repeats another's."""
    objective = build(name, dropout=0.1)
    found = []
    for seed, step, first in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 4)):
        rows = batch(4, first_row=first)
        inputs = objective.sample(rows, seed, step)
        keys = [value for field, value in vars(inputs).items() if field.endswith("_keys")]
        found += [*keys, row_keys(seed, "mask", step, rows.row_indices)]
    assert len(found) == 4 * (2 if name == "mlm" else 4)
    assert torch.cat(found).unique().numel() == 4 * len(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_main_loss_gets_no_graph_of_the_generator(name: str) -> None:
    """What the main loss and the sampling read of the generator carries no gradient, not even zero."""
    objective = build(name)
    tracked = []

    def sampler(real):
        return lambda *given, **named: tracked.append(torch.is_grad_enabled()) or real(*given, **named)

    def main_loss(inputs, filled: torch.Tensor, generator_hidden: torch.Tensor):
        tracked.append(generator_hidden.requires_grad)
        return real(inputs, filled, generator_hidden)

    kernels = objective.encoder.kernels
    sampling = {key: sampler(getattr(kernels, key)) for key in ("sample_distinct", "sample_candidates")}
    objective.encoder.kernels = replace(kernels, **sampling)
    real, objective.main_loss = objective.main_loss, main_loss
    objective(objective.sample(batch(), 0, 0))[objective.main].backward()
    assert tracked == [False] * (2 if name == "electra" else 3)
    main = {id(p) for p in (*objective.encoder.parameters(), *objective.head.parameters())}
    assert all(p.grad is None for p in objective.parameters() if id(p) not in main)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_flows_through_the_sampling(name: str) -> None:
    """The encoder's loss has no gradient in the generator, and the generator's loss none in the encoder."""
    objective = build(name)
    main_only = {id(p) for p in (*objective.encoder.parameters(), *objective.head.parameters())}
    small_only = {id(p) for p in (*objective.small.parameters(), *objective.small_head.parameters())}
    shared = main_only & small_only
    for key, reached in ((objective.main, main_only), ("mlm", small_only)):
        objective.zero_grad()
        objective(objective.sample(batch(), 0, 0))[key].backward()
        got = {id(p) for p in objective.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert got <= reached and shared & got and got - shared


@pytest.mark.parametrize("name", OBJECTIVES)
def test_validation_masks_everything_and_drops_nothing(name: str) -> None:
    objective = build(name, dropout=0.1, options=OPTIONS[name](mask_token_fraction=0.0)).eval()
    inputs = objective.sample(batch(), 0, 0, "validation-mask")
    assert inputs.dropout_keys is None and inputs.generator_dropout_keys is None
    assert (inputs.input_ids.gather(1, inputs.positions) == 4).all()
    assert torch.equal(objective(inputs)["mlm"], objective(inputs)["mlm"])
    inputs = objective.train().sample(batch(), 0, 0)
    assert (inputs.input_ids != 4).all() and torch.equal(inputs.input_ids, inputs.original)
    # Each network drops by keys of its own.
    assert not torch.equal(inputs.dropout_keys, inputs.generator_dropout_keys)
    networks = {
        "generator_dropout_keys": objective.generator_hidden,
        "dropout_keys": lambda d: objective.encode(d, d.original),
    }
    for own, network in networks.items():
        for keys in networks:
            same = torch.equal(network(inputs), network(replace(inputs, **{keys: None})))
            assert same == (keys != own)


@pytest.mark.parametrize(("name", "fraction"), [("electra", 0.85), ("multiple-choice", 1.0)])
def test_masked_tokens_that_show_the_mask(name: str, fraction: float) -> None:
    inputs = build(name, options=OPTIONS[name](mask_rate=0.5)).sample(batch(64), 0, 0)
    shown = inputs.input_ids.gather(1, inputs.positions)
    assert (shown == 4).float().mean() == pytest.approx(fraction, abs=0.05 if fraction < 1 else 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_special_tokens_stay_where_a_row_has_fewer_words_than_masked_positions(name: str) -> None:
    objective = build(name, options=OPTIONS[name](mask_rate=0.9))
    rows = batch()
    rows.input_ids[:, 3:] = 3
    inputs = objective.sample(rows, 0, 0)
    filled = objective.predictions(inputs)[0]
    assert (filled[:, 3:] == 3).all() and (filled[:, 0] == 2).all()
    assert (filled[:, 1:3] != inputs.original[:, 1:3]).any()
    assert inputs.counts["mlm"] == 8 and inputs.counts[objective.main] == 64


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_document_mask_reaches_both_networks(name: str) -> None:
    """What stands in another document changes nothing in this one, in neither network; positions are the document's."""
    objective = build(name).eval()
    rows = batch(2)
    rows.input_ids[:, 8] = 3
    documents, positions = documents_of(rows.input_ids, 3)
    inputs = objective.sample(replace(rows, document_ids=documents, position_ids=positions), 0, 0)
    other = inputs.original.clone()
    other[:, 9:] = 5
    running = replace(inputs, position_ids=None)  # positions that do not start again
    for hidden in (
        lambda inputs, ids: objective.generator_hidden(replace(inputs, input_ids=ids)),
        lambda inputs, ids: objective.encode(inputs, ids),
    ):
        whole = hidden(inputs, inputs.original)
        for changed in (hidden(inputs, other), hidden(running, inputs.original)):
            torch.testing.assert_close(whole[:, :9], changed[:, :9])
            assert (whole[:, 9:] - changed[:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_networks_read_notes_and_the_main_one_writes_them(name: str) -> None:
    """With a stand-in for `NoteTokens`: words are edited at the encoder's width, also for a narrower generator."""

    class Shifted:
        widths, collected = [], []

        def edit(self, words: torch.Tensor) -> torch.Tensor:
            self.widths.append(words.shape[-1])
            return words.roll(1, 1)

        @property
        def windows(self) -> Windows:
            tokens = torch.arange(6).view(2, 3)
            return Windows(torch.tensor([3, 1]), tokens, False, lambda hidden: self.collected.append(hidden.shape))

    objective = build(name, "tupe-a")
    inputs = objective.sample(batch(), 0, 0)
    with_notes = replace(inputs, note_tokens=Shifted())
    for network in (objective.generator_hidden, lambda given: objective.encode(given, given.original)):
        assert (network(inputs) - network(with_notes)).abs().max() > 1e-3
    assert Shifted.widths == [32, 32] and Shifted.collected == [(2, 3, 32)]
    objective.eval().encode(with_notes, with_notes.original)
    assert len(Shifted.widths) == 3 and len(Shifted.collected) == 1  # a validation reads them alone


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_validation_has_the_weights_of_the_losses_and_leaves_the_mode(name: str) -> None:
    objective = build(name, options=OPTIONS[name](loss_weight=3.0))
    seen = []
    for training in (True, False):
        found = evaluate(objective.train(training), [batch(3), batch(1, first_row=3)], "fp32")
        main = found[f"{objective.main}_loss"]
        assert found["loss"] == pytest.approx(found["mlm_loss"] + 3.0 * main) and main > 0.1
        assert all(module.training == training for module in objective.modules())
        seen.append(found)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chance_is_the_loss_of_the_best_constant_guess(name: str) -> None:
    objective = build(name, options=OPTIONS[name](mask_rate=0.3))
    replaced = evaluate(objective, [batch(8)], "fp32")["replaced"]
    for parameter in objective.head.parameters():
        parameter.data.zero_()
    odds = math.log(replaced / (1 - replaced))
    if name == "electra":
        objective.head.output.bias.data.fill_(odds)
    else:
        objective.head.none.bias.data.fill_(math.log(objective.options.choices - 1) - odds)
    metrics = objective.metrics(evaluate(objective, [batch(8)], "fp32"))
    known = {metric.label: metric for metric in metrics if metric.chance is not None}
    assert (
        known.keys()
        == {"electra": {"rtd loss"}, "multiple-choice": {"choice loss", "detection loss", "choosing loss"}}[name]
    )
    for label, metric in known.items():
        assert metric.value == pytest.approx(metric.chance, rel=1e-5)
        line = next(line for line in summary_lines(metrics, 5.0) if label in line)
        assert line.endswith(f"{metric.value:.3f} nats   (chance: {metric.chance:.3f})")
    assert [metric.label for metric in metrics if metric.words] == [objective.second_network]


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize(("name", "further"), WITH_FURTHER)
def test_a_step_waits_for_nothing(name: str, further: dict, whole_word: bool) -> None:
    words = WordPiece(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(V - 6)), "##x"))
    options = OPTIONS[name](whole_word=whole_word, **further)
    objective = build(name, "tupe-r", 0.1, options=options, vocabulary=words)
    rows = batch()
    with NoWaiting():
        inputs = objective.sample(rows, 0, 0)
        loss_of(objective, inputs).backward()
        measured = objective.after_step([inputs], torch.tensor(True))
    others = {"accuracy_replaced", "accuracy_original"}
    others |= {"detection_loss", "choosing_loss"} if name == "multiple-choice" else set()
    assert measured.keys() == {"mlm_loss", f"{objective.main}_loss", "replaced", "entropy"} | others


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_change_what_is_learned(name: str) -> None:
    default = build(name)
    assert masks(default) == 8 and masks(build(name, options=OPTIONS[name](mask_rate=0.5))) == 32
    weight = build(name, options=OPTIONS[name](loss_weight=3.0))
    assert weight.loss_weights == {"mlm": 1.0, weight.main: 3.0}
    assert default.loss_weights == {"mlm": 1.0, default.main: {"electra": 50.0, "multiple-choice": 20.0}[name]}


def masks(objective) -> int:
    return objective.sample(batch(), 0, 0).positions.numel()
