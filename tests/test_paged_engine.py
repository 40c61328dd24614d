"""The paged engine against a plain forward, and against the engine over slots: the same trajectories, one step behind.

What runs here without kernels and graphs is the code that a GPU runs with them. Trajectories are compared in float64,
where another order of summation does not flip a token.
"""

import asyncio
import random

import pytest
import torch
from test_engine import NO_EOS, many_turns, random_program, run
from test_model import some_sequences

from thor.decode_step import DecodeStep, Launched, NextToken, batch_sizes
from thor.engine import Engine, Sequence
from thor.model import Decoder
from thor.paged_engine import PagedEngine, make_engine
from thor.sampling import Sampling, noise_key
from thor.weights import load_model


@pytest.fixture(scope="module")
def model(random_directories) -> Decoder:
    return load_model(random_directories["qwen2"], torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3"])
def test_the_log_prob_of_a_token_equals_a_plain_forwards_also_after_forks_backtracks_and_evictions(
        random_directories, name):
    model = load_model(random_directories[name])
    engine = PagedEngine(model, {3, 5}, num_slots=6, max_tokens=60, chunk_tokens=7, page_tokens=4, num_pages=30)
    errors = run(random_program(engine, model, random.Random(0)))
    assert engine.counts.evictions and engine.counts.copied and engine.counts.discarded
    assert not engine._requests and engine.cache.num_free == 30
    assert not engine.cache.references.any()
    assert len(errors) > 100
    assert max(errors) < 2e-4
    assert sum(errors) / len(errors) < 2e-5


async def together(engine: Engine, seed: int) -> list:
    """Twelve trajectories with forks, stops, backtracks and observations, whose pauses let them join at odd moments."""
    prompts, pauses = some_sequences([5 + 9 * name % 90 for name in range(12)]), random.Random(seed)

    async def stops_and_goes_on(name: int) -> list:
        sequence = engine.new(prompts[name], noise_key("stops", name))
        reasons = [await engine.sample(sequence, Sampling(1.2), 25, lambda token: token % 9 == 0)]
        for turn in range(3):
            for _ in range(pauses.randrange(8)):  # a tool call
                await asyncio.sleep(0)
            child = engine.fork(sequence, noise_key("child", name, turn))
            engine.truncate(sequence, max(1, len(sequence.ids) - 5 * turn), noise_key("stops", name, turn))
            engine.append(sequence, [1, 2, 3, 4][:turn + 1])
            reasons += await asyncio.gather(engine.sample(sequence, Sampling(1.2), 25, lambda token: token % 9 == 0),
                                            engine.sample(child, Sampling(0.8), 5))
            reasons.append((list(child.ids), child.logprobs))
            engine.free(child)
        engine.free(sequence)
        return [*reasons, (sequence.ids, sequence.logprobs)]

    return await asyncio.gather(*(many_turns(engine, prompts[name], name, pauses) for name in range(6)),
                                *map(stops_and_goes_on, range(6, 12)))


def assert_same(a: object, b: object) -> None:
    """Equal, log-probs to 1e-5: `Engine` takes its softmax in float32."""
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    else:
        assert a == (pytest.approx(b, abs=1e-5) if isinstance(a, float) else b)


@pytest.mark.parametrize("num_pages, chunk_tokens, seed", [(None, 512, 0), (60, 13, 1), (25, 512, 2)])
def test_trajectories_are_those_of_the_engine_over_slots(model, num_pages, chunk_tokens, seed):
    expected = run(together(Engine(model, {3}, 40, max_tokens=150), 0))
    reasons = {reason for steps in expected[6:] for reason in steps if isinstance(reason, str)}
    assert reasons == {"stop", "eos", "length"}
    engine = PagedEngine(model, {3}, 40, max_tokens=150, chunk_tokens=chunk_tokens, page_tokens=8, num_pages=num_pages)
    assert_same(run(together(engine, seed)), expected)
    assert engine.counts.discarded > 0
    assert (engine.counts.evictions > 0) == (num_pages is not None)
    assert engine.cache.num_free == (num_pages or 40 * 19)


def test_the_oldest_request_gets_on_though_memory_holds_one_sequence_only(model):
    """Pages for a single one of full length: the younger are evicted in mid-decoding, and read again."""
    async def crowd(engine: Engine) -> list[Sequence]:
        sequences = [engine.new([1, 2, number], noise_key(number)) for number in range(6)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 70) for sequence in sequences))
        return sequences

    short = PagedEngine(model, NO_EOS, 6, max_tokens=80, page_tokens=8, num_pages=10)
    sequences = run(crowd(short))
    assert short.counts.evictions > 0
    assert short.counts.fed == short.counts.evicted + sum(sequence.cached for sequence in sequences)
    plenty = run(crowd(Engine(model, NO_EOS, 6, 80)))
    assert [sequence.ids for sequence in sequences] == [sequence.ids for sequence in plenty]


def test_more_sequences_than_rows_of_the_table_take_turns(model):
    async def crowd(engine: Engine) -> list[list[int]]:
        sequences = [engine.new([1, 2, number], noise_key(number)) for number in range(30)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 6) for sequence in sequences))
        return [sequence.ids for sequence in sequences]

    expected = run(crowd(Engine(model, NO_EOS, 30, 80)))
    assert run(crowd(PagedEngine(model, NO_EOS, 3, 80, page_tokens=8, num_pages=10))) == expected


class Recorder(DecodeStep):
    """Writes down when steps are launched and when their tokens are read."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events, self.rows = [], []

    def launch(self, rows: list[NextToken]) -> Launched:
        recorder, number = self, len(self.rows)
        self.rows.append(rows)
        self.events.append(("launch", number))

        class Read(Launched):
            def results(self) -> tuple[list[int], list[float]]:
                recorder.events.append(("read", number))
                return super().results()

        launched = super().launch(rows)
        return Read(launched.stage, launched.num_rows)


def recorded(model: Decoder, max_rows: int, chunk_tokens: int = 512) -> PagedEngine:
    engine = PagedEngine(model, NO_EOS, 2, 200, chunk_tokens, page_tokens=8)
    engine.decoder = Recorder(model, engine.cache, max_rows, False, False)
    return engine


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read(model):
    engine = recorded(model, 1)
    run(engine.sample(engine.new([1, 2, 3], b""), Sampling(), 4))
    assert engine.decoder.events == [("launch", 0), ("launch", 1), ("read", 0), ("launch", 2), ("read", 1),
                                     ("launch", 3), ("read", 2), ("read", 3)]
    assert [row.source for rows in engine.decoder.rows for row in rows] == [-1, 0, 0, 0]  # the host never sends a token


def test_an_observation_goes_in_the_rows_of_a_decoding_step_and_a_long_one_does_not(model):
    async def observe(count: int) -> tuple[list[list[tuple]], list[int]]:
        engine = recorded(model, 12)
        acts, thinks = engine.new([1, 2, 3], b"a"), engine.new([4, 5], b"b")

        async def act() -> None:
            await engine.sample(acts, Sampling(), 3)
            engine.append(acts, list(range(10, 10 + count)))
            await engine.sample(acts, Sampling(), 2)

        await asyncio.gather(act(), engine.sample(thinks, Sampling(), 20))
        steps = [[(row.slot == acts.slot, row.position, row.token) for row in rows] for rows in engine.decoder.rows]
        return steps, acts.ids

    rows, ids = run(observe(5))
    [step] = [step for step in rows[1:] if len(step) > 2]
    assert [row for row in step if row[0]] == [(True, place, ids[place]) for place in range(5, 11)]
    assert [row[0] for row in step].count(False) == 1  # the other goes on in the same step
    long, _ = run(observe(20))
    assert max(map(len, long[1:])) == 2


def test_a_stop_costs_one_discarded_token_and_a_limit_none(model):
    async def to_stop_and_limit() -> tuple[PagedEngine, Sequence]:
        engine = PagedEngine(model, NO_EOS, 4, 200, page_tokens=8)
        sequence = engine.new([1, 2, 3], b"a")
        await engine.sample(sequence, Sampling(), 10, lambda token: len(sequence.ids) == 8)
        assert (engine.counts.sampled, engine.counts.discarded) == (5, 0)  # the step under way has not been read
        await engine.sample(sequence, Sampling(), 10)
        return engine, sequence

    engine, sequence = run(to_stop_and_limit())
    assert (engine.counts.sampled, engine.counts.discarded, len(sequence.ids)) == (15, 1, 18)
    assert engine.counts.fed == 3 + 4 + 1 + 10


def test_a_group_shares_the_prompts_pages_and_copies_the_last_one_only(model):
    async def group() -> PagedEngine:
        engine = PagedEngine(model, NO_EOS, 9, 100, 20, page_tokens=8)
        first = engine.new(some_sequences([50])[0], b"")
        await engine.prefill(first)
        forks = [engine.fork(first, noise_key(i)) for i in range(8)]
        assert engine.cache.num_free == 9 * 13 - 7
        await asyncio.gather(*(engine.sample(fork, Sampling(), 10) for fork in forks))
        return engine

    counts = run(group()).counts
    assert counts.fed == 49 + 8 * 10
    assert counts.copied == 8 * 1  # 49 tokens are six pages of 8, and one token
    assert counts.sampled == 80


def test_forks_survive_their_parents_truncation_and_eviction(model):
    async def orphans() -> PagedEngine:
        engine = PagedEngine(model, NO_EOS, 4, 100, page_tokens=8)
        parent = engine.new(some_sequences([50])[0], b"a")
        await engine.prefill(parent)
        fork, sibling = engine.fork(parent, b"b"), engine.fork(parent, b"c")
        engine.truncate(parent, 3, b"d")
        engine._drop_slot(parent)
        await asyncio.gather(engine.sample(fork, Sampling(), 5), engine.sample(sibling, Sampling(), 5))
        return engine

    assert run(orphans()).counts.fed == 49 + 2 * 5


def test_a_truncation_gives_pages_back_and_what_stays_is_not_read_again(model):
    engine = PagedEngine(model, NO_EOS, 4, 100, page_tokens=8)
    sequence = engine.new(some_sequences([50])[0], b"a")
    run(engine.prefill(sequence))
    free, fed = engine.cache.num_free, engine.counts.fed
    engine.truncate(sequence, 17, b"b")
    assert engine.cache.num_free == free + 7 - 3
    run(engine.sample(sequence, Sampling(), 1))
    assert engine.counts.fed == fed + 1


def test_a_long_prompt_is_fed_in_chunks_and_stalls_nobody(model):
    async def mix() -> tuple[list[int], PagedEngine]:
        engine = recorded(model, 2, chunk_tokens=10)
        long, short = engine.new(some_sequences([95])[0], b"a"), engine.new([1], b"b")
        await asyncio.gather(engine.sample(long, Sampling(), 1), engine.sample(short, Sampling(), 20))
        return [len(rows) for rows in engine.decoder.rows], engine

    rows, engine = run(mix())
    assert rows == [1] * 9 + [2] + [1] * 10  # 94 tokens before the last take ten steps: `short` decodes in all of them
    assert engine.counts.fed == 95 + 20


def test_with_more_requests_than_rows_of_a_step_nothing_is_prefilled_for_those_that_wait(random_directories):
    """A forward over no token at all would cost a GPU as much host time as one over many."""
    class Counting(Decoder):
        """Remembers how many tokens it was given."""

        def forward(self, token_ids_T: torch.Tensor, *others: object) -> torch.Tensor:
            fed.append(len(token_ids_T))
            return super().forward(token_ids_T, *others)

    fed, model = [], load_model(random_directories["qwen2"], torch.float64)
    model.__class__ = Counting
    engine = PagedEngine(model, NO_EOS, 1, 80, num_pages=200)
    assert engine.decoder.max_rows < 100

    async def crowd(engine: Engine) -> list[list[int]]:
        sequences = [engine.new([1, 2, number] * 9, noise_key(number)) for number in range(100)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 4) for sequence in sequences))
        return [sequence.ids for sequence in sequences]

    assert run(crowd(engine)) == run(crowd(Engine(model, NO_EOS, 100, 80)))
    assert min(fed) > 0


def test_a_model_error_reaches_every_coroutine_and_the_engine_recovers(model):
    async def break_and_go_on() -> tuple[list, list[int]]:
        engine = PagedEngine(model, NO_EOS, 4, 64, page_tokens=8)
        good = [engine.new([1, 2, 3 + i], noise_key(i)) for i in range(3)]
        await asyncio.gather(*(engine.sample(sequence, Sampling(), 4) for sequence in good))
        bad = engine.new([1, 10**6, 2], b"")  # no such token in the vocabulary
        errors = await asyncio.gather(*(engine.sample(sequence, Sampling(), 8) for sequence in [*good, bad]),
                                      return_exceptions=True)
        engine.free(bad)
        await engine.sample(good[0], Sampling(), 12 - len(good[0].ids))
        assert engine.cache.num_free == 32 - 2
        return errors, good[0].ids

    errors, ids = run(break_and_go_on())
    assert [type(error) for error in errors] == [IndexError] * 4
    alone = PagedEngine(model, NO_EOS, 2, 64, page_tokens=8)
    sequence = alone.new([1, 2, 3], noise_key(0))
    run(alone.sample(sequence, Sampling(), 9))
    assert ids == sequence.ids


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(random_directories):
    model = load_model(random_directories["qwen2"])
    model.model["norm"].weight.data[0] = torch.nan
    engine = PagedEngine(model, NO_EOS, 1, 64)
    with pytest.raises(ValueError, match="logits are not finite after 2 tokens"):
        run(engine.sample(engine.new([1, 2], b""), Sampling(), 5))


def test_a_cancelled_coroutine_leaves_no_trace(model):
    async def cancel_one(cancel: bool) -> tuple[PagedEngine, Sequence]:
        engine = PagedEngine(model, NO_EOS, 2, 100, page_tokens=8)
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
    assert not engine._requests and engine.cache.num_free == 26 - 4


def test_graph_sizes_cover_every_number_of_rows_without_much_padding():
    assert batch_sizes(1) == [1] and batch_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    sizes = batch_sizes(300)
    for rows in range(1, 301):
        size = next(size for size in sizes if size >= rows)
        assert size <= max(2 * rows - 1, 1) and (rows < 16 or size <= 1.5 * rows)


def test_the_engine_for_a_cpu_is_the_exact_one(model):
    engine = make_engine(model, NO_EOS, 2, 64)
    assert type(engine) is Engine and engine.exact
    assert not PagedEngine(model, NO_EOS, 2, 64).self_test()
    with pytest.raises(ValueError, match="num_slots is 0"):
        PagedEngine(model, NO_EOS, 0, 64)
