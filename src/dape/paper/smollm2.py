"""The experiment on SmolLM2-135M, a pretrained model of others, read beyond its length."""

from pathlib import Path

from dape.paper.cells import Regime
from dape.paper.claims import Better, Claim
from dape.paper.experiment import Experiment
from dape.paper.sweep import Arm, Measure, Options
from dape.paper.tuning import Pretrained

TRAINED, LENGTH, LONGEST = 8_192, 16_384, 65_536
STEP = 2 * LENGTH  # tokens
FACTOR, THETA, HEAD_DIM = LONGEST / TRAINED, 100_000.0, 64
# NTK-aware: the slowest pair turns FACTOR times slower, the fastest as before.
SLOWER = THETA * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2))
NTK = {"model.config": {"rope_parameters": {"rope_type": "default", "rope_theta": SLOWER}}}
YARN = {
    "model.config": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": THETA,
            "factor": FACTOR,
            "original_max_position_embeddings": TRAINED,
        }
    }
}
BARE: Options = {"model.adapter": None, "model.train": "all"}
UNTRAINED: Options = {**BARE, "training.steps": 0}
# Of the rates tried below, the best by the validation loss, for the whole model and for adapters.
WHOLE_RATE, ADAPTER_RATE = 1e-4, 1e-2
WHOLE: Options = {**BARE, "optimizer.learning_rate": WHOLE_RATE}
ADAPTERS: Options = {"optimizer.learning_rate": ADAPTER_RATE}
# A + f(B): what f of the bias does without the scores.
BLIND: Options = {"model.options": {"adapter": {"inputs": "bias"}}}
OPTIONS: Options = {
    "training.batch_size": STEP // LENGTH,
    "hardware.micro_batch_size": 1,
    "tracking.validation_batches": 16,
}
RECIPE, FOLDER, CORPUS = "recipes/retrofit.yaml", "models/smollm2", "books-smollm2"
RATES = Pretrained(
    folder=FOLDER,
    regime=Regime("135m", CORPUS, LENGTH, 24 * STEP),
    recipe=RECIPE,
    arms=(
        *(
            Arm(f"plain-{rate}", {**BARE, "optimizer.learning_rate": float(rate)}, 0.7)
            for rate in ("3e-5", "1e-4", "3e-4")
        ),
        *(
            Arm(f"dape-kerple-{rate}", {"optimizer.learning_rate": float(rate)}, 1.2)
            for rate in ("3e-3", "1e-2", "3e-2")
        ),
    ),
    options=OPTIONS,
)
REGIME = Regime("135m", CORPUS, LENGTH, 96 * STEP)
NUMBERS = (
    *("eval", "retrieval", "{run}", "--tasks", "passkey,needle", "--trials", "5"),
    *("--lengths", f"2048,...,{LONGEST // 2}"),
)


def _arms(arms: tuple[Arm, ...], seeds: tuple[int, ...]) -> Pretrained:
    """Return arms with seeds, measured at short, trained and longer lengths."""
    return Pretrained(
        folder=FOLDER,
        regime=REGIME,
        recipe=RECIPE,
        arms=arms,
        options=OPTIONS,
        seeds=seeds,
        reads=f"256,...,{LONGEST}",
        words=("--blocks", "1"),
        measures=(Measure(NUMBERS, ("retrieval/passkey.json", "retrieval/needle.json")),),
    )


def _better(candidate: str, baseline: str) -> Claim:
    """Return the claim that an arm is better at the length of the training and beyond."""
    return Claim(
        f"{candidate} is better than {baseline} at the training length, 2 and 4 times as far",
        "a question of ours",
        tuple(Better(candidate, baseline, REGIME, times) for times in (1, 2, 4)),
    )


# Minutes are estimates.
SMOLLM2 = Experiment(
    name="smollm2",
    title="SmolLM2-135M-Instruct of 4 bits, trained at 8,192, read up to 65,536",
    shows="DAPE as an addition to a pretrained model of others",
    parts=(
        _arms(
            (
                Arm("as-it-is", UNTRAINED, 0.9),
                Arm("ntk-untrained", {**UNTRAINED, **NTK}, 0.9),
                Arm("yarn-untrained", {**UNTRAINED, **YARN}, 0.9),
            ),
            seeds=(0,),
        ),
        _arms(
            (
                Arm("plain", WHOLE, 1.9),
                Arm("yarn", {**WHOLE, **YARN}, 1.9),
                Arm("dape-kerple", ADAPTERS, 5.0),
                Arm("blind", {**ADAPTERS, **BLIND}, 2.4),
                Arm("yarn-dape-kerple", {**ADAPTERS, **YARN}, 6.3),
            ),
            seeds=(0, 1, 2),
        ),
        RATES,
    ),
    claims=(
        _better("dape-kerple", "plain"),
        _better("dape-kerple", "yarn"),
        _better("dape-kerple", "blind"),
        _better("yarn-dape-kerple", "yarn"),
    ),
    home=Path("results/retrofit"),
    sections=("curves", "retrievals"),
)
