"""Run by torchrun: trains sharded and copied, and writes what each rank holds."""

import json
import sys
from pathlib import Path

from small import recipe
from torch.distributed.tensor import DTensor

from dape.data.shards import Corpus
from dape.train.loop import fit
from dape.train.run import begin, train
from dape.train.task import LanguageModelling

LAYOUTS = {
    "ddp": ({"strategy": "ddp", "micro_batch_size": 2}, "fp32"),
    "fsdp-bf16": ({"strategy": "fsdp", "activation_checkpointing": "selective"}, "bf16-mixed"),
    "fsdp-step": ({"strategy": "fsdp", "gather": "step", "micro_batch_size": 1}, "fp32"),
    "fsdp-pass": ({"strategy": "fsdp", "gather": "pass", "micro_batch_size": 1}, "fp32"),
}


def sharded(settings):
    session = begin(LanguageModelling(settings, Corpus(settings.data)))
    fit(session)
    session.task.save(session.fabric, session.model)
    return {
        name: [isinstance(p, DTensor), str(p.placements), p.numel(), p.to_local().numel()]
        for name, p in session.model.named_parameters()
    }, session.fabric.global_rank


def main(data, out):
    held, rank = sharded(recipe(data, out / "fsdp", hardware={"strategy": "fsdp"}))
    (out / f"rank-{rank}.json").write_text(json.dumps(held))
    fused = {"backend": "triton"}
    train(recipe(data, out / "fused", model=fused, hardware={"strategy": "fsdp"}))
    for name, (hardware, precision) in LAYOUTS.items():
        train(recipe(data, out / name, hardware=hardware, training={"precision": precision}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
