"""Provides thread pools that do not block the end of an interrupted job."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def thread_pool(size: int | None, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads are joined at the end, except after an interrupt.

    An interrupt can strike while the main thread holds the lock of a future. The thread that is to set this future then
    waits forever, so joining it would too.
    """
    pool = ThreadPoolExecutor(size, thread_name_prefix=name)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()
