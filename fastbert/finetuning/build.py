"""Model and optimizer of a fine-tuning."""

from collections.abc import Mapping

import torch

from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.loop import build_scaled_optimizer
from fastbert.finetuning.model import new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.hub.load import Pretrained
from fastbert.training.step import Updater
from fastbert.training.world import ONE_PROCESS, World


def build_updater(
    options: FinetuneOptions,
    pretrained: Pretrained,
    kinds: Mapping[str, TaskKind],
    seed: int,
    device: torch.device,
    precision: str,
    world: World = ONE_PROCESS,
) -> Updater:
    """Builds the model with a new head for each of `kinds`, and its optimizer.

    Args:
        options: with the learning rate resolved.
        kinds: name of a head -> the kind of its task.
    """
    model = new_task_model(
        pretrained,
        kinds,
        seed,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        kernels=options.machine.kernels,
    ).to(device)
    optimizer = build_scaled_optimizer(
        model.named_parameters(),
        model.encoder.config,
        options.optimizer(options.learning_rate),
        options.layer_decay,
        device,
        options.machine.apex,
    )
    network = world.distributed(model, device, partly_used=len(kinds) > 1)
    return Updater(model, optimizer, options.clip_norm, precision, world, network)
