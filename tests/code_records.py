"""Problems of our own in the public formats of code benchmarks, with right answers, and with faults to put into them."""

import base64
import json
import pickle
import zlib
from dataclasses import dataclass

from code_mutants import ASSERT


@dataclass(frozen=True)
class Case:
    """A record, a right answer, (what stands in it, what would be wrong) pairs, and the head of its function."""

    record: dict
    right: str
    faults: dict[str, tuple[str, str]]
    head: str

    def mutants(self) -> dict[str, tuple[str, str]]:
        """Wrong answers with the kind of verdict they must get."""
        wrong = {name: (self.right.replace(*fault), "wrong_answer") for name, fault in self.faults.items()}
        assert all(source != self.right for source, _ in wrong.values()), "a fault that is not in the answer"
        if not self.head:  # a whole program
            return wrong | {"empty": ("pass\n", "wrong_answer"), "exit": ("exit(0)\n", "wrong_answer"),
                            "assert": ("print('passed')\n", "wrong_answer"), "loop": ("while True:\n    pass\n", "timeout")}
        bodies = {"empty": ("pass", "wrong_answer"), "exit": ("exit(0)", "exited"), "loop": ("while True: pass", "timeout"),
                  "assert": (ASSERT[1], "wrong_answer")}
        indent = " " * 4 * self.head.startswith("class")
        return wrong | {name: (self.head + "\n    " + indent + body.replace("\n", "\n" + indent) + "\n", kind)
                        for name, (body, kind) in bodies.items()}


def packed(cases: list[dict]) -> str:
    """Private tests as LiveCodeBench packs them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


PAIRS = """def pairs(numbers, total):
    found = set()
    for i, a in enumerate(numbers):
        for b in numbers[i + 1:]:
            if a + b == total:
                found.add((min(a, b), max(a, b)))
    return found
"""

RUNS = """def pack(items):
    runs = []
    for item in items:
        if runs and runs[-1][0] == item:
            runs[-1][1] += 1
        else:
            runs.append([item, 1])
    return runs

def unpack(runs):
    return [item for item, count in runs for _ in range(count)]
"""

MEAN = '''def weighted_mean(values: List[float], weights: List[float]) -> float:
    """The mean of values, each counted with its weight; no weight at all is a ValueError.
    >>> weighted_mean([1.0, 4.0], [2.0, 1.0])
    2.0
    """
'''

LETTERS = """def letters(text):
    counts = {}
    for letter in text.lower():
        if letter.isalpha():
            counts[letter] = counts.get(letter, 0) + 1
    return counts
"""

BALANCE = """class Solution:
    def deepest(self, text: str, pairs: List[List[str]]) -> List[int]:
        depth, best = 0, [0, 0]
        opening = {a for a, _ in pairs}
        closing = {b for _, b in pairs}
        for place, letter in enumerate(text):
            depth += (letter in opening) - (letter in closing)
            if depth > best[0]:
                best = [depth, place]
        return best
"""

SUMS = """n = int(input())
total = 0
for _ in range(n):
    a, b = map(int, input().split())
    total += a * b
print(total)
print(total / max(n, 1))
"""

CASES = {
    "mbpp": Case(
        {"task_id": 9001, "text": "Write a function to find all pairs of numbers with a given sum.", "code": PAIRS,
         "test_list": ["assert pairs([1, 2, 3, 4], 5) == {(1, 4), (2, 3)}", "assert pairs([], 1) == set()",
                       "assert sorted(pairs([0, 0, -1, 1], 0)) == [(-1, 1), (0, 0)]"],
         "test_setup_code": "", "challenge_test_list": []},
        PAIRS, {"constant": ("i + 1", "i + 2"), "operator": ("a + b", "a - b")}, "def pairs(*_):"),
    "mbpp-sanitized": Case(
        {"task_id": 9002, "source_file": "ours", "prompt": "Write functions to pack a list into runs and to unpack it.",
         "code": RUNS, "test_imports": ["import math"],
         "test_list": ["assert unpack(pack([1, 1, 2])) == [1, 1, 2]", "assert len(pack('aab')) == math.ceil(1.5)",
                       "assert unpack(pack([])) == []"]},
        RUNS, {"constant": ("+= 1", "+= 2"), "operator": ("== item", "!= item")}, "def pack(_): return []\n\ndef unpack(*_):"),
    "mbpp+": Case(
        {"task_id": 9003, "source_file": "ours", "prompt": "Write a function that counts letters.", "code": LETTERS,
         "test_imports": [], "test_list": ["assert letters('aB b') == {'a': 1, 'b': 2}"],
         "test": "import numpy as np\ndef assertion(out, exp):\n    assert out == exp, f'{out} is not {exp}'\n"
                 "inputs = [['aB b'], [''], ['zZ9!z']]\nresults = [{'a': 1, 'b': 2}, {}, {'z': 3}]\n"
                 "for inp, exp in zip(inputs, results):\n    assertion(letters(*inp), exp)\n"},
        LETTERS, {"constant": (", 0) + 1", ", 1) + 1"), "operator": (") + 1", ") * 1")}, "def letters(*_):"),
    "humaneval+": Case(
        {"task_id": "Ours/0", "prompt": "from typing import List\n\n\n" + MEAN, "entry_point": "weighted_mean",
         "canonical_solution": "    if not sum(weights):\n        raise ValueError('no weight')\n"
                               "    return sum(v * w for v, w in zip(values, weights)) / sum(weights)\n",
         "test": "import numpy as np\ndef check(candidate):\n"
                 "    inputs = [[[1.0, 4.0], [2.0, 1.0]], [[1e300, 3.0], [0.0, 2.0]], [[0.1] * 3, [0.3] * 3]]\n"
                 "    results = [2.0, 3.0, 0.1]\n    for inp, exp in zip(inputs, results):\n"
                 "        assert np.allclose(candidate(*inp), exp, rtol=1e-7, atol=1e-6)\n"
                 "    try:\n        candidate([1.0], [0.0])\n        assert False, 'no error'\n    except ValueError:\n        pass\n"},
        MEAN + "    total = 0.0\n    if sum(weights) == 0:\n        raise ValueError\n    for value, weight in zip(values, weights):\n"
               "        total += value * weight\n    return total / sum(weights)\n",
        {"constant": ("total = 0.0", "total = 1.0"), "operator": ("value * weight", "value + weight")}, "def weighted_mean(*_):"),
    "livecodebench-functional": Case(
        {"question_title": "Deepest", "question_content": "Find the greatest depth of brackets and where it is reached first.",
         "platform": "ours", "question_id": "ours-1", "contest_id": "1", "contest_date": "2025-01-01", "difficulty": "easy",
         "starter_code": "class Solution:\n    def deepest(self, text: str, pairs: List[List[str]]) -> List[int]:\n        ",
         "public_test_cases": json.dumps([{"input": '"a(b)"\n[["(", ")"]]', "output": "[1, 1]", "testtype": "functional"}]),
         "private_test_cases": packed([{"input": f"{json.dumps(text)}\n" + '[["(", ")"], ["[", "]"]]', "output": json.dumps(best),
                                        "testtype": "functional"} for text, best in (("", [0, 0]), ("(()[[]])", [3, 4]))]),
         "metadata": '{"func_name": "deepest"}'},
        BALANCE, {"constant": ("depth, best = 0", "depth, best = 1"), "operator": ("depth > best", "depth >= best")},
        "class Solution:\n    def deepest(*_):"),
    "livecodebench-stdin": Case(
        {"question_title": "Sums", "question_content": "Print the sum of products of pairs, and its mean.", "platform": "ours",
         "question_id": "ours-2", "contest_id": "1", "contest_date": "2025-01-01", "difficulty": "easy", "starter_code": "",
         "public_test_cases": json.dumps([{"input": "2\n1 2\n3 4\n", "output": "14\n7\n", "testtype": "stdin"}]),
         "private_test_cases": packed([{"input": "0\n", "output": "0\n0", "testtype": "stdin"},
                                       {"input": "1\n-3 5\n", "output": "-15\n-15.00\n", "testtype": "stdin"}]),
         "metadata": "{}"},
        SUMS, {"constant": ("total = 0", "total = 1"), "operator": ("a * b", "a + b")}, ""),
}
