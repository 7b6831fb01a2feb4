"""How many parameters the blocks around an MoE layer have: attention of three kinds, a state space, dense layers."""

from __future__ import annotations


def gqa(
    hidden: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool = False, out_bias: bool = False,
    qk_norm: bool = False, sinks: bool = False, gate: bool = False, shared_kv: bool = False,
) -> int:  # fmt: skip
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Args:
        qk_norm: a scale of head_dim for queries and one for keys.
        sinks: one learned logit per head (GPT-OSS).
        gate: the query projection is twice as wide, for a gate on the output (Qwen3-Next).
        shared_kv: values are the keys before their norm (Gemma 4's global layers).
    """
    wide = heads * head_dim
    qkv = wide * (2 if gate else 1) + kv_heads * head_dim * (1 if shared_kv else 2)
    biases = qkv * qkv_bias + hidden * out_bias
    return hidden * (qkv + wide) + biases + 2 * head_dim * qk_norm + heads * sinks


def mla(
    hidden: int, heads: int, q_rank: int | None, kv_rank: int, nope: int = 128, rope: int = 64, v: int = 128
) -> int:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434): low ranks, and a norm on each of them."""
    q = hidden * heads * (nope + rope)
    if q_rank is not None:
        q = hidden * q_rank + q_rank + q_rank * heads * (nope + rope)
    kv = hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v)
    return q + kv + heads * v * hidden


def mamba(hidden: int, inner: int, state: int, conv: int, rank: int) -> int:
    """A Mamba mixer (Gu and Dao 2023, arXiv:2312.00752) with Jamba's three norms on dt, B and C."""
    projections = hidden * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * hidden
    return projections + inner * conv + inner + inner + inner * state + inner + rank + 2 * state


def gated_delta_net(hidden: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, conv: int) -> int:
    """Qwen3-Next's linear attention (Yang et al. 2024, arXiv:2412.06464)."""
    keys, values = key_heads * key_dim, value_heads * value_dim
    projections = hidden * (2 * keys + 2 * values) + hidden * 2 * value_heads + values * hidden
    return projections + (2 * keys + values) * conv + 2 * value_heads + value_dim


def mlp(hidden: int, inner: int, *, gated: bool = True) -> int:
    """A dense feed-forward layer without biases."""
    return hidden * inner * (3 if gated else 2)
