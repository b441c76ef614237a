import pytest
import torch

from lilliput.compress.hooks import registered_hooks, run_texts


def test_hooks_run_inside_the_block_and_are_removed_after_an_error():
    layers, calls = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], []
    x = torch.zeros(1, 2)
    with (
        pytest.raises(KeyboardInterrupt),
        registered_hooks(layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers),
    ):
        layers[0](x), layers[1](x)
        raise KeyboardInterrupt
    layers[0](x), layers[1](x)
    assert len(calls) == 2


def test_hooks_are_removed_if_a_later_one_cannot_be_registered():
    layer, calls = torch.nn.Linear(2, 2), []
    hooked = (each.register_forward_hook(lambda *_: calls.append(1)) for each in (layer, None))
    with pytest.raises(AttributeError), registered_hooks(hooked):
        pass
    layer(torch.zeros(1, 2))
    assert not calls


def test_run_texts_counts_the_tokens_that_the_model_reads(opened):
    seen = []
    with registered_hooks(
        [opened[0].model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0]))]
    ):
        assert run_texts(opened[0], [[5, 6, 7], [8, 9]]) == 5
    assert [ids.tolist() for ids in seen] == [[[5, 6, 7]], [[8, 9]]]
