"""Both ends of the line between a candidate and its tests: this text runs in the sandbox, in front of a call of it.

`serve` is the end of the candidate's process, which has its inputs and nothing else; `check` is the end of the process
that runs the tests, in which no line of the candidate's ever runs. Between them go plain values as JSON. Invariant:
`decode` makes built-in values only, so no object of the candidate's can answer a comparison, and the verdict is printed
by a process that it never was in. Standard library only, and no import of ours: it is sent as text (code_tests.py).
"""

import builtins
import json
import os
import random
import sys
import types
from collections.abc import Callable
from typing import TextIO

Data = None | bool | int | float | str | dict  # what JSON carries

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
ENDED = {"missing": "missing_function", "syntax": "syntax_error", "exited": "exited"}  # an answer's kind -> the verdict
SHOWN = 200  # characters of a message that are kept


class Other:
    """A value that cannot travel: it equals nothing but itself, and is as true as the candidate's process said."""

    def __init__(self, text: str, truth: bool):
        self.text, self.truth = text, truth

    def __repr__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return self.truth


class Stop(BaseException):
    """Ends the tests from inside a call, past any `except Exception` of theirs; the reason is on the line."""


def encode(value: object, other: Callable[[object], Data]) -> Data:
    """A value as JSON data; subclasses count as what they are built on, `other` says what to make of all else."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in ((int, int), (float, float), (str, str.__str__)):
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, dict):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, other) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return other(value)


def decode(data: Data) -> object:
    """The inverse of `encode`. ValueError, TypeError or KeyError for anything that it does not write."""
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a bare list is not a value")
        return data
    (name, content), = data.items()
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    if name in SEQUENCES:
        return SEQUENCES[name](map(decode, content))
    if name == "other":
        return Other(str(content[0]), content[1] is True)
    if name == "bytes":
        return bytes.fromhex(content)
    return {"complex": complex, "range": range}[name](*content)


def describe(value: object) -> Data:
    """What is sent of a value that cannot travel."""
    return {"other": [repr(value)[:SHOWN], bool(value)]}


def dumps(data: Data | list) -> str:
    """JSON on one line, whole numbers of any length."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data)
    finally:
        sys.set_int_max_str_digits(limit)


def take_stdout() -> TextIO:
    """What stdout was; from here on, whatever is printed goes to stderr, so that it is not taken for an answer."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


def trouble(error: BaseException) -> dict[str, list[str]]:
    """How an exception of the candidate's is reported: its name and its text. SystemExit has a kind of its own."""
    kind = "raised" if isinstance(error, Exception) else "exited"
    try:
        text = str(error)[:SHOWN]
    except Exception:  # its own __str__ fails
        text = ""
    return {kind: [type(error).__name__, text]}


def find(module: types.ModuleType, name: str) -> Callable:
    """A function of the candidate's; `Solution.f` is a method of a fresh Solution. AttributeError if there is none."""
    owner, _, function = name.rpartition(".")
    return getattr(getattr(module, owner)(), function) if owner else getattr(module, name)


def answer(module: types.ModuleType, call: str) -> str:
    """One call, made: a line that says what came of it."""
    name, args, kwargs = json.loads(call)
    first = name.partition(".")[0]
    if not hasattr(module, first):
        return dumps({"missing": first})
    try:
        return dumps({"returned": encode(find(module, name)(*decode(args), **decode(kwargs)), describe)})
    except RecursionError:
        return dumps({"raised": ["RecursionError", "maximum recursion depth exceeded"]})
    except BaseException as error:
        return dumps(trouble(error))


def serve(source: str, calls: list[str]) -> None:
    """The candidate's process: run its source, then make the calls; a line for the source and one for each call."""
    answers = take_stdout()
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    loaded = load(source, module)
    print(loaded, file=answers, flush=True)
    if loaded == "{}":
        for call in calls:
            print(answer(module, call), file=answers, flush=True)


def load(source: str, module: types.ModuleType) -> str:
    """Run the source in `module`; a line that says what came of it, {} if nothing did."""
    try:
        program = compile(source, "<candidate>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # null bytes and deep nesting, too
        return dumps({"syntax": [type(error).__name__, str(error)[:SHOWN]]})
    try:
        exec(program, module.__dict__)
    except BaseException as error:
        return dumps(trouble(error))
    return "{}"


def feed(source: str, text: str) -> None:
    """The candidate's process where it is a whole program: run it with `text` on its standard input."""
    with open("stdin", "w+", encoding="utf-8") as file:
        file.write(text)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    os.unlink("stdin")
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, "<candidate>", "exec", dont_inherit=True), module.__dict__)


class Line:
    """The tests' end: calls in the order in which they are made, with the answers that the candidate gave to `known`.

    `verdict` is set by what ends the tests from here: a call that was never answered, or a candidate that did not get
    so far. `raised` is the exception that the last call handed on.
    """

    def __init__(self, known: list[str], answers: list[str]):
        self.known, self.answers = known, answers
        self.calls: list[str] = []
        self.verdict: tuple[str, str] | None = None
        self.raised: BaseException | None = None

    def function(self, name: str) -> Callable:
        """What the tests call in the candidate's place."""
        return lambda *args, **kwargs: self.call(name, args, kwargs)

    def call(self, name: str, args: tuple, kwargs: dict) -> object:
        """The candidate's value, or its exception. Stop if there is neither."""
        call = dumps([name, encode(args, self.refuse), encode(kwargs, self.refuse)])
        place = len(self.calls)
        self.calls.append(call)
        if self.known[place:place + 1] != [call]:
            self.stop("call", "")
        if place >= len(self.answers):
            self.stop("exited", "its process ended before it returned")
        return self.value(self.answers[place])

    def value(self, text: str) -> object:
        """What an answer says, which anybody may have written."""
        try:
            (kind, content), = json.loads(text).items()
            if kind == "returned":
                return decode(content)
            words = content if isinstance(content, str) else ": ".join(map(str, content))
            ended = None if kind == "raised" else ENDED[kind]
        except Exception:  # not JSON, or not such JSON as `answer` writes
            self.stop("wrong_answer", "its answer cannot be read")
        if ended is not None:
            self.stop(ended, words)
        if content[0] == "MemoryError":
            self.stop("memory", words)
        self.raised = exception(*map(str, content[:2]))
        raise self.raised

    def refuse(self, value: object) -> Data:
        """An argument that cannot travel is the tests' doing."""
        self.stop("wrong_answer", f"the tests call with a {type(value).__name__}, which cannot go to another process")

    def stop(self, kind: str, detail: str) -> None:
        """End the tests with this verdict."""
        self.verdict = self.verdict or (kind, detail[:SHOWN])
        raise Stop


class Reference(Line):
    """The same line with the benchmark's own solution at its end, in this process: it tells which calls are made."""

    def __init__(self, source: str):
        super().__init__([], [])
        self.module = types.ModuleType("reference")
        exec(source, self.module.__dict__)

    def call(self, name: str, args: tuple, kwargs: dict) -> object:
        """Through the same encoding, so that what cannot travel is found here."""
        self.calls.append(dumps([name, encode(args, self.refuse), encode(kwargs, self.refuse)]))
        return self.value(answer(self.module, self.calls[-1]))


def exception(name: str, text: str) -> BaseException:
    """A built-in exception by its name, for tests that expect one; any other is an Exception with it in its text."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # it wants more than a text
            pass
    return Exception(f"{name}: {text}")


def check(suite: dict[str, str | dict[str, str]], known: list[str] | None, answers: str) -> None:
    """The tests' process: run them and print {"kind", "detail", "calls"}. `known` None: with the reference."""
    verdict = take_stdout()
    sys.set_int_max_str_digits(0)
    random.seed(0)  # a sandbox does it as well, a remote one may not
    line = make_line(suite, known, answers)
    kind, detail = run_tests(suite, line)
    print(json.dumps({"kind": kind, "detail": detail, "calls": line.calls if known is None or kind == "call" else []}),
          file=verdict, flush=True)


def make_line(suite: dict, known: list[str] | None, answers: str) -> Line:
    """The line that the tests will call. The first answer is how the candidate's source ran, the rest are to calls."""
    if known is None:
        return Reference(suite["reference"])
    lines = answers.split("\n")[:-1]  # what follows the last newline is half an answer
    if lines[:1] == ["{}"]:
        return Line(known, lines[1:])
    return Line(known, lines[:1] * len(known))  # every call gets what became of the source


def run_tests(suite: dict, line: Line) -> tuple[str, str]:
    """(kind, detail) of one run of the tests."""
    namespace = {"__name__": "tests"}
    error = None
    try:
        exec(suite["setup"], namespace)
        namespace |= {local: line.function(name) for local, name in suite["names"].items()}
        exec(compile(suite["tests"], "<tests>", "exec"), namespace)
    except BaseException as caught:
        error = caught
    if line.verdict is not None:
        return line.verdict
    if error is None:
        return ("passed", "") if line.calls else ("wrong_answer", "the tests never call the candidate")
    words = f"{type(error).__name__}: {error}"[:SHOWN].rstrip(": ")
    return "exception" if error is line.raised else "wrong_answer", words
