"""The demo's cold-start data: what TIRGen's filters left, topped up with scripted solutions of the other problems.

    python runs/demo_mix.py out/demo

Writes cold_start.jsonl and prints the share of TIRGen's trajectories in it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from thor import config  # noqa: E402
from thor.checkpoint import write_aside  # noqa: E402
from thor.data import read_lines  # noqa: E402


@dataclass
class Options:
    """One flag a field."""

    out: str = config.required("directory of the demo")


def main(options: Options) -> None:
    """One solution a problem: TIRGen's where there is one, else the scripted one."""
    out = Path(options.out)
    survivors = out / "tirgen" / "sft.jsonl"
    made = [line for _, line in read_lines(survivors)] if survivors.stat().st_size else []
    solved = {json.loads(line)["question"] for line in made}
    scripted = [line for _, line in read_lines(out / "scripted.jsonl") if json.loads(line)["question"] not in solved]
    write_aside(out / "cold_start.jsonl", "".join(made + scripted))
    print(share(len(made), len(made) + len(scripted)))


def share(num_made: int, num_all: int) -> str:
    """The sentence that the demo's table repeats."""
    return (f"cold start: {num_all} trajectories, {num_made} of them from TIRGen ({num_made / num_all:.1%}), the others "
            "scripted")


if __name__ == "__main__":
    config.run(main, Options, __doc__, ["--out", *sys.argv[1:]] if len(sys.argv) == 2 else None)
