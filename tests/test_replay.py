"""What a record gives back: executions in the order in which they ran, and the first token that differs."""

import asyncio
from dataclasses import replace

from thor.replay import Difference, RecordedSandbox, first_difference, tokens_in_order
from thor.trajectory import Attempt, Execution, Span, Trajectory


def ran(output: str) -> Execution:
    return Execution("ok", output, "", 0.5)


def made() -> Trajectory:
    """Two steps; the second was tried three times, from token 3 of the response."""
    attempts = [Attempt(1, 3, [70, 71], [0.0] * 2, ran("second, first try")),
                Attempt(1, 3, [80], [0.0], ran("second, second try"))]
    return Trajectory("q", 0, "?", None, [1, 2], [10, 11, 12, 13, 14], [0.0] * 5,
                      [Span("think", 0, 1), Span("act", 1, 2), Span("think", 2, 4), Span("act", 4, 5)],
                      [ran("first"), ran("second, kept")], attempts)


def test_executions_come_back_in_the_order_in_which_they_ran():
    sandbox = RecordedSandbox(made())
    outputs = [asyncio.run(sandbox.run("any code")).stdout for _ in range(4)]
    assert outputs == ["first", "second, first try", "second, second try", "second, kept"]
    assert asyncio.run(sandbox.run("one more")).outcome == "infrastructure"


def test_a_block_that_never_ran_has_no_execution_to_give_back():
    assert asyncio.run(RecordedSandbox(replace(made(), executions=[ran("first"), None], attempts=[])).run("a")).stdout == "first"
    sandbox = RecordedSandbox(replace(made(), executions=[None, None], attempts=[]))
    assert asyncio.run(sandbox.run("a")).outcome == "infrastructure"


def test_tokens_stand_in_the_order_in_which_they_were_sampled():
    parts = [("prompt", 1), ("prompt", 2), ("response", 10), ("response", 11), ("response", 12), ("dropped attempt 1", 70),
             ("dropped attempt 1", 71), ("dropped attempt 2", 80), ("response", 13), ("response", 14)]
    assert tokens_in_order(made()) == parts


def test_the_first_difference_is_named_wherever_it_lies():
    assert first_difference(made(), made()) is None
    assert first_difference(made(), replace(made(), response_ids=[10, 11, 12, 13, 15])) == Difference(9, "response", 14, 15)
    assert first_difference(made(), replace(made(), response_ids=[10, 11, 12, 13])) == Difference(9, "response", 14, None)
    assert first_difference(made(), replace(made(), response_ids=[10, 11, 12, 13, 14, 9])) == Difference(10, "response", None, 9)
    other = [replace(made().attempts[0], response_ids=[70, 72]), made().attempts[1]]
    assert first_difference(made(), replace(made(), attempts=other)) == Difference(6, "dropped attempt 1", 71, 72)
