"""Looks of figures: a theme, and a fixed colour, dash and marker for every scheme."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dape.evaluate.compare import split
from dape.files import whole
from dape.positions.scheme import ADAPTERS, BASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# An encoding has a fixed colour in all figures, with and without an adapter: the ten colours of
# seaborn's palette "colorblind" in order, then the ten colours darkened, and darkened again.
_FIRST = (
    *("kerple", "alibi", "fire", "rope", "cope", "sandwich", "xpos", "nope", "learned", "t5"),
    *("kerple-power", "sinusoidal", "transformer-xl", "yarn", "dynamic-ntk"),
    *("partial-rope", "randomized-rope", "pi", "ntk"),
)
ENCODINGS = (*_FIRST, *(name for name in BASES if name not in _FIRST))
DARKENED = 0.55
_MARKERS = {
    "dape": "o",
    "dape3": "s",
    "dape5": "D",
    "dape7": "^",
    "dape-add": "v",
    "dape-concat": "P",
    "dape-bias": "X",
    "talking-heads": "p",
}
MARKERS = _MARKERS | dict(zip((x for x in ADAPTERS if x not in _MARKERS), "*h<>dH8", strict=False))
SOLID, DASHED = "", (3, 1.5)
ACCENT = "#555555"

THEME: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": ACCENT,
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.figsize": (6.4, 3.6),
    "font.size": 9,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "dape",
    "xtick.color": ACCENT,
    "ytick.color": ACCENT,
}


@contextmanager
def theme() -> Iterator[None]:
    """Draw with the theme of `dape` inside, and restore the user's theme."""
    import seaborn
    from matplotlib import rc_context

    settings: dict[Any, Any] = {**seaborn.axes_style("ticks"), **THEME}
    with rc_context(settings):
        yield


def save(figure: "Figure", target: Path | BytesIO, **options: Any) -> None:
    """Save a figure, whole or not at all, in the format of the suffix.

    Fonts of a PDF and names in an SVG are chosen on saving. An SVG has no date, and a repeated
    drawing gives an equal file.
    """
    with theme():
        if not isinstance(target, Path):
            figure.savefig(target, **options)
            return
        if target.suffix == ".svg":
            options = {"metadata": {"Date": None}, **options}
        with whole(target) as partial:
            figure.savefig(partial, format=target.suffix.removeprefix("."), **options)


def looks(schemes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return palette, dashes and markers of labels for seaborn's `lineplot`, from schemes.

    The colour stands for the encoding. Lines are dashed without an adapter, and solid with an
    adapter, whose marker stands for the adapter. A label gets a free colour, bright ones first, if
    the encoding has no fixed colour, or if the looks are taken. A label equal to the scheme comes
    first and then the alphabet, whatever the order of the labels.
    """
    parts = {label: _parts(scheme) for label, scheme in schemes.items()}
    colours = palette()
    fixed = {ENCODINGS.index(each) for _, each in parts.values() if each in ENCODINGS}
    places: dict[str, int] = {}
    for label in sorted(parts, key=lambda label: (label != schemes[label], label)):
        adapter, encoding = parts[label]
        own = [ENCODINGS.index(encoding)] if encoding in ENCODINGS else []
        taken = {place for other, place in places.items() if not own or parts[other][0] == adapter}
        candidates = [*own, *sorted(range(len(colours)), key=lambda place: place in fixed)]
        free = (place for place in candidates if place not in taken)
        places[label] = next(free, candidates[0])
    return {
        "palette": {label: colours[place] for label, place in places.items()},
        "dashes": {label: SOLID if adapter else DASHED for label, (adapter, _) in parts.items()},
        "markers": {label: MARKERS.get(adapter, "o") for label, (adapter, _) in parts.items()},
    }


def _parts(scheme: str) -> tuple[str, str]:
    """Return adapter and encoding, also of a pretrained model such as `rope + dape-kerple`."""
    encoding, _, mounted = scheme.partition(" + ")
    if mounted:
        return split(mounted)[0] or mounted, encoding
    return split(scheme.removesuffix(" fine-tuned"))


def palette() -> list[tuple[float, float, float]]:
    """Return the colours of encodings and labels, as red, green and blue."""
    import seaborn

    bright = seaborn.color_palette("colorblind")
    shades = (DARKENED**n for n in range(1 + (len(ENCODINGS) - 1) // len(bright)))
    return [(shade * r, shade * g, shade * b) for shade in shades for r, g, b in bright]
