r"""What a solution is worth: the boxed answer, whether it is equivalent to the gold one, and the two rewards.

Equivalence is thor/answers.py's where the text decides, else math-verify's (gold first, both wrapped as mathematics).
Rulings: a tuple or interval is no list or set; lists have no order but equal length, a set of one is its element; units
must be the same, or one is left out; percent signs, number bases, ratios (3:4), variables and case must match; case
of words does not matter; a rounded decimal is not the fraction. Where in doubt, not equal. What cannot be parsed
is wrong and counted. Comparing can take for ever (9^{9^9}), so it runs in worker processes that end themselves; a
machine on which they do not start is an error, never a reward of 0.
"""

import asyncio
import atexit
import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from thor.answers import question
from thor.trajectory import Execution, Trajectory

BOX_OR_BRACE = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)  # of more backslashes, pairs go by themselves
GRADE_SECONDS = 5.0  # CPU time of one comparison, so that a busy machine does not change a verdict
WALL_FACTOR = 6  # and of wall-clock, should a comparison ever sleep
WORKER_BYTES = 4 << 30
MAX_KNOWN = 100_000  # verdicts remembered
NUMBER_TOLERANCE = 1e-14  # relative: room for binary fractions, not for rounding
NOISE = 1e-60  # relative: what sympy may leave of an exact 0, for which it computes 100 digits and more


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} whose braces balance; None without one, or if it is empty."""
    open_braces: list[tuple[bool, int]] = []  # (does it open a box, where its content starts)
    box = (0, 0)
    for token in BOX_OR_BRACE.finditer(text):
        if token[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            box = max(box, (start, token.start())) if is_box else box
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append((token[0] != "{", token.end()))
    return text[slice(*box)].strip() or None


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether two answers, as written in data or in \boxed{}, mean the same. From any thread."""
    return default_grader().equivalent(gold, answer)


async def grade(trajectory: Trajectory) -> bool:
    """Whether the boxed answer is equivalent to the gold one; no box is wrong. In a thread: decoding goes on."""
    return trajectory.boxed is not None and await asyncio.to_thread(equivalent, trajectory.answer, trajectory.boxed)


def trajectory_reward(trajectory: Trajectory) -> float:
    """R of Eq. 3: 1 if the boxed answer was graded equivalent to the gold one, else 0."""
    return float(trajectory.correct is True)


def step_reward(execution: Execution) -> float | None:
    """R' of the step level (method, section 4.2): 1 if the code passed, else 0; None where the sandbox failed."""
    return None if execution.outcome == "infrastructure" else float(execution.passed)


@dataclass
class GraderCounts:
    """What a grader did: comparisons, those with a side that could not be parsed, those out of time or memory."""

    graded: int = 0
    unparsed: int = 0
    timeouts: int = 0


class Grader:
    """Compares answers in worker processes; thread-safe, workers are started when first needed."""

    def __init__(self, num_workers: int = 2, seconds: float = GRADE_SECONDS):
        if num_workers < 1 or seconds <= 0:
            raise ValueError(f"a grader needs workers and time, got {num_workers} workers and {seconds} s")
        self.seconds, self.counts = seconds, GraderCounts()
        self._workers: queue.Queue[subprocess.Popen | None] = queue.Queue()
        self._verdict = lru_cache(MAX_KNOWN)(self._ask)
        self._lock = threading.Lock()
        for _ in range(num_workers):
            self._workers.put(None)

    def equivalent(self, gold: str, answer: str) -> bool:
        """Whether `answer` means what `gold` means."""
        asked = question(gold, answer)
        return asked if isinstance(asked, bool) else self._verdict(*asked)

    def _ask(self, gold: str, answer: str) -> bool:
        """One question to one worker. A worker that does not answer has ended itself and is replaced."""
        worker, reply = self._workers.get(), None
        try:
            if worker is None or worker.poll() is not None:
                worker = _start_worker(self.seconds)
            reply = _exchange(worker, {"gold": gold, "answer": answer})
        finally:
            if reply is None and worker is not None:  # or we are interrupted: its reply would meet the next question
                _end_worker(worker)
            self._workers.put(worker)
        with self._lock:
            self.counts.graded += 1
            self.counts.timeouts += reply is None
            self.counts.unparsed += reply is not None and not reply["parsed"]
        return reply is not None and reply["equal"]

    def close(self) -> None:
        """End the workers that nobody waits for; a later question starts them again."""
        for _ in range(self._workers.qsize()):
            worker = self._workers.get()
            if worker is not None:
                _end_worker(worker)
            self._workers.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_default: list[Grader] = []
_default_lock = threading.Lock()


def default_grader() -> Grader:
    """The grader behind `equivalent`, made when first asked for and closed at exit."""
    with _default_lock:
        if not _default:
            _default.append(Grader())
            atexit.register(_default[0].close)
        return _default[0]


def _start_worker(seconds: float) -> subprocess.Popen:
    """A process that compares, one JSON line in and one out; its first line says that it can."""
    above = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(above), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "thor.reward", str(seconds)]
    worker = subprocess.Popen(command, env=environment, text=True, start_new_session=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if worker.stdout.readline() != "ready\n":
        _end_worker(worker)
        raise ValueError(f"the process that compares answers does not start; `{' '.join(command)}` says why")
    return worker


def _end_worker(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:
        pass  # the question that ended it is still in the buffer


def _exchange(worker: subprocess.Popen, question: dict[str, str]) -> dict[str, bool] | None:
    """The worker's reply, or None if it is gone."""
    try:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line.endswith("\n") else None


def work(seconds: float) -> None:
    """A worker's life. A timer's default action ends the process, also inside a computation that no signal handler
    could interrupt and when the asking process is gone; so a worker needs nobody to kill it."""
    from math_verify import parse  # here, so that importing this module does not import sympy

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the library may have set its own
        _set_timers(seconds)
        gold, answer = (_expressions(parse(f"${asked[side]}$", parsing_timeout=None)) for side in ("gold", "answer"))
        equal = bool(gold and answer) and _same(gold[0], answer[0])
        _set_timers(0)
        print(json.dumps({"equal": equal, "parsed": bool(gold and answer)}), flush=True)


def _set_timers(seconds: float) -> None:
    """End this process after so much CPU time, or WALL_FACTOR times that by the clock; 0 calls it off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)


def _expressions(parsed: list[object]) -> list[object]:
    """Without the strings that the library falls back on: of a fraction that it cannot read, only "\\frac{" is left."""
    return [expression for expression in parsed if not isinstance(expression, str)]


def _same(gold: object, answer: object) -> bool:
    """Whether two expressions are equal: complex constants by value, everything else as the library finds."""
    from math_verify import verify
    from sympy import Expr, I, S

    if isinstance(gold, Expr) and isinstance(answer, Expr):
        variables = gold.free_symbols | answer.free_symbols
        if {variable.name for variable in variables} == {"i"}:  # next to other variables it is an index
            return _close_parts(*(side.subs({i: I for i in variables}) for side in (gold, answer)))
    if S.EmptySet in (gold, answer):  # also what [5, 2] is read as
        return False
    return bool(verify(gold, answer, float_rounding=12, timeout_seconds=None)) and _close(gold, answer)


def _close_parts(gold: object, answer: object) -> bool:
    """Whether two complex constants are the same number: part by part as in _close if one has a decimal point, else
    because nothing is left of their difference in 30 digits."""
    from sympy import Float

    if not (gold.evalf(30).is_finite and answer.evalf(30).is_finite):
        return False
    if gold.has(Float) or answer.has(Float):
        return all(_close_numbers(*parts) for parts in zip(gold.as_real_imag(), answer.as_real_imag()))
    left, size = abs((gold - answer).evalf(30)), max(abs(gold.evalf(30)), abs(answer.evalf(30)))
    return bool(left <= NOISE * size)


def _close(gold: object, answer: object) -> bool:
    """Whether the numbers of two answers agree to NUMBER_TOLERANCE; the library looks at decimals, and 1e-20 and 2e-20
    have none."""
    left, right = _numbers(gold), _numbers(answer)
    if len(left) != len(right):
        return True
    return all(any(_close_numbers(one, other) for other in right) for one in left) and all(
        any(_close_numbers(one, other) for one in left) for other in right)


def _numbers(answer: object) -> list[object]:
    """The number that an answer is, or those that a list, tuple, interval or matrix holds."""
    from sympy import MatrixBase, Set, Tuple

    if isinstance(answer, (MatrixBase, Set, Tuple)):
        parts = answer.flat() if isinstance(answer, MatrixBase) else answer.args
        return [number for part in parts for number in _numbers(part)]
    return [answer] if getattr(answer, "is_number", False) else []


def _close_numbers(gold: object, answer: object) -> bool:
    """Whether two numbers agree to NUMBER_TOLERANCE."""
    left, right = gold.evalf(30), answer.evalf(30)
    if not (left.is_finite and right.is_finite):
        return gold == answer
    return bool(abs(left - right) <= NUMBER_TOLERANCE * max(abs(left), abs(right)))


if __name__ == "__main__":
    work(float(sys.argv[1]))
