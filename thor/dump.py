"""The dump of one round of RL: every sample drawn, why it went or what it was worth, and every trained token's numbers.

`train_rl.py --dump_every N` writes one; docs/audit.md lists files and fields. Nothing is decided here: reasons are the
filters', advantages, log-probs and loss parts those that the optimizer step saw. Invariant: a dump is whole or absent,
and a round that is done again replaces it. The page (thor/report.py) and the check (thor/audit.py) read it.
"""

import dataclasses
import json
import math
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save
from torch import Tensor

from thor.batch import Sample
from thor.filters import Kept, branch_reward
from thor.grpo import Counts, LossOptions, Tokens, loss_parts
from thor.metrics import log_line
from thor.reward import trajectory_reward
from thor.rollout import FailedStep
from thor.trajectory import Trajectory, to_json

PARTS = ("trajectory_grpo", "trajectory_nll", "step_grpo", "step_nll", "joint_grpo", "joint_nll", "kl", "entropy")

Groups = list[list[Sample]]


@dataclass(frozen=True)
class _Row:
    """A line of samples.jsonl in the making, and the sample that training made of it; None for what was removed."""

    facts: dict[str, str | int | float | bool | None]
    sample: Sample | None


@dataclass(frozen=True)
class _Scored:
    """What an optimizer step saw of one sample, one entry for each trained token; None where it was not computed."""

    update: int
    new: np.ndarray
    reference: np.ndarray | None
    entropy: np.ndarray | None


class RoundDump:
    """Collects a round in the order of its methods; samples must have been scored with π_old by then."""

    def __init__(self, number: int):
        self.number = number
        self.trajectories: list[Trajectory] = []
        self.branches: list[Trajectory] = []
        self.rows: list[_Row] = []
        self.num_groups = 0
        self.parts: dict[str, float] = {}  # of the update under way, summed over its packs
        self.updates: list[dict[str, object]] = []
        self.scored: dict[int, _Scored] = {}  # by the identity of a sample, which `rows` keeps alive

    def drawn(self, groups: list[list[Trajectory]], kept: Kept, used: Groups) -> None:
        """All trajectories of the round, graded; `used` are the samples of `kept.groups`, in the same order."""
        samples = (sample for group in used for sample in group)
        for group, reasons in zip(groups, kept.reasons, strict=True):
            for trajectory, why in zip(group, reasons, strict=True):
                reward = None if why == "infrastructure" else trajectory_reward(trajectory)
                self._add("trajectory", len(self.trajectories), reward, why, samples)
                self.trajectories.append(trajectory)
            self.num_groups += 1

    def grown(self, groups: list[list[Trajectory]], kept: Kept, used: Groups, failures: list[FailedStep]) -> None:
        """All branches of the round, one group for each of `failures`; `used` as above."""
        samples = (sample for group in used for sample in group)
        lines = {id(trajectory): line for line, trajectory in enumerate(self.trajectories)}
        for group, reasons, failed in zip(groups, kept.reasons, failures, strict=True):
            fork = failed.anchor - len(failed.trajectory.prompt_ids)
            for branch, why in zip(group, reasons, strict=True):
                judged = branch.executions or why is None  # without code only where a quirk keeps it
                reward = branch_reward(branch) if judged and why != "infrastructure" else None
                self._add("step", len(self.branches), reward, why, samples, lines[id(failed.trajectory)], fork)
                self.branches.append(branch)
            self.num_groups += 1

    def carried(self, groups: Groups) -> None:
        """Groups that the round before left over; those that no update takes do not appear."""
        for group in groups:
            for sample in group:
                self._add("trajectory", None, None, None, iter([sample]))
            self.num_groups += 1

    def pack(self, samples: list[Sample], logprobs: Tensor, tokens: Tokens, counts: Counts, options: LossOptions,
             reference: Tensor | None, entropies: Tensor | None) -> None:
        """One pack of the update under way: its samples, and what `hierarchical_loss` was given."""
        with torch.no_grad():
            for name, part in loss_parts(logprobs, tokens, counts, options, reference, entropies).items():
                self.parts[name] = self.parts.get(name, 0.0) + part.item()
        ends = np.cumsum([sample.num_trained for sample in samples])[:-1]
        columns = [[None] * len(samples) if values is None else np.split(values.detach().cpu().numpy(), ends)
                   for values in (logprobs, reference, entropies)]
        for sample, *values in zip(samples, *columns, strict=True):
            self.scored[id(sample)] = _Scored(len(self.updates), *values)

    def update(self, counts: Counts, sums: dict[str, float], grad_norm: float, skipped: bool) -> None:
        """The update is done: `sums` holds its loss and its counts of clipped tokens."""
        parts = {name: _finite(self.parts.get(name)) for name in PARTS}
        clipped = {name: int(sums.get(name, 0)) for name in ("clipped_low", "clipped_high")}
        self.updates.append({"update": len(self.updates), "loss": _finite(sums["loss"]), **parts,
                             "counts": dataclasses.asdict(counts), **clipped, "grad_norm": _finite(grad_norm),
                             "skipped": skipped})
        self.parts = {}

    def write(self, run_directory: Path, options: dict[str, object], eos: int | None, surplus: Groups,
              metrics: dict[str, float | None]) -> Path:
        """Put it all under `run_directory`/dump; `surplus` are the groups kept for the next round."""
        target = run_directory / "dump" / f"round_{self.number:06d}"
        aside, old = (target.with_name(f".{target.name}.{ending}") for ending in ("tmp", "old"))
        for left_over in (aside, old):
            shutil.rmtree(left_over, ignore_errors=True)
        aside.mkdir(parents=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                    "python": platform.python_version()}
        settings = {"round": self.number, "options": options, "versions": versions, "model": options["model"],
                    "eos": eos}
        _write_lines(aside / "settings.json", [_json(settings)])
        _write_lines(aside / "trajectories.jsonl", map(to_json, self.trajectories))
        _write_lines(aside / "branches.jsonl", map(to_json, self.branches))
        _write_lines(aside / "updates.jsonl", map(_json, self.updates))
        _write_lines(aside / "metrics.json", [log_line(self.number, metrics)])
        self._write_samples(aside, {id(sample) for group in surplus for sample in group})
        if target.exists():
            os.rename(target, old)
        os.rename(aside, target)
        shutil.rmtree(old, ignore_errors=True)
        return target

    def _add(self, level: str, line: int | None, reward: float | None, why: str | None, samples: Iterable[Sample],
             parent: int | None = None, fork: int | None = None) -> None:
        """One more row; what was not removed is the next of `samples`."""
        sample = next(samples) if why is None else None
        facts = {"level": level, "line": line, "group": self.num_groups, "reward": reward, "removed": why,
                 "advantage": sample and sample.advantage, "carried": line is None, "parent": parent, "fork": fork}
        self.rows.append(_Row(facts, sample))

    def _write_samples(self, directory: Path, kept_for_later: set[int]) -> None:
        """samples.jsonl, and tokens.safetensors beside it: the tokens of the used samples, one sample after another."""
        lines, used, first = [], [], 0
        for row in self.rows:
            scored = self.scored.get(id(row.sample))
            if row.facts["carried"] and scored is None:
                continue
            count = row.sample.num_trained if scored else 0
            lines.append(_json(row.facts | {
                "kept_for_later": id(row.sample) in kept_for_later, "update": scored and scored.update,
                "first": first if scored else None, "count": count}))
            if scored:
                used.append((row.sample, scored))
            first += count
        _write_lines(directory / "samples.jsonl", lines)
        (directory / "tokens.safetensors").write_bytes(save(_token_columns(used)))
        _flush(directory / "tokens.safetensors")


def _token_columns(used: list[tuple[Sample, _Scored]]) -> dict[str, np.ndarray]:
    """The columns of tokens.safetensors, [T] each over the trained tokens of `used`."""
    def column(values: Iterable[Iterable[float]], dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in values)])

    places = [np.flatnonzero(sample.trained) for sample, _ in used]
    tokens = [np.asarray(sample.ids)[at] for (sample, _), at in zip(used, places, strict=True)]
    columns = {"token": column(tokens, np.int32), "position": column(places, np.int32),
               "sampled": column((sample.sampler_logprobs for sample, _ in used), np.float32),
               "old": column((sample.old_logprobs for sample, _ in used), np.float32),
               "new": column((scored.new for _, scored in used), np.float32)}
    for name in ("entropy", "reference"):
        parts = [getattr(scored, name) for _, scored in used]
        if parts and parts[0] is not None:
            columns[name] = column(parts, np.float32)
    return columns


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _json(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until it is on disk: the rename may otherwise get there first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
