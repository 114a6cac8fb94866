"""What is written to disk stays the same from version to version: digests, codecs and checksums as literal values."""

import numpy as np
import pytest

from store.array_io import _content_digest
from store.config import Compressor
from store.zarr_metadata import chunk_codecs, document_checksum

LITTLE, CRC32C = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
BLOSC = {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle", "blocksize": 0, "typesize": 2}


def test_the_digest_of_an_array() -> None:
    content = np.arange(3, dtype="<i8").tobytes()
    assert _content_digest("train/label", {"shape": [3], "data_type": "int64"}, content) == "f8fc6d8b5c337b11"


def test_the_checksum_of_a_document() -> None:
    assert (
        document_checksum({"zarr_format": 3, "node_type": "group", "attributes": {"a": [1, "é"]}}) == "30976cc5e51d6f52"
    )


@pytest.mark.parametrize(
    ("compressor", "codecs"),
    [
        (None, [LITTLE, CRC32C]),
        ("zstd", [LITTLE, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}, CRC32C]),
        ("gzip", [LITTLE, {"name": "gzip", "configuration": {"level": 5}}, CRC32C]),
        ("blosc", [LITTLE, {"name": "blosc", "configuration": BLOSC}, CRC32C]),
    ],
)
def test_the_codecs_of_a_chunk(compressor: Compressor | None, codecs: list[dict[str, object]]) -> None:
    assert chunk_codecs(compressor, item_bytes=2) == codecs
