"""Runs transformers' own tests of models and configurations on the classes of exports, for every position encoding.

    python scripts/against_transformers/model_tests.py [--source FOLDER_OR_ARCHIVE] [-k EXPRESSION]

ModelTesterMixin (tests/test_modeling_common.py) and ConfigTester (tests/test_configuration_common.py) come from the
source distribution of the installed version of transformers, which pip downloads unless `--source` is given. The
modules that they import for generation and exporters are replaced by stubs: a text encoder does not need them. For each
encoding, prints the numbers of tests that passed, failed and were skipped, and the names of failed tests; the exit code
is 1 if any failed. This takes 3 minutes per encoding on two CPU cores.

Skipped are tests of images, audio, generation, mixtures of experts, several GPUs, FlashAttention, and on a machine
without a GPU those that need one. It needs pytest, parameterized and, for one of the tests, peft.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import defaultdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

STUBS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": 'config_common_kwargs = {"return_dict": False, "num_labels": 7, '
    '"output_hidden_states": True, "output_attentions": True, "dtype": "float16", "problem_type": "regression"}\n',
}
FOLDER = "FASTBERT_MODEL_TESTS"
"""Environment variable: folder of the tests and the code of the exports."""
TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""Tables in which the tests look up the labels of a class."""


def variants() -> dict[str, dict]:
    from fastbert.model.positions import POSITIONS

    modern = {"position": "tupe-r", "norm": "pre", "feed_forward": "geglu", "bias": False}
    return {position: {"position": position} for position in POSITIONS} | {"tupe-r, modern": modern}


# --- in the process that runs the tests


class Sizes:
    """The mixin's model tester: sizes, and inputs of these sizes."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 5, 7, 32, 2, 4
    is_training = True

    def __init__(self, configuration: type, choices: dict) -> None:
        self.configuration, self.choices = configuration, choices

    def get_config(self):
        sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 37, "max_position_embeddings": 512}
        return self.configuration(**sizes, **self.choices)

    def prepare_config_and_inputs_for_common(self):
        import torch
        from transformers.testing_utils import torch_device

        ids = torch.randint(0, 99, (self.batch_size, self.seq_length), device=torch_device)
        mask = torch.ones_like(ids)
        mask[:, -2:] = 0
        inputs = {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask}
        return self.get_config(), inputs


def define_tests() -> None:
    """A test case for each variant, for pytest to collect from this module."""
    from importlib import import_module

    import transformers
    from transformers.models.auto import modeling_auto

    from fastbert.hub.export import AUTO_MAP

    sys.path.insert(0, os.environ[FOLDER])
    common = import_module("tests.test_modeling_common")
    names = {auto: name.partition(".")[2] for auto, name in AUTO_MAP.items() if auto != "AutoConfig"}
    for auto, table in TABLES.items():
        getattr(modeling_auto, table)["fastbert"] = names[auto]

    for name, choices in variants().items():
        modeling = import_module(f"exported_{choices['position'].replace('-', '_')}.modeling_fastbert")

        def set_up(self, modeling=modeling, choices=choices):
            configuration = modeling.FastBertConfig
            self.model_tester = Sizes(configuration, choices)
            transformers.AutoConfig.register("fastbert", configuration, exist_ok=True)
            for auto, name in names.items():
                getattr(transformers, auto).register(configuration, getattr(modeling, name), exist_ok=True)

        def prepare(self, inputs, model_class, return_labels=False):
            inputs = common.ModelTesterMixin._prepare_for_class(self, inputs, model_class, return_labels)
            if return_labels and model_class.__name__ == "FastBertForPreTraining":
                inputs["labels"] = inputs["input_ids"] % 2
            return inputs

        def test_config(self, configuration=modeling.FastBertConfig):
            tester = import_module("tests.test_configuration_common").ConfigTester
            tester(self, configuration, hidden_size=36, num_attention_heads=4, norm="pre").run_common_tests()

        classes = tuple(getattr(modeling, name) for name in names.values())
        members = {"all_model_classes": classes, "setUp": set_up, "_prepare_for_class": prepare}
        members["test_config"] = test_config
        test_case = type("FastBertModelTest", (common.ModelTesterMixin, unittest.TestCase), members)
        test_case.__qualname__ = test_case.__name__ = "Test " + name
        globals()["Test " + name] = test_case


# --- in the process that was started


class Results:
    """A plugin of pytest that counts outcomes by test case."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            _, case, test = report.nodeid.split("::")
            self.outcomes[case.removeprefix("Test ")][report.outcome].add(test)


def unpacked(source: Path | None, folder: Path) -> Path:
    """The folder `tests` of transformers' source distribution."""
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers"]
        command += ["-d", folder, f"transformers=={version('transformers')}"]
        if code := subprocess.run(command).returncode:
            raise SystemExit(f"pip download ended with {code}; fetch the source distribution and give it with --source")
        (source,) = folder.glob("transformers-*.tar.gz")
    if source.is_file():
        shutil.unpack_archive(source, folder, filter="data")
        (source,) = (path for path in folder.glob("transformers-*") if path.is_dir())
    return source / "tests"


def write(tests: Path, folder: Path) -> None:
    """Puts the two modules and the code of every export where `define_tests` imports them."""
    from fastbert.hub.export_code import export_code

    files = {f"tests/{name}": text for name, text in STUBS.items()}
    for name in ("test_modeling_common.py", "test_configuration_common.py"):
        files[f"tests/{name}"] = (tests / name).read_text(encoding="utf-8")
    for position in {choices["position"] for choices in variants().values()}:
        code = export_code(position)
        files |= {f"exported_{position.replace('-', '_')}/{name}": text for name, text in code.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="source distribution of transformers, packed or not")
    parser.add_argument("-k", default="", help="only these tests and variants, by pytest's expressions of names")
    arguments = parser.parse_args()
    if missing := [name for name in ("pytest", "parameterized", "transformers") if find_spec(name) is None]:
        parser.error(f"missing packages: pip install {' '.join(missing)}")
    import pytest

    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        write(unpacked(arguments.source, Path(made)), Path(folder))
        os.environ[FOLDER] = folder
        results = Results()
        options = [
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-q",
            "--tb",
            "short",
            "-k",
            arguments.k,
        ]
        pytest.main([*options, "--override-ini", "python_files=*.py", __file__], plugins=[results])
    for name, outcomes in results.outcomes.items():
        print(f"{name:16}", *(f"{len(outcomes[key]):4} {key}" for key in ("passed", "failed", "skipped")))
        for test in sorted(outcomes["failed"]):
            print("    failed:", test)
    return int(not results.outcomes or any(outcomes["failed"] for outcomes in results.outcomes.values()))


if FOLDER in os.environ and __name__ != "__main__":
    define_tests()
if __name__ == "__main__":
    sys.exit(main())
