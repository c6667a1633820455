from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

MOST = 4
"""With more threads, the disk decides how long an update takes."""


def single_core_threads() -> ThreadPoolExecutor:
    """Return threads that compute on one core each. Beside threads that read and write, operations on several cores
    are up to ten times slower, because their parts wait for each other."""
    cores = torch.get_num_threads()
    count = min(cores, MOST)
    started = Barrier(count + 1)
    threads = ThreadPoolExecutor(count)

    def begin() -> None:
        torch.get_num_threads()  # would else set the number of all threads at the first operation
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        started.wait()

    for _ in range(count):
        threads.submit(begin)
    started.wait()
    torch.set_num_threads(cores)  # of the threads to come
    return threads
