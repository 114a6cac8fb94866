"""The training loop: results depend on the seed alone, the best epoch is kept, and interrupted runs resume."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from method_cases import build, make_spec
from torch import Tensor

import adapt.training.checkpoint
import adapt.training.loop
from adapt.training.candidate import Candidate
from adapt.training.checkpoint import Checkpoint, TrainingProgress
from adapt.training.distributed import World
from adapt.training.loop import Loop, Settings, TrainingTask, evaluate_split, fit, predict_logits
from adapt.training.objective import Objective, class_weights, make_objective
from adapt.training.optimizer import make_optimizer, make_schedule
from adapt.training.row_draw import draw_validation
from store.errors import JobError, UserError

SETTINGS = Settings(epochs=4, batch_size=8, seed=1)
PLAIN = Objective(multi_label=False)


class MadeFeatures:
    """Tokens with the class in one patch: hard for a probe of the mean, easy for LoSA."""

    kind = "made"
    at_once, views = 32, 1

    def __init__(self, total: int = 60, multi_label: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.spec, self.device, self.num_classes, self.multi_label = make_spec(), torch.device("cpu"), 5, multi_label
        self._labels = torch.randint(0, 5, (total,), generator=draw)
        shape = (total, self.spec.layout.num_tokens, self.spec.dim)
        self._tokens = {layer: torch.randn(shape, generator=draw) for layer in self.spec.layers}
        for values in self._tokens.values():
            values[torch.arange(total), 1, self._labels] += 6.0
        if multi_label:
            self._labels = torch.nn.functional.one_hot(self._labels, 5).to(torch.uint8)

    def labels(self, split: str) -> Tensor:
        return self._labels

    def samples_at_once(self, layers: Sequence[int]) -> int:
        return self.at_once

    def for_epoch(self, seed: int, epoch: int) -> "MadeFeatures":
        return self

    def batches(
        self, split: str, groups: Sequence[np.ndarray], layers: Sequence[int], together: int = 1
    ) -> Iterator[tuple[np.ndarray, Any]]:
        for rows in groups:
            yield rows, {layer: self._tokens[layer][torch.from_numpy(rows)] for layer in layers}


def candidate(lr: float = 0.01, method: str = "losa", **options: Any) -> Candidate:
    torch.manual_seed(0)
    options = {"rank": 4, "token_rank": 2, "pool": "mean"} | options if method == "losa" else options
    return Candidate(build(method, options), lr, 0.01)


def task_of(features: MadeFeatures, objective: Objective = PLAIN) -> TrainingTask:
    rows, val_rows = draw_validation(features.labels("train"), 0.25, seed=0)
    return TrainingTask(features=features, rows=rows, val_rows=val_rows, objective=objective)


def test_training_learns() -> None:
    features, trained = MadeFeatures(), candidate()
    fit([trained], task_of(features), Settings(epochs=15, batch_size=8, seed=0))
    assert trained.score > 60  # chance is 20
    assert evaluate_split(trained.model, features, "train").top1 > 80


def test_one_seed_gives_the_same_bits_and_another_gives_others() -> None:
    features = MadeFeatures()
    models = []
    for seed in (1, 1, 2):
        trained = candidate(dropout=0.2)
        fit([trained], task_of(features), Settings(epochs=2, batch_size=8, seed=seed))
        models.append(trained.model.state_dict())
    same, other = ([torch.equal(models[0][name], models[k][name]) for name in models[0]] for k in (1, 2))
    assert all(same)
    assert not all(other)


def test_candidates_in_one_pass_train_as_they_would_alone() -> None:
    features = MadeFeatures()
    together = [candidate(0.01), candidate(0.001), candidate(0.03)]
    fit(together, task_of(features), SETTINGS)
    for trained in together:
        alone = candidate(trained.lr)
        fit([alone], task_of(features), SETTINGS)
        assert (alone.score, alone.loss, alone.best_epoch) == (trained.score, trained.loss, trained.best_epoch)


def test_the_epoch_with_the_best_validation_score_is_kept() -> None:
    features, trained = MadeFeatures(), candidate(lr=0.01)
    task = task_of(features)
    mislabeled = torch.from_numpy(task.val_rows[::3])  # so that no epoch scores on validation as on training rows
    features.labels("train")[mislabeled] = (features.labels("train")[mislabeled] + 1) % 5
    fit([trained], task, Settings(epochs=8, batch_size=8, seed=0))
    logits = predict_logits([trained.model], features, "train", task.val_rows)[0]
    accuracy = 100 * (logits.argmax(1) == features.labels("train")[torch.from_numpy(task.val_rows)]).float().mean()
    assert float(accuracy) == pytest.approx(trained.score)


def test_a_model_is_left_as_it_was_in_its_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if later epochs were worse."""
    features, trained, states, scores = MadeFeatures(), candidate(), [], iter([1.0, 3.0, 2.0, 0.0])
    judge = Objective.judge

    def judged(*args: Any) -> tuple[float, float]:
        states.append(trained.trained_state())
        return next(scores), judge(*args)[1]

    monkeypatch.setattr(Objective, "judge", judged)
    fit([trained], task_of(features), SETTINGS)
    left = trained.trained_state()
    assert trained.best_epoch == 2
    assert all(torch.equal(left[name], states[1][name]) for name in left)
    assert not all(torch.equal(left[name], states[3][name]) for name in left)


class OneOfTwo(World):
    """One of two processes, without communication."""

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_among_others_draws_its_own_dropout_and_the_same_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The checkpoint is written by rank 0, with the generators of that process."""
    features, file = MadeFeatures(), tmp_path / "state.pt"
    ends = []
    for stops in (False, True, False):
        trained = candidate(dropout=0.2)
        monkeypatch.setattr(adapt.training.loop, "world", lambda: OneOfTwo(rank, 2))
        with monkeypatch.context() as patch:
            if stops:
                patch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
                patch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
                patch.setattr(Loop, "validate", stop_at(Loop.validate, 2))
            with contextlib.suppress(KeyboardInterrupt):
                fit([trained], task_of(features), SETTINGS, file if ends else None)
        if stops:
            torch.save({**torch.load(file), "rng": [torch.Generator().manual_seed(9).get_state()]}, file)
        ends.append(trained.model.state_dict())
    whole, _, resumed = ends
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = candidate(dropout=0.2)
    monkeypatch.setattr(adapt.training.loop, "world", lambda: OneOfTwo(1 - rank, 2))
    monkeypatch.setattr(OneOfTwo, "shard", lambda self, parts: list(parts[rank::2]))  # the same samples
    fit([other], task_of(features), SETTINGS)
    assert not all(torch.equal(whole[name], values) for name, values in other.model.state_dict().items())


def stop_at(validate: Callable[..., None], epoch: int) -> Callable[..., None]:
    def stopped(loop: Loop, rows: np.ndarray, current: int) -> None:
        if current == epoch:
            raise KeyboardInterrupt
        validate(loop, rows, current)

    return stopped


@pytest.mark.parametrize("stop_after", [(1, 0), (3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("shuffle_block", [1, 4])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: tuple[int, int], shuffle_block: int
) -> None:
    features, file = MadeFeatures(), tmp_path / "state.pt"
    settings = replace(SETTINGS, shuffle_block=shuffle_block)
    whole, resumed = candidate(dropout=0.2), candidate(dropout=0.2)
    fit([whole], task_of(features), settings)
    save = Checkpoint.save

    def save_then_stop(checkpoint: Checkpoint, progress: TrainingProgress) -> None:
        save(checkpoint, progress)
        if (progress.epochs, progress.steps) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        fit([candidate(dropout=0.2)], task_of(features), settings, file)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert file.exists()
    fit([resumed], task_of(features), settings, file)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (resumed.score, resumed.best_epoch) == (whole.score, whole.best_epoch)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    checkpoint = Checkpoint(tmp_path / "state.pt", [], torch.device("cpu"))
    checkpoint.save(TrainingProgress(1))
    fresh = Checkpoint(tmp_path / "state.pt", [], torch.device("cpu"))
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("store.local.durable_files._temporary", lambda path: tmp_path / "full")
    with pytest.raises(JobError, match=r"the checkpoint .*state\.pt cannot be written \(No space left on device\)"):
        fresh.save(TrainingProgress(2))
    assert fresh.load() == TrainingProgress(1)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises two errors: at the write, and when it closes the archive."""
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(
        adapt.training.checkpoint, "_generators", lambda _: [mock.Mock(get_state=lambda: torch.zeros(10**6))]
    )
    checkpoint, limits = Checkpoint(tmp_path / "state.pt", [], torch.device("cpu")), getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(JobError, match=r"the checkpoint .*state\.pt cannot be written \(File too large\)"):
            checkpoint.save(TrainingProgress(1))
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"no checkpoint")
    features = MadeFeatures()
    with pytest.raises(JobError, match=r"the checkpoint .*state\.pt is damaged; delete it to start again"):
        fit([candidate()], task_of(features), SETTINGS, tmp_path / "state.pt")


def test_no_flipped_bit_of_a_checkpoint_changes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not verify the CRC-32 of a record when it reads."""
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    file, draw = tmp_path / "state.pt", np.random.default_rng(0)

    def checkpoint() -> tuple[Checkpoint, Loop]:
        loop = Loop([candidate()], task_of(MadeFeatures()), SETTINGS)
        return Checkpoint(file, loop.states, torch.device("cpu")), loop

    written, saved = checkpoint()
    written.save(TrainingProgress(1))
    content, refused = file.read_bytes(), 0
    for place in draw.integers(0, 8 * len(content), 100):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        fresh, loop = checkpoint()
        try:
            done = fresh.load()
        except JobError:
            refused += 1
            continue
        assert done == TrainingProgress(1)
        for (ours, *_), (theirs, *_) in zip(loop.states, saved.states, strict=True):
            for name, values in theirs.trained_state().items():
                assert torch.equal(ours.trained_state()[name], values)
    assert refused > 50
    file.write_bytes(content)
    other = Checkpoint(file.rename(tmp_path / "other.pt"), saved.states, torch.device("cpu"))
    with pytest.raises(JobError, match=r"the checkpoint .*other\.pt is damaged"):
        other.load()


def test_a_rate_that_diverges_loses_and_alone_ends_early() -> None:
    features = MadeFeatures()
    wild, tame = candidate(1e30), candidate(0.01)
    fit([wild, tame], task_of(features), SETTINGS)
    assert tame.rank > wild.rank
    alone, epochs = candidate(1e30), []
    features.for_epoch = lambda _, epoch: epochs.append(epoch) or features  # type: ignore[method-assign, func-returns-value]
    fit([alone], task_of(features), SETTINGS)
    assert (alone.score, epochs) == (-np.inf, [0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_every_kind_of_task_trains(optimizer: str, multi_label: bool, balanced: bool) -> None:
    features = MadeFeatures(multi_label=multi_label)
    trained = candidate(lr=0.01 if optimizer == "adamw" else 0.1)
    settings = Settings(epochs=25, batch_size=8, seed=0, optimizer=optimizer, balance_classes=balanced)
    labels = features.labels("train")[torch.from_numpy(task_of(features).rows)]
    task = task_of(features, make_objective(labels, 5, multi_label, balanced))
    fit([trained], task, settings)
    metrics = evaluate_split(trained.model, features, "train")
    assert (metrics.mean_average_precision if multi_label else metrics.top1) > 50  # chance is 20


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(multi_label: bool, balanced: bool) -> None:
    features = MadeFeatures(multi_label=multi_label)
    labels = features.labels("train")[torch.from_numpy(task_of(features).rows)]
    task = task_of(features, make_objective(labels, 5, multi_label, balanced))
    states = []
    for at_once in (32, 3):
        features.at_once, trained = at_once, candidate()
        settings = Settings(epochs=2, batch_size=8, seed=0, optimizer="sgd", balance_classes=balanced)
        fit([trained], task, settings)
        states.append(trained.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_balanced_weights_give_rare_classes_their_share() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    weights = class_weights(labels, 2)
    assert weights.tolist() == pytest.approx([100 / 180, 5.0])
    assert float((weights[labels]).mean()) == pytest.approx(1.0)


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    factor = make_schedule(100, 0.1)
    rates = [factor(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_every_step_is_taken_at_the_rate_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    features, trained, rates = MadeFeatures(), candidate(0.01), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda it, *args: rates.append(it.param_groups[0]["lr"]) or step(it, *args)
    )
    task = task_of(features)
    fit([trained], task, SETTINGS)
    factor = make_schedule(len(rates), SETTINGS.warmup)
    assert len(rates) == SETTINGS.epochs * -(-len(task.rows) // SETTINGS.batch_size)
    assert rates == pytest.approx([0.01 * factor(number) for number in range(len(rates))])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_spares_vectors(name: str) -> None:
    """With AdamW and SGD, a step without gradient shrinks matrices, and leaves biases unchanged."""
    model = build("losa", {"rank": 4, "token_rank": 2})
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.fill_(1.0).grad = torch.zeros_like(tensor)
    optimizer = make_optimizer(model, name, lr=0.1, weight_decay=0.5, head_lr=0.2)  # type: ignore[arg-type]
    optimizer.step()
    for key, tensor in model.named_parameters():
        if tensor.requires_grad:
            shrunk = bool((tensor < 1).all())
            assert shrunk is (tensor.ndim > 1), key


def test_mixup_trains_on_mixtures_of_images_and_of_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    share, order = 0.75, torch.tensor([1, 2, 0])
    loop, model = Loop([candidate()], task_of(MadeFeatures()), SETTINGS), torch.nn.Linear(4, 5)
    monkeypatch.setattr(loop, "_candidates", [SimpleNamespace(model=model)])
    monkeypatch.setattr(loop, "_draw_mixup", lambda size: (share, order))
    images, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    loop._add_gradients(images, labels, labels)
    logits = model(share * images + (1 - share) * images[order])
    loss = share * PLAIN(logits, labels, labels) + (1 - share) * PLAIN(logits, labels[order], labels)
    (expected,) = torch.autograd.grad(loss, [model.weight])
    assert torch.allclose(model.weight.grad, expected, atol=1e-7)


def test_evaluation_is_without_dropout() -> None:
    features, trained = MadeFeatures(), candidate(dropout=0.5)
    with torch.no_grad():
        for tensor in trained.model.parameters():
            tensor.add_(torch.randn_like(tensor))
    trained.model.train()
    one, other = (predict_logits([trained.model], features, "train", np.arange(60))[0] for _ in range(2))
    assert torch.equal(one, other)


def test_the_views_of_a_sample_are_judged_by_their_mean_logits() -> None:
    features, trained = MadeFeatures(), candidate()
    fit([trained], task_of(features), SETTINGS)
    features._labels = features._labels.repeat_interleave(3)[:60]
    features.views = 3
    (logits,) = predict_logits([trained.model], features, "train", np.arange(60))
    right = logits.view(20, 3, 5).mean(dim=1).argmax(dim=1) == features.labels("train")[::3]
    expected = 100 * float(right.float().mean())
    assert expected != 100 * float((logits[::3].argmax(dim=1) == features.labels("train")[::3]).float().mean())
    assert evaluate_split(trained.model, features, "train").top1 == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_whole() -> None:
    assert [make_schedule(4, 0.0)(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert make_schedule(4, 0.1)(0) == 0.5  # a fraction of a step is rounded up to one step


def test_validation_keeps_every_class_in_its_share_and_comes_from_the_seed() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 5)
    rows, val_rows = draw_validation(labels, 0.2, seed=0)
    assert np.bincount(labels[torch.from_numpy(val_rows)]).tolist() == [8, 4, 1]
    assert sorted([*rows, *val_rows]) == list(range(65))
    assert np.array_equal(val_rows, draw_validation(labels, 0.2, seed=0)[1])
    assert not np.array_equal(val_rows, draw_validation(labels, 0.2, seed=1)[1])


def test_a_split_too_small_to_validate_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"val_fraction 0.1 of 3 training samples leaves 3 to train on and 0"):
        draw_validation(torch.tensor([0, 1, 2]), 0.1, seed=0)
