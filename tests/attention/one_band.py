"""A mixer on one band, forward and backward, beside what `naive` makes of the same scores."""

import torch

from dape.attention.fused import naive
from dape.attention.fused.geometry import Scratch, bands
from dape.attention.fused.problem import Problem
from dape.attention.fused.rows import Rows
from dape.attention.fused.terms import Mixed


def problem_of(terms, heads, rows, keys, offset, causal, masked, dtype=torch.float32):
    query, key = (torch.zeros(2, heads, n, 16, dtype=dtype) for n in (rows, keys))
    mask = torch.arange(keys) >= torch.tensor([[0], [3]]) if masked else None
    return Problem(query, key, key, terms, mask, 1.0, causal, offset)


def solutions(mixer):
    """Return logits, P, dA and the gradients of the terms: the mixer's, and the formula's."""
    problem, terms = mixer.problem, mixer.terms
    (band,) = bands(problem)
    batch, heads, rows, _ = problem.query.shape
    keys = problem.key.shape[2]
    scores, grads = torch.randn(2, batch, heads, rows, keys)
    scores, grads = (x.to(problem.scratch) for x in (scores, grads - torch.randn(heads, rows, 1)))
    i, j = torch.arange(rows) + problem.offset, torch.arange(keys)
    seen = torch.ones(batch, 1, rows, keys, dtype=torch.bool)
    if problem.causal:
        seen &= j <= i[:, None]
    if problem.mask is not None:
        seen &= problem.mask[:, None, None]

    def in_scratch(values):
        view = Scratch.of(problem, (band,)).view(band).fill_(float("nan"))
        padded = torch.zeros(*values.shape[:3], view.shape[2] * 64, dtype=values.dtype)
        padded[..., :keys] = values
        return view.copy_(padded.unflatten(3, (-1, 64)).permute(0, 2, 3, 1, 4))

    def values(x):
        found = x.permute(0, 3, 1, 2, 4).flatten(3)[..., :keys].float()
        return found.masked_fill(~seen, 0)

    leaves = [x.float().clone().requires_grad_() for x in (scores, *terms)]
    given = type(terms)(*leaves[1:])
    if isinstance(terms, Mixed):  # C holds W2 phi(U), through which U has a gradient, W2 none here
        of_hidden = given.weight_out.detach() @ naive.phi(given.hidden).t()
        given = given._replace(static=given.static + of_hidden - of_hidden.detach())
    true = naive.logits(given, leaves[0], i, j, seen)
    lse = true.logsumexp(3).detach()
    rows_of = Rows(lse, lse, lse, lse, None, torch.ones(()))
    weights = (true - lse[..., None]).exp().masked_fill(~seen, 0).detach()
    ds = weights * grads.float()  # dP - delta
    true_grads = torch.autograd.grad(true.masked_fill(~seen, 0), leaves, ds)

    x = in_scratch(scores)
    logits = values(mixer.mix(x, band))
    if mixer.static is not None:
        tables = mixer.static.unflatten(0, (-1, heads))
        c = tables[0][:, (i[:, None] - j).abs()]
        for first, table in enumerate(tables[1:]):  # the first two keys have tables of their own
            c[..., first] = table[:, (i - first).abs()]
        logits = (logits + c).masked_fill(~seen, 0)
    slots, into = mixer.slots(), type(terms)(*map(torch.empty_like, terms))
    p, da = mixer.mix_backward(in_scratch(scores), in_scratch(grads), band, rows_of, slots)
    mixer.gradients(slots, rows_of.unit, into)
    found = [logits, values(p), values(da), *into]
    return found, [true.detach().masked_fill(~seen, 0), weights, *true_grads]
