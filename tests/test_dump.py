"""The dump of a round: it changes no number, holds every sample and every trained token, and is whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_rl
from thor import config
from thor.dump import RoundDump
from thor.trajectory import OBSERVE, Trajectory, from_json

SETTINGS = ["--style", "base", "--instruction", "", "--problems_per_round", "8", "--samples", "6", "--branches", "6",
            "--updates_per_round", "2", "--max_response_tokens", "60", "--suffix_tokens", "6", "--max_branch_tokens",
            "40", "--min_response_tokens", "0", "--box_within_last", "0", "--min_group_fraction", "0.25", "--lr",
            "3e-4", "--nll_weight", "0.1", "--threads", "1", "--slots", "32", "--groups_per_round", "3", "--max_passes",
            "2"]
FILES = {"settings.json", "trajectories.jsonl", "branches.jsonl", "samples.jsonl", "tokens.safetensors",
         "updates.jsonl", "metrics.json"}


@pytest.fixture(scope="module")
def runs(tiny_directory, tmp_path_factory) -> dict[str, Path]:
    """Two rounds, both dumped; the same two without a dump of the first, in two sittings."""
    folder = tmp_path_factory.mktemp("runs")
    problems = folder / "problems.jsonl"
    lines = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(6)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"dumped": folder / "dumped", "resumed": folder / "resumed"}
    for name, more in (("dumped", ["--rounds", "2", "--dump_every", "1"]), ("resumed", ["--rounds", "1"]),
                       ("resumed", ["--rounds", "2", "--dump_every", "2"])):
        given = ["--model", str(tiny_directory), "--problems", str(problems), "--out", str(found[name])]
        given += SETTINGS + more
        train_rl.main(config.parse(train_rl.TrainOptions, "", given))
    return found


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def place(run: Path, number: int) -> Path:
    return run / "dump" / f"round_{number:06d}"


def records(directory: Path) -> dict[str, list[Trajectory]]:
    """Trajectories and branches, by level."""
    names = {"trajectory": "trajectories.jsonl", "step": "branches.jsonl"}
    return {level: [from_json(line) for line in (directory / name).read_text().splitlines()]
            for level, name in names.items()}


def test_dumping_changes_no_number_and_may_be_switched_on_when_a_run_is_continued(runs):
    assert (runs["dumped"] / "metrics.jsonl").read_bytes() == (runs["resumed"] / "metrics.jsonl").read_bytes()


def test_every_nth_round_is_dumped_with_all_its_files_and_nothing_beside_it(runs):
    found = {name: sorted(path.name for path in (run / "dump").iterdir()) for name, run in runs.items()}
    assert found == {"dumped": ["round_000001", "round_000002"], "resumed": ["round_000002"]}
    assert {path.name for path in place(runs["resumed"], 2).iterdir()} == FILES


def test_a_resumed_run_dumps_what_the_run_in_one_sitting_dumps(runs):
    for name in FILES - {"settings.json", "trajectories.jsonl", "branches.jsonl"}:  # paths, and the executions' seconds
        assert (place(runs["dumped"], 2) / name).read_bytes() == (place(runs["resumed"], 2) / name).read_bytes()


def test_every_sample_is_listed_once_and_counted_as_the_metrics_count_it(runs):
    for number, metrics in enumerate(lines(runs["dumped"] / "metrics.jsonl"), 1):
        directory = place(runs["dumped"], number)
        samples, drawn = lines(directory / "samples.jsonl"), records(directory)
        fresh = [(sample["level"], sample["line"]) for sample in samples if not sample["carried"]]
        assert fresh == [(level, line) for level in drawn for line in range(len(drawn[level]))]
        assert len(drawn["trajectory"]) == metrics["trajectory/drawn"]
        assert lines(directory / "metrics.json") == [metrics]
        for level in drawn:
            kept = [s for s in samples if s["level"] == level and not s["carried"] and s["removed"] is None]
            assert len(kept) == metrics[f"{level}/kept"]
            assert all((s["update"] is None) == s["kept_for_later"] for s in kept)
        assert len(lines(directory / "updates.jsonl")) == metrics["policy/updates"]


def test_the_tokens_of_a_used_sample_are_its_own_in_order_and_no_observation_is_among_them(runs):
    directory = place(runs["dumped"], 1)
    tokens, drawn, end = load_file(directory / "tokens.safetensors"), records(directory), 0
    for sample in lines(directory / "samples.jsonl"):
        if sample["update"] is None:
            assert sample["first"] is None and sample["count"] == 0
            continue
        assert sample["first"] == end
        end += sample["count"]
        record = drawn[sample["level"]][sample["line"]]
        ids, positions = record.prompt_ids + record.response_ids, tokens["position"][sample["first"]:end]
        assert tokens["token"][sample["first"]:end].tolist() == [ids[position] for position in positions]
        observed = sum(span.end - span.start for span in record.spans if span.kind == OBSERVE)
        assert len(positions) == len(record.response_ids) - observed and (np.diff(positions) > 0).all()
    assert {name: (len(column), column.dtype) for name, column in tokens.items()} == {
        "token": (end, np.int32), "position": (end, np.int32), "sampled": (end, np.float32), "old": (end, np.float32),
        "new": (end, np.float32)}


def test_the_first_update_sees_the_ratio_one_and_the_second_does_not(runs):
    directory = place(runs["dumped"], 1)
    tokens = load_file(directory / "tokens.safetensors")
    gaps = {0: [], 1: []}
    for sample in lines(directory / "samples.jsonl"):
        if sample["update"] is not None:
            at = slice(sample["first"], sample["first"] + sample["count"])
            gaps[sample["update"]].append(np.abs(tokens["new"][at] - tokens["old"][at]).max())
    assert max(gaps[0]) < 1e-5 < max(gaps[1])


def test_a_branch_begins_at_its_fork_in_the_trajectory_that_failed(runs):
    directory = place(runs["dumped"], 1)
    drawn = records(directory)
    branches = [sample for sample in lines(directory / "samples.jsonl") if sample["level"] == "step"]
    assert branches
    for sample in branches:
        parent, branch = drawn["trajectory"][sample["parent"]], drawn["step"][sample["line"]]
        assert parent.finish == "failed" and parent.id == branch.id
        assert branch.prompt_ids == parent.prompt_ids + parent.response_ids[:sample["fork"]]


def test_a_group_kept_for_later_is_trained_in_the_next_round_as_a_carried_one(runs):
    first, second = (lines(place(runs["dumped"], number) / "samples.jsonl") for number in (1, 2))
    later = [sample["advantage"] for sample in first if sample["kept_for_later"]]
    carried = [sample for sample in second if sample["carried"]]
    assert carried and later[:len(carried)] == [sample["advantage"] for sample in carried]
    assert all(sample["line"] is None and sample["count"] > 0 for sample in carried)


def write_empty(out: Path, loss: float | None = None) -> Path:
    return RoundDump(7).write(out, {"model": "m"}, None, [], {"policy/loss": loss})


def test_a_round_that_is_done_again_replaces_its_dump_and_what_a_killed_one_left(tmp_path):
    left_over = tmp_path / "dump" / ".round_000007.tmp"
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("x")
    target = write_empty(tmp_path, 1.0)
    write_empty(tmp_path, 2.0)
    assert list((tmp_path / "dump").iterdir()) == [target] and {path.name for path in target.iterdir()} == FILES
    assert lines(target / "metrics.json") == [{"step": 7, "policy/loss": 2.0}]


def test_a_dump_that_cannot_be_written_leaves_the_one_before_whole(tmp_path):
    target = write_empty(tmp_path, 1.0)
    with pytest.raises(TypeError):
        RoundDump(7).write(tmp_path, {"model": "m"}, None, [], {"policy/loss": [object()]})
    assert {path.name for path in target.iterdir()} == FILES and lines(target / "metrics.json")[0]["policy/loss"] == 1.0


def test_a_round_without_any_sample_is_dumped_too(tmp_path):
    target = write_empty(tmp_path)
    columns = load_file(target / "tokens.safetensors")
    assert lines(target / "samples.jsonl") == [] and {len(column) for column in columns.values()} == {0}
