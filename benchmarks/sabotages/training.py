"""Faults in training."""

from benchmarks.sabotages.sabotage_class import Sabotage

_HONEST = "tests/job/test_honest.py"
_ROWS = f"{_HONEST}::test_search_and_training_of_a_seed_have_that_seeds_validation_rows"
_STANDARD = f"{_HONEST}::test_features_are_standardised_by_the_training_rows_alone"

TRAINING = (
    Sabotage(
        name="validation rows trained on",
        file="adapt/training/trials.py",
        old="features=self._data.inputs, rows=self.rows,",
        new="features=self._data.inputs, rows=torch.arange(len(self._labels)).numpy(),",
        tests=(_ROWS,),
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
        file="adapt/training/trials.py",
        old="draw_validation(self._labels, val_fraction, settings.seed, features.views)",
        new="draw_validation(self._labels, val_fraction, 0, features.views)",
        tests=(_ROWS,),
    ),
    Sabotage(
        name="views of a sample on both sides",
        file="adapt/training/trials.py",
        old="draw_validation(self._labels, val_fraction, settings.seed, features.views)",
        new="draw_validation(self._labels, val_fraction, settings.seed)",
        tests=(f"{_HONEST}::test_the_views_of_a_sample_are_on_one_side",),
    ),
    Sabotage(
        name="standardization left out",
        file="adapt/training/trials.py",
        old="        self._standardize(group)\n        if",
        new="        if",
        tests=(_STANDARD,),
    ),
    Sabotage(
        name="standardized by validation rows too",
        file="adapt/training/trials.py",
        old="readout.standardize(values[rows], rounding)",
        new="readout.standardize(values, rounding)",
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
        file="adapt/training/trials.py",
        old="trained_on = self._labels[torch.from_numpy(self.rows)]",
        new="trained_on = self._labels",
        tests=(f"{_HONEST}::test_classes_are_weighted_by_the_training_rows_alone",),
    ),
    Sabotage(
        name="rows never shuffled",
        file="adapt/training/batch_order.py",
        old="in_groups(draw.permutation(rows), batch_size)",
        new="in_groups(rows, batch_size)",
        tests=("tests/adapt/test_shuffle.py",),
    ),
    Sabotage(
        name="schedule never stepped",
        file="adapt/training/loop.py",
        old="                scheduler.step()\n",
        new="                pass\n",
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
        file="adapt/training/loop.py",
        old="        model.eval()\n",
        new="        model.train()\n",
        tests=("tests/adapt/test_train.py::test_evaluation_is_without_dropout",),
    ),
    Sabotage(
        name="no optimum and no warning",
        file="adapt/training/newton.py",
        old=" and not self._objective.separates(free, self._labels)",
        new="",
        tests=("tests/adapt/test_solve.py",),
    ),
)
