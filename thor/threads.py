"""Waiting for a server in a thread, beside the event loop: `await in_thread(ask, url)`.

Python joins the threads of an executor when it exits, so a run that was interrupted, or that failed, would stand still
until the last server had answered. Invariant: nobody waits for one of these threads but who awaits its result.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(function: Callable[..., Result], *arguments: object) -> Result:
    """What `function(*arguments)` returns or raises, in a thread of its own."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # so that it takes its result even if nobody awaits that any more

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
