"""What the trainer costs beside the bare DeepSpeed engine: the same model, batches and process, step about step.

    torchrun --nproc_per_node 2 benchmarks/trainer.py --config CONFIG key=value ...

Takes the arguments of pretrain/main.py. Before each of its steps the engine alone runs the same batch: forward,
backward, update. A step of the trainer is all from there to the next: data, metrics over all ranks, guards,
logging. Writes benchmarks/trainer.md; validation and checkpoints are left out, since their cost is a choice.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain import main as entry
from pretrain import trainer
from pretrain.diffusion import loss_weights

WARM_UP = 5  # steps that are not counted
train_step, step_data = trainer.train_step, trainer.step_data
bare, whole, data = [], [], []
after_bare = None


def beside(engine, config, part, step, lr, *rest):
    global after_bare
    if after_bare is not None:
        whole.append(time.perf_counter() - after_bare)
    began = time.perf_counter()
    state = trainer.visibility_at(config, step, part.batches[0].xt.shape[1])
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for batch in part.batches:
        loss = engine(
            input_ids=batch.xt,
            labels=batch.labels,
            loss_weights=loss_weights(batch.t, part.masked),
            position_ids=batch.positions,
            visibility=replace(state, documents=batch.documents),
        ).loss
        engine.backward(loss)
        engine.step()
    after_bare = time.perf_counter()
    bare.append(after_bare - began)
    return train_step(engine, config, part, step, lr, *rest)


def timed_data(*args):
    began = time.perf_counter()
    part = step_data(*args)
    data.append(time.perf_counter() - began)
    return part


def main() -> None:
    import torch.distributed as dist

    arguments = ["checkpoint.keep=0", "validation.rows=0", "wandb.mode=disabled"]
    trainer.train_step, trainer.step_data = beside, timed_data
    rank = {}

    def remember(*args, **kwargs):
        rank["rank"], rank["world"] = dist.get_rank(), dist.get_world_size()
        return trainer_train(*args, **kwargs)

    trainer_train, trainer.train = trainer.train, remember
    code = entry.main([*sys.argv[1:], *arguments])
    if code or rank["rank"]:
        sys.exit(code)
    ratios = [w / b for w, b in zip(whole[WARM_UP:], bare[WARM_UP:])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ratio = statistics.median(whole[WARM_UP:]) / statistics.median(bare[WARM_UP:])
    text = (
        f"{len(ratios)} steps on {rank['world']} ranks, {statistics.median(bare) * 1e3:.0f} ms each.\n\n"
        f"Trainer ÷ bare engine: **{ratio:.3f}** (ratio of medians); step about step {middle:.3f}, quartiles "
        f"{low:.3f} to {high:.3f}. Reading a batch takes {statistics.median(data) / statistics.median(bare):.3f} of "
        f"a step, in a thread beside it.\n"
    )
    print(text)
    Path(__file__).with_suffix(".md").write_text(f"`torchrun benchmarks/trainer.py` wrote this.\n\n{text}")


if __name__ == "__main__":
    main()
