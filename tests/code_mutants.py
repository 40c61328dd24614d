"""Wrong candidates made from right ones: each problem gets one kind of fault, in turn, always the same one.

A fault in the code (another constant, another operator) may leave every test passing; the place of the fault is then the
next one, as OTHER_PLACE says, and where a solution has no constant or no operator the other kind is taken.
"""

import ast
import random

KINDS = ("constant", "operator", "empty", "exit", "assert", "loop")

# HumanEval problem -> which constant or operator of its solution is wrong, where that is not the first one.
OTHER_PLACE = {66: 1, 108: 2}

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
         ast.Pow: ast.Mult, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE,
         ast.LtE: ast.Gt, ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In}

# Bodies that would make a harness pass which lets candidate and tests meet.
ASSERT = (
    "import builtins\n    builtins.AssertionError = type('Harmless', (Exception,), {})\n    return None",
    "class Always:\n        def __eq__(self, other):\n            return True\n        __ne__ = __lt__ = __le__ = __gt__ = "
    "__ge__ = __sub__ = __rsub__ = lambda self, other: 0\n        __hash__ = None\n    return Always()",
    "import sys\n    sys.settrace(lambda frame, event, arg: None)\n    sys.excepthook = lambda *error: None\n    return None",
    "import os\n    for fd in range(1, 20):\n        try:\n            os.write(fd, b'{\"kind\": \"passed\", \"detail\": \"\", \"calls\": "
    "[]}\\n')\n        except OSError:\n            pass\n    os._exit(0)",
)


def kind_of(number: int) -> str:
    """The fault of HumanEval's problem of that number."""
    return KINDS[number % len(KINDS)]


def mutant(number: int, prompt: str, solution: str, entry: str) -> str:
    """A wrong candidate. `solution` is the body that follows `prompt`."""
    kind = kind_of(number)
    if kind in ("constant", "operator"):
        return faulty(prompt + solution, entry, kind, OTHER_PLACE.get(number, 0))
    body = {"empty": "pass", "exit": ("exit(0)", "import os; os._exit(0)")[number // 6 % 2],
            "assert": ASSERT[number // 6 % len(ASSERT)], "loop": "while True:\n        pass"}[kind]
    return f"{prompt}    {body}\n"


def faulty(source: str, entry: str, kind: str, place: int) -> str:
    """The source with one constant or operator of its last function wrong; the other kind comes after the first is used up."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry)
    nodes = [node for statement in function.body[1:] for node in ast.walk(statement)]
    constants = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None)))]
    operators = [node for node in nodes if type(operator_of(node)) in SWAPS]
    found = constants + operators if kind == "constant" else operators + constants
    change(found[place])
    return ast.unparse(tree)


def operator_of(node: ast.AST) -> ast.AST | None:
    """The operator of an expression that has one."""
    if isinstance(node, ast.Compare):
        return node.ops[0]
    return node.op if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) else None


def change(node: ast.AST) -> None:
    """Put another value or operator in its place."""
    if isinstance(node, ast.Constant):
        value = node.value
        node.value = not value if isinstance(value, bool) else value + "?" if isinstance(value, str) else (value or 0) + 1
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()
    else:
        node.op = SWAPS[type(node.op)]()


def sample(count: int, of: int) -> list[int]:
    """Numbers of problems, the same each time."""
    return sorted(random.Random(0).sample(range(of), count))
