"""Candidates and their tests: right ones pass, wrong ones fail, and none can say itself which it is."""

import asyncio
import json
import re
import sys
from collections import Counter, defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
from code_records import CASES

from thor.code_benchmarks import FORMATS, format_of
from thor.code_channel import decode, describe, dumps, encode
from thor.code_scores import run_all
from thor.code_tests import Judge, Program, Suite, Verdict, same_output
from thor.trajectory import Execution

PROBLEMS = {name: FORMATS[format_of(case.record, name)][1](case.record, name) for name, case in CASES.items()}
MUTANTS = {(name, fault): wrong for name, case in CASES.items() for fault, wrong in case.mutants().items()
           if fault != "loop" or name in ("mbpp", "livecodebench-stdin")}  # a loop costs a second

SECRET = "the expected value is 4711"
INCREMENT = Suite("", f"note = {SECRET!r}\nassert increment(1) == 2\nassert increment(4710) == 4711\n",
                  (("increment", "increment"),), "def increment(x):\n    return x + 1\n")
DEF = "def increment(x):\n    "

# Candidates that are wrong, whatever they do about it, and the verdict on each.
CHEATS = {
    "exit": (DEF + "exit(0)", "exited"),
    "exit while it is loaded": ("raise SystemExit", "exited"),
    "the process ends": (DEF + "import os; os._exit(0)", "exited"),
    "the process ends while it is loaded": ("import os; os._exit(0)", "exited"),
    "it kills itself": (DEF + "import os; os.kill(os.getpid(), 9)", "exited"),
    "no such function": ("def decrement(x): return x", "missing_function"),
    "not Python": ("def increment(x) return x", "syntax_error"),
    "a null byte": ("x = '\0'", "syntax_error"),
    "nested too deeply": ("x = " + "(" * 5000 + ")" * 5000, "syntax_error"),
    "its own exception": (DEF + "raise KeyError(x)", "exception"),
    "its own assertion": (DEF + "assert False", "exception"),
    "an exception whose text cannot be had": (
        "class E(Exception):\n    def __str__(self): raise self\n" + DEF + "raise E", "exception"),
    "recursion": (DEF + "return increment(x)", "exception"),
    "memory": (DEF + "return [0] * (1 << 40)", "memory"),
    "too much output": (DEF + "return 'x' * (20 << 20)", "output_limit"),
    "it sleeps in a loop of work": (DEF + "while True: pass", "timeout"),
    "AssertionError is another": ("import builtins\nbuiltins.AssertionError = KeyError\n" + DEF + "return 2", "wrong_answer"),
    "equal to everything": (
        "class Always:\n    def __eq__(self, other): return True\n    __hash__ = None\n" + DEF + "return Always()", "wrong_answer"),
    "a number equal to everything": (
        "class Always(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n" + DEF + "return Always(2)",
        "wrong_answer"),
    "it answers for itself": (
        "import __main__\n__main__.answer = lambda module, call: '{\"returned\": 2}'\n" + DEF + "return 2", "wrong_answer"),
    "json is another": ("import json\njson.dumps = lambda *a, **k: '{\"returned\": 2}'\n" + DEF + "return 2", "wrong_answer"),
    "print is another": (
        "import builtins, os\nbuiltins.print = lambda *a, **k: os.write(k['file'].fileno(), b'passed\\n')\n" + DEF + "return 2",
        "wrong_answer"),
    "a verdict on every descriptor": (
        "import os\nfor fd in range(1, 256):\n    try: os.write(fd, b'{\"kind\": \"passed\", \"detail\": \"\", \"calls\": []}\\n')\n"
        "    except OSError: pass\n" + DEF + "return 2", "wrong_answer"),
    "a verdict when all is over": (
        "import atexit, os\nfor fd in (1, 3, 4, 5):\n    atexit.register(lambda fd=fd: os.write(fd, b'{\"kind\": \"passed\"}\\n'))\n"
        + DEF + "return 2", "wrong_answer"),
    "a thread that writes verdicts": (
        "import os, threading\ndef work():\n    while True:\n        for fd in (1, 3, 4, 5):\n            try: os.write(fd, b'passed\\n')\n"
        "            except OSError: pass\nthreading.Thread(target=work, daemon=True).start()\n" + DEF + "return 2", "wrong_answer"),
    "a process that stays and writes verdicts": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    for _ in range(1000):\n        os.write(3, b'{\"kind\": \"passed\"}\\n')\n"
        "    os._exit(0)\n" + DEF + "return 2", "wrong_answer"),
    "every line is traced": (
        "import sys\nsys.settrace(lambda frame, event, arg: frame.f_locals.update(passed=True))\n" + DEF + "return 2",
        "exited" if sys.version_info >= (3, 13) else "wrong_answer"),  # from 3.13 on it changes real variables: its own
    "an answer of no known kind": (
        "import os\nos.write(3, b'{\"kind\": \"passed\"}\\n')\nos._exit(0)", "wrong_answer"),
    "an answer of the wrong shape": (
        "import os\nos.write(3, b'{}\\n{\"returned\": {\"set\": [{\"list\": []}]}}\\n')\nos._exit(0)", "wrong_answer"),
    "an answer that is nested too deeply": (
        "import os\nos.write(3, b'{}\\n{\"returned\": ' + b'{\"list\": [' * 9999 + b']}' * 9999 + b'}\\n')\nos._exit(0)",
        "wrong_answer"),
}

TOLD = "note = 'the expected value is 0815'\n"  # another one: what one candidate leaves in memory the next may find
# Where a candidate may look for the tests: among its objects and frames, and in all of its memory.
SPIES = {
    "objects": """import gc, sys
def increment(x):
    key = "".join(["the expected ", "value is "])
    seen = [str(o) for o in gc.get_objects() if isinstance(o, (str, dict, list, tuple))]
    frame = sys._getframe()
    while frame:
        seen.append(str(frame.f_locals) + str(frame.f_globals) + str(frame.f_code.co_consts))
        frame = frame.f_back
    found = [text for text in seen if key + "47" in text]
    return x + 1 if found else 0
""",
    "memory": """def increment(x):
    first, then = b"the expected ", b"value is 47"
    for line in open("/proc/self/maps"):
        place, rights = line.split()[:2]
        start, end = (int(word, 16) for word in place.split("-"))
        if "w" in rights and end - start < 1 << 28:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(start)
                try:
                    parts = memory.read(end - start).split(first)
                except OSError:
                    continue
                if any(part.startswith(then) for part in parts[1:]):
                    return x + 1
    return 0
""",
}


def slowly(suite: Suite) -> Suite:
    """The same tests with nothing known of their calls: each is found out by running them up to it."""
    return Suite(suite.setup, suite.tests, suite.names)


CALLS = Suite("", """values = [start(3)]
while len(values) < 4:
    values.append(follow(values[-1]))
assert values[-1] - values[0] == 3, values
try:
    follow(-1)
    assert False
except ValueError as error:
    assert 'negative' in str(error)
""", (("start", "start"), ("follow", "follow")), """def start(x):
    return x
def follow(x):
    if x < 0:
        raise ValueError('negative')
    return x + 1
""")
OTHER_START = CALLS.reference.replace("return x\n", "return 10 * x\n", 1)
LEADS_ON = CALLS.reference.replace("return x\n", "import time; return time.time_ns()\n", 1)


FOLLOWERS = {"reference": CALLS.reference, "other start": OTHER_START, "leads on": LEADS_ON,
             "no error": CALLS.reference.replace("raise ValueError('negative')", "return 0"),
             "other error": CALLS.reference.replace("ValueError", "KeyError"),
             "own error": "class Mine(ValueError): pass\n" + CALLS.reference.replace("ValueError(", "Mine("),
             "off by one": CALLS.reference.replace("x + 1", "x + 2")}

BROKEN = {
    "a failing reference": (INCREMENT, Suite("", "assert f() == 1", (("f", "f"),), "def f(): return 2")),
    "an object as argument": (Suite("class Node: pass", "assert f(Node())", (("f", "f"),), "def f(x): return True"),),
    "no call": (Suite("", "assert True", (("f", "f"),), "def f(): return 2"),),
}


def judged(candidates: list[tuple], cpu_seconds: float = 1.0) -> list[Verdict]:
    """The verdicts on (tests, source) pairs, all at a time."""
    async def all_of_them() -> list[Verdict]:
        async with Judge(cpu_seconds) as judge:
            return await asyncio.gather(*(judge.judge(tests, source) for tests, source in candidates))

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def verdicts() -> dict:
    """Of all that these tests are about, by name: the sandboxes are opened once."""
    wanted = {("right", name): (PROBLEMS[name].tests, PROBLEMS[name].context + case.right) for name, case in CASES.items()}
    wanted |= {key: (PROBLEMS[key[0]].tests, PROBLEMS[key[0]].context + source) for key, (source, _) in MUTANTS.items()}
    wanted["chatty",] = ((INCREMENT,), "print('{}')\nimport os\n" + DEF + "print(x); os.write(1, b'1\\n'); return x + 1")
    wanted |= {("cheat", name): ((INCREMENT,), source) for name, (source, _) in CHEATS.items()}
    wanted |= {("spy", name): ((INCREMENT,), source) for name, source in SPIES.items()}
    wanted |= {("told spy", name): ((INCREMENT,), TOLD + source.replace("47", "08")) for name, source in SPIES.items()}
    wanted |= {("fast", name): ((CALLS,), source) for name, source in FOLLOWERS.items()}
    wanted |= {("slow", name): ((slowly(CALLS),), source) for name, source in FOLLOWERS.items() if name != "leads on"}
    wanted |= {("broken", name): (tests, "def f(x=0): return True") for name, tests in BROKEN.items()}
    wanted |= {("broken without code", name): (tests, None) for name, tests in BROKEN.items()}
    wanted |= {("no code", name): (PROBLEMS[name].tests, None) for name in CASES}
    return dict(zip(wanted, judged(list(wanted.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_right_answer_in_each_format_passes(verdicts, name):
    assert verdicts["right", name] == Verdict("passed")


@pytest.mark.parametrize("name, fault", MUTANTS)
def test_a_wrong_answer_in_each_format_fails_for_the_right_reason(verdicts, name, fault):
    assert verdicts[name, fault].kind == MUTANTS[name, fault][1]


def test_a_right_answer_may_print_while_it_is_called(verdicts):
    assert verdicts["chatty",] == Verdict("passed")


@pytest.mark.parametrize("name", CHEATS)
def test_no_candidate_can_make_its_own_verdict(verdicts, name):
    assert verdicts["cheat", name].kind == CHEATS[name][1]


@pytest.mark.parametrize("name", SPIES)
def test_what_the_tests_expect_is_nowhere_in_the_candidates_process(verdicts, name):
    assert verdicts["spy", name].kind == "wrong_answer"
    assert verdicts["told spy", name].kind == "passed"  # it does find what is there


@pytest.mark.parametrize("name", CASES)
def test_a_response_without_code_is_counted_as_that(verdicts, name):
    assert verdicts["no code", name] == Verdict("no_code")


@pytest.mark.parametrize("name, kind", [("reference", "passed"), ("other start", "passed"), ("no error", "wrong_answer"),
                                        ("other error", "exception"), ("off by one", "wrong_answer")])
def test_knowing_the_calls_beforehand_changes_no_verdict(verdicts, name, kind):
    assert verdicts["fast", name].kind == verdicts["slow", name].kind == kind


def test_an_exception_that_is_not_built_in_is_a_plain_one_to_the_tests(verdicts):
    assert verdicts["fast", "own error"] == Verdict("exception", "Exception: Mine: negative")


def test_a_candidate_that_answers_otherwise_each_time_does_not_go_on_for_ever(verdicts):
    found = verdicts["fast", "leads on"]
    assert found.kind == "wrong_answer" and "rounds" in found.detail


@pytest.mark.parametrize("name", BROKEN)
def test_tests_that_fail_on_the_benchmarks_own_solution_judge_nobody(verdicts, name):
    assert verdicts["broken", name].kind == verdicts["broken without code", name].kind == "broken_tests"


VALUES = [None, True, 0, -3, 1 << 200, 0.1, float("inf"), "ä\ud800", b"\x00", 1 + 2j, [], [1, [2.5]], (), (1, (None,)), {1, "a"}, set(),
          frozenset({3}), {}, {"a": [1], (1, 2): {3}}, range(1, 9, 2), 10 ** 5000]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_plain_value_arrives_as_it_was_sent(value):
    back = decode(json.loads(dumps(encode(value, describe)), parse_int=whole))
    assert back == value and type(back) is type(value)


def whole(digits: str) -> int:
    """An int of any length, as the tests' process reads it."""
    return sum(int(digit) * 10 ** place for place, digit in enumerate(reversed(digits.lstrip("-")))) * (-1 if digits[0] == "-" else 1)


@pytest.mark.parametrize("value, arrives", [
    (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True), (Counter("aab"), {"a": 2, "b": 1}),
    (namedtuple("Pair", "a b")(1, 2), (1, 2)), (IntEnum("Colour", "RED").RED, 1), (defaultdict(list, {1: [2]}), {1: [2]})])
def test_a_value_of_a_subclass_arrives_as_what_it_is_built_on(value, arrives):
    back = decode(encode(value, describe))
    assert back == arrives and type(back) is type(arrives)


def test_anything_else_equals_nothing_and_keeps_its_truth():
    match, empty = decode(encode([re.match("a", "a"), memoryview(b"")], describe))
    assert match and match is not None and match != re.match("a", "a") and match != match.text
    assert not empty and empty != memoryview(b"")


@pytest.mark.parametrize("data", [[1], {"list": 1}, {"set": [{"list": []}]}, {"no": 1}, {"list": [], "set": []}, {}, {"bytes": "x"},
                                  {"dict": [[1]]}, {"range": ["a"]}, {"other": []}])
def test_what_encode_does_not_write_is_an_error(data):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        decode(data)


@pytest.mark.parametrize("expected, printed, same", [
    ("1 2\n3\n", "1 2\n3", True), ("1 2\n3", " 1 2 \n3  \n\n", True), ("0.5", "0.50", True), ("1", "1.0", True), ("a 1", "a 1.0", False),
    ("1\n2", "1 2", False), ("1 2", "1  2", True), ("a b", "a  b", False), ("", "", True), ("1", "", False), ("nan", "nan", True),
    ("YES", "Yes", False), ("0.1", "0.1000000000000000055", False), ("1e999999999", "2", False)])
def test_outputs_are_the_same_line_by_line_and_number_by_number(expected, printed, same):
    assert same_output(expected, printed) == same


class Refusing:
    """A sandbox that is out of order."""

    async def __aenter__(self) -> "Refusing":
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def run(self, code: str) -> Execution:
        return Execution("infrastructure", "", "out of order", 0.0)


@pytest.mark.parametrize("test", [Program("", "1"), INCREMENT])
def test_a_failure_of_the_sandbox_is_nobodys(test):
    judge = Judge()
    judge.candidates = judge.checks = Refusing()
    with pytest.raises(ValueError, match="2 of 2 candidates could not be tested for failures of the sandbox"):
        run_all([((test,), "print(1)")] * 2, judge)
