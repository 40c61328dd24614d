"""The sandbox over HTTP, against a real server that speaks SandboxFusion's contract, and misbehaves when told to."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from tests.stub import Reply, Stub, closed_port
from thor.sandbox import open_sandbox
from thor.sandbox_http import RemoteSandbox
from thor.trajectory import Execution

QUICK = dict(run_seconds=2.0, pause_seconds=0.01, output_bytes=1000)


def result(status: str = "Success", run: str = "Finished", code: int | None = 0, stdout: str | None = "",
           stderr: str | None = "") -> Reply:
    """An answer as the service gives it."""
    run_result = {"status": run, "execution_time": 0.25, "return_code": code, "stdout": stdout, "stderr": stderr}
    return Reply(json.dumps({"status": status, "message": "", "compile_result": None, "run_result": run_result,
                             "executor_pod_name": None, "files": {}}).encode())


def really(body: dict) -> Reply:
    """Run the code, as an honest service does; what does not sleep is never late, however busy the machine."""
    try:
        run = subprocess.run([sys.executable, "-c", body["code"]], capture_output=True, text=True,
                             timeout=body["run_timeout"] if "sleep" in body["code"] else None)
    except subprocess.TimeoutExpired:
        return result("Failed", "TimeLimitExceeded", None, None, None)
    return result("Success" if run.returncode == 0 else "Failed", "Finished", run.returncode, run.stdout, run.stderr)


def ask(answer: Callable[[int], Reply], *codes: str, **options) -> tuple[list[Execution], Stub]:
    """The executions of some snippets at a server whose n-th answer is answer(n), its health check answered rightly."""
    async def run(url: str) -> list[Execution]:
        async with RemoteSandbox([url], **{**QUICK, **options}) as sandbox:
            return list(await asyncio.gather(*map(sandbox.run, codes)))

    with Stub(lambda number, body: answer(number - 1) if number else result(stdout="1\n")) as stub:
        return asyncio.run(run(stub.url)), stub


@pytest.mark.parametrize(("reply", "outcome", "stdout", "error"), [
    (result(stdout="42\n"), "ok", "42\n", ""),
    (result(stdout=" \n"), "silent", " \n", "(no output: print the result)"),
    (result(stdout=None, stderr=None), "silent", "", "(no output: print the result)"),
    (result("Failed", code=1, stdout="1\n", stderr="Traceback\nNameError: x\n\n"), "error", "1\n", "NameError: x"),
    (result("Failed", code=3), "error", "", "exit code 3"),
    (result("Failed", code=1, stdout="a\ud800", stderr="E\ud800"), "error", "a?", "E?"),
    (result("Failed", code=1, stderr="Traceback\nMemoryError\n"), "memory", "", "MemoryError"),
    (result("Failed", "TimeLimitExceeded", None, None, None), "timeout", "", "TimeoutError: exceeded 2 s"),
    (result(stdout="x" * 219_264), "output-limit", "x" * 1000, "OutputLimitError: more than 1000 bytes"),
    (result("Failed", "TimeLimitExceeded", None, "x" * 5000), "output-limit", "x" * 1000,
     "OutputLimitError: more than 1000 bytes"),
])
def test_answers_of_the_service_become_our_outcomes(reply, outcome, stdout, error):
    [execution], stub = ask(lambda number: reply, "code")
    assert (execution.outcome, execution.stdout, execution.error) == (outcome, stdout, error)
    assert execution.seconds == 0.25 and len(stub.posts) == 2


def test_the_request_is_the_one_that_the_contract_names():
    _, stub = ask(lambda number: result(stdout="1"), "print('\u00e4')", memory_mb=512)
    assert stub.posts[1].path == "/run_code"
    assert stub.posts[1].body == {"code": "print('\u00e4')", "language": "python", "run_timeout": 2.0,
                                  "compile_timeout": 2.0, "memory_limit_MB": 512, "stdin": "", "files": {}}


FAULTS = {
    "SandboxError": Reply(b'{"status": "SandboxError", "message": "full", "run_result": null}'),
    "no run": Reply(b'{"status": "Failed", "message": "", "run_result": null}'),
    "a run that the service could not do": result("Failed", "Error", None),
    "HTTP 500": Reply(b"oops", 500),
    "HTTP 503": Reply(b"", 503),
    "truncated JSON": Reply(b'{"status": "Success", "run_res'),
    "not JSON": Reply(b"<html>"),
    "wrong types": Reply(b'{"status": "Success", "run_result": {"status": "Finished", "return_code": "0", '
                         b'"stdout": 5, "stderr": []}}'),
    "a list": Reply(b"[]"),
    "an unknown status": result("Perhaps"),
    "no return code": result(code=None),
    "bottomless JSON": Reply(b"[" * 200_000),
    "half a surrogate pair": Reply(b'{"status": "SandboxError", "message": "\\ud800", "run_result": null}'),
    "hanging up": Reply(None),
} | {f"a time of {seconds[:9]}": Reply(result(stdout="1").body.replace(b"0.25", seconds.encode()))
     for seconds in ("NaN", "-Infinity", "1" + "0" * 400, "[1]", '"a"')}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_service_does_wrong_is_tried_again_and_never_the_codes_failure(fault):
    [execution], stub = ask(lambda number: FAULTS[fault] if number < 2 else result(stdout="7\n"), "print(7)")
    assert (execution.outcome, execution.stdout) == ("ok", "7\n") and len(stub.posts) == 4


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("HTTP 503", "hanging up")])
def test_a_service_that_keeps_answering_wrongly_is_infrastructure(fault):
    """And what it said can be written into a file."""
    [execution], stub = ask(lambda number: FAULTS[fault], "print(7)")
    assert execution.outcome == "infrastructure" and execution.error.encode() and len(stub.posts) == 4


@pytest.mark.parametrize("code", [1, -9])
def test_an_error_of_the_code_is_never_tried_again(code):
    [execution], stub = ask(lambda number: result("Failed", code=code), "code")
    assert execution.outcome == "error" and len(stub.posts) == 2


def test_a_service_that_died_is_waited_for_then_the_run_stops_with_a_clear_error():
    with pytest.raises(ValueError, match=r"^no sandbox service has answered for 0.2 s \(http.*the same command contin"):
        ask(lambda number: Reply(None), "code", wait_seconds=0.2)


def test_a_snippet_that_brings_the_service_down_is_infrastructure_while_others_are_served():
    def answer(number: int, body: dict) -> Reply:
        return Reply(None) if body["code"] == "bad" else result(stdout="1\n")

    async def run(url: str) -> list[Execution]:
        async with RemoteSandbox([url], **QUICK, wait_seconds=2.0) as sandbox:
            bad = asyncio.create_task(sandbox.run("bad"))
            good = [await sandbox.run("good") for _ in range(50) if not await asyncio.sleep(0.02)]
            return [await bad, *good]

    with Stub(answer) as stub:
        bad, *good = asyncio.run(run(stub.url))
    assert bad.outcome == "infrastructure" and all(run.passed for run in good)


def test_several_services_share_the_work_and_one_that_is_gone_costs_nothing_but_tries():
    async def run(urls: list[str], leave: Callable[[], None]) -> list[Execution]:
        async with RemoteSandbox(urls, **QUICK) as sandbox:
            together = [await sandbox.run(f"print({n})") for n in range(4)]
            leave()
            return together + [await sandbox.run(f"print({n})") for n in range(4, 8)]

    with Stub(lambda number, body: really(body)) as one, Stub(lambda number, body: really(body)) as other:
        def leave() -> None:
            other.answer = lambda number, body: Reply(None)

        executions = asyncio.run(run([one.url, other.url], leave))
    assert [run.stdout for run in executions] == [f"{n}\n" for n in range(8)]
    assert len(other.posts) > 3 and len(one.posts) >= 1 + 2 + 4


def test_no_more_requests_are_in_flight_than_allowed():
    three = threading.Barrier(3, timeout=30)  # nobody is answered before three have asked

    def answer(number: int) -> Reply:
        three.wait()
        return Reply(result(stdout="1\n").body, seconds=0.05)  # time for a fourth to come

    executions, stub = ask(answer, *["print(1)"] * 12, max_in_flight=3)
    assert all(run.passed for run in executions) and stub.most_at_once == 3


def test_waiting_for_a_slow_service_leaves_the_event_loop_free():
    ticked = threading.Event()

    async def run(url: str) -> bool:
        async with RemoteSandbox([url], **QUICK) as sandbox:
            task = asyncio.create_task(sandbox.run("code"))
            for _ in range(5):
                await asyncio.sleep(0.01)
            ticked.set()
            return (await task).passed

    def answer(number: int, body: dict) -> Reply:
        return result(stdout="1\n") if number == 0 or ticked.wait(30) else Reply(b"", 500)

    with Stub(answer) as stub:
        assert asyncio.run(run(stub.url))


def test_an_honest_service_gives_what_the_local_sandbox_gives():
    codes = ["print(6 * 7)", "x = 1", "1 / 0", "import time\ntime.sleep(99)", "import sys\nsys.exit(3)"]
    with Stub(lambda number, body: really(body)) as stub:
        async def run() -> list[Execution]:
            async with RemoteSandbox([stub.url], **QUICK) as sandbox:
                return list(await asyncio.gather(*map(sandbox.run, codes)))

        assert [(run.outcome, run.stdout, run.error) for run in asyncio.run(run())] == [
            ("ok", "42\n", ""), ("silent", "", "(no output: print the result)"),
            ("error", "", "ZeroDivisionError: division by zero"), ("timeout", "", "TimeoutError: exceeded 2 s"),
            ("error", "", "exit code 3")]


def test_opening_checks_every_service_in_one_clear_sentence():
    async def open_it(spec: str) -> None:
        async with open_sandbox(spec):
            pass

    with pytest.raises(ValueError, match="^the sandbox service at http://127.0.0.1:.* does not work: "):
        asyncio.run(open_it(closed_port()))
    with Stub(lambda number, body: result("Failed", code=1, stderr="No module named sympy")) as stub:
        with pytest.raises(ValueError, match="does not work: No module named sympy$"):
            asyncio.run(open_it(stub.url))


def test_urls_on_the_command_line_are_separated_by_commas():
    sandbox = open_sandbox("http://a:1,https://b/x/", cpu_seconds=5)
    assert isinstance(sandbox, RemoteSandbox) and sandbox.urls == ["http://a:1", "https://b/x/"]
    assert sandbox.run_seconds == 10
    with pytest.raises(ValueError, match="cache needs --sandbox local"):
        open_sandbox("http://a:1", log="log", log_mode="cache")
    with pytest.raises(ValueError, match="http://a,b: "):
        open_sandbox("http://a,b")


@pytest.mark.parametrize("name", ["run_seconds", "memory_mb", "output_bytes", "max_in_flight", "pause_seconds"])
def test_limits_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        RemoteSandbox(["http://a"], **{name: 0})
