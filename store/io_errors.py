"""Translates errors of tensorstore and of the system into one line that says what to do.

A failing disk or file is an AccessError. A server that cannot be reached is an OutageError: the store may be intact, so
it is never reported as damaged.
"""

import re

from store.errors import JobError

NEEDS_REPLACING = "delete the store, or choose a new store.path, and run `sidecache extract` again"
_NEEDS_REPAIR = "`sidecache verify` lists all damage, and with --repair PIPELINE.YAML extracts it again"
_NEEDS_ROOM = "make room, then run the same command again: what is committed is kept"
_NEEDS_MEMORY = "free memory, or raise its limit (`ulimit -v`), then run the same command again"
_NEEDS_ACCESS = "choose another store.path, or make this one writable"
_NEEDS_BUCKET = "create the bucket first, or correct its name in store.path"
_NEEDS_RIGHTS = (
    "give keys that may read, write, list and delete there: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE (s3://), GOOGLE_APPLICATION_CREDENTIALS (gs://)"
)
_NEEDS_REGION = "set AWS_REGION to the region of the bucket"
_NEEDS_SERVER = (
    "check that the server is up and its address right (AWS_ENDPOINT_URL, if set), then run the same command "
    "again: what is committed is kept"
)
_REMEDIES = {  # part of tensorstore's error for a disk or file -> remedy
    "No space left on device": _NEEDS_ROOM,
    "Disk quota exceeded": _NEEDS_ROOM,
    "Cannot allocate memory": _NEEDS_MEMORY,
    "File too large": _NEEDS_ROOM,
    "Read-only file system": _NEEDS_ACCESS,
    "Permission denied": _NEEDS_ACCESS,
    "Operation not permitted": _NEEDS_ACCESS,
    "Not a directory": _NEEDS_ACCESS,
    "Is a directory": _NEEDS_ACCESS,
    "is missing": _NEEDS_REPAIR,
    "DATA_LOSS": _NEEDS_REPAIR,
    "ecod": _NEEDS_REPAIR,  # decode, decoding
    "checksum": _NEEDS_REPAIR,
}
_OUTAGES = {  # part of its error for a server -> remedy
    "NoSuchBucket": _NEEDS_BUCKET,
    "Malformed List response": _NEEDS_BUCKET,  # the wording of tensorstore 0.1.81
    "does not exist": _NEEDS_BUCKET,
    "PermanentRedirect": _NEEDS_REGION,
    "AuthorizationHeaderMalformed": _NEEDS_REGION,
    "retry attempts failed": _NEEDS_SERVER,
    "CURL error": _NEEDS_SERVER,
    "(HTTP 501)": "choose a server that has conditional writes (If-Match, If-None-Match), which the store's lock needs",
    "(HTTP 401)": _NEEDS_RIGHTS,
    "(HTTP 403)": _NEEDS_RIGHTS,
    "get credentials": _NEEDS_RIGHTS,
}
_STATUS = re.compile(r"(?:http_response_code='|HTTP code )(\d+)")


class AccessError(JobError):
    """A read or write that failed; `reason` is tensorstore's own message."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def is_damage(self) -> bool:
        """Whether the content that was read is damaged, as opposed to an error of the disk."""
        return "DATA_LOSS" in self.reason


class OutageError(JobError):
    """A server that does not answer, or refuses to; the store may be intact."""


def failure(error: Exception, doing: str) -> JobError:
    """The JobError for an error of tensorstore or the system; `doing` says what failed, such as "read the file x"."""
    reason = _reason(getattr(error, "strerror", None) or str(error))
    for part, remedy in _REMEDIES.items():
        if part in reason:
            return AccessError(f"cannot {doing}: {reason}; {remedy}", reason)
    for part, remedy in _OUTAGES.items():
        if part in reason:
            return OutageError(f"cannot {doing}: {reason}; {remedy}")
    return AccessError(f"cannot {doing}: {reason}", reason)


def _reason(text: str) -> str:
    """The message of tensorstore without its annotations, except for the server's status."""
    status = _STATUS.search(text)
    reason = text.split(" [", maxsplit=1)[0].split("[tensorstore_spec", maxsplit=1)[0].strip()
    return f"{reason} (HTTP {status[1]})" if status else reason
