"""Resume a run and save what its engine computes: the trained model itself, not a copy of its weights.

torchrun --nproc_per_node 2 tests/scripts/trained_logits.py IDS.pt OUT.pt <arguments of pretrain/main.py>
"""

import sys

import torch
import torch.distributed as dist

from data_prep.shards import Manifest
from pretrain import checkpoint, main, trainer

ids_file, out_file, arguments = sys.argv[1], sys.argv[2], sys.argv[4:]


def instead_of_training(config, base, tokenizer, mask_token_id, ds_config):
    found = checkpoint.resumption(config, ds_config, Manifest.load(config.data.path).fingerprint)
    engine = trainer.build_engine(config, base, mask_token_id, ds_config)
    assert checkpoint.load(engine, found) > 0
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=torch.load(ids_file)).logits
    if dist.get_rank() == 0:
        torch.save(logits, out_file)
    return 0


trainer.train = instead_of_training
sys.exit(main.main(arguments))
