"""What the documents name exists: functions, tests, files, metrics."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def defined(path: Path) -> dict[str, int]:
    """Functions and classes of a file, methods too, and the lines where they begin."""
    return {node.name: node.lineno for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}


def test_every_equation_links_to_its_functions_line():
    rows = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)", (ROOT / "docs" / "equations.md").read_text())
    assert len(rows) >= 10
    assert [(name, file, int(line)) for name, file, line in rows] == [
        (name, file, defined(ROOT / file).get(name)) for name, file, _ in rows]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_and_file_that_a_document_names_exists(document):
    text = document.read_text()
    tests = set().union(*(defined(path) for path in (ROOT / "tests").glob("test_*.py")))
    assert {name for name in re.findall(r"`(test_\w+)`", text) if name not in tests} == set()
    files = set(re.findall(r"`((?:thor|runs|benchmarks|tests|docs)/[\w./-]+\.\w+)", text))
    assert {file for file in files if not (ROOT / file).exists()} == set()


def test_the_reading_order_says_about_how_long_each_file_is():
    """Within a tenth, or ten lines."""
    rows = re.findall(r"^\| (`[^|]+) \| ([\d, ]+) \|", (ROOT / "README.md").read_text(), re.M)
    lines = {name: int(count) for names, counts in rows
             for name, count in zip(re.findall(r"`([^`]+)`", names), counts.split(","), strict=True)}
    assert len(lines) > 40
    found = {name: len((ROOT / name).read_text().splitlines()) for name in lines}
    assert found == {name: pytest.approx(count, rel=0.1, abs=10) for name, count in lines.items()}


def test_every_metric_of_a_round_is_explained():
    """The names in code, against the table; a name with a star stands for a family."""
    explained = set(re.findall(r"`([\w/*…]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    families = tuple(name.rstrip("*") for name in explained if name.endswith("*"))
    source = (ROOT / "thor" / "rl_metrics.py").read_text()
    named = set(re.findall(r'"((?:trajectory|step)/\w+)"', source))
    assert len(named) > 10
    assert {name for name in named if name not in explained and not name.startswith(families)} == set()
