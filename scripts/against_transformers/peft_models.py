"""LoRA and prompt tuning of exports by PEFT, for each of its task types and every position encoding.

    pip install peft
    python scripts/against_transformers/peft_models.py

A few steps of training must lower the loss and must not change a weight of the encoder. Prompt tuning for token
classification is left out: PEFT has no labels for the tokens it adds, nor has it for transformers' BERT. Prints the
first and the last loss; exit code 1 if a model fails.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

if find_spec("peft") is None:
    raise SystemExit("missing package: pip install peft")

import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import logging

from fastbert.hub.export_code import export_code
from fastbert.model.positions import POSITIONS

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so that each loss can be compared
IDS = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(0))
HALVES, FIRST = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64)
TASKS = {
    TaskType.SEQ_CLS: ("ForSequenceClassification", {"labels": HALVES}),
    TaskType.TOKEN_CLS: ("ForTokenClassification", {"labels": IDS % 2}),
    TaskType.QUESTION_ANS: ("ForQuestionAnswering", {"start_positions": FIRST, "end_positions": FIRST + 3}),
    TaskType.FEATURE_EXTRACTION: ("Model", {}),
}


def losses(model: torch.nn.Module, labels: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for _ in range(30):
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **labels)
        loss = output.loss if labels else output.last_hidden_state[..., 0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> int:
    logging.set_verbosity_error()
    failed = False
    for position in POSITIONS:
        for task, (name, labels) in TASKS.items():
            methods = [LoraConfig(task_type=task, target_modules=["qkv", "out"], r=4)]
            if task != TaskType.TOKEN_CLS:
                methods.append(PromptTuningConfig(task_type=task, num_virtual_tokens=3))
            for method in methods:
                torch.manual_seed(0)
                base = new_model(position, name)
                frozen = {key: value.clone() for key, value in base.state_dict().items() if "encoder" in key}
                found = losses(get_peft_model(base, method).train(), labels)
                after = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items()}
                changed = [key for key, value in frozen.items() if not torch.equal(after[key], value)]
                bad = found[-1] >= found[0] or changed
                failed |= bool(bad)
                label = f"{position:9} {task.value:18} {method.peft_type.value:14}"
                print(f"{label} {found[0]:.3f} -> {found[-1]:.3f}{f'  FAILED {changed}' if bad else ''}", flush=True)
    return int(failed)


def new_model(position: str, name: str) -> torch.nn.Module:
    """A model with random weights, of the code in an export."""
    package = f"exported_{position.replace('-', '_')}"
    folder = Path(sys.path[0]) / package
    if not folder.exists():
        folder.mkdir()
        for file, text in export_code(position).items():
            (folder / file).write_text(text, encoding="utf-8")
    module = __import__(f"{package}.modeling_fastbert", fromlist=["FastBertModel"])
    return getattr(module, f"FastBert{name}")(module.FastBertConfig(**SIZES, position=position))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as code:
        sys.path.insert(0, code)
        sys.exit(main())
