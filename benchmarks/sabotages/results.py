"""Faults in results."""

from benchmarks.sabotages.sabotage_class import Sabotage

_HONEST = "tests/job/test_honest.py"
_OWN = f"{_HONEST}::test_every_setting_that_determines_a_result_gives_another_search_and_trial"
_SAVE = "save_adaptor(adaptor_path(self.config.run_dir, row), trained.model, self._card(metrics))"
_UNTRAINED = (
    "self.features.training_data(self._trains_backbone)"
    ".new_model(self.spec.method.name, self.spec.trial, self.spec.seed)"
)

RESULTS = (
    Sabotage(
        name="a trial's key without val_fraction",
        file="adapt/job/trial_run.py",
        old="*trained, drawn, TRAINING_VERSION)",
        new="*trained, TRAINING_VERSION)",
        tests=(f"{_OWN}[losa]",),
    ),
    Sabotage(
        name="a trial's key without its settings",
        file="adapt/job/trial_run.py",
        old="trained = (self.spec.method.name, self.spec.trial, self.spec.seed, self.settings)",
        new="trained = (self.spec.method.name, self.spec.trial, self.spec.seed)",
        tests=(f"{_OWN}[losa]",),
    ),
    Sabotage(
        name="a search's key without its settings",
        file="adapt/job/method_search.py",
        old="config.search, settings, drawn, seed)",
        new="config.search, drawn, seed)",
        tests=(f"{_OWN}[losa]",),
    ),
    Sabotage(
        name="row written before its adaptor",
        file="adapt/job/trial_run.py",
        old=f"        {_SAVE}\n",
        new=f"        write_results(self.config.run_dir, [row])\n        {_SAVE}\n",
        tests=(f"{_HONEST}::test_a_row_is_never_without_its_adaptor",),
    ),
    Sabotage(
        name="row without adaptor counts as done",
        file="adapt/job/trial_run.py",
        old="return bool(rows) and all(",
        new="return bool(rows) or all(",
        tests=(f"{_HONEST}::test_a_row_whose_adaptor_is_gone_is_trained_again",),
    ),
    Sabotage(
        name="another model saved than evaluated",
        file="adapt/job/trial_run.py",
        old=_SAVE,
        new=_SAVE.replace("trained.model", _UNTRAINED),
        tests=("tests/adapt/test_rounding.py::test_the_accuracy_reported_is_that_of_the_saved_adaptor",),
    ),
    Sabotage(
        name="conditions without the precision",
        file="adapt/report/fingerprint.py",
        old="        **trained,\n",
        new='        **{name: value for name, value in trained.items() if name != "precision"},\n',
        tests=("tests/adapt/test_conditions.py",),
    ),
    Sabotage(
        name="results merged by position",
        file="adapt/run_dir/results.py",
        old="{row.trial_id: row for row in [*old, *rows]}",
        new="dict(enumerate(old)) | dict(enumerate(rows))",
        tests=("tests/adapt/test_results.py::test_other_rows_are_kept_and_the_same_trial_is_replaced_in_place",),
    ),
    Sabotage(
        name="best seed instead of the mean",
        file="adapt/report/seed_averages.py",
        old="Stat(statistics.fmean(known),",
        new="Stat(max(known),",
        tests=("tests/adapt/test_results.py::test_seeds_are_summarized_by_mean_and_sample_deviation",),
    ),
    Sabotage(
        name="deviation of the population",
        file="adapt/report/seed_averages.py",
        old="statistics.stdev(known)",
        new="statistics.pstdev(known)",
        tests=("tests/adapt/test_results.py::test_seeds_are_summarized_by_mean_and_sample_deviation",),
    ),
)
