"""Defines the errors that a user may see; any other exception is a defect of this program.

A message says what was given, what is legal, and what to do next.
"""

import difflib
from collections.abc import Iterable

_LONGEST_NAME = 60  # characters that are compared


class Note(UserWarning):
    """A warning about something that the user may not expect; the program goes on."""


class UserError(ValueError):
    """The input, the configuration or the command line is wrong (exit status 2)."""


class OtherStoreError(UserError):
    """The existing store was made from something else."""


class ChangedError(OtherStoreError):
    """Samples of the store are gone or changed."""


class JobError(RuntimeError):
    """The work failed: a full disk, a damaged file, a non-finite value (exit status 1)."""


def did_you_mean(name: str, legal: Iterable[str], likeness: float = 0.6) -> str:
    """`; did you mean 'epochs'?` for a name that is near to legal ones, at the end of a message; else empty.

    Args:
        name: what was given.
        legal: the legal names.
        likeness: share of the characters that must match, as of `difflib`.
    """
    by_lower = {known.lower(): known for known in legal}
    near = difflib.get_close_matches(name[:_LONGEST_NAME].lower(), by_lower, n=2, cutoff=likeness)
    return f"; did you mean {' or '.join(repr(by_lower[known]) for known in near)}?" if near else ""
