"""What stands behind the gateway: the device's model and the edge server, both reached by OpenAI's chat API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from typing import Any

import httpx

from lilliput.chat.control_tokens import ControlTokens
from lilliput.llama_server.completions import Chunks, as_chunks_of, as_completion
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.transport import Wire

COUNT_TIMEOUT_S = 5.0
MOST_BYTES = 4 * 2**20  # of an answer; an end that sends more is out of order
# Unreachable, an error status, too slow, no JSON, or JSON that is no chat completion.
_FAILURES = (
    httpx.HTTPError,
    TimeoutError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,  # a count of 1e999 tokens
    RecursionError,  # a thousand brackets
)
_AT_FAULT = (400, 413, 422)


class EndFailed(Exception):
    """An end gave no usable answer; the message says what was the matter."""


class EndDown(EndFailed):
    """The process of an end is not running."""


class EndRefused(Exception):
    """An end understood the request and will not serve it: the one who asked has to change it."""


class End:
    """An OpenAI-compatible server.

    Args:
        url: of it, without `/v1`.
        timeout_s: after which an answer is given up. A stream that has begun has as long again for the rest: its client
            can no longer be given another answer.
        model: as the server calls it, where it serves several.
        key: that it asks for.
        breaker: leaves a failing end alone for a while; None to try each time.
        transport: how it is reached; HTTP if None.
        clock: of the CPU-seconds that its process has used; None where that is not known.
        running: whether its process is there; always, where that is not known.
        control_tokens: of its model, which are split in what users write; None where they are not known.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        *,
        model: str | None = None,
        key: str | None = None,
        breaker: Breaker | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float | None] | None = None,
        running: Callable[[], bool] = lambda: True,
        control_tokens: ControlTokens | None = None,
    ) -> None:
        self.model, self.breaker, self.clock = model, breaker, clock
        self._running, self.control_tokens = running, control_tokens
        self.timeout_s = timeout_s
        self._chat, self._count, self._health = (
            httpx.URL(url.rstrip("/") + path)
            for path in ("/v1/chat/completions", "/v1/chat/completions/input_tokens", "/health")
        )
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # Without httpx's client: redirects, cookies and joined addresses, which no end needs, are a fifth of the time.
        self._transport = transport or Wire()

    async def close(self) -> None:
        """Lets go of its connections."""
        await self._transport.aclose()

    async def healthy(self) -> bool:
        """Whether it answers at all."""
        try:
            async with self._asked("GET", self._health, 5.0) as response:
                return response.status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def up(self) -> bool:
        """Whether it is not left alone at present."""
        return self.breaker is None or self.breaker.closed

    async def ask(self, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The chat completion to `request`.

        Args:
            request: as OpenAI's API has it.
            timeout_s: what is left of the end's own, if some of it has been spent on waiting.

        Raises:
            EndDown: its process is not running.
            EndFailed: it is down, slow or lying.
            EndRefused: the request is at fault.
        """
        with self._judged():
            async with asyncio.timeout(self.timeout_s if timeout_s is None else timeout_s):
                async with self._post(dict(request) | {"stream": False}) as response:
                    return as_completion(json.loads(await _read(response)))

    async def stream(self, request: Mapping[str, Any], timeout_s: float | None = None) -> Chunks:
        """The chunks of the answer to `request`, as they come, the last with its usage; closing it ends the request.

        Args:
            request: as OpenAI's API has it.
            timeout_s: until the first chunk: what is left of the end's own, if some of it has been spent on waiting.

        Raises:
            EndFailed: it is down, slow or lying; perhaps in the midst of an answer.
            EndRefused: the request is at fault.
        """
        told: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        # A task of its own: who reads the answer may change on the way, and a deadline belongs to one task.
        streamed = dict(request) | {"stream": True, "stream_options": {"include_usage": True}}
        pump = asyncio.create_task(self._pump(streamed, told, self.timeout_s if timeout_s is None else timeout_s))
        try:
            while (chunk := await told.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(
        self, request: Mapping[str, Any], told: asyncio.Queue[dict[str, Any] | Exception | None], timeout_s: float
    ) -> None:
        begun = False
        try:
            with self._judged():
                async with (
                    asyncio.timeout(timeout_s) as deadline,
                    self._post(request) as response,
                    aclosing(as_chunks_of(_chunks(response))) as chunks,
                ):
                    async for chunk in chunks:
                        if not begun:
                            begun = True
                            deadline.reschedule(asyncio.get_running_loop().time() + self.timeout_s)
                        told.put_nowait(chunk)
            told.put_nowait(None)
        except (EndFailed, EndRefused) as error:
            told.put_nowait(error)

    async def count_prompt(self, request: Mapping[str, Any]) -> int | None:
        """Tokens of the prompt of `request`, as llama.cpp's server counts them; None if it does not say."""
        try:
            content = json.dumps({"messages": request["messages"]})
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                async with self._asked("POST", self._count, COUNT_TIMEOUT_S, content) as response:
                    return int(json.loads(await _read(response))["input_tokens"])
        except _FAILURES:
            return None

    def _post(self, request: Mapping[str, Any]) -> AbstractAsyncContextManager[httpx.Response]:
        return self._asked("POST", self._chat, self.timeout_s, json.dumps(dict(request)))

    @asynccontextmanager
    async def _asked(
        self, method: str, url: httpx.URL, timeout_s: float, content: str | None = None
    ) -> AsyncIterator[httpx.Response]:
        limits = {"timeout": httpx.Timeout(timeout_s).as_dict()}
        request = httpx.Request(method, url, headers=self._headers, content=content, extensions=limits)
        response = await self._transport.handle_async_request(request)
        response.request = request
        try:
            yield response
        finally:
            await response.aclose()

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Lets a request pass if the breaker does, and tells it how that went."""
        breaker = self.breaker
        if not self._running():
            raise EndDown("is not running")
        if breaker is not None and not breaker.admits():
            raise EndFailed("was down")
        try:
            yield
        except _FAILURES as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _AT_FAULT:
                raise EndRefused(str(error)) from None
            if breaker is not None:
                breaker.failed()
            raise EndFailed(f"failed ({type(error).__name__})") from None
        if breaker is not None:
            breaker.succeeded()


async def _chunks(response: httpx.Response) -> Chunks:
    """The chunks of a stream of server-sent events, until the one that ends it."""
    if response.is_error:
        await _read(response)
    received, chunk = 0, None
    async for line in response.aiter_lines():
        received += len(line)
        if received > MOST_BYTES:
            raise ValueError("it does not end")
        if not line.startswith("data:"):
            continue
        told = line.removeprefix("data:").strip()
        if told == "[DONE]" and chunk is not None:
            return
        chunk = json.loads(told)
        yield chunk
    raise ValueError("the stream broke off")


async def _read(response: httpx.Response) -> bytes:
    """The whole body, if it is not too long.

    Raises:
        httpx.HTTPStatusError: its status is an error; the message in the body comes with it.
        ValueError: it is too long.
    """
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MOST_BYTES:
            raise ValueError("it does not end")
    if response.is_error:
        raise httpx.HTTPStatusError(_message(bytes(body)), request=response.request, response=response)
    return bytes(body)


def _message(body: bytes) -> str:
    """What an end says of an error."""
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return "refused without a reason"
