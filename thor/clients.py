"""Text from a model, wherever it runs: our own engine on a Hugging Face directory, or servers of /v1/completions.

TIRGen's Actor and Critic are coroutines that `await client.complete(request)`; how many of them ask at once is nobody's
business but the client's. Invariants: a completion of our engine depends on its request alone (a server is told the
seed, too, and does with it what it can); it never holds a stop string; what a server does wrong is tried again, then a
ClientError, while a request that is itself wrong is a ValueError at once. The API key is read from the environment and
goes nowhere but into the request's header.
"""

import asyncio
import email.utils
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import requests

from thor.engine import Sequence
from thor.paged_engine import make_engine
from thor.sampling import Sampling, noise_key
from thor.template import TEXT_INSTRUCTION, Template, load_template, stop_ids
from thor.threads import in_thread
from thor.weights import DTYPES, load_model

SERVER_SEEDS = 2**31  # llama.cpp takes 32 bits of a seed, some servers a signed number of them
BYTES_PER_CHARACTER = 4  # a token holds at least a byte, so a stop string of n characters has at most 4 n tokens
EXCERPT = 300  # characters of a server's message that are shown
TOO_LONG = re.compile(r"context.{0,20}(length|size|window)|(longer|larger) than the (model's )?context", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """One continuation of `prompt`, which the caller has rendered; `seed` (63 bits) decides all noise."""

    prompt: str
    max_tokens: int
    temperature: float = 0.6
    top_k: int = 30
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What was written, without the stop string, and why it ended: stop, eos, length or unknown.

    unknown: a server that says "stop" and not whether it met a stop string or the end of the text. The caller takes it
    for a stop string, and an empty continuation after it for the end.
    """

    text: str
    finish: str


class ClientError(Exception):
    """A server has failed as often as `max_retries` allows; whoever asked drops that try and goes on."""


Answer = TypeVar("Answer")
JSON = dict | list | str | int | float | bool | None


class _Failure(Exception):
    """What a server did wrong, which may go better next time; `retry_after` is the pause it asks for, in seconds."""

    def __init__(self, kind: str, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class _Refused(ValueError):
    """A request that no server will take, however often it is sent."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _TooLong(Exception):
    """The prompt and its completion do not fit the server's context."""


@dataclass(frozen=True)
class ClientOptions:
    """How to reach a model. The second block is for our engine, the third for servers; the first is for both.

    `tokenizer` is a directory whose chat template renders prompts for a server; without one there is no template.
    """

    style: str = "chat"
    instruction: str = TEXT_INSTRUCTION
    system: str | None = None
    thinking: bool = False

    device: str = "cpu"
    dtype: str = "float32"
    slots: int = 16  # sequences in memory at once; the rest wait
    context: int = 4096  # tokens of prompt and completion together, at most the model's own

    tokenizer: str | None = None
    model_name: str | None = None  # None: the first that the server lists
    key_variable: str = "THOR_API_KEY"
    concurrency: int = 64  # requests in flight, over all URLs
    timeout: float = 300.0  # seconds without a byte from the server
    max_retries: int = 5
    backoff: float = 1.0  # seconds before the first retry, twice as long before each further one
    max_wait: float = 60.0  # seconds; the most that a retry waits, whatever the server's Retry-After asks for

    def __post_init__(self) -> None:
        limits = {"slots": 1, "context": 2, "concurrency": 1, "max_retries": 0, "backoff": 0, "max_wait": 0}
        for name, low in limits.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {low} or more")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0 seconds")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")


class EngineClient:
    """Our engine on a Hugging Face directory. A completion does not depend on which others are in the batch."""

    def __init__(self, directory: str, options: ClientOptions):
        self.template = load_template(directory, options.style, options.instruction, options.system, options.thinking)
        model = load_model(directory, DTYPES[options.dtype], options.device)
        context = min(options.context, model.config.max_context)
        stops = stop_ids(self.template.tokenizer, directory)
        self.engine = make_engine(model, stops, options.slots, context)

    async def __aenter__(self) -> "EngineClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def complete(self, request: Request) -> Completion:
        """One continuation; a prompt that leaves no room in the context ends as a length at once."""
        sampling = Sampling(request.temperature, request.top_k, request.top_p)
        ids = self.template.encode_prompt(request.prompt)
        if len(ids) >= self.engine.max_tokens or request.max_tokens < 1:
            return Completion("", "length")
        sequence = self.engine.new(ids, noise_key(request.seed))
        search = _StopSearch(self.template, sequence, request.stops)
        try:
            finish = await self.engine.sample(sequence, sampling, request.max_tokens, search.met)
        finally:
            self.engine.free(sequence)
        written = sequence.ids[len(ids):-1] if finish == "eos" else sequence.ids[len(ids):]
        return Completion(_before_stop(self.template.decode(written), request.stops), finish)


class _StopSearch:
    """Looks for stop strings in a sequence's text as its tokens come, reading only as far back as a stop can reach."""

    def __init__(self, template: Template, sequence: Sequence, stops: tuple[str, ...]):
        self.template, self.sequence, self.stops = template, sequence, stops
        self.start = len(sequence.ids)
        self.reach = 1 + BYTES_PER_CHARACTER * max(map(len, stops), default=0)

    def met(self, token: int) -> bool:
        """Whether the text with this token, the sequence's last, holds a stop string."""
        begin = max(self.start, len(self.sequence.ids) - self.reach)
        return bool(self.stops) and _first_stop(self.template.decode(self.sequence.ids[begin:]), self.stops) is not None


class HTTPClient:
    """OpenAI-compatible servers (vLLM, SGLang, llama.cpp, …), asked in turn, `concurrency` requests at once.

    `counts` says what went wrong and was tried again, by kind. `template` is None without `tokenizer`.
    """

    def __init__(self, urls: list[str], options: ClientOptions):
        self.options = options
        self.urls = [completions_url(url) for url in urls]
        self.template = None
        if options.tokenizer is not None:
            self.template = load_template(options.tokenizer, options.style, options.instruction, options.system,
                                          options.thinking)
        self.counts: Counter[str] = Counter()
        self.model_names: dict[str, str | None] = dict.fromkeys(self.urls, options.model_name)
        self._turn = itertools.cycle(self.urls)
        self._key = os.environ.get(options.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the key in {options.key_variable} has a character that cannot be sent in a header")
        self._slots = asyncio.Semaphore(options.concurrency)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(len(self.urls), options.concurrency))

    async def __aenter__(self) -> "HTTPClient":
        """Ask each server for its model. Raises ValueError if one of them does not answer."""
        try:
            if self.options.model_name is None:
                await asyncio.gather(*map(self._learn_model_name, self.model_names))
        except ClientError as error:
            await self.__aexit__()
            raise ValueError(str(error)) from None
        except ValueError:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._session.close()

    async def complete(self, request: Request) -> Completion:
        """One continuation. Raises ClientError when retries are spent, ValueError for a request that is wrong."""
        payload = {"prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": request.temperature,
                   "top_p": request.top_p, "seed": request.seed % SERVER_SEEDS}
        if request.top_k:  # not OpenAI's own; vLLM, SGLang and llama.cpp know it
            payload["top_k"] = request.top_k
        if request.stops:
            payload["stop"] = list(request.stops)
        while payload["max_tokens"] > 0:
            try:
                return await self._persist(lambda url: self._complete_once(url, payload, request.stops), self._turn)
            except _TooLong:  # most servers refuse what might not fit, where our engine would stop at its context
                payload["max_tokens"] //= 2
        return Completion("", "length")

    async def pause(self, seconds: float) -> None:
        """What happens between two tries."""
        await asyncio.sleep(seconds)

    async def _learn_model_name(self, url: str) -> None:
        listing = url.removesuffix("/completions") + "/models"
        self.model_names[url] = await self._persist(self._first_model, itertools.repeat(listing))

    async def _persist(self, ask: Callable[[str], Answer], urls: Iterator[str]) -> Answer:
        """`ask(url)` in a thread, again with the next URL and after a growing pause while servers fail."""
        for failures in range(self.options.max_retries + 1):
            url = next(urls)
            try:
                async with self._slots:
                    return await in_thread(ask, url)
            except _Failure as error:
                failure = error
            self.counts[failure.kind] += 1
            if failures < self.options.max_retries:
                pause = max(self.options.backoff * 2**failures, failure.retry_after)
                await self.pause(min(pause, self.options.max_wait))
        raise ClientError(f"{url}: {failure} ({self.options.max_retries + 1} tries)")

    def _complete_once(self, url: str, payload: dict, stops: tuple[str, ...]) -> Completion:
        """One POST. Raises _Failure for what may go better next time."""
        name = self.model_names[url]
        body = self._ask("POST", url, payload if name is None else payload | {"model": name})
        try:
            choice = body["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise _Failure("wrong schema", f"its answer is not a completion: "
                           f"{_excerpt(self._without_key(str(body)))}") from None
        if not isinstance(text, str) or finish not in ("stop", "length"):
            raise _Failure("wrong schema", f"its answer has text {_excerpt(self._without_key(repr(text)))}, finish_reason "
                           f"{_excerpt(self._without_key(repr(finish)))}")
        return _completion(_well_formed(text), choice, stops)

    def _first_model(self, url: str) -> str | None:
        """The first model that a server lists, None if it keeps no list."""
        try:
            return self._ask("GET", url, None)["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            return None
        except _Refused as error:
            if error.status in (404, 405):
                return None
            raise

    def _ask(self, method: str, url: str, payload: dict | None) -> JSON:
        """The JSON that a server answers. Raises _Failure, or ValueError where asking again would be no use."""
        try:
            response = self._session.request(method, url, json=payload, auth=self._authorise, allow_redirects=False,
                                             timeout=self.options.timeout)
        except requests.Timeout:
            raise _Failure("no answer", f"it did not answer within {self.options.timeout:g} s") from None
        except requests.RequestException as error:
            raise _Failure("no connection", f"no connection ({_excerpt(self._without_key(str(error)))})") from None
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _Failure(f"HTTP {response.status_code}", f"it answers HTTP {response.status_code}",
                           _retry_after(response.headers.get("Retry-After", "")))
        if response.status_code >= 300:
            self._refuse(url, response)
        try:
            return json.loads(response.content.decode())  # requests' own reading guesses an encoding
        except (ValueError, RecursionError):
            raise _Failure("not JSON", "its answer is not JSON") from None

    def _refuse(self, url: str, response: requests.Response) -> None:
        """Raise what a 3xx or 4xx means: the prompt is too long, or no request of this kind will ever be taken."""
        message = self._without_key(response.content.decode("utf-8", "replace"))
        if response.status_code in (400, 413, 422) and TOO_LONG.search(message):
            raise _TooLong(message)
        hint = f"; the key is read from {self.options.key_variable}" if response.status_code in (401, 403) else ""
        raise _Refused(response.status_code,
                       f"{url} refuses with HTTP {response.status_code}: {_excerpt(message)}{hint}")

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _without_key(self, message: str) -> str:
        """Some servers repeat the key in their complaint."""
        return message.replace(self._key, "…") if self._key else message


def open_client(spec: str, options: ClientOptions) -> EngineClient | HTTPClient:
    """The client of a Hugging Face directory or of URLs, separated by commas: `async with open_client(…) as client`."""
    if spec.startswith(("http://", "https://")):
        return HTTPClient(spec.split(","), options)
    return EngineClient(spec, options)


def completions_url(url: str) -> str:
    """Where a server takes completions: its address may be given with /v1 or /v1/completions, or without."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a server; it must be like http://localhost:8000")
    base = url.strip().rstrip("/").removesuffix("/completions").rstrip("/")
    return f"{base if base.endswith('/v1') else base + '/v1'}/completions"


def _completion(text: str, choice: dict, stops: tuple[str, ...]) -> Completion:
    """What a server wrote, with its `finish_reason` made precise where its other fields allow that."""
    if _first_stop(text, stops) is not None:  # a server that writes stop strings out, or knows none
        return Completion(_before_stop(text, stops), "stop")
    if choice["finish_reason"] == "length":
        return Completion(text, "length")
    if not stops:
        return Completion(text, "eos")
    if choice.get("matched_stop") is not None:  # SGLang: the stop string, or the number of the token that ends a text
        return Completion(text, "stop" if isinstance(choice["matched_stop"], str) else "eos")
    if "stop_reason" in choice:  # vLLM: the stop string, a stop token's number, or null at the model's own EOS
        return Completion(text, "stop" if isinstance(choice["stop_reason"], str) else "eos")
    return Completion(text, "unknown")


def _first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the earliest stop string begins, None without one."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def _before_stop(text: str, stops: tuple[str, ...]) -> str:
    return text[:_first_stop(text, stops)]


def _well_formed(text: str) -> str:
    """Half of a surrogate pair, which JSON can say and no file can hold, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retry_after(value: str) -> float:
    """Seconds from now that a Retry-After header names, as a number or as a date; 0 for anything else."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _excerpt(message: str) -> str:
    """A message in one line of bearable length."""
    line = " ".join(message.split())
    return line if len(line) <= EXCERPT else line[:EXCERPT] + "…"
