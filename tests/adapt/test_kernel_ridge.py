"""What is predicted of a sample that was left out is what a regression without it predicts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapt.training import kernel_ridge
from adapt.training.kernel_ridge import leave_one_out


def draw(seed: int, samples: int = 14, features: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 + torch.randn(samples, features, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (samples, 3), generator=generator).double()
    return values - values.mean(dim=0), targets


def fit_without(row: int, values: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The prediction of a row by a ridge regression on all others, with a bias of its own variance."""
    kept = torch.arange(len(values)) != row
    with_bias = torch.cat([values, torch.full((len(values), 1), kernel_ridge._BIAS**0.5).double()], dim=1)
    x, y = with_bias[kept], targets[kept]
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).double(), x.T @ y)
    return with_bias[row] @ weights


@given(st.integers(0, 10_000), st.sampled_from([1e-4, 1e-2, 1.0]), st.sampled_from([5, 30]))
def test_predictions_are_those_of_regressions_on_the_other_samples(seed: int, strength: float, features: int) -> None:
    values, targets = draw(seed, features=features)
    scaled = values / (values @ values.T).diagonal().mean().sqrt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_ridge, "STRENGTHS", (strength,))
        predicted = leave_one_out(7.0 * values @ values.T, targets)  # the scale of a kernel does not count
    expected = torch.stack([fit_without(row, scaled, targets, strength * len(values)) for row in range(len(values))])
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-6)


def test_features_need_not_be_centered() -> None:
    values, targets = draw(0)
    moved = values + 100
    torch.testing.assert_close(
        leave_one_out(moved @ moved.T, targets), leave_one_out(values @ values.T, targets), rtol=1e-6, atol=1e-6
    )


def test_the_strength_with_the_least_squared_error_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets = draw(1)
    best = leave_one_out(values @ values.T, targets)
    errors = []
    for strength in kernel_ridge.STRENGTHS:
        monkeypatch.setattr(kernel_ridge, "STRENGTHS", (strength,))
        errors.append(float((leave_one_out(values @ values.T, targets) - targets).square().sum()))
        monkeypatch.undo()
    assert float((best - targets).square().sum()) == min(errors) < max(errors)


def test_features_that_do_not_vary_predict_the_most_common_label_of_the_others() -> None:
    targets = torch.eye(2).double()[[0, 0, 0, 1]]
    assert leave_one_out(torch.zeros(4, 4).double(), targets).argmax(dim=1).tolist() == [0, 0, 0, 0]
