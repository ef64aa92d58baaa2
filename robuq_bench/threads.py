"""Independent pieces of work side by side, each on a share of torch's threads.

Torch divides every operation among its threads. Those of a small model are too short for that: on
two cores they wait for each other longer than they compute. Whole pieces side by side do not wait,
and a piece on one thread gives the bits of one thread, however many run beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

T = TypeVar("T")


def run_side_by_side(
    work: Callable[[T], Iterable[object]], items: Sequence[T], workers: int = 1
) -> None:
    """Exhaust `work(item)` for every item, up to `workers` items at a time.

    No more workers start than torch has threads, and each computes on its share of them. One
    worker is the calling thread, with all of torch's threads.

    Args:
        work: does an item step by step; between two steps it can be stopped. It runs in inference
            mode, and must not change what the items share.
        items: pieces of work, begun in their order.
        workers: at most so many at a time.

    Raises:
        Exception: the first that a step raises; no further step is begun then, nor when the
            calling thread is interrupted.
    """
    threads = torch.get_num_threads()
    workers = min(workers, len(items), threads)
    stop = threading.Event()

    def exhaust(item: T) -> None:
        if stop.is_set():
            return
        try:
            with torch.inference_mode():
                for _ in work(item):
                    if stop.is_set():
                        return
        except BaseException:
            stop.set()  # before this worker takes its next item
            raise

    if workers <= 1:
        for item in items:
            exhaust(item)
        return
    share = threads // workers
    # The number of threads is partly the process's (MKL) and partly the calling thread's (OpenMP).
    torch.set_num_threads(share)
    pool = ThreadPoolExecutor(workers, "robuq", torch.set_num_threads, (share,))
    try:
        for done in as_completed([pool.submit(exhaust, item) for item in items]):
            done.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
