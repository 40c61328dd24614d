"""An evaluation, problem by problem: what evaluate.py writes under "per_problem", and what comparisons and curves read.

One row a problem: its id, a fingerprint of its question (two benchmarks may both have a problem "1"), and for each
sample, in order, whether it was right, which class of equivalent answers it is in, how many of its code blocks ran and
passed, and how many tokens it cost. Invariant: all lists of all rows of a file have one length, the number of samples.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from thor.trajectory import Trajectory, kept_executions

Setting = str | int | float | bool | None | dict[str, str]


@dataclass(frozen=True)
class Row:
    """The samples of one problem."""

    question: str                    # a fingerprint of its text
    correct: list[int]               # 1 or 0
    classes: list[int | None] | None  # the first sample with an equivalent answer, None without a box; or no list
    run: list[int]                   # code blocks that ran and were kept
    passed: list[int]                # those of them that passed
    tokens_generated: list[int]      # dropped attempts included
    tests: str | None = None         # code benchmarks: a fingerprint of its tests

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.correct)


@dataclass(frozen=True)
class Result:
    """One file of evaluate.py."""

    path: Path
    settings: dict[str, Setting]
    rows: dict[str, Row]

    @property
    def samples(self) -> int:
        """Samples a problem."""
        return next(iter(self.rows.values())).samples

    @property
    def benchmark(self) -> str:
        """What was solved, for a heading: the benchmark's name or file; this file's name if it does not say."""
        named = self.settings.get("benchmark")
        return Path(str(named)).name.removesuffix(".jsonl") if named else self.path.stem

    @property
    def model(self) -> str:
        """Who solved it, for a heading: the model's directory; of a training run, the run's."""
        parts = Path(str(self.settings.get("model") or self.path.stem)).parts
        inside = len(parts) > 1 and (parts[-1] == "latest" or parts[-1].startswith("step_"))
        return parts[-2] if inside else parts[-1]


def row_of(group: list[Trajectory], classes: list[int | None] | None, question: str | None = None,
           tests: str | None = None) -> Row:
    """The row of one problem from its graded samples, in order; `classes` as Row has them.

    `question` is what the problem asks, if styles put it to a model in different words; `tests` what decides about it.
    """
    runs = [kept_executions(trajectory) for trajectory in group]
    return Row(fingerprint(group[0].question if question is None else question),
               [int(trajectory.correct) for trajectory in group], classes,
               [len(kept) for kept in runs], [sum(run.passed for run in kept) for kept in runs],
               [trajectory.tokens_generated for trajectory in group], None if tests is None else fingerprint(tests))


def fingerprint(text: str) -> str:
    """12 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def to_text(settings: dict[str, Setting], metrics: dict[str, dict], rows: dict[str, Row]) -> str:
    """The JSON of an evaluation, laid out to be read: one line a problem."""
    head = json.dumps({"settings": settings, "metrics": metrics}, indent=2)
    lines = [f"    {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items()]
    return head.removesuffix("\n}") + ',\n  "per_problem": {\n' + ",\n".join(lines) + "\n  }\n}\n"


def read_result(path: Path) -> Result:
    """The file as `to_text` writes it. ValueError that says what it is instead."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it must be a JSON file that evaluate.py wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is not JSON ({error}); it must be a file that evaluate.py wrote with --out") from None
    if not isinstance(record, dict) or not {"settings", "metrics"} <= record.keys():
        raise ValueError(f"{path} has no settings and metrics; it must be a file that evaluate.py wrote with --out")
    if not (isinstance(record["settings"], dict) and isinstance(record["settings"].get("versions") or {}, dict)
            and isinstance(record.get("per_problem") or {}, dict)):
        raise ValueError(f"{path}: settings, versions and per_problem must be objects, as evaluate.py writes them")
    if not record.get("per_problem"):
        raise ValueError(f"{path} has no results problem by problem: an older evaluate.py wrote it; grade its "
                         "responses once more (evaluate.py --responses FILE --out FILE.json)")
    return Result(path, record["settings"], _rows(path, record["per_problem"]))


def _rows(path: Path, record: dict[str, dict]) -> dict[str, Row]:
    known, needed = {field.name for field in fields(Row)}, {field.name for field in fields(Row) if field.default is MISSING}
    rows = {}
    for name, row in record.items():
        missing = needed - row.keys() if isinstance(row, dict) else needed
        if missing:
            raise ValueError(f"{path}: problem {name!r} has no {', '.join(sorted(missing))}: another version of "
                             "evaluate.py wrote it; grade its responses once more")
        rows[name] = Row(**{key: row[key] for key in known & row.keys()})
        if not _possible(rows[name]):
            raise ValueError(f"{path}: problem {name!r} has values that evaluate.py does not write; grade its responses "
                             "once more")
    lengths = {len(values) for row in rows.values()
               for values in (row.correct, row.run, row.passed, row.tokens_generated, row.classes or row.correct)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{path}: its problems must all have the same number of samples, one or more")
    return rows


def _possible(row: Row) -> bool:
    """Whether its lists hold what Row says: whole numbers, and no more right or passed than there can be."""
    counts = (row.correct, row.run, row.passed, row.tokens_generated)
    if not all(isinstance(values, list) and all(isinstance(value, int) and value >= 0 for value in values) for values in counts):
        return False
    classes = [] if row.classes is None else row.classes
    return (isinstance(classes, list) and all(c is None or isinstance(c, int) and 0 <= c < row.samples for c in classes)
            and max(row.correct, default=0) <= 1 and all(few <= many for few, many in zip(row.passed, row.run, strict=False)))
