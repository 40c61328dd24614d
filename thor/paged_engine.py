"""The engine on a GPU: pages instead of slots, one graph a step, and a host that is one step behind the device.

A step has two parts. Long stretches of unseen tokens are prefilled, at most `chunk_tokens` a sequence and
PREFILL_TOKENS together, all but the last token; then every sequence with one unseen token reads it and samples the
next (`decode_step`), those whose prefill ended just now among them. A short stretch, an observation, needs no pass of
its own: its tokens are rows of the decoding step, as if of other sequences, since all rows store their keys before
any of them looks. So a long prompt delays decoding by one bounded chunk a step, an observation by nothing. The next
step is launched before this one's tokens are read: a sequence that turns out to have stopped costs one discarded
token. Invariants: `cached` counts what the device has been told to store, and its work is done in order; pages given
back may still be written to by the step under way, and are overwritten only after it; the oldest request always gets
on.
"""

import time
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from thor.attention import Row
from thor.decode_step import DecodeStep, Launched, NextToken
from thor.engine import Engine, Request, Sequence, closest_relative
from thor.model import Decoder
from thor.paged import PAGE_TOKENS, PagedCache, pages_for, upload
from thor.paged_attention import kernels_available, paged
from thor.sampling import Sampling, uniform

PREFILL_TOKENS = 2048
MAX_ROWS = 512  # of a decoding step
NOT_SAMPLED = Sampling()  # of a row whose token nobody wants
FEED_ROWS = 64  # rows of it beside one for each sequence, for stretches that short
# All but cuDNN, which torch prefers on Hopper: it makes a plan for each new shape, some 30 ms of host time, and nearly
# every prefill has a shape of its own.
PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class _Plan:
    """What one step will do: pages to copy, rows to prefill, rows to decode with their requests (None: only read)."""

    copies: list[tuple[int, int]]
    prefills: list[tuple[Sequence, Row]]
    decodes: list[tuple[Request | None, NextToken]]
    cached: list[tuple[Sequence, int]]  # what the sequences' caches will hold
    read: list[Request]  # prefills that end with this step
    feed_rows: int  # that are left
    is_full: bool = False  # no page was left for someone: nobody new is let in behind it


@dataclass(frozen=True)
class _UnderWay:
    """A launched step whose tokens have not been read; `row_of` finds a request's row by identity."""

    launched: Launched
    requests: list[Request | None]
    row_of: dict[int, int]


class PagedEngine(Engine):
    """`Engine` over pages. `num_slots` sequences of `max_tokens` fit, or more that are shorter or share prefixes.

    `num_pages` overrides that. `use_kernels` and `use_graphs` default to what the device can do; with neither, this
    runs on a CPU and samples the same trajectories as `Engine`. A token's bits may depend on its batch mates here.
    """

    def __init__(self, model: Decoder, eos_ids: set[int], num_slots: int, max_tokens: int, chunk_tokens: int = 512,
                 max_wait: float = 0.01, page_tokens: int = PAGE_TOKENS, num_pages: int | None = None,
                 use_kernels: bool | None = None, use_graphs: bool | None = None):
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; the sampler must hold 1 sequence or more")
        self.page_tokens, self._num_pages = page_tokens, num_pages
        super().__init__(model, eos_ids, num_slots, max_tokens, False, chunk_tokens, max_wait)
        if on_gpu := self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams, events and Triton go by it
        use_kernels = kernels_available(self.device) and page_tokens >= 16 if use_kernels is None else use_kernels
        self.decoder = DecodeStep(model, self.cache, min(num_slots + FEED_ROWS, MAX_ROWS), use_kernels,
                                  on_gpu if use_graphs is None else use_graphs)
        self._under_way: _UnderWay | None = None

    def _make_cache(self, num_slots: int) -> PagedCache:
        num_pages = self._num_pages or num_slots * pages_for(self.max_tokens, self.page_tokens)
        return PagedCache(self.model.config, num_pages, self.page_tokens, self.max_tokens, self.model.head_weight.dtype,
                          self.device)

    def fork(self, sequence: Sequence, key: bytes) -> Sequence:
        """A copy with noise of its own, which refers to the parent's pages from now on, whatever becomes of those."""
        child = super().fork(sequence, key)
        if sequence.cached > 0 and (slot := self.cache.take()) is not None:
            self._hold(slot, child, sequence, min(sequence.cached, len(child.ids) - 1))
        return child

    def truncate(self, sequence: Sequence, length: int, key: bytes) -> None:
        """Forget everything after the first `length` tokens, and give their pages back."""
        super().truncate(sequence, length, key)
        if sequence.slot is not None:
            self.cache.shrink(sequence.slot, sequence.cached)

    def self_test(self) -> bool:
        """False: that a token has the same bits in every batch is promised by `Engine` on a CPU alone."""
        return False

    @torch.inference_mode()
    def step(self) -> None:
        """Launch the next step, then read the tokens of the one before."""
        started = time.perf_counter()
        plan = self._plan()
        self.cache.copy(plan.copies)
        self._prefill(plan.prefills)
        before, self._under_way = self._under_way, self._launch(plan.decodes)
        for request in plan.read:
            self._finish(request, "length")
        if before is not None:
            self._read(before)
        self.counts.steps += 1
        self.counts.seconds += time.perf_counter() - started

    def _plan(self) -> _Plan:
        """First come, first served, as far as pages, rows and the prefill budget go."""
        feed_rows = max(0, self.decoder.max_rows - len(self._requests))
        plan, budget = _Plan([], [], [], [], [], feed_rows), PREFILL_TOKENS
        for request in list(self._requests):
            row = None if self._under_way is None else self._under_way.row_of.get(id(request))
            if row is not None:
                self._plan_next(plan, request, row)
            else:
                budget -= self._plan_unseen(plan, request, budget)
        for sequence, cached in plan.cached:
            sequence.cached, sequence.last_step = cached, self.counts.steps
        return plan

    def _plan_next(self, plan: _Plan, request: Request, row: int) -> None:
        """The request's last token is being sampled: read it where the device has it, without knowing it."""
        sequence, position = request.sequence, len(request.sequence.ids)
        goes_on = sequence.slot is not None and position + 1 < request.limit  # without a slot it was evicted meanwhile
        has_room = len(plan.decodes) < self.decoder.max_rows
        if goes_on and has_room and self._reserve(plan, request, position, position + 1):
            noise = uniform(sequence.key, position + 1)
            plan.decodes.append((request, NextToken(sequence.slot, position, 0, row, noise, request.sampling)))
            plan.cached.append((sequence, position + 1))

    def _plan_unseen(self, plan: _Plan, request: Request, budget: int) -> int:
        """Feed what the cache lacks, the last token by decoding; returns the tokens that need a prefill."""
        sequence, wanted = request.sequence, request.limit > len(request.sequence.ids)
        if sequence.slot is None and (plan.is_full or not self._admit_one(plan, request)):
            return 0
        start, last = sequence.cached, len(sequence.ids) - 1
        count = min(last - start, self.chunk_tokens, budget)
        decodes = wanted and start + count == last and len(plan.decodes) < self.decoder.max_rows
        end = start + count + decodes
        if end > start and not self._reserve(plan, request, start, end):
            return 0
        is_short = count <= plan.feed_rows
        if is_short:
            plan.feed_rows -= count
            plan.decodes += [(None, NextToken(sequence.slot, place, sequence.ids[place], -1, 0.0, NOT_SAMPLED))
                             for place in range(start, start + count)]
        else:
            plan.prefills.append((sequence, Row(sequence.slot, start, count)))
        if decodes:
            noise, token = uniform(sequence.key, last + 1), sequence.ids[-1]
            plan.decodes.append((request, NextToken(sequence.slot, last, token, -1, noise, request.sampling)))
        if not wanted and end == last:
            plan.read.append(request)
        plan.cached.append((sequence, end))
        return 0 if is_short else count

    def _admit_one(self, plan: _Plan, request: Request) -> bool:
        """Give the request's sequence a row of the block table, and the pages of its closest relative."""
        while (slot := self.cache.take()) is None:
            if not self._evict(plan, request):
                return False
        self._hold(slot, request.sequence, *closest_relative(request.sequence))
        return True

    def _hold(self, slot: int, sequence: Sequence, donor: Sequence | None, shared: int) -> None:
        if donor is not None:
            self.cache.share(donor.slot, slot, shared)
        sequence.slot, sequence.cached, sequence.last_step = slot, shared, self.counts.steps
        self._holders.append(sequence)

    def _reserve(self, plan: _Plan, request: Request, start: int, end: int) -> bool:
        """Make positions `start` to `end` writable, evicting others if need be; the plan gets the pages to copy."""
        slot = request.sequence.slot
        while (missing := self.cache.missing(slot, start, end)) > self.cache.num_free:
            if not self._evict(plan, request):
                plan.is_full = True
                return False
        copies = self.cache.prepare(slot, start, end) if missing else []
        plan.copies += copies
        self.counts.copied += start % self.page_tokens if copies else 0
        return True

    def _evict(self, plan: _Plan, request: Request) -> bool:
        """Take the pages of the least recently used idle sequence; if there is none, of the youngest request, for the
        sake of one that is decoding or of the first in line."""
        waiting = {id(other.sequence) for other in self._requests}
        idle = [other for other in self._holders if id(other) not in waiting]
        younger = self._requests[self._requests.index(request) + 1:]
        behind = [other.sequence for other in younger if other.sequence.slot is not None]
        is_decoding = self._under_way is not None and id(request) in self._under_way.row_of
        if idle:
            victim = min(idle, key=lambda other: other.last_step)
        elif behind and (is_decoding or not plan.cached):
            victim = behind[-1]
        else:
            return False
        self.counts.evictions += 1
        self.counts.evicted += victim.cached
        self._drop_slot(victim)
        return True

    def _prefill(self, prefills: list[tuple[Sequence, Row]]) -> None:
        """One forward over the chunks of all sequences that have any; their hidden states are not wanted."""
        if not prefills:
            return
        ids, rows = [], [row for _, row in prefills]
        for sequence, row in prefills:
            ids += sequence.ids[row.start:row.start + row.count]
        positions = [row.start + i for row in rows for i in range(row.count)]
        self.counts.fed += len(ids)
        token_ids_T, positions_T = (upload(values, torch.int64, self.device) for values in (ids, positions))
        with sdpa_kernel(PREFILL_BACKENDS):
            self.model(token_ids_T, positions_T, paged(self.cache, rows))

    def _launch(self, decodes: list[tuple[Request, NextToken]]) -> _UnderWay | None:
        if not decodes:
            return None
        requests = [request for request, _ in decodes]
        self.counts.fed += len(decodes)
        launched = self.decoder.launch([token for _, token in decodes])
        row_of = {id(request): row for row, request in enumerate(requests) if request is not None}
        return _UnderWay(launched, requests, row_of)

    def _read(self, step: _UnderWay) -> None:
        """Hand the tokens of a step out, except to those who have stopped meanwhile."""
        for request, token, logprob in zip(step.requests, *step.launched.results(), strict=True):
            if request is None:
                continue
            if request.future.done():
                self.counts.discarded += 1
                continue
            self.counts.sampled += 1
            self._extend(request, token, logprob)
            if len(request.sequence.ids) == request.limit:
                self._finish(request, "length")


def release_memory(device: str) -> None:
    """Between sampling and training: give back what torch keeps of memory that is free, on a GPU.

    What outlives a phase, as the optimizer's moments do, would else be put into the gaps that caches or activations
    left, and the next cache, one piece, would not find its place again.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def make_engine(model: Decoder, eos_ids: set[int], num_slots: int, max_tokens: int, exact: bool = True) -> Engine:
    """The engine for the model's device: `PagedEngine` on a GPU, `Engine` elsewhere, where `exact` means something."""
    if model.head_weight.device.type == "cuda":
        return PagedEngine(model, eos_ids, num_slots, max_tokens)
    return Engine(model, eos_ids, num_slots, max_tokens, exact=exact)
