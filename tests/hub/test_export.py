"""Exports are opened by transformers without fastbert and compute what our encoder computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fastbert.errors import UserError
from fastbert.hub.configuration_fastbert import FastBertConfig
from fastbert.hub.export import export_model
from fastbert.hub.export_code import check_exportable
from fastbert.hub.load import load_pretrained
from fastbert.hub.names import BERT_OPTIONS, OWN_OPTIONS
from fastbert.model.positions import POSITIONS
from tests.hub.conftest import long_batch, named, random_models, small_batch, small_config
from tests.pretrained import build_encoder

VARIANTS = {
    f"{position}.{norm}{'.tied' if cls == 'tied' else ''}": {"position": position, "norm": norm, "cls_attention": cls}
    for position in POSITIONS
    for norm in ("post", "pre")
    for cls in (("untied", "tied") if position.startswith("tupe") else ("untied",))
} | {
    "absolute.untyped": {"type_vocab_size": 0},
    "tupe-r.untyped": {"position": "tupe-r", "type_vocab_size": 0},
    "absolute.geglu": {"feed_forward": "geglu"},
    "tupe-r.unbiased": {"position": "tupe-r", "bias": False},
    "rope.modern": {"position": "rope", "rope_base": 50.0, "feed_forward": "geglu", "bias": False, "norm": "pre"},
}
NATIVE = ("absolute.post", "absolute.untyped")
CARD = {"data": "State of the Union", "steps": 7, "validation loss": 2.5, "command": "fastbert pretrain a | tee b"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for number, (name, choices) in enumerate(VARIANTS.items()):
        config = small_config(**choices)
        export_model(config, named(*random_models(config, number)), tokenizer, folder / name, card=CARD)
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory, exports) -> Path:
    """What open_exports.py wrote."""
    results = tmp_path_factory.mktemp("results")
    longer = {f"long_{name}": tensor for name, tensor in long_batch().items()}
    save_file(small_batch() | longer, results / "batch.safetensors")
    script = Path(__file__).with_name("open_exports.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(results / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", script, exports, results / "batch.safetensors", results]
    done = subprocess.run(command, cwd=results, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def report(opened) -> dict:
    return json.loads((opened / "report.json").read_text())


@torch.no_grad()
def our_logits(
    name: str, inputs: tuple[str, ...], dtype: torch.dtype = torch.float32, batch: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    config = small_config(**VARIANTS[name])
    encoder, head = random_models(config, list(VARIANTS).index(name))
    batch = small_batch() if batch is None else batch
    hidden = encoder.to(dtype)(batch["input_ids"], **{key: batch[key] for key in inputs})
    return head.to(dtype)(hidden)


PADDED, PACKED = ("attention_mask", "token_type_ids"), ("position_ids",)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_ours_to_rounding(name, opened):
    theirs = load_file(opened / f"{name}.safetensors")
    real = small_batch()["attention_mask"].bool()
    for key, inputs, tokens in (("padded", PADDED, real), ("packed", PACKED, ...), ("plain", (), ...)):
        ours = our_logits(name, inputs)
        scale = ours.abs().max().item()
        assert (theirs[key][tokens] - ours[tokens]).abs().max() < 2e-6 * scale, key
        assert scale > 1
    for key, inputs, tokens in (("padded64", PADDED, real), ("packed64", PACKED, ...)):
        assert (theirs[key][tokens] - our_logits(name, inputs, torch.float64)[tokens]).abs().max() < 1e-12, key


@pytest.mark.parametrize("name", VARIANTS)
def test_sequences_beyond_the_positions_are_read_as_ours_or_refused(name, opened, report):
    theirs, message = load_file(opened / f"{name}.safetensors").get("long"), report[name]["too_long"]
    if not name.startswith("absolute"):
        real = long_batch()["attention_mask"].bool()
        ours = our_logits(name, ("attention_mask", "position_ids"), batch=long_batch())
        assert (theirs[real] - ours[real]).abs().max() < 2e-6 * ours.abs().max() and not message
    elif name in NATIVE:
        assert theirs is None and message  # transformers' own error
    else:
        refusal = "45 tokens is longer than the 30 positions, and position encoding absolute defines none beyond; "
        assert theirs is None and refusal + "truncate the text, or use a model with another" in message


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_near_and_a_row_of_padding_alone_is_finite(name, opened):
    theirs = load_file(opened / f"{name}.safetensors")
    real = small_batch()["attention_mask"].bool()
    real[2] = False
    ours = our_logits(name, PADDED)
    for key, limit in (("torch.float16", 0.01), ("torch.bfloat16", 0.08), ("autocast", 0.08)):
        assert theirs[key].isfinite().all(), key
        error = (theirs[key].float() - ours)[real].pow(2).mean().sqrt() / ours[real].pow(2).mean().sqrt()
        assert error < limit, key


@pytest.mark.parametrize("name", VARIANTS)
def test_conventions_of_transformers(name, report, tokenizer):
    seen = report[name]
    assert seen["class"] == ("BertForMaskedLM" if name in NATIVE else "FastBertForMaskedLM")
    assert seen["config"] == ("BertConfig" if name in NATIVE else "FastBertConfig")
    assert seen["remote"] == (name not in NATIVE)
    assert seen["loss_error"] < 1e-5
    assert seen["hidden_states"] == 3
    assert seen["last_is_last"] and seen["tuple_equal"] and seen["saved_again_equal"] and seen["tied"]
    assert seen["lost"] == []
    assert seen["resized"] == [3, 24, 64]
    assert seen["ids"] == [2, 25, 26, 5, 16, 17, 3, 6, 15, 18, 3]
    assert seen["pad"] == [1, 1]


def test_classifiers_learn_and_nothing_of_fastbert_was_imported(report):
    for losses in report["fine-tuning"].values():
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert report["imported"] == []


def test_every_dropout_drops(report):
    assert report["dropouts"] == {
        "hidden_dropout_prob": True,
        "attention_probs_dropout_prob": True,
        "classifier_dropout": True,
        "None": False,
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_loads_back_bit_for_bit_without_running_its_code(name, exports, tokenizer):
    config = small_config(**VARIANTS[name])
    if name not in NATIVE:
        assert "raise" in (exports / name / "modeling_fastbert.py").read_text()
    pretrained = load_pretrained(exports / name)
    if name in NATIVE:  # a BERT's configuration has no words for what absolute positions do not use
        assert pretrained.config == small_config(**VARIANTS[name], relative_buckets=32, relative_max_distance=128)
    else:
        assert pretrained.config == config
    expected = named(*random_models(config, list(VARIANTS).index(name)))
    assert pretrained.weights.keys() == expected.keys()
    assert all(torch.equal(pretrained.weights[key], expected[key]) for key in expected)
    assert pretrained.has_head and pretrained.tokenizer == exports / name
    encoder, head = build_encoder(pretrained)
    assert head.decoder.weight is encoder.words.weight


def test_the_configuration_has_the_names_that_encodings_read():
    config = small_config(position="rope", type_vocab_size=0)
    names = BERT_OPTIONS | OWN_OPTIONS
    theirs = FastBertConfig(**{names[name]: value for name, value in config.to_dict().items()})
    assert {name: getattr(theirs, name) for name in names} == config.to_dict()
    assert theirs.head_size == config.head_size


def test_exports_of_one_name_and_several_encodings_open_in_one_process(tokenizer, tmp_path):
    """Transformers registers a class of models for each class of configurations, and names modules by their folder."""
    for position in ("tupe-a", "alibi", "rope", "tupe-a"):
        config = small_config(position=position)
        encoder = random_models(config)[0]
        export_model(config, named(encoder, None), tokenizer, tmp_path / position / "model")
        model = AutoModel.from_pretrained(tmp_path / position / "model", trust_remote_code=True).eval()
        ids = small_batch()["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).last_hidden_state, encoder(ids), rtol=1e-5, atol=1e-5)
    model.config.position = "relative"
    with pytest.raises(ValueError, match="this file has the code of position encoding tupe-a, not of relative"):
        type(model)(model.config)


def test_weights_of_two_precisions_have_the_wider_one(tokenizer, tmp_path):
    config = small_config()
    weights = named(random_models(config)[0], None)
    weights["encoder.embedding_norm.bias"] = weights["encoder.embedding_norm.bias"].bfloat16()
    export_model(config, weights, tokenizer, tmp_path / "model")
    assert {tensor.dtype for tensor in load_pretrained(tmp_path / "model").weights.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["absolute.post", "tupe-r.pre"])
def test_a_model_that_transformers_saved_again_loads_too(name, opened, exports):
    again, first = load_pretrained(opened / f"again-{name}"), load_pretrained(exports / name)
    assert again.config == first.config
    assert all(torch.equal(again.weights[key], first.weights[key]) for key in first.weights)


@pytest.mark.parametrize("position", ["absolute", "tupe-a"])
def test_without_a_head(position, tokenizer, tmp_path):
    config = small_config(position=position)
    weights = named(random_models(config)[0], None)
    export_model(config, weights, tokenizer, tmp_path / "bare")
    pretrained = load_pretrained(tmp_path / "bare")
    assert not pretrained.has_head and build_encoder(pretrained)[1] is None
    assert all(torch.equal(pretrained.weights[key], weights[key]) for key in weights)
    architecture = json.loads((tmp_path / "bare" / "config.json").read_text())["architectures"]
    assert architecture == ["BertModel" if position == "absolute" else "FastBertModel"]
    assert "fill-mask" not in (tmp_path / "bare" / "README.md").read_text()


def test_card_has_the_facts_and_leaves_the_licence_open(exports):
    text = (exports / "tupe-r.pre" / "README.md").read_text()
    for fact in ("| data | State of the Union |", "| steps | 7 |", "| command | fastbert pretrain a \\| tee b |"):
        assert fact in text
    assert "AutoModel.from_pretrained(folder, trust_remote_code=True)" in text
    assert "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)" in text
    assert "| feed-forward | gelu |" in text and "| biases | yes |" in text
    modern = (exports / "rope.modern" / "README.md").read_text()
    for fact in (
        "| position encoding | rope |",
        "| rope base | 50.0 |",
        "| feed-forward | geglu |",
        "| biases | no |",
    ):
        assert fact in modern
    assert "# license: to be chosen" in text
    absolute = (exports / "absolute.post" / "README.md").read_text()
    assert "trust_remote_code" not in absolute
    assert "| longer sequences | extrapolated |" in modern and "| longer sequences | refused |" in absolute


def test_replaces_only_its_own_exports(tokenizer, tmp_path):
    config = small_config()
    weights = named(*random_models(config))
    out = tmp_path / "out"
    export_model(config, weights, tokenizer, out)
    (out / "stale.txt").write_text("from the earlier export")
    export_model(config, weights, tokenizer, out)
    assert not (out / "stale.txt").exists()
    assert list(tmp_path.iterdir()) == [out]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="thesis is not empty and is not an export of fastbert; choose another"):
        export_model(config, weights, tokenizer, tmp_path / "thesis")
    with pytest.raises(UserError, match=r"chapter\.txt: it is a file; choose a folder"):
        export_model(config, weights, tokenizer, tmp_path / "thesis" / "chapter.txt")


def test_a_model_that_was_trained_on_and_saved_is_not_replaced(opened, tokenizer):
    config = small_config()
    with pytest.raises(UserError, match="not an export of fastbert"):
        export_model(config, named(*random_models(config)), tokenizer, opened / "again-absolute.post")


def test_nothing_is_left_of_an_export_that_fails(tokenizer, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    config = small_config()
    with pytest.raises(UserError, match="the disk is full"):
        export_model(config, named(*random_models(config)), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_weights_are_named(tokenizer, tmp_path):
    config = small_config()
    weights = named(*random_models(config))

    def refuses(changed, message):
        with pytest.raises(UserError, match=message):
            export_model(config, changed, tokenizer, tmp_path / "out")

    refuses(
        {k: v for k, v in weights.items() if k != "encoder.blocks.1.feed_forward.up.bias"},
        r"encoder\.blocks\.1\.feed_forward\.up\.bias is missing",
    )
    refuses({k: v for k, v in weights.items() if k != "head.norm.bias"}, r"head\.norm\.bias is missing")
    refuses(weights | {"encoder.novelty": torch.zeros(1)}, r"encoder\.novelty is unexpected")
    refuses(weights | {"encoder.words.weight": torch.zeros(39, 24)}, r"shape \(39, 24\) instead of \(40, 24\)")
    refuses(weights | {"head.decoder.weight": torch.zeros(40, 24)}, "is not its word embedding")
    refuses({}, "is missing; .* and 24 more")


def test_bad_tokenizers_are_named(tokenizer, tmp_path):
    config = small_config(vocab_size=20)
    weights = named(*random_models(config))
    with pytest.raises(UserError, match=r"has 27 tokens and the model 20; give the folder of the tokenizer it was"):
        export_model(config, weights, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="has no tokenizer; give a folder with"):
        export_model(config, weights, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_a_tokenizer_of_one_file_opens_without_running_code(file, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / file).write_text((tokenizer / file).read_text())
    config = small_config(position="tupe-a")
    export_model(config, named(*random_models(config)), tmp_path / "tokenizer", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the state")["input_ids"] == [2, 25, 26, 3]


def test_a_tokenizer_opens_without_code_or_a_question_as_the_card_states(exports, monkeypatch):
    from transformers import AutoTokenizer

    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    folder = exports / "tupe-r.pre"
    assert "`AutoTokenizer.from_pretrained(folder, trust_remote_code=False)`" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("the state")["input_ids"] == [2, 25, 26, 3]
    assert not questions
    AutoTokenizer.from_pretrained(folder)
    assert len(questions) == 1


@pytest.mark.parametrize("position", ["tupe-r", "relative"])
def test_an_encoding_is_tested_at_a_short_length(position) -> None:
    """A bias over all positions would have 4 TB a head here."""
    check_exportable(small_config(position=position, max_positions=2**20))
