"""The papers' formulas once more, for one layer, in numpy and float64, one head and one query at a time."""

from __future__ import annotations

import math

import numpy as np


def attention(queries, keys, scale):
    """[w, Hq, D], [H, n, D] -> [Hq, w, n]: causal softmax of the last w queries over all tokens."""
    w, hq, _ = queries.shape
    heads, n, _ = keys.shape
    out = np.zeros((hq, w, n))
    for h in range(hq):
        for i in range(w):
            seen = n - w + i + 1
            logits = keys[h // (hq // heads), :seen] @ queries[i, h] * scale
            p = np.exp(logits - logits.max())
            out[h, i, :seen] = p / p.sum()
    return out


def pooled(row, size):
    """Average over `size` neighbours, zeros beyond the ends, rescaled to the sum before."""
    n, half = len(row), size // 2
    padded = np.concatenate([np.zeros(half), row, np.zeros(half)])
    out = np.array([padded[j : j + size].mean() for j in range(n)])
    return out * row.sum() / out.sum()


def defensive(queries, keys, values, weight, scale, *, budget, pool=5, mass=0.9, norm="l1", over="tokens"):
    """[H, n - w] scores of DefensiveKV."""
    (w, hq, _), (heads, n, _) = queries.shape, keys.shape
    group, past = hq // heads, n - w
    a = attention(queries, keys, scale)
    power = 1 if norm == "l1" else 2
    norms = np.zeros((heads, past))
    worst = np.zeros((heads, past))
    for kv in range(heads):
        for h in range(kv * group, (kv + 1) * group):
            norms[kv] += np.linalg.norm(values[kv, :past] @ weight[h], ord=power, axis=-1) / group
            for i in range(w):
                worst[kv] = np.maximum(worst[kv], pooled(a[h, i, :past], pool))
        worst[kv] = np.maximum(worst[kv], worst[kv].mean())
    norms /= norms.sum(-1, keepdims=True) if over == "tokens" else norms.sum(0, keepdims=True)
    scores = worst * norms
    forced = []
    for kv in range(heads):
        mean = a[kv * group : (kv + 1) * group].mean((0, 1))
        need, total, taken = mass - mean[past:].sum(), 0.0, []
        for j in sorted(range(past), key=lambda j: -mean[j]):
            if total >= need or len(taken) >= budget - w:
                break
            taken.append(j)
            total += mean[j]
        forced.append(taken)
    top = scores.max()
    for kv, taken in enumerate(forced):
        scores[kv, taken] += 2 * top
    return scores


def rest(queries, keys, values, weight, scale, *, budget, alpha=0.3, beta=2000.0, tau=1.0, group="mean"):
    """[H, n - w] scores of ReST-KV, drift by ranks."""
    (w, hq, _), (heads, n, _) = queries.shape, keys.shape
    past, half = n - w, w // 2
    a = attention(queries, keys, scale)[:, :, :past]
    rows = np.zeros((hq, past))
    for h in range(hq):
        smooth = a[h, 0]
        for i in range(1, w):
            smooth = alpha * a[h, i] + (1 - alpha) * smooth
        v = values[h // (hq // heads), :past]
        o = smooth @ v
        moved = np.linalg.norm((o - v) @ weight[h], axis=-1)
        score = smooth / np.maximum(1 - smooth, 1e-4) * moved**tau
        order = np.argsort(-a[h], axis=-1, kind="stable")[:, : max(1, min(past, budget - w))]
        drift = (order[:half].astype(float) - order[half : 2 * half]).mean()
        step = math.floor(abs(drift) / beta)
        width, shift = max(5, 2 * step + 1), int(np.sign(drift)) * step
        left, right = width // 2 - shift, width // 2 + shift
        at = np.clip(np.arange(past)[:, None] + np.arange(-left, right + 1), 0, past - 1)
        rows[h] = score[at].mean(-1)
    by_group = rows.reshape(heads, -1, past)
    return by_group.mean(1) if group == "mean" else by_group.max(1)


def removal(queries, keys, values, weight, scale):
    """[Hq, n]: norm of the change of the last query's output behind W_O if one token is removed, by brute force."""
    w, hq, _ = queries.shape
    heads, n, _ = keys.shape
    out = np.zeros((hq, n))
    for h in range(hq):
        k, v = keys[h // (hq // heads)], values[h // (hq // heads)]
        logits = k @ queries[w - 1, h] * scale

        def output(rows, logits=logits, v=v):
            p = np.exp(logits[rows] - logits[rows].max())
            return (p / p.sum()) @ v[rows]

        every = output(list(range(n)))
        for j in range(n):
            less = output([i for i in range(n) if i != j])
            out[h, j] = np.linalg.norm((less - every) @ weight[h])
    return out


def proto(queries, keys, scale, *, budget, reach, anchors, chunks, bucket):
    """Kept past tokens of each KV head, as sets: whole clusters by mean attention, the last one cut by attention.

    `bucket(keys [p, D])` gives the hash of the anchors (random numbers are the implementation's).
    """
    w, (heads, n, _) = queries.shape[0], keys.shape
    past, kept = n - w, []
    a = attention(queries, keys, scale)
    for kv in range(heads):
        mean = a.reshape(heads, -1, w, n)[kv].mean((0, 1))[:past]
        k = keys[kv, :past]
        unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
        near = []
        for i in range(past):
            others = [j for j in range(max(0, i - reach), min(past, i + reach + 1)) if j != i]
            near.append(np.mean([unit[i] @ unit[j] for j in others]))
        marked = sorted(sorted(range(past), key=lambda i: near[i])[:anchors])
        groups: dict[object, list[int]] = {}
        if marked:
            order = sorted(marked, key=lambda i: near[i])
            for i, b in zip(order, bucket(k[order], kv)):
                groups.setdefault(("anchor", int(b)), []).append(i)
        plain = [i for i in range(past) if i not in marked]
        count = min(chunks, len(plain))
        for place, i in enumerate(plain):
            groups.setdefault(("chunk", place * count // len(plain)), []).append(i)
        names = list(groups)
        centres = np.array([k[groups[g]].sum(0) for g in names])
        centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
        member = np.argmax(unit @ centres.T, axis=-1)
        clusters = [[i for i in range(past) if member[i] == c] for c in range(len(names))]
        clusters = sorted((c for c in clusters if c), key=lambda c: -np.mean(mean[c]))
        taken: list[int] = []
        for cluster in clusters:
            taken += sorted(cluster, key=lambda i: -mean[i])[: budget - w - len(taken)]
        kept.append(set(taken))
    return kept


def trim(log_beta, positions, now):
    """[H, n] log of the retention left at `now`."""
    return (now - positions) * log_beta
