"""The papers' formulas, one query at a time: what the package must equal.

Nothing here comes from the package. Tensors are taken in whatever dtype they have (tests use
float64), gradients by autograd through these loops. A row of scores is A [heads, keys]; `seen` are
the keys its query may see, in order.
"""

import math

import torch


def alibi_slopes(heads):
    """2^(-8 h / n) for n a power of two; else those of the one below, and half of the next."""

    def geometric(n):
        return [2.0 ** (-8 * h / n) for h in range(1, n + 1)]

    below = 1
    while 2 * below <= heads:
        below *= 2
    return torch.tensor((geometric(below) + geometric(2 * below)[::2])[:heads], dtype=torch.float64)


def alibi(slopes):
    return lambda distance: -slopes[:, None] * distance


def kerple(p, a):
    return lambda distance: -p[:, None] * torch.log(1 + a[:, None] * distance)


def leaky_relu(x):
    return torch.where(x > 0, x, 0.01 * x)


def see(inputs, scores, bias):
    """What f sees, channels first."""
    if inputs == "concat":
        return torch.cat([scores, bias])
    return {"sum": scores + bias, "bias": bias, "scores": scores}[inputs]


def dape(w1, b1, w2, b2, inputs="concat", residual=True):
    """DAPE: A + B + W2 leaky(W1 [A; B] + b1) + b2, and the paper's variants."""

    def logits(scores, bias, seen):
        scores, bias = scores[:, seen], bias[:, seen]
        hidden = leaky_relu(w1 @ see(inputs, scores, bias) + b1[:, None])
        base = scores + bias if residual else scores
        return base + w2 @ hidden + b2[:, None]

    return logits


def talking_heads(p):
    """S + P S for S = A + B."""

    def logits(scores, bias, seen):
        s = (scores + bias)[:, seen]
        return s + p @ s

    return logits


def dape_v2(w1, b1, w2, b2, inputs="concat", residual=True):
    """DAPE V2: both layers sum over taps; zeros before the first key, masked keys past the last."""
    taps = w1.shape[2]
    reach = taps // 2

    def logits(scores, bias, seen):
        x = see(inputs, scores, bias)

        first, size = seen[0] - 2 * reach, seen[-1] - seen[0] + 1
        line = torch.zeros(len(x), size + 4 * reach, dtype=x.dtype)
        line[:, [j - first for j in seen]] = x[:, seen]
        length = size + 2 * reach  # from `reach` keys before the first to as many past the last
        taken = sum(w1[:, :, t] @ line[:, t : t + length] for t in range(taps))
        units = leaky_relu(b1[:, None] + taken)
        units = torch.cat([torch.zeros_like(units[:, :reach]), units[:, reach:]], dim=1)
        change = b2[:, None] + sum(w2[:, :, t] @ units[:, t : t + size] for t in range(taps))
        base = scores + bias if residual else scores
        return base[:, seen] + change[:, [j - seen[0] for j in seen]]

    return logits


def attention(
    query, key, value, visible, query_positions, key_positions, bias=None, logits=None, scale=None
):
    """softmax over the visible keys, row by row; [B, H, Tq, d] to [B, H, Tq, dv], and the weights.

    `visible` and the positions are [B, Tq, Tk], [B, Tq] and [B, Tk]; `bias` maps distances [Tk] to
    [H, Tk], and `logits(A, B, seen)` gives the logits of the seen keys: A + B without.
    """
    batch, heads, rows, width = query.shape
    group = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = query.new_zeros(batch, heads, rows, value.shape[3])
    all_weights = query.new_zeros(batch, heads, rows, key.shape[2])
    visible = visible.tolist()
    for b in range(batch):
        for i in range(rows):
            seen = [j for j in range(key.shape[2]) if visible[b][i][j]]
            if not seen:
                continue
            a = torch.stack([key[b, h // group] @ query[b, h, i] * scale for h in range(heads)])
            distance = (query_positions[b, i] - key_positions[b]).abs().to(a.dtype)
            shift = torch.zeros_like(a) if bias is None else bias(distance)
            s = (a + shift)[:, seen] if logits is None else logits(a, shift, seen)
            weights = torch.exp(s - s.detach().amax(1, keepdim=True))
            weights = weights / weights.sum(1, keepdim=True)
            for h in range(heads):
                out[b, h, i] = weights[h] @ value[b, h // group, seen]
                all_weights[b, h, i, seen] = weights[h].detach()
    return out, all_weights
