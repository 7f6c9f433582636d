"""What people type who come from transformers' Trainer, nanochat, a spreadsheet or an earlier version."""

from pathlib import Path

MINE = "--model run --task mine --custom.train custom.csv --custom.dev custom.csv --out new"
RUN = "--data text.txt --out new"


def files(folder: Path) -> None:
    (folder / "text.txt").write_text("a text\n\nanother text\n")
    (folder / "strings.json").write_text('["a", "b"]')
    (folder / "custom.csv").write_text("text;label\na;0\nb;1\n")
    (folder / "bars.csv").write_text("n|body\n1|a\n")
    (folder / "quoted.tsv").write_text('n\ttext\n1\t"a\nb"\n')
    for name in (
        "ready",
        "run/checkpoints",
        "glue/RTE",
        "results/seed-0/model",
        "runs/x/checkpoints/step-1",
        "runs/x/exports/chck_1M",
        "runs/x/model",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "ready" / "dataset.json").write_text("{}")
    (folder / "runs" / "x" / "config.yaml").write_text("steps: 3")
    (folder / "runs" / "x" / "model" / "config.json").write_text("{}")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text("{}")
    (folder / "results" / "seed-0" / "model" / "task.json").write_text("{}")
    for name, text in {
        "pretrain": "data: text.txt\nsteps: 3\n",
        "finetune": "task: rte\nseeds: 3\n",
        "sweep": "models: [a]\ntasks: [rte]\n",
        "ablate": "base: {steps: 3}\nvariants: {a: }\n",
        "one": "train: custom.csv\ndev: custom.csv\n",
        "two": "train: custom.csv\ndev: custom.csv\n",
        "own-sweep": "models: [run]\ntasks: [one.yaml]\n",
        "subset": "models: [run]\ntasks: [one.yaml]\nfinetune: {glue_subset: true}\n",
        "entry": "models: [run]\ntasks: [{task: rte}, {task: one.yaml, glue_subset: true}]\n",
        "own-ablate": "base: {data: text.txt, steps: 3}\nvariants: {a: }\ntasks: [one.yaml]\n",
        "trainer": "lr_scheduler_type: linear\n",
        "earlier": "data: text.txt\nnotes: {weight: 0.5}\n",
        "earlier-ablation": "base: {data: text.txt, steps: 3, batch-start: 4}\nvariants: {a: }\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)


CASES = [
    *[
        (f"pretrain {RUN} --{theirs} 3", f"unknown option --{theirs.replace('_', '-')}; did you mean --{ours}? See")
        for theirs, ours in {
            "learning_rate": "optimizer.learning-rate",
            "per_device_train_batch_size": "batch-size",
            "device_batch_size": "machine.micro-batch-size",
            "model_name_or_path": "init-from",
            "output_dir": "out",
            "max_seq_length": "length",
            "warmup_ratio": "schedule.warmup",
            "mlm_probability": "mlm.mask-rate",
            "save_steps": "checkpoint-every",
            "num_iterations": "steps",
            "depth": "layers",
            "fp16": "machine.precision",
            "optimizer": "optimizer.name",
            "schedule": "schedule.name",
            "notes": "notes.enabled",
        }.items()
    ],
    *[
        (f"pretrain {RUN} --{before} 3", f"unknown option --{before}; did you mean --{now}? See")
        for before, now in {
            "notes.least": "notes.min-count",
            "notes.most": "notes.max-count",
            "notes.weight": "notes.mix",
            "electra.weight": "electra.loss-weight",
            "multiple-choice.weight": "multiple-choice.loss-weight",
            "batch-start": "initial-batch-size",
            "cls": "cls-attention",
        }.items()
    ],
    ("pretrain earlier.yaml", "notes: unknown option 'weight'; did you mean mix?"),
    ("ablate earlier-ablation.yaml", "base: unknown option 'batch_start'; did you mean initial_batch_size?"),
    (f"pretrain {RUN} --num_train_epochs 3", "--num-train-epochs; the budget is --steps, --tokens or --minutes; see"),
    (f"pretrain {RUN} --gpus 2", "--gpus; pretrain and finetune use several GPUs under torchrun"),
    (f"pretrain {RUN} --overwrite_output_dir", "nothing is overwritten: remove it or choose another --out; see"),
    ("finetune --num_train_epochs 3", "--num-train-epochs; did you mean --epochs?"),
    ("finetune --train_file a.csv", "did you mean --custom.train?"),
    ("finetune --task_name rte", "did you mean --task?"),
    ("prepare --input text.txt", "did you mean --source?"),
    ("prepare --encoding latin1", "an iconv command is printed"),
    ("evaluate --data text.txt", "did you mean --source?"),
    ("export --model a --out b", "did you mean --run?"),
    ("prepare text.txt", "'text.txt' belongs to no option; options begin with --, such as --source text.txt, see"),
    (
        "predict --model results/era --source custom.csv",
        "give the folder of a fine-tuned model: the --out of `fastbert",
    ),
    ("pretrain tiny.yaml", "there is no file tiny.yaml; the configuration that comes with fastbert is called tiny"),
    ("fill 'a [MASK] of the'", "the model comes before the text: fastbert fill MODEL 'a [MASK] of the'"),
    (
        "evaluate --model my/bert --source text.txt",
        "there is no folder my/bert, and the cache of the Hugging Face hub",
    ),
    ("pretrain runs/x", "runs/x is a folder; it is a run: resume it with fastbert pretrain --resume runs/x, or start"),
    ("pretrain bert", "bert is a folder; it is a model: start from its weights with --init-from bert"),
    ("pretrain ready --steps 3", "ready is a folder; it is prepared data: fastbert pretrain --data ready"),
    (
        "pretrain text.txt --steps 3",
        "text.txt is text, not a YAML file; give it as --data text.txt",
    ),
    ("finetune runs/x", "runs/x is a folder; give a file, and a model as --model runs/x"),
    ("sweep results", "results is a folder; give a file; to continue the study in a folder, repeat the command"),
    (
        "pretrain --resume runs/x/model",
        "it is the export of a run: resume it with fastbert pretrain --resume runs/x, or",
    ),
    (
        "pretrain --resume runs/x/checkpoints/step-1",
        "it is a checkpoint of a run: resume it with fastbert pretrain --res",
    ),
    (
        "pretrain --resume runs/x/exports/chck_1M",
        "it is an export of a run: resume it with fastbert pretrain --resume r",
    ),
    ("pretrain --resume bert", "no run to resume in bert: it is a model: start from its weights with --init-from bert"),
    ("pretrain --resume ready", "no run to resume in ready: it is prepared data: fastbert pretrain --data ready"),
    ("pretrain --resume pretrain.yaml", "it is a YAML file, which comes first: fastbert pretrain pretrain.yaml"),
    (
        "pretrain --data pretrain.yaml --steps 3",
        "pretrain.yaml is a YAML file by its suffix .yaml, which is not read; op",
    ),
    ("pretrain --data bert --steps 3", "bert is a model, not text; --init-from bert starts from its weights"),
    ("pretrain trainer.yaml", "unknown option 'lr_scheduler_type'; did you mean schedule: name?"),
    ("pretrain finetune.yaml", "the file looks like one for fastbert finetune"),
    ("pretrain ablate.yaml", "the file looks like one for fastbert ablate"),
    ("finetune pretrain.yaml", "the file looks like one for fastbert pretrain"),
    ("sweep pretrain.yaml", "the file looks like one for fastbert pretrain"),
    ("ablate sweep.yaml", "the file looks like one for fastbert sweep"),
    ("export --run ready --out new", "ready holds prepared data, not a model; fastbert pretrain --data ready trains"),
    (
        "evaluate --model results --source text.txt",
        "results holds the models of several seeds; give one of them, such as results/seed-0",
    ),
    ("predict --model results --source bars.csv --out new", "not all of its seeds are trained; run fastbert finetune"),
    ("finetune --model run --task rte --glue-dir . --out new", "did you mean --glue-dir glue?"),
    (
        "finetune --model run --task rte --glue-dir glue/RTE --out new",
        "glue/RTE has no folder RTE; it holds nothing; did you mean --glue-dir",
    ),
    (
        "finetune --model run --task mine --custom.train custom.csv --out new",
        "for a custom task, give --custom.dev",
    ),
    (
        "finetune --model run --task cola, --out new",
        "'cola,' has no name before or after one of its commas; leave out that",
    ),
    (
        f"finetune {MINE.replace('csv', 'csv/')}",
        "custom.csv/ ends with a slash but is a file, not a folder; leave out the",
    ),
    (f"finetune {MINE} --glue-dir glue", "--glue-dir is for GLUE, and mine is not a GLUE task; leave it out"),
    (f"finetune {MINE} --glue-subset", "--glue-subset is for GLUE, and mine is not a GLUE task; leave it out"),
    (
        "predict --model results/seed-0 --task mine --custom.dev custom.csv --out new --glue-dir glue",
        "--glue-dir is for GLUE, and mine is not a GLUE task",
    ),
    (
        "finetune --model run --task one.yaml,two.yaml --out new --glue-dir glue",
        "one.yaml and two.yaml are not GLUE tasks",
    ),
    ("sweep own-sweep.yaml --glue-dir glue", "glue_dir is for GLUE, and one.yaml is not a GLUE task; leave it out"),
    ("sweep subset.yaml", "glue_subset is for GLUE, and one.yaml is not a GLUE task; leave it out"),
    ("sweep entry.yaml", "glue_subset is for GLUE, and one.yaml is not a GLUE task; leave it out"),
    ("ablate own-ablate.yaml --glue-dir glue", "glue_dir is for GLUE, and one.yaml is not a GLUE task; leave it out"),
    ("ablate ablate.yaml --glue-dir glue", "glue_dir is for GLUE, and there is no task; leave it out"),
    ("prepare --source nothere.csv --out new", "'nothere.csv' does not exist; give a file"),
    (f"pretrain {RUN} --steps 1k", "--steps must be a whole number, not '1k'; write 1000"),
    (f"pretrain {RUN} --tokens 2.5M", "--tokens must be a whole number, not '2.5M'; write 2500000"),
    (f"pretrain {RUN} --steps 1,000", "not '1,000'; write 1000"),
    (f"pretrain {RUN} --optimizer.learning-rate 0,001", "not '0,001'; write 0.001"),
    (f"pretrain {RUN} --mlm.mask-rate 15%", "not '15%'; write 0.15"),
    (f"pretrain {RUN} --minutes 30m", "not '30m'; write it without a unit"),
    (
        "prepare --source '~/text.txt' --out new",
        "~ does not mean the home folder within quotes or after =: give the whole",
    ),
    ("prepare --source https://a.org/b.txt --out new", "download the file first and give its path"),
    ("prepare --source owner/name --out new", "a dataset on the hub is hf:owner/name"),
    ("prepare --source txet.txt --out new", "'txet.txt' does not exist; did you mean 'text.txt'? Else give a file"),
    (
        "prepare --source ready --out new",
        "ready is prepared data, not text; use it with fastbert pretrain --data ready",
    ),
    ("pretrain --data run --steps 3", "run is a run, not text; a run is resumed with --resume run"),
    ("prepare --source strings.json --out new", "jq -c '.[] | {text: .}' FILE.json > FILE.jsonl"),
    ("prepare --source bars.csv --out new", "has no column 'text'; known: body, n; choose with"),
    ("prepare --source quoted.tsv --out new", "if this one has quotes around fields, rename it to .csv"),
]
