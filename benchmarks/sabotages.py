"""Lists the faults that `benchmarks.sabotage` makes; with each of them jobs run to the end, but give wrong results."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sabotage:
    """A replacement in one file, and tests of which at least one must fail.

    Args:
        old: the text to replace, which the file contains exactly once.
        tests: test files or tests, as arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_HONEST = "tests/job/test_honest.py"
_SPY = f"{_HONEST}::test_the_test_split_is_read_once_a_chosen_model_and_never_before"
_OWN = f"{_HONEST}::test_every_setting_that_determines_a_result_gives_another_search_and_trial"
_ROWS = f"{_HONEST}::test_search_and_training_of_a_seed_have_that_seeds_validation_rows"
_STANDARD = f"{_HONEST}::test_features_are_standardised_by_the_training_rows_alone"
_SAVE = "save_adaptor(adaptor_path(self.config.run_dir, row), best.model, self._card(metrics))"

SABOTAGES = (
    # Choosing on validation
    Sabotage(
        "probe chosen on the test split",
        "adapt/training/trials.py",
        "parts = (values[index], labels[index], values[val_index], labels[val_index])",
        'test = pooled.whole("test", layer, readout_of(candidates[0]))\n'
        '            parts = (values[index], labels[index], test, pooled.features.labels("test"))',
        (_SPY,),
    ),
    Sabotage(
        "epoch chosen on the test split",
        "adapt/training/loop.py",
        "        labels = self._labels[torch.from_numpy(rows)]\n"
        '        predicted = predict_logits(models, self._task.features, "train", rows,',
        '        labels = self._task.features.labels("test")\n        rows = np.arange(len(labels))\n'
        '        predicted = predict_logits(models, self._task.features, "test", rows,',
        (_SPY,),
    ),
    Sabotage(
        "test split evaluated twice",
        "adapt/job/trial_run.py",
        "        row = self._row(",
        '        evaluate_split(best.model, self.data.inputs, "test", self.settings.precision)\n'
        "        row = self._row(",
        (_SPY,),
    ),
    Sabotage(
        "training split reported",
        "adapt/job/trial_run.py",
        'evaluate_split(best.model, self.data.inputs, "test",',
        'evaluate_split(best.model, self.data.inputs, "train",',
        (_SPY,),
    ),
    Sabotage(
        "epoch chosen by training rows",
        "adapt/training/loop.py",
        "loop.validate(task.val_rows, current.epochs)",
        "loop.validate(task.rows, current.epochs)",
        ("tests/adapt/test_train.py::test_the_epoch_with_the_best_validation_score_is_kept",),
    ),
    Sabotage(
        "last epoch kept instead of the best",
        "adapt/training/loop.py",
        "        candidate.load(candidate.best)\n",
        "        pass\n",
        ("tests/adapt/test_train.py::test_a_model_is_left_as_it_was_in_its_best_epoch",),
    ),
    Sabotage(
        "search keeps the worst",
        "adapt/training/search.py",
        "best = max(range(len(trials))",
        "best = min(range(len(trials))",
        ("tests/adapt/test_search.py",),
    ),
    Sabotage(
        "best method chosen by the test split",
        "adapt/report/comparison.py",
        "key=_validation, default=None",
        "key=self.mean, default=None",
        ("tests/adapt/test_report.py",),
    ),
    Sabotage(
        "a seed counts by its best test score",
        "adapt/report/seed_averages.py",
        'return float("-inf") if row.val_score is None else row.val_score',
        "return row.top1 or 0.0",
        ("tests/adapt/test_results.py",),
    ),
    # Training
    Sabotage(
        "validation rows trained on",
        "adapt/training/trials.py",
        "features=self._data.inputs, rows=self.rows,",
        "features=self._data.inputs, rows=torch.arange(len(self._labels)).numpy(),",
        (_ROWS,),
    ),
    Sabotage(
        "probe solved on validation rows too",
        "adapt/training/trials.py",
        "parts = (values[index], labels[index], ",
        "parts = (values, labels, ",
        (f"{_HONEST}::test_a_probe_is_solved_on_training_rows_and_chosen_by_validation_rows",),
    ),
    Sabotage(
        "one validation set for all seeds",
        "adapt/training/trials.py",
        "draw_validation(self._labels, val_fraction, settings.seed, features.views)",
        "draw_validation(self._labels, val_fraction, 0, features.views)",
        (_ROWS,),
    ),
    Sabotage(
        "views of a sample on both sides",
        "adapt/training/trials.py",
        "draw_validation(self._labels, val_fraction, settings.seed, features.views)",
        "draw_validation(self._labels, val_fraction, settings.seed)",
        (f"{_HONEST}::test_the_views_of_a_sample_are_on_one_side",),
    ),
    Sabotage(
        "standardization left out",
        "adapt/training/trials.py",
        "        self._standardize(group)\n        if",
        "        if",
        (_STANDARD,),
    ),
    Sabotage(
        "standardized by validation rows too",
        "adapt/training/trials.py",
        "readout.standardize(values[rows], rounding)",
        "readout.standardize(values, rounding)",
        (_STANDARD,),
    ),
    Sabotage(
        "divided by rounding noise",
        "adapt/methods/readout.py",
        "std > 2 * rounding",
        "std > 1e-6",
        ("tests/adapt/test_rounding.py::test_the_accuracy_reported_is_that_of_the_saved_adaptor",),
    ),
    Sabotage(
        "classes weighted by validation rows too",
        "adapt/training/trials.py",
        "trained_on = self._labels[torch.from_numpy(self.rows)]",
        "trained_on = self._labels",
        (f"{_HONEST}::test_classes_are_weighted_by_the_training_rows_alone",),
    ),
    Sabotage(
        "rows never shuffled",
        "adapt/training/batch_order.py",
        "in_groups(draw.permutation(rows), batch_size)",
        "in_groups(rows, batch_size)",
        ("tests/adapt/test_shuffle.py",),
    ),
    Sabotage(
        "schedule never stepped",
        "adapt/training/loop.py",
        "                scheduler.step()\n",
        "                pass\n",
        ("tests/adapt/test_train.py::test_every_step_is_taken_at_the_rate_of_the_schedule",),
    ),
    Sabotage(
        "biases decayed",
        "adapt/training/optimizer.py",
        'if tensor.ndim <= 1], "weight_decay": 0.0,',
        'if tensor.ndim <= 1], "weight_decay": weight_decay,',
        ("tests/adapt/test_train.py::test_weight_decay_spares_vectors",),
    ),
    Sabotage(
        "dropout at work in evaluation",
        "adapt/training/loop.py",
        "        model.eval()\n",
        "        model.train()\n",
        ("tests/adapt/test_train.py::test_evaluation_is_without_dropout",),
    ),
    Sabotage(
        "no optimum and no warning",
        "adapt/training/newton.py",
        " and not self._objective.separates(free, self._labels)",
        "",
        ("tests/adapt/test_solve.py",),
    ),
    # Results
    Sabotage(
        "a trial's key without val_fraction",
        "adapt/job/trial_run.py",
        "data, method, self.trial, self.settings, fraction)",
        "data, method, self.trial, self.settings)",
        (f"{_OWN}[losa]",),
    ),
    Sabotage(
        "a trial's key without its settings",
        "adapt/job/trial_run.py",
        "data, method, self.trial, self.settings, fraction)",
        "data, method, self.trial, fraction)",
        (f"{_OWN}[losa]",),
    ),
    Sabotage(
        "a search's key without its settings",
        "adapt/job/training_job.py",
        "data.kind, method, settings, fraction)",
        "data.kind, method, fraction)",
        (f"{_OWN}[losa]",),
    ),
    Sabotage(
        "row written before its adaptor",
        "adapt/job/trial_run.py",
        f"        {_SAVE}\n        write_results(self.config.run_dir, [row])\n",
        f"        write_results(self.config.run_dir, [row])\n        {_SAVE}\n",
        (f"{_HONEST}::test_a_row_is_never_without_its_adaptor",),
    ),
    Sabotage(
        "row without adaptor counts as done",
        "adapt/job/trial_run.py",
        'any(path.exists() and path.with_suffix(".json").exists() for path in paths)',
        "bool(paths)",
        (f"{_HONEST}::test_a_row_whose_adaptor_is_gone_is_trained_again",),
    ),
    Sabotage(
        "another model saved than evaluated",
        "adapt/job/trial_run.py",
        _SAVE,
        _SAVE.replace("best.model", "self.data.new_model(self.method.name, self.trial, self.settings.seed)"),
        ("tests/adapt/test_rounding.py::test_the_accuracy_reported_is_that_of_the_saved_adaptor",),
    ),
    Sabotage(
        "conditions without the precision",
        "adapt/report/fingerprint.py",
        'trained.pop("seed", None)',
        '[trained.pop(name, None) for name in ("seed", "precision")]',
        ("tests/adapt/test_conditions.py",),
    ),
    Sabotage(
        "results merged by position",
        "adapt/run_dir/results.py",
        "{row.trial_id: row for row in [*old, *rows]}",
        "dict(enumerate(old)) | dict(enumerate(rows))",
        ("tests/adapt/test_results.py::test_other_rows_are_kept_and_the_same_trial_is_replaced_in_place",),
    ),
    Sabotage(
        "best seed instead of the mean",
        "adapt/report/seed_averages.py",
        "Stat(statistics.fmean(known),",
        "Stat(max(known),",
        ("tests/adapt/test_results.py::test_seeds_are_summarized_by_mean_and_sample_deviation",),
    ),
    Sabotage(
        "deviation of the population",
        "adapt/report/seed_averages.py",
        "statistics.stdev(known)",
        "statistics.pstdev(known)",
        ("tests/adapt/test_results.py::test_seeds_are_summarized_by_mean_and_sample_deviation",),
    ),
    # Metrics
    Sabotage(
        "top-5 is top-1",
        "adapt/training/metrics.py",
        "_percent(rank < 5)",
        "_percent(rank < 1)",
        ("tests/adapt/test_metrics.py",),
    ),
    Sabotage(
        "top-1 as mean class accuracy",
        "adapt/training/metrics.py",
        "mean_class_accuracy=_percent(n_hit[present] / n_labelled[present])",
        "mean_class_accuracy=_percent(rank < 1)",
        ("tests/adapt/test_metrics.py",),
    ),
    Sabotage(
        "absent classes in the F1",
        "adapt/training/metrics.py",
        "    present = n_labelled > 0\n    if not",
        "    present = n_labelled + n_predicted > 0\n    if not",
        ("tests/adapt/test_metrics.py",),
    ),
    Sabotage(
        "first view instead of the mean over views",
        "adapt/training/loop.py",
        "evaluate(average_views(logits, features.views), labels[:: features.views])",
        "evaluate(logits[:: features.views], labels[:: features.views])",
        ("tests/adapt/test_train.py::test_the_views_of_a_sample_are_judged_by_their_mean_logits",),
    ),
    # Store
    Sabotage(
        "shard marked before its values",
        "extract/job/extraction.py",
        "    writer.write(split, number, shard.tokens, shard.status)\n",
        "    writer.mark(split, number, shard.status)\n    writer.write(split, number, shard.tokens, shard.status)\n",
        ("tests/extract/test_resume.py::test_a_shard_whose_values_cannot_be_written_is_not_marked",),
    ),
    Sabotage(
        "lock never checked",
        "store/writer.py",
        "        if self._lock:\n",
        "        if False:\n",
        ("tests/store/test_lock.py",),
    ),
    Sabotage(
        "missing shards taken for whole",
        "store/writer.py",
        "if status[shards.rows(shard).start] == MISSING]\n\n    def commit",
        "if status[shards.rows(shard).start] == MISSING and shard == 0]\n\n    def commit",
        ("tests/extract/test_resume.py::test_a_lost_mark_is_one_shard_again", "tests/store/test_store.py"),
    ),
    Sabotage(
        "digest of a shard left out",
        "store/writer.py",
        "        wait([self._open(split, DIGEST)[shard].write(np.array(list(digests), np.uint32))], doing)\n",
        "",
        ("tests/store/test_verify.py::test_a_whole_store_is_sound",),
    ),
    Sabotage(
        "rows read without their checksum",
        "store/local/chunks.py",
        "for number, place in enumerate(places) if not version.checked[place]]",
        "for number, place in enumerate(places) if False]",
        ("tests/store/test_chunks.py",),
    ),
    Sabotage(
        "files never synced",
        "store/local/durable_files.py",
        "pool.submit(os.fsync, file)",
        "pool.submit(int, file)",
        ("tests/store/test_power_loss.py",),
    ),
    # Extraction
    Sabotage(
        "final norm in every layer",
        "extract/backbones/timm_vit.py",
        "norm=False",
        "norm=True",
        ("tests/extract/test_backbone.py::test_tokens_are_what_the_blocks_return",),
    ),
    Sabotage(
        "layers off by one",
        "extract/backbones/timm_vit.py",
        "indices=list(layers)",
        "indices=[max(0, layer - 1) for layer in layers]",
        ("tests/extract/test_backbone.py::test_tokens_are_what_the_blocks_return",),
    ),
    Sabotage(
        "rows of a batch in reverse",
        "extract/job/shard_extractor.py",
        "whole[places] = array",
        "whole[places[::-1]] = array",
        ("tests/adapt/test_features.py::test_online_features_are_the_stored_ones_to_the_bit_whatever_the_batch",),
    ),
    Sabotage(
        "int8 by the rms of another layer",
        "extract/forward/encoding.py",
        "_encode(values, dtype, rms.get(layer))",
        "_encode(values, dtype, rms.get(min(tokens)))",
        ("tests/adapt/test_rounding.py::test_no_stored_value_differs_by_more_than_the_stated_rounding",),
    ),
    Sabotage(
        "mixed precision ignored by the extraction",
        "extract/forward/frozen_forward.py",
        "with autocast(self.device, self.precision):",
        'with autocast(self.device, "float32"):',
        ("tests/extract/test_backbone.py::test_tokens_come_out_as_float32_under_autocast",),
    ),
    Sabotage(
        "backbone not frozen",
        "extract/backbones/weights.py",
        "model.eval().requires_grad_(False)",
        "model.eval()",
        ("tests/adapt/test_features.py::test_no_gradient_reaches_the_backbone",),
    ),
    Sabotage(
        "frozen backbone trained",
        "extract/backbones/timm_vit.py",
        "copy.deepcopy(self.module).requires_grad_(False)",
        "copy.deepcopy(self.module).requires_grad_(True)",
        ("tests/adapt/test_methods.py::test_end_to_end_methods_train_as_many_parameters_as_their_formula",),
    ),
)
