"""Files that claim, hold or nest more than anything of use, and files of another shape."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    **{"model_type": "fastbert", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"intermediate_size": 8, "max_position_embeddings": 8, "type_vocab_size": 0, "hidden_dropout_prob": 0.1},
    **{"attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12, "initializer_range": 0.02, "norm": "post"},
    **{"position": "absolute", "cls_attention": "untied", "relative_buckets": 32, "relative_max_distance": 128},
}
MODELS = {  # the configuration of a model whose weights are two numbers
    "layers": {"num_hidden_layers": 10**9},
    "layers-float": {"num_hidden_layers": 1e9},
    "layers-text": {"num_hidden_layers": "12"},
    "vocabulary": {"vocab_size": 10**12},
    "width": {"hidden_size": 2**40},
    "positions": {"max_position_embeddings": 10**15},
    "digits": {"vocab_size": 10**30},
    "null": {"position": None},
    "escape": {"position": "\x1b[2J"},
    "long": {"position": "x" * 10**6},
    "type": {"model_type": ["x" * 10**6]},
    "finite": {"layer_norm_eps": float("nan")},
}
CHANGED = "a" + "\nb" * 3 + "\x1b[31m"


def files(folder: Path) -> None:
    for name, text in {
        "deep": "a: " + "[" * 50_000,
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "digits": "steps: " + "9" * 5000,
        "twice": "length: 32\nsteps: 5\nlength: 64\n",
        "both": "batch-size: 8\nbatch_size: 16\n",
        "tag": "steps: !!python/object/apply:os.getcwd []\n",
        "octal": "seed: 010\n",
        "key": "3: 4\n",
        "value": f"length: {json.dumps(CHANGED)}\n",
        "long-value": f"length: {'x' * 100_000}\n",
        "long-key": f"? {'x' * 100_000}\n: 3\n",
        "seeds": "models: [a]\ntasks: [rte]\nseeds: 1000000000\n",
        "axes": f"models: [a]\ntasks: [rte]\nepochs: {list(range(1, 201))}\nbatch_sizes: {list(range(1, 201))}\n",
        "jobs": f"models: {[f'm{n}' for n in range(60)]}\ntasks: [rte]\nseeds: 200\n",
        "variants": "base: {steps: 10}\nvariants: {a: , b: {norm: pre}}\nseeds: 1000000000\n",
        "group": "base: {steps: 10, norm: pre}\nvariants: {a: , b: {norm: {a: 1}}}\n",
        "trials": "base: {steps: 10}\nvariants: {a: , b: {norm: pre}}\ntasks: [rte]\ntrials: 5000\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, changes in MODELS.items():
        model(folder / name, json.dumps(CONFIG | changes))
    model(folder / "json-deep", "[" * 100_000)
    model(folder / "json-digits", '{"model_type": ' + "9" * 10**6 + "}")
    model(folder / "json-list", "[]")
    model(folder / "header", json.dumps(CONFIG))
    (folder / "header" / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    model(folder / "pickle", json.dumps(CONFIG))
    (folder / "pickle" / "model.safetensors").unlink()
    zipped(folder / "pickle" / "pytorch_model.bin", {"archive/data.pkl": bytes(2**22)})
    with open(folder / "sparse.yaml", "wb") as file:
        file.truncate(10 * 2**30)
    zipped(folder / "zeros.zip", {"CoLA.tsv": bytes(2**24 + 1)})
    zipped(folder / "many.zip", {str(number): b"" for number in range(1001)})
    (folder / "plain.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "data").mkdir()
    (folder / "data" / "dataset.json").write_text(
        '{"format": "fastbert tokens", "format_version": ' + "[" * 30 + "]" * 30 + "}"
    )
    (folder / "tuned").mkdir()
    (folder / "tuned" / "task.json").write_text("[" * 100 + "]" * 100)
    (folder / "tuned" / "rows.jsonl").write_text('{"text": "a"}\n')


def model(folder: Path, config: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file({"encoder.words.weight": np.zeros(2, np.float32)}, folder / "model.safetensors")


def zipped(path: Path, contents: dict[str, bytes]) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    path.write_bytes(made.getvalue())


CASES = [
    ("pretrain deep.yaml", "deep.yaml: line 1: more than 32 lists and mappings inside each other"),
    ("finetune laughs.yaml", "more than 20,000 values; options have far fewer"),
    ("pretrain digits.yaml", "digits.yaml: line 1: the number 9999"),
    ("pretrain twice.yaml", "twice.yaml: line 3: length is given twice, first in line 1"),
    ("pretrain both.yaml", "both.yaml: batch_size is given twice, with - and with _"),
    ("ablate tag.yaml", "tag.yaml: line 1: the tag"),
    ("pretrain octal.yaml", "octal.yaml: line 1: '010' would be read as"),
    ("pretrain key.yaml", "key.yaml: line 1: the key 3 is not text; put it in quotes"),
    ("pretrain value.yaml", r"found text ('a\nb\nb\nb\x1b[31m')"),
    ("pretrain long-value.yaml", "xxx...)"),
    ("pretrain long-key.yaml", "unknown option 'xxx"),
    ("pretrain sparse.yaml", "configuration file sparse.yaml has more than 1,048,576 bytes"),
    ("sweep seeds.yaml", "seeds.yaml: seeds must be at most 10,000, not 1000000000"),
    ("sweep axes.yaml", "axes.yaml: tasks: rte: the axes make 40,000 settings, more than 10,000"),
    ("sweep jobs.yaml", "jobs.yaml: 12,000 jobs, and the most is 10,000"),
    ("ablate variants.yaml", "variants.yaml: seeds must be at most 10,000, not 1000000000"),
    ("ablate trials.yaml", "trials.yaml: 60,012 jobs, and the most is 10,000"),
    ("ablate group.yaml", "group.yaml: variants: b: norm must be text, found a mapping"),
    (
        "finetune --seeds 1000000000",
        "--seeds with train_fraction make 1,000,000,000 training runs, but the maximum is 10,000",
    ),
    ("export --run layers --out x", "config.json has num_hidden_layers 1000000000, and the weights lack those layers"),
    ("export --run layers-float --out x", "has num_hidden_layers 1000000000.0, which must be of type int"),
    ("export --run layers-text --out x", "has num_hidden_layers '12', which must be of type int"),
    ("export --run vocabulary --out x", "config.json: vocab_size must be at most 268,435,456, not 1000000000000"),
    ("export --run width --out x", "config.json: width must be at most"),
    ("export --run positions --out x", "config.json: max_positions must be at most"),
    ("export --run digits --out x", "vocab_size must be at most 268,435,456, not 1000000000000000000000000000000"),
    ("export --run null --out x", "has position None, which must be of type str"),
    ("export --run escape --out x", r"unknown position encoding '\x1b[2J'"),
    ("export --run long --out x", "unknown position encoding 'xxx"),
    ("export --run type --out x", "has model_type ['xxx"),
    ("export --run finite --out x", "norm_eps must be a finite number, not nan"),
    ("export --run json-deep --out x", "is damaged: more than 64 lists and objects inside each other"),
    ("export --run json-digits --out x", "is damaged: the number 999"),
    ("export --run json-list --out x", "is damaged: it holds no JSON object, but a list"),
    ("export --run header --out x", "model.safetensors is damaged"),
    ("export --run pickle --out x", "pytorch_model.bin is damaged: it holds more than its"),
    ("submit --check zeros.zip", "zeros.zip/CoLA.tsv is larger than any submission file"),
    ("submit --check many.zip", "many.zip holds 1,001 files, and a submission 11"),
    ("submit --check plain.zip", "plain.zip is damaged or not a zip file"),
    ("submit --check /dev/zero", "/dev/zero is a pipe or a device, not a file"),
    ("pretrain --data data --steps 1 --out x", "data is of format [[[["),
    (
        "predict --model tuned --source tuned/rows.jsonl --out x",
        "is damaged: more than 64 lists and objects inside each other",
    ),
]
