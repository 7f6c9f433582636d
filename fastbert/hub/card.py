"""Model card (README.md) of an exported model: its architecture, its training, and how to load it."""

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
`trust_remote_code=True` is needed because transformers does not include this architecture. Its code is in this folder,
in `configuration_fastbert.py` and `modeling_fastbert.py`, and imports only torch and transformers. The tokenizer needs
no such code: `AutoTokenizer.from_pretrained(folder, trust_remote_code=False)` loads it without running any. If the
argument is left out, AutoTokenizer asks whether to run the code and waits 15 seconds for an answer.
"""


AUTO_CLASSES = {None: "AutoModel", "mlm": "AutoModelForMaskedLM", "replaced": "AutoModelForPreTraining"}
"""Class that loads an export with its head, if it has one."""


def model_card(
    config: EncoderConfig, name: str, *, native: bool, head: str | None, parameters: int, facts: dict[str, Any]
) -> str:
    """Renders the card as Markdown.

    Args:
        config: configuration of the encoder.
        name: name of the exported folder.
        native: true if transformers' own BERT or ELECTRA loads it.
        head: the exported head, mlm or replaced, or None.
        parameters: number of parameters, including those of the head.
        facts: rows of the table about pretraining, in order.
    """
    encoder = {
        "position encoding": config.position,
        **{option.replace("_", " "): getattr(config, option) for option in POSITIONS.uses(config.position)},
        "layer norm": config.norm,
        "feed-forward": config.feed_forward,
        "biases": "yes" if config.bias else "no",
        "layers": config.layers,
        "width": config.width,
        "attention heads": config.heads,
        "vocabulary": config.vocab_size,
        "positions": config.max_positions,
        "longer sequences": "extrapolated" if POSITIONS[config.position].extrapolates else "refused",
        "parameters": parameters,
    }
    classes = ["AutoModel", *([AUTO_CLASSES[head]] if head else [])]
    tasks = [f"AutoModelFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    front = ["---", "library_name: transformers", *(["pipeline_tag: fill-mask"] if head == "mlm" else []), "tags:"]
    trust = "" if native else ", trust_remote_code=True"
    without_code = "" if native else ", trust_remote_code=False"
    parts = [
        "\n".join([*front, "- fastbert", "# license: to be chosen by the publisher of this model", "---"]),
        f"# {name}",
        f"A text encoder, exported by fastbert {__version__}.",
        "## Encoder\n\n" + _table(encoder),
        "## Pretraining\n\n" + (_table(facts) if facts else "Not recorded."),
        "## Use\n\n" + _SNIPPET.format(name=name, width=config.width, trust=trust, without_code=without_code),
        f"Load it with `{'` or `'.join(classes)}`. `{'`, `'.join(tasks)}` add a new head, which must be trained.",
        *([] if native else [_REMOTE.strip()]),
        "## License\n\nNot stated: the publisher of this model chooses one that its training data allows.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(facts: dict[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    for key, value in facts.items():
        text = value if isinstance(value, str) else json_text(value)
        rows.append(f"| {key} | {text.replace('|', chr(92) + '|').replace(chr(10), '<br>')} |")
    return "\n".join(rows)
