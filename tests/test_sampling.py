"""One token from logits: the distribution against a loop over sorted probabilities, the draw against a running sum."""

import math

import pytest
import torch

from thor.sampling import TOP_P_SHORTLIST, Sampling, draw, filtered_logprobs, noise_key, sample_tokens, uniform

ALL_SETTINGS = [Sampling(), Sampling(0.6), Sampling(2.0, top_k=5), Sampling(1.0, top_p=0.9), Sampling(0.7, 20, 0.8),
                Sampling(1.3, 1), Sampling(1.0, 0, 1e-6), Sampling(1.0, 1000, 0.999)]


def written_out(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities after temperature, then top-k, then top-p, token by token in double precision."""
    scaled = [logit / sampling.temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[:sampling.top_k] if sampling.top_k else order
    total = math.fsum(math.exp(scaled[token]) for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= sampling.top_p:
            break
        nucleus.append(token)
        mass += math.exp(scaled[token]) / total
    total = math.fsum(math.exp(scaled[token]) for token in nucleus)
    return [math.exp(scaled[token]) / total if token in set(nucleus) else 0.0 for token in range(len(scaled))]


def some_logits(rows: int = 6, vocab_size: int = 60, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampling", ALL_SETTINGS)
def test_the_distribution_is_temperature_then_top_k_then_top_p(sampling):
    logits = some_logits()
    got = filtered_logprobs(logits, sampling).exp()
    expected = torch.tensor([written_out(row.tolist(), sampling) for row in logits])
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_flat_distribution_needs_more_than_the_shortlist_for_top_p():
    logits = some_logits(2, 5000, spread=0.5)
    got = filtered_logprobs(logits, Sampling(top_p=0.9)).exp() > 0
    assert got[0].sum() > 2 * TOP_P_SHORTLIST
    assert got.tolist() == [[p > 0 for p in written_out(row.tolist(), Sampling(top_p=0.9))] for row in logits]


@pytest.mark.parametrize("sampling", ALL_SETTINGS)
def test_the_log_prob_returned_is_that_of_the_distribution_the_token_was_drawn_from(sampling):
    logits = some_logits().repeat(34, 1)
    tokens, logprobs = sample_tokens(logits, [(i + 0.5) / 204 for i in range(204)], sampling)
    for row, token, logprob in zip(logits, tokens.tolist(), logprobs.tolist()):
        assert math.exp(logprob) == pytest.approx(written_out(row.tolist(), sampling)[token], rel=1e-4)


def test_greedy_takes_the_likeliest_token_and_returns_the_plain_log_prob():
    logits = some_logits()
    tokens, logprobs = sample_tokens(logits, [0.99] * 6, Sampling(0.0, top_k=3, top_p=0.5))
    for row, token, logprob in zip(logits.tolist(), tokens.tolist(), logprobs.tolist()):
        assert token == row.index(max(row))
        assert math.exp(logprob) == pytest.approx(max(written_out(row, Sampling())), rel=1e-4)


@pytest.mark.parametrize("sampling", ALL_SETTINGS)
def test_a_token_is_the_inverse_cdf_of_its_noise(sampling):
    logits, draws = some_logits(1), 3000
    noise = [(i + 0.5) / draws for i in range(draws)]
    tokens, _ = sample_tokens(logits.expand(draws, -1), noise, sampling)
    probs, above = written_out(logits[0].tolist(), sampling), 0.0
    for token, prob in enumerate(probs):
        below, above = above, above + prob
        share = [u for u, drawn in zip(noise, tokens.tolist()) if drawn == token]
        assert len(share) == pytest.approx(prob * draws, abs=1.5)
        assert all(below - 1e-5 < u < above + 1e-5 for u in share)


@pytest.mark.parametrize("noise", [0.0, 1e-300, 1 - 2**-53])
@pytest.mark.parametrize("impossible", [slice(0, 20), slice(40, 60), slice(10, 60)])
def test_the_ends_of_the_noise_never_give_an_impossible_token(noise, impossible):
    logits = some_logits()
    logits[:, impossible] = -torch.inf
    tokens, logprobs = sample_tokens(logits, [noise] * 6, Sampling())
    assert logprobs.isfinite().all()
    assert all(logits[row, token] > -torch.inf for row, token in enumerate(tokens.tolist()))


def test_tokens_far_out_in_the_tail_are_drawn_at_their_own_place():
    """A running sum in float32, or noise that is not scaled by the sum's end, would miss them by hundreds of tokens."""
    logits = torch.cat((torch.zeros(3), torch.full((2000,), -20.0)))[None] + 0.3
    cdf = [0.0]
    for prob in filtered_logprobs(logits, Sampling()).exp()[0].tolist():
        cdf.append(cdf[-1] + prob)
    wanted = list(range(3, 2003, 50))
    noise = [(cdf[token] + cdf[token + 1]) / 2 / cdf[-1] for token in wanted]
    assert sample_tokens(logits.expand(len(wanted), -1), noise, Sampling())[0].tolist() == wanted


def test_noise_is_a_function_of_key_and_position():
    key = noise_key(0, 1, "problem", 2)
    assert uniform(key, 7) == uniform(noise_key(0, 1, "problem", 2), 7)
    others = [noise_key(1, 0, "problem", 2), noise_key(0, 1, "problem", "2"), noise_key(0, 1, "problem2"),
              noise_key(0, 1, "problem", 2, 0), noise_key("0, 1", "problem", 2)]
    values = {uniform(other, 7) for other in others} | {uniform(key, 7), uniform(key, 8)}
    assert len(values) == len(others) + 2


def test_noise_is_the_same_in_every_process_and_on_every_machine():
    key = noise_key(0, "problem", 3)
    assert key.hex() == "85c72ed229427b1892ad51b53b736d97"
    assert uniform(key, 5) == 0.16153292877074232


def test_noise_is_uniform():
    values = [uniform(noise_key(seed), position) for seed in range(100) for position in range(200)]
    assert min(values) >= 0 and max(values) < 1
    counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


@pytest.mark.parametrize("arguments, message", [
    ((-0.1,), "temperature is -0.1"), ((math.nan,), "temperature is nan"), ((1.0, -1), "top_k is -1"),
    ((1.0, 0, 0.0), "top_p is 0.0"), ((1.0, 0, 1.1), "top_p is 1.1")])
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(*arguments)


@pytest.mark.parametrize("vocab_size, spread", [(60, 2.0), (128, 2.0), (1000, 8.0), (2048, 0.1)])
def test_the_draw_in_blocks_is_the_plain_one_each_row_at_its_own_temperature(vocab_size, spread):
    temperatures = [0.0, 0.6, 1.0, 2.0]
    logits = some_logits(500, vocab_size, spread)
    noise = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[:3] = torch.tensor([0.0, 1 - 2.0**-53, 0.5])
    tokens, logprobs = draw(logits, noise, torch.tensor(temperatures, dtype=torch.float64).repeat(125))
    for i, temperature in enumerate(temperatures):
        expected = sample_tokens(logits[i::4], noise[i::4].tolist(), Sampling(temperature))
        assert torch.equal(tokens[i::4], expected[0])
        torch.testing.assert_close(logprobs[i::4], expected[1], atol=1e-5, rtol=0)


def test_the_draw_in_blocks_never_takes_what_cannot_be_drawn():
    logits = torch.full((4, 300), -torch.inf)
    logits[:, [5, 200]] = 0.0
    noise = torch.tensor([0.0, 0.4999, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, noise, torch.ones(4, dtype=torch.float64))
    assert tokens.tolist() == [5, 5, 200, 200]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 4)
    tokens, logprobs = draw(torch.full((1, 300), torch.nan), noise[:1], torch.ones(1, dtype=torch.float64))
    assert 0 <= tokens.item() < 300 and logprobs.isnan().all()  # the device must not read past the embedding
