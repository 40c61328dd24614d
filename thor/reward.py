r"""What a solution is worth: the boxed answer, whether it is equivalent to the gold one, and the two rewards.

Equivalence is math-verify's (gold first, both wrapped as mathematics), behind guards for what it calls equal and is not.
Rulings: a tuple or interval is no list or set, lists have equal length; a percent sign, a number base and differing units
must match; a rounded decimal is not the fraction; case of text does not matter. What cannot be parsed is wrong and
counted, never an exception. Comparing can take for ever (9^{9^9}), so it runs in worker processes that end themselves.
"""

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
from pathlib import Path

from thor.trajectory import Execution, Trajectory

BOX = re.compile(r"\\boxed\s*\{")
GRADE_SECONDS = 5.0  # wall-clock of one comparison
WORKER_BYTES = 4 << 30


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} whose braces balance; None without one, or if it is empty."""
    for opening in reversed(list(BOX.finditer(text))):
        end = _closing_brace(text, opening.end())
        if end is not None:
            return text[opening.end():end].strip() or None
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """The offset of the brace that closes the one before `start`; an escaped brace is a character like any other."""
    depth, escaped = 1, False
    for offset in range(start, len(text)):
        character = text[offset]
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return offset
        escaped = character == "\\" and not escaped
    return None


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether two answers, as written in data or in \boxed{}, mean the same. From any thread; at most GRADE_SECONDS."""
    return default_grader().equivalent(gold, answer)


def trajectory_reward(trajectory: Trajectory) -> float:
    """R of Eq. 3: 1 if the boxed answer was graded equivalent to the gold one, else 0."""
    return float(trajectory.correct is True)


def step_reward(execution: Execution) -> float | None:
    """R' of the step level (method, section 4.2): 1 if the code passed, else 0; None where the sandbox itself failed."""
    return None if execution.outcome == "infrastructure" else float(execution.passed)


@dataclass
class GraderCounts:
    """What a grader did: comparisons by a worker, those with a side that could not be parsed, those out of time or memory."""

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
        self._known: dict[tuple[str, str], bool] = {}
        self._lock = threading.Lock()
        for _ in range(num_workers):
            self._workers.put(None)

    def equivalent(self, gold: str, answer: str) -> bool:
        """Whether `answer` means what `gold` means."""
        gold, answer = normalise(gold), normalise(answer)
        if not gold or not answer or not comparable(gold, answer):
            return False
        if gold == answer:
            return True
        if (gold, answer) not in self._known:
            self._known[gold, answer] = self._ask(gold, answer)
        return self._known[gold, answer]

    def _ask(self, gold: str, answer: str) -> bool:
        """One question to one worker. A worker that does not answer has ended itself and is replaced."""
        worker = self._workers.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = _start_worker(self.seconds)
            reply = _exchange(worker, {"gold": gold, "answer": answer})
            if reply is None:
                worker.wait()
        finally:
            self._workers.put(worker)
        with self._lock:
            self.counts.graded += 1
            self.counts.timeouts += reply is None
            self.counts.unparsed += reply is not None and not reply["parsed"]
        return reply is not None and reply["equal"]

    def close(self) -> None:
        """End the workers."""
        while not self._workers.empty():
            worker = self._workers.get()
            if worker is not None:
                worker.kill()
                worker.wait()
                worker.stdin.close()
                worker.stdout.close()

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


def normalise(text: str) -> str:
    """What two spellings of one answer share. Nothing here may make different answers equal."""
    text = text.strip().strip("$").strip().rstrip(".").replace("−", "-").replace("\\!", "")
    text = re.sub(r"\\(?:left|right)(?=[()\[\]|.\\])", "", text)
    text = re.sub(r"\\boxed\s*\{(.*)\}$", r"\1", text)
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # 3 1/2 would be read as a product
    return re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", text)


def comparable(gold: str, answer: str) -> bool:
    """False where math-verify would find two answers equal that are not: the rulings of this file."""
    return all(look(gold) == look(answer) for look in (_has_percent, _base, _is_tuple, _num_elements)) and (
        not _unit(gold) or not _unit(answer) or _unit(gold) == _unit(answer))


def _has_percent(text: str) -> bool:
    return "%" in text or "percent" in text


def _base(text: str) -> str | None:
    """The base that a number is written in, as in 101_2."""
    found = re.fullmatch(r"[0-9A-Fa-f]+_\{?(\d+)\}?", text.replace(" ", ""))
    return found[1] if found else None


def _is_tuple(text: str) -> bool:
    """Whether it is written as (a, b), [a, b), …: a point or an interval, not a list or a set."""
    text = re.split(r"=|\\in\b", text)[-1].strip()
    return text[:1] in ("(", "[") and text[-1:] in (")", "]") and _num_elements(text[1:-1]) > 1


def _num_elements(text: str) -> int:
    r"""How many elements a list has: commas outside brackets that separate no thousands. With \pm: not known, 0."""
    if "\\pm" in text or "\\cup" in text or "matrix" in text:
        return 0
    text = re.sub(r"(?<!\d)(\d{1,3})((?:,\d{3})+)(?!\d)", lambda found: found[0].replace(",", ""), text)
    inner = text.removeprefix("\\{").removesuffix("\\}")
    depth, count = 0, 1
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        count += character == "," and depth == 0
    return count


def _unit(text: str) -> str:
    """A unit written as text after a number, "" where there is none."""
    found = re.search(r"\d[^a-zA-Z]*\\(?:text|mathrm|mbox)\{\s*([^}]*?)\s*\}", text)
    return found[1].rstrip("s") if found else ""


def _start_worker(seconds: float) -> subprocess.Popen:
    """A process that compares, one JSON line in and one out."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "thor.reward", str(seconds)], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


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
    """A worker's life. The alarm's default action ends the process, also inside a computation that no signal handler
    could interrupt and when the asking process is gone; so a worker needs nobody to kill it."""
    from math_verify import parse, verify  # here, so that importing this module does not import sympy

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    for line in sys.stdin:
        question = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        gold, answer = (parse(f"${question[side]}$", parsing_timeout=None) for side in ("gold", "answer"))
        equal = bool(gold and answer) and verify(gold, answer, float_rounding=12, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": bool(equal), "parsed": bool(gold and answer)}), flush=True)


if __name__ == "__main__":
    work(float(sys.argv[1]))
