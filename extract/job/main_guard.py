"""The main script of a job, which processes of Python's multiprocessing import before they do anything else.

Without `if __name__ == "__main__":` around its calls it runs the job again there, which starts processes in its turn.
"""

import multiprocessing
import os
import sys

from store.errors import UserError

_STATUS_OF_RERUN = 64  # the exit status of a process in which the job was run again


def require_main_guard() -> None:
    """Import the main script in a process that does nothing else, to learn whether that runs the job again.

    There this call is what it looks for, and ends the process at once, from any thread.

    Raises:
        UserError: it does.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        os._exit(_STATUS_OF_RERUN)
    probe = multiprocessing.get_context("spawn").Process(target=int)
    probe.start()
    probe.join()
    if probe.exitcode == _STATUS_OF_RERUN:
        script = sys.modules["__main__"].__file__
        raise UserError(
            f"extract.workers starts processes, each of which imports {script} and would run its job again; put the "
            'calls of the script below `if __name__ == "__main__":`, or leave extract.workers at 1'
        )
