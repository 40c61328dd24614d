"""Spans, the loss mask and the file format: what a trajectory is, and that it survives being written down."""

import dataclasses
import json

import pytest

from thor.trajectory import ACT, OBSERVE, THINK, Attempt, Execution, Span, Trajectory, add_span, check_spans, code_steps
from thor.trajectory import from_json, kept_executions, loss_mask, to_json

OK = Execution("ok", "4\n", "", 0.01)
ERROR = Execution("error", "", "NameError: name 'x' is not defined", 0.02)


def example() -> Trajectory:
    """think, act, observe, act, observe, think: the second block directly follows the first one's output."""
    spans = [Span(THINK, 0, 3), Span(ACT, 3, 6), Span(OBSERVE, 6, 8), Span(ACT, 8, 10), Span(OBSERVE, 10, 11),
             Span(THINK, 11, 14)]
    logprobs = [-0.5] * 6 + [None] * 2 + [-1.5] * 2 + [None] + [-0.1] * 3
    attempts = [Attempt(0, 1, [5, 6], [-0.1, -0.2], ERROR)]
    return Trajectory("p1", 2, "2+2?", "4", [9, 9], list(range(14)), logprobs, spans, [ERROR, OK], attempts, "…text ∑",
                      "4", True, "eos", 1, 0.6, 16, False, 3, "dir")


def test_spans_tile_the_response():
    spans = example().spans
    check_spans(spans, 14)
    for damaged in (spans[1:], spans[:-1], spans[:2] + spans[3:], [Span(THINK, 0, 4)] + spans[1:],
                    spans + [Span(THINK, 14, 14)], [Span(THINK, 0, 2)] + spans[1:]):
        with pytest.raises(ValueError, match="spans"):
            check_spans(damaged, 14)
    with pytest.raises(ValueError, match="unknown span kind 'code'"):
        check_spans([Span("code", 0, 14)], 14)


def test_think_and_act_are_trained_observe_never_the_end_of_turn_token_always():
    trajectory = example()
    mask = loss_mask(trajectory.spans, 14)
    assert [position for position, trained in enumerate(mask) if not trained] == [6, 7, 10]
    assert trajectory.finish == "eos" and mask[-1]


def test_the_loss_mask_covers_exactly_the_tokens_that_were_sampled():
    trajectory = example()
    assert loss_mask(trajectory.spans, 14) == [logprob is not None for logprob in trajectory.logprobs]


def test_a_loss_mask_of_spans_that_do_not_tile_the_response_is_refused():
    with pytest.raises(ValueError, match="spans cover 14 tokens of a response of 15"):
        loss_mask(example().spans, 15)


def test_a_step_begins_after_the_previous_observation():
    first, second = code_steps(example())
    assert (first.start, first.act_start, first.act_end, first.end, first.execution) == (0, 3, 6, 8, ERROR)
    assert (second.start, second.act_start, second.act_end, second.end, second.execution) == (8, 8, 10, 11, OK)


def test_a_last_block_that_was_not_run_has_no_observation_and_no_execution():
    trajectory = dataclasses.replace(example(), executions=[ERROR, None], spans=[
        Span(THINK, 0, 3), Span(ACT, 3, 6), Span(OBSERVE, 6, 8), Span(THINK, 8, 12), Span(ACT, 12, 14)])
    last = code_steps(trajectory)[-1]
    assert (last.start, last.act_start, last.act_end, last.end, last.execution) == (8, 12, 14, 14, None)
    assert kept_executions(trajectory) == [ERROR]


def test_spans_grow_without_empty_ones_and_without_two_thinks_in_a_row():
    spans = add_span([], THINK, 0, 0)
    assert spans == []
    for kind, start, end in ((THINK, 0, 2), (THINK, 2, 3), (ACT, 3, 4), (ACT, 4, 6), (OBSERVE, 6, 6), (THINK, 6, 7)):
        spans = add_span(spans, kind, start, end)
    assert spans == [Span(THINK, 0, 3), Span(ACT, 3, 4), Span(ACT, 4, 6), Span(THINK, 6, 7)]


def test_only_what_printed_and_ended_well_has_passed():
    outcomes = ("ok", "silent", "error", "timeout", "memory", "output-limit", "infrastructure")
    assert [outcome for outcome in outcomes if Execution(outcome, "", "", 0.0).passed] == ["ok"]


def test_a_trajectory_survives_being_written_and_read():
    line = to_json(example())
    assert "\n" not in line
    assert from_json(line) == example()


def test_the_file_format_has_the_fields_that_others_read():
    record = json.loads(to_json(example()))
    assert record.keys() >= {"id", "sample", "question", "answer", "prompt_ids", "response_ids", "logprobs", "spans",
                             "executions", "attempts", "text", "boxed", "correct", "finish", "corrections",
                             "tokens_generated", "thinking", "seed", "model"}
    assert record["spans"][1] == {"kind": "act", "start": 3, "end": 6}
    assert record["executions"][1] == {"outcome": "ok", "stdout": "4\n", "error": "", "seconds": 0.01}
    assert record["attempts"][0].keys() == {"step", "start", "response_ids", "logprobs", "execution"}


def test_records_without_logprobs_and_with_fields_of_their_own_are_read():
    record = json.loads(to_json(example()))
    for name in ("logprobs", "attempts", "prompt_ids", "corrections"):
        del record[name]
    read = from_json(json.dumps(record | {"source": "somewhere"}))
    assert (read.logprobs, read.attempts, read.response_ids) == ([], [], list(range(14)))


@pytest.mark.parametrize("changes, message", [
    ({"spans": None}, "not a trajectory"), ({"executions": []}, "0 executions for 2 act spans"),
    ({"spans": [{"kind": "think", "start": 0, "end": 13}], "executions": []}, "cover 13 tokens of a response of 14"),
    ({"spans": [{"kind": "think"}]}, "not a trajectory"), ({"logprobs": [0.0]}, "1 logprobs for 14 tokens"),
    ({"finish": "tired"}, "unknown finish 'tired'; it must be one of eos, length"),
    ({"executions": [None, {"outcome": "bad", "stdout": "", "error": "", "seconds": 0}]}, "unknown outcome bad"),
    ({"executions": [None, {"outcome": "ok"}]}, "not a trajectory"), ({"attempts": [{}]}, "not a trajectory"),
    ({"answer": 4}, "answer is 4; it must be str | None"), ({"boxed": 4}, "boxed is 4"), ({"id": 1}, "id is 1; it must be str"),
    ({"question": None}, "question is None"), ({"text": None}, "text is None"), ({"sample": "0"}, "sample is '0'"),
    ({"tokens_generated": None}, "tokens_generated is None; it must be int"), ({"prompt_ids": [-1]}, "id is negative"),
    ({"prompt_ids": ["a"]}, "not a trajectory"), ({"prompt_ids": None}, "not a trajectory"),
])
def test_a_malformed_record_is_refused_in_one_sentence(changes, message):
    line = json.dumps(json.loads(to_json(example())) | changes)
    with pytest.raises(ValueError, match=message):
        from_json(line)


@pytest.mark.parametrize("line, message", [("{", "not JSON"), ("[1]", "a trajectory is a JSON object"),
                                           ('{"id": "x"}', "no field sample, question, answer, response_ids")])
def test_what_is_not_a_trajectory_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        from_json(line)


def test_a_step_starts_after_the_last_token_of_the_previous_observation_or_of_the_prompt():
    """Tokens written for the model, such as a forced </think>, are an observation, too."""
    spans = [Span("think", 0, 2), Span("act", 2, 4), Span("observe", 4, 6), Span("think", 6, 8), Span("observe", 8, 9),
             Span("think", 9, 10), Span("act", 10, 12)]
    runs = [Execution("ok", "1", "", 0.0), None]
    trajectory = Trajectory("a", 0, "?", None, [1], list(range(12)), spans=spans, executions=runs)
    assert [(step.start, step.act_start) for step in code_steps(trajectory)] == [(0, 2), (9, 10)]
