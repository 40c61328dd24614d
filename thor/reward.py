r"""What a solution is worth: the boxed answer, whether it is equivalent to the gold one, and the two rewards.

Equivalence is math-verify's (gold first, both wrapped as mathematics) behind guards for what it calls equal and is not.
Rulings: a tuple or interval is no list or set; lists have no order but equal length, a set of one is its element; units
must be the same, or one is left out; percent signs, number bases, ratios (3:4), variables and case must match; case
of words does not matter; a rounded decimal is not the fraction. Where in doubt, not equal. What cannot be parsed
is wrong and counted. Comparing can take for ever (9^{9^9}), so it runs in worker processes that end themselves; a
machine on which they do not start is an error, never a reward of 0.
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
from functools import lru_cache
from pathlib import Path

from thor.trajectory import Execution, Trajectory

BOX_OR_BRACE = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
INTEGER = re.compile(r"-?\d+")
GRADE_SECONDS = 5.0  # CPU time of one comparison, so that a busy machine does not change a verdict
WALL_FACTOR = 6  # and of wall-clock, should a comparison ever sleep
WORKER_BYTES = 4 << 30
MAX_KNOWN = 100_000  # verdicts remembered
MAX_CHARACTERS = 1000  # what is longer is no answer
NUMBER_TOLERANCE = 1e-14  # relative: room for binary fractions, not for rounding

# A number in groups of three: 1{,}000, 1\,000, 1 000, 11,\! 111. Plain commas are left to the library.
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,\s*\\!\s*|\\!,\s*|\{,\}|\\[,;: ]|~|\s)\d{3})+(?!\d)")

# What the library overlooks: both answers have it or neither.
MARKS = [re.compile(pattern) for pattern in (
    r"%|percent", r":", r"\.\.\.|\\[lcd]?dots", r"\\neq?(?![a-z])|\\not(?![a-z])|≠", r"mod",
    r"\\(?:sin|cos|tan|cot|sec|csc).*(?:circ|°)",
    r"\b(?:or|more|less|fewer|least|most|than|not|hundred|thousand|[mbtr]*illion|dozen|half)\b")]
# What it drops so that nothing is left to compare: then only the same text is the same answer.
DROPPED = [re.compile(pattern) for pattern in (
    r"\d\D*\\(?:text|mathrm|mbox|textrm)\{[^}]*\}\s*\d",  # 3 hours 20 minutes, 10 (mod 7)
    r"(?<![_^\d])\d+\s+\d", r"'|′", r"^(?:[<>≤≥]|\\[lg](?:eq?|t)(?![a-z]))")]  # 4 2 is 6, f' is f, \le 5 is 5
UNIT = re.compile(r"\\(?:text|mathrm|mbox|textrm)\{[~\s]*([^}]*?)\s*\}(?:\s*\^\s*\{?(\d)\}?)?"
                  r"|(?<=\d)\s*([A-Za-z]{2,})$")


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
        if max(len(gold), len(answer)) > MAX_CHARACTERS:
            return False
        gold, answer = normalise(gold), normalise(answer)
        if gold == answer or not gold or not answer:
            return gold == answer != ""
        if _words(gold) and _words(answer):
            return _words(gold) == _words(answer)
        if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):  # most pairs: no need to ask a worker
            return int(gold) == int(answer)
        return comparable(gold, answer) and self._verdict(gold, answer)

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


def normalise(text: str) -> str:
    """What two spellings of one answer share. Nothing here may make different answers equal."""
    text = text.strip().strip("$").strip().replace("−", "-").replace("\\varnothing", "\\emptyset")
    text = re.sub(r"(?<!\.)\.$", "", text)
    text = re.sub(r"\\boxed\s*\{(.*)\}$", r"\1", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?=[()\[\]|.\\])", "", text)
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # 3 1/2 would be read as a product
    text = re.sub(THOUSANDS, lambda number: re.sub(r"\D", "", number[0]), text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)e(\d+)(?![\w.])|(?<![\w.])(\d+\.\d+)e(-\d+)(?![\w.])",
                  r"\1\3\\times 10^{\2\4}", text)  # 7e37, 1.5e-3; but 2e-3 is 2e less 3
    text = re.sub(r"\\!|(?<!\\)\\[,;: ]", " ", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    if re.search(r"\d", text) and not re.search(r"[<>]|\\[lg]e", text):  # a list of solutions, not of conditions
        text = re.sub(r"\s*\\(?:text|mbox|textrm|mathrm)\{\s*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", "", text)
    return re.sub(r"^(?:\\(?:text|textbf|textrm|mathrm|mathbf)\{)?\s*\(?([A-Za-z])\)?\s*\}?$", r"\1", text)  # (B) is B


def _words(text: str) -> str | None:
    """The answer in lower case if it is a word or a phrase, bare or as text; None for mathematics."""
    found = re.fullmatch(r"(?:\\(?:text|textbf|textrm|mathrm|mbox)\{)?\s*([A-Za-z][A-Za-z .,'-]*[A-Za-z])\s*\}?", text)
    phrase = " ".join(found[1].lower().split()) if found else ""
    return phrase if re.search(r"[a-z]{2}", phrase) else None


def comparable(gold: str, answer: str) -> bool:
    """False where math-verify would find two answers equal that are not: the rulings of this file."""
    if any(bool(mark.search(gold)) != bool(mark.search(answer)) for mark in MARKS):
        return False
    if any(dropped.search(text) for dropped in DROPPED for text in (gold, answer)):
        return False
    if _base(gold) != _base(answer) or _is_tuple(gold) != _is_tuple(answer):
        return False
    if _unit(gold) and _unit(answer) and _unit(gold) != _unit(answer):
        return False
    return _same_length(_elements(gold), _elements(answer)) and _letters(gold, answer) == _letters(answer, gold)


def _base(text: str) -> str | None:
    """The base that a number is written in, as in 101_2."""
    found = re.fullmatch(r"[0-9A-Fa-f]+_\{?(\d+)\}?", text.replace(" ", ""))
    return found[1] if found else None


def _is_tuple(text: str) -> bool:
    """Whether it is written as (a, b), [a, b), …: a point or an interval, not a list or a set."""
    text = re.split(r"=|\\in\b", text)[-1].strip()
    return text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(_elements(text)) == 1 < len(_elements(text[1:-1]))


def _elements(text: str) -> list[str]:
    r"""The elements of a list: cut at commas outside brackets that separate no thousands; ± stands for two."""
    text = re.sub(r"(?<!\d)(\d{1,3})((?:,\d{3})+)(?!\d)", lambda found: found[0].replace(",", ""), text)
    text = text.strip().removeprefix("\\{").removesuffix("\\}")
    depth, elements = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements for _ in range(2 if "\\pm" in element else 1)]


def _same_length(gold: list[str], answer: list[str]) -> bool:
    """Whether two lists can be equal: the library drops what is there twice."""
    twice = (len(set(gold)) < len(gold) or len(set(answer)) < len(answer)) and "\\pm" not in "".join(gold + answer)
    return len(gold) == len(answer) and (not twice or sorted(gold) == sorted(answer))


def _unit(text: str) -> str:
    r"""The units after a number, "" where there is none: 5 km, 90^\circ, \$5, 5\text{ cm}^2."""
    found = [(match[1] or match[3] or "") + (match[2] or "") for match in UNIT.finditer(text) if match.start()]
    found += ["degree"] * ("circ" in text or "°" in text) + ["dollar"] * ("\\$" in text)
    return " ".join(re.sub(r"(?<=[a-z][a-z])(?:(?<=ch)es|s)$", "", unit.lower()) for unit in found)


def _letters(text: str, other: str) -> set[str]:
    """The variables of an answer, which the library takes for units (2h is 2) or whose case it drops; not those of a
    name before "=" that the other answer lacks, nor e and i, which may be numbers."""
    if "=" not in other:
        text = re.sub(r"(^|,)[^=,]*=", r"\1", text)
    if "\\in" not in other:
        text = re.sub(r"^.*\\in(?![a-z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|textrm|begin|end)\{[^}]*\}", "", text)
    text = re.sub(r"(?<=\d)\s+[A-Za-z]{2,}$", "", text)
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|sqrt|infty", "", text))) - {"e", "i"}


def _start_worker(seconds: float) -> subprocess.Popen:
    """A process that compares, one JSON line in and one out; its first line says that it can."""
    above = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(above), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "thor.reward", str(seconds)]
    worker = subprocess.Popen(command, env=environment, text=True, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
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
    from math_verify import parse, verify  # here, so that importing this module does not import sympy

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the library may have set its own
        _set_timers(seconds)
        gold, answer = (_expressions(parse(f"${question[side]}$", parsing_timeout=None)) for side in ("gold", "answer"))
        equal = bool(gold and answer) and verify(gold, answer, float_rounding=12, timeout_seconds=None)
        equal = equal and _close(gold[0], answer[0])
        _set_timers(0)
        print(json.dumps({"equal": bool(equal), "parsed": bool(gold and answer)}), flush=True)


def _set_timers(seconds: float) -> None:
    """End this process after so much CPU time, or WALL_FACTOR times that by the clock; 0 calls it off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)


def _expressions(parsed: list[object]) -> list[object]:
    """Without the strings that the library falls back on: of a fraction that it cannot read, only "\\frac{" is left."""
    return [expression for expression in parsed if not isinstance(expression, str)]


def _close(gold: object, answer: object) -> bool:
    """Whether two numbers agree to NUMBER_TOLERANCE; the library looks at decimals, and 1e-20 and 2e-20 have none."""
    if not (getattr(gold, "is_number", False) and getattr(answer, "is_number", False)):
        return True
    left, right = gold.evalf(30), answer.evalf(30)
    if not (left.is_finite and right.is_finite):
        return gold == answer
    return bool(abs(left - right) <= NUMBER_TOLERANCE * max(abs(left), abs(right)))


if __name__ == "__main__":
    work(float(sys.argv[1]))
