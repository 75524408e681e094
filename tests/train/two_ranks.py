"""Two ranks that train sharded, copied and spread, and write what each of them holds."""

import errno
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from small import recipe
from spread import CALLS, arguments
from torch.distributed.tensor import DTensor

import interpreter
from dape import DapeConfig, DapeForCausalLM
from dape.attention.context_parallel import ContextParallel
from dape.data.shards import Corpus
from dape.errors import RankError, UserError
from dape.evaluate import evaluate
from dape.evaluate.perplexity import _spread_forward
from dape.runs import RunFolder
from dape.train import drawing, task
from dape.train.loop import fit
from dape.train.parallelize import context_parallel, launch
from dape.train.run import begin, train
from dape.train.task import LanguageModelling
from forked import fork

BF16 = {"training": {"precision": "bf16-mixed"}}
FUSED = {"model": {"backend": "triton"}}
ROPE = {"model": {"scheme": "dape-rope", "tie_word_embeddings": True}}
MEASURING = {"lengths": [17, 34], "protocol": "non_overlapping", "device": "cpu"}
HALFWAY = {"tracking": {"checkpoint_every": 3}}
LAYOUTS = {
    "fused": ({"strategy": "fsdp"}, FUSED),
    "ddp": ({"strategy": "ddp", "micro_batch_size": 2}, HALFWAY),
    "fsdp-bf16": ({"strategy": "fsdp", "activation_checkpointing": "selective"}, BF16),
    "fsdp-step": ({"strategy": "fsdp", "gather": "step", "micro_batch_size": 1}, {}),
    "fsdp-pass": ({"strategy": "fsdp", "gather": "pass", "micro_batch_size": 1}, {}),
    "fsdp-rope": ({"strategy": "fsdp"}, ROPE),
    "spread-rope": ({"strategy": "ddp", "context_parallel": 2, "micro_batch_size": 4}, ROPE),
    "spread": (
        {"strategy": "fsdp", "context_parallel": 2, "activation_checkpointing": "selective"},
        HALFWAY,
    ),
}
# From the layout of the first steps to the layout of the last.
RESUMED = {"one-spread": ("one", "spread"), "spread-ddp": ("spread", "ddp")}


def sharded(settings):
    session = begin(LanguageModelling(settings, Corpus(settings.data)), launch(settings))
    fit(session)
    session.task.save(session.fabric, session.model)
    held = {
        name: [isinstance(p, DTensor), str(p.placements), p.numel(), p.to_local().numel()]
        for name, p in session.model.named_parameters()
    }
    return held, session.fabric


def spread(devices: ContextParallel):
    """Return this rank's output and gradients of each call of attention."""
    found = {}
    for name in CALLS:
        whole, bias, adapter, backend = arguments(name)
        parts = [devices.part(x, dim=2).detach().requires_grad_() for x in whole[:3]]
        out = devices.attention(*parts, bias, adapter, backend=backend)
        learned = [p for module in (bias, adapter) if module for p in module.parameters()]
        weights = devices.part(whole[3], dim=2)
        found[name] = out.detach(), *torch.autograd.grad((out * weights).sum(), parts + learned)
    return found


def table():
    """Return a model with a table of 18 positions, no multiple of four chunks, and windows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DapeConfig(scheme="learned", train_length=18, vocab_size=17, **sizes)
    return DapeForCausalLM(config).eval(), torch.randint(17, (2, 20))


def losses_by_table(devices: ContextParallel):
    """Return this rank's losses of windows of 17 to 19 tokens, or the refusal."""
    model, tokens = table()
    found = {}
    for length in (19, 18, 17):
        try:
            with torch.inference_mode():
                found[length] = _spread_forward(model, tokens[:, : length + 1], length, devices)
        except UserError as error:
            found[length] = str(error)
    return found


def resumed(settings, rank):
    """Return the step of a run that resumes; the second rank cannot read the last checkpoint."""

    def check(*paths):
        if rank == 1 and "step-00000006" in str(paths):
            raise OSError(errno.ESTALE, "Stale file handle")

    with patch("dape.train.checkpoint.check_ordinary", check):
        task = LanguageModelling(settings, Corpus(settings.data))
        return begin(task, launch(settings)).progress.step


def main(data, out):
    interpreter.quicken()
    drawing.LARGE = 100  # numbers: sharded models start in parts
    held, fabric = sharded(recipe(data, out / "fsdp", hardware={"strategy": "fsdp"}))
    rank = fabric.global_rank
    (out / f"rank-{rank}.json").write_text(json.dumps(held))
    for name, (hardware, others) in LAYOUTS.items():
        if "context_parallel" in hardware:
            task.TOKENS_AT_ONCE = 24  # fewer than a micro-batch has: logits in parts
        train(recipe(data, out / name, hardware=hardware, **others))
    for name, (before, after) in RESUMED.items():
        if rank == 0:
            ended = shutil.ignore_patterns("step-00000006", "model")
            shutil.copytree(out / before, out / name, ignore=ended)
            RunFolder(out / name).update_record({"ended": None})
        fabric.barrier()
        train(recipe(data, out / name, hardware=LAYOUTS[after][0], **HALFWAY))
    hardware, others = LAYOUTS["ddp"]
    step = resumed(recipe(data, out / "ddp", hardware=hardware, **others), rank)
    (out / f"resumed-{rank}.json").write_text(json.dumps(step))
    devices = context_parallel(fabric, recipe(data, out, hardware=LAYOUTS["spread"][0]).hardware)
    torch.save(spread(devices), out / f"attention-{rank}.pt")
    torch.save(losses_by_table(devices), out / f"table-{rank}.pt")
    evaluate(out / "ddp", **MEASURING, out=out / "spread-evaluation", context_parallel=devices)
    # Again, where the second rank sees no result of the first measurement.
    place = out / ("elsewhere" if rank else "spread-evaluation")
    (again,) = evaluate(out / "ddp", **MEASURING, out=place, context_parallel=devices)
    losses = {each.length: each.loss for each in again.measurements}
    (out / f"again-{rank}.json").write_text(json.dumps(losses))
    # Where the second rank has other weights, as on a machine with files of its own.
    model = out / ("fsdp-rope" if rank else "ddp") / "model"
    try:
        evaluate(model, data, **MEASURING, out=out / "mixed", context_parallel=devices)
    except RankError as error:
        (out / "mixed.txt").write_text(str(error))
    except RuntimeError:
        assert rank == 0, "the second rank ended before an exchange"


if __name__ == "__main__":
    fork(lambda: main(sys.argv[1], Path(sys.argv[2])))
