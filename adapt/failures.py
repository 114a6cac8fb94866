"""Tells failures that a user can act on from defects of this program, which need their traceback."""

from store.errors import JobError, UserError
from store.out_of_memory import is_shortage


def explain_failure(error: Exception) -> str | None:
    """The message of a failure for its user; None if the error is a defect of this program."""
    if isinstance(error, UserError | JobError):
        return str(error)
    if is_shortage(error):
        return _explain_shortage(error)
    return str(error) if isinstance(error, OSError) else None


def _explain_shortage(error: Exception) -> str:
    less = "lower train.batch_size or extract.batch_size"
    if "out of memory" in str(error):  # torch has several exception types for this
        return f"the GPU is out of memory; {less}"
    reason = " ".join(str(error).split())[:200]
    return f"out of memory{f' ({reason})' if reason else ''}; {less}, or raise the limit if there is one (`ulimit -v`)"
