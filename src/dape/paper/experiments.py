"""The experiments, in the order of their value for GPU time."""

from dape.errors import unknown
from dape.paper.beyond import DEMO, RETROFIT, SCHEMES
from dape.paper.cells import Regime
from dape.paper.chomsky_experiment import CHOMSKY
from dape.paper.claims import Better, Claim, Rise, Uses
from dape.paper.experiment import Experiment
from dape.paper.smollm2 import SMOLLM2
from dape.paper.sweep import USES, Arm, Bench, Options, Sweep, heads, schemes

PAIRS = schemes("alibi", "dape-alibi", "kerple", "dape-kerple", "fire", "dape-fire")
MAIN = (*PAIRS, *schemes("rope", "nope", "dape3-kerple"))
FOUR = PAIRS[:4]
BIASES = ("alibi", "kerple", "fire")


def _against(better: str, worse: str, regime: Regime, *times: int) -> tuple[Better, ...]:
    """Return the checks of an arm against a worse arm, at multiples of the training length."""
    return tuple(Better(better, worse, regime, n) for n in times)


def _pairs(regime: Regime, *times: int, biases: tuple[str, ...] = BIASES) -> tuple[Better, ...]:
    """Return the checks of DAPE on every bias against the bias alone."""
    return tuple(Better(f"dape-{bias}", bias, regime, n) for n in times for bias in biases)


def _steady(*checks: tuple[Regime, int]) -> tuple[Claim, Claim]:
    """Return the claims about Kerple's curve with and without DAPE, up to `times` the length."""
    return (
        Claim(
            "DAPE-Kerple's perplexity does not rise beyond the training length",
            "section 4.1",
            tuple(Rise("dape-kerple", regime, times, rises=False) for regime, times in checks),
        ),
        Claim(
            "Kerple's perplexity rises beyond the training length",
            "section 4.1",
            tuple(Rise("kerple", regime, times, rises=True) for regime, times in checks),
        ),
    )


ARXIV, BOOKS = Regime("125m", "arxiv", 512), Regime("125m", "books", 512)
SMALL_ARXIV, SMALL_BOOKS = Regime("small", "arxiv", 512), Regime("small", "books", 512)
SMALL_LONG = Regime("small", "arxiv", 1024)
SMALL_SHORT, SHORT = Regime("small", "arxiv", 128), Regime("125m", "arxiv", 128)

CORE = Experiment(
    name="core",
    title="DAPE on three biases, trained at 512",
    shows="Figure 2 (training length 512) and section 4.1",
    parts=(Sweep("125m", ("arxiv", "books"), (512,), MAIN),),
    claims=(
        Claim(
            "DAPE-X is better than X within the training length",
            "section 4.1",
            (*_pairs(ARXIV, 1), *_pairs(BOOKS, 1)),
        ),
        Claim(
            "DAPE-X is better than X at 16 times the training length",
            "section 4.1",
            (*_pairs(ARXIV, 16), *_pairs(BOOKS, 16)),
        ),
        *_steady((ARXIV, 16), (BOOKS, 16)),
        Claim(
            "V2 is better than V1 on Kerple at 125M",
            "DAPE V2",
            (
                *_against("dape3-kerple", "dape-kerple", ARXIV, 1, 16),
                *_against("dape3-kerple", "dape-kerple", BOOKS, 1, 16),
            ),
        ),
    ),
)
LENGTHS = Experiment(
    name="lengths",
    title="Trained at 128 and at 1,024",
    shows="Figures 2 and 3",
    parts=(
        Sweep("small", ("arxiv",), (128, 1024), MAIN),
        Sweep("125m", ("arxiv",), (128, 1024), FOUR),
    ),
    claims=(
        Claim(
            "DAPE-X is better than X at 64 times the training length",
            "section 4.1",
            (
                *_pairs(SMALL_SHORT, 64),
                *_pairs(SHORT, 64, biases=BIASES[:2]),
            ),
        ),
        *_steady((SMALL_SHORT, 64), (SHORT, 64)),
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
    parts=(
        Sweep("small", ("arxiv",), (128,), EVERY),
        Sweep("small", ("books",), (512,), EVERY),
    ),
    claims=(
        Claim(
            "DAPE-Kerple is better than CoPE and Transformer-XL at 16 times the training length",
            "Table 6, which is trained at 128",
            tuple(
                Better("dape-kerple", other, regime, 16)
                for regime in (SMALL_SHORT, SMALL_BOOKS)
                for other in ("cope", "transformer-xl")
            ),
        ),
    ),
)
SIGNIFICANCE = Experiment(
    name="significance",
    title="Is the difference more than chance?",
    shows="Table 5",
    parts=(
        Sweep("small", ("arxiv",), (512,), PAIRS, seeds=(0, 1, 2, 3, 4)),
        Sweep("125m", ("arxiv",), (512,), PAIRS[2:4], seeds=(0, 1, 2)),
    ),
    claims=(
        Claim(
            "DAPE-X is better than X within the training length (p < 0.05)",
            "Table 5",
            (*_pairs(SMALL_ARXIV, 1), *_pairs(ARXIV, 1, biases=("kerple",))),
        ),
        Claim(
            "DAPE-X is better than X beyond the training length (p < 0.05)",
            "Table 5",
            (*_pairs(SMALL_ARXIV, 2, 16), *_pairs(ARXIV, 2, 16, biases=("kerple",))),
        ),
    ),
)
SIZE = Experiment(
    name="size",
    title="350M beside 125M",
    shows="Figure 4",
    parts=(
        Sweep("350m", ("arxiv",), (512,), FOUR),
        Sweep("125m", ("arxiv",), (512,), FOUR),
    ),
    claims=(
        Claim(
            "DAPE-X is better than X at 350M too",
            "section 4.2",
            _pairs(Regime("350m", "arxiv", 512), 1, 16, biases=BIASES[:2]),
        ),
    ),
)
TOKENS = (50_000_000, 150_000_000, 450_000_000)
AMOUNTS = Experiment(
    name="tokens",
    title="How the static bias's rise grows with training",
    shows="a question of ours",
    parts=(Sweep("125m", ("mixed",), (128,), PAIRS[2:4], tokens=TOKENS),),
    claims=(
        Claim(
            "Kerple's perplexity rises up to 64 times the training length, at every amount",
            "section 4.1 at 6.6B tokens",
            tuple(
                Rise("kerple", Regime("125m", "mixed", 128, tokens), 64, True, corpus)
                for tokens in TOKENS
                for corpus in ("arxiv", "books")
            ),
        ),
    ),
)
HIDDEN = tuple(
    Arm(
        f"dape-alibi-d{width}",
        {"model.scheme": "dape-alibi", "model.scheme_options": {"adapter": {"hidden": width}}},
    )
    for width in (4, 16, 64)  # dape-alibi has 32
)
# A + f(A + B) is absent from the paper.
BARE_SUM = Arm(
    "dape-add-kerple-bare",
    {"model.scheme": "dape-add-kerple", "model.scheme_options": {"adapter": {"residual": False}}},
)
FIRE_128: Options = {"model.scheme_options": {"bias": {"threshold": 128}}}
THRESHOLD = Experiment(
    name="threshold",
    title="FIRE whose threshold starts at 128 tokens",
    shows="DAPE-FIRE of Figure 3 and section 4.2, as the released settings start the threshold",
    parts=(
        Sweep(
            *("small", ("arxiv",), (512, 1024)),
            (
                *schemes("fire", "dape-fire"),
                Arm("fire-l128", {"model.scheme": "fire", **FIRE_128}),
                Arm("dape-fire-l128", {"model.scheme": "dape-fire", **FIRE_128}),
            ),
        ),
    ),
    claims=(
        Claim(
            "Trained at 1,024, DAPE-FIRE's perplexity does not rise up to 8,192",
            "section 4.1, Figure 3",
            (Rise("dape-fire-l128", SMALL_LONG, 8, rises=False),),
        ),
        Claim(
            "FIRE reads further if the threshold starts below the training length",
            "the released settings",
            tuple(
                Better(f"{arm}-l128", arm, regime, times)
                for arm in ("fire", "dape-fire")
                for regime, times in ((SMALL_ARXIV, 16), (SMALL_LONG, 8))
            ),
        ),
    ),
)
ABLATION = Experiment(
    name="ablation",
    title="Hidden width, bias ablation and form",
    shows="Figure 6, Table 7, and Figure 5 with section 4.3",
    parts=(
        Sweep("small", ("arxiv",), (128,), (*schemes("alibi", "dape-alibi"), *HIDDEN)),
        Sweep("small", ("books",), (512,), schemes("kerple", "dape-bias-kerple", "dape-kerple")),
        Sweep(
            *("small", ("arxiv",), (128, 512)),
            (
                *schemes("kerple", "dape-kerple", "dape-concat-kerple", "dape-add-kerple"),
                BARE_SUM,
            ),
        ),
        # Differences about as large as those between seeds.
        Sweep("small", ("arxiv",), (128,), (*schemes("alibi"), HIDDEN[0]), seeds=(1, 2)),
        Sweep(
            *("small", ("arxiv",), (512,)),
            schemes("dape-kerple", "dape-concat-kerple", "dape-add-kerple"),
            seeds=(1, 2),
        ),
    ),
    claims=(
        Claim(
            "A hidden width of 4 still helps",
            "section 4.4",
            _against("dape-alibi-d4", "alibi", SMALL_SHORT, 1, 64),
        ),
        Claim(
            "A + B + f(A, B) is better than A + B + f(B), and that better than A + B",
            "Table 7",
            (
                *_against("dape-kerple", "dape-bias-kerple", SMALL_BOOKS, 1, 16),
                *_against("dape-bias-kerple", "kerple", SMALL_BOOKS, 1, 16),
            ),
        ),
        Claim(
            "Concatenating scores and bias is better than adding them",
            "section 4.3",
            tuple(
                Better(variant, "dape-add-kerple", regime, times)
                for regime, times in ((SMALL_SHORT, 64), (SMALL_ARXIV, 16))
                for variant in ("dape-kerple", "dape-concat-kerple")
            ),
        ),
    ),
)
TIMED = (
    *("nope", "rope", "t5", "alibi", "kerple", "fire"),
    *("dape-alibi", "dape-kerple", "dape-fire", "dape3-kerple"),
)
COST = Experiment(
    name="cost",
    title="Time and memory of whole models, ours and by the textbook",
    shows="Table 1, whose cells are lost, and section 4.5",
    parts=tuple(
        Bench(size, direction, TIMED, (512, 1024, 2048, 4096, 8192), minutes)
        for size, minutes in (("125m", 1.2), ("350m", 1.5), ("2.7b", 2.0), ("6.7b", 2.5))
        for direction in ("training", "forward", "generation")
    ),
    sections=("costs",),
)
V2 = Experiment(
    name="v2",
    title="DAPE V2 against V1",
    shows="the tables of DAPE V2, and what its reviewers said",
    parts=(
        Sweep(
            *("small", ("arxiv",), (128, 512)),
            (*PAIRS, *schemes("dape3-alibi", "dape3-kerple", "dape3-fire")),
        ),
    ),
    claims=(
        Claim(
            "V2 is better than V1 on Kerple, within and beyond the training length",
            "DAPE V2",
            (
                *_against("dape3-kerple", "dape-kerple", SMALL_SHORT, 1, 64),
                *_against("dape3-kerple", "dape-kerple", SMALL_ARXIV, 1, 16),
            ),
        ),
        Claim(
            "V2 is worse than V1 on ALiBi trained at 128",
            "a review of DAPE V2",
            _against("dape-alibi", "dape3-alibi", SMALL_SHORT, 1, 64),
        ),
    ),
)
LEARNT = Experiment(
    name="learnt",
    title="What was learnt: A, B and f(A, B) of one query",
    shows="Figure 1 and Figures 7 to 21",
    parts=(
        Sweep(
            *("125m", ("arxiv",), (512,), schemes("dape-kerple")),
            measures=(heads(1), heads(4), heads(16)),
        ),
    ),
    sections=("heads",),
)
USE = Experiment(
    name="context",
    title="Is far text used, or does it only do no harm?",
    shows="what section 4.1 says of far text",
    parts=(Sweep("125m", ("arxiv", "books"), (512,), FOUR, measures=(USES,)),),
    claims=(
        Claim(
            "DAPE uses text beyond the training length",
            "section 4.1",
            tuple(Uses(f"dape-{bias}", regime) for regime in (ARXIV, BOOKS) for bias in BIASES[:2]),
        ),
    ),
    sections=("uses",),
)
PAPER = (
    *(CORE, LENGTHS, ALL, SIGNIFICANCE, SIZE, AMOUNTS, ABLATION, THRESHOLD, COST, V2, LEARNT, USE),
    CHOMSKY,
)
EXPERIMENTS = {each.name: each for each in (*PAPER, DEMO, SCHEMES, RETROFIT, SMOLLM2)}


def find(name: str) -> Experiment:
    """Return the experiment of a name.

    Raises:
        UserError: for an unknown name, with near names.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
