"""Checks the checksums of a PNG, which Pillow skips for image data."""

import struct
import zlib

_SIGNATURE_BYTES = 8


def check_png(encoded: bytes) -> None:
    """Compare every chunk with its CRC, up to the end chunk.

    Raises:
        ValueError: a chunk is damaged, or the file ends before the end chunk.
    """
    content, at, kind = memoryview(encoded), _SIGNATURE_BYTES, b""
    while kind != b"IEND":
        if len(encoded) < at + 12:
            raise ValueError("it is truncated: a PNG ends with an IEND chunk")
        n_bytes, kind = struct.unpack_from(">I4s", encoded, at)
        body = content[at + 4 : at + 8 + n_bytes]
        crc = content[at + 8 + n_bytes : at + 12 + n_bytes]
        if zlib.crc32(body) != int.from_bytes(crc):
            raise ValueError(f"its {kind.decode('latin-1')} chunk at byte {at} does not match its checksum")
        at += 12 + n_bytes
