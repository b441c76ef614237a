"""Runs a compiled model for evaluation: with the runtime of its target, in separate processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilliput.devices.runs import DeviceJob, DeviceOutcome, run_on_device
from lilliput.runtime.protocol import Ids

_START_S = 120.0
_SLOWEST_TOKEN_S = 0.5


class CompiledRuntime:
    """The AnsweringRuntime protocol for a compiled model. Each call runs in a new process, because a runtime may crash.

    Args:
        target: the compile target (a module of lilliput/compile).
        folder: folder of the compiled model.
        threads: CPU threads.
    """

    def __init__(self, target: str, folder: Path, threads: int) -> None:
        self._target, self._folder, self._threads = target, folder, threads
        self.cpu_s, self.peak_rss_bytes = 0.0, 0

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens.

        Raises:
            ArtifactError: the runtime does not open the model, crashes or hangs.
        """
        pairs = [(list(prompt), [list(ids) for ids in row]) for prompt, row in zip(prompts, continuations, strict=True)]
        longest = max((len(prompt) + len(ids) for prompt, row in pairs for ids in row), default=0)
        tokens = sum(len(prompt) + sum(map(len, row)) for prompt, row in pairs)
        return self._run(longest, tokens, score=pairs).scores

    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Returns greedy answers of at most `max_tokens` tokens, without the end token.

        Raises:
            ArtifactError: the runtime does not open the model, crashes or hangs.
        """
        longest = max(map(len, prompts), default=0) + max_tokens
        tokens = sum(map(len, prompts)) + len(prompts) * max_tokens
        return self._run(longest, tokens, answer=[list(prompt) for prompt in prompts], max_tokens=max_tokens).generated

    def write_logits(self, prompts: Sequence[Ids], continuations: Sequence[Ids], file: Path) -> None:
        """Writes the logits that predict the continuations to `file`, see `DeviceJob.logits_file`.

        Raises:
            ArtifactError: the runtime does not open the model, crashes or hangs.
        """
        pairs = [(list(prompt), list(ids)) for prompt, ids in zip(prompts, continuations, strict=True)]
        lengths = [len(prompt) + len(ids) for prompt, ids in pairs]
        self._run(max(lengths), sum(lengths), logits=pairs, logits_file=str(file))

    def _run(self, context_tokens: int, tokens: int, **work: Any) -> DeviceOutcome:
        job = DeviceJob(self._target, str(self._folder), self._threads, context_tokens + 8, **work)
        outcome = run_on_device(job, memory_bytes=None, deadline_s=_START_S + _SLOWEST_TOKEN_S * tokens)
        self.cpu_s += outcome.cpu_s
        self.peak_rss_bytes = max(self.peak_rss_bytes, outcome.peak_rss_bytes)
        return outcome
