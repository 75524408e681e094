"""How many encoders of the Chomsky benchmark a GPU trains a second, and which way is the fastest.

Ways: an ordinary loop; K models side by side without and with CUDA graphs; several such stacks on
streams of their own. Each is timed over the curriculum of lengths, after every length was captured,
and once more at the longest length alone, as padding all batches to one shape would cost.
A run is 50,000 steps; `h / 495 runs` is for 495 of them on four such GPUs.

    python benchmarks/chomsky_speed.py --schemes rope,dape-kerple --task reverse-string

With `--prices FILE` it measures what the plan of `dape paper chomsky` asks the price of: the start,
with a graph for every length, a step of the models of all seeds side by side, and the test of one
of them, for each scheme on tasks of three lengths of output. What the file holds of the same
commit, device and settings is not measured again. `--schemes` limits the schemes.

    python benchmarks/chomsky_speed.py --prices results/chomsky/speed.json [--schemes kerple]

With `--split` it times the parts of `dape chomsky train`: starting, the draw of examples,
capturing, a step, and testing by length.

    python benchmarks/chomsky_speed.py --split --schemes kerple,dape-kerple --task parity-check
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path

import torch

from dape.chomsky.benchmark import SCHEMES
from dape.chomsky.encoder import Model, build, configure
from dape.chomsky.measure import Evaluation, OneByOne, accuracy
from dape.chomsky.stack import Stack, Training
from dape.chomsky.task import Draw, single
from dape.chomsky.tasks import TASKS
from dape.files import check_writable, write_json
from dape.provenance import provenance

STEPS, RUNS, GPUS = 50_000, 495, 4
COMPARED = ("rope", "alibi", "kerple", "fire", "dape-kerple", "dape3-kerple")
SETTINGS = ("width", "length", "batch_size", "precision")
PRICED, SEEDS = ("cycle-navigation", "stack-manipulation", "duplicate-string"), 3


def loop(task, model, scheme, training, device):
    """Return one step of an ordinary training loop: a module, dropout, clipping, Adam."""
    config = configure(model, scheme, task, training.length)
    encoder = build(config, len(task.outputs), seed=0).to(device).train()
    optimizer = torch.optim.Adam(encoder.parameters(), training.learning_rate, fused=True)
    draw = single(0, training.batch_size, device)
    generator = torch.Generator(device).manual_seed(1)

    def step(length):
        inputs, outputs, _ = task.sample(draw, length)
        tokens = inputs.shape[1] + outputs.shape[1]
        noise = encoder.noise([generator], len(inputs), tokens, training.dropout)
        logits = encoder(inputs, outputs.shape[1], noise.one(0))
        torch.nn.functional.cross_entropy(logits.mT, outputs).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def stacked(task, model, scheme, training, device, models, stacks, graphs):
    """Return one step of so many stacks of so many models."""
    config = configure(model, scheme, task, training.length, backend="reference")
    seeds = count()
    each = [
        Stack(task, config, training, [next(seeds) for _ in range(models)], device)
        for _ in range(stacks)
    ]

    def step(length):
        for stack in each:
            if graphs:
                stack.step(length)
            else:
                stack.update(length)

    return step


def seconds(step, lengths, device):
    """Return the seconds a step takes, over the given lengths."""
    synchronize(device)
    start = time.perf_counter()
    for length in lengths:
        step(length)
    synchronize(device)
    return (time.perf_counter() - start) / len(lengths)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step, training, device, timed):
    """Return seconds per step over the curriculum and at the longest length, and of capturing."""
    every = [*range(1, training.length + 1)]
    start = time.perf_counter()
    for _ in range(3):
        seconds(step, every, device)
    captured = time.perf_counter() - start
    curriculum = replace(training, steps=timed).lengths()
    return seconds(step, curriculum, device), seconds(step, every[-1:] * timed, device), captured


def ways(options, task, model, training, device):
    """Yield scheme, way, its number of models, and what makes its step."""
    models = [int(each) for each in options.models.split(",")]
    for scheme in options.schemes:
        setting = (task, model, scheme, training, device)
        yield scheme, "loop", 1, partial(loop, *setting)
        ordinary = partial(stacked, *setting, models[0], 1, False)
        yield scheme, f"{models[0]} side by side", models[0], ordinary
        for number in models:
            make = partial(stacked, *setting, number, 1, True)
            yield scheme, f"{number} side by side, graphs", number, make
        for streams in [int(each) for each in options.streams.split(",")]:
            each = options.per_stream
            make = partial(stacked, *setting, each, streams, True)
            yield scheme, f"{streams} streams of {each}, graphs", streams * each, make


def tester(task, model, scheme, training, device):
    """Return a test of the models of all seeds at a length, as `dape chomsky train` makes it."""
    evaluation = Evaluation()
    config = configure(model, scheme, task, training.length, "reference")
    models = Stack(task, config, training, range(SEEDS), device)
    if not models.tests_together(task.tokens(evaluation.longest)):
        config = configure(model, scheme, task, training.length)
        models = OneByOne(
            [build(config, len(task.outputs), s).to(device).eval() for s in range(SEEDS)]
        )

    def test(length):
        sample = task.sample(single(length, evaluation.samples, device), length)
        accuracy(models, sample, length, evaluation.batch_tokens)

    return test


def sweep(task, model, scheme, training, device):
    """Return about how many seconds a test at all lengths up to 500 takes, for a model."""
    test, longest = tester(task, model, scheme, training, device), Evaluation().longest
    lengths = range(25, longest + 1, 50)
    seconds(test, lengths, device)  # compiles kernels
    return longest * seconds(test, lengths, device) / SEEDS


def split(options, task, model, training, device):
    """Print the seconds of every part of a training of three seeds, by scheme."""
    every = [*range(1, training.length + 1)]
    draw = Draw(
        [torch.Generator(device).manual_seed(seed) for seed in range(SEEDS)], training.batch_size
    )
    drawn = seconds(lambda length: task.sample(draw, length), every * 2, device)
    print(f"{SEEDS} models; a draw of examples by itself takes {1e3 * drawn:.2f} ms")
    records = []
    for scheme in options.schemes:
        config = configure(model, scheme, task, training.length, "reference")
        begun = time.perf_counter()
        stack = Stack(task, config, training, range(SEEDS), device)
        synchronize(device)
        start = time.perf_counter() - begun
        first, second = (len(every) * seconds(stack.step, every, device) for _ in range(2))
        curriculum = replace(training, steps=options.steps).lengths()
        step, longest = (
            seconds(stack.step, lengths, device) for lengths in (curriculum, every[-1:] * 50)
        )
        record = {
            **{"scheme": scheme, "start": start, "first": first},
            **{"capture": second, "step": step, "longest": longest},
            "tests": tests(task, model, scheme, training, device),
        }
        records.append(record)
        bands = " ".join(f"{length}: {1e3 * took:.1f}" for length, took in record["tests"])
        print(
            f"{scheme:<16} start {start:.1f} s,"
            f" first steps {first:.1f} s, capture {second:.1f} s, step {1e3 * step:.2f} ms"
            f" (longest {1e3 * longest:.2f}), test of all models by length, ms: {bands}",
            flush=True,
        )
    return records


def tests(task, model, scheme, training, device):
    """Return pairs of a length and the seconds that a test of the models of all seeds takes."""
    test = tester(task, model, scheme, training, device)
    lengths = [500, 400, 300, 200, 100, 40, 10]
    seconds(test, lengths, device)  # compiles kernels
    return [(length, seconds(test, [length] * 3, device)) for length in lengths]


def prices(options, model, training, device, origin):
    """Measure steps and tests for the plan, and write the file after each."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    file, origin = Path(options.prices), {**settings, **origin}
    held = json.loads(file.read_text()) if file.is_file() else {}
    same = all(held.get(name) == origin[name] for name in ("commit", "device", *SETTINGS))
    known = held["prices"] if same else []
    measured = {(each["task"], each["scheme"]) for each in known}
    for name, scheme in product(PRICED, options.schemes):
        if (name, scheme) in measured:
            continue
        setting = (TASKS[name], model, scheme, training, device)
        step = stacked(*setting, SEEDS, 1, True)
        every = [*range(1, training.length + 1)] * 2
        start = len(every) * seconds(step, every, device)
        took = seconds(step, replace(training, steps=options.steps).lengths(), device)
        test = sweep(*setting)
        price = {"start": start, "step": took, "test": test}
        known.append({"task": name, "scheme": scheme, "models": SEEDS, **price})
        write_json(file, {"prices": known, **origin})
        print(
            f"{name:<20} {scheme:<16} start {start:>5.1f} s, {SEEDS / took:>8.1f} model steps/s,"
            f" {test:>6.1f} s a test",
            flush=True,
        )


def compare(options, task, model, training, device):
    """Time every way to train every scheme, and tests if asked for; print and return records."""
    print(
        f"{'scheme':<16} {'way':<32} {'steps/s':>8} {'models/s':>9} {'longest':>9} "
        f"{'h / 495 runs':>12} {'GiB':>6} {'set-up s':>8}"
    )
    records = []
    for scheme, way, models, make in ways(options, task, model, training, device):
        record = {"scheme": scheme, "way": way, "models": models}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            took, longest, captured = measure(make(), training, device, options.steps)
        except (RuntimeError, NotImplementedError) as error:
            record["failed"] = str(error).splitlines()[0]
            print(f"{scheme:<16} {way:<32} failed: {record['failed']}", flush=True)
            records.append(record)
            continue
        gib = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0
        record |= {"seconds": took, "seconds_longest": longest, "capture": captured, "gib": gib}
        hours = RUNS * STEPS * took / models / GPUS / 3600
        print(
            f"{scheme:<16} {way:<32} {1 / took:>8.1f} {models / took:>9.1f} "
            f"{models / longest:>9.1f} {hours:>12.2f} {gib:>6.1f} {captured:>8.1f}",
            flush=True,
        )
        records.append(record)
    for scheme in options.schemes if options.evaluation else ():
        took = sweep(task, model, scheme, training, device)
        print(f"{scheme:<16} about {took:.0f} s to test a model at lengths 1 to 500", flush=True)
        records.append({"scheme": scheme, "way": "test", "seconds": took})
    return records


def parse(argv):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="reverse-string")
    parser.add_argument("--schemes", type=lambda text: text.split(","))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--models", default="1,3,9,27")
    parser.add_argument("--streams", default="2,4")
    parser.add_argument("--per-stream", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--evaluation", action="store_true", help="time the test of a model too")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--prices", help="JSON file of the prices of the plan, to write or complete"
    )
    parser.add_argument("--split", action="store_true", help="time the parts of a training")
    options = parser.parse_args(argv)
    options.schemes = options.schemes or [*(SCHEMES if options.prices else COMPARED)]
    return options


def main(argv=None):
    options = parse(argv)
    check_writable(*(Path(file) for file in (options.out, options.prices) if file))
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    device, task = torch.device(options.device), TASKS[options.task]
    model = Model(hidden_size=options.width)
    training = Training(length=options.length, batch_size=options.batch_size)
    origin = provenance(device)
    print(f"{origin['device']}, {task.name}, width {options.width}, {options.precision}")
    if options.prices:
        prices(options, model, training, device, origin)
        return
    name, timed = ("split", split) if options.split else ("ways", compare)
    records = timed(options, task, model, training, device)
    if options.out:
        write_json(Path(options.out), {"options": vars(options), name: records, **origin})


if __name__ == "__main__":
    main()
