"""Choice of the replayed examples of SDS2: greedy facility location with entropies, over the candidates of a step."""

import numpy as np

from fastbert.dataset_work.selection.queries import facility_location, gaussian_similarity
from fastbert.finetuning.continual.replay import CHOICES, candidates
from fastbert.finetuning.continual.tuner import ContinualTuner
from fastbert.finetuning.stream import StreamBatch
from fastbert.studies.active.acquire import uncertainty


def submodular(tuner: ContinualTuner, batch: StreamBatch) -> np.ndarray:
    """Rows that maximize sum_i max_j w_ij + lambda log(1 + sum_j h_j) over the candidates of the step: w from their
    pooled states and h, their entropies in nats, by the current weights without dropout. lambda is `entropy_weight`
    times the number of candidates, so that both terms grow with it."""
    rows = candidates(tuner)
    its = tuner.outputs(rows)
    similarity = gaussian_similarity(its.states, tuner.settings["width"])
    entropies = uncertainty("entropy", tuner.updater.module.kinds[batch.head], its.logits)
    weight = tuner.settings["entropy_weight"] * len(rows)
    return rows[facility_location(similarity, min(tuner.replay, len(rows)), entropies, weight).rows]


ALL_CHOICES = {**CHOICES, "submodular": submodular}
