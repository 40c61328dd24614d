"""Does a candidate pass its tests? Two processes, each in a sandbox of its own, and what the candidate's says is data.

The candidate's process gets the calls that the tests will make and answers them; the tests' process takes those answers
as the values of these calls (code_channel.py). Invariant: expected values, tests and verdict are never in a process, or
in a sandbox whose memory a process came from, that runs a line of the candidate's; so all that it can forge is a value,
and the tests judge values. What the sandbox could not run is never judged.
"""

import asyncio
import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from tqdm import tqdm

from thor.sandbox import open_sandbox
from thor.trajectory import Execution

CHANNEL = Path(__file__).with_name("code_channel.py").read_text(encoding="utf-8")
OUTPUT_BYTES = 16 << 20  # of values, or of what a program prints: some tests want a megabyte
MAX_JUDGED = 16  # at a time: a sandbox has 8 workers, and what waits holds its tests' input in memory
MAX_ROUNDS = 32  # in which tests may make calls that depend on earlier answers

PASSED, NO_CODE, BROKEN, INFRASTRUCTURE = "passed", "no_code", "broken_tests", "infrastructure"
KINDS = (PASSED, NO_CODE, "syntax_error", "missing_function", "wrong_answer", "exception", "exited", "timeout",
         "memory", "output_limit", BROKEN, INFRASTRUCTURE)
LIMITS = {"timeout": "timeout", "memory": "memory", "output-limit": "output_limit", "infrastructure": INFRASTRUCTURE}


@dataclass(frozen=True)
class Suite:
    """Tests that call functions. `setup` runs before `tests`; `names` says under which name they call what.

    `names` are (name in the tests, name in the candidate) pairs, `Solution.f` for a method. `reference` is source that
    passes, or "" where there is none; then `calls`, as code_channel.Line writes them, should be known.
    """

    setup: str
    tests: str
    names: tuple[tuple[str, str], ...]
    reference: str = ""
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """One test of a whole program: what is on its standard input, and what it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate, one of KINDS, and a few words on it."""

    kind: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.kind == PASSED


class Judge:
    """Judges candidates; use as `async with Judge() as judge`. `cpu_seconds` is for all calls of a suite."""

    def __init__(self, cpu_seconds: float = 10.0, sandbox: str = "local", require: str = "best"):
        self.candidates, self.checks = (open_sandbox(sandbox, cpu_seconds, require, output_bytes=OUTPUT_BYTES)
                                        for _ in range(2))
        self._references: dict[Suite, asyncio.Task] = {}
        self._gate = asyncio.Semaphore(MAX_JUDGED)

    async def __aenter__(self) -> "Judge":
        await self.candidates.__aenter__()
        try:
            await self.checks.__aenter__()
        except BaseException:
            await self.candidates.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.candidates.__aexit__()
        await self.checks.__aexit__()

    async def judge(self, tests: tuple[Suite | Program, ...], source: str | None) -> Verdict:
        """The first failure, or passed; no source: `no_code`; the benchmark's own solution fails: `broken_tests`."""
        async with self._gate:
            judged = await self.own_solution(tests)
            if judged.passed and source is None:
                return Verdict(NO_CODE)
            for test in tests:
                if not judged.passed:
                    break
                run = self._run_suite if isinstance(test, Suite) else self._run_program
                judged = await run(test, source)
            return judged

    async def own_solution(self, tests: tuple[Suite | Program, ...]) -> Verdict:
        """Passed, unless tests have a reference that does not pass them."""
        for test in tests:
            judged = (await self.reference(test))[0] if isinstance(test, Suite) else Verdict(PASSED)
            if not judged.passed:
                return judged
        return Verdict(PASSED)

    async def _run_program(self, test: Program, source: str) -> Verdict:
        run = await self.candidates.run(f"{CHANNEL}\nfeed({source!r}, {test.stdin!r})\n")
        if run.outcome in LIMITS:
            return Verdict(LIMITS[run.outcome], run.error)
        if run.outcome == "error":
            syntax = run.error.partition(":")[0] in ("SyntaxError", "IndentationError", "TabError")
            return Verdict("syntax_error" if syntax else "exception", run.error)
        return Verdict(PASSED) if same_output(test.stdout, run.stdout) else Verdict("wrong_answer")

    async def _run_suite(self, suite: Suite, source: str) -> Verdict:
        """Answer the calls that are known; if the tests make another one, it becomes known, and all is run again."""
        _, calls = await self.reference(suite)
        for _ in range(MAX_ROUNDS):
            run = await self.candidates.run(f"{CHANNEL}\nserve({source!r}, {calls!r})\n")
            if run.outcome in LIMITS:
                return Verdict(LIMITS[run.outcome], run.error)
            judged, more = await self._check(suite, calls, run.stdout)
            if judged.kind != "call":
                return judged
            calls = more
        return Verdict("wrong_answer", f"its tests still call after {MAX_ROUNDS} rounds: its values lead them on")

    async def reference(self, suite: Suite) -> tuple[Verdict, list[str]]:
        """Whether the benchmark's own solution passes, and the calls that the tests make of it; worked out once."""
        if not suite.reference:
            return Verdict(PASSED), list(suite.calls)
        if suite not in self._references:
            self._references[suite] = asyncio.create_task(self._check(suite, None, ""))
        judged, calls = await self._references[suite]
        if judged.passed or judged.kind == INFRASTRUCTURE:
            return judged, calls
        return Verdict(BROKEN, f"the benchmark's own solution fails: {judged.kind} {judged.detail}"), []

    async def _check(self, suite: Suite, known: list[str] | None, answers: str) -> tuple[Verdict, list[str]]:
        """One run of the tests: the verdict, or kind "call" with the calls that they make up to one not known."""
        fields = {"setup": suite.setup, "tests": suite.tests, "names": dict(suite.names), "reference": suite.reference}
        run = await self.checks.run(f"{CHANNEL}\ncheck({fields!r}, {known!r}, {answers!r})\n")
        return read_verdict(run)


def read_verdict(run: Execution) -> tuple[Verdict, list[str]]:
    """What a process that ran tests printed. Without a verdict it was the candidate's values that it died of."""
    if run.outcome in LIMITS:
        return Verdict(LIMITS[run.outcome], f"{run.error} (while its values were compared)"), []
    if run.outcome != "ok":
        return Verdict("wrong_answer", f"{run.error} (while its values were compared)"), []
    found = json.loads(run.stdout)
    return Verdict(found["kind"], found["detail"]), found["calls"]


def same_output(expected: str, printed: str) -> bool:
    """Line by line, without the spaces around them; a line may also be the same decimal numbers written otherwise."""
    ours, theirs = (text.strip().split("\n") for text in (expected, printed))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(expected: str, printed: str) -> bool:
    if expected.strip() == printed.strip():
        return True
    try:
        return [Decimal(word) for word in expected.split()] == [Decimal(word) for word in printed.split()]
    except InvalidOperation:  # not numbers
        return False


async def judge_all(candidates: list[tuple[tuple[Suite | Program, ...], str | None]], judge: Judge) -> list[Verdict]:
    """The verdict on each (tests, source), in order, with a progress bar."""
    async with judge:
        with tqdm(total=len(candidates), desc="testing") as bar:
            async def one(tests: tuple[Suite | Program, ...], source: str | None) -> Verdict:
                verdict = await judge.judge(tests, source)
                bar.update()
                return verdict

            return list(await asyncio.gather(*(one(tests, source) for tests, source in candidates)))
