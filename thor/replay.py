"""Sampling a recorded trajectory again: what its code printed, from the record, and where the two first differ.

Every token follows from model, seed, problem, sample and the outputs of its code. Invariant: a comparison covers dropped
attempts too, in the order in which they were sampled, so that nothing that was sampled escapes it.
"""

from dataclasses import dataclass

from thor.trajectory import Execution, Trajectory, kept_executions


class RecordedSandbox:
    """Answers with what a trajectory's code gave when it ran, in that order; asked for more, it has no answer."""

    def __init__(self, trajectory: Trajectory):
        self._left = recorded_executions(trajectory)

    async def run(self, code: str) -> Execution:
        """The next recorded execution. Past the last one: an infrastructure failure, which ends the trajectory."""
        if not self._left:
            return Execution("infrastructure", "", "the record has no further execution", 0.0)
        return self._left.pop(0)


def recorded_executions(trajectory: Trajectory) -> list[Execution]:
    """All that ran, in order: of each step first its dropped attempts, then what was kept."""
    kept, found = kept_executions(trajectory), []
    for step in range(len(kept) + 1):
        found += [attempt.execution for attempt in trajectory.attempts if attempt.step == step]
        found += kept[step:step + 1]
    return found


@dataclass(frozen=True)
class Difference:
    """The first token that differs: how many tokens were the same before it, in which part it lies, and both tokens
    (None past an end)."""

    position: int
    part: str
    recorded: int | None
    again: int | None


def first_difference(recorded: Trajectory, again: Trajectory) -> Difference | None:
    """None if every token is the same, dropped ones included."""
    before, after = tokens_in_order(recorded), tokens_in_order(again)
    if before == after:
        return None
    same = next((i for i, (left, right) in enumerate(zip(before, after)) if left != right), min(len(before), len(after)))
    part = (before if same < len(before) else after)[same][0]
    return Difference(same, part, *(stream[same][1] if same < len(stream) else None for stream in (before, after)))


def tokens_in_order(trajectory: Trajectory) -> list[tuple[str, int]]:
    """(part, token) as they came to be: prompt, response, and each dropped attempt where it was dropped."""
    stream, position = [("prompt", token) for token in trajectory.prompt_ids], 0
    for number, attempt in enumerate(trajectory.attempts):
        stream += [("response", token) for token in trajectory.response_ids[position:attempt.start]]
        stream += [(f"dropped attempt {number + 1}", token) for token in attempt.response_ids]
        position = max(position, attempt.start)
    return stream + [("response", token) for token in trajectory.response_ids[position:]]
