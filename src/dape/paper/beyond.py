"""The experiments beyond the paper, except `smollm2`, the experiment on a model of others."""

from pathlib import Path

from dape.paper.experiment import Experiment
from dape.paper.sweep import Arm, Sweep, schemes
from dape.paper.tuning import Tuning
from dape.positions import scheme

DEMO = Experiment(
    name="demo",
    title="Two models of bytes on a CPU",
    shows="the demonstration of the README with three seeds",
    parts=(
        Sweep(
            *("demo", ("python-stdlib",), (64,), schemes("kerple", "dape-kerple"), (0, 1, 2)),
            tokens=(1_638_400,),
            reads="64,...,1024",
        ),
    ),
    home=Path("results/demo"),
)
# Bases without a bias that the experiment also trains with DAPE.
WITHOUT_BIAS = ("nope", "rope")
SCHEMES = Experiment(
    name="schemes",
    title="Every encoding, and every form of adapter on one of them",
    shows="how far each encoding of the package reads",
    parts=(
        Sweep(
            *("cpu", ("python-stdlib",), (128,)),
            schemes(
                *scheme.BASES,
                *(
                    f"dape-{x}"
                    for x, base in scheme.BASES.items()
                    if base.bias or x in WITHOUT_BIAS
                ),
                *(f"{adapter}-kerple" for adapter in scheme.ADAPTERS if adapter != "dape"),
            ),
            tokens=(1_638_400,),
            reads="128,512,2048,8192,16384",
            options=("--blocks", "1"),
        ),
    ),
    home=Path("results/schemes"),
)
WHOLE = {"model.adapter": None, "model.train": "all"}
ADAPTERS = {"optimizer.learning_rate": 3e-2}
YARN = {"model.config": {"scheme": "yarn", "scheme_options": {"rotation": {"factor": 16}}}}
RETROFIT = Experiment(
    name="retrofit",
    title="A RoPE model trained at 512, then for 5 % of its steps more",
    shows="DAPE as an addition to a model that is there",
    # Rates are the best of three or four by the validation loss of seed 0 at 2,048 tokens: 3e-5 to
    # 3e-4 for the whole model, to 1e-3 as YaRN, and 3e-3 to 3e-2 for adapters.
    parts=(
        Tuning(
            base=Sweep(
                *("retrofit", ("books",), (512,)),
                *((Arm("base", {"model.scheme": "rope"}),), (0, 1, 2), (65_536_000,)),
            ),
            recipe="recipes/retrofit.yaml",
            options={"training.steps": 100},
            arms=(
                Arm(
                    "plain-512", {**WHOLE, "optimizer.learning_rate": 1e-4, "training.length": 512}
                ),
                Arm("plain-2048", {**WHOLE, "optimizer.learning_rate": 1e-4}),
                Arm("yarn-2048", {**WHOLE, "optimizer.learning_rate": 3e-4, **YARN}),
                Arm("dape-512", {**ADAPTERS, "training.length": 512}),
                Arm("dape-2048", ADAPTERS),
                Arm("yarn-dape-2048", {**ADAPTERS, **YARN}),
            ),
        ),
    ),
    home=Path("results/retrofit"),
)
