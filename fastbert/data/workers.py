"""Worker processes that tokenize, with a bounded queue of jobs and results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

from fastbert.data.encoding import set_encoder, start_worker
from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.processes import without_control_c


@contextmanager
def pool(workers: int, wordpiece: WordPiece) -> Iterator[Callable[..., Future]]:
    """Yields a function that runs another function in a worker process (with one worker: in this process) and returns a
    Future."""
    if workers == 1:
        set_encoder(wordpiece)
        yield _now
        return
    # Spawned, not forked: a fork copies the locks of all threads, such as those of CUDA and the tokenizers library.
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (wordpiece,)) as executor:
        try:
            yield partial(_submitted, executor)
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenizes was killed, most likely because memory ran out; use fewer --workers"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def _submitted(executor: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Future:
    with without_control_c():  # submitting starts the processes
        return executor.submit(function, *arguments)


def _now(function: Callable[..., Any], *arguments: Any) -> Future:
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def in_order(jobs: Iterator[tuple[Any, Any, Future]]) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the jobs with their results, in order. Only enough jobs to keep every worker busy are queued."""
    ahead = 2 * (os.cpu_count() or 1)
    waiting: deque[tuple[Any, Any, Future]] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > ahead or waiting[0][2].done():
            first, second, future = waiting.popleft()
            yield first, second, future.result()
    while waiting:
        first, second, future = waiting.popleft()
        yield first, second, future.result()
