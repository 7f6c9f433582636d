"""The README.md of an exported model: what it is, where it came from, how to open it. Facts only."""

from typing import Any

from fastbert import __version__
from fastbert.model.config import EncoderConfig
from fastbert.model.positions import POSITIONS
from fastbert.records import json_text

_SNIPPET = """```python
import torch
from transformers import AutoModel, AutoTokenizer

folder = "{name}"  # the path of this folder
tokenizer = AutoTokenizer.from_pretrained(folder{without_code})
model = AutoModel.from_pretrained(folder{trust})

batch = tokenizer(["A sentence.", "Another, longer one."], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden_states = model(**batch).last_hidden_state  # [batch, tokens, {width}]
```"""

_REMOTE = """
`trust_remote_code=True` is needed because this encoder is not one that transformers knows: its code is in this folder,
in `configuration_fastbert.py` and `modeling_fastbert.py`. It imports torch and transformers only.
The tokenizer needs none of it: `AutoTokenizer.from_pretrained(folder, trust_remote_code=False)` opens it and runs no
code. Without either value AutoTokenizer asks whether to run the code, and waits 15 seconds for an answer.
"""


AUTO_CLASSES = {None: "AutoModel", "mlm": "AutoModelForMaskedLM", "replaced": "AutoModelForPreTraining"}
"""What opens an export with its head, if it has one."""


def model_card(
    config: EncoderConfig, name: str, *, native: bool, head: str | None, parameters: int, facts: dict[str, Any]
) -> str:
    """Markdown.

    Args:
        config: of the encoder.
        name: of the exported folder.
        native: whether transformers opens it as its own BERT or ELECTRA.
        head: which head is in it: mlm, replaced or None.
        parameters: how many there are, with those of the head.
        facts: rows of the table on its pretraining, in order.
    """
    encoder = {
        "position scheme": config.position,
        **{option.replace("_", " "): getattr(config, option) for option in POSITIONS.uses(config.position)},
        "layer norm": config.norm,
        "feed-forward": config.feed_forward,
        "biases": "yes" if config.bias else "no",
        "layers": config.layers,
        "width": config.width,
        "attention heads": config.heads,
        "vocabulary": config.vocab_size,
        "longest sequence": config.max_positions,
        "parameters": parameters,
    }
    classes = ["AutoModel", *([AUTO_CLASSES[head]] if head else [])]
    tasks = [f"AutoModelFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    front = ["---", "library_name: transformers", *(["pipeline_tag: fill-mask"] if head == "mlm" else []), "tags:"]
    trust = "" if native else ", trust_remote_code=True"
    without_code = "" if native else ", trust_remote_code=False"
    parts = [
        "\n".join([*front, "- fastbert", "# license: to be chosen by whoever publishes this model", "---"]),
        f"# {name}",
        f"A text encoder, exported by fastbert {__version__}.",
        "## Encoder\n\n" + _table(encoder),
        "## Pretraining\n\n" + (_table(facts) if facts else "Nothing was noted down at its export."),
        "## Use\n\n" + _SNIPPET.format(name=name, width=config.width, trust=trust, without_code=without_code),
        f"`{'`, `'.join(classes)}` opens it as it is; `{'`, `'.join(tasks)}` add a new head, which has to be trained.",
        *([] if native else [_REMOTE.strip()]),
        "## Licence\n\nNot stated. It is for whoever publishes this model to choose, with an eye on its training data.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(facts: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    for key, value in facts.items():
        text = value if isinstance(value, str) else json_text(value)
        rows.append(f"| {key} | {text.replace('|', chr(92) + '|').replace(chr(10), '<br>')} |")
    return "\n".join(rows)
