"""The reference runtime: PyTorch, in batches; the prefix shared by all prompts is computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import end_ids, pad_id, shared_prefix_length
from lilliput.decoders import attention_reach, vocabulary_logits
from lilliput.errors import ArtifactError
from lilliput.memory import Shape, answering_bytes, scoring_bytes
from lilliput.resident import free_bytes
from lilliput.runtime.experts import ONE_BY_ONE
from lilliput.runtime.packed import Pack, group_into_packs, shared_length
from lilliput.runtime.protocol import Ids, Receive, ScoresByPrediction

PACKED_TOKENS = 6  # per prompt of a batch


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Sets torch's number of CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Prefilled:
    """Prompts that were run: their KV cache, mask (rows, width) and last logits (rows, vocabulary)."""

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


class TorchRuntime(ScoresByPrediction):
    """The Runtime protocol for a PyTorch model; prompts are sorted by length and answered in batches of `batch_size`.

    A batch that exceeds free memory, by estimate or in fact, is halved. The results are equal except for rounding.
    Packing and padding ignore windows and states, so texts that a layer does not see whole run one by one.

    Args:
        model: a causal language model that computes in float32; set to evaluation mode.
        tokenizer: its tokenizer.
        batch_size: maximum number of prompts per batch.
        prefix: the usual beginning of prompts; run once, its keys and values are reused by every `stream`.
    """

    name = "torch"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, prefix: Ids = ()
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.device = next(model.parameters()).device
        model.set_experts_implementation(ONE_BY_ONE)  # affects mixtures of experts only
        self._shape = Shape.of(model.config.to_dict())
        self._prefix, self._prefix_cache = list(prefix), self._run(prefix)

    def stats(self) -> dict[str, str]:
        """Returns engine, dtype and threads."""
        return {"engine": f"torch {torch.__version__}", "dtype": "float32", "threads": str(torch.get_num_threads())}

    @torch.inference_mode()
    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens.

        Raises:
            ArtifactError: a logit is NaN or infinite.
        """
        pairs = zip(prompts, continuations, strict=True)
        if not self._sees_whole(max((len(prompt) + len(ids) for prompt, row in pairs for ids in row), default=0)):
            return super().score(prompts, continuations)
        scores: list[list[float]] = [[] for _ in prompts]

        def score_rows(rows: list[int], pack: Pack, logits: torch.Tensor, index: torch.Tensor) -> None:
            values = iter(_pack_scores(pack, logits, index).tolist())
            for row in rows:
                scores[row] = [next(values) for _ in continuations[row]]

        self._run_packs(prompts, continuations, score_rows)
        return scores

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Ids], continuations: Sequence[Ids], receive: Receive) -> None:
        """Calls `receive` once for each prompt, in any order, with the logits that predict its continuation.

        Raises:
            ArtifactError: a logit is NaN or infinite.
        """
        pairs = list(zip(prompts, continuations, strict=True))
        if not self._sees_whole(max((len(prompt) + len(ids) for prompt, ids in pairs), default=0)):
            for row, (prompt, ids) in enumerate(pairs):
                receive(row, self._logits([*prompt, *ids], len(prompt)).cpu().numpy())
            return

        def give(rows: list[int], pack: Pack, logits: torch.Tensor, index: torch.Tensor) -> None:
            for row, places in zip(rows, index.split([len(continuations[row]) for row in rows]), strict=True):
                receive(row, logits[places].cpu().numpy())

        self._run_packs(prompts, [[ids] for ids in continuations], give)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Returns greedy answers of at most `max_tokens` tokens, without the end token."""
        if not self._sees_whole(max(map(len, prompts), default=0) + max_tokens):
            ends = self._end_ids()
            answers = [[token for token in self.stream(prompt, max_tokens) if token not in ends] for prompt in prompts]
            return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
        texts = [""] * len(prompts)
        shared = shared_length(prompts)
        prefix = self._run(prompts[0][:shared] if shared else ())

        def answer_rows(rows: list[int]) -> None:
            prefilled = self._prefill_batch([prompts[row][shared:] for row in rows], prefix, shared)
            for row, tokens in zip(rows, self._decode(prefilled, max_tokens), strict=True):
                texts[row] = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

        def needed_bytes(rows: list[int], shape: Shape) -> int:
            longest = max(len(prompts[row]) for row in rows)
            return answering_bytes(shape, len(rows), longest + max_tokens, longest - shared)

        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        self._run_parts(batches, needed_bytes, answer_rows, "answer")
        return texts

    def stream(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Yields the greedy tokens of one answer as they are generated, including the end token.

        Raises:
            ArtifactError: a logit is NaN or infinite.
        """
        cache, cached = self._cached_prefix(prompt)
        ids, ends = torch.tensor([list(prompt[cached:])], device=self.device), self._end_ids()
        for _ in range(max_tokens):
            with torch.inference_mode():
                logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                ids = self._checked(logits).argmax(-1, keepdim=True)
            token = int(ids)
            yield token
            if token in ends:
                return

    @torch.inference_mode()
    def predictions(self, ids: Ids, start: int) -> list[tuple[float, int]]:
        """Returns (log-likelihood given the tokens before, likeliest token) for each token of `ids` from `start` on."""
        likelihoods = self._logits(ids, start).log_softmax(-1)
        chosen = likelihoods.gather(-1, torch.tensor(ids[start:], device=self.device)[:, None])[:, 0]
        return list(zip(chosen.tolist(), likelihoods.argmax(-1).tolist(), strict=True))

    def _logits(self, ids: Ids, start: int) -> torch.Tensor:
        """Returns the logits that predict the tokens of `ids` from `start` on, float32 of (tokens, vocabulary)."""
        return self._checked(
            self.model(input_ids=torch.tensor([list(ids[:-1])], device=self.device)).logits[0, start - 1 :]
        )

    @torch.inference_mode()
    def _cached_prefix(self, prompt: Ids) -> tuple[DynamicCache, int]:
        """Returns a cache of the stored prefix as far as `prompt` shares it, without its last token, and the length."""
        length = shared_prefix_length([self._prefix, prompt[:-1]])
        if not length or not self._sees_whole(len(self._prefix)):  # a full window cannot be cropped
            return DynamicCache(config=self.model.config), 0
        cache = copy.deepcopy(self._prefix_cache)
        cache.crop(length - len(self._prefix))
        return cache, length

    @torch.inference_mode()
    def _run(self, ids: Ids) -> DynamicCache:
        """Returns the keys and values of `ids`."""
        cache = DynamicCache(config=self.model.config)
        if ids:
            batch = torch.tensor([list(ids)], device=self.device)
            self.model(input_ids=batch, past_key_values=cache, logits_to_keep=1)
        return cache

    def _run_packs(
        self,
        prompts: Sequence[Ids],
        continuations: Sequence[Sequence[Ids]],
        receive: Callable[[list[int], Pack, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Calls `receive` for each pack: with numbers of prompts, the pack, and what `_pack_logits` returns for it."""
        shared = shared_length(prompts)
        prefix = self._run(prompts[0][:shared] if shared else ())

        def run(rows: list[int]) -> None:
            pack = Pack.of(rows, prompts, continuations, shared)
            receive(rows, pack, *self._pack_logits(pack, prefix))

        def needed_bytes(rows: list[int], shape: Shape) -> int:
            pack = Pack.of(rows, prompts, continuations, shared)
            return scoring_bytes(shape, shared, len(pack.ids), len(pack.targets))

        parts = group_into_packs(prompts, continuations, shared, PACKED_TOKENS * self.batch_size)
        self._run_parts(parts, needed_bytes, run, "score")

    def _run_parts(
        self,
        parts: Sequence[list[int]],
        needed_bytes: Callable[[list[int], Shape], int],
        run: Callable[[list[int]], None],
        label: str,
    ) -> None:
        """Calls `run` with each of `parts` (numbers of prompts); halves parts that do not fit into memory."""
        waiting = list(parts)
        with tqdm(total=sum(map(len, parts)), desc=label, unit="prompt", delay=1.0) as bar:
            while waiting:
                rows = waiting.pop(0)
                # Without a known shape there is no estimate; then only torch's own error counts.
                exceeds_memory = self._shape and needed_bytes(rows, self._shape) > free_bytes(self.device)
                if len(rows) > 1 and exceeds_memory:
                    waiting[:0] = _halves(rows)
                    continue
                try:
                    run(rows)
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    waiting[:0] = _halves(rows)
                    torch.cuda.empty_cache()
                else:
                    bar.update(len(rows))

    def _prefill_batch(self, rests: list[Ids], prefix: DynamicCache, shared: int) -> _Prefilled:
        width = max(len(rest) for rest in rests)
        pad = pad_id(self.tokenizer)
        # Padding is on the left, between prefix and question, so the last column has every row's last logits.
        ids = torch.tensor([[pad] * (width - len(rest)) + list(rest) for rest in rests], device=self.device)
        real = [[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
        mask = torch.tensor(real, device=self.device)
        cache = copy.deepcopy(prefix)
        if shared:
            cache.batch_repeat_interleave(len(rests))
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, shared:],
            past_key_values=cache,
            logits_to_keep=1,
        )
        return _Prefilled(cache, mask, self._checked(output.logits[:, -1]))

    def _pack_logits(self, pack: Pack, prefix: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits, float32 of shape (predicting places, vocabulary), and the row in them of each target."""
        ids, positions, places = (
            torch.tensor(values, device=self.device) for values in (pack.ids, pack.positions, pack.places)
        )
        hidden = self.model.model(
            input_ids=ids[None],
            attention_mask=pack.mask(torch.float32, self.device),
            position_ids=positions[None],
            past_key_values=copy.deepcopy(prefix) if pack.shared else None,
            use_cache=bool(pack.shared),
        ).last_hidden_state[0]
        # The projection to the vocabulary is a fifth of the work, so it runs once for each place that is needed.
        predicting, index = places.unique(return_inverse=True)
        return self._checked(vocabulary_logits(self.model, hidden[predicting])), index

    def _sees_whole(self, tokens: int) -> bool:
        """Whether every layer sees a whole text of `tokens` tokens."""
        return tokens <= attention_reach(self.model.config)

    def _decode(self, prefilled: _Prefilled, max_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(len(prefilled.mask))]
        running = list(range(len(answers)))
        logits, mask = prefilled.logits, prefilled.mask
        for _ in range(max_tokens):
            tokens = logits.argmax(-1)
            ended = self._end_ids()
            active = [place for place, token in enumerate(tokens.tolist()) if token not in ended]
            for place in active:
                answers[running[place]].append(int(tokens[place]))
            if not active or len(answers[running[active[0]]]) == max_tokens:
                break
            keep = torch.tensor(active, device=self.device)
            if len(active) < len(running):  # drops finished answers from the batch
                prefilled.cache.batch_select_indices(keep)
                mask, running = mask[keep], [running[place] for place in active]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = self.model(
                input_ids=tokens[keep, None],
                attention_mask=mask,
                position_ids=_positions(mask)[:, -1:],
                past_key_values=prefilled.cache,
                logits_to_keep=1,
            )
            logits = self._checked(output.logits[:, -1])
        return answers

    def _end_ids(self) -> list[int]:
        return end_ids(self.tokenizer, self.model.generation_config)

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(logits).all():
            raise ArtifactError(
                "the model's logits are NaN or infinite, so it cannot be measured; "
                "lower the learning rate of its training or quantise it less"
            )
        return logits.float()


def _pack_scores(pack: Pack, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the summed log-likelihoods of a pack, float32 of shape (continuations,); see `_pack_logits`."""
    targets, owners = (torch.tensor(values, device=logits.device) for values in (pack.targets, pack.owners))
    likelihoods = logits[index, targets] - logits.logsumexp(-1)[index]
    return likelihoods.new_zeros(pack.continuations).index_add(0, owners, likelihoods)


def _halves(rows: list[int]) -> list[list[int]]:
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
