"""`prepare` with every kind of source: equal bytes for any number of workers, and after kill -9 at any point."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastbert.cli import main
from fastbert.data import corpus as corpus_module
from fastbert.data import integrity, partial, rare, shards, tokenizer
from fastbert.data import prepare as prepare_module
from fastbert.data.hashing import text_hash
from fastbert.data.prepare import PrepareOptions, prepare
from fastbert.data.shards import SPLITS, open_dataset, read_record, whitespace_words
from fastbert.data.sources import open_source
from fastbert.data.tally import sums
from fastbert.errors import UserError
from fastbert.progress import Progress
from tests.data.small_corpora import contents, small_batches, write_corpus

BATCH = 1_500  # characters


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as text and Parquet, others as JSONL and as a folder that datasets saved."""
    folder = tmp_path_factory.mktemp("texts")
    documents = write_corpus(folder / "a.txt", 250, seed=1)
    pq.write_table(pa.table({"text": documents}), folder / "a.parquet", row_group_size=30)
    others = write_corpus(folder / "b.txt", 200, seed=2)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in others))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": others}).save_to_disk(folder / "saved")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch, BATCH_CHARACTERS=BATCH)


KINDS = {
    "text": {"source": "{0}/a.txt"},
    "parquet": {"source": "{0}/a.parquet"},
    "list": {"source": "{0}/a.parquet,{0}/b.jsonl", "column": "text,body", "shard_tokens": 1024},  # two groups
    "mixture": {"source": "{0}/a.parquet,{0}/b.txt,hf:{0}/saved", "weights": "0.5,0.3,0.2"},
}
KINDS["copies"] = {**KINDS["mixture"], "drop_duplicates": True}  # what datasets saved is in b.txt too


def options_of(texts: Path, kind: str, out: Path, **changes: object) -> PrepareOptions:
    given = {name: value.format(texts) if isinstance(value, str) else value for name, value in KINDS[kind].items()}
    usual = {"vocab_size": 300, "validation_fraction": 0.2, "rare_min": 3, "rare_max": 20, "workers": 1}
    return PrepareOptions(**{"out": str(out), "shard_tokens": 4096, **usual, **given, **changes})


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source, prepared without interruption."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch, BATCH_CHARACTERS=BATCH)
        return {kind: prepare(options_of(texts, kind, out / kind), table=io.StringIO()) for kind in KINDS}


def test_parquet_and_text_give_the_same_corpus(finished: dict[str, Path]) -> None:
    one, other = contents(finished["text"]), contents(finished["parquet"])
    assert {**one, "dataset.json": b""} == {**other, "dataset.json": b""}


def test_words_are_counted_between_white_space(texts: Path, finished: dict[str, Path]) -> None:
    documents = list(open_source(f"{texts}/a.txt").documents())
    training = text_hash(0, documents) >= np.uint64(int(0.2 * 2**64))
    words = np.array([len(text.split()) for text in documents])
    record = read_record(finished["text"])
    assert [whitespace_words(record, split) for split in SPLITS] == [words[training].sum(), words[~training].sum()]


@pytest.mark.parametrize("kind", KINDS)
def test_workers_and_states_leave_no_trace(
    texts: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    usual = contents(finished[kind])
    assert not [name for name in usual if Path(name).name.startswith(".")]
    small_batches(monkeypatch, STATE_SECONDS=0.05)
    assert contents(prepare(options_of(texts, kind, tmp_path / "two", workers=2), table=io.StringIO())) == usual
    small_batches(monkeypatch, BATCH_CHARACTERS=2**21)
    assert contents(prepare(options_of(texts, kind, tmp_path / "one"), table=io.StringIO())) == usual
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


DIES = """
import os, signal
import fastbert.data.corpus as corpus_module, fastbert.data.partial as partial
import fastbert.data.finish as finish, fastbert.data.prepare as job
corpus_module.BATCH_CHARACTERS, corpus_module.STATE_SECONDS = {batch}, 0

def dying(function):
    calls = 0
    def call(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls > {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call

if __name__ == "__main__":
    {point} = dying({point})
    job.prepare(job.{options!r})
"""


def run_and_die(folder: Path, options: PrepareOptions, point: str, calls: int) -> None:
    code = DIES.format(batch=BATCH, point=point, calls=calls, options=options)
    (folder / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, folder / "run.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not Path(options.out).exists()
    (folder / "run.py").unlink()


@pytest.mark.parametrize(
    ("point", "calls", "least"),
    [
        ("job._train", 0, 0),  # nothing is there yet
        ("corpus_module.Corpus.add", 0, 0),  # the tokenizer
        ("corpus_module.Corpus.add", 11, 11),  # a state after each batch
        ("partial.os.replace", 9, 4),  # within a later save
        ("job.write_dataset", 0, 20),  # all is tokenized
        ("finish._record", 1, 20),
        ("partial.os.rename", 1, 20),  # whole, but for its name
    ],
)
def test_killed_and_continued(
    texts: Path,
    finished: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    calls: int,
    least: int,
) -> None:
    """`least`: number of batches that are not tokenized again."""
    options = options_of(texts, "copies", tmp_path / "out", workers=2 if point == "corpus_module.Corpus.add" else 1)
    run_and_die(tmp_path, options, point, calls)
    trained, encoded = [], []
    train, encode = prepare_module._train, corpus_module.encode_in_worker
    monkeypatch.setattr(prepare_module, "_train", lambda *a: trained.append(1) or train(*a))
    monkeypatch.setattr(corpus_module, "encode_in_worker", lambda *a: encoded.append(1) or encode(*a))
    out = prepare(dataclasses.replace(options, workers=1), table=io.StringIO())
    assert contents(out) == contents(finished["copies"])
    assert open_dataset(out).record["duplicates"]["documents"] > 50
    assert len(trained) == (point == "job._train")
    source = open_source(options.source, weights=options.weights)
    total = len(list(corpus_module._batches(source, source.groups(2 * options.shard_tokens), 0)))
    assert total > 20 and len(encoded) <= total - least and (len(encoded) == 0) == (least == 20)
    assert os.listdir(tmp_path) == ["out"]


def test_a_part_is_killed_and_continued(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With counts on the disk; and another part in the same folder begins anew."""
    whole = prepare(options_of(texts, "list", tmp_path / "whole", part="2/2"), table=io.StringIO())
    options = options_of(texts, "list", tmp_path / "out", part="2/2")
    run_and_die(tmp_path, options, "corpus_module.Corpus.add", 5)
    monkeypatch.setattr("fastbert.data.tally.MOST", 50)  # a run for each batch
    add = corpus_module.Corpus.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_module.Corpus, "add", lambda self, *a: add(self, *a) if self.batches < 9 else interrupt())
        prepare(options)
    runs = list((tmp_path / ".out.partial").glob("words-*.npy"))
    (tmp_path / ".out.partial" / "words-00099.counts.npy").write_bytes(b"")  # of a later batch
    assert len(runs) > 4
    capsys.readouterr()
    out = prepare(options, table=io.StringIO())
    assert "continuing the unfinished work" in capsys.readouterr().err and not (out / "words-00099.counts.npy").exists()
    tallies = ("words-", "documents-")
    files = [{n: c for n, c in contents(f).items() if not n.startswith(tallies)} for f in (whole, out)]
    assert files[0].pop("dataset.json") != files[1].pop("dataset.json") and files[0] == files[1]  # it lists the runs
    totals = []
    for folder in (whole, out):
        found = list(sums(sorted(folder.glob("words-*.hashes.npy"))))
        totals.append({word: n for words, counts in found for word, n in zip(words, counts, strict=True)})
    assert totals[0] == totals[1] and len(totals[0]) > 100
    run_and_die(tmp_path, dataclasses.replace(options, out=str(tmp_path / "b")), "corpus_module.Corpus.add", 3)
    prepare(dataclasses.replace(options, out=str(tmp_path / "b"), part="1/2"), table=io.StringIO())
    assert "starting from the beginning" in capsys.readouterr().err


def interrupt() -> None:
    raise KeyboardInterrupt


def test_killed_repeatedly(
    texts: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(texts, "list", tmp_path / "out")
    source = open_source(options.source, options.column)
    first = len(list(corpus_module._batches(source.slice(0, 1), [(0, 1)], 0)))
    for calls in (7, first - 9, 5, 4):
        run_and_die(tmp_path, options, "corpus_module.Corpus.add", calls)
    record = json.loads(np.load(tmp_path / ".out.partial" / ".state.npz")["record"].tobytes())
    assert (record["group"], record["batches"]) == (1, 7 - 9 + 5 + 4)
    shown = record_progress(monkeypatch, corpus_module)
    assert contents(prepare(options, table=io.StringIO())) == contents(finished["list"])
    skipped, tokenized = shown
    assert source.chunks[0].size == skipped.before < record["position"] < tokenized.total, "the first file is not read"
    assert skipped.total == skipped.done == tokenized.before == record["position"]
    assert tokenized.done == tokenized.total == open_source(options.source, options.column).size


def test_every_pass_shows_its_progress_to_the_end(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = record_progress(monkeypatch, tokenizer, corpus_module, rare, partial, integrity, shards)
    out = prepare(options_of(texts, "text", tmp_path / "out"), table=io.StringIO())
    open_dataset(out, verify=True)
    assert [(work.label, work.done) for work in shown] == [(work.label, work.total) for work in shown]
    assert list(dict.fromkeys(work.label for work in shown)) == [
        *("reading a sample for the tokenizer", "training the tokenizer", f"verifying {tmp_path / '.out.partial'}"),
        *("tokenizing", "finding rare words", "flushing the files to the disk"),
        *(f"verifying {out}", f"checking {out}"),
    ]


def record_progress(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[Progress]:
    """Records the progress of everything that `modules` do from now on."""
    shown = []

    @contextmanager
    def recorded(label: str, total: int = 0, unit: str = "B", done: int = 0) -> Iterator[Progress]:
        shown.append(Progress(label, total, unit, done))
        shown[-1].before = done
        yield shown[-1]

    for module in modules:
        monkeypatch.setattr(module, "progress", recorded)
    return shown


def test_another_source_or_option_starts_from_the_beginning(
    texts: Path, finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a message, because hours of work may be dropped."""
    run_and_die(tmp_path, options_of(texts, "text", tmp_path / "out", seed=5), "corpus_module.Corpus.add", 8)
    out = prepare(options_of(texts, "text", tmp_path / "out"), table=io.StringIO())
    assert f"starting from the beginning: the unfinished work in {tmp_path / '.out.partial'}" in capsys.readouterr().err
    assert contents(out) == contents(finished["text"]) and os.listdir(tmp_path) == ["out"]


def test_damaged_files_are_reported(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice is how to start from the beginning."""
    options = options_of(texts, "copies", tmp_path / "out")
    run_and_die(tmp_path, options, "corpus_module.Corpus.add", 8)
    folder = tmp_path / ".out.partial"
    for name, change in {
        ".state.npz": lambda content: content[:500],
        ".keys": lambda content: bytes([content[0] ^ 1]) + content[1:],
        "/.keys": lambda content: content[:-8],  # or zeros would stand there
        "//.keys": None,
        ".tokenizer.json": lambda content: content.replace(b"bytes", b"cytes", 1),
        ".made_of.json": lambda content: content[1:],
    }.items():
        path = folder / name.strip("/")
        whole = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(whole))
        with pytest.raises(UserError, match=rf"{path.name}.*; remove {folder} to start from the beginning"):
            prepare(options, table=io.StringIO())
        assert "the same command" not in capsys.readouterr().err
        path.write_bytes(whole)


def test_interrupted_and_continued(
    texts: Path,
    finished: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = options_of(texts, "text", tmp_path / "out")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "write_dataset", interrupt)
        prepare(options)
    assert "the same command continues it" in capsys.readouterr().err
    assert contents(prepare(options)) == contents(finished["text"])
    assert "continuing the unfinished work" in capsys.readouterr().err


def test_two_processes_prepare_one_folder(texts: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    """The second waits and uses the result of the first."""
    options = options_of(texts, "text", tmp_path / "out")
    code = (
        "import time, fastbert.data.prepare as job\n"
        "write = job.write_dataset\n"
        "job.write_dataset = lambda *a: (time.sleep(2), write(*a))[1]\n"
        f"job.prepare(job.{options!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / ".state.npz").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    before = time.time_ns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_write", None)
        prepare(options, table=io.StringIO())
    assert first.communicate()[1] and first.returncode == 0
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns > before
    assert contents(tmp_path / "out") == contents(finished["text"]) and os.listdir(tmp_path) == ["out"]


def test_workers_exit_with_a_killed_parent(texts: Path, tmp_path: Path) -> None:
    options = options_of(texts, "text", tmp_path / "out", workers=2)
    code = (
        "import time, fastbert.data.prepare as job\n"
        "if __name__ == '__main__':\n"
        "    job.write_dataset = lambda *a: time.sleep(60)\n"
        f"    job.prepare(job.{options!r})\n"
    )
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / ".state.npz").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL)
    run.wait()
    while any(Path(f"/proc/{child}/cmdline").exists() and _alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_table_shows_each_source(
    texts: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = open_dataset(finished["mixture"]).record
    parts = record["sources"]
    assert [part["weight"] for part in parts] == [0.5, 0.3, 0.2] and [p["ran_out"] for p in parts].count(True) == 1
    for split, figures in record["splits"].items():
        for figure in ("documents", "bytes", "tokens"):
            assert sum(part[split][figure] for part in parts) == figures[figure]
    size = {part["source"]: sum(part[split]["bytes"] for split in record["splits"]) for part in parts}
    for part in parts:
        assert size[part["source"]] / sum(size.values()) == pytest.approx(part["weight"], abs=0.02)
    arguments = ["--source", KINDS["mixture"]["source"].format(texts), "--weights", "0.50,0.3,0.2"]
    usual = ["--vocab-size", "300", "--validation-fraction", "0.2", "--rare-min", "3", "--rare-max", "20"]
    more = ["--shard-tokens", "4096", "--streamed", "--out", str(finished["mixture"])]
    assert main(["prepare", *arguments, *usual, *more]) == 0
    shown = capsys.readouterr()
    assert "already prepared" in shown.err and "50.00%" in shown.out and "a.parquet" in shown.out
    assert "has no more documents" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "a.parquet,b.txt", "--weights", "2,1"], "sum to 3, not to 1; for these proportions write"),
        (["--source", "a.parquet", "--column", "body"], "has no column 'body'"),
        (["--source", "hf:saved::test"], "has no split 'test'"),
        (["--source", "hf:no/where"], "give a local copy"),
    ],
)
def test_refusals_come_before_any_work(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(texts)
    assert main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not os.listdir(tmp_path)
