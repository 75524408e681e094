"""The explorer: an HTML page of encodings with sliders, and of a model on a text.

The page repeats the formulas of biases in JavaScript (`explorer/formulas.js`). Initial parameters,
and parameters of a model, come from the modules of `dape`.
"""

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dape.evaluate.passage import Layer, Passage
from dape.figures.report import template_of
from dape.figures.view import View
from dape.positions.bias import FIRE, T5, ALiBi, Bias, Kerple, KerplePower, NoBias, Sandwich
from dape.positions.scheme import BASES

Parameters = dict[str, Any]
SCRIPTS = ("formulas.js", "draw.js", "encodings.js", "model.js")  # in the order of use


class Slider(NamedTuple):
    """A slider for a parameter, from `low` to `high`, on a logarithmic scale with `log`."""

    name: str
    low: float
    high: float
    step: float
    log: bool = False


class Port(NamedTuple):
    """A bias on the page: sliders, and the parameters of a head of a module."""

    sliders: tuple[Slider, ...]
    parameters: Callable[[Any, int], Parameters]


def _fire(bias: FIRE, head: int) -> Parameters:
    return {
        "c": bias.c.item(),
        "L": bias.threshold.item(),
        "weight_in": bias.weight_in[:, 0].tolist(),
        "bias_in": bias.bias_in.tolist(),
        "weight_out": bias.weight_out[head].tolist(),
        "bias_out": bias.bias_out[head].item(),
    }


PORTS: dict[type[Bias], Port] = {
    NoBias: Port((), lambda bias, head: {}),
    ALiBi: Port(
        (Slider("s", 0.001, 1, 0.01, log=True),),
        lambda bias, head: {"s": bias.slopes()[head].item()},
    ),
    Kerple: Port(
        (Slider("p", 0, 8, 0.01), Slider("a", 0.0001, 10, 0.01, log=True)),
        lambda bias, head: {"p": bias.p[head].item(), "a": bias.a[head].item()},
    ),
    KerplePower: Port(
        (Slider("p", 0, 2, 0.01), Slider("a", 0.0001, 10, 0.01, log=True)),
        lambda bias, head: {"p": bias.p[head].item(), "a": bias.a[head].item()},
    ),
    T5: Port(
        (Slider("buckets", 2, 64, 1), Slider("max_distance", 33, 4096, 1, log=True)),
        lambda bias, head: {
            "buckets": bias.num_buckets,
            "max_distance": bias.max_distance,
            "weight": bias.weight[:, head].tolist(),
        },
    ),
    Sandwich: Port(
        (Slider("weight", 0.01, 2, 0.01, log=True), Slider("d_bar", 2, 512, 2)),
        lambda bias, head: {"weight": bias.num_heads / (8 * (head + 1)), "d_bar": bias.d_bar},
    ),
    FIRE: Port(
        (Slider("c", 0.001, 10, 0.01, log=True), Slider("L", 1, 8192, 1, log=True)),
        _fire,
    ),
}


def parameters(bias: nn.Module) -> list[Parameters] | None:
    """Return the parameters by head in float64, None for a bias unknown to the page.

    A bias of a user's class is unknown.
    """
    port = PORTS.get(type(bias))  # type: ignore[arg-type]
    if port is None:
        return None
    wide = deepcopy(bias).double()
    return [port.parameters(wide, head) for head in range(wide.num_heads)]  # type: ignore[arg-type]


def page(view: View, passage: Passage | None = None, origin: Mapping[str, str] = {}) -> str:
    """Return the page: encodings for the model of `view`, and a model's computation on a passage.

    `origin` is the provenance at the foot of the page.
    """
    folder = files("dape.figures") / "explorer"
    content = {
        "encodings": _encodings(view, passage),
        "length": view.length,
        "passage": None if passage is None else _passage(passage),
    }
    return template_of(folder / "page.html").render(
        passage=passage,
        origin=origin,
        scripts=[folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS],
        data=json.dumps(content).replace("<", "\\u003c"),
    )


def _encodings(view: View, passage: Passage | None) -> list[dict[str, Any]]:
    """Return all biases of the page, with formula, sliders and parameters."""
    found = []
    for name, kind in _known().items():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(view.seed)
            module = _built(name, kind, view)
            sets = [{"label": "before training", "heads": parameters(module)}]
            sets += _trained(kind, passage)
        found.append(
            {
                "name": name,
                "kind": kind.__name__,
                "formula": (kind.__doc__ or "").partition("\n")[0].replace("`", ""),
                "sliders": [slider._asdict() for slider in PORTS[kind].sliders],
                "sets": sets,
            }
        )
    return found


def _known() -> dict[str, type[Bias]]:
    """Return the classes of biases by scheme name."""
    kinds = {name: base.bias.module for name, base in BASES.items() if base.bias is not None}
    return {"nope": NoBias, **{name: kind for name, kind in kinds.items() if kind in PORTS}}


def _built(name: str, kind: type[Bias], view: View) -> nn.Module:
    built = BASES[name].build("bias", view.dimensions, {})
    return kind(view.heads) if built is None else built


def _trained(kind: type[Bias], passage: Passage | None) -> list[dict[str, Any]]:
    """Return the parameters of the layers with this bias."""
    return [
        {"label": f"layer {each.layer} of the model", "heads": parameters(each.module)}
        for each in (passage.layers if passage else ())
        if type(each.module) is kind and each.module is not None
    ]


def _passage(passage: Passage) -> dict[str, Any]:
    return {
        "tokens": passage.tokens,
        "layers": [_layer(each) for each in passage.layers],
    }


def _layer(layer: Layer) -> dict[str, Any]:
    parts = {"A": layer.scores, "B": layer.bias, "f": layer.change}
    return {
        "layer": layer.layer,
        "residual": layer.residual,
        "heads": len(layer.scores),
        **{name: packed(values) for name, values in parts.items()},
    }


def packed(values: np.ndarray) -> str:
    """Return numbers as float32, compressed, in base64."""
    raw = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return base64.b64encode(gzip.compress(raw, mtime=0)).decode()
