"""Adapts a Runtime to the model interface of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import end_id
from lilliput.errors import DataError
from lilliput.runtime.protocol import AnsweringRuntime

MAX_ANSWER_TOKENS = 256


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests with `runtime`; a prompt is computed once for all its options."""

    def __init__(self, runtime: AnsweringRuntime, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._runtime, self._tokenizer = runtime, tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token for an empty context: BOS if the tokenizer adds it, otherwise the end of a turn."""
        added = cast("list[int]", self._tokenizer("")["input_ids"])
        return added[0] if added else end_id(self._tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns token ids, by default with the tokenizer's own special tokens, as the harness does."""
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return cast("list[int]", self._tokenizer(string, **options)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns summed log-likelihoods; the second value (is greedy) is not used by supported tasks."""
        prompts: list[list[int]] = []
        options: list[list[list[int]]] = []
        for prompt, group in groupby(requests, key=lambda request: request[1]):
            prompts.append(prompt)
            options.append([continuation for _, _, continuation in group])
        return [(score, False) for row in self._runtime.score(prompts, options) for score in row]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, each cut before its task's first stop text.

        Raises:
            DataError: the task asks for sampling.
        """
        answers = [""] * len(requests)
        prompted = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        settings = [setting for _, setting in prompted]
        if any(setting.get("do_sample") and setting.get("temperature", 1.0) > 0.0 for setting in settings):
            raise DataError("evaluation.benchmarks: a task that samples its answers is not supported; choose another")
        limits = [int(setting.get("max_gen_toks", MAX_ANSWER_TOKENS)) for setting in settings]
        for limit in sorted(set(limits)):
            rows = [row for row, of_row in enumerate(limits) if of_row == limit]
            prompts = [self.tok_encode(prompted[row][0]) for row in rows]
            for row, text in zip(rows, self._runtime.generate(prompts, limit), strict=True):
                answers[row] = _cut(text, settings[row].get("until") or ())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not supported: `load_task` rejects such tasks."""
        raise DataError("evaluation.benchmarks: perplexity tasks are not supported; choose multiple choice or answers")


def _cut(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
