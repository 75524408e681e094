"""The experiments, in the order in which GPU time is best spent on them."""

from pathlib import Path

from dape.errors import unknown
from dape.paper.experiment import Arm, Experiment, Sweep, schemes

PAIRS = schemes("alibi", "dape-alibi", "kerple", "dape-kerple", "fire", "dape-fire")
MAIN = (*PAIRS, *schemes("rope", "nope", "dape3-kerple"))
FOUR = PAIRS[:4]

CORE = Experiment(
    name="core",
    title="DAPE on three biases, trained at 512",
    shows="Figure 2 (training length 512) and section 4.1",
    sweeps=(Sweep("125m", ("arxiv", "books"), (512,), MAIN),),
)
LENGTHS = Experiment(
    name="lengths",
    title="Trained at 128 and at 1,024",
    shows="Figures 2 and 3",
    sweeps=(
        Sweep("small", ("arxiv",), (128, 1024), MAIN),
        Sweep("125m", ("arxiv",), (128, 1024), FOUR),
    ),
)
EVERY = schemes(
    *("nope", "rope", "yarn", "randomized-rope", "t5", "alibi", "kerple", "sandwich", "fire"),
    *("cope", "transformer-xl", "dape-alibi", "dape-kerple", "dape-fire"),
    *("dape3-kerple", "dape3-alibi", "dape3-fire", "talking-heads-kerple"),
)
ALL = Experiment(
    name="all",
    title="Every encoding of the paper's figures",
    shows="Figure 2 and Table 6",
    sweeps=(
        Sweep("small", ("arxiv",), (128,), EVERY),
        Sweep("small", ("books",), (512,), EVERY),
    ),
)
SIGNIFICANCE = Experiment(
    name="significance",
    title="Is the difference more than chance?",
    shows="Table 5",
    sweeps=(
        Sweep("small", ("arxiv",), (512,), PAIRS, seeds=(0, 1, 2, 3, 4)),
        Sweep("125m", ("arxiv",), (512,), PAIRS[2:4], seeds=(0, 1, 2)),
    ),
)
SIZE = Experiment(
    name="size",
    title="350M beside 125M",
    shows="Figure 4",
    sweeps=(
        Sweep("350m", ("arxiv",), (512,), FOUR),
        Sweep("125m", ("arxiv",), (512,), FOUR),
    ),
)
AMOUNTS = Experiment(
    name="tokens",
    title="How the static bias's rise grows with training",
    shows="a question of ours",
    sweeps=(
        Sweep(
            *("125m", ("mixed",), (128,), PAIRS[2:4]),
            tokens=(50_000_000, 150_000_000, 450_000_000),
        ),
    ),
)
HIDDEN = tuple(
    Arm(
        f"dape-alibi-d{width}",
        {"model.scheme": "dape-alibi", "model.scheme_options": {"adapter": {"hidden": width}}},
    )
    for width in (4, 16, 64)  # dape-alibi itself has 32
)
ABLATION = Experiment(
    name="ablation",
    title="Hidden width, bias ablation and form",
    shows="Figure 6, Table 7, and Figure 5 with section 4.3",
    sweeps=(
        Sweep("small", ("arxiv",), (128,), (*schemes("alibi", "dape-alibi"), *HIDDEN)),
        Sweep("small", ("books",), (512,), schemes("kerple", "dape-bias-kerple", "dape-kerple")),
        Sweep(
            *("small", ("arxiv",), (128, 512)),
            schemes("kerple", "dape-kerple", "dape-concat-kerple", "dape-add-kerple"),
        ),
    ),
)
V2 = Experiment(
    name="v2",
    title="DAPE V2 against V1",
    shows="the tables of DAPE V2, and what its reviewers said",
    sweeps=(
        Sweep(
            *("small", ("arxiv",), (128, 512)),
            (*PAIRS, *schemes("dape3-alibi", "dape3-kerple", "dape3-fire")),
        ),
    ),
)
DEMO = Experiment(
    name="demo",
    title="Two models of bytes on a CPU",
    shows="the demonstration of the README with three seeds",
    sweeps=(
        Sweep(
            *("demo", ("python-stdlib",), (64,), PAIRS[2:4], (0, 1, 2), (1_638_400,)),
            reads="64,...,1024",
        ),
    ),
    home=Path("results/demo"),
)
SCHEMES = Experiment(
    name="schemes",
    title="Every encoding, and every form of adapter on one of them",
    shows="how far each encoding of the package reads",
    sweeps=(
        Sweep(
            *("cpu", ("python-stdlib",), (128,)),
            schemes(
                *("nope", "sinusoidal", "learned", "rope", "partial-rope", "pi", "ntk"),
                *("dynamic-ntk", "yarn", "xpos", "randomized-rope", "alibi", "kerple"),
                *("kerple-power", "t5", "sandwich", "fire", "cope", "transformer-xl"),
                *("dape-nope", "dape-rope", "dape-alibi", "dape-kerple", "dape-kerple-power"),
                *("dape-t5", "dape-sandwich", "dape-fire", "dape3-kerple", "dape5-kerple"),
                *("dape7-kerple", "dape-add-kerple", "dape-concat-kerple", "dape-bias-kerple"),
                "talking-heads-kerple",
            ),
            tokens=(1_638_400,),
            reads="128,512,2048,8192,16384",
            options=("--blocks", "1"),
        ),
    ),
    home=Path("results/schemes"),
)

EXPERIMENTS = {
    each.name: each
    for each in (
        *(CORE, LENGTHS, ALL, SIGNIFICANCE, SIZE, AMOUNTS, ABLATION, V2),
        *(DEMO, SCHEMES),
    )
}


def find(name: str) -> Experiment:
    """Return the experiment of a name.

    Raises:
        UserError: for an unknown name, with the near ones.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
