"""The words by which two questions differ: names, numbers, signs, denials and comparisons."""

from __future__ import annotations

import re
import unicodedata

# Words (with what they join by hyphen or apostrophe), numbers, the dot of .NET and .5, and every other character but
# plain punctuation: any of them may change what is asked ($5 and €5, 5² and 5, C# and C).
_TOKENS = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_][\w'’-]*|(?<!\w)\.(?=\w)|(?<=\d)['\"]|[^\s.,;:?'’‘\"“”„«»]")
# What may open a question with a capital and is no name.
_OPENER = re.compile(
    r"an?|about|after|and|are|as|at|before|by|can|could|describe|did|do|does|during|explain|find|for|from|give|had|has|"
    r"have|how|if|in|is|its?|let's|list|may|name|of|on|please|say|should|show|tell|that|the|their|there|these|this|"
    r"those|to|under|was|were|wh(?:at|o)(?:['’]s)?|when|where|which|whom|whose|why|will|with|would",
    re.IGNORECASE,
)
_COUNT_OR_DENIAL = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|hundred|thousand|million|billion|half|twice|"
    r"first|second|third|fourth|fifth|last|not?|nor|never|none|neither|without|except|hardly|barely|cannot|\w+n['’]t|"
    r"(?:is|was|are|were|do|does|did|ca|could|wo|would|should|has|have|had|must|ai)nt|"
    r"nicht|kein\w*|nie|niemals|ohne|ne|n['’]\w+|pas|jamais|sans|non|sin|ni|nunca|jamás|não|sem|nem|mai|senza|niet|geen|"
    r"nooit|ikke|inte|ej|aldrig|bez|není|не|ни|нет|без|δεν|δε|χωρίς|değil|yok|bukan|tidak|không|ei|eivät"
)
# A name in small letters, by its place: "of peru", "peru, South America".
_SMALL_NAME = re.compile(r"\b(?:of|in|from|near|for|between|than) ([^\W\d_][\w'’-]*)|([^\W\d_][\w'’-]*), ?(?=[A-Z])")
# What orders, bounds or compares: "smallest", "before 1990", "larger than".
_COMPARISON = re.compile(r"\b(\w{2,}est|before|after|since|until|few|fewer|more|less|most|least|\w+(?= than\b))\b")


def names_in(question: str) -> str:
    """The names, numbers, signs and denials in `question`, in their order: what two questions must have in common.

    A name is a word that is not all in small letters, unless it merely opens the question. Beside such names, a word in
    small letters counts where a name is expected ("of peru"), and so does a comparison ("before", "smallest"). Order
    counts: "Is Paris north of London" and "Is London north of Paris" share everything else.
    """
    wording = plain(question)
    opener, tokens = [], _TOKENS.findall(wording)
    if tokens and _OPENER.fullmatch(tokens[0]) and not (len(tokens[0]) > 1 and tokens[0].isupper()):
        opener, tokens = [word for word in tokens[:1] if _COMPARISON.fullmatch(word.lower())], tokens[1:]
    if not any(map(_tells_apart, tokens)):
        return ""
    small = {name for pair in _SMALL_NAME.findall(wording) for name in pair if not _OPENER.fullmatch(name)}
    small |= {*_COMPARISON.findall(wording)}
    kept = opener + [token for token in tokens if token in small or _tells_apart(token)]
    return " ".join(re.sub(r"['’]s?$", "", token) for token in kept)


def plain(question: str) -> str:
    """The wording that counts: case stays, for the symbols CO and Co are two."""
    return " ".join(unicodedata.normalize("NFC", question).split()).rstrip(" ?.")


def _tells_apart(token: str) -> bool:
    # False of signs, and of scripts without case, whose words are then all taken for names.
    small = token.islower() and not any(character.isdigit() for character in token)
    return not small or _COUNT_OR_DENIAL.fullmatch(token) is not None
