"""A call of attention by a backend, and by the textbook, against float64."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from drawn_calls import DTYPES, TAPS, Call, cuts, given, modules, tensors_of
from torch import Tensor

import dape
from dape.attention import call as attention_call
from dape.attention import parallel
from dape.attention.call import widened
from dape.attention.fused.overflow import LARGEST_SCORE, LARGEST_SUM
from dape.errors import UserError
from dape.positions.adapter import Rows

# What an error may be beside the yardstick's, relative to the size of the tensor.
SLACK = {"bf16": 4e-3, "fp16": 2e-3, "fp32": 1e-4}
TIMES = 4.0
# Draws of the tensors of a call for the textbook's error.
DRAWS = 3


class SoftmaxValue(torch.autograd.Function):
    """softmax(S) V with the roundings of a fused kernel: P, O, and dS = P (dP - dO O)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, visible: Tensor, value: Tensor) -> Tensor:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1).masked_fill(~visible, 0)
        out = (weights.to(value.dtype).to(weights) @ value.to(weights)).to(value.dtype)
        ctx.save_for_backward(weights, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, value, out = ctx.saved_tensors
        rounded, wide = weights.to(value.dtype).to(weights), grad.to(weights)
        mean = (wide * out).sum(-1, keepdim=True)
        shift = weights * (wide @ value.to(weights).mT - mean)
        return shift.to(value.dtype).to(weights), None, (rounded.mT @ wide).to(value.dtype)


class InHalf(torch.autograd.Function):
    """Scores in fp16, as the scratch of the kernels holds them; the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return scores.half().to(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def textbook(call: attention_call.Call, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by the formula, rounded as a fused kernel of the dtype does.

    If `narrow`, the scores that an adapter of a 16-bit call sees are rounded to fp16, unless scores
    or log-sum-exps leave the range in which the kernels keep them so.
    """
    value, visible = call.value, call.visible()
    query, key, _ = widened(call.query, call.key, value)
    group, positions = query.shape[1] // key.shape[1], call.positions()
    scores = query @ key.repeat_interleave(group, 1).mT * call.scale
    shift = torch.zeros_like(scores[0]) if call.bias is None else call.bias(*positions)
    shift = shift.to(scores.dtype)

    def logits_of(scores: Tensor) -> Tensor:
        if call.adapter is None:
            return scores + shift
        if not getattr(call.adapter, "needs_rows", False):
            return call.adapter(scores, shift)
        return call.adapter(scores, shift, Rows(query, key, *positions, visible, call.scale))

    def log_sum(logits: Tensor) -> Tensor:
        return logits.masked_fill(~visible, torch.finfo(logits.dtype).min).logsumexp(-1)

    seen, logits = visible.any(-1), logits_of(scores)
    if narrow and call.adapter is not None and value.element_size() == 2:
        sizes = scores.detach().abs().max(), log_sum(logits.detach()).where(seen, 0).abs().max()
        if sizes[0] <= LARGEST_SCORE and sizes[1] <= LARGEST_SUM:
            logits = logits_of(InHalf.apply(scores))
    out = SoftmaxValue.apply(logits, visible, value.repeat_interleave(group, 1))
    return out, log_sum(logits).masked_fill(~seen, -math.inf)


def solve(
    call: Call, attend: str, dtype: torch.dtype, device: str, draw: int = 0
) -> dict[str, Tensor]:
    """Return output, log-sum-exp and gradients by name, by a backend or the textbook."""
    torch.manual_seed(call.seed)
    parts = tuple(m and m.to(device) for m in modules(call))
    tensors, (cotangent, of_lse) = tensors_of(call, device, draw)
    if dtype == torch.float64:
        parts = tuple(m and copy.deepcopy(m).double() for m in parts)
    tensors = [x.to(dtype).detach().requires_grad_() for x in tensors]
    asked = given(call, tensors, parts, draw)
    if attend == "textbook":
        table = call.shape.fire or call.shape.form in TAPS  # in the scratch, too large with a level
        out, lse = textbook(asked, not (call.level and call.bias != "none" and table))
    elif call.parts > 1:
        out, lse, _ = parallel.attend(asked, cuts(call), call.lse, attend)
    else:
        found = dape.attention(
            *tensors, *parts, asked.causal, asked.scale, asked.query_offset, attend,
            key_offset=asked.key_offset, mask=asked.mask, query_positions=asked.query_positions,
            key_positions=asked.key_positions, return_lse=call.lse,
        )  # fmt: skip
        out, lse = found if call.lse else (found, None)
    leaves = dict(zip(("query", "key", "value"), tensors, strict=True))
    for place, module in zip(("bias", "adapter"), parts, strict=True):
        if module is not None:
            leaves |= {f"{place}.{name}": x for name, x in module.named_parameters()}
    total, results = (out * cotangent.to(out.dtype)).sum(), {"output": out.detach()}
    if call.lse:
        results["lse"] = lse.detach()
        total = total + (lse.masked_fill(lse == -math.inf, 0) * of_lse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a call: its worst tensor, and that error over the one it may have."""

    call: Call
    outcome: str  # right, off, not finite, refused, crashed
    ratio: float = 0.0
    detail: str = ""


def judge(call: Call, device: str) -> Verdict:
    """Return the verdict on a call."""
    dtype = DTYPES[call.shape.dtype]
    try:
        found = solve(call, call.backend, dtype, device)
    except UserError as error:
        return Verdict(call, "refused", detail=str(error))
    except Exception as error:
        return Verdict(call, "crashed", detail=f"{type(error).__name__}: {error}"[:300])
    exact = solve(call, "textbook", torch.float64, device)
    if call.lse and not torch.equal(found["lse"] == -math.inf, exact["lse"] == -math.inf):
        return Verdict(call, "off", math.inf, "lse of rows without keys")
    bad = [name for name, x in visible(found).items() if not x.isfinite().all()]
    if bad:
        return Verdict(call, "not finite", math.inf, bad[0])
    errors, theirs = errors_of(found, exact), yardstick(call, exact, dtype, device)
    ratios = {name: errors[name] / least_error(call, name, exact, theirs) for name in exact}
    name = max(ratios, key=lambda name: ratios[name])
    return Verdict(call, "off" if ratios[name] > TIMES else "right", ratios[name], name)


def yardstick(
    call: Call, exact: dict[str, Tensor], dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Return the textbook's errors by name, the root of their mean square over some draws."""
    found = []
    for draw in range(DRAWS):
        true = solve(call, "textbook", torch.float64, device, draw) if draw else exact
        found.append(errors_of(solve(call, "textbook", dtype, device, draw), true))
    return {name: math.hypot(*(x[name] for x in found)) / math.sqrt(DRAWS) for name in exact}


def errors_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the norms of differences by name."""
    pairs = zip(visible(found).items(), visible(exact).values(), strict=True)
    return {name: (x.double() - true).norm().item() for (name, x), true in pairs}


def visible(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same with 0 for the log-sum-exp of rows that see nothing."""
    return {
        name: x.masked_fill(x == -math.inf, 0) if name == "lse" else x for name, x in found.items()
    }


def least_error(
    call: Call, name: str, exact: dict[str, Tensor], yardsticks: dict[str, float]
) -> float:
    """Return the yardstick of a tensor, and some digits of its size.

    Gradients may vanish: the size is no less than a tenth of what is usual among those of its
    module, or that of numbers of order one. float32 itself holds large logits to some digits only.
    """
    exact = visible(exact)
    true, place = exact[name], name.partition(".")[0]
    module = [x for other, x in exact.items() if other.partition(".")[0] == place]
    square = sum(x.square().sum().item() for x in module) / sum(x.numel() for x in module)
    least = max(1.0 if "." in name else 0.5, 0.1 * math.sqrt(square)) * math.sqrt(true.numel())
    size, scale = max(true.norm().item(), least), call.scale
    scale = 1 / math.sqrt(call.shape.head_dim) if scale is None else abs(scale)
    logit = call.scores**2 * call.shape.head_dim * scale / 4
    slack = (SLACK[call.shape.dtype] + 3e-7 * (abs(call.level) + logit)) * size / TIMES
    return min(yardsticks[name], size) + slack


def judge_long(call: Call, device: str) -> Verdict:
    """Return whether all is finite, and the first and last rows as in float64.

    float32 itself does not tell neighbours apart where a bias is beyond 1e5.
    """
    try:
        found = solve(call, call.backend, DTYPES[call.shape.dtype], device)
    except Exception as error:
        return Verdict(call, "crashed", detail=f"{type(error).__name__}: {error}"[:300])
    bad = [name for name, x in found.items() if not x.isfinite().all()]
    if bad:
        return Verdict(call, "not finite", math.inf, bad[0])
    output = found.pop("output")
    found.clear()  # the float64 of keys and values needs the room
    loose = call.bias in ("alibi", "kerple-power") and call.shape.form != "none"
    error = max(error_of_rows(call, output, start, device) for start in (0, call.rows - 2))
    return Verdict(call, "off" if error > 0.05 and not loose else "right", error / 0.05, "output")


def error_of_rows(call: Call, output: Tensor, start: int, device: str) -> float:
    """Return the relative error of two rows of an output, a key head at a time in float64."""
    torch.manual_seed(call.seed)
    parts = tuple(m and m.to(device).double() for m in modules(call))
    (query, key, value), _ = tensors_of(call, device)
    rows = query[:, :, start : start + 2]
    with torch.no_grad():
        exact = dape.attention(
            *(x.double() for x in (rows, key, value)), *parts, causal=call.shape.causal,
            query_offset=call.offset + start, backend="chunked",
        )  # fmt: skip
    return ((output[:, :, start : start + 2].double() - exact).norm() / exact.norm()).item()
