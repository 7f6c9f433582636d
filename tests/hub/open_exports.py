"""Opens exported models as a stranger does: in a process of its own that cannot import fastbert.

    python -I open_exports.py <folder of exports> <batch.safetensors> <folder for results>

Writes <name>.safetensors with logits for each export, and report.json with what else was seen.
"""

import contextlib
import importlib.abc
import json
import sys
from pathlib import Path


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastbert", "fastbert_kernels"):
            raise ImportError(f"{name} is not installed here")
        return None


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    logging,
)

logging.set_verbosity_error()


def inputs(batch, *names):
    return {name: batch[name] for name in ("input_ids", *names)}


def longer(batch):
    return {name: batch[f"long_{name}"] for name in ("input_ids", "attention_mask", "position_ids")}


@torch.no_grad()
def logits(folder, batch, remote):
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=remote).eval()
    double = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float64).eval()
    padded = inputs(batch, "attention_mask", "token_type_ids")
    packed = inputs(batch, "position_ids")
    found = {
        "padded": model(**padded).logits,
        "packed": model(**packed).logits,
        "plain": model(batch["input_ids"]).logits,
        "padded64": double(**padded).logits,
        "packed64": double(**packed).logits,
    }
    with contextlib.suppress(ValueError, RuntimeError, IndexError):  # whose message `conventions` returns
        found["long"] = model(**longer(batch)).logits
    nothing = {**padded, "attention_mask": padded["attention_mask"] * torch.tensor([[1], [1], [0]])}
    for dtype in (torch.float16, torch.bfloat16):
        half = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=remote, dtype=dtype).eval()
        found[str(dtype)] = half(**nothing).logits  # the last row is padding only
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = model(**nothing).logits
    return {name: tensor.contiguous() for name, tensor in found.items()}


@torch.no_grad()
def conventions(folder, batch, remote, scratch):
    """What transformers expects of a model beyond its numbers."""
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=remote).eval()
    padded = inputs(batch, "attention_mask", "token_type_ids")
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    output = model(**padded, labels=labels, output_hidden_states=True)
    chosen = labels != -100
    by_hand = torch.nn.functional.cross_entropy(output.logits[chosen], labels[chosen])
    as_tuple = model(**padded, return_dict=False)
    bare = AutoModel.from_pretrained(folder, trust_remote_code=remote).eval()
    model.save_pretrained(scratch)
    again, loading = AutoModelForMaskedLM.from_pretrained(scratch, trust_remote_code=remote, output_loading_info=True)
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    again.resize_token_embeddings(64)
    try:
        model(**longer(batch))
        too_long = ""
    except (ValueError, RuntimeError, IndexError) as error:
        too_long = str(error)
    return {
        "class": type(model).__name__,
        "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=remote)).__name__,
        "loss_error": (output.loss - by_hand).abs().item(),
        "hidden_states": len(output.hidden_states),
        "last_is_last": torch.equal(output.hidden_states[-1], bare(**padded).last_hidden_state),
        "tuple_equal": isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits),
        "saved_again_equal": all(
            torch.equal(a, b)
            for a, b in zip(
                model.state_dict().values(),
                AutoModelForMaskedLM.from_pretrained(scratch, trust_remote_code=remote).state_dict().values(),
                strict=True,
            )
        ),
        "lost": sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"]),
        "tied": tied,
        "resized": list(again(batch["input_ids"]).logits.shape),
        "too_long": too_long,
    }


def fine_tune(folder, batch, remote, **options):
    """Losses of a few steps of training a classifier, with dropout; then saved and opened again."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=remote, **options).train()
    labels = torch.tensor([0, 1, 1]) if model.config.num_labels > 1 else torch.tensor([0.0, 1.0, 1.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # at 1e-2 several seeds diverge
    losses = []
    for _ in range(40):
        loss = model(**inputs(batch, "attention_mask", "token_type_ids"), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def dropouts(folder, batch):
    """Whether two passes in training mode differ, for each dropout alone and for none."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    found = {}
    for chosen in (*names, None):
        options = {name: 0.5 if name == chosen else 0.0 for name in names}
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, **options).train()
        found[str(chosen)] = not torch.equal(model(batch["input_ids"]).logits, model(batch["input_ids"]).logits)
    return found


def main(exports, batch_file, results):
    batch = load_file(batch_file)
    report = {}
    for folder in sorted(Path(exports).iterdir()):
        remote = (folder / "modeling_fastbert.py").exists()
        save_file(logits(folder, batch, remote), Path(results) / f"{folder.name}.safetensors")
        tokens = AutoTokenizer.from_pretrained(folder)
        report[folder.name] = conventions(folder, batch, remote, Path(results) / f"again-{folder.name}") | {
            "remote": remote,
            "ids": tokens("the state abc", "bad")["input_ids"],
            "pad": [tokens.pad_token_id, AutoConfig.from_pretrained(folder, trust_remote_code=remote).pad_token_id],
        }
    remote = [folder for folder in sorted(Path(exports).iterdir()) if (folder / "modeling_fastbert.py").exists()]
    report["fine-tuning"] = {
        "classes": fine_tune(remote[0], batch, True, num_labels=2),
        "regression": fine_tune(remote[-1], batch, True, num_labels=1),
    }
    report["dropouts"] = dropouts(remote[0], batch)
    report["imported"] = sorted(name for name in sys.modules if name.startswith("fastbert"))
    (Path(results) / "report.json").write_text(json.dumps(report))


main(*sys.argv[1:])
