"""Simulates a loss of power: files of a store that are not committed are deleted, truncated or zeroed.

A write is durable under its name when it returns (test_power_loss.py checks that). So a shard with a mark is durable,
and so are files written before the root group, files staged in a committed redo log, and the lock. A shard without a
mark and temporary files are not.
"""

import json
import random
import re
from pathlib import Path

from store.arrays import ADDED, NEXT
from store.kvstore import LOCK

_OF_SHARD = re.compile(rf"({ADDED}/)?(train|test)/(?:(?:layer|scale)_(\d+)|shard_digest)/c/(\d+)/.*")
_CHECKSUM_BYTES = 4


def lose_power(store: Path, draw: random.Random) -> list[str]:
    """Delete, truncate or zero the files of a store that are not committed; returns their names."""
    names = [str(file.relative_to(store)) for file in sorted(store.rglob("*")) if file.is_file()]
    doomed = [name for name in names if not _is_durable(store, name)]
    for name in doomed:
        file, kind = store / name, draw.randrange(3)
        size = file.stat().st_size
        if kind == 0:
            file.unlink()
        elif kind == 1:
            file.write_bytes(file.read_bytes()[: draw.randrange(size + 1)])
        else:
            file.write_bytes(bytes(size))
    return doomed


def _is_durable(store: Path, name: str) -> bool:
    root = store / "zarr.json"
    if name.endswith(".__lock"):
        return False
    if name.startswith(LOCK) or not root.exists():
        return name.startswith(LOCK)
    if name.startswith(NEXT):
        return (store / NEXT / "zarr.json").exists()
    shard = _OF_SHARD.fullmatch(name)
    if shard is None:
        return True
    marks, split, layer, number = shard.groups()
    is_added = bool(layer) and int(layer) not in json.loads(root.read_text())["attributes"]["layers"]
    mark = store / (ADDED if marks or is_added else "") / split / "status/c" / number
    return mark.exists() and any(mark.read_bytes()[:-_CHECKSUM_BYTES])
