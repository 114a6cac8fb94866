"""The schema of a store: the attributes of its root group, parsed and checked."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from store.config import MAX_SHARD_SAMPLES, Compressor, Dtype
from store.dtypes import block_size, bytes_per_token
from store.errors import UserError
from store.layout import Shards, TokenLayout

FORMAT_VERSION = 3
AUGMENTED = "augmented"  # the split of the augmented views of the samples of `train`

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a group or array; not a path out of the store
Count = Annotated[int, Field(ge=1, le=2**40)]
Few = Annotated[int, Field(ge=1, le=2**14)]  # such as a backbone's blocks, over which loops run


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Provenance(_Frozen):
    """The fields that determine the stored values: two stores of the same samples agree if all of these do."""

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
    sampling: str = ""  # how frames are drawn from videos
    drawn: str = ""  # how the test split is drawn, if the source has none
    decoder_digest: str = ""  # of the frames that the video decoder returns for a fixed clip
    augmentation: str = ""  # how the augmented views of training samples are drawn, if there are any

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: Callable[["Provenance"], dict[str, Any]]) -> dict[str, Any]:
        """The fields, without `augmentation` if it is empty: such stores are readable by versions that lack it."""
        fields = serialize(self)
        return {name: value for name, value in fields.items() if name != "augmentation" or value}


class SplitInfo(_Frozen):
    """One split's size, known before its first sample is decoded."""

    num_samples: Annotated[int, Field(ge=0, le=2**40)]


class Schema(_Frozen):
    """The schema of a store: its samples, layers, shapes and formats, and its provenance.

    Attributes:
        layers: absolute block indices, ascending.
        num_class_tokens: among the prefix tokens; see `store.layout.TokenLayout`.
        views: consecutive rows that show the same sample.
        shard_samples: rounded up to whole samples if there are many views.
        libraries: versions with which the store was created, for the record; their effects are in the provenance.
        tail_tensors: the arrays of the group `tail`, the backbone's own read-out (final norm, attention pool).
        val_split: the source's split whose samples are in `train`, marked for validation; empty if there is none.
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
    num_class_tokens: Annotated[int, Field(ge=0, le=2**40)]
    grid: tuple[Count, ...]
    prefix_sets: Count = 1
    views: Count = 1
    shard_samples: Annotated[int, Field(ge=1, le=2 * MAX_SHARD_SAMPLES)]
    compressor: Compressor | None
    provenance: Provenance
    libraries: dict[str, str] = {}
    tail_tensors: tuple[Name, ...]
    val_split: str = ""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: Callable[["Schema"], dict[str, Any]]) -> dict[str, Any]:
        """The fields, without `val_split` if it is empty: such stores are readable by versions that lack it."""
        fields = serialize(self)
        return {name: value for name, value in fields.items() if name != "val_split" or value}

    @model_validator(mode="after")
    def _check(self) -> "Schema":
        if not self.layers or list(self.layers) != sorted({layer for layer in self.layers if layer < self.depth}):
            raise ValueError(f"layers are {list(self.layers)[:9]}; legal: ascending ones of {self.depth}")
        if any(info.num_samples % self.views for info in self.splits.values()):
            raise ValueError(f"the rows of a split are not a multiple of {self.views} views")
        if AUGMENTED in self.splits and self._rows(AUGMENTED) != self.augmented_views * self._rows("train"):
            raise ValueError("the rows of `augmented` are not a multiple of those of `train`")
        if self.dtype == "int4" and not block_size(self.dim):
            raise ValueError(f"int4 takes widths that are a multiple of 4, not {self.dim}")
        assert self.token_layout  # raises for numbers that fit no layout
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
    def augmented_views(self) -> int:
        """Number of augmented views of every sample of `train`: so many consecutive rows of `augmented`."""
        return self._rows(AUGMENTED) // max(1, self._rows("train"))

    def _rows(self, split: str) -> int:
        return self.splits[split].num_samples if split in self.splits else 0

    @property
    def bytes_per_sample(self) -> int:
        """Stored bytes of one sample over all layers, before compression."""
        return len(self.layers) * self.token_layout.num_tokens * bytes_per_token(self.dtype, self.dim)

    def bytes_of(self, rows: int, layers: Sequence[int]) -> int:
        """Stored bytes of some layers of a number of rows, before compression."""
        return rows * self.bytes_per_sample * len(layers) // len(self.layers)

    def shards(self, split: str) -> Shards:
        """How the rows of a split fall into shards."""
        if split not in self.splits:
            raise UserError(f"there is no split {split!r}; legal: {', '.join(self.splits)}")
        return Shards(self.splits[split].num_samples, self.shard_samples)

    def marks_validation(self, split: str) -> bool:
        """Whether the listing of a split says which of its rows are for validation."""
        return split == "train" and self.val_split != ""

    def check_layers(self, layers: tuple[int, ...] | list[int]) -> tuple[int, ...]:
        """The layers as they were given.

        Raises:
            UserError: some of them are not stored.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise UserError(f"layers {missing} are not in this store, which holds {list(self.layers)}")
        return tuple(layers)

    @classmethod
    def parse(cls, attributes: Any, where: str) -> "Schema":
        """Parse a root group's attributes; `where` is the store's name in messages.

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
    """Refuse attributes that are not a store's, or are of another format.

    Raises:
        UserError: names the version that was found.
    """
    version = attributes.get("format_version") if isinstance(attributes, dict) else None
    if version is None:
        raise UserError(f"{where} is not a token store; choose another store.path")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} is a store of format {version!r}, this sidecache reads and writes {FORMAT_VERSION}; "
            "install the version that wrote it, or choose a new store.path"
        )
