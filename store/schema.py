"""What a store says of itself: the attributes of its root group."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from store.config import MOST_SHARD_SAMPLES, Compressor, Dtype
from store.dtypes import bytes_per_token
from store.errors import OtherStoreError, UserError
from store.layout import Shards, TokenLayout

FORMAT_VERSION = 3

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a group or array: no path that leads elsewhere
Count = Annotated[int, Field(ge=1, le=2**40)]
Few = Annotated[int, Field(ge=1, le=2**14)]  # blocks of a backbone, say: loops go over them


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Provenance(_Frozen):
    """Every field that decides a stored value. Two stores agree only where all of these agree."""

    backbone: str
    model_kwargs: dict[str, Any]
    weights_digest: str
    image_size: Annotated[tuple[Count, ...], Field(min_length=1)]
    preprocessing: str
    preprocessing_digest: str
    tokens: str
    dtype: Dtype
    precision: str
    samples: dict[str, str]
    extraction_version: int
    sampling: str = ""  # how frames were drawn from videos
    drawn: str = ""  # how the test split was, where the source has none
    decoder_digest: str = ""  # of what the decoder of videos made of a fixed clip

    def difference(self, other: "Provenance") -> dict[str, tuple[Any, Any]]:
        """Field -> (here, there), for every field that differs."""
        # As JSON, which is how a store keeps them: a tuple of the caller's equals the list that was stored.
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


class SplitInfo(_Frozen):
    """One split's size, known before its first sample is decoded."""

    num_samples: Annotated[int, Field(ge=0, le=2**40)]


class Schema(_Frozen):
    """The whole self-description. `layers` are absolute block indices, ascending.

    `libraries` are the versions with which the store was begun, for the record: they are never compared, since what
    they decide is in the provenance.
    `tail_tensors` name the arrays of the group `tail`: the backbone's own read-out (final norm, attention pool).
    """

    format_version: int
    dataset: str
    classes: tuple[str, ...]
    multi_label: bool
    splits: dict[Name, SplitInfo]
    depth: Few
    layers: tuple[Annotated[int, Field(ge=0)], ...]
    dim: Count
    num_prefix_tokens: Annotated[int, Field(ge=0, le=2**40)]
    num_class_tokens: Annotated[int, Field(ge=0, le=2**40)]  # among the prefix tokens; see `store.layout.TokenLayout`
    grid: tuple[Count, ...]
    prefix_sets: Count = 1
    views: Count = 1  # consecutive rows that show the same sample
    shard_samples: Annotated[int, Field(ge=1, le=2 * MOST_SHARD_SAMPLES)]  # rounded up to whole samples of many views
    compressor: Compressor | None
    provenance: Provenance
    libraries: dict[str, str] = {}
    tail_tensors: tuple[Name, ...]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Schema":
        if not self.layers or list(self.layers) != sorted({layer for layer in self.layers if layer < self.depth}):
            raise ValueError(f"layers are {list(self.layers)[:9]}; legal: ascending ones of {self.depth}")
        if any(info.num_samples % self.views for info in self.splits.values()):
            raise ValueError(f"the rows of a split are no multiple of {self.views} views")
        assert self.token_layout  # which refuses numbers that fit no layout
        return self

    @property
    def dtype(self) -> Dtype:
        """The stored format."""
        return self.provenance.dtype

    @property
    def token_layout(self) -> TokenLayout:
        """Prefix tokens and grid, as stored."""
        return TokenLayout(self.num_prefix_tokens, self.grid, self.prefix_sets, num_class_tokens=self.num_class_tokens)

    @property
    def bytes_per_sample(self) -> int:
        """Stored bytes of one sample over all layers, before compression."""
        return len(self.layers) * self.token_layout.num_tokens * bytes_per_token(self.dtype, self.dim)

    def bytes_of(self, rows: int, layers: Sequence[int]) -> int:
        """Stored bytes of some layers of so many rows, before compression."""
        return rows * self.bytes_per_sample * len(layers) // len(self.layers)

    def shards(self, split: str) -> Shards:
        """How the rows of a split fall into shards."""
        if split not in self.splits:
            raise UserError(f"there is no split {split!r}; legal: {', '.join(self.splits)}")
        return Shards(self.splits[split].num_samples, self.shard_samples)

    def check_layers(self, layers: tuple[int, ...] | list[int]) -> tuple[int, ...]:
        """`layers` where all of them are stored."""
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise UserError(f"layers {missing} are not in this store, which holds {list(self.layers)}")
        return tuple(layers)

    def may_grow_into(self, later: "Schema") -> bool:
        """Whether another schema differs in more samples and more layers alone, if at all."""
        samples = later.provenance.model_copy(update={"samples": self.provenance.samples})
        like_this = {"splits": self.splits, "layers": self.layers, "provenance": samples}
        return (
            self == later.model_copy(update=like_this)
            and set(self.layers) <= set(later.layers)
            and self.splits.keys() == later.splits.keys()
            and all(info.num_samples <= later.splits[split].num_samples for split, info in self.splits.items())
        )

    @classmethod
    def parse(cls, attributes: Any, where: str) -> "Schema":
        """From a root group's attributes.

        Raises:
            UserError: they are of another format, or do not fit this one.
        """
        require_version(attributes, where)
        try:
            return cls.model_validate(attributes)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{where} was written by another version of sidecache ({field}: {first['msg']}); "
                "extract to a new store.path"
            ) from error


def require_version(attributes: Any, where: str) -> None:
    """Refuse what is no store, or one of another format.

    Raises:
        UserError: says which version was found, and what to do.
    """
    version = attributes.get("format_version") if isinstance(attributes, dict) else None
    if version is None:
        raise UserError(f"{where} holds something that is no token store; choose another store.path")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} is a store of format {version!r}, this sidecache reads and writes {FORMAT_VERSION}; "
            "install the version that wrote it, or choose a new store.path"
        )


def require_same(stored: Schema, wanted: Schema, where: str) -> None:
    """Refuse a store that was made in another way, naming every field that differs.

    Samples and classes are compared apart (changes.py), since more of the former may come; so may layers.

    Raises:
        OtherStoreError: provenance, kind of labels or shape of tokens differ.
    """
    different: dict[str, tuple[Any, Any]] = {
        f"provenance.{name}": pair for name, pair in stored.provenance.difference(wanted.provenance).items()
    }
    different.pop("provenance.samples", None)
    if "provenance.decoder_digest" in different and stored.libraries != wanted.libraries:
        different["libraries"] = (stored.libraries, wanted.libraries)  # no reason to refuse, but what to install
    compared = ("multi_label", "depth", "dim", "num_prefix_tokens", "num_class_tokens", "grid", "prefix_sets", "views")
    for name in (*compared, "tail_tensors"):
        if getattr(stored, name) != getattr(wanted, name):
            different[name] = (getattr(stored, name), getattr(wanted, name))
    refuse_difference(different, where)


def refuse_difference(different: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Raise OtherStoreError where any field -> (stored, wanted) is given, naming them all."""
    if different:
        lines = "".join(f"\n  {name}: stored {here!r}, wanted {there!r}" for name, (here, there) in different.items())
        raise OtherStoreError(
            f"the store {where} was made from something else:{lines}\n"
            "Undo that change, or choose another store.path (a store is never overwritten)."
        )
