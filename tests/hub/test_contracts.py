"""What transformers, accelerate and PEFT ask of a model beyond its logits, on the classes of an export."""

from types import ModuleType

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fastbert.errors import UserError
from fastbert.hub.load import load_pretrained
from fastbert.hub.names import BERT_OPTIONS, OWN_OPTIONS
from fastbert.model.positions import POSITIONS
from tests.hub.conftest import exported_modeling, small_batch, small_config

INPUTS = {key: small_batch()[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
REAL = INPUTS["attention_mask"].bool()


@pytest.fixture(scope="module", params=POSITIONS)
def modeling(request, tmp_path_factory) -> ModuleType:
    return exported_modeling(request.param, tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def tupe(tmp_path_factory) -> ModuleType:
    return exported_modeling("tupe-r", tmp_path_factory.mktemp("code"))


def new(modeling: ModuleType, name: str = "ForMaskedLM", **choices) -> nn.Module:
    """A model with random weights, all of which matter."""
    values = small_config(position=modeling.POSITION_NAME).to_dict()
    settings = {theirs: values[ours] for ours, theirs in (BERT_OPTIONS | OWN_OPTIONS).items()}
    torch.manual_seed(0)
    model = getattr(modeling, f"FastBert{name}")(modeling.FastBertConfig(**settings | choices))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + name.endswith("norm.weight"))
    return model.eval()


@torch.no_grad()
def test_eager_attention_gives_the_same_and_its_softmax(modeling) -> None:
    model = new(modeling)
    fused = model(**INPUTS)
    model.set_attn_implementation("eager")
    eager = model(**INPUTS, output_attentions=True)
    torch.testing.assert_close(eager.logits[REAL], fused.logits[REAL], rtol=1e-4, atol=1e-5)
    assert [list(weights.shape) for weights in eager.attentions] == 2 * [[3, 3, 24, 24]]
    for weights in eager.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 24))
        assert not weights.permute(0, 3, 1, 2)[~REAL].any()
    model.set_attn_implementation("sdpa")
    assert model(**INPUTS, output_attentions=True).attentions == () and fused.attentions is None


def test_checkpointed_gradients_are_the_same(modeling) -> None:
    model, found = new(modeling).train(), {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.encoder.blocks)
        torch.manual_seed(1)  # of the dropout
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        found[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
    assert all(torch.equal(found[True][name], gradient) for name, gradient in found[False].items())


@torch.no_grad()
def test_offloaded_to_memory_and_disk(modeling, tmp_path) -> None:
    expected = [new(modeling)(**INPUTS).logits, new(modeling)(INPUTS["input_ids"]).logits]
    here = torch.device("cpu")
    for model in (
        accelerate.cpu_offload(new(modeling), here, offload_buffers=True),
        accelerate.disk_offload(new(modeling), str(tmp_path), here),
    ):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(**INPUTS).logits, expected[0])
        assert torch.equal(model(INPUTS["input_ids"]).logits, expected[1])


@torch.no_grad()
def test_embeddings_in_place_of_words_and_what_else_a_tokenizer_returns(tupe) -> None:
    model = new(tupe)
    rest = {key: value for key, value in INPUTS.items() if key != "input_ids"}
    embedded = model.get_input_embeddings()(INPUTS["input_ids"])
    expected = model(**INPUTS).logits
    assert torch.equal(model(inputs_embeds=embedded, **rest).logits, expected)
    extra = {"special_tokens_mask": REAL, "offset_mapping": REAL, "overflow_to_sample_mapping": REAL}
    assert torch.equal(model(**INPUTS, **extra).logits, expected)
    for both in ({}, {"input_ids": INPUTS["input_ids"], "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**both)


@torch.no_grad()
def test_masks_of_pairs_of_tokens(tupe) -> None:
    model, expected = new(tupe), new(tupe)(**INPUTS).logits[REAL]
    pairs = REAL[:, None, None, :]
    for mask in (pairs, torch.where(pairs, 0.0, torch.finfo(torch.float32).min)):
        found = model(**INPUTS | {"attention_mask": mask.expand(-1, -1, 24, -1)}).logits
        torch.testing.assert_close(found[REAL], expected, rtol=1e-4, atol=1e-5)
    for mask in (REAL[:, None].expand(-1, 24, -1), pairs.long()):
        with pytest.raises(ValueError, match=r"an attention_mask of shape .*: give \[rows, tokens\], or"):
            model(INPUTS["input_ids"], mask)


def test_overrides_that_no_encoder_can_have_are_refused(tupe, tmp_path) -> None:
    model = new(tupe)
    model.save_pretrained(tmp_path)
    for override, message in (
        ({"norm": "Pre"}, "norm must be one of post, pre, not 'Pre'"),
        ({"position": "rope"}, "this file has the code of position encoding tupe-r, not of rope"),
        ({"num_attention_heads": 5}, "hidden_size 24 must be a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer of at least 1, not -1"),
        ({"type_vocab_size": 0.5}, "type_vocab_size must be an integer of at least 0, not 0.5"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be between 0 and 1, not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path, **override)
    assert type(model).from_pretrained(tmp_path, hidden_dropout_prob=0.5).encoder.dropout.p == 0.5


def test_heads_of_odd_size_are_refused_by_rope(tmp_path) -> None:
    with pytest.raises(ValueError, match="position encoding rope needs a head size that is a multiple of 2"):
        new(exported_modeling("rope", tmp_path), hidden_size=15)


def test_a_decoder_of_its_own_is_saved_and_not_loaded_as_a_tied_one(tupe, tokenizer, tmp_path) -> None:
    model = new(tupe, tie_word_embeddings=False)
    words, decoder = model.encoder.words.weight, model.head.decoder.weight
    assert not torch.equal(words, decoder)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).head.decoder.weight, decoder)
    with pytest.raises(UserError, match="is not its word embedding"):
        load_pretrained(tmp_path)


def test_no_class_takes_the_head_of_another(tupe, tmp_path) -> None:
    new(tupe).save_pretrained(tmp_path / "mlm")
    new(tupe, "ForPreTraining").save_pretrained(tmp_path / "replaced")
    for folder, name, prefix in (("mlm", "ForPreTraining", "discriminator."), ("replaced", "ForMaskedLM", "head.")):
        load = getattr(tupe, f"FastBert{name}").from_pretrained
        model, loading = load(tmp_path / folder, output_loading_info=True)
        own = {name for name in model.state_dict() if name.startswith(prefix)} - {"head.decoder.weight"}
        assert own and set(loading["missing_keys"]) == own
    assert "head.output.bias" in load_pretrained(tmp_path / "replaced").weights


def test_tokens_without_a_label_count_for_nothing_in_a_discriminator(tupe) -> None:
    model = new(tupe, "ForPreTraining")
    labels = torch.where(INPUTS["input_ids"] % 3 == 0, -100, INPUTS["input_ids"] % 2)
    found = model(**INPUTS, labels=labels)
    chosen = (labels != -100) & REAL
    expected = nn.functional.binary_cross_entropy_with_logits(found.logits[chosen], labels[chosen].float())
    torch.testing.assert_close(found.loss, expected)


class Rows(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {key: value[index] for key, value in INPUTS.items()}
        return row | {"labels": torch.where(REAL[index], INPUTS["input_ids"][index], -100)}


def test_trainer_takes_the_mean_over_accumulated_batches(tupe, tmp_path) -> None:
    """Of losses that divide by their own counts: the gradient is not the sum over the batches."""
    model = new(tupe, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = [model(**{key: value[None] for key, value in row.items()}).loss for row in (Rows()[0], Rows()[1])]
    before = model.head.dense.weight.detach().clone()
    (gradient,) = torch.autograd.grad(sum(losses) / 2, model.head.dense.weight)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd"}
    options |= {"learning_rate": 1.0, "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, use_cpu=True, gradient_checkpointing=True, disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=Rows()).train()
    torch.testing.assert_close(before - model.head.dense.weight, gradient, rtol=1e-3, atol=1e-5)
