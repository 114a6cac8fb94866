"""Head2Toe keeps the features that a first head finds most useful, and is a linear probe of these."""

import pytest
import torch
from end_to_end import CLASSES
from method_cases import LAYERS, build
from probe_data import draw, pooled

from adapt.methods.from_features.linear_probe import LinearProbe
from adapt.training.candidate import Candidate
from adapt.training.linear_solver import readout_of, solve_heads
from adapt.training.objective import Objective
from adapt.training.seed_rows import SeedRows
from adapt.training.selected_heads import most_useful, solve_selected_heads
from store.errors import Note

OBJECTIVE = Objective(multi_label=False)


def candidate(method: str, rows: SeedRows, decay: float = 0.01, **options: object) -> Candidate:
    model = build(method, {"pool": "mean", "layers": list(LAYERS[:1]), **options})
    return Candidate(model, None, decay, data=rows, method=method)


@pytest.fixture
def rows() -> SeedRows:
    return SeedRows(seed=0, rows=torch.arange(200).numpy(), val_rows=torch.arange(50).numpy(), objective=OBJECTIVE)


def weight_of(one: Candidate) -> torch.Tensor:
    return readout_of(one).head.weight.detach()


def test_a_fraction_of_all_features_is_the_linear_probe(rows: SeedRows) -> None:
    features, labels = draw()
    whole, probe = candidate("head2toe", rows, fraction=1.0), candidate("linear_probe", rows)
    solve_selected_heads([whole], pooled(labels, features), OBJECTIVE, "solving")
    solve_heads([probe], pooled(labels, features), OBJECTIVE, "solving")
    torch.testing.assert_close(weight_of(whole), weight_of(probe), rtol=1e-3, atol=1e-3)
    assert whole.score == probe.score


def test_features_that_tell_the_classes_are_kept_and_all_others_have_no_weight(rows: SeedRows) -> None:
    features, labels = draw()  # the class shifts one of the first features
    one = candidate("head2toe", rows, fraction=CLASSES / features.shape[1])
    solve_selected_heads([one], pooled(labels, features), OBJECTIVE, "solving")
    kept = weight_of(one).abs().sum(dim=0) > 0
    assert kept.nonzero().flatten().tolist() == list(range(CLASSES))


def test_the_second_head_is_the_optimum_on_the_kept_features(rows: SeedRows) -> None:
    features, labels = draw()
    one = candidate("head2toe", rows, fraction=0.5)
    solve_selected_heads([one], pooled(labels, features), OBJECTIVE, "solving")
    kept = weight_of(one).abs().sum(dim=0) > 0
    assert int(kept.sum()) == features.shape[1] // 2
    probe = candidate("linear_probe", rows)
    assert isinstance(probe.model, LinearProbe)
    solve_heads([probe], pooled(labels, features * kept), OBJECTIVE, "solving")
    torch.testing.assert_close(weight_of(one), weight_of(probe), rtol=1e-2, atol=3e-3)


def test_each_candidate_of_a_search_gives_what_it_gives_alone(rows: SeedRows) -> None:
    features, labels = draw()
    points = [{"fraction": fraction, "decay": decay} for fraction in (0.1, 0.6) for decay in (0.001, 0.1)]
    together = [candidate("head2toe", rows, **point) for point in points]
    solve_selected_heads(together, pooled(labels, features), OBJECTIVE, "solving")
    for point, of_search in zip(points, together, strict=True):
        alone = candidate("head2toe", rows, **point)
        solve_selected_heads([alone], pooled(labels, features), OBJECTIVE, "solving")
        assert torch.equal(weight_of(alone), weight_of(of_search))
        assert (alone.score, alone.loss, alone.best_epoch) == (of_search.score, of_search.loss, of_search.best_epoch)


@pytest.mark.parametrize(("fraction", "kept"), [(1e-6, [2]), (0.5, [1, 2]), (0.51, [1, 2]), (1.0, [0, 1, 2, 3])])
def test_the_most_useful_features_have_the_largest_norms_over_classes(fraction: float, kept: list[int]) -> None:
    weight = torch.tensor([[0.1, 3.0, 3.0, 0.0], [0.0, 0.0, -4.0, 0.2]])
    assert most_useful(weight, fraction).tolist() == kept


def test_a_second_head_without_an_optimum_is_warned_of(rows: SeedRows) -> None:
    features, labels = draw()
    features[:, :CLASSES] += 8 * torch.eye(CLASSES)[labels]  # the classes are separable by these
    one = candidate("head2toe", rows, decay=0.0, fraction=1.0)
    second = pytest.warns(Note, match="the head on the kept features of weight decay 0 is not at its optimum")
    with pytest.warns(Note, match="the linear probe of weight decay 0 is not at its optimum"), second:
        solve_selected_heads([one], pooled(labels, features), OBJECTIVE, "solving")
