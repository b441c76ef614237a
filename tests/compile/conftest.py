"""Quantised versions of the tiny model, created once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput.compress.rtn import rtn
from lilliput.config import RtnConfig
from tests.contexts import context


@pytest.fixture(scope="session")
def quantised(checkpoint, facts, tmp_path_factory) -> Callable[..., Path]:
    """The tiny model rounded to `bits`, as a checkpoint in AutoGPTQ's format."""
    created: dict[tuple[int, int, bool], Path] = {}

    def make(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> Path:
        key = (bits, group_size, symmetric)
        if key not in created:
            result = rtn(
                context(checkpoint, held_out=facts[:2]),
                RtnConfig.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric}),
            )
            folder = tmp_path_factory.mktemp("quantised")
            assert result.save is not None
            result.save(folder)
            result.tokenizer.save_pretrained(folder)
            created[key] = folder
        return created[key]

    return make
