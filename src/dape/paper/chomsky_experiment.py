"""The experiment on the Chomsky hierarchy: encoders, and the claims of the paper about them."""

from pathlib import Path

from dape.paper.chomsky import Above, BestOf, Near
from dape.paper.claims import Claim
from dape.paper.encoders import GROUPS, Encoders
from dape.paper.experiment import Experiment

CHOMSKY = Experiment(
    name="chomsky",
    title="Fifteen tasks of the Chomsky hierarchy",
    shows="section 4.7 and Table 2",
    parts=(Encoders(GROUPS),),
    claims=(
        Claim(
            "DAPE-X is above X on the tasks in which the order matters",
            "section 4.7",
            (
                Above("dape-alibi", "alibi", "11 of 11"),
                Above("dape-kerple", "kerple", "10 of 11"),
                Above("dape-fire", "fire", "11 of 11"),
            ),
        ),
        Claim(
            "A DAPE is best on the tasks in which the order matters",
            "section 4.7",
            (BestOf("10 of 11"),),
        ),
        Claim(
            "DAPE-ALiBi has 50.30 on Parity Check and 99.38 on Bucket Sort",
            "section 4.7",
            (
                Near("parity-check", "dape-alibi", 50.30),
                Near("bucket-sort", "dape-alibi", 99.38),
            ),
        ),
        Claim(
            "V2 is above Kerple on the tasks in which the order matters",
            "DAPE V2, from a third party's notes",
            (Above("dape3-kerple", "kerple", "8 of 11"),),
        ),
        Claim(
            "FIRE is above Kerple, and Kerple above ALiBi",
            "section 4.7, which counts 14 tasks",
            (
                Above("fire", "kerple", "9 of 14"),
                Above("kerple", "alibi", "11 of 14"),
            ),
        ),
    ),
    home=Path("results/chomsky"),
    sections=("scores", "lengths", "training", "maps"),
)
