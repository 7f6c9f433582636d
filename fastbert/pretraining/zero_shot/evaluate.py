"""`fastbert evaluate --pairs` and `--pll`: measures a model and prints the result."""

from typing import Any

from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot import pairs, pll
from fastbert.records import json_text


def evaluate_zero_shot(options: EvaluateOptions) -> dict[str, Any]:
    """Prints the result and returns it; raises the errors of `measure_pairs` and `measure_pll`."""
    of_pairs = options.measurement == "pairs"
    result = pairs.measure_pairs(options) if of_pairs else pll.measure_pll(options)
    report = pairs.report if of_pairs else pll.report
    print(json_text(result) if options.json else report(result))
    return result
