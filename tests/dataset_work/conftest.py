"""The tiny encoder of the fine-tuning tests."""

from tests.finetuning.conftest import bert  # noqa: F401 (pytest finds the fixture by its name here)
