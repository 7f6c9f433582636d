"""Folders of runs as `fastbert pretrain` leaves them, without training, and one browser for all tests of a process."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCIENCE = {
    **{"objective": "mlm", "position": "absolute", "length": 32, "batch_size": 8, "steps": 40, "seed": 0},
    **{"optimizer.learning_rate": 0.001, "data": "c786d4f6"},
}


def make_run(folder: Path, records: list[dict] | None = None, finished: bool = True, **science: Any) -> Path:
    """Writes a run of 40 steps with a training record every second step and a validation every tenth."""
    science = {**SCIENCE, **science}
    if records is None:
        records = [
            record for step in range(2, 41, 2) for record in records_at(step, science["optimizer.learning_rate"])
        ]
    machine = {"cpu": "a CPU", "cores": 2, "gpus": [], "commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}}
    resolved = {"device": "cpu", "precision": "fp32", "threads": 1, "flops_per_step": 1e9}
    session = {"started": "2026-01-01T00:00:00+00:00", "from_step": 0, "machine": machine, "resolved": resolved}
    manifest = {"experiment": "12345678", "science": science, "data": {"folder": "data/wiki"}, "sessions": [session]}
    (folder / "report").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text("eval_sequences: 512\nmachine:\n  kernels: auto\n  threads: 1\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        figures = [{"label": "masked loss", "value": 5.5, "unit": "nats", "words": True}]
        examples = ["a held-out [sentence].\n      -> word 50 %, text 20 %, line 5 %"]
        summary = {"step": science["steps"], "tokens": 10240, "validation": {"loss": 5.5, "accuracy": 0.125}}
        summary |= {
            "figures": figures,
            "unigram_entropy": 6.0,
            "loss_in_nats": True,
            "parameters": 51234,
            "flops": 4e10,
        }
        summary |= {"examples": examples, "seconds": 90.0, "sessions": 1, "skipped_updates": 0}
        (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder


def records_at(step: int, rate: float) -> list[dict]:
    """The records after `step` steps of 256 tokens, 512 a second, whose loss depends on the learning rate."""
    loss = 5 + math.exp(-step * rate * 50)
    train = {"step": step, "split": "train", "loss": loss, "lr": rate, "tokens": 256 * step, "flops": 2e9 * step}
    train |= {"tokens_per_second": 512.0, "mfu": 0.25}
    validation = {"step": step, "split": "validation", "loss": loss + 0.1, "accuracy": step / 400, "tokens": 256 * step}
    return [train, validation] if step % 10 == 0 else [train]


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_run` in the folder of the test: name, arguments -> path."""
    return lambda name, *arguments, **science: make_run(tmp_path / name, *arguments, **science)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a display, a window of 1,100 x 900; skips where it or its driver is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()
