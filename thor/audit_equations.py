"""Section 4 of the method once more, in NumPy and float64, for the check of dumped rounds (thor/audit.py).

Rewards, reasons to remove, Eq. 3, the mask m, and Eq. 4 to 8, written from the equations and sharing no code with the
trainer. Invariant: everything here is a function of a trajectory, of numbers, and of the run's options alone.
"""

from dataclasses import dataclass

import numpy as np

from thor.trajectory import Trajectory

STD_EPSILON = 1e-6  # ε of Eq. 3
EDGE = 1e-6  # relative: so near its limit a float32 ratio may count as clipped or not

REASONS = {"trajectory": ("infrastructure", "failed_execution", "short", "no_box_at_end"),
           "step": ("infrastructure", "eos_before_code", "no_closed_block")}
GROUP_REASONS = {"trajectory": ("groups_too_few", "groups_below_two", "groups_equal_rewards"),
                 "step": ("groups_below_two", "groups_equal_rewards")}
UNDECIDED = "no_box_at_end or none"  # where a box stands needs the tokenizer

Options = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one optimizer step, [T] each; entropy and reference where they were computed."""

    new: np.ndarray
    old: np.ndarray
    sampled: np.ndarray
    advantage: np.ndarray
    is_step: np.ndarray
    sequence: np.ndarray
    reference: np.ndarray | None = None
    entropy: np.ndarray | None = None


def outcomes(record: Trajectory) -> list[str]:
    """What became of the code that ran."""
    return [run.outcome for run in record.executions if run is not None]


def lost(record: Trajectory) -> bool:
    """Whether the sandbox itself failed: nobody's reward."""
    return record.finish == "infrastructure" or "infrastructure" in outcomes(record)


def trajectory_reward(record: Trajectory) -> float | None:
    """R of section 4.1."""
    return None if lost(record) else float(record.correct is True)


def branch_reward(branch: Trajectory) -> float | None:
    """R' of section 4.2: no code that ran, no reward."""
    return None if lost(branch) or not outcomes(branch) else float(outcomes(branch)[0] == "ok")


def trajectory_reason(record: Trajectory, options: Options) -> str | None:
    """The first filter of section 4.1 that removes a trajectory; UNDECIDED if only the tokenizer could tell."""
    length, limit = len(trained_places(record)), options["box_within_last"]
    if lost(record):
        return "infrastructure"
    if any(outcome != "ok" for outcome in outcomes(record)):
        return "failed_execution"
    if length < options["min_response_tokens"]:
        return "short"
    if limit and record.boxed is None:
        return "no_box_at_end"
    return UNDECIDED if limit and length > limit else None


def branch_reason(branch: Trajectory) -> str | None:
    """The first filter of section 4.2 that removes a branch."""
    if lost(branch):
        return "infrastructure"
    if outcomes(branch):
        return None
    return "eos_before_code" if branch.finish == "eos" else "no_closed_block"


def group_reason(level: str, rewards: list[float], num_drawn: int, options: Options) -> str | None:
    """Why a group goes, given the rewards of its survivors."""
    if level == "trajectory" and (not rewards or len(rewards) < options["min_group_fraction"] * num_drawn):
        return "groups_too_few"
    if len(rewards) < 2:
        return "groups_below_two"
    return "groups_equal_rewards" if min(rewards) == max(rewards) else None


def advantages(rewards: list[float], options: Options) -> list[float]:
    """Eq. 3: (R − mean R) / (std R + ε), std with Bessel's correction; without the division under no_std."""
    centred = np.array(rewards) - np.mean(rewards)
    return (centred if options["no_std"] else centred / (np.std(rewards, ddof=1) + STD_EPSILON)).tolist()


def trained_places(record: Trajectory, code_only: bool = False) -> list[int]:
    """m of Eq. 5, as positions in prompt and response: think and act tokens; for code_only branches act alone."""
    kinds = ("act",) if code_only else ("think", "act")
    return [len(record.prompt_ids) + place for span in record.spans if span.kind in kinds
            for place in range(span.start, span.end)]


def fork_of(parent: Trajectory, suffix_tokens: int) -> int | None:
    """Where r_pre of a failed last step ends (section 4.2): L_suf tokens before its code, not past the start of r^t."""
    if parent.finish != "failed":
        return None
    act = max(span.start for span in parent.spans if span.kind == "act")
    start = max((span.end for span in parent.spans if span.kind == "observe"), default=0)
    return max(start, act - suffix_tokens)


def ratios(tokens: Tokens, options: Options) -> np.ndarray:
    """Eq. 4: ρ of each token; with sequence_ratio the geometric mean over its sequence."""
    log_ratio = tokens.new - tokens.old
    if options["sequence_ratio"]:
        sums, sizes = np.bincount(tokens.sequence, log_ratio), np.bincount(tokens.sequence)
        log_ratio = (sums / np.maximum(sizes, 1))[tokens.sequence]
    return np.exp(log_ratio)


def surrogates(tokens: Tokens, options: Options) -> np.ndarray:
    """s of Eq. 5 for each token, times the truncated weight of the gap between sampler and trainer, if that is on."""
    ratio, advantage = ratios(tokens, options), tokens.advantage
    s = np.minimum(ratio * advantage, np.clip(ratio, 1 - options["clip_low"], 1 + options["clip_high"]) * advantage)
    if options["dual_clip"]:
        s = np.where(advantage < 0, np.maximum(s, options["dual_clip"] * advantage), s)
    if options["importance_cap"]:
        s = s * np.minimum(np.exp(tokens.old - tokens.sampled), options["importance_cap"])
    return s


def loss_parts(tokens: Tokens, options: Options) -> dict[str, float]:
    """Eq. 5 and Eq. 6 of each level, or of their union under joint; KL and entropy where they are on."""
    s, positive, step = surrogates(tokens, options), tokens.advantage > 0, tokens.is_step
    levels = {"joint": np.ones_like(step)} if options["joint"] else {"trajectory": ~step, "step": step}
    parts = {}
    for level, chosen in levels.items():
        parts[f"{level}_grpo"] = -mean(s[chosen])  # Eq. 5
        parts[f"{level}_nll"] = -mean(tokens.new[chosen & positive])  # Eq. 6
    if options["kl_weight"]:
        parts["kl"] = mean(k3(tokens.reference - tokens.new))
    if options["entropy_weight"]:
        parts["entropy"] = mean(tokens.entropy)
    return parts


def total_loss(parts: dict[str, float], options: Options) -> float:
    """Eq. 7 and 8: L = L_traj + λ L_step, each L_GRPO + α L_NLL; and what is optional."""
    def level(name: str) -> float:
        return parts[f"{name}_grpo"] + options["nll_weight"] * parts[f"{name}_nll"]  # Eq. 7

    loss = level("joint") if options["joint"] else level("trajectory") + options["step_weight"] * level("step")  # Eq. 8
    return loss + options["kl_weight"] * parts.get("kl", 0.0) - options["entropy_weight"] * parts.get("entropy", 0.0)


def token_counts(tokens: Tokens) -> dict[str, int]:
    """Σ|τ_i| of Eq. 5 and of Eq. 6, of each level."""
    positive, step = tokens.advantage > 0, tokens.is_step
    chosen = {"trajectory_tokens": ~step, "trajectory_positive": ~step & positive,
              "step_tokens": step, "step_positive": step & positive}
    return {name: int(flags.sum()) for name, flags in chosen.items()}


def clipped(tokens: Tokens, options: Options) -> dict[str, tuple[int, int]]:
    """How many tokens' terms the clip changes, at least and at most: at its edge float32 may be on either side."""
    ratio = ratios(tokens, options)
    beyond = {"clipped_high": np.where(tokens.advantage > 0, ratio / (1 + options["clip_high"]), 0.0),
              "clipped_low": np.where(tokens.advantage < 0, (1 - options["clip_low"]) / ratio, 0.0)}
    return {name: (int((excess > 1 + EDGE).sum()), int((excess > 1 - EDGE).sum())) for name, excess in beyond.items()}


def k3(log_ratio: np.ndarray) -> np.ndarray:
    """Estimate of KL(p ‖ q) from tokens of p: r − 1 − log r with r = q / p."""
    return np.exp(log_ratio) - 1 - log_ratio


def mean(values: np.ndarray) -> float:
    """Σ / n; an empty set gives 0 (section 4.1)."""
    return float(values.mean()) if len(values) else 0.0
