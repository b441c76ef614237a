"""Lets llama.cpp's converter recognise the vocabularies of the matrix.

The converter knows a family's rule for splitting words by a hash of published token ids. A vocabulary trained here uses
the same rule and has other ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def recognised(name: str) -> Iterator[None]:
    """Gives the converter llama.cpp's name of the rule for the length of a block; an empty name changes nothing."""
    from conversion.base import TextModel

    with pytest.MonkeyPatch.context() as patch:
        if name:
            patch.setattr(TextModel, "get_vocab_base_pre", lambda _self, _tokenizer: name)
        yield
