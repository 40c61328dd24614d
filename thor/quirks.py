"""What the authors' released code does otherwise than the paper, each thing behind a name, for who wants to see its effect.

`train_rl.py --quirk NAME[,NAME…]` switches them on; docs/departures.md says what each is and docs/results.md what some
do to a run. Nothing here is on by default, and nothing here is right: `python -m thor.audit` finds each where it changes
a number, `mixed_normaliser` excepted, which is the option `--joint`.
"""

import random
from dataclasses import replace

from thor.batch import Sample
from thor.rollout import FailedStep, Tools
from thor.sampling import noise_key
from thor.trajectory import OBSERVE, Span, Trajectory, code_steps

QUIRKS = {
    "mixed_normaliser": "Eq. 5 and 6 once over trajectories and branches together, λ unused: the same as --joint",
    "pack_means": "token means within each forward pass, and the mean of these, instead of one global count",
    "misplaced_mask": "observations are masked at their offset within their turn, counted from the response's start",
    "pad_after_code": "a branch ends in a padding token (the EOS), which is trained like its code",
    "no_code_passes": "a branch without a closed code block has reward 1 instead of being removed",
    "lone_reward": "a group reduced to one sample stays, with its raw reward as advantage",
    "success_branch": "a round without failures branches a random step that passed",
    "loose_anchor": "the suffix may reach back past the start of the failed step's reasoning",
}


def parse_quirks(text: str) -> frozenset[str]:
    """The names in "NAME,NAME…"; none in "". ValueError for a name that is none."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    unknown = sorted(names - QUIRKS.keys())
    if unknown:
        raise ValueError(f"quirk {unknown[0]!r} is not known; there are {', '.join(QUIRKS)}")
    return names


def misplaced_mask(spans: list[Span], length: int) -> list[bool]:
    """The loss mask that masks an observation at [start, end) of its turn as if the turn began with the response.

    A turn begins where r^t begins. Example: think 3, act 2, observe 1, think 1, act 2, observe 2 masks places 5 (right)
    and 3, 4 (an act) instead of 9 and 10, which are trained.
    """
    mask, turn = [True] * length, 0
    for span in spans:
        if span.kind == OBSERVE:
            mask[span.start - turn:span.end - turn] = [False] * (span.end - span.start)
            turn = span.end
    return mask


def with_misplaced_mask(sample: Sample, trajectory: Trajectory) -> Sample:
    """The sample of `trajectory` under that mask; the sampler's log-prob of an observation token is taken as 0."""
    mask = misplaced_mask(trajectory.spans, len(trajectory.response_ids))
    logprobs = [logprob or 0.0 for logprob, trained in zip(trajectory.logprobs, mask, strict=True) if trained]
    return replace(sample, trained=[False] * len(trajectory.prompt_ids) + mask, sampler_logprobs=logprobs)


def with_pad(sample: Sample, pad: int) -> Sample:
    """A branch's sample with one padding token after its code, trained with the branch's advantage."""
    return replace(sample, ids=[*sample.ids, pad], trained=[*sample.trained, True],
                   sampler_logprobs=[*sample.sampler_logprobs, 0.0])


def loosened(failed: FailedStep, suffix_tokens: int) -> FailedStep:
    """The failed step with its anchor L_suf tokens before the code, be it in an observation or in the prompt."""
    act_start = len(failed.trajectory.prompt_ids) + code_steps(failed.trajectory)[-1].act_start
    anchor = max(1, act_start - suffix_tokens)
    return replace(failed, anchor=anchor, start=min(failed.start, anchor))


def random_success(tools: Tools, drawn: list[list[Trajectory]], suffix_tokens: int, rng: random.Random) -> list[FailedStep]:
    """One step that passed, uniformly drawn, as if it had failed; none where no code passed."""
    passed = [(trajectory, step) for group in drawn for trajectory in group for step in code_steps(trajectory)
              if step.execution is not None and step.execution.passed]
    if not passed:
        return []
    trajectory, step = rng.choice(passed)
    prompt, anchor = len(trajectory.prompt_ids), max(step.start, step.act_start - suffix_tokens)
    sequence = tools.engine.new((trajectory.prompt_ids + trajectory.response_ids)[:prompt + step.act_end], noise_key(0))
    return [FailedStep(trajectory, sequence, prompt + step.start, prompt + anchor)]
