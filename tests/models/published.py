"""Baichuan, ChatGLM, YOCO written out in numpy (float64, one row, one head at a time), apart from the code under test.

Sources: the modelling files published with Baichuan-7B, Baichuan-13B, Baichuan2-7B and chatglm3-6b; YOCO in
microsoft/unilm. Weights are dicts of the published names.
"""

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal(scores):
    return np.where(np.tril(np.ones_like(scores, bool)), scores, -np.inf)


def halves_rotated(x):
    """x * cos + rotate_half(x) * sin, the table of frequencies written twice side by side."""
    T, H = x.shape
    angle = np.outer(np.arange(T), 1 / 10_000 ** (np.arange(0, H, 2) / H))
    angle = np.concatenate([angle, angle], -1)
    turned = np.concatenate([-x[:, H // 2 :], x[:, : H // 2]], -1)
    return x * np.cos(angle) + turned * np.sin(angle)


def slopes(n):
    """ALiBi's: powers of 2^(-8 / n), for other numbers of heads those of the next lower power of two first."""
    below = 2 ** int(np.floor(np.log2(n)))
    own = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    between = [2 ** (-4 * (i + 1) / below) for i in range(2 * below)]
    return own + between[0::2][: n - below]


def baichuan(w, ids, heads, layers, *, alibi, normalised, eps=1e-6):
    """Logits [T, V]."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    h = w["model.embed_tokens.weight"][ids]
    T, D = h.shape
    H, far = D // heads, np.arange(T)[None, :] - np.arange(T)[:, None]
    for i in range(layers):
        p = f"model.layers.{i}."
        x = rms(h, w[p + "input_layernorm.weight"], eps)
        q, k, v = np.split(x @ w[p + "self_attn.W_pack.weight"].T, 3, -1)
        out = []
        for n, slope in enumerate(slopes(heads)):
            one = slice(n * H, n * H + H)
            if alibi:
                scores = q[:, one] @ k[:, one].T / H**0.5 + slope * far
            else:
                scores = halves_rotated(q[:, one]) @ halves_rotated(k[:, one]).T / H**0.5
            out.append(softmax(causal(scores)) @ v[:, one])
        h = h + np.concatenate(out, -1) @ w[p + "self_attn.o_proj.weight"].T
        x = rms(h, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = x @ w[p + "mlp.gate_proj.weight"].T, x @ w[p + "mlp.up_proj.weight"].T
        h = h + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    head = head / np.linalg.norm(head, axis=1, keepdims=True) if normalised else head
    return rms(h, w["model.norm.weight"], eps) @ head.T


def pairs_rotated(x, ratio):
    """The first half of a head as complex numbers of neighbours, each turned by its angle."""
    T, H = x.shape
    z = x[:, 0 : H // 2 : 2] + 1j * x[:, 1 : H // 2 : 2]
    theta = (10_000 * ratio) ** (-np.arange(0, H // 2, 2) / (H // 2))
    z = z * np.exp(1j * np.outer(np.arange(T), theta))
    first = np.stack([z.real, z.imag], -1).reshape(T, H // 2)
    return np.concatenate([first, x[:, H // 2 :]], -1)


def chatglm(w, ids, config):
    """Logits [T, V]."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    h, eps = w["transformer.embedding.word_embeddings.weight"][ids], config["layernorm_epsilon"]
    N, H, K = config["num_attention_heads"], config["kv_channels"], config["multi_query_group_num"]

    def norm(x, name):
        if config["rmsnorm"]:
            return rms(x, w[f"{name}.weight"], eps)
        centred = x - x.mean(-1, keepdims=True)
        return rms(centred, w[f"{name}.weight"], eps) + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    for i in range(config["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        mixed = linear(norm(h, p + "input_layernorm"), p + "self_attention.query_key_value")
        if config["multi_query_attention"]:
            q, k, v = np.split(mixed, [N * H, N * H + K * H], -1)
            q, k, v = (x.reshape(len(ids), -1, H) for x in (q, k, v))
        else:
            q, k, v = np.split(mixed.reshape(len(ids), N, 3 * H), 3, -1)
        out = []
        for n in range(N):
            kv = n * k.shape[1] // N
            turned = [pairs_rotated(x, config.get("rope_ratio", 1)) for x in (q[:, n], k[:, kv])]
            out.append(softmax(causal(turned[0] @ turned[1].T / H**0.5)) @ v[:, kv])
        h = h + linear(np.concatenate(out, -1), p + "self_attention.dense")
        gate, up = np.split(linear(norm(h, p + "post_attention_layernorm"), p + "mlp.dense_h_to_4h"), 2, -1)
        h = h + linear(silu(gate) * up, p + "mlp.dense_4h_to_h")
    h = norm(h, "transformer.encoder.final_layernorm") if config["post_layer_norm"] else h
    return h @ w["transformer.output_layer.weight"].T


def neighbours_rotated(x, theta):
    """A head as complex numbers of neighbours; the slowest turns by exactly 1 / theta a token."""
    T, H = x.shape
    turn = theta ** -np.linspace(0, 1, H // 2)
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.outer(np.arange(T), turn))
    return np.stack([z.real, z.imag], -1).reshape(T, H)


def yoco(w, ids, layers, heads, kv_heads, window, theta=10_000, eps=1e-5):
    """Logits [T, V], with a sliding window in the self-decoder."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    h = w["embed_tokens.weight"][ids]
    T, D = h.shape
    H, h = D // heads, h * D**0.5
    ago = np.arange(T)[:, None] - np.arange(T)[None, :]

    def split(x, name):
        return np.split(x @ w[f"{name}_proj.weight"].T, w[f"{name}_proj.weight"].shape[0] // H, -1)

    def layer(h, p, kv, seen):
        x = rms(h, w[p + "mixer_layer_norm.weight"], eps)
        q = split(x, p + "mixer.q")
        k, v = kv or (split(x, p + "mixer.k"), split(x, p + "mixer.v"))
        out = []
        for n in range(heads):
            own = n * len(k) // heads
            scores = neighbours_rotated(q[n], theta) @ neighbours_rotated(k[own], theta).T / H**0.5
            out.append(softmax(np.where(seen, scores, -np.inf)) @ v[own])
        h = h + np.concatenate(out, -1) @ w[p + "mixer.out_proj.weight"].T
        x = rms(h, w[p + "final_layer_norm.weight"], eps)
        return h + (silu(x @ w[p + "ffn.fc1.weight"].T) * (x @ w[p + "ffn.gate.weight"].T)) @ w[p + "ffn.fc2.weight"].T

    for i in range(layers // 2):
        h = layer(h, f"self_decoder.layers.{i}.", None, (ago >= 0) & (ago < window))
    x = rms(h, w["cross_decoder.kv_layer_norm.weight"], eps)
    once = split(x, "cross_decoder.k"), split(x, "cross_decoder.v")
    assert len(once[0]) == kv_heads
    for i in range(layers // 2):
        h = layer(h, f"cross_decoder.layers.{i}.", once, ago >= 0)
    return rms(h, w["layer_norm.weight"], eps) @ w["output_projection.weight"].T
