"""Models are read from every kind of folder, with transformers' BERT as the oracle; what cannot be read is named."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, logging

from fastbert.data.tokenizer import SPECIAL_TOKENS, WordPiece
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.export_run import export_run
from fastbert.hub.load import load_pretrained, tokenizer_of
from fastbert.hub.options import ExportOptions
from fastbert.training.checkpoints import Checkpointer
from tests.hub.conftest import named, random_models, small_batch, small_config
from tests.pretrained import build_encoder

logging.set_verbosity_error()


@pytest.fixture
def bert(tmp_path) -> tuple[Path, BertForMaskedLM]:
    """A random BertForMaskedLM, saved."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = BertConfig(vocab_size=40, max_position_embeddings=30, initializer_range=0.3, **sizes)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()  # zeros would hide that it is lost
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def change_settings(folder: Path, **values) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


# --- Hugging Face BERTs


@torch.no_grad()
def test_real_weights_give_transformers_hidden_states_and_go_back(minilm, tmp_path):
    tokens = AutoTokenizer.from_pretrained(minilm)
    firsts = ["The state of the union is strong.", "A question?", "We measured, and then we measured again, carefully."]
    seconds = ["Is it?", "An answer that is quite a lot longer than the question was.", "Yes."]
    batch = tokens(firsts, seconds, padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    assert not real.all() and batch["token_type_ids"].any()
    theirs = BertModel.from_pretrained(minilm).eval()(**batch).last_hidden_state

    pretrained = load_pretrained(minilm)
    encoder, head = build_encoder(pretrained)
    assert head is None and not pretrained.has_head
    ours = encoder.eval()(**batch)
    assert (ours - theirs)[real].abs().max() < 5e-6

    export_model(pretrained.config, pretrained.weights, pretrained.tokenizer, tmp_path / "out")
    again = AutoModel.from_pretrained(tmp_path / "out").eval()(**batch).last_hidden_state
    assert torch.equal(again, theirs)
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(firsts, seconds)["input_ids"] == tokens(firsts, seconds)["input_ids"]
    assert opened.model_max_length == tokens.model_max_length


@torch.no_grad()
def our_logits(folder: Path) -> torch.Tensor:
    encoder, head = build_encoder(load_pretrained(folder))
    batch = small_batch()
    del batch["position_ids"]
    return head(encoder.eval()(**batch))


@torch.no_grad()
def their_logits(model: BertForMaskedLM) -> torch.Tensor:
    batch = small_batch()
    del batch["position_ids"]
    return model(**batch).logits


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    real = small_batch()["attention_mask"].bool()
    assert theirs.abs().max() > 3
    assert (ours - theirs)[real].abs().max() < 2e-6 * theirs.abs().max()


def test_a_random_bert_gives_equal_logits(bert):
    folder, model = bert
    assert load_pretrained(folder).has_head
    assert_equal_logits(our_logits(folder), their_logits(model))


def test_old_names_and_pickles_load(bert):
    folder, _ = bert
    expected = our_logits(folder)

    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return name.removeprefix("bert.")

    weights = {old(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["embeddings.position_ids"] = torch.arange(30)[None]
    weights["pooler.dense.weight"] = torch.zeros(24, 24)
    weights["cls.seq_relationship.bias"] = torch.zeros(2)
    weights["cls.predictions.decoder.weight"] = weights["embeddings.word_embeddings.weight"].clone()
    weights["cls.predictions.decoder.bias"] = weights.pop("cls.predictions.bias")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(our_logits(folder), expected)


def test_options_that_config_json_leaves_out_are_berts(bert):
    folder, _ = bert
    change_settings(folder, layer_norm_eps=..., type_vocab_size=..., hidden_act=..., hidden_dropout_prob=0.25)
    config = load_pretrained(folder).config
    assert (config.norm_eps, config.type_vocab_size, config.dropout) == (1e-12, 2, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, r"config\.json has hidden_act 'relu'; fastbert reads BERTs with 'gelu' only"),
        ({"position_embedding_type": "relative_key"}, "has position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "has is_decoder True"),
        ({"add_cross_attention": True}, "has add_cross_attention True"),
        ({"model_type": "roberta"}, "holds a RoBERTa, whose architecture is not one of fastbert's encoders"),
        ({"model_type": ...}, "has model_type None"),
        ({"hidden_size": ..., "vocab_size": ...}, "lacks vocab_size, hidden_size"),
        ({"num_attention_heads": 5}, r"config\.json: heads 5 do not divide width 24"),
        ({"vocab_size": 41}, r"encoder\.words\.weight has shape \(40, 24\) instead of \(41, 24\)"),
        ({"num_hidden_layers": 1}, r"contain bert\.encoder\.layer\.1\.\S+, .* and 11 more, which a BERT of this"),
        ({"num_hidden_layers": 3}, r"lack bert\.encoder\.layer\.2\.\S+, .* and 11 more"),
    ],
)
def test_settings_that_ours_cannot_express_are_named(settings, message, bert):
    change_settings(bert[0], **settings)
    with pytest.raises(UserError, match=message):
        load_pretrained(bert[0])


def test_missing_and_untied_weights_are_named(bert):
    folder, _ = bert
    whole = load_file(folder / "model.safetensors")

    def refuses(change, message):
        save_file(change({name: tensor.clone() for name, tensor in whole.items()}), folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_pretrained(folder)

    refuses(
        lambda w: {k: v for k, v in w.items() if "layer.1.attention.self.key.bias" not in k},
        r"lack bert\.encoder\.layer\.1\.attention\.self\.key\.bias$",
    )
    refuses(
        lambda w: {k: v for k, v in w.items() if k != "cls.predictions.transform.dense.weight"},
        r"lack cls\.predictions\.transform\.dense\.weight$",
    )
    refuses(
        lambda w: w | {"cls.predictions.decoder.weight": torch.zeros(40, 24)},
        "output embedding of the BERT in .* is not its word embedding; fastbert's MLM head ties the two",
    )


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_named(keep, bert):
    path = bert[0] / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*; copy, download or export it again"):
        load_pretrained(bert[0])


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/fastbert-was-fooled"),))


def test_pickles_that_hold_more_than_tensors_or_are_cut_are_refused(bert):
    folder, _ = bert
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"bert": Trap()}, path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        load_pretrained(folder)
    assert not Path("/tmp/fastbert-was-fooled").exists()
    for zipped in (True, False):
        torch.save({"bert": torch.zeros(9)}, path, _use_new_zipfile_serialization=zipped)
        content, generator = path.read_bytes(), random.Random(0)
        for size in (0, *(generator.randrange(len(content)) for _ in range(60))):
            flipped = bytes([*content[:size], content[size] ^ 0x55, *content[size + 1 :]])
            for damaged in (content[:size], flipped):
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=r"pytorch_model\.bin|lack bert\."):
                    load_pretrained(folder)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds a list and not weights by name"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"has no weights: neither model\.safetensors nor .* nor pytorch_model\.bin"):
        load_pretrained(folder)


# --- exports


def test_an_export_that_was_trained_on_keeps_its_token_types(tokenizer, tmp_path):
    """The native BERT of an encoder without token types has two rows of zeros, which fine-tuning fills."""
    config = small_config(type_vocab_size=0)
    export_model(config, named(*random_models(config)), tokenizer, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").config.type_vocab_size == 0
    model = BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_()
    model.save_pretrained(tmp_path / "trained")
    assert load_pretrained(tmp_path / "trained").config.type_vocab_size == 2
    assert_equal_logits(our_logits(tmp_path / "trained"), their_logits(model))


def test_code_in_a_folder_is_never_run(tokenizer, tmp_path):
    config = small_config(position="tupe-r")
    export_model(config, named(*random_models(config)), tokenizer, tmp_path / "out")
    for name in ("configuration_fastbert.py", "modeling_fastbert.py"):
        (tmp_path / "out" / name).write_text("raise SystemExit('run')")
    assert load_pretrained(tmp_path / "out").config == config
    change_settings(tmp_path / "out", position="rotary")
    with pytest.raises(UserError, match=r"config\.json was changed .*: unknown position encoding 'rotary'"):
        load_pretrained(tmp_path / "out")
    change_settings(tmp_path / "out", position="tupe-r", norm=...)
    with pytest.raises(UserError, match=r"config\.json lacks norm$"):
        load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("position", ["absolute", "tupe-r"])
def test_exports_and_runs_that_are_older_than_an_option_load(position, tokenizer, tmp_path):
    """What was written before there was a choice is what there was."""
    later, config = ("feed_forward", "bias", "rope_base"), small_config(position=position, norm="pre")
    weights = named(*random_models(config))
    export_model(config, weights, tokenizer, tmp_path / "out")
    change_settings(tmp_path / "out", **dict.fromkeys(later, ...))
    assert load_pretrained(tmp_path / "out").config == config
    opened = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(
        opened.state_dict()["blocks.0.feed_forward.up.bias"], weights["encoder.blocks.0.feed_forward.up.bias"]
    )
    encoder = {name: value for name, value in config.to_dict().items() if name not in later}
    path = Checkpointer(tmp_path / "run" / "checkpoints", 3, print).save(5, {"model": weights}, {"encoder": encoder})
    assert load_pretrained(path).config == config


# --- runs and checkpoints


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run with two checkpoints, of different weights."""
    config = small_config(position="tupe-r")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep_last=3, echo=print)
    for step in (5, 10):
        state = {"encoder": config.to_dict(), "objective": "mlm", "progress": {"tokens": 24 * step}}
        tensors = {"model": named(*random_models(config, step)) | {"notes.table": torch.zeros(3)}}
        checkpointer.save(step, tensors, state, metric=3.5)
    shutil.copytree(tokenizer, tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def test_a_loss_of_several_parts_is_not_in_nats(tokenizer, tmp_path):
    config = small_config()
    state = {"encoder": config.to_dict(), "objective": "electra", "progress": {"tokens": 9}}
    weights = named(*random_models(config, 1))
    Checkpointer(tmp_path / "checkpoints", 1, print).save(3, {"model": weights}, state, metric=3.5)
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    facts = load_pretrained(tmp_path).facts
    assert facts == {"objective": "electra", "steps": 3, "tokens": 9, "validation loss": 3.5}
    Checkpointer(tmp_path / "checkpoints", 1, print).save(4, {"model": weights}, state, metric=2.5, metric_of="old")
    assert load_pretrained(tmp_path).facts["validation loss of old"] == 2.5


def assert_weights_of(step: int, path: Path) -> None:
    pretrained = load_pretrained(path)
    expected = named(*random_models(small_config(position="tupe-r"), step))
    assert pretrained.weights.keys() == expected.keys()
    assert all(torch.equal(pretrained.weights[name], expected[name]) for name in expected)


def test_a_run_gives_its_newest_whole_checkpoint(run, capsys, monkeypatch):
    assert_weights_of(10, run)
    assert_weights_of(5, run / "checkpoints" / "step-00000005")
    pretrained = load_pretrained(run)
    assert pretrained.tokenizer == run / "tokenizer"
    assert pretrained.config == small_config(position="tupe-r")
    assert pretrained.source.endswith("step-00000010")
    assert pretrained.facts == {"objective": "mlm", "steps": 10, "tokens": 240, "validation loss (nats)": 3.5}
    monkeypatch.chdir(run / "checkpoints" / "step-00000005")
    assert load_pretrained(".").tokenizer == run / "tokenizer"
    assert not capsys.readouterr().err

    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_weights_of(5, run)
    assert "step-00000010/model.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-00000010/model\.safetensors is damaged"):
        load_pretrained(weights.parent)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*model\.safetensors is damaged"):
        load_pretrained(run)


def test_reading_a_run_leaves_a_save_in_progress_alone(run):
    half = run / "checkpoints" / ".step-00000015.1.tmp"
    half.mkdir()
    assert_weights_of(10, run)
    assert half.exists()


def test_a_head_of_another_kind_is_left_aside(run):
    config = small_config()
    weights = named(random_models(config)[0], None) | {"head.choice.weight": torch.zeros(1, 24)}
    state = {"encoder": config.to_dict()}
    path = Checkpointer(run / "checkpoints", 3, print).save(20, {"model": weights}, state)
    assert not load_pretrained(path).has_head


def test_checkpoints_that_are_not_of_pretraining_are_named(run):
    checkpointer = Checkpointer(run / "checkpoints", 9, print)
    with pytest.raises(UserError, match="is not from a pretraining run"):
        load_pretrained(checkpointer.save(20, {"model": {"x": torch.zeros(1)}}, {}))
    encoder = small_config().to_dict()
    with pytest.raises(UserError, match=r"state\.json: unknown encoder option 'layer'; did you mean 'layers'"):
        load_pretrained(checkpointer.save(21, {"model": {"x": torch.zeros(1)}}, {"encoder": encoder | {"layer": 1}}))
    older = encoder | {"cls": "untied"}
    older.pop("cls_attention")
    with pytest.raises(UserError, match=r"state\.json: .* an older version of fastbert, .* give the export"):
        load_pretrained(checkpointer.save(22, {"model": {"x": torch.zeros(1)}}, {"encoder": older}))
    with pytest.raises(UserError, match=r"the weights of the checkpoint .* do not fit .*words\.weight is missing"):
        load_pretrained(checkpointer.save(23, {"model": {"x": torch.zeros(1)}}, {"encoder": encoder}))
    renamed = (run / "checkpoints" / "step-00000005").rename(run / "best")
    with pytest.raises(UserError, match="best was renamed"):
        load_pretrained(renamed)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(
        UserError, match="checkpoints holds no checkpoint yet; wait for the first checkpoint of the run"
    ):
        load_pretrained(run)


def test_the_job_exports_a_run(run, tmp_path, capsys):
    export_run(ExportOptions(str(run), str(tmp_path / "out")))
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert_weights_of(10, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 10 |" in card and "step-00000010 |" in card


@pytest.mark.parametrize("position", ["absolute", "tupe-r"])
def test_a_replaced_tokenizer_is_refused(position, run, tokenizer, tmp_path):
    """A tokenizer with the same number of words in another order would be read without a warning."""
    words = load_tokenizer(tokenizer)
    other = WordPiece((*SPECIAL_TOKENS, *reversed(words.tokens[len(SPECIAL_TOKENS) :])))
    assert len(other.tokens) == len(words.tokens) and other.tokens != words.tokens
    out, config = tmp_path / "out", small_config(position=position)
    export_model(config, named(*random_models(config)), tokenizer, out)
    load_pretrained(out)
    other.save(out)
    with pytest.raises(UserError, match=f"the tokenizer in {out} is not the one that the model"):
        load_pretrained(out)

    state = {"encoder": config.to_dict(), "tokenizer": words.fingerprint}
    Checkpointer(run / "checkpoints", 9, print).save(20, {"model": named(*random_models(config))}, state)
    load_pretrained(run)
    other.save(run / "tokenizer")
    with pytest.raises(UserError, match=r"is not the one that the checkpoint .*step-00000020 was trained with"):
        load_pretrained(run)


def test_tokenizers_of_hugging_face_folders_are_checked(bert, capsys):
    """transformers' weights do not say what tokenizer they were trained with."""
    folder, words = bert[0], (*SPECIAL_TOKENS, *(f"w{n}" for n in range(36)))
    with pytest.raises(UserError, match="holds no tokenizer, so the ids of words in"):
        tokenizer_of(load_pretrained(folder))
    WordPiece(words).save(folder)
    with pytest.raises(UserError, match=r"has 41 tokens and the BERT in .* 40; give the model with the tokenizer"):
        tokenizer_of(load_pretrained(folder))
    WordPiece(words[:-1], lowercase=False).save(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UserError, match="do_lower_case is False in fastbert and True in transformers"):
        load_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    assert not tokenizer_of(load_pretrained(folder)).lowercase
    assert "is read with the settings of tokenizer.json" in capsys.readouterr().err


# --- no model at all


def test_paths_without_a_model_have_different_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for path, message in {
        "empty": r"empty holds no model: looked for config\.json .*, checkpoints/ .* and state\.json",
        "notes.txt": r"notes\.txt is a file; give the folder of the model",
        "google-bert/bert-base-uncased": r"no folder .*, and the cache .* `hf download google-bert/bert-base-u",
        "runs/x": r"there is no folder runs/x; give the folder of",
        "run": r"there is no folder run; did you mean 'runs'\? Give the folder of",
        "runs/x@20": r"there is no folder runs/x@20; .* give its folder, runs/x/checkpoints/step-00000020",
        "/nowhere/at/all": "there is no folder /nowhere/at/all; give the folder of",
    }.items():
        with pytest.raises(UserError, match=message):
            load_pretrained(path)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model configuration empty/config\.json is damaged"):
        load_pretrained("empty")
