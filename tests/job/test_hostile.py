"""Malicious files give one clear error, run no code, and take little memory and time."""

import ast
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_limit import little_memory
from PIL import Image
from result_rows import Tags, make_row, terminal
from safetensors.torch import save_file
from tiny_vit import TINY
from torch import nn

from adapt.adaptors.card import Card, card_document
from adapt.adaptors.files import load_adaptor
from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows
from extract.backbones.backbone import TimmBackbone, digests, empty_backbone, load_backbone
from extract.backbones.module_count_limit import limit_module_count
from extract.config import BackboneConfig, ClipConfig, DataConfig
from extract.images.decode import DecodeError, decode_rgb
from extract.sources.open_source import ImageSource, open_source
from extract.sources.samples import FileSlice
from store.console.visible import visible
from store.errors import Note, UserError

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224"
QUICK = settings(derandomize=True, max_examples=12, deadline=None)


def refused(action: Callable[[], object]) -> str:
    with little_memory(), pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# No objects from files


SOURCES = [file for name in ("adapt", "extract", "sidecache", "store") for file in (ROOT / name).rglob("*.py")]
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "eval", "exec"}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """(name in the source, keyword arguments, positional arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
            yield ast.unparse(node.func), named, [ast.unparse(value) for value in node.args]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_of_the_package_unpickles(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        assert not RUNS_CODE.intersection(name.partition(".")[0] for name in [*names, *module])
    for name, named, values in calls(tree):
        assert name not in UNSAFE
        assert not re.search(r"dist\..*_object", name), "torch.distributed sends objects as pickles"
        if name in ("torch.load", "load_state_dict"):
            assert named.get("weights_only") == "True"
        if name == "np.load":
            assert named.get("allow_pickle", "False") == "False"
        if name == "yaml.load":
            assert values[1:] == ["Loader"], "the safe loader of adapt.config.yaml_text"


# Tars


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with any size, also negative or beyond 8 GiB."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 256**12).to_bytes(12, "big")
    block[124] |= 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


def record(key: str, value: str) -> bytes:
    """A record of a pax header."""
    rest = f" {key}={value}\n"
    length = len(rest) + 1
    while len(f"{length}{rest}") != length:
        length += 1
    return f"{length}{rest}".encode()


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", b"".join(records), kind)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(key: str, label: bytes, kind: str = "cls") -> bytes:
    return member(f"{key}.png", png(len(key))) + member(f"{key}.{kind}", label)


FOUR = b"".join(pair(key, label) for key, label in (("0", b"a"), ("1", b"b"), ("2", b"a"), ("3", b"b")))
END = bytes(1024)


def list_tar(folder: Path, content: bytes) -> ImageSource:
    (folder / "x.tar").write_bytes(content)
    return open_source(DataConfig(source="tars", root=folder / "x.tar"))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (header("pax", 2**40, tarfile.XHDTYPE), "a header has 1099511627776 bytes; legal: at most 65,536"),
        (header("long", 2**60, tarfile.GNUTYPE_LONGNAME), "legal: at most 65,536"),
        (header("pax", -2048, tarfile.XHDTYPE), "a header has -2048 bytes"),
        (member("pax", bytes(1 << 20), tarfile.XHDTYPE), "legal: at most 65,536"),
        (header("a.png", 2**50), "truncated|cannot be read as a tar"),
        (header("a.png", -1024), "begins before the one in front of it ends|cannot be read as a tar"),
        (pax(record("size", "-1024")) + header("a.png", 0), "begins before|cannot be read as a tar"),
        (pax(b"9" * 60_000 + b" a=b\n"), "a number of 64 digits or more"),
        (pax(b"99999999999999999999 a=b\n"), "cannot be read as a tar"),
        (pax(record("GNU.sparse.map", "a,b")) + member("a.png", b"abc"), "cannot be read as a tar"),
        (pax(record("GNU.sparse.size", "x")) + member("a.png", b"abc"), "cannot be read as a tar"),
        (pax(record("a", "b")) * 3000 + member("a.png", b"abc"), "recursion|truncated|cannot be read as a tar"),
        (member("L", b"a\0", tarfile.GNUTYPE_LONGNAME) * 3000, "recursion|cannot be read as a tar"),
        (pax(record("path", "../../a.png")) + member("a.png", png()), r"'\.\./\.\./a\.png', which leads out"),
        (pax(record("path", "/etc/a.png")) + member("a.png", png()), "'/etc/a.png', which leads out of the archive"),
        (member("x.png", b"", tarfile.FIFOTYPE), "a link, device or sparse file"),
        (member("x.png", b"", tarfile.BLKTYPE), "a link, device or sparse file"),
        (pair("a", bytes(2 << 20)), r"has a \.cls of 2,097,152 bytes; legal: at most 1,048,576"),
        (pair("a", b"x" * 2000), "the label has 2,000 characters; legal: at most 1,000"),
        (pair("a", b"[" * 100_000, "json"), "no readable label"),
        (pair("a", b'{"label":' + b"9" * 9000 + b"}", "json"), "no readable label"),
    ],
)  # fmt: skip
def test_a_hostile_member_ends_the_listing(attack: bytes, message: str, tmp_path: Path) -> None:
    assert re.search(message, refused(lambda: list_tar(tmp_path, FOUR + attack + END)))


def test_pax_records_for_all_members_are_not_kept_for_each(tmp_path: Path) -> None:
    for_all = pax(*(record(f"k{i}", "v") for i in range(900)), kind=tarfile.XGLTYPE)
    many = b"".join(header(f"x{i}", 0) for i in range(3000))  # with 900 records each: 100 MB
    with little_memory(32), pytest.warns(Note, match="ignored 3,000 files"):
        assert len(list_tar(tmp_path, for_all + many + FOUR + END).splits["train"]) == 2
    two = pax(*(record(f"k{i}", "v") for i in range(1100)), kind=tarfile.XGLTYPE)
    assert "1100 pax records; legal: at most 1,000" in refused(lambda: list_tar(tmp_path, two + FOUR + END))


def test_a_bomb_of_an_archive_is_never_unpacked(tmp_path: Path) -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = squeeze.compress(bytes(64 << 20)) + squeeze.flush()
    for name in ("x.tar", "x.tgz", "x.tar.gz"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(bomb)
        message = refused(lambda: open_source(DataConfig(source="tars", root=tmp_path / "x")))
        assert "is compressed, so its members cannot be read in any order" in message
        (tmp_path / "x" / name).unlink()


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_tar_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(pax(record("path", "0.png")) + FOUR + END)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 8)) * 512 + data.draw(st.integers(0, 511))
        content[at] = data.draw(st.sampled_from([0, 32, 48, 55, 57, 120, 128, 255]))
    for start in range(0, len(content) - 512, 512):  # with a valid checksum, else tarfile stops there
        if data.draw(st.booleans()):
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    try:
        list_tar(tmp_path_factory.getbasetemp(), bytes(content))
    except UserError as error:
        assert str(error)  # noqa: PT017 (both outcomes are legal)


# Images


def tiff(width_of_tile: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of the given size, which unpacks to zeros."""
    packed = zlib.compress(bytes(1 << 20), 9)
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, width_of_tile), (323, width_of_tile), (324, 1000), (325, len(packed))]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4)).ljust(1000, b"\0") + packed


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


ONE = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
ZEROS = zlib.compress(bytes(64 << 20), 9)
PIXEL = (b"IDAT", zlib.compress(bytes(4)))


def progressive(n_scans: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    encoded = buffer.getvalue()
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    return encoded[:-2] + n_scans * last + encoded[-2:]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (tiff(46_336), "the limit against decompression bombs"),
        (chunks(ONE, (b"iCCP", b"a\0\0" + ZEROS), PIXEL, (b"IEND", b"")), "too large"),
        (chunks(ONE, (b"zTXt", b"a\0\0" + ZEROS), PIXEL, (b"IEND", b"")), "too large"),
        (chunks(ONE)[:-4] + struct.pack(">I", 2**31 - 1) + b"eXIf", "cannot be decoded"),
        (b"GIF89a" + struct.pack("<HHBBB", 1, 1, 128, 0, 0) + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;",
         "the limit against decompression bombs"),
        (b"P6\n60000 60000\n255\n", "the limit against decompression bombs"),
        (b"P6\n" + b"9" * 100_000, "cannot be decoded"),
        (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2**31 - 1, -1, 1, 24, 0, 0, 0, 0, 0, 0),
         "the limit against decompression bombs"),
        (progressive(200), "scans; legal: at most 100"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\n", "not an image in a known"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "not an image in a known"),
    ],
)  # fmt: skip
def test_a_hostile_image_is_a_sample_that_cannot_be_decoded(encoded: bytes, message: str) -> None:
    with little_memory(), pytest.raises(DecodeError, match=message):
        decode_rgb(encoded, "x")


def test_what_is_only_unusual_is_decoded() -> None:
    frames = [Image.new("P", (16, 16), k % 256) for k in range(1000)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    with little_memory():
        for encoded in (buffer.getvalue(), tiff(64), progressive(20), chunks(ONE, (b"IDAT", ZEROS), (b"IEND", b""))):
            assert decode_rgb(encoded, "x").mode == "RGB"


def test_a_file_beyond_a_gibibyte_is_no_image(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(40 << 30)  # a sparse file
    with little_memory(), pytest.raises(DecodeError, match="it has 42,949,672,960 bytes, more than 1 GiB"):
        FileSlice(str(tmp_path / "x.png")).decode("x")


# Lists


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a" * 300, "does not exist in"),
        ("a/" * 1000, "does not exist in"),
        ("a" * 5000, "path has 5,000 characters; legal: at most 4,096"),
        ("loop/0.png", "does not exist in"),
        ("a\0b" + "x" * 100_000, "legal: a file"),
        ("x" * 200_000, "field larger than field limit"),
        ("fifo.png", "does not exist in"),
        ("/dev/zero", "leads out of the table's folder"),
        ("..", "leads out of the table's folder"),
        (".", "does not exist in"),
    ],
)
def test_a_hostile_path_is_refused_by_line(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "l.csv").write_text(f"path,label\n{path},a\n")
    with little_memory(), pytest.raises(UserError) as error:
        open_source(DataConfig(source="csv", root=tmp_path / "l.csv"))
    text = str(error.value)
    assert len(text) < 5000
    assert "line 2" in text
    assert message in text


def test_a_parquet_file_of_a_billion_rows_ends_at_the_first_fault(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3_000_000, np.int8)), pa.array(["0.png"]))
    pq.write_table(pa.table({"path": names, "label": names}), tmp_path / "l.parquet")
    message = refused(lambda: open_source(DataConfig(source="parquet", root=tmp_path / "l.parquet")))
    assert "row 2 names '0.png', as" in message


@pytest.mark.parametrize("label", [b"\0" * 100_000, "x" * 100_000, [["a"] * 9], {"a": 1}, 1.5])
def test_a_label_of_another_kind_is_refused_in_few_words(label: Any, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    pq.write_table(pa.table({"path": ["0.png"], "label": [label]}), tmp_path / "l.parquet")
    assert "row 1: the label" in refused(lambda: open_source(DataConfig(source="parquet", root=tmp_path / "l.parquet")))


# Weights


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(load(Path("random")).state_dict())


def load(path: Path, **kwargs: Any) -> nn.Module:
    config = BackboneConfig(name=NAME, weights=str(path), image_size=32, model_kwargs={**TINY, **kwargs})
    return load_backbone(config).module


def rewrite(path: Path, compression: int, edit: Callable[[str, bytes], bytes] = lambda _, content: content) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, edit(name, content))


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_any_torch_file_is_not_run(ending: str, zipped: bool, state: Any, tmp_path: Path) -> None:
    path, mark = tmp_path / f"evil{ending}", tmp_path / "ran"
    for content in (Touch(mark), {**state, "x": Touch(mark)}, [Touch(mark)] * 10_000):
        if zipped:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content) + bytes(200_000))
        assert "does not load into" in refused(lambda: load(path))
        assert not mark.exists()


def test_no_variable_of_the_environment_lets_code_run(
    state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**state, "x": Touch(tmp_path / "ran")}, tmp_path / "evil.pth")
    assert "does not load into" in refused(lambda: load(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_compressed_torch_file_is_not_unpacked(state: Any, tmp_path: Path) -> None:
    torch.save({**state, "bomb": torch.zeros(64 << 20)}, tmp_path / "a.pth")  # 256 MiB
    rewrite(tmp_path / "a.pth", zipfile.ZIP_DEFLATED)
    assert "its records are compressed" in refused(lambda: load(tmp_path / "a.pth"))


def test_a_tensor_that_claims_more_than_its_record_reads_no_other_memory(state: Any, tmp_path: Path) -> None:
    torch.save({**state, "norm.bias": torch.ones(32)}, tmp_path / "a.pth")
    names = [name for name in zipfile.ZipFile(tmp_path / "a.pth").namelist() if "/data/" in name]
    rewrite(tmp_path / "a.pth", zipfile.ZIP_STORED, lambda n, content: content[:8] if n == names[-1] else content)
    with little_memory():
        try:
            model = load(tmp_path / "a.pth")
        except UserError:
            return
    content = (tmp_path / "a.pth").read_bytes()
    assert all(tensor.numpy().tobytes() in content for tensor in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:Validation of sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:.*sparse tensor invariants.*:UserWarning")
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(1, 1 << 20, 1 << 12), "is larger than the file"),
        (torch.zeros(1).expand(1 << 16, 1 << 20), "is larger than the file"),
        (torch.zeros(1, 1, 32, dtype=torch.complex64), "holds complex numbers"),
        (torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (1 << 20,) * 2, check_invariants=True),
         "or sparse"),
        ("text", "is no tensor"),
    ],
    ids=["position", "patch", "complex", "sparse", "text"],
)  # fmt: skip
def test_a_tensor_of_another_kind_is_refused(tensor: Any, message: str, state: Any, tmp_path: Path) -> None:
    torch.save({**state, "pos_embed": tensor}, tmp_path / "a.pth")
    assert message in refused(lambda: load(tmp_path / "a.pth"))


def test_a_compressed_npz_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", cls=np.zeros(64 << 20, np.float32))
    assert "more than 10 times its size" in refused(lambda: load(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 64) + b'{"cls_token":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(64),
        struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}   ',
    ],
)  # fmt: skip
def test_a_forged_safetensors_header_is_refused(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(head + bytes(60_000))
    assert "does not load into" in refused(lambda: load(tmp_path / "a.safetensors"))


def test_a_model_is_not_built_that_the_file_cannot_fill_or_memory_hold(state: Any, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    assert "the model has " in refused(lambda: load(tmp_path / "a.safetensors", embed_dim=2048))
    assert "more than are free; give a smaller one" in refused(lambda: load(Path("random"), embed_dim=16_384, depth=96))
    for kwargs in ({"depth": 10**9}, {"patch_size": [8, 10**9]}, {"patch_size": [[10**9]]}):
        name = next(iter(kwargs))
        assert f"model_kwargs.{name} is 1,000,000,000; legal: at most 16,384" in refused(
            lambda kwargs=kwargs: load(Path("random"), **kwargs)
        )


def test_a_model_without_end_is_not_built_whoever_names_it(
    adaptor: Callable[..., str], state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"depth": 16_384, "embed_dim": 8, "num_heads": 1}  # few parameters, but a minute to build the modules
    assert "it has more than 5,000 modules; give a smaller depth" in refused(lambda: load(Path("random"), **kwargs))
    monkeypatch.setattr("extract.backbones.module_count_limit._MAX_MODULES", 300)
    message, backbone = "it has more than 300 modules; give a smaller depth", {"name": NAME, "weights": "random"}
    assert message in refused(lambda: empty_backbone(NAME, kwargs))
    assert message in adaptor(backbone={**backbone, "model_kwargs": kwargs}, given=None)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "model_args": kwargs}))
    assert message in refused(lambda: load_backbone(BackboneConfig(weights=str(tmp_path))))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_hidden_layers": 10**9, "hidden_size": 8, "num_attention_heads": 1}, "more than 300 modules"),
        ({"hidden_size": 2**24, "num_attention_heads": 1}, "more than are free; give a smaller one"),
    ],
)
def test_no_vivit_is_built_that_memory_cannot_hold(
    kwargs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("extract.backbones.module_count_limit._MAX_MODULES", 300)
    config = BackboneConfig(name="vivit", weights="random", model_kwargs=kwargs)
    assert message in refused(lambda: load_backbone(config, ClipConfig(frames=32)))


def test_the_limit_of_modules_ends_with_its_model_and_is_each_threads_own() -> None:
    with limit_module_count():
        for _ in range(3):
            nn.Sequential(*(nn.Identity() for _ in range(1_000)))
        in_a_thread = Thread(target=lambda: nn.Sequential(*(nn.Identity() for _ in range(6_000))))
        in_a_thread.start()
        in_a_thread.join()
    assert len(nn.Sequential(*(nn.Identity() for _ in range(6_000)))) == 6_000


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("[" * 100_000, "no readable config.json"),
        (" " * (2 << 20), "it is larger than 1 MiB"),
        ({"architecture": ["a"]}, "is no timm model"),
        ({"architecture": NAME, "model_args": [1, 2]}, "no readable config.json"),
        ({"architecture": NAME, "model_args": {"checkpoint_path": "/etc/passwd"}}, "may not hold 'checkpoint_path'"),
        ({"architecture": NAME, "model_args": {"depth": 10**9}}, "legal: at most 16,384"),
        ({"architecture": NAME, "pretrained_cfg": "x"}, "pretrained_cfg of config.json: "),
        ({"architecture": NAME, "pretrained_cfg": {"mean": "x"}}, "pretrained_cfg.mean of config.json: "),
        (
            {"architecture": NAME, "pretrained_cfg": {"mean": [float("nan")] * 3}},
            "pretrained_cfg.mean.0 of config.json",
        ),
        ({"architecture": NAME, "pretrained_cfg": {"std": [0, 0, 0]}}, "pretrained_cfg.std.0 of config.json: "),
        ({"architecture": NAME, "pretrained_cfg": {"crop_pct": -1}}, "pretrained_cfg.crop_pct of config.json: "),
    ],
)
def test_a_hostile_hub_folder_is_refused(card: Any, message: str, state: Any, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(card if isinstance(card, str) else json.dumps(card))
    assert message in refused(lambda: load_backbone(BackboneConfig(weights=str(tmp_path))))


# Adaptors


@pytest.fixture
def adaptor(tiny_backbone: TimmBackbone, tmp_path: Path) -> Callable[..., str]:
    """Write an adaptor with changes to its card, load it, and return the error message."""

    def attempt(
        tensors: dict[str, torch.Tensor] | None = None,
        text: str | None = None,
        given: TimmBackbone | None = tiny_backbone,
        **changes: Any,
    ) -> str:
        card: dict[str, Any] = {
            "method": "losa",
            "options": {},
            "backbone": {"name": NAME, "weights": "random", "image_size": 32, "model_kwargs": TINY},
            "precision": "float32",
            "layers": [0, 1, 2],
            "tokens": "all",
            "classes": ["a", "b", "c"],
            "multi_label": False,
            "metrics": {},
            "train_precision": "float32",
            **digests(tiny_backbone),
        }
        save_file(tensors or {"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        document = card_document({**card, **changes}, tmp_path / "a.safetensors")
        (tmp_path / "a.json").write_text(text if text is not None else json.dumps(document))
        return refused(lambda: load_adaptor(tmp_path / "a.safetensors", given, "cpu"))

    return attempt


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"rank": 10**9}},
        {"options": {"rank": 10**18}},
        {"options": {"token_rank": 10**12}},
        {"method": "lora", "options": {"rank": 10**9}},
        {"method": "adapter", "options": {"bottleneck": 10**10}},
        {"method": "compacter", "options": {"bottleneck": 10**10 + 1}},
        {"method": "prompt", "options": {"length": 10**9}},
        {"classes": [str(k) for k in range(100_000)]},
    ],
)
def test_a_card_cannot_claim_memory(adaptor: Callable[..., str], changes: Any) -> None:
    message = adaptor(**changes)
    assert "does not hold the tensors that its card describes" in message or "is damaged" in message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, " " * (17 << 20), "NaN", "1e999", '"\\ud800"'])
def test_a_card_that_is_no_card_is_refused(adaptor: Callable[..., str], text: str) -> None:
    assert "is no JSON" in (message := adaptor(text=text)) or "is no adaptor's card" in message


def test_tensors_of_another_type_or_without_a_value_are_refused(
    adaptor: Callable[..., str], tiny_backbone: TimmBackbone
) -> None:
    import sidecache as sc
    from adapt.methods.trained_parameters import adapter_state_dict

    right = {
        name: tensor.detach() for name, tensor in adapter_state_dict(sc.create_model("losa", tiny_backbone, 3)).items()
    }
    name = next(iter(right))
    for tensor in (right[name].to(torch.int8), right[name].double(), torch.full_like(right[name], torch.nan)):
        assert f"{name} does not hold finite numbers of type torch.float32" in adaptor({**right, name: tensor})


def test_a_card_names_files_by_path_only_where_no_backbone_is_given(tmp_path: Path) -> None:
    card = Card(
        method="losa", options={}, metrics={}, backbone=BackboneConfig(name=NAME, weights=str(tmp_path / "none.pth")),
        weights_digest="", preprocessing_digest="", precision="float32", layers=(0,), tokens="all", classes=("a", "b"),
        multi_label=False, train_precision="float32",
    )  # fmt: skip
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    document = card_document(card.model_dump(mode="json"), tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert "none.pth': there is no such file or folder" in refused(lambda: load_adaptor(tmp_path / "a.safetensors"))


# The report


MARKUP = [
    "<script>alert(1)</script>",
    "</style><script>",
    "--><img src=x onerror=alert(1)>",
    "</pre></title>]]><svg onload=alert(1)>",
    "'\" onmouseover=alert(1) x='",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;",
]
PIECES = st.sampled_from("<>&\"'`/=!-{}%#;() \0\x1b\n\t\u202e\u2066\ud800ab数")
NASTY = st.text(PIECES, min_size=1, max_size=12) | st.sampled_from(MARKUP)


def structure(folder: Path, text: Callable[[str], str], given: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Elements and attribute names of a report that has these texts in every place."""
    names = {field: text(given[field]) for field in ("dataset", "backbone", "feature_source", "trial_id")}
    rows = [
        make_row(text(given["method"]), seed, **names | {"trial_id": str(seed)}, options={text(given["option"]): seed})
        for seed in (0, 1)
    ]
    rows[0] = rows[0].model_copy(update={"trial_id": names["trial_id"] + "!"})
    page = write_report(folder, ReportedRows.of_run(folder, rows), config_text=text(given["config"])).read_text(
        encoding="utf-8"
    )
    assert not set("\0\x1b\u202e\u2066").intersection(page)
    return [(tag, list(attributes)) for tag, attributes in Tags(page).found]


FIELDS = ("dataset", "backbone", "feature_source", "trial_id", "method", "option", "config")


@QUICK
@given(given_texts=st.fixed_dictionaries(dict.fromkeys(FIELDS, NASTY)))
def test_no_text_becomes_an_element_or_an_attribute(
    tmp_path_factory: pytest.TempPathFactory, given_texts: dict[str, str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    harmless = structure(folder, lambda text: "x" * len(" ".join(visible(text).split()) or "x"), given_texts)
    assert structure(folder, str, given_texts) == harmless


def test_the_name_of_the_run_is_a_text_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)<\u202escript>"
    page = write_report(folder, ReportedRows.of_run(folder, [make_row()])).read_text(encoding="utf-8")
    assert Tags(page).named("script") == [{}]
    assert "\\u202escript" in page


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not UTF-8")
def test_a_run_in_a_folder_that_is_not_utf8_has_its_report(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert "\\udcff" in write_report(folder, ReportedRows.of_run(folder, [make_row()])).read_text(encoding="utf-8")


def test_the_terminal_obeys_no_name() -> None:
    shown = terminal([make_row(dataset="\x1b[31mred\u202e", backbone="\x1b]0;title\x07")])
    assert "\x1b" not in shown
    assert "\\u001b[31mred\\u202e" in shown


@given(st.text(st.characters()))
def test_visible_text_can_be_written_and_holds_no_control(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown
    assert all(character.isprintable() or ord(character) > 159 or character in "\t\n" for character in shown)
