"""Benchmarks by name: where each lies on the Hugging Face hub and which of its fields are question and answer.

Any local JSON-lines file of problems does as well; that is the way on a machine that does not reach the hub.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thor.data import Problem, read_problems


@dataclass(frozen=True)
class Benchmark:
    """One dataset on the hub; `keep` says which of its records count.

    `repository` may be "json", and `files` the addresses of JSON-lines files. Code benchmarks (code_benchmarks.py) have
    more fields than a question and an answer, and name neither.
    """

    repository: str
    split: str
    question: str = ""
    answer: str = ""
    subset: str | None = None
    keep: Callable[[dict], bool] = lambda record: True
    files: tuple[str, ...] = ()


def _one_number(record: dict) -> bool:
    """OlympiadBench as the paper uses it: a single numerical answer (the subset is text-only and English already)."""
    return record["answer_type"] == "Numerical" and not record["is_multiple_answer"]


BENCHMARKS = {
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "aime-2024": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime-2025": Benchmark("math-ai/aime25", "test", "problem", "answer"),
    "amc-2023": Benchmark("math-ai/amc23", "test", "question", "answer"),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": Benchmark("Hothan/OlympiadBench", "train", "question", "final_answer", "OE_TO_maths_en_COMP", _one_number),
}


def read_benchmark(name: str) -> list[Problem]:
    """The problems of a local file or of a named benchmark. ValueError that says what would work instead."""
    if Path(name).is_file():
        return read_problems(name)
    if name not in BENCHMARKS:
        raise ValueError(f"{name!r} is neither a file of problems nor a benchmark; known are {', '.join(BENCHMARKS)}, and of "
                         "code those in docs/code-benchmarks.md")
    benchmark = BENCHMARKS[name]
    records = download(name, benchmark)
    return [Problem(f"{name}/{number}", record[benchmark.question].strip(), _answer(record[benchmark.answer]))
            for number, record in enumerate(records) if benchmark.keep(record)]


def _answer(value: str | int | float | list[str]) -> str:
    """The gold answer as text; a number that is whole is written so, and of a list there is one entry."""
    if isinstance(value, list):
        return value[0].strip()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def download(name: str, benchmark: Benchmark) -> list[dict]:
    """All records, from the hub or its local cache."""
    other_way = f"or give --benchmark a local JSON-lines file instead of {name}"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"benchmark {name} needs the package datasets (pip install -r runs/requirements-benchmarks.txt), "
                         f"{other_way}") from None
    try:
        files = list(benchmark.files) or None
        return list(load_dataset(benchmark.repository, benchmark.subset, split=benchmark.split, data_files=files))
    except Exception as error:  # the hub's client raises its own, requests' and the operating system's errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        place = ", ".join(benchmark.files) or benchmark.repository
        raise ValueError(f"benchmark {name}: {place} cannot be loaded from the Hugging Face hub ({reason}); "
                         f"try again with a connection, {other_way}") from None
