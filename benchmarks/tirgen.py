"""How fast TIRGen goes: problems a minute against what the servers' latency allows, and filtered trajectories a second.

    python benchmarks/tirgen.py

Actor and Critic are one server that answers every request after the same time, however many there are; it runs in a
process of its own. A problem takes k requests one after another, so N problems, c at a time, cannot take less than
N / c · k · latency: the share of that ideal rate is printed. The time is the server's, from the first request it got to
the last answer it gave, so what a run costs once (imports, the sandbox's start) is not in it. Filters are timed on
trajectories that all survive, the slowest case, in CPU time of one core.
"""

import asyncio
import contextlib
import json
import math
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).parent.parent))

import tirgen  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402
from thor import config  # noqa: E402
from thor.config import option  # noqa: E402
from thor.tirgen_filters import FilterSettings, filter_tirgen  # noqa: E402
from thor.trajectory import Execution, Trajectory  # noqa: E402

STEP = "There are 17 rows of 23 trees. So 17 * 23 = 391."
REWRITE = "There are 17 rows of 23 trees.\n```python\nprint(sum(23 for row in range(17)))\n```"
LAST = "So the answer is \\boxed{391}."
WORDS = "row tree field farmer number each half whole then first second total count apple price less more day".split()

BAR_SHARE, BAR_FILTER = 0.8, 2000  # at 16 in flight; trajectories a second and core


@dataclass
class Options:
    """One flag a field."""

    latency: float = option(0.5, "seconds that the server takes for each answer")
    waves: int = option(4, "problems for each one in flight")
    trajectories: int = option(4000, "trajectories that are filtered")
    kilobytes: int = option(4, "text of a trajectory")
    serve: bool = option(False, "used by the script itself: be the server")


def main(options: Options) -> None:
    """Print a line for each concurrency and one for the filters."""
    if options.serve:
        asyncio.run(serve(options.latency))
        return
    print(f"python {platform.python_version()}, a server that takes {options.latency} s for each answer")
    with server(options.latency) as url:
        for in_flight in (1, 16, 128):
            measure_run(url, in_flight, options)
    measure_filters(options.trajectories, options.kilobytes)


def measure_run(url: str, in_flight: int, options: Options) -> None:
    """Run TIRGen on enough problems and print its rate beside the ideal one."""
    num_problems = options.waves * in_flight
    with tempfile.TemporaryDirectory() as directory:
        run_tirgen(url, in_flight, num_problems, Path(directory))
        kept = len((Path(directory) / "out" / "sft.jsonl").read_text().splitlines())
    assert kept == num_problems, f"{kept} of {num_problems} problems gave a trajectory, so this is no measurement"
    times = requests.get(f"{url}/times", timeout=60).json()
    per_problem = times["requests"] / num_problems
    ideal = math.ceil(num_problems / in_flight) * per_problem * options.latency
    bar = f" (bar {BAR_SHARE})" if in_flight == 16 else ""
    rate = 60 * num_problems / times["seconds"]
    print(f"{in_flight:4} in flight: {rate:7.1f} problems a minute, {per_problem:g} requests each, "
          f"{ideal / times['seconds']:.2f} of the ideal rate{bar}", flush=True)


def run_tirgen(url: str, in_flight: int, num_problems: int, directory: Path) -> None:
    """The script itself, in this process, with its output put aside."""
    make_tokenizer().save_pretrained(directory / "tokenizer")
    problems = [{"id": str(number), "question": f"Field {number}?", "answer": "391"} for number in range(num_problems)]
    (directory / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    arguments = tirgen.TirgenOptions(
        actor=url, critic=url, problems=str(directory / "problems.jsonl"), out=str(directory / "out"), style="base",
        actor_tokenizer=str(directory / "tokenizer"), tries=1, difficulty_samples=0, one_call_share=1.0,
        concurrency=in_flight)
    with open(directory / "log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        tirgen.main(arguments)


def measure_filters(count: int, kilobytes: int) -> None:
    """Print how many trajectories a second of CPU time all filters judge together."""
    rng = random.Random(0)
    trajectories = [make_trajectory(rng, str(number), 1000 * kilobytes) for number in range(count)]
    start = time.process_time()
    filtered = filter_tirgen(trajectories, FilterSettings(), {})
    rate = count / (time.process_time() - start)
    assert len(filtered.kept) == count, "a trajectory was dropped, so this is not the slowest case"
    print(f"filters: {rate:.0f} trajectories of {kilobytes} kB a CPU second, {rate / BAR_FILTER:.2f} of the bar")


def make_trajectory(rng: random.Random, name: str, characters: int) -> Trajectory:
    """A right solution with a program in about every 800 characters, all of them with control flow."""
    parts, length, execution = [], 0, Execution("ok", "391\n", "", 0.01)
    while length < characters - 100:
        prose = " ".join(rng.choice(WORDS) + str(rng.randrange(100)) * (rng.random() < 0.3) for _ in range(90))
        lines = "".join(f"    total += {rng.randrange(1000)} * step // {rng.randrange(1, 99)}\n" for _ in range(6))
        code = f"total = 0\nfor step in range({rng.randrange(99)}):\n{lines}print(total)\n"
        parts.append(f"{prose}\n```python\n{code}```\n```output\n391\n```\n")
        length += len(parts[-1])
    text = "".join(parts) + LAST
    return Trajectory(name, 0, "How many?", "391", [], text=text, executions=[execution] * len(parts), boxed="391",
                      correct=True, finish="eos")


@contextlib.contextmanager
def server(latency: float) -> Iterator[str]:
    """The URL of the server, in a process that ends when its standard input does."""
    command = [sys.executable, __file__, "--serve", "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@dataclass
class Times:
    """Since they were last read: how many requests came, when the first did, when the last was answered."""

    requests: int = 0
    first: float = 0.0
    last: float = 0.0


async def serve(latency: float) -> None:
    """Answer until standard input ends."""
    times = Times()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await answer(reader, writer, latency, times)

    listening = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=512)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    listening.close()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float, times: Times) -> None:
    """One request of a connection that stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
    body = await reader.readexactly(size)
    if head.startswith("get /times"):
        reply = {"requests": times.requests, "seconds": times.last - times.first}
        times.requests = 0
    elif head.startswith("get"):
        reply = {"data": [{"id": "stub"}]}
    else:
        times.first = time.monotonic() if times.requests == 0 else times.first
        times.requests += 1
        await asyncio.sleep(latency)
        times.last = time.monotonic()
        text, stop_reason = written(json.loads(body)["prompt"])
        reply = {"choices": [{"text": text, "finish_reason": "stop", "stop_reason": stop_reason}]}
    payload = json.dumps(reply).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(payload) + payload)
    await writer.drain()


def written(prompt: str) -> tuple[str, str | None]:
    """(text, stop string) of the server as Critic or Actor, told apart by how the prompt ends."""
    if prompt.rstrip().endswith("Answer:"):
        return (" YES" if STEP in prompt.rpartition("Step:")[2] else " NO"), None
    if prompt.rstrip().endswith("Rewritten:"):
        return REWRITE, None
    return (LAST, None) if "```output\n391" in prompt else (STEP, "\n\n")


if __name__ == "__main__":
    config.run(main, Options, __doc__)
