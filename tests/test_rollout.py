"""The think–act–observe loop on a real tiny model; the sandbox is a toy where a test needs it to fail on command."""

import asyncio
import re
from dataclasses import replace

import pytest
import torch

import tiny
from thor.attention import packed
from thor.data import Problem
from thor.engine import Engine
from thor.rollout import FailedStep, RolloutOptions, Tools, answer_part, branch_group, solve_group
from thor.sampling import Sampling
from thor.template import Template, code_of, observation_text
from thor.trajectory import Execution, Trajectory, check_spans, code_steps, loss_mask, to_json
from thor.weights import load_model

PROBLEMS = [Problem(f"{a}+{b}", f"{a}+{b}", str(a + b)) for a, b in [(3, 4), (7, 8), (2, 9), (6, 6), (0, 5), (1, 1)]]
OPTIONS = RolloutOptions(Sampling(1.0), max_response_tokens=160, max_code_rounds=4, suffix_tokens=6)


class ToySandbox:
    """Adds two numbers; a name is an error. `broken` makes every run an infrastructure failure."""

    def __init__(self, broken: bool = False):
        self.broken, self.codes = broken, []

    async def run(self, code: str) -> Execution:
        self.codes.append(code)
        if self.broken:
            return Execution("infrastructure", "", "the service does not answer", 0.0)
        sum_of = re.fullmatch(r"print\((\d)\+(\d)\)\n", code)
        if not sum_of:
            return Execution("error", "", "NameError: name 'x' is not defined", 0.0)
        return Execution("ok", f"{int(sum_of[1]) + int(sum_of[2])}\n", "", 0.0)


class AlwaysFails(ToySandbox):
    """Every run is an error of the policy's own."""

    async def run(self, code: str) -> Execution:
        self.codes.append(code)
        return Execution("error", "", "NameError: name 'x' is not defined", 0.0)


@pytest.fixture(scope="module")
def model(tiny_directory):
    return load_model(tiny_directory)


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(tiny.make_tokenizer(), style="base", instruction="")


def roll(model, template, options=OPTIONS, problems=PROBLEMS, samples=4, sandbox=None, slots=8,
         engine_class=Engine) -> tuple[
        list[Trajectory], Engine]:
    """All trajectories in order of problem and sample, and the engine that made them."""
    engine = engine_class(model, {template.tokenizer.eos_token_id}, slots, 256)
    tools, finished = Tools(engine, sandbox or ToySandbox(), template), []

    async def done(trajectory: Trajectory) -> None:
        finished.append(trajectory)

    async def run() -> None:
        gate = asyncio.Semaphore(slots)
        await asyncio.gather(*(solve_group(tools, problem, list(range(samples)), options, gate, done)
                               for problem in problems))

    asyncio.run(run())
    order = {problem.id: index for index, problem in enumerate(problems)}
    return sorted(finished, key=lambda t: (order[t.id], t.sample)), engine


@pytest.fixture(scope="module")
def trajectories(model, template) -> list[Trajectory]:
    """Without self-correction: 24 trajectories, of which some have failed steps."""
    found = roll(model, template, replace(OPTIONS, max_corrections=0))[0]
    assert any(not run.passed for t in found for run in t.executions) and any(t.finish == "eos" for t in found)
    return found


@pytest.fixture(scope="module")
def corrected(model, template) -> list[Trajectory]:
    """With self-correction; some retried more than once."""
    found = roll(model, template, samples=12)[0]
    assert any(t.corrections > 1 for t in found)
    return found


def policy_tokens(trajectory: Trajectory) -> int:
    return sum(loss_mask(trajectory.spans, len(trajectory.response_ids)))


def test_spans_tile_the_response_and_only_observations_are_untrained(trajectories, template):
    for trajectory in trajectories:
        ids, spans = trajectory.response_ids, trajectory.spans
        check_spans(spans, len(ids))
        observed = [template.decode(ids[span.start:span.end]) for span in spans if span.kind == "observe"]
        acts = [template.decode(ids[span.start:span.end]) for span in spans if span.kind == "act"]
        shown = [observation_text(act, run) for act, run in zip(acts, trajectory.executions, strict=True)]
        assert observed == shown[:len(observed)]
        untrained = [i for i, trained in enumerate(loss_mask(spans, len(ids))) if not trained]
        assert untrained == [i for i, logprob in enumerate(trajectory.logprobs) if logprob is None]


def test_the_tokens_trained_on_are_the_tokens_sampled(corrected, model):
    """A plain forward over the recorded ids gives each policy token the log-prob it was sampled with."""
    for trajectory in corrected[:24]:
        ids = torch.tensor(trajectory.prompt_ids + trajectory.response_ids)
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(len(ids)), packed([len(ids)])))
        scored = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0][len(trajectory.prompt_ids) - 1:]
        sampled = [(p, q) for p, q in zip(trajectory.logprobs, scored.tolist(), strict=True) if p is not None]
        assert max(abs(p - q) for p, q in sampled) < 2e-4


def test_eos_is_the_last_of_response_ids_inside_the_last_think_span_with_its_log_prob(trajectories, template):
    ended = [t for t in trajectories if t.finish == "eos"]
    for trajectory in ended:
        assert trajectory.response_ids[-1] == template.tokenizer.eos_token_id
        assert trajectory.spans[-1].kind == "think" and trajectory.spans[-1].end == len(trajectory.response_ids)
        assert trajectory.logprobs[-1] is not None and "<eos>" not in trajectory.text


def test_the_code_that_runs_is_the_code_between_the_fences(model, template):
    sandbox = ToySandbox()
    found = roll(model, template, replace(OPTIONS, max_corrections=0), samples=1, sandbox=sandbox)[0]
    written = [code_of(template.decode(t.response_ids[step.act_start:step.act_end]))
               for t in found for step in code_steps(t) if step.execution is not None]
    assert sorted(written) == sorted(sandbox.codes)


def test_a_failure_is_shown_and_the_trajectory_goes_on_when_self_correction_is_off(trajectories):
    failed = [t for t in trajectories if any(not run.passed for run in t.executions)]
    assert all(t.corrections == 0 and not t.attempts for t in trajectories)
    assert any("NameError: name 'x' is not defined" in t.text and t.finish == "eos" for t in failed)


def test_each_retry_starts_from_the_same_anchor_with_fresh_noise(corrected):
    for trajectory in corrected:
        for step in {attempt.step for attempt in trajectory.attempts}:
            dropped = [attempt for attempt in trajectory.attempts if attempt.step == step]
            assert len({attempt.start for attempt in dropped}) == 1
    repeated = [t for t in corrected if t.corrections > 1]
    assert any(len({tuple(a.response_ids) for a in t.attempts}) > 1 for t in repeated)


def test_the_anchor_lies_suffix_tokens_before_the_code_and_never_before_its_own_reasoning(model, template, corrected):
    """On the first attempt act_start - anchor is the suffix, unless the step's reasoning is shorter."""
    for suffix in (0, 2, 6, 10_000):
        found = corrected if suffix == 6 else roll(model, template, replace(OPTIONS, suffix_tokens=suffix), samples=3)[0]
        assert any(t.attempts for t in found)
        for trajectory in found:
            starts = [step.start for step in code_steps(trajectory)]
            for attempt in (a for a in trajectory.attempts if a.step < len(starts)):
                think = template.decode(attempt.response_ids).index("```python")
                assert attempt.start >= starts[attempt.step] and think <= len("Again.\n")
                assert attempt.start == starts[attempt.step] or len(
                    template.encode(template.decode(attempt.response_ids)[:think])) <= suffix


def test_at_most_n_corr_retries_then_the_last_attempt_and_its_error_are_kept(model, template):
    options = replace(OPTIONS, max_corrections=2, max_code_rounds=2)
    found = roll(model, template, options, samples=2, sandbox=AlwaysFails())[0]
    for trajectory in found:
        tried = [sum(attempt.step == step for attempt in trajectory.attempts) for step in range(2)]
        assert max(tried) <= 2 and ("NameError" in trajectory.text) == (len(trajectory.executions) > 0)
    assert any(t.finish == "rounds" and t.corrections == 4 for t in found)


def test_dropped_attempts_cost_neither_code_rounds_nor_response_length_but_count_as_generated(corrected):
    for trajectory in corrected:
        dropped = sum(len(attempt.response_ids) for attempt in trajectory.attempts)
        assert trajectory.tokens_generated == policy_tokens(trajectory) + dropped
        assert len([run for run in trajectory.executions if run]) <= OPTIONS.max_code_rounds
        assert len(trajectory.response_ids) <= OPTIONS.max_response_tokens
        assert trajectory.corrections == len(trajectory.attempts)


def test_nothing_is_prefilled_twice(model, template):
    """The prompt but its last token is fed once a group; then one token is fed for each one sampled or observed."""
    problems = PROBLEMS[:2]
    found, engine = roll(model, template, problems=problems, samples=6, slots=16)
    assert engine.counts.evictions == 0 and any(t.corrections for t in found)
    prompts = sum(len(template.prompt_ids(problem.question)) - 1 for problem in problems)
    responses = sum(len(t.response_ids) + sum(len(a.response_ids) for a in t.attempts) for t in found)
    assert engine.counts.fed == prompts + responses


def test_the_first_rounds_run_and_one_more_block_ends_the_trajectory(model, template):
    found = roll(model, template, replace(OPTIONS, max_code_rounds=1, max_corrections=0))[0]
    ended = [t for t in found if t.finish == "rounds"]
    assert ended
    for trajectory in ended:
        assert [run is None for run in trajectory.executions] == [False, True]
        assert trajectory.spans[-1].kind == "act"


def test_budgets_belong_to_one_trajectory(model, template):
    """Many trajectories together run as many blocks each as they would alone."""
    together = roll(model, template, replace(OPTIONS, max_code_rounds=1, max_corrections=1))[0]
    alone = [roll(model, template, replace(OPTIONS, max_code_rounds=1, max_corrections=1), [problem])[0]
             for problem in PROBLEMS]
    assert [to_json(t) for t in together] == [to_json(t) for group in alone for t in group]


def test_a_trajectory_does_not_depend_on_its_batch_mates_or_on_memory(model, template, corrected):
    few_slots = roll(model, template, samples=12, slots=2)[0]
    assert [to_json(t) for t in few_slots] == [to_json(t) for t in corrected]


def test_samples_and_seeds_differ(model, template, trajectories):
    other = roll(model, template, replace(OPTIONS, max_corrections=0, seed=1))[0]
    assert [t.response_ids for t in other] != [t.response_ids for t in trajectories]
    assert len({tuple(t.response_ids) for t in trajectories}) > len(PROBLEMS)


@pytest.mark.parametrize("limit", [1, 2, 5, 10, 14, 20, 24, 30])
def test_a_response_never_exceeds_its_length_and_is_never_cut_inside_an_observation(model, template, limit):
    for trajectory in roll(model, template, replace(OPTIONS, max_response_tokens=limit), samples=2)[0]:
        assert len(trajectory.response_ids) <= limit and trajectory.finish in ("length", "eos")
        assert all(template.decode(trajectory.response_ids[s.start:s.end]).endswith("```\n")
                   for s in trajectory.spans if s.kind == "observe")


def test_in_training_a_rollout_ends_at_its_first_failed_execution(model, template):
    found = roll(model, template, replace(OPTIONS, max_corrections=0, stop_at_failure=True))[0]
    failed = [t for t in found if t.finish == "failed"]
    assert failed and all(t.spans[-1].kind == "act" and not t.executions[-1].passed for t in failed)
    assert all(run.passed for t in found if t.finish != "failed" for run in t.executions)


def test_an_infrastructure_failure_ends_the_trajectory_and_is_never_corrected(model, template):
    found = roll(model, template, samples=1, sandbox=ToySandbox(broken=True))[0]
    with_code = [t for t in found if t.executions]
    assert with_code and all(t.finish == "infrastructure" and not t.attempts for t in with_code)


def test_greedy_retries_are_sampled_at_temperature_0_6_and_recorded_so(model, template):
    greedy = replace(OPTIONS, sampling=Sampling(0.0), max_code_rounds=2)
    found = roll(model, template, greedy, samples=2, sandbox=AlwaysFails())[0]
    retried = [t for t in found if t.attempts]
    assert retried and all(t.retry_temperature == 0.6 for t in retried)
    assert any(len({tuple(a.response_ids) for a in t.attempts}) > 1 for t in retried), "greedy would repeat what failed"


def test_tool_calls_overlap_with_decoding(model, template):
    """The first tool call returns only once another trajectory has ended: without overlap this would never finish."""

    class Waiting(ToySandbox):
        def __init__(self):
            super().__init__()
            self.other_ended, self.waits = asyncio.Event(), 0

        async def run(self, code: str) -> Execution:
            self.waits += 1
            if self.waits == 1:
                await asyncio.wait_for(self.other_ended.wait(), 60)
            return await super().run(code)

    async def run() -> int:
        engine = Engine(model, {template.tokenizer.eos_token_id}, 4, 256)
        sandbox, ended = Waiting(), []

        async def done(trajectory: Trajectory) -> None:
            ended.append(trajectory)
            sandbox.other_ended.set()

        await solve_group(Tools(engine, sandbox, template), PROBLEMS[0], [0, 1, 2], OPTIONS, asyncio.Semaphore(3), done)
        return len(ended)

    assert asyncio.run(run()) == 3


def test_past_the_thinking_budget_think_is_closed_for_the_model_with_tokens_that_are_never_trained(model):
    template = Template(tiny.make_tokenizer(), style="base", instruction="", thinking=True)
    found = roll(model, template, replace(OPTIONS, max_thinking_tokens=9, max_response_tokens=200), samples=2)[0]
    closed = [t for t in found if "</think>" in t.text]
    assert closed
    for trajectory in closed:
        mask = loss_mask(trajectory.spans, len(trajectory.response_ids))
        forced = template.close_thinking_ids
        start = next(i for i in range(len(mask)) if trajectory.response_ids[i:i + len(forced)] == forced)
        assert start == 9 and not any(mask[start:start + len(forced)]) and trajectory.thinking
    assert any(trajectory.boxed for trajectory in closed), "the answer after a forced </think> is read"


def test_a_reasoning_model_answers_after_its_last_think():
    assert answer_part("<think>\\boxed{1}</think> so \\boxed{2}") == " so \\boxed{2}"
    assert answer_part("<think>\\boxed{1}") == ""


@pytest.mark.parametrize("name", ["max_code_rounds", "max_corrections", "suffix_tokens", "max_thinking_tokens"])
def test_negative_budgets_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        RolloutOptions(**{name: -1})


def branches_of(model, template, num_branches: int = 6, suffix_tokens: int = 6, slots: int = 8) -> tuple[
        list[FailedStep], list[list[Trajectory]], Engine]:
    """The failed steps of a training round, and the branches grown from each of them."""
    options = replace(OPTIONS, max_corrections=0, stop_at_failure=True, suffix_tokens=suffix_tokens)
    engine = Engine(model, {template.tokenizer.eos_token_id}, slots, 256)
    tools, failures = Tools(engine, ToySandbox(), template), []

    async def done(trajectory: Trajectory) -> None:
        pass

    async def run() -> list[list[Trajectory]]:
        gate = asyncio.Semaphore(slots)
        await asyncio.gather(*(solve_group(tools, problem, list(range(4)), options, gate, done, failures)
                               for problem in PROBLEMS))
        failures.sort(key=lambda failed: (failed.trajectory.id, failed.trajectory.sample))
        return await asyncio.gather(*(branch_group(tools, failed, num_branches, 60, options, gate) for failed in failures))

    return failures, asyncio.run(run()), engine


def test_a_branch_is_one_think_act_step_from_the_anchor_of_a_failed_one(model, template):
    failures, groups, _ = branches_of(model, template)
    assert failures and any(branch.executions and branch.executions[0].passed for group in groups for branch in group)
    for failed, group in zip(failures, groups, strict=True):
        source = failed.trajectory.prompt_ids + failed.trajectory.response_ids
        assert len(group) == 6 and len({tuple(branch.response_ids) for branch in group}) > 1
        for branch in group:
            assert branch.prompt_ids == source[:failed.anchor] and len(branch.response_ids) <= 60
            assert [span.kind for span in branch.spans] in (["think", "act"], ["act"], ["think"])
            assert (branch.finish == "rounds") == (branch.spans[-1].kind == "act") == (len(branch.executions) == 1)
            assert None not in branch.logprobs, "nothing is appended"


def test_the_anchor_of_a_branch_lies_at_most_suffix_tokens_before_the_code(model, template):
    for suffix in (0, 3, 10_000):
        for failed in branches_of(model, template, num_branches=1, suffix_tokens=suffix)[0]:
            act = failed.trajectory.spans[-1]
            act_start = len(failed.trajectory.prompt_ids) + act.start
            assert failed.anchor == max(failed.start, act_start - suffix)


def test_branches_are_the_same_with_little_memory_and_leave_nothing_in_it(model, template):
    """The prefix of a failed step may be evicted before its branches grow; then it is computed again, and counted."""
    _, plenty, roomy = branches_of(model, template, slots=64)
    _, little, tight = branches_of(model, template, slots=2)
    assert [[to_json(b) for b in group] for group in plenty] == [[to_json(b) for b in group] for group in little]
    assert tight.counts.evicted > 0 == roomy.counts.evicted
    assert tight.cache.take() is not None and tight.cache.take() is not None


def test_no_two_attempts_at_a_step_share_their_noise(model, template):
    """Every key that a truncation gives is new."""
    keys = []

    class Remembering(Engine):
        def truncate(self, sequence, length, key):
            keys.append(key)
            super().truncate(sequence, length, key)

    options = replace(OPTIONS, max_code_rounds=3)
    roll(model, template, options, samples=2, sandbox=AlwaysFails(), engine_class=Remembering)
    assert len(keys) > 20 and len(set(keys)) == len(keys)
