"""Detects that an assistant declines a request, or asks the user for what is missing, by its English wording."""

from __future__ import annotations

import re

from lilliput.evaluate.abstention import abstained

_ASKS = re.compile(
    r"\b(?:please|could you|can you|would you|kindly) (?:also |first )?"
    r"(?:tell|specify|provide|give|enter|say|name|share|clarify|choose|indicate|state|confirm|let me know)\b"
    r"|\b(?:let me know|tell me) (?:what|which|who|when|where|how|the|your)\b"
    r"|\bi(?:'d| would)? (?:still |also )?need (?:to know|the|an?|your|more|some)\b"
    r"|[?？؟]\W*$",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\b(?:i|we) (?:can ?not|can['’]?t|could(?:n['’]?t| not)|(?:am|are) (?:not able|unable) to)"
    r" \w+|\b(?:i|we) do(?:n['’]t| not) support\b|\bi['’]m (?:not able|unable) to \w+"
    r"|\bi can only (?:help|assist|do|use|answer)\b"
    r"|\b(?:no|none of (?:the|my)|not have an?y?|n['’]t have an?y?) (?:\w+ )?(?:functions?|tools?|way)\b"
    r"|\b(?:is|are)(?: not|n['’]t) (?:possible|supported|something i can)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?？؟。]")
# An offer, or a question that asserts: "Anything else?", "Paris, right?".
_OFFERS = re.compile(
    r"\b(?:else|more help|further help|other questions|right|isn['’]t it|okay|ok)\W*$|\banything\b", re.I
)
# A claim that the request was carried out is no question, whatever follows.
_DONE = (
    r"(?:set|sent|added|created|called|played|started|booked|scheduled|turned|changed|saved|updated|deleted|cancell?ed)"
)
_CLAIMS = re.compile(
    rf"^\W*done\b|\b(?:i|we)(?:['’]ve| have) (?:\w+ly )?{_DONE}\b|\b(?:is|are|has been|have been) (?:now )?{_DONE}\b",
    re.IGNORECASE,
)


def declines_or_asks(text: str) -> bool:
    """Returns whether `text` declines, or asks for something that is missing, and does not claim to have acted.

    An empty text declines. An offer after an answer ("Anything else?") asks for nothing that is missing.
    """
    if _CLAIMS.search(text):
        return False
    if abstained(text) or _REFUSES.search(text):
        return True
    return _ASKS.search(text) is not None and not _OFFERS.search(_last_sentence(text))


def _last_sentence(text: str) -> str:
    """Returns the last sentence that has words; empty if there is none."""
    sentences = reversed(_SENTENCE_END.split(text))
    return next((sentence for sentence in sentences if re.search(r"\w", sentence)), "")
