"""The time limit of a task is the configured one, or follows the slowest task so far."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.job.retry_rules import RetryRules
from extract.job.workers import Workers

seconds = st.floats(0.1, 1e6)


def rules(limit: float | str) -> RetryRules:
    return RetryRules(
        setting="extract.shard_seconds",
        seconds=limit,  # type: ignore[arg-type]
        least_seconds=600.0,
        first_seconds=3600.0,
        retry_job_errors=True,
    )


@given(seconds, seconds)
def test_a_configured_limit_does_not_depend_on_other_tasks(limit: float, slowest: float) -> None:
    assert rules(limit).limit(0.0) == rules(limit).limit(slowest) == limit


@given(seconds)
def test_the_automatic_limit_is_ten_times_the_slowest_task_and_no_less_than_its_minimum(slowest: float) -> None:
    assert rules("auto").limit(slowest) == max(600.0, 10 * slowest)


def test_the_first_task_has_a_limit_of_its_own() -> None:
    assert rules("auto").limit(0.0) == 3600.0


def test_local_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    threads = [Workers(section="train", count=count, scheduler=None).threads for count in (1, 3, 20)]
    assert threads == [10, 3, 1]
    assert Workers(section="train", count=3, scheduler="tcp://10.0.0.1:8786").threads is None
