"""Quality filters and near-duplicate removal with datatrove, from JSONL or Parquet into Parquet for `fastbert prepare`.
Run with datatrove 0.10.1.

    pip install "datatrove[io,processing]==0.10.1" spacy
    python scripts/datatrove/clean.py --source raw --out clean --tasks 16 --workers 8
    fastbert prepare --source clean/text --out data/clean

`raw` is a folder of .jsonl, .jsonl.gz or .parquet files with English text in the column `text`. The filters of Gopher
and C4 drop documents of low quality. MinHash then leaves one of each group of documents with a similarity of about 0.7
or more. An interrupted call continues with the tasks that are not complete.
"""

import argparse
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter


def reader(source: Path) -> PipelineStep:
    if any(source.rglob("*.parquet")):
        return ParquetReader(str(source), glob_pattern="**/*.parquet")
    if any(source.rglob("*.jsonl*")):
        return JsonlReader(str(source), glob_pattern="**/*.jsonl*")
    sys.exit(f"{source} has no .parquet and no .jsonl files; write the text as one of them first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of JSONL or Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: text/ is the result")
    parser.add_argument("--tasks", type=int, default=1, help="number of output files; at most that of the input files")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    work, config = options.out / "work", MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter()]

    def run(name: str, steps: list[PipelineStep], tasks: int) -> None:
        LocalPipelineExecutor(
            pipeline=steps, tasks=tasks, workers=options.workers, logging_dir=str(work / "logs" / name)
        ).run()

    filtered, signatures, buckets, removed = (str(work / name) for name in ("filtered", "signatures", "buckets", "ids"))
    run("filters", [reader(options.source), *filters, JsonlWriter(filtered)], options.tasks)
    run("signatures", [JsonlReader(filtered), MinhashDedupSignature(signatures, config)], options.tasks)
    run("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets)
    run("clusters", [MinhashDedupCluster(buckets, removed, config=config)], 1)
    # The number of tasks of the signatures: datatrove assigns files to tasks by their number.
    write = ParquetWriter(str(options.out / "text"), output_filename="${rank}.parquet")
    run("text", [JsonlReader(filtered), MinhashDedupFilter(removed), write], options.tasks)


if __name__ == "__main__":
    main()
