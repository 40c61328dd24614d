"""Continuous batching: any number of sequences ask for tokens, and every step feeds all of them at once.

There is no prefill path and no decode path. A step gives each waiting sequence the tokens its cache has not seen (a new
prompt, an observation, what follows a backtrack, an evicted sequence, or just the last sampled token) and samples one
token where that was all. Invariants: `cached` tokens of a sequence are in its slot and equal a plain forward's; a
sequence that waits has at least one token its cache has not seen; a sequence's tokens do not depend on who else is in
the step (on a CPU bit for bit, see `exact` and `self_test`).
"""

import asyncio
import bisect
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thor.attention import Row, feed, head
from thor.cache import KVCache
from thor.model import Decoder
from thor.sampling import Sampling, sample_tokens, uniform

FULL_SHARE = 0.25  # of the sequences in memory: a batch for which no step waits


@dataclass(eq=False)
class Sequence:
    """Token ids with the log-probs of the sampled ones (None for prompt and observation), and how far they are cached.

    `family` holds the sequences forked from one another: whoever of them needs a prefix copies it from a relative.
    """

    ids: list[int]
    key: bytes
    logprobs: list[float | None]
    family: list["Sequence"]
    slot: int | None = None
    cached: int = 0
    last_step: int = 0
    waiting: asyncio.Future | None = None

    @property
    def idle(self) -> bool:
        """Nobody waits for its tokens."""
        return self.waiting is None or self.waiting.done()


@dataclass
class Counts:
    """What the engine did, in tokens unless the name says otherwise; `seconds` of its steps, by the clock.

    `discarded` tokens were sampled for a sequence that had stopped one step earlier; only `PagedEngine` has any.
    """

    steps: int = 0
    seconds: float = 0.0
    fed: int = 0
    sampled: int = 0
    copied: int = 0
    evictions: int = 0
    evicted: int = 0
    discarded: int = 0


@dataclass(eq=False)
class Request:
    """A coroutine that waits until its sequence has `limit` tokens, an EOS, or `stop(token)` says so."""

    sequence: Sequence
    sampling: Sampling
    limit: int
    stop: Callable[[int], bool] | None
    future: asyncio.Future = field(repr=False)

    @property
    def unseen(self) -> int:
        return len(self.sequence.ids) - self.sequence.cached


class Engine:
    """Sampler over one model. `num_slots` sequences are in memory at once; the rest wait or are recomputed.

    `exact` pads every step to a multiple of 8 rows, which makes a token independent of its batch mates on a CPU.
    `chunk_tokens` is the most one sequence is fed in a step, so that a long prompt does not stall the others.
    `max_wait`: seconds that a step waits for a batch to fill up, while most sequences are away, running code.
    """

    def __init__(self, model: Decoder, eos_ids: set[int], num_slots: int, max_tokens: int, exact: bool = True,
                 chunk_tokens: int = 512, max_wait: float = 0.01):
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; a step must feed a sequence 1 token or more")
        weight = model.head_weight
        self.model, self.eos_ids, self.max_tokens = model, frozenset(eos_ids), max_tokens
        self.device, self.exact, self.chunk_tokens = weight.device, exact, chunk_tokens
        self.cache = self._make_cache(num_slots)
        self.counts = Counts()
        self._requests: list[Request] = []
        self._holders: list[Sequence] = []  # sequences with a slot, least recently used first
        self._driver: asyncio.Task | None = None
        self.max_wait = max_wait
        self._submitted, self._waited_for = 0, -1  # requests so far, and how many there were at a wait for nothing

    def _make_cache(self, num_slots: int) -> KVCache:
        return KVCache(self.model.config, num_slots, self.max_tokens, self.model.head_weight.dtype, self.device)

    def new(self, ids: list[int], key: bytes) -> Sequence:
        """A sequence that starts with `ids` (at least one, at most `max_tokens`) and draws its noise from `key`."""
        if not 0 < len(ids) <= self.max_tokens:
            raise ValueError(f"a sequence of {len(ids)} tokens does not fit the context of {self.max_tokens}")
        sequence = Sequence(list(ids), key, [None] * len(ids), [])
        sequence.family.append(sequence)
        return sequence

    def fork(self, sequence: Sequence, key: bytes) -> Sequence:
        """A copy with noise of its own. Its cache is copied from the family when it is first fed, not now."""
        child = Sequence(list(sequence.ids), key, list(sequence.logprobs), sequence.family)
        sequence.family.append(child)
        return child

    def truncate(self, sequence: Sequence, length: int, key: bytes) -> None:
        """Forget everything after the first `length` tokens; `key` gives what comes next fresh noise."""
        assert sequence.idle, "a sequence was truncated while it is being sampled"
        assert 0 < length <= len(sequence.ids), f"cannot cut {len(sequence.ids)} tokens to {length}"
        del sequence.ids[length:], sequence.logprobs[length:]
        sequence.cached, sequence.key = min(sequence.cached, length), key

    def append(self, sequence: Sequence, ids: list[int]) -> None:
        """Add tokens that were not sampled: an observation. They are fed in one pass with the last sampled token."""
        assert sequence.idle, "a sequence was appended to while it is being sampled"
        if len(sequence.ids) + len(ids) > self.max_tokens:
            raise ValueError(f"{len(ids)} tokens after {len(sequence.ids)} exceed the context of {self.max_tokens}")
        sequence.ids += ids
        sequence.logprobs += [None] * len(ids)

    def free(self, sequence: Sequence) -> None:
        """Give the sequence's memory back. It must not be used again."""
        assert sequence.idle, "a sequence was freed while it is being sampled"
        self._drop_slot(sequence)
        sequence.family.remove(sequence)

    @torch.inference_mode()
    def self_test(self) -> bool:
        """Whether here a token's logits have the same bits alone and in a batch, in one pass and recomputed.

        If not, trajectories are still exact samples with exact log-probs, but they are not repeatable across batches.
        """
        alone = [[Row(0, 0, 146)]]  # of 192 keys that a product reads, while in the last step there are 256
        mixed = [[Row(0, 0, 1), Row(2, 0, 33), Row(3, 0, 5)],
                 [Row(0, 1, 1), Row(2, 33, 112)],
                 [Row(0, 2, 1), Row(1, 0, 1), Row(2, 145, 1), Row(3, 250, 1)]]
        last = []
        for steps, slot in ((alone, 0), (mixed, 2)):
            cache = KVCache(self.model.config, 4, 256, self.cache.keys.dtype, self.device)
            for rows in steps:
                tokens = [31 * (row.start + i) % self.model.config.vocab_size for row in rows for i in range(row.count)]
                hidden = feed(self.model, cache, rows, tokens, self.exact)
            end = sum(row.count for row in rows if row.slot <= slot)
            last.append(head(self.model, hidden[end - 1:end], self.exact))
        return torch.equal(*last)

    async def prefill(self, sequence: Sequence) -> None:
        """Feed all but the last token without sampling, so that forks find it: a group's prompt is read once."""
        if len(sequence.ids) - 1 > sequence.cached:
            await self._submit(sequence, Sampling(), len(sequence.ids), None)

    async def sample(self, sequence: Sequence, sampling: Sampling, max_new_tokens: int,
                     stop: Callable[[int], bool] | None = None) -> str:
        """Extend the sequence until `stop(token)` is true ("stop"), an EOS ("eos") or the limit ("length")."""
        limit = min(len(sequence.ids) + max_new_tokens, self.max_tokens)
        if len(sequence.ids) >= limit:
            return "length"
        return await self._submit(sequence, sampling, limit, stop)

    async def _submit(self, sequence: Sequence, sampling: Sampling, limit: int,
                      stop: Callable[[int], bool] | None) -> str:
        assert sequence.idle, "two coroutines sample one sequence"
        sequence.waiting = future = asyncio.get_running_loop().create_future()
        sequence.cached = min(sequence.cached, len(sequence.ids) - 1)  # after a truncation: the last token is fed again
        self._requests.append(Request(sequence, sampling, limit, stop, future))
        self._submitted += 1
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        """Step while anyone waits. Between steps the event loop runs whoever was answered, and reads the sandbox."""
        while self._requests:
            for _ in range(3):  # a finished coroutine needs a few turns of the loop to ask for its next tokens
                await asyncio.sleep(0)
            await self._fill_batch()
            self._requests = [request for request in self._requests if not request.future.done()]
            try:
                if self._requests:
                    self.step()
            except Exception as error:  # whoever waits must hear of it, or the run would hang
                for request in self._requests:
                    self._drop_slot(request.sequence)  # what its cache holds is not known any more
                    if not request.future.done():
                        request.future.set_exception(error)
                self._requests = []

    async def _fill_batch(self) -> None:
        """Wait a little while most sequences are away, running code: a step for a few costs nearly what one for all does,
        and takes the processor from the code that they wait for. What is sampled does not depend on it."""
        give_up, submitted = time.monotonic() + self.max_wait, self._submitted
        if submitted == self._waited_for:  # nobody has come since the last wait, which was for nothing
            return
        while len(self._requests) < FULL_SHARE * len(self._holders) and time.monotonic() < give_up:
            await asyncio.sleep(self.max_wait / 10)
        self._waited_for = submitted if self._submitted == submitted else -1

    @torch.inference_mode()
    def step(self) -> None:
        """Feed every waiting sequence that has (or gets) a slot, and sample one token where nothing is left to feed."""
        started = time.perf_counter()
        admitted = self._admit()
        batch = [request for request in admitted if self._to_feed(request) > 0]
        fed = [min(self._to_feed(request), self.chunk_tokens) for request in batch]
        if batch:
            hidden = self._forward(batch, fed)
        ends = torch.tensor(fed).cumsum(0) - 1
        sampled = [i for i, request in enumerate(batch) if request.unseen == 0]
        for sampling in {batch[i].sampling: None for i in sampled}:
            same = [i for i in sampled if batch[i].sampling == sampling]
            self._sample(hidden[ends[same].to(self.device)], [batch[i] for i in same])
        for request in admitted:
            if request.limit == len(request.sequence.ids) and request.unseen <= 1:
                self._finish(request, "length")
        self.counts.steps += 1
        self.counts.seconds += time.perf_counter() - started

    def _to_feed(self, request: Request) -> int:
        """Unseen tokens, less the last one when no token is wanted after them (a prefill)."""
        return request.unseen - (request.limit == len(request.sequence.ids))

    def _forward(self, batch: list[Request], fed: list[int]) -> Tensor:
        """Hidden states of the fed tokens in order of the batch (which is order of slot), padding rows at the end."""
        rows, ids = [], []
        for request, count in zip(batch, fed, strict=True):
            sequence, start = request.sequence, request.sequence.cached
            rows.append(Row(sequence.slot, start, count))
            ids += sequence.ids[start:start + count]
            sequence.cached, sequence.last_step = start + count, self.counts.steps
        self.counts.fed += len(ids)
        return feed(self.model, self.cache, rows, ids, self.exact)

    def _sample(self, hidden: Tensor, requests: list[Request]) -> None:
        """Draw one token for each request from its last hidden state, and finish those that are done."""
        noise = [uniform(request.sequence.key, len(request.sequence.ids)) for request in requests]
        tokens, logprobs = sample_tokens(head(self.model, hidden, self.exact), noise, requests[0].sampling)
        self.counts.sampled += len(requests)
        for request, token, logprob in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True):
            self._extend(request, token, logprob)

    def _extend(self, request: Request, token: int, logprob: float) -> None:
        """Add a sampled token, and finish the request if that was its last one; the limit is the caller's to check."""
        if not math.isfinite(logprob):
            raise ValueError(f"the model's logits are not finite after {len(request.sequence.ids)} tokens")
        request.sequence.ids.append(token)
        request.sequence.logprobs.append(logprob)
        stopped = request.stop is not None and request.stop(token)
        if token in self.eos_ids:
            self._finish(request, "eos")
        elif stopped:
            self._finish(request, "stop")

    def _finish(self, request: Request, reason: str) -> None:
        if not request.future.done():
            request.future.set_result(reason)
        self._requests = [other for other in self._requests if other is not request]

    def _admit(self) -> list[Request]:
        """Requests whose sequence has a slot, first come first served, in order of slot."""
        waiting = {id(request.sequence) for request in self._requests}
        for request in self._requests:
            if request.sequence.slot is None and not self._take_slot(request.sequence, waiting):
                break
        batch = [request for request in self._requests if request.sequence.slot is not None]
        return sorted(batch, key=lambda request: request.sequence.slot)

    def _take_slot(self, sequence: Sequence, waiting: set[int]) -> bool:
        """Give `sequence` a slot, evicting the least recently used idle one if need be, and its family's prefix."""
        donor, shared = closest_relative(sequence)
        slot = self.cache.take()
        if slot is None:
            idle = [other for other in self._holders if id(other) not in waiting]
            if not idle:
                return False
            victim = min(idle, key=lambda other: other.last_step)
            self.counts.evictions += 1
            self.counts.evicted += victim.cached
            self._drop_slot(victim)
            slot = self.cache.take()
        if donor is not None and donor.slot is None:  # it was evicted just now: its contents are still in this slot
            self.counts.evicted -= shared
        elif donor is not None:
            self.cache.copy(donor.slot, slot, shared)
            self.counts.copied += shared
        sequence.slot, sequence.cached, sequence.last_step = slot, shared, self.counts.steps
        bisect.insort(self._holders, sequence, key=lambda other: other.slot)
        return True

    def _drop_slot(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.cache.release(sequence.slot)
            self._holders.remove(sequence)
            sequence.slot, sequence.cached = None, 0


def closest_relative(sequence: Sequence) -> tuple[Sequence | None, int]:
    """The family member whose cache holds most of this sequence's tokens, and how many (one is left to feed)."""
    best, most = None, 0
    for other in sequence.family:
        if other.slot is None or min(other.cached, len(sequence.ids) - 1) <= most:
            continue
        shared = min(_common_prefix(other.ids, sequence.ids), other.cached, len(sequence.ids) - 1)
        if shared > most:
            best, most = other, shared
    return best, most


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading elements two lists share, by bisection: comparing slices is fast."""
    return bisect.bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda length: a[:length] != b[:length])


def warn_if_inexact(engine: Engine) -> None:
    """Say aloud when this machine's libraries break the promise about batch mates."""
    if engine.exact and engine.device.type == "cpu" and not engine.self_test():
        print("warning: on this machine a token's logits depend on its batch; trajectories are exact samples, but not "
              "repeatable across batches", file=sys.stderr)
