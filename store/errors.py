"""Defines the errors that a user may see; any other exception is a defect of this program.

A message says what was given, what is legal, and what to do next.
"""


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
