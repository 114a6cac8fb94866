"""Chooses the test and validation splits: the source's own splits, or a fraction drawn from the training samples."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from extract.config import DataConfig
from extract.sources.data_root import describe_source
from extract.sources.samples import Sample
from store.errors import Note, UserError

TRAIN = "train"
TEST_NAMES = ("test", "val", "validation", "valid")
KNOWN_SPLITS = frozenset((TRAIN, *TEST_NAMES))


@dataclass(frozen=True, kw_only=True)
class ChosenSplits:
    """The names of the source's splits that a job uses beside `train`.

    Attributes:
        test: the split to test on; None if the test set must be drawn from `train`.
        validation: the split to validate on; None if validation samples are drawn from `train`.
    """

    test: str | None
    validation: str | None


def choose_splits(splits: Collection[str], config: DataConfig) -> ChosenSplits:
    """Choose the splits to test and to validate on among those of a source, and warn of the others.

    Args:
        splits: names of the source's splits; empty for a source without splits.
        config: the `data:` section.

    Raises:
        UserError: a split that the configuration names does not exist, or none can be the test split.
    """
    if not splits:
        _refuse_named_splits(config)
        return ChosenSplits(test=None, validation=None)
    if TRAIN not in splits:
        found = ", ".join(sorted(splits))
        raise UserError(
            f"{describe_source(config)} has the splits {found} but no {TRAIN!r}; rename the one to train on"
        )
    validation = _named_split("val_split", config.val_split, splits, config)
    test = _named_split("test_split", config.test_split, splits, config) or _default_test(splits, config)
    chosen = ChosenSplits(test=test, validation=validation)
    _warn_of_unused(splits, chosen, config)
    return chosen


def _refuse_named_splits(config: DataConfig) -> None:
    """Refuse a configuration that names splits of a source without splits."""
    for key, name in (("test_split", config.test_split), ("val_split", config.val_split)):
        if name is not None:
            raise UserError(f"data.{key} is {name!r}, but {describe_source(config)} has no splits; remove {key}")


def _named_split(key: str, name: str | None, splits: Collection[str], config: DataConfig) -> str | None:
    """The split that a key of the configuration names, checked; None if the key is not set."""
    if name is not None and (name not in splits or name == TRAIN):
        raise UserError(
            f"data.{key} is {name!r}, but the splits of {describe_source(config)} are {', '.join(sorted(splits))}; "
            f"name one other than {TRAIN}"
        )
    return name


def default_test_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the splits that serve as the test set by default, the first that exists; never the validation split."""
    return tuple(name for name in TEST_NAMES if name != config.val_split)


def _default_test(splits: Collection[str], config: DataConfig) -> str | None:
    """The split to test on if the configuration names none; None if `train` has to give the test set."""
    for name in default_test_names(config):
        if name in splits:
            return name
    if not set(splits) - {TRAIN, config.val_split}:
        return None
    raise UserError(
        f"the splits of {describe_source(config)} are {', '.join(sorted(splits))}, none named "
        f"{', '.join(default_test_names(config))}; set data.test_split to the one to test on"
    )


def _warn_of_unused(splits: Collection[str], chosen: ChosenSplits, config: DataConfig) -> None:
    """Warn of splits that are used neither for training nor for validation or testing."""
    unused = ", ".join(sorted(set(splits) - {TRAIN, chosen.test, chosen.validation}))
    if not unused:
        return
    validation, remedy = f"uses {chosen.validation}", ""
    if chosen.validation is None:
        validation, remedy = f"takes data.val_fraction of {TRAIN}", "set data.val_split to validate on them, or "
    warnings.warn(
        f"{describe_source(config)}: {unused} is used neither for training nor for testing; training uses {TRAIN}, "
        f"testing uses {chosen.test} (set data.test_split for another), and validation {validation}. "
        f"To use these samples, {remedy}move them into {TRAIN}",
        Note,
        stacklevel=3,
    )


def draw_settings(config: DataConfig) -> str:
    """All settings that determine how a test split is drawn, as JSON."""
    return json.dumps({"test_fraction": config.test_fraction, "split_seed": config.split_seed})


def draw_test(
    samples: Sequence[Sample],
    fraction: float,
    *,
    multi_label: bool,
    seed: int = 0,
    stored_splits: Mapping[str, str] | None = None,
) -> set[str]:
    """Draw the test set of a source that has none.

    Each class gives the `fraction` of its samples that comes first in the order of the hashes of their ids, salted with
    `seed`. So the draw depends neither on the order of the samples nor on other classes, and one more sample moves at
    most one other. Multi-label samples are drawn in the same way from all of them, except that every class keeps a
    training sample. Parts of one file that have the same class are drawn together.

    Args:
        samples: the candidates.
        fraction: of the samples of each class.
        multi_label: whether samples may have several labels.
        seed: another one gives another draw.
        stored_splits: id -> `train` or `test` of samples that a store holds. They, and other parts of their files, stay
            in that split; only as many new samples are drawn as the class's fraction then lacks.

    Returns:
        The ids of the samples drawn.
    """
    groups: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(() if multi_label else sample.labels, []).append(sample)
    chosen: set[str] = set()
    for group in groups.values():
        old_test, old_train, new = _by_stored_split(group, stored_splits or {})
        ordered = sorted(new, key=lambda sample: (_hash(sample.file, seed), sample.id))
        missing = min(int(len(group) * fraction + 0.5), len(group) - 1) - len(old_test)
        # if train has no sample yet, one must remain for it
        drawn = ordered[: _nearest_cut(ordered, missing, may_take_all=bool(old_train))]
        chosen.update(sample.id for sample in (*old_test, *drawn))
        if multi_label:
            chosen -= _only_holders(drawn, [*old_train, *ordered[len(drawn) :]])
    return chosen


def _nearest_cut(ordered: Sequence[Sample], wanted: int, may_take_all: bool) -> int:
    """The number of samples nearest to `wanted` that divides no file."""
    cuts = [0, *(k for k in range(1, len(ordered)) if ordered[k - 1].file != ordered[k].file)]
    if may_take_all:
        cuts.append(len(ordered))
    return min(cuts, key=lambda k: (abs(k - wanted), -k))


def _by_stored_split(
    group: Sequence[Sample], stored_splits: Mapping[str, str]
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples that stay in test, samples that stay in train, and new samples."""
    split_of_file = {sample.file: stored_splits[sample.id] for sample in group if sample.id in stored_splits}
    by_split: dict[str | None, list[Sample]] = {"test": [], "train": [], None: []}
    for sample in group:
        by_split[stored_splits.get(sample.id, split_of_file.get(sample.file))].append(sample)
    return by_split["test"], by_split["train"], by_split[None]


def _only_holders(drawn: Sequence[Sample], remaining: Sequence[Sample]) -> set[str]:
    """Ids of drawn samples that must go back to training, so that every class has a training sample."""
    missing = labels_of(drawn) - labels_of(remaining)
    returned: set[str] = set()
    for sample in reversed(drawn):
        if missing.intersection(sample.labels):
            missing.difference_update(sample.labels)
            returned.add(sample.id)
    return returned


def labels_of(samples: Sequence[Sample]) -> set[str]:
    """All labels of the samples."""
    return {label for sample in samples for label in sample.labels}


def _hash(sample_id: str, seed: int) -> bytes:
    salt = seed.to_bytes(blake2b.SALT_SIZE, "little")  # a salt of zeros is the same as none
    return blake2b(sample_id.encode(errors="surrogateescape"), digest_size=16, salt=salt).digest()
