"""Objectives: each owns its networks and turns a batch into losses. A new one is one file with a subclass of
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
    """The name of the group of its options: multiple-choice has --multiple-choice..., in Python multiple_choice."""
    return objective.replace("-", "_")
