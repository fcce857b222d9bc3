"""Next-token prediction through the seam is the loss of transformers' own causal language model."""

import numpy as np
import pytest
import torch
from independent import InOrder, Row, Source, assert_same_gradients, gradients, made_up, stock

from common.config import load_config
from pretrain import adapt
from pretrain.config import ModelConfig, RunConfig
from pretrain.model.forms import Causal
from pretrain.model.modeling_diffullama import IGNORE
from pretrain.objectives import make_objective
from pretrain.objectives.autoregressive import Autoregressive
from pretrain.step import one_forward, read_rows, read_step

FAMILIES = ["llama", "gpt2", "qwen3"]
LENGTH = 24
FULL, SPLIT, PADDED = [LENGTH], [7, 1, 12, 4], [9, 6]


def objective() -> Autoregressive:
    return make_objective(load_config(RunConfig, None, ["objective=autoregressive"]), None)


def batch_of(source: Source, isolated: bool = False):
    return objective().batch(read_rows(source.places, source.numbers, isolated), step=0)


def model_of(folder):
    chosen = ModelConfig(base=str(folder))
    model = adapt.load_model(chosen, adapt.base_config(chosen, LENGTH), None, torch.float32)
    adapt.describe_model(model.config, objective().shipped({}))
    return model


def expected_loss(model, rows: list[Row], isolated: bool = False) -> torch.Tensor:
    """The mean over all labels of the batch, each row or each of its documents read by the model alone."""
    total, count = torch.zeros(()), 0
    for row in rows:
        used = torch.from_numpy(row.ids[: sum(row.lengths)])
        for ids in used.split(row.lengths) if isolated else [used]:
            if len(ids) > 1:
                total = total + model(ids[None], labels=ids[None]).loss * (len(ids) - 1)
                count += len(ids) - 1
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
def test_loss_and_gradients_are_those_of_transformers(family, isolated, base_dir):
    source = made_up([FULL, SPLIT, PADDED, [1, 1]], LENGTH)
    theirs, ours = stock(base_dir(family)), model_of(base_dir(family))
    batch = batch_of(source, isolated)
    found, expected = one_forward(ours, batch), expected_loss(theirs, source.rows, isolated)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(found.loss, ours), gradients(expected, theirs))
    metrics = objective().metrics(batch.counts, objective().sums(batch, found))
    assert metrics == {"loss": pytest.approx(expected.item(), rel=1e-5)}


@pytest.mark.parametrize("family", FAMILIES)
def test_of_whole_rows_it_is_simply_their_loss(family, base_dir):
    source = made_up([FULL, SPLIT, FULL], LENGTH)
    ids = torch.from_numpy(np.stack([row.ids for row in source.rows]))
    expected = stock(base_dir(family))(ids, labels=ids).loss
    torch.testing.assert_close(one_forward(model_of(base_dir(family)), batch_of(source)).loss, expected)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (1, 3), (2, 1), (3, 2)])
def test_micro_batches_and_ranks_add_up_to_the_global_batch(world_size, micro, base_dir):
    source = made_up([FULL, PADDED, SPLIT, [1], [20], [2, 3]], LENGTH, first=6)
    ours = model_of(base_dir("llama"))
    whole = one_forward(ours, batch_of(source, isolated=True))
    parts = [
        part
        for rank in range(world_size)
        for part in read_step(InOrder(source), objective(), 1, range(6, 12), rank, world_size, micro, isolated=True)
    ]
    assert len(parts) == 6 // micro
    losses = [one_forward(ours, part) for part in parts]
    torch.testing.assert_close(sum(found.loss for found in losses), whole.loss)
    assert_same_gradients(gradients(sum(found.loss for found in losses), ours), gradients(whole.loss, ours))
    sums = sum(objective().sums(part, found) for part, found in zip(parts, losses))
    assert objective().metrics(parts[-1].counts, sums)["loss"] == pytest.approx(whole.loss.item(), rel=1e-6)


@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
def test_padding_bears_no_loss(isolated, base_dir):
    source = made_up([PADDED, FULL, [1]], LENGTH)
    batch = batch_of(source, isolated)
    first = {0, 9} if isolated else {0}
    labelled = [[i for i in range(15) if i not in first], [*range(1, LENGTH)], []]
    for k, positions in enumerate(labelled):
        assert (batch.tensors["labels"][k] != IGNORE).nonzero().flatten().tolist() == positions
    assert batch.counts == {"labelled": sum(map(len, labelled))} and batch.form == Causal()
    assert torch.equal(batch.tensors["input_ids"], torch.from_numpy(np.stack([row.ids for row in source.rows])))
    ours = model_of(base_dir("llama"))
    before = one_forward(ours, batch)
    source.rows[0].ids[15:] = 5
    source.rows[2].ids[1:] = 5
    after = one_forward(ours, batch_of(source, isolated))
    assert torch.equal(after.loss, before.loss) and torch.equal(after.nll, before.nll)


def test_a_batch_without_labels_has_no_loss(base_dir):
    ours = model_of(base_dir("llama"))
    batch = batch_of(made_up([[1], [1]], LENGTH))
    found = one_forward(ours, batch)
    assert found.loss.item() == 0 and batch.counts == {"labelled": 0}
    assert objective().metrics(batch.counts, objective().sums(batch, found)) == {"loss": 0.0}
    assert not any(gradient.any() for gradient in gradients(found.loss, ours).values())


def test_held_out_loss_and_accuracy(base_dir):
    source = made_up([FULL, SPLIT, PADDED], LENGTH)
    theirs, ours = stock(base_dir("gpt2")), model_of(base_dir("gpt2"))
    with torch.no_grad():
        found = {}
        for measurement in objective().held_out(read_rows(source.places, source.numbers, False), base=True):
            losses = one_forward(ours, measurement.batch)
            found |= measurement.report(objective().sums(measurement.batch, losses))
        hits, count = 0, 0
        for row in source.rows:
            ids = torch.from_numpy(row.ids[: sum(row.lengths)])
            predicted = theirs(ids[None]).logits[0, :-1].argmax(-1)
            hits, count = hits + int((predicted == ids[1:]).sum()), count + len(predicted)
        expected = expected_loss(theirs, source.rows).item()
    assert found == {"val_loss": pytest.approx(expected, rel=1e-5), "val_accuracy": hits / count}


def test_it_needs_no_mask_and_ships_a_plain_model(base_dir):
    assert not Autoregressive.masks and Autoregressive.repeats == 1
    assert Autoregressive.forms(RunConfig()) == [Causal()]
    config = model_of(base_dir("llama")).config
    config.update({"diffusion": {"shift": True}, "mask_token_id": 7})
    adapt.describe_model(config, objective().shipped({}))
    assert not hasattr(config, "diffusion") and not hasattr(config, "mask_token_id")
    assert model_of(base_dir("llama")).get_input_embeddings().weight.shape[0] == 384
