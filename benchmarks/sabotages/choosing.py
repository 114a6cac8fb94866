"""Faults in choosing on validation."""

from benchmarks.sabotages.sabotage_class import Sabotage

_HONEST = "tests/job/test_honest.py"
_SPY = f"{_HONEST}::test_the_test_split_is_read_once_a_pass_and_never_before"
_WATCHED = f"{_HONEST}::test_a_job_without_a_leak_has_none_reported"
_EVALUATION = '    logits = predict_split([candidates[k] for k in converged], data.inputs, "test", precision)'

CHOOSING = (
    Sabotage(
        name="probe chosen on the test split",
        file="adapt/training/trials.py",
        old="parts = (values[index], labels[index], values[val_index], labels[val_index])",
        new='test = pooled.whole("test", readout_of(candidate))\n'
        '    parts = (values[index], labels[index], test, pooled.features.labels("test"))',
        tests=(_WATCHED, _SPY),
    ),
    Sabotage(
        name="epoch chosen on the test split",
        file="adapt/training/loop.py",
        old='predict_logits(active, self._job.inputs, "train", rows,',
        new='predict_logits(active, self._job.inputs, "test", [np.arange(len(of)) for of in rows],',
        tests=(_WATCHED, _SPY),
    ),
    Sabotage(
        name="test split evaluated twice",
        file="adapt/job/trial_batch.py",
        old=_EVALUATION,
        new=f'    predict_split(candidates, data.inputs, "test", precision)\n{_EVALUATION}',
        tests=(_WATCHED, _SPY),
    ),
    Sabotage(
        name="training split reported",
        file="adapt/job/trial_batch.py",
        old=_EVALUATION,
        new='    size = len(data.inputs.labels("test"))\n'
        '    every = predict_split([candidates[k] for k in converged], data.inputs, "train", precision)\n'
        "    logits = [of[:size] for of in every]",
        tests=(_WATCHED, _SPY),
    ),
    Sabotage(
        name="epoch chosen by training rows",
        file="adapt/training/seed_draw.py",
        old="rows=rows, val_rows=val_rows,",
        new="rows=rows, val_rows=rows,",
        tests=(_WATCHED,),
    ),
    Sabotage(
        name="last epoch kept instead of the best",
        file="adapt/training/loop.py",
        old="        candidate.load(candidate.best)\n",
        new="        pass\n",
        tests=("tests/adapt/test_train.py::test_a_model_is_left_as_it_was_in_the_epoch_that_is_kept",),
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
