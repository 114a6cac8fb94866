"""Threads that nobody waits for once the job is given up."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def thread_pool(size: int | None, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads are waited for in the end, but not after an interrupt.

    An interrupt can strike while the main thread holds a future's own lock; the thread that is to fill that future
    then waits for ever, and so would whoever waits for the thread.
    """
    pool = ThreadPoolExecutor(size, thread_name_prefix=name)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()
