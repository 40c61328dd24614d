"""Public formats of code benchmarks become problems with tests, and a file that is none of them is said to be so."""

import base64
import gzip
import json
import pickle
import zlib

import pytest
from code_records import CASES, packed

from thor.code_benchmarks import NAMES, is_code_benchmark, problems, read_code_benchmark
from thor.code_tests import Program, Suite

LCB = CASES["livecodebench-functional"].record
STDIN = CASES["livecodebench-stdin"].record
MBPP = CASES["mbpp"].record
HUMANEVAL = CASES["humaneval+"].record


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def problem_of(record: dict):
    return problems([("the file, line 1", record)])[0]


@pytest.mark.parametrize("name", CASES)
def test_a_local_file_of_each_format_is_known_and_read(tmp_path, name):
    path = write(tmp_path / "x.jsonl", [CASES[name].record])
    assert is_code_benchmark(path)
    (problem,) = read_code_benchmark(path)
    assert problem.id == str(CASES[name].record.get("question_id") or CASES[name].record["task_id"]) or problem.id.startswith("mbpp/900")
    assert problem.solution == ("" if name.startswith("live") else problem.tests[0].reference)


def test_a_file_of_mathematics_is_no_code_benchmark(tmp_path):
    assert not is_code_benchmark(write(tmp_path / "x.jsonl", [{"id": "a", "question": "1+1?", "answer": "2"}]))
    assert not is_code_benchmark("math-500") and not is_code_benchmark("no such file")
    assert all(map(is_code_benchmark, NAMES)) and "livecodebench-v6" in NAMES


def test_a_compressed_file_is_read_like_a_plain_one(tmp_path):
    plain = write(tmp_path / "x.jsonl", [MBPP])
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write((tmp_path / "x.jsonl").read_text())
    assert read_code_benchmark(plain) == read_code_benchmark(str(tmp_path / "x.jsonl.gz"))


@pytest.mark.parametrize("name", CASES)
def test_what_a_model_reads_has_nothing_of_the_tests_but_the_first_assertion_of_mbpp(name):
    record, problem = CASES[name].record, problem_of(CASES[name].record)
    shown = problem.task + problem.completion + problem.context
    hidden = record.get("test_list", [])[1:] + [line for line in record.get("test", "").splitlines() if "results =" in line]
    hidden += [case["input"] for case in json.loads(record.get("public_test_cases", "[]"))]
    assert hidden or name == "mbpp+"
    assert not [test for test in hidden if test in shown]
    assert record.get("test_list", [""])[0] in problem.task
    assert not problem.solution or problem.solution.splitlines()[-1] not in shown


def test_a_public_test_of_livecodebench_is_one_of_its_tests():
    method, program = problem_of(LCB), problem_of(STDIN)
    assert len(method.tests) == 3 and all(isinstance(test, Suite) and len(test.calls) == 1 for test in method.tests)
    assert program.tests[0] == Program("2\n1 2\n3 4\n", "14\n7\n") and len(program.tests) == 3


def test_private_tests_may_be_plain_or_packed():
    cases = json.loads(STDIN["public_test_cases"])
    assert problem_of(STDIN | {"private_test_cases": json.dumps(cases)}).tests == problem_of(
        STDIN | {"private_test_cases": packed(cases)}).tests


class Harmful:
    """What must not be built while tests are unpacked."""

    def __reduce__(self) -> tuple:
        return print, ("harm",)


def test_unpacking_private_tests_runs_nothing(capsys):
    harm = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(ValueError, match="cannot be unpacked .it names builtins.print; only text is expected"):
        problem_of(STDIN | {"private_test_cases": harm})
    assert capsys.readouterr().out == ""


def test_the_functions_that_tests_call_are_those_that_the_solution_defines():
    called = problem_of(CASES["mbpp-sanitized"].record)
    assert called.tests[0].names == (("pack", "pack"), ("unpack", "unpack")) and called.entry == "pack"


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize("records, message", [
    ([without(HUMANEVAL, "test") | {"base_input": [], "plus_input": []}], "line 1: EvalPlus's own format of inputs is not read"),
    ([without(HUMANEVAL, "canonical_solution")], "line 1: a version of a code benchmark that is not known, with the fields task_id"),
    ([without(LCB, "metadata")], "line 1: a version of a code benchmark that is not known"),
    ([MBPP, without(MBPP, "code")], "line 2: not a problem of MBPP, as the first is: no field code"),
    ([MBPP, HUMANEVAL], "line 2: not a problem of MBPP, as the first is: no field text, code, test_list"),
    ([MBPP, MBPP], "line 2: the id 'mbpp/9001' has been seen before"),
    ([MBPP | {"test_list": []}], "line 1: its test_list is empty"),
    ([MBPP | {"test_list": 3}], "line 1: not a problem of MBPP: TypeError"),
    ([MBPP | {"test_list": ["assert pairs(1"]}], "line 1: its code or its tests are not Python"),
    ([MBPP | {"test_list": ["assert other(1)"]}], "line 1: its tests call no function that its own solution defines"),
    ([HUMANEVAL | {"entry_point": "other"}], "line 1: the prompt does not begin the function 'other'"),
    ([HUMANEVAL | {"entry_point": "f("}], "line 1: the prompt does not begin the function 'f('"),
    ([HUMANEVAL | {"task_id": 7}], "line 1: its id is 7; it must be a string"),
    ([STDIN | {"question_id": []}], "line 1: its id is []; it must be a string"),
    ([STDIN | {"private_test_cases": "AAAA"}], "line 1: its private tests cannot be unpacked"),
    ([STDIN | {"private_test_cases": "[{}]"}], "line 1: a test case needs input, output and testtype"),
    ([STDIN | {"metadata": '{"func_name": "f"}'}], "line 1: tests of kind stdin and func_name 'f'"),
    ([LCB | {"metadata": "{}"}], "line 1: tests of kind functional and func_name None"),
    ([LCB | {"metadata": "{"}], "line 1: not JSON"),
    ([STDIN | {"public_test_cases": "[]", "private_test_cases": "[]"}], "line 1: tests of kind none"),
])
def test_another_version_of_a_format_gets_one_sentence_that_says_where(tmp_path, records, message):
    with pytest.raises(ValueError) as error:
        read_code_benchmark(write(tmp_path / "x.jsonl", records))
    assert message in str(error.value)
