"""Pictures of encodings: the part of position in a scheme, without data.

The numbers come from the modules of a model, called at the drawn positions.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dape.errors import UserError
from dape.evaluate.compare import split
from dape.figures import bias_maps
from dape.figures.bias_maps import DISTANCE, Map, Row
from dape.figures.view import View
from dape.positions.absolute import Learned
from dape.positions.adapter import DAPE, Rows, TransformerXL
from dape.positions.rotary import RandomizedRoPE, RoPE
from dape.positions.scheme import ADAPTERS, BASES, PLACES, Scheme, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESOLUTION = 512  # positions along a side of a matrix, at most: a panel has no more pixels

# Positions of queries and keys to [heads, query, key].
Values = Callable[[Tensor, Tensor], Tensor]
Modules = Mapping[str, Any]


def draw(name: str, view: View) -> "Figure":
    """Draw a scheme over the distance from the last position, and as a matrix.

    | place | drawn |
    |---|---|
    | bias | B by head |
    | bias under `dape-bias` | also B + f(B), because no score enters f |
    | rotation | the score of q = k = (1, .., 1) / sqrt(d), in total and by pair of dimensions |
    | embedding | the cosine between the embeddings of two positions, and the embeddings |
    | Transformer-XL's terms | the terms at q = k = 0, v . W r(i - j) / sqrt(d) |

    Raises:
        UserError: for an unknown scheme, or a scheme without a picture.
    """
    scheme = resolve(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(view.seed)
        modules = {place: scheme.build(place, view.dimensions, {}) for place in PLACES}
        rows = _rows(name, modules, view)
    built = [type(module) for module in modules.values() if module is not None]
    knows_length = any("train_length" in inspect.signature(each).parameters for each in built)
    return bias_maps.draw(
        rows,
        _title(scheme),
        _caption(scheme, modules, view),
        mark=view.train_length if knows_length else None,
    )


def _rows(name: str, modules: Modules, view: View) -> list[Row]:
    """Return the drawing of the only place of a scheme with a picture."""
    embedding, rotation, bias, adapter = (modules[place] for place in PLACES)
    base = split(name)[1]
    if bias is not None:
        rows = [_bias_row("$B$", bias, view)]
        if _sees_bias_alone(adapter):
            rows.append(_bias_row("$B + f(B)$", _adapted(bias, adapter), view))
        return rows
    if view.matrices and (rotation or embedding):
        raise UserError(f"matrices: {base} is equal for all heads; leave matrices out")
    if rotation is not None:
        return [_rotation_row(base, rotation, view)]
    if embedding is not None:
        return [_embedding_row(base, embedding, view)]
    if isinstance(adapter, TransformerXL):
        return [_bias_row(r"$v \cdot W r(i - j) / \sqrt{d}$", _without_data(adapter), view)]
    reason = "no place depends on position"
    if adapter is not None:
        reason = "the adapter depends on the scores alone"
    raise UserError(f"{name!r} cannot be drawn without data: {reason}")


def _sees_bias_alone(adapter: nn.Module | None) -> bool:
    return isinstance(adapter, DAPE) and adapter.inputs == "bias"


def _bias_row(label: str, values: Values, view: View) -> Row:
    every, some = torch.arange(view.length), _sample(view.length)
    lines = values(every[-1:], every)[:, 0].flip(-1)
    matrices = values(some, some)
    return Row(
        label,
        {f"head {head}": line.numpy() for head, line in enumerate(lines, 1)},
        [_matrix(f"{label}, head {head}", matrices[head - 1], some) for head in view.shown],
        by_head=True,
    )


def _adapted(bias: Values, adapter: DAPE) -> Values:
    """Return the logits at scores of zero."""

    def values(query: Tensor, key: Tensor) -> Tensor:
        found = bias(query, key)
        return adapter(torch.zeros_like(found)[None], found)[0]

    return values


def _without_data(adapter: TransformerXL) -> Values:
    """Return the logits at queries and keys of zero."""

    def values(query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros(1, adapter.num_heads, max(len(query), len(key)), adapter.head_dim)
        scores = torch.zeros(1, adapter.num_heads, len(query), len(key))
        rows = Rows(
            query=zero[:, :, : len(query)],
            key=zero[:, :, : len(key)],
            query_positions=query,
            key_positions=key,
            visible=torch.ones_like(scores[:, :1], dtype=torch.bool),
            scale=adapter.head_dim**-0.5,
        )
        return adapter(scores, scores, rows)[0]

    return values


def _rotation_row(name: str, rotation: RoPE, view: View) -> Row:
    """Return the scores of vectors (1, .., 1): the cosine of the angle for each turned pair."""
    every, some = torch.arange(view.length), _sample(view.length)
    lines = {}
    if name != "rope":
        lines["rope"] = _products(RoPE(view.head_dim), view, every).sum(-1).numpy()
    products = _products(rotation.eval(), view, every)
    lines[name] = products.sum(-1).numpy()
    if isinstance(rotation, RandomizedRoPE):
        trained = _products(rotation.train(), view, torch.arange(view.train_length))
        lines["a draw in training"] = trained.sum(-1).numpy()
    pairs = products[:, : rotation.width].unflatten(-1, (2, -1)).sum(1) * (view.head_dim / 2)
    query, key = _turned(rotation.eval(), view, some)
    maps = [
        Map(
            "each pair alone",
            pairs.T.numpy(),
            (DISTANCE, every.numpy()),
            ("pair, from the fastest", np.arange(rotation.width // 2)),
        ),
        _matrix("score", query @ key.T, some),
    ]
    return Row(r"score of $q = k = (1, ..., 1) / \sqrt{d}$", lines, maps)


def _products(rotation: RoPE, view: View, positions: Tensor) -> Tensor:
    """Return the terms of the dimensions in the scores of the last query, [distance, head_dim]."""
    query, key = _turned(rotation, view, positions)
    return (query[-1] * key).flip(0)


def _turned(rotation: RoPE, view: View, positions: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.ones(1, 1, len(positions), view.head_dim, dtype=torch.float64)
    query, key = rotation(ones / view.head_dim**0.5, ones / view.head_dim**0.5, positions)
    return query[0, 0], key[0, 0]


def _embedding_row(name: str, embedding: nn.Module, view: View) -> Row:
    length = min(view.length, view.train_length) if isinstance(embedding, Learned) else view.length
    every = torch.arange(length)
    width = view.dimensions["hidden_size"]
    vectors = embedding(torch.zeros(1, length, width, dtype=torch.float64), every)[0]
    directions = nn.functional.normalize(vectors, dim=-1)
    some = _sample(length)
    chosen = directions[some]
    maps = [
        Map(
            "embeddings",
            vectors[some, ::2].T.numpy(),
            ("position", some.numpy()),
            ("even dimension", np.arange(0, width, 2)),
        ),
        _matrix("cosine", chosen @ chosen.T, some),
    ]
    lines = {name: (directions @ directions[-1]).flip(0).numpy()}
    return Row("cosine of two embeddings", lines, maps)


def _sample(length: int) -> Tensor:
    """Return positions from the first to the last, at most as many as a panel has pixels."""
    return torch.linspace(0, length - 1, min(length, RESOLUTION)).round().long()


def _matrix(title: str, values: Tensor, positions: Tensor) -> Map:
    """Return a map of the visible keys by query."""
    hidden = positions[None, :] > positions[:, None]
    axis = positions.numpy()
    masked = np.ma.masked_array(values.numpy(), hidden.numpy())
    return Map(title, masked, ("key position $j$", axis), ("query position $i$", axis))


def _title(scheme: Scheme) -> str:
    adapter, base = split(scheme.name)
    if not adapter:
        return _cited(scheme)
    return f"{scheme.name}: {_cited(ADAPTERS[adapter])} on {_cited(BASES[base])}"


def _cited(scheme: Scheme) -> str:
    return f"{scheme.name} [{scheme.paper}, {scheme.year}]"


def _caption(scheme: Scheme, modules: Modules, view: View) -> str:
    """Return the formula from the docstring of the class, and notes for a reader."""
    place = next(place for place in PLACES if modules[place] is not None)
    drawn, options = modules[place], getattr(scheme, place).options
    notes = [(inspect.getdoc(drawn) or "").partition("\n")[0].replace("`", "")]
    if options:
        notes.append(f"With {', '.join(f'{name} = {value}' for name, value in options.items())}.")
    if place != "adapter" and not drawn.relative:
        notes.append("Lines show the last query.")
    if place == "rotation":
        notes.append("A model learns the weights of the pairs.")
    if place == "adapter":
        notes.append("Only the terms at q = k = 0 are drawn.")
    elif _sees_bias_alone(modules["adapter"]):
        notes.append("Below: B + f(B), because f sees B alone.")
    elif modules["adapter"] is not None:
        notes.append(f"The adapter {split(scheme.name)[0]} depends on the scores and is not drawn.")
    if [*drawn.parameters()] or _sees_bias_alone(modules["adapter"]):
        notes.append(f"Learnable parameters are drawn before training, with seed {view.seed}.")
    notes.append(f"Reads past the training length: {scheme.extrapolates}.")
    return " ".join(notes)
