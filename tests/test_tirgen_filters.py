"""TIRGen's filters: each stage drops texts that no other objects to; what balancing leaves; the funnel's arithmetic."""

import itertools
import math
import random
from collections import Counter

import pytest

import tiny
from thor import funnel
from thor.data import Problem
from thor.template import Template, encode_response
from thor.tirgen_filters import (STAGES, FilterSettings, difficulty_reason, dollars_balance, filter_tirgen,
                                 first_objection, format_reason, is_trivial, prose_and_codes, quality_reason, repeats,
                                 surplus_reasons, thinks_then_answers)
from thor.trajectory import ACT, OBSERVE, THINK, Execution, Span, Trajectory
from thor.tries import Try

RAN = Execution("ok", "2\n", "", 0.0)
FAILED = Execution("error", "", "NameError: x", 0.0)
LOOP = "```python\nfor i in range(3):\n    print(i)\n```"
SUM = "```python\nprint(1 + 1)\n```"
OUTPUT = "\n```output\n2\n```\n"
THOUGHT = f"<think>\nWe add.\n{LOOP}{OUTPUT}</think>\nIt is \\boxed{{2}}."
SETTINGS = FilterSettings()


def solved(text: str | None = None, *, id: str = "a", sample: int = 0, calls: int = 1, **changes) -> Trajectory:
    """A trajectory that every stage lets pass, with changes."""
    text = f"We add $x$.\n{''.join((LOOP + OUTPUT) for _ in range(calls))}So \\boxed{{2}}." if text is None else text
    fields = {"boxed": "2", "correct": True, "finish": "eos", "executions": [RAN] * text.count("```py")} | changes
    return Trajectory(id, sample, "1+1", "2", [1], text=text, **fields)


FORMAT = {
    "not_ended": solved(finish="length"),
    "no_box": solved(f"{LOOP}{OUTPUT}So 2.", boxed=None),
    "wrong_answer": solved(correct=False),
    "no_gold_answer": solved(correct=None),
    "failed_execution": solved(executions=[FAILED]),
    "no_code": solved("So \\boxed{2}."),
    "unbalanced_dollars": solved(f"We add $x.\n{LOOP}{OUTPUT}So \\boxed{{2}}."),
    "think_structure": solved(THOUGHT.replace("</think>", "</think></think>"), thinking=True),
    "broken_characters": solved(f"We \N{REPLACEMENT CHARACTER}dd.\n{LOOP}{OUTPUT}So \\boxed{{2}}."),
    "repetition": solved(f"{'We add again and again. ' * 21}\n{LOOP}{OUTPUT}So \\boxed{{2}}."),
}
TRIVIAL = solved(f"We add.\n{SUM}{OUTPUT}So \\boxed{{2}}.")


@pytest.mark.parametrize("reason", FORMAT)
def test_each_rule_of_the_format_drops_a_text_that_nothing_else_objects_to(reason):
    """One thing is wrong with it, and the later stages let it pass as it is."""
    trajectory = FORMAT[reason]
    prose, codes = prose_and_codes(trajectory.text)
    assert format_reason(trajectory, prose, codes) == reason
    assert quality_reason(codes, 0.4) is None and difficulty_reason(None) is None
    dropped = first_objection(trajectory, SETTINGS, {})
    assert (dropped.stage, dropped.reason) == ("format", reason)


def test_a_trajectory_without_fault_passes_every_stage():
    for good in (solved(), solved(calls=3), solved(THOUGHT, thinking=True)):
        assert first_objection(good, SETTINGS, {"a": (3, 4)}) is None


def test_trivial_code_is_dropped_by_the_second_stage_alone():
    assert format_reason(TRIVIAL, *prose_and_codes(TRIVIAL.text)) is None and difficulty_reason((3, 4)) is None
    dropped = first_objection(TRIVIAL, SETTINGS, {})
    assert (dropped.stage, dropped.reason) == ("code_quality", "trivial_code")
    assert first_objection(TRIVIAL, FilterSettings(max_trivial_share=1), {}) is None


@pytest.mark.parametrize("trivial, other, dropped", [
    (2, 3, False), (3, 4, True), (1, 1, True), (0, 1, False), (0, 0, False)])
def test_the_share_of_trivial_blocks_may_reach_its_limit_and_not_pass_it(trivial, other, dropped):
    codes = ["print(1 + 1)"] * trivial + ["import math\nprint(math.pi)"] * other
    assert (quality_reason(codes, 0.4) == "trivial_code") is dropped


@pytest.mark.parametrize("code, trivial", [
    ("print(3 * 4)", True), ("x = 3\ny = abs(-x)\nprint(x, y)", True), ("print('if and for import def')", True),
    ("# while True:\nprint(1)", True), ("form = 3\nprint(form)", True), ("print(", True), ("a\0 = 1", True),
    ("import math\nprint(math.pi)", False), ("from math import pi\nprint(pi)", False),
    ("for i in range(3):\n    print(i)", False), ("while x:\n    x -= 1", False), ("print([i for i in 'ab'])", False),
    ("print(sum(i for i in 'ab'))", False), ("print({i for i in 'ab'})", False), ("print({i: 1 for i in 'ab'})", False),
    ("print(1 if x else 2)", False), ("if x:\n    print(1)", False), ("def f():\n    return 1\nprint(f())", False),
    ("print((lambda x: x)(1))", False), ("match 1:\n    case 1:\n        print(1)", False),
    ("try:\n    print(1)\nexcept ValueError:\n    print(2)", False)])
def test_code_without_import_and_control_flow_is_trivial(code, trivial):
    assert is_trivial(code) is trivial


def test_a_problem_that_text_alone_solves_every_time_is_dropped_by_the_third_stage_alone():
    dropped = first_objection(solved(), SETTINGS, {"a": (4, 4)})
    assert (dropped.stage, dropped.reason) == ("difficulty", "solved_without_code")
    for passes in ({"a": (3, 4)}, {"a": (0, 4)}, {"a": (0, 0)}, {"b": (4, 4)}, {}):
        assert first_objection(solved(), SETTINGS, passes) is None


@pytest.mark.parametrize("prose, balanced", [
    ("", True), ("It costs $5.", True), ("It costs $5 and $7, so $12.", True), ("$x$ costs $5.", True),
    ("It costs $5. Let $x$ be more.", True), ("We have $$x = 1$$ here.", True), ("$ x $ is fine.", True),
    ("A price of \\$ or \\$x.", True), ("The $n$th term of $a$.", True), ("The $3$rd is it.", True), ("It is $10$cm.", True), ("$5x + 1$ is odd.", True),
    ("Let $x be.", False), ("Let $x$ and $y be.", False), ("It costs $5 and let $x be.", False), ("cost$", False),
    ("$$x = 1$", False)])
def test_dollars_come_in_pairs_unless_they_are_money(prose, balanced):
    assert dollars_balance(prose) is balanced


@pytest.mark.parametrize("text, good", [
    (THOUGHT, True), (THOUGHT.removeprefix("<think>\n"), True),  # the prompt may have opened it
    (THOUGHT.replace("</think>", ""), False), (THOUGHT + "</think>", False), ("<think>" + THOUGHT, False),
    ("We see. " + THOUGHT, False), (f"<think>\nWe add.\n</think>\n{LOOP}{OUTPUT}", False)])
def test_one_closed_think_holds_all_code(text, good):
    assert thinks_then_answers(text) is good


def slowly_repeats(text: str) -> bool:
    """Counts every 20 characters in a row."""
    counts = Counter(text[place:place + 20] for place in range(len(text) - 19))
    return max(counts.values(), default=0) > 20


def test_repetition_is_what_counting_every_ngram_finds():
    rng = random.Random(0)
    texts = ["", "a" * 39, "a" * 40, "a" * 39 + "b", "é" * 41, "abc" * 26 + "ab", "abc" * 27, "😀 ha " * 30]
    for _ in range(60):
        phrase = "".join(rng.choice("ab c") for _ in range(rng.randrange(1, 40)))
        noise = ["".join(rng.choice("xyz") for _ in range(rng.randrange(9))) for _ in range(rng.randrange(15, 28))]
        texts.append(phrase.join(noise))
    assert [repeats(text) for text in texts] == [slowly_repeats(text) for text in texts]
    assert 10 < sum(map(slowly_repeats, texts)) < len(texts) - 10


def test_outputs_are_the_sandboxs_words_and_do_not_count_as_repetition_or_as_prose():
    output = f"\n```output\n{'$ ' + '7' * 90}\n```\n"
    assert first_objection(solved(f"We add.\n{LOOP}{output}So \\boxed{{2}}."), SETTINGS, {}) is None


def test_prose_and_code_are_what_the_spans_of_the_same_text_say():
    template = Template(tiny.make_tokenizer(), style="base")
    for text in (solved(calls=2).text, TRIVIAL.text, THOUGHT, "No code.", "```python\nnever closed", f"x\n  {LOOP}"):
        ids, spans = encode_response(template, text)
        parts = {kind: [template.decode(ids[span.start:span.end]) for span in spans if span.kind == kind]
                 for kind in (THINK, ACT)}
        prose, codes = prose_and_codes(text)
        assert "".join(prose.split()) == "".join("".join(parts[THINK]).removesuffix("<eos>").split())
        assert [f"```python\n{code}```" for code in codes] == [part.strip() for part in parts[ACT]]


def test_a_trajectory_counts_under_the_first_stage_that_objects_and_order_is_kept():
    everything = solved("So 2.", boxed=None, finish="length", id="b")
    rows = [solved(id="z"), TRIVIAL, everything, solved(id="c"), solved(id="easy")]
    filtered = filter_tirgen(rows, FilterSettings(one_call_share=1), {"easy": (4, 4), "b": (4, 4)})
    assert [each.id for each in filtered.kept] == ["z", "c"]
    assert [(each.trajectory.id, each.stage) for each in filtered.rejected] == [
        ("a", "code_quality"), ("b", "format"), ("easy", "difficulty")]


def test_one_trajectory_of_a_problem_stays_and_which_one_does_not_depend_on_the_order():
    rows = [solved(id=str(problem), sample=sample, calls=2) for problem in range(400) for sample in range(4)]
    kept = filter_tirgen(rows, SETTINGS, {}).kept
    assert [each.id for each in kept] == [str(problem) for problem in range(400)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {(each.id, each.sample) for each in filter_tirgen(shuffled, SETTINGS, {}).kept} == {
        (each.id, each.sample) for each in kept}
    assert all(70 < count < 130 for count in Counter(each.sample for each in kept).values()), "about 100 each"
    others = filter_tirgen(rows, FilterSettings(seed=1), {}).kept
    assert [each.sample for each in others] != [each.sample for each in kept]


@pytest.mark.parametrize("share", [0.0, 0.33, 0.5, 0.75, 1.0])
def test_a_share_of_the_trajectories_with_one_call_stays_and_all_with_more(share):
    rows = [solved(id=str(problem), calls=1 + (problem % 3 == 0)) for problem in range(31)]
    filtered = filter_tirgen(rows, FilterSettings(one_call_share=share), {})
    calls = Counter(len(each.executions) for each in filtered.kept)
    assert calls[2] == 11 and calls[1] == math.ceil(20 * share)
    assert filtered.unbalanced == rows
    assert all((each.stage, each.reason) == ("balance", "one_call") for each in filtered.rejected)


def test_of_a_problem_one_trajectory_is_chosen_before_the_calls_are_counted():
    rows = [solved(id="a", sample=sample, calls=1 + sample % 2) for sample in range(6)]
    reasons = surplus_reasons(rows, FilterSettings(one_call_share=0))
    assert Counter(reasons.values())["another_of_the_problem"] == 5


@pytest.mark.parametrize("wrong", [{"max_trivial_share": 1.5}, {"one_call_share": -0.1}, {"min_calls": -1}])
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FilterSettings(**wrong)


def made_tries() -> tuple[list[Problem], list[Try]]:
    """Three problems of two sources, and six tries that go in every possible way."""
    problems = [Problem("a", "1+1", "2", {"source": "sums"}), Problem("b", "1+1", "2", {"source": "sums"}),
                Problem("c", "1+1", "2", {"source": "other"})]
    whole = [solved(id="a", calls=2), solved(id="a", sample=1, calls=2), solved(id="b", correct=False), TRIVIAL_C]
    tries = [Try(each.id, each.sample, each, critic={"steps": 2, "solvable": 0}) for each in whole]
    return problems, [*tries, Try("b", 1, None, "no_verdict", critic={"steps": 1}), Try("c", 1, None, "endpoint")]


TRIVIAL_C = solved(TRIVIAL.text, id="c")


def report() -> dict:
    problems, tries = made_tries()
    filtered = filter_tirgen([each.trajectory for each in tries if each.trajectory], SETTINGS, {})
    return funnel.report(problems, "source", tries, filtered, SETTINGS, {"a": (1, 4)})


def test_the_survivors_of_a_stage_are_those_before_it_less_what_it_removed():
    stages = report()["stages"]
    assert [stage["name"] for stage in stages] == ["tries", "finished", *STAGES]
    assert [stage["survivors"] for stage in stages] == [6, 4, 3, 2, 2, 1]
    for before, after in zip(stages, stages[1:], strict=False):
        assert after["survivors"] == before["survivors"] - sum(after["removed"].values())
    assert all(sum(stage["by_source"].values()) == stage["survivors"] for stage in stages)
    assert stages[1]["removed"] == {"no_verdict": 1, "endpoint": 1}
    assert stages[2]["by_source"] == {"sums": 2, "other": 1}


def test_the_table_says_what_was_asked_and_what_came_of_it_a_yield_of_nothing_too():
    text = funnel.table(report())
    assert "no_verdict 1, endpoint 1" in text and "yield: 1 of 6 tries (16.7%)" in text and "other" in text
    assert "steps 9, solvable 0" in text and "problems 1, solved 1, samples 4" in text
    nothing = funnel.report(made_tries()[0], "source", [], filter_tirgen([], SETTINGS, {}), SETTINGS, {})
    assert "yield: 0 of 0 tries" in funnel.table(nothing)


def test_the_histograms_count_every_trajectory_once():
    rows = [solved(id=str(calls), calls=calls) for calls in (1, 2, 2, 6, 7, 9)]
    assert funnel.rounds_histogram(rows) == {"1": 1, "2": 2, "3": 0, "4": 0, "5": 0, "6": 1, "≥7": 2}
    lengths = [10, 63, 64, 127, 32767, 32768, 99999]
    long = [solved(spans=[Span(THINK, 0, n), Span(OBSERVE, n, n + 500)]) for n in lengths]
    bars = funnel.length_histogram(long)
    assert (bars["<64"], bars["<128"], bars["<32768"], bars["≥32768"]) == (2, 2, 1, 2) and sum(bars.values()) == 7


def test_the_picture_is_drawn_with_and_without_survivors(tmp_path):
    nothing = funnel.report(made_tries()[0], "source", [], filter_tirgen([], SETTINGS, {}), SETTINGS, {})
    for name, each in (("some", report()), ("none", nothing)):
        funnel.draw(each, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_trivial_blocks_is_that_of_all_blocks_in_whatever_order():
    """The filter stops parsing early; the plain count does not."""
    for codes in itertools.product(["print(1)", "import math\nprint(math.pi)"], repeat=4):
        too_many = sum(map(is_trivial, codes)) > 0.4 * len(codes)
        assert quality_reason(list(codes), 0.4) == ("trivial_code" if too_many else None)
