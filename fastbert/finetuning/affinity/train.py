"""Fine-tuning of a group of tasks for a comparison: a number of steps, the last weights, the scores on dev."""

from collections.abc import Sequence
from functools import partial

from fastbert.errors import UserError
from fastbert.finetuning.affinity.run import ADVICE, SteppedTuner, updater_of
from fastbert.finetuning.affinity.setup import AffinitySetup, mixed
from fastbert.finetuning.dev_scores import dev_figures, selection_value
from fastbert.finetuning.scoring import BATCH, predict_scores
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.progress import progress
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import NoLogbook


def train_group(
    setup: AffinitySetup, names: Sequence[str], seed: int, interrupts: Interrupts
) -> dict[str, float] | None:
    """Trains the tasks `names` together, for the number of steps of the run that was probed. No epoch is
    selected on dev.

    Returns:
        The first metric of each task on dev, the mean over its dev splits; None if a signal ended the training.

    Raises:
        UserError: training diverged.
    """
    options, tasks = setup.options, [task for task in setup.tasks if task.name in names]
    parts = [SingleTaskStream(task.name, setup.orders[task.name], options.batch_size, seed) for task in tasks]
    updater = updater_of(setup, tasks, seed)
    stream = mixed(parts, seed)  # of one task: that of `fastbert finetune`
    tuner = SteppedTuner(updater, stream, setup.tuning, seed, NoLogbook(), total=options.steps)
    with progress(f"training {'+'.join(names)}, seed {seed}", options.steps, "steps") as shown:
        if not tuner.run(interrupts, lambda: shown.update(tuner.progress.step)):
            return None
    found = {}
    for task in tasks:
        batch_size = options.machine.micro_batch_size or BATCH
        score = partial(predict_scores, updater.module, task.name, precision=setup.precision, batch_size=batch_size)
        splits = setup.dev[task.name]
        figures = {split: dev_figures(task, score(inputs), inputs.examples) for split, inputs in splits.items()}
        if any(None in metrics.values() for metrics in figures.values()):
            raise UserError(f"training {'+'.join(names)}, seed {seed}, diverged: scores on dev are not finite{ADVICE}")
        found[task.name] = selection_value(task, figures)
    return found
