"""Adapt an AR model into a masked diffusion model; the same command again resumes.

    deepspeed pretrain/main.py --config pretrain/configs/diffugpt_s.yaml --deepspeed_config ds_configs/zero2.json
    torchrun --nproc_per_node 8 pretrain/main.py --config ... --deepspeed_config ... train.seed=7
    python pretrain/main.py --config pretrain/configs/diffullama_7b.yaml --dry_run --world_size 16

`key=value` overrides the configuration file; a dot descends: optimizer.lr=1e-4. Unknown keys are errors.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a file: find the project, and keep pretrain/*.py from standing as top-level modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import command, make_parser
from common.config import load_config
from common.log import log
from pretrain.config import RunConfig, accumulation_steps, check_run
from pretrain.launch import check_corpus, fast_dtype, launch_environment, packaged, start_ranks


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    parser = make_parser("pretrain/main.py", __doc__)
    parser.add_argument("--config", required=True, help="run configuration, such as pretrain/configs/diffugpt_s.yaml")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3.json", help="default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="check, print the plan, start nothing")
    parser.add_argument("--world_size", type=int, help="ranks that --dry_run plans for; default: as launched, or 1")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-4")
    return parser.parse_args(argv)


def print_plan(args: argparse.Namespace, config: RunConfig, dtype: str) -> None:
    """The dry run's page."""
    from pretrain import deepspeed_config, plan

    world_size = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    shape = plan.shape_of(config)
    data = plan.planned_data(config)
    path = packaged(args.deepspeed_config)
    ds_config = deepspeed_config.resolve(path, config, dtype, shape.hidden_size, world_size)
    print(plan.describe(config, ds_config, shape, data, world_size))


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see `Trainer.run`."""
    args = arguments(argv)
    config = load_config(RunConfig, packaged(args.config), args.overrides)
    check_run(config)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dtype = fast_dtype() if config.model.dtype == "auto" else config.model.dtype
    if args.dry_run:
        print_plan(args, config, dtype)
        return 0

    from pretrain import adapt, deepspeed_config
    from pretrain.objectives import OBJECTIVES
    from pretrain.runtime.resume import check_same_run

    world_size = launch_environment()
    accumulation_steps(config, world_size)
    check_same_run(config)
    tokenizer = adapt.load_tokenizer(config.model)
    corpora = check_corpus(config, tokenizer)
    base = adapt.base_config(config.model, corpora.seq_len)
    objective = OBJECTIVES[config.objective]
    learnt = getattr(base, "mask_token_id", None)
    mask_token_id = adapt.add_mask_token(tokenizer, config.model, learnt) if objective.masks else None
    if config.model.init == "random":
        adapt.take_token_ids(base, tokenizer)
    adapt.check_fits(config, base, corpora.tokenizer["vocab_size"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    backends = adapt.check_acceleration(config.model, objective.forms(config), device, torch_dtype)
    log.info("attention: %s", ", ".join(f"{form} by {name}" for form, name in backends.items()))
    path = packaged(args.deepspeed_config)
    ds_config = deepspeed_config.resolve(path, config, dtype, base.hidden_size, world_size)

    start_ranks(config, world_size)
    import torch.distributed as dist

    from pretrain.trainer import Trainer

    try:
        trainer = Trainer(config, base, tokenizer, mask_token_id, ds_config)
        code = trainer.run()
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
    trainer.wait_for_evaluation()
    return code


if __name__ == "__main__":
    sys.exit(main())
