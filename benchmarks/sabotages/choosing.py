"""Faults in choosing on validation."""

from benchmarks.sabotages.sabotage_class import Sabotage

_HONEST = "tests/job/test_honest.py"
_SPY = f"{_HONEST}::test_the_test_split_is_read_once_a_chosen_model_and_never_before"

CHOOSING = (
    Sabotage(
        name="probe chosen on the test split",
        file="adapt/training/trials.py",
        old="parts = (values[index], labels[index], values[val_index], labels[val_index])",
        new='test = pooled.whole("test", layer, readout_of(candidates[0]))\n'
        '            parts = (values[index], labels[index], test, pooled.features.labels("test"))',
        tests=(_SPY,),
    ),
    Sabotage(
        name="epoch chosen on the test split",
        file="adapt/training/loop.py",
        old="        labels = self._labels[torch.from_numpy(rows)]\n"
        '        predicted = predict_logits(models, self._task.features, "train", rows,',
        new='        labels = self._task.features.labels("test")\n        rows = np.arange(len(labels))\n'
        '        predicted = predict_logits(models, self._task.features, "test", rows,',
        tests=(_SPY,),
    ),
    Sabotage(
        name="test split evaluated twice",
        file="adapt/job/trial_run.py",
        old="        row = self._row(",
        new='        evaluate_split(best.model, self.data.inputs, "test", self.settings.precision)\n'
        "        row = self._row(",
        tests=(_SPY,),
    ),
    Sabotage(
        name="training split reported",
        file="adapt/job/trial_run.py",
        old='evaluate_split(best.model, self.data.inputs, "test",',
        new='evaluate_split(best.model, self.data.inputs, "train",',
        tests=(_SPY,),
    ),
    Sabotage(
        name="epoch chosen by training rows",
        file="adapt/training/loop.py",
        old="loop.validate(task.val_rows, current.epochs)",
        new="loop.validate(task.rows, current.epochs)",
        tests=("tests/adapt/test_train.py::test_the_epoch_with_the_best_validation_score_is_kept",),
    ),
    Sabotage(
        name="last epoch kept instead of the best",
        file="adapt/training/loop.py",
        old="        candidate.load(candidate.best)\n",
        new="        pass\n",
        tests=("tests/adapt/test_train.py::test_a_model_is_left_as_it_was_in_its_best_epoch",),
    ),
    Sabotage(
        name="search keeps the worst",
        file="adapt/training/scores.py",
        old="best = max((trial for trial in trials",
        new="best = min((trial for trial in trials",
        tests=("tests/adapt/test_search.py",),
    ),
    Sabotage(
        name="best method chosen by the test split",
        file="adapt/report/comparison.py",
        old="key=_validation, default=None",
        new="key=self.mean, default=None",
        tests=("tests/adapt/test_report.py",),
    ),
    Sabotage(
        name="a seed counts by its best test score",
        file="adapt/report/seed_averages.py",
        old='return float("-inf") if row.val_score is None else row.val_score',
        new="return row.top1 or 0.0",
        tests=("tests/adapt/test_results.py",),
    ),
)
