"""A made-up run with the dump of one round (docs/audit.md has the format): every case that the page has to show.

Texts are written here and log-probs are random; what follows from them (reasons, advantages, counts) is right.
`python tests/make_dump.py DIR --groups 500 --tokens 2000` makes a large one, to measure with.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from tiny import make_tokenizer  # noqa: E402
from thor.grpo import Counts, LossOptions, group_advantages  # noqa: E402
from thor.template import Template, encode_response  # noqa: E402
from thor.trajectory import Attempt, Execution, Span, Trajectory, loss_mask, to_json  # noqa: E402

OK = Execution("ok", "5\n", "", 0.11)
ERROR = Execution("error", "", "NameError: name 'x' is not defined", 0.12)
NASTY = "</script><img src=x onerror=alert(1)><!-- &amp; <b>bold</b>"
ROUND, UPDATES = 2, 2


def solution(answer: str, thought: str = "Add.", code: str = "print(2+3)") -> str:
    """One block that runs, and a box."""
    return f"{thought}\n```python\n{code}\n```\n```output\n5\n```\nIt is \\boxed{{{answer}}}"


class World:
    """Collects trajectories, branches and their lines of samples.jsonl; `write` puts them on disk."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.template = Template(make_tokenizer(), style="base", instruction="")
        self.trajectories: list[Trajectory] = []
        self.branches: list[Trajectory] = []
        self.lines: list[dict] = []

    def logprobs(self, spans: list[Span], length: int) -> list[float | None]:
        """Random ones for sampled tokens, null on observe tokens."""
        drawn = -self.rng.exponential(0.4, length).astype(np.float32)
        drawn[0] = -2.0  # room for a ratio beyond 3
        return [float(p) if kept else None for p, kept in zip(drawn, loss_mask(spans, length), strict=True)]

    def trajectory(self, problem: str, sample: int, text: str, correct: bool, executions: tuple[Execution, ...] = (OK,),
                   finish: str = "eos", question: str = "2+3", attempts: tuple[Attempt, ...] = ()) -> Trajectory:
        """A trajectory from its text; it ends with EOS only if that is how it finished."""
        ids, spans = encode_response(self.template, text)
        if finish != "eos":
            ids = ids[:-1]
            spans = [Span(span.kind, span.start, min(span.end, len(ids))) for span in spans if span.start < len(ids)]
        return Trajectory(problem, sample, question, "5", self.template.prompt_ids(question), ids,
                          self.logprobs(spans, len(ids)), spans, list(executions), list(attempts), text, None, correct,
                          finish, len(attempts), tokens_generated=len(ids))

    def branch(self, parent: Trajectory, sample: int, fork: int, text: str, execution: Execution | None) -> Trajectory:
        """One think–act step from token `fork` of its parent; without an execution it ended before any code."""
        ids, spans = encode_response(self.template, text)
        if execution:
            ids, spans = ids[:-1], [span for span in spans if span.end < len(ids)]
        prompt = parent.prompt_ids + parent.response_ids[:fork]
        return Trajectory(parent.id, sample, parent.question, parent.answer, prompt, ids,
                          self.logprobs(spans, len(ids)), spans,
                          [execution] if execution else [], text=text,
                          finish="failed" if execution and not execution.passed else "eos")

    def add(self, level: str, group: int, members: list[Trajectory], rewards: list[float | None],
            removed: list[str | None], update: int | None, parent: int | None = None, fork: int | None = None,
            carried: bool = False, kept_for_later: bool = False) -> None:
        """A group with its advantages over those that were not removed."""
        kept = [reward for reward, reason in zip(rewards, removed, strict=True) if reason is None]
        advantages = iter(group_advantages(torch.tensor(kept, dtype=torch.float64), torch.zeros(len(kept))).tolist())
        file = self.trajectories if level == "trajectory" else self.branches
        for member, reward, reason in zip(members, rewards, removed, strict=True):
            if not carried:
                file.append(member)
            self.lines.append({
                "level": level, "line": None if carried else len(file) - 1, "group": group, "reward": reward,
                "removed": reason, "advantage": None if reason else next(advantages), "carried": carried,
                "kept_for_later": kept_for_later, "update": None if reason else update, "parent": parent, "fork": fork,
                "sequence": member})

    def write(self, run: Path) -> Path:
        """The run's directory: dump, metrics and the model's tokenizer; returns the dump's directory."""
        self.lines.sort(key=lambda line: (line["carried"], line["level"] == "step", line["line"] or 0))
        directory = run / "dump" / f"round_{ROUND:06d}"
        directory.mkdir(parents=True, exist_ok=True)
        self.template.tokenizer.save_pretrained(run / "model")
        tensors = self.tensors()
        save_file(tensors, directory / "tokens.safetensors")
        texts = {"trajectories": map(to_json, self.trajectories), "branches": map(to_json, self.branches),
                 "samples": (json.dumps({k: v for k, v in line.items() if k != "sequence"}) for line in self.lines),
                 "updates": map(json.dumps, self.updates(tensors))}
        for name, lines in texts.items():
            (directory / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        options = dataclasses.asdict(LossOptions()) | {"model": str(run / "model"), "samples": 4, "branches": 4,
                                                       "code_only": False, "no_std": False, "temperature": 1.0}
        settings = {"round": ROUND, "options": options, "versions": {}, "model": options["model"], "eos": 0}
        (directory / "settings.json").write_text(json.dumps(settings))
        rounds = [metrics_line(number, self.rng) for number in range(1, 5)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in rounds))
        (directory / "metrics.json").write_text(json.dumps(rounds[ROUND - 1]))
        return directory

    def tensors(self) -> dict[str, np.ndarray]:
        """The trained tokens of every used sample, and in its line where they are."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("token", "position", "sampled", "old", "new")}
        first = 0
        for line in self.lines:
            sequence, count = line["sequence"], 0
            if line["update"] is not None:
                mask = np.array(loss_mask(sequence.spans, len(sequence.response_ids)))
                count, prompt = int(mask.sum()), len(sequence.prompt_ids)
                sampled = np.array([p for p in sequence.logprobs if p is not None], dtype=np.float32)
                old = sampled + self.rng.normal(0, 1e-6, count).astype(np.float32)
                new = old + self.rng.normal(0, 0.2, count).astype(np.float32)
                new[:1] += 1.3  # so that the dual clip is seen
                for name, values in (("token", np.array(sequence.response_ids, np.int32)[mask]), ("sampled", sampled),
                                     ("position", prompt + np.flatnonzero(mask).astype(np.int32)), ("old", old),
                                     ("new", new)):
                    columns[name].append(values.astype(np.int32 if name in ("token", "position") else np.float32))
            line |= {"first": first if count else None, "count": count}
            first += count
        return {name: np.concatenate(values) for name, values in columns.items()}

    def updates(self, tensors: dict[str, np.ndarray]) -> list[dict]:
        """A line for each optimizer step; the counts are right, the losses are made up."""
        found = []
        for number in range(UPDATES):
            members = [line for line in self.lines if line["update"] == number]
            sums = {(level, positive): sum(line["count"] for line in members if line["level"] == level
                                           and (line["advantage"] > 0 or not positive))
                    for level in ("trajectory", "step") for positive in (False, True)}
            counts = Counts(*sums.values())
            found.append({"update": number, "loss": 0.0123, "trajectory_grpo": 0.01, "trajectory_nll": 0.2,
                          "step_grpo": 0.0, "step_nll": 0.03, "kl": None, "entropy": None,
                          "counts": dataclasses.asdict(counts), "clipped_low": 3, "clipped_high": 4, "grad_norm": 0.8,
                          "skipped": False})
        return found


def metrics_line(number: int, rng: np.random.Generator) -> dict[str, float | None]:
    """Plausible curves."""
    rise = 0.3 + 0.1 * number
    finishes = {"eos": 10 + number, "length": 1, "rounds": 0, "failed": 5 - number, "infrastructure": 0}
    return {"step": number, "trajectory/accuracy": rise, "trajectory/pass_rate": 1 - 0.3 / number,
            "trajectory/correct_if_all_ran": rise + 0.1, "trajectory/correct_if_some_failed": 0.0,
            "trajectory/tokens": 60 - number, "trajectory/drawn": 16,
            **{f"trajectory/finish_{name}": count for name, count in finishes.items()},
            "step/pass_rate": None if number == 1 else 0.4, "step/tokens": 20.0 + number,
            "policy/kl_old": 0.001 * number, "policy/sampler_gap": 1e-6, "policy/sampler_gap_max": 4e-6,
            "policy/clipped_low": 0.01, "policy/clipped_high": 0.02 * float(rng.random())}


def make_dump(run: Path) -> Path:
    """The small one: six groups of trajectories, two of branches, one carried."""
    world = World()
    failed_text = "Add. Add. Again.\n```python\nprint(2+x)\n```"
    failed = world.trajectory("sum", 2, failed_text, False, (ERROR,), "failed")
    kinds = [(solution("5"), True), (solution("6"), False), (failed_text, False), (solution("5", "Let me see."), True)]
    group = [failed if sample == 2 else world.trajectory("sum", sample, text, correct)
             for sample, (text, correct) in enumerate(kinds)]
    world.add("trajectory", 0, group, [1.0, 0.0, 0.0, 1.0], [None, None, "failed_execution", None], 0)
    nasty = [world.trajectory("nasty", sample, solution(str(5 + sample), f"{NASTY} x\n", f"print('{NASTY}')"),
                              sample == 0, question=f"{NASTY} 2+3") for sample in range(3)]
    world.add("trajectory", 1, nasty, [1.0, 0.0, 0.0], [None] * 3, 1)
    equal = [world.trajectory("easy", sample, solution("5"), True) for sample in range(4)]
    world.add("trajectory", 2, equal, [1.0] * 4, ["groups_equal_rewards"] * 4, None)
    world.add("trajectory", 3, [corrected(world), world.trajectory("again", 1, solution("7"), False)], [1.0, 0.0],
              [None] * 2, 0)
    later = [world.trajectory("later", sample, solution(str(5 + sample)), sample == 0) for sample in range(2)]
    world.add("trajectory", 4, later, [1.0, 0.0], [None] * 2, None, kept_for_later=True)
    alone = [world.trajectory("lost", sample, failed_text, False, (ERROR,), "failed") for sample in range(2)]
    world.add("trajectory", 5, alone, [0.0] * 2, ["failed_execution"] * 2, None)
    fork = failed.spans[1].start - 3
    texts = [("Again.\n```python\nprint(5)\n```", OK), ("Again.\n```python\nprint(y)\n```", ERROR),
             ("Again.\n```python\nprint(2+3)\n```", OK), ("Again. It is \\boxed{5}", None)]
    grown = [world.branch(failed, 8 + place, fork, text, execution) for place, (text, execution) in enumerate(texts)]
    world.add("step", 6, grown, [1.0, 0.0, 1.0, None], [None, None, None, "eos_before_code"], 1, parent=2, fork=fork)
    same = [world.branch(alone[0], place, 2, texts[1][0], ERROR) for place in range(3)]
    world.add("step", 7, same, [0.0] * 3, ["groups_equal_rewards"] * 3, None,
              parent=len(world.trajectories) - 2, fork=2)
    carried = [world.trajectory("before", sample, solution(str(5 + sample)), sample == 0) for sample in range(2)]
    world.add("trajectory", 8, carried, [1.0, 0.0], [None] * 2, 1, carried=True)
    for line in world.lines[-2:]:
        line["reward"] = None  # a checkpoint keeps the advantages of carried samples
    return world.write(run)


def corrected(world: World) -> Trajectory:
    """A trajectory whose block ran at its third attempt."""
    trajectory = world.trajectory("again", 0, solution("5"), True)
    start = trajectory.spans[1].start - 2
    attempts = []
    for name in ("x", "z"):
        ids = world.template.encode(f"d.\n```python\nprint(2+{name})\n```")
        attempts.append(Attempt(0, start, ids, [-0.5] * len(ids), ERROR))
    return dataclasses.replace(trajectory, attempts=attempts, corrections=2, retry_temperature=1.0)


def make_large_dump(run: Path, groups: int, tokens: int, samples: int = 4) -> Path:
    """`groups` groups of `samples` trajectories of about `tokens` tokens: long thoughts of random letters."""
    world = World()
    for group in range(groups):
        thoughts = ["".join(map(chr, world.rng.integers(97, 123, tokens - 40))) for _ in range(samples)]
        members = [world.trajectory(f"p{group}", sample, solution(str(5 + sample), thought), sample == 0)
                   for sample, thought in enumerate(thoughts)]
        world.add("trajectory", group, members, [1.0] + [0.0] * (samples - 1), [None] * samples, group % UPDATES)
    return world.write(run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    print(make_large_dump(given.run, given.groups, given.tokens) if given.groups else make_dump(given.run))
