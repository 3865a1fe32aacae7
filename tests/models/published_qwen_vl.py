"""Qwen-VL written out in numpy (float64, one row, one head at a time), apart from the code under test.

Source: modeling_qwen.py and visual.py published with Qwen-VL. Weights are a dict of the published names.
"""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


class Weights:
    def __init__(self, tensors):
        self.w = {name: x.astype(np.float64) for name, x in tensors.items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def layer_norm(self, name, x, eps=1e-6):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return unit * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms(self, name, x, eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"]


def heads_attend(q, k, v, heads, mask=None):
    """q [T, N * H] ..., heads one after another in the width."""
    out = []
    for a, b, c in zip(*(np.split(x, heads, -1) for x in (q, k, v)), strict=True):
        scores = a @ b.T / a.shape[-1] ** 0.5
        out.append(softmax(scores if mask is None else np.where(mask, scores, -np.inf)) @ c)
    return np.concatenate(out, -1)


def cubic(t):
    """Keys' kernel with a = -0.75, as torch's bicubic interpolation has it."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def to_size(table, n):
    """A square table of vectors [s * s, D] at n positions."""
    s, m = round(len(table) ** 0.5), round(n**0.5)
    if s == m:
        return table
    grid, out = table.reshape(s, s, -1), np.zeros((m, m, table.shape[1]))
    for i in range(m):
        for j in range(m):
            y, x = (i + 0.5) * s / m - 0.5, (j + 0.5) * s / m - 0.5
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    r, c = int(np.floor(y)) + dy, int(np.floor(x)) + dx
                    near = grid[min(max(r, 0), s - 1), min(max(c, 0), s - 1)]
                    out[i, j] += cubic(y - r) * cubic(x - c) * near
    return out.reshape(m * m, -1)


def sincos(dim, side):
    """2-D: the first half of the width encodes the column, the second the row; sines before cosines."""
    omega = 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4))
    rows = []
    for r in range(side):
        for c in range(side):
            rows.append(np.concatenate([f(p * omega) for p in (c, r) for f in (np.sin, np.cos)]))
    return np.array(rows)


def image_vectors(w, pixels, visual):
    """[queries, output_dim] of one image [3, height, width]."""
    v, patch = "transformer.visual.", visual["patch_size"]
    n = pixels.shape[1] // patch
    kernel = w.w[v + "conv1.weight"]
    cells = [pixels[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] for i in range(n) for j in range(n)]
    x = np.array([(kernel * cell).sum((1, 2, 3)) for cell in cells])
    x = w.layer_norm(v + "ln_pre", x + to_size(w.w[v + "positional_embedding"], n * n))
    for i in range(visual["layers"]):
        p = f"{v}transformer.resblocks.{i}."
        mixed = w.linear(p + "attn.in_proj", w.layer_norm(p + "ln_1", x)).reshape(len(x), visual["heads"], 3, -1)
        q, k, value = (mixed[:, :, j].reshape(len(x), -1) for j in range(3))
        x = x + w.linear(p + "attn.out_proj", heads_attend(q, k, value, visual["heads"]))
        x = x + w.linear(p + "mlp.c_proj", gelu(w.linear(p + "mlp.c_fc", w.layer_norm(p + "ln_2", x))))
    a, out = v + "attn_pool.", visual["output_dim"]
    x = w.layer_norm(a + "ln_kv", w.linear(a + "kv_proj", x))
    q = w.layer_norm(a + "ln_q", w.w[a + "query"])
    place = sincos(out, round(len(q) ** 0.5))
    inputs = (q + place, x + to_size(place, len(x)), x)
    parts = zip(np.split(w.w[a + "attn.in_proj_weight"], 3), np.split(w.w[a + "attn.in_proj_bias"], 3), strict=True)
    q, k, value = (one @ kernel.T + bias for one, (kernel, bias) in zip(inputs, parts, strict=True))
    x = w.linear(a + "attn.out_proj", heads_attend(q, k, value, out // 128))
    return w.layer_norm(v + "ln_post", x) @ w.w[v + "proj"]


def turned(x, heads):
    """Rotary, halves of each head; positions 0, 1, ..."""
    out = []
    for h in np.split(x, heads, -1):
        half = h.shape[1] // 2
        angle = np.outer(np.arange(len(h)), 1 / 10_000 ** (np.arange(half) / half))
        a, b = h[:, :half], h[:, half:]
        out.append(np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1))
    return np.concatenate(out, -1)


def qwen_vl(tensors, ids, pixels, config):
    """Logits [T, V] of a row with one image, whose vectors stand between the image's start and end tokens."""
    w, visual, eps = Weights(tensors), config["visual"], config["layer_norm_epsilon"]
    heads, h = config["num_attention_heads"], Weights(tensors).w["transformer.wte.weight"][ids]
    start, end = list(ids).index(visual["image_start_id"]), list(ids).index(visual["image_start_id"] + 1)
    h[start + 1 : end] = image_vectors(w, pixels.astype(np.float64), visual)
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    for i in range(config["num_hidden_layers"]):
        p = f"transformer.h.{i}."
        q, k, v = np.split(w.linear(p + "attn.c_attn", w.rms(p + "ln_1", h, eps)), 3, -1)
        h = h + w.linear(p + "attn.c_proj", heads_attend(turned(q, heads), turned(k, heads), v, heads, causal))
        x = w.rms(p + "ln_2", h, eps)
        gate = w.linear(p + "mlp.w2", x)
        h = h + w.linear(p + "mlp.c_proj", w.linear(p + "mlp.w1", x) * gate / (1 + np.exp(-gate)))
    return w.linear("lm_head", w.rms("transformer.ln_f", h, eps))
