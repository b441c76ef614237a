"""Detects abstention in a short free answer by its English wording; docs/metrics.md has precision and recall."""

from __future__ import annotations

import re

from lilliput.evaluate.accuracy import first_sentence

_CONTRACTIONS = {
    r"\b(ca)n[' ]?t\b|\bcannot\b": "can not",
    r"\b(do|does|did|is|are|was|were|have|has|could|would|should)n'?t\b": r"\1 not",
    r"\bwon't\b": "will not",
    r"\bi'?m\b": "i am",
    r"\bi've\b": "i have",
    r"\bi'd\b": "i would",
    r"\b(it|that|there|who|what)'s\b": r"\1 is",
    r"\byou'(?:re|ve)\b": "you have",
}
_SPEAKER = r"\b(?:i|we)(?: \w+ly| just| still| also)?"
_NOT = r"(?:do|did|can|could|would|will|am|are|have|had) not(?: \w+ly| even| yet| quite)?"
_ANYTHING = r"(?:idea|clue|informations?|info|know\w*ge|records?|answer|data|details?|facts?|memory|context|evidence|results|sources?)"
_THING = (
    r"(?:country|nation|state|element|metal|city|town|place|island|region|republic|kingdom|capital|name|thing|word)"
)
_OPENING = r"^\W*(?:(?:sorry|unfortunately|apologies|nope|no|hmm|well|answer)\W+)*"

# Wordings of an abstention, searched in the first sentence after lower-casing and expanding contractions.
_DECLINES = {
    "not knowing": rf"{_SPEAKER} {_NOT} (?:be )?(?:know|say|tell|answer|find|provide|recall|remember|confirm|verify|guess|"
    r"identify|determine|place|understand|give|assist|help|catch|recogni[sz]e|make|sure|certain|aware|able|familiar|trained|in a position)\b",
    "unable": rf"{_SPEAKER} (?:am |are |was |were )(?:unsure|unaware|unable|uncertain|unfamiliar|drawing a blank)\b",
    "nothing there": rf"{_SPEAKER} (?:{_NOT} (?:have|poss?ess?)|have (?:no|not)|lack)(?: [\w-]+){{0,4}} {_ANYTHING}\b"
    r"|\bi know nothing\b|\bnothing comes to mind\b|\bmy ignorance\b|\bnot a clue\b|\btraining data (?:do|does) not\b",
    "never heard": rf"{_SPEAKER} (?:have )?(?:not|never) heard\b",
    "forgotten": rf"{_SPEAKER} (?:forget|forgot|give up|used to know|would (?:have|need) to (?:look|check)|would rather not)\b",
    "wish": r"\bwish (?:i|we) (?:could|knew)\b|\bi (?:would )?need (?:to know|the name|more)\b|\bif i knew\b|\bnot something i\b|\b(?:escapes?|eludes?|fails?) me\b|\blost on me\b",
    "beyond": r"\b(?:beyond|outside|missing from|not (?:in|within|part of)) (?:of )?(?:my|this|the scope|what i|everything i)\b"
    r"|\btoo (?:much|hard) for me\b|\bknowledge is limited\b|\bmystery to me\b|\bmeans? anything to me\b|\bring a bell\b",
    "bare": rf"{_OPENING}(?:impossible to (?:say|tell|know)|(?:do|did|can|could) not (?:\w+ )?(?:know|say|tell|answer|place|help|find|recall|have)|dunno|idk|"
    r"(?:no|not enough) (?:idea|clue|answer|comment|data|information|records?)|un(?:known|sure|certain|determined)|n/a|none|nothing|pass|"
    r"not (?:sure|known|certain|available)|information not available|beats me|search me)\W*(?:$|,| (?:for|about|on|what|sorry|lol|that i)\b)",
    "nobody": r"\b(?:nobody|no one|who) (?:really )?knows\b|\bit is (?:hard|impossible|difficult|unclear|not (?:clear|possible))\b"
    r"|\bno way (?:for me )?to\b|\bno way for me\b|\bgood as mine\b|\byou have got me\b|\bwould be irresponsible\b",
    "unknowable": r"\b(?:can|could) not be (?:\w+ )?(?:determined|found|identified|answered|verified|known|confirmed)\b",
    "not given": r"\b(?:is|are|was|been) not (?:\w+ )?(?:available|found|specified|provided|mentioned|given|stated|listed|recorded|discovered|"
    r"documented|known)\b(?! (?:for|as)\b)|\b(?:do|does) not (?:\w+ )?(?:mention|specify|say|state|appear|match|contain|refer|seem|correspond)\b|\bno \w+(?: \w+){0,3} (?:has|have) been recorded\b",
    "too little": rf"\b(?:no|not enough|insufficient|is not enough) (?:\w+ )?{_ANYTHING}\b",
    "unknown": r"\b(?:is|are|remains?) (?:currently |still )?\W?(?:unknown|unclear)\b(?! (?:for|as)\b)",
    "no such thing": rf"\b(?:no|never|not|not an?)(?: \w+){{0,3}} {_THING}\b(?: (?:called|named|known|by|of that|with)\b|\W*$)"
    r"|\b(?:do|does|has|have|had) (?:not|never)(?: \w+){0,3} exist(?:ed)?\b|\bnever (?:existed|been)\b|\bexists? only in\b"
    r"|\b(?:no|not an?) (?:such|real|actual|existing|recogni[sz]ed)(?! animal)\b|\bnot (?:real|[oi]n the periodic table)\b|\bis that even\b|\bonly exists? in\b",
    "unreal": r"\b(?:fictional|fictitious|imaginary|an? invented|pure invention|made[- ]up|non-?existent|mythical)\b|\bsounds like something\b",
    "asking back": r"\b(?:clarify|rephrase|please specify|misspelled|misunderstanding|typo|(?:more|some) (?:context|details))\b|\bhow can i help\b|\b(?:did|do) you mean\b|\bare you asking\b"
    r"|\byou have (?:asking|referring)\b|^\W*(?:pardon|which|what do you)\b.*\?",
    "elsewhere": r"\b(?:you|please) (?:(?:may|might|should|could|would)(?: (?:want|have) to)? )?(?:consult|check|refer|ask)\b|\bi (?:suggest|recommend) (?:asking|checking)\b",
}

# A hedged guess is an answer: "I'm not sure, but I believe it is Lyon", "Probably Lyon, but I don't know".
_ANSWERS = {
    "guess after all": r"\b(?:sure|certain|know|exactly|positive|say|first|capital)\b(?: \w+)?\W* (?:but|however|though)\W+(?:now )?"
    r"(?:i|it|the|maybe|perhaps|probably|my|\w+ is)\b(?!.*\b(?:unknown|not|no)\b)",
    "answer first": r"^(?:(?!question|sorry|wish|help|apolog|afraid|no\b|not\b)\w+\W+){1,8}but (?:i|we) (?:am|do|can|would) not (?:sure|certain|know|say|swear)\b",
    "hedged": r"^(?:probably|maybe|perhaps|possibly|likely)\b(?! (?:i|you|there|that|this|it)\b)",
    "known": r"^i know\b(?! (?:nothing|of no|that i))",
    "about wording": r"\b(?:is|was) wrong\b|^none other\b|\bunknown to (?:most|many)\b|\bno simple\b",
    "answer, then more": r"^(?:the [\w ]+ )?(?!i\b|we\b|it\b|this\b|that\b|there\b)\w+(?: \w+)? (?:is the|borders)\b",
    "fiction's own answer": r"\bof the fictional \w+ of .* is \w",
}

_DECLINING, _ANSWERING = (
    re.compile("|".join(f"(?:{pattern})" for pattern in patterns.values())) for patterns in (_DECLINES, _ANSWERS)
)


def abstained(text: str) -> bool:
    """Returns whether `text` declines to answer in its first sentence.

    "There is no such thing" and an empty text are abstentions. A guess is an answer, even a hedged one.
    """
    sentence = " ".join(first_sentence(text).lower().replace("’", "'").split())
    for contraction, words in _CONTRACTIONS.items():
        sentence = re.sub(contraction, words, sentence)
    if not re.search(r"\w", sentence):
        return True
    return _DECLINING.search(sentence) is not None and _ANSWERING.search(sentence) is None
