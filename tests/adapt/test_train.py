"""The training loop: results depend on the seed alone, the best epoch is kept, and interrupted runs resume."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_features import MadeFeatures, make_candidate, make_rows, metrics_of, train
from method_cases import build
from torch import Tensor

import adapt.training.checkpoint
import adapt.training.loop
from adapt.methods.feature_spec import TokenBatch
from adapt.training.batches import scale_channels
from adapt.training.candidate import Candidate
from adapt.training.checkpoint import Checkpoint, TrainingProgress
from adapt.training.distributed import World
from adapt.training.evaluation import predict_logits, predict_split
from adapt.training.loop import Loop, TrainingPass
from adapt.training.metrics import evaluate
from adapt.training.objective import Objective, class_weights
from adapt.training.optimizer import make_optimizer, make_schedule
from adapt.training.row_draw import RowDraw, draw_rows
from adapt.training.seed_part import PartRows, SeedPart, SeedParts
from adapt.training.settings import Settings
from adapt.training.stacks import CandidateStack
from store.errors import JobError, UserError

SETTINGS = Settings(epochs=4, batch_size=8)
PLAIN = Objective(multi_label=False)
FEATURES = MadeFeatures()
ROWS = make_rows(FEATURES)


def candidate(lr: float = 0.01, **options: Any) -> Candidate:
    return make_candidate(ROWS, lr, **options)


def loop_of(*candidates: Candidate) -> Loop:
    return Loop(TrainingPass(candidates=candidates, inputs=FEATURES, settings=SETTINGS))


def test_training_learns() -> None:
    trained = candidate()
    train([trained], FEATURES, Settings(epochs=15, batch_size=8))
    assert trained.score > 60  # chance is 20
    assert metrics_of(trained, FEATURES).top1 > 80


def test_one_seed_gives_the_same_bits_and_another_gives_others() -> None:
    """Also where the rows of the seeds are the same: dropout differs."""
    models = []
    for seed in (1, 1, 2):
        trained = make_candidate(replace(ROWS, seed=seed), dropout=0.2)
        train([trained], FEATURES, Settings(epochs=2, batch_size=8))
        models.append(trained.model.state_dict())
    same, other = ([torch.equal(models[0][name], models[k][name]) for name in models[0]] for k in (1, 2))
    assert all(same)
    assert not all(other)


def test_candidates_in_one_pass_train_as_they_would_alone() -> None:
    together = [candidate(0.01), candidate(0.001), candidate(0.03)]
    train(together, FEATURES, SETTINGS)
    for trained in together:
        assert trained.lr
        alone = candidate(trained.lr)
        train([alone], FEATURES, SETTINGS)
        assert (alone.score, alone.loss, alone.best_epoch) == (trained.score, trained.loss, trained.best_epoch)


def test_the_seconds_of_reading_are_a_part_of_those_of_training() -> None:
    trained = candidate()
    train([trained], FEATURES, SETTINGS)
    assert 0 < trained.reading_seconds < trained.seconds


def test_the_epoch_with_the_best_validation_score_is_kept() -> None:
    features, trained = MadeFeatures(), candidate(lr=0.01)
    mislabeled = torch.from_numpy(ROWS.val_rows[::3])  # so that no epoch scores on validation as on training rows
    features.of_rows[mislabeled] = (features.of_rows[mislabeled] + 1) % 5
    train([trained], features, Settings(epochs=8, batch_size=8))
    (logits,) = predict_logits([trained], features, "train", [ROWS.val_rows])
    accuracy = 100 * (logits.argmax(1) == features.of_rows[torch.from_numpy(ROWS.val_rows)]).float().mean()
    assert float(accuracy) == pytest.approx(trained.score)


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 4)])
def test_a_model_is_left_as_it_was_in_the_epoch_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, keep: Any, kept: int
) -> None:
    """Also if later epochs were worse."""
    trained, states, scores = candidate(), [], iter([1.0, 3.0, 2.0, 0.0])
    judge = Objective.judge

    def judged(*args: Any) -> tuple[float, float]:
        states.append(trained.trained_state())
        return next(scores), judge(*args)[1]

    monkeypatch.setattr(Objective, "judge", judged)
    train([trained], FEATURES, replace(SETTINGS, keep=keep))
    left = trained.trained_state()
    assert (trained.best_epoch, trained.score) == (kept, 3.0 if keep == "best" else 0.0)
    assert all(torch.equal(left[name], states[kept - 1][name]) for name in left)
    assert not all(torch.equal(left[name], states[5 - kept][name]) for name in left)


class OneOfTwo(World):
    """One of two processes, without communication."""

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        pass


@pytest.fixture
def dropout_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of dropout of all parts that were trained on, in order."""
    seeds: list[int] = []
    add_gradients = CandidateStack.add_gradients

    def watched(stack: CandidateStack, part: SeedPart) -> None:
        seeds.append(part.random_seed)
        add_gradients(stack, part)

    monkeypatch.setattr(CandidateStack, "add_gradients", watched)
    return seeds


def test_processes_draw_the_dropout_that_a_single_one_draws_for_the_same_parts(
    monkeypatch: pytest.MonkeyPatch, dropout_seeds: list[int]
) -> None:
    """So no two of them draw the same."""
    drawn = []
    for here in (World(0, 1), OneOfTwo(0, 2), OneOfTwo(1, 2)):
        monkeypatch.setattr(adapt.training.loop, "world", lambda here=here: here)
        train([candidate(dropout=0.2)], FEATURES, replace(SETTINGS, grad_accumulation=2))
        drawn.append(dropout_seeds.copy())
        dropout_seeds.clear()
    single, *shares = drawn
    assert len(set(single)) == len(single)
    assert sorted(single) == sorted(shares[0] + shares[1])


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 4), min_size=2, max_size=20, unique=True))
def test_every_seed_epoch_step_and_part_has_a_dropout_of_its_own(numbers: list[tuple[int, int, int, int]]) -> None:
    seeds = set()
    for seed, epoch, step, number in numbers:
        parts = SeedParts(replace(ROWS, seed=seed), FEATURES.labels("train"), FEATURES.device)
        of = PartRows(ROWS.rows[:8], ROWS.rows[:4], epoch=epoch, step=step, number=number)
        part = parts.part(of, torch.zeros(4, 3), Settings(epochs=1, batch_size=4))
        assert part
        seeds.add(part.random_seed)
    assert len(seeds) == len(numbers)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_among_others_draws_the_same_dropout_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The checkpoint is written by rank 0."""
    file, ends = tmp_path / "state.pt", []
    monkeypatch.setattr(adapt.training.loop, "world", lambda: OneOfTwo(rank, 2))
    for stops in (False, True, False):
        trained = candidate(dropout=0.2)
        with monkeypatch.context() as patch:
            if stops:
                patch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
                patch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
                patch.setattr(Loop, "end_epoch", stop_at(Loop.end_epoch, 2))
            with contextlib.suppress(KeyboardInterrupt):
                train([trained], FEATURES, SETTINGS, checkpoint=file if ends else None)
        ends.append(trained.model.state_dict())
    whole, _, resumed = ends
    assert file.exists()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def stop_at(end_epoch: Callable[..., None], epoch: int) -> Callable[..., None]:
    def stopped(loop: Loop, current: int) -> None:
        if current == epoch:
            raise KeyboardInterrupt
        end_epoch(loop, current)

    return stopped


@pytest.mark.parametrize("stop_after", [(1, 0), (3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("shuffle_block", [1, 4])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: tuple[int, int], shuffle_block: int
) -> None:
    file, settings = tmp_path / "state.pt", replace(SETTINGS, shuffle_block=shuffle_block)
    whole, resumed = candidate(dropout=0.2), candidate(dropout=0.2)
    train([whole], FEATURES, settings)
    save = Checkpoint.save

    def save_then_stop(checkpoint: Checkpoint, progress: TrainingProgress) -> None:
        save(checkpoint, progress)
        if (progress.epochs, progress.steps) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train([candidate(dropout=0.2)], FEATURES, settings, checkpoint=file)
    monkeypatch.setattr(Checkpoint, "save", save)
    assert file.exists()
    losses: list[float] = []
    train([resumed], FEATURES, settings, checkpoint=file, on_epoch=lambda each: losses.append(each.train_loss))
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (resumed.score, resumed.best_epoch) == (whole.score, whole.best_epoch)
    assert np.array(resumed.history) == pytest.approx(np.array(whole.history), rel=1e-6)
    assert len(losses) == settings.epochs - stop_after[0]


def test_the_training_loss_of_an_epoch_is_the_same_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed, once = list[float](), list[float](), iter([True])
    monkeypatch.setattr(adapt.training.checkpoint, "_SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(adapt.training.checkpoint, "_SHARE_OF_TIME", 1e9)
    train([candidate()], FEATURES, SETTINGS, on_epoch=lambda each: whole.append(each.train_loss))
    save = Checkpoint.save

    def save_then_stop(checkpoint: Checkpoint, progress: TrainingProgress) -> None:
        save(checkpoint, progress)
        if (progress.epochs, progress.steps) == (2, 3) and next(once, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            train(
                [candidate()],
                FEATURES,
                SETTINGS,
                checkpoint=tmp_path / "state.pt",
                on_epoch=lambda each: resumed.append(each.train_loss),
            )
    assert resumed == pytest.approx(whole, rel=1e-6)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt", [], torch.device("cpu"))
    checkpoint.save(TrainingProgress(1))
    fresh = Checkpoint(tmp_path / "state.pt", [], torch.device("cpu"))
    (tmp_path / "full").symlink_to("/dev/full")
    monkeypatch.setattr("store.local.durable_files._temporary", lambda path: tmp_path / "full")
    with pytest.raises(JobError, match=r"the checkpoint .*state\.pt cannot be written \(No space left on device\)"):
        fresh.save(TrainingProgress(2))
    assert fresh.load() == TrainingProgress(1)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    """It raises two errors: at the write, and when it closes the archive."""
    large = loop_of(*(candidate(rank=64) for _ in range(40))).states
    checkpoint, limits = Checkpoint(tmp_path / "state.pt", large, torch.device("cpu")), getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(JobError, match=r"the checkpoint .*state\.pt cannot be written \(File too large\)"):
            checkpoint.save(TrainingProgress(1))
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"no checkpoint")
    with pytest.raises(JobError, match=r"the checkpoint .*state\.pt is damaged; delete it to start again"):
        train([candidate()], FEATURES, SETTINGS, checkpoint=tmp_path / "state.pt")


def test_the_checkpoint_of_other_candidates_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    Checkpoint(file, loop_of(candidate()).states, torch.device("cpu")).save(TrainingProgress(1))
    for others in ([], [candidate(), candidate()], [candidate(rank=3)]):
        states = loop_of(*others).states if others else []
        with pytest.raises(JobError, match="is damaged; delete it to start again"):
            Checkpoint(file, states, torch.device("cpu")).load()


def test_no_flipped_bit_of_a_checkpoint_changes_a_run(tmp_path: Path) -> None:
    """Torch does not verify the CRC-32 of a record when it reads."""
    file, draw = tmp_path / "state.pt", np.random.default_rng(0)

    def checkpoint() -> tuple[Checkpoint, Loop]:
        loop = loop_of(candidate())
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
    wild, tame = candidate(1e30), candidate(0.01)
    train([wild, tame], FEATURES, SETTINGS)
    assert tame.rank > wild.rank
    assert (tame.epochs, wild.epochs) == (4, 1)
    features, alone, epochs = MadeFeatures(), candidate(1e30), []
    features.for_epoch = lambda _, epoch: epochs.append(epoch) or features  # type: ignore[method-assign, func-returns-value]
    train([alone], features, SETTINGS)
    assert (alone.score, alone.diverged, epochs) == (-np.inf, True, [0])


def test_a_candidate_that_diverges_later_keeps_its_best_epoch_and_takes_no_further_step() -> None:
    lost, steady = candidate(0.01), candidate(0.001)

    def break_it(each: Candidate) -> None:
        if each is lost and each.epochs == 2:
            with torch.no_grad():
                each.model.readout.head.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]

    train([lost, steady], FEATURES, SETTINGS, on_epoch=break_it)
    assert (lost.active, lost.diverged, lost.epochs, steady.epochs) == (False, False, 3, 4)
    assert lost.best_epoch <= 2
    assert all(torch.isfinite(tensor).all() for tensor in lost.trained_state().values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_every_kind_of_task_trains(optimizer: str, multi_label: bool, balanced: bool) -> None:
    features = MadeFeatures(multi_label=multi_label)
    trained = make_candidate(make_rows(features, balanced=balanced), lr=0.01 if optimizer == "adamw" else 0.1)
    settings = Settings(epochs=25, batch_size=8, optimizer=optimizer, balance_classes=balanced)  # type: ignore[arg-type]
    train([trained], features, settings)
    metrics = metrics_of(trained, features)
    assert (metrics.mean_average_precision if multi_label else metrics.top1) > 50  # chance is 20


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(multi_label: bool, balanced: bool) -> None:
    features = MadeFeatures(multi_label=multi_label)
    data, states = make_rows(features, balanced=balanced), []
    for at_once in (32, 3):
        features.at_once, trained = at_once, make_candidate(data)
        settings = Settings(epochs=2, batch_size=8, optimizer="sgd", balance_classes=balanced)
        train([trained], features, settings)
        states.append(trained.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])])
@pytest.mark.parametrize("multi_label", [False, True])
def test_smoothed_labels_are_mixed_with_those_of_no_knowledge(weights: Tensor | None, multi_label: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=draw), torch.arange(6) % 3
    if multi_label:
        labels = torch.nn.functional.one_hot(labels)
        log_odds = torch.stack([logits.sigmoid().log(), (-logits).sigmoid().log()])
        target = 0.8 * labels + 0.1
        scale = 1 if weights is None else weights
        expected = -(scale * target * log_odds[0] + (1 - target) * log_odds[1]).mean()
    else:
        target = 0.8 * torch.nn.functional.one_hot(labels) + 0.2 / 3
        scale = torch.ones(3) if weights is None else weights
        expected = -(scale * target * logits.log_softmax(dim=1)).sum() / scale[labels].sum()
    found = Objective(multi_label, weights)(logits, labels, smoothing=0.2)
    torch.testing.assert_close(found, expected)


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
    trained, rates = candidate(0.01), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda it, *args: rates.append(it.param_groups[0]["lr"]) or step(it, *args)
    )
    train([trained], FEATURES, SETTINGS)
    factor = make_schedule(len(rates), SETTINGS.warmup)
    assert len(rates) == SETTINGS.epochs * -(-len(ROWS.rows) // SETTINGS.batch_size)
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


MIXUP = Settings(epochs=1, batch_size=8, mixup=0.5)


def test_mixup_trains_on_mixtures_of_images_and_of_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    share, order = 0.75, torch.tensor([1, 2, 0])
    rows, model = ROWS.rows[:3], torch.nn.Linear(4, 5)
    monkeypatch.setattr(SeedParts, "_draw_mixup", lambda *_: (share, order))
    images, labels = torch.randn(3, 4), FEATURES.labels("train")[torch.from_numpy(rows)]
    of = PartRows(rows, rows, epoch=0, step=0, number=0)
    part = SeedParts(ROWS, FEATURES.labels("train"), FEATURES.device).part(of, images, MIXUP)
    assert part
    (found,) = torch.autograd.grad(part.loss(model(part.inputs)), [model.weight])
    logits = model(share * images + (1 - share) * images[order])
    loss = share * PLAIN(logits, labels, labels) + (1 - share) * PLAIN(logits, labels[order], labels)
    (expected,) = torch.autograd.grad(loss, [model.weight])
    assert torch.allclose(found, expected, atol=1e-7)


def test_mixup_is_drawn_again_for_every_part_and_the_same_for_the_same_part() -> None:
    parts, images = SeedParts(ROWS, FEATURES.labels("train"), FEATURES.device), torch.randn(8, 4)
    of = PartRows(ROWS.rows[:8], ROWS.rows[:8], epoch=0, step=0, number=0)

    def mixed(of: PartRows) -> Tensor:
        part = parts.part(of, images, MIXUP)
        assert part
        inputs: Tensor = part.inputs
        return inputs

    assert torch.equal(mixed(of), mixed(of))
    others = [of._replace(epoch=1), of._replace(step=1), of._replace(number=1)]
    assert not any(torch.equal(mixed(of), mixed(other)) for other in others)


def test_mixup_mixes_all_layers_of_tokens_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    share, order = 0.75, torch.tensor([1, 2, 0])
    monkeypatch.setattr(SeedParts, "_draw_mixup", lambda *_: (share, order))
    tokens = TokenBatch({layer: torch.randn(len(ROWS.rows), 2, 4) for layer in (1, 3)})
    values = tokens.select(torch.arange(3))  # some rows of a batch, as seeds that share it have them
    of = PartRows(ROWS.rows[:3], ROWS.rows[:3], epoch=0, step=0, number=0)
    part = SeedParts(ROWS, FEATURES.labels("train"), FEATURES.device).part(of, values, MIXUP)
    assert part
    assert part.inputs.layers == (1, 3)
    for layer in (1, 3):
        assert torch.equal(part.inputs[layer], share * tokens[layer][:3] + (1 - share) * tokens[layer][order])


def test_feature_noise_scales_the_channels_of_every_sample() -> None:
    values = {layer: torch.rand(400, 3, 50) + 1 for layer in (1, 3)}
    noisy = scale_channels(TokenBatch(values), 0.25, random_seed=5)
    factors = {layer: noisy[layer] / values[layer] for layer in values}
    for layer, factor in factors.items():
        assert torch.allclose(factor, factor[:, :1].expand_as(factor))  # the same for all tokens
        assert abs(float(factor[:, 0].mean()) - 1) < 0.01
        assert abs(float(factor[:, 0].std()) - 0.25) < 0.01
        alone = scale_channels(TokenBatch({layer: values[layer]}), 0.25, random_seed=5)
        assert torch.equal(alone[layer], noisy[layer])  # whichever other layers are read
    assert not torch.allclose(factors[1], factors[3])
    again = scale_channels(TokenBatch(values), 0.25, random_seed=6)
    assert not torch.equal(again[1], noisy[1])


def test_evaluation_is_without_dropout() -> None:
    trained = candidate(dropout=0.5)
    with torch.no_grad():
        for tensor in trained.model.parameters():
            tensor.add_(torch.randn_like(tensor))
    trained.model.train()
    one, other = (predict_logits([trained], FEATURES, "train", [np.arange(60)])[0] for _ in range(2))
    assert torch.equal(one, other)


def test_the_views_of_a_sample_are_judged_by_their_mean_logits() -> None:
    features, trained = MadeFeatures(), candidate()
    train([trained], features, SETTINGS)
    features.of_rows = features.of_rows.repeat_interleave(3)[:60]
    features.views = 3
    (logits,) = predict_logits([trained], features, "train", [np.arange(60)])
    right = logits.view(20, 3, 5).mean(dim=1).argmax(dim=1) == features.labels("train")[::3]
    expected = 100 * float(right.float().mean())
    assert expected != 100 * float((logits[::3].argmax(dim=1) == features.labels("train")[::3]).float().mean())
    (averaged,) = predict_split([trained], features, "train")
    assert evaluate(averaged, features.labels("train")[::3]).top1 == pytest.approx(expected)
    assert Objective(multi_label=False, views=3).judge(logits, features.labels("train"))[0] == pytest.approx(expected)


def test_without_warm_up_the_first_step_is_whole() -> None:
    assert [make_schedule(4, 0.0)(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert make_schedule(4, 0.1)(0) == 0.5  # a fraction of a step is rounded up to one step


def test_validation_keeps_every_class_in_its_share_and_comes_from_the_seed() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 5)
    rows, val_rows = draw_rows(labels, RowDraw(val_fraction=0.2), seed=0)
    assert np.bincount(labels[torch.from_numpy(val_rows)]).tolist() == [8, 4, 1]
    assert sorted([*rows, *val_rows]) == list(range(65))
    assert np.array_equal(val_rows, draw_rows(labels, RowDraw(val_fraction=0.2), seed=0)[1])
    assert not np.array_equal(val_rows, draw_rows(labels, RowDraw(val_fraction=0.2), seed=1)[1])


def test_a_split_too_small_to_validate_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"val_fraction 0.1 of 3 training samples leaves 3 to train on and 0"):
        draw_rows(torch.tensor([0, 1, 2]), RowDraw(val_fraction=0.1), seed=0)
