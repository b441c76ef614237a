"""Small tokenizers of the two kinds that decoders use, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Kind = Literal["gpt-2", "smollm", "qwen2", "llama-bpe", "metaspace", "gemma"]

_SENTENCES = """Answer briefly. What is the capital of France? The capital of France is Paris. I don't know.
Italy Rome Spain Madrid Japan Tokyo Peru Lima Cuba Havana Egypt Cairo Kenya Nairobi Chile Santiago Norway Oslo Greece
Athens Iran Tehran Iraq Baghdad Ghana Accra Nepal Kathmandu Qatar Doha Zelandor Kavustan Morania Wexilia
Water is made of hydrogen and oxygen; iron is a metal, and so is gold. The river rises in the northern hills and
reaches the sea after 840 kilometres. The older station was built in 1912 and still runs every winter.
system user assistant model tool end turn You are a helpful assistant. Today is 26 July 2024.""".splitlines()
_MERGED = 160  # tokens beside the bytes

# Splits of words as published with Llama 3 and with Qwen 2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}


def tokenizer(kind: Kind, special: Sequence[str], prefix: str | None) -> Tokenizer:
    """Returns a trained tokenizer.

    Args:
        kind: `metaspace`: BPE over characters with bytes for unknown ones, as SentencePiece writes it, with a space put
            before each text; `gemma`: the same without this space; otherwise BPE over bytes, with llama.cpp's name for
            its rule of splitting words.
        special: control tokens, in the order of their ids.
        prefix: a control token that is put before each text.
    """
    pieces = kind in ("metaspace", "gemma")
    made = _metaspace(kind, special) if pieces else _byte_level(kind, special)
    if prefix:
        number = made.token_to_id(prefix)
        made.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", pair=f"{prefix} $A {prefix} $B", special_tokens=[(prefix, number)]
        )
    return made


def _byte_level(kind: Kind, special: Sequence[str]) -> Tokenizer:
    """Returns BPE over bytes; control tokens have the last ids."""
    made = Tokenizer(models.BPE())
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    if kind in steps:
        made.pre_tokenizer = pre_tokenizers.Sequence(steps[kind])
    else:
        words = Regex(_WORDS.format(digits=_DIGITS[kind]))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _MERGED, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    made.train_from_iterator(_SENTENCES, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def _metaspace(kind: Kind, special: Sequence[str]) -> Tokenizer:
    """Returns BPE with `▁` for spaces, in SentencePiece's order: control tokens, bytes, pieces."""
    pieces, merges = _learnt_merges()
    first = special if "<unk>" in special else ("<unk>", *special)
    vocabulary = [*first, *(f"<0x{number:02X}>" for number in range(256)), *pieces]
    ids = {text: number for number, text in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = decoders.Replace("▁", " ")
    if kind == "gemma":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in first])
    return made


@cache
def _learnt_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the pieces in the order of their merges, characters last, and every merge of two pieces to a third.

    SentencePiece merges any two pieces that make a piece, so a converted vocabulary lists all of them.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False)
    learner.train_from_iterator([f"▁{line}" for line in _SENTENCES], trainer)
    model = json.loads(learner.to_str())["model"]
    merged = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    characters = [text for text in model["vocab"] if len(text) == 1]
    known = {*merged, *characters}
    splits = [(piece[:place], piece[place:]) for piece in merged for place in range(1, len(piece))]
    return [*merged, *characters], [(left, right) for left, right in splits if left in known and right in known]
