"""Many processes as one: who this one is, the few things that all do together, FSDP2, weights out of the shards.

`torchrun --nproc-per-node N train_rl.py …` starts N ranks (on several machines by torchrun's rendezvous, nothing special
here); without it there is one process and nothing in here communicates. Invariants: gradients are summed over ranks and
never averaged, since every loss is divided by a count over all of them; all ranks call the functions marked "together" in
the same order; what they decide on is gathered first, so that they decide the same.

When a rank fails, it says why, the others end silently and torchrun ends the job; with `--max-restarts 3` it starts
again from the last checkpoint. Ctrl-C and SIGTERM reach a rank through torchrun, which kills after --shutdown-timeout
(30 s): give it the length of a round if the round is to be finished and saved.
"""

import asyncio
import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from thor.checkpoint import State, begin_checkpoint, complete_checkpoint
from thor.model import Decoder
from thor.weights import load_model

PATIENCE = timedelta(hours=2)  # how long a rank waits for the others, who may have one long trajectory left
OPTIMIZER = "optimizer"  # a directory in a checkpoint: the same format for one process and for many
MOMENTS = ("exp_avg", "exp_avg_sq")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them. `mesh` says which of them share the weights, `store` is what all of them read
    and write; both are None in a world of one."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    store: dist.Store | None = None
    _handouts: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0

    def first(self, act: Callable[[], Result]) -> Result:
        """Together: what `act` returns on the first rank, which alone calls it, and before anyone goes on."""
        if self.size == 1:
            return act()
        answer = [act() if self.is_first else None]
        dist.broadcast_object_list(answer)
        return answer[0]

    def gather(self, mine: Result) -> list[Result]:
        """Together: everyone's, in order of rank; one's own is the very object that was given, the others copies."""
        if self.size == 1:
            return [mine]
        everyone: list[Result] = [mine] * self.size
        dist.all_gather_object(everyone, mine)
        everyone[self.rank] = mine
        return everyone

    def collect(self, mine: dict[int, Result], total: int) -> list[Result]:
        """Together: the results of places 0 to `total` − 1, each of which one rank has, in order of place."""
        found = {place: result for part in self.gather(mine) for place, result in part.items()}
        assert found.keys() == set(range(total)), f"places 0 to {total - 1} were to be filled, got {sorted(found)}"
        return [found[place] for place in range(total)]

    def add_up(self, mine: dict[str, float]) -> dict[str, float]:
        """Together: sums over all ranks, added in order of rank; of what is called `…_max` the largest."""
        everyone = self.gather(mine)
        return {name: (max if name.endswith("_max") else sum)(part[name] for part in everyone) for name in mine}

    async def spread(self, items: Sequence[Item], work: Callable[[Item, Callable[[], None]], Awaitable[Result]],
                     limit: int, weight: int = 1) -> list[Result]:
        """Together: `await work(item, ended)` of every item, each on one rank; all results, in order of item.

        An item brings `weight` trajectories, and `work` calls `ended` as each of them ends. Items are handed out one by
        one by a counter that all ranks share: a rank takes the next when it has fewer than `limit` trajectories under
        way (or than its even share, if that is less). So a slow rank, or one with a long trajectory, takes fewer items.
        At the end the others wait for its last one, since a round needs them all; they take nothing back from it, nor
        its failed steps, whose caches only it has. Who worked is not seen in a result.
        """
        next_place, done = self._handout(), {}
        limit = min(limit, -(-len(items) * weight // self.size))
        under_way, vacancy, turn = 0, asyncio.Event(), asyncio.Lock()

        def ended() -> None:
            nonlocal under_way
            under_way -= 1
            vacancy.set()

        async def take_one() -> None:
            nonlocal under_way
            async with turn:
                while under_way >= limit:
                    vacancy.clear()
                    await vacancy.wait()
                place = next_place()
                under_way += weight
            if place < len(items):
                done[place] = await work(items[place], ended)
            else:
                under_way -= weight

        await asyncio.gather(*(take_one() for _ in items))
        return self.collect(done, len(items))

    def _handout(self) -> Callable[[], int]:
        """A counter from 0 that all ranks share, if they ask for it the same number of times."""
        number = next(self._handouts)
        if self.store is None:
            return itertools.count().__next__
        return lambda: self.store.add(f"handout {number}", 1) - 1


@contextmanager
def open_ranks(device: str, replicas: int = 1, *, mixed: bool = False,
               patience: timedelta = PATIENCE) -> Iterator[Ranks]:
    """The ranks that torchrun started, or a world of one, which has a mesh only if it is `mixed`.

    Mixed precision is FSDP2's: float32 shares, of which a layer at a time is gathered in bfloat16, so that one process
    computes and sums as many do; it needs a mesh, be it of one. `replicas` groups of ranks each hold all weights
    between them, gradients are summed over both (HSDP): one group a machine keeps the traffic of weights inside it.
    ValueError if the ranks cannot be divided so. Of several ranks that raise, the first one's error is seen.
    """
    size, kind = int(os.environ.get("WORLD_SIZE", "1")), torch.device(device).type
    if replicas < 1 or size % replicas:
        raise ValueError(f"replicas is {replicas}; it must divide the number of ranks, which is {size}")
    if size == 1 and not mixed:
        yield Ranks()
        return
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank = dist.HashStore(), 0
    if size > 1:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    # torchrun's store outlives a restart, and the addresses in it are those of processes that are gone
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", rank=rank, world_size=size,
                            store=dist.PrefixStore("group", store), timeout=patience)
    shape, names = ((size,), ("shards",)) if replicas == 1 else ((replicas, size // replicas), ("replicas", "shards"))
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    dist.all_reduce(torch.zeros(1))  # nobody who fails at once takes the store away from one that is still joining
    try:
        yield Ranks(rank, size, mesh, store)
    except Exception:
        if not _is_first_to_fail(store):
            sys.exit(1)  # what this one saw is that another is gone
        raise
    dist.destroy_process_group()


def _is_first_to_fail(store: dist.Store) -> bool:
    """Whether no other rank has failed so far. The store goes with the rank that keeps it, which then was the first."""
    try:
        return store.add("failed", 1) == 1
    except dist.DistError:
        return False


def load_sharded(directory: str | Path, ranks: Ranks, device: str, compute_dtype: torch.dtype | None = None,
                 offload: bool = False) -> Decoder:
    """The model of a Hugging Face directory with float32 weights: this rank's share, or all of it without a mesh.

    With several ranks the files stay where they are, mapped, until a layer is converted, divided and put on the device.
    """
    if ranks.mesh is None:
        return load_model(directory, torch.float32, device)
    return shard(load_model(directory, None), ranks, torch.float32, compute_dtype, offload)


def shard(model: Decoder, ranks: Ranks, dtype: torch.dtype | None = None,
          compute_dtype: torch.dtype | None = None, offload: bool = False) -> Decoder:
    """The same model with its parameters divided over the ranks, layer by layer, on their devices; make the optimizer
    afterwards. Without a mesh the model as it is.

    `dtype` is that of the shares, `compute_dtype` that of arithmetic and gathered weights, with float32 sums of
    gradients; None leaves it as it is. Embedding, last norm and head stay whole from the forward to the end of the
    backward pass: `model.logits` uses the head in between, outside of `forward`, and again where a chunk is recomputed.
    With `offload` shares, their gradients and so the optimizer's moments are on the CPU (CUDA only).
    """
    if ranks.mesh is None:
        return model
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32 if compute_dtype else None)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in model.model["layers"]:
        fully_shard(layer.to(dtype), mesh=ranks.mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=True)
    for module in outside_layers(model):
        module.to(dtype)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def outside_layers(model: Decoder) -> list[torch.nn.Module]:
    """Embedding, last norm, and the head where it has weights of its own."""
    return [model.model["embed_tokens"], model.model["norm"], *([] if model.config.tied_head else [model.lm_head])]


@torch.no_grad()
def full_parameters(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Together: name and whole tensor of each parameter, one after another, so that one is in memory if one is kept."""
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward without a backward pass the root's are still whole
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach())


def whole(tensor: Tensor) -> Tensor:
    """Together: a tensor that may be divided over the ranks, in one piece, on the mesh's device."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.to(tensor.device_mesh.device_type).full_tensor()  # offloaded shares would go through gloo
    padded = full.untyped_storage().nbytes() > full.nbytes  # so uneven shards come, and safetensors does not take that
    return full.clone() if padded else full


def full_copy(model: Decoder, dtype: torch.dtype | None = None, device: str | None = None) -> Decoder:
    """Together: a sampler's model with the weights as they are now, in `dtype` on `device` (None: as there), on each rank.

    Filled parameter by parameter: beside the copy itself one whole parameter is in memory. A model that is not sharded
    is its own sampler's. Where the copy and its KV cache exceed one device, sampling would have to be tensor-parallel, which this is
    not: with 80 GB, in bf16, from about 20 billion parameters on (docs/scale.md).
    """
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        copy = Decoder(model.config)
    copy.load_state_dict({name: tensor.to(device, dtype) for name, tensor in full_parameters(model)}, assign=True)
    return copy.requires_grad_(False)


def save_checkpoint(ranks: Ranks, directory: Path, step: int, model: Decoder, optimizer: torch.optim.Optimizer,
                    model_directory: str | Path, state: State, keep: int) -> Path:
    """Together: write `step_N/`, whole or not at all (thor/checkpoint.py), on a disk that all ranks share.

    The first rank gathers the weights one by one and holds them on its CPU until they are written; each rank writes its
    share of the optimizer's moments. OSError if the disk is full or the like; what was there before is whole then.
    """
    aside = ranks.first(lambda: begin_checkpoint(directory, step))
    try:
        weights = {name: tensor.cpu() for name, tensor in full_parameters(model) if ranks.is_first}
        if optimizer.state:
            _transfer(dcp.save, _moments(model, optimizer), aside / OPTIMIZER, ranks)
        return ranks.first(lambda: complete_checkpoint(aside, weights, Path(model_directory), state, keep))
    finally:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)


def load_optimizer(ranks: Ranks, checkpoint: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    """Together: AdamW's moments as they were saved, whatever the number of ranks then; each rank reads its share.

    Learning rate, decay and the like are options of the run and not in it. A run without an optimizer step has none.
    """
    if not (checkpoint / OPTIMIZER).is_dir():
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    zeros = {number: {"step": torch.zeros(()), **{name: torch.zeros_like(parameter.detach()) for name in MOMENTS}}
             for number, parameter in enumerate(parameters)}
    optimizer.load_state_dict({"state": zeros, "param_groups": optimizer.state_dict()["param_groups"]})
    _transfer(dcp.load, _moments(model, optimizer), checkpoint / OPTIMIZER, ranks)


def _transfer(act: Callable[..., object], moments: dict[str, Tensor], directory: Path, ranks: Ranks) -> None:
    """`dcp.save` or `dcp.load`; what goes wrong there is an OSError, as in every other file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what was asked for
        try:
            act(moments, checkpoint_id=directory, no_dist=ranks.size == 1)
        except dcp.CheckpointException as error:
            raise OSError(f"{directory} cannot be written or read ({error})") from None


def _moments(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state under the parameters' names, which do not depend on their order, divided as they are."""
    return {f"{name}.{key}": tensor for name, parameter in model.named_parameters()
            for key, tensor in optimizer.state[parameter].items()}


if __name__ == "__main__":
    from thor.plan import main

    main()
