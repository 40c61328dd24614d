"""Running code on servers that speak SandboxFusion's contract: `await sandbox.run(code) -> Execution`, as locally.

POST /run_code answers with a status of its own and one of the run. Invariant: only what the code did is judged. What
the service did wrong (an outage, a time-out past the run's own, an answer that is not one, SandboxError, which comes as
HTTP 200) is tried again, then `infrastructure`; a service that nobody reaches for `wait_seconds` ends the run.
"""

import asyncio
import itertools
import time

import requests

from thor.threads import in_thread
from thor.trajectory import Execution

MAX_TRIES = 3  # of a snippet that the service answered, and wrongly
CONNECT_SECONDS = 10.0
EXTRA_SECONDS = 30.0  # that a request may take longer than its run: queues, start-up, transfer
LONGEST_PAUSE = 15.0
BUSY = (429, 502, 503, 504)  # HTTP statuses of a service that is not there just now
EXCERPT = 300  # characters of an answer that are shown


class Unreachable(Exception):
    """Nobody answered."""


class RemoteSandbox:
    """Runs snippets on the services at `urls`, taken in turn; use as `async with RemoteSandbox([url]) as sandbox`.

    The contract knows no CPU time: `run_seconds` of wall-clock time decide a time-out. `output_bytes` of stdout decide
    output-limit here (services cut at a limit of their own). At most `max_in_flight` requests are under way. Opening
    raises ValueError if a service does not run `print(1)`.
    """

    def __init__(self, urls: list[str], run_seconds: float = 20.0, memory_mb: int = 1024, output_bytes: int = 65536,
                 max_in_flight: int = 32, wait_seconds: float = 600.0, pause_seconds: float = 0.5):
        for name, value in (("run_seconds", run_seconds), ("memory_mb", memory_mb), ("output_bytes", output_bytes),
                            ("max_in_flight", max_in_flight), ("pause_seconds", pause_seconds)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.urls, self.run_seconds, self.memory_mb, self.output_bytes = urls, run_seconds, memory_mb, output_bytes
        self.limits = {"run_seconds": run_seconds, "memory_mb": memory_mb, "output_bytes": output_bytes}
        self.wait_seconds, self.pause_seconds = wait_seconds, pause_seconds
        self._turn, self._slots = itertools.cycle(urls), asyncio.Semaphore(max_in_flight)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(len(urls), max_in_flight))
        self._last_answer = 0.0

    async def __aenter__(self) -> "RemoteSandbox":
        for url in self.urls:
            try:
                first = await self._ask(url, "print(1)")
                reason = first.error or f"print(1) was {first.outcome}"
            except Unreachable as error:
                first, reason = None, str(error)
            if first is None or not first.passed:
                await self.__aexit__()
                raise ValueError(f"the sandbox service at {url} does not work: {reason}")
        return self

    async def __aexit__(self, *error: object) -> None:
        self._session.close()

    async def run(self, code: str) -> Execution:
        """Run one snippet. ValueError once nobody has answered for `wait_seconds`; else it raises for nothing."""
        started = time.monotonic()
        wrong = 0
        for pause in (min(self.pause_seconds * 2**n, LONGEST_PAUSE) for n in itertools.count()):
            try:
                execution = await self._ask(next(self._turn), code)
                if execution.outcome != "infrastructure":
                    return execution
                wrong += 1
            except Unreachable as error:
                execution = Execution("infrastructure", "", str(error), 0.0)
            late = time.monotonic() - started > self.wait_seconds
            if late and self._last_answer < started:
                raise ValueError(f"no sandbox service has answered for {self.wait_seconds:g} s ({execution.error}); "
                                 "when it is back, the same command continues")
            if late or wrong == MAX_TRIES:
                return execution
            await asyncio.sleep(pause)
        raise AssertionError("the count of tries has no end")

    async def _ask(self, url: str, code: str) -> Execution:
        async with self._slots:
            return await in_thread(self._post, url, code)

    def _post(self, url: str, code: str) -> Execution:
        """One request, over a kept connection. Raises Unreachable."""
        body = {"code": code, "language": "python", "run_timeout": self.run_seconds,
                "compile_timeout": self.run_seconds, "memory_limit_MB": self.memory_mb, "stdin": "", "files": {}}
        started = time.monotonic()
        try:
            answer = self._session.post(f"{url.rstrip('/')}/run_code", json=body,
                                        timeout=(CONNECT_SECONDS, self.run_seconds + EXTRA_SECONDS))
        except requests.ReadTimeout:
            return Execution("infrastructure", "", f"{url}: no answer in {time.monotonic() - started:.0f} s", 0.0)
        except requests.RequestException as error:
            raise Unreachable(f"{url}: {error}"[:EXCERPT]) from None
        if answer.status_code in BUSY:
            raise Unreachable(f"{url}: HTTP {answer.status_code}")
        self._last_answer = time.monotonic()
        if answer.status_code != 200:
            return Execution("infrastructure", "", f"{url}: HTTP {answer.status_code}: {answer.text[:EXCERPT]}", 0.0)
        return read_answer(answer, self.run_seconds, self.output_bytes)


def read_answer(answer: requests.Response, run_seconds: float, output_bytes: int) -> Execution:
    """The outcome that an answer of the service tells; what does not keep to the contract is `infrastructure`."""
    try:
        body = answer.json()
        status, result = body["status"], body["run_result"]
        if status == "SandboxError" or result is None or result["status"] == "Error":
            return Execution("infrastructure", "", f"the service failed: {body.get('message')!r}"[:EXCERPT], 0.0)
        stdout, stderr = result["stdout"] or "", result["stderr"] or ""
        seconds, code = float(result.get("execution_time") or 0), result["return_code"]
        timed_out = result["status"] == "TimeLimitExceeded"
        kept = isinstance(stdout, str) and isinstance(stderr, str) and abs(seconds) < float("inf")
        if not kept or status not in ("Success", "Failed") or not timed_out and (
                result["status"] != "Finished" or not isinstance(code, int)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Execution("infrastructure", "", f"not an answer of a sandbox service: {answer.text[:EXCERPT]}", 0.0)
    outcome, error = judge(stdout, stderr, None if timed_out else code, run_seconds, output_bytes)
    printed = stdout.encode("utf-8", "replace")[:output_bytes].decode("utf-8", "replace")
    return Execution(outcome, printed, error.encode("utf-8", "replace").decode(), seconds)


def judge(stdout: str, stderr: str, code: int | None, run_seconds: float, output_bytes: int) -> tuple[str, str]:
    """(outcome, what the model is told); `code` None: it ran out of time. The same words as the local sandbox's."""
    if len(stdout.encode("utf-8", "replace")) > output_bytes:
        return "output-limit", f"OutputLimitError: more than {output_bytes:g} bytes"
    if code is None:
        return "timeout", f"TimeoutError: exceeded {run_seconds:g} s"
    if code == 0:
        return ("ok", "") if stdout.strip() else ("silent", "(no output: print the result)")
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    if last.partition(":")[0].endswith("MemoryError"):
        return "memory", "MemoryError"
    return "error", last or f"exit code {code}"
