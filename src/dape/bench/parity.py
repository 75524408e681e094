"""Checks of a method: output and gradients against float64."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dape.attention.call import visibility
from dape.bench.case import DTYPES, Attend, Case, Inputs, Parts, build, draw, step
from dape.bench.methods import Method, each_direction
from dape.bench.record import Check, Missing
from dape.errors import UserError
from dape.positions.adapter import Rows, adapted

# Most scores of a check, and of a block in float64, to limit time and memory.
SCORES = {"cpu": 2**24, "cuda": 2**32}
SCORES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**25}
# Allowed errors beside twice the error of the textbook in the same dtype.
SLACK = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}
# A gradient that is zero in exact arithmetic, such as the gradient of a constant added to every
# key, is measured relative to the usual gradient of the module, and must stay below a tenth.
ZERO, ZERO_LIMIT = 1e-9, 0.1

# `output`, and the gradients of `query`, `key`, `value`, `bias.raw_p`, ...
Named = Mapping[str, Tensor]


def check_all(
    cases: Sequence[Case], methods: Sequence[Method], announce: Callable[[Check], None]
) -> list[Check]:
    """Return the checks of all methods at all lengths, in all directions.

    Raises:
        UserError: for a wrong method, after all checks.
    """
    checks = []
    for case in cases:
        for check in checks_at(case, methods):
            announce(check)
            checks.append(check)
    for check in checks:
        refuse(check, cases[0].dtype)
    return checks


def refuse(check: Check, dtype: str) -> None:
    """Raise a `UserError` for a wrong method, naming the worst tensor."""
    if check.missing or check.within(name := check.worst):
        return
    what = name if name == "output" else f"the gradient of {name}"
    raise UserError(
        f"{check.method} is wrong at length {check.length:,}, {check.direction}: {what} is "
        f"{check.errors[name]:.1e} from float64, more than {check.limits[name]:.1e}, twice the "
        f"textbook's error in {dtype} and {SLACK[dtype]:g}; wrong methods are not timed; "
        f"mend {check.method}, or leave {check.method} out of --methods"
    )


def checks_at(case: Case, methods: Sequence[Method]) -> Iterator[Check]:
    """Yield the checks at a length, or at a shorter length where float64 would take too long."""
    small = case.at_most(SCORES[case.device.type])
    parts, (inputs,) = build(small), draw(small, 1)
    truths: dict[bool, Truth] = {}
    for method in methods:
        if method.plain not in truths:
            truths[method.plain] = Truth.of(small, method.parts(parts), inputs)
        truth = truths[method.plain]
        for direction, found in each_direction(method, small, truth.parts, truth.errors_of):
            place = (method.name, case.length, direction, small.batch, small.length)
            if isinstance(found, Missing):
                yield Check(*place, missing=found)
            else:
                yield Check(*place, found, {name: truth.limits[name] for name in found})


@dataclass(frozen=True, slots=True)
class Truth:
    """Output and gradients in float64 for some inputs, and the allowed errors."""

    parts: Parts
    inputs: Inputs
    tensors: Named
    limits: Mapping[str, float]

    @classmethod
    def of(cls, case: Case, parts: Parts, inputs: Inputs) -> "Truth":
        """Return the truth of a case, with limits from the textbook in the case's dtype."""
        exact = by_rows(case, parts, inputs, torch.float64)
        textbook = errors(by_rows(case, parts, inputs, DTYPES[case.dtype]), exact)
        limits = {
            name: ZERO_LIMIT if vanishes(name, exact) else 2 * error + SLACK[case.dtype]
            for name, error in textbook.items()
        }
        return cls(parts, inputs, exact, limits)

    def errors_of(self, attend: Attend, direction: str) -> dict[str, float]:
        """Return the errors of a method: of the output, and in training of gradients."""
        found = step(attend, self.inputs, self.parts, direction)
        return errors(dict(zip(self.tensors, found, strict=False)), self.tensors)


def by_rows(case: Case, parts: Parts, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return output and gradients by the textbook in a dtype, in blocks of query rows.

    Memory holds a single block. Results of blocks are summed in float64.
    """
    if dtype == torch.float64:
        parts = Parts(*(module and copy.deepcopy(module).double() for module in parts))
    *qkv, cotangent = (x.detach().to(dtype) for x in inputs)
    query, key, value = (x.requires_grad_() for x in qkv)
    leaves = {"query": query, "key": key, "value": value} | parts.named_parameters
    gradients = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in leaves.items()}
    outputs = []
    budget = SCORES_PER_BLOCK[case.device.type] // (case.batch * case.heads * case.length)
    height = max(1, budget)
    for start in range(0, case.length, height):
        stop = min(start + height, case.length)
        seen = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
        out = eager(parts, *seen, start)
        given = torch.autograd.grad(out, list(leaves.values()), cotangent[:, :, start:stop])
        for total, gradient in zip(gradients.values(), given, strict=True):
            total += gradient
        outputs.append(out.detach().double())
    return {"output": torch.cat(outputs, dim=2), **gradients}


def eager(parts: Parts, query: Tensor, key: Tensor, value: Tensor, offset: int) -> Tensor:
    """Return the output by the arithmetic of the paper's code, with products rounded to the dtype.

    The result is a yardstick for 16 bits. `dape.attention` keeps scores and weights in float32.
    """
    rows, keys = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    visible = visibility(len(rows), len(keys), None, True, offset, query.device)
    scale = 1 / math.sqrt(query.shape[3])
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    shift = torch.zeros_like(scores[0])
    if parts.bias is not None:
        shift = parts.bias(rows + offset, keys).to(scores.dtype)
    block = Rows(query, key, rows + offset, keys, visible, scale)
    logits = adapted(parts.adapter, scores, shift, block)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype) @ value


def errors(found: Named, exact: Named) -> dict[str, float]:
    """Return the relative Frobenius error of every tensor."""
    return {
        name: ((x.double() - exact[name]).norm() / size(name, exact)).item()
        for name, x in found.items()
    }


def size(name: str, exact: Named) -> float:
    """Return the norm for relative errors: of the tensor, or the usual norm in the module."""
    return usual(name, exact) if vanishes(name, exact) else exact[name].norm().item()


def vanishes(name: str, exact: Named) -> bool:
    """Return whether a tensor is zero up to rounding."""
    return exact[name].norm().item() <= ZERO * usual(name, exact)


def usual(name: str, exact: Named) -> float:
    """Return the norm of a tensor of this size, with the mean square of the module's gradients."""
    place = name.partition(".")[0]
    module = [x for other, x in exact.items() if other.partition(".")[0] == place]
    square = sum(x.square().sum().item() for x in module) / sum(x.numel() for x in module)
    return math.sqrt(square * exact[name].numel())
