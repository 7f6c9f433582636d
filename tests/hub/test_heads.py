"""The heads in an export compute what those of transformers' BERT compute with the same weights."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from fastbert.hub.names import BERT_OPTIONS, bert_names
from tests.hub.conftest import named, random_models, small_batch, small_config

CONFIG = small_config()
SHARED = {theirs: getattr(CONFIG, ours) for ours, theirs in BERT_OPTIONS.items()} | {"classifier_dropout": 0.0}
LABELS = small_batch()["input_ids"] % 5
SPAN = {"start_positions": torch.tensor([3, 0, 99]), "end_positions": torch.tensor([[7], [24], [-4]])}


def copied(bert: nn.Module, ours: nn.Module) -> None:
    """Random weights for both, of the encoder by the table of names, of the head by theirs."""
    weights = named(random_models(CONFIG)[0], None)
    with torch.no_grad():
        for name, theirs in bert_names(CONFIG, types=True, head=None).items():
            for part, value in zip(theirs, weights[name].chunk(len(theirs)), strict=True):
                bert.get_parameter(part).copy_(value)
            ours.get_parameter(name).copy_(weights[name])
        for name, parameter in ours.named_parameters():
            if not name.startswith("encoder."):
                parameter.copy_(torch.randn_like(parameter))
                bert.get_parameter(name).copy_(parameter)


def gradients(model: nn.Module, output: dict[str, Tensor], names: list[str]) -> Tensor:
    wanted = [model.get_parameter(name) for name in names]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(output.loss, wanted)])


@pytest.mark.parametrize(
    ("theirs", "head", "labels", "logits"),
    [
        (
            BertForTokenClassification,
            "classifier",
            {"labels": torch.where(small_batch()["attention_mask"] == 1, LABELS, -100)},
            ["logits"],
        ),
        (BertForQuestionAnswering, "qa_outputs", SPAN, ["start_logits", "end_logits"]),
    ],
)
def test_logits_losses_and_gradients_are_those_of_bert(
    theirs: type, head: str, labels: dict[str, Tensor], logits: list[str], modeling_absolute: ModuleType
) -> None:
    outputs = 5 if head == "classifier" else 2
    bert = theirs(BertConfig(**SHARED, num_labels=outputs)).eval()
    ours = getattr(modeling_absolute, theirs.__name__.replace("Bert", "FastBert"))
    ours = ours(ours.config_class(**SHARED, num_labels=outputs)).eval()
    copied(bert, ours)
    inputs = {key: small_batch()[key] for key in ("input_ids", "attention_mask", "token_type_ids")} | labels
    found, expected = ours(**inputs), bert(**inputs)
    for name in (*logits, "loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    shared = [f"{head}.weight", f"{head}.bias"]
    found = gradients(ours, found, [*shared, "encoder.words.weight"])
    expected = gradients(bert, expected, [*shared, "bert.embeddings.word_embeddings.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_dropout_of_labels_of_tokens_is_that_of_bert(modeling_absolute: ModuleType) -> None:
    ours, configuration = modeling_absolute.FastBertForTokenClassification, modeling_absolute.FastBertConfig
    for choices in ({"classifier_dropout": 0.4}, {"classifier_dropout": None}):
        settings = SHARED | choices
        assert ours(configuration(**settings)).dropout.p == BertForTokenClassification(BertConfig(**settings)).dropout.p
