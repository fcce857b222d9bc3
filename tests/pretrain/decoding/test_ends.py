"""Where a text ends: at an end-of-text token that has come to stay, in a gap at the end of a row."""

import pytest
import torch
from known_laws import LAW, MASK, fixed, run, start

from pretrain.model.rules import ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_an_end_of_text_ends_a_gap_at_the_end_of_a_row_alone(order):
    law = torch.tensor([0.3, 0.3, 0.2, 0.2, 0.0])
    eos = 3
    x = start(200, 21)
    x[100:, 20] = 1  # a suffix: the gap is not at the end
    out = run(fixed(law), x, order=order, eos=eos)
    plain = run(fixed(law), x, order=order)
    tail = out.sequences[:100, 1:]
    first = torch.where((tail == eos).any(1), (tail == eos).long().argmax(1), 20)
    for row, end in zip(tail.tolist(), first.tolist()):
        assert set(row[end:]) <= {eos}
    assert (out.nfe[:100] <= 20).all() and out.nfe[:100].float().mean() < 19.8
    assert (out.nfe[100:] == 19).all() and torch.equal(out.sequences[100:], plain.sequences[100:])
    cut = out.step_of[:100, 1:] < 0
    assert (cut.any(1) | (out.nfe[:100] == 20)).all()
    assert torch.equal(cut, out.confidence[:100, 1:].isnan())
    place = torch.arange(20)
    assert torch.equal(cut, place > first[:, None]), "the end itself was found; what follows was not"
    real = torch.ones(100, 26, dtype=torch.long)
    real[:, 21:] = 0
    padded = torch.cat([x[:100], torch.ones(100, 5, dtype=torch.long)], dim=1)
    again = run(fixed(law), padded, attention_mask=real, order=order, eos=eos)
    assert torch.equal(again.sequences[:, :21], out.sequences[:100]), "padding does not hide that a gap is at the end"
    assert (out.tokens_per_forward <= 1).all(), "what was cut off was not generated"


def test_an_end_of_text_waits_while_it_may_be_taken_back():
    out = run(fixed(LAW), start(300, 13), eos=3, order="random", block_length=4, remasking=0.9, steps=24)
    for state in out.history[:-1]:
        for k in range(3):  # a block that has masks has ended nothing
            has = (state[:, 1 + 4 * k : 5 + 4 * k] == MASK).any(1)
            assert (state[has, 5 + 4 * k :] == MASK).all()
    tail = out.sequences[:, 1:]
    ended = (tail == 3).any(1)
    assert ended.any()
    filled = (out.step_of[:, 1:] < 0).any(1)
    assert (ended | ~filled).all() and filled.any()
