"""Kinds of tasks by name. A new kind is one file, a subclass of `kind.TaskKind`, and one line here."""

from fastbert.registry import Registry

KINDS = Registry(
    {
        "classes": "fastbert.finetuning.kinds.classes:Classes",
        "multi-label": "fastbert.finetuning.kinds.multi_label:MultiLabel",
        "number": "fastbert.finetuning.kinds.number:Number",
        "tokens": "fastbert.finetuning.kinds.tokens:Tokens",
    }
)
