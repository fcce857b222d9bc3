"""Details of how each kind of model is asked: times and grids, orders, ends that do not fit, seeds, budgets."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from known_model import END, MASK, Digits, Known
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from pretrain.model.settings import SamplingSettings
from tools.decoding import load
from tools.evaluation import diffusion_lm
from tools.evaluation.answers import Answers
from tools.evaluation.autoregressive_lm import AutoregressiveLM
from tools.evaluation.diffusion_lm import PAPER_STEPS, DiffusionLM, Likelihood
from tools.evaluation.harness import GENERATED, Asked, text_of
from tools.evaluation.likelihood import EPS, Draws, draw, estimate, random_for

# likelihoods


class Ends:
    """Random numbers that are all the same."""

    def __init__(self, value):
        self.value = value

    def random(self, shape=None):
        return self.value if shape is None else np.full(shape, self.value)


def test_no_time_is_smaller_than_eps():
    assert draw("nelbo", 9, 8, Ends(1.0)).weights.max() == pytest.approx(1 / EPS)
    assert draw("dream", 9, 8, Ends(0.0)).weights.max() == pytest.approx(1 / EPS)


def test_dreams_times_differ_by_seed_and_short_targets_are_drawn_too():
    weights = [draw("dream", 9, 8, random_for(seed, [1])).weights for seed in (0, 1)]
    assert (weights[0] != weights[1]).all()
    assert draw("dream", 1, 32, random_for(0, [1])).masked.shape == (32, 1)


def test_the_authors_first_grid_point_masks_everything():
    assert all(draw("paper", 40, 32, random_for(seed, [1])).masked[0].all() for seed in range(20))


def test_the_error_of_independent_draws_is_that_of_their_mean():
    values = np.random.default_rng(0).normal(size=4000)
    _, error = estimate(Draws(np.ones((4000, 1), bool), np.ones(4000)), values)
    assert error == pytest.approx(values.std() / math.sqrt(4000), rel=0.1)


# diffusion models


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load(str(tiny_checkpoint), device="cpu")


def diffusion(model, tokenizer, folder, name="mask_count", draws=8, seed=0, **settings) -> DiffusionLM:
    how = SamplingSettings(**{"order": "left_to_right", **settings})
    return DiffusionLM(model, tokenizer, Answers(folder), Likelihood(name, draws, seed), how, progress=False)


def test_greedy_decoding_goes_in_the_order_of_the_settings_and_leaves_the_rest_out(tiny, tmp_path):
    model, tokenizer = tiny
    differ = 0
    for text in ("The king", "Once there was a fox", "It", "One day the old man", "She saw"):
        context = tokenizer(text)["input_ids"]
        ids = torch.tensor([[*context, *[model.config.mask_token_id] * 8]])
        given = {
            order: model.diffusion_generate(ids, order=order, temperature=0, eos_token_id=-1)[
                0, len(context) :
            ].tolist()
            for order in ("left_to_right", "confidence")
        }
        differ += given["left_to_right"] != given["confidence"]
        for order, target in given.items():
            for more in ({}, {"repetition_penalty": 9.0}):
                lm = diffusion(model, tokenizer, tmp_path, order=order, **more)
                found = lm._greedy_gives([(context, one) for one in given.values()])
                assert found == [one == target for one in given.values()], (order, more)
    assert differ


def test_what_does_not_fit_goes_from_the_ends_far_from_the_target(tiny, tmp_path):
    model, tokenizer = tiny
    lm = diffusion(model, tokenizer, tmp_path)
    lm.max_length = 16
    long = " ".join(f"{n} {n * n}" for n in range(20))
    all_ids = tokenizer(long)["input_ids"]
    context, target = lm._fitted(Asked(long, " end"))
    assert context == all_ids[-len(context) :] and len(context) + len(target) + 1 == 16
    for before, after in ((long, " " + long), (long, " x"), ("x", " " + long)):
        ids, begin, count = lm._with_masks(Asked(before, suffix=after, middle=" y"))
        first, last = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]
        assert len(ids) == 16 and 0 < begin < 16 - count
        assert ids[:begin] == first[-begin:] and ids[begin + count :] == last[: 16 - begin - count]
        assert (begin == len(first)) == (before == "x") and (16 - begin - count == len(last)) == (after == " x")
    with pytest.raises(UserError, match="16"):
        lm._fitted(Asked("x", " " + long))
    with pytest.raises(UserError, match="max_gen_toks"):
        lm._with_masks(Asked("x", max_tokens=16))


def test_drawn_texts_differ_by_seed_and_have_as_many_tokens_as_asked(tiny, tmp_path):
    model, tokenizer = tiny
    drawn = Asked("Once", max_tokens=6, temperature=1.0)
    texts = [diffusion(model, tokenizer, tmp_path / f"{seed}", seed=seed).write([drawn]) for seed in (0, 1)]
    assert texts[0] != texts[1]
    lm = diffusion(model, tokenizer, tmp_path)
    lm.max_length = 2 * GENERATED
    assert [lm._with_masks(Asked("x", max_tokens=n))[2] for n in (6, None)] == [6, GENERATED]


def test_the_authors_ways_do_not_depend_on_the_settings(tmp_path, monkeypatch):
    flat = Known(3)
    flat.law = torch.full_like(flat.law, 1 / len(flat.law))
    share = draw("paper", 3, 32, random_for(0, [0, 1, 2])).masked.any(axis=1).mean()
    for draws in (4, 16):
        [score] = diffusion(flat, Digits(), tmp_path, draws=draws).score([Asked(".", "012", False, faulty=True)])
        assert score.value == pytest.approx(-math.log(3) * share, rel=1e-5)
    known = Known(3)
    [as_authors] = diffusion(known, Digits(), tmp_path).score([Asked(".", "012", False, faulty=True)])
    [by_name] = diffusion(known, Digits(), tmp_path, "paper", 32).score([Asked(".", "012", False)])
    assert as_authors == by_name, "at the authors' temperature in both"
    for kind, temperature in (("llama", 0.9), ("gpt2", 0.95)):
        monkeypatch.setattr(known.config, "model_type", kind)
        assert diffusion(known, Digits(), tmp_path).paper_temperature == temperature
    used = []
    monkeypatch.setattr(
        known, "diffusion_generate", lambda ids, **how: (used.append((how["order"], how["steps"])), ids)[1]
    )
    lm = diffusion(known, Digits(), tmp_path, order="entropy", steps=2)
    monkeypatch.setattr(diffusion_lm, "text_of", lambda ids, tokenizer: "")
    monkeypatch.setattr(lm, "_with_masks", lambda asked: ([END, MASK], 1, 1))
    lm.write([Asked(".", middle="0", faulty=faulty) for faulty in (False, True)])
    assert sorted(used) == [("confidence", PAPER_STEPS), ("entropy", 2)]


def test_an_end_of_text_that_a_tokenizer_appends_is_no_part_of_a_context(tmp_path):
    class Ending(Digits):
        def __call__(self, text, **_):
            return {"input_ids": [*super().__call__(text)["input_ids"], END]}

    assert diffusion(Known(2), Ending(), tmp_path).tok_encode("01") == [0, 1]


def test_a_text_longer_than_a_window_is_the_sum_of_all_of_them(tmp_path):
    known = Known(4)
    lm = diffusion(known, Digits(), tmp_path, draws=32)
    lm.max_length = 5
    [value] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("01202101",), 0)])
    texts = known.texts.tolist()
    expected = sum(float(known.law[texts.index(t)].log()) for t in ([0, 1, 2, 0], [2, 1, 0, 1]))
    assert value == pytest.approx(expected, rel=1e-5)


def test_the_space_before_a_texts_first_word_is_kept():
    class Stripping(Digits):
        """As sentencepiece: a space before each word but the first."""

        def decode(self, ids, **_):
            return " ".join(str(i) for i in ids)

        def __call__(self, text, **_):
            return {"input_ids": [0]} if text == "\n" else super().__call__(text)

    assert text_of([1, 2], Stripping()) == " 1 2"


# autoregressive models


@pytest.fixture(scope="module")
def base(base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir("llama"), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(base_dir("llama"))


def test_an_ar_models_drawn_texts_depend_on_their_seed_alone(base, tmp_path):
    def texts(seed, asked):
        return AutoregressiveLM(*base, Answers(tmp_path), seed, progress=False).write(asked)

    drawn = [Asked("Once", max_tokens=8, temperature=1.0, number=n) for n in range(3)]
    first = texts(0, drawn)
    assert len(set(first)) == 3
    torch.manual_seed(5)
    assert texts(0, [*drawn[::-1], Asked("The", max_tokens=2)])[:3] == first[::-1]
    assert texts(1, drawn) != first
    assert texts(0, [dataclasses.replace(drawn[0], temperature=1e-4)]) == texts(0, [Asked("Once", max_tokens=8)])


def test_an_ar_model_writes_no_more_than_it_may(base, tmp_path):
    lm = AutoregressiveLM(*base, Answers(tmp_path), progress=False)
    [text] = lm.write([Asked("Once", max_tokens=6)])
    ids = base[1]("Once", return_tensors="pt")
    new = base[0].generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
    assert text == base[1].decode(new, skip_special_tokens=True)
    stop = text[1:3]
    assert lm.write([Asked("Once", max_tokens=6, until=(stop,))]) == [text[: text.index(stop)]]
    how = lm._request(Asked("Once", max_tokens=6, temperature=0.7)).args[1]
    assert (how["do_sample"], how["temperature"], how["top_k"], how["max_gen_toks"]) == (True, 0.7, 0, 6)
    with pytest.raises(UserError, match="max_gen_toks"):
        lm.write([Asked("Once", max_tokens=lm.hf.max_length)])


def test_an_ar_models_scores_are_those_of_lm_eval(base, tmp_path, monkeypatch):
    lm = AutoregressiveLM(*base, Answers(tmp_path), progress=False)
    monkeypatch.setattr(lm.hf, "_loglikelihood_tokens", lambda requests, **_: [(-1.5, True), (-2.5, False)])
    scores = lm.score([Asked("Once", " a"), Asked("Once", " b")])
    assert [(s.value, s.stderr, s.is_greedy) for s in scores] == [(-1.5, 0, True), (-2.5, 0, False)]


def test_an_ar_models_context_that_does_not_fit_is_counted(base, tmp_path):
    lm = AutoregressiveLM(*base, Answers(tmp_path), progress=False)
    lm.hf._max_length = 8
    pairs = {n: Asked(" a" * n, " b") for n in range(2, 14)}
    lm.score(list(pairs.values()))
    for asked in pairs.values():
        context, target = lm._encode_pair(asked.context, asked.continuation)
        assert (asked.key in lm.truncated) == (len(context) + len(target) > 9), "the last token is not read"
    assert 0 < len(lm.truncated) < len(pairs)


def test_what_did_not_fit_is_still_known_when_its_answer_is(tiny, tmp_path):
    asked = [Asked("word " * 40, " end"), Asked("a", " end")]
    for _ in range(2):
        lm = diffusion(*tiny, tmp_path)
        lm.max_length = 16
        lm._answered(asked, lm.score, "likelihoods")
        assert lm.answers.truncated == {asked[0].key}
    theirs = Answers(tmp_path, 1)
    assert theirs.truncated == {asked[0].key}, "another rank knows it too"
