"""Every command and snippet of the README and the docs works: executed in order, each page in a folder, at toy size.
The snippets of docs/extending.md and those that train with other libraries have tests of their own.
"""

import json
import lzma
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fastbert
from fastbert.cli import OPTIONS, main
from fastbert.flags import parse
from fastbert.named_configs import config_path
from fastbert.pretraining import dry_run
from fastbert.studies.pipelines import estimate
from tests.finetuning.conftest import make_glue
from tests.finetuning.conftest import sentence as one_sentence
from tests.studies.conftest import time_steps, write_pairs

ROOT = Path(__file__).parents[1]
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "extending.md"})
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CPU = {"--machine.device": "cpu", "--machine.threads": "1", "--machine.precision": "fp32"}
NETWORK = {"--layers": "1", "--width": "16", "--heads": "1", "--ffn": "32", "--length": "32", "--batch-size": "4"}
TOY = {
    "prepare": {"--vocab-size": "300", "--workers": "1", "--validation-fraction": "0.2"},
    "pretrain": {**NETWORK, "--steps": "2", "--eval-sequences": "4", "--data": "toy-data", **CPU},
    "evaluate": CPU,
    "affinity": {"--steps": "4", "--every": "2", "--batch-size": "4", "--seeds": "1", **CPU},
    "audit": {"--epochs": "1", "--batch-size": "16", "--folds": "2", **CPU},
    "finetune": {"--epochs": "1", "--batch-size": "16", "--seeds": "2", **CPU},
    "select": {"--count": "5", **CPU},
}
"""Options of a job that a toy replaces or adds."""
STUDY = {
    "ablate": {
        "base": {"data": "data/wiki", "layers": 1, "width": 16, "heads": 1, "ffn": 32, "length": 16, "batch_size": 4}
        | {"eval_sequences": 4, "machine": {"device": "cpu", "precision": "fp32"}},
        "budget": {"steps": 20},
        "seeds": 1,
    },
    "sweep": {},
    "active": {
        "pool": 40,
        "rounds": [8, 16],
        "learners": [{"method": "anew", "query": "random"}, {"method": "sd", "query": "margin"}],
        "seeds": 1,
        "finetune": {"epochs": 1, "max_length": 16, "machine": {"device": "cpu", "precision": "fp32"}},
    },
    "run": {
        "data": {"wiki": {"source": "held-out.txt", "vocab_size": 300, "validation_fraction": 0.3}},
        "models": [
            {"name": "absolute", "data": "wiki", "layers": 1, "width": 16, "heads": 1, "length": 16, "batch_size": 4}
            | {"steps": 2, "eval_sequences": 4, "machine": {"device": "cpu", "precision": "fp32"}}
        ],
        "stages": [{"name": "nli", "tasks": ["rte"], "epochs": 1}],
        "evaluate": {"pll": "held-out.txt", "sentences": 3},
        "finetune": {"max_length": 16, "glue_subset": True, "machine": {"device": "cpu", "precision": "fp32"}},
    },
}
"""Changes of a study's YAML file that make it a toy, and those of one with tasks."""
STUDY_TASKS = {"finetune": {"glue_subset": True, "machine": {"device": "cpu", "precision": "fp32"}}}
STUDY_TASKS |= {"epochs": 1, "seeds": 1}
IF_GIVEN = {"--machine.micro-batch-size": "2", "--checkpoint-words": "20,40,...,80"}
UNTOUCHED = ("--resume", "--help")
CHECKED = ("bench", "submit")
"""Jobs whose options are checked, but that are not run: GLUE's archive needs the official test splits."""
ON_THE_HUB = {"bert-base-uncased", "answerdotai/ModernBERT-base@main"}
"""Models of commands whose options are checked, but that are not run."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> list[list[str]]:
    """The commands of a bash block as lists of arguments, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split(" && ") if (words := shlex.split(part, comments=True))]


def toy(arguments: list[str]) -> list[str]:
    """A command of fastbert at toy size: the same, but for the options in TOY."""
    job, rest = arguments[0], list(arguments[1:])
    if job in STUDY:
        path = Path(rest[0]).with_stem(f"toy-{Path(rest[0]).stem}")
        tasks = STUDY_TASKS if "tasks" in yaml.safe_load(Path(rest[0]).read_text()) else {}
        changes = {**STUDY[job], **tasks}
        if "--glue-dir" in rest and job == "active":
            changes["finetune"] = {**changes["finetune"], "glue_subset": True}
        if "--rounds-from" in rest:
            changes = {"finetune": changes["finetune"]}
        path.write_text(yaml.safe_dump({"inherits": rest[0], **changes}))
        if "--workers" in rest:
            rest[rest.index("--workers") + 1] = "1"
        return [job, str(path), *rest[1:]]
    if job not in TOY or set(UNTOUCHED) & set(rest):
        return arguments
    chosen = dict(TOY[job])
    if job == "pretrain" and "--data" in rest and (Path(rest[rest.index("--data") + 1]) / "dataset.json").is_file():
        del chosen["--data"]
    if job in ("finetune", "affinity", "audit") and "--glue-dir" in rest:
        rest.append("--glue-subset")
    if job == "finetune" and "glue" in rest:
        chosen["--seeds"] = "1"
    if job == "evaluate":
        chosen |= {"--max-tokens": "300"} if "--source" in rest else {"--sentences": "5"} if "--pll" in rest else {}
    chosen |= {"--shard-tokens": "1024"} if "--part" in rest else {}  # so that small files can be divided
    chosen |= {flag: value for flag, value in IF_GIVEN.items() if flag in rest}
    for flag in (*chosen, "--minutes", "--tokens"):
        if flag in rest:
            index = rest.index(flag)
            del rest[index : index + 2]
    return [job, *rest, *(word for flag, value in chosen.items() for word in (flag, value))]


def check_of_several(words: list[str]) -> None:
    """Checks the options of a command that trains in several processes. tests/training and tests/test_slurm.py start
    such commands."""
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        job, arguments = "pretrain", words[2:]
    else:
        job, *arguments = words[words.index("fastbert") + 1 :]
    arguments = [word for word in arguments if word != "..."]
    if arguments and not arguments[0].startswith("-"):
        assert Path(config_path(job, arguments.pop(0))).is_file()
    if "--resume" in arguments:
        arguments.insert(arguments.index("--resume") + 1, "--out")
    parse(OPTIONS[job], arguments, job)


def check_script(words: list[str]) -> None:
    """Checks the options of a script, which has a test of its own."""
    index = next(number for number, word in enumerate(words) if word.endswith(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / words[index]).parent))  # as Python does for a script
        parser = runpy.run_path(str(ROOT / words[index]))["command_line"]()
    parser.parse_args(words[index + 1 :])


def run_command(words: list[str]) -> None:
    if words[0] in ("torchrun", "sbatch") or "--launch" in words:
        check_of_several(words)
        return
    if words[0] == "./run_pretrain.sh":
        words = ["fastbert", "pretrain", "tiny", *words[1:]]
    if words[0] == "python3":
        check_script(words)
        return
    if words[0] != "fastbert":
        known = words[0] in ("cd", "export", "git", "source", "tensorboard", "hf")
        assert known or (words[0].startswith("./") and (ROOT / words[0]).is_file()), f"unknown command: {words}"
        return
    arguments = words[1:]
    if arguments[0] in CHECKED or any(
        word in ON_THE_HUB or ("hf:" in word and "hf:books" not in word) for word in arguments
    ):
        count = 2 if arguments[0] == "bench" else 1
        parse(OPTIONS[" ".join(arguments[:count])], arguments[count:], arguments[0])
        return
    assert main(toy(arguments)) == 0, f"{shlex.join(words)} failed as {shlex.join(toy(arguments))}"


def toy_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastbert.pretrain` and `fastbert.finetune` at toy size."""

    def toy_function(job: str) -> Callable:
        function, keys = getattr(fastbert, job), {}
        for flag, value in TOY[job].items():
            group, _, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
            where = keys.setdefault(group, {}) if group else keys
            where[name] = int(value) if value.isdigit() else value

        def call(*given: object, **changes: object) -> object:
            return function(*given, **changes | keys | ({"glue_subset": True} if "glue_dir" in changes else {}))

        return call

    for job in ("pretrain", "finetune"):
        monkeypatch.setattr(fastbert, job, toy_function(job))


def write_inputs(folder: Path, corpus: Path, prepared: Path) -> None:
    """The files that the pages take for granted: text, GLUE, tables of custom tasks, and a run."""
    import random

    text = corpus.read_text()
    for path in (folder / "wiki" / "a.txt.xz", folder / "wikipedia_en.txt.xz"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lzma.compress(text[:60000].encode()))
    (folder / "babylm").mkdir()
    for name in ("held-out.txt", "books.txt", "german.txt", "babylm/a.txt"):
        (folder / name).write_text(text[:20000])
    (folder / "books").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": text[:60000].split("\n\n")}), folder / "books" / "a.parquet")
    (folder / "toy-data").symlink_to(prepared)
    (folder / "configs").symlink_to(ROOT / "configs")
    write_pairs(folder / "blimp")
    make_glue(folder / "glue", ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"))
    rng = random.Random(0)
    rows = [{"text": one_sentence(rng, word), "label": word} for word in ("bad", "good") * 20]
    for split in ("train", "dev", "new"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
        )
    pool = [{"text": one_sentence(rng, word)} for word in ("bad", "good") * 10]
    for name, content in (("pool", pool), ("train-2", [{**row, "label": "good"} for row in pool[:4]] + rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "rounds").mkdir()
    labelled = [{"text": f"{n} times {word}", "label": word, "score": 0.9} for n, word in enumerate(("bad", "good"), 2)]
    (folder / "rounds" / "round-2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    for seed, name in enumerate(("base", "absolute", "tupe-r")):
        assert main(toy(["pretrain", "--data", "data/wiki", "--seed", f"{seed}", "--out", f"runs/{name}"])) == 0


@pytest.fixture(scope="module")
def folder(corpus: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory, forked_workers) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(folder, corpus, prepared)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_works(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    (tmp_path / "runs").mkdir()
    (tmp_path / "data").mkdir()
    links = {
        path.name: path for path in folder.iterdir() if path.name != "runs"
    }  # each page starts from the same files
    links |= {f"runs/{path.name}": path for path in (folder / "runs").iterdir()} | {"data/wiki": folder / "toy-data"}
    for name, path in links.items():
        if not re.search(rf"--out {name}\b", text):
            (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    time_steps(monkeypatch, lambda *given: 0.1)
    monkeypatch.setattr(dry_run, "SECONDS", 0.05)  # of timed steps
    monkeypatch.setattr(estimate, "STEP_SECONDS", 0.05)
    toy_functions(monkeypatch)
    pushed: list[str] = []
    for cls in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(cls, "push_to_hub", lambda self, name: pushed.append(name))
    for language, block in blocks(page):
        if language == "bash":
            for words in commands(block):
                run_command(words)
        elif language == "python" and "trainer.train()" not in block:  # tests/hub/test_training_examples.py runs these
            exec(compile(block, str(page), "exec"), {"__name__": "snippet"})
        elif language == "yaml" and (file := re.match(r"# (\S+\.yaml)\n", block)):
            Path(file[1]).write_text(block)
        else:
            assert language in ("python", "yaml", "text"), f"{page}: a block in {language} is not run by any test"
    assert len(pushed) == 2 * ("push_to_hub" in text)


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, *(ROOT / "docs" / "results").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target} does not exist"


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.stem != "index" and page.name not in index]
