"""The Runtime protocol for llama.cpp, in this process, through xllamacpp.

Prompts are answered by its server, as a device does. Many prompts together, untimed, go through `llama_batches`.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xllamacpp

from lilliput.errors import ArtifactError
from lilliput.runtime.loopback import require_key
from lilliput.runtime.protocol import Ids, Receive

if TYPE_CHECKING:
    from lilliput.runtime.llama_library import LlamaModel

_engine: Any = xllamacpp  # a compiled module without types
_FORCING_BIAS = 1e5  # in logits, far above any other token; reported probabilities do not include it


class LlamaCppRuntime:
    """A GGUF file opened by llama.cpp; `stream` reuses the prefix shared with the last prompt.

    Args:
        file: the GGUF file.
        threads: CPU threads for prompts and answers.
        context_tokens: maximum tokens of prompt and answer together.

    Raises:
        ArtifactError: llama.cpp cannot open the file.
    """

    name = "llama.cpp"

    def __init__(self, file: Path, threads: int, context_tokens: int) -> None:
        params = _engine.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context_tokens, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity, params.cache_ram_mib, params.use_jinja = False, 0, 0, True
        self._threads, self._file, self._key = threads, file, secrets.token_urlsafe(32)
        require_key(params, self._key)
        try:
            self._server = _engine.Server(params)
        except Exception as error:  # its own class, which cannot be imported
            raise ArtifactError(f"{file}: llama.cpp does not open it: {error}; compile this candidate again") from None

    def stats(self) -> dict[str, str]:
        """Returns engine and threads."""
        return {"engine": f"xllamacpp {xllamacpp.__version__}", "threads": str(self._threads)}

    def predictions(self, ids: Ids, start: int) -> Iterator[tuple[float, int]]:
        """Yields (log-likelihood given the tokens before, likeliest token) for each token of `ids` from `start` on.

        The server does not return probabilities of a prompt. Therefore a bias forces it to answer with the next token
        of `ids`, and it returns that token's probability without the bias. The tokens before are in its cache.
        """
        for place in range(start, len(ids)):
            answer = self._complete(ids[:place], n_predict=1, n_probs=1, logit_bias=[[ids[place], _FORCING_BIAS]])
            token = answer["choices"][0]["logprobs"]["content"][0]
            if token["id"] != ids[place]:
                raise ArtifactError(
                    f"{self._file}: llama.cpp answered token {token['id']} although {ids[place]} was forced"
                )
            yield float(token["logprob"]), int(token["top_logprobs"][0]["id"])

    def chat_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Returns the prompt of `messages` as llama.cpp's server encodes it, with the file's own chat template."""
        request = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        text = self._post("/apply-template", request)["prompt"]
        return list(self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def text_ids(self, text: str) -> list[int]:
        """Returns the ids of `text` under the file's own tokenizer, without the special tokens that it may add."""
        request = {"content": text, "add_special": False, "parse_special": True}
        return list(self._post("/tokenize", request)["tokens"])

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
        from lilliput.runtime import llama_batches

        with self._opened_for_batches() as model:
            return llama_batches.score(model, prompts, continuations, self._threads)

    def logits(self, prompts: Sequence[Ids], continuations: Sequence[Ids], receive: Receive) -> None:
        """Calls `receive` once for each prompt, in any order, with the logits that predict its continuation."""
        from lilliput.runtime import llama_batches

        with self._opened_for_batches() as model:
            llama_batches.logits(model, prompts, continuations, self._threads, receive)

    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Returns greedy answers of at most `max_tokens` tokens, without the end token."""
        from lilliput.runtime import llama_batches

        with self._opened_for_batches() as model:
            return llama_batches.generate(model, prompts, max_tokens, self._threads)

    @contextmanager
    def _opened_for_batches(self) -> Iterator[LlamaModel]:
        """Opens the file once more; both read the same pages of it."""
        from lilliput.runtime.llama_library import LlamaModel  # not needed on a device, whose memory is measured

        model = LlamaModel(self._file)
        try:
            yield model
        finally:
            model.close()

    def stream(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Yields the greedy tokens of one answer as they are generated, including the end token."""
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def answer() -> None:
            try:
                self._server.handle_completions(
                    _request(prompt, n_predict=max_tokens, n_probs=1, stream=True), chunks.put
                )
            except Exception as error:
                chunks.put(error)
            chunks.put(None)

        worker = threading.Thread(target=answer, daemon=True)
        worker.start()
        while (chunk := chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise ArtifactError(f"{self._file}: llama.cpp: {chunk}")
            yield from _tokens(chunk)
        worker.join()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        import httpx  # imported here, because a device does not need it and its memory would count

        bearer = {"Authorization": f"Bearer {self._key}"}
        address = f"{self._server.listening_address}{path}"
        answer = httpx.post(address, headers=bearer, json=body, timeout=60.0, trust_env=False)
        if answer.is_error:
            raise ArtifactError(f"{self._file}: llama.cpp: {path}: {answer.text[:300]}")
        return answer.json()

    def _complete(self, prompt: Ids, **settings: Any) -> dict[str, Any]:
        answer = self._server.handle_completions(_request(prompt, **settings))
        if "choices" not in answer:
            raise ArtifactError(f"{self._file}: llama.cpp: {answer}")
        return answer


def _request(prompt: Ids, **settings: Any) -> dict[str, Any]:
    return {"prompt": list(prompt), "temperature": 0.0, "cache_prompt": True, **settings}


def _tokens(chunk: dict[str, Any]) -> Iterator[int]:
    for choice in chunk.get("choices", []):
        for token in (choice.get("logprobs") or {}).get("content") or []:
            yield int(token["id"])
