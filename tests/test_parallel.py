"""Many ranks against one: gradients, weights, checkpoints, the handing out of work. Gloo processes on a CPU."""

import asyncio
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_batch import SHAPE, make_samples
from torch import Tensor

from thor.batch import Sample, deal_packs, loss_tokens, make_pack, score
from thor.grpo import Counts, LossOptions, count_tokens, hierarchical_loss
from thor.model import Decoder
from thor.optimizer import Skips, make_optimizer, take_step
from thor.parallel import Ranks, full_copy, full_parameters, load_optimizer, open_ranks, save_checkpoint, shard, whole
from train_sft import SftOptions, Trainer, evaluate, train_step

BUDGET = 25  # tokens of a pack
ALONE = Ranks()


def make_model(tied: bool = True) -> Decoder:
    """The same random weights in every process."""
    torch.manual_seed(0)
    return Decoder(replace(SHAPE, tied_head=tied)).double()


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def weights(model: Decoder) -> dict[str, Tensor]:
    """As they are now."""
    return {name: tensor.clone() for name, tensor in full_parameters(model)}


def add_gradients(model: Decoder, ranks: Ranks, samples: list[Sample], budget: int) -> tuple[float, list[int]]:
    """Eq. 8 as train_rl.optimizer_step does it, in float64: the loss, and the sizes of this rank's packs."""
    packs = deal_packs([len(sample.ids) for sample in samples], budget, ranks.size)[ranks.rank]
    members = [[samples[place] for place in pack] for pack in packs]
    laid = [make_pack(group) for group in members]
    tokens = [loss_tokens(group, pack, torch.float64) for group, pack in zip(members, laid, strict=True)]
    counts, loss = sum(ranks.gather(sum(map(count_tokens, tokens), Counts())), Counts()), 0.0
    for pack, known in zip(laid, tokens, strict=True):
        share = hierarchical_loss(score(model, pack, chunk_tokens=5)[0], known, counts, LossOptions())
        share.backward()
        loss += share.item()
    return ranks.add_up({"loss": loss})["loss"], [len(group) for group in members]


def sft_trainer(model: Decoder, ranks: Ranks) -> Trainer:
    """Seven sequences in one batch, three held out; the clip is out of reach."""
    samples = [replace(sample, is_step=False) for sample in make_samples(10)]
    options = SftOptions(batch=7, epochs=1, micro_tokens=BUDGET, max_grad_norm=1e9, warmup=0.0, lr=1e-3)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.999), 0.1)
    return Trainer(options, model, optimizer, samples[:7], samples[7:], Skips(), ranks)


def everything(ranks: Ranks, directory: Path) -> dict[str, object]:
    """All that several tests look at, computed by one set of ranks or by a world of one."""
    found = {}
    for tied in (True, False):
        model = shard(make_model(tied), ranks)
        found[f"loss {tied}"], found[f"packs {tied}"] = add_gradients(model, ranks, make_samples(7), BUDGET)
        found[f"gradient {tied}"] = gradients(model)
    model = shard(make_model(), ranks)
    found["few"] = add_gradients(model, ranks, make_samples(3), 1000), gradients(model)
    model = shard(make_model(), ranks)
    trainer = sft_trainer(model, ranks)
    found["sft"] = [evaluate(trainer), train_step(trainer, 1), evaluate(trainer)]
    found["after sft"] = weights(model)
    found["copy"] = weights(full_copy(model))
    add_gradients(model, ranks, make_samples(7), BUDGET)
    found["norm"] = take_step(model, trainer.optimizer, 0.0, 1e-3, 0.01, Skips())
    found["clipped"] = weights(model)
    evaluate(trainer)  # a forward alone leaves the root's parameters whole, which saving must not mind
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model/config.json").write_text('{"model_type": "llama"}')
    save_checkpoint(ranks, directory, 1, model, trainer.optimizer, directory / "model", {"step": 1}, 0)
    found["moments"] = moments(model, trainer.optimizer)
    return found


def moments(model: Decoder, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {f"{name}.{key}": whole(value) for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()}


def resumed(ranks: Ranks, checkpoint: Path) -> dict[str, Tensor]:
    """The moments of a checkpoint, read by a model with other weights."""
    model = shard(make_model(), ranks)
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.999), 0.1)
    load_optimizer(ranks, checkpoint, model, optimizer)
    return moments(model, optimizer)


WORLDS = {"two": (2, 1), "four": (4, 1), "four in two replicas": (4, 2)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("ranks") for name in ("one", *WORLDS)}


@pytest.fixture(scope="module")
def one(directories) -> dict[str, object]:
    """What a world of one computes."""
    return everything(ALONE, directories["one"])


@pytest.fixture(scope="module")
def many(directories) -> dict[str, list[dict[str, object]]]:
    """What each rank of each world computes."""
    return {name: on_ranks(size, everything, directories[name], replicas=replicas)
            for name, (size, replicas) in WORLDS.items()}


@pytest.fixture(params=WORLDS)
def each(request, many) -> list[dict[str, object]]:
    return many[request.param]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_and_loss_of_eq_8_do_not_depend_on_the_number_of_ranks(one, each, tied):
    for rank in each:
        assert rank[f"loss {tied}"] == pytest.approx(one[f"loss {tied}"], rel=1e-9)
        assert_close(rank[f"gradient {tied}"], one[f"gradient {tied}"])
    sizes = [rank[f"packs {tied}"] for rank in each]
    assert len({len(packs) for packs in sizes}) == 1 and len({tuple(packs) for packs in sizes}) > 1, "uneven packs"


def test_a_rank_without_a_sequence_runs_the_same_forward_and_adds_nothing(one, many):
    (loss, _), expected = one["few"]
    sizes = []
    for rank in many["four"]:
        (found, packs), gradient = rank["few"]
        assert found == pytest.approx(loss, rel=1e-9)
        assert_close(gradient, expected)
        sizes += packs
    assert sorted(sizes) == [0, 1, 1, 1]


def test_a_step_of_the_cold_start_and_its_evaluation_do_not_depend_on_the_number_of_ranks(one, each):
    before, step, after = one["sft"]
    for rank in each:
        assert rank["sft"][0] == pytest.approx(before, rel=1e-9)
        assert rank["sft"][1] == {name: pytest.approx(value, rel=1e-9) for name, value in step.items()}
        assert rank["sft"][2] == pytest.approx(after, rel=1e-9) != before
        assert_close(rank["after sft"], one["after sft"])


def test_gradients_are_clipped_by_the_norm_over_all_ranks(one, each):
    for rank in each:
        assert rank["norm"] == pytest.approx(one["norm"], rel=1e-9)
        assert_close(rank["clipped"], one["clipped"])
    assert one["norm"] > 0.01, "the clip is at work"


def test_every_rank_samples_with_the_same_bits_of_the_weights_that_were_trained(each):
    for rank in each:
        assert rank["copy"].keys() == rank["after sft"].keys()
        assert all(torch.equal(rank["copy"][name], each[0]["after sft"][name]) for name in rank["copy"])


@pytest.mark.parametrize("saved, size", [("two", 1), ("two", 4), ("one", 2), ("four in two replicas", 1)])
def test_a_checkpoint_can_be_continued_on_another_number_of_ranks(one, many, directories, saved, size):
    expected = one["moments"] if saved == "one" else many[saved][0]["moments"]
    checkpoint = directories[saved] / "step_1"
    for found in [resumed(ALONE, checkpoint)] if size == 1 else on_ranks(size, resumed, checkpoint):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(list((checkpoint / "optimizer").glob("*.distcp"))) == (WORLDS[saved][0] if saved in WORLDS else 1)


def test_the_weights_of_a_checkpoint_are_one_model_whatever_the_number_of_ranks(many, directories):
    from safetensors.torch import load_file
    for name, ranks in many.items():
        found = load_file(directories[name] / "step_1/model.safetensors")
        assert found.keys() == ranks[0]["clipped"].keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in ranks[0]["clipped"].items())


def hand_out(ranks: Ranks, limit: int, weight: int) -> tuple[list[tuple[int, int]], int, int]:
    """(rank, item) of all items in order, the items that this rank did, the most trajectories that it had under way.

    With a second rank, the first is slow: its first item ends when the second has done eight, and the second, however
    early it starts, ends none before the first has one.
    """
    mine, under_way, most = [], 0, 0

    async def wait_for(what: str) -> None:
        while not ranks.store.check([what]):
            await asyncio.sleep(0.001)

    async def work(item: int, ended) -> tuple[int, int]:
        nonlocal under_way, most
        mine.append(item)
        under_way += weight
        most = max(most, under_way)
        if ranks.size > 1:
            if ranks.rank == 0:
                ranks.store.set("the slow one has an item", "")
                await wait_for("the fast one has done eight")
            else:
                await wait_for("the slow one has an item")
                if len(mine) >= 8:
                    ranks.store.set("the fast one has done eight", "")
        for _ in range(weight):
            await asyncio.sleep(0)
            under_way -= 1
            ended()
        return ranks.rank, item

    first = asyncio.run(ranks.spread(range(12), work, limit, weight))
    again = asyncio.run(ranks.spread(range(3), work, limit, weight))
    assert [item for _, item in again] == [0, 1, 2]
    return first, len(mine), most


def test_a_slow_rank_takes_fewer_items_and_results_come_in_order_of_item():
    answers = on_ranks(2, hand_out, 2, 2)
    (found, _, _), (other, _, _) = answers
    assert found == other and [item for _, item in found] == list(range(12))
    workers = [rank for rank, _ in found]
    assert 1 <= workers.count(0) <= 4 and workers.count(1) >= 8
    assert sum(count for _, count, _ in answers) == 15, "each item is one rank's work"


@pytest.mark.parametrize("limit, weight", [(1, 1), (4, 1), (3, 2), (1, 5)])
def test_no_item_is_taken_while_as_many_trajectories_are_under_way_as_there_may_be(limit, weight):
    found, count, most = hand_out(ALONE, limit, weight)
    assert [item for _, item in found] == list(range(12)) and count == 15
    assert most <= limit - 1 + weight


def what_all_do(ranks: Ranks) -> tuple:
    box = [ranks.rank]
    everyone = ranks.gather(box)
    summed = ranks.add_up({"tokens": 0.1 * (ranks.rank + 1), "gap_max": float(-ranks.rank)})
    mine = {place: f"{place} by {ranks.rank}" for place in range(5) if place % ranks.size == ranks.rank}
    said = ranks.first(lambda: f"said by {ranks.rank}")
    return said, everyone, everyone[ranks.rank] is box, summed, ranks.collect(mine, 5)


def test_sums_first_and_gathered_are_the_same_on_all_ranks():
    answers = on_ranks(4, what_all_do)
    for said, everyone, own, summed, collected in answers:
        assert said == "said by 0" and everyone == [[0], [1], [2], [3]] and own
        assert summed == {"tokens": pytest.approx(1.0), "gap_max": 0.0}
        assert collected == ["0 by 0", "1 by 1", "2 by 2", "3 by 3", "4 by 0"]
    assert what_all_do(ALONE)[3] == {"tokens": 0.1, "gap_max": 0.0}


def one_forward_more(ranks: Ranks) -> None:
    """The second rank goes through the model twice, the first one once, and then waits for it."""
    model = shard(make_model(), ranks)
    for _ in range(1 + ranks.rank):
        score(model, make_pack(make_samples(2)))[0].sum().backward()
    time.sleep(15 * (1 - ranks.rank))


def test_ranks_with_uneven_numbers_of_forwards_do_not_wait_for_ever():
    with pytest.raises(AssertionError, match=r"(?is)rank \d: .*timed out"):
        on_ranks(2, one_forward_more, patience=timedelta(seconds=5))


def test_a_number_of_replicas_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ValueError, match="replicas is 2; it must divide the number of ranks, which is 1"):
        with open_ranks("cpu", 2):
            pass
