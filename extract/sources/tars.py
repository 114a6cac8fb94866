"""WebDataset shards: uncompressed tars whose members, grouped by name, are an image and its label.

Headers are scanned once; images are read later at their offset, in any order. A member's key is its name up to the
first dot of its last part, as in webdataset's `base_plus_ext`. Nothing is ever unpacked, so no name leads anywhere.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from extract.config import DataConfig
from extract.images.decode import ENDINGS
from extract.sources.samples import KNOWN_SPLITS, TRAIN, FileSlice, Listing, Sample, choose_test, given_root
from extract.sources.skipped_files import LeftOut, is_dropping
from extract.sources.tables import label_text
from store.errors import UserError

_MOST_HEADER_BYTES = 64 << 10  # of a long name or of pax records
_MOST_RECORDS = 1_000
_MOST_LABEL_BYTES = 1 << 20
_DIGITS = re.compile(rb"\d{64}")  # no number of a header is as long, and tarfile's search for numbers is quadratic
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_NUMBERS = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_COMPRESSED_NAME = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_IMAGE_KINDS = frozenset(ending[1:] for ending in ENDINGS)

_WANTED = "a sample is an image such as 000.jpg with its label in 000.cls, or in 000.json under the key label"


class Span(NamedTuple):
    """Where a member's content lies in its shard, in bytes; all that is kept of a header."""

    offset: int
    n_bytes: int


Group = dict[str, Span]  # the members of one sample by kind: "jpg", "cls", ...


class _Shard(io.BufferedReader):
    """A file from which tarfile reads headers only, so that one of them cannot claim gigabytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, where {_MOST_HEADER_BYTES:,} are legal")
        content = super().read(size)
        if _DIGITS.search(content):
            raise tarfile.ReadError("a header with a number of 64 digits or more")
        return content


def list_tars(config: DataConfig) -> Listing:
    root = given_root(config)
    shards = _shards_by_split(root, config.test_split)
    test = choose_test([] if None in shards else [split for split in shards if split], config)
    left_out = LeftOut()
    listing = Listing(
        name=root.resolve().name if root.is_dir() else root.stem,
        train=_list_shards(shards[None if None in shards else TRAIN], left_out),
        test=None if test is None else _list_shards(shards[test], left_out),
    )
    left_out.note(root, "as no image and label have their name up to its first dot")
    return listing


def _shards_by_split(root: Path, test_split: str | None) -> dict[str | None, list[Path]]:
    """Shards by split, or all under None if the source has no splits."""
    if root.is_file():
        return {None: [root]}
    direct = _tars_in(root)
    nested: dict[str | None, list[Path]] = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and (tars := _tars_in(folder)):
            nested[folder.name] = tars
    if direct and nested:
        raise UserError(
            f"{root} holds tars beside folders of tars ({', '.join(map(str, nested))}); keep one or the other"
        )
    if nested:
        return nested
    if not direct:
        raise UserError(f"{root} holds no tars; it wants train-000000.tar ..., train/*.tar, or *.tar without splits")
    known = KNOWN_SPLITS | ({test_split} if test_split else set())
    splits: dict[str | None, list[Path]] = {}
    for path in direct:
        splits.setdefault(_split_in_name(path, known), []).append(path)
    return splits if known.intersection(filter(None, splits)) else {None: direct}


def _tars_in(folder: Path) -> list[Path]:
    names = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in names:
        if _COMPRESSED_NAME.search(path.name):
            raise _compressed(path)
    return [path for path in names if path.suffix == ".tar"]


def _split_in_name(path: Path, known: frozenset[str] | set[str]) -> str:
    """`train` for train-000000.tar, and for flowers-train-000000.tar as well."""
    prefix = _NUMBERS.sub("", path.stem)
    last = re.split(r"[-_.]", prefix)[-1]
    return last if last in known else prefix or path.stem


def _list_shards(paths: Sequence[Path], left_out: LeftOut) -> list[Sample]:
    samples: dict[str, Sample] = {}
    for path in paths:
        for sample in _list_shard(path, left_out):
            if sample.id in samples:
                raise UserError(f"the sample {sample.id!r} of {path} is in another shard of its split too; rename one")
            samples[sample.id] = sample
    if not samples:
        raise UserError(f"{paths[0]} and its like hold no samples: {_WANTED}")
    return list(samples.values())


def _list_shard(path: Path, left_out: LeftOut) -> list[Sample]:
    with path.open("rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise _compressed(path)
    try:
        with _Shard(path) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            groups = _group(path, _members(tar), left_out)
            _check_end(path, tar)
        return [sample for key, group in groups.items() for sample in _samples(path, key, group, left_out)]
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        # tarfile has no error of its own for pax records that are no numbers, or for a chain of headers
        raise UserError(f"{path} cannot be read as a tar: {error}; write or fetch it again") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """One by one; tarfile would keep all of them, each with a copy of the archive's pax records."""
    end = 0
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]
        if member.size < 0 or member.offset_data < end:
            raise tarfile.ReadError(f"the member {member.name!r} begins before the one in front of it ends")
        if len(member.pax_headers) > _MOST_RECORDS:
            raise tarfile.ReadError(f"{len(member.pax_headers)} pax records, where {_MOST_RECORDS:,} are legal")
        end = member.offset_data + member.size
        yield member


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header, or none, for the end of the archive: samples would go missing in silence."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        rest = file.read(1 << 16)
    if not rest or any(rest):
        what = "is cut short" if not rest else "is damaged, or goes on behind its end,"
        raise UserError(f"{path} {what} at byte {tar.offset}; write or fetch it again")


def _group(path: Path, members: Iterable[tarfile.TarInfo], left_out: LeftOut) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for member, name in _safe_files(path, members):
        *folders, base = name.split("/")
        if base.startswith(".") or any(map(is_dropping, (*folders, base))):
            continue
        match = _MEMBER.fullmatch(name)
        if match is None:
            left_out.add(name)
            continue
        key, kind = match[1], match[2].lower()
        if kind in groups.setdefault(key, {}):
            raise UserError(f"{path} holds {name!r} twice; write the shard again with unique names")
        groups[key][kind] = Span(member.offset_data, member.size)
    return groups


def _safe_files(path: Path, members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[tarfile.TarInfo, str]]:
    for member in members:
        if member.isdir():
            continue
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path} holds {member.name!r}, which leads out of the archive; write the shard again")
        if not member.isfile() or member.issparse():
            raise UserError(f"{path} holds {member.name!r}, a link, device or sparse file; only plain files are legal")
        yield member, name.as_posix()


def _samples(path: Path, key: str, group: Group, left_out: LeftOut) -> Iterator[Sample]:
    """The group's sample; nothing for a group without image and class, such as a README."""
    kinds = sorted(_IMAGE_KINDS.intersection(group))
    if not kinds and "cls" not in group:
        for kind in group:
            left_out.add(f"{key}.{kind}")
        return
    if len(kinds) != 1:
        raise UserError(f"the sample {key!r} of {path} has {len(kinds)} images ({', '.join(group)}); {_WANTED}")
    place = f"the sample {key!r} of {path}"
    image = group[kinds[0]]
    label = label_text(_label(path, group, place), place)
    yield Sample(key, (label,), FileSlice(str(path), *image))


def _label(path: Path, group: Group, place: str) -> Any:
    kind = "cls" if "cls" in group else "json"
    if kind not in group:
        raise UserError(f"{place} has no label; {_WANTED}. Plain images in class folders: unpack, use source folder")
    offset, n_bytes = group[kind]
    if n_bytes > _MOST_LABEL_BYTES:
        raise UserError(f"{place} has a .{kind} of {n_bytes:,} bytes; legal: at most {_MOST_LABEL_BYTES:,}")
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(n_bytes)
    try:
        text = content.decode()
        return text if kind == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{place} has no label that can be read in its .{kind} ({error!r}); {_WANTED}") from error


def _compressed(path: Path) -> UserError:
    return UserError(f"{path} is compressed, so its members cannot be read in any order; unpack it to a plain .tar")
