"""Eq. 3 to 8 against cases worked out by hand and against a plain evaluation with loops."""

import math
from dataclasses import replace

import pytest
import torch

from thor.grpo import (Counts, LossOptions, Tokens, clipped_surrogate, count_tokens, group_advantages,
                       hierarchical_loss, k3, loss_statistics, sequence_mean, token_surrogates)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_advantages_are_rewards_centred_and_divided_by_the_bessel_standard_deviation():
    found = group_advantages(doubles(1, 0, 0), torch.tensor([7, 7, 7]))
    std = math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)
    assert found.tolist() == pytest.approx([(2 / 3) / (std + 1e-6), (-1 / 3) / (std + 1e-6), (-1 / 3) / (std + 1e-6)])


def test_groups_may_be_interleaved_and_have_any_integer_ids():
    rewards, ids = doubles(1, 5, 0, 6, 1), torch.tensor([900, -3, 900, -3, 900])
    found = group_advantages(rewards, ids)
    assert torch.equal(found[[0, 2, 4]], group_advantages(doubles(1, 0, 1), torch.zeros(3, dtype=torch.int64)))
    assert torch.equal(found[[1, 3]], group_advantages(doubles(5, 6), torch.zeros(2, dtype=torch.int64)))


def test_a_group_with_one_member_or_with_equal_rewards_gives_no_gradient():
    rewards = doubles(1, 0.1, 0.1, 0.1, 1, 0)
    found = group_advantages(rewards, torch.tensor([0, 1, 1, 1, 2, 2]))
    assert found[:4].tolist() == [0, 0, 0, 0] and found[4] > 0 > found[5]


def test_duplicate_problems_in_a_batch_stay_separate_groups():
    """Two copies of a problem are two ids, and neither sees the other's rewards."""
    found = group_advantages(doubles(1, 0, 1, 1), torch.tensor([0, 0, 1, 1]))
    assert found[0] == -found[1] and found[2:].tolist() == [0, 0]


def test_without_std_normalisation_the_reward_is_only_centred():
    assert group_advantages(doubles(1, 0), torch.tensor([0, 0]), normalize_std=False).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("ratio, advantage, s", [
    (1.0, 2.0, 2.0),
    (1.2, 1.0, 1.2),       # inside the clip range
    (1.5, 1.0, 1.28),      # raised too far: the gain stops at 1 + 0.28
    (0.5, 1.0, 0.5),       # lowered although good: no clip, the gradient stays
    (0.5, -1.0, -0.8),     # lowered far enough: stops at 1 - 0.2
    (1.5, -1.0, -1.5),     # raised although bad: no clip on this side …
    (4.0, -1.0, -3.0),     # … but the dual clip stops it at c
    (4.0, 1.0, 1.28),
    (4.0, 0.0, 0.0),
])
def test_the_surrogate_is_clipped_on_the_right_sides(ratio, advantage, s):
    found = clipped_surrogate(doubles(math.log(ratio)), doubles(0), doubles(advantage), 0.2, 0.28, 3.0)
    assert found.item() == pytest.approx(-s)


def test_without_the_dual_clip_a_bad_token_that_became_likely_costs_its_full_ratio():
    assert clipped_surrogate(doubles(math.log(4)), doubles(0), doubles(-1), 0.2, 0.28, None).item() == pytest.approx(4)


@pytest.mark.parametrize("ratio, advantage, moves", [(1.1, 1, True), (1.5, 1, False), (0.5, 1, True), (0.5, -1, False),
                                                     (1.5, -1, True), (4.0, -1, False)])
def test_a_clipped_token_has_no_gradient(ratio, advantage, moves):
    logprobs = doubles(math.log(ratio)).requires_grad_()
    clipped_surrogate(logprobs, doubles(0), doubles(advantage), 0.2, 0.28, 3.0).sum().backward()
    assert (logprobs.grad.item() != 0) == moves


def batch(seed: int = 0) -> tuple[torch.Tensor, Tokens]:
    """30 tokens of 6 sequences, 4 trajectories and 2 branches, some ratios beyond every clip."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 5, 6, 4, 5])
    new = -torch.rand(30, generator=generator, dtype=torch.float64) * 3
    old = new + torch.randn(30, generator=generator, dtype=torch.float64)
    return new, Tokens(old, old + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64),
                       doubles(1.2, -0.7, 0.3, -2.0, 0.9, -0.9).repeat_interleave(lengths),
                       torch.tensor([False] * 4 + [True] * 2).repeat_interleave(lengths),
                       torch.arange(6).repeat_interleave(lengths))


def plain_loss(new: list[float], tokens: Tokens, options: LossOptions) -> float:
    """Eq. 5 to 8 with loops, token by token."""
    old, advantages, step = tokens.old_logprobs.tolist(), tokens.advantages.tolist(), tokens.is_step.tolist()

    def level(chosen: list[int]) -> float:
        total = 0.0
        for k in chosen:
            ratio = math.exp(new[k] - old[k])
            clipped = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
            s = min(ratio * advantages[k], clipped * advantages[k])
            if advantages[k] < 0:
                s = max(s, options.dual_clip * advantages[k])
            total -= s / len(chosen)
        good = [k for k in chosen if advantages[k] > 0]
        return total - options.nll_weight * sum(new[k] for k in good) / max(len(good), 1)

    everyone = range(len(new))
    if options.joint:
        return level(list(everyone))
    return level([k for k in everyone if not step[k]]) + options.step_weight * level([k for k in everyone if step[k]])


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(step_weight=0.3, nll_weight=0.5),
                                     LossOptions(joint=True)])
def test_the_loss_is_eq_5_to_8_evaluated_token_by_token(options):
    new, tokens = batch()
    found = hierarchical_loss(new, tokens, count_tokens(tokens), options)
    assert found.item() == pytest.approx(plain_loss(new.tolist(), tokens, options), rel=1e-12)


def test_each_level_has_its_own_normaliser_and_its_own_nll_term():
    """With the branches doubled, L_step stays what it was; under `joint` everything moves."""
    new, tokens = batch()
    chosen = torch.cat((torch.arange(30), torch.arange(21, 30)))
    doubled = Tokens(*(getattr(tokens, name)[chosen] for name in Tokens.__dataclass_fields__))
    before, after = (hierarchical_loss(logprobs, given, count_tokens(given), LossOptions()).item()
                     for logprobs, given in ((new, tokens), (new[chosen], doubled)))
    assert before == pytest.approx(after, rel=1e-12)
    joint = [hierarchical_loss(logprobs, given, count_tokens(given), LossOptions(joint=True)).item()
             for logprobs, given in ((new, tokens), (new[chosen], doubled))]
    assert joint[0] != pytest.approx(joint[1], rel=1e-6)


def test_losses_are_sums_divided_once_by_a_global_token_count():
    """Micro-batches of any cut give shares that add up to the whole."""
    new, tokens = batch()
    counts, whole = count_tokens(tokens), None
    for cut in (1, 10, 16, 29):
        parts = [(new[at], Tokens(*(getattr(tokens, name)[at] for name in Tokens.__dataclass_fields__)))
                 for at in (slice(0, cut), slice(cut, 30))]
        assert count_tokens(parts[0][1]) + count_tokens(parts[1][1]) == counts
        total = sum(hierarchical_loss(*part, counts, LossOptions()).item() for part in parts)
        whole = total if whole is None else whole
        assert total == pytest.approx(whole, rel=1e-12)


def test_an_empty_level_gives_0_and_keeps_the_graph():
    new, tokens = batch()
    only = Tokens(*(getattr(tokens, name)[:21] for name in Tokens.__dataclass_fields__))
    logprobs = new[:21].clone().requires_grad_()
    loss = hierarchical_loss(logprobs, only, count_tokens(only), LossOptions(step_weight=100.0))
    assert loss.item() == hierarchical_loss(logprobs, only, count_tokens(only), LossOptions(step_weight=0.0)).item()
    nothing = Tokens(*(getattr(tokens, name)[:0] for name in Tokens.__dataclass_fields__))
    empty = new[:0].clone().requires_grad_()
    loss = hierarchical_loss(empty, nothing, Counts(), LossOptions())
    loss.backward()
    assert loss.item() == 0 and empty.grad is not None


def test_kl_and_entropy_are_off_by_default_and_means_over_all_tokens_when_on():
    new, tokens = batch()
    counts, reference, entropies = count_tokens(tokens), new + 0.3, torch.ones(30, dtype=torch.float64)
    base = hierarchical_loss(new, tokens, counts, LossOptions())
    assert hierarchical_loss(new, tokens, counts, LossOptions(), reference, entropies) == base
    options = LossOptions(kl_weight=2.0, entropy_weight=0.5)
    with_both = hierarchical_loss(new, tokens, counts, options, reference, entropies)
    assert (with_both - base).item() == pytest.approx(2.0 * (math.exp(0.3) - 1.3) - 0.5)


def test_k3_is_zero_for_equal_policies_and_never_negative():
    assert k3(doubles(-1, -2), doubles(-1, -2)).tolist() == [0, 0]
    assert (k3(torch.randn(100).double(), torch.randn(100).double()) >= 0).all()


def test_the_sequence_ratio_is_the_geometric_mean_of_the_sequences_ratios():
    new, tokens = batch()
    tokens = replace(tokens, advantages=torch.full((30,), 1.0, dtype=torch.float64))
    found = token_surrogates(new, tokens, LossOptions(sequence_ratio=True, clip_low=0.99, clip_high=99.0))
    first = math.exp((new[:7] - tokens.old_logprobs[:7]).mean())
    assert found[:7].tolist() == pytest.approx([-first] * 7)
    assert sequence_mean(new, tokens.sequence)[8].item() == pytest.approx(new[7:10].mean().item())


def test_importance_weights_are_truncated_and_carry_no_gradient():
    logprobs = doubles(-1, -1).requires_grad_()
    tokens = Tokens(doubles(-1, -1), doubles(-1.5, -9), doubles(1, 1), torch.tensor([False] * 2), torch.tensor([0, 1]))
    found = token_surrogates(logprobs, tokens, LossOptions(importance_cap=2.0))
    assert found.tolist() == pytest.approx([-math.exp(0.5), -2.0])
    found.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.5), -2.0])


def test_clip_statistics_count_only_tokens_whose_term_the_clip_changes():
    new, old = doubles(*map(math.log, (1.5, 1.5, 0.5, 0.5, 1.0))), doubles(0, 0, 0, 0, 0)
    tokens = Tokens(old, old + 0.2, doubles(1, -1, 1, -1, 1), torch.zeros(5, dtype=torch.bool), torch.arange(5))
    found = loss_statistics(new, tokens, LossOptions())
    assert (found["tokens"], found["clipped_high"], found["clipped_low"]) == (5, 1, 1)
    assert found["sampler_gap"] == pytest.approx(1.0) and found["kl_old"] > 0


def test_a_ratio_too_large_for_a_float_costs_no_nan_gradient():
    logprobs = torch.zeros(2, requires_grad=True)
    old, advantages = torch.tensor([-100.0, -100.0]), torch.tensor([1.0, -1.0])
    clipped_surrogate(logprobs, old, advantages, 0.2, 0.28, 3.0).sum().backward()
    assert logprobs.grad.tolist() == [0, 0]


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages(doubles(float("nan"), 1), torch.tensor([0, 0]))
