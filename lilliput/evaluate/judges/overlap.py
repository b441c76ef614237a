"""Overlap of an answer with a reference: token F1 and ROUGE-L."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import regex
from rapidfuzz.distance import LCSseq

from lilliput.evaluate.answer_text import UNSPACED

# In scripts without spaces between words, every character is a token, as in multilingual versions of SQuAD.
_TOKEN = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+", regex.V1)
_JOINING = regex.compile(r"(?<=\w)['’.,](?=\w)")  # SQuAD removes punctuation: "U.S." and "1,200" are one token
_ARTICLES = frozenset({"a", "an", "the"})


def token_f1(answer: str, reference: str) -> float:
    """Returns the F1 of the tokens that both have in common, as in SQuAD (Rajpurkar et al., arXiv 1606.05250).

    Case, punctuation and English articles do not count. Without tokens in one of them, 1 if both have none.
    """
    given, expected = (
        Counter(token for token in _tokens(text) if token not in _ARTICLES) for text in (answer, reference)
    )
    return _f1((given & expected).total(), given.total(), expected.total())


def rouge_l(answer: str, reference: str) -> float:
    """Returns ROUGE-L, the F1 of the longest common subsequence of tokens (Lin, 2004), without stemming."""
    given, expected = _tokens(answer), _tokens(reference)
    return _f1(LCSseq.similarity(given, expected), len(given), len(expected))


def _tokens(text: str) -> Sequence[str]:
    return _TOKEN.findall(_JOINING.sub("", text.casefold()))


def _f1(common: int, given: int, expected: int) -> float:
    return 2 * common / (given + expected) if given and expected else float(given == expected)
