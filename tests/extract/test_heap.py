"""What a training step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // 4096
TAKE_AND_FREE = """
import ctypes, resource
from extract.forward.device import keep_freed_memory

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def take_and_free():
    blocks = [libc.malloc(2**20) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    for block in blocks:
        libc.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{call}
for _ in range(3):
    take_and_free()
before = faults()
take_and_free()
print(faults() - before)
"""


def pages_taken_again(call: str) -> int:
    command = [sys.executable, "-c", TAKE_AND_FREE.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_handed_back_to_the_kernel() -> None:
    assert pages_taken_again("") > 0.5 * PAGES
    assert pages_taken_again("keep_freed_memory()") < 0.05 * PAGES
