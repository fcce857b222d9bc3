"""The way of a batch stays short: few functions from the disk to its loss, few calls from main to the step."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks import walk


@pytest.mark.slow
def test_a_batch_crosses_few_functions_and_files(tmp_path):
    # in a process of its own: it is left with DeepSpeed initialised
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(walk.watch, tmp_path).result()
    assert found.chain[0] == "main (pretrain/main.py)", str(found)
    assert found.chain[-1] == "train_step (pretrain/step.py)", str(found)
    assert found.calls <= walk.MOST_CALLS, str(found)
    assert found.functions[-1] == "ChunkedLoss.forward (pretrain/model/loss.py)", str(found)
    assert len(found.functions) <= walk.MOST_FUNCTIONS, str(found)
    assert len(found.files) <= walk.MOST_FILES, str(found)
