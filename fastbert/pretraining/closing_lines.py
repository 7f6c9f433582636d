"""The last lines that a finished run prints: where its files are, a snippet of Python that opens the model, and the
commands that use it next."""

import shlex
from pathlib import Path

from fastbert.hub.card import AUTO_CLASSES

WITH_MASK = "The people of the United [MASK]."
_USES = {
    "mlm": (
        WITH_MASK,
        "logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]",
        "print(tokenizer.convert_ids_to_tokens(logits.topk(5).indices[0]))",
    ),
    "replaced": (
        "The people of the United bananas.",
        "replaced = model(**inputs).logits[0].sigmoid()  # probability that a token was replaced",
        "print(list(zip(inputs.tokens(), replaced.tolist())))",
    ),
    None: (
        "The people of the United States.",
        "hidden_states = model(**inputs).last_hidden_state  # [batch, tokens, width]",
        "print(hidden_states.mean(1))",
    ),
}
"""Head of an export -> a text, and two lines that apply the model to it."""


def snippet(model: Path, native: bool, head: str | None) -> list[str]:
    """Lines of Python that open an export and apply it to a text.

    Args:
        model: folder of the export.
        native: whether transformers opens it as its own BERT or ELECTRA, without the code in the folder.
        head: mlm, replaced or None.
    """
    text, *use = _USES[head]
    trust = "" if native else ", trust_remote_code=True"
    return [
        f"from transformers import {AUTO_CLASSES[head]}, AutoTokenizer",
        f"folder = {str(model)!r}",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"model = {AUTO_CLASSES[head]}.from_pretrained(folder{trust})",
        f'inputs = tokenizer("{text}", return_tensors="pt")',
        *use,
    ]


def commands(run: Path, length: int) -> list[str]:
    """Commands that use the model of a run with sequences of `length` tokens."""
    name, following = shlex.quote(str(run)), shlex.quote(f"{run}-more-text")
    files = "--custom.train train.csv --custom.dev dev.csv"
    return [
        f'fastbert fill {name} "{WITH_MASK}"',
        f"fastbert finetune --model {name} --task mine {files} --out results/mine",
        f"fastbert pretrain --init-from {name} --data more.txt --length {length} --minutes 10 --out {following}",
    ]


def closing_lines(
    run: Path,
    model: Path,
    exports: Path | None,
    curves: Path | None,
    page: Path | None,
    *,
    length: int,
    native: bool,
    head: str | None,
) -> list[str]:
    """All closing lines, without those of the exports, the curves and the report where their paths are None."""
    return [
        f"Model   {model}",
        *([f"Exports {exports}"] if exports else []),
        *([f"Curves  {curves}"] if curves else []),
        *([f"Report  {page}"] if page else []),
        f"Run     {run}   (tensorboard --logdir {shlex.quote(str(run.parent))})",
        "",
        "In Python",
        *(f"    {line}" for line in snippet(model, native, head)),
        "",
        "On the command line",
        *(f"    {line}" for line in commands(run, length)),
    ]
