import math

import pytest
import torch

from lilliput.statistics.perplexity import IGNORED, counted, perplexity
from lilliput.training.examples import Example


def test_answers_alone_count_and_all_of_them_together(opened):
    model, _ = opened
    texts = [
        Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]),
        Example([9, 10, 11], [IGNORED, 10, 11]),
        Example([12, 13, 14], [12, 13, 14]),  # the first token is given, whatever its label
    ]
    nll = []
    for text in texts:
        with torch.inference_mode():
            likelihoods = model(torch.tensor([text.input_ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(text.labels[1:]):
            if label != IGNORED:
                nll.append(-likelihoods[place, label].item())
    assert counted(texts) == len(nll) == 6
    assert perplexity(model, texts, show=False) == pytest.approx(math.exp(sum(nll) / 6), rel=1e-4)
