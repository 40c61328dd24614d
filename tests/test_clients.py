"""Completions from our engine, against a plain loop over its tokens; and over HTTP, from a real server with faults."""

import asyncio
import dataclasses
import email.utils
import threading
import time
from pathlib import Path

import pytest
from stub import Reply, Stub, closed_port, completion

from thor.clients import ClientError, ClientOptions, Completion, HTTPClient, Request, completions_url, open_client
from thor.engine import Engine
from thor.sampling import Sampling, noise_key
from thor.template import load_template, stop_ids
from thor.weights import load_model

QUICK = ClientOptions(backoff=0.001, max_retries=3, timeout=30.0)
PROMPT = "Problem: 3+4\nSolution:\n"


def ask(url: str, options: ClientOptions = QUICK, request: Request = Request("x", 8)) -> Completion:
    """One completion from a server."""
    async def one() -> Completion:
        async with open_client(url, options) as client:
            return await client.complete(request)
    return asyncio.run(one())


def after_faults(*faults: Reply) -> Stub:
    """A server that answers with each fault in turn and then with "fine"."""
    return Stub(lambda number, body: faults[number] if number < len(faults) else completion("fine"))


def complete_all(directory: Path, requests: list[Request], **options: int) -> list[Completion]:
    """Completions of our engine, all asked for at once."""
    async def run() -> list[Completion]:
        async with open_client(str(directory), ClientOptions(style="base", **options)) as client:
            return await asyncio.gather(*map(client.complete, requests))
    return asyncio.run(run())


def by_hand(directory: Path, request: Request) -> Completion:
    """The slow way: one sequence alone, the whole text decoded after each token and searched for stops."""
    template = load_template(directory, "base", "", None, False)
    engine = Engine(load_model(directory), stop_ids(template.tokenizer, directory), 1, 256)
    ids = template.encode_prompt(request.prompt)
    sequence = engine.new(ids, noise_key(request.seed))

    async def run() -> Completion:
        for _ in range(request.max_tokens):
            finish = await engine.sample(sequence, Sampling(request.temperature, request.top_k, request.top_p), 1)
            text = template.decode(sequence.ids[len(ids):])
            if finish == "eos":
                return Completion(text.removesuffix("<eos>"), "eos")
            places = [text.find(stop) for stop in request.stops if stop in text]
            if places:
                return Completion(text[:min(places)], "stop")
        return Completion(text, "length")
    return asyncio.run(run())


def some_requests() -> list[Request]:
    """Requests that end in every way, with stop strings inside one token, over several tokens, and two at a time."""
    stops = [(), ("```output",), ("Add.\n",), (".\n```py",), ("print(3+", "3"), ("never",), ("\n```\n",), ("}", "{7")]
    return [Request(PROMPT, max_tokens, temperature, 30, 1.0, stop, seed)
            for stop in stops for max_tokens, temperature, seed in ((60, 1.0, 1), (60, 1.0, 2**62 + 5), (9, 0.0, 3))]


def test_a_completion_is_what_a_search_of_the_whole_text_after_every_token_gives(tiny_directory):
    requests = some_requests()
    expected = [by_hand(tiny_directory, request) for request in requests]
    assert {answer.finish for answer in expected} == {"stop", "eos", "length"}
    assert complete_all(tiny_directory, requests) == expected


def test_a_completion_does_not_depend_on_who_else_is_in_the_batch(tiny_directory):
    requests = some_requests()
    alone = [complete_all(tiny_directory, [request])[0] for request in requests[:6]]
    assert complete_all(tiny_directory, requests, slots=3)[:6] == alone


def test_another_seed_gives_another_text(tiny_directory):
    texts = {answer.text for answer in complete_all(tiny_directory, [Request(PROMPT, 40, 2.0, 0, 1.0, (), seed)
                                                                     for seed in range(6)])}
    assert len(texts) == 6


def test_a_prompt_without_room_in_the_context_ends_as_a_length(tiny_directory):
    assert complete_all(tiny_directory, [Request(PROMPT, 8)], context=4) == [Completion("", "length")]


def test_a_cancelled_completion_gives_its_memory_back(tiny_directory):
    async def run() -> Completion:
        async with open_client(str(tiny_directory), ClientOptions(style="base", slots=1)) as client:
            task = asyncio.create_task(client.complete(Request(PROMPT, 200)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await client.complete(Request(PROMPT, 60, seed=1))
    assert asyncio.run(run()) == complete_all(tiny_directory, [Request(PROMPT, 60, seed=1)])[0]


def test_a_finished_completion_leaves_nothing_in_memory(tiny_directory):
    async def run() -> int:
        async with open_client(str(tiny_directory), ClientOptions(style="base", slots=1)) as client:
            for seed in range(3):
                await client.complete(Request(PROMPT, 8, seed=seed))
            return client.engine.counts.evictions
    assert asyncio.run(run()) == 0


def test_a_client_of_a_directory_has_its_template(tiny_directory):
    assert open_client(str(tiny_directory), ClientOptions(style="chat")).template.style == "chat"


def test_a_request_reaches_the_server_as_it_was_meant():
    with Stub(lambda number, body: completion(" seven", matched_stop="\n\n")) as stub:
        answer = ask(stub.url, request=Request("3+4 =", 12, 0.7, 20, 0.9, ("\n\n", "."), 2**62 + 11))
    assert answer == Completion(" seven", "stop")
    assert stub.posts[0].path == "/v1/completions"
    assert stub.posts[0].body == {"model": "stub", "prompt": "3+4 =", "max_tokens": 12, "temperature": 0.7, "top_k": 20,
                                  "top_p": 0.9, "stop": ["\n\n", "."], "seed": 11}


def test_what_is_off_is_not_sent():
    with Stub(lambda number, body: completion("")) as stub:
        ask(stub.url, request=Request("x", 1, top_k=0))
    assert not {"top_k", "stop"} & stub.posts[0].body.keys()


@pytest.mark.parametrize("fields, expected", [
    ({"finish_reason": "length"}, "length"),
    ({"stop_reason": "\n\n"}, "stop"),  # vLLM
    ({"stop_reason": None}, "eos"),
    ({"stop_reason": 2}, "eos"),
    ({"matched_stop": "\n\n"}, "stop"),  # SGLang
    ({"matched_stop": 2}, "eos"),
    ({}, "unknown"),  # llama.cpp
])
def test_why_a_completion_ended_is_read_from_what_the_server_tells(fields, expected):
    with Stub(lambda number, body: completion("text", **fields)) as stub:
        assert ask(stub.url, request=Request("x", 8, stops=("\n\n",))) == Completion("text", expected)


def test_without_stop_strings_a_stop_is_the_end():
    with Stub(lambda number, body: completion("text")) as stub:
        assert ask(stub.url).finish == "eos"


def test_a_stop_string_that_a_server_writes_out_is_cut_off():
    with Stub(lambda number, body: completion("one.\n\ntwo; three", "length")) as stub:
        assert ask(stub.url, request=Request("x", 8, stops=(";", "\n\n"))) == Completion("one.", "stop")


FAULTS = {
    "429": (Reply(b"slow down", 429), "HTTP 429"),
    "500": (Reply(b"oops", 500), "HTTP 500"),
    "503": (Reply(b"", 503), "HTTP 503"),
    "408": (Reply(b"", 408), "HTTP 408"),
    "hangs up": (Reply(None), "no connection"),
    "half an answer": (Reply(b"{", headers={"Content-Length": "99"}), "no connection"),
    "not JSON": (Reply(b"<html>gateway</html>"), "not JSON"),
    "not UTF-8": (Reply(b'{"choices": [{"text": "\xff\xfe\xfa", "finish_reason": "stop"}]}'), "not JSON"),
    "bottomless": (Reply(b"[" * 200_000), "not JSON"),
    "an error in a 200": (Reply(b'{"error": "overloaded"}'), "wrong schema"),
    "no choice": (Reply(b'{"choices": []}'), "wrong schema"),
    "a list": (Reply(b"[1]"), "wrong schema"),
    "text is null": (Reply(b'{"choices": [{"text": null, "finish_reason": "stop"}]}'), "wrong schema"),
    "it was aborted": (Reply(b'{"choices": [{"text": "a", "finish_reason": "abort"}]}'), "wrong schema"),
}


@pytest.mark.parametrize("fault, kind", FAULTS.values(), ids=FAULTS)
def test_what_a_server_does_wrong_is_tried_again(fault, kind):
    async def run(url: str) -> tuple[Completion, dict[str, int]]:
        async with open_client(url, QUICK) as client:
            return await client.complete(Request("x", 8)), client.counts

    with after_faults(fault, fault) as stub:
        assert asyncio.run(run(stub.url)) == (Completion("fine", "eos"), {kind: 2})
    assert len(stub.posts) == 3


@pytest.mark.parametrize("fault, kind", FAULTS.values(), ids=FAULTS)
def test_a_server_that_keeps_failing_is_a_client_error(fault, kind):
    with Stub(lambda number, body: fault) as stub, pytest.raises(ClientError, match=r"127.0.0.1.*\(4 tries\)"):
        ask(stub.url)
    assert len(stub.posts) == 4


def test_a_server_that_never_answers_is_given_up_after_the_time_out():
    options = dataclasses.replace(QUICK, timeout=0.2, max_retries=1, model_name="m")
    with Stub(lambda number, body: Reply(b"", seconds=60.0)) as stub:
        with pytest.raises(ClientError, match=r"did not answer within 0.2 s \(2 tries\)"):
            ask(stub.url, options)


def test_one_of_several_servers_may_be_gone():
    with Stub(lambda number, body: completion("fine")) as stub:
        urls, options = f"{closed_port()},{stub.url}", dataclasses.replace(QUICK, model_name="m")
        assert [ask(urls, options).text for _ in range(3)] == ["fine"] * 3


def test_servers_are_asked_in_turn():
    async def run(urls: str) -> None:
        async with open_client(urls, QUICK) as client:
            await asyncio.gather(*(client.complete(Request("x", 8)) for _ in range(9)))

    with after_faults() as one, after_faults() as two, after_faults() as three:
        asyncio.run(run(",".join(stub.url for stub in (one, two, three))))
        assert [len(stub.posts) for stub in (one, two, three)] == [3, 3, 3]


def test_as_many_requests_are_in_flight_as_allowed_and_no_more():
    async def run(url: str) -> None:
        async with open_client(url, dataclasses.replace(QUICK, concurrency=4)) as client:
            await asyncio.gather(*(client.complete(Request("x", 8)) for _ in range(12)))

    four = threading.Barrier(4, timeout=30)  # nobody is answered before four have asked

    def answer(number: int, body: dict) -> Reply:
        four.wait()
        return dataclasses.replace(completion("fine"), seconds=0.05)  # time for a fifth to come

    with Stub(answer) as stub:
        asyncio.run(run(stub.url))
    assert stub.most_at_once == 4 and len(stub.posts) == 12


class Patient(HTTPClient):
    """Notes the pauses it would make and makes none."""

    def __init__(self, urls: list[str], options: ClientOptions):
        super().__init__(urls, options)
        self.pauses: list[float] = []

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def pauses(*faults: Reply, **options: float) -> list[float]:
    """How long a client with the default options waits between its tries."""
    async def run(url: str) -> list[float]:
        async with Patient([url], ClientOptions(**options)) as client:
            await client.complete(Request("x", 8))
            return client.pauses

    with after_faults(*faults) as stub:
        return asyncio.run(run(stub.url))


def test_pauses_double():
    assert pauses(*[Reply(b"", 500)] * 5) == [1, 2, 4, 8, 16]


def test_retry_after_is_honoured_in_seconds_and_as_a_date_but_not_beyond_the_bound():
    date = email.utils.formatdate(time.time() + 1000, usegmt=True)
    answers = [Reply(b"", 429, {"Retry-After": value}) for value in ("7", date, "1e9", "soon")]
    first, second, third, fourth = pauses(*answers, max_wait=1200.0)
    assert (first, third, fourth) == (7, 4, 8) and 900 < second <= 1000
    assert pauses(Reply(b"", 503, {"Retry-After": "99999"}), max_wait=30.0) == [30]


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_request_that_is_itself_wrong_is_refused_at_once_with_the_servers_message(status):
    wrong = Reply(b'{"error": "no such thing"}', status, {"Location": "/elsewhere"})  # which nobody goes to
    with Stub(lambda number, body: wrong) as stub:
        with pytest.raises(ValueError, match=f"HTTP {status}.*no such thing"):
            ask(stub.url)
    assert len(stub.posts) == 1


@pytest.mark.parametrize("message", [
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",  # vLLM
    "The input (9 tokens) is longer than the model's context length (8 tokens).",  # SGLang
    "Requested tokens (5000) exceed context window of 2048",  # llama-cpp-python
    "the request exceeds the available context size, try increasing it",  # llama.cpp's own server
])
def test_a_prompt_without_room_in_a_servers_context_ends_as_a_length(message):
    with Stub(lambda number, body: Reply(message.encode(), 400)) as stub:
        assert ask(stub.url) == Completion("", "length")


def test_a_completion_that_might_not_fit_is_asked_for_again_in_half():
    """As our own engine does it, which stops where its context ends."""
    def answer(number: int, body: dict) -> Reply:
        if body["max_tokens"] > 30:
            return Reply(b"maximum context length is 40 tokens", 400)
        return Reply(b'{"choices": [{"text": "fits", "finish_reason": "length"}]}')

    with Stub(answer) as stub:
        assert ask(stub.url, request=Request("x", 100)) == Completion("fits", "length")
        assert [seen.body["max_tokens"] for seen in stub.posts] == [100, 50, 25]


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    body = b'{"choices": [{"text": "a\\ud83d b\\ud83d\\ude00", "finish_reason": "stop"}]}'
    with Stub(lambda number, request: Reply(body)) as stub:
        assert ask(stub.url).text == "a\ufffd b\U0001f600"


@pytest.mark.parametrize("body", [b'{"error": "bad key secret-123"}', b'{"choices": [{"text": ["secret-123"], "finish_reason": "stop"}]}',
                                  b'{"choices": [{"text": "", "finish_reason": "secret-123"}]}'])
def test_the_key_is_in_no_message_about_an_answer_that_is_none(body, monkeypatch):
    monkeypatch.setenv("THOR_API_KEY", "secret-123")
    with Stub(lambda number, request: Reply(body)) as stub, pytest.raises(ClientError) as error:
        ask(stub.url)
    assert "its answer" in str(error.value) and "secret" not in str(error.value)


def test_the_key_comes_from_the_named_variable_and_is_in_no_message(monkeypatch, capfd):
    monkeypatch.setenv("SOME_KEY", "secret-123")
    monkeypatch.setenv("THOR_API_KEY", "another")
    with Stub(lambda number, body: Reply(b"bad key secret-123", 401)) as stub, pytest.raises(ValueError) as error:
        ask(stub.url, dataclasses.replace(QUICK, key_variable="SOME_KEY"))
    assert {seen.headers["Authorization"] for seen in stub.seen} == {"Bearer secret-123"}
    assert "SOME_KEY" in str(error.value) and "secret" not in str(error.value) + str(capfd.readouterr())


@pytest.mark.parametrize("key", ["secret-123\nmore", "secret\u2013123"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("THOR_API_KEY", key)
    with after_faults() as stub, pytest.raises(ValueError, match="the key in THOR_API_KEY has a character") as error:
        ask(stub.url)
    assert "secret" not in str(error.value) and stub.seen == []


def test_the_newline_that_a_file_of_a_key_ends_with_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv("THOR_API_KEY", "secret-123\n")
    with after_faults() as stub:
        ask(stub.url)
    assert {seen.headers["Authorization"] for seen in stub.seen} == {"Bearer secret-123"}


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("THOR_API_KEY", raising=False)
    with after_faults() as stub:
        ask(stub.url)
    assert not any("Authorization" in seen.headers for seen in stub.seen)


def test_a_server_without_a_list_of_models_is_asked_without_a_name():
    with Stub(lambda number, body: completion("fine"), models=Reply(b"", 404)) as stub:
        assert ask(stub.url).text == "fine"
    assert "model" not in stub.posts[0].body


def test_a_server_that_is_not_there_is_one_clear_sentence():
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+/v1/models: no connection.*\(4 tries\)"):
        ask(closed_port())


def test_a_tokenizer_renders_prompts_for_a_server(tiny_directory):
    options = ClientOptions(tokenizer=str(tiny_directory), style="base", instruction="")
    client = HTTPClient(["http://localhost:1"], options)
    assert client.template.prompt_text("3+4") == PROMPT
    assert HTTPClient(["http://localhost:1"], ClientOptions()).template is None


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/completions"])
def test_a_server_may_be_named_by_any_part_of_its_address(url):
    assert completions_url(url) == "http://host:1/v1/completions"


@pytest.mark.parametrize("spec, words", [("http://", "not the URL"), ("http://a,ftp://b", "not the URL"),
                                         ("http://a,", "not the URL"), ("nowhere", "not a directory")])
def test_a_client_of_nothing_is_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        open_client(spec, QUICK)


@pytest.mark.parametrize("name, value", [("slots", 0), ("context", 1), ("concurrency", 0), ("max_retries", -1),
                                         ("timeout", 0.0), ("backoff", -1.0), ("dtype", "int8")])
def test_an_option_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        ClientOptions(**{name: value})
