"""Objectives: each owns its networks and turns a batch into losses. A new one is one file and one line here.

An objective is a module with

    draw(batch, seed, step, purpose)   everything random about a micro-batch, and the counts its losses are means over
    forward(drawn)                     name -> sum, differentiable for the names in `loss_weights`; what is only looked
                                       at may be a pair of sum and count
    loss_weights                       name -> its weight in the loss
    after_step(drawn, updated)         called after the optimizer with all micro-batches of the step and whether it
                                       made an update; name -> scalar for the log
    config, encoder                    the network that is kept, and its numbers
    flops(batch, length)               of one training step over [B, T]
    parameter_count()                  in closed form

Counts are known before any forward pass, so a loss over several micro-batches (or processes) is the exact mean over all
of them. State that is no parameter is a persistent buffer: it is saved and restored with the weights.
"""

from fastbert.registry import Registry

OBJECTIVES = Registry(
    {
        "mlm": "fastbert.objectives.mlm:MLM",
        "electra": "fastbert.objectives.electra:Electra",
        "multiple-choice": "fastbert.objectives.multiple_choice:MultipleChoice",
    }
)
