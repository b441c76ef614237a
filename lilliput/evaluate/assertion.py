"""Detects denials and lists of candidates: whether a sentence asserts the thing that it names."""

from __future__ import annotations

from collections.abc import Callable

import regex

_FLAGS = regex.IGNORECASE | regex.V1
_CLAUSE = regex.compile(
    r"[,;:!?()\[\]—。、，；：！？।؟،]|\.(?=\s|$)|\b(?:but|although|though|whereas|while|sondern|sino|mais|aber|بل)\b|而是",
    _FLAGS,
)
# Phrases that only look like a denial, and denials in unusual words.
_REWRITTEN = [
    (r"^[*_\"]*(?:(?:is|was)n'?t it|(?:is|was) it not|why not)\b", " "),  # "Isn't it Paris?" is a guess
    (
        r"\bnot (?:only|just|merely|simply|solely|until|to mention)\b|\bwithout (?:a |any )?(?:doubt|question)\b"
        r"|\bno (?:doubt|question)\b|\bno(?:ne|body|thing)? other than\b|\bnothing but\b",
        " ",
    ),
    (r"\b(?:anything|all|everything) but\b", " never "),
    (r"\b(is|was|are|were|do|does|did|ca|wo|could|would|should|ai)n'?t\b", r"\1 not"),
    (r"\bcannot\b", "can not"),
]
_DENIAL = (
    r"\b(?:not|never|neither|nor|without|except(?: for)?|excluding|unlike|instead of|rather than|other than|apart from|"
    r"far from|no longer|nobody|no one|nowhere|by no means|hardly|"
    r"wrong to|incorrect to|false that|nicht|kein\w*|ikke|inte|niet|geen|pas|"
    r"n'est|n'était|(?:no|non|não) (?:es|era|è|é|fue|foi)|не|δεν|bukan|không|nie|není|ei ole|nem|nu este|"
    r"ليس|ليست|לא|אינה?)\b|\bno (?:such )?$"
)
_DENIAL_UNSPACED = r"不是|不叫|不在|并非|並非|没有|沒有|ไม่|ບໍ່|មិន"
# A denial extends to the next statement, unless it denies a belief: "I don't think it is Paris".
_STATEMENT = r"\b(?:is|was|are|were)\b|'s\b"
_BELIEF = r"\b(?:knows?|thinks?|believes?|supposes?|means?|says?|true|case|correct|clear|likely|sure|certain)\b"
_DENIED_BEFORE = regex.compile(
    rf"(?:{_DENIAL})(?:(?!{_STATEMENT}).)*$|(?:{_DENIAL})(?:(?!{_STATEMENT}).)*{_BELIEF}.*$|(?:{_DENIAL_UNSPACED}).*$"
    r"|\b(?:no way|(?<!(?:little|beyond|any) )doubt(?:ful|s)?)\b.*$",
    _FLAGS,
)
_WRONG = r"(?:wrong|incorrect|false|untrue)\b"
# "Paris? No, Lyon", "Paris — sorry, Lyon", "Paris, no wait, Lyon"; not "Paris, no doubt".
_TAKEN_BACK = (
    r"[\"')*]*(?: ?[,;?!.…—:]+| -) ?(?:no|nope|sorry|wait|actually not)(?= ?(?:[,;:.!—-]|$)| (?:wait|sorry|it)\b)"
)
_DENIED_AFTER = regex.compile(
    rf"^{_TAKEN_BACK}|^,? (?:(?:but|and|though|although|yet) )?(?:that|this|it|which)(?:'s| is| was) (?:{_WRONG}"
    r"|not (?:it|right|true|correct|so|the case)\b(?! (?:for|in)\b))"
    r"|^(?: \w{1,3})? (?:ikke|inte|niet|nie|bukan|nem|není|nu este|ei ole|δεν|(?:no|non|não) (?:es|era|è|é|fue|foi))\b"
    r"|^[也并並]?不(?:是|在|叫)(?![吗嗎])|^(?:이|가|은|는)?(?: \w+[이가])? ?아(?:니|닙)"
    r"|^(?: (?!है)[^\s,]+){0,3} (?:नहीं|नही) |^(?: [^\s,]+){0,2} değil"
    rf"|^[\"')* ]*(?:(?:is|was|are|were|do|does|did|has|can|could|would|will|ai)(?: \w+ly)? "
    rf"(?:(?:not|never|no longer)\b|{_WRONG})|never\b|نیست|n'est pas|ist (?:nicht|kein)|не )"
    r"|^(?:で(?:は|も)|じゃ|で)(?:な[いく]|あり?ません)|^[ ်]*မဟုတ်",
    _FLAGS,
)
_ITEM = r"(?:[^\s,;/.]+ ?){1,3}"
_OR_BEFORE = regex.compile(rf"({_ITEM}),? (?:or|oder|ou)(?: (?:in|the|an?))? ?$", _FLAGS)
_OR_AFTER = regex.compile(rf"^((?:, ?{_ITEM})*),? (?:or|oder|ou) (?!so\b|more\b|less\b|thereabouts\b)({_ITEM})", _FLAGS)
_SLASH = regex.compile(r"([^\s/|]+)(?: ?/ ?|\|)$|^(?: ?/ ?|\|)([^\s/|]+)|(\S+) vs\.? $|^ vs\.? (\S+)")
_BOUND = regex.compile(
    r"(?:\b(?:more|less|fewer|greater|higher|lower|larger|smaller) than|\bat (?:least|most)|\bup to"
    r"|\b(?:over|under|above|below)|[<>≤≥])[ $€£¥]*$",
    _FLAGS,
)
_STATES = regex.compile(rf"{_STATEMENT}|[:=]|\bbe\b", _FLAGS)
# Without a comma: "Sarajevo, Bosnia and Herzegovina" is one place.
_PAIR = regex.compile(rf"\0 and ({_ITEM})[.!?\"']*|({_ITEM}) and \0[.!?\"']*", _FLAGS)


def is_denied(before: str, after: str) -> bool:
    """Returns whether a sentence denies the thing named between `before` and `after`: "It is not …", "… isn't it".

    Covers English widely; of other languages only the most frequent denial.
    """
    before, after = (_rewritten(part) for part in (before, after))
    clause = _CLAUSE.split(before)[-1]
    return _DENIED_BEFORE.search(clause) is not None or _DENIED_AFTER.search(after) is not None


def one_of_several(before: str, after: str, is_right: Callable[[str], bool]) -> bool:
    """Returns whether the thing named between `before` and `after` is one of several candidates, not all of them right.

    "Paris or Lyon", "Paris, London or Rome", "Paris/Lyon"; and "Paris and Lyon" if the sentence states nothing else.

    Args:
        before: the sentence up to the thing named.
        after: the rest of the sentence.
        is_right: returns whether another candidate is a wording of the same answer.
    """
    matches = [pattern.search(part) for pattern, part in ((_OR_BEFORE, before), (_OR_AFTER, after))]
    matches += [_SLASH.search(before[-40:]), _SLASH.search(after[:40])]
    matches.append(_PAIR.fullmatch((_STATES.split(before)[-1].strip(" \"'") + " \0 " + after.strip()).strip()))
    others = [group for match in matches if match for group in match.groups() if group and group.strip(" ,")]
    return any(not is_right(other) for other in others)


def is_bound(before: str) -> bool:
    """Returns whether the number after `before` is only a bound: "more than …", "at least …"."""
    return _BOUND.search(before) is not None


def _rewritten(part: str) -> str:
    for pattern, replacement in _REWRITTEN:
        part = regex.sub(pattern, replacement, part, flags=_FLAGS)
    return part
