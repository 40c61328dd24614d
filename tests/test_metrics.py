"""Unbiased estimators against enumeration, intervals that resample problems, and a log that survives a kill."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from thor.metrics import MetricsLog, bootstrap, cell, cut_after, pass_at_k, plot


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in combinations(right, k)]))


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_pass_at_k_stays_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_the_bootstrap_of_a_mean_has_the_normal_interval_for_many_problems():
    values = np.random.default_rng(1).normal(0.5, 1.0, 1000)
    found, half = bootstrap(values), 1.96 * values.std() / np.sqrt(1000)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.005)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.005)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).normal(size=20)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)


def test_a_pooled_rate_is_a_ratio_of_sums_not_a_mean_of_ratios():
    assert bootstrap([1, 0], [1, 9])["value"] == pytest.approx(0.1)


def test_an_empty_denominator_is_null():
    nothing = {"value": None, "low": None, "high": None}
    assert bootstrap([0, 0], [0, 0]) == bootstrap([]) == nothing


def test_a_log_opened_again_at_a_step_continues_as_if_nothing_had_happened(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log = MetricsLog(whole, 0, tensorboard=False)
    for step in range(1, 6):
        log.write(step, {"a": step / 3, "b": None}, {"seconds": 0.1})
    log.close()
    log = MetricsLog(resumed, 0, tensorboard=False)
    for step in range(1, 5):
        log.write(step, {"a": step / 3, "b": None}, {"seconds": 0.2})
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "a": 0.3')  # killed in the middle of a line
    log = MetricsLog(resumed, 3, tensorboard=False)
    for step in range(4, 6):
        log.write(step, {"a": step / 3, "b": None}, {"seconds": 0.3})
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_metric_that_is_not_finite_is_null_and_the_line_stays_json(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write(1, {"loss": float("nan")}, {})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_cutting_a_file_that_does_not_exist_does_nothing(tmp_path):
    cut_after(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn_for_several_runs_and_for_metrics_that_one_of_them_lacks(tmp_path):
    for name in ("t4", "t5"):
        log = MetricsLog(tmp_path / name, 0, tensorboard=False)
        for step in range(3):
            log.write(step, {"trajectory/accuracy": step / 3} | ({"step/pass_rate": 0.5} if name == "t5" else {}), {})
    plot([tmp_path / "t4", tmp_path / "t5"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "t4" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([tmp_path / "t4"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="does not exist"):
        plot([tmp_path / "none"], tmp_path / "x.png")


def test_two_runs_of_the_same_name_are_two_curves(tmp_path):
    runs = [tmp_path / parent / "run" for parent in "ab"]
    for value, run in enumerate(runs):
        log = MetricsLog(run, 0, tensorboard=False)
        for step in (1, 2):
            log.write(step, {"accuracy": float(value)}, {})
    plot(runs, tmp_path / "both.png")
    plot(runs[1:], tmp_path / "second.png")
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "second.png").read_bytes()


def test_a_tables_cell_has_value_interval_and_what_it_is_a_share_of():
    rate = {"value": 0.5, "low": 0.25, "high": 0.7504}
    assert cell(rate) == "0.500 [0.250, 0.750]" and cell(rate | {"n": 8}) == "0.500 [0.250, 0.750], n = 8"
    assert cell({"value": None, "low": None, "high": None, "n": 0}) == "–"


def test_the_command_explains_itself_and_names_a_directory_that_is_no_run(tmp_path):
    def call(argument: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "thor.metrics", argument]
        return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)

    asked, wrong = call("--help"), call(str(tmp_path))
    assert asked.returncode == 0 and "python -m thor.metrics DIR" in asked.stdout
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {tmp_path}/metrics.jsonl does not exist")
