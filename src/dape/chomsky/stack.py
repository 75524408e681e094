"""Encoders of equal shape, with different seeds, trained side by side on a model axis.

Small models leave a GPU idle. Therefore the parameters of all models lie in a tensor
`[models, parameters]`, and `torch.func` maps a forward pass over the tensor. An update is captured
as a CUDA graph per length of the curriculum, with the drawing of examples inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from dape.chomsky.encoder import Encoder, Noise, build
from dape.chomsky.graphs import Graphs
from dape.chomsky.heads import served, serves
from dape.chomsky.mapped import (
    Method,
    block_of,
    flatten,
    padded,
    repeated,
    stacked,
    views,
    within,
)
from dape.chomsky.task import Draw, Sample, Task, generator

if TYPE_CHECKING:
    from dape.model.configuration import DapeConfig

NOISE = 2**32  # added to a seed for dropout and randomised positions
PART = 8  # examples of a product of weights; see `Stack.forward`
PAIRS = 2**25  # queries and keys at a time in tests; a pair has 32 bytes of scores


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of the training: Adam at a constant rate on fresh examples."""

    steps: int = 50_000
    """number of updates"""
    batch_size: int = 128
    """examples in an update, all of equal length"""
    length: int = 40
    """longest training input; lengths are uniform from 1"""
    learning_rate: float = 3e-4
    """constant rate of Adam"""
    clip: float = 1.0
    """largest norm of the gradient"""
    dropout: float = 0.1
    """fraction of activations dropped where a block adds to the stream, in training only"""
    precision: Literal["fp32", "tf32"] = "fp32"
    """precision of matrix products on a GPU"""

    def lengths(self) -> list[int]:
        """Return the requested lengths of the updates, equal for all tasks, schemes and seeds."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.length + 1, (self.steps,), generator=generator).tolist()


class Stack:
    """The models of some seeds, in training.

    Model k starts, draws and learns as in a separate training. Parameters, examples and noise
    follow from `seeds[k]`. The examples are equal for all schemes.

    Attributes:
        flat: the parameters, `[models, parameters]`.
        losses: sums of the models' losses over the updates since `read_losses`.
        fused: whether a kernel computes DAPE's map across heads.

    """

    def __init__(
        self,
        task: Task,
        config: "DapeConfig",
        training: Training,
        seeds: Sequence[int],
        device: torch.device | str,
    ) -> None:
        self.task, self.training, self.seeds = task, training, list(seeds)
        self.device = torch.device(device)
        models = [build(config, len(task.outputs), seed) for seed in seeds]
        self._shapes = {name: p.shape for name, p in models[0].named_parameters()}
        by_block = groupby(self._shapes.items(), lambda item: item[0].split(".")[:2])
        self._blocks = [dict(shapes) for _, shapes in by_block]
        rows = [flatten(model) for model in models]
        self.flat = torch.stack(rows).to(self.device).requires_grad_()
        self.encoder: Encoder = models[0].to(self.device).train()
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            [self.flat], lr=training.learning_rate, fused=on_gpu, capturable=on_gpu
        )
        self._data, self._noise = (
            [generator(seed + offset, self.device) for seed in seeds] for offset in (0, NOISE)
        )
        self._draw = Draw(self._data, training.batch_size)
        self.losses = torch.zeros(len(self.seeds), device=self.device)
        self._graphs = Graphs([*self._data, *self._noise])
        self._captures = on_gpu
        self._embed = stacked(Method(self.encoder, Encoder.embed), (0, None, 1))
        self._read = stacked(Method(self.encoder, Encoder.read), (0, None))
        self._layer_names = [name for name, _ in self.encoder.layers[0].named_parameters()]
        self._layer = block_of(config)
        self.fused = serves(self.flat) and any(map(served, self.encoder.modules()))

    def parameters(
        self, flat: Float[Tensor, "models parameters"]
    ) -> dict[str, Float[Tensor, "models ..."]]:
        """Return the parameters by name, views of `flat`."""
        return views(flat, self._shapes)

    def _copies(
        self, flat: Float[Tensor, "models parameters"], copies: int
    ) -> dict[str, Float[Tensor, "copies ..."]]:
        """Return some copies of each model's parameters by name.

        The parameters of a block lie side by side, in equal places for every task.
        """
        sizes = [sum(map(padded, shapes.values())) for shapes in self._blocks]
        found: dict[str, Tensor] = {}
        for shapes, piece in zip(self._blocks, flat.split(sizes, dim=1), strict=True):
            found |= views(repeated(piece, copies), shapes)
        return found

    def model(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a model, to load into an `Encoder`."""
        with torch.no_grad():
            return {name: p[index].clone() for name, p in self.parameters(self.flat).items()}

    def update(self, length: int) -> None:
        """Draw a batch of a requested length for every model and take a step of Adam."""
        sample = self.task.sample(self._draw, length)
        loss = self.loss(sample, self._noise)
        loss.sum().backward()  # the loss of a model depends on no other model's parameters
        gradient = self.flat.grad
        assert gradient is not None
        norm = gradient.norm(dim=1, keepdim=True)
        gradient *= (self.training.clip / (norm + 1e-6)).clamp(max=1)
        self.optimizer.step()
        self.flat.grad = None
        self.losses += loss.detach()

    def loss(self, sample: Sample, noise: Sequence[torch.Generator]) -> Float[Tensor, " models"]:
        """Return the cross-entropy by model, the mean over the output symbols, fillers included."""
        models, out = len(self.seeds), sample.outputs.shape[1]
        inputs = sample.inputs.unflatten(0, (models, -1))
        tokens, dropout = inputs.shape[2] + out, self.training.dropout
        drawn = self.encoder.noise(noise, inputs.shape[1], tokens, dropout)
        logits = self.forward(self.flat, inputs, out, drawn)
        entropy = cross_entropy(logits.flatten(0, 2), sample.outputs.flatten(), reduction="none")
        return entropy.view(models, -1).mean(1)

    def forward(
        self,
        flat: Float[Tensor, "models parameters"],
        inputs: Int[Tensor, "models batch length"],
        out: int,
        noise: Noise,
    ) -> Float[Tensor, "models batch out classes"]:
        """Return the logits of every model on separate inputs and noise.

        Every `PART` examples have a copy of their model's weights. The gradient of a weight is then
        a sum of many short products. A single product over the batch has few outputs and a long
        sum, and keeps few processors of a GPU busy. On an H200 a step of three RoPE models takes
        8.6 ms with a part of 128 examples, 5.2 with 16, 5.0 with 8 and 5.1 with 4 (reverse-string,
        inputs of 20 symbols).
        """
        models, batch = inputs.shape[:2]
        parts = batch // PART if torch.is_grad_enabled() and batch % PART == 0 else 1
        keep, positions = noise
        if keep is not None:  # a model's part of the batch lies beside the models
            keep = keep.transpose(0, 1).unflatten(2, (parts, -1)).flatten(1, 2)
        if positions is not None:
            positions = repeated(positions, parts).transpose(0, 1).contiguous()
        noise = Noise(keep, positions)
        of = self._copies(flat, parts)
        inputs = inputs.unflatten(1, (parts, -1)).flatten(0, 1)
        hidden = self._embed(within("encoder", of), inputs, out, keep)
        for index in range(len(self.encoder.layers)):
            its = {name: of[f"layers.{index}.{name}"] for name in self._layer_names}
            hidden = self._layer(its, hidden, *noise.layer(index))
        logits: Tensor = self._read(within("encoder", of), hidden, out)
        return logits.unflatten(0, (models, parts)).flatten(1, 2)

    def tests_together(self, tokens: int) -> bool:
        """Return whether tests side by side are fast, and an example of some tokens fits memory."""
        return self.fused and len(self.seeds) * tokens**2 <= PAIRS

    @torch.no_grad()
    def answers(
        self, inputs: Int[Tensor, "batch length"], out: int, generator: torch.Generator
    ) -> Int[Tensor, "models batch out"]:
        """Return the output symbols of every model, without dropout."""
        models, tokens = len(self.seeds), inputs.shape[1] + out
        positions = self.encoder.noise([generator], len(inputs), tokens).positions
        noise = Noise(positions=None if positions is None else positions.expand(models, -1, -1))
        pieces = -(-models * len(inputs) * tokens**2 // PAIRS)
        logits = [
            self.forward(self.flat, piece.expand(models, -1, -1), out, noise)
            for piece in inputs.tensor_split(min(pieces, len(inputs)))
        ]
        return torch.cat([each.argmax(-1) for each in logits], 1)

    def step(self, length: int) -> None:
        """Make an update, on a GPU as a graph from the second update of a length on."""
        if self._captures:
            self._graphs.run(length, self.update)
        else:
            self.update(length)

    def read_losses(self) -> list[float]:
        """Return the sums of the models' losses since the last call; waits for the device."""
        self.synchronize()
        found: list[float] = self.losses.tolist()
        self.losses.zero_()
        self.synchronize()  # the updates run on a separate stream
        return found

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> dict[str, Any]:
        """Return the state for a resumed training."""
        return {
            "flat": self.flat.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generators": [each.get_state() for each in (*self._data, *self._noise)],
            "losses": self.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        with torch.no_grad():
            self.flat.copy_(state["flat"])
        self.optimizer.load_state_dict(state["optimizer"])
        for own, saved in zip((*self._data, *self._noise), state["generators"], strict=True):
            own.set_state(saved)
        self.losses.copy_(state["losses"])
