"""The compared ways to compute attention, by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from dape.attention.operator import attention
from dape.attention.select import BACKENDS
from dape.bench import flex
from dape.bench.attempt import Outcome, attempt
from dape.bench.case import DIRECTIONS, YARDSTICK, Attend, Case, Inputs, Parts
from dape.bench.record import Missing
from dape.errors import UserError, unknown

CHUNK = 512  # query rows of a block of `chunked-compiled`


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compute attention; a `plain` method leaves out bias and adapter.

    `prepare` raises a `UserError` with the reason if the method cannot express a case.
    """

    name: str
    what: str
    prepare: Callable[[Case, Parts], Attend]
    plain: bool = False

    def parts(self, parts: Parts) -> Parts:
        """Return the computed part of a scheme, for tables."""
        return Parts() if self.plain else parts


def chosen(names: Sequence[str]) -> list[Method]:
    """Return methods by name, by default all; the divisor of ratios comes first.

    Raises:
        UserError: for an unknown name.
    """
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    return [METHODS[name] for name in dict.fromkeys([YARDSTICK, *(names or METHODS)])]


def each_direction(
    method: Method, case: Case, parts: Parts, action: Callable[[Attend, str], Outcome]
) -> Iterator[tuple[str, Outcome | Missing]]:
    """Yield the result of an action on a method, or the reason of a failure, by direction."""
    prepared = attempt(partial(method.prepare, case, parts))
    for direction in DIRECTIONS:
        if isinstance(prepared, Missing):
            yield direction, prepared
        else:
            yield direction, attempt(partial(action, prepared, direction))


def sdpa(only: SDPBackend | None, case: Case, parts: Parts) -> Attend:
    """Return PyTorch's attention, by a given backend or by PyTorch's choice."""
    if only is SDPBackend.CUDNN_ATTENTION and case.device.type != "cuda":
        raise UserError("cuDNN needs a CUDA GPU")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with nullcontext() if only is None else sdpa_kernel(only):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


def sdpa_default(inputs: Inputs) -> str:
    """Return the name of PyTorch's backend for some inputs."""
    return SDPBackend(torch._fused_sdp_choice(*inputs[:3], is_causal=True)).name


def ours(backend: str, case: Case, parts: Parts) -> Attend:
    """Return a backend of `dape.attention`."""
    reason = BACKENDS[backend].absent()
    if reason is not None:
        raise UserError(reason)
    attend: Any = partial(attention, bias=parts.bias, adapter=parts.adapter, backend=backend)
    return attend


def textbook_compiled(case: Case, parts: Parts) -> Attend:
    """Return the textbook under `torch.compile`."""
    torch.compiler.reset()  # the compiler would give up after a few lengths
    return torch.compile(ours("reference", case, parts), dynamic=False)


def chunked_compiled(case: Case, parts: Parts) -> Attend:
    """Return the textbook on blocks of query rows, with a compiled graph for all, checkpointed.

    Every block sees whole rows of keys, because fewer keys would need a graph per block.
    """
    torch.compiler.reset()
    block = torch.compile(ours("reference", case, parts), dynamic=False)
    offsets = [torch.full((), n, device=case.device) for n in range(0, case.length, CHUNK)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Nothing is random, and a CUDA graph may not ask for the state of the generator.
        recomputed = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        each = recomputed if torch.is_grad_enabled() else block
        blocks = zip(query.split(CHUNK, dim=2), offsets, strict=True)
        return torch.cat([each(q, key, value, query_offset=n) for q, n in blocks], dim=2)

    return attend


METHODS = {
    method.name: method
    for method in (
        Method(
            YARDSTICK,
            "PyTorch's attention, PyTorch's choice",
            partial(sdpa, None),
            plain=True,
        ),
        Method("sdpa-cudnn", "by cuDNN", partial(sdpa, SDPBackend.CUDNN_ATTENTION), plain=True),
        Method(
            "sdpa-flash", "by FlashAttention", partial(sdpa, SDPBackend.FLASH_ATTENTION), plain=True
        ),
        Method("textbook", "whole score matrices", partial(ours, "reference")),
        Method("textbook-compiled", "the same under torch.compile", textbook_compiled),
        Method("chunked", "blocks of query rows", partial(ours, "chunked")),
        Method("chunked-compiled", f"blocks of {CHUNK} rows, compiled", chunked_compiled),
        Method("flex", "FlexAttention, the bias by formula", flex.by_formula),
        Method("flex-table", "FlexAttention, the bias by a table of distances", flex.by_table),
        Method("triton", "fused kernels in Triton", partial(ours, "triton")),
        Method("cuda", "fused kernels in CUDA", partial(ours, "cuda")),
    )
}
