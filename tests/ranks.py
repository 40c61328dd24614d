"""Several ranks on this machine: forked from the test's own process, which has imported all, and joined by gloo."""

import gc
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection

import torch

from thor import reward
from thor.parallel import open_ranks

DEADLINE = 240.0  # seconds for all of it, on a machine that others use, too
PATIENCE = timedelta(seconds=120)

Work = Callable[..., object]


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(work: Callable[..., object], *given: object) -> multiprocessing.Process:
    """A forked process that does `work(*given)`.

    Its garbage collector leaves alone what earlier tests left behind: some of that crashes when it is destroyed in a
    process that has its memory and not its threads.
    """
    process = multiprocessing.get_context("fork").Process(target=work, args=given)
    gc.freeze()
    process.start()
    gc.unfreeze()
    return process


def on_ranks(size: int, work: Work, *given: object, replicas: int = 1, patience: timedelta = PATIENCE) -> list[object]:
    """What `work(ranks, *given)` returns on each of `size` ranks; AssertionError for what a rank raised, or a hang."""
    def start(ranks_work: Work, result: Connection) -> object:
        with open_ranks("cpu", replicas, patience=patience) as ranks:
            result.send((True, pickle.dumps(ranks_work(ranks, *given))))  # tensors by value, not as shared memory

    return [pickle.loads(answer) for _, answer in finished(start_ranks(size, lambda result: start(work, result)))]


def start_ranks(size: int, work: Callable[[Connection], object]) -> list[tuple]:
    """(process, connection) of `size` forked processes that believe torchrun started them."""
    port, started = free_port(), []
    for rank in range(size):
        mine, theirs = multiprocessing.Pipe()
        process = fork(_as_rank, rank, size, port, work, theirs)
        theirs.close()
        started.append((process, mine))
    return started


def finished(started: list[tuple], codes: set[int] | None = None) -> list[tuple[bool, object]]:
    """What the ranks sent, once all have ended; with the exit codes `codes`, or, without, having done their work."""
    deadline, sent = time.monotonic() + DEADLINE, []
    for process, connection in started:
        try:
            ready = connection.poll(max(0.0, deadline - time.monotonic()))
            sent.append(connection.recv() if ready else None)
        except EOFError:
            sent.append((False, "ended without an answer"))
    for process, _ in started:
        process.join(max(0.0, deadline - time.monotonic()) if None not in sent else 1.0)
    hanging = [number for number, (process, _) in enumerate(started) if process.is_alive()]
    for process, _ in started:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} hang: not all ranks ran the same number of forwards or collectives"
    if codes is None:
        for number, (done, answer) in enumerate(sent):
            assert done, f"rank {number}: {answer}"
    else:
        assert {process.exitcode for process, _ in started} == codes, sent
    return sent


def _as_rank(rank: int, size: int, port: int, work: Callable[[Connection], object], result: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    reward._default.clear()  # a grader that was forked shares its workers with the process that made it
    try:
        work(result)
    except BaseException:
        result.send((False, traceback.format_exc()))
        raise
    finally:
        for grader in reward._default:
            grader.close()
