"""The dictionary against one written out by hand in float64, and what must not change where notes do nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastbert.data.batches import Batch, PackedRows, TrainingBatches
from fastbert.data.note_words import PIECES, NoteWords
from fastbert.data.rare import RareWords
from fastbert.data.stages import BatchPlan
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.model.encoder import Encoder, initialize
from fastbert.model.flops import TRAINING, encoder_flops, mlm_head_flops, query_flops
from fastbert.model.kernel_choice import KERNELS
from fastbert.model.note_dictionary import NoteDictionary
from fastbert.model.options import EncoderOptions, NoteDictionaryOptions
from fastbert.objectives.masking import mask_count
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions

CPU = torch.device("cpu")
PLAIN, CONTINUING = 8, 4
VOCABULARY = WordPiece(
    (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{i}" for i in range(PLAIN)),
        *(f"##{i}" for i in range(CONTINUING)),
    )
)
V, CLS, SEP = len(VOCABULARY.tokens), 2, 3
T, ROWS, K = 16, 8, 3
NOTED = [(5,), (6, 13), (7, 13, 14), (8, 15), (9, 13)]


class Text:
    """2000 tokens of documents of 1 to 40 words, of which those of NOTED are listed."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        tokens, starts, occurrences = [], [], []
        while len(tokens) < 2000:
            starts.append(len(tokens))
            for _ in range(random.integers(1, 40)):
                word = NOTED[random.integers(len(NOTED))] if random.random() < 0.07 else (int(random.integers(10, 13)),)
                if word in NOTED:
                    occurrences.append((len(tokens), len(word), NOTED.index(word)))
                tokens += word
            tokens.append(SEP)
        self.tokens, self.documents = np.array(tokens), np.array(starts)
        self.occurrences = [np.array(column) for column in zip(*occurrences, strict=True)]

    def __len__(self) -> int:
        return len(self.tokens)

    def document_borders(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        borders = np.append(self.documents, len(self.tokens))
        after = np.searchsorted(borders, positions, side="right")
        return borders[after - 1], borders[after]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def rare(self, start: int, stop: int) -> RareWords:
        here = (self.occurrences[0] >= start) & (self.occurrences[0] < stop)
        return RareWords(*(column[here] for column in self.occurrences))


def batches(micro: int, document_mask: bool = False, half_window: int = K, rows: int = ROWS) -> TrainingBatches:
    text = Text()
    noted = NoteWords(text, np.arange(len(NOTED), dtype=np.int32), T, half_window)
    packed = PackedRows(text, T, CLS, SEP, document_mask, noted)
    return TrainingBatches({T: packed}, BatchPlan.constant(rows, T), micro, 3, CPU)


def build(options: NoteDictionaryOptions | None, dropout: float = 0.0, masks: MLMOptions | None = None) -> MLM:
    """TUPE: what its embedding norm is given are the words alone."""
    config = EncoderOptions(
        layers=1, width=16, heads=2, position="tupe-a", dropout=dropout, attention_dropout=dropout
    ).resolve(V, T)
    notes = NoteDictionary(options, len(NOTED), 16, 7) if options is not None else None
    objective = MLM(config, masks or MLMOptions(mask_rate=0.2), VOCABULARY, notes=notes)
    initialize(objective, 0, 0.3)
    return objective.double().train()


class Seen:
    """The encoder's input and output of each forward pass."""

    def __init__(self, objective: MLM) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        encoder = objective.encoder
        encoder.embedding_norm.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].detach().clone()))
        encoder.register_forward_hook(self.whole, with_kwargs=True)

    @torch.no_grad()
    def whole(self, encoder: Encoder, given: tuple, named: dict, _: Tensor) -> None:
        """The hidden states of all tokens, from a pass of its own."""
        self.outputs.append(encoder.forward(*given, **named | {"only": None, "windows": None}))
        self.inputs.pop()


def step(objective: MLM, parts: list[Batch], number: int, optimizer: torch.optim.Optimizer) -> tuple[list, dict]:
    """As the loop's."""
    inputs = [objective.sample(part, 5, number) for part in parts]
    count = sum(part.counts["mlm"] for part in inputs)
    for part in inputs:
        (objective(part)["mlm"] / count).backward()
    optimizer.step()
    measured = objective.after_step(inputs, torch.tensor(True))
    optimizer.zero_grad()
    return inputs, measured


def words_of(row: list[int]) -> list[tuple[int, int, int]]:
    """(first, stop, number) of the noted words of a row's ids."""
    found, index = [], 1
    while index < len(row):
        stop = index + 1
        while stop < len(row) and row[stop] >= 5 + PLAIN:
            stop += 1
        if tuple(row[index:stop]) in NOTED:
            found.append((index, stop, NOTED.index(tuple(row[index:stop]))))
        index = stop
    return found


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("micro", [8, 4, 2, 3])
def test_ten_steps_against_a_dictionary_written_by_hand(micro: int, leak: bool, document_mask: bool) -> None:
    options = NoteDictionaryOptions(half_window=K, gamma=0.3, mix=0.4, leak=leak)
    # With whole words, part of the masked positions are unused, but are those of words too.
    objective = build(options, dropout=0.1, masks=MLMOptions(mask_rate=0.2, whole_word=document_mask))
    optimizer = torch.optim.SGD(objective.parameters(), 0.3)
    seen = Seen(objective)
    theirs = {number: note.clone() for number, note in enumerate(objective.notes.table)}
    met: set[int] = set()
    again_within = again_across = hidden = at_border = 0
    whole_rows: set[bool] = set()
    for number in range(10):
        embedding = objective.encoder.words.weight.detach().clone()
        parts = list(batches(micro, document_mask).at(number))
        seen.inputs.clear(), seen.outputs.clear()
        inputs, measured = step(objective, parts, number, optimizer)
        contexts: dict[int, list[Tensor]] = {}
        got = 0
        for part, masked, used, output in zip(parts, inputs, seen.inputs, seen.outputs, strict=True):
            before = {word: len(found) for word, found in contexts.items()}
            expected = embedding[masked.input_ids]
            for row, ids in enumerate(part.input_ids.tolist()):
                chosen = masked.positions[row][masked.targets[row] != -100].tolist()
                for first, stop, word in words_of(ids):
                    # A word that continues in the next row is another word here; the text has none that begin NOTED.
                    window = list(range(first, stop))
                    while len(window) < stop - first + K and window[0] > 1 and ids[window[0] - 1] != SEP:
                        window.insert(0, window[0] - 1)
                    right = stop
                    while right < T and ids[right] != SEP and right - stop < K:
                        window.append(right)
                        right += 1
                    at_border += len(window) < stop - first + 2 * K
                    contexts.setdefault(word, []).append(output[row, window].mean(0))
                    if not leak and any(index in chosen for index in range(first, stop)):
                        hidden += 1
                        continue
                    for index in range(first, stop):
                        own, note = expected[row, index], theirs[word]
                        expected[row, index] = 0.6 * own + 0.4 * note * own.norm() / note.norm()
                        got += 1
            torch.testing.assert_close(used, expected, rtol=1e-11, atol=1e-12)
            again_across += sum(before[word] < len(contexts[word]) for word in before)
        again_within += sum(len(found) > 1 for found in contexts.values())
        drift, norm = [], []
        for word, found in contexts.items():
            new = 0.7 * theirs[word] + 0.3 * torch.stack(found).mean(0)
            drift.append((new - theirs[word]).norm())
            norm.append(new.norm())
            theirs[word] = new
        met |= contexts.keys()
        whole_rows |= {part.note_tokens.where.windows.whole_rows for part in inputs}
        torch.testing.assert_close(objective.notes.table, torch.stack([*theirs.values()]), rtol=1e-11, atol=1e-12)
        assert measured["notes_words"].item() == pytest.approx(len(met) / len(NOTED))
        assert measured["notes_tokens"].item() == pytest.approx(got / (ROWS * T))
        assert measured["notes_norm"].item() == pytest.approx(torch.stack(norm).mean().item())
        assert measured["notes_drift"].item() == pytest.approx(torch.stack(drift).mean().item())
    assert again_within and at_border and (hidden or leak) and (again_across or micro == ROWS)
    assert {micro == ROWS, False} <= whole_rows


def test_accumulation_changes_the_order_of_sums_only() -> None:
    tables = []
    for micro in (8, 4, 2):
        objective = build(NoteDictionaryOptions(half_window=K), dropout=0.1)
        optimizer = torch.optim.SGD(objective.parameters(), 0.3)
        for number in range(10):
            step(objective, list(batches(micro).at(number)), number, optimizer)
        tables.append(objective.notes.table)
    assert (tables[0] != build(NoteDictionaryOptions()).notes.table).all(1).all()
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tables[0], tables[2], rtol=1e-10, atol=1e-12)


def test_a_context_of_several_windows_is_one_mean(monkeypatch) -> None:
    tables = []
    for pieces in (4, 0):  # with 0 every whole context is longer than a window
        monkeypatch.setattr("fastbert.data.note_words.PIECES", pieces)
        objective = build(NoteDictionaryOptions(half_window=K))
        inputs, _ = step(objective, list(batches(8).at(0)), 0, torch.optim.SGD(objective.parameters(), 0.3))
        tables.append(objective.notes.table)
        where = inputs[0].note_tokens.where.windows
        assert (where.lengths < where.totals)[where.lengths > 0].any() == (pieces == 0)
    torch.testing.assert_close(*tables, rtol=1e-11, atol=1e-12)


def test_a_step_reads_what_stood_there_at_its_start() -> None:
    """Nothing is written between the micro-batches, nor if the update was skipped, nor outside training."""
    objective = build(NoteDictionaryOptions())
    before = {name: tensor.clone() for name, tensor in objective.notes.state_dict().items()}
    inputs = [objective.sample(part, 0, 0) for part in batches(2).at(0)]
    for part in inputs:
        objective(part)
    objective.eval()
    for part in batches(2).at(1):
        objective(objective.sample(part, 0, 0, "validation-mask"))
    inputs[0].note_tokens.contexts[:] = float("nan")  # as a step that is skipped may have it
    assert objective.after_step(inputs, torch.tensor(False))["notes_drift"] == 0
    for name, tensor in objective.notes.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_validation_reads_notes() -> None:
    objective = build(NoteDictionaryOptions()).eval()
    inputs = objective.sample(next(iter(batches(8).at(0))), 0, 0, "validation-mask")
    first = objective(inputs)["mlm"]
    objective.notes.table.normal_()
    assert objective(inputs)["mlm"] != first


def test_no_gradient_reaches_the_dictionary() -> None:
    objective = build(NoteDictionaryOptions())
    assert not any("notes" in name for name, _ in objective.named_parameters())
    assert not any(buffer.requires_grad for buffer in objective.notes.buffers())
    inputs = objective.sample(next(iter(batches(8).at(0))), 0, 0)
    objective(inputs)["mlm"].backward()
    assert not inputs.note_tokens.contexts.requires_grad and objective.notes.table.grad is None


def test_the_gradient_is_that_of_the_mixture() -> None:
    """(1 - lambda) at a piece with a note, as it is elsewhere; the norm that scales the note is a constant."""
    objective = build(NoteDictionaryOptions(mix=0.25, leak=True))
    inputs = objective.sample(next(iter(batches(8).at(0))), 0, 0)
    words = torch.randn(ROWS, T, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(words)
    (inputs.note_tokens.edit(words) * weight).sum().backward()
    factor = torch.ones(ROWS * T, 1, dtype=torch.float64)
    factor[inputs.note_tokens.where.tokens[inputs.note_tokens.shown[:, 0]]] = 0.75
    torch.testing.assert_close(words.grad, weight * factor.view(ROWS, T, 1), rtol=1e-12, atol=0)
    assert 0 < (factor < 1).sum() < ROWS * T / 2


def test_no_weight_is_no_notes_to_the_bit() -> None:
    """Over ten steps in float32: losses, weights; the dictionary is written all the same."""
    runs = []
    for options in (None, NoteDictionaryOptions(mix=0.0)):
        objective = build(options, dropout=0.1).float()
        optimizer = torch.optim.AdamW(objective.parameters(), 1e-2)
        for number in range(10):
            step(objective, list(batches(4).at(number)), number, optimizer)
        runs.append(objective)
    assert all(torch.equal(a, b) for a, b in zip(*(run.parameters() for run in runs), strict=True))
    assert runs[1].notes.writes.sum() > 10


@pytest.mark.parametrize(
    "changes",
    [{"half_window": 1}, {"gamma": 0.5}, {"mix": 0.9}, {"initial_std": 1.0}, {"initial_std": 0.0}, {"leak": True}],
)
def test_each_option_changes_the_training(changes: dict) -> None:
    losses = []
    for options in (NoteDictionaryOptions(half_window=K), NoteDictionaryOptions(**{"half_window": K, **changes})):
        objective = build(options)
        optimizer = torch.optim.SGD(objective.parameters(), 0.3)
        for number in range(2):
            inputs, _ = step(objective, list(batches(8, half_window=options.half_window).at(number)), number, optimizer)
        losses.append(objective(inputs[0])["mlm"].item())
    assert losses[0] != losses[1]


def test_initial_notes() -> None:
    options = NoteDictionaryOptions(initial_std=0.5)
    tables = [NoteDictionary(options, 400, 100, seed).table for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert tables[0].std().item() == pytest.approx(0.5, rel=0.02) and abs(tables[0].mean().item()) < 0.01
    assert not NoteDictionary(NoteDictionaryOptions(initial_std=0.0), 4, 100, 0).table.any()


def test_zero_notes_are_read_without_a_division_by_zero() -> None:
    objective = build(NoteDictionaryOptions(initial_std=0.0, leak=True))
    inputs = objective.sample(next(iter(batches(8).at(0))), 0, 0)
    words = torch.zeros(ROWS, T, 16, dtype=torch.float64)
    assert torch.equal(inputs.note_tokens.edit(words), words)
    edited = inputs.note_tokens.edit(words + 1)
    assert set(edited.unique().tolist()) == {0.5, 1.0}


@pytest.mark.parametrize("whole_word", [False, True])
def test_products_are_those_that_torch_counts(whole_word: bool) -> None:
    """Those of the last block for the contexts among them, once forward; all others of notes are sums."""
    objective = build(NoteDictionaryOptions(half_window=K), masks=MLMOptions(mask_rate=0.2, whole_word=whole_word))
    objective.notes = dictionary()
    objective.encoder.kernels = KERNELS["reference"]  # torch cannot look into operators of our own
    others = objective.flops(ROWS, T) - objective.notes.context_flops(objective.config, ROWS, T)
    block = encoder_flops(objective.config, 9, T) - encoder_flops(objective.config, 1, T)  # of all tokens
    size, found = 2 * K + PIECES, set()
    for number in range(10):
        inputs = objective.sample(next(iter(batches(8).at(number))), 0, number)
        with FlopCounterMode(display=False) as counter:
            objective(inputs)["mlm"].backward()
        assert inputs.note_tokens.contexts.abs().sum() > 0
        contexts = counter.get_total_flops() - others + objective.notes.flops(ROWS * T)
        windows = inputs.note_tokens.where.windows
        expected = len(windows.firsts) * query_flops(objective.config, T, size)
        assert contexts == (block if windows.whole_rows else expected)
        found.add(windows.whole_rows)
    assert found == {False, True}


def test_flops_of_contexts_are_those_of_the_average_batch() -> None:
    config, rows, size = build(None).config, 24, 2 * K + PIECES
    block = encoder_flops(config, rows + 1, T) - encoder_flops(config, 1, T)
    found = []
    for batch in (next(iter(batches(rows, rows=rows).at(number))) for number in range(200)):
        windows = batch.noted.windows
        found.append(block if windows.whole_rows else len(windows.firsts) * query_flops(config, T, size))
    assert len(set(found)) > 1
    assert dictionary().context_flops(config, rows, T) == pytest.approx(np.mean(found), rel=0.05)


def dictionary() -> NoteDictionary:
    """A dictionary with the frequencies of the text."""
    frequencies = batches(8).rows[T].noted.frequencies
    return NoteDictionary(NoteDictionaryOptions(half_window=K), len(NOTED), 16, 0, frequencies)


def test_few_programs_are_compiled_for_any_number_of_occurrences() -> None:
    """The numbers of windows are 24, 32, or that of whole rows; the last two are the variable and the last program."""
    torch.compiler.reset()
    objective = build(NoteDictionaryOptions(half_window=K))
    objective.encoder.kernels = KERNELS["reference"]
    programs, sizes, after = [], [], []

    def backend(graph, inputs):
        programs.append(graph)
        return graph

    objective.encoder.blocks[0].compile(backend=backend)
    for number in range(16):
        inputs = objective.sample(next(iter(batches(24, rows=24).at(number))), 0, number)
        where = inputs.note_tokens.where
        if number in (6, 12):  # as with more occurrences than the largest number
            inputs.note_tokens.where = replace(where, windows=replace(where.windows, whole_rows=True))
        objective(inputs)["mlm"].backward()
        sizes.append("rows" if number in (6, 12) else len(where.windows.firsts))
        after.append(len(programs))
    assert set(sizes[:6]) == {24, 32}
    assert after[6:] == [4] * 10  # of the masked positions, of 24 windows, of any number, of whole rows


def test_flops_are_those_of_the_text() -> None:
    """The mean over the text, borders of windows left out."""
    rows = batches(8).rows[T]
    noted, tokens = rows.noted, len(rows) * T
    notes = dictionary()
    every = noted.read(np.arange(len(rows)), noted.step_words(np.arange(len(rows))))
    whole = (every.lengths + 2 * K)[every.lengths > 0].sum().item()
    assert every.windows.lengths.sum() < whole
    expected = 2 * 16 * (whole + 3 * noted.index.tokens + 2 * len(noted.index.positions))
    assert notes.flops(tokens) == pytest.approx(expected, rel=1e-6) and expected > 0
    plain, objective = build(None), build(NoteDictionaryOptions())
    objective.notes = notes
    masked = mask_count(T, plain.options.mask_rate)
    assert plain.flops(8, T) == TRAINING * (
        encoder_flops(plain.config, 8, T, last=masked) + mlm_head_flops(plain.config, 8 * masked)
    )
    contexts = notes.context_flops(plain.config, 8, T)
    assert objective.flops(8, T) - plain.flops(8, T) - contexts == notes.flops(8 * T) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"half_window": -1},
        {"gamma": 0.0},
        {"gamma": 1.5},
        {"mix": -0.1},
        {"fraction": 0.0},
        {"min_count": 0},
        {"min_count": 9, "max_count": 8},
        {"initial_std": -1.0},
    ],
)
def test_options_out_of_range(changes: dict) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(changes))} must"):
        NoteDictionaryOptions(**changes)
