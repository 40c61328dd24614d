"""Checks dumped rounds of RL against the equations: everything is computed again, in float64, from the trajectories up.

    python -m thor.audit DIR      # a run of train_rl.py --dump_every N: all its dumped rounds; or one round's directory

Rewards, filters, advantages, masks, losses and the metrics that follow come from thor/audit_equations.py, which shares
nothing with the trainer, and are compared with what the trainer logged. Invariant: a difference never passes silently;
docs/audit.md says what is taken on trust. Exit codes: 0 all agree, 1 something does not, 2 no whole dump.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from thor import audit_equations as equations
from thor.audit_equations import GROUP_REASONS, REASONS, UNDECIDED, Options, Tokens
from thor.trajectory import FINISHES, Trajectory, from_json

RELATIVE, ABSOLUTE = 1e-5, 1e-7  # how far a float32 sum may be from ours; the second in units of its terms' mean size
LEVELS = {"trajectory": "trajectories.jsonl", "step": "branches.jsonl"}
PARTS = ("trajectory_grpo", "trajectory_nll", "step_grpo", "step_nll", "joint_grpo", "joint_nll", "kl", "entropy")

Number = float | int | None


@dataclass
class Item:
    """A line of samples.jsonl as the trainer logged it, its trajectory or branch, and what we find for it.

    `record` is None for a carried sample whose own round was not dumped: its advantage and mask are taken on trust.
    """

    logged: dict[str, str | int | float | bool | None]
    record: Trajectory | None
    reward: float | None = None
    removed: str | None = None
    advantage: float | None = None

    @property
    def used(self) -> bool:
        """Whether an update trained on it."""
        return self.logged["update"] is not None

    @property
    def name(self) -> str:
        """What a person looks for."""
        what = "branch" if self.logged["level"] == "step" else "trajectory"
        which = f" {self.record.id!r}, sample {self.record.sample}" if self.record else ""
        place = f"group {self.logged['group']}, carried" if self.logged["carried"] else f"line {self.logged['line']}"
        return f"{what}{which} ({place})"


@dataclass
class Round:
    """One dump, read."""

    number: int
    options: Options
    items: list[Item]
    tokens: dict[str, np.ndarray]
    updates: list[dict]
    metrics: dict[str, Number]

    def groups(self, level: str, carried: bool = False) -> list[list[Item]]:
        """The items of a level, group by group, in order."""
        found: dict[int, list[Item]] = {}
        for item in self.items:
            if (item.logged["level"], item.logged["carried"]) == (level, carried):
                found.setdefault(item.logged["group"], []).append(item)
        return list(found.values())

    def survivors(self, level: str) -> list[list[Item]]:
        """The groups that we find to be kept, without what was removed."""
        kept = [[item for item in group if item.removed is None] for group in self.groups(level)]
        return [group for group in kept if group]

    def drawn(self, level: str) -> list[Trajectory]:
        """All trajectories or all branches."""
        return [item.record for group in self.groups(level) for item in group]

    def columns(self, item: Item) -> dict[str, np.ndarray]:
        """The trained tokens of a used item."""
        at = slice(item.logged["first"], item.logged["first"] + item.logged["count"])
        return {name: values[at] for name, values in self.tokens.items()}


@dataclass
class Findings:
    """Differences between what was logged and what we find: of each kind the first, and how many there are."""

    first: dict[str, str] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    on_trust: Counter[str] = field(default_factory=Counter)

    def equal(self, kind: str, where: str, logged: object, found: object) -> None:
        """They must be the same."""
        self._note(kind, where, logged, found, logged == found)

    def close(self, kind: str, where: str, logged: Number, found: Number, size: float = 1.0) -> None:
        """They must agree but for the rounding of a float32 sum over terms of mean size `size`; NaN is null there."""
        found = found if found is not None and math.isfinite(found) else None
        if logged is None or found is None:
            return self.equal(kind, where, logged, found)
        tolerance = RELATIVE * abs(found) + ABSOLUTE * max(1.0, size)
        self._note(kind, where, logged, found, abs(logged - found) <= tolerance)

    def _note(self, kind: str, where: str, logged: object, found: object, same: bool) -> None:
        self.checked += 1
        if not same:
            self.first.setdefault(kind, f"{kind} of {where}: logged {logged}, recomputed {found}")
            self.count[kind] += 1


def audit(directory: Path) -> bool:
    """Check and print round after round; whether all of them agree. ValueError where nothing was dumped."""
    rounds = [directory] if (directory / "settings.json").is_file() else sorted(directory.glob("dump/round_*"))
    if not rounds:
        raise ValueError(f"{directory} holds no dumped round; train_rl.py --dump_every N writes them")
    kept: dict[int, list[Item]] = {}  # by round, what it left for the next one
    good = True
    for place in rounds:
        try:
            dump = read_round(place, kept)
            findings = audit_round(dump, kept.get(dump.number - 1, []))
        except (ValueError, SafetensorError, LookupError, TypeError) as error:  # a field is missing, or is no number
            raise ValueError(f"{place} is not a whole dump of this version: {error!r}") from None
        kept[dump.number] = [item for item in dump.items if item.logged["kept_for_later"]]
        report(dump, findings)
        good = good and not findings.first
    return good


def read_round(directory: Path, kept: dict[int, list[Item]]) -> Round:
    """A dumped round; a carried sample's trajectory is in the round before, if that was read."""
    def lines(name: str) -> list[str]:
        return (directory / name).read_text(encoding="utf-8").split("\n")[:-1]

    settings, metrics = (json.loads(lines(name)[0]) for name in ("settings.json", "metrics.json"))
    rows, updates = ([json.loads(line) for line in lines(name)] for name in ("samples.jsonl", "updates.jsonl"))
    records = {level: [from_json(line) for line in lines(name)] for level, name in LEVELS.items()}
    columns = load_file(directory / "tokens.safetensors")
    number, options = settings["round"], settings["options"]
    if missing := sorted({"token", "position", "sampled", "old", "new"} - columns.keys()):
        raise ValueError(f"tokens.safetensors has no {', '.join(missing)}")
    listed = [(row["level"], row["line"]) for row in rows if not row["carried"]]
    if listed != [(level, line) for level in LEVELS for line in range(len(records[level]))]:
        raise ValueError("samples.jsonl does not list the trajectories and the branches one by one")
    before = iter(kept.get(number - 1, []))
    items = [Item(row, records[row["level"]][row["line"]]) if not row["carried"] else
             Item(row, getattr(next(before, None), "record", None)) for row in rows]
    tokens = {name: column.astype(np.float64) for name, column in columns.items()}
    return Round(number, options, items, tokens, updates, metrics)


def audit_round(dump: Round, before: list[Item]) -> Findings:
    """All checks of one round, in the order of the method; `before` is what the round before kept for it."""
    findings = Findings()
    check_origins(dump, findings)
    judge(dump, findings)
    judge_carried(dump, before, findings)
    check_dealing(dump, findings)
    for item in dump.items:
        if item.used and item.record is not None:
            check_tokens(item, dump, findings)
    steps = [tokens_of_update(dump, number) for number in range(len(dump.updates))]
    for logged, tokens in zip(dump.updates, steps, strict=True):
        check_update(logged, tokens, dump.options, findings)
    for name, found in (count_metrics(dump) | rate_metrics(dump) | policy_metrics(dump.updates, steps)).items():
        findings.close(name, "metrics.json", dump.metrics.get(name), found)
    return findings


def check_origins(dump: Round, findings: Findings) -> None:
    """A group is G samples of one problem, or G' branches of one failed step, from r_pre on (section 4.2)."""
    options, sizes = dump.options, {"trajectory": dump.options["samples"], "step": dump.options["branches"]}
    for level, size in sizes.items():
        for group in dump.groups(level):
            problems = {(item.record.id, item.logged["parent"], item.record.sample // size) for item in group}
            samples = {item.record.sample for item in group}
            found = [len(problems), len(samples), len(group)]
            findings.equal("problems, samples, size", f"the group of {group[0].name}", found, [1, size, size])
    parents = dump.drawn("trajectory")
    failures = sum(parent.finish == "failed" for parent in parents) if options["branches"] else 0
    prompts = min(failures, options["problems_per_round"])
    findings.equal("number of failed steps that were branched", "the round", len(dump.groups("step")), prompts)
    for item in (item for group in dump.groups("step") for item in group):
        parent, fork = parents[item.logged["parent"]], item.logged["fork"]
        findings.equal("fork", item.name, fork, equations.fork_of(parent, options["suffix_tokens"]))
        same = item.record.prompt_ids == parent.prompt_ids + parent.response_ids[:fork]
        findings.equal("prompt is what stands before the fork", item.name, same, True)


def judge(dump: Round, findings: Findings) -> None:
    """Rewards, reasons and Eq. 3 of everything that was drawn in the round."""
    for level in LEVELS:
        for group in dump.groups(level):
            for item in group:
                item.reward, item.removed = judge_alone(item, level, dump.options, findings)
                findings.close("reward", item.name, item.logged["reward"], item.reward)
            judge_group(group, level, dump.options)
            for item in group:
                findings.equal("removed", item.name, item.logged["removed"], item.removed)
                findings.close("advantage", item.name, item.logged["advantage"], item.advantage)


def judge_alone(item: Item, level: str, options: Options, findings: Findings) -> tuple[float | None, str | None]:
    """Reward and own reason; whether a box stands near enough to the end is taken from the log where it has to be."""
    if level == "step":
        return equations.branch_reward(item.record), equations.branch_reason(item.record)
    why = equations.trajectory_reason(item.record, options)
    if why == UNDECIDED:
        findings.on_trust["places of boxes"] += 1
        why = "no_box_at_end" if item.logged["removed"] == "no_box_at_end" else None
    return equations.trajectory_reward(item.record), why


def judge_group(group: list[Item], level: str, options: Options) -> None:
    """What goes with its group, and the advantages over the survivors of one that stays (in place)."""
    survivors = [item for item in group if item.removed is None]
    rewards = [item.reward for item in survivors]
    why = equations.group_reason(level, rewards, len(group), options)
    advantages = [None] * len(survivors) if why else equations.advantages(rewards, options)
    for item, advantage in zip(survivors, advantages, strict=True):
        item.removed, item.advantage = why, advantage


def judge_carried(dump: Round, before: list[Item], findings: Findings) -> None:
    """Carried samples have the advantages that the round before found; on trust where its dump is not at hand."""
    for place, item in enumerate(item for item in dump.items if item.logged["carried"]):
        known = place < len(before)
        item.advantage = before[place].advantage if known else item.logged["advantage"]
        findings.close("advantage", item.name, item.logged["advantage"], item.advantage)
        findings.on_trust["carried samples"] += not known


def check_dealing(dump: Round, findings: Findings) -> None:
    """Every survivor is trained once or kept for later; groups go whole and evenly to the optimizer steps."""
    wanted = dump.options["groups_per_round"]
    carried, fresh, steps = dump.groups("trajectory", True), dump.survivors("trajectory"), dump.survivors("step")
    room = max(0, wanted - len(carried)) if wanted else len(fresh)
    used, later = carried + fresh[:room], fresh[room:]
    num_updates = min(dump.options["updates_per_round"], len(used) or len(steps))
    findings.equal("number of updates", "the round", len(dump.updates), num_updates)
    findings.equal("number of tokens", "the round", len(dump.tokens["new"]), sum(i.logged["count"] for i in dump.items))
    trained, kept = ({id(item) for group in groups for item in group} for groups in (used + steps, later))
    for item in dump.items:
        logged = [item.used, item.logged["kept_for_later"]]
        findings.equal("trained, kept for later", item.name, logged, [id(item) in trained, id(item) in kept])
    for level, groups in (("trajectory", used), ("step", steps)):
        taken = [{item.logged["update"] for item in group} for group in groups]
        for group, updates in zip(groups, taken, strict=True):
            findings.equal("updates", f"the group of {group[0].name}", len(updates), 1)
        loads = [sum(number in updates for updates in taken) for number in range(num_updates)]
        even = [len(groups) // num_updates + (number < len(groups) % num_updates) for number in range(num_updates)]
        findings.equal(f"{level} groups", "the updates", loads, even)


def check_tokens(item: Item, dump: Round, findings: Findings) -> None:
    """Exactly the policy's own tokens are trained, with the log-probs that they were sampled with."""
    record, columns = item.record, dump.columns(item)
    code_only = item.logged["level"] == "step" and dump.options["code_only"]
    places, logged = equations.trained_places(record, code_only), columns["position"].astype(int).tolist()
    wrong = min(set(places) ^ set(logged), default=None)
    findings.equal("trained or not", item.name if wrong is None else f"position {wrong}, {item.name}",
                   logged if wrong is None else wrong in logged, places if wrong is None else wrong in places)
    if places == logged:
        ids, start = record.prompt_ids + record.response_ids, len(record.prompt_ids)
        findings.equal("tokens", item.name, columns["token"].astype(int).tolist(), [ids[place] for place in places])
        for place, value in zip(places, columns["sampled"].tolist(), strict=True):
            findings.close("sampled log-prob", f"position {place}, {item.name}", value, record.logprobs[place - start])


def tokens_of_update(dump: Round, number: int) -> Tokens:
    """The trained tokens of one optimizer step, with the advantages that we find."""
    items = [item for item in dump.items if item.logged["update"] == number]
    if not items:
        raise ValueError(f"round {dump.number}: no sample belongs to update {number}")
    columns = [dump.columns(item) for item in items]
    lengths = [len(column["new"]) for column in columns]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    advantages = np.array([item.advantage or 0.0 for item in items])
    is_step = np.array([item.logged["level"] == "step" for item in items])
    return Tokens(joined["new"], joined["old"], joined["sampled"], np.repeat(advantages, lengths),
                  np.repeat(is_step, lengths), np.repeat(np.arange(len(items)), lengths), joined.get("reference"),
                  joined.get("entropy"))


def check_update(logged: dict, tokens: Tokens, options: Options, findings: Findings) -> None:
    """Counts, clipping, each part of the loss and the total of one optimizer step."""
    where = f"update {logged['update']}"
    for name, found in equations.token_counts(tokens).items():
        findings.equal(f"count {name}", where, logged["counts"][name], found)
    for name, (least, most) in equations.clipped(tokens, options).items():
        findings.equal(name, where, logged[name], min(max(logged[name], least), most))
    parts, size = equations.loss_parts(tokens, options), float(np.abs(equations.surrogates(tokens, options)).mean())
    for name in PARTS:
        findings.close(name, where, logged[name], parts.get(name), size)
    findings.close("loss", where, logged["loss"], equations.total_loss(parts, options), size)
    findings.equal("skipped", where, logged["skipped"], logged["loss"] is None or logged["grad_norm"] is None)


def count_metrics(dump: Round) -> dict[str, Number]:
    """What was removed, kept, used and carried, as samples and as groups."""
    found: dict[str, Number] = {}
    for level in LEVELS:
        kept, groups = dump.survivors(level), dump.groups(level)
        removed = Counter(item.removed for group in groups for item in group)
        found |= {f"{level}/kept": sum(map(len, kept)), f"{level}/groups_kept": len(kept)}
        found |= {f"{level}/removed_{name}": removed[name] for name in REASONS[level]}
        gone = [{item.removed for item in group} & set(GROUP_REASONS[level]) for group in groups]
        counts = Counter(why for reasons in gone for why in reasons)
        empty = sum({item.removed for item in group} <= set(REASONS[level]) for group in groups)
        counts[GROUP_REASONS[level][0]] += empty  # nothing is left that could bear the group's reason
        found |= {f"{level}/removed_{name}": counts[name] for name in GROUP_REASONS[level]}
    used = {item.logged["group"] for item in dump.items if item.used and item.logged["level"] == "trajectory"}
    later = {item.logged["group"] for item in dump.items if item.logged["kept_for_later"]}
    return found | {"trajectory/groups_used": len(used), "trajectory/groups_carried": len(later)}


def rate_metrics(dump: Round) -> dict[str, Number]:
    """Accuracy, pass rates and lengths; what the sandbox lost is in no rate, and a rate over nothing is null."""
    def rate(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    drawn = dump.drawn("trajectory")
    judged, branches = ([(record, [outcome == "ok" for outcome in equations.outcomes(record)]) for record in records
                         if record.finish != "infrastructure"] for records in (drawn, dump.drawn("step")))
    clean = [record.correct is True for record, passed in judged if passed and all(passed)]
    failed = [record.correct is True for record, passed in judged if not all(passed)]
    failures = sum(record.finish == "failed" for record in drawn) if dump.options["branches"] else 0
    return {"trajectory/accuracy": rate([record.correct is True for record, _ in judged]),
            "trajectory/pass_rate": rate([one for _, passed in judged for one in passed]),
            "trajectory/code_ratio": rate([bool(passed) for _, passed in judged]),
            "trajectory/correct_if_all_ran": rate(clean), "trajectory/num_all_ran": len(clean),
            "trajectory/correct_if_some_failed": rate(failed), "trajectory/num_some_failed": len(failed),
            "trajectory/tokens": rate([len(record.response_ids) for record, _ in judged]),
            "trajectory/drawn": len(drawn),
            **{f"trajectory/finish_{finish}": sum(t.finish == finish for t in drawn) for finish in FINISHES},
            "step/failures": failures, "step/prompts": len(dump.groups("step")),
            "step/pass_rate": rate([any(passed) for _, passed in branches]),
            "step/tokens": rate([len(record.response_ids) for record, _ in branches])}


def policy_metrics(updates: list[dict], steps: list[Tokens]) -> dict[str, Number]:
    """Means over the round's optimizer steps, or over its trained tokens."""
    if not updates:
        return {"policy/updates": 0, "policy/loss": None, "policy/clip_fraction": None}
    new, old, sampled = (np.concatenate(columns) for columns in zip(*((t.new, t.old, t.sampled) for t in steps)))
    low, high = (sum(update[name] for update in updates) / len(new) for name in ("clipped_low", "clipped_high"))
    logged = {name: [update[name] for update in updates] for name in ("loss", "grad_norm")}
    found = {name: None if None in values else float(np.mean(values)) for name, values in logged.items()}
    found |= {"updates": len(updates), "skipped": sum(update["skipped"] for update in updates),
              "clipped_low": low, "clipped_high": high, "clip_fraction": low + high,
              "ratio": np.exp(new - old).mean(), "kl_old": equations.k3(new - old).mean(), "logprob": new.mean(),
              "sampler_gap": np.abs(old - sampled).mean(), "sampler_gap_max": np.abs(old - sampled).max()}
    return {f"policy/{name}": value for name, value in found.items()}


def report(dump: Round, findings: Findings) -> None:
    """One line for a round that agrees, else one for each kind of difference."""
    if dump.options.get("quirk"):
        print(f"round {dump.number}: made with --quirk {dump.options['quirk']}, which departs from the equations")
    for kind, first in findings.first.items():
        more = findings.count[kind] - 1
        print(f"round {dump.number}: {first}" + (f" (and {more} more)" if more else ""))
    if not findings.first:
        trusted = ", ".join(f"{count} {what}" for what, count in findings.on_trust.items() if count)
        num_trajectories, num_branches = (len(dump.drawn(level)) for level in LEVELS)
        print(f"round {dump.number}: {num_trajectories} trajectories, {num_branches} branches, "
              f"{len(dump.tokens['new'])} trained tokens, {len(dump.updates)} updates: {findings.checked} comparisons "
              "of groups, rewards, filters, Eq. 3, mask, Eq. 4 to 8 and metrics agree"
              + (f"; on trust: {trusted}" if trusted else ""))


if __name__ == "__main__":
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__)
            sys.exit(0)
        if len(sys.argv) != 2:
            raise ValueError("usage: python -m thor.audit DIR")
        sys.exit(0 if audit(Path(sys.argv[1])) else 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
