"""Refuses to start worker processes from a script that has no `if __name__ == "__main__":` guard.

Processes of Python's multiprocessing import the main script first. Without the guard, each of them would run the job
again and start processes in turn.
"""

import multiprocessing
import os
import sys

from store.errors import UserError

_STATUS_OF_RERUN = 64  # exit status of a process in which the job was run again


def require_main_guard(option: str = "extract.workers") -> None:
    """Import the main script in a new process, and check that this does not run the job again.

    If it does, it calls this function there, which ends that process at once, from any thread.

    Args:
        option: the one that asks for processes, for the message.

    Raises:
        UserError: the script has no guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own test
        os._exit(_STATUS_OF_RERUN)
    probe = multiprocessing.get_context("spawn").Process(target=int)
    probe.start()
    probe.join()
    if probe.exitcode == _STATUS_OF_RERUN:
        script = sys.modules["__main__"].__file__
        raise UserError(
            f"{option} starts processes, each of which imports {script} and would run its job again; put the "
            f'calls of the script below `if __name__ == "__main__":`, or leave {option} at 1'
        )
