"""What SmolLM2 has learnt: the loss of the cold start, and accuracy and use of code before, between and after.

    python runs/smollm2_table.py out/smollm2-train-tiny
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.metrics import cell  # noqa: E402

ROWS = {"SmolLM2-135M-Instruct": "before", "after the cold start": "cold-start", "after RL": "rl"}
COLUMNS = {"accuracy": "avg@", "code ratio": "code_ratio", "execution pass rate": "execution_pass_rate",
           "correct if all ran": "correct_if_all_ran"}


@dataclass
class Options:
    """One flag a field."""

    out: str = config.required("directory of the run")


def main(options: Options) -> None:
    """Print both and write them to OUT/table.md."""
    out = Path(options.out)
    text = f"{losses(out / 'sft' / 'metrics.jsonl')}\n\n{table(out)}\n"
    (out / "table.md").write_text(text)
    print(text)


def losses(path: Path) -> str:
    """The loss of the first optimizer step and of the last ones."""
    steps = [json.loads(line)["train/loss"] for line in path.read_text().splitlines()]
    tail = steps[-max(1, len(steps) // 10):]
    return f"Loss of the cold start: {steps[0]:.3f} at step 1, {sum(tail) / len(tail):.3f} at step {len(steps)}."


def table(out: Path) -> str:
    """A row for each model that was evaluated, with 95 % intervals over problems."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for name, stem in ROWS.items():
        path = out / f"{stem}.json"
        if not path.is_file():
            continue
        metrics = json.loads(path.read_text())["metrics"]
        cells = [metrics[next(key for key in metrics if key.startswith(prefix))] for prefix in COLUMNS.values()]
        lines.append(f"| {name} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main, Options, __doc__,
               ["--out", *sys.argv[1:]] if len(sys.argv) == 2 and sys.argv[1][:1] != "-" else None)
