"""The demo in small, whole (minutes long, so only with -m slow), and what its table counts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "runs"))

import demo_table  # noqa: E402


@pytest.mark.slow
def test_the_quick_demo_runs_every_stage_and_prints_the_table():
    shutil.rmtree(ROOT / "out" / "demo-quick", ignore_errors=True)
    done = subprocess.run(["bash", "runs/demo.sh", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| T5 = T3 + hierarchical RL |") == 2 and (ROOT / "out/demo-quick/curves.png").is_file()


@pytest.mark.parametrize("option, sentence", [("--nonsense", "--nonsense is not an option"),
                                              ("--seed", "--seed needs a number")])
def test_an_unknown_option_or_one_without_its_value_is_one_sentence_and_exit_code_2(option, sentence):
    done = subprocess.run(["bash", "runs/demo.sh", option], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr


@pytest.mark.parametrize("script, name", [("demo.sh", "BESIDE"), ("tirgen_smollm2.sh", "SERVER")])
@pytest.mark.parametrize("last, code", [("true", 0), ("exit 2", 2)])
def test_what_runs_beside_a_script_is_ended_with_it_and_its_exit_code_stays(script, name, last, code, tmp_path):
    trap = next(line for line in (ROOT / "runs" / script).read_text().splitlines() if line.endswith("EXIT"))
    started = f"until [ $(cat /proc/${name}/comm) = sleep ]; do :; done"  # before, a signal would still be bash's own
    lines = ["set -euo pipefail", f"{name}=", trap, "set -m", "sleep 300 &", f"{name}=$!", "set +m", f"echo ${name}",
             started, last]
    (tmp_path / "script.sh").write_text("\n".join(lines) + "\n")
    done = subprocess.run(["bash", tmp_path / "script.sh"], capture_output=True, text=True, timeout=200)
    assert done.returncode == code and not Path(f"/proc/{int(done.stdout)}").exists()


@pytest.fixture
def two_runs(tmp_path):
    """T4: 3 rounds of 2 s; T5: 3 rounds of 5 s."""
    for name, seconds in (("t4", (1.0, 0.5, 0.5)), ("t5", (3.0, 1.5, 0.5))):
        line = dict(zip(("time/sample", "time/execute", "time/train"), seconds, strict=True)) | {"sandbox/seconds": 99.0}
        (tmp_path / name).mkdir()
        (tmp_path / name / "timing.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    return tmp_path


def test_equal_wall_clock_is_as_many_more_rounds_as_fit_into_the_other_runs_time(two_runs):
    assert demo_table.equal_rounds(two_runs) == round(3 * 15 / 6)


def test_the_time_of_the_rounds_is_shared_out_and_adds_up(two_runs):
    assert demo_table.shares_of_time(two_runs) == ("T4: 6 s of rounds, sampling 50%, executing 25%, training 25%\n"
                                                   "T5: 15 s of rounds, sampling 60%, executing 30%, training 10%")


def test_two_demos_stand_side_by_side_in_the_rows_that_both_have(tmp_path):
    for name, accuracy in (("demo-thinking", 0.75), ("demo", 0.5)):
        (tmp_path / name).mkdir()
        value = {"value": accuracy, "low": 0.0, "high": 1.0}
        metrics = {"metrics": {"avg@2": value, "execution_pass_rate": value | {"value": accuracy / 2}}}
        for row in ("t3-1.0-0", *(["t4-1.0-0"] if name == "demo" else [])):
            (tmp_path / name / f"{row}.json").write_text(json.dumps(metrics))
    table = demo_table.side_by_side([tmp_path / "demo-thinking", tmp_path / "demo"])
    [row] = [line for line in table.splitlines() if line.startswith("| T")]
    assert [part.split()[0] for part in row.split("|")[2:6]] == ["0.750", "0.500", "0.375", "0.250"]
    assert "accuracy, demo-thinking | accuracy, demo | pass rate, demo-thinking" in table


def test_means_over_seeds_stand_beside_each_seeds_value_and_what_is_missing_is_a_dash():
    assert demo_table.mean_cell([0.25, 0.75]) == "0.500 (0.250, 0.750)"
    assert demo_table.mean_cell([0.25, None]) == "–"
