"""The Triton kernels against their twins, in Triton's interpreter or on a GPU. Skipped where Triton is missing.

    TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention import model_of

pytest.importorskip("triton", reason="Triton is not installed: pip install -r runs/requirements-kernels.txt")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from thor import kernels  # noqa: E402
from thor.decode_step import fused_forward  # noqa: E402
from thor.paged import PagedCache  # noqa: E402
from thor.paged_attention import attend_pages, decode  # noqa: E402

pytestmark = pytest.mark.cuda  # with the interpreter, on a CPU, too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter, which computes with numpy, has no bfloat16: there float16 stands for low precision.
DTYPES = {torch.float32: 2e-5, torch.bfloat16 if torch.cuda.is_available() else torch.float16: 2e-2}
SHAPES = {"groups of seven": (14, 2, 8), "one query head a key head": (3, 3, 20), "Qwen2.5-1.5B": (12, 2, 128)}


def some_pages(shape: tuple[int, int, int], dtype: torch.dtype, lengths: list[int], page: int = 16) -> tuple:
    """Queries, pages of keys and values, a table with its pages in disorder, and positions."""
    heads, kv_heads, dim = shape
    torch.manual_seed(0)
    width = -(-max(lengths) // page)
    keys, values = torch.randn(2, len(lengths) * width + 1, kv_heads, page, dim, device=DEVICE).to(dtype).unbind(0)
    table = (torch.randperm(len(lengths) * width, device=DEVICE) + 1).view(len(lengths), width).int()
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    return torch.randn(len(lengths), heads, dim, device=DEVICE).to(dtype), keys, values, table, positions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("max_splits", [1, 4])
def test_paged_attention_equals_gathered_pages(shape, dtype, max_splits):
    lengths = [1, 16, 17, 40, 100]  # with four parts some are empty
    q, keys, values, table, positions = some_pages(shape, dtype, lengths)
    wide = (tensor.double() for tensor in (q[:, None], keys, values))
    expected = attend_pages(*wide, table.long(), positions[:, None])[:, 0].float()
    for row, length in enumerate(lengths):  # what lies beyond must not matter
        keys[table[row, -(-length // 16):].long()] = 100.0
    got = kernels.paged_decode(q, keys, values, table, positions, max_splits)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, qk_norm", [((14, 2, 8), False), ((3, 3, 20), True)], ids=["Qwen2", "Qwen3"])
def test_the_fused_forward_equals_the_model_and_stores_the_same_keys(shape, qk_norm, dtype):
    model = model_of(shape, qk_norm=qk_norm).to(DEVICE, dtype)
    caches = [PagedCache(model.config, 20, 16, 60, dtype, DEVICE) for _ in range(2)]
    torch.manual_seed(0)
    past = torch.randn(2, *caches[0].keys.shape, device=DEVICE).to(dtype)
    lengths = [44, 17, 16, 1]
    for cache in caches:
        cache.keys.copy_(past[0])
        cache.values.copy_(past[1])
        rows = [cache.take() for _ in lengths]
        for row, length in zip(rows, lengths):
            cache.prepare(row, 0, length)
    table = torch.tensor(caches[0].tables[rows], device=DEVICE)
    positions = torch.tensor(lengths, dtype=torch.int32, device=DEVICE) - 1
    tokens = torch.tensor([3, 141, 5, 92], device=DEVICE)
    expected = model(tokens, positions, decode(caches[0], table, positions, False))
    got = fused_forward(model, caches[1], tokens, positions, table)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for store in ("keys", "values"):
        ours, theirs = (getattr(cache, store) for cache in reversed(caches))
        torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], atol=tolerance, rtol=tolerance)
        assert not torch.equal(ours[:, 1:], past[("keys", "values").index(store)][:, 1:])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from thor import kernels

HALVES = "q k v keys values cos sin x delta weight sum out gate up".split()
TYPES = {**dict.fromkeys(HALVES, "*bf16"), **dict.fromkeys(["mixed", "best", "total"], "*fp32"), "table": "*i32",
         "positions": "*i32", "table_stride": "i32", "size": "i32", "scale": "fp32", "eps": "fp32"}
SIZES = {"KV_HEADS": 2, "HEADS": 12, "GROUP": 6, "PAGE": 64, "DIM": 128, "BLOCK_G": 16, "BLOCK_D": 128, "SPLITS": 4,
         "PRECISION": "tf32", "SIZE": 1536, "HAS_DELTA": True, "BLOCK": 2048}
for name in ("_attend_part", "_join_parts", "_add_norm", "_rotate_and_store", "_swiglu"):
    kernel = getattr(kernels, name)
    types = {argument: "constexpr" if argument in SIZES else TYPES[argument.removesuffix("_ptr")]
             for argument in kernel.arg_names}
    sizes = {argument: SIZES[argument] for argument in kernel.arg_names if argument in SIZES}
    compiled = triton.compile(ASTSource(kernel, types, sizes), target=GPUTarget("cuda", 90, 32))
    print(name, len(compiled.asm["cubin"]))
"""


def test_every_kernel_compiles_for_a_gpu_that_need_not_be_there(tmp_path):
    """The interpreter takes what the compiler does not: two types of one name in two branches, for one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "_attend_part", "_join_parts", "_add_norm", "_rotate_and_store", "_swiglu"]
