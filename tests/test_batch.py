"""Packing, masks and alignment, and the gradient of the whole loss in float64."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thor.attention import packed
from thor.batch import Sample, branch_sample, deal_packs, loss_tokens, make_pack, score, trajectory_sample
from thor.grpo import Counts, LossOptions, count_tokens, group_advantages, hierarchical_loss
from thor.model import Decoder, ModelConfig
from thor.trajectory import Execution, Span, Trajectory

SHAPE = ModelConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
                    head_dim=4, norm_eps=1e-6, rope_theta=1000.0, max_context=64, tied_head=True)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SHAPE).double()


def make_samples(count: int = 7, seed: int = 0, groups: int = 2) -> list[Sample]:
    """Random sequences with holes in their masks; the last two are branches."""
    rng, samples = random.Random(seed), []
    for number in range(count):
        ids = [rng.randrange(29) for _ in range(rng.randint(6, 20))]
        trained = [False, False] + [rng.random() < 0.7 for _ in ids[2:]]
        trained[-1] = True
        sampled = [-rng.random() * 4 for flag in trained if flag]
        old = [p + rng.gauss(0, 0.3) for p in sampled]
        samples.append(Sample(ids, trained, sampled, old, is_step=number >= count - 2))
    rewards = torch.tensor([float(rng.random() < 0.5) for _ in samples], dtype=torch.float64)
    rewards[0], rewards[1], rewards[-1], rewards[-2] = 1, 0, 1, 0
    group_ids = torch.tensor([100 if sample.is_step else index % groups for index, sample in enumerate(samples)])
    advantages = group_advantages(rewards, group_ids).tolist()
    return [replace(sample, advantage=a) for sample, a in zip(samples, advantages, strict=True)]


def gradient(model: Decoder, micro_batches: list[list[Sample]], options: LossOptions = LossOptions(),
             chunk: int = 5) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient, accumulated over micro-batches with one global count."""
    model.zero_grad()
    packs = [(samples, make_pack(samples)) for samples in micro_batches]
    tokens = [loss_tokens(samples, pack, torch.float64) for samples, pack in packs]
    counts, total = sum(map(count_tokens, tokens), Counts()), 0.0
    for (_, pack), known in zip(packs, tokens, strict=True):
        loss = hierarchical_loss(score(model, pack, chunk_tokens=chunk)[0], known, counts, options)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def plain_loss(model: Decoder, samples: list[Sample], options: LossOptions) -> torch.Tensor:
    """Eq. 5 to 8 on one sequence at a time, full logits, token by token: no pack, no chunk, no vector."""
    def level(chosen: list[Sample]) -> torch.Tensor:
        surrogate, likelihood, count, positive = 0.0, 0.0, 0, 0
        for sample in chosen:
            ids = torch.tensor(sample.ids)
            logprobs = model.logits(model(ids, torch.arange(len(ids)), packed([len(ids)]))).log_softmax(-1)
            old = iter(sample.old_logprobs)
            for place in range(1, len(ids)):
                if not sample.trained[place]:
                    continue
                logprob, a = logprobs[place - 1, ids[place]], sample.advantage
                ratio = (logprob - next(old)).exp()
                s = min(ratio * a, ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * a)
                surrogate = surrogate - (max(s, torch.tensor(options.dual_clip * a)) if a < 0 else s)
                count += 1
                if a > 0:
                    likelihood, positive = likelihood - logprob, positive + 1
        zero = torch.zeros((), dtype=torch.float64)
        nll = likelihood / positive if positive else zero
        return (surrogate / count if count else zero) + options.nll_weight * nll

    if options.joint:
        return level(samples)
    return level([s for s in samples if not s.is_step]) + options.step_weight * level([s for s in samples if s.is_step])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ((a - b).norm() / b.norm()).item() < 1e-9


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(step_weight=0.25, nll_weight=0.3),
                                     LossOptions(joint=True)])
def test_the_gradient_equals_a_plain_unpacked_unchunked_evaluation(model, options):
    samples = make_samples()
    loss, found = gradient(model, [samples], options)
    model.zero_grad()
    expected = plain_loss(model, samples, options)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert close(found, torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_the_gradient_does_not_depend_on_micro_batch_size_packing_order_or_chunks(model):
    samples = make_samples()
    whole = gradient(model, [samples])[1]
    assert close(gradient(model, [[s] for s in samples])[1], whole)
    assert close(gradient(model, [samples[:1], samples[1:]])[1], whole)
    assert close(gradient(model, [samples[::-1]])[1], whole)
    assert close(gradient(model, [samples], chunk=1000)[1], whole)
    [packs] = deal_packs([len(s.ids) for s in samples], 25)
    assert len(packs) > 2 and close(gradient(model, [[samples[i] for i in pack] for pack in packs])[1], whole)


def test_a_batch_with_every_problem_twice_has_the_same_gradient(model):
    """Two copies of a problem are two groups with the same advantages: sums and counts double, the quotient stays."""
    samples = make_samples()
    assert close(gradient(model, [samples + samples])[1], gradient(model, [samples])[1])


def test_the_gradient_is_that_of_finite_differences(model):
    """Along random directions; the loss is smooth but at the clip's corners, which a step this small rarely meets."""
    samples, generator = make_samples(seed=3), torch.Generator().manual_seed(1)
    found, parameters = gradient(model, [samples])[1], list(model.parameters())
    for _ in range(3):
        direction = torch.randn(len(found), generator=generator, dtype=torch.float64)
        pieces = direction.split([p.numel() for p in parameters])
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, piece in zip(parameters, pieces, strict=True):
                    p += sign * 1e-6 * piece.view_as(p)
                losses.append(plain_loss(model, samples, LossOptions()).item())
                for p, piece in zip(parameters, pieces, strict=True):
                    p -= sign * 1e-6 * piece.view_as(p)
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((found @ direction).item(), rel=1e-5)


def test_a_group_without_advantage_gives_no_gradient(model):
    samples = [replace(sample, advantage=0.0) for sample in make_samples()]
    assert gradient(model, [samples])[1].abs().max() == 0


def test_the_hidden_state_before_a_token_scores_it(model):
    sample = make_samples()[0]
    pack = make_pack([sample])
    ids = torch.tensor(sample.ids)
    logprobs = model.logits(model(ids, torch.arange(len(ids)), packed([len(ids)]))).log_softmax(-1)
    expected = [logprobs[t - 1, ids[t]].item() for t in range(len(ids)) if sample.trained[t]]
    assert score(model, pack)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_sequences_in_a_pack_do_not_see_each_other_and_nothing_is_padded(model):
    samples = make_samples()
    together = score(model, make_pack(samples))[0]
    alone = torch.cat([score(model, make_pack([sample]))[0] for sample in samples])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)
    assert len(make_pack(samples).token_ids) == sum(len(sample.ids) for sample in samples)


def test_log_probs_are_at_the_sampling_temperature_and_entropy_comes_only_when_asked_for(model):
    pack = make_pack(make_samples())
    hidden = model(pack.token_ids, pack.positions, packed(pack.lengths))[pack.rows]
    expected = (model.logits(hidden) / 0.5).log_softmax(-1)
    found, entropies = score(model, pack, temperature=0.5, with_entropy=True, chunk_tokens=3)
    assert torch.allclose(found, expected.gather(-1, pack.targets[:, None])[:, 0])
    assert torch.allclose(entropies, torch.distributions.Categorical(logits=expected).entropy())
    assert score(model, pack)[1] is None


PASS = Execution("ok", "1", "", 0.0)
TRAJECTORY = Trajectory("a", 0, "?", "1", [5, 6], list(range(7, 15)), [-1.0, -2.0, -3.0, None, None, -4.0, -5.0, -6.0],
                        [Span("think", 0, 1), Span("act", 1, 3), Span("observe", 3, 5), Span("think", 5, 8)], [PASS])


def test_an_observation_and_the_prompt_are_never_trained_and_the_end_of_turn_token_always_is():
    sample = trajectory_sample(TRAJECTORY, 0.5)
    trained = [token for token, flag in zip(sample.ids, sample.trained, strict=True) if flag]
    assert trained == [7, 8, 9, 12, 13, 14] and sample.sampler_logprobs == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]


def test_a_step_branch_trains_r_suf_and_a_only():
    branch = Trajectory("a", 0, "?", None, [5, 6, 7], [8, 9, 10, 11], [-1.0, -2.0, -3.0, -4.0],
                        [Span("think", 0, 2), Span("act", 2, 4)], [PASS])
    sample = branch_sample(branch, 1.0)
    assert sample.trained == [False] * 3 + [True] * 4 and sample.is_step
    code = branch_sample(branch, 1.0, code_only=True)
    assert code.trained == [False] * 5 + [True] * 2 and code.sampler_logprobs == [-3.0, -4.0]


@pytest.mark.parametrize("seed", range(20))
def test_packs_hold_every_sequence_once_within_the_budget_and_ranks_get_equally_many(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 40))]
    budget, ranks = rng.randint(20, 100), rng.randint(1, 4)
    packs = deal_packs(lengths, budget, ranks)
    assert len(packs) == ranks and len({len(of_rank) for of_rank in packs}) == 1
    assert sorted(i for of_rank in packs for pack in of_rank for i in pack) == list(range(len(lengths)))
    for pack in (pack for of_rank in packs for pack in of_rank):
        assert sum(lengths[i] for i in pack) <= budget or len(pack) == 1


def test_the_worked_example_of_deal_packs():
    [[first, second]] = deal_packs([5, 4, 3, 3, 2], 9)
    assert sorted(sum([5, 4, 3, 3, 2][i] for i in pack) for pack in (first, second)) == [8, 9]


def test_packs_are_balanced_over_ranks():
    lengths = [100] * 8 + [10] * 16
    totals = [sum(lengths[i] for pack in of_rank for i in pack) for of_rank in deal_packs(lengths, 200, 4)]
    assert max(totals) <= 1.1 * min(totals) and sum(totals) == sum(lengths)


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="positive budget"):
        deal_packs([3], 0)


def test_ratios_are_one_when_the_trainer_scores_what_it_just_scored(model):
    samples = make_samples()
    scored = score(model, make_pack(samples))[0].tolist()
    cut = [0]
    for sample in samples:
        cut.append(cut[-1] + sample.num_trained)
    fresh = [replace(s, old_logprobs=scored[a:b]) for s, a, b in zip(samples, cut, cut[1:], strict=False)]
    tokens = loss_tokens(fresh, make_pack(fresh), torch.float64)
    difference = score(model, make_pack(fresh))[0] - tokens.old_logprobs
    assert math.isclose(difference.abs().max().item(), 0.0, abs_tol=1e-12)


def test_an_empty_pack_runs_the_same_forward_and_gives_every_parameter_a_gradient_of_zero():
    """Under FSDP a rank without work would otherwise leave the others waiting."""
    untied = Decoder(replace(SHAPE, tied_head=False)).double()
    pack = make_pack([])
    tokens = loss_tokens([], pack, torch.float64)
    loss = hierarchical_loss(score(untied, pack)[0], tokens, Counts(10, 5, 3, 1), LossOptions())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in untied.parameters())


def test_more_ranks_than_sequences_give_empty_packs():
    packs = deal_packs([3], 10, 3)
    assert sorted(len(pack) for of_rank in packs for pack in of_rank) == [0, 0, 1]


class LargestRows(TorchDispatchMode):
    """Watches every operation, and remembers the most rows of vocabulary size that any of them made."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == 499:
                self.rows = max(self.rows, tensor.shape[0])
        return out


def test_the_full_logits_never_exist_forward_or_backward():
    """No operation makes more than a chunk of logits, and the graph keeps none of them until the backward pass."""
    wide, kept = Decoder(replace(SHAPE, vocab_size=499)), []
    pack = make_pack([Sample([1] * 200, [False] + [True] * 199, [])])
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
    with LargestRows() as watch, hooks:
        score(wide, pack, chunk_tokens=20)[0].sum().backward()
    assert watch.rows == 20 and not [shape for shape in kept if shape == (20, 499)]
