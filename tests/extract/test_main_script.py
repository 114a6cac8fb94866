"""A script without `if __name__ == "__main__":` gets a message instead of processes that run it again and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = "from extract.job.main_guard import require_main_guard\n"
JOB = """
import sidecache as sc
config = sc.load_config({
    "run_dir": "run", "data": {"source": "digits"}, "extract": {"workers": 2}, "store": {"path": "run/c.zarr"},
    "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": {"depth": 1}},
})
sc.extract(config)
print("done")
"""


def run(folder: Path, script: str, *options: str) -> "subprocess.CompletedProcess[str]":
    (folder / "job.py").write_text(script)
    return subprocess.run(
        [sys.executable, *(options or ["job.py"])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize(
    "call",
    [
        "require_main_guard()\n",
        "def main():\n    require_main_guard()\nmain()\n",
        "import threading\nthread = threading.Thread(target=require_main_guard)\nthread.start()\nthread.join()\n",
        "try:\n    require_main_guard()\nexcept Exception as error:\n    print(error)\n    raise\n",
    ],
)
def test_a_script_that_calls_outside_the_guard_is_named(call: str, tmp_path: Path) -> None:
    done = run(tmp_path, PROBE + call)
    message = f"each of which imports {tmp_path / 'job.py'} and would run its job again"
    assert done.stderr.count(message) == 1
    assert done.stderr.count("Traceback") == 1
    assert 'below `if __name__ == "__main__":`' in done.stderr


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ('if __name__ == "__main__":\n    require_main_guard()\n    print("done")', ()),
        ('import sys\nif __name__ != "__main__":\n    sys.exit()\nrequire_main_guard()\nprint("done")', ()),
        ("", ("-c", PROBE + "require_main_guard()\nprint('done')")),  # which a process cannot import
    ],
)
def test_a_script_that_is_not_run_again_goes_on(script: str, options: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, PROBE + script, *options)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.slow
def test_an_extraction_by_workers_outside_the_guard_ends_before_it_begins(tmp_path: Path) -> None:
    done = run(tmp_path, JOB)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("store.errors.UserError: extract.workers starts processes, each of")
    assert [path.name for path in tmp_path.iterdir()] == ["job.py"]
