"""Chooses the test split: one of the source's own splits, or a fraction drawn from the training samples."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from extract.config import DataConfig
from extract.sources.data_root import describe_source
from extract.sources.samples import Sample
from store.errors import Note, UserError

TRAIN = "train"
TEST_NAMES = ("test", "val", "validation", "valid")
KNOWN_SPLITS = frozenset((TRAIN, *TEST_NAMES))


def choose_test(splits: Collection[str], config: DataConfig) -> str | None:
    """The name of the source's split that serves as the test set; None if the test set must be drawn."""
    chosen = _find_test(splits, config)
    if unused := ", ".join(sorted(set(splits) - {TRAIN, chosen})):
        warnings.warn(
            f"{describe_source(config)}: {unused} is used neither for training nor for testing; training uses {TRAIN}, "
            f"testing uses {chosen} (set data.test_split for another), and validation takes data.val_fraction of "
            f"{TRAIN}. To use these samples, move them into {TRAIN}",
            Note,
            stacklevel=2,
        )
    return chosen


def _find_test(splits: Collection[str], config: DataConfig) -> str | None:
    wanted, found = config.test_split, ", ".join(sorted(splits))
    if not splits:
        if wanted is not None:
            raise UserError(
                f"data.test_split is {wanted!r}, but {describe_source(config)} has no splits; remove test_split"
            )
        return None
    if TRAIN not in splits:
        raise UserError(
            f"{describe_source(config)} has the splits {found} but no {TRAIN!r}; rename the one to train on"
        )
    if wanted is not None:
        if wanted not in splits or wanted == TRAIN:
            raise UserError(
                f"data.test_split is {wanted!r}, but the splits of {describe_source(config)} are {found}; "
                f"name one other than {TRAIN}"
            )
        return wanted
    for name in TEST_NAMES:
        if name in splits:
            return name
    if len(splits) == 1:
        return None
    raise UserError(
        f"the splits of {describe_source(config)} are {found}, none named {', '.join(TEST_NAMES)}; "
        "set data.test_split to the one to test on"
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
