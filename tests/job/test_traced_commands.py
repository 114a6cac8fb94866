"""System call traces of the commands on malicious stores: they change no files but those of the job."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_store import kvstore_at
from store_jobs import FORMATS, Jobs, renew, state
from tiny_vit import TINY

from extract.backbones.backbone import TimmBackbone
from store.arrays import open_schema
from store.schema import SplitInfo

ROOT = Path(__file__).parents[2]
CHANGING = "unlink,unlinkat,rmdir,rename,renameat,renameat2,mkdir,mkdirat,link,linkat,symlink,symlinkat,truncate,chmod"
MORE = "fchmodat,chown,lchown,fchownat,utimensat,mknod,mknodat,open,openat,creat"
TRACE = f"trace={CHANGING},{MORE}"
CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += +(-?\d+)")
PATHS = re.compile(r'(?:AT_FDCWD<([^>]*)>, |\d+<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
COMMANDS = """
import sys, sidecache
pipeline, *stores = sys.argv[1:]
for command in ("inspect", "verify", "repair", "extract", "train", "run", "layers", "samples"):
    for store in stores:
        path = f"-ostore.path={store}"
        given = {
            "inspect": ["inspect", store],
            "verify": ["verify", store],
            "repair": ["verify", store, "--repair", pipeline, path],
            "layers": ["extract", pipeline, path, "-ostore.layers=all"],
            "samples": ["extract", pipeline, path, "-ostore.layers=all", "-odata.root=more"],
        }.get(command, [command, pipeline, path])
        sys.argv = ["sidecache", *given]
        status = 0
        try:
            sidecache.main()
        except SystemExit as ended:
            status = ended.code
        print(command, store, status, flush=True)
"""


def changed(log: Path, cwd: Path) -> set[Path]:
    """Paths that the traced process created or changed, with links resolved."""
    found = set()
    for line in log.read_text(errors="replace").splitlines():
        call = CALL.match(line)
        if call is None or int(call[3]) < 0 or (call[1].startswith("open") and not WRITING.search(call[2])):
            continue
        for base, folder, name in PATHS.findall(call[2]):
            path = Path(base or folder or cwd) / name
            found.add(Path(os.path.realpath(path.parent)) / path.name)
    return found


def trace(log: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a separate folder for all caches and temporary files that it may write."""
    home = str(cwd / "home")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL", "TORCH"))}
    env |= {"HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    strace = ["strace", "-f", "-y", "-s", "4096", "-o", str(log), "-e", TRACE, sys.executable, *command]
    return subprocess.run(strace, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def can_trace(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("strace") / "log"
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-f", "-y", "-o", str(log), "-e", TRACE, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace cannot run here: {tried.stderr.strip()}")


def test_a_write_through_a_link_is_seen(can_trace: None, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "link").symlink_to("victim")
    trace(tmp_path / "log", tmp_path, "-c", "import os; os.mkdir('link/a'); open('link/b', 'w'); os.rmdir('link/a')")
    victim = tmp_path / "victim"
    assert {path for path in changed(tmp_path / "log", tmp_path) if victim in path.parents} == {
        victim / "a",
        victim / "b",
    }


def make_hostile_stores(jobs: Jobs) -> list[str]:
    """Stores with symbolic links in some places, and with names in the log that point elsewhere."""
    stores = []
    links = ("zarr.json", "_log", "_log/next", "train/layer_00/c", "train/status", "zarr.json.__lock")
    for place in links:
        renew(jobs)
        held = jobs.store / place
        aside = jobs.folder / "traced" / f"of {place.replace('/', '-')}"
        aside.parent.mkdir(exist_ok=True)
        if held.exists():
            held.rename(aside)
        else:
            aside.mkdir()
            (aside / "precious").write_text("precious")
        held.symlink_to(aside)
        stores.append(f"{place.replace('/', '-')}.zarr")
        jobs.store.rename(jobs.folder / stores[-1])
    for place in ("_log/added", "_log/next"):
        renew(jobs)
        folder = kvstore_at(jobs.store)
        schema = open_schema(folder)
        assert schema is not None
        for name in ("../../../traced", str(jobs.folder / "traced")):
            splits = {**schema.splits, name: SplitInfo(num_samples=6)}
            forged = schema.model_copy(update={"splits": splits}).model_dump(mode="json")
            folder.write_group(place, {"schema": forged, "ready": True})
        stores.append(f"{place.replace('/', '-')}-names.zarr")
        jobs.store.rename(jobs.folder / stores[-1])
    return stores


@pytest.mark.slow
def test_no_command_changes_a_file_that_is_not_the_jobs_own(
    can_trace: None, tmp_path: Path, tiny_backbone: TimmBackbone
) -> None:
    jobs = Jobs(tmp_path, tiny_backbone, "plain")
    jobs.make(tmp_path / "whole.zarr")
    stores = make_hostile_stores(jobs)
    renew(jobs)  # an undamaged one, on which every command has something to do
    jobs.store.rename(tmp_path / "sound.zarr")
    document = {
        "run_dir": "run",
        "data": {"source": "folder", "root": "images", "val_fraction": 0.34},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_kwargs": TINY},
        "store": {"layers": [0, 2], "shard_samples": 4},
        "train": {"epochs": 1, "batch_size": 4, "seeds": [0], "device": "cpu"},
        "extract": {"device": "cpu"},
        "methods": ["linear_probe"],
    }
    for override in FORMATS["plain"]:
        section, _, value = override.partition("=")
        document[section.split(".")[0]] |= {section.split(".")[1]: value}  # type: ignore[operator]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document))
    for name in ("home", "run"):
        (tmp_path / name).mkdir(exist_ok=True)
    before = state(tmp_path / "traced"), state(tmp_path / "victim")
    done = trace(tmp_path / "log", tmp_path, "-c", COMMANDS, "pipeline.yaml", *stores, "sound.zarr")
    assert (state(tmp_path / "traced"), state(tmp_path / "victim")) == before, done.stderr
    own = [tmp_path / name for name in ("run", "home", *stores, "sound.zarr")] + [Path("/dev"), Path("/proc")]
    paths = changed(tmp_path / "log", tmp_path)
    assert any(tmp_path / "sound.zarr" in path.parents for path in paths)
    elsewhere = [path for path in paths if not any(folder in (path, *path.parents) for folder in own)]
    assert elsewhere == []
    ended = [line for line in done.stdout.splitlines() if re.fullmatch(r"\w+ \S+\.zarr \d", line)]
    assert len(ended) == 8 * (len(stores) + 1), done.stderr
    assert [line for line in ended if "sound" in line and not line.endswith(" 0")] == []
    linked = [line for line in ended if "names" not in line and "sound" not in line]
    assert [line for line in linked if not line.endswith(" 1")] == []
    assert "Traceback" not in done.stderr
