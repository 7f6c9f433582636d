"""The exports of a run: the one at its end, and those after numbers of words (--checkpoint-words), as BabyLM asks.

Words are those between white space in the training split. A row of a batch is [CLS] and T - 1 tokens of that split, so
n rows have floor(n (T - 1) W / N) words, for a split of W words in N tokens. In later epochs they count again. With
replay the words of the old rows count too, with W and N of the old data.
"""

from bisect import bisect_left
from pathlib import Path

import torch

from fastbert.data.replay import ReplaySchedule
from fastbert.data.shards import Dataset, whitespace_words
from fastbert.errors import UserError
from fastbert.files import make_inner_folder, refuse_link
from fastbert.hub.export import check_out, export_model
from fastbert.hub.names import exported_weights
from fastbert.objectives.objective import Objective
from fastbert.pretraining.checkpoint_words import short_count
from fastbert.pretraining.evaluation import NOT_FINITE
from fastbert.pretraining.loop import Progress
from fastbert.pretraining.run import RunFolder
from fastbert.pretraining.setup import PretrainSetup
from fastbert.ranges import LARGEST
from fastbert.streams import echo
from fastbert.training.hardware import describe_machine
from fastbert.training.splits import OLD


def words_seen(setup: PretrainSetup, steps: int) -> int | None:
    """Number of words in the first `steps` steps; None if an older version prepared the data, which did not count
    them."""
    plan, replay = setup.plan(max(steps, setup.options.steps)), setup.options.replay
    rows = plan.sequences(steps)
    before = ReplaySchedule(replay.fraction if replay.active else 0.0).old_before
    old = {length: before(count) for length, count in rows.items()}
    seen = 0
    for dataset in _trained_on(setup):
        counts = old if dataset is not setup.dataset else {length: rows[length] - old[length] for length in rows}
        if (words := whitespace_words(dataset.record, "train")) is None:
            return None
        tokens = sum(count * (length - 1) for length, count in counts.items())
        seen += tokens * words // len(dataset.split("train"))
    return seen


def _trained_on(setup: PretrainSetup) -> list[Dataset]:
    """The data of --data and, with replay, the old data."""
    return [setup.dataset, *([setup.others[OLD]] if setup.options.replay.active else ())]


def export_steps(setup: PretrainSetup) -> dict[int, list[str]]:
    """Step -> names of the exports after it. An export is written after the first step at which the model has seen its
    number of words of --checkpoint-words.

    Raises:
        UserError: the run sees fewer words, or the data has no count of them.
    """
    options, counts = setup.options, setup.options.word_counts()
    if not counts:
        return {}
    if (words := words_seen(setup, options.steps)) is None:
        uncounted = next(d.folder for d in _trained_on(setup) if whitespace_words(d.record, "train") is None)
        raise UserError(
            f"--checkpoint-words needs the number of words in {uncounted}, which an older version of "
            "fastbert prepared without counting them: remove that folder and prepare the same text again, which gives "
            "the same tokens"
        )
    if words < counts[-1]:
        needed = bisect_left(range(LARGEST), counts[-1], lo=options.steps, key=lambda step: words_seen(setup, step))
        raise UserError(
            f"--checkpoint-words {short_count(counts[-1])}: the run sees {words:,} words in its {options.steps:,} "
            f"steps; leave out the numbers above, or start a run of at least {needed:,} steps"
        )
    found: dict[int, list[str]] = {}
    for count in counts:
        step = bisect_left(range(options.steps), count, key=lambda step: words_seen(setup, step))
        found.setdefault(step, []).append(f"chck_{short_count(count)}")
    return found


def check_exports(run: RunFolder, exports: dict[int, list[str]]) -> None:
    """Raises a UserError, before the first step, if the folder of an export is a link or contains something else."""
    for folder in (run.exports / name for names in exports.values() for name in names):
        refuse_link(run.exports)
        refuse_link(folder)
        check_out(folder)


def export_lines(run: RunFolder, exports: dict[int, list[str]], step: int) -> list[str]:
    """Lines about the exports of a run that continues after `step` steps."""
    past = {done: [n for n in names if not _written(run, n)] for done, names in exports.items() if done <= step}
    lines = [f"exports in {run.exports}: {shown_exports(exports)}"] if exports else []
    if any(past.values()):
        lines.append(
            f"not exported, because the run resumes at step {step}: {shown_exports(past)}; if {run.checkpoints} has a "
            "checkpoint of that step, export it with fastbert export"
        )
    return lines


def _written(run: RunFolder, name: str) -> bool:
    return (run.exports / name / "config.json").is_file()


def shown_exports(exports: dict[int, list[str]]) -> str:
    return ", ".join(f"{name} (step {step})" for step, names in exports.items() for name in names)


def export_words(
    setup: PretrainSetup, objective: Objective, run: RunFolder, progress: Progress, names: list[str]
) -> None:
    """Writes those of the exports `names` that an interrupted session of the run has not written."""
    make_inner_folder(run.exports)
    for name in names:
        if not _written(run, name):
            export(setup, objective, run, progress, run.exports / name)


def export(setup: PretrainSetup, objective: Objective, run: RunFolder, progress: Progress, out: Path) -> None:
    """Writes the present model to the folder `out`."""
    if problem := run.restore_tokenizer(setup.vocabulary):  # damaged during the run
        echo(problem)
    export_model(
        setup.config,
        exported_weights(objective.state_dict()),
        run.tokenizer,
        out,
        card=card_facts(setup, objective, progress),
    )


def card_facts(setup: PretrainSetup, objective: Objective, progress: Progress) -> dict[str, object]:
    """Facts about the training up to now, for the model card; without the validation loss if this step has none."""
    options, machine = setup.options, describe_machine()
    optimizer, schedule, replay = options.optimizer, options.schedule, options.replay
    on_gpu = setup.device.type == "cuda"
    unit = "nats" if objective.loss_in_nats else "weighted sum of all losses"
    unigram, words = setup.dataset.split("validation").unigram_entropy, words_seen(setup, progress.step)
    facts = {
        "objective": options.objective,
        "data": options.data,
        **({"old data": f"{100 * replay.fraction:g} % of the rows, {replay.data}"} if replay.active else {}),
        "steps": progress.step,
        "tokens": progress.tokens,
        "words": "not counted" if words is None else words,
        "batches": setup.plan().describe(progress.step),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay "
        f"{optimizer.weight_decay:g}, betas {optimizer.beta1:g} and {optimizer.beta2:g}, clip {optimizer.clip_norm:g}",
        "schedule": f"{schedule.name}, warm-up {schedule.warmup:g}, final fraction {schedule.final:g}",
        "machine": f"{torch.cuda.get_device_name(setup.device) if on_gpu else machine['cpu']}, {setup.precision}",
        "minutes": f"{progress.seconds / 60:.1f}",
        "commit and torch": f"{machine['commit']}, {machine['versions']['torch']}",
    }
    if progress.last_eval.get("step") == progress.step:
        loss = progress.last_eval["loss"]
        facts[f"validation loss ({unit})"] = NOT_FINITE if loss is None else round(loss, 4)
        facts["unigram entropy of the same text (nats)"] = round(unigram, 4)
    return {**facts, "seed": options.seed}
