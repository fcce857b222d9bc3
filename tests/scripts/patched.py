"""pretrain/main.py with something changed, for tests:  patched.py MODE [FILE] <arguments of pretrain/main.py>

record FILE.RANK    writes the numbers of the samples of every step that was trained on
poison              the labels of batches 18 to 20 are wrong, and hard to learn
left_out            batches 18 to 20 are passed over from the beginning
fill                the checkpoints' disk gets full when the second one begins to be written
"""

import contextlib
import json
import os
import sys
from dataclasses import replace

import torch

from pretrain import checkpoint, data, guards, main, trainer

mode, arguments = sys.argv[1], sys.argv[2:]
sample, collate, step_data, train_step = data.TrainData.sample, data.collate, data.step_data, trainer.train_step


def numbered_sample(self, n):
    found = sample(self, n)
    found.n = n
    return found


def numbered_collate(samples, isolated):
    batch = collate(samples, isolated)
    batch.numbers = [s.n for s in samples]
    return batch


def recorded_step(engine, config, part, step, *rest):
    line = {"step": step, "numbers": [n for batch in part.batches for n in vars(batch).pop("numbers")]}
    with open(f"{output}.{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(line) + "\n")
    return train_step(engine, config, part, step, *rest)


def poisoned_data(source, batch, *rest):
    part = step_data(source, batch, *rest)
    if 18 <= batch <= 20:
        wrong = [torch.where(b.labels < 0, b.labels, (b.labels * 7 + 3) % 384) for b in part.batches]
        part.batches = [replace(b, labels=labels) for b, labels in zip(part.batches, wrong)]
    return part


def room_and_then_none(root, at_least):
    if list(root.glob("step_*")):
        with open(root / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    return 0


if mode == "record":
    output, *arguments = arguments
    data.TrainData.sample, data.collate, trainer.train_step = numbered_sample, numbered_collate, recorded_step
elif mode == "poison":
    trainer.step_data = poisoned_data
elif mode == "fill":
    checkpoint._missing_bytes = room_and_then_none
elif mode == "left_out":
    guards.Guard.restored = classmethod(lambda cls, config, state: cls(config, left_out=[[18, 20]]))
sys.exit(main.main([a for a in arguments if not a.endswith(".py")]))
