"""Every variant trains, resumes, exports and evaluates with the same loop."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForMaskedLM

from fastbert.model.positions import POSITIONS
from tests.flags import main

pytestmark = pytest.mark.figures

VARIANTS = {
    **{position: ["--position", position] for position in POSITIONS},
    "tied-pre-norm": ["--position", "tupe-r", "--cls-attention", "tied", "--norm", "pre"],
    "document-mask": ["--document-mask"],
    "whole-word": ["--mlm.whole-word", "--mlm.mask-rate", "0.3"],
    "segments": ["--position", "tupe-a", "--type-vocab-size", "2"],
    "cosine": ["--schedule.name", "cosine", "--schedule.final", "0.1"],
    "wsd": ["--schedule.name", "wsd"],
    "reference-kernels": ["--machine.kernels", "reference"],
    "bf16": ["--machine.precision", "bf16"],
}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory) -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant(name: str, flags, corpus, tmp_path, capsys, plain) -> None:
    run = tmp_path / "run"
    given = [*flags, "--steps", "6", "--eval-every", "3", "--checkpoint-every", "3", "--log-every", "1"]
    given += ["--machine.precision", "fp32"]  # on any machine; bf16 would round away what one border does
    assert main(["pretrain", *given, *VARIANTS[name], "--out", str(run)]) == 0
    measured = losses(run)
    assert len(measured) == 8 and all(0 < loss < 10 for loss in measured)
    plain[name] = measured
    # Resumed from the middle it ends the same.
    for path in (run / "checkpoints").glob("step-00000006/*.safetensors"):
        path.unlink()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert losses(run) == measured
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run / "model"), "--source", str(corpus), "--length", "32", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["loss"] < 10
    assert AutoModelForMaskedLM.from_pretrained(run / "model", trust_remote_code=True).num_parameters() > 10_000


def test_variants_differ_and_machine_options_do_not(plain) -> None:
    """Science options change the losses, machine options only their last digits."""
    if len(plain) < len(VARIANTS):
        pytest.skip("only a selection of the variants was run")
    same = {"reference-kernels", "bf16", "document-mask"}  # these texts have one border in six steps
    for name in set(VARIANTS) - same - {"tupe-r"}:
        assert plain[name] != plain["tupe-r"], name
    assert plain["reference-kernels"] == pytest.approx(plain["tupe-r"], rel=1e-5)
    assert plain["bf16"] == pytest.approx(plain["tupe-r"], rel=2e-2)
    assert plain["bf16"] != plain["tupe-r"]


def test_the_document_mask_counts_where_documents_are_short(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the text is prepared
    text, found = tmp_path / "text.txt", []
    text.write_text("\n\n".join(f"document {n} states that {n % 7} and {n % 5} are {n % 3}" for n in range(2000)))
    # Large weights: with small ones attention hardly matters in two steps.
    given = ["--data", str(text), "--vocab-size", "300", *flags[2:], "--steps", "2", "--initializer-std", "0.2"]
    for more in ([], ["--document-mask"]):
        run = tmp_path / f"run{len(found)}"
        assert main(["pretrain", *given, "--machine.precision", "fp32", *more, "--out", str(run)]) == 0
        found.append(losses(run))
    assert abs(found[0][0] / found[1][0] - 1) > 1e-5


def test_budget_in_minutes(flags, tmp_path) -> None:
    """Converted to steps once, and stored."""
    run = tmp_path / "run"
    index = flags.index("--steps")
    timed = [*flags[:index], *flags[index + 2 :], "--minutes", "0.04", "--eval-every", "10000", "--log-every", "100"]
    assert main(["pretrain", *timed, "--out", str(run)]) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["minutes"] == 0.04 and stored["steps"] >= 1
    assert json.loads((run / "report" / "summary.json").read_text())["step"] == stored["steps"]
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert main(["pretrain", "--resume", str(run), "--minutes", "5"]) == 2


def test_budget_in_tokens(flags, tmp_path) -> None:
    run = tmp_path / "run"
    index = flags.index("--steps")
    flags = [*flags[:index], *flags[index + 2 :], "--tokens", str(8 * 32 * 4 + 5)]
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    assert json.loads((run / "report" / "summary.json").read_text())["step"] == 4


def test_files_of_a_run(flags, tmp_path, capsys, works) -> None:
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    printed = capsys.readouterr()
    for words in ("unigram entropy", "masked loss", "masked accuracy", str(run / "model"), "curves.png"):
        assert words in printed.out
    assert "step 30/30" in printed.err and "tokens/s" in printed.err and "MFU" in printed.err and "left" in printed.err
    assert {"checking export and summary", "saving a checkpoint", "exporting the model", "filling in the examples"} <= {
        *works
    }
    assert works["validating"].total == works["validating"].done > 1
    names = {path.name.partition(".tfevents")[0] for path in run.iterdir()}
    assert names == {
        *(
            ".lock",
            "config.yaml",
            "manifest.json",
            "metrics.jsonl",
            "events.out",
            "tokenizer",
            "checkpoints",
            "model",
            "report",
        )
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["experiment"]) == 8
    session = manifest["sessions"][0]
    assert session["machine"]["versions"]["torch"] and session["resolved"]["precision"] in ("fp32", "bf16")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "step",
        "split",
        "loss",
        "lr",
        "tokens",
        "flops",
        "tokens_per_second",
        "mfu",
        "grad_norm",
        "skipped",
    } == row.keys()
    assert (run / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    cards = [run / "model" / "README.md", tmp_path / "export" / "README.md"]
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    for card in (path.read_text() for path in cards):
        for fact in (
            "| steps | 30 |",
            "| tokens | 7680 |",
            "| optimizer | adamw, learning rate 0.003, ",
            "| seed | 0 |",
        ):
            assert fact in card
        assert "| schedule | linear, warm-up 0.01" in card and "## License" in card
    assert "| commit and torch | " in cards[0].read_text() and "| batch | 8 sequences of 32 " in cards[1].read_text()


def test_a_second_run_of_the_same_file_gets_its_own_folder(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("seed: 3\n")
    for expected in ("one", "one-2"):
        assert main(["pretrain", "one.yaml", *flags, "--steps", "1"]) == 0
        assert (tmp_path / "runs" / expected / "model").is_dir()


def test_a_flag_replaces_the_budget_of_the_file(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("steps: 100000\n")
    index = flags.index("--steps")
    given = [*flags[:index], *flags[index + 2 :], "--tokens", str(8 * 32 * 3)]
    assert main(["pretrain", "one.yaml", *given]) == 0
    assert json.loads((tmp_path / "runs" / "one" / "report" / "summary.json").read_text())["step"] == 3


def test_without_matplotlib_only_the_curves_are_missing(flags, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--steps", "2", "--out", str(run)]) == 0
    printed = capsys.readouterr()
    assert "matplotlib is not installed" in printed.err and "masked loss" in printed.out
    assert "curves" not in printed.out.lower()
    assert {path.name for path in (run / "report").iterdir()} == {"summary.json", "index.html"}
    assert "Without curves: matplotlib is not installed" in (run / "report" / "index.html").read_text()
