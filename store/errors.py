"""The two kinds of failure a user meets; everything else is a defect of ours.

A message says what was given, what is legal, and what to do next.
"""


class Note(UserWarning):
    """What the user may not expect, and what the program goes on with all the same."""


class UserError(ValueError):
    """The input, the configuration or the command line is wrong (exit status 2)."""


class OtherStoreError(UserError):
    """The store that is there was made from something else."""


class ChangedError(OtherStoreError):
    """Samples that the store holds are gone or changed."""


class JobError(RuntimeError):
    """The work itself failed: a disk, a damaged file, a non-finite value (exit status 1)."""
