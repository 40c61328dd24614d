"""benchmarks/gpu.py without a GPU: its rows run in a tiny shape, one that fails stops nobody, few packages do."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_report  # noqa: E402
import gpu_training  # noqa: E402
from gpu_shapes import QWEN_1_5B, QWEN_7B, TINY, build_model, layer_bytes  # noqa: E402

from thor.batch import make_pack, score  # noqa: E402
from thor.paged_engine import PagedEngine  # noqa: E402

GPU_ONLY = ("generate_batch", "compiled")


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What the rows that run on a CPU measure, each called as its process would."""
    rows = {name: row(gpu.Bench(True)) for name, (row, _) in gpu.ROWS.items() if name not in GPU_ONLY}
    rows["about"] = gpu.about(True, None)
    return json.loads(json.dumps(rows))


def test_every_row_runs_and_every_line_of_the_table_reads_from_it(found):
    table = gpu_report.table(found)
    assert table.count("not measured") == 3  # a CPU's memory is not counted; two rows need a GPU
    assert "failed" not in table
    lines = dict(line.strip("| ").split(" | ")[:2] for line in table.splitlines() if line.startswith("| "))
    assert set(lines) >= {line.title for line in gpu_report.LINES}
    assert lines["self-correction"] == "**10** tokens computed, 110 kept"
    assert "kernels off, graphs off" in lines["decode, 7B shape, one sequence"]
    assert found["rollouts"]["counts"]["slow"]["sampled"] == found["rollouts"]["tokens"] == found["generate"]["tokens"]
    assert found["rewind"]["gap"]["as used"][1] < 1e-3
    assert found["decode_1_5b"]["key_bytes"] > 0 and found["decode_7b"]["step_seconds"] > 0
    assert [run["tokens"] for run in found["training"]["plain"]] == [64, 128]


def test_without_a_measurement_a_line_says_so_and_with_a_failure_why():
    table = gpu_report.table({})
    assert table.startswith("Nothing measured.") and table.count("not measured") == len(gpu_report.LINES)
    table = gpu_report.table({"ceilings": {"trouble": "CUDA error: no | luck"}})
    assert "| ceilings | failed: CUDA error: no / luck |" in table


def test_a_row_that_fails_or_takes_too_long_is_reported_and_the_others_go_on(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--rows", "compiled,ceilings", "--out",
               str(tmp_path / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "compiled: torch.compile is measured on a GPU only" in done.stdout and "ceilings: done" in done.stdout
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["ceilings"]["bytes_per_second"] > 0
    assert (tmp_path / "gpu.png").stat().st_size > 0
    assert (tmp_path / "gpu.md").read_text() in done.stdout
    assert gpu.run_row("ceilings", True, 1.0)["trouble"] == "stopped after 1 s"
    assert gpu.run_row("ceilings", True, -5.0)["trouble"] == "not run, the time was up"


def test_what_a_row_printed_before_it_failed_is_kept(found):
    printed = 'loading…\n{"step_seconds": 1.0}\n{"step_seconds": 2.0, "batch": 3}\nSegmentation fault\n'
    assert gpu.last_numbers(printed) == {"step_seconds": 2.0, "batch": 3}
    assert gpu.last_numbers("nothing\n3\n") == {}
    partly = {name: dict(row) for name, row in found.items()}
    del partly["training"]["plain"], partly["training"]["profile"]
    partly["training"]["trouble"] = "stopped after 9 s"
    before, after = gpu_report.table(found).splitlines(), gpu_report.table(partly).splitlines()
    changed = [line for line, other in zip(after, before, strict=True) if line != other]
    assert len(changed) == 2 and all("failed: stopped after 9 s" in line for line in changed)


def test_an_errors_last_line_is_what_is_shown():
    text = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\n\nexit 1\n"
    assert gpu.last_line(text) == "torch.OutOfMemoryError: CUDA out of memory."
    assert gpu.last_line("error: there is no GPU\n") == "there is no GPU"
    assert gpu.last_line("") == "no message"


class CompilerError(Exception):
    """Of no kind of Python's own, like Triton's."""


def test_an_engine_that_fails_in_any_way_gives_way_to_a_plainer_one():
    calls = iter([CompilerError("int32 and int64"), KeyError("graph")])

    def failing_twice(engine: PagedEngine) -> dict[str, object]:
        for error in calls:
            raise error
        return {"step_seconds": 1.0}

    found = gpu.attempts(gpu.Bench(True), TINY, 2, 64, failing_twice)
    assert found["errors"] == ["CompilerError: int32 and int64", "KeyError: 'graph'"]
    assert gpu_report.arranged(found) == "kernels off, graphs off; CompilerError: int32 and int64; KeyError: 'graph'"
    seen = []
    gpu.attempts(gpu.Bench(True, ("the first", "the second")), TINY, 2, 64, lambda engine: seen.append(engine) or {})
    assert len(seen) == 1 and not seen[0].decoder.use_graphs  # another process's failures count


def test_a_kernels_time_counts_once_and_not_again_for_the_operator_that_launched_it():
    launched = SimpleNamespace(key="mm", device_type=DeviceType.CPU, self_device_time_total=5, self_cpu_time_total=7)
    kernel = SimpleNamespace(key="gemm", device_type=DeviceType.CUDA, self_device_time_total=5,
                             is_user_annotation=False)
    note = SimpleNamespace(key="step", device_type=DeviceType.CUDA, self_device_time_total=9, is_user_annotation=True)
    assert gpu_training.kernel_times([launched, kernel, note], True) == {"gemm": 5}
    assert gpu_training.kernel_times([launched], False) == {"mm": 7}


def test_the_shapes_have_the_sizes_of_their_names():
    assert layer_bytes(QWEN_1_5B, torch.bfloat16) / 2 == pytest.approx(1.54e9, rel=0.01)
    assert layer_bytes(QWEN_7B, torch.bfloat16) / 2 == pytest.approx(7.07e9, rel=0.01)  # 7.62 with the embedding


def test_flops_are_those_that_torch_counts():
    """Its counter sees the matrix products and not attention, which is causal: half of two products over all pairs."""
    model = build_model(TINY, torch.float32, torch.device("cpu"))
    samples = gpu_training.some_samples(TINY, 64, 64)
    pack = make_pack(samples)
    with FlopCounterMode(display=False) as counter:
        score(model, pack)[0].sum().backward()
    chunks_again = 2 * TINY.vocab_size * TINY.hidden_size * len(pack.rows)
    attention = gpu_training.flops_of(TINY, [64], len(pack.rows)) - (counter.get_total_flops() - chunks_again)
    assert attention == 3 * TINY.num_layers * TINY.num_heads * (2 * 2 * 64**2 * TINY.head_dim) / 2


BLOCKED = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
"""
ALWAYS = {"math_verify", "latex2sympy2_extended", "matplotlib", "tensorboard", "pyseccomp", "triton", "pytest"}
WITHOUT_TRANSFORMERS = ALWAYS | {"transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "requests"}


@pytest.mark.parametrize("modules, blocked", [
    ("thor.model, thor.engine, thor.paged_engine, thor.grpo, thor.batch", WITHOUT_TRANSFORMERS),
    ("gpu, gpu_report", ALWAYS)])
def test_few_packages_are_needed(modules, blocked):
    code = BLOCKED.format(blocked=blocked, root=str(ROOT)) + f"import {modules}\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
