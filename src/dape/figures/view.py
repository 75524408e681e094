"""The sizes of a model for the drawing of an encoding."""

from dataclasses import dataclass
from typing import Annotated

from dape.errors import UserError, check_whole
from dape.strict import default

LARGEST = 2**16  # of a size


@dataclass(frozen=True, slots=True)
class View:
    """The sizes of a model for the drawing of an encoding, and the drawn range.

    Raises:
        UserError: for a size below the minimum, or an unknown head.
    """

    heads: int = 12
    """number of heads"""
    head_dim: int = 64
    """width of a head; the model is `heads` times as wide"""
    train_length: int = 128
    """training length L in tokens, for encodings that depend on L"""
    length: int = 512
    """number of positions to draw"""
    matrices: Annotated[tuple[int, ...], default("the first, a middle head and the last")] = ()
    """heads, from 1, drawn as a matrix"""
    seed: int = 0
    """seed of learnable parameters, drawn before training"""

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        for name, least in (("heads", 1), ("head_dim", 1), ("train_length", 2), ("length", 2)):
            check_whole(least, **{name: getattr(self, name)})
            if getattr(self, name) > LARGEST:
                raise UserError(f"{name}={getattr(self, name)} must be at most {LARGEST}")
        check_whole(0, seed=self.seed)
        for head in self.matrices:
            if not 1 <= head <= self.heads:
                raise UserError(f"matrices: head {head} is not one of 1 to {self.heads}")

    @property
    def shown(self) -> list[int]:
        """Return the heads drawn as a matrix."""
        return list(self.matrices) or sorted({1, (self.heads + 1) // 2, self.heads})

    @property
    def dimensions(self) -> dict[str, int]:
        """Return the dimensions for the modules of a scheme."""
        return {
            "num_heads": self.heads,
            "head_dim": self.head_dim,
            "hidden_size": self.heads * self.head_dim,
            "train_length": self.train_length,
        }
