"""Objectives: each owns its networks and computes losses from a batch. A new one is one file with a subclass of
`objective.Objective`, and one line here."""

from fastbert.registry import Registry, Variant

OBJECTIVES = Registry(
    {
        "mlm": Variant("fastbert.objectives.mlm:MLM", "fastbert.objectives.options:MLMOptions"),
        "electra": Variant("fastbert.objectives.electra:Electra", "fastbert.objectives.options:ElectraOptions"),
        "multiple-choice": Variant(
            "fastbert.objectives.multiple_choice:MultipleChoice", "fastbert.objectives.options:MultipleChoiceOptions"
        ),
    }
)


def group_of(objective: str) -> str:
    """Name of the group of an objective's options: multiple_choice for multiple-choice (--multiple-choice...)."""
    return objective.replace("-", "_")
