"""Resume a run and save what its engine computes: the trained model itself, not a copy of its weights.

torchrun --nproc_per_node 2 tests/scripts/trained_logits.py IDS.pt OUT.pt <arguments of pretrain/main.py>
"""

import sys

import torch

from pretrain import main, trainer
from pretrain.model.visibility import Visibility
from pretrain.objectives import OBJECTIVES

ids_file, out_file, arguments = sys.argv[1], sys.argv[2], sys.argv[4:]


class Asked(trainer.Trainer):
    """Computes logits in place of training."""

    def run(self) -> int:
        assert self.done > 0, "nothing was resumed"
        self.engine.eval()
        form = OBJECTIVES[self.config.objective].forms(self.config)[-1]  # the one that training ends with
        with torch.no_grad():
            logits = self.engine(input_ids=torch.load(ids_file), visibility=Visibility(form)).logits
        if self.rank == 0:
            torch.save(logits, out_file)
        self.metrics.close()
        self.watchdog.close()
        return 0


trainer.Trainer = Asked
sys.exit(main.main(arguments))
