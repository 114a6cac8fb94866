"""Faults in training."""

from benchmarks.sabotages.sabotage_class import Sabotage

_HONEST = "tests/job/test_honest.py"
_ROWS = f"{_HONEST}::test_search_and_training_of_a_seed_have_that_seeds_validation_rows"
_STANDARD = f"{_HONEST}::test_features_are_standardised_by_the_training_rows_alone"
_WATCHED = f"{_HONEST}::test_a_job_without_a_leak_has_none_reported"
_VIEWS = "tests/adapt/test_drawn_views.py"
_OWN_ROWS = (
    "tests/adapt/test_one_pass.py::test_every_seed_trains_on_its_own_rows_once_an_epoch_and_validates_on_its_own"
)

TRAINING = (
    Sabotage(
        name="validation rows trained on",
        file="adapt/training/seed_draw.py",
        old="seed=seed, rows=rows,",
        new="seed=seed, rows=np.arange(len(labels)),",
        tests=(_WATCHED, _ROWS),
    ),
    Sabotage(
        name="probe solved on validation rows too",
        file="adapt/training/trials.py",
        old="parts = (values[index], labels[index], ",
        new="parts = (values, labels, ",
        tests=(f"{_HONEST}::test_a_probe_is_solved_on_training_rows_and_chosen_by_validation_rows",),
    ),
    Sabotage(
        name="one validation set for all seeds",
        file="adapt/training/seed_draw.py",
        old="row_draw, seed=seed,",
        new="row_draw, seed=0,",
        tests=(_WATCHED, _ROWS),
    ),
    Sabotage(
        name="augmented views of another sample",
        file="adapt/features/drawn_views.py",
        old="self._rows[rows, self._drawn[rows]]",
        new="self._rows[rows - 1, self._drawn[rows]]",
        tests=(f"{_VIEWS}::test_no_view_of_a_validation_sample_is_read",),
    ),
    Sabotage(
        name="the same views in every epoch",
        file="adapt/features/drawn_views.py",
        old="[epoch, _VIEWS]",
        new="[0, _VIEWS]",
        tests=(f"{_VIEWS}::test_every_epoch_draws_one_view_of_each_sample",),
    ),
    Sabotage(
        name="views of a sample on both sides",
        file="adapt/training/seed_draw.py",
        old="seed=seed, views=features.views, validation",
        new="seed=seed, validation",
        tests=(f"{_HONEST}::test_the_views_of_a_sample_are_on_one_side",),
    ),
    Sabotage(
        name="standardization left out",
        file="adapt/training/trials.py",
        old="    _standardize(candidates, data.pooled)\n",
        new="",
        tests=(_STANDARD,),
    ),
    Sabotage(
        name="standardized by validation rows too",
        file="adapt/training/trials.py",
        old="readout)[torch.from_numpy(candidate.data.rows)]",
        new="readout)",
        tests=(_STANDARD,),
    ),
    Sabotage(
        name="divided by rounding noise",
        file="adapt/methods/readout.py",
        old="std > 2 * rounding",
        new="std > 1e-6",
        tests=("tests/adapt/test_rounding.py::test_the_accuracy_reported_is_that_of_the_saved_adaptor",),
    ),
    Sabotage(
        name="classes weighted by validation rows too",
        file="adapt/training/seed_draw.py",
        old="labels[torch.from_numpy(rows)],",
        new="labels,",
        tests=(f"{_HONEST}::test_classes_are_weighted_by_the_training_rows_alone",),
    ),
    Sabotage(
        name="rows never shuffled",
        file="adapt/training/batch_order.py",
        old="np.array_split(draw.permutation(n_rows), n_batches)",
        new="np.array_split(np.arange(n_rows), n_batches)",
        tests=("tests/adapt/test_shuffle.py",),
    ),
    Sabotage(
        name="schedule never stepped",
        file="adapt/training/stacks.py",
        old="                scheduler.step()\n",
        new="",
        tests=("tests/adapt/test_train.py::test_every_step_is_taken_at_the_rate_of_the_schedule",),
    ),
    Sabotage(
        name="biases decayed",
        file="adapt/training/optimizer.py",
        old='if tensor.ndim <= 1], "weight_decay": 0.0,',
        new='if tensor.ndim <= 1], "weight_decay": weight_decay,',
        tests=("tests/adapt/test_train.py::test_weight_decay_spares_vectors",),
    ),
    Sabotage(
        name="dropout at work in evaluation",
        file="adapt/training/evaluation.py",
        old="candidate.model.to(inputs.device).eval()",
        new="candidate.model.to(inputs.device).train()",
        tests=("tests/adapt/test_train.py::test_evaluation_is_without_dropout",),
    ),
    Sabotage(
        name="no optimum and no warning",
        file="adapt/training/newton.py",
        old=" and not self._objective.separates(free, self._labels)",
        new="",
        tests=("tests/adapt/test_solve.py",),
    ),
    Sabotage(
        name="a seed trained on the rows of the others too",
        file="adapt/training/seed_part.py",
        old="index = np.flatnonzero(self.mask[of.rows])",
        new="index = np.arange(len(of.rows))",
        tests=(_OWN_ROWS, _WATCHED),
    ),
    Sabotage(
        name="all seeds validated on the rows of the first",
        file="adapt/training/loop.py",
        old="rows = [candidate.data.val_rows for candidate in active]",
        new="rows = [active[0].data.val_rows for candidate in active]",
        tests=(_OWN_ROWS, _WATCHED),
    ),
    Sabotage(
        name="the same dropout in every part",
        file="adapt/training/seed_part.py",
        old="of.step, of.number, purpose]",
        new="of.step, purpose]",
        tests=("tests/adapt/test_train.py::test_every_seed_epoch_step_and_part_has_a_dropout_of_its_own",),
    ),
    Sabotage(
        name="an epoch ordered as a seed is drawn",
        file="adapt/training/batch_order.py",
        old="default_rng([epoch, _ORDER])",
        new="default_rng([epoch])",
        tests=("tests/adapt/test_shuffle.py",),
    ),
    Sabotage(
        name="searches compared with each other by halving",
        file="adapt/training/halving.py",
        old="setdefault(candidate.contest, [])",
        new='setdefault("", [])',
        tests=("tests/adapt/test_halving.py",),
    ),
    Sabotage(
        name="refit without the rows for validation",
        file="adapt/training/seed_draw.py",
        old="rows, val_rows = np.union1d(rows, val_rows), val_rows[:0]",
        new="rows, val_rows = rows, val_rows[:0]",
        tests=(_WATCHED,),
    ),
)
