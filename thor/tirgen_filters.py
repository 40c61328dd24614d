r"""TIRGen's filters (method, section 2): which of the finished trajectories the cold start learns from.

Four stages in their stated order: format, code quality, difficulty, balance. Each is a pure function of records that
were graded before, and gives a reason where it drops one. Invariants: a trajectory is dropped once, by the first stage
that objects; what is chosen by chance depends on the seed and the problem's id alone, so never on the order of a file.
"""

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from thor.sampling import noise_key
from thor.template import CLOSING, code_of, cut_response
from thor.trajectory import OBSERVE, Trajectory

FORMAT, QUALITY, DIFFICULTY, BALANCE = STAGES = ("format", "code_quality", "difficulty", "balance")

NGRAM, MAX_REPEATS = 20, 20  # characters, and how often they may occur

HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # any odd number whose bits look random

CONTROL_FLOW = (ast.Import, ast.ImportFrom, ast.For, ast.AsyncFor, ast.While, ast.If, ast.IfExp, ast.Match, ast.Try,
                ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
                ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
# Each of these nodes is written with one of these words, so code without them need not be parsed.
CONTROL_WORD = re.compile(r"import|for|while|if|match|try|def|lambda|class")

CODE_OPENS = re.compile(r"^```py[^\n]*\n", re.MULTILINE)
DOLLAR_PAIR = re.compile(r"\$\$.+?\$\$|\$[\d.,]+\$(?!\d)|\$[^$\n]+\$(?![\w\\])", re.DOTALL)
PLAIN_DOLLAR = re.compile(r"\$(?!\d)")  # before a digit, one without a partner is money


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds of the stages; the defaults are the paper's."""

    max_trivial_share: float = 0.4  # of a trajectory's blocks; 1 is off
    min_calls: int = 1  # code blocks; 0 keeps trajectories without code
    one_call_share: float = 0.5  # of the trajectories with exactly one block; 1 is off
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_trivial_share", "one_call_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1 (off)")
        if self.min_calls < 0:
            raise ValueError(f"min_calls is {self.min_calls}; it must be 0 (off) or more")


@dataclass(frozen=True)
class Rejected:
    """A trajectory that a stage dropped, and why."""

    trajectory: Trajectory
    stage: str
    reason: str


@dataclass(frozen=True)
class Filtered:
    """What survived all stages, what survived all but the last, and what was dropped, each in the order it came in."""

    kept: list[Trajectory]
    unbalanced: list[Trajectory]
    rejected: list[Rejected]


def filter_tirgen(trajectories: list[Trajectory], settings: FilterSettings,
                  difficulty: dict[str, tuple[int, int]]) -> Filtered:
    """All stages in order. `difficulty` maps problem ids to (solved, drawn) samples of plain chain of thought.

    A problem that `difficulty` does not know passes that stage.
    """
    unbalanced, rejected = [], []
    for trajectory in trajectories:
        dropped = first_objection(trajectory, settings, difficulty)
        if dropped is None:
            unbalanced.append(trajectory)
        else:
            rejected.append(dropped)
    surplus = surplus_reasons(unbalanced, settings)
    kept = [trajectory for trajectory in unbalanced if _key(trajectory) not in surplus]
    rejected += [Rejected(trajectory, BALANCE, surplus[_key(trajectory)]) for trajectory in unbalanced
                 if _key(trajectory) in surplus]
    return Filtered(kept, unbalanced, rejected)


def first_objection(trajectory: Trajectory, settings: FilterSettings,
                    difficulty: dict[str, tuple[int, int]]) -> Rejected | None:
    """The first of the stages that judge a trajectory by itself which drops it, and why; None if all let it pass."""
    prose, codes = prose_and_codes(trajectory.text)
    if reason := format_reason(trajectory, prose, codes, settings.min_calls):
        return Rejected(trajectory, FORMAT, reason)
    if reason := quality_reason(codes, settings.max_trivial_share):
        return Rejected(trajectory, QUALITY, reason)
    if reason := difficulty_reason(difficulty.get(trajectory.id)):
        return Rejected(trajectory, DIFFICULTY, reason)
    return None


def format_reason(trajectory: Trajectory, prose: str, codes: list[str], min_calls: int = 1) -> str | None:
    """Stage 1. What is told first is what explains the rest: who never ended has no box, who has no box is wrong."""
    if trajectory.finish != "eos":
        return "not_ended"
    if not trajectory.boxed:
        return "no_box"
    if trajectory.correct is not True:
        return "no_gold_answer" if trajectory.correct is None else "wrong_answer"
    if not all(execution is not None and execution.passed for execution in trajectory.executions):
        return "failed_execution"
    if len(codes) < min_calls:
        return "no_code"
    if not dollars_balance(prose):
        return "unbalanced_dollars"
    if trajectory.thinking and not thinks_then_answers(trajectory.text):
        return "think_structure"
    written = "\n".join((prose, *codes))
    if "\N{REPLACEMENT CHARACTER}" in written:
        return "broken_characters"
    return "repetition" if repeats(written) else None


def quality_reason(codes: list[str], max_trivial_share: float) -> str | None:
    """Stage 2: too many of the blocks are trivial. Parsing is what this costs, so it ends as soon as that is decided."""
    allowed, num_trivial = max_trivial_share * len(codes), 0
    for num_seen, code in enumerate(codes, 1):
        num_trivial += is_trivial(code)
        if num_trivial > allowed:
            return "trivial_code"
        if num_trivial + len(codes) - num_seen <= allowed:
            return None
    return None


def difficulty_reason(solved_and_drawn: tuple[int, int] | None) -> str | None:
    """Stage 3: plain chain of thought solves the problem in every one of its samples."""
    solved, drawn = solved_and_drawn or (0, 0)
    return "solved_without_code" if solved == drawn > 0 else None


def surplus_reasons(trajectories: Iterable[Trajectory], settings: FilterSettings) -> dict[tuple[str, int], str]:
    """Stage 4: (id, sample) -> why it goes. One trajectory a problem stays, then a share of those with one block."""
    chosen: dict[str, Trajectory] = {}
    reasons: dict[tuple[str, int], str] = {}
    for trajectory in trajectories:
        rival = chosen.setdefault(trajectory.id, trajectory)
        first, second = sorted((rival, trajectory), key=lambda each: noise_key(settings.seed, "one", *_key(each)))
        chosen[trajectory.id] = first
        if rival is not trajectory:
            reasons[_key(second)] = "another_of_the_problem"
    one_call = sorted((trajectory for trajectory in chosen.values() if len(trajectory.executions) == 1),
                      key=lambda each: noise_key(settings.seed, "one call", each.id))
    for trajectory in one_call[math.ceil(settings.one_call_share * len(one_call)):]:
        reasons[_key(trajectory)] = "one_call"
    return reasons


def _key(trajectory: Trajectory) -> tuple[str, int]:
    return trajectory.id, trajectory.sample


def prose_and_codes(text: str) -> tuple[str, list[str]]:
    """A response without its outputs: the reasoning, and the programs of its closed blocks."""
    prose, codes = [], []
    for kind, piece in cut_response(text):
        if kind == OBSERVE:
            continue
        opening = CODE_OPENS.search(piece) if piece.endswith(CLOSING) else None
        prose.append(piece[:opening.start()] if opening else piece)
        if opening:
            codes.append(code_of(piece[opening.start():]))
    return "\n".join(prose), codes


def dollars_balance(prose: str) -> bool:
    r"""Whether every $ of the reasoning has its partner; \$, and an unpaired one before a digit, are money."""
    if "$" not in prose:
        return True
    return len(PLAIN_DOLLAR.findall(DOLLAR_PAIR.sub("", prose.replace("\\$", "")))) % 2 == 0


def thinks_then_answers(text: str) -> bool:
    """Exactly one closed <think> that holds all code; the prompt may have opened it."""
    opened = text.count("<think>")
    if text.count("</think>") != 1 or opened > 1 or opened and not text.lstrip().startswith("<think>"):
        return False
    return CODE_OPENS.search(text, text.index("</think>")) is None


def repeats(text: str) -> bool:
    """Whether some NGRAM characters in a row occur more than MAX_REPEATS times, overlapping ones counted.

    Equal n-grams have equal rolling hashes, and sorted, equal ones are neighbours.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(characters) - NGRAM + 1
    if count <= MAX_REPEATS:
        return False
    hashes = np.convolve(characters, HASH_FACTOR ** np.arange(NGRAM, dtype=np.uint64), "valid")
    hashes.sort()
    return bool((hashes[MAX_REPEATS:] == hashes[:-MAX_REPEATS]).any())


def is_trivial(code: str) -> bool:
    """No import and no control flow (loop, comprehension, conditional, function): a pocket calculator would do."""
    if not CONTROL_WORD.search(code):
        return True
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return not any(isinstance(node, CONTROL_FLOW) for node in ast.walk(tree))
