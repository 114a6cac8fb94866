"""A shard of uncompressed rows as a file: what Zarr v3's sharding codec makes of it, laid out row after row.

Every row is followed by its crc32c. Then comes the index, where each row starts and how many bytes it takes, and the
crc32c of that.
"""

from dataclasses import dataclass

import google_crc32c
import numpy as np
from jaxtyping import Shaped, UInt8, UInt64

CRC_BYTES = 4
_NO_ROW = 2**64 - 1  # in the index, of rows that a last, shorter shard lacks


@dataclass(frozen=True)
class PlainShard:
    """The layout of shards of `shard_samples` rows of `row_bytes`."""

    shard_samples: int
    row_bytes: int

    @property
    def stride(self) -> int:
        """From the start of a row to that of the next."""
        return self.row_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Without its checksum."""
        return 2 * 8 * self.shard_samples

    def index(self, rows: int) -> UInt64[np.ndarray, "shard_samples 2"]:
        """Start and length of every row of a shard that has so many."""
        index = np.full((self.shard_samples, 2), _NO_ROW, "<u8")
        index[:rows, 0] = np.arange(rows) * self.stride
        index[:rows, 1] = self.stride
        return index

    def pieces(self, values: Shaped[np.ndarray, "rows ..."]) -> list[memoryview]:
        """The file of some rows, piece after piece; the rows are not copied."""
        file: list[memoryview] = []
        for piece in (*np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8), self._index(len(values))):
            file += [piece.data, memoryview(google_crc32c.value(piece).to_bytes(CRC_BYTES, "little"))]
        return file

    def _index(self, rows: int) -> UInt8[np.ndarray, "n_bytes"]:
        return self.index(rows).reshape(-1).view(np.uint8)
