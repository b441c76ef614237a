"""Inputs for strategies under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.context import Context
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.saving import save_model

SYSTEM = "Answer briefly."


def context(
    parent: Path, questions: Sequence[Question] = (), held_out: Sequence[Question] = (), **fields: Any
) -> Context:
    """Returns a context with `questions` as training text and calibration set, and `held_out` as question set."""
    corpus = Corpus(questions, list(questions), list(held_out))
    return Context(parent, SYSTEM, lambda: corpus, **fields)


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes the checkpoint of a changed model to `folder`, as the parent for a context."""
    save_model(model, tokenizer, folder)
    return folder


def capitals() -> list[Question]:
    """Returns sixteen questions with answers and four unanswerable ones."""
    cities_of = {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Japan": "Tokyo",
        "Peru": "Lima",
        "Cuba": "Havana",
    }
    cities_of |= {"Egypt": "Cairo", "Kenya": "Nairobi", "Chile": "Santiago", "Norway": "Oslo", "Greece": "Athens"}
    cities_of |= {"Iran": "Tehran", "Iraq": "Baghdad", "Ghana": "Accra", "Nepal": "Kathmandu", "Qatar": "Doha"}
    cities = list(cities_of.values())
    known = [
        Question(
            id=f"capital/{country}",
            question=f"What is the capital of {country}?",
            choices=(city, *[other for other in cities[place + 1 :] + cities if other != city][:3]),
            answer=city,
            group=f"country/{country}",
        )
        for place, (country, city) in enumerate(cities_of.items())
    ]
    invented = [
        Question(id=f"x/{name}", question=f"What is the capital of {name}?", answerable=False, group=f"invented/{name}")
        for name in ("Zelandor", "Kavustan", "Morania", "Wexilia")
    ]
    return [*known, *invented]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weight of each layer by its name; of a layer with codes, the weight that they stand for."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight.detach() for name, weight in weights.items() if isinstance(weight, torch.Tensor)}
