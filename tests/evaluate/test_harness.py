"""Public benchmarks encode a text as lm-evaluation-harness does by itself."""

import copy

import pytest

from tests.families import BOS

pytest.importorskip("lm_eval", reason="the extra `benchmarks` is not installed")


@pytest.fixture
def model():
    from lilliput.public_benchmarks.harness import HarnessModel

    return lambda tokenizer: HarnessModel(None, tokenizer)  # pyright: ignore[reportArgumentType]


def test_a_text_of_a_family_with_bos_begins_with_it_once(model, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.bos_token, changed.add_bos_token = BOS, True
    bos, plain = changed.bos_token_id, tokenizer("Water is wet")["input_ids"]
    asked = model(changed)
    assert asked.tok_encode("Water is wet") == [bos, *plain]
    assert asked._encode_pair("Water is", " wet") == ([bos, *plain[:2]], plain[2:])
    assert asked.tok_encode("Water is wet", add_special_tokens=False) == plain
    assert asked.prefix_token_id == bos


def test_the_built_in_model_s_texts_are_as_ever(model, tokenizer):
    asked = model(tokenizer)
    assert asked.tok_encode("Water is wet") == tokenizer("Water is wet", add_special_tokens=False)["input_ids"]
    assert asked.prefix_token_id == 2
