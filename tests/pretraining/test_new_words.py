"""`--init-from` with data whose tokenizer has further words, and `--optimizer.keep`: rows, moments, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fastbert.config import from_dict
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import open_dataset
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.hub.export import export_model
from fastbert.model.config import EncoderConfig
from fastbert.objectives import OBJECTIVES
from fastbert.objectives.mlm import MLM
from fastbert.objectives.options import MLMOptions
from fastbert.pretraining.initial import keep_moments
from fastbert.pretraining.options import PretrainOptions
from fastbert.training.checkpoints import read_checkpoint
from fastbert.training.optimizer_state import flatten_optimizer
from fastbert.training.world import ONE_PROCESS
from tests.flags import main
from tests.pretraining.short_runs import short_options, short_run, short_setup, write_moments
from tests.ranks import output_of, run_ranks

NEW = ("legislature", "##nesses", "東京")
SIZES = {"layers": 2, "width": 32, "heads": 2, "position": "absolute"}
OPTIONS = {
    "mlm": {},
    "electra": {"objective": "electra"},
    "multiple-choice": {"objective": "multiple-choice"},
    "shared bias": {"objective": "multiple-choice", "multiple_choice": {"shared_bias": True, "nota_embedding": True}},
}


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory) -> Callable[[str], Path]:
    """Name in OPTIONS -> a run of three steps with these options."""
    folder = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        out = folder / name
        return out if out.exists() else short_run(out, prepared, **SIZES, **OPTIONS[name])

    return made


@pytest.fixture(scope="module")
def grown(prepared: Path, corpus: Path, tmp_path_factory) -> Path:
    """The corpus with a tokenizer that has three further words."""
    folder, old = tmp_path_factory.mktemp("grown"), load_tokenizer(prepared)
    assert not set(NEW) & set(old.tokens)
    replace(old, tokens=(*old.tokens, *NEW)).save(folder / "tokenizer")
    return prepare(
        PrepareOptions(str(corpus), str(folder / "data"), tokenizer=str(folder / "tokenizer"), workers=1, seed=1)
    )


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "step-00000003").tensors["model"]


def expected_rows(weight: torch.Tensor, prepared: Path) -> list[torch.Tensor]:
    """The rows of NEW, from the pieces of transformers' tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    within = tokenizer.tokenize("1nesses")
    assert within[0] == "1" and within[1].startswith("##n") and tokenizer.tokenize("東京") == ["[UNK]", "[UNK]"]
    pieces = [tokenizer.tokenize("legislature"), within[1:]]
    assert min(map(len, pieces)) > 1
    rows = [weight[tokenizer.convert_tokens_to_ids(tokens)].double().mean(0) for tokens in pieces]
    return [row.to(weight.dtype) for row in (*rows, weight.double().mean(0))]


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_of_new_words_are_means_and_all_else_is_equal_to_the_bit(name, run, prepared, grown, capsys) -> None:
    model = run(name)
    capsys.readouterr()
    found = short_setup(grown, init_from=model, **OPTIONS[name]).objective().state_dict()
    printed = capsys.readouterr().err
    assert "newly initialized" not in printed
    assert "3 new rows of the word embedding" in printed and "for 1 entry with a character that it lacks" in printed
    before = weights_of(model)
    assert found.keys() == before.keys()
    grew = {key for key in found if found[key].shape != before[key].shape}
    for key, tensor in found.items():
        if key not in grew:
            assert torch.equal(tensor, before[key]), key
            continue
        assert torch.equal(tensor[:600], before[key]) and len(tensor) == 603
        for row, expected in zip(tensor[600:], expected_rows(before[key], prepared), strict=True):
            assert torch.equal(row, expected), key
    heads = {"mlm": "head.decoder.bias", "electra": "small_head.decoder.bias"}
    assert {"encoder.words.weight", heads.get(name, "small_head.bias")} <= grew


@pytest.mark.parametrize("name", OPTIONS)
def test_all_weights_with_a_row_for_each_word_are_declared(name, prepared) -> None:
    """Those whose shape depends on the vocabulary; of tied ones the name of the parameter."""
    options = from_dict(PretrainOptions, OPTIONS[name], "the test")
    shapes = []
    for size in (600, 601):
        config = EncoderConfig(vocab_size=size, layers=1, width=8, heads=1, ffn=16, max_positions=8)
        group = options.of_objective.resolve(config)
        objective = OBJECTIVES[options.objective](config, group, load_tokenizer(prepared))
        shapes.append({key: parameter.shape for key, parameter in objective.named_parameters()})
    depend = {key for key in shapes[0] if shapes[0][key] != shapes[1][key]}
    assert depend == {key for key in objective.word_rows if key in shapes[0]}
    assert set(objective.word_rows) - depend == ({"small_head.bias"} if name == "shared bias" else set())


@pytest.mark.parametrize("rows", [602, 640])
def test_unused_rows_of_a_model_are_used_first(rows, prepared, grown, tmp_path) -> None:
    """A model with 602 rows for 600 words has 603 afterwards; one with 640 has 37 unused rows as before."""
    load_tokenizer(prepared).save(tmp_path / "tokenizer")
    config = EncoderConfig(vocab_size=rows, layers=1, width=16, heads=2, ffn=16, max_positions=32)
    weights = MLM(config, MLMOptions(), load_tokenizer(prepared)).state_dict()
    weights["head.decoder.bias"].normal_()
    export_model(config, weights, tmp_path / "tokenizer", tmp_path / "model")
    setup = short_setup(grown, init_from=tmp_path / "model")
    assert setup.config.vocab_size == max(rows, 603)
    state = setup.objective().state_dict()
    for name in ("encoder.words.weight", "head.decoder.bias"):
        before, after = weights[name], state[name]
        assert torch.equal(after[:600], before[:600]) and torch.equal(after[603:], before[603:])
        assert torch.equal(after[600], expected_rows(before[:600], prepared)[0])


def test_the_export_of_a_grown_model_predicts_old_words_as_before(run, corpus, grown, tmp_path, monkeypatch) -> None:
    """The data is a source that is prepared with --tokenizer; at a rate of almost 0 no weight changes."""
    monkeypatch.chdir(tmp_path)
    start = str(run("mlm"))
    source = ["--data", str(corpus), "--tokenizer", str(grown), "--validation-fraction", "0.1"]
    flags = ["--length", "32", "--batch-size", "4", "--steps", "1", "--eval-sequences", "4"]
    flags += ["--optimizer.learning-rate", "1e-12", "--init-from", start, "--out", "run", "--machine.threads", "1"]
    assert main(["pretrain", *source, *flags]) == 0
    assert main(["export", start, "--out", "start"]) == 0
    models = [AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in ("start", "run/model")]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in ("start", "run/model")]
    assert [len(tokenizer) for tokenizer in tokenizers] == [600, 603]
    text = "the state of the [MASK] and its people"
    with torch.no_grad():
        before, after = (
            model(**tokenizer(text, return_tensors="pt")).logits
            for model, tokenizer in zip(models, tokenizers, strict=True)
        )
    assert after.shape[-1] == 603
    torch.testing.assert_close(after[..., :600], before, rtol=0, atol=1e-6)


def test_a_vocabulary_crosses_16_bits(prepared, corpus, tmp_path) -> None:
    old = load_tokenizer(prepared)
    large = replace(old, tokens=(*old.tokens, *(f"unused{n}" for n in range(2**16 - 600))))
    large.save(tmp_path / "tokenizer")
    config = EncoderConfig(vocab_size=2**16, layers=1, width=8, heads=1, ffn=8, max_positions=32)
    weights = MLM(config, MLMOptions(), large).state_dict()
    export_model(config, weights, tmp_path / "tokenizer", tmp_path / "model")
    replace(large, tokens=(*large.tokens, *NEW)).save(tmp_path / "grown")
    data = prepare(PrepareOptions(str(corpus), str(tmp_path / "data"), tokenizer=str(tmp_path / "grown"), workers=1))
    dataset = open_dataset(data)
    assert dataset.record["dtype"] == "uint32" and dataset.split("train").unigrams[2**16] > 0
    state = short_setup(data, init_from=tmp_path / "model").objective().state_dict()
    assert state["encoder.words.weight"].shape == (2**16 + 3, 8)
    assert torch.equal(state["encoder.words.weight"][: 2**16], weights["encoder.words.weight"])


def test_a_network_of_another_shape_is_new_as_a_whole(run, prepared, capsys) -> None:
    """Nothing of a generator of another width is copied; the discriminator is."""
    capsys.readouterr()
    wider = {"objective": "electra", "electra": {"generator_scale": 0.5}}
    found = short_setup(prepared, init_from=run("electra"), **wider).objective().state_dict()
    printed = capsys.readouterr().err
    new = printed.partition("newly initialized: ")[2].splitlines()[0].split(", ")
    assert (
        "small_head.dense.weight" in new
        and "small_head.decoder.bias" in new
        and "small.blocks.0.attention.qkv.weight" in new
    )
    assert all(name.startswith(("small.", "small_head.")) for name in new)
    before = weights_of(run("electra"))
    assert all(torch.equal(found[name], before[name]) for name in found if name.startswith(("encoder.", "head.")))


# --- moments


def moments_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> its moments and its step counter in the checkpoint."""
    checkpoint = read_checkpoint(run / "checkpoints" / "step-00000003")
    groups = checkpoint.state["optimizer"]["param_groups"]["list"]
    names = [name for group in groups for name in dict(group["dict"])["param_names"]["list"]]
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for key, tensor in checkpoint.tensors["optimizer"].items():
        if key.startswith("state."):
            _, index, what = key.split(".")
            found[names[int(index)]][what] = tensor
    return found


KEEP = {"keep": True, "beta2": 0.9, "weight_decay": 0.5}


def started(data: Path, model: Path, **more) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Networks and optimizer of a run before its first step."""
    setup = short_setup(data, init_from=model, optimizer=KEEP, **more)
    objective = setup.objective()
    optimizer = setup.updater(objective).optimizer
    keep_moments(optimizer, objective, setup.options, setup.vocabulary, ONE_PROCESS)
    return objective, optimizer


@pytest.mark.parametrize("name", OPTIONS)
def test_the_optimizer_starts_with_the_moments_of_the_run(name, run, prepared, grown) -> None:
    before = moments_of(run(name))
    for data in (prepared, grown):
        objective, optimizer = started(data, run(name), **OPTIONS[name])
        assert before.keys() == dict(objective.named_parameters()).keys()
        for key, parameter in objective.named_parameters():
            assert optimizer.state[parameter].keys() == before[key].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[parameter]["step"] == 3
            for what in ("exp_avg", "exp_avg_sq"):
                old, new = before[key][what], optimizer.state[parameter][what]
                assert torch.equal(new[: len(old)], old) and new.shape == parameter.shape
                assert not new[len(old) :].any()
                assert len(new) - len(old) == (3 if data == grown and key in objective.word_rows else 0)
        # The constants are those of this run.
        constants = [(group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
        assert constants == [((0.9, 0.9), 0.5), ((0.9, 0.9), 0)]


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_the_state_of_other_optimizers(name, prepared, tmp_path) -> None:
    """All tensors are those of the checkpoint; LAMB has its step counter in the groups."""
    out = short_run(tmp_path / "run", prepared, **SIZES, optimizer={"name": name})
    setup = short_setup(prepared, init_from=out, optimizer={"name": name, "keep": True, "learning_rate": 0.1})
    objective = setup.objective()
    optimizer = setup.updater(objective).optimizer
    keep_moments(optimizer, objective, setup.options, setup.vocabulary, ONE_PROCESS)
    before = read_checkpoint(out / "checkpoints" / "step-00000003").tensors["optimizer"]
    after, _ = flatten_optimizer(optimizer)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)
    assert {int(value) for key, value in after.items() if key.endswith("step")} == {3}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_each_of_two_processes_has_a_part_of_the_moments(run, grown, tmp_path) -> None:
    options = short_options(grown, init_from=run("mlm"), optimizer=KEEP)
    codes = run_ranks(write_moments, 2, tmp_path / "ranks", options, str(tmp_path / "moments.safetensors"))
    assert codes == [0, 0], output_of(tmp_path / "ranks", 1)
    together = load_file(tmp_path / "moments.safetensors")
    alone, _ = flatten_optimizer(started(grown, run("mlm"))[1])
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


def test_a_run_continues_with_the_moments(run, grown, tmp_path) -> None:
    """The option is a part of the experiment; without it the counters begin at 0."""
    runs = [
        short_run(tmp_path / str(keep), grown, init_from=run("mlm"), optimizer={"keep": keep}) for keep in (True, False)
    ]
    steps = [{int(values["step"]) for values in moments_of(one).values()} for one in runs]
    assert steps == [{6}, {3}]
    records = [json.loads((one / "manifest.json").read_text()) for one in runs]
    assert records[0]["science"]["optimizer.keep"] is True and "optimizer.keep" not in records[1]["science"]
    assert records[0]["experiment"] != records[1]["experiment"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--optimizer.keep has no effect without --init-from"),
        (["--init-from", "export"], "export is no run, nor a checkpoint of one, and has no moments; leave"),
        (["--init-from", "{run}"], "was trained with the objective electra, and this run has mlm; leave"),
        (
            ["--init-from", "{run}", "--objective", "electra", "--optimizer.name", "muon"],
            "was trained with the optimizer adamw, and this run has muon; leave",
        ),
        (
            ["--init-from", "{run}", "--objective", "electra", "--electra.generator-scale", "0.5"],
            "error: --optimizer.keep: the checkpoint's optimizer has for parameter small.",
        ),
    ],
)
def test_moments_that_are_missing_or_do_not_fit(more, message, run, prepared, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run("electra")), "--out", "export"]) == 0
    more = [word.format(run=run("electra")) for word in more]
    flags = ["--data", str(prepared), "--length", "32", "--batch-size", "4", "--steps", "3"]
    capsys.readouterr()
    assert main(["pretrain", *flags, "--optimizer.keep", *more, "--out", "run"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "leave" in printed and not (tmp_path / "run").exists()
