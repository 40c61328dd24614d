"""The demo in small, whole: minutes long, so only with -m slow."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quick_demo_runs_every_stage_and_prints_the_table():
    shutil.rmtree(ROOT / "out" / "demo-quick", ignore_errors=True)
    done = subprocess.run(["bash", "runs/demo.sh", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| T5 = T3 + hierarchical RL |") == 2 and (ROOT / "out/demo-quick/curves.png").is_file()


def test_an_unknown_option_is_one_sentence_and_exit_code_2():
    done = subprocess.run(["bash", "runs/demo.sh", "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--nonsense is not an option" in done.stderr
