"""The engine against a plain forward that recomputes everything; it may not compute twice or depend on mates."""

import asyncio
import random
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field

import pytest
import torch
from test_model import logits_of, some_sequences

from thor.engine import Counts, Engine, Sequence
from thor.model import Decoder, ModelConfig
from thor.sampling import Sampling, filtered_logprobs, noise_key, uniform
from thor.weights import load_model

NO_EOS = {10**6}
SETTINGS = [Sampling(), Sampling(0.0), Sampling(0.7, 20, 0.9), Sampling(1.5, top_p=0.8)]


@pytest.fixture(scope="module")
def model(random_directories) -> Decoder:
    return load_model(random_directories["llama"])


def run(coroutine: Coroutine):
    """What the coroutine returns; an engine that makes no progress fails here instead of hanging."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@dataclass
class Mirror:
    """What a sequence must hold; `drawn` has (key, sampling) for sampled tokens, None for given ones."""

    sequence: Sequence
    key: bytes
    ids: list[int]
    drawn: list[tuple[bytes, Sampling] | None] = field(default_factory=list)

    def check(self, model: Decoder) -> list[float]:
        """Compare with one plain forward over all ids; returns the log-probs' errors."""
        sequence = self.sequence
        assert sequence.ids == self.ids
        assert [logprob is None for logprob in sequence.logprobs] == [drawn is None for drawn in self.drawn]
        logits, errors = logits_of(model, [self.ids]), []
        for position, drawn in enumerate(self.drawn):
            if drawn is not None:
                key, sampling = drawn
                errors.append(check_token(logits[position - 1], self.ids[position], uniform(key, position), sampling,
                                          sequence.logprobs[position]))
        return errors


def check_token(logits: torch.Tensor, token: int, noise: float, sampling: Sampling, logprob: float) -> float:
    """The token is what its noise gives under the plain forward's logits; returns the log-prob's error."""
    if sampling.temperature == 0:
        assert logits[token] > logits.max() - 1e-3
        return abs(logits.log_softmax(-1)[token].item() - logprob)
    expected = filtered_logprobs(logits[None], sampling)[0]
    cdf = expected.exp().cumsum(-1, dtype=torch.float64)
    assert cdf[token] - expected[token].exp() - 1e-4 < noise * cdf[-1] < cdf[token] + 1e-4
    return abs(expected[token].item() - logprob)


@torch.no_grad()
def test_the_log_prob_of_a_token_equals_a_plain_forwards_also_after_forks_backtracks_and_evictions(random_directory):
    model, errors = load_model(random_directory), []
    for seed in range(2):
        engine = Engine(model, {3, 5}, num_slots=4, max_tokens=60, chunk_tokens=7)
        errors += run(random_program(engine, model, random.Random(seed)))
        assert engine.counts.evictions and engine.counts.copied
        assert not engine._requests and len(engine.cache._free) == 4
    assert len(errors) > 300
    assert max(errors) < 2e-4
    assert sum(errors) / len(errors) < 2e-5


async def random_program(engine: Engine, model: Decoder, rng: random.Random) -> list[float]:
    """Random calls on a handful of sequences, each mirrored by list operations; errors of the log-probs at the end."""
    live, errors = [], []
    for number in range(150):
        key = noise_key("program", number)
        kind = rng.choice(["new", "fork", "truncate", "append", "prefill", "sample", "sample", "sample", "free"])
        if not live or (kind == "new" and len(live) < 6):
            ids = [rng.randrange(131) for _ in range(rng.randint(1, 20))]
            live.append(Mirror(engine.new(ids, key), key, ids, [None] * len(ids)))
            continue
        mirror = rng.choice(live)
        if kind == "fork":
            live.append(Mirror(engine.fork(mirror.sequence, key), key, list(mirror.ids), list(mirror.drawn)))
        elif kind == "truncate":
            length = rng.randint(1, len(mirror.ids))
            engine.truncate(mirror.sequence, length, key)
            mirror.key, mirror.ids, mirror.drawn = key, mirror.ids[:length], mirror.drawn[:length]
        if kind == "append" or (kind == "truncate" and rng.random() < 0.5):
            ids = [rng.randrange(131) for _ in range(rng.randint(0, min(12, 60 - len(mirror.ids))))]
            engine.append(mirror.sequence, ids)
            mirror.ids, mirror.drawn = mirror.ids + ids, mirror.drawn + [None] * len(ids)
        elif kind == "prefill":
            await engine.prefill(mirror.sequence)
        elif kind == "free" or len(live) > 6:
            errors += mirror.check(model)
            engine.free(mirror.sequence)
            live.remove(mirror)
        else:
            await asyncio.gather(*(sample(engine, mirror, rng.choice(SETTINGS), rng.randint(1, 15))
                                   for mirror in rng.sample(live, rng.randint(1, len(live)))))
    for mirror in live:
        errors += mirror.check(model)
        engine.free(mirror.sequence)
    return errors


async def sample(engine: Engine, mirror: Mirror, sampling: Sampling, count: int) -> None:
    """Sample, and hold the engine to its word on why it stopped."""
    reason = await engine.sample(mirror.sequence, sampling, count, lambda token: token % 17 == 0)
    new = mirror.sequence.ids[len(mirror.ids):]
    mirror.ids, mirror.drawn = mirror.ids + new, mirror.drawn + [(mirror.key, sampling)] * len(new)
    ends = ["eos" if token in (3, 5) else "stop" if token % 17 == 0 else None for token in new]
    if reason == "length":
        assert not any(ends) and (len(new) == count or len(mirror.ids) == 60)
    else:
        assert ends[-1] == reason and not any(ends[:-1])


@torch.no_grad()
def test_greedy_decoding_takes_the_plain_forwards_likeliest_tokens(random_directory):
    model, prompts = load_model(random_directory), some_sequences([5, 30, 12])

    async def decode() -> list[Sequence]:
        engine = Engine(model, NO_EOS, num_slots=3, max_tokens=100)
        sequences = [engine.new(ids, b"") for ids in prompts]
        await asyncio.gather(*(engine.sample(sequence, Sampling(0.0), 40) for sequence in sequences))
        return sequences

    for prompt, sequence in zip(prompts, run(decode())):
        ids = list(prompt)
        for _ in range(40):
            ids.append(logits_of(model, [ids])[-1].argmax().item())
        assert sequence.ids == ids


async def many_turns(engine: Engine, ids: list[int], name: int, pauses: random.Random) -> tuple[list, list]:
    """A trajectory with everything in it: two forks that backtrack and observe, at moments that `pauses` moves."""
    parent = engine.new(ids, noise_key(name))
    await engine.prefill(parent)
    results = []
    for branch in range(2):
        sequence = engine.fork(parent, noise_key(name, branch))
        for turn in range(3):
            await engine.sample(sequence, SETTINGS[name % 4], 6 + name % 5)
            for _ in range(pauses.randrange(6)):
                await asyncio.sleep(0)
            if turn == 1:
                engine.truncate(sequence, len(sequence.ids) - 4, noise_key(name, branch, "again"))
            engine.append(sequence, [7, 8, 9][:turn])
        results.append((list(sequence.ids), list(sequence.logprobs)))
        engine.free(sequence)
    engine.free(parent)
    return results


def trajectories(model: Decoder, names: list[int], num_slots: int, chunk_tokens: int, seed: int) -> tuple[dict, Engine]:
    """The trajectories of `names`, made at the same time."""
    engine, pauses = Engine(model, {3}, num_slots, max_tokens=150, chunk_tokens=chunk_tokens), random.Random(seed)
    prompts = some_sequences([5 + 9 * name % 90 for name in range(10)])

    async def together() -> list:
        return await asyncio.gather(*(many_turns(engine, prompts[name], name, pauses) for name in names))

    return dict(zip(names, run(together()))), engine


def test_a_trajectory_does_not_depend_on_its_batch_mates(random_directory):
    model, names, alone = load_model(random_directory), list(range(8)), {}
    for name in names:
        alone |= trajectories(model, [name], 40, 512, seed=0)[0]
    for num_slots, chunk_tokens in ((40, 512), (2, 13), (1, 512)):
        random.Random(num_slots).shuffle(names)
        together, engine = trajectories(model, names, num_slots, chunk_tokens, seed=num_slots)
        assert together == alone  # ids, and log-probs to the last bit
        assert (engine.counts.evictions > 0) == (num_slots < 8)


def test_the_self_test_passes_here_and_fails_for_a_model_whose_tokens_feel_their_mates(random_directories):
    class Sociable(Decoder):
        """Adds a little of the number of tokens in the step."""

        def forward(self, token_ids_T, positions_T, attend):
            return super().forward(token_ids_T, positions_T, attend) + 1e-6 * len(token_ids_T)

    wide = ModelConfig(1000, 576, 1536, 2, 9, 3, 64, 1e-5, 1e4, 256)
    torch.manual_seed(0)
    assert Engine(Decoder(wide), NO_EOS, 2, 64).self_test()
    assert all(Engine(load_model(directory), NO_EOS, 2, 64).self_test() for directory in random_directories.values())
    assert not Engine(Sociable(wide), NO_EOS, 2, 64).self_test()


def test_the_prompt_of_a_group_is_read_once(model):
    async def group() -> Engine:
        engine = Engine(model, NO_EOS, num_slots=9, max_tokens=100, chunk_tokens=20)
        first = engine.new(some_sequences([50])[0], b"")
        await engine.prefill(first)
        forks = [engine.fork(first, noise_key(i)) for i in range(8)]
        await asyncio.gather(*(engine.sample(fork, Sampling(), 10) for fork in forks))
        return engine

    counts = run(group()).counts
    assert counts.fed == 49 + 8 * 10  # each fork reads the prompt's last token and 9 of its own
    assert counts.copied == 8 * 49
    assert counts.sampled == 80


def test_an_observation_is_fed_in_one_pass(model):
    async def act_and_observe() -> tuple[int, int, int]:
        engine = Engine(model, NO_EOS, num_slots=1, max_tokens=100)
        sequence = engine.new([1, 2, 3], b"")
        await engine.sample(sequence, Sampling(), 5)
        before = engine.counts.steps
        engine.append(sequence, list(range(30)))
        await engine.sample(sequence, Sampling(), 1)
        return before, engine.counts.steps, engine.counts.fed

    assert run(act_and_observe()) == (5, 6, 3 + 4 + 1 + 30)


def test_a_backtrack_reads_one_token_again(model):
    async def backtrack() -> int:
        engine = Engine(model, NO_EOS, num_slots=1, max_tokens=100)
        sequence = engine.new([1, 2, 3], b"a")
        await engine.sample(sequence, Sampling(), 30)
        before = engine.counts.fed
        engine.truncate(sequence, 20, b"b")
        await engine.sample(sequence, Sampling(), 1)
        return engine.counts.fed - before

    assert run(backtrack()) == 1


def test_a_long_prompt_is_fed_in_chunks_and_stalls_nobody(model):
    async def mix() -> list[int]:
        engine = Engine(model, NO_EOS, num_slots=2, max_tokens=200, chunk_tokens=10)
        long, short = engine.new(some_sequences([95])[0], b"a"), engine.new([1], b"b")
        lengths = []
        await asyncio.gather(engine.sample(long, Sampling(), 1),
                             engine.sample(short, Sampling(), 20, lambda token: lengths.append(len(long.ids))))
        return lengths

    assert run(mix()) == [95] * 9 + [96] * 11  # `short` gets a token in every one of the ten steps that `long` takes


def test_finished_rows_cost_nothing(model):
    async def mixed_lengths() -> Engine:
        engine = Engine(model, NO_EOS, num_slots=4, max_tokens=100)
        sequences = [engine.new([i, i + 1], noise_key(i)) for i in range(4)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 3 + 20 * i) for i, sequence in enumerate(sequences)))
        return engine

    counts = run(mixed_lengths()).counts
    assert counts.sampled == 3 + 23 + 43 + 63
    assert counts.fed == counts.sampled + 4
    assert counts.steps == 63


def test_what_an_eviction_costs_is_counted_and_nothing_else_is_read_again(model):
    async def waves(num_slots: int) -> tuple[Counts, list[Sequence]]:
        engine = Engine(model, NO_EOS, num_slots, max_tokens=60)
        sequences = [engine.new([i, 1, 2], noise_key(i)) for i in range(10)]
        for _ in range(3):
            await asyncio.gather(*(engine.sample(sequence, Sampling(), 10) for sequence in sequences))
        return engine.counts, sequences

    plenty, sequences = run(waves(10))
    assert (plenty.evictions, plenty.fed) == (0, 10 * 32)
    short, again = run(waves(2))
    assert short.evictions > 10
    assert short.fed == short.evicted + sum(sequence.cached for sequence in again)
    assert [sequence.ids for sequence in again] == [sequence.ids for sequence in sequences]


def test_a_fork_of_an_evicted_parent_takes_over_its_slot(model):
    async def inherit() -> Engine:
        engine = Engine(model, NO_EOS, num_slots=1, max_tokens=60)
        parent = engine.new(some_sequences([30])[0], b"a")
        await engine.prefill(parent)
        await engine.sample(engine.fork(parent, b"b"), Sampling(), 5)
        return engine

    counts = run(inherit()).counts
    assert (counts.fed, counts.evictions, counts.evicted, counts.copied) == (29 + 5, 1, 0, 0)


def test_every_eos_id_ends_a_sequence_and_is_its_last_token(model):
    async def until_eos(eos_ids: set[int]) -> tuple[str, Sequence]:
        engine = Engine(model, eos_ids, num_slots=1, max_tokens=200)
        sequence = engine.new([1, 2, 3], b"a")
        return await engine.sample(sequence, Sampling(), 190, lambda token: token in eos_ids), sequence

    _, free_running = run(until_eos(NO_EOS))
    response = free_running.ids[3:]
    early, late = response[4], response[20]
    reason, sequence = run(until_eos({early, late}))
    assert reason == "eos"
    assert sequence.ids == free_running.ids[:3 + min(response.index(early), response.index(late)) + 1]
    assert sequence.logprobs[-1] is not None
    for never_sampled in (-1, 10**6):
        reason, sequence = run(until_eos({late, never_sampled}))
        assert (reason, sequence.ids) == ("eos", free_running.ids[:3 + response.index(late) + 1])


def test_a_full_context_is_a_length_and_never_an_error(model):
    async def fill() -> tuple[str, str, int]:
        engine = Engine(model, NO_EOS, num_slots=1, max_tokens=64)
        sequence = engine.new([1] * 50, b"a")
        reasons = await engine.sample(sequence, Sampling(), 1000), await engine.sample(sequence, Sampling(), 5)
        return *reasons, len(sequence.ids)

    assert run(fill()) == ("length", "length", 64)


@pytest.mark.parametrize("length", [0, 65])
def test_a_sequence_that_does_not_fit_is_refused(model, length):
    engine = Engine(model, NO_EOS, num_slots=1, max_tokens=64)
    with pytest.raises(ValueError, match=f"a sequence of {length} tokens does not fit the context of 64"):
        engine.new([1] * length, b"")
    sequence = engine.new([1] * 60, b"")
    with pytest.raises(ValueError, match="5 tokens after 60 exceed the context of 64"):
        engine.append(sequence, [1] * 5)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        Engine(model, NO_EOS, 1, 64, chunk_tokens=0)


def test_a_tool_call_overlaps_with_decoding(model):
    """The other sequence stops decoding only because the tool, a real process, answered meanwhile."""
    async def overlap() -> tuple[str, bytes]:
        engine, answers = Engine(model, NO_EOS, num_slots=2, max_tokens=50_000), []

        async def act() -> None:
            await engine.sample(engine.new([1], b"a"), Sampling(), 5)
            tool = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(6*7)",
                                                        stdout=asyncio.subprocess.PIPE)
            answers.append((await tool.communicate())[0])

        decoding = engine.sample(engine.new([2], b"b"), Sampling(), 49_000, lambda token: bool(answers))
        reason, _ = await asyncio.gather(decoding, act())
        return reason, answers[0].strip()

    assert run(overlap()) == ("stop", b"42")


def test_a_model_error_reaches_every_coroutine_and_the_engine_recovers(model):
    async def break_and_go_on() -> tuple[list, Sequence]:
        engine = Engine(model, NO_EOS, num_slots=4, max_tokens=64)
        good = [engine.new([1, 2, 3 + i], noise_key(i)) for i in range(3)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 4) for sequence in good))
        for sequence in good:
            engine.append(sequence, [5, 6, 7])
        bad = engine.new([1, 2, 10**6], b"")  # no such token in the vocabulary
        errors = await asyncio.gather(*(engine.sample(sequence, Sampling(), 8) for sequence in [*good, bad]),
                                      return_exceptions=True)
        engine.free(bad)
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 4) for sequence in good))
        return errors, good[0]

    errors, sequence = run(break_and_go_on())
    assert [type(error) for error in errors] == [IndexError] * 4

    async def undisturbed() -> Sequence:
        engine = Engine(model, NO_EOS, num_slots=2, max_tokens=64)
        alone = engine.new([1, 2, 3], noise_key(0))
        await engine.sample(alone, Sampling(), 4)
        engine.append(alone, [5, 6, 7])
        await engine.sample(alone, Sampling(), 4)
        return alone

    alone = run(undisturbed())
    assert (sequence.ids, sequence.logprobs) == (alone.ids, alone.logprobs)


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(random_directories):
    model = load_model(random_directories["qwen2"])
    model.model["norm"].weight.data[0] = torch.nan
    engine = Engine(model, NO_EOS, num_slots=1, max_tokens=64)
    with pytest.raises(ValueError, match="logits are not finite after 2 tokens"):
        run(engine.sample(engine.new([1, 2], b""), Sampling(), 5))


def test_a_cancelled_coroutine_leaves_no_trace(model):
    async def cancel_one(cancel: bool) -> tuple[Engine, Sequence]:
        engine = Engine(model, NO_EOS, num_slots=2, max_tokens=100)
        stays, goes = engine.new([1, 2], b"a"), engine.new([3, 4], b"b")
        task = asyncio.create_task(engine.sample(goes, Sampling(), 90)) if cancel else None
        await engine.sample(stays, Sampling(), 10)
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            engine.free(goes)
        await engine.sample(stays, Sampling(), 20)
        return engine, stays

    engine, stays = run(cancel_one(True))
    _, alone = run(cancel_one(False))
    assert (stays.ids, stays.logprobs) == (alone.ids, alone.logprobs)
    assert not engine._requests and engine.cache._free == [1]
    assert engine.counts.sampled <= 30 + 11


def test_a_sequence_belongs_to_one_coroutine_at_a_time(model):
    async def misuse() -> list[str]:
        engine = Engine(model, NO_EOS, num_slots=2, max_tokens=100)
        sequence = engine.new([1, 2], b"a")
        task = asyncio.create_task(engine.sample(sequence, Sampling(), 50))
        await asyncio.sleep(0)
        complaints = []
        for call in (lambda: engine.free(sequence), lambda: engine.append(sequence, [1]),
                     lambda: engine.truncate(sequence, 1, b"")):
            with pytest.raises(AssertionError) as caught:
                call()
            complaints.append(str(caught.value))
        with pytest.raises(AssertionError, match="two coroutines sample one sequence"):
            await engine.sample(sequence, Sampling(), 5)
        await task
        return complaints

    assert run(misuse()) == [f"a sequence was {what} while it is being sampled"
                             for what in ("freed", "appended to", "truncated")]


def test_a_step_waits_for_those_that_are_away_running_code(model):
    """Of eight sequences that went together two go on, the second a little later: still in the same steps."""
    engine = Engine(model, NO_EOS, 8, 40, max_wait=1.0)

    async def everyone() -> None:
        sequences = [engine.new([1, 2, number], noise_key(number)) for number in range(8)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 4) for sequence in sequences))
        first = asyncio.create_task(engine.sample(sequences[0], Sampling(), 4))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, engine.sample(sequences[1], Sampling(), 4))

    run(everyone())
    assert engine.counts.steps == 8
