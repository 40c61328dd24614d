"""The check of dumped rounds: it passes what is right, finds every seeded fault, and names the number that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_rl
from thor import audit, audit_equations, config, grpo
from thor.trajectory import THINK, Execution, Span, Trajectory

ROOT = Path(__file__).parent.parent
SETTINGS = ["--style", "base", "--instruction", "", "--problems_per_round", "8", "--samples", "6", "--branches", "6",
            "--max_response_tokens", "60", "--suffix_tokens", "6", "--max_branch_tokens", "40",
            "--min_response_tokens", "0", "--box_within_last", "0", "--min_group_fraction", "0.25", "--nll_weight",
            "0.1", "--threads", "1", "--slots", "32", "--dump_every", "1"]
HOT = ["--rounds", "1", "--lr", "2e-2", "--updates_per_round", "6", "--step_weight", "0.5", "--pack_tokens", "150"]
VARIANTS = {
    "carried": ["--rounds", "2", "--updates_per_round", "2", "--lr", "3e-4", "--groups_per_round", "3", "--max_passes",
                "2"],
    "hot": HOT,
    "options": ["--rounds", "1", "--updates_per_round", "4", "--lr", "1e-2", "--kl_weight", "0.1", "--entropy_weight",
                "0.01", "--sequence_ratio", "True", "--importance_cap", "1", "--no_std", "True", "--code_only", "True",
                "--joint", "True", "--min_response_tokens", "12", "--box_within_last", "12", "--dual_clip", "0"]}

# Lets train_rl.py of each given directory learn from the samples of a recorded round, in a process of its own; what
# takes long the first time, in torch and transformers, is done once.
LEARN = """
import json, os, random, sys, torch, tqdm, safetensors.torch, torch._dynamo, torch.utils.checkpoint
from transformers import AutoTokenizer, HfArgumentParser
places, recorded, given = sys.argv[1].split(":"), sys.argv[2], sys.argv[3:]
AutoTokenizer.from_pretrained(given[1])
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.AdamW([weight]).step()
for place in places:
    child = os.fork()
    if not child:
        os.chdir(place)
        sys.path.insert(0, place)
        import train_rl
        from thor import config
        from thor.trajectory import from_json
        run = train_rl.begin(config.parse(train_rl.TrainOptions, "", given))
        drawn, grown = ([from_json(line) for line in open(f"{recorded}/{name}.jsonl")]
                        for name in ("trajectories", "branches"))
        groups = {}
        for row in map(json.loads, open(f"{recorded}/samples.jsonl")):
            groups.setdefault((row["level"], row["group"]), []).append(row)
        drawn, grown = ([[records[row["line"]] for row in group] for (of, _), group in groups.items() if of == level]
                        for level, records in (("trajectory", drawn), ("step", grown)))
        flat = [trajectory for group in drawn for trajectory in group]
        failed = [(flat[group[0]["parent"]], group[0]["fork"]) for (of, _), group in groups.items() if of == "step"]
        chosen = [train_rl.FailedStep(parent, None, 0, len(parent.prompt_ids) + fork) for parent, fork in failed]
        kept = train_rl.filter_trajectories(drawn, train_rl.TrajectoryFilters(0, 0, 0.25), run.template.decode)
        num_failures = sum(trajectory.finish == "failed" for trajectory in flat)
        sampled = train_rl.Sampled(drawn, kept, num_failures, chosen, grown, {})
        train_rl.learn(run, sampled, 1, random.Random(0))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, place
"""

# Name -> (file, lines to change, what the check has to complain about).
FAULTS = {
    "none": ("thor/grpo.py", [], None),
    "mask: observations trained": ("thor/batch.py", [
        ("mask = loss_mask(trajectory.spans, len(trajectory.response_ids))",
         "mask = [True] * len(trajectory.response_ids)"),
        ("trajectory.logprobs or [0.0] * len(mask)", "[p or 0.0 for p in trajectory.logprobs]")], "trained or not"),
    "mask: act left out": ("thor/trajectory.py", [
        ("[span.kind != OBSERVE for", "[span.kind == THINK for")], "trained or not"),
    "mask: end of turn left out": ("thor/batch.py", [
        ("loss_mask(trajectory.spans, len(trajectory.response_ids))",
         "loss_mask(trajectory.spans, len(trajectory.response_ids))[:-1] + [False]")], "trained or not"),
    "normaliser: trajectories by all tokens": ("thor/grpo.py", [
        ("(~step, counts.trajectory_tokens,", "(~step, num_tokens,")], "trajectory_grpo"),
    "normaliser: number of samples": ("thor/grpo.py", [
        ("share(surrogates, chosen, num_chosen)", "share(surrogates, chosen, len(tokens.sequence[chosen].unique()))")],
        "step_grpo"),
    "normaliser: each pack by its own tokens": ("train_rl.py", [
        ("count_tokens(known) if pack_means else counts", "count_tokens(known)")], "trajectory_grpo"),
    "clip: low and high swapped": ("thor/grpo.py", [
        ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)")], "step_grpo"),
    "clip: on the wrong side": ("thor/grpo.py", [("s = torch.minimum(", "s = torch.maximum(")], "step_grpo"),
    "clip: no dual clip": ("thor/grpo.py", [("if dual_clip is not None:", "if False:")], "trajectory_grpo"),
    "std: of the population": ("thor/grpo.py", [("/ (size - 1).clamp(min=1)", "/ size")], "advantage"),
    "std: another ε": ("thor/grpo.py", [("STD_EPSILON = 1e-6", "STD_EPSILON = 1e-4")], "advantage"),
    "NLL: over all tokens": ("thor/grpo.py", [
        ("chosen & positive, num_positive", "chosen, num_chosen")], "trajectory_nll"),
    "NLL: on the negative ones": ("thor/grpo.py", [
        ("options), tokens.advantages > 0", "options), tokens.advantages < 0")], "step_nll"),
    "weights: λ twice": ("thor/grpo.py", [("* step\n", "* options.step_weight * step\n")], "loss"),
    "weights: α left out": ("thor/grpo.py", [("+ nll_weight * parts", "+ parts")], "loss"),
    "filter: failures are punished": ("thor/filters.py", [
        ("if not all(execution.passed", "if False and not all(execution.passed")], "removed"),
}


@pytest.fixture(scope="module")
def world(tiny_directory, tmp_path_factory) -> list[str]:
    """Model and problems, as arguments."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    lines = [{"id": f"{a}+{b}", "question": f"{a}+{b}", "answer": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", str(tiny_directory), "--problems", str(path), *SETTINGS]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """A run of each variant."""
    found = {name: tmp_path_factory.mktemp("runs") / name for name in VARIANTS}
    for name, more in VARIANTS.items():
        train_rl.main(config.parse(train_rl.TrainOptions, "", [*world, *more, "--out", str(found[name])]))
    return found


@pytest.fixture(scope="module")
def faulty(world, runs, tmp_path_factory) -> dict[str, Path]:
    """What each faulty copy of the repository's code makes of the samples of one round."""
    copies = {}
    for name, (file, changes, _) in FAULTS.items():
        copy = copies[name] = tmp_path_factory.mktemp("copy")
        shutil.copytree(ROOT / "thor", copy / "thor", ignore=shutil.ignore_patterns("__pycache__"))
        for script in ("train_rl.py", "generate.py"):
            shutil.copy(ROOT / script, copy)
        text = (copy / file).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times in {file}"
            text = text.replace(old, new)
        (copy / file).write_text(text)
    run = subprocess.run([sys.executable, "-c", LEARN, ":".join(map(str, copies.values())),
                          str(runs["hot"] / "dump" / "round_000001"), *world, *HOT, "--out", "run"],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name: copy / "run" for name, copy in copies.items()}


def kinds(printed: str) -> list[str]:
    """What each line of the check complains about, without the round."""
    return [line.partition(": ")[2].partition(" of ")[0] for line in printed.splitlines()]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_trainer_logged_agrees_with_the_equations(runs, name, capsys):
    assert audit.audit(runs[name])
    lines = capsys.readouterr().out.splitlines()
    assert all("agree" in line for line in lines) and len(lines) == len(list((runs[name] / "dump").iterdir()))
    rounds = [audit.read_round(place, {}) for place in sorted((runs[name] / "dump").iterdir())]
    assert any(item.used and item.logged["level"] == level for dump in rounds for item in dump.items
               for level in audit.LEVELS), "both levels were trained"
    assert any(item.logged["carried"] for dump in rounds for item in dump.items) == (name == "carried")


def test_a_round_alone_takes_its_carried_samples_on_trust_and_says_so(runs, capsys):
    assert audit.audit(runs["carried"] / "dump" / "round_000002")
    assert "on trust: " in (said := capsys.readouterr().out) and "carried samples" in said


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found_and_the_wrong_number_named(faulty, name, capsys):
    expected = FAULTS[name][2]
    assert audit.audit(faulty[name]) == (expected is None)
    found = kinds(capsys.readouterr().out)
    assert expected is None or expected in found, f"{name}: only {found}"


def test_the_round_with_faults_reaches_every_branch_of_eq_5(faulty):
    """Otherwise a fault in a branch that no token takes would not show."""
    dump = audit.read_round(faulty["none"] / "dump" / "round_000001", {})
    for item in dump.items:
        item.advantage = item.logged["advantage"]
    steps = [audit.tokens_of_update(dump, number) for number in range(len(dump.updates))]
    ratio = np.concatenate([audit_equations.ratios(tokens, dump.options) for tokens in steps])
    advantage = np.concatenate([tokens.advantage for tokens in steps])
    good, bad = ratio[advantage > 0], ratio[advantage < 0]
    assert (good > 1.28).any() and (bad < 0.8).any() and (bad > 3).any()


def test_a_difference_names_the_first_trajectory_the_number_and_both_values(faulty, capsys):
    audit.audit(faulty["std: of the population"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if "advantage" in line]
    first = next(item for item in audit.read_round(faulty["none"] / "dump" / "round_000001", {}).items
                 if item.logged["advantage"] is not None)
    right = first.logged["advantage"]
    assert f"advantage of trajectory {first.record.id!r}, sample {first.record.sample} (line " in line
    logged, recomputed = (float(line.partition(f"{word} ")[2].split()[0].rstrip(","))
                          for word in ("logged", "recomputed"))
    assert recomputed == pytest.approx(right, rel=1e-12) and abs(logged) > abs(right) and "more)" in line


TAMPERINGS = {
    "reward": ("samples.jsonl", lambda row: {"reward": 1.0 - row["reward"]} if row["reward"] is not None else {}),
    "removed": ("samples.jsonl", lambda row: {"removed": "short"} if row["removed"] == "failed_execution" else {}),
    "advantage": ("samples.jsonl", lambda row: {"advantage": 1.0001 * row["advantage"]} if row["advantage"] else {}),
    "fork": ("samples.jsonl", lambda row: {"fork": row["fork"] + 1} if row["parent"] is not None else {}),
    "trained, kept for later": ("samples.jsonl", lambda row: {"kept_for_later": True} if row["update"] == 0 else {}),
    "updates": ("samples.jsonl",
                lambda row: {"update": 1 - row["update"]} if row["update"] in (0, 1) and row["line"] % 2 else {}),
    "clipped_high": ("updates.jsonl", lambda row: {"clipped_high": row["clipped_high"] + 1}),
    "count step_positive": ("updates.jsonl", lambda row: {"counts": row["counts"] | {"step_positive": 1}}),
    "loss": ("updates.jsonl", lambda row: {"loss": row["loss"] * 1.0001}),
    "skipped": ("updates.jsonl", lambda row: {"skipped": True}),
    "policy/kl_old": ("metrics.json", lambda row: {"policy/kl_old": row["policy/kl_old"] * 1.001}),
    "trajectory/removed_groups_equal_rewards": (
        "metrics.json", lambda row: {name: row[name] + 1 for name in ["trajectory/removed_groups_equal_rewards"]}),
    "step/pass_rate": ("metrics.json", lambda row: {"step/pass_rate": row["step/pass_rate"] + 0.001}),
    "problems, samples, size": ("trajectories.jsonl", lambda row: {"sample": row["sample"] // 2}),
    "sampled log-prob": ("trajectories.jsonl", lambda row: {"logprobs": [p and p - 1e-3 for p in row["logprobs"]]}),
    "tokens": ("trajectories.jsonl", lambda row: {"response_ids": [*row["response_ids"][:-1], 1]}),
    "prompt is what stands before the fork": ("branches.jsonl", lambda row: {"prompt_ids": row["prompt_ids"][:-1]}),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_a_number_that_was_changed_in_the_dump_is_found(faulty, kind, tmp_path, capsys):
    copy = shutil.copytree(faulty["none"] / "dump" / "round_000001", tmp_path / "round")
    file, change = TAMPERINGS[kind]
    rows = [json.loads(line) for line in (copy / file).read_text().splitlines()]
    (copy / file).write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))
    assert not audit.audit(copy) and kind in kinds(capsys.readouterr().out)


def random_tokens(seed: int) -> tuple[torch.Tensor, grpo.Tokens, torch.Tensor, torch.Tensor]:
    """60 tokens of 8 sequences, ratios beyond every clip; reference log-probs and entropies."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([12, 3, 5, 10, 4, 8, 11, 7])
    new, old, sampled, reference = (-3 * torch.rand(60, generator=rng).double() for _ in range(4))
    advantages = torch.tensor([1.2, -0.7, 0.3, -2.0, 0.9, -0.9, 0.0, 0.4]).double()
    old = old - advantages.sign().repeat_interleave(sizes)  # whole sequences beyond the clip, too
    tokens = grpo.Tokens(old, sampled, advantages.repeat_interleave(sizes),
                         (torch.arange(8) > 4).repeat_interleave(sizes), torch.arange(8).repeat_interleave(sizes))
    return new, tokens, reference, torch.rand(60, generator=rng).double()


@pytest.mark.parametrize("more", [
    {}, {"joint": True}, {"sequence_ratio": True}, {"importance_cap": 1.5}, {"dual_clip": None},
    {"kl_weight": 0.3, "entropy_weight": 0.2, "step_weight": 0.4, "nll_weight": 0.7}])
def test_both_formulations_of_eq_4_to_8_give_the_same_numbers(more):
    """Each is the other's oracle; float64 on both sides, so that nothing hides behind a tolerance."""
    new, tokens, reference, entropies = random_tokens(1)
    given = grpo.LossOptions(**more)
    options = dict(vars(given), dual_clip=given.dual_clip or 0, importance_cap=given.importance_cap or 0)
    extras = (reference if given.kl_weight else None, entropies if given.entropy_weight else None)
    plain = audit_equations.Tokens(new.numpy(), tokens.old_logprobs.numpy(), tokens.sampler_logprobs.numpy(),
                                   tokens.advantages.numpy(), tokens.is_step.numpy(), tokens.sequence.numpy(),
                                   reference.numpy(), entropies.numpy())
    counts, parts = grpo.count_tokens(tokens), audit_equations.loss_parts(plain, options)
    assert audit_equations.token_counts(plain) == vars(counts)
    assert parts == pytest.approx({name: part.item() for name, part in grpo.loss_parts(
        new, tokens, counts, given, *extras).items()}, rel=1e-12)
    assert audit_equations.total_loss(parts, options) == pytest.approx(
        grpo.hierarchical_loss(new, tokens, counts, given, *extras).item(), rel=1e-12)
    statistics = grpo.loss_statistics(new, tokens, given)
    for name, (least, most) in audit_equations.clipped(plain, options).items():
        assert least == most == statistics[name]
    assert statistics["clipped_low"] > 0 and statistics["clipped_high"] > 0


def test_the_place_of_a_box_is_decided_where_it_can_be_without_the_tokenizer():
    options = {"min_response_tokens": 3, "box_within_last": 8}
    plain = Trajectory("a", 0, "1+1", "2", [1], [7] * 8, [-1.0] * 8, [Span(THINK, 0, 8)], boxed="2")
    longer = replace(plain, response_ids=[7] * 9, logprobs=[-1.0] * 9, spans=[Span(THINK, 0, 9)])
    short = replace(plain, response_ids=[7] * 2, logprobs=[-1.0] * 2, spans=[Span(THINK, 0, 2)])
    assert audit_equations.trajectory_reason(plain, options) is None
    assert audit_equations.trajectory_reason(replace(plain, boxed=None), options) == "no_box_at_end"
    assert audit_equations.trajectory_reason(longer, options) == audit_equations.UNDECIDED
    assert audit_equations.trajectory_reason(replace(longer, boxed=None), options) == "no_box_at_end"
    assert audit_equations.trajectory_reason(short, options) == "short"
    assert audit_equations.trajectory_reason(longer, options | {"box_within_last": 0}) is None


def test_what_the_sandbox_lost_has_no_reward_at_either_level():
    lost = Trajectory("a", 0, "1+1", "2", [1], [7], [-1.0], [Span("act", 0, 1)],
                      [Execution("infrastructure", "", "", 0.0)], finish="infrastructure", correct=False)
    assert audit_equations.trajectory_reward(lost) is audit_equations.branch_reward(lost) is None
    assert audit_equations.trajectory_reason(lost, {"box_within_last": 0}) == audit_equations.branch_reason(lost)
    assert audit_equations.branch_reason(lost) == "infrastructure"


def check(*given: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "thor.audit", *given], cwd=ROOT, capture_output=True, text=True)


def test_the_exit_code_is_0_where_all_agrees_1_where_not_and_2_without_a_dump(faulty, tmp_path):
    good, bad, none = check(str(faulty["none"])), check(str(faulty["weights: λ twice"])), check(str(tmp_path))
    assert (good.returncode, bad.returncode, none.returncode) == (0, 1, 2)
    assert len(good.stdout.splitlines()) == 1 and good.stdout.startswith("round 1: 48 trajectories, ")
    assert len(none.stderr.splitlines()) == 1 and "holds no dumped round" in none.stderr
    assert (check().returncode, check().stderr) == (2, "error: usage: python -m thor.audit DIR\n")
    assert check("--help").returncode == 0 and "Exit codes: 0" in check("--help").stdout


@pytest.mark.parametrize(("name", "broken"), [
    ("samples.jsonl", ""), ("samples.jsonl", "{"), ("samples.jsonl", "[]\n"), ("settings.json", "{}\n"),
    ("settings.json", "[]\n"), ("trajectories.jsonl", '{"id": 1}\n'), ("updates.jsonl", '{"update": 0}\n'),
    ("settings.json", '{"round": 1, "options": {}}\n')])
def test_a_dump_that_is_not_whole_gets_one_sentence_and_exit_code_2(faulty, tmp_path, name, broken):
    copy = shutil.copytree(faulty["none"] / "dump" / "round_000001", tmp_path / "round")
    (copy / name).write_text(broken)
    said = check(str(copy))
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1 and str(copy) in said.stderr


def test_the_check_shares_no_code_with_what_it_checks():
    """Of the package it imports the file format alone, and no torch."""
    program = ("import sys, thor.audit\n"
               "print(*sorted(name for name in sys.modules if name.startswith('thor.')), 'torch' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert said == ["thor.audit", "thor.audit_equations", "thor.trajectory", "False"]
