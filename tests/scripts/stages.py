"""Run the trainer under several ZeRO stages in one process group; rank 0 prints their metrics as one JSON line.

torchrun --nproc_per_node 2 tests/scripts/stages.py 0,1,2,3 OUT.json <arguments of pretrain/main.py>
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from pretrain import main as entry
from pretrain.telemetry import read_metrics

stages, output, arguments = sys.argv[1].split(","), Path(sys.argv[2]), sys.argv[3:]
dist.destroy_process_group, keep = (lambda: None), dist.destroy_process_group  # one group for all the runs
found = {}
for stage in stages:
    folder = output.with_name(f"{output.stem}_stage{stage}")
    command = [a for a in arguments if a.endswith(".py") is False]
    command[command.index("--deepspeed_config") + 1] = f"ds_configs/zero{stage}.json"
    code = entry.main([*command, f"run_dir={folder}"])
    if code:
        sys.exit(code)
    found[stage] = read_metrics(folder)
if dist.get_rank() == 0:
    output.write_text(json.dumps(found))
keep()
