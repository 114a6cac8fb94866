"""Runs benchmarks.torture at a small size."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torture(*arguments: str, planted: str = "") -> tuple[int, str]:
    """Exit status and output of the benchmark; `planted` is code that runs first and plants a fault."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.torture", *arguments]
    if planted:
        command[1:3] = ["-c", f"{planted}\nimport sys\nfrom benchmarks import torture\nsys.exit(torture.main())"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    return ended.returncode, ended.stderr + ended.stdout
