"""The schedule by example, clipping, and steps that are skipped because something was not finite."""

import math

import pytest
import torch

from thor.optimizer import Skips, learning_rate, make_optimizer, take_step


def rates(num_steps: int, warmup: float, schedule: str) -> list[float]:
    return [learning_rate(step, num_steps, 1.0, warmup, schedule) for step in range(1, num_steps + 1)]


def test_a_constant_rate_rises_during_the_warm_up_and_stays():
    assert rates(10, 0.2, "constant") == [0.5] + [1.0] * 9
    assert rates(3, 0.0, "constant") == [1.0] * 3


def test_a_cosine_falls_from_the_peak_and_the_last_step_still_learns():
    found = rates(100, 0.1, "cosine")
    assert found[9] == 1.0 and found[:10] == sorted(found[:10]) and found[9:] == sorted(found[9:], reverse=True)
    assert found[54] == pytest.approx(0.5, abs=0.02) and 0 < found[-1] < 0.001


def network() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, skips: Skips, scale: float,
         lr: float = 0.1) -> float:
    """One optimizer step on a loss whose gradient is `scale` times something fixed."""
    loss = scale * model(torch.ones(3)).sum()
    loss.backward()
    return take_step(model, optimizer, loss.item(), lr, 1.0, skips)


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf), (math.inf, math.inf)])
def test_a_step_is_skipped_whether_it_is_the_loss_or_the_gradient_that_is_not_finite(loss, gradient):
    model, skips = network(), Skips()
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), gradient)
    take_step(model, make_optimizer(model, 0.1, (0.9, 0.99), 0.0), loss, 0.1, 1.0, skips)
    assert skips.total == 1 and torch.equal(model.weight, before) and model.weight.grad is None


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(scale):
    model, skips = network(), Skips()
    optimizer = make_optimizer(model, 0.1, (0.9, 0.99), 0.0)
    step(model, optimizer, skips, 1.0)
    weights, moments = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    for _ in range(2):
        step(model, optimizer, skips, scale)
    assert torch.equal(model.weight, weights) and torch.equal(optimizer.state[model.weight]["exp_avg"], moments)
    assert (skips.total, skips.in_a_row, skips.too_many) == (2, 2, False)
    step(model, optimizer, skips, scale)
    assert skips.too_many
    step(model, optimizer, skips, 1.0)
    assert (skips.total, skips.in_a_row, skips.too_many) == (3, 0, False) and not torch.equal(model.weight, weights)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_returned():
    """With plain gradient descent the length of the step is the clipped norm times the rate."""
    model = network()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    norm = step(model, torch.optim.SGD(model.parameters(), lr=9.0), Skips(), 100.0, lr=0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm == pytest.approx(100 * math.sqrt(8))
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_only_matrices_decay():
    model = network()
    optimizer = make_optimizer(model, 0.1, (0.9, 0.99), weight_decay=0.5)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    step(model, optimizer, Skips(), 0.0)
    assert torch.allclose(model.weight, weight * 0.95) and torch.equal(model.bias, bias)
