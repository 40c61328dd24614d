"""A made-up run with the dump of one round (docs/audit.md): every case that the page has to show, or one large round.

Texts are written here and log-probs are random; filters, advantages, losses and the writing are the real ones.
`python tests/make_dump.py DIR --groups 500 --tokens 2000` makes a large dump, to measure with.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from tiny import make_tokenizer  # noqa: E402
from train_rl import TrainOptions, branch_groups, trajectory_groups  # noqa: E402
from thor.batch import Sample, loss_tokens, make_pack, trajectory_sample  # noqa: E402
from thor.dump import RoundDump  # noqa: E402
from thor.filters import TrajectoryFilters, filter_branches, filter_trajectories  # noqa: E402
from thor.grpo import count_tokens, hierarchical_loss, loss_statistics  # noqa: E402
from thor.rollout import FailedStep  # noqa: E402
from thor.template import Template, encode_response  # noqa: E402
from thor.trajectory import Attempt, Execution, Span, Trajectory, loss_mask  # noqa: E402

OK = Execution("ok", "5\n", "", 0.11)
ERROR = Execution("error", "", "NameError: name 'x' is not defined", 0.12)
NASTY = "</script><img src=x onerror=alert(1)><!-- &amp; <b>bold</b>"
FAILED = "Add. Add. Again.\n```python\nprint(2+x)\n```"
ROUND, UPDATES = 2, 2


def solution(answer: str, thought: str = "Add.", code: str = "print(2+3)") -> str:
    """One block that runs, and a box."""
    return f"{thought}\n```python\n{code}\n```\n```output\n5\n```\nIt is \\boxed{{{answer}}}"


class World:
    """Makes trajectories and branches, collects them in groups, and plays the part of a round that the dump sees."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.template = Template(make_tokenizer(), style="base", instruction="")
        self.groups: list[list[Trajectory]] = []
        self.branches: list[list[Trajectory]] = []
        self.failures: list[FailedStep] = []

    def logprobs(self, spans: list[Span], length: int) -> list[float | None]:
        """Random ones for sampled tokens, null on observe tokens; the first leaves room for a ratio beyond 3."""
        drawn = -self.rng.exponential(0.4, length).astype(np.float32)
        drawn[0] = -2.0
        return [float(p) if kept else None for p, kept in zip(drawn, loss_mask(spans, length), strict=True)]

    def trajectory(self, problem: str, sample: int, text: str, correct: bool, question: str = "2+3") -> Trajectory:
        """A trajectory from its text, whose blocks ran; the text FAILED is one that ended at its failure."""
        ids, spans = encode_response(self.template, text)
        failed = text == FAILED
        if failed:
            ids, spans = ids[:-1], spans[:-1]
        return Trajectory(problem, sample, question, "5", self.template.prompt_ids(question), ids,
                          self.logprobs(spans, len(ids)), spans, [ERROR if failed else OK], text=text, correct=correct,
                          finish="failed" if failed else "eos", tokens_generated=len(ids))

    def group(self, problem: str, texts: list[str], question: str = "2+3") -> list[Trajectory]:
        """A group whose right answer is 5."""
        members = [self.trajectory(problem, sample, text, text.endswith("{5}"), question)
                   for sample, text in enumerate(texts)]
        self.groups.append(members)
        return members

    def grow(self, parent: Trajectory, fork: int, tries: list[tuple[str, Execution | None]]) -> None:
        """Branches from token `fork` of their parent; without an execution one ended before any code."""
        members = []
        for sample, (text, execution) in enumerate(tries):
            ids, spans = encode_response(self.template, text)
            if execution:
                ids, spans = ids[:-1], spans[:-1]
            prompt = parent.prompt_ids + parent.response_ids[:fork]
            members.append(Trajectory(
                parent.id, sample, parent.question, parent.answer, prompt, ids, self.logprobs(spans, len(ids)), spans,
                [execution] if execution else [], text=text, finish="eos"))
        self.branches.append(members)
        self.failures.append(FailedStep(parent, None, 0, len(parent.prompt_ids) + fork))

    def write(self, run: Path, carried: list[list[Sample]], num_surplus: int = 0) -> Path:
        """The run's directory: dump, metrics and the model's tokenizer; returns the dump's directory."""
        self.template.tokenizer.save_pretrained(run / "model")
        options = TrainOptions(str(run / "model"), "none", str(run), "base", samples=4, branches=4,
                               min_response_tokens=0, box_within_last=0, updates_per_round=UPDATES)
        kept = filter_trajectories(self.groups, TrajectoryFilters(0, 0, 0.5), self.template.decode)
        grown = filter_branches(self.branches)
        fresh = self.scored(trajectory_groups(kept.groups, options))
        steps = self.scored(branch_groups(grown.groups, options, self.template))
        dump, used = RoundDump(ROUND), carried + fresh[:len(fresh) - num_surplus]
        dump.drawn(self.groups, kept, fresh)
        dump.grown(self.branches, grown, steps, self.failures)
        dump.carried(carried)
        for number in range(UPDATES):
            groups = used[number::UPDATES] + steps[number::UPDATES]
            self.update(dump, [sample for group in groups for sample in group], options)
        lines = [metrics_line(number) for number in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return dump.write(run, dataclasses.asdict(options), 0, fresh[len(fresh) - num_surplus:], lines[ROUND - 1])

    def scored(self, groups: list[list[Sample]]) -> list[list[Sample]]:
        """As the trainer would: log π_old next to what the sampler says."""
        return [[replace(sample, old_logprobs=(np.float32(sample.sampler_logprobs) + self.rng.normal(
            0, 1e-6, sample.num_trained).astype(np.float32)).tolist()) for sample in group] for group in groups]

    def update(self, dump: RoundDump, samples: list[Sample], options: TrainOptions) -> None:
        """One optimizer step without a model: π_θ and the reference are π_old and noise."""
        pack = make_pack(samples)
        tokens = loss_tokens(samples, pack)
        noise = torch.tensor(self.rng.normal(0, 0.2, (2, len(tokens.old_logprobs))), dtype=torch.float32)
        noise[0, torch.tensor([0, *np.cumsum([sample.num_trained for sample in samples])[:-1]])] += 1.3
        new, reference = tokens.old_logprobs + noise
        counts = count_tokens(tokens)
        loss = hierarchical_loss(new, tokens, counts, options.loss, reference)
        dump.pack(samples, new, tokens, counts, options.loss, reference, None)
        dump.update(counts, {"loss": loss.item()} | loss_statistics(new, tokens, options.loss), 0.8, False)


def metrics_line(number: int) -> dict[str, float | None]:
    """Plausible curves."""
    rise = 0.3 + 0.1 * number
    finishes = {"eos": 10 + number, "length": 1, "rounds": 0, "failed": 5 - number, "infrastructure": 0}
    return {"step": number, "trajectory/accuracy": rise, "trajectory/pass_rate": 1 - 0.3 / number,
            "trajectory/correct_if_all_ran": rise + 0.1, "trajectory/correct_if_some_failed": 0.0,
            "trajectory/tokens": 60 - number, "trajectory/drawn": 16,
            **{f"trajectory/finish_{name}": count for name, count in finishes.items()},
            "step/pass_rate": None if number == 1 else 0.4, "step/tokens": 20.0 + number,
            "policy/kl_old": 0.001 * number, "policy/sampler_gap": 1e-6, "policy/sampler_gap_max": 4e-6,
            "policy/clipped_low": 0.01, "policy/clipped_high": 0.01 * number}


def make_dump(run: Path) -> Path:
    """The small one. Groups 0 to 5 are of trajectories, 6 and 7 of branches (grown in 0 and in 4), 8 is carried."""
    world = World()
    failed = world.group("sum", [solution("5"), solution("6"), FAILED, solution("5", "Let me see.")])[2]
    world.group("nasty", [solution(answer, f"{NASTY} x\n", f"print('{NASTY}')") for answer in "567"], f"{NASTY} 2+3")
    world.group("easy", [solution("5")] * 4)
    again = world.group("again", [solution("5"), solution("7")])
    again[0] = corrected(world, again[0])
    lost = world.group("lost", [FAILED] * 2)
    world.group("later", [solution("5"), solution("6")])
    good, bad = "Again.\n```python\nprint(2+3)\n```", "Again.\n```python\nprint(y)\n```"
    early = ("Again. It is \\boxed{5}", None)
    world.grow(failed, failed.spans[1].start - 3, [(good, OK), (bad, ERROR), (good.replace("2+3", "5"), OK), early])
    world.grow(lost[0], 2, [(bad, ERROR)] * 3)
    before = [trajectory_sample(world.trajectory("before", sample, solution(answer), sample == 0), 0.7 - 1.4 * sample)
              for sample, answer in enumerate("56")]
    return world.write(run, world.scored([before]), num_surplus=1)


def corrected(world: World, trajectory: Trajectory) -> Trajectory:
    """The same, had its block run at the third attempt only."""
    start = trajectory.spans[1].start - 2
    tries = [world.template.encode(f"d.\n```python\nprint(2+{name})\n```") for name in "xz"]
    attempts = [Attempt(0, start, ids, [-0.5] * len(ids), ERROR) for ids in tries]
    return replace(trajectory, attempts=attempts, corrections=2, retry_temperature=1.0)


def make_large_dump(run: Path, groups: int, tokens: int, samples: int = 4) -> Path:
    """`groups` groups of `samples` trajectories of about `tokens` tokens: long thoughts of random letters."""
    world = World()
    for group in range(groups):
        thoughts = ["".join(map(chr, world.rng.integers(97, 123, tokens - 25))) for _ in range(samples)]
        world.group(f"p{group}", [solution(str(5 + sample), thought) for sample, thought in enumerate(thoughts)])
    return world.write(run, [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    print(make_large_dump(given.run, given.groups, given.tokens) if given.groups else make_dump(given.run))
