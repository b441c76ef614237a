"""The words that distinguish similar questions: names, numbers, signs, negations and comparisons."""

from __future__ import annotations

import re
import unicodedata

# Words (also with hyphens and apostrophes), numbers, the dot of .NET and .5, and every other character except plain
# punctuation. Each of them may change the meaning: $5 and €5, 5² and 5, C# and C.
_TOKENS = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_][\w'’-]*|(?<!\w)\.(?=\w)|(?<=\d)['\"]|[^\s.,;:?'’‘\"“”„«»]")
# Capitalized first words of a question that are not names.
_OPENER = re.compile(
    r"an?|about|after|and|are|as|at|before|by|can|could|describe|did|do|does|during|explain|find|for|from|give|had|has|"
    r"have|how|if|in|is|its?|let's|list|may|name|of|on|please|say|should|show|tell|that|the|their|there|these|this|"
    r"those|to|under|was|were|wh(?:at|o)(?:['’]s)?|when|where|which|whom|whose|why|will|with|would",
    re.IGNORECASE,
)
_COUNT_OR_NEGATION = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|thousand|million|billion|half|twice|"
    r"first|second|third|fourth|fifth|last|not?|nor|never|none|neither|without|except|hardly|barely|cannot|\w+n['’]t|"
    r"(?:is|was|are|were|do|does|did|ca|could|wo|would|should|has|have|had|must|ai)nt|"
    r"nicht|kein\w*|nie|niemals|ohne|ne|n['’]\w+|pas|jamais|sans|non|sin|ni|nunca|jamás|não|sem|nem|mai|senza|niet|geen|"
    r"nooit|ikke|inte|ej|aldrig|bez|není|не|ни|нет|без|δεν|δε|χωρίς|değil|yok|bukan|tidak|không|ei|eivät"
)
# A lower-case name, recognized by its position: "of peru", "peru, South America".
_LOWER_CASE_NAME = re.compile(
    r"\b(?:of|in|from|near|for|between|than) ([^\W\d_][\w'’-]*)|([^\W\d_][\w'’-]*), ?(?=[A-Z])"
)
# Superlatives, bounds and comparatives: "smallest", "before 1990", "larger than".
_COMPARISON = re.compile(r"\b(\w{2,}est|before|after|since|until|few|fewer|more|less|most|least|\w+(?= than\b))\b")


def distinguishing_words(question: str) -> str:
    """The names, numbers, signs and negations in `question`, in order. Equal questions have equal distinguishing words.

    A name is a word with a capital letter, except a common first word of a question. If there are such words, a
    lower-case word in a name's position ("of peru") counts too, and so does a comparison ("before", "smallest"). Order
    matters: it alone separates "Is Paris north of London" from "Is London north of Paris".
    """
    wording = normalize_wording(question)
    opener, tokens = [], _TOKENS.findall(wording)
    if tokens and _OPENER.fullmatch(tokens[0]) and not (len(tokens[0]) > 1 and tokens[0].isupper()):
        opener, tokens = [word for word in tokens[:1] if _COMPARISON.fullmatch(word.lower())], tokens[1:]
    if not any(map(_distinguishes, tokens)):
        return ""
    lower_case = {name for pair in _LOWER_CASE_NAME.findall(wording) for name in pair if not _OPENER.fullmatch(name)}
    lower_case |= {*_COMPARISON.findall(wording)}
    kept = opener + [token for token in tokens if token in lower_case or _distinguishes(token)]
    return " ".join(re.sub(r"['’]s?$", "", token) for token in kept)


def normalize_wording(question: str) -> str:
    """The wording without extra spaces and final marks. Keeps the case: CO and Co are different."""
    return " ".join(unicodedata.normalize("NFC", question).split()).rstrip(" ?.")


def _distinguishes(token: str) -> bool:
    # `lower_case` is False for signs, and for all words of scripts without case, which thus count as names.
    lower_case = token.islower() and not any(character.isdigit() for character in token)
    return not lower_case or _COUNT_OR_NEGATION.fullmatch(token) is not None
