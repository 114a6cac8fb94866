"""The sabotages of benchmarks/ apply to the source, and a run reports which ones the tests notice."""

from dataclasses import replace

import pytest

from benchmarks.sabotage import ROOT, report, run, sabotaged
from benchmarks.sabotages import SABOTAGES, Sabotage
from store.errors import UserError

IDS = [sabotage.name for sabotage in SABOTAGES]
BY_NAME = {sabotage.name: sabotage for sabotage in SABOTAGES}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=IDS)
def test_every_sabotage_applies_and_its_tests_are_there(sabotage: Sabotage) -> None:
    compile(sabotaged(sabotage), sabotage.file, "exec")
    for test in sabotage.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, f"{test} is gone"


def test_names_are_not_given_twice() -> None:
    assert len(BY_NAME) == len(SABOTAGES) >= 25


def test_a_sabotage_that_no_longer_applies_is_an_error() -> None:
    gone = replace(SABOTAGES[0], old="no such text")
    with pytest.raises(UserError, match=r"found 0 times in adapt/training/trials\.py, not once: 'no such text'"):
        sabotaged(gone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows never shuffled", "best seed instead of the mean"])
def test_a_sabotage_is_noticed(name: str) -> None:
    outcome = run(BY_NAME[name], BY_NAME[name].tests)
    assert outcome.failed_test
    assert outcome.failed_test.startswith(BY_NAME[name].tests[0].partition("::")[0])


@pytest.mark.slow
def test_a_sabotage_that_no_test_notices_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """One that changes only the text."""
    harmless = replace(BY_NAME["rows never shuffled"], new="np.array_split(draw.permutation(n_rows),  n_batches)")
    assert report([harmless], at_once=2) == 1
    assert "SURVIVES" in capsys.readouterr().out
