import torch

from lilliput.runtime.packed import Pack, group_into_packs

PROMPTS = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [1, 2, 3, 4]]
OPTIONS = [[[8, 9], [8, 10, 11]], [[8]], [[9], [9, 9, 9]], [[12, 13]]]


def texts(row):
    return [[*PROMPTS[row], *option] for option in OPTIONS[row]]


def test_common_beginnings_occur_once_and_each_token_sees_exactly_its_own_text():
    pack = Pack.of(range(4), PROMPTS, OPTIONS, shared=2)
    beginnings = {tuple(text[:end]) for row in range(4) for text in texts(row) for end in range(3, len(text))}
    assert len(pack.ids) == len(beginnings)
    mask = pack.mask(torch.float32, torch.device("cpu"))[0, 0]
    assert (mask[:, :2] == 0.0).all()
    seen = mask[:, 2:] == 0.0
    paths = {(1, 2, *(pack.ids[node] for node in row.nonzero()[:, 0].tolist())) for row in seen}
    assert paths == beginnings
    assert [2 + int(row.sum()) - 1 for row in seen] == pack.positions


def test_each_scored_token_is_predicted_from_the_text_before_it():
    pack = Pack.of(range(4), PROMPTS, OPTIONS, shared=2)
    seen = pack.mask(torch.float32, torch.device("cpu"))[0, 0, :, 2:] == 0.0
    predicted = [
        ([1, 2, *(pack.ids[node] for node in seen[place].nonzero()[:, 0].tolist())], target)
        for place, target in zip(pack.places, pack.targets, strict=True)
    ]
    expected = [
        (text[:end], text[end])
        for row in range(4)
        for text in texts(row)
        for end in range(len(PROMPTS[row]), len(text))
    ]
    assert predicted == expected
    assert pack.owners == [0, 0, 1, 1, 1, 2, 3, 4, 4, 4, 5, 5]


def test_packs_hold_every_prompt_once_with_similar_ones_together_and_few_enough_tokens():
    assert group_into_packs(PROMPTS, OPTIONS, 2, 100) == [[0, 3, 1, 2]]
    for tokens in range(1, 12):
        groups = group_into_packs(PROMPTS, OPTIONS, 2, tokens)
        assert sorted(row for group in groups for row in group) == [0, 1, 2, 3]
        sizes = {len(group): len(Pack.of(group, PROMPTS, OPTIONS, 2).ids) for group in groups}
        assert all(size <= tokens for count, size in sizes.items() if count > 1)
