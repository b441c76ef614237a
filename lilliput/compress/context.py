"""The inputs of a strategy besides its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lilliput.data.conversations import Conversation
from lilliput.data.corpus import Corpus
from lilliput.data.rows import Row, has_answer
from lilliput.training.examples import ALL_TURNS, Example, TurnRules, encode_examples

_HELD_OUT_QUESTIONS = 32


@dataclass(frozen=True)
class Context:
    """Everything a strategy may read; nothing is opened before the strategy uses it.

    Attributes:
        parent: folder of the parent's checkpoint; for `load`, of the fetched source.
        system_prompt: the system message before each row that has none.
        open_corpus: reads the corpus; strategies use `corpus`.
        teacher: folder of the teacher's checkpoint; None for a candidate without a teacher.
        gguf_file: name of the GGUF file in the source's folder; None for a source in safetensors.
        chose_template: whether params.yaml chose the chat template in the source's folder (source.chat_template).
        checkpoints: folder from which a killed training resumes (see `train`); None for no checkpoints.
        teacher_logits: folder for the logits of teachers; required by `distill` with `teacher_logits: stored`.
        turn_rules: the turns of conversations that are learnt.
    """

    parent: Path
    system_prompt: str
    open_corpus: Callable[[], Corpus]
    teacher: Path | None = None
    gguf_file: str | None = None
    chose_template: bool = False
    checkpoints: Path | None = None
    teacher_logits: Path | None = None
    turn_rules: TurnRules = ALL_TURNS

    @cached_property
    def corpus(self) -> Corpus:
        """The training text, the calibration set and the question set."""
        return self.open_corpus()

    @property
    def has_functions(self) -> bool:
        """Whether conversations of the calibration set have functions that may be called."""
        return any(isinstance(row, Conversation) and row.tools for row in self.corpus.calibration)

    @property
    def held_out(self) -> list[Row]:
        """Answerable rows of the question set that have an answer, for perplexity before and after quantisation."""
        answered = (row for row in self.corpus.questions if row.answerable and has_answer(row))
        return list(islice(answered, _HELD_OUT_QUESTIONS))

    def calibration(self, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Example]:
        """Returns the first `count` calibration rows with their answers as token ids."""
        return encode_examples(tokenizer, self.system_prompt, self.corpus.calibration[:count], self.turn_rules)

    def for_training(self, name: str, rows: Sequence[Row]) -> Context:
        """Returns a copy for one of several trainings.

        Args:
            name: the subfolder of `checkpoints` that the training uses.
            rows: its training rows.
        """
        return replace(
            self,
            open_corpus=lambda: replace(self.corpus, train=rows),
            checkpoints=self.checkpoints and self.checkpoints / name,
        )
