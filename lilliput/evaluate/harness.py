"""A Runtime as a model of lm-evaluation-harness: its tasks and prompts, our scoring."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import end_id
from lilliput.errors import DataError
from lilliput.runtime.protocol import Runtime

MAX_ANSWER_TOKENS = 256


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model, answered by `runtime`; a prompt is run once for all its options."""

    def __init__(self, runtime: Runtime, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._runtime, self._tokenizer = runtime, tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context: the one that texts begin with (BOS), else the end of a turn."""
        added = cast("list[int]", self._tokenizer("")["input_ids"])
        return added[0] if added else end_id(self._tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, by default with the special tokens that the tokenizer adds by itself, as the harness does."""
        chosen: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return cast("list[int]", self._tokenizer(string, **chosen)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihoods. Whether a text is the greedy one is never asked by the kinds of task let in."""
        prompts: list[list[int]] = []
        options: list[list[list[int]]] = []
        for prompt, group in groupby(requests, key=lambda request: request[1]):
            prompts.append(prompt)
            options.append([continuation for _, _, continuation in group])
        return [(score, False) for row in self._runtime.score(prompts, options) for score in row]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first of its task's stop texts.

        Raises:
            DataError: the task samples.
        """
        answers = [""] * len(requests)
        asked = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        settings = [setting for _, setting in asked]
        if any(setting.get("do_sample") and setting.get("temperature", 1.0) > 0.0 for setting in settings):
            raise DataError("evaluation.benchmarks: a task that samples its answers is not supported; choose another")
        limits = [int(setting.get("max_gen_toks", MAX_ANSWER_TOKENS)) for setting in settings]
        for limit in sorted(set(limits)):
            rows = [row for row, of_row in enumerate(limits) if of_row == limit]
            prompts = [self.tok_encode(asked[row][0]) for row in rows]
            for row, text in zip(rows, self._runtime.generate(prompts, limit), strict=True):
                answers[row] = _cut(text, settings[row].get("until") or ())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered: `require_benchmarks` refuses such tasks before anything runs."""
        raise DataError("evaluation.benchmarks: perplexity tasks are not supported; choose multiple choice or answers")


def _cut(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
