"""benchmarks/gap.py: float32 has no gap to speak of, bfloat16 has one, and rounded logits are on bfloat16's grid."""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gap  # noqa: E402

from thor.model import Decoder  # noqa: E402
from thor.weights import load_model  # noqa: E402


def test_a_row_each_and_the_gap_is_that_of_the_dtype(tiny_directory, capsys):
    gap.main(gap.Options(str(tiny_directory), samples=1, tokens=12))
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| (\S+) \| \S+ \| (\S+) \| (\S+) \|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["bfloat16", gap.ROUNDED, "float32"]
    (half, _, distance), _, (single, ratio, same) = (tuple(map(float, row[1:])) for row in rows)
    assert single < 1e-5 < 1e-4 < half and ratio < 0.1
    assert same < 1e-5 < 1e-4 < distance


def test_rounded_logits_are_those_of_a_linear_layer(tiny_directory):
    model = load_model(tiny_directory, torch.bfloat16)
    hidden = torch.randn(5, model.config.hidden_size).bfloat16()
    exact = model.logits(hidden)
    gap.round_logits(model)
    assert torch.equal(model.logits(hidden), exact.bfloat16().float()) and not torch.equal(model.logits(hidden), exact)
    assert torch.equal(Decoder.logits(model, hidden), exact)
