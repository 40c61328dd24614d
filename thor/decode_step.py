"""One token for many sequences: forward, sampling and the way back to the host, as one CUDA graph where there is a GPU.

The host says for each row where it stands and what its uniform number is, both known before the token is, and which
row of the step before its input token comes from; so the host can launch a step whose input it has not read. A graph
is made for a few numbers of rows, at first use; a step with fewer rows is padded. Invariants: `launch` never waits
for the device but for rows with top-k or top-p; tokens are read by `Launched.results`, which waits for that step only;
without graphs the same code runs as it is.

R rows · N pages of a row · V vocabulary
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thor.model import Decoder, RMSNorm, rope_tables
from thor.paged import PagedCache
from thor.paged_attention import decode
from thor.sampling import Sampling, draw, sample_tokens

SOURCE, TOKEN, POSITION, PAGES = 0, 1, 2, 3  # columns of the integers that the host sends for a row
WARM_UPS = 2  # runs before a graph is recorded: kernels are compiled and libraries set up


@dataclass(frozen=True)
class NextToken:
    """A row: the sequence in `slot` reads the token at `position` and samples the next one with `noise`.

    The token is `token`, or, with `source` 0 or more, what that row of the step before has sampled.
    """

    slot: int
    position: int
    token: int
    source: int
    noise: float
    sampling: Sampling


class _Stage:
    """Host memory of one step; two take turns, so that one is filled while the device still reads the other."""

    def __init__(self, max_rows: int, width: int, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.integers = torch.zeros(max_rows, PAGES + width, dtype=torch.int32, pin_memory=self.on_gpu)
        self.reals = torch.zeros(max_rows, 2, dtype=torch.float64, pin_memory=self.on_gpu)
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, pin_memory=self.on_gpu)
        self.logprobs = torch.zeros(max_rows, dtype=torch.float32, pin_memory=self.on_gpu)
        self.done = torch.cuda.Event() if self.on_gpu else None


@dataclass(frozen=True)
class Launched:
    """A step that the device has been told to do."""

    stage: _Stage
    num_rows: int

    def results(self) -> tuple[list[int], list[float]]:
        """Its tokens and their log-probs, when it is done."""
        if self.stage.done is not None:
            self.stage.done.synchronize()
        return self.stage.tokens[:self.num_rows].tolist(), self.stage.logprobs[:self.num_rows].tolist()


class DecodeStep:
    """Static buffers and graphs for one model and one cache."""

    def __init__(self, model: Decoder, cache: PagedCache, max_rows: int, use_kernels: bool, use_graphs: bool):
        self.model, self.cache, self.use_kernels, self.use_graphs = model, cache, use_kernels, use_graphs
        self.device, self.max_rows = cache.keys.device, max_rows
        self.sizes = batch_sizes(max_rows) if use_graphs else []
        width = cache.tables.shape[1]
        self._stages = [_Stage(max_rows, width, self.device) for _ in range(2)]
        self._num_launched = 0
        self._integers = torch.zeros(max_rows, PAGES + width, dtype=torch.int32, device=self.device)
        self._reals = torch.zeros(max_rows, 2, dtype=torch.float64, device=self.device)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
        self._logprobs = torch.zeros(max_rows, dtype=torch.float32, device=self.device)
        # warm-ups run on it, too: cuBLAS keeps a workspace for each stream, which shall not lie in a graph's memory
        self._stream = torch.cuda.Stream(self.device) if use_graphs else None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def launch(self, rows: list[NextToken]) -> Launched:
        """Start a step. At most two may be under way: read the results of the one before the last first."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(rows))] if self.use_graphs else len(rows)
        if self.use_graphs and size not in self._graphs:
            self._graphs[size] = self._record(size)
        stage = self._stages[self._num_launched % 2]
        self._num_launched += 1
        _fill(stage, rows, size, self.cache.tables)
        self._integers[:size].copy_(stage.integers[:size], non_blocking=True)
        self._reals[:size].copy_(stage.reals[:size], non_blocking=True)
        if self.use_graphs:
            graph, logits = self._graphs[size]
            graph.replay()
        else:
            logits = self._run(size)
        self._sample_filtered(logits, rows)
        stage.tokens[:size].copy_(self._tokens[:size], non_blocking=True)
        stage.logprobs[:size].copy_(self._logprobs[:size], non_blocking=True)
        if stage.done is not None:
            stage.done.record()
        return Launched(stage, len(rows))

    def _run(self, size: int) -> Tensor:
        """What a graph records: input tokens, forward, sampling. Returns the logits [size, V]."""
        integers, reals = self._integers[:size], self._reals[:size]
        source, position, table = integers[:, SOURCE], integers[:, POSITION].contiguous(), integers[:, PAGES:]
        tokens = torch.where(source >= 0, self._tokens[source.clamp(min=0).long()], integers[:, TOKEN].long())
        if self.use_kernels:
            hidden = fused_forward(self.model, self.cache, tokens, position, table)
        else:
            hidden = self.model(tokens, position, decode(self.cache, table, position, False))
        logits = self.model.logits(hidden)
        drawn, logprobs = draw(logits, reals[:, 0], reals[:, 1])
        self._tokens[:size] = drawn
        self._logprobs[:size] = logprobs
        return logits

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph for `size` rows. It is warmed up on padding alone, and the tokens of the step before are kept."""
        tokens = self._tokens.clone()
        self._integers[:size] = 0
        self._integers[:size, SOURCE] = -1
        self._reals[:size] = 1.0
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._run(size)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            logits = self._run(size)
        self._tokens.copy_(tokens)
        return graph, logits

    def _sample_filtered(self, logits_RV: Tensor, rows: list[NextToken]) -> None:
        """Top-k and top-p need a sort, at times a look at its result: such rows are sampled again, beside the graph."""
        filtered = {row.sampling: None for row in rows if row.sampling.is_filtered}
        for sampling in filtered:
            same = [i for i, row in enumerate(rows) if row.sampling == sampling]
            drawn, logprobs = sample_tokens(logits_RV[same], [rows[i].noise for i in same], sampling)
            self._tokens[same] = drawn
            self._logprobs[same] = logprobs.float()


def batch_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that get a graph: powers of two and the middles between them, up to the first that is enough."""
    sizes = [1]
    while sizes[-1] < max_rows:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(power * 3 // 2 if sizes[-1] == power and power >= 16 else 2 * power)
    return sizes[:-1] + [max_rows]


def _fill(stage: _Stage, rows: list[NextToken], size: int, tables: np.ndarray) -> None:
    """Write what the host knows of a step; padding reads token 0 at position 0 of page 0."""
    integers, reals, count = stage.integers.numpy(), stage.reals.numpy(), len(rows)
    integers[:count, SOURCE] = [row.source for row in rows]
    integers[:count, TOKEN] = [row.token for row in rows]
    integers[:count, POSITION] = [row.position for row in rows]
    integers[:count, PAGES:] = tables[[row.slot for row in rows]]
    reals[:count, 0] = [row.noise for row in rows]
    reals[:count, 1] = [row.sampling.temperature for row in rows]
    integers[count:size] = 0
    integers[count:size, SOURCE] = -1
    reals[count:size] = 1.0


def fused_forward(model: Decoder, cache: PagedCache, token_ids_R: Tensor, positions_R: Tensor,
                  table_RN: Tensor) -> Tensor:
    """`model(...)` for one token a row with a third of the kernels, hidden states [R, E]; its twin is the model."""
    from thor import kernels  # needs Triton

    config, rows = model.config, len(token_ids_R)
    x, delta = model.model["embed_tokens"](token_ids_R), None
    cos, sin = (table[:, 0].contiguous() for table in rope_tables(config, positions_R, x.dtype))
    for number, layer in enumerate(model.model["layers"]):
        x, normed = _norm(x, delta, layer.input_layernorm)
        attention, keys, values = layer.self_attn, cache.keys[number], cache.values[number]
        q, k, v = (project(normed) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k, v = (part.view(rows, -1, config.head_dim) for part in (q, k, v))
        if config.qk_norm:
            q, k = (_norm(part.flatten(0, 1), None, norm)[1].view_as(part)
                    for part, norm in ((q, attention.q_norm), (k, attention.k_norm)))
        q = kernels.rotate_and_store(q, k, v, cos, sin, keys, values, table_RN, positions_R)
        mixed = kernels.paged_decode(q, keys, values, table_RN, positions_R)
        x, normed = _norm(x, attention.o_proj(mixed.flatten(1)), layer.post_attention_layernorm)
        gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
        delta = layer.mlp.down_proj(kernels.swiglu(gate, up))
    return _norm(x, delta, model.model["norm"])[1]


def _norm(x_RE: Tensor, delta_RE: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    from thor import kernels

    return kernels.add_norm(x_RE, delta_RE, norm.weight, norm.eps)
