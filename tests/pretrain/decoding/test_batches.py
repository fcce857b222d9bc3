"""A text is the same alone and in any batch."""

import pytest
import torch
from tiny_models import GAPS, MASK, padded, rng

SETTINGS = [
    {"order": "random"},
    {"order": "random", "steps": 3},
    {"order": "entropy", "block_length": 2},
    {"order": "left_to_right", "block_length": 3, "cache": "window"},
    {"order": "random", "steps": 4, "block_length": 6, "cache": "window"},
    {"order": "random", "steps": 4, "block_length": 6, "cache": "window", "refresh_every": 2},
    {"order": "confidence", "block_length": 3, "cache": "window", "refresh_every": 2, "threshold": 0.3},
    {"threshold": 0.2, "verify_threshold": 0.9},
    {"threshold": 0.2, "verify_threshold": 0.9, "block_length": 4},
    {"threshold": 0.2, "kl_threshold": 0.5, "repetition_penalty": 1.3},
    {"threshold": 0.1, "kl_threshold": 9.0, "block_length": 8, "cache": "window"},
    {"remasking": 0.9, "steps": 20, "order": "margin"},
    {"remasking": 0.9, "steps": 20, "order": "random", "block_length": 3},
    {"order": "entropy", "temperature": 0},
]


FEWER = ("threshold", "steps")  # settings by which some row takes another number of calls than it has masks


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize(("side", "filler"), [("left", MASK), ("right", 7)])
def test_a_text_is_the_same_alone_and_in_any_batch(model, settings, side, filler):
    """Its padding, its neighbours and its place in the batch change nothing: neither text nor number of calls."""
    again = {"return_dict_in_generate": True, "eos_token_id": [17, 20, 21, 22, 23], **settings}
    alone = [
        model.diffusion_generate(torch.tensor([row]), generator=[rng(k)], **again) for k, row in enumerate(GAPS)
    ]  # fmt: skip
    for places in ([0, 1, 2], [2, 0, 1]):
        ids, real = padded([GAPS[k] for k in places], side, filler)
        together = model.diffusion_generate(ids, attention_mask=real, generator=[rng(k) for k in places], **again)
        for place, k in enumerate(places):
            here = real[place].bool()
            assert torch.equal(together.sequences[place][here], alone[k].sequences[0])
            assert torch.equal(together.step_of[place][here], alone[k].step_of[0])
            assert together.nfe[place] == alone[k].nfe[0]
        assert torch.equal(together.sequences[real == 0], ids[real == 0]), "padding stays"
    for row, out in zip(GAPS, alone):
        given = torch.tensor(row) != MASK
        assert torch.equal(out.sequences[0][given], torch.tensor(row)[given])
    if any(name in settings for name in FEWER):
        assert any(int(out.nfe) != row.count(MASK) for row, out in zip(GAPS, alone)), "the rule did something"
