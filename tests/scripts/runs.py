"""Several runs of pretrain/main.py, one after the other in one process group: starting takes longer than training.

    torchrun --nproc_per_node 2 tests/scripts/runs.py RUNS.json

RUNS.json holds {"runs": [arguments of each], "expected": the exit code that each must have}.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from pretrain import main as entry


def make_runs(listed: str) -> int:
    """Returns 0, or at once the exit code of a run that ended with another than expected; 1 where that is 0."""
    leave_group = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # each run would leave it
    content = json.loads(Path(listed).read_text())
    for arguments in content["runs"]:
        code = entry.main(arguments)
        if code != content["expected"]:
            print(f"exit code {code}, expected {content['expected']}: {arguments}", file=sys.stderr)
            return code or 1
    if dist.is_initialized():
        leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(make_runs(sys.argv[1]))
