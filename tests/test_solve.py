"""Linear probes reach the optimum that scikit-learn finds for the same objective."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_methods import CLASSES, DIM, build
from torch import Tensor

from adapt.candidate import Candidate
from adapt.objective import Objective, make_objective
from adapt.solve import Pooled, readout_of, solve_heads
from store.errors import JobError

DECAYS = (1e-3, 1.0, 0.03)


def draw(total: int = 200) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that the optimum is finite."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    features = torch.randn((total, DIM), generator=generator)
    features[torch.arange(total), labels] += 1.5
    return features, labels


def probes() -> list[Candidate]:
    return [Candidate(build("linear_probe", {"pool": "mean"}), None, decay) for decay in DECAYS]


def pooled(labels: Tensor, features: Tensor) -> Pooled:
    return Pooled(features, labels, features[:50], labels[:50])


@pytest.mark.parametrize("balanced", [False, True])
def test_the_solution_is_scikit_learns(balanced: bool) -> None:
    features, labels = draw()
    labels[labels == 1] = torch.where(torch.arange(int((labels == 1).sum())) % 3 > 0, 2, 1)  # make one class rare
    candidates = probes()
    objective = make_objective(labels, CLASSES, multi_label=False, balance_classes=balanced)
    solve_heads(candidates, pooled(labels, features), objective, "solving")
    for candidate in candidates:
        strength = 1 / (len(labels) * candidate.weight_decay)
        weights = "balanced" if balanced else None
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000, class_weight=weights)
        theirs.fit(features.numpy(), labels.numpy())
        ours = readout_of(candidate).classify(features).softmax(dim=1).detach().numpy()
        np.testing.assert_allclose(ours, theirs.predict_proba(features.numpy()), atol=5e-4)


def test_a_solution_does_not_depend_on_the_others_of_the_search() -> None:
    features, labels = draw()
    together, alone = probes(), probes()
    solve_heads(together, pooled(labels, features), Objective(multi_label=False), "solving")
    for one, other in zip(alone, together, strict=True):
        solve_heads([one], pooled(labels, features), Objective(multi_label=False), "solving")
        assert (one.score, one.loss) == (other.score, other.loss)
        assert all(torch.equal(one.best[name], other.best[name]) for name in one.best)


@pytest.mark.parametrize("decay", [1e-4, 1e-5, 1e-6])
def test_weak_decays_are_solved_to_their_own_optimum(decay: float) -> None:
    """Of separable classes, whose loss goes on falling long after the gradient has become small."""
    features, labels = draw()
    features[torch.arange(len(labels)), labels] += 4.0
    candidate = Candidate(build("linear_probe", {"pool": "mean"}), None, decay)
    solve_heads([candidate], pooled(labels, features), Objective(multi_label=False), "solving")
    theirs = LogisticRegression(C=1 / (len(labels) * decay), tol=1e-10, max_iter=50_000)
    theirs.fit(features.double().numpy(), labels.numpy())

    def loss(weight: Tensor, bias: Tensor) -> float:
        logits = features.double() @ weight.double().T + bias.double()
        return float(torch.nn.functional.cross_entropy(logits, labels) + 0.5 * decay * weight.double().square().sum())

    ours = loss(*(tensor.detach() for tensor in readout_of(candidate).head.parameters()))
    assert ours < 1.001 * loss(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_))


def test_a_limit_that_is_hit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw()
    monkeypatch.setattr("adapt.solve._MOST_ITERATIONS", 3)
    with pytest.warns(UserWarning, match=r"weight decay 0\.001 is not at its optimum after 3 iterations"):
        solve_heads(probes()[:1], pooled(labels, features), Objective(multi_label=False), "solving")


def test_multi_label_probes_are_solved_class_by_class() -> None:
    features, labels = draw()
    targets = torch.nn.functional.one_hot(labels, CLASSES).to(torch.uint8)
    (candidate,) = probes()[:1]
    solve_heads([candidate], pooled(targets, features), Objective(multi_label=True), "solving")
    ours = readout_of(candidate).classify(features).sigmoid().detach().numpy()
    for k in range(CLASSES):  # our mean runs over samples and classes
        strength = 1 / (targets.numel() * candidate.weight_decay)
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(features.numpy(), targets[:, k].numpy())
        np.testing.assert_allclose(ours[:, k], theirs.predict_proba(features.numpy())[:, 1], atol=5e-4)


def test_features_that_are_not_finite_are_an_error() -> None:
    features, labels = draw()
    features[3, 2] = torch.inf
    with pytest.raises(JobError, match="the pooled features hold a value that is not finite"):
        solve_heads(probes(), pooled(labels, features), Objective(multi_label=False), "solving")
