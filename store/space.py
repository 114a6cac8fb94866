"""Room on the disk of a store."""

import shutil

from store.address import local_path


def free_bytes(url: str) -> int | None:
    """Free bytes where a store is, or will be; None where it is not on a local disk."""
    path = local_path(url)
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), None) if path else None
    return shutil.disk_usage(existing).free if existing else None
