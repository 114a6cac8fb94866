"""Lists WebDataset shards: uncompressed tars whose members, grouped by name, are an image and its label.

The headers are scanned once; images are read later from their offset, in any order. A member's key is its name up to
the first dot of its last part, as in webdataset's `base_plus_ext`. Nothing is unpacked, so no member can be written to
a path outside.
"""

import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from extract.config import DataConfig
from extract.images.decode import EXTENSIONS
from extract.sources.data_root import required_root
from extract.sources.ignored_files import IgnoredFiles, is_system_file
from extract.sources.samples import FileSlice, Sample, SourceSamples
from extract.sources.splits import KNOWN_SPLITS, TRAIN, choose_splits
from extract.sources.tables import label_text
from store.errors import UserError

_MAX_HEADER_BYTES = 64 << 10  # of a long name or of pax records
_MAX_RECORDS = 1_000
_MAX_LABEL_BYTES = 1 << 20
_DIGITS = re.compile(rb"\d{64}")  # no number of a header is as long, and tarfile's search for numbers is quadratic
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_NUMBERS = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_COMPRESSED_NAME = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_IMAGE_KINDS = frozenset(extension[1:] for extension in EXTENSIONS)

_LEGAL = "legal: an image such as 000.jpg with its label in 000.cls, or in 000.json under the key label"


class ByteRange(NamedTuple):
    """Where a member's content is in its shard. Nothing else of a header is kept."""

    offset: int
    n_bytes: int


Members = dict[str, ByteRange]  # the members of one sample by kind: "jpg", "cls", ...


class _HeaderReader(io.BufferedReader):
    """The file from which tarfile reads the headers; limits their size, since a header may claim gigabytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes; legal: at most {_MAX_HEADER_BYTES:,}")
        content = super().read(size)
        if _DIGITS.search(content):
            raise tarfile.ReadError("a header holds a number of 64 digits or more")
        return content


def list_tars(config: DataConfig) -> SourceSamples:
    """All samples of `data.root`: a tar, a folder of tars, or a folder with a folder of tars for each split."""
    root = required_root(config)
    shards = _shards_by_split(root, {name for name in (config.test_split, config.val_split) if name})
    chosen = choose_splits([] if None in shards else [split for split in shards if split], config)
    ignored = IgnoredFiles()
    samples = SourceSamples(
        name=root.resolve().name if root.is_dir() else root.stem,
        train=_list_shards(shards[None if None in shards else TRAIN], ignored),
        test=None if chosen.test is None else _list_shards(shards[chosen.test], ignored),
        validation=() if chosen.validation is None else _list_validation(chosen.validation, shards, ignored),
    )
    ignored.warn(root, "no image and label with this name up to its first dot")
    return samples


def _list_validation(split: str, shards: Mapping[str | None, Sequence[Path]], ignored: IgnoredFiles) -> list[Sample]:
    """The samples of the validation split; their ids begin with its name, since `train` may have the same keys."""
    return [replace(sample, id=f"{split}/{sample.id}") for sample in _list_shards(shards[split], ignored)]


def _shards_by_split(root: Path, named: Collection[str]) -> dict[str | None, list[Path]]:
    """Shards by split, or all under None if the source has no splits.

    Args:
        root: a tar, or a folder.
        named: splits that the configuration names, to be found in the names of shards beside the usual ones.
    """
    if root.is_file():
        return {None: [root]}
    # a folder for each split
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
        raise UserError(
            f"{root} holds no tars; legal: train-000000.tar and so on, train/*.tar, or *.tar without splits"
        )
    # the split in the name of each shard
    known = KNOWN_SPLITS.union(named)
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


def _split_in_name(path: Path, known: Collection[str]) -> str:
    """`train` for train-000000.tar, and for flowers-train-000000.tar as well."""
    prefix = _NUMBERS.sub("", path.stem)
    last = re.split(r"[-_.]", prefix)[-1]
    return last if last in known else prefix or path.stem


def _list_shards(paths: Sequence[Path], ignored: IgnoredFiles) -> list[Sample]:
    samples: dict[str, Sample] = {}
    for path in paths:
        for sample in _list_shard(path, ignored):
            if sample.id in samples:
                raise UserError(f"the sample {sample.id!r} of {path} is also in another shard of its split; rename one")
            samples[sample.id] = sample
    if not samples:
        raise UserError(f"the shards {paths[0]} and so on hold no samples; {_LEGAL}")
    return list(samples.values())


def _list_shard(path: Path, ignored: IgnoredFiles) -> list[Sample]:
    with path.open("rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise _compressed(path)
    try:
        with _HeaderReader(path) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            groups = _group(path, _iterate(tar), ignored)
            _check_end(path, tar)
        return [sample for key, members in groups.items() for sample in _samples(path, key, members, ignored)]
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        # tarfile raises no TarError for pax records that are no numbers, or for a chain of headers
        raise UserError(f"{path} cannot be read as a tar: {error}; write it or download it again") from error


def _iterate(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, one at a time; tarfile would keep all of them, each with a copy of the archive's pax records."""
    end = 0
    while member := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]
        if member.size < 0 or member.offset_data < end:
            raise tarfile.ReadError(f"the member {member.name!r} begins before the end of the previous one")
        if len(member.pax_headers) > _MAX_RECORDS:
            raise tarfile.ReadError(f"it has {len(member.pax_headers)} pax records; legal: at most {_MAX_RECORDS:,}")
        end = member.offset_data + member.size
        yield member


def _check_end(path: Path, tar: tarfile.TarFile) -> None:
    """Refuse an archive that is cut or damaged, where tarfile would silently stop as if at the end of the archive."""
    with path.open("rb") as file:
        file.seek(tar.offset)
        rest = file.read(1 << 16)
    if not rest or any(rest):
        fault = "is damaged or continues after its end mark" if rest else "is truncated"
        raise UserError(f"{path} {fault} at byte {tar.offset}; write it or download it again")


def _group(path: Path, members: Iterable[tarfile.TarInfo], ignored: IgnoredFiles) -> dict[str, Members]:
    groups: dict[str, Members] = {}
    for member, name in _safe_files(path, members):
        *folders, base = name.split("/")
        if base.startswith(".") or any(map(is_system_file, (*folders, base))):
            continue
        match = _MEMBER.fullmatch(name)
        if match is None:
            ignored.add(name)
            continue
        key, kind = match[1], match[2].lower()
        if kind in groups.setdefault(key, {}):
            raise UserError(f"{path} holds {name!r} twice; write the shard again with unique names")
        groups[key][kind] = ByteRange(member.offset_data, member.size)
    return groups


def _safe_files(path: Path, members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[tarfile.TarInfo, str]]:
    for member in members:
        if member.isdir():
            continue
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path} holds {member.name!r}, which leads out of the archive; write the shard again")
        if not member.isfile() or member.issparse():
            raise UserError(f"{path} holds {member.name!r}, a link, device or sparse file; legal: only plain files")
        yield member, name.as_posix()


def _samples(path: Path, key: str, members: Members, ignored: IgnoredFiles) -> Iterator[Sample]:
    """The sample that the members make; none if they have neither image nor class, such as a README."""
    kinds = sorted(_IMAGE_KINDS.intersection(members))
    if not kinds and "cls" not in members:
        for kind in members:
            ignored.add(f"{key}.{kind}")
        return
    if len(kinds) != 1:
        raise UserError(f"the sample {key!r} of {path} has {len(kinds)} images ({', '.join(members)}); {_LEGAL}")
    place = f"the sample {key!r} of {path}"
    image = members[kinds[0]]
    label = label_text(_read_label(path, members, place), place)
    yield Sample(key, (label,), FileSlice(str(path), *image))


def _read_label(path: Path, members: Members, place: str) -> Any:
    kind = "cls" if "cls" in members else "json"
    if kind not in members:
        raise UserError(
            f"{place} has no label; {_LEGAL}. If these are plain images in class folders, unpack the tar and use "
            "source folder"
        )
    offset, n_bytes = members[kind]
    if n_bytes > _MAX_LABEL_BYTES:
        raise UserError(f"{place} has a .{kind} of {n_bytes:,} bytes; legal: at most {_MAX_LABEL_BYTES:,}")
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(n_bytes)
    try:
        text = content.decode()
        return text if kind == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{place} has no readable label in its .{kind} ({error!r}); {_LEGAL}") from error


def _compressed(path: Path) -> UserError:
    return UserError(f"{path} is compressed, so its members cannot be read in any order; unpack it to a plain .tar")
