"""MiniLLM: the whole life of a small language model in one readable file of pure PyTorch.

It reads text, learns a tokenizer, pretrains a Transformer, teaches it to answer (SFT), to prefer (DPO, reward model)
and to improve by trial (PPO, GRPO), and lets it write. Sections 1-7 are an evening's reading:

    1 Config            the shape of a model, and the presets
    2 Model             RMSNorm, RoPE, grouped-query attention, SwiGLU, mixture of experts, KV cache, LoRA, reward head
    3 Losses            pure functions of tensors, from cross-entropy to PPO
    4 Optimisation      the training options, schedules, Muon and AdamW
    5 Tokenizer         byte-level BPE that is friendly to Chinese
    6 Data              files -> records -> memory-mapped token ids -> batches
    7 Generation        greedy, sampling, beam search, streaming, chat

    8 Runs              device and precision, several processes, checkpoints that survive crashes, the terminal
    9 Trainers          one loop: accumulate -> clip -> step -> log -> evaluate -> save; pretraining, SFT, DPO, rewards
   10 Reinforcement     rollouts, PPO and GRPO
   11 Pipeline          the table of stages; SFT -> reward model -> PPO in one resumable go
   12 Edges             files and forms of records, CPU kernels, Hugging Face, GGUF, foreign tokenizers, flags

What it does not do: shard a model over devices, run pipelines of tools, serve requests, quantize.
Importing it only defines names. What a user can mend raises UserError, whose message says what is wrong and where, what
was found, what is allowed and what to do. Weights follow the conventions of Hugging Face's Llama and Qwen3.

Axes: B batch, T time, S keys (cached time), C hidden, H heads, K key/value heads, D head dim, F ffn, V vocabulary,
E experts, N rows or tokens laid end to end.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import heapq
import importlib
import inspect
import io
import itertools
import json
import math
import mmap
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
import types
import typing
import warnings
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

AnyPath = str | Path
Paths = str | Path | list  # files or directories, or one of them
Device = str | torch.device
Batch = dict[str, Tensor]
Figures = dict[str, tuple[float, float] | float]  # of a batch: (sum, count) for a mean, a number for a total

# ======================================================================================================================
# 1 Config: the shape of a model, and the presets.
# ======================================================================================================================


class UserError(ValueError):
    """A mistake that the user can correct. Drivers print its message and exit with status 2."""


def check(owner: object, ok: bool, field: str, allowed: str) -> None:
    """Raise UserError unless `ok`, naming the field of `owner`, its value and what is allowed."""
    if not ok:
        raise UserError(f"{field}={getattr(owner, field)!r} is not possible: it must be {allowed}")


def check_fields(owner: object, ranges: dict[str, str]) -> None:
    """Check that every field of a dataclass holds a value of its type, and those named in `ranges` a number in range.

    ranges: {"[0, 1)": "beta1 beta2"}; a square bracket includes the limit. None is in every range.
    """
    for field, hint in typing.get_type_hints(type(owner)).items():
        value = getattr(owner, field)
        accepted = typing.get_args(hint) or (hint,)  # int | None -> (int, NoneType)
        if typing.get_origin(hint) is Literal:
            check(owner, value in accepted, field, f"one of {', '.join(accepted)}")
        elif float in accepted:
            check(owner, type(value) in (int, float) and math.isfinite(value), field, "a finite number")
        else:
            kinds = [typing.get_origin(kind) or kind for kind in accepted]  # list[str] -> list
            names = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "none")
            check(owner, type(value) in kinds, field, f"of type {names}")  # not isinstance: True is an int
    for interval, fields in ranges.items():
        low, high = map(float, interval[1:-1].split(", "))
        allowed = f"in {interval}" if high < math.inf else f"{low:g} or more" if "[" in interval else f"above {low:g}"
        for field in fields.split():
            value = getattr(owner, field)
            at_limit = value == low and "[" in interval or value == high and "]" in interval
            check(owner, value is None or at_limit or low < value < high, field, allowed)


@dataclass
class MiniGPTConfig:
    """Shape of a model, with Hugging Face's field names. A bad value raises a UserError that names the field."""

    vocab_size: int = 4096  # rows of the embedding; at least the tokenizer's size
    hidden_size: int = 256  # width C of the residual stream
    num_hidden_layers: int = 6  # Transformer blocks
    num_attention_heads: int = 8  # query heads H
    num_key_value_heads: int | None = None  # key/value heads K, a divisor of H (default: H)
    head_dim: int | None = None  # width D of a head, even (default: C / H)
    intermediate_size: int | None = None  # SwiGLU width F (default: 8/3 C, rounded up to a multiple of 32)
    max_position_embeddings: int = 512  # longest context, in tokens
    rms_norm_eps: float = 1e-6  # added to the mean square inside RMSNorm
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_scaling: dict | None = None  # {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    qk_norm: bool = True  # RMSNorm on each query and key head before RoPE (as in Qwen3)
    tie_word_embeddings: bool = True  # the output matrix is the embedding
    dropout: float = 0.0  # after the embedding, attention and MLP, in training
    num_experts: int = 0  # routed experts E; 0 is a dense model
    num_experts_per_tok: int = 2  # experts that each token visits
    num_shared_experts: int = 0  # experts that every token visits
    moe_intermediate_size: int | None = None  # SwiGLU width of one expert (default: F / active experts, in 32s)
    norm_topk_prob: bool = True  # scale the chosen experts' probabilities to sum 1
    router_aux_loss_coef: float = 0.01  # weight of the load-balancing loss
    bos_token_id: int = 1  # begins a document
    eos_token_id: int = 2  # ends a document
    pad_token_id: int = 0  # padding; masked out of attention and loss

    def __post_init__(self):
        ranges = {
            "[1, inf)": "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings num_experts_per_tok moe_intermediate_size",
            "[0, inf)": "num_experts num_shared_experts router_aux_loss_coef",
            "[0, 1)": "dropout",
            "(0, inf)": "rms_norm_eps",
            "(1, inf)": "rope_theta",
        }
        check_fields(self, ranges)
        C, H, E = self.hidden_size, self.num_attention_heads, self.num_experts
        self.num_key_value_heads = self.num_key_value_heads or H
        if self.head_dim is None:
            check(self, C % H == 0, "num_attention_heads", f"a divisor of hidden_size={C} unless head_dim is given")
            self.head_dim = C // H
        self.intermediate_size = self.intermediate_size or -(-8 * C // 3 // 32) * 32  # 8/3 C, rounded up
        if E:
            check(self, self.num_experts_per_tok <= E, "num_experts_per_tok", f"at most num_experts={E}")
            share = self.intermediate_size // (self.num_experts_per_tok + self.num_shared_experts)
            self.moe_intermediate_size = self.moe_intermediate_size or max(32, share // 32 * 32)
        check(self, H % self.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads={H}")
        check(self, self.head_dim % 2 == 0, "head_dim", "even, as RoPE turns pairs")
        check_fields(self, {f"[0, {self.vocab_size - 1}]": "bos_token_id eos_token_id pad_token_id"})
        forms = f"none, or one of these rope_types and its numbers: {ROPE_KEYS}; yarn may have {YARN_OPTIONS} too"
        check(self, self.rope_scaling is None or is_rope_scaling(self.rope_scaling), "rope_scaling", forms)


ROPE_KEYS = {  # what each way to stretch RoPE needs; slower_rotations explains them
    "linear": ["factor"],
    "yarn": ["factor", "original_max_position_embeddings"],
    "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
}
YARN_OPTIONS = ["beta_fast", "beta_slow", "attention_factor", "truncate"]


def is_rope_scaling(scaling: dict) -> bool:
    """Return whether a dict has the keys of its rope_type, with possible values."""
    kind, least = scaling.get("rope_type"), {"factor": 1, "original_max_position_embeddings": 1}
    needed, options = ROPE_KEYS.get(str(kind)), YARN_OPTIONS if kind == "yarn" else []
    if needed is None or not set(needed) <= scaling.keys() <= {"rope_type", *needed, *options}:
        return False
    return type(scaling.get("truncate", True)) is bool and all(
        type(scaling[key]) in (int, float) and least.get(key, 0) <= scaling[key] < math.inf
        for key in scaling.keys() - {"rope_type", "truncate"}
    )


PRESETS = {  # vocabulary, width, layers, heads, kv heads, head dim, ffn width, context: MiniGPTConfig's first fields
    "tiny": (2048, 128, 6, 2, 1, 64, 384, 256),  # ~1.4 M parameters: learns to write on a laptop CPU in minutes
    "small": (6400, 512, 8, 8, 2, 64, 1408, 512),  # ~25 M: an evening on a CPU, minutes on a GPU
    "medium": (8192, 768, 12, 12, 4, 64, 2048, 1024),  # ~80 M: GPT-2 small without its large vocabulary
    "large": (16384, 1024, 28, 16, 8, 64, 3072, 2048),  # ~350 M: for one serious GPU
    "moe": (6400, 512, 8, 8, 2, 64, 1408, 512),  # ~60 M, of which a token uses ~25 M
}
EXPERTS = {"moe": {"num_experts": 8, "num_shared_experts": 1, "moe_intermediate_size": 480}}


def get_config(name: str) -> MiniGPTConfig:
    """Return the preset called `name`: tiny, small, medium, large or moe."""
    if name not in PRESETS:
        raise UserError(f"config {name!r} is unknown: choose from {', '.join(PRESETS)}")
    return MiniGPTConfig(*PRESETS[name], **EXPERTS.get(name, {}))


get_tiny_config, get_small_config, get_medium_config, get_large_config, get_moe_config = (
    functools.partial(get_config, name) for name in PRESETS
)

# ======================================================================================================================
# 2 Model: a pre-norm Transformer with the conventions of Hugging Face's Llama and Qwen3.
# ======================================================================================================================


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        # the mean square needs more than half precision: CUDA's kernel sees to that where all is in one dtype
        if x.dtype.itemsize < 4 and not (x.is_cuda and x.dtype == self.weight.dtype):
            return self(x.float()).to(x.dtype)
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled():  # the same function with a faster gradient
            return RMSNormOnCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(x.dtype)  # autocast may have made it float32


class Linear(nn.Linear):
    """A linear layer without bias. Several `out_features` (of q, k, v) are stacked by rows and take one product."""

    def __init__(self, in_features: int, *out_features: int):
        super().__init__(in_features, sum(out_features), bias=False)
        self.stacked = {"weight": out_features}  # Muon treats each matrix by itself

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, in) · weightᵀ -> (…, out)."""
    few_rows_on_cpu = x.device.type == "cpu" and x.numel() <= 64 * x.shape[-1] and not torch.is_grad_enabled()
    return linear_of_few_rows(x, weight) if few_rows_on_cpu else F.linear(x, weight)


# -- attention ---------------------------------------------------------------------------------------------------------


def rope_tables(config: MiniGPTConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines of rotary position embedding (arXiv:2104.09864), each (max_positions, D)."""
    D, attention_factor = config.head_dim, 1.0
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)  # (D / 2,)
    if config.rope_scaling:
        inv_freq, attention_factor = slower_rotations(inv_freq, config)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq)  # (max_positions, D / 2)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    # half-split: dimension d is paired with d + D / 2; the sine's sign belongs to the rotation
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[d], x[d + D/2]) of x (B, T, heads, D) by their angles; cos and sin are (B or 1, T, 1, D)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # x[d] and x[d + D/2] trade places
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def visible_keys(queries: Tensor, S: int, attention_mask: Tensor | None) -> Tensor:
    """Return which of S keys each query may attend to, bool (B or 1, 1, T, S).

    queries (T,): their slots among the keys. attention_mask (B, S) or (B, T, S): further limits, or None.
    """
    keys = torch.arange(S, device=queries.device)
    causal = keys <= queries[:, None]  # (T, S)
    if attention_mask is None:
        return causal[None, None]
    allowed = attention_mask if attention_mask.dim() == 3 else attention_mask[:, None]  # (B, T or 1, S)
    # a padding token attends to itself: the softmax of a row without any key would be NaN
    return (causal & allowed.bool() | (keys == queries[:, None]))[:, None]


def attention_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: 0 for visible keys, -∞ for the others; in the shape of `visible`."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ / √D + bias) v for q (B, H, T, D), k and v (B, K, S, D), bias (B or 1, 1, T, S).

    Without a bias, attention is causal with T = S, or one query that attends to all keys.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 512
    if short_on_cpu or q.device.type == "mps":
        return attend_by_products(q, k, v, bias)
    if T == 1:  # the H / K heads of a group become the queries of one kv head: no copies of k and v
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v, bias).reshape(B, H, T, D)
    if bias is not None and q.is_cuda and H != K:  # there no fused kernel takes a bias and groups of heads
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, enable_gqa=H != k.shape[1])


class KVCache:
    """Keys and values of the tokens so far: for each layer two tensors (B, K, S, D), of which `length` slots are used.

    For compiled code every shape must be fixed. So with `position`, a tensor (1,), one token goes into that slot and
    all S slots come back; the mask tells which to use.
    """

    def __init__(self, model: MiniGPT, batch_size: int, max_length: int):
        shape = (batch_size, model.config.num_key_value_heads, max_length, model.config.head_dim)
        weight = model.embed_tokens.weight
        zeros = functools.partial(torch.zeros, shape, dtype=compute_dtype(weight), device=weight.device)
        self.k, self.v = ([zeros() for _ in model.layers] for _ in range(2))
        self.length, self.max_length = 0, max_length
        self.position: Tensor | None = None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, D) to a layer; return all that it holds, (B, K, length + T, D)."""
        all_k, all_v = self.k[layer], self.v[layer]
        if self.position is not None:  # before `length` is read: it changes, and code would be compiled for each value
            return all_k.index_copy_(2, self.position, k), all_v.index_copy_(2, self.position, v)
        start, end = self.length, self.length + k.shape[2]
        all_k[:, :, start:end], all_v[:, :, start:end] = k, v
        return all_k[:, :, :end], all_v[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row `rows[i]`; there may be more rows than before, or fewer."""
        for layers in (self.k, self.v):
            for i, old in enumerate(layers):
                layers[i] = old if len(old) == len(rows) else old.new_zeros(len(rows), *old.shape[1:])
                layers[i][:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245): H query heads share K key/value heads."""

    def __init__(self, config: MiniGPTConfig, layer: int):
        super().__init__()
        H, K, D = self.shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        self.qkv_proj = Linear(config.hidden_size, H * D, K * D, K * D)
        self.o_proj = Linear(H * D, config.hidden_size)
        self.q_norm, self.k_norm = (
            RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.shape
        q, k, v = self.qkv_proj(x).view(B, T, H + 2 * K, D).split((H, K, K), dim=2)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        out = attend(q, k, v, bias)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, H * D))


# -- feed-forward ------------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv:2002.05202), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, intermediate_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down_proj(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Each token visits its `num_experts_per_tok` likeliest experts and every shared one; no token is dropped.

    Routing is Qwen3-MoE's, the balance loss Switch Transformer's (arXiv:2101.03961), shared experts DeepSeekMoE's
    (arXiv:2401.06066). Visits are sorted by expert, so that each expert's work is one matrix product.
    """

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(C, E)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))
        self.stacked = {"gate_up_proj": (width, width)}
        # the sum of n SwiGLUs is one SwiGLU of n times the width
        self.shared = SwiGLU(C, config.num_shared_experts * width) if config.num_shared_experts else None

    def route(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return weights and indices (N, k) of the experts of x (N, C), and the balance loss E · Σ f P."""
        with torch.autocast(x.device.type, enabled=False):  # float32: a rounding error would send a token elsewhere
            probs = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)  # (N, E)
        weights, experts = probs.topk(self.k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if not self.training:
            return weights, experts, probs.new_zeros(())
        visits = torch.zeros_like(probs).scatter_(1, experts, 1.0)  # (N, E)
        if token_mask is not None:
            visits, probs = (part * token_mask.reshape(-1, 1) for part in (visits, probs))  # 0 for padding
        num_visits = visits.sum().clamp(min=1)
        f = visits.sum(0) / num_visits  # share of all visits that goes to each expert
        P = probs.sum(0) / (num_visits / self.k)  # mean probability of each expert
        return weights, experts, len(P) * (f * P).sum()

    def forward(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> the mixture (B, T, C) and the balance loss; `token_mask` (B, T) is 0 for padding."""
        flat = x.flatten(0, 1)  # (N, C)
        weights, experts, balance = self.route(flat, token_mask)
        order = experts.flatten().argsort(stable=True)  # the N · k visits, sorted by expert
        tokens = order // self.k  # the token of each
        sizes = experts.flatten().bincount(minlength=len(self.gate.weight)).tolist()
        visits = flat.index_select(0, tokens).split(sizes)
        outs = torch.cat([self._expert(e, part) for e, part in enumerate(visits) if len(part)])
        outs = outs * weights.flatten()[order, None].to(x.dtype)
        mixed = outs.new_zeros(flat.shape).index_add_(0, tokens, outs).view_as(x)
        return (mixed if self.shared is None else mixed + self.shared(x)), balance

    def _expert(self, e, x):
        gate, up = linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.down_proj[e])


# -- the whole model ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); beside it the router's balance loss, 0 of a dense MLP."""

    def __init__(self, config: MiniGPTConfig, layer: int):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else SwiGLU(C, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor | None,
        token_mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, bias, cache))  # (B, T, C)
        normed = self.post_attention_layernorm(x)
        is_sparse = isinstance(self.mlp, MixtureOfExperts)
        out, balance = self.mlp(normed, token_mask) if is_sparse else (self.mlp(normed), 0.0)
        return x + self.dropout(out), balance


class MiniGPT(nn.Module):
    """A decoder-only Transformer. `model(input_ids)`: (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config: MiniGPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("rope", torch.stack(rope_tables(config)), persistent=False)  # (2, max_positions, D)
        self.gradient_checkpointing = False
        self.has_fixed_shapes = not config.num_experts  # how many rows an expert gets depends on the data
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights by name; what is not listed keeps the values of its own module.

        name                            values                  why
        embed_tokens, lm_head           normal, std 2.5 / C     a tied model at first predicts the token it reads, with
                                                                a logit of C · std: small, so the first loss is ln V
        qkv_proj, gate_up_proj, gate    normal, std 1 / √in     activations keep their scale
        o_proj, down_proj               0                       each block starts as the identity: gradients reach
                                                                every layer, whatever the depth
        …norm                           1                       (set by RMSNorm)
        """
        for name, p in self.named_parameters():
            if name in ("embed_tokens.weight", "lm_head.weight"):
                p.normal_(std=2.5 / self.config.hidden_size)
            elif name.endswith(("qkv_proj.weight", "gate_up_proj.weight", "gate_up_proj", "gate.weight")):
                p.normal_(std=p.shape[-1] ** -0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                p.zero_()

    @property
    def output_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        """(B, T) int64 -> the last hidden states after the final norm (B, T, C), and the routers' mean balance loss.

        position_ids (B or 1, T): default 0 … T-1, or the slots after those that the cache holds.
        attention_mask (B, S) or (B, T, S): keys that may be attended to, besides causality; None is the fast path.
        token_mask (B, T): 0 for padding, which the routers then do not count.
        cache: the T tokens follow those in it, and are added to it.
        """
        T = input_ids.shape[1]
        limit = self.config.max_position_embeddings
        if cache and cache.position is not None:  # fixed shapes: every slot of the cache is a key
            slots, S, fast = cache.position, cache.max_length, False
        else:
            S = T + (cache.length if cache else 0)
            slots = torch.arange(S - T, S, device=input_ids.device)
            fast = attention_mask is None and T in (1, S)  # no mask: plain causal, or one query after all keys
        if position_ids is None:
            position_ids = slots[None]
            if S > limit:
                raise UserError(f"{S} tokens exceed the context of max_position_embeddings={limit}")
        dtype = compute_dtype(self.embed_tokens.weight)
        bias = None if fast else attention_bias(visible_keys(slots, S, attention_mask), dtype)  # one for all layers
        cos, sin = self.rope[:, position_ids].unsqueeze(3)  # (B or 1, T, 1, D) each
        x, balances = self.dropout(self.embed_tokens(input_ids)), []
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled() and not cache:  # keep x alone
                block = functools.partial(recompute, block, use_reentrant=False)
            x, balance = block(x, cos, sin, bias, token_mask, cache)
            balances.append(balance)
        if cache and cache.position is None:
            cache.length += T
        return self.norm(x), sum(balances) / len(balances)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, C) -> logits (…, V)."""
        return linear(hidden, self.output_weight)

    def forward(self, input_ids: Tensor, **options) -> Tensor:
        """(B, T) int64 -> logits (B, T, V); options as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, **options)[0])

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue (B, T) token by token, without a cache: slow and simple, the oracle for TextGenerator.

        Greedy at temperature 0, else sampling. Returns (B, T + max_new_tokens).
        """
        with eval_mode(self):
            for _ in range(max_new_tokens):
                logits = self(input_ids)[:, -1]  # (B, V)
                if temperature > 0:
                    token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
                else:
                    token = logits.argmax(dim=-1, keepdim=True)
                input_ids = torch.cat((input_ids, token), dim=1)
        return input_ids

    @classmethod
    def from_pretrained(cls, folder: AnyPath) -> MiniGPT:
        """Read a Hugging Face directory of a Llama, Qwen3 or Qwen3-MoE, into float32 and eval mode.

        What differs from these architectures (biases, sliding windows, other weights) raises a UserError.
        """
        return read_hf_model(Path(folder), cls(read_hf_config(folder)))

    def save_pretrained(self, folder: AnyPath, tokenizer: BPETokenizer | None = None, dtype: str = "float32") -> None:
        """Write a directory that transformers' AutoModelForCausalLM (and AutoTokenizer) read; LoRA is merged.

        A model with qk_norm becomes a Qwen3 or Qwen3-MoE, one without a Llama. What these do not have (shared experts,
        a reward head, parameters of your own) raises a UserError.
        """
        write_hf_directory(Path(folder), self, tokenizer, dtype)

    def num_params(self, active: bool = False) -> int:
        """Count parameters; with `active` only those that a token uses (all of a dense model)."""
        c, idle = self.config, 0
        if active and c.num_experts:
            idle = (c.num_experts - c.num_experts_per_tok) * 3 * c.hidden_size * c.moe_intermediate_size  # of a block
        return sum(p.numel() for p in self.parameters()) - c.num_hidden_layers * idle

    def flops_per_token(self, seq_len: int) -> int:
        """Count floating-point operations of forward and backward for a token of a row (arXiv:2204.02311, B).

        Six for each weight of a matrix product. Six for each element of causal attention's two products, of which the
        mask leaves half.
        """
        c, weights = self.config, self.num_params(active=True)
        if not c.tie_word_embeddings:
            weights -= self.embed_tokens.weight.numel()  # a look-up is no product
        return 6 * (weights + c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a weight is multiplied: autocast's, where that is on, or its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


_modes_before: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # the state of each model before its eval mode


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; the mode before is restored after it, or after the last of blocks that overlap.

    Blocks that `Trainer` compiled run as they are: torch keeps few versions, and a growing cache would use them up.
    """
    before = _modes_before.setdefault(model, types.SimpleNamespace(users=0))
    if not before.users:
        before.training = model.training
        before.compiled = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl}
    before.users += 1
    try:
        model.eval()
        for part in before.compiled:
            part._compiled_call_impl = None
        yield
    finally:
        before.users -= 1
        if not before.users:
            model.train(before.training)
            for part, call in before.compiled.items():
                part._compiled_call_impl = call


# -- what is built from a model: LoRA, and a reward model --------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear map W and a low-rank update that is trained: W + alpha / rank · B A (arXiv:2106.09685)."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.scale = base.weight.requires_grad_(False), alpha / rank
        self.out_features = base.stacked["weight"]
        rows, columns = base.weight.shape
        # B A is 0 at first, so that training starts from the model as it is
        self.lora_a = nn.Parameter(torch.randn(rank, columns, device=self.weight.device) * columns**-0.5)
        self.lora_b = nn.Parameter(self.weight.new_zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return the same map as one matrix."""
        merged = Linear(self.weight.shape[1], *self.out_features).to(self.weight)
        merged.weight.copy_(self.weight)
        for column, row in zip(self.lora_b.T, self.lora_a, strict=True):  # one by one: the same bits on every machine
            merged.weight.add_(self.scale * column[:, None] * row)
        return merged


def add_lora(model: MiniGPT, rank: int, alpha: float) -> None:
    """Freeze the model except for LoRA updates of the matrices of its blocks (routed experts stay frozen)."""
    narrowest = min(model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim)
    if rank > narrowest:
        raise UserError(f"lora_rank={rank} is not possible: it must be at most {narrowest}, the rank of the matrices")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))  # a reward model's head is new: it is trained whole
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, Linear) and not name.endswith("gate"):
            model.layers.set_submodule(name, LoRALinear(module, rank, alpha))


def trained_weights(module: nn.Module) -> Batch:
    """Return the part of a module's state dict that is trained."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def merge_lora(model: MiniGPT) -> None:
    """Fold LoRA's updates into the matrices; the model is a plain one again, all of it trainable."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    model.requires_grad_(True)


class RewardModel(MiniGPT):
    """The backbone with a scalar head: a score for a conversation, or, as PPO's critic, an estimate at every token.

    `RewardModel(model)` copies the weights of a MiniGPT; `RewardModel(config)` starts anew. The head starts at 0.
    """

    def __init__(self, source: MiniGPT | MiniGPTConfig):
        super().__init__(getattr(source, "config", source))
        self.score = Linear(self.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        if isinstance(source, MiniGPT):
            self.load_state_dict(source.state_dict(), strict=isinstance(source, RewardModel))
            self.to(source.embed_tokens.weight)

    def token_scores(self, input_ids: Tensor, **options) -> Tensor:
        """(B, T) int64 -> a score after each token, (B, T) float32; options as in `hidden_states`."""
        return self.head(self.hidden_states(input_ids, **options)[0])

    def forward(self, input_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """(B, T) int64, padded on the right where `token_mask` is 0 -> the score at the last token, (B,)."""
        return self.final_score(self.hidden_states(input_ids, token_mask=token_mask)[0], token_mask)

    def final_score(self, hidden: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) -> the score at the last token that is no padding, (B,)."""
        rows = torch.arange(len(hidden), device=hidden.device)
        last = -1 if token_mask is None else token_mask.long().sum(dim=1) - 1  # padding is on the right
        return self.head(hidden[rows, last])

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, C) -> scores (…)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)  # in bf16 near scores would be ties
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.score.weight.to(wide))[..., 0]


# ======================================================================================================================
# 3 Losses: functions of tensors and numbers; the tests hold a worked example of each.
# ======================================================================================================================


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None, compiled: bool = False
) -> Tensor:
    """Return Σ -log softmax(hidden · weightᵀ)[label], in nats, over the labels that are not -100.

    hidden (…, C), weight (V, C), labels (…) int64 aligned with hidden: labels[i] is the token that follows hidden[i].
    Only `chunk` x V logits exist at a time; by default as many as fit a processor's cache, or keep a GPU busy.
    `compiled` code makes fewer passes over them.
    """
    chunk = chunk or max(2048, 2**28 // len(weight) if hidden.is_cuda else 0)
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, compiled)
    return -token_logprobs(hidden, weight, labels, chunk=chunk).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that computes its gradients already in forward, chunk by chunk, while the logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, compiled):
        dtype = compute_dtype(weight)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)  # losses and sums are never in half precision
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        logits_gradient = _compiled_logits_gradient() if compiled else _logits_gradient
        parts = (x.split(chunk) for x in (hidden, labels, d_hidden))
        for h, y, d_h in zip(*parts, strict=True):  # (chunk, C), (chunk,), (chunk, C)
            part, grad = logits_gradient(h @ weight.T, y)  # (), (chunk, V)
            loss += part
            torch.mm(grad, weight, out=d_h)
            if d_weight is not None:
                d_weight.add_(grad.T @ h)  # the sum over chunks in float32
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # the gradients of the sum: the chain rule only scales them
        return *(d if d is None else d.mul(grad.to(d.dtype)) for d in ctx.saved_tensors), None, None, None


def _logits_gradient(logits, labels):
    """Return the summed loss of logits (n, V) and its gradient by them: softmax - onehot, 0 in untrained rows."""
    trained = (labels != -100)[:, None]  # (n, 1)
    y = labels[:, None].where(trained, 0)  # any valid index: masked below
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = wide.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    loss = ((log_sum - wide.gather(1, y)) * trained).sum()
    if torch.compiler.is_compiling():  # one pass over the logits
        onehot = torch.arange(logits.shape[1], device=y.device) == y
        grad = (wide - log_sum).exp() - onehot.to(wide.dtype)
    else:  # written over the logits
        grad = wide.sub_(log_sum).exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=wide.dtype))
    return loss, grad.mul_(trained).to(logits.dtype)


@functools.cache
def _compiled_logits_gradient():
    return torch.compile(_logits_gradient)


def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = 2048
) -> Tensor:
    """Return log softmax(hidden · weightᵀ / temperature)[label] for each label, in nats; 0 where the label is -100.

    hidden (…, C), weight (V, C), labels (…) aligned with hidden. Only trained positions are computed, `chunk` x V
    logits at a time; backward computes them again.
    """

    def logprobs_of(h, y):
        logits = F.linear(h, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (n, V)
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(dim=-1)

    trained = labels != -100  # prompts and padding need no logits
    chunks = zip(hidden[trained].split(chunk), labels[trained].split(chunk), strict=True)
    logprobs = torch.cat([recompute(logprobs_of, h, y, use_reentrant=False) for h, y in chunks])
    return logprobs.new_zeros(labels.shape).masked_scatter(trained, logprobs)  # back to their places


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
) -> Tensor:
    """Return the mean DPO loss of pairs; each input (B,) is a log-probability summed over a completion.

    sigmoid (arXiv:2305.18290, eq. 7): -log σ(β h), where h = (policy - reference of chosen) - (the same of rejected).
    At policy = reference it is ln 2. ipo (arXiv:2310.12036, eq. 17): (h - 1 / (2 β))².
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square().mean()
    return -F.logsigmoid(beta * h).mean()


def reward_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the mean of -log σ(chosen - rejected) over pairs of scores (B,) (arXiv:2203.02155, eq. 1)."""
    return -F.logsigmoid(chosen - rejected).mean()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x weighted by `mask`, over all axes."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale x to mean 0 and variance 1 over where mask is true; 0 elsewhere."""
    centred = x - masked_mean(x, mask)
    # 1e-8: equal values have no variance
    variance = masked_mean(centred.square(), mask)
    return centred * (variance + 1e-8).rsqrt() * mask


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(policy || reference) from each token that the policy sampled (joschu.net/blog/kl-approx.html).

    With r = reference / policy: k1 = -ln r; k3 = r - 1 - ln r, which is unbiased, too, and never negative.
    """
    log_r = reference_logprobs - logprobs
    return -log_r if kind == "k1" else log_r.exp() - 1 - log_r


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns, both (B, T), of the tokens where mask is true (arXiv:1506.02438).

    rewards, values and mask (B, T): values[t] is the estimate before token t is written, rewards[t] what it earns.
    Replies are contiguous, and nothing follows their last token.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,), 0 after the end
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # eq. 12
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]  # eq. 16: A_t = δ_t + γλ A_{t+1}
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """Return the mean over mask of -min(ρ A, clip(ρ, 1 ± clip_range) A), ρ = new / old (arXiv:1707.06347, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()  # 1 at the first update
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float) -> Tensor:
    """Return the mean over mask of ½ max((V - R)², (V' - R)²), V' = V within value_clip of the old V (2310.10505)."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def grpo_advantages(rewards: Tensor, group_size: int, kind: str = "dr_grpo") -> Tensor:
    """Return rewards (N,) of consecutive groups less their group's mean (Dr. GRPO, arXiv:2503.20783).

    grpo also divides by the group's standard deviation (arXiv:2402.03300). A group of equal rewards gives exactly 0.
    """
    groups = rewards.view(-1, group_size)  # (N / group_size, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # the mean of equal numbers may differ from them by a rounding error
    if kind == "grpo":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    return centred.flatten()


# ======================================================================================================================
# 4 Optimisation: the training options, schedules, Muon and AdamW.
# ======================================================================================================================


@dataclass
class MemoryConfig:
    """The part of the training options that trades time for memory."""

    dtype: Literal["auto", "float32", "float32_onednn", "bfloat16", "float16"] = "auto"  # of products; auto: fastest
    accumulation_steps: int = 1  # pretrain, SFT, DPO, reward: batches whose gradients are summed before one update
    gradient_checkpointing: bool = False  # keep only each block's input and recompute the rest in backward
    auto_micro_batch: bool = True  # when memory runs out, go on with smaller micro-batches of the same total
    lora_rank: int = 0  # train only low-rank updates of the blocks' matrices (LoRA); 0 trains everything
    lora_alpha: float = 16.0  # LoRA's updates are scaled by alpha / rank


@dataclass
class TrainConfig(MemoryConfig):
    """Every option of training. `max_steps`, `epochs` or `minutes` ends a run; of several, whichever comes first."""

    batch_size: int = 16  # rows, pairs or prompts of a batch
    packing: bool = True  # SFT: several conversations in a row, which cannot see each other; off: one a row
    seq_len: int | None = None  # tokens of a row (default: the model's max_position_embeddings)
    learning_rate: float = 3e-3  # peak, for Muon's matrices and AdamW's vectors alike
    min_learning_rate: float = 0.0  # learning rate at the end of the schedule
    warmup_steps: int = 20  # steps of linear warm-up
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, linear decay
    decay_fraction: float = 0.4  # part of the run that wsd spends decaying
    optimizer: Literal["muon", "adamw"] = "muon"  # optimizer of the matrices; the rest always gets AdamW
    weight_decay: float = 0.1  # decoupled, on the blocks' matrices only; times the passes over the data, 1 to 10
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    momentum: float = 0.95  # Muon's momentum
    grad_clip: float = 1.0  # largest norm of a module's whole gradient; 0 is off
    max_steps: int = 0  # end after so many updates; 0 is no limit
    epochs: float = 0.0  # end after so many passes over the data, 0.5 is half a one; 0 is no limit
    minutes: float = 0.0  # end so many minutes after the process started; 0 is no limit
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 250  # steps between evaluations, each with a sample; 0 is only at the end
    save_every: int = 250  # steps between checkpoints; 0 is only at the end
    eval_tokens: int = 100_000  # pretrain, SFT, DPO, reward: validation tokens of an evaluation, always the same
    eval_prompts: int = 200  # SFT, PPO, GRPO: validation prompts that the model answers in an evaluation
    reply_tokens: int = 48  # SFT, DPO, PPO, GRPO: longest reply in evaluations and rollouts
    sample_tokens: int = 48  # length of the samples shown during training; 0 is none
    seed: int = 0  # seed of initialisation, data order and dropout, below 2 ** 32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile each block; auto: where a run is long enough
    on_bad_record: Literal["stop", "skip"] = "stop"  # stop at a malformed line of data, or count it and go on
    tensorboard: bool = False  # also write the metrics for TensorBoard into the run directory

    def __post_init__(self):
        ranges = {
            "[1, inf)": "batch_size seq_len accumulation_steps log_every eval_tokens eval_prompts reply_tokens",
            "[0, inf)": "warmup_steps max_steps epochs minutes eval_every save_every sample_tokens weight_decay "
            "grad_clip min_learning_rate lora_rank",
            "(0, inf)": "learning_rate lora_alpha",
            "(0, 1]": "decay_fraction",
            "[0, 1)": "beta1 beta2 momentum",
            "[0, 4294967295]": "seed",
        }
        check_fields(self, ranges)
        is_lower = self.min_learning_rate <= self.learning_rate
        check(self, is_lower, "min_learning_rate", f"at most learning_rate={self.learning_rate}")


def learning_rate_at(step: int, progress: float, config: TrainConfig) -> float:
    """Return the rate of update `step` (from 0) when `progress` (0 … 1) of the run is over.

    After the warm-up, cosine falls all the way (arXiv:1608.03983); wsd stays at the peak, then falls in a straight line
    (arXiv:2404.06395).
    """
    low, high = config.min_learning_rate, config.learning_rate
    left = 1 - min(progress, 1.0)
    share = {
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        "wsd": min(1.0, left / config.decay_fraction),
        "constant": 1.0,
    }[config.schedule]
    rate = low + (high - low) * share
    return rate * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else rate


def orthogonalize(matrices: Tensor, steps: int = 5, half: bool = False) -> Tensor:
    """Push the singular values of each matrix of (n, rows, cols) to about 1 by Muon's Newton-Schulz iteration.

    `half` computes in bfloat16: devices without bf16 units are many times slower in it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's quintic: steepest at 0, lands in [0.7, 1.2]
    x = matrices.bfloat16() if half else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the shorter side is the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values in [0, 1]
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b G + c G²) x
    return (x.mT if tall else x).to(matrices.dtype)


def unstack(weight: Tensor, rows: list[int]) -> list[Tensor]:
    """Return the matrices, as views, of a weight (sum(rows), cols), or (E, sum(rows), cols) of experts."""
    return [matrix for part in weight.split(rows, dim=-2) for matrix in part.view(-1, *part.shape[-2:])]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices (kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    The update's root mean square is AdamW's (0.2), so that one learning rate suits both. A group's `stacked` gives the
    rows of the matrices that its weights consist of, one below the other; each is orthogonalized by itself.
    """

    def __init__(
        self, groups: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.0, half: bool = False
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.half = half  # orthogonalize in bfloat16

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices = defaultdict(list)  # by shape and learning rate: (its update, the matrix itself)
        for group in self.param_groups:  # torch._foreach functions take lists: on a GPU many tensors at once
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for weights in zip(updates, params, strict=True):
                for update, target in zip(*(unstack(weight, group["stacked"]) for weight in weights), strict=True):
                    matrices[target.shape, group["lr"]].append((update, target))
        for (shape, lr), items in matrices.items():  # equal shapes go through the iteration together
            updates, targets = zip(*items, strict=True)
            stacked = WORLD.share(functools.partial(orthogonalize, half=self.half), torch.stack(updates))
            torch._foreach_add_(targets, stacked.unbind(), alpha=-lr * 0.2 * max(shape) ** 0.5)


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW (arXiv:1711.05101) for all that is trained; with optimizer="muon", Muon for the blocks' matrices.

    Only the blocks' matrices are decayed. Routers and LoRA's factors stay with AdamW: an orthogonal update would use
    LoRA's whole rank at every step.
    """
    plain, decayed, muon = [], [], defaultdict(list)  # muon: by the rows of the matrices that a weight consists of
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            of_a_block = p.dim() >= 2 and "layers." in path and not path.endswith("gate") and "lora_" not in name
            if of_a_block and config.optimizer == "muon":
                muon[tuple(getattr(module, "stacked", {}).get(name, p.shape[-2:-1]))].append(p)
            else:
                (decayed if of_a_block else plain).append(p)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}]
    optimizers = [torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)]
    if muon:
        groups = [{"params": params, "stacked": list(rows)} for rows, params in muon.items()]
        half = config.dtype == "bfloat16"
        optimizers.append(Muon(groups, config.learning_rate, config.momentum, config.weight_decay, half))
    return optimizers


# ======================================================================================================================
# 5 Tokenizer: byte-level BPE; no <unk>, so every byte string survives the round trip.
# ======================================================================================================================

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")  # ids 0-4; then 256 bytes; then merges
FIRST_BYTE, FIRST_MERGE = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256


# Text is first cut into words; merges never cross words. Each word lies inside one word of Qwen2's pattern, and what is
# cut only here (Latin from Chinese, say) is never joined by a merge. So llama.cpp gives the same ids with its "qwen2"
# pattern. The classes list characters, because \w, \s and \p differ between Python's `re` and the Rust `tokenizers`.
# Repeats are bounded, so that no text takes quadratic time.
_HAN = "々㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U000323af"  # \uf900 as a character would become U+8C48 under NFC
_LETTER = (
    "A-Za-zµÀ-ÖØ-öø-\u02c1\u1e00-\u1fbcＡ-Ｚａ-ｚ"  # Latin (Greek with accents among it), and full-width
    "\u0370-\u0374\u0376-\u037d\u0386\u0388-\u03f5\u03f7-\u0481\u048a-\u0559\u0560-\u0588"  # Greek … Armenian
    "\u05d0-\u05f2\u0620-\u064a\u0671-\u06d3\u10a0-\u10fa\u10fc-\u135a"  # Hebrew, Arabic, Georgian … Ethiopic
    "\u0904-\u0939\u0985-\u09b9\u0a05-\u0a39\u0a85-\u0ab9\u0b05-\u0b39\u0b83-\u0bb9\u0c05-\u0c39\u0c85-\u0cb9"
    "\u0d04-\u0d3a\u0e01-\u0e30\u0f40-\u0f6c\u1000-\u102a\u1780-\u17b3\u1820-\u1884"  # India … Mongolia
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u318e\u31a0-\u31bf\u31f0-\u31ff"  # kana, bopomofo
    "\uac00-\ud7a3\uff66-\uffdc"
)  # Hangul, half-width kana
_BLANK = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE = "\r\n" + _BLANK
# with symbols, accents that combine and joiners, but without numbers (¼ ① ❶ 🄀 …): those are words of one character
_PUNCTUATION = (
    "!-/:-@\\[-`{-~¡-©«-±´¶-¸»¿×÷\u0300-\u036f\u200b-\u2027\u2030-\u205e\u2060-\u206f\u20a0-\u20ff"
    "℀℁℃-℆℈℉℔№-℘℞-℣\u2190-\u245f\u249c-\u24e9\u2500-\u2775\u2794-\u2bff\u3001-\u3004\u3008-\u3020\u30fb"
    "\u32c0-\u33ff\ufe00-\ufe6f！-／：-＠［-｀｛-･\U0001f000-\U0001f0ff\U0001f10d-\U0001faff"
)
WORD_PATTERN = "|".join(
    (
        "'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])",  # English contractions
        f" ?[{_LETTER}]{{1,32}}",  # a word, with the space before it
        f"[{_HAN}]{{1,64}}",  # a run of Chinese characters
        f" ?[{_PUNCTUATION}]{{1,32}}[\r\n]{{0,32}}",  # with the ends of lines that follow, as in Qwen2's
        f"[{_BLANK}]{{0,32}}[\r\n]{{1,32}}",  # the end of a line with the blanks before it
        f"[{_BLANK}]{{1,32}}(?![^{_SPACE}])",  # blanks, less the last one, which goes to the word that follows
        # One character of anything else. A digit or another number (〇 ½ ٣) is one token: the same number always looks
        # the same, so that sums can be learned. So are rare letters and marks: engines differ in which are letters.
        ".",
    )
)
# Safe places to cut a text, where the words on both sides stay the same: before a blank, after the end of a line, and
# where punctuation follows Chinese.
SAFE_CUT = re.compile(f"(?<=[^{_SPACE}])(?=[{_BLANK}])|(?<=[\r\n])(?=[^\r\n])|(?<=[{_HAN}])(?=[{_PUNCTUATION}])")

CHAT_TEMPLATE = (  # ChatML in Jinja, for transformers
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A tokenizer.json without word pattern, vocabulary and merges, and with one special token as an example.
EMPTY_TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
  {"id": 0, "content": "", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
   "special": true}],
 "normalizer": null,
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": false},
  {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
 "post_processor": null,
 "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
 "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
  "vocab": {}, "merges": []}}"""
# Further fields for transformers: put BOS before every text; the names of the special tokens.
ADD_BOS = """{"post_processor": {"type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
 "pair": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
          {"Sequence": {"id": "B", "type_id": 0}}],
 "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}}}}"""
TOKENIZER_CONFIG = """{"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
 "bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}"""

# The parts of a conversation: ids of special tokens, and text, which is encoded together with the text around it; a
# reply is encoded apart, and a trained one is to be learned from. These names are code points that no text contains.
TEXT, REPLY, TRAINED = "\ud800", "\ud801", "\ud802"

# GPT-2's table, which tokenizer.json uses: bytes that print stand for themselves, the others for U+0100 and up.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_TO_CHAR = {b: chr(b if b in _PRINTABLE else 256 + _OTHERS.index(b)) for b in range(256)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def spell_bytes(token: bytes) -> str:
    return "".join(map(BYTE_TO_CHAR.get, token))


def count_words(texts: Iterable[str]) -> Counter:
    return Counter(itertools.chain.from_iterable(map(re.compile(WORD_PATTERN).findall, texts)))


def learn_merges(word_counts: dict[str, int], count: int) -> list[tuple[bytes, bytes]]:
    """Return the `count` most useful merges of byte-level BPE (arXiv:1508.07909), fewer if no pair occurs twice.

    Merges join whole characters, or the bytes of one character from left to right; never parts of two characters, so
    that Chinese tokens are characters and words. So the merges inside characters and those of characters are learned
    apart, the former on the list of distinct characters. A pair of characters is never more frequent than either of
    them (ties go to bytes), so both are complete before they are joined.

    >>> learn_merges({"low": 5, "lower": 2}, 2)
    [(b'l', b'o'), (b'lo', b'w')]
    """
    char_counts = Counter()
    for word, n in word_counts.items():
        for char in word:
            char_counts[char] += n
    unused = (chr(i) for i in range(0xF0000, sys.maxunicode) if chr(i) not in char_counts)
    spelled = {char.encode().decode("latin-1"): n for char, n in char_counts.items()}  # byte b is the symbol chr(b)
    in_characters = _merges_of(spelled, {chr(b): bytes([b]) for b in range(256)}, unused, 1)
    of_characters = _merges_of(word_counts, {char: char.encode() for char in char_counts}, unused, None)
    merges = heapq.merge(in_characters, of_characters, key=lambda merge: -merge[0])  # the most frequent first
    return [pair for _, pair in itertools.islice(merges, count)]


def _merges_of(word_counts, symbol_bytes, unused, first):
    """Yield (frequency, the bytes of both halves) of one merge after another, until no pair occurs twice.

    Words are strings of symbols; `symbol_bytes` has their bytes, `unused` gives new ones. A symbol is one code point: a
    pair is a string of two, and a merge is one str.replace. If `first` is 1, only a word's first pair may merge.
    """

    def pairs(word):
        return list(map(str.__add__, word, word[1:]))[:first]

    # 1 Count the pairs.
    words, counts = list(word_counts), list(word_counts.values())
    pair_counts, words_with = defaultdict(int), defaultdict(set)  # numbers of the words that have a pair, or had it
    for i, word in enumerate(words):
        for pair in pairs(word):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    queue = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(queue)
    while queue:
        # 2 Take the most frequent pair.
        n, pair = heapq.heappop(queue)
        if pair_counts[pair] != -n:  # earlier merges have used up some of its occurrences: back with today's count
            heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        if -n < 2:
            return
        left, right = map(symbol_bytes.get, pair)
        yield -n, (left, right)
        # 3 Replace it by a new symbol in all words, and update the counts.
        symbol, new_pairs = next(unused), set()
        symbol_bytes[symbol] = left + right
        for i in words_with.pop(pair):
            old = words[i]
            words[i] = old.replace(pair, symbol)  # it may be gone: an earlier merge has used it up
            for p in pairs(old):
                pair_counts[p] -= counts[i]
            for p in pairs(words[i]):
                pair_counts[p] += counts[i]
                if symbol in p:
                    words_with[p].add(i)
                    new_pairs.add(p)
        for p in new_pairs:
            heapq.heappush(queue, (-pair_counts[p], p))


class _Cache(dict):
    """The results of a function. It starts anew when it is full; a dict is faster than functools.lru_cache."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, key):
        if len(self) >= 200_000:
            self.clear()
        result = self[key] = self.function(key)
        return result


class BPETokenizer:
    """Byte-level BPE: `decode_bytes(encode(x)) == x` for every text and every byte string.

    Text never becomes a special token, whatever it looks like; only the chat template and BOS/EOS do. Ids are those
    that `tokenizers.Tokenizer.from_file` gives for the saved file (with its `encode_special_tokens = True`).

    >>> tokenizer = BPETokenizer(vocab_size=300)
    >>> tokenizer.train(["你好，世界！ hello world"] * 2)
    >>> tokenizer.decode(tokenizer.encode("你好 world"))
    '你好 world'
    """

    special_tokens = dict(enumerate(SPECIAL_TOKENS))
    pad_id, bos_id, eos_id, im_start_id, im_end_id = range(5)  # an imported tokenizer's BOS may be None
    stop_ids = (eos_id, im_end_id)  # the tokens that end a text or a turn

    def __init__(self, vocab_size: int = 4096):
        self.requested_size = vocab_size
        self._set_merges([])

    @property
    def vocab_size(self) -> int:
        """Number of tokens: special tokens, bytes and the merges learned so far."""
        return len(self.token_bytes)

    def train(self, texts: Iterable[str]) -> None:
        """Learn `vocab_size` tokens from `texts`, or as many as there are pairs that occur twice."""
        if self.requested_size > 1 << 17:
            raise UserError(f"vocab_size={self.requested_size} is not possible: at most {1 << 17} can be learned")
        if self.requested_size < FIRST_MERGE:
            warnings.warn(
                f"vocab_size={self.requested_size} is below the floor of {FIRST_MERGE} (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens): using {FIRST_MERGE}",
                stacklevel=2,
            )
            self.requested_size = FIRST_MERGE
        texts = [texts] if isinstance(texts, str) else texts
        word_counts = Counter()
        for counts in parallel_map(count_words, batched(texts, len)):
            word_counts.update(counts)
        most = self.requested_size - FIRST_MERGE
        self._set_merges(learn_merges(word_counts, most))
        if len(self.merges) < most / 2:
            warnings.warn(
                f"only {len(self.merges)} of {most} merges were learned, as no other pair occurs twice: the data are "
                "too small or too uniform for this vocab_size",
                stacklevel=2,
            )

    def _set_merges(self, merges, pattern=None):
        """Set the vocabulary. For speed, encoding works on strings: token i is the character chr(i)."""
        self.merges, self.pattern = merges, pattern or WORD_PATTERN
        self.token_bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
        symbols = {token: chr(i) for i, token in enumerate(self.token_bytes)}
        self._joined = {symbols[a] + symbols[b]: symbols[a + b] for a, b in merges}
        self._find_words = re.compile(self.pattern).findall
        # No merge joins parts of two characters, so a character's own merges can run first, once for each character.
        self._encode_char = _Cache(self._merge_bytes).__getitem__
        self._encode_word = _Cache(self._merge_chars).__getitem__

    def _merge_bytes(self, char):
        return self._merge("".join(chr(FIRST_BYTE + b) for b in char.encode("utf-8", "surrogateescape")))

    def _merge_chars(self, word):
        return self._merge("".join(map(self._encode_char, word)))

    def _merge(self, symbols):
        """Apply the merges to a word: always the one that was learned first, wherever it occurs."""
        joined = self._joined
        while pairs := [pair for pair in map(str.__add__, symbols, symbols[1:]) if pair in joined]:
            first = min(pairs, key=joined.__getitem__)  # the smallest id was learned first
            symbols = symbols.replace(first, joined[first])
        return symbols

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`, after BOS if `add_special_tokens`. Bytes need not be UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids = self._encode_text(text)
        return [self.bos_id, *ids] if add_special_tokens and self.bos_id is not None else ids

    def _encode_text(self, text):
        return list(map(ord, "".join(map(self._encode_word, self._find_words(text)))))

    def encode_batch(self, texts: Iterable, add_special_tokens: bool = False) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """Return the bytes of `ids`; special tokens have none, or else those of their names."""
        names = {} if skip_special_tokens else self.special_tokens
        ids = list(map(int, ids))
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary, 0 … {self.vocab_size - 1}")
        return b"".join(names[i].encode() if i in names else self.token_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", "replace")

    # -- conversations -------------------------------------------------------------------------------------------------

    def _chat_pieces(self, messages, kinds, add_generation_prompt):
        """ChatML as pieces (kind, text): `<|im_start|>role\\ncontent<|im_end|>\\n` a message."""
        start, end, pieces = (self.im_start_id, ""), (self.im_end_id, ""), []
        for message, kind in zip(messages, kinds, strict=True):
            pieces += [start, (TEXT, message["role"] + "\n"), (kind, message["content"]), end, (TEXT, "\n")]
        return pieces + [start, (TEXT, "assistant\n")] * add_generation_prompt

    def _encode_messages(self, messages, kinds, add_generation_prompt=False):
        ids, trained = [], []
        awaits_end = False  # a trained reply has been written: its end of turn is trained, too
        pieces = self._chat_pieces(messages, kinds, add_generation_prompt)
        for kind, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
            new = [kind] if isinstance(kind, int) else self.encode("".join(text for _, text in run))
            ids += new
            trained += [kind == TRAINED or awaits_end and kind in self.stop_ids] * len(new)
            awaits_end = kind == TRAINED or (awaits_end and not new)  # a template may put an empty text before it
        return ids, trained

    def encode_chat(self, messages: list[dict], first: int = 0) -> tuple[list[int], list[bool]]:
        """Return the template's ids, and which are trained: the assistant's, from message `first` on.

        These are its contents and the token that ends the turn. Generation starts at a reply, so it is encoded apart.
        """
        kinds = []
        for i, message in enumerate(messages):
            reply = TRAINED if i >= first and message.get("trained", True) else REPLY
            kinds.append(reply if message["role"] == "assistant" else TEXT)
        return self._encode_messages(messages, kinds)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Return the ids that transformers gives, save that contents never become special tokens.

        The generation prompt opens the assistant's turn.
        """
        return self._encode_messages(messages, [TEXT] * len(messages), add_generation_prompt)[0]

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the Hugging Face `tokenizer.json`. Equal tokenizers give equal text."""
        data = json.loads(EMPTY_TOKENIZER)
        (example,) = data["added_tokens"]
        data["added_tokens"] = [example | {"id": i, "content": name} for i, name in enumerate(SPECIAL_TOKENS)]
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = self.pattern
        texts = [*SPECIAL_TOKENS, *map(spell_bytes, self.token_bytes[FIRST_BYTE:])]
        data["model"]["vocab"] = {text: i for i, text in enumerate(texts)}
        data["model"]["merges"] = [list(map(spell_bytes, pair)) for pair in self.merges]
        return json.dumps(data, ensure_ascii=False, indent=1)

    def content_hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: AnyPath) -> None:
        """Write a tokenizer.json."""
        write_file(path, self.to_json())

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write what transformers' AutoTokenizer reads; it adds BOS and has the chat template, as here.

        There, text that looks like a special token becomes one, as in every tokenizer of transformers.
        """
        files = {
            "tokenizer.json": json.loads(self.to_json()) | json.loads(ADD_BOS),
            "tokenizer_config.json": json.loads(TOKENIZER_CONFIG) | {"chat_template": CHAT_TEMPLATE},
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(Path(folder) / name, json.dumps(content, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: AnyPath) -> BPETokenizer:
        """Read a tokenizer.json: one of `save`, or of another family of byte-level BPE, such as Llama 3's or Qwen's."""
        data = read_json(path)
        try:
            is_ours = [token["content"] for token in data["added_tokens"]][:FIRST_BYTE] == list(SPECIAL_TOKENS)
            if is_ours:
                spelled = data["model"]["merges"]
                merges = [tuple(bytes(map(CHAR_TO_BYTE.__getitem__, half)) for half in pair) for pair in spelled]
                tokenizer = cls(FIRST_MERGE + len(merges))
                # an older file has an older word pattern, which its ids depend on
                tokenizer._set_merges(merges, data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
                # transformers adds how it padded and truncated last
                if json.loads(tokenizer.to_json()) == data | dict.fromkeys(("post_processor", "padding", "truncation")):
                    return tokenizer
        except (LookupError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{path} is not a tokenizer.json of byte-level BPE: {error!r}") from error
        if is_ours and not Path(path).with_name("tokenizer_config.json").exists():  # transformers may add tokens, too
            raise UserError(
                f"{path} is not a tokenizer.json that MiniLLM wrote: its special tokens, words or vocabulary differ"
            )
        return ImportedTokenizer(path)


# ======================================================================================================================
# 6 Data: files -> records -> memory-mapped token ids -> batches.
# ======================================================================================================================

# The life of a batch, from a file to the loss:
#   1  make_trainer asks make_loader for the loader of the stage, say PretrainDataLoader, which calls encode_data.
#   2  There is a cache folder for these contents and this code: go on at 6. Otherwise encode_once makes it.
#   3  Reader.documents opens the files, knows each record by its keys (form_of), and takes what can be trained.
#   4  Reader.items divides train from val and yields TextPart or Example; parallel_map gives them to processes.
#   5  There .encode of each asks the tokenizer for ids, and for which of them are trained.
#   6  The loader maps the arrays into memory. BatchLoader.__iter__ goes through the order of an epoch.
#   7  collate copies the rows: {"input_ids", "labels"}, (B, T), labels -100 where nothing is trained.
#   8  Trainer.step hands accumulation_steps of them to update, which counts their labels and splits them to fit memory.
#   9  PreTrainer.loss moves the labels by one, runs MiniGPT.hidden_states and sums the loss in chunked_cross_entropy.
#  10  _accumulate divides by the count of all and runs backward; clipping and the optimizers' steps follow.

TOKENIZER_BYTES = 20_000_000  # a tokenizer learns from about so much text at most


# -- records: what people have in their files --------------------------------------------------------------------------


class Form(NamedTuple):
    """A form of record, known by its keys. In a conversation the first is the user's, the second the assistant's."""

    kind: str  # text, chat, preference or prompt
    first: str
    second: str | None = None


FORMS = (  # the first one whose keys a record has
    Form("preference", "chosen", "rejected"),  # with a question as in a chat
    Form("chat", "prompt", "completion"),
    Form("chat", "prompt", "response"),
    Form("chat", "messages"),
    Form("chat", "conversations"),  # MiniMind's, and with {from, value} ShareGPT's
    Form("chat", "instruction", "output"),  # Alpaca's
    Form("chat", "instruction", "response"),  # Dolly's
    Form("chat", "question", "response"),
    Form("chat", "question", "answer"),
    Form("chat", "problem", "solution"),
    Form("chat", "query", "response"),
    Form("chat", "input", "output"),
    Form("prompt", "prompt"),
    Form("text", "text"),
)

# Descriptions of what a stage takes, for error messages.
KINDS = {
    "text": 'text: .txt files and {"text": …}',
    "chat": 'conversations: {"messages": […]} and its kin',
    "preference": 'pairs: {"prompt", "chosen", "rejected"}',
    "prompt": '{"prompt"} records, or conversations where no file has any',
}

Messages = list[dict]  # each {"role", "content"}, and "trained": False if it is not to be learned from


def form_of(record: object) -> Form | None:
    """Return the form of a record, by its content; None if it has none of the FORMS."""
    forms = FORMS if isinstance(record, dict) else ()
    return next((form for form in forms if record.keys() >= {form.first, form.second or form.first}), None)


class TextPart(NamedTuple):
    """A part of a document, or all of it."""

    split: str  # train or val
    text: str
    begins: bool = True  # the document begins with this part
    ends: bool = True

    def question(self) -> str:
        return self.text

    def texts(self) -> list[str]:
        return [self.text]

    def encode(self, tokenizer: BPETokenizer) -> dict:
        ids = tokenizer.encode(self.text, add_special_tokens=self.begins)
        return {"ids": ids + [tokenizer.eos_id] * self.ends}


class LeftOut(ValueError):
    """A record that is understood and yet left out; its text says why. It is counted, and never stops the reading."""


class Example(NamedTuple):
    """A record that is no text, ready to be encoded: one conversation of a chat, two of a pair, or one prompt."""

    split: str  # train or val
    conversations: list[Messages]
    first: int  # replies are trained from this message on
    note: dict  # what is kept as it is: "messages" (the prompt), "answer", "category"
    where: str  # file:line

    def question(self) -> str:
        """Return what decides on which side it is: the first message of a user, else all that is said."""
        asked = (message["content"].strip() for message in self.conversations[0] if message["role"] == "user")
        return next(asked, "") or json.dumps(self.texts())

    def texts(self) -> list[str]:
        """Return what is said in it; of a pair the prompt only once."""
        chosen, *rejected = self.conversations
        said = chosen + [message for messages in rejected for message in messages[self.first :]]
        return [message["content"] for message in said]

    def encode(self, tokenizer: BPETokenizer) -> dict:
        ids, trained, lengths = [], [], []
        for messages in self.conversations:
            if self.first == len(messages):  # a prompt
                row = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                flags = [False] * len(row)
            else:
                row, flags = tokenizer.encode_chat(messages, self.first)
                while flags and not flags[-1]:  # what follows the last reply teaches nothing
                    del row[-1], flags[-1]
            ids += row
            trained += flags
            lengths.append(len(row))
        note = json.dumps(self.note).encode()
        return {"ids": ids, "trained": trained, "lengths": lengths, "notes": note, "note_lengths": [len(note)]}


def read_document(kind: str, where: str, record: dict, form: Form, remarks: list[str]) -> Path | TextPart | Example:
    """Return a record as a document of a kind; of a .txt file its path. Raises ValueError for what is wrong with it.

    What of the record is not read, or is changed, is noted in `remarks`.
    """
    if kind != "text":
        document = read_example(kind, where, record, form, remarks)
    else:
        text = record["text"]
        if isinstance(text, Path):
            return text
        if not isinstance(text, str):
            raise ValueError(f'"text" must be a string, not {type(text).__name__}')
        if not text:
            raise LeftOut("empty text")
        document = TextPart("train", text)
        remarks += [f"unknown key {key!r}" for key in record if key != "text"]
    if re.search("[\ud800-\udfff]", "".join(document.texts())):
        raise ValueError("an escape \\ud800 … \\udfff without its other half is no character")
    return document


def hash_share(text: str) -> float:
    """Return a number in [0, 1) that only the text decides; hashes spread evenly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


class Reader:
    """Reads the records of the files that `paths` name. A malformed one stops it with file:line, or is counted.

    `counts` are the records that were left out or changed, by description; `report` puts them into words.
    """

    def __init__(self, paths: Paths, on_bad_record: str = "stop"):
        self.paths, self.files, self.on_bad_record = path_list(paths), data_files(paths), on_bad_record
        self.counts, self.first_places, self.kinds = Counter(), {}, defaultdict(Counter)
        self.files_used = 0

    def key(self, *rules: object) -> str:
        """Return a name for the content of the files and the `rules` that it is read by."""
        # Names do not matter, but whether a file is read as text, and whether it may lack records (see items).
        content = [(data_suffix(path), path in self.paths, hash_file(path)) for path in self.files]
        return hashlib.sha256(repr((content, self.on_bad_record, rules)).encode()).hexdigest()[:24]

    def skip(self, where: str, problem: object, what: str = "malformed") -> None:
        """Count a record that cannot be used, or stop with a UserError."""
        if self.on_bad_record == "stop":
            raise UserError(f"{where}: {problem} (--on-bad-record skip goes on without such records)")
        self.count(what, f"{where}: {problem}")

    def count(self, what: str, where: str, n: int = 1) -> None:
        self.counts[what] += n
        self.first_places.setdefault(what, where)

    def report(self) -> str:
        """Return one line on the records that were left out or changed so far; empty if none was."""
        parts = [f"{n:,} × {what}, the first at {self.first_places[what]}" for what, n in self.counts.items()]
        return "records left out or changed: " * bool(parts) + "; ".join(parts)

    def _values(self, path):
        """Yield (file:line, value) for every JSON value in a file: one a line, or over lines as the first one shows.

        A list of records stands for its items.
        """
        limit, is_first, is_whole = LONGEST_RECORD, True, False
        with open_text(path) as file:
            for number, text in enumerate(iter(lambda: file.readline(LONGEST_RECORD + 1), ""), 1):
                if is_first and (line := text.strip()):
                    is_first = False
                    if data_suffix(path) == ".jsonl":  # a value a line, unless one goes on in the next
                        is_whole = line in "[{" or line[0] == "[" and line[-1] != "]"
                    else:  # a .json is one value, unless its first line is an object by itself
                        is_whole = not (line[0] == "{" and line[-1] == "}")
                    if is_whole:
                        limit *= 16
                        text += file.read(limit)
                if len(text) > limit:
                    raise UserError(f"{path}:{number}: a line of more than {limit:,} characters: one record a line")
                try:
                    for line, value in json_values(text.rstrip()):
                        where = f"{path}:{number + line}"
                        if isinstance(value, list):
                            for i, item in enumerate(value):
                                yield f"{where}[{i}]", item
                        else:
                            yield where, value
                except (ValueError, RecursionError) as error:  # not JSON, or brackets thousands deep
                    line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
                    what = "malformed file, of which the rest is lost" if is_whole else "malformed"
                    self.skip(f"{path}:{number + line - 1}:{column}", f"not JSON: {error}", what)

    def _rows(self, path):
        """Yield (file:row, record) for every row of a .parquet file; what is null is left out."""
        parquet = import_extra("pyarrow.parquet", "data")
        try:
            # A thousand rows and a megabyte of the file are in memory at a time.
            file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            batches = file.iter_batches(1000, use_threads=False)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                # Through JSON: dates and the like become texts, as they are in the other files.
                record = json.loads(json.dumps(row, default=str), object_hook=_without_nulls)
                yield f"{path}:{number}", record
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged .parquet file ({error})") from error

    def records(self, path: Path) -> Iterator[tuple]:
        """Yield (file:line, record, its form) for every record in a file; a .txt file is {"text": its path}.

        A file of a directory that holds no record at all is passed over.
        """
        suffix = data_suffix(path)
        if suffix == ".txt":
            values = [(str(path), {"text": path})] if next(read_text(path), "") else []
        else:
            values = self._rows(path) if suffix == ".parquet" else self._values(path)
        # An unknown record is an error in a file with data, but a directory may hold other .json files, too: there it
        # waits until a record shows that the file has some.
        kinds, unknown = self.kinds[path], None
        for where, record in values:
            if form := form_of(record):
                kinds[form.kind] += 1
            elif not unknown:
                keys = ", ".join(record) or "empty object" if isinstance(record, dict) else type(record).__name__
                forms = "; ".join("+".join(filter(None, form[1:])) for form in FORMS)
                unknown = where, f"unknown form of record ({keys}): allowed are objects with {forms}"
            if unknown and (kinds or path in self.paths or self.on_bad_record == "skip"):
                self.skip(*unknown)
                unknown = None
            if form:
                yield where, record, form
        if not kinds and path not in self.paths:
            self.count("file without records", ": ".join(unknown or [str(path)]))

    def documents(self, path: Path, kind: str, source: str) -> Iterator[Path | TextPart | Example]:
        """Yield a document of a `kind` for every record of the kind `source` in a file."""
        for where, record, form in self.records(path):
            if form.kind != source:
                continue
            remarks = []
            try:
                yield read_document(kind, where, record, form, remarks)
                for remark in dict.fromkeys(remarks):
                    self.count(remark, where)
            except LeftOut as error:
                self.count(str(error), where)
            except (ValueError, TypeError) as error:  # a key holds something of another type
                self.skip(where, error)

    def division(self, kind: str, source: str) -> Callable:
        """Return the function that says on which side a document is, "train" or "val", whatever the documents' order.

        A tenth of all hashes are for validation. The first question's hash decides, for chats, pairs and prompts alike,
        so that no question is on both sides. Of two different documents at least one is on each side.
        """
        ahead = Reader(self.paths, "skip")  # what is wrong with the documents is said later
        for text_of in (lambda document: document.question(), lambda document: json.dumps(document.texts())):
            shares, below = set(), 0.1
            for document in itertools.chain(*(ahead.documents(path, kind, source) for path in ahead.files)):
                # A .txt gives to both sides.
                shares |= {0, 1} if isinstance(document, Path) else {hash_share(text_of(document))}
                if min(shares) < below <= max(shares):  # both sides have one: no need to read on
                    break
            else:  # All are on one side. Then the lowest tenth is for validation, but not a single document.
                below = sorted(shares)[max(1, len(shares) // 10)] if len(shares) > 1 else 0
            if below:
                return lambda document: "val" if hash_share(text_of(document)) < below else "train"
        return lambda _: "train"

    def items(self, kind: str, split: str) -> Iterator[TextPart | Example]:
        """Yield what is to be encoded: the parts of every text, or an example for every other record of a kind.

        A file without such records is an error if the user named it, and skipped if it came from a directory.
        """
        source = kind
        if kind == "prompt" and "prompt" not in kinds_of(self.paths):
            source = "chat"  # conversations hold prompts, too
        side = self.division(kind, source) if split != "all" else lambda _: "train"
        count = 0
        for path in self.files:
            for document in self.documents(path, kind, source):
                count += 1
                if isinstance(document, Path):
                    yield from text_parts(document, split)
                else:
                    yield document._replace(split=side(document))
            kinds = self.kinds[path]
            if kinds[source]:
                self.files_used += 1
                for other in sorted(kinds.keys() - {source}):
                    self.count(f"{other} record, which other stages take", str(path), kinds[other])
            elif path in self.paths:
                raise self._nothing(kind, [path], kinds)
        if not count:
            raise self._nothing(kind, self.paths, sum(self.kinds.values(), Counter()))

    def _nothing(self, kind, paths, kinds):
        found = f"it holds {', '.join(kinds) or 'no'} records" + f" ({self.report()})" * bool(self.counts)
        return UserError(f"{', '.join(map(str, paths))}: nothing for this stage, which takes {KINDS[kind]}: {found}")


def _without_nulls(value):
    return {key: item for key, item in value.items() if item is not None}


def text_parts(path: Path, split: str) -> Iterator[TextPart]:
    """Yield a .txt file in parts; the last tenth of its characters is for validation, unless the split is "all"."""
    total = sum(map(len, read_text(path)))
    # Characters before `boundary` are trained on; `at` is where the next part starts.
    boundary, at = total if split == "all" else max(1, int(0.9 * total)), 0
    for part in read_text(path):
        k = max(0, boundary - at)  # the boundary may lie inside this part
        for half in filter(None, (part[:k], part[k:])):
            side, end = "train" if at < boundary else "val", at + len(half)
            yield TextPart(side, half, at in (0, boundary), end in (boundary, total))
            at = end


def kinds_of(paths: Paths) -> Counter:
    """Count the records of each kind in the files."""
    reader = Reader(paths, "skip")  # what is wrong with them is said when they are used
    return Counter(form.kind for path in reader.files for _, _, form in reader.records(path))


# -- what the tokenizer learns from ------------------------------------------------------------------------------------


def sample_texts(paths: Paths, split: str, on_bad_record: str) -> Iterator[str]:
    """Yield the texts that a tokenizer learns from: all that is trained on, of large data a sample.

    The sample consists of whole records, chosen by their content, so that alternating data are sampled evenly. Names of
    keys and roles are left out.
    """
    reader = Reader(paths, on_bad_record)
    # Compressed text is about four times as long as its file.
    size = sum(f.stat().st_size * (4 if f.suffix in (".gz", ".parquet") else 1) for f in reader.files)
    every = max(1, round(size / TOKENIZER_BYTES))
    division = functools.cache(reader.division)
    for path in reader.files:
        for where, record, form in reader.records(path):
            if data_suffix(path) == ".txt":  # every so many of a long text's parts
                parts = (part.text for part in text_parts(path, split) if part.split == "train")
                yield from itertools.islice(parts, 0, None, every)
            elif zlib.crc32(json.dumps(record).encode()) % every == 0:  # one record in so many
                try:
                    document = read_document(form.kind, where, record, form, [])
                except (ValueError, TypeError):  # is said when the record is used
                    continue
                if split == "all" or division(form.kind, form.kind)(document) == "train":
                    yield from document.texts()


class TokenizerManager:
    """Trains a tokenizer once for each content of the data, and finds it again by that content's hash."""

    def __init__(self, cache_dir: AnyPath = "out/cache"):
        self.cache_dir = Path(cache_dir)

    def get_or_train_tokenizer(
        self, data_path: Paths, vocab_size: int = 4096, split: str = "train", on_bad_record: str = "stop"
    ) -> BPETokenizer:
        """Return a tokenizer of `vocab_size` tokens for `data_path` (a file, a directory or a list of them).

        With split="train" it never sees the validation part of the data; with "all" it learns from everything.
        """
        key = Reader(data_path, on_bad_record).key(vocab_size, split, code_hash())
        path = self.cache_dir / f"tokenizer-{key}.json"
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # A second process that finds none waits for the first one's.
        with contextlib.nullcontext() if path.exists() else locked(self.cache_dir, wait=True):
            try:
                if path.exists():
                    return BPETokenizer.load(path)
            except UserError as error:
                warnings.warn(f"{path} is damaged: training the tokenizer again ({error})", stacklevel=2)
            tokenizer = BPETokenizer(vocab_size)
            tokenizer.train(sample_texts(data_path, split, on_bad_record))
            tokenizer.save(path)
        return tokenizer


# -- the cache: everything is encoded once, into folders of plain arrays -----------------------------------------------


def encode_once(folder: Path, parts: Iterable[dict[str, bytes]]) -> None:
    """Fill `folder` with the files that parts, {name: bytes to append}, add up to; only if it does not exist yet.

    The folder appears complete or not at all. A second process with the same work waits for the first one's result.
    """
    if _is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, sizes = temporary_beside(folder), Counter()
    with locked(folder.parent, wait=True):
        if _is_whole(folder):
            return
        if folder.exists():
            warnings.warn(f"{folder} is damaged: encoding the data again", stacklevel=4)
            shutil.rmtree(folder)
        temporary.mkdir()
        try:
            for part in parts:
                for name, values in part.items():
                    with open(temporary / name, "ab") as file:  # appends
                        sizes[name] += file.write(values)
            (temporary / "sizes").write_text(json.dumps(sizes))
            for path in temporary.iterdir():  # on the disk before the folder gets its name
                with open(path, "ab") as file:
                    os.fsync(file.fileno())
            try:
                os.rename(temporary, folder)
            except OSError:
                if not _is_whole(folder):  # where nothing can be locked, another process may have been faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder):
    try:
        sizes = json.loads((folder / "sizes").read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):  # absent, or cut short
        return False


def _array_types(tokenizer):
    """Return the arrays of a split and their types, for the array module and for torch.

    Sequences lie end to end in `ids` and `trained`, records as JSON in `notes`; the lengths tell them apart.
    """
    ids = ("H", torch.uint16) if tokenizer.vocab_size <= 1 << 16 else ("I", torch.uint32)
    return {
        "ids": ids,
        "trained": ("b", torch.bool),
        "lengths": ("i", torch.int32),
        "notes": ("B", torch.uint8),
        "note_lengths": ("i", torch.int32),
    }


def _encode_items(items, tokenizer):
    """Return the arrays of both splits, {"train.ids": bytes, …}, and (file:line, problem) where a template refuses."""
    arrays = {
        f"{split}.{name}": array.array(typecode)
        for split in ("train", "val")
        for name, (typecode, _) in _array_types(tokenizer).items()
    }
    refused = []
    for item in items:
        try:
            encoded = item.encode(tokenizer)
        except UserError as error:  # by an imported chat template
            refused.append((item.where, str(error)))
            continue
        for name, values in encoded.items():
            part = arrays[f"{item.split}.{name}"]
            part += array.array(part.typecode, values)  # bytes at once
    return {name: values.tobytes() for name, values in arrays.items()}, refused


def _memory_map(path, dtype):
    """Return a file of numbers as a memory-mapped tensor (N,)."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return torch.empty(0, dtype=dtype)
    with open(path, "rb") as file:  # not torch.from_file, which wants a path in UTF-8
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=dtype)


def encode_data(
    kind: str, paths: Paths, tokenizer: BPETokenizer, split: str, cache_dir: AnyPath, on_bad_record: str = "stop"
) -> tuple[Batch, str, str]:
    """Return the memory-mapped arrays of a split of a kind's records, the split's key, and "2 of 3 files" if not all.

    The splits "train" and "val" divide the data; "all" takes them whole. Val is the last tenth of the characters of
    each .txt, and the records whose first question (a text: its content) is among the lowest tenth of hashes.
    """
    # 1. The name of the cache folder says from what, by what rules and by what code it was made.
    reader = Reader(paths, on_bad_record)
    key = reader.key(kind, split == "all" or "by the first question", tokenizer.content_hash())
    folder = Path(cache_dir) / f"{key}-{code_hash()}"

    # 2. Train and val are encoded together, in lists of items of about half a million characters (item[1]: the text).
    def parts():
        lists = batched(reader.items(kind, split), lambda item: len(str(item[1])))
        for encoded, refused in parallel_map(functools.partial(_encode_items, tokenizer=tokenizer), lists):
            for where, problem in refused:
                reader.skip(where, problem, "refused by the chat template")
            yield encoded
        used, total = reader.files_used, len(reader.files)
        files = f"{used} of {total} files" * (used < total)
        yield {"report": reader.report().encode(), "files": files.encode()}  # later users of the folder read them there

    encode_once(folder, parts())
    if report := (folder / "report").read_text(encoding="utf-8"):
        warnings.warn(report, stacklevel=4)
    # 3. Only what a batch needs is read from the disk.
    part = "val" if split == "val" else "train"
    arrays = {
        name: _memory_map(folder / f"{part}.{name}", dtype) for name, (_, dtype) in _array_types(tokenizer).items()
    }
    if not len(arrays["ids"]):
        raise UserError(
            f"{', '.join(map(str, reader.paths))}: the {part} part is empty: one document, or copies of one, cannot be "
            "divided into train and val: give more documents, or --val-data"
        )
    return arrays, f"{key}-{split}", (folder / "files").read_text()


# -- batches -----------------------------------------------------------------------------------------------------------


def batched(items: Iterable, size: Callable = lambda _: 1, limit: int = 1 << 19) -> Iterator[list]:
    """Yield lists of consecutive items whose sizes, or else whose number, add up to about `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _shuffled(items, random):
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]


def pad_left(rows: list[list[int]], pad_id: int) -> Batch:
    """Return rows of ids as {"input_ids", "attention_mask"}, both (B, T), padded on the left."""
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return {"input_ids": pad(ids, padding_value=pad_id), "attention_mask": pad(list(map(torch.ones_like, ids)))}


def _pack(rows, pad_id):
    """Return rows, each of (ids, trained) sequences one after another, as a batch of (B, T) int64, padded on the right.

    It is {"input_ids", "labels" (-100 where not trained), "position_ids", "segments"}: the sequences of a row are
    numbered from 1 (0 is padding), and positions restart with each.
    """
    packed = []
    for row in rows:
        sequences = [
            torch.stack((ids, trained, torch.arange(len(ids)), torch.full_like(ids, k)), dim=1)
            for k, (ids, trained) in enumerate(row, 1)
        ]
        packed.append(torch.cat(sequences))  # (T of the row, 4); all rows get the length of the longest
    ids, trained, positions, segments = nn.utils.rnn.pad_sequence(packed, batch_first=True).unbind(2)  # (B, T)
    ids = ids.masked_fill(segments == 0, pad_id)
    return {"input_ids": ids, "labels": ids.where(trained > 0, -100), "position_ids": positions, "segments": segments}


class Source(NamedTuple):
    """Where a loader's data come from: files or directories, and which part of them: train, val or all."""

    paths: list[str]
    split: str


class BatchLoader:
    """Base of the loaders: batches in an order that seed and epoch decide, and the exact cursor as `state_dict`.

    `paths` are files and directories; every record form of the README is recognised. Iterating gives the batches up to
    the end of the epoch; the next iteration is the next epoch. A subclass says what an epoch's items are, and collates.
    """

    kind = ""
    fixed: tuple = ("corpus", "seed", "seq_len")  # what the order depends on

    def __init__(
        self,
        paths: Paths,
        tokenizer: BPETokenizer,
        batch_size: int = 16,
        seq_len: int = 256,
        split: str = "train",
        *,
        shuffle: bool | None = None,
        seed: int = 0,
        cache_dir: AnyPath = "out/cache",
        on_bad_record: str = "stop",
    ):
        self.arrays, self.corpus, self.files = encode_data(self.kind, paths, tokenizer, split, cache_dir, on_bad_record)
        self.tokenizer, self.batch_size, self.seq_len, self.seed = tokenizer, batch_size, seq_len, seed
        self.source = Source([str(path.absolute()) for path in path_list(paths)], split)
        # Validation goes through the data in order.
        self.shuffle = split != "val" if shuffle is None else shuffle
        self.rewind()  # to the first epoch's start
        self._prepare()

    def rewind(self):
        self.epoch = self.index = 0  # index: items of this epoch that have been given out

    @property
    def passes(self) -> float:
        """How often the data have been gone through: whole epochs, and the part of the one being iterated."""
        return self.epoch + self.index / self.size

    def _epoch_generator(self):
        """Return this epoch's random generator."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)

    def _whole_batches(self, items):
        """Return the items without a last batch that is small, a noisy step; they come in another epoch."""
        return items[: len(items) - len(items) % self.batch_size] or items

    def __iter__(self):
        order = self.order()  # the whole epoch's; the cursor may stand in its middle
        self.size = len(order)
        while self.index < len(order):
            yield self.collate(self._take(order))
        self.epoch, self.index = self.epoch + 1, 0

    def _take(self, order):
        """Return the items of the next batch, and move the cursor behind them."""
        items = order[self.index : self.index + self.batch_size]
        self.index += len(items)  # before the batch is given out: a checkpoint then goes on behind it
        return items

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("epoch", "index", *self.fixed)}

    def load_state_dict(self, state: dict):
        for name in self.fixed:
            if state[name] != getattr(self, name):
                raise UserError(
                    f"{name}={getattr(self, name)}, but {name}={state[name]} in the checkpoint: give the same --data, "
                    "--val-data, tokenizer and options as before"
                )
        self.epoch, self.index = state["epoch"], state["index"]


class PretrainDataLoader(BatchLoader):
    """Batches of blocks of `seq_len` + 1 consecutive tokens; neighbours share a token, so that each is predicted once.

    Gives {"input_ids", "labels"}, both (B, seq_len + 1) int64 and equal. Shuffled blocks start at an offset that
    changes with the epoch. In order (`shuffle=False`) no token is left out: the last rows may be fewer, and the very
    last one shorter.
    """

    kind = "text"

    def _prepare(self):
        self.tokens = self.arrays["ids"]
        if len(self.tokens) <= (self.seq_len if self.shuffle else 1):
            raise UserError(
                f"{', '.join(self.source.paths)}: the {self.source.split} part holds {len(self.tokens)} "
                f"tokens, fewer than seq_len={self.seq_len} and one: give more data, or a smaller --seq-len"
            )

    def order(self) -> list[int]:
        """Return where this epoch's blocks start, in the order in which they are given out."""
        T, N = self.seq_len, len(self.tokens)
        if not self.shuffle:  # one block after another
            return list(range(0, N - 1, T))
        random = self._epoch_generator()
        # The last start leaves room for T + 1 tokens.
        offset = int(torch.randint(0, min(T, N - T), (), generator=random)) if self.epoch else 0
        return self._whole_batches(_shuffled(range(offset, N - T, T), random))

    def __len__(self):
        return math.ceil(len(self.order()) / self.batch_size)

    def _take(self, order):
        starts = super()._take(order)
        if len(starts) > 1 and starts[-1] + self.seq_len >= len(self.tokens):  # the short end is a batch of its own
            starts.pop()
            self.index -= 1
        return starts

    def collate(self, starts: list[int]) -> Batch:
        batch = torch.stack([self.tokens[i : i + self.seq_len + 1].long() for i in starts])  # (B, T + 1)
        return {"input_ids": batch, "labels": batch}


LONGER = ": --seq-len takes longer ones (at most the context: --max-position-embeddings of a new model)"


class RecordDataLoader(BatchLoader):
    """Batches of records of a `kind`; a subclass makes the batches.

    `items` are the records in use: those too long for `seq_len` are left out (or truncated by the subclass), with one
    warning that counts them.
    """

    sides = 1  # sequences of a record
    fixed = (*BatchLoader.fixed, "batch_size")
    window = 16  # batches whose records are sorted by length together

    def _prepare(self):
        lengths = self.arrays["lengths"]  # of sequences; record i has those from sides * i on
        self.ends = [0, *lengths.cumsum(0).tolist()]
        self.note_ends = [0, *self.arrays["note_lengths"].cumsum(0).tolist()]
        self.lengths = lengths.view(-1, self.sides).amax(dim=1).tolist()  # of each record's longest sequence
        self.items = self.select_items()
        if not self.items:
            raise UserError(
                f"{', '.join(self.source.paths)}: none of {len(self.lengths)} {self.kind} records fits "
                f"{self.seq_len} tokens (--seq-len; of a prompt, what --reply-tokens leave)"
            )

    def select_items(self) -> list[int]:
        """Return the records to use, and warn about the others."""
        items = [i for i, length in enumerate(self.lengths) if length <= self.seq_len]
        if len(items) < len(self.lengths):
            warnings.warn(
                f"{len(self.lengths) - len(items)} of {len(self.lengths)} {self.kind} records exceed "
                f"{self.seq_len} tokens and are left out{LONGER}",
                stacklevel=4,
            )
        return items

    def sequence(self, i: int, side: int = 0) -> tuple[Tensor, Tensor]:
        """Return the ids (n,) int64 of a sequence of record i, as far as they are used, and which are trained (n,)."""
        k = self.sides * i + side
        start, end = self.ends[k : k + 2]
        span = slice(start, min(end, start + self.lengths[i]))
        return self.arrays["ids"][span].long(), self.arrays["trained"][span]

    def note(self, i: int) -> dict:
        """Return what is kept of record i as it was: "messages" (the prompt), "answer", "category"."""
        start, end = self.note_ends[i : i + 2]
        return json.loads(ctypes.string_at(self.arrays["notes"].data_ptr() + start, end - start))  # no copy by number

    def prompt_ids(self, i: int) -> list[int]:
        return self.tokenizer.apply_chat_template(self.note(i)["messages"], add_generation_prompt=True)

    def order(self) -> list[int]:
        """Return the records of this epoch; shuffled, a batch's are of similar length, so it needs little padding."""
        if not self.shuffle:
            return self.items
        random, size = self._epoch_generator(), self.batch_size
        # 1. Shuffle the records. 2. Sort them by length, but only near ones. 3. Shuffle the batches.
        items = self._whole_batches(_shuffled(self.items, random))  # not after sorting: always the longest
        windows = batched(items, limit=self.window * size)
        near = [i for window in windows for i in sorted(window, key=self.lengths.__getitem__)]
        batches = list(batched(near, limit=size))
        return list(itertools.chain(*_shuffled(batches, random)))


class ConversationDataLoader(RecordDataLoader):
    """Batches of conversations for SFT; only the assistant's content and end-of-turn are trained, in every turn.

    Gives {"input_ids", "labels" (-100 where not trained), "position_ids", "segments"}, each (B, T) int64, T at most
    `seq_len`. With `packing` a row holds several conversations: `segments` numbers them from 1 (0 is padding), and
    positions restart with each. A conversation that is too long loses whole turns at its end. If the first reply alone
    is too long, it is truncated and lacks its end-of-turn.
    """

    kind, fixed = "chat", (*RecordDataLoader.fixed, "packing")

    def __init__(self, *args, packing: bool = True, **options):
        self.packing = packing
        super().__init__(*args, **options)

    def select_items(self) -> list[int]:
        # 1. A row takes a conversation up to the end of its last reply that ends within `seq_len`.
        full, starts, trained = torch.tensor(self.lengths), torch.tensor(self.ends[:-1]), self.arrays["trained"]
        ends = (trained[:-1] > trained[1:]).nonzero().flatten() + 1  # behind each reply, in the array of all ids
        ends = F.pad(ends, (1, 0))  # with a 0 before them, where none fits
        last = ends[torch.searchsorted(ends, starts + self.seq_len, right=True) - 1]
        kept = full.where(full <= self.seq_len, (last - starts).clamp(min=0))
        self.truncated = (kept == 0).tolist()  # where not even the first reply fits
        self.lengths = kept.where(kept > 0, self.seq_len).tolist()
        # 2. Of a truncated conversation a part of a reply must be left.
        items = [i for i, cut in enumerate(self.truncated) if not cut or self.sequence(i)[1].any()]
        too_long, lost = int((full > self.seq_len).sum()), sum(self.truncated)
        if too_long:
            warnings.warn(
                f"of {len(full)} conversations {too_long} exceed {self.seq_len} tokens: {too_long - lost} lose turns "
                f"at their end, {lost} are truncated and lack their end-of-turn, "
                f"{len(full) - len(items)} of which hold nothing to train on and are left out{LONGER}",
                stacklevel=5,
            )
        return items

    def _take(self, order):
        """Return the conversations of each row of the next batch: each goes into the first row with room for it.

        With packing there are more than `batch_size` of them; what `order` calls a batch is then a run of like lengths.
        """
        rows, room = [[] for _ in range(self.batch_size)], [self.seq_len] * self.batch_size
        for i in order[self.index :]:
            k = next((k for k, left in enumerate(room) if self.lengths[i] <= left), None)
            if k is None:
                break
            rows[k].append(i)
            room[k] -= self.lengths[i] if self.packing else self.seq_len  # else the row is full
            self.index += 1
        return [row for row in rows if row]

    def collate(self, rows: list[list[int]]) -> Batch:
        """Return the batch of these rows of conversations."""
        return _pack([[self.sequence(i) for i in row] for row in rows], self.tokenizer.pad_id)


class DPODataLoader(RecordDataLoader):
    """Batches of preference pairs: "input_ids", "labels" (-100 outside the completions), "attention_mask", (B, 2, T).

    Row 0 of a pair is prompt and chosen completion, row 1 prompt and rejected one, both padded on the right. "category"
    is a list. Once a trainer has set `reference_logprobs` (pairs, 2), batches carry their rows of it.
    """

    kind, sides = "preference", 2
    reference_logprobs: Tensor | None = None

    def collate(self, items: list[int]) -> Batch:
        batch = _pack([[self.sequence(i, side)] for i in items for side in (0, 1)], self.tokenizer.pad_id)
        input_ids, labels, _, segments = (value.view(len(items), 2, -1) for value in batch.values())  # (B, 2, T)
        # A row holds one sequence, so its segments are 1, and 0 for padding: an attention mask.
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": segments}
        batch["category"] = [self.note(i)["category"] for i in items]
        if self.reference_logprobs is not None:
            batch["reference_logprobs"] = self.reference_logprobs[items]
        return batch


class PromptDataLoader(RecordDataLoader):
    """Batches of prompts for PPO and GRPO: the lists "input_ids" (of lists of ids), "messages" and "answers".

    A prompt has at most `seq_len` tokens. An answer is "" where none is known.
    """

    kind = "prompt"
    window = 1  # not sorted by length: prompts of one length are mostly one task, and a step on it unlearns the others

    def collate(self, items: list[int]) -> dict:
        notes = [self.note(i) for i in items]
        return {
            "input_ids": [self.sequence(i)[0].tolist() for i in items],
            "messages": [note["messages"] for note in notes],
            "answers": [note["answer"] for note in notes],
        }


class LanguageModelingDataset(torch.utils.data.Dataset):
    """Texts as rows of `max_length` tokens for a plain torch DataLoader; long texts take several rows.

    An item is {"input_ids", "labels", "attention_mask"}, each (max_length,) int64: BOS text EOS, then padding, whose
    labels are -100. A text's next row begins with the last token of the row before, so that each token is predicted.
    """

    def __init__(self, texts: Iterable[str], tokenizer: BPETokenizer, max_length: int):
        if max_length < 2:
            raise UserError(f"max_length={max_length} is not possible: it must be 2 or more")
        self.pad_id, self.max_length, self.rows = tokenizer.pad_id, max_length, []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = torch.tensor([*tokenizer.encode(text, add_special_tokens=True), tokenizer.eos_id])
            # Rows overlap by one token, which is an input only in the later one.
            self.rows += [ids[i : i + max_length] for i in range(0, len(ids) - 1, max_length - 1)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int):
        ids = self.rows[i]
        input_ids = F.pad(ids, (0, self.max_length - len(ids)), value=self.pad_id)
        mask = torch.arange(self.max_length) < len(ids)
        return {"input_ids": input_ids, "labels": input_ids.where(mask, -100), "attention_mask": mask.long()}


# ======================================================================================================================
# 7 Generation: one cached decoder for greedy search, sampling, streaming and chat; beam search beside it.
# ======================================================================================================================


@dataclass
class GenerationConfig:
    """How to continue a prompt. Lengths are in tokens."""

    max_new_tokens: int | None = None  # longest continuation (default: 128, or what max_length leaves)
    min_new_tokens: int = 0  # end tokens are forbidden before so many
    max_length: int | None = None  # longest prompt (with its padding) and continuation; max_new_tokens wins
    do_sample: bool = True  # draw from the distribution; off is greedy
    temperature: float = 0.8  # below 1 sharpens, above 1 flattens; 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 0.95  # keep the fewest tokens whose probabilities reach p; 1 keeps all
    min_p: float = 0.0  # keep tokens at least so likely, relative to the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred already less likely (CTRL)
    num_beams: int = 1  # hypotheses of beam search; 1 is none
    length_penalty: float = 1.0  # beams are ranked by log-probability / length ** penalty
    early_stopping: bool = False  # beams end as soon as num_beams are finished, not when none can win any more
    stop: list[str] | None = None  # texts that end the continuation; they are not part of it
    seed: int | None = None  # seed of the sampling; without one each call differs

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        ranges = {
            "[1, inf)": "max_new_tokens max_length num_beams",
            "[0, inf)": "min_new_tokens top_k temperature",
            "(0, 1]": "top_p",
            "[0, 1]": "min_p",
            "[1e-6, 1e9]": "repetition_penalty",
            "[-10, 10]": "length_penalty",
            "[0, 4294967295]": "seed",
        }
        check_fields(self, ranges)
        check(self, all(isinstance(text, str) and text for text in self.stop or []), "stop", "texts that are not empty")

    def new_tokens(self, prompt_len: int) -> int:
        """Return how many tokens to add to a prompt of `prompt_len`."""
        left = 128 if self.max_length is None else max(0, self.max_length - prompt_len)
        return self.max_new_tokens or left


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` (B, V) less likely in logits (B, V): CTRL's penalty (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sampling_probs(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Logits (B, V) -> probabilities (B, V) after temperature, top-k, top-p and min-p, 0 for what these remove.

    top-p (arXiv:1904.09751) keeps the token that crosses p; min-p is arXiv:2407.01082.
    """
    probs = (logits.float() / config.temperature).softmax(dim=-1)
    if not config.top_k and config.top_p == 1 and not config.min_p:
        return probs
    V = probs.shape[-1]
    if config.top_k:
        top, ids = probs.topk(min(config.top_k, V))  # likeliest first
        top = top / top.sum(dim=-1, keepdim=True)  # top-p and min-p look at what top-k leaves
    elif probs.is_cuda:
        top, ids = probs.sort(dim=-1, descending=True)
    else:
        # On a CPU, sorting all V tokens would take longer than the model. Tokens below (1 - p) / V hold less than 1 - p
        # together, so they are not among those that reach p: only the others need to be sorted.
        least = (config.min_p * probs.amax(dim=-1, keepdim=True)).clamp(min=(1 - config.top_p) / V)
        top, ids = probs.topk(int((probs >= least).sum(dim=-1).max()))
    likelier = top.cumsum(dim=-1) - top  # probability of all the tokens before each
    top = top * ((likelier < config.top_p) & (top >= config.min_p * top[:, :1]))
    top = top / top.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, ids, top)  # back to the order of the vocabulary


def draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token for each row of probabilities (B, V), by random numbers (B, 1) from [0, 1) -> (B,).

    It is the first whose cumulative probability exceeds the number. torch.multinomial needs V numbers a row, and 15
    times as long.
    """
    cumulative = probs.cumsum(dim=-1)
    cumulative = cumulative / cumulative[:, -1:]  # ends at exactly 1, above any random number
    return torch.searchsorted(cumulative, numbers, right=True)[:, 0]


def _decode_step(model, ids, positions, mask, cache):
    """Return the logits (B, V) after ids (B, T): what is compiled for decoding, where all shapes are fixed."""
    hidden, _ = model.hidden_states(ids, position_ids=positions, attention_mask=mask, cache=cache)
    return model.logits(hidden[:, -1])


def _is_recorded(model):
    # only in the main thread: two threads could not record at once
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and model.has_fixed_shapes and model.embed_tokens.weight.is_cuda


class _Decoding:
    """The state of a batch while decoding: KV cache, padding, and the tokens that are forbidden or penalized."""

    def __init__(self, generator, input_ids, config, attention_mask, choose=None):
        self.model, self.tokenizer, self.compiled = generator.model, generator.tokenizer, generator.compiled
        self.config, self.device, self.choose = config, self.model.embed_tokens.weight.device, choose
        self.is_recorded, self.repeat = _is_recorded(self.model), None
        self.has_fixed_shapes = self.is_recorded or self.compiled is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        limit, V = self.model.config.max_position_embeddings, self.model.config.vocab_size
        # 1 check the prompts
        if input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
            raise UserError(f"prompts must be integers (B, T), int64, not {input_ids.dtype} {tuple(input_ids.shape)}")
        if mask.shape != input_ids.shape or not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
            raise UserError("prompts of unequal length must be padded on the left, where attention_mask (B, T) is 0")
        (B, T), (low, high) = input_ids.shape, input_ids.aminmax()
        if T >= limit:
            raise UserError(f"a prompt of {T} tokens leaves no room in the context of {limit}: shorten it")
        if low < 0 or high >= V:
            raise UserError(f"prompt ids lie in {low} … {high}, the model's in 0 … {V - 1}")
        if config.new_tokens(T) < 1:
            raise UserError(f"max_length={config.max_length} leaves nothing to add to a prompt of {T} tokens")
        self.room = (limit - mask.sum(dim=1)).clamp(max=config.new_tokens(T)).to(self.device)  # (B,): tokens left
        self.new_tokens = int(self.room.max())
        # 2 make room for them and what follows
        size, self.least_end = T + self.new_tokens, T + config.min_new_tokens  # no end before so many
        if self.compiled:  # code is compiled for a shape: sizes in steps of 256 let calls share it
            size = max(size, min(limit, -(-size // 256) * 256))
        self.cache, self.position = KVCache(self.model, B, size), torch.zeros(1, dtype=torch.long, device=self.device)
        self.padding = (mask == 0).sum(dim=1, keepdim=True).to(self.device)  # (B, 1): slots before a row's first token
        self.is_padded = bool(self.padding.any())
        self.seen = torch.zeros(B, V, dtype=torch.bool, device=self.device)  # the tokens that occurred
        self.stop_ids = torch.tensor(self.tokenizer.stop_ids, dtype=torch.long, device=self.device)
        self.is_stop = torch.zeros(V, dtype=torch.bool, device=self.device).index_fill_(0, self.stop_ids, True)

    def feed(self, ids, numbers=None):
        """Append ids (B, t) to every row; return the logits (B, V), in float32, of the token that comes next.

        With a function `choose`, return choose(logits, numbers) instead.
        """
        # inference mode is a tenth faster than no_grad, where each call counts; compiled code need not know it
        with contextlib.nullcontext() if self.compiled else torch.inference_mode():
            cache, start, end = self.cache, self.cache.length, self.cache.length + ids.shape[1]
            is_fixed = self.has_fixed_shapes and start > 0  # then every slot of the cache is a key
            self.position.fill_(end - 1)
            cache.position, size = (self.position, cache.max_length) if is_fixed else (None, end)
            positions = mask = None  # faster, where no row is padded
            if self.is_padded:
                offsets = torch.arange(size, device=self.device) - self.padding  # (B, size): 0 at a row's first token
                limit = self.model.config.max_position_embeddings  # rows that have ended go beyond it
                positions, mask = offsets[:, start:end].clamp(0, limit - 1), offsets >= 0
            inputs = ids, positions, mask, numbers
            result = self._replay(inputs) if is_fixed and self.is_recorded else self._step(*inputs)
            cache.length = end  # what is compiled or recorded does not count
            return result

    def _step(self, ids, positions, mask, numbers):
        # 1 run the model
        step = self.compiled if self.compiled and self.cache.position is not None else _decode_step
        logits = step(self.model, ids, positions, mask, self.cache).float()
        # 2 penalize and forbid
        if self.config.repetition_penalty != 1:  # for padding, which is on the left, the last token stands in
            is_prompt = mask is not None and mask.shape == ids.shape
            self.seen.scatter_(1, ids.where(mask, ids[:, -1:]) if is_prompt else ids, True)
            logits = penalize_repetition(logits, self.seen, self.config.repetition_penalty)
        logits[:, self.tokenizer.vocab_size :] = -math.inf  # ids that the tokenizer does not have
        if self.config.min_new_tokens:
            logits.masked_fill_(self.is_stop & (self.position + 1 < self.least_end), -math.inf)
        # 3 choose
        return logits if self.choose is None else self.choose(logits, numbers)

    def _replay(self, inputs):
        """Return _step(*inputs), which is recorded at the first call; anew where beams have become more."""
        if self.repeat is None or len(self.inputs[0]) != len(inputs[0]):
            self.inputs = [x if x is None else x.clone() for x in inputs]  # what is recorded goes on reading these
            self.repeat = record_graph(lambda: self._step(*self.inputs), self.device)
        for own, new in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(new)
        return self.repeat()

    def reorder(self, rows):
        """Row i becomes a copy of row `rows[i]`; there may be more rows than before, or fewer."""
        self.cache.reorder(rows)
        seen, self.padding = self.seen[rows], self.padding[rows]
        # in place, where it can be: what is recorded goes on reading it
        self.seen = self.seen.copy_(seen) if len(seen) == len(self.seen) else seen


def length_groups(lengths: Tensor, rows: Tensor | None = None, size: int = 64) -> list[Tensor]:
    """Return rows (default: all) in groups of at most `size` of similar length: mixed ones would be mostly padding."""
    rows = (torch.arange(len(lengths)) if rows is None else rows).to(lengths.device)
    return list((rows if len(rows) <= size else rows[lengths[rows].argsort(stable=True)]).split(size))


class TextGenerator:
    """Continues text with a model. Tensor methods take prompts (B, T) and give prompt and continuation (B, ≤ T + new).

    A row ends at EOS or an end-of-turn; after that it is padding. Rows of unequal length are padded on the left and
    come with an `attention_mask` (B, T), 0 for padding. A continuation also ends where the model's context does.

    With `compile`, steps go through torch.compile: seconds for the first of each batch size, then up to several times
    faster. It may freeze the weights, so it is not for a model that goes on training, nor for a mixture of experts.
    Without it they run in torch's inference mode: a tensor that forward keeps on the model then cannot be trained with.
    On a GPU a dense model's step is recorded as a CUDA graph (in the main thread): the Python code of forward then runs
    only while it is recorded.
    """

    def __init__(self, model: MiniGPT, tokenizer: BPETokenizer, compile: bool = False):
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.compiled = compile_decode_step(model) if compile else None
        self.written = 0  # tokens that the last call of generate, stream or chat has written so far

    def greedy_search(
        self, input_ids: Tensor, config: GenerationConfig | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Take the likeliest token at every step."""
        config = dataclasses.replace(config or GenerationConfig(), do_sample=False)
        return self.sample_generate(input_ids, config, attention_mask)

    def sample_generate(
        self,
        input_ids: Tensor,
        config: GenerationConfig | None = None,
        attention_mask: Tensor | None = None,
        random: torch.Generator | None = None,
    ) -> Tensor:
        """Draw each token from the distribution that temperature, top-k, top-p and min-p leave, if config.do_sample."""
        config, steps = config or GenerationConfig(), []
        for tokens, ended in self._decode(input_ids, config, attention_mask, random):
            steps.append(tokens)
            if config.stop:
                for row, ids in enumerate(torch.stack(steps, dim=1).tolist()):  # a stop text may span tokens
                    ended[row] |= clip_at_stop(self._text(ids), config.stop)[1]
        return torch.cat((input_ids.to(ended.device), torch.stack(steps, dim=1)), dim=1)

    def generate(
        self, prompts: str | list, config: GenerationConfig | None = None, batch_size: int = 128
    ) -> str | list[str]:
        """Return what continues each prompt, up to a stop text: a text for a text, a list for a list of prompts.

        In a list, a prompt is a text, chat messages (their reply comes back), or ids.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], config)[0]
        config = config or GenerationConfig()
        replies = self.continue_ids([self._prompt_ids(prompt) for prompt in prompts], config, batch_size)
        return [clip_at_stop(self._text(ids), config.stop)[0] for ids in replies]

    def continue_ids(
        self,
        rows: list[list[int]],
        config: GenerationConfig,
        batch_size: int = 128,
        random: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Return the ids that continue each row, up to its first end; rows of similar length share a batch."""
        replies, random = [[]] * len(rows), random or self._random(config)
        limit = self.model.config.max_position_embeddings
        for group in length_groups(torch.tensor(list(map(len, rows))), size=batch_size) if rows else []:
            ids, mask = pad_left([rows[i] for i in group], self.tokenizer.pad_id).values()  # (B, T)
            if config.num_beams > 1:
                output = self.beam_search(ids, config, mask)
            else:
                output = self.sample_generate(ids, config, mask, random)
            for i, reply in zip(group.tolist(), output[:, ids.shape[1] :].tolist(), strict=True):
                end = next((n for n, token in enumerate(reply, 1) if token in self.tokenizer.stop_ids), None)
                replies[i] = reply[: min(end or limit, limit - len(rows[i]))]  # what follows is padding
        self.written = sum(map(len, replies))
        return replies

    def stream(self, prompt: str | list[dict], config: GenerationConfig | None = None) -> Iterator[str]:
        """Yield the continuation of a text, or the reply to chat messages, never ending inside a character."""
        config = config or GenerationConfig()
        if config.num_beams > 1:
            raise UserError(f"num_beams={config.num_beams} cannot stream: beams are only known at the end")
        ids, shown = [], 0  # the ids so far, and how many of their characters have been shown
        for token, _ in self._decode(torch.tensor([self._prompt_ids(prompt)]), config):
            ids.append(token.item())
            self.written = len(ids)
            text, is_stopped = clip_at_stop(self._text(ids), config.stop)
            if is_stopped:
                break
            # the beginning of a stop text waits until it is clear whether it becomes one
            end = len(text) - length_of_stop_prefix(text, config.stop)
            if end > shown:
                yield text[shown:end]
                shown = end
        if text[shown:]:
            yield text[shown:]

    def chat(self, messages: list[dict], config: GenerationConfig | None = None) -> str:
        """Return the assistant's reply to [{"role", "content"}, …]."""
        return "".join(self.stream(messages, config))

    def _prompt_ids(self, prompt):
        if isinstance(prompt, str):  # without text and BOS, what stands between documents
            return self.tokenizer.encode(prompt, add_special_tokens=True) or [self.tokenizer.eos_id]
        if prompt and isinstance(prompt[0], int):
            return prompt
        return self.tokenizer.apply_chat_template(as_messages(prompt, "user", []), add_generation_prompt=True)

    def _text(self, ids):
        return self.tokenizer.decode_bytes(ids).decode("utf-8", "ignore")  # the last character may be unfinished

    def _random(self, config):
        device = self.model.embed_tokens.weight.device
        return None if config.seed is None else torch.Generator(device).manual_seed(config.seed)

    @torch.no_grad()
    def _decode(self, input_ids, config, attention_mask=None, random=None):
        """Yield (tokens (B,), ended (B,)) step by step until all rows have ended; the caller may set `ended`, too.

        Where shapes are not fixed, finished rows are dropped from the batch as soon as they make up half of it, since
        rollouts end at different lengths.
        """
        random = random or self._random(config)
        greedy = not config.do_sample or config.temperature < 1e-5  # where logits / temperature could be infinite

        def choose(logits, numbers):
            return logits.argmax(dim=-1) if greedy else draw(sampling_probs(logits, config), numbers)

        with eval_mode(self.model):
            state = _Decoding(self, input_ids, config, attention_mask, choose)
            next_ids = input_ids.to(state.device, torch.long)
            running = torch.arange(len(input_ids), device=state.device)  # rows that are still in the batch
            ended, padding = running < 0, torch.full_like(running, self.tokenizer.pad_id)  # (B,): none has ended yet
            for length in range(1, state.new_tokens + 1):
                numbers = None if greedy else torch.rand(len(next_ids), 1, device=state.device, generator=random)
                tokens = state.feed(next_ids, numbers)
                written = padding.index_copy(0, running, tokens).where(~ended, padding)  # ended rows write padding
                ended = ended | torch.isin(written, state.stop_ids) | (state.room <= length)
                yield written, ended
                unfinished = int((~ended).sum())  # waits for the device
                if not unfinished:
                    return
                if 2 * unfinished <= len(running) and not state.has_fixed_shapes:
                    kept = (~ended[running]).nonzero()[:, 0]
                    state.reorder(kept)
                    running, tokens = running[kept], tokens[kept]
                next_ids = tokens[:, None]

    @torch.no_grad()
    def beam_search(
        self, input_ids: Tensor, config: GenerationConfig | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the best of `num_beams` hypotheses a row, by log-probability / length ** length_penalty (1609.08144).

        The length is that of the continuation with its end. With as many beams as there are continuations it is exact.
        """
        config = config or GenerationConfig(num_beams=4)
        k, penalty = config.num_beams, config.length_penalty
        with eval_mode(self.model):
            state = _Decoding(self, input_ids, config, attention_mask)
            ids = input_ids.to(state.device, torch.long)  # (rows, T): the beams of all prompts, at first one each
            logits = state.feed(ids)  # (rows, V)
            (B, V), logprobs = logits.shape, logits.new_zeros(len(ids), 1)  # (B, beams)
            best, num_ends = [(-math.inf, row) for row in ids], [0] * B  # best hypothesis of each prompt; ends so far
            for length in range(1, state.new_tokens + 1):
                # 1 extend: enough candidates that k unfinished ones remain even if all stop tokens are among them
                totals = (logprobs.view(-1, 1) + logits.log_softmax(dim=-1)).view(B, -1)  # (B, beams V)
                totals, flat = totals.topk(min(k * (len(state.stop_ids) + 1), totals.shape[1]))  # (B, n)
                rows = flat // V + torch.arange(0, len(ids), logprobs.shape[1], device=state.device)[:, None]
                tokens = flat % V
                candidates = torch.cat((ids[rows], tokens[:, :, None]), dim=2)  # (B, n, T + length)
                # 2 finish: an end counts only among the best k; where there is no room for more, all end
                ends = torch.isin(tokens, state.stop_ids) | (state.room <= length)[:, None]
                for b, i in (ends & totals.isfinite())[:, :k].nonzero().tolist():
                    hypothesis = totals[b, i].item() / length**penalty, candidates[b, i]
                    best[b], num_ends[b] = max(best[b], hypothesis, key=lambda pair: pair[0]), num_ends[b] + 1
                # 3 go on with the best k of the others, unless none can win: a log-probability only falls, but divided
                # by a power of the length it can still rise until the maximum length
                logprobs, others = totals.masked_fill(ends, -math.inf).topk(min(k, totals.shape[1]))  # (B, k)
                longest = state.room.tolist() if penalty > 0 else [length] * B
                for b, logprob in enumerate(logprobs[:, 0].tolist()):
                    if best[b][0] >= logprob / longest[b] ** penalty or config.early_stopping and num_ends[b] >= k:
                        logprobs[b] = -math.inf
                if logprobs.isneginf().all():
                    break
                state.reorder(rows.gather(1, others).flatten())
                ids = candidates.take_along_dim(others[:, :, None], dim=1).flatten(0, 1)  # (B k, T + length)
                logits = state.feed(ids[:, -1:].contiguous())  # compiled code is for fixed strides, too
        return nn.utils.rnn.pad_sequence(
            [ids for _, ids in best], batch_first=True, padding_value=self.tokenizer.pad_id
        )


def compile_decode_step(model: MiniGPT) -> Callable:
    """Return `_decode_step` through torch.compile: on a CPU with frozen weights."""
    if not model.has_fixed_shapes:
        raise UserError("a mixture of experts, whose shapes depend on the data, cannot be compiled for decoding")
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    compiled = torch.compile(_decode_step, dynamic=False, options={"cpp_wrapper": True} if on_cpu else None)

    def step(model, ids, positions, mask, cache):
        try:
            # freezing lays out the weights for the processor; torch looks at this setting whenever it compiles
            with torch._inductor.config.patch(freezing=on_cpu):
                return compiled(model, ids, positions, mask, cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise compile_error("decoding", error) from error

    return step


def check_vocabulary(model: nn.Module, tokenizer: BPETokenizer) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer's {tokenizer.vocab_size} tokens exceed the model's vocab_size="
            f"{model.config.vocab_size}: they do not belong together"
        )


def clip_at_stop(text: str, stops: list[str] | None) -> tuple[str, bool]:
    """Return `text` up to the first of the stop texts in it, and whether there was one."""
    end = min((text.find(stop) for stop in stops or [] if stop in text), default=None)
    return text[:end], end is not None


def length_of_stop_prefix(text: str, stops: list[str] | None) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop text."""
    return max((n for stop in stops or [] for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


# ======================================================================================================================
# 8 Runs: where and on how many processes they run; checkpoints and run directories; the terminal.
# ======================================================================================================================

# -- devices, precision, memory ----------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`, and set CUDA up; auto is CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not possible: it must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # but where training_kernels says so
        torch.set_float32_matmul_precision("high")  # float32 products use the tensor cores, as TF32
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device  # of several, this process's


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; auto is bfloat16 (float16 on older GPUs) on CUDA, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name.removesuffix("_onednn"))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def fastest_dtype(device: torch.device) -> str:
    """Return the name of the dtype whose matrix products are fastest here, measured in a tenth of a second.

    float32_onednn is float32 by oneDNN's kernels instead of MKL's. bfloat16 rounds, so it has to be clearly faster.
    """
    if device.type == "cuda":
        return str(pick_dtype("auto", device)).removeprefix("torch.")
    return WORLD.first(lambda: _measured_dtype(device))


def _measured_dtype(device):
    names = ("float32", "float32_onednn", "bfloat16") if device.type == "cpu" else ("float32", "bfloat16")
    speed = defaultdict(float)
    for name in names * 4:  # in turns, so that what else the machine does slows all of them
        speed[name] = max(speed[name], matmul_peak(device, name, 512))
    x = torch.rand(64, 64)
    with training_kernels(onednn=True):
        is_exact = torch.allclose(x @ x, (x.double() @ x.double()).float(), rtol=1e-5)  # processors with AMX round
    best = "float32_onednn" if is_exact and speed["float32_onednn"] > 1.1 * speed["float32"] else "float32"
    return "bfloat16" if speed["bfloat16"] > 1.5 * speed[best] else best


@contextlib.contextmanager
def training_kernels(onednn: bool, cudnn: bool = False) -> Iterator[None]:
    """Let oneDNN compute float32 products, and cuDNN attention on CUDA, inside the block.

    oneDNN is slower than MKL for single rows, as in decoding. cuDNN was the fastest on an H200 (torch 2.11), but plans
    for every new shape, up to 0.5 s.
    """
    precision, before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("medium" if onednn else precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(before)


def matmul_peak(device: torch.device, dtype: str, n: int = 1024) -> float:
    """Measure the floating-point operations per second of an n x n matrix product, in a fraction of a second."""
    # random numbers: a product of ones takes less power, so that a GPU is a tenth faster than it ever is in training
    random = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, device=device, generator=random).to(pick_dtype(dtype, device))
    seconds = []
    with training_kernels(onednn=dtype == "float32_onednn"):
        while len(seconds) < 10 and sum(seconds) < 0.5:  # float16 on a CPU takes long
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def is_out_of_memory(error: BaseException) -> bool:
    # messages of torch's allocator on a CPU, of MPS, and of cuBLAS and cuDNN
    words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


def compile_error(what: str, error: Exception) -> UserError:
    """Return the one message that says why torch.compile fails."""
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{what} cannot be compiled here (on a CPU it takes a C++ compiler): {reason}")


class MemoryMonitor:
    """Memory in use, in bytes: that of torch on a CUDA or MPS device, else the process's; 0 is unknown."""

    def __init__(self, device: Device = "cpu"):
        self.device, self.highest = torch.device(device), 0

    def current_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return torch.mps.driver_allocated_memory() if self.device.type == "mps" else self._of_process("VmRSS")

    def peak_bytes(self) -> int:
        """Return the most so far; where the system keeps no record, the most at any call of this method."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        recorded = self._of_process("VmHWM") if self.device.type == "cpu" else 0
        self.highest = max(self.highest, self.current_bytes(), recorded)
        return self.highest

    def _of_process(self, field):
        try:
            with open("/proc/self/status") as file:  # not getrusage: its peak includes the parent's before exec
                return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field)), 0)
        except OSError:
            if sys.platform != "darwin":
                return 0
            import resource  # macOS counts in bytes and knows only the peak

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- several processes -------------------------------------------------------------------------------------------------


class World:
    """The processes of a run, as torchrun starts them; alone, every operation is the identity.

    Each process holds the whole state and walks the same loaders. It takes its rows of every batch, and what depends on
    all rows is summed or gathered. So the sums of losses, counts and gradients are those of one process.
    """

    rank, size, barriers = 0, 1, 0
    limit = datetime.timedelta(minutes=10)  # how long processes wait for each other inside a step

    @property
    def is_first(self) -> bool:
        """True in the process that prints, logs and saves."""
        return self.rank == 0

    def start(self) -> None:
        """Join the other processes if torchrun has started several; all but the first fall silent."""
        if self.size > 1 or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        # Ctrl-C ends the process at once: Python's handler would wait for processes that are gone already
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        # the store is torchrun's: it outlives any of the processes
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=self.limit))
        self.store = dist.PrefixStore(self._name_of_start(store), store)
        self._communicate(
            dist.init_process_group, backend, store=self.store, rank=self.rank, world_size=self.size, timeout=self.limit
        )
        self.barrier()  # one that ended now would leave the others a failed connection instead of its message
        signal.signal(signal.SIGINT, handler)
        if not self.is_first:
            silence_stdout()
            warnings.simplefilter("ignore")

    def _name_of_start(self, store):
        """Return a name that all processes of this start agree on: the store still holds what those before it wrote."""
        name = os.urandom(8).hex()
        if not self.is_first:  # asks with a name of its own, which no earlier first process can have answered
            store.set(f"question/{self.rank}", name)
            name = store.get(f"answer/{name}").decode()
            store.set(f"{name}/{self.rank}", "")
            return name
        others = range(1, self.size)
        while not store.check([f"{name}/{rank}" for rank in others]):
            for rank in others:  # its question may still be that of an earlier start: then it is asked again
                if store.check([f"question/{rank}"]):
                    store.set(f"answer/{store.get(f'question/{rank}').decode()}", name)
            time.sleep(0.02)
        return name

    def _communicate(self, operation, *args, **options):
        """Call an operation of torch.distributed; if it fails, the error names the processes that did not answer."""
        if self.size == 1:
            return
        try:
            operation(*args, **options)
        except RuntimeError as error:
            self.store.set(f"waiting/{self.rank}", "")
            time.sleep(2)  # whoever is alive says so
            lost = [rank for rank in range(self.size) if not self.store.check([f"waiting/{rank}"])]
            problem = (
                f"process {', '.join(map(str, lost))} of {self.size} has ended or does not answer" if lost else error
            )
            raise UserError(f"{problem}: start again with --resume, from the last checkpoint") from error

    def _all_gather(self, tensor):
        """Return the tensors of all processes, which have one shape."""
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._communicate(dist.all_gather, gathered, tensor)
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        self._communicate(dist.all_reduce, tensor)
        return tensor

    def max(self, *numbers: float) -> list[float]:
        """Return the largest of each number over the processes."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self._communicate(dist.all_reduce, tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: typing.Any) -> list:
        """Return the values of all processes: numbers, texts and tensors in lists and dicts."""
        if self.size == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        mine = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)  # (n,)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(mine)]))]
        gathered = self._all_gather(F.pad(mine, (0, max(sizes) - len(mine))))
        parts = [ctypes.string_at(part.data_ptr(), size) for part, size in zip(gathered, sizes, strict=True)]
        return [torch.load(io.BytesIO(part), map_location="cpu", weights_only=True) for part in parts]

    def first(self, fn: Callable) -> typing.Any:
        """Return fn() as the first process computes it; the others wait."""
        return self.gather(fn() if self.is_first else None)[0]

    def add(self, figures: Metrics) -> Metrics:
        """Return the sum of each figure over all processes; one that lacks it counts as 0."""
        total = Counter()
        for part in self.gather(dict(figures)):
            total.update(part)
        return total

    def mine(self, batch: typing.Any) -> typing.Any:
        """Return this process's rows of a batch, or its items of a list."""
        if isinstance(batch, dict):
            return {name: self.mine(rows) for name, rows in batch.items()}
        return batch[self.rank :: self.size]

    def share(self, fn: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Return fn(rows), which treats rows one by one; each process computes an equal part of them."""
        if self.size == 1:
            return fn(rows)
        n = -(-len(rows) // self.size)  # rounded up: after the last row come the first ones again
        mine = torch.arange(n * self.rank, n * (self.rank + 1), device=rows.device) % len(rows)
        return torch.cat(self._all_gather(fn(rows[mine])))[: len(rows)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up gradients over the processes. A parameter that has one in no process keeps none."""
        if self.size == 1:
            return
        parameters = list(parameters)
        has_gradient = self.max(*(p.grad is not None for p in parameters))  # in any process
        for group in batched(itertools.compress(parameters, has_gradient), torch.numel, 1 << 24):  # buffers of 64 MB
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for p, gradient in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = gradient.view_as(p)

    def barrier(self) -> None:
        """Wait for the others, however long they encode data: torchrun ends all if one of them dies."""
        self.barriers += 1
        if self.size > 1:
            self.store.set(f"barrier/{self.barriers}/{self.rank}", "")
            names = [f"barrier/{self.barriers}/{rank}" for rank in range(self.size)]
            while not self.store.check(names):
                time.sleep(0.05)

    def seed(self, seed: int) -> int:
        """Return a seed of this process's own; the first one's is `seed` itself."""
        return seed + 1_000_003 * self.rank

    def is_first_to(self, event: str) -> bool:
        """Return whether no other process has announced this event."""
        return self.size == 1 or self.store.add(event, 1) == 1


WORLD = World()


# -- run directories: checkpoint.pt, config.json, tokenizer.json and metrics.jsonl -------------------------------------

# signals that ask for an end; Windows has fewer
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
FORMAT = 3  # the checkpoints' format; those of older ones can be used, but not resumed


def save_checkpoint(path: AnyPath, state: dict) -> None:
    """Write `state`, complete or not at all; the checkpoint that was there becomes NAME.prev.pt."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's name for a write that fails
            if isinstance(error.__context__, KeyboardInterrupt):  # or that a second Ctrl-C ends
                raise error.__context__ from None
            raise OSError(
                f"{path} cannot be written, perhaps because the disk is full: {str(error).splitlines()[0]}; "
                "the checkpoint before it is complete: go on from it with --resume"
            ) from error
        if path.exists():  # a second name for it, so that there is a complete checkpoint at every instant
            previous = path.with_suffix(".prev.pt")
            previous.unlink(missing_ok=True)  # a link does not replace a file
            try:
                os.link(path, previous)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, previous)


def load_checkpoint(path: AnyPath, repair: bool = False) -> dict:
    """Read what `save_checkpoint` wrote, without running any code in it; if it is damaged, the one before it.

    With `repair` the one before takes the damaged one's place, so that the next save does not delete the good one.
    """
    path, problems = Path(path), []
    for candidate in (path, path.with_suffix(".prev.pt")):
        try:
            with zipfile.ZipFile(candidate) as archive:
                if damaged := archive.testzip():  # compares checksums: torch.load itself accepts a flipped bit
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError("it holds no dict")
        except FileNotFoundError:
            problems.append(f"{candidate} does not exist")
        except Exception as error:  # a torn zip fails in many ways; whatever it is goes into the message
            problems.append(f"{candidate} is damaged ({repr(error)[:100]})")
        else:
            if problems:
                warnings.warn(f"{problems[0]}: going on from {candidate}", stacklevel=2)
                if repair:
                    os.replace(candidate, path)
            return state
    raise UserError(f"no checkpoint can be read: {'; '.join(problems)}")


def fingerprint(module: nn.Module, without: Iterable[str] = ()) -> str:
    """Return a hash of a module's weights, but for those named in `without`."""
    buffer, weights = io.BytesIO(), module.state_dict()  # torch.save writes equal tensors as equal bytes
    torch.save({name: tensor.cpu() for name, tensor in weights.items() if name not in without}, buffer)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, so that no other process or thread writes there; the lock ends with the process, however it ends.

    Temporary files of writers that were killed are removed. If the folder is in use, wait, or raise a UserError.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    directory = os.open(folder, os.O_RDONLY)  # the lock is on the directory: nothing to leave behind
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            for dead in folder.glob(".*.tmp"):
                shutil.rmtree(dead) if dead.is_dir() else dead.unlink()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                raise UserError(f"{folder} is in use by another process: wait for it, or take another --out") from None
            warnings.warn(f"{folder} cannot be locked ({error}): let no other process write there", stacklevel=4)
        yield
    finally:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(directory, fcntl.LOCK_UN)  # though a child may still have the directory open
        os.close(directory)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list of the signals caught so far that ask for an end (Ctrl-C, a closed terminal, a cluster's warning …).

    A second one interrupts at once. One that the parent process has set to be ignored, as nohup does, stays ignored.
    """
    caught: list[int] = []

    def _note(number, _):
        if caught and WORLD.size == 1:  # torchrun repeats what its processes have got from the terminal already
            raise KeyboardInterrupt  # the user does not want to wait for the step
        caught.append(number)

    in_main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = {
        number: signal.signal(number, _note)
        for number in SIGNALS
        if in_main and signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:  # the handlers that were there
        for number, handler in before.items():
            signal.signal(number, handler)


def holds_run(run_dir: AnyPath) -> bool:
    """Return whether there is a checkpoint to go on from."""
    return any((Path(run_dir) / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt", "best.pt"))


def run_config(run_dir: AnyPath) -> dict:
    """Return the config.json of a run directory; of a Hugging Face directory, that of a run with such a model."""
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.json")
    config = read_json(path)
    if "model_type" in config:  # Hugging Face's
        return {
            "model_type": config["model_type"],
            "imported": Path(run_dir).resolve().name,
            "stage": "pretrain",
            "train": {},
            "data": {},
            "model": dataclasses.asdict(read_hf_config(run_dir)),
        }
    if not all(isinstance(config.get(part), dict) for part in ("model", "train")):
        raise UserError(f'{path} has neither "model" and "train", as that of a run, nor a "model_type"')
    try:
        MiniGPTConfig(**config["model"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return config


def read_metrics(run_dir: AnyPath) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            rows.append(dict(json.loads(line)))
            rows[-1]["step"] + 0  # a number
        except (ValueError, TypeError, KeyError) as error:
            if line.endswith("\n"):  # otherwise a line that was being written when the run was killed
                raise UserError(f"{path}:{number}: not a row of metrics ({error!r}): correct or delete it") from error
    return rows


def load_run(
    run_dir: AnyPath, device: Device = "cpu", which: Literal["best", "last"] = "best"
) -> tuple[MiniGPT, BPETokenizer, dict]:
    """Return the model (in eval mode; LoRA merged), the tokenizer and the whole checkpoint of a run directory.

    which: "best" takes best.pt, the weights of the best evaluation so far, where there is one; "last" checkpoint.pt.
    A Hugging Face directory is read likewise; its checkpoint has only "config" and "step".
    """
    run_dir, config = Path(run_dir), run_config(run_dir)
    tokenizer, path = BPETokenizer.load(run_dir / "tokenizer.json"), run_dir / "checkpoint.pt"
    if "model_type" in config:
        model = MiniGPT.from_pretrained(run_dir).to(device)
        check_vocabulary(model, tokenizer)
        return model, tokenizer, {"config": config, "step": 0}
    state = _best_state(run_dir, config, tokenizer) if which == "best" else None
    state = state or load_checkpoint(path)
    try:  # 1 build the module of the right kind, 2 fill it, 3 see that the tokenizer belongs to it
        config = state["config"]
        model = (RewardModel if config["stage"] == "reward" else MiniGPT)(MiniGPTConfig(**config["model"]))
        if rank := config["train"].get("lora_rank", 0):
            add_lora(model, rank, config["train"]["lora_alpha"])
        weights = state["model"]
        if base := state.get("base", {}).get("model"):
            weights = _base_weights(path, config["parent"], base, weights) | weights
        model.load_state_dict(weights)
        if state["tokenizer_hash"] != tokenizer.content_hash():
            raise UserError(f"{run_dir / 'tokenizer.json'} is not the tokenizer that the checkpoint was trained with")
    except (KeyError, TypeError, RuntimeError) as error:  # undamaged, but not what a run of today's code writes
        raise UserError(f"{path} does not hold such a run: {str(error)[:200]}") from error
    for part, cls in (("train", TrainConfig), ("rl", RLHFConfig)):  # an older version may have other options
        config[part] = {name: value for name, value in config.get(part, {}).items() if hasattr(cls, name)}
    merge_lora(model)  # a plain model from here on
    return model.to(device).eval(), tokenizer, state


def _best_state(run_dir, config, tokenizer):
    """Return the checkpoint in best.pt; None, with a warning, if it is damaged or of another run."""
    path = run_dir / "best.pt"
    if not path.exists():
        return None
    try:
        state = load_checkpoint(path)
        saved = state["config"]["stage"], state["config"]["model"], state["tokenizer_hash"]
        if saved != (config["stage"], config["model"], tokenizer.content_hash()):
            raise UserError(f"{path} is not of this run")
        return state
    except (UserError, KeyError, TypeError) as error:
        warnings.warn(f"{error}: taking the last weights, in checkpoint.pt, instead", stacklevel=3)
        return None


def _base_weights(path, parent, expected, trained):
    """Return the weights that LoRA left as they were, from the run that it started from."""
    for which in ("best", "last"):  # whichever it started from
        try:
            model = load_run(parent, which=which)[0]
        except UserError as error:
            raise UserError(f"{path} holds only what LoRA trained, and its base cannot be read: {error}") from error
        if fingerprint(model, trained) == expected:  # the names of its weights are the same with LoRA
            return model.state_dict()
    raise UserError(f"{path} holds only what LoRA trained, and its base {parent} has changed since: restore that")


@contextlib.contextmanager
def replacing(overwrite: bool, *run_dirs: Path) -> Iterator[None]:
    """With `overwrite`, move the old runs aside; they come back unless a new one with a checkpoint takes their place.

    Of several, those that were not reached stay aside: beside new parents they would pass for finished.
    """
    for run_dir in run_dirs:
        for old in run_dir.parent.glob(f"{run_dir.name}.old-*"):
            print(f"{old} is of an --overwrite that did not end: move it back, or delete it")
    aside = {}
    WORLD.barrier()  # no process reads the old ones any more
    try:
        for run_dir in run_dirs if overwrite and WORLD.is_first else ():
            if run_dir.exists():
                with locked(run_dir):  # unless somebody trains in it
                    pass
                aside[run_dir] = run_dir.rename(run_dir.with_name(f"{run_dir.name}.old-{time.time_ns()}"))
        WORLD.barrier()
        yield
    finally:
        some_new = any(map(holds_run, aside))
        for run_dir, old in aside.items():
            if holds_run(run_dir):
                shutil.rmtree(old)
            elif some_new:
                print(f"not replaced yet: the old {run_dir} is in {old}")
            else:
                shutil.rmtree(run_dir, ignore_errors=True)
                old.rename(run_dir)


def newest_run(out: AnyPath = "out") -> Path:
    """Return the run directory under `out` whose checkpoint is the latest."""
    runs = [
        path
        for path in Path(out).glob("*/*/checkpoint.pt")
        if path.parent.name != "reward" and ".old-" not in path.parent.name
    ]  # one cannot write, one is set aside
    if not runs:
        raise UserError(f"no run in {out}/: train one with `python train.py --config tiny`, or name one with --run")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


# -- the terminal ------------------------------------------------------------------------------------------------------


def silence_stdout() -> None:
    """After a broken pipe, send stdout to the null device, so that later prints do not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ProgressLine:
    """One live line: rewritten in place on a terminal, printed every ten seconds into a file or pipe."""

    def __init__(self):
        self.live, self.last, self.width = sys.stdout.isatty(), -math.inf, 0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            print("\r" + text.ljust(self.width), end="", flush=True)  # over the text before it
            self.width = len(text)
        elif now - self.last >= 10:
            self.say(text)
            self.last = now

    def say(self, text: str) -> None:
        """Print lines that stay. If nobody reads them any more, training goes on."""
        try:
            print(f"\r{' ' * self.width}\r" if self.width else "", end="")  # blank the live line
            print(text, flush=True)
            self.width = 0
        except BrokenPipeError:
            silence_stdout()


FIGURES = {
    "loss": "loss {:.4f}",
    "bpb": "{:.4f} bits per byte",
    "exact_match": "exact match {:.1%}",
    "pair_accuracy": "pair accuracy {:.1%}",
    "longer_accuracy": "the longer reply would be {:.1%}",
    "chosen_logprob": "log-prob of chosen {:.2f}",
    "accuracy": "accuracy {:.0%}",
    "reward": "reward {:.3f}",
    "kl": "KL {:.3f}",
    "reply_length": "{:.1f} tokens a reply",
    "tokens": "{:,} tokens",
}


def describe(result: dict[str, float], names: Iterable[str] = FIGURES) -> str:
    """Return the figures of `result` among `names`, in words; one that is not in FIGURES by its name."""
    return ", ".join(
        FIGURES.get(name, f"{name.replace('_', ' ')} {{:.4g}}").format(result[name]) for name in names if name in result
    )


# ======================================================================================================================
# 9 Trainers: one loop for all; a subclass says what its loss is.
# ======================================================================================================================


Metrics = dict[str, float]  # what is measured in a step or an evaluation, by name
# options that may not change when a run is resumed: they are part of what its weights, moments and best evaluation
# mean. The shape, the tokenizer, other models' fingerprints and the loaders' `fixed` are compared likewise; the rest
# (rates, limits, precision, memory, coefficients) may change from one step to the next.
FIXED_OPTIONS = ("lora_rank", "lora_alpha", "optimizer", "dpo_beta", "dpo_kind", "gamma")


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Return a batch in so many parts, or fewer where it has too few rows: none without any."""
    B = len(batch["input_ids"])
    rows = max(1, -(-B // parts))  # rounded up
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, B, rows)]


def average(parts: Iterable[Figures]) -> Metrics:
    """Return Σ sum / Σ count of each figure over the parts, and over all processes; of a total the sum."""
    sums, counts = Counter(), Counter()
    for figures in parts:
        for name, figure in figures.items():
            value, count = figure if isinstance(figure, tuple) else (figure, 0)  # a total has no count
            sums[name] += float(value)
            counts[name] += float(count)
    sums, counts = WORLD.add(sums), WORLD.add(counts)
    return {name: total / counts[name] if counts[name] else int(total) for name, total in sums.items()}


class Trainer:
    """Accumulate -> clip -> step -> log -> evaluate -> save. A subclass defines `loss`, and `count` if not of tokens.

    Only pretraining and SFT add the routers' balance loss: the later stages change a model little.

    config: TrainConfig. train_data, val_data: iterables of batches; `fit` repeats train_data as often as it takes, and
    one with `state_dict` is resumed where it stood. run_dir: where `fit` keeps checkpoints and metrics. started: the
    time.monotonic() from which `minutes` count. rl_config: the options of preferences and rewards. Precision,
    compilation and memory follow the config.
    """

    stage = ""
    may_round = True  # `dtype` "auto" is the fastest one, even if that rounds
    counters = ("step_count", "epochs_done", "tokens_seen", "skipped", "skipped_in_row", "micro_splits", "best")
    counters += ("best_figures", "first_figures")
    step_count = tokens_seen = skipped = skipped_in_row = 0
    micro_splits = 1  # number of micro-batches that a batch is cut into, since memory ran out
    best = -math.inf  # highest `quality` of an evaluation
    best_figures: Metrics = {}  # the figures of that evaluation, and its "step"
    first_figures: Metrics = {}  # the figures of the evaluation before the first step
    epochs_done = 0.0  # passes over the data
    final_s = 0.0  # seconds that the evaluation, sample and checkpoint at the end will take
    part_names: dict = {}  # names of the loss and its parts
    peak_flops = math.nan  # measured by the process that logs

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BPETokenizer,
        device: Device = "cpu",
        *,
        config: TrainConfig | None = None,
        train_data: Iterable | None = None,
        val_data: Iterable | None = None,
        run_dir: AnyPath | None = None,
        started: float | None = None,
        rl_config: RLHFConfig | None = None,
    ):
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.config, self.rl = config or TrainConfig(), rl_config or RLHFConfig()
        self.train_data, self.val_data = train_data, val_data
        self.run_dir = run_dir and Path(run_dir)
        self.device = pick_device(str(device))
        self.has_chosen_dtype = self.config.dtype == "auto" and self.may_round
        if self.has_chosen_dtype:
            self.config = dataclasses.replace(self.config, dtype=fastest_dtype(self.device))
        self.dtype = pick_dtype(self.config.dtype, self.device)
        # compiling takes half a minute; on a CPU it was measured to pay for the equal rows of pretraining
        mode, minutes, kind = self.config.compile, self.config.minutes, self.device.type
        many_steps = kind == "cuda" and not minutes and self.config.max_steps >= 1000
        pays = kind == "cuda" or kind == "cpu" and self.stage == "pretrain"
        self.compiles = mode == "on" or mode == "auto" and pays and (minutes >= 10 or many_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # what is trained, and with what: {"model": module}, {"model.AdamW": optimizer}
        self.trained, self.optimizers = nn.ModuleDict(), {}
        self.train_module("model", model)
        self.origin: dict[str, str] = {}  # the runs that this one starts from; goes into config.json and checkpoints
        self.monitor, self.line = MemoryMonitor(self.device), ProgressLine()
        self.started = started or time.monotonic()

    def train_module(self, name: str, module: nn.Module, rate: float = 1.0) -> None:
        """Train a module, with optimizers of its own at `rate` times the learning rate."""
        config = self.config
        module.to(self.device)
        if config.lora_rank:
            add_lora(module, config.lora_rank, config.lora_alpha)
        module.gradient_checkpointing = config.gradient_checkpointing
        if self.compiles:
            for block in module.layers:
                (block if module.has_fixed_shapes else block.self_attn).compile()
        for optimizer in build_optimizers(module, config):
            for group in optimizer.param_groups:
                group["rate"], group["decay"] = rate, group["weight_decay"]  # `step` scales both
            self.optimizers[f"{name}.{type(optimizer).__name__}"] = optimizer
        self.trained[name] = module

    # -- what a subclass defines ---------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor | tuple[Tensor, Figures]:
        """Return the loss of a batch, a sum over `count` terms.

        It may come with named parts, {"name": sum over the same terms, or (sum, count)}: their means are logged, shown
        and plotted.
        """
        raise TypeError(f"{type(self).__name__} does not define its loss")

    def count(self, batch: Batch) -> float:
        """Return the number of terms that `loss` sums: the trained tokens, unless a subclass defines it otherwise."""
        return int((batch["labels"][:, 1:] != -100).sum())

    def measure(self, batch: Batch) -> Figures:
        """Return the figures of a validation batch: means as (sum, count), totals as numbers."""
        return self.text_figures(self._loss_and_parts(batch)[0], batch["labels"][:, 1:])

    def quality(self, result: Metrics) -> float:
        """Return how good an evaluation is, higher is better: the best one's weights are kept in best.pt."""
        return -result["loss"]

    def extra_state(self) -> dict[str, str]:
        """Return hashes of further inputs by name, like a reference model; a resumed run must get the same ones."""
        return {}

    # -- one update ----------------------------------------------------------------------------------------------------

    def step(self, batches: list[Batch]) -> Metrics:
        """One step of the run, here one update; return what to log, with "count", and "tokens" and "flops" spent."""
        metrics = self.update(batches)
        self.step_count += 1
        tokens, T = sum(map(self.tokens, batches)), batches[0]["input_ids"].shape[-1] - 1
        return metrics | {"tokens": tokens, "flops": tokens * self.model.flops_per_token(T)}

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens that a batch puts through the model, padding not counted."""
        mask = batch.get("segments", batch.get("attention_mask"))  # 0 is padding in both
        return batch["input_ids"][:, 1:].numel() if mask is None else int((mask > 0).sum())

    def update(self, batches: list[Batch]) -> Metrics:
        """One optimizer step on the gradient of Σ loss / Σ count over `batches`, whatever their sizes."""
        # 1 accumulate the gradients of this process's rows, then sum them over all processes
        count = sum(map(self.count, batches))  # of all rows, before any backward
        if not count:
            raise UserError("a batch holds nothing to train on: all of its labels are -100")
        mine = list(map(WORLD.mine, batches))
        accumulate = functools.partial(self._accumulate, mine, count)
        self.trained.train()
        # the rows of pretraining are of equal length
        with training_kernels(self.config.dtype == "float32_onednn", cudnn=self.stage == "pretrain"):
            figures = self.in_memory(accumulate, max(len(batch["input_ids"]) for batch in mine))
        WORLD.sum_gradients(self.trained.parameters())
        # 2 clip
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)  # float16: the gradients are those of a scaled loss
        limit = self.config.grad_clip or math.inf
        norms = [nn.utils.clip_grad_norm_(module.parameters(), limit) for module in self.trained.values()]
        metrics, norms = average(figures), [norm.item() for norm in norms]  # nothing before waits for the device
        self.part_names = dict.fromkeys(metrics)
        # 3 step, unless something is not finite: then weights and moments stay as they are
        rate = learning_rate_at(self.step_count, WORLD.max(self.progress())[0], self.config)
        # what is read again and again is learned by heart: there more decay is better (arXiv:2509.14786)
        decay = min(max(1.0, self.epochs_done), 10.0)
        is_finite = all(map(math.isfinite, [metrics["loss"], *norms]))  # the same for all optimizers
        for optimizer in self.optimizers.values():
            gradients = []
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = rate * group["rate"], decay * group["decay"]
                gradients += [p.grad for p in group["params"] if p.grad is not None]
            if is_finite and gradients:  # PPO's policy has none in the critic's warm-up
                self.scaler.step(optimizer)
        self.scaler.update()  # lowers the scale if unscaling met an infinity
        self.trained.zero_grad(set_to_none=True)
        self._count_skipped(is_finite)
        return metrics | {"count": count, "grad_norm": norms[0] if is_finite else math.nan, "lr": rate}

    def _count_skipped(self, is_finite):
        """Count the steps that were skipped: a few are normal in float16, twenty in a row are not."""
        self.skipped += not is_finite
        self.skipped_in_row = 0 if is_finite else self.skipped_in_row + 1
        if self.skipped_in_row >= 20:
            data = self.train_data
            where = (
                f", before item {data.index} of epoch {data.epoch} of the data" if isinstance(data, BatchLoader) else ""
            )
            raise UserError(
                f"loss or gradient was not finite in 20 steps in a row, up to step {self.step_count}{where}: "
                "try a smaller --learning-rate, or --dtype float32"
            )

    def in_memory(self, fn: Callable[[int], typing.Any], rows: int) -> typing.Any:
        """Return fn(parts), which computes `rows` rows in so many parts, twice as many whenever memory runs out."""
        while True:
            try:
                return fn(self.micro_splits)
            except RuntimeError as error:
                is_full = is_out_of_memory(error)
                if not (self.config.auto_micro_batch if is_full else self._stops_compiling(error)):
                    raise
            # outside of except, where the error no longer holds on to the tensors of the failed attempt
            self.trained.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # nothing without CUDA
            if is_full:
                self._split_more(rows)

    def map_in_memory(self, fn: Callable[[Batch], typing.Any], batch: Batch) -> list:
        """Return [fn(batch)], or fn of each part of it where memory does not suffice for all of it."""
        return self.in_memory(
            lambda parts: [fn(self._to_device(part)) for part in split_rows(batch, parts)], len(batch["input_ids"])
        )

    def _split_more(self, rows):
        if self.micro_splits >= rows:
            raise UserError(
                "out of memory with one row at a time: try a smaller --seq-len or model, "
                "--gradient-checkpointing, or --optimizer adamw"
            )
        self.micro_splits *= 2
        rows = -(-rows // self.micro_splits)
        self.line.say(f"out of memory: going on with micro-batches of {rows} rows, the same batch in all")

    def _stops_compiling(self, error):
        """Return whether the error is one of torch.compile, and training can go on without it."""
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return False
        if self.config.compile == "on":
            raise compile_error("training", error) from error
        self.line.say(f"{compile_error('training', error)}: going on without compiling")
        self.compiles = False
        for module in self.trained.modules():
            module._compiled_call_impl = None
        return True

    def _accumulate(self, batches, count, parts):
        """Sum the gradients of Σ loss / `count` over the batches, each in so many parts; return the figures of each."""
        figures = []
        for micro in itertools.chain(*(split_rows(batch, parts) for batch in batches)):
            with self.autocast():
                loss, parts_of_loss = self._loss_and_parts(self._to_device(micro))
            self.scaler.scale(loss / count).backward()  # gradients add up in p.grad
            terms, sums = self.count(micro), {"loss": loss, **parts_of_loss}
            figures.append({name: x if isinstance(x, tuple) else (x.detach(), terms) for name, x in sums.items()})
        return figures

    def _loss_and_parts(self, batch):
        loss = self.loss(batch)
        return loss if isinstance(loss, tuple) else (loss, {})

    def _to_device(self, batch):
        def copy(value):
            if self.device.type == "cuda" and value.device.type == "cpu":  # without waiting for what is queued there
                return value.pin_memory().to(self.device, non_blocking=True)
            return value.to(self.device)

        return {name: copy(value) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def autocast(self, decoding: bool = False) -> contextlib.AbstractContextManager:
        # on a CPU the few rows of decoding are faster in float32: weights would be cast anew at every step
        enabled = self.dtype != torch.float32 and not (decoding and self.device.type == "cpu")
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    # -- loops ---------------------------------------------------------------------------------------------------------

    def train_epoch(self, dataloader: Iterable[Batch]) -> float:
        """One pass over any iterable of batches; return the mean loss of what it trained on."""
        total = count = 0.0
        batches = iter(dataloader)
        while group := list(itertools.islice(batches, self.config.accumulation_steps)):
            metrics = self.step(group)
            total += metrics["loss"] * metrics["count"]  # a mean -> its sum
            count += metrics["count"]
        if not count:
            raise UserError("the dataloader gave no batch")
        return total / count

    def fit(self) -> Metrics:
        """Train until max_steps, epochs or minutes, evaluate, save. A signal ends it after the step, with a checkpoint.

        Returns the last evaluation (empty without val_data) and, if it was interrupted, {"signal": number} too. An
        error ends it with a checkpoint of the steps before.
        """
        self._check_can_fit()
        config, window, evaluation = self.config, [], {}
        hold = contextlib.nullcontext()
        if WORLD.is_first:  # for all processes
            self.run_dir.mkdir(parents=True, exist_ok=True)
            hold = locked(self.run_dir)
        with hold, catch_signals() as caught, self._saved_on_error():
            self._start_run()
            if self.step_count == 0 and (self.stage != "pretrain" or self.origin):
                evaluation = self._evaluate_and_save()  # what the parent's model can do already
            batches, self.position = self._endless_batches(), self._position()
            is_over, signal_number = False, self._end_of_run(caught)[1]
            while not is_over and not signal_number:
                # 1 accumulate, clip, step
                start, before = time.monotonic(), self.epochs_done
                metrics = self.step(list(itertools.islice(batches, config.accumulation_steps)))
                self.position = self._position()
                self.tokens_seen, self.epochs_done = self.tokens_seen + metrics["tokens"], self._count_epochs()
                # 2 log
                window.append(metrics | {"seconds": time.monotonic() - start})
                if self.step_count % config.log_every == 0 or self.step_count == 1:
                    self._log_window(window, evaluation)
                    window = []
                # 3 evaluate, save. Clock and signals are looked at here alone, so that all processes decide the same
                is_over, signal_number = self._end_of_run(caught)
                if is_over or not signal_number and self._is_evaluation_due(before):
                    evaluation = self._evaluate_and_save()
                elif signal_number or self.step_count % (config.save_every or math.inf) == 0:
                    self.save_checkpoint(self.run_dir / "checkpoint.pt")
            if is_over:
                self._say_best(evaluation)
        signal_number = self._end_of_run(caught)[1]  # here all wait until the first process has saved
        return evaluation | ({"signal": signal_number} if signal_number else {})

    def _end_of_run(self, caught):
        """Return whether the run is over, and the signal that ends it early (0: none), as any process knows."""
        progress, number = WORLD.max(self.progress(), caught[0] if caught else 0)
        return progress >= 1, int(number)

    @contextlib.contextmanager
    def _saved_on_error(self):
        """Save the steps that are done before an error ends the block; of several processes the others may be gone."""
        first = self.step_count
        try:
            yield
        except (UserError, RuntimeError):
            if self.step_count > first and WORLD.size == 1:
                self._go_to(self.position)  # a step that failed has taken batches and random numbers
                self.save_checkpoint(self.run_dir / "checkpoint.pt")
            raise

    def _is_evaluation_due(self, before):
        """Return whether to evaluate after this step, in which `epochs_done` moved on from `before`."""
        every, now = self.config.eval_every, self.epochs_done
        if every and self.step_count % every == 0:
            return True
        ends_epoch = self.config.epochs and int(now) > int(before)
        return ends_epoch and self.step_count / now < every  # short epochs are evaluated at their ends

    def _say_best(self, last):
        """Say which evaluation was the best if it is not the last, and warn where training has gone on for too long."""
        best, first = self.best_figures, self.first_figures
        if not best:
            return
        text = (
            f"best: the evaluation of step {best['step']} ({describe(best)}); "
            "later stages, sample.py, eval and export take its weights, best.pt"
        )
        if self._is_worse(last, best):
            warnings.warn(f"held-out figures have become worse, in the end {describe(last)}; {text}", stacklevel=4)
        elif best["step"] < self.step_count:
            self.line.say(text)
        if first and self._is_worse(best, first):
            text = f"before the first step held-out figures were better: {describe(first)}"
            warnings.warn(f"{text}: try a smaller --learning-rate", stacklevel=4)

    def _is_worse(self, figures, others):
        """Return whether an evaluation is clearly worse than another; a NaN is."""
        quality = self.quality(others)
        return not (self.quality(figures) >= quality - 0.02 * abs(quality) or math.isnan(quality))

    def _check_can_fit(self):
        limits = self.config.max_steps or self.config.minutes or self.config.epochs
        if self.train_data is None or self.run_dir is None or not limits:
            raise UserError("fit() needs train_data and run_dir, and an end of the run: max_steps, epochs or minutes")
        if self.config.epochs and not isinstance(self.train_data, BatchLoader | Sized):
            raise UserError("epochs need train_data with a length: give max_steps or minutes instead")
        if self.progress() >= 1:  # a resumed run that is over
            raise UserError(
                f"the run is over: {self.step_count} steps, {self.epochs_done:.3g} epochs and {self.elapsed_s():.0f} s "
                "are done: give a larger --max-steps, --epochs or --minutes"
            )

    def _endless_batches(self):
        is_resumed = self.step_count > 0  # then the data may stand at the very end of an epoch
        while True:
            batch = None
            for batch in self.train_data:  # an epoch
                yield batch
            if batch is None and not is_resumed:
                raise UserError("train_data gives no more batches: fit() needs data that can be iterated again")
            is_resumed = False

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def budget_s(self) -> float:
        """Return the seconds from the start to the end of training that `minutes` allow: infinity without."""
        return (self.config.minutes or math.inf) * 60 - self.final_s

    def _count_epochs(self):
        """Return how often the data have been gone through."""
        if isinstance(self.train_data, BatchLoader):
            return self.train_data.passes
        batches = len(self.train_data) if isinstance(self.train_data, Sized) else math.inf
        return self.step_count * self.config.accumulation_steps / batches

    def work_done(self) -> float:
        """Return how much of max_steps or epochs is done, whichever is further: 0 … 1."""
        config = self.config
        return max(self.step_count / (config.max_steps or math.inf), self.epochs_done / (config.epochs or math.inf))

    def progress(self) -> float:
        """Return how much of the run is over, 0 … 1: by steps, by epochs or by the clock, whichever is further."""
        return max(self.work_done(), self.elapsed_s() / max(self.budget_s(), 1e-3))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, max_tokens: int | None = None) -> Metrics:
        """Return the figures of val_data, or of its beginning with `max_tokens` trained tokens.

        Text has "loss" (nats per token), "bpb" (bits per byte), "tokens" and "bytes"; stages add theirs. Where the data
        have checkable answers, "exact_match" is the share of prompts that are answered right, greedily.
        """
        if self.val_data is None:
            raise UserError("there is no validation data to evaluate on")
        if hasattr(self.val_data, "rewind"):
            self.val_data.rewind()  # always the same batches
        figures = []
        with eval_mode(self.trained), self.autocast():
            for batch in map(WORLD.mine, self.held_out(max_tokens)):
                figures += self.map_in_memory(self.measure, batch)
            matches = self.exact_match()
        result = average(figures)
        if not any(result.values()):
            raise UserError("the validation data holds nothing to score")
        return result | matches

    def held_out(self, max_tokens: int | None) -> Iterator[Batch]:
        """Yield the batches of val_data until they hold `max_tokens` trained tokens."""
        tokens = 0
        for batch in self.val_data:
            yield batch
            tokens += int((batch["labels"][..., 1:] != -100).sum())
            if max_tokens and tokens >= max_tokens:
                return

    def text_figures(self, nats: Tensor | float, labels: Tensor) -> Figures:
        """Return the figures of text whose labels have a summed loss of `nats`."""
        labels = labels[labels != -100].tolist()  # the trained tokens, (n,)
        size = sum(len(self.tokenizer.token_bytes[token]) for token in labels)
        return {"loss": (nats, len(labels)), "bpb": (nats / math.log(2), size), "tokens": len(labels), "bytes": size}

    def exact_match(self) -> Metrics:
        """Return {"exact_match"}: the share of val_data's first `eval_prompts` checkable prompts answered right."""
        data = self.val_data
        if not isinstance(data, RecordDataLoader):
            return {}
        # those without room are counted before they are dropped: then the prompts do not depend on the model
        checkable = (i for i in data.items if data.note(i)["answer"])
        answered = self._answered(WORLD.mine(list(itertools.islice(checkable, self.config.eval_prompts))))
        return average({"exact_match": (answer_matches(reply, note["answer"]), 1)} for note, reply in answered)

    def samples(self) -> str:
        """Return text to show beside an evaluation: replies to a few held-out prompts."""
        answered = self._answered(self.val_data.items[:3]) if isinstance(self.val_data, RecordDataLoader) else []
        return "\n".join(f"{last_content(note['messages'])} → {reply}" for note, reply in answered)

    def _answered(self, items):
        """Return (note, reply) of those records of val_data whose prompts leave room for a reply."""
        room = self.model.config.max_position_embeddings - self.config.reply_tokens
        prompts = {i: ids for i in items if len(ids := self.val_data.prompt_ids(i)) <= room}
        replies = self.replies(list(prompts.values()))
        return [(self.val_data.note(i), reply) for i, reply in zip(prompts, replies, strict=True)]

    def replies(self, prompts: list[list[int]]) -> list[str]:
        """Return greedy replies to chats that end in a generation prompt."""
        settings = GenerationConfig(max_new_tokens=self.config.reply_tokens, do_sample=False)
        generator = TextGenerator(self.model, self.tokenizer)
        with self.autocast(decoding=True):
            return self.in_memory(lambda parts: generator.generate(prompts, settings, 128 // parts), 128)

    def _evaluate_and_save(self):
        """Evaluate on the first `eval_tokens`; after a step also save, keep the best and show a sample.

        Returns the evaluation, empty without validation data.
        """
        # 1 evaluate
        start, result, path = time.monotonic(), {}, self.run_dir / "checkpoint.pt"
        if self.val_data is not None:
            result = self.evaluate(self.config.eval_tokens)
            self._log({f"val_{name}": value for name, value in result.items()})
            self.line.say(f"step {self.step_count}: validation {describe(result)}")
        if self.step_count == 0:  # nothing to save yet
            self.first_figures = result
            return result
        # 2 save, and keep a copy of the best; a NaN is never the best
        if is_best := bool(result) and self.quality(result) > self.best:
            self.best, self.best_figures = self.quality(result), result | {"step": self.step_count}
        self.save_checkpoint(path)
        if is_best and WORLD.is_first:
            with atomic_write(self.run_dir / "best.pt") as out, open(path, "rb") as file:
                shutil.copyfileobj(file, out)
        # 3 show what the model writes
        if self.config.sample_tokens and WORLD.is_first and (text := self.samples()):
            self.line.say("  " + text.replace("\n", "\n  "))
        self.final_s = 1.1 * (time.monotonic() - start) + 0.3  # the last one will take as long
        return result

    # -- log, checkpoint, run directory --------------------------------------------------------------------------------

    def _log_window(self, window, evaluation):
        """Log and show the means of the steps since the last time."""
        # 1 the row: a figure's mean is over the steps where it is finite, NaN where it never is
        finite = [{name: (x, 1) for name, x in metrics.items() if math.isfinite(x)} for metrics in window]
        row = dict.fromkeys(window[0], math.nan) | average(finite)
        del row["count"]
        step_s = row.pop("seconds")
        # the last learning rate; speeds are sums over sums
        row |= {
            "lr": window[-1]["lr"],
            "tok_per_s": row.pop("tokens") / step_s,
            "mfu": row.pop("flops") / step_s / self.peak_flops / WORLD.size,
        }
        self._log(row)
        if not evaluation and self.val_data is not None:  # not measured yet: forward alone is 2.5 times as fast
            guess = self.config.eval_tokens / (2.5 * row["tok_per_s"]) + 2.0
            self.final_s = min(guess, 0.1 * 60 * self.config.minutes)  # at most a tenth of the run
        # 2 the line, with what ends first: the steps or the time
        done = self.work_done()
        steps_left = self.step_count / done - self.step_count if done else math.inf
        eta = max(0, round(min(steps_left * step_s, self.budget_s() - self.elapsed_s())))
        val = f" | val {describe(evaluation, [headline(self.stage, evaluation)])}" if evaluation else ""
        speed = f"{row['tok_per_s'] / 1e3:.1f}k" if row["tok_per_s"] >= 1000 else f"{row['tok_per_s']:.0f}"
        used = self.monitor.current_bytes(), self.monitor.peak_bytes()
        current, peak = (f"{size / 1e9:.2f}" if size else "?" for size in used)  # 0 is unknown
        self.line.show(
            f"step {self.step_count:>5} {min(self.progress(), 1):>4.0%} | eta {eta // 60}:{eta % 60:02} | "
            f"{describe(row, FIGURES | self.part_names)}{val} | {speed} tok/s | "
            f"mfu {row['mfu']:.0%} | {current} GB (peak {peak})"
        )

    def _log(self, row):
        if not WORLD.is_first:
            return
        row = {
            "step": self.step_count,
            **row,
            "tokens": self.tokens_seen,
            "skipped": self.skipped,
            "peak_bytes": self.monitor.peak_bytes(),
            "elapsed_s": round(self.elapsed_s(), 2),
        }
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.config.tensorboard:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(name, value, self.step_count)
            self.writer.flush()

    def _start_run(self):
        """Write config.json and tokenizer.json, and drop metrics of steps that a resumed run will repeat."""
        self._check_equal()
        if WORLD.size > 1 and self.step_count == 0:  # dropout and sampling differ
            torch.manual_seed(WORLD.seed(self.config.seed))
        if not WORLD.is_first:
            return
        # 1 nothing on disk is harmed
        if self.step_count == 0 and holds_run(self.run_dir):
            raise UserError(f"{self.run_dir} holds a run already: load its checkpoint, or take another run_dir")
        metrics = self.run_dir / "metrics.jsonl"
        rows = read_metrics(self.run_dir) if metrics.exists() else []
        # 2 what others read
        write_file(metrics, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= self.step_count))
        write_file(self.run_dir / "config.json", json.dumps(self.config_dict(), indent=2))
        self.tokenizer.save(self.run_dir / "tokenizer.json")
        if self.config.tensorboard:
            import_extra("tensorboard", "plot")  # torch's writer needs it
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=self.step_count + 1)
        # 3 what `mfu` is a share of
        self.peak_flops = matmul_peak(self.device, self.config.dtype, 8192 if self.device.type == "cuda" else 1024)

    def config_dict(self) -> dict:
        """Return what config.json and a checkpoint say of a run."""
        loaders = {"train": self.train_data, "val": self.val_data}
        data = {name: loader.source._asdict() for name, loader in loaders.items() if isinstance(loader, BatchLoader)}
        return {
            "stage": self.stage,
            **self.origin,  # "parent", "checkpoint", "reward", "imported": as far as there are such
            "model": dataclasses.asdict(self.model.config),
            "train": dataclasses.asdict(self.config),
            "rl": dataclasses.asdict(self.rl),
            "data": data,
        }

    def _parts(self):
        """Return what is saved by its state_dict, by the name in a checkpoint."""
        return {**self.trained, "scaler": self.scaler}

    @functools.cached_property
    def base(self) -> dict[str, str]:
        """The hashes by module of the frozen weights, which a LoRA checkpoint leaves to the parent run's; else {}."""
        if not self.config.lora_rank or "parent" not in self.origin:
            return {}
        return {name: fingerprint(module, trained_weights(module)) for name, module in self.trained.items()}

    def _random_states(self):
        """Return who draws random numbers: the CPU's generator and the device's."""
        generators = {"cpu": torch.default_generator}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.default_generators[self.device.index or 0]
        if self.device.type == "mps":
            generators["mps"] = torch.mps._get_default_mps_generator()
        return generators

    def _position(self):
        """Return the data's cursor, None without one, and the random states by generator."""
        cursor = self.train_data.state_dict() if hasattr(self.train_data, "load_state_dict") else None
        return cursor, {name: generator.get_state() for name, generator in self._random_states().items()}

    def _go_to(self, position):
        cursor, random_states = position
        if cursor:
            self.train_data.load_state_dict(cursor)
        for name, generator in self._random_states().items():
            if name in random_states:
                generator.set_state(random_states[name])

    def save_checkpoint(self, path: AnyPath) -> None:
        """Save everything that going on needs: weights, moments, scaler, cursor, random states, counters, configs.

        Of a LoRA run that starts from another run's weights, these are left out; their fingerprint is in "base".
        """
        is_over = WORLD.max(self.progress())[0] >= 1
        cursor, random_states = self._position()
        random_states = WORLD.gather(random_states)
        self._check_equal()
        if not WORLD.is_first:
            return
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        save_checkpoint(
            path,
            {
                "format": FORMAT,
                "step": self.step_count,
                "finished": is_over,
                "config": self.config_dict(),
                "tokenizer_hash": self.tokenizer.content_hash(),
                "extra": self.extra_state(),
                **parts,
                "data": cursor,
                **{name: trained_weights(self.trained[name]) for name in self.base},
                "base": self.base,
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "rng": random_states,  # of each process
                "counters": {name: getattr(self, name) for name in self.counters},
                "elapsed_s": self.elapsed_s(),
            },
        )

    def _check_equal(self):
        """Raise UserError unless all processes have the same weights."""
        marks = WORLD.gather(fingerprint(self.trained) if WORLD.size > 1 else "")
        if odd := [rank for rank, mark in enumerate(marks) if mark != marks[0]]:
            raise UserError(f"processes {odd} have other weights than the first: are machines and versions the same?")

    def load_checkpoint(self, path: AnyPath) -> None:
        """Go on where `save_checkpoint` stopped, with any number of processes."""
        # 1 read and compare, before anything is changed
        WORLD.barrier()  # nobody reads while the first process may replace a damaged file
        if WORLD.is_first:
            state = load_checkpoint(path, repair=True)
        WORLD.barrier()
        if not WORLD.is_first:
            state = load_checkpoint(path)
        self._check_belongs(path, state)
        # 2 weights, cursor, moments
        for name in state["base"]:
            state[name] = self.trained[name].state_dict() | state[name]
        for name, part in self._parts().items():
            if state[name]:  # empty for a disabled scaler
                part.load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():  # moments as they were, settings as they are now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizers"][name]["state"]})
        # 3 counters, clock, random states
        vars(self).update(state["counters"])
        self.started -= state["elapsed_s"]  # the time before counts as well
        if len(state["rng"]) != WORLD.size:
            self.line.say(f"saved by {len(state['rng'])} processes, now {WORLD.size}: new random numbers from here on")
            torch.manual_seed(WORLD.seed(self.config.seed + self.step_count))
            state["rng"] = [{}] * WORLD.size
        self._go_to((state["data"], state["rng"][WORLD.rank]))

    def _check_belongs(self, path, state):
        """Raise UserError unless a checkpoint can be resumed by this trainer."""
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path} is of an older version: it cannot be resumed, but used with --init, --run and "
                "--stage eval or export"
            )
        saved, now = state["config"], self.config_dict()
        if saved["stage"] != now["stage"]:
            raise UserError(f"{path} is of stage {saved['stage']}, not {now['stage']}")
        if saved["model"] != now["model"]:
            raise UserError(f"{path} holds a model of another shape: build it with {saved['model']}")
        if state["tokenizer_hash"] != self.tokenizer.content_hash():
            raise UserError(f"{path} was trained with another tokenizer")
        before, options = (config["train"] | config.get("rl", {}) for config in (saved, now))
        for name in FIXED_OPTIONS:
            if before.get(name, options[name]) != options[name]:
                raise UserError(f"{path} was trained with --{name.replace('_', '-')} {before[name]}: give that")
        marks = self.extra_state() | {name: fingerprint(self.trained[name], state[name]) for name in state["base"]}
        for name, mark in marks.items():
            if (state["extra"] | state["base"]).get(name) != mark:
                if name in state["base"]:
                    raise UserError(
                        f"{path} holds only what LoRA trained, and its base has changed since: restore that"
                    )
                raise UserError(f"the {name} is not the one that this run started with: give that")


def last_content(messages: list[dict]) -> str:
    """Return the last message's text, "" without messages: a completion may stand alone."""
    return messages[-1]["content"] if messages else ""


class PreTrainer(Trainer):
    """Next-token prediction on blocks of text: cross-entropy of token t+1 given tokens 0 … t, and the balance loss."""

    stage = "pretrain"

    def loss(self, batch: Batch) -> Tensor:
        labels = batch["labels"][:, 1:]  # (B, T): labels[t] follows input_ids[t]
        mask = batch.get("attention_mask")  # padding is on the right, where causality already hides it
        hidden, balance = self.model.hidden_states(
            batch["input_ids"][:, :-1], token_mask=None if mask is None else mask[:, :-1]
        )
        loss = chunked_cross_entropy(hidden, self.model.output_weight, labels, compiled=self.compiles)
        return loss + self.model.config.router_aux_loss_coef * balance * (labels != -100).sum()

    def samples(self) -> str:
        """Return continuations of how held-out documents begin."""
        settings = GenerationConfig(max_new_tokens=self.config.sample_tokens, temperature=0.7, seed=self.config.seed)
        generator = TextGenerator(self.model, self.tokenizer)
        return "\n".join(f"{prompt}→{generator.generate(prompt, settings)}" for prompt in self.prompts())

    def prompts(self) -> list[str]:
        """Return beginnings of held-out lines: six characters of the first in Chinese, four words of another."""
        if not isinstance(self.val_data, PretrainDataLoader):
            return ["Once there was"]
        text = self.tokenizer.decode(self.val_data.tokens[:50_000].long(), skip_special_tokens=False)
        for special in self.tokenizer.special_tokens.values():  # they stand between documents
            text = text.replace(special, "\n")
        begins = (re.search(pattern, text, re.MULTILINE) for pattern in ("^[一-鿿].{5}", r"^[^\s一-鿿]\S*( \S+){3}"))
        # they are shown in a command to paste, which a newline or an escape would break
        lines = [begin[0] for begin in begins if begin and begin[0].isprintable()]
        return lines or [*re.findall(r"\w{1,8}", text), ""][:1]


class SFTTrainer(Trainer):
    """Supervised fine-tuning: next-token prediction on the assistant's tokens of conversations, packed or not."""

    stage = "sft"

    def loss(self, batch: Batch) -> Tensor:
        segments = batch["segments"][:, :-1]
        # tokens of a packed row see their own conversation only
        same_conversation = segments[:, :, None] == segments[:, None]  # (B, T, T)
        hidden, balance = self.model.hidden_states(
            batch["input_ids"][:, :-1],
            position_ids=batch["position_ids"][:, :-1],
            attention_mask=same_conversation,
            token_mask=segments > 0,
        )
        labels = batch["labels"][:, 1:]
        trained = labels != -100
        # most tokens are not trained: their logits need not be computed
        loss = chunked_cross_entropy(hidden[trained], self.model.output_weight, labels[trained], compiled=self.compiles)
        return loss + self.model.config.router_aux_loss_coef * balance * trained.sum()


# -- learning from preferences -----------------------------------------------------------------------------------------


@dataclass
class RLHFConfig:
    """Options of learning from preferences and rewards. `kl` means divergence from the reference model."""

    dpo_beta: float = 0.1  # DPO: β, the strength of the pull towards the reference
    dpo_kind: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO: the loss; ipo regresses to a margin and never saturates
    dpo_sft_coef: float = 0.0  # DPO: weight of the chosen completion's loss per token, against its collapse
    reward_center_coef: float = 0.01  # reward: weight of (chosen + rejected)², which keeps scores around 0
    reward_sft_coef: float = 1.0  # reward: weight of the chosen completion's loss per token, as regulariser
    temperature: float = 1.0  # PPO, GRPO: of the rollouts' sampling
    missing_end_penalty: float = 1.0  # PPO, GRPO: subtracted from the score of a reply that does not end
    minibatch_size: int = 128  # PPO, GRPO: replies of an update
    update_epochs: int = 2  # PPO, GRPO: passes over a rollout
    clip_range: float = 0.2  # PPO, GRPO: how far the ratio of probabilities counts, 1 ± this
    stop_kl: float = 0.1  # PPO, GRPO: end a rollout's updates once KL(old || new) exceeds this (nats a token); 0 is off
    kl_coef: float = 0.05  # PPO: penalty on each token's KL, subtracted from its reward
    gamma: float = 1.0  # PPO: discount of later rewards
    gae_lambda: float = 0.95  # PPO: generalised advantage estimation, 0 trusts the critic, 1 the rewards
    value_clip: float = 1.0  # PPO: how far the critic's estimate may move in a rollout's updates, in units of the score
    value_coef: float = 0.5  # PPO: weight of the critic's loss
    critic_rate: float = 5.0  # PPO: the critic's learning rate, as a multiple of the policy's
    critic_warmup: int = 8  # PPO: first steps that train only the critic, so that the policy is not misled
    group_size: int = 8  # GRPO: replies to each prompt, each compared with the others
    grpo_kl_coef: float = 0.0  # GRPO: weight of the KL in the loss
    advantage_kind: Literal["dr_grpo", "grpo"] = "dr_grpo"  # GRPO: grpo divides by the group's deviation, too

    def __post_init__(self):
        ranges = {
            "[2, inf)": "group_size",
            "[1, inf)": "minibatch_size update_epochs",
            "[0, inf)": "dpo_sft_coef reward_center_coef reward_sft_coef missing_end_penalty stop_kl kl_coef "
            "value_coef critic_warmup grpo_kl_coef",
            "(0, inf)": "dpo_beta clip_range value_clip critic_rate",
            "[1e-5, inf)": "temperature",
            "[0, 1]": "gamma gae_lambda",
        }
        check_fields(self, ranges)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy that stays as `model` is now, in eval mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def remove_dropout(model: nn.Module) -> None:
    """Turn dropout off, so that policy and reference start with identical log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def pair_rows(batch: Batch) -> list[Tensor]:
    """Return input_ids, labels and attention_mask of pairs (B, 2, T) as rows, (2 B, T): chosen, rejected, chosen, …"""
    return [batch[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask")]


def completion_logprobs(model: MiniGPT, batch: Batch) -> Tensor:
    """Return the log-probabilities of the completions of pairs (B, 2, T), summed over tokens, (B, 2)."""
    ids, labels, mask = pair_rows(batch)
    hidden, _ = model.hidden_states(ids[:, :-1], token_mask=mask[:, :-1])
    return token_logprobs(hidden, model.output_weight, labels[:, 1:]).sum(dim=1).view(-1, 2)


def pair_figures(scores: Tensor, batch: Batch) -> Figures:
    """Return {"pair_accuracy"}: the share of pairs whose first score (B, 2) is the higher one, also by category."""
    margins = scores[:, 0] - scores[:, 1]
    right = torch.where(margins.abs() < 1e-4, 0.5, (margins > 0).float())  # rounding errors are ties
    figures = {"pair_accuracy": (right.sum(), len(right))}
    categories = batch.get("category", [])
    for name in sorted({*categories} - {""}):
        of_category = right[[category == name for category in categories]]
        figures[f"pair_accuracy_{name}"] = (of_category.sum(), len(of_category))
    return figures


class PairTrainer(Trainer):
    """Base of the trainers on preference pairs: the loss counts pairs."""

    def count(self, batch: Batch) -> int:
        return len(batch["input_ids"])


class DPOTrainer(PairTrainer):
    """Direct preference optimisation (arXiv:2305.18290) of a policy against the frozen model that it starts as.

    `reference`: that model (default: a copy of `model`); its log-probabilities are computed once for each pair.
    """

    stage = "dpo"

    def __init__(self, model: MiniGPT, *args, reference: MiniGPT | None = None, **options):
        self.reference = frozen_copy(reference or model)  # before LoRA is added
        super().__init__(model, *args, **options)
        remove_dropout(self.trained)
        self.reference.to(self.device)
        for loader in (self.train_data, self.val_data):
            if isinstance(loader, DPODataLoader) and loader.reference_logprobs is None:
                self.cache_reference(loader)

    def cache_reference(self, loader: DPODataLoader) -> None:
        if len(loader.items) > 1000:
            self.line.say(f"the reference scores {len(loader.items):,} pairs, once")
        logprobs = torch.zeros(len(loader.lengths), 2)
        by_length = sorted(loader.items, key=loader.lengths.__getitem__)  # little padding
        for items in WORLD.mine(list(batched(by_length, limit=loader.batch_size))):
            logprobs[items] = torch.cat(self.map_in_memory(self.reference_logprobs, loader.collate(items))).cpu()
        loader.reference_logprobs = WORLD.sum(logprobs)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Return the reference's log-probabilities (B, 2), from the batch where the loader has them."""
        if "reference_logprobs" in batch:
            return batch["reference_logprobs"]
        with torch.no_grad(), self.autocast():
            return completion_logprobs(self.reference, batch)

    def extra_state(self) -> dict[str, str]:
        return {"reference": fingerprint(self.reference)}

    def dpo_loss(self, policy: Tensor, reference: Tensor) -> Tensor:
        return dpo_loss(*policy.T, *reference.T, self.rl.dpo_beta, self.rl.dpo_kind)  # (2, B): chosen, rejected

    def loss(self, batch: Batch) -> Tensor:
        policy = completion_logprobs(self.model, batch)  # (B, 2)
        loss = self.dpo_loss(policy, self.reference_logprobs(batch))
        if self.rl.dpo_sft_coef:
            # a weighted log-likelihood per token beside it, since DPO lowers that of both completions
            lengths = (batch["labels"][:, 0] != -100).sum(dim=1)  # tokens of the chosen completions
            loss = loss - self.rl.dpo_sft_coef * (policy[:, 0] / lengths).mean()
        return loss * len(policy)

    def measure(self, batch: Batch) -> Figures:
        """Return the figures of text of the chosen completions, "dpo_loss", and "chosen_logprob" per completion.

        "pair_accuracy": the share of pairs whose chosen completion has gained more on the reference than the rejected
        one, also by category.
        """
        policy, reference = completion_logprobs(self.model, batch), self.reference_logprobs(batch)
        chosen, N = policy[:, 0].sum(), len(policy)
        # the share of pairs, not the mean gain: that one grows without bound
        return self.text_figures(-chosen, batch["labels"][:, 0]) | {
            "dpo_loss": (self.dpo_loss(policy, reference) * N, N),
            "chosen_logprob": (chosen, N),
            **pair_figures(policy - reference, batch),
        }

    def quality(self, result: Metrics) -> float:
        return -result["dpo_loss"]


class RewardTrainer(PairTrainer):
    """Trains a RewardModel to score chosen completions above rejected ones (Bradley-Terry; arXiv:2203.02155).

    It also learns to write the chosen ones, which makes scores hold on unseen pairs (arXiv:2406.10216).
    """

    stage = "reward"

    def loss(self, batch: Batch) -> Tensor:
        ids, labels, mask = pair_rows(batch)
        hidden, _ = self.model.hidden_states(ids, token_mask=mask)  # (2 B, T, C), for scores and logits alike
        scores = self.model.final_score(hidden, mask).view(-1, 2)  # (B, 2): chosen, rejected
        loss = reward_loss(*scores.T) + self.rl.reward_center_coef * scores.sum(dim=1).square().mean()
        if self.rl.reward_sft_coef:
            hidden, labels = hidden[::2, :-1], labels[::2, 1:]  # those of the chosen completions
            logprobs = token_logprobs(hidden, self.model.output_weight, labels).sum(dim=1)
            loss = loss - self.rl.reward_sft_coef * (logprobs / (labels != -100).sum(dim=1)).mean()
        return loss * len(scores)

    def scores(self, batch: Batch) -> Tensor:
        """Return the scores (B, 2) of the chosen and of the rejected completions."""
        ids, _, mask = pair_rows(batch)
        return self.model(ids, mask).view(-1, 2)

    def measure(self, batch: Batch) -> Figures:
        """Return "loss" (nats per pair), "pair_accuracy" (also by category), and that of the longer completion."""
        scores, lengths, N = self.scores(batch), batch["attention_mask"].sum(dim=2), self.count(batch)
        return {
            "loss": (reward_loss(*scores.T) * N, N),
            "tokens": lengths.sum(),
            "longer_accuracy": pair_figures(lengths, batch)["pair_accuracy"],
            **pair_figures(scores, batch),
        }

    @torch.no_grad()
    def samples(self) -> str:
        """Return the scores of a few held-out pairs."""
        data, lines = self.val_data, []
        for i in data.items[:2] if isinstance(data, DPODataLoader) else ():
            with eval_mode(self.model):
                scores = self.scores(self._to_device(data.collate([i])))[0].tolist()
            for side, score in enumerate(scores):
                ids, trained = data.sequence(i, side)
                lines.append(
                    f"{last_content(data.note(i)['messages'])} → {self.tokenizer.decode(ids[trained])} [{score:.2f}]"
                )
        return "\n".join(lines)


# ======================================================================================================================
# 10 Reinforcement learning: the policy writes replies, a reward scores them, an update makes good ones likelier.
# ======================================================================================================================


Reward = RewardModel | Callable[[list[dict], str, str], float]  # what scores (messages, reply, answer)
Rollout = tuple[Batch, Figures]  # the experience, and what to log


# Full-width characters and the minus sign as ASCII
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0xFFE5: "¥", 0x2212: "-"}
_NUMBER = re.compile(r"([+-]?)[$¥€£]? ?(?=\.?\d)((?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?(?:e[+-]?\d{1,3})?)(.*)")


def _number(text):
    """Return the value and the unit of a text that is a number; None for another."""
    match = _NUMBER.fullmatch(text.translate(_PLAIN))
    return match and (Decimal(match[1] + match[2].replace(",", "")), match[3].strip())


def answer_matches(reply: str, answer: str) -> bool:
    """Return whether the reply's first sentence is the answer (one of the lines of `answer`), in any case.

    Numbers are compared by their values. A unit or % must be that of the answer; a leading currency counts for nothing.

    >>> answer_matches("Tom. I hope that helps!", "tom"), answer_matches("是小明。", "小明"), answer_matches("3.5", "3")
    (True, False, False)
    >>> answer_matches("$1,000.", "1000.0"), answer_matches("18 apples", "18"), answer_matches("18.0 kg", "18 kg")
    (True, False, True)
    """
    reply = "\n".join(" ".join(line.split()) for line in reply.strip().lower().split("\n"))
    number = _number(re.split(r"[。！？!?\n]|[.．](?!\d)", reply)[0])
    for line in answer.lower().split("\n"):
        line = " ".join(line.split()).rstrip("。！？!?.")
        # The sentence ends there; a point before a digit is a decimal one.
        if line and re.match(re.escape(line) + r"([。！？!?\n]|\.(?!\d)|$)", reply):
            return True
        if number and number == _number(line):
            return True
    return False


def answer_reward(messages: list[dict], reply: str, answer: str) -> float:
    """Return 1 for a reply whose first sentence is the prompt's answer, else 0."""
    if not answer:
        raise UserError(
            f'--reward answer needs prompts with an "answer" (or "gt"): one has none: {messages[-1]["content"][:80]!r}'
        )
    return float(answer_matches(reply, answer))


def select_rows(batch: Batch, rows: Tensor) -> Batch:
    """Return rows of an experience, without the columns on the right that only longer rows need."""
    unused = int(batch["last"].max() - batch["last"][rows].max())
    return {
        name: value[rows, : value.shape[1] - unused] if value.dim() > 1 else value[rows]
        for name, value in batch.items()
    }


def check_stage(stage: str, config: TrainConfig, shape: MiniGPTConfig) -> None:
    """Raise UserError unless a model of that shape can go through a stage with such options."""
    context = f"max_position_embeddings={shape.max_position_embeddings}"
    if config.reply_tokens >= shape.max_position_embeddings:
        raise UserError(f"reply_tokens={config.reply_tokens} leave no room for a prompt in the context of {context}")
    if (config.seq_len or 0) > shape.max_position_embeddings:
        raise UserError(f"seq_len={config.seq_len} exceeds the context, {context}")
    if config.batch_size < WORLD.size:
        raise UserError(f"batch_size={config.batch_size} cannot be divided among {WORLD.size} processes: start fewer")
    if stage in ("ppo", "grpo") and config.accumulation_steps > 1:
        raise UserError(
            f"accumulation_steps={config.accumulation_steps} has no meaning here: batch_size prompts make "
            "a rollout, minibatch_size replies an update"
        )


class RLTrainer(Trainer):
    """Base of PPO and GRPO: rollouts, their scores, minibatch updates, held-out evaluation.

    A step takes a batch of a PromptDataLoader. `reward`: a RewardModel, or a function of (messages, reply, answer) that
    returns a number. `reference`: the model to stay near (default: a copy of `model`).

    A subclass defines `collect`, the rollout of one process's prompts; `advantages`, which adds them to the experience
    of all; and `policy_loss`. The experience has one row a reply. Column j of every (N, T - 1) tensor
    (log-probabilities, values, rewards) is about token j + 1.
    """

    may_round = False  # the ratio of two probabilities close to each other would drown in it

    def __init__(self, model: MiniGPT, *args, reward: Reward, reference: MiniGPT | None = None, **options):
        self.reference = frozen_copy(reference or model)  # before super().__init__, which adds LoRA to the policy
        super().__init__(model, *args, **options)
        self.reference.to(self.device)
        self.reward = frozen_copy(reward).to(self.device) if isinstance(reward, RewardModel) else reward
        check_stage(self.stage, self.config, model.config)
        remove_dropout(self.trained)  # otherwise the ratio would not be 1 at the first update

    def extra_state(self) -> dict[str, str]:
        reward = self.reward
        name = getattr(reward, "__qualname__", type(reward).__qualname__)
        return {
            "reference": fingerprint(self.reference),
            "reward": fingerprint(reward) if isinstance(reward, RewardModel) else name,
        }

    def logprobs(self, model: MiniGPT, batch: Batch) -> Tensor:
        """Return the log-probability of each reply token, (N, T - 1).

        As they are sampled: at the sampling temperature, and over the tokenizer's vocabulary only.
        """
        hidden, _ = model.hidden_states(batch["input_ids"][:, :-1], token_mask=batch["token_mask"][:, :-1])
        weight, labels = model.output_weight[: self.tokenizer.vocab_size], batch["labels"][:, 1:]
        return token_logprobs(hidden, weight, labels, self.rl.temperature)

    def by_length_groups(self, fn: Callable, batch: Batch) -> Tensor:
        """Return fn(batch), (N, 1) or (N, T - 1), computed in groups of rows of similar length."""

        def compute(parts):
            groups = length_groups(batch["last"], size=64 // parts)  # (n,) each
            rows = [row for group in groups for row in fn(select_rows(batch, group))]  # some groups are narrower
            return nn.utils.rnn.pad_sequence(rows, True)[torch.cat(groups).argsort()]  # in the order of the batch

        return self.in_memory(compute, 64)

    # -- the rollout ---------------------------------------------------------------------------------------------------

    def sample_replies(self, prompts: list[list[int]], random: torch.Generator | None) -> list[list[int]]:
        """Return the ids of a reply to each prompt, up to its first end-of-turn."""
        settings = GenerationConfig(max_new_tokens=self.config.reply_tokens, temperature=self.rl.temperature, top_p=1.0)
        generator = TextGenerator(self.model, self.tokenizer)
        with self.autocast(decoding=True):
            return self.in_memory(lambda parts: generator.continue_ids(prompts, settings, 64 // parts, random), 64)

    @torch.no_grad()
    def rollout(self, prompts: dict, random: torch.Generator | None = None) -> Rollout:
        """Let the policy reply to a batch of prompts; return the experience and what to log.

        Experience: "input_ids", "labels", "token_mask" (N, T), padded on the right; "mask" (reply tokens), "logprobs",
        "reference_logprobs", "kl" (N, T - 1); "scores", "last" (N,), the column of the last token. A reply ends with
        its first end-of-turn; one without any loses `missing_end_penalty`.
        """
        # 1 write
        start = time.monotonic()
        written = self.sample_replies(prompts["input_ids"], random)
        rollout_s = time.monotonic() - start  # generation alone, without scoring
        # 2 the tensors: as in SFT, the reply is what is trained
        rows = [
            [(torch.tensor(prompt + reply), torch.tensor([False] * len(prompt) + [True] * len(reply)))]
            for prompt, reply in zip(prompts["input_ids"], written, strict=True)
        ]
        ids, labels, _, segments = self._to_device(_pack(rows, self.tokenizer.pad_id)).values()  # (N, T)
        mask = labels[:, 1:] != -100  # (N, T - 1)
        last = segments.sum(dim=1) - 2  # a row is one sequence: its segments are 1, and 0 for padding
        batch = {"input_ids": ids, "labels": labels, "token_mask": segments > 0, "mask": mask, "last": last}
        # 3 score
        replies = list(map(self.tokenizer.decode, written))
        ended = torch.tensor([reply[-1] in self.tokenizer.stop_ids for reply in written], device=self.device)  # (N,)
        with eval_mode(self.model), self.autocast():
            logprobs = self.by_length_groups(functools.partial(self.logprobs, self.model), batch)
            reference = self.by_length_groups(functools.partial(self.logprobs, self.reference), batch)
            scores = self._score(batch, prompts, replies)
        kl = kl_estimate(logprobs, reference) * mask
        batch["logprobs"], batch["reference_logprobs"], batch["kl"] = logprobs, reference, kl  # (N, T - 1)
        batch["scores"] = scores - self.rl.missing_end_penalty * ~ended  # (N,)
        N, tokens = len(replies), int(mask.sum())
        figures = {
            "reward": (scores.sum(), N),
            "kl": (kl.sum(), N),
            "ended": (ended.sum(), N),
            "entropy": (-(logprobs * mask).sum(), tokens),
            "reply_length": (tokens, N),
            "tokens": segments.sum(),
            "rollout_s": (rollout_s, 1),
            "rollout_tok_per_s": (tokens * WORLD.size, rollout_s),
        }
        if all(prompts["answers"]):  # all of them can be checked
            figures["accuracy"] = (sum(map(answer_matches, replies, prompts["answers"])), N)
        return batch, figures

    def _score(self, batch, prompts, replies):
        """Return the score of each reply, (N,)."""
        if isinstance(self.reward, RewardModel):
            return self.by_length_groups(lambda x: self.reward(x["input_ids"], x["token_mask"])[:, None], batch)[:, 0]
        try:
            scores = list(map(self.reward, prompts["messages"], replies, prompts["answers"]))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"the reward function failed: {place_and_error(error)}") from error
        for value in scores:
            if not hasattr(value, "__float__") or not math.isfinite(value):
                raise UserError(f"the reward function gave {value!r}: it must give a finite number")
        return torch.tensor(list(map(float, scores)), device=self.device)

    @torch.no_grad()
    def experience(self, prompts: dict) -> tuple[Batch, Metrics]:
        """Return a rollout of all prompts with advantages, and what to log. Each process replies to its own prompts."""
        if (N := len(prompts["input_ids"])) < WORLD.size:
            raise UserError(f"a batch of {N} prompts cannot be divided among {WORLD.size} processes: take fewer")
        batch, figures = self.collect(WORLD.mine(prompts))
        batch, stats = self.advantages(self._gathered(batch))
        return batch, average([figures]) | stats

    def _gathered(self, batch):
        """Return the rows of all processes, padded to the longest."""
        if WORLD.size == 1:
            return batch
        parts, gathered = WORLD.gather(batch), {}
        fill = {"input_ids": self.tokenizer.pad_id, "labels": -100}
        for name, value in batch.items():
            rows = [row for part in parts for row in part[name]]
            is_wide = value.dim() > 1
            gathered[name] = nn.utils.rnn.pad_sequence(rows, True, fill.get(name, 0)) if is_wide else torch.stack(rows)
        return self._to_device(gathered)

    # -- the update ----------------------------------------------------------------------------------------------------

    def _minibatches(self, N):
        """Yield the rows of each minibatch, in an order of their own in every pass over the rollout's N rows."""
        for _ in range(self.rl.update_epochs if N else 0):
            yield from WORLD.first(lambda: torch.randperm(N)).chunk(math.ceil(N / self.rl.minibatch_size))

    def step(self, batches: list[dict]) -> dict[str, float]:
        """A rollout, and a few epochs of minibatch updates on it, fewer if the policy has moved by `stop_kl`."""
        # 1 write and score
        start = time.monotonic()
        batch, stats = self.experience(batches[0])
        # 2 update in minibatches; N is 0 where nothing can be learned from the rollout
        N, T = batch["input_ids"].shape
        results = []
        for rows in self._minibatches(N):
            groups = length_groups(batch["last"], rows, 32)  # micro-batches with little padding
            results.append(self.update([select_rows(batch, group) for group in groups]))
            # 3 stop when the policy has moved far from the one that wrote
            if results[-1]["moved"] > (self.rl.stop_kl or math.inf):
                break
        self.step_count += 1
        stats |= {
            "rollout_share": stats.pop("rollout_s") / (time.monotonic() - start),  # of the step's time
            "updates": len(results),
            "count": max(1, N),
            "flops": stats["tokens"] * self.model.flops_per_token(T),  # tokens: those of the whole rollout
        }
        results = results or [dict.fromkeys(("loss", "grad_norm", "lr", "moved"), 0.0)]
        means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        return means | stats | {"moved": results[-1]["moved"]}

    def loss(self, batch: Batch) -> tuple[Tensor, Figures]:
        """Return the subclass's loss with a named part: how far the policy has moved from the one that wrote.

        In nats per token, as `stop_kl` is.
        """
        logprobs = self.logprobs(self.model, batch)
        moved = kl_estimate(batch["logprobs"], logprobs.detach(), "k3") * batch["mask"]
        return self.policy_loss(batch, logprobs), {"moved": (moved.sum(), batch["mask"].sum())}

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def held_out(self, max_tokens: int | None) -> Iterator[dict]:
        """Yield the first `eval_prompts` prompts of val_data."""
        self.eval_random = torch.Generator(self.device).manual_seed(WORLD.seed(self.config.seed))
        left = self.config.eval_prompts  # always the same prompts, and the same random numbers
        for prompts in self.val_data:
            yield {name: value[:left] for name, value in prompts.items()}
            left -= len(prompts["answers"])
            if left <= 0:
                return

    def measure(self, batch: dict) -> Figures:
        """Return the figures of sampled replies: "reward", "kl" and "reply_length"."""
        figures = self.rollout(batch, self.eval_random)[1]
        return {name: figures[name] for name in ("reward", "kl", "reply_length")}

    def quality(self, result: dict[str, float]) -> float:
        return result.get("exact_match", result["reward"])


class PPOTrainer(RLTrainer):
    """Proximal policy optimisation with a critic (arXiv:1707.06347; details as in arXiv:2310.10505).

    Each token's reward is -kl_coef · k1; the last token also gets the score. The critic is a model of its own. It
    starts as the reward model where the reward is one, else as the policy.
    """

    stage = "ppo"

    def __init__(self, model: MiniGPT, *args, reward: Reward, **options):
        # before super().__init__, which moves and changes the models
        self.critic = RewardModel(reward if isinstance(reward, RewardModel) else model)
        super().__init__(model, *args, reward=reward, **options)
        self.train_module("critic", self.critic, self.rl.critic_rate)
        remove_dropout(self.critic)
        if 0 < self.config.max_steps <= self.rl.critic_warmup:
            self.line.say(
                f"critic_warmup={self.rl.critic_warmup}: all of max_steps={self.config.max_steps} will train "
                "only the critic, and the policy stays as it is"
            )

    def values(self, batch: Batch) -> Tensor:
        """Return the critic's estimate before each token is written, (N, T - 1)."""
        return self.critic.token_scores(batch["input_ids"][:, :-1], token_mask=batch["token_mask"][:, :-1])

    def collect(self, prompts: dict) -> Rollout:
        batch, figures = self.rollout(prompts)
        with eval_mode(self.critic), self.autocast():
            batch["values"] = self.by_length_groups(self.values, batch)
        return batch, figures

    def advantages(self, batch: Batch) -> tuple[Batch, Metrics]:
        # 1 rewards: the KL penalty at every token, the score at the last
        rewards = -self.rl.kl_coef * batch["kl"]
        rewards.scatter_add_(1, batch["last"][:, None], batch["scores"][:, None])
        # 2 advantages; the returns, the critic's targets, use them before whitening
        advantages, batch["returns"] = gae(rewards, batch["values"], batch["mask"], self.rl.gamma, self.rl.gae_lambda)
        batch["advantages"] = whiten(advantages, batch["mask"])  # 3 the policy's step does not depend on their scale
        return batch, {}

    def count(self, batch: Batch) -> int:
        return int(batch["mask"].sum())

    def policy_loss(self, batch: Batch, logprobs: Tensor) -> Tensor:
        mask = batch["mask"]
        loss = self.rl.value_coef * ppo_value_loss(
            self.values(batch), batch["values"], batch["returns"], mask, self.rl.value_clip
        )  # a mean over the reply tokens
        if self.step_count >= self.rl.critic_warmup:  # an untrained critic would mislead the policy
            loss = loss + ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"], mask, self.rl.clip_range)
        return loss * mask.sum()  # a mean over tokens -> their sum


class GRPOTrainer(RLTrainer):
    """Group-relative policy optimisation (arXiv:2402.03300): several replies a prompt, each compared with their mean.

    By default with the normalisation of Dr. GRPO (arXiv:2503.20783): no division by the group's deviation, and token
    losses summed over a reply and divided by `reply_tokens`. So neither easy prompts nor long replies weigh more.
    """

    stage = "grpo"

    def collect(self, prompts: dict) -> Rollout:
        # each prompt G times, one after another
        repeat = range(self.rl.group_size)
        return self.rollout({name: [item for item in value for _ in repeat] for name, value in prompts.items()})

    def advantages(self, batch: Batch) -> tuple[Batch, Metrics]:
        G = self.rl.group_size
        batch["advantages"] = grpo_advantages(batch["scores"], G, self.rl.advantage_kind)  # (N,)
        equal = (batch["advantages"].view(-1, G) == 0).all(dim=1).repeat_interleave(G)  # (N,)
        kept = ~equal | (self.rl.grpo_kl_coef > 0)  # groups of equal rewards have no other gradient than the KL's
        # dropped rows have loss 0: to divide by all replies, each kept row counts N / kept
        batch["row_weight"] = kept / kept.float().mean()
        return {name: value[kept] for name, value in batch.items()}, {"equal_groups": equal.float().mean().item()}

    def count(self, batch: Batch) -> float:
        return batch["row_weight"].sum().item()

    def policy_loss(self, batch: Batch, logprobs: Tensor) -> Tensor:
        mask = batch["mask"]
        divisor = mask.sum(dim=1, keepdim=True) if self.rl.advantage_kind == "grpo" else self.config.reply_tokens
        weights = mask / divisor  # (N, T - 1): Dr. GRPO divides by a constant, GRPO by the reply's length
        loss = ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"][:, None], weights, self.rl.clip_range)
        if self.rl.grpo_kl_coef:
            kl = kl_estimate(logprobs, batch["reference_logprobs"], "k3")
            loss = loss + self.rl.grpo_kl_coef * masked_mean(kl, weights)
        return loss * weights.sum()


# ======================================================================================================================
# 11 Pipeline: the table of stages; SFT, reward model and PPO in one resumable go.
# ======================================================================================================================


Sources = dict[str, Source]  # "train", "val", or both


class Stage(NamedTuple):
    """A stage of a model's life. A new one needs a row in STAGES, and defaults in RECIPES: steps, epochs or minutes."""

    trainer: type[Trainer]
    loader: type[BatchLoader]
    parent: str | None  # the stage whose run it starts from
    metrics: tuple[str, ...]  # its headline: the first of these that was measured
    epochs: float = 0.0  # over data of the user, where no limit is given; 0 is the recipe's limit


STAGES = {
    "pretrain": Stage(PreTrainer, PretrainDataLoader, None, ("bpb",)),
    "sft": Stage(SFTTrainer, ConversationDataLoader, "pretrain", ("exact_match", "bpb"), 3.0),
    "dpo": Stage(DPOTrainer, DPODataLoader, "sft", ("pair_accuracy",), 1.0),
    "reward": Stage(RewardTrainer, DPODataLoader, "sft", ("pair_accuracy",), 2.0),
    "ppo": Stage(PPOTrainer, PromptDataLoader, "sft", ("exact_match", "reward")),
    "grpo": Stage(GRPOTrainer, PromptDataLoader, "sft", ("exact_match", "reward")),
}


def changed_options(saved: dict, now: dict) -> str:
    """Return in words what differs between the options of a saved run, and where it comes from, and those of now."""
    before, after = ({**config, **config["train"], **config.get("rl", {})} for config in (saved, now))
    changes = [
        f"{name} {value} -> {after.get(name)}"
        for name, value in before.items()
        if not isinstance(value, dict) and after.get(name) not in (value, "auto")
    ]
    return ", ".join(changes)


def headline(stage: str, figures: Metrics) -> str:
    """Return the name of the figure that tells most about a stage; "loss" for one that is not in the table."""
    names = STAGES[stage].metrics if stage in STAGES else ()
    return next((name for name in names if name in figures), "loss")


# options that several recipes share
_WSD, _LONG, _ADAMW = {"schedule": "wsd", "decay_fraction": 0.7}, {"eval_tokens": 131_072}, {"optimizer": "adamw"}
_RL = _ADAMW | {"schedule": "constant", "log_every": 1}
_TINY_RL = _RL | {
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "warmup_steps": 5,
    "weight_decay": 0.0,
    "eval_prompts": 600,
    "reply_tokens": 32,
}
RECIPE_FIELDS = ("minutes", "max_steps", "batch_size", "learning_rate", "eval_every")
RECIPES = {  # the training options of a preset and a stage, where not TrainConfig's
    # minutes, steps, batch, learning rate, steps between evaluations (and checkpoints), and what else is special
    "tiny": {
        "pretrain": (3, 0, 8, 1e-2, 250, _WSD | {"decay_fraction": 0.6}),
        "sft": (4, 1200, 4, 4e-3, 300, _WSD | {"eval_prompts": 500}),
        "dpo": (4, 800, 16, 2e-3, 200, _WSD),
        "reward": (5, 1800, 16, 2e-3, 300, _WSD),
        "ppo": (6, 30, 256, 3e-4, 10, _TINY_RL),
        "grpo": (6, 50, 32, 3e-4, 10, _TINY_RL),
    },
    "small": {
        "pretrain": (0, 10_000, 32, 2e-3, 500, _LONG | {"warmup_steps": 200}),
        "sft": (0, 3000, 32, 5e-4, 500, _LONG | {"warmup_steps": 100}),
        "dpo": (0, 1000, 32, 1e-5, 500, _LONG | _ADAMW),
        "reward": (0, 1000, 32, 1e-4, 500, _LONG | _ADAMW),
        "ppo": (0, 300, 64, 1e-5, 25, _LONG | _RL),
        "grpo": (0, 300, 16, 1e-5, 25, _LONG | _RL),
    },
}
PRETRAINING_STEPS = {"medium": 20_000, "large": 50_000}  # otherwise the larger presets are trained like small


def get_train_config(preset: str = "tiny", stage: str = "pretrain") -> TrainConfig:
    """Return the training defaults of a preset and a stage."""
    get_config(preset)  # checks its name
    if stage not in STAGES:
        raise UserError(f"stage {stage!r} has no training defaults: choose from {', '.join(STAGES)}")
    *values, more = RECIPES.get(preset, RECIPES["small"]).get(stage, ({},))
    config = TrainConfig(**dict(zip(RECIPE_FIELDS, values, strict=False)) | more)
    config.save_every = config.eval_every
    if stage == "pretrain":
        config.max_steps = PRETRAINING_STEPS.get(preset, config.max_steps)
    return config


def get_imported_config(stage: str, model: MiniGPT, lora: bool = False) -> TrainConfig:
    """Return the defaults for a model that was trained elsewhere: AdamW at a rate for its size, few tokens at once.

    5e-5 for 135 M parameters; LoRA takes ten times that, learning from preferences and rewards a tenth.
    """
    scale = (10 if lora else 1) * (0.1 if stage in ("dpo", "ppo", "grpo") else 1)
    config = dataclasses.replace(
        get_train_config("small", stage),
        learning_rate=scale * 0.6 / model.num_params() ** 0.5,
        optimizer="adamw",
        batch_size=8,
        eval_tokens=20_000,
        eval_every=100,
        save_every=100,
    )
    if STAGES[stage].loader is not PromptDataLoader:
        config.max_steps, config.epochs = 0, STAGES[stage].epochs or 1.0
    return config


def get_rlhf_config(preset: str = "tiny") -> RLHFConfig:
    """Return the defaults of a preset.

    A tiny model forgets right answers under plain DPO, so it also keeps learning them. It makes one update on each
    rollout: then the policy that learns is the one that wrote.
    """
    get_config(preset)
    tiny = {"dpo_sft_coef": 1.0, "minibatch_size": 256, "update_epochs": 1, "critic_warmup": 3}
    return RLHFConfig(**tiny if preset == "tiny" else {})


def make_loaders(
    stage: str, tokenizer: BPETokenizer, shape: MiniGPTConfig, config: TrainConfig, sources: Sources, cache_dir: AnyPath
) -> dict[str, BatchLoader]:
    """Return "train_data" and "val_data" of a stage, from the `sources` "train" and "val". The first is shuffled."""
    loader, seq_len = STAGES[stage].loader, config.seq_len or shape.max_position_embeddings
    options = {"seed": config.seed, "cache_dir": cache_dir, "on_bad_record": config.on_bad_record}
    if loader is PromptDataLoader:  # what a prompt leaves is for the reply
        seq_len -= config.reply_tokens
    if loader is ConversationDataLoader:
        options["packing"] = config.packing
    return {
        f"{part}_data": loader(
            source.paths, tokenizer, config.batch_size, seq_len, source.split, shuffle=part == "train", **options
        )
        for part, source in sources.items()
    }


def make_trainer(
    stage: str,
    model: MiniGPT,
    tokenizer: BPETokenizer,
    sources: Sources,
    config: TrainConfig,
    rl: RLHFConfig | None = None,
    *,
    reward: Reward | None = None,
    cache_dir: AnyPath = "out/cache",
    **options,
) -> Trainer:
    """Return the trainer of a stage, with loaders of `sources`: "train", "val", or both.

    `reward` is what PPO and GRPO maximise. `options` are the trainer's, like the `reference` of theirs and of DPO.
    """
    if isinstance(model, RewardModel) and stage != "reward":
        raise UserError(f"a reward model cannot be the beginning of stage {stage}: it scores and does not write")
    check_stage(stage, config, model.config)
    # 1 data
    torch.manual_seed(config.seed)  # for LoRA's factors and dropout
    loaders = make_loaders(stage, tokenizer, model.config, config, sources, cache_dir)
    # 2 only reinforcement learning takes a reward
    cls = STAGES[stage].trainer
    if issubclass(cls, RLTrainer):
        options["reward"] = reward
        for loader in loaders.values() if reward is answer_reward else ():
            if without := sum(not loader.note(i)["answer"] for i in loader.items):
                raise UserError(
                    f'{", ".join(loader.source.paths)}: --reward answer needs prompts with an "answer" (or '
                    f'"gt"): {without} of {len(loader.items)} have none'
                )
    # 3 a reward model begins as the language model with a head
    if stage == "reward" and not isinstance(model, RewardModel):
        model = RewardModel(model)
    return cls(model, tokenizer, config=config, rl_config=rl, **loaders, **options)


class RLHFPipeline:
    """SFT -> reward model -> PPO (arXiv:2203.02155), each in its own run directory under `out`, from a pretrained run.

    config: for the reward model and PPO. base: the pretrained run. sources: "train" and "val". train: the TrainConfig
    of a stage, where it is not the preset's. `run` goes on where it stopped, after the finished stages.
    """

    stages = ("sft", "reward", "ppo")

    def __init__(
        self,
        config: RLHFConfig,
        base: AnyPath = "out/tiny/pretrain",
        out: AnyPath = "out/tiny",
        sources: Sources | None = None,
        train: dict[str, TrainConfig] | None = None,
        *,
        device: Device = "cpu",
        cache_dir: AnyPath = "out/cache",
    ):
        self.config, self.base, self.out = config, Path(base), Path(out)
        self.sources = sources or {part: Source([f"data/{part}"], "all") for part in ("train", "val")}
        self.train = {stage: get_train_config("tiny", stage) for stage in self.stages} | (train or {})
        self.device, self.cache_dir = pick_device(str(device)), cache_dir

    def run(self) -> list[dict]:
        """Train what is not finished yet; return a row for each stage that is finished.

        A row: "stage", "seconds", "metric" (its name), "before", "after", "reply" (to the same held-out prompt). If the
        run was interrupted, the last row is {"signal": number}.
        """
        self.check()
        # a Hugging Face directory has no metrics
        rows = [self.row("pretrain", self.base)] if (self.base / "metrics.jsonl").exists() else []
        for stage in self.stages:
            run_dir = self.out / stage
            if self.is_finished(run_dir):
                print(f"{stage}: finished already, in {run_dir}{self.changes(stage)}", flush=True)
            else:
                print(f"\n== {stage}: {run_dir}{self.changes(stage)}", flush=True)
                result = self.trainer(stage).fit()  # from the beginning, or where it stopped
                if "signal" in result:
                    return [*rows, result]
            rows.append(self.row(stage, run_dir))
        return rows

    def check(self) -> None:
        """Read all data, and check what each stage needs, so that mistakes show before anything is trained."""
        model, tokenizer, _ = load_run(self.base)
        for stage in self.stages:
            check_stage(stage, self.train[stage], model.config)
            sources = self.sources_of(stage)
            loaders = make_loaders(stage, tokenizer, model.config, self.train[stage], sources, self.cache_dir)
        *_, prompts = loaders.values()  # PPO's, held out
        self.messages = prompts.note(prompts.items[0])["messages"]
        self.prompt = last_content(self.messages)

    def sources_of(self, stage: str) -> Sources:
        """Return the sources without the files that have nothing for this stage, but something for another."""
        sources = {}
        for part, source in self.sources.items():
            for kind in (STAGES[stage].loader.kind, "chat"):  # conversations have prompts, too
                if paths := [str(path) for path in path_list(source.paths) if kind in kinds_of(path)]:
                    sources[part] = Source(paths, source.split)
                    break
        return sources

    def origin(self, stage: str) -> dict[str, str]:
        """Return where a stage starts from, as config.json says it."""
        parent = self.base if stage == "sft" else self.out / "sft"
        reward = {"reward": str((self.out / "reward").absolute())} if stage == "ppo" else {}
        imported = run_config(self.base).get("imported")
        return {"parent": str(parent.absolute()), **reward, "checkpoint": "best", "imported": imported}

    def trainer(self, stage: str) -> Trainer:
        """Return the trainer of a stage, where it stopped if it has begun."""
        origin, run_dir, config = self.origin(stage), self.out / stage, self.train[stage]
        if holds_run(run_dir) and config.dtype == "auto":  # a resumed run keeps what was chosen
            config = dataclasses.replace(config, dtype=run_config(run_dir)["train"]["dtype"])
        model, tokenizer, _ = load_run(origin["parent"])
        trainer = make_trainer(
            stage,
            model,
            tokenizer,
            self.sources_of(stage),
            config,
            self.config,
            reward=load_run(origin["reward"])[0] if "reward" in origin else None,
            run_dir=run_dir,
            device=self.device,
            cache_dir=self.cache_dir,
        )
        trainer.origin = origin
        if holds_run(run_dir):
            trainer.load_checkpoint(run_dir / "checkpoint.pt")
        return trainer

    def changes(self, stage: str) -> str:
        """Return what has changed since a stage began, so that a finished one shows the options it lacks."""
        if not holds_run(self.out / stage):
            return ""
        now = {"stage": stage, "train": vars(self.train[stage]), "rl": vars(self.config), **self.origin(stage)}
        changed = changed_options(run_config(self.out / stage), now)
        return f"; changed since it began: {changed}" if changed else ""

    @staticmethod
    def is_finished(run_dir: Path) -> bool:
        return holds_run(run_dir) and load_checkpoint(run_dir / "checkpoint.pt").get("finished", True)

    def row(self, stage: str, run_dir: Path) -> dict:
        """Return a finished stage's row of the table, of its best evaluation."""
        model, tokenizer, state = load_run(run_dir, self.device)
        rows = read_metrics(run_dir)
        # 1 its headline, before the first step and after that of the weights
        evaluations = {row["step"]: row for row in rows if any(name.startswith("val_") for name in row)}
        before, after = (evaluations.get(step, {}) for step in (0, state["step"]))
        metric = headline(stage, {name.removeprefix("val_") for name in after})
        # 2 its reply to the prompt of all rows
        settings = GenerationConfig(max_new_tokens=self.train["ppo"].reply_tokens, do_sample=False)
        reply = "" if stage == "reward" else TextGenerator(model, tokenizer).chat(self.messages, settings)
        return {
            "stage": stage,
            "seconds": rows[-1]["elapsed_s"],
            "metric": metric.replace("_", " "),
            "reply": reply,
            "before": before.get(f"val_{metric}"),
            "after": after.get(f"val_{metric}"),
        }


# ======================================================================================================================
# 12 Edges: files, forms of records, CPU kernels, long contexts, Hugging Face, GGUF, foreign tokenizers, flags.
# ======================================================================================================================

# -- data files, and files that appear whole or not at all -------------------------------------------------------------

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".txt.gz", ".json.gz", ".jsonl.gz")  # data files, in any case
LONGEST_RECORD = 1 << 26  # characters of a line of JSON; a longer line is a mistake, not a record


def path_list(paths: Paths) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, AnyPath) else paths)]


def files_under(folder: Path, above: tuple = ()) -> Iterator[Path]:
    """Yield all files below a folder. Hidden ones are passed over; links are followed, unless they form a cycle."""
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):  # the order does not depend on the machine
        if not path.name.startswith(".") and path.resolve() not in above:
            yield from files_under(path, above) if path.is_dir() else [path]


def data_files(paths: Paths) -> list[Path]:
    """Return the data files that `paths` name, each once: a file as it is, of a directory those with a known suffix."""
    files = {}
    for path in path_list(paths):
        inside = list(files_under(path)) if path.is_dir() else [path]
        data = {f.resolve(): f for f in inside if f.is_file() and data_suffix(f)}
        if not data:
            problem = "no data file" if path.exists() else "no such file or directory"
            raise UserError(f"{path}: {problem}: data are {', '.join(SUFFIXES)} files, or directories with some")
        if others := [f for f in inside if f.resolve() not in data]:
            warnings.warn(
                f"{path}: passed over {len(others)} files that are not {', '.join(SUFFIXES)}, such as {others[0]}",
                stacklevel=2,
            )
        if again := [f for f in data if f in files]:
            warnings.warn(f"{path}: {len(again)} files are named already, and count once: {again[0]}", stacklevel=2)
        files |= data
    return list(files.values())


def data_suffix(path: Path) -> str:
    """Return the suffix that says how a file is read, in lower case and without .gz; "" if it is no data file."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return suffix.removesuffix(".gz")


def hash_file(path: AnyPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache  # the file is read once
def code_hash() -> str:
    """Return the hash of this source file. It is part of the caches' keys: after an edit, data are encoded anew."""
    return hash_file(__file__)[:24]


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[typing.TextIO]:
    """Open UTF-8 text, .gz or not, without BOM and with \\n line ends; a UserError names the line that is not UTF-8."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        # Read again as bytes, up to the line that changes when what cannot be decoded is left out.
        with opener(path, "rb") as file:
            line = next(n for n, line in enumerate(file, 1) if line.decode("utf-8", "ignore").encode() != line)
        raise UserError(
            f"{path}:{line}: not UTF-8 ({error.reason}): convert the file, for example with iconv"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged .gz file ({error})") from error


def read_text(path: Path, chunk_chars: int = 1 << 20) -> Iterator[str]:
    """Yield a text file in parts of about `chunk_chars` characters that end where a word of the tokenizer ends."""
    rest = ""
    with open_text(path) as file:
        while chunk := file.read(chunk_chars):
            rest += chunk  # what has not been given out yet
            # Millions of characters without a blank are cut anywhere: memory matters more than one word.
            anywhere = len(rest) if len(rest) >= 4 * chunk_chars else 0
            cut = max((match.start() for match in SAFE_CUT.finditer(rest, len(rest) - 1000)), default=anywhere)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:  # the end of the file
        yield rest


def json_values(text: str) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every JSON value in a text, lines from 0; ValueError for what is none.

    >>> list(json_values('{"a": 1}\\n[2,\\n3] 4'))
    [(0, {'a': 1}), (1, [2, 3]), (2, 4)]
    """
    line, start, end, decode = 0, 0, 0, json.JSONDecoder().raw_decode
    while match := re.compile(r"\S").search(text, end):
        line += text.count("\n", start, match.start())
        start = match.start()
        value, end = decode(text, start)
        yield line, value


def temporary_beside(path: Path) -> Path:
    """Return a name beside `path`, so that renaming is atomic; random, as containers have processes of equal ids."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


@contextlib.contextmanager
def atomic_write(path: AnyPath) -> Iterator[typing.BinaryIO]:
    """Open a file for writing bytes; it appears under `path` complete and on the disk, or not at all."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk: say which file it concerns
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is on the disk only once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def write_file(path: AnyPath, text: str):
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: AnyPath) -> dict:
    """Return the JSON object in a file."""
    try:
        data = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it comes with every run and every model of Hugging Face") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):  # a list, say
        raise UserError(f"{path}: a JSON object is expected, not {type(data).__name__}")
    return data


def parallel_map(fn: Callable, items: Iterable) -> Iterator:
    """`map(fn, items)` over the machine's cores, in order, with few items in flight: memory stays flat.

    Children are forked: they inherit `fn` and never import the caller's `__main__` again. Where there is no fork
    (Windows, a daemonic process), with one core, or for fewer than four items, everything runs in this process.
    """
    items = iter(items)
    # Look at a few items first: starting processes costs more than so little work.
    first = list(itertools.islice(items, 4))
    items = itertools.chain(first, items)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(first) < 4 or workers < 2 or not hasattr(os, "fork") or current_process().daemon:
        yield from map(fn, items)
        return
    try:
        start = workers, get_context("fork"), _start_child, (fn, os.getpid())
        # Fork beside torch's idle threads, of which children use none, is warned of.
        quiet = warnings.catch_warnings(action="ignore", category=DeprecationWarning)
        with quiet, ProcessPoolExecutor(*start) as pool:
            try:
                for wave in batched(items, limit=8 * workers):  # so many are in flight
                    yield from pool.map(_run_child, wave)
            except BrokenProcessPool:
                if sys.version_info < (3, 11, 5):  # it would wait for ever for a pipe that nobody reads any more
                    pool._call_queue._reader.close()
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encodes the data was killed, perhaps because memory ran out: start again"
        ) from error


def _start_child(fn, parent):
    global _child_function  # set in a forked child; a closure could not be sent through the pool's queue
    _child_function = fn
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent

    def end_with_parent():  # even if that was killed
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_child(item):
    return _child_function(item)


# -- records in the forms that people have -----------------------------------------------------------------------------

MORE_KEYS = ("input", "context")  # what a question refers to: it becomes part of the user's text
# Further keys of records and of messages. Others cause a warning that names them; those in NO_TEXT are an error.
RECORD_KEYS = ("system", "system_prompt", "history", "tools", "answer", "gt", "category")
SWITCHES = ("trained", "train", "loss", "weight")  # keys of a message: 0 or false if it is not learned from
MESSAGE_KEYS = ("role", "from", "content", "value", "reasoning_content", "tools", "tool_calls", *SWITCHES)
NO_TEXT = ("image", "images", "audio", "audios", "video", "videos", "function_call", "functions")
# How speakers are spelled, and the template's name for each.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "developer": "system",
}
# Qwen's system prompt for tools; each is one line of JSON.
TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def as_messages(value: object, role: str, remarks: list[str]) -> Messages:
    """Return a text said by `role`, a message, or a list of them, as [{"role", "content"}, …].

    A message is {role, content} or {from, value}. Two of a user or an assistant in a row are joined by a blank line.
    That is noted in `remarks`, as are keys that are not read. Raises ValueError for anything else.
    """
    messages = []
    for item in value if isinstance(value, list) else [value]:
        item = {"role": role, "content": item} if isinstance(item, str) else item
        try:
            message = {"role": ROLES[item.get("role", item.get("from"))], "content": _content(item)}
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"a message must be an object with a role (or from), one of {', '.join(ROLES)}, and a content (or "
                "value) of type string or of parts with a text; tools and tool_calls are objects with a name and "
                f"arguments: found {str(item)[:200]}"
            ) from error
        remarks += [f"unknown key {key!r} of a message" for key in _unknown_keys(item, MESSAGE_KEYS)]
        for key in SWITCHES:
            if item.get(key) not in (None, 0, 1):
                raise ValueError(f'"{key}" of a message must be 0 (false) or 1 (true), not {item[key]!r}')
            if item.get(key) == 0:
                message["trained"] = False
        speaker = message["role"]
        if messages and messages[-1]["role"] == speaker != "tool":  # several tools may answer one message
            before = messages.pop()
            message = before | message | {"content": f"{before['content']}\n\n{message['content']}"}
            if speaker != "system":
                remarks.append(f"two {speaker} messages in a row, joined")
        if messages and speaker == "system":
            raise ValueError("a system message may only come first")
        messages.append(message)
    return messages


def _unknown_keys(item, known):
    """Return the keys that are not read; raises ValueError for one that means more than text."""
    unknown = [key for key, value in item.items() if key not in known and value not in (None, "", [], {})]
    for key in unknown:
        if key in NO_TEXT:
            raise ValueError(f'"{key}" is not supported: a model reads and writes text only')
    return unknown


def _content(message):
    """Return the content of a message with its thoughts, tool calls and tools, spelled as in Qwen's templates."""
    content, thought = message.get("content", message.get("value")), message.get("reasoning_content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls, tools = (_parsed(message.get(key) or []) for key in ("tool_calls", "tools"))
    blocks = [content] if content or not (calls or tools) else []
    for call in calls:
        call = call.get("function", call)
        call = {"name": call["name"], "arguments": _parsed(call["arguments"])}
        blocks.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
    if tools:
        lines = "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools)
        blocks.append("\n" * bool(content) + TOOLS_PROMPT.format(lines))
    return f"<think>\n{thought}\n</think>\n\n" * bool(thought) + "\n".join(blocks)


def _parsed(value):
    return json.loads(value) if isinstance(value, str) else value  # some write JSON into texts


def read_example(kind, where, record, form, remarks):
    """Return a record as an Example of a kind; raises ValueError for what is wrong with it."""
    key = form.first
    if kind == "preference":  # its question is under a key of any chat
        key = next((other.first for other in FORMS if other.kind == "chat" and record.get(other.first)), "")
    asked = dict.fromkeys((key, *MORE_KEYS)) if key else {}
    unknown = _unknown_keys(record, (*RECORD_KEYS, *form[1:], *asked))
    remarks += [f"unknown key {key!r}" for key in unknown]
    question = _question(record, asked)
    if kind == "preference":
        prompt, conversations = _preference_messages(record, question, remarks)
        if not any(message["role"] == "user" for message in conversations[0]):
            for key in unknown:
                if isinstance(record[key], (str, list)) and key != "id":
                    raise ValueError(
                        f'"{key}" may be the question, but is not read: put it into "prompt", or remove it'
                    )
    else:
        prompt, conversations = _chat_messages(record, form, kind, question, remarks)
    category = record.get("category")
    note = {
        "messages": prompt,
        "answer": "\n".join(_answers(record)) if kind != "preference" else "",
        "category": "" if category is None else str(category),
    }
    return Example("train", conversations, 0 if kind == "chat" else len(prompt), note, where)


def _question(record, keys):
    """Return what the user says under the first of these keys, with the texts under the others that it refers to."""
    question, *more = [record.get(key) for key in keys] or [[]]
    if not any(more):
        return question
    try:
        return "\n".join(filter(None, [question, *more]))
    except TypeError:
        raise ValueError(f"{', '.join(keys)} must be strings") from None


def _whole(record, messages, remarks):
    """Put the record's system prompt, tools and history before its messages."""
    systems = [record[key] for key in ("system", "system_prompt") if record.get(key)]
    before = as_messages(systems, "system", remarks)
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError('"history" must be a list of pairs [question, answer]')
        before += as_messages(pair[0], "user", remarks) + as_messages(pair[1], "assistant", remarks)
    messages = before + messages
    if tools := record.get("tools"):  # they follow the system prompt
        place = sum(message["role"] == "system" for message in messages)
        messages.insert(place, {"role": "system", "content": "", "tools": tools})
    return as_messages(messages, "", remarks)


def _chat_messages(record, form, kind, question, remarks):
    """Return (prompt, conversations) of a chat or prompt record: what comes before the last reply, and the whole."""
    messages = as_messages(question, "user", remarks)
    if form.second:  # an answer may be a number, or one of several
        reply = _answers(record)[:1] if form.second == "answer" else record[form.second]
        messages += as_messages(reply, "assistant", remarks)
    messages = _whole(record, messages, remarks)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if form.kind == "chat" and not replies:
        raise ValueError("a conversation without an assistant message holds nothing to train on")
    if kind == "prompt":
        prompt = messages[: replies[-1]] if form.kind == "chat" else messages
        if not prompt or prompt[-1]["role"] == "assistant":
            raise ValueError("a prompt must end with a message to reply to")
        return prompt, [prompt]
    for i in replies:
        if not messages[i]["content"].strip():  # it would teach to end at once
            messages[i]["trained"] = False
            remarks.append("empty reply, not trained")
    trained = [i for i in replies if messages[i].get("trained", True)]
    if not trained or any(record.get(key) is False for key in ("label", *SWITCHES)):  # "label" is KTO's mark
        raise LeftOut("no reply to learn from: empty, or marked as bad")
    return messages[: trained[-1]], [messages[: trained[-1] + 1]]


def _preference_messages(record, question, remarks):
    """Return (prompt, conversations) of a pair: the chosen and the rejected one begin with the prompt."""
    sides = [record["chosen"], record["rejected"]]
    # 1. Texts may repeat the prompt, or be whole transcripts, as Anthropic's are.
    if all(isinstance(side, str) for side in sides):
        if isinstance(question, str) and all(side.startswith(question) and side != question for side in sides):
            sides = [side.removeprefix(question) for side in sides]
        elif not question and all(re.match(r"\s*Human: ", side) for side in sides):
            sides = map(_transcript_messages, sides)
    prompt = as_messages(question, "user", remarks)
    chosen, rejected = (as_messages(side, "assistant", remarks) for side in sides)
    # 2. Messages that both sides begin with belong to the prompt, or are its repetition.
    shared = []
    while chosen and rejected and chosen[0] == rejected[0]:
        shared.append(chosen.pop(0))
        rejected.pop(0)
    prompt = _whole(record, shared if shared[: len(prompt)] == prompt else prompt + shared, remarks)
    # 3. What is left is compared, so each side needs a reply of its own.
    completions = {"chosen": chosen, "rejected": rejected}
    said = [[message["content"].split() for message in side] for side in completions.values()]
    if said[0] == said[1]:
        raise LeftOut("both sides alike")
    for name, side in completions.items():
        if not side or side[-1]["role"] != "assistant" or prompt and side[0]["role"] in ("system", prompt[-1]["role"]):
            raise ValueError(
                f'"{name}" must end with a reply of the assistant that the other side does not share, and go on where '
                "the prompt ends"
            )
        if not side[-1]["content"].strip() or not side[-1].get("trained", True):
            raise LeftOut("no reply to learn from: empty, or marked as bad")
    return prompt, [prompt + side for side in completions.values()]


def _transcript_messages(text):
    # A turn lasts up to the blank line before the next speaker.
    turns = re.findall(r"(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", text, re.S)
    return [{"role": speaker.lower(), "content": content.strip()} for speaker, content in turns]


def _answers(record):
    """Return the record's "answer" or "gt" as a list of texts, each of which is right; empty without one."""
    answer = record.get("answer", record.get("gt"))
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if not all(type(one) in (str, int, float) for one in answers):  # a bool is an int, but no answer
        raise ValueError(f'"answer" must be a text, a number or a list of them, not {str(answer)[:80]}')
    return list(map(str, answers))


# -- the same arithmetic, several times faster: kernels for CPUs and MPS, CUDA graphs ----------------------------------


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm by the kernels of layer norm; torch's own gradient of F.rms_norm takes eight times as long on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Layer norm is RMSNorm of x - mean(x). With a mean of 0 its kernel gives RMSNorm's gradient less the mean of
        # grad · weight · scale, which comes through the mean that RMSNorm does not have. So add that back.
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        through_mean = (grad @ weight).unsqueeze(-1).mul(scale).div_(len(weight))
        return d_x.add_(through_mean), d_weight, None


def linear_of_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return the same as F.linear for the few rows of decoding.

    For one row MKL's product reaches a quarter of the memory's speed, its batched product nearly all of it; for 64 rows
    that still saves a third. So the weight becomes a batch of two halves, (2, n / 2, width).
    """
    n, width = weight.shape
    if n % 2 or x.dtype != weight.dtype:
        return F.linear(x, weight)
    columns = x.reshape(-1, width).T.expand(2, -1, -1)  # (2, width, rows)
    product = torch.bmm(weight.view(2, -1, width), columns).flatten(0, 1)  # (n, rows)
    return product.T.reshape(*x.shape[:-1], n).contiguous()


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same as `attend`, with all scores (B K, H/K T, S) in memory at once.

    In bfloat16 on a CPU two products are faster than the fused kernel, as long as the scores are small. On MPS several
    versions of torch have fused kernels that are wrong.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if bias is None:
        bias = attention_bias(visible_keys(torch.arange(S - T, S, device=q.device), S, None), q.dtype)
    with torch.autocast(q.device.type, enabled=False):  # which would compute the softmax in float32
        scores = q.new_empty(B * K, H // K * T, S)  # no view: autograd would copy it in backward
        scores.view(B, K, H // K, T, S).copy_(bias.view(-1, 1, 1, T, S))
        q, k, v = (x.to(q.dtype).reshape(B * K, -1, D) for x in (q, k, v))
        scores = scores.baddbmm_(q, k.mT, alpha=D**-0.5)
        return torch.bmm(scores.softmax(dim=-1), v).view(B, H, T, D)


_recording_stream = functools.cache(torch.cuda.Stream)  # one for each device: each keeps memory for its products


def record_graph(fn: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record what `fn` starts on a GPU as a CUDA graph; return what starts all of it again and returns the same tensor.

    Hundreds of kernels then start with one call: to start them one by one takes longer than to run them.
    """
    dtype, is_enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    # weights that autocast has cast may be gone when the graph runs again: it casts them itself
    with torch.cuda.device(device), torch.autocast("cuda", dtype, is_enabled, cache_enabled=False):
        graph, stream, mode = torch.cuda.CUDAGraph(), _recording_stream(device), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                fn()  # libraries prepare themselves at a first call, which cannot be recorded
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a mode that may overlook something
                    torch.cuda.set_sync_debug_mode("error")  # now it is an error to wait for the GPU
                fn()
                torch.cuda.set_sync_debug_mode(mode)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    result = fn()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise UserError(
                "decoding cannot be recorded as a CUDA graph, since the model or its sampling reads numbers from the "
                "GPU (.item, .tolist, if): set model.has_fixed_shapes = False"
            ) from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)

    def repeat():
        graph.replay()
        return result

    return repeat


# -- RoPE for longer contexts than trained -----------------------------------------------------------------------------


def slower_rotations(inv_freq: Tensor, config: MiniGPTConfig) -> tuple[Tensor, float]:
    """Return inv_freq (D / 2,) slowed as `rope_scaling` says, and a factor for cosines and sines.

    Linear slows all rotations by `factor`. YaRN (arXiv:2309.00071) and Llama 3 slow those that turn seldom within the
    original context, with a blend between.
    """
    scaling, D = config.rope_scaling, config.head_dim
    original = scaling.get("original_max_position_embeddings", 1)
    attention_factor, slow = 1.0, 1.0  # slow: share (D / 2,) of each rotation that is slowed
    if scaling["rope_type"] == "llama3":
        turns = original * inv_freq / (2 * math.pi)  # of each rotation within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        slow = 1 - ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling["rope_type"] == "yarn":
        # the dimensions that turn beta_fast and beta_slow times within the original context: a line from 0 to 1 between
        turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        low, high = (D * math.log(original / (n * 2 * math.pi)) / (2 * math.log(config.rope_theta)) for n in turns)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        slow = ((torch.arange(D // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        attention_factor = scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1.0)
    return inv_freq / scaling["factor"] * slow + inv_freq * (1 - slow), attention_factor


# -- Hugging Face directories ------------------------------------------------------------------------------------------

# Fields of a config.json, and what transformers takes for those left out; None: no default.
HF_SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size num_key_value_heads head_dim"
HF_LLAMA = dict.fromkeys(HF_SIZES.split()) | {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
HF_QWEN3 = HF_LLAMA | {"head_dim": 128, "max_position_embeddings": 32768}
HF_QWEN3_MOE = HF_QWEN3 | {
    "head_dim": None,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
HF_KINDS = {"llama": ("Llama", HF_LLAMA), "qwen3": ("Qwen3", HF_QWEN3), "qwen3_moe": ("Qwen3Moe", HF_QWEN3_MOE)}
HF_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def import_extra(module: str, extra: str) -> typing.Any:
    """Import an optional package; a UserError names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {module.split('.')[0]}: pip install -e '.[{extra}]'") from None


def read_hf_config(folder: AnyPath) -> MiniGPTConfig:
    """Return the shape that a Hugging Face config.json describes."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no Hugging Face directory: it has no config.json")
    data = read_json(path)
    kind = data.get("model_type")
    if kind not in HF_KINDS:
        raise UserError(f"{path}: model_type={kind!r} is not supported: it must be llama, qwen3 or qwen3_moe")
    # what would change the arithmetic is refused; null means the default
    for field, value in HF_FIXED.items():
        if data.get(field, value) not in (value, None):
            raise UserError(f"{path}: {field}={data[field]!r} is not supported: it must be {value!r}")
    if "num_local_experts" in data:  # another name of it
        data.setdefault("num_experts", data["num_local_experts"])
    fields = {field: data.get(field, value) for field, value in HF_KINDS[kind][1].items()}
    # the first of several EOS; it stands in for a BOS or padding that is missing
    eos = data.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    data["eos_token_id"] = eos = next((i for i in ends if i is not None), MiniGPTConfig.eos_token_id)
    ids = {name: eos if data.get(name) in (None, -1) else data[name] for name in TOKEN_IDS}
    try:
        config = MiniGPTConfig(**fields, **ids, **read_hf_rope(data, fields), qk_norm=kind != "llama")
        check_fields(config, {"[0, 16777216)": " ".join(HF_LLAMA)})  # a damaged file must not fill the memory
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def read_hf_rope(data: dict, fields: dict) -> dict:
    """Return rope_theta and rope_scaling of a config.json, in the spelling of transformers 5 or an earlier one."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters={rope!r} is not possible: it must be an object with a rope_type")
    rope = {name: value for name, value in rope.items() if value is not None}
    # here, rope_theta is a field of its own; where a file leaves out the original context, it is the whole one
    theta = rope.pop("rope_theta", data.get("rope_theta", 10000.0))
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind in ("yarn", "llama3"):
        original = data.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}


def hf_kind(config: MiniGPTConfig) -> str:
    """Return the model_type of the architecture that a model has, but for shared experts."""
    check(config, config.qk_norm or not config.num_experts, "qk_norm", "True to export a mixture of experts")
    return "qwen3_moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"


def hf_config(config: MiniGPTConfig, dtype: str = "float32") -> dict:
    """Return the config.json with which transformers builds the same model; a UserError names what it cannot have."""
    check(config, not config.num_shared_experts, "num_shared_experts", "0 for transformers: a Qwen3-MoE has none")
    kind = hf_kind(config)
    name, fields = HF_KINDS[kind]
    return {
        "architectures": [name + "ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": dtype,
        **{field: getattr(config, field) for field in (*fields, "rope_theta", "rope_scaling", *TOKEN_IDS)},
    }


GGUF_NAMES = {  # of our weights, there; "*" is a layer's number. A matrix of several is several there
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.*.input_layernorm": "blk.*.attn_norm",
    "layers.*.self_attn.qkv_proj": "blk.*.attn_q blk.*.attn_k blk.*.attn_v",
    "layers.*.self_attn.q_norm": "blk.*.attn_q_norm",
    "layers.*.self_attn.k_norm": "blk.*.attn_k_norm",
    "layers.*.self_attn.o_proj": "blk.*.attn_output",
    "layers.*.post_attention_layernorm": "blk.*.ffn_norm",
    "layers.*.mlp.gate": "blk.*.ffn_gate_inp",
    "layers.*.mlp.gate_up_proj": "blk.*.ffn_gate blk.*.ffn_up",
    "layers.*.mlp.down_proj": "blk.*.ffn_down",
    "layers.*.mlp.shared.gate_up_proj": "blk.*.ffn_gate_shexp blk.*.ffn_up_shexp",
    "layers.*.mlp.shared.down_proj": "blk.*.ffn_down_shexp",
}
HF_NAMES = {name: name for name in GGUF_NAMES} | {  # after "model."
    "layers.*.self_attn.qkv_proj": "layers.*.self_attn.q_proj layers.*.self_attn.k_proj layers.*.self_attn.v_proj",
    "layers.*.mlp.gate_up_proj": "layers.*.mlp.gate_proj layers.*.mlp.up_proj",
}


def exported_weights(model: MiniGPT, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as views, under `names`.

    A parameter that no table knows raises a UserError: other programs would ignore it, or take it for another.
    """
    c = model.config
    heads = [n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)]
    absent = ["lm_head"] * c.tie_word_embeddings + ["layers.*.mlp.gate"] * (not c.num_experts)
    for name, p in model.named_parameters():
        layer = re.search(r"\d+|$", name)[0]
        part = name.replace(f"layers.{layer}.", "layers.*.").removesuffix(".weight")
        if part not in names or part in absent:
            raise UserError(
                f"the parameter {name} cannot be exported: no supported architecture has it, as none has the head of "
                "a reward model"
            )
        parts, matrix = names[part].split(), p.detach()
        # q, k, v: (H D, C), (K D, C) twice; gate and up: (F, C), or (E, F, C) of experts
        matrices = matrix.split(heads) if len(parts) == 3 else matrix.chunk(len(parts), dim=-min(2, p.dim()))
        for there, matrix in zip(parts, matrices, strict=True):
            yield there.replace("*", layer), matrix


def hf_tensors(model: MiniGPT) -> Batch:
    """Return the model's weights as views, under Hugging Face's names: import fills them, export writes them."""
    tensors = {}
    for name, matrix in exported_weights(model, HF_NAMES):
        path = "lm_head.weight" if name == "lm_head" else f"model.{name}.weight"
        experts = enumerate(matrix) if matrix.dim() == 3 else ()  # (E, rows, columns): there, each has its own
        tensors |= {path.replace("mlp.", f"mlp.experts.{e}."): expert for e, expert in experts} or {path: matrix}
    return tensors


@torch.no_grad()
def read_hf_model(folder: Path, model: MiniGPT) -> MiniGPT:
    """Fill the model from all safetensors in `folder`: nothing may be missing, left over or of another shape."""
    safetensors = import_extra("safetensors.torch", "hf")
    targets, tensors = hf_tensors(model), {}
    # 1 read all files
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= safetensors.load_file(file)
        except Exception as error:  # its SafetensorError derives from Exception
            raise UserError(f"{file} is damaged, or no safetensors file: {error}") from error
    if not tensors:
        raise UserError(f"{folder} holds no weights: they are read from safetensors, one file or shards")
    # 2 compare the names
    head = tensors.get("lm_head.weight", torch.empty(0))
    if model.config.tie_word_embeddings and torch.equal(head, tensors.get("model.embed_tokens.weight", head[:0])):
        tensors.pop("lm_head.weight", None)  # written twice
    extra = {name for name in tensors.keys() - targets.keys() if not name.endswith("rotary_emb.inv_freq")}
    for names, problem in ((targets.keys() - tensors.keys(), "lack"), (extra, "hold, against config.json,")):
        if names:
            raise UserError(f"the weights in {folder} {problem} {', '.join(sorted(names)[:4])}")
    # 3 fill the views; copy_ converts to float32, but would also broadcast, so shapes are compared
    for name, target in targets.items():
        tensor = tensors[name]
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise UserError(
                f"the weights in {folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}: it must be "
                f"of floating point, and by config.json {tuple(target.shape)}"
            )
        target.copy_(tensor)
    return model.eval()


def write_hf_directory(folder: Path, model: MiniGPT, tokenizer: BPETokenizer | None, dtype: str) -> None:
    """Write model and tokenizer for transformers; a failure leaves what was there."""
    safetensors, config = import_extra("safetensors.torch", "hf"), hf_config(model.config, dtype)
    model = copy.deepcopy(model)  # the caller keeps its LoRA
    merge_lora(model)
    tensors = {name: x.to("cpu", getattr(torch, dtype), copy=True) for name, x in hf_tensors(model).items()}
    stop_ids = config["eos_token_id"]
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
        config |= {name: getattr(tokenizer, name.replace("_token", "")) for name in TOKEN_IDS}
        stop_ids = list(tokenizer.stop_ids)
    generation = {name: config[name] for name in TOKEN_IDS} | {"eos_token_id": stop_ids}
    # everything is written into a directory aside, and moved when it is complete
    aside = temporary_beside(folder)
    try:
        aside.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            write_file(aside / name, json.dumps(content, indent=2))
        with atomic_write(aside / "model.safetensors") as file:
            file.write(safetensors.save(tensors, metadata={"format": "pt"}))
        folder.mkdir(exist_ok=True)
        for path in aside.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# -- GGUF: one file for llama.cpp and ollama ---------------------------------------------------------------------------

GGUF_FIELDS = {  # there, and of our config
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
GGUF_EXPERT_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "num_shared_experts",
    "expert_weights_norm": "norm_topk_prob",
}
GGUF_TYPES = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}  # number there, and how `struct` packs it
GGUF_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def gguf_architecture(config: MiniGPTConfig) -> str:
    """Return llama.cpp's name of the architecture that computes the same; a UserError names what none does."""
    kind, rope = hf_kind(config), config.rope_scaling or {}
    name = "bailingmoe2" if kind == "qwen3_moe" and config.num_shared_experts else kind.replace("_", "")
    yarn = [rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)]
    possible = {
        "norm_topk_prob": name != "qwen3moe" or config.norm_topk_prob,
        "head_dim": name != "bailingmoe2" or config.num_attention_heads * config.head_dim == config.hidden_size,
        "rope_scaling": yarn == [32, 1, True] and (name == "llama" or rope.get("rope_type") != "llama3"),
    }
    for field, ok in possible.items():
        check(config, ok, field, "another one for GGUF: llama.cpp computes this model differently")
    return name


def gguf_metadata(model: MiniGPT, tokenizer: BPETokenizer, add_bos: bool) -> dict:
    """Return what a GGUF file says about a model beside its tensors."""
    c, arch, rope = model.config, gguf_architecture(model.config), model.config.rope_scaling or {}
    names = GGUF_FIELDS | (GGUF_EXPERT_FIELDS if c.num_experts else {})
    fields = {there: getattr(c, here) for there, here in names.items()}
    fields |= {"attention.layer_norm_rms_epsilon": float(c.rms_norm_eps), "rope.freq_base": float(c.rope_theta)}
    if c.num_experts:
        fields["expert_gating_func"] = 1  # softmax
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":  # llama.cpp multiplies by the usual attention factor itself
        usual = 0.1 * math.log(rope["factor"]) + 1
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        fields["rope.scaling.attn_factor"] = rope.get("attention_factor", usual) / usual
    vocabulary = {
        "model": "gpt2",
        "pre": "qwen2",  # our words lie inside Qwen2's, so that the ids are the same
        "tokens": [*SPECIAL_TOKENS, *map(spell_bytes, tokenizer.token_bytes[FIRST_BYTE:])],
        "token_type": [3] * FIRST_BYTE + [1] * (tokenizer.vocab_size - FIRST_BYTE),  # 3 is control, 1 normal
        "merges": [" ".join(map(spell_bytes, pair)) for pair in tokenizer.merges],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "eot_token_id": tokenizer.im_end_id,
        "eos_token_ids": list(tokenizer.stop_ids),
        "padding_token_id": tokenizer.pad_id,
        "add_bos_token": add_bos,
    }
    return {
        "general.architecture": arch,
        **{f"{arch}.{name}": value for name, value in fields.items()},
        **{f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()},
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def gguf_tensors(model: MiniGPT, vocab_size: int) -> Batch:
    """Return the model's weights under GGUF's names."""
    c, arch, tensors = model.config, gguf_architecture(model.config), {}
    whole = {"layers.*.self_attn.qkv_proj": "blk.*.attn_qkv"} if arch == "bailingmoe2" else {}
    for name, matrix in exported_weights(model, GGUF_NAMES | whole):
        if name in ("token_embd", "output"):
            matrix = matrix[:vocab_size]  # rows that no token has are left out
        if arch == "llama" and name.endswith(("attn_q", "attn_k")):  # it turns neighbours, not halves
            matrix = matrix.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        tensors[f"{name}{'_exps' if matrix.dim() == 3 else ''}.weight"] = matrix
    if arch == "bailingmoe2":  # has no tied weights
        tensors.setdefault("output.weight", tensors["token_embd.weight"])
    if c.rope_scaling and c.rope_scaling["rope_type"] == "llama3":  # how much slower each rotation is than without
        cos, sin = rope_tables(c)
        angles = torch.atan2(sin[1], cos[1])[c.head_dim // 2 :]  # at position 1
        tensors["rope_freqs.weight"] = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim) / angles
    return tensors


def gguf_value(value: object) -> tuple[int, bytes]:
    """Return a value's type in GGUF and its bytes."""
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):
        items = [(5, struct.pack("<i", item)) if isinstance(item, int) else gguf_value(item) for item in value]
        return 9, struct.pack("<IQ", items[0][0] if items else 8, len(items)) + b"".join(data for _, data in items)
    number, code = GGUF_TYPES[type(value)]
    return number, struct.pack("<" + code, value)


@torch.no_grad()
def write_gguf(
    path: AnyPath, model: MiniGPT, tokenizer: BPETokenizer, add_bos: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Write model and tokenizer as one GGUF file (version 3), complete or not at all.

    add_bos: whether llama.cpp puts BOS before a text, as pretraining does; conversations have none. Vectors and routers
    stay float32. A UserError names what llama.cpp would compute differently.
    """
    if isinstance(tokenizer, ImportedTokenizer):
        raise UserError("GGUF of an imported tokenizer is not supported: convert the Hugging Face directory instead")
    model = copy.deepcopy(model)
    merge_lora(model)
    metadata = gguf_metadata(model, tokenizer, add_bos)
    tensors = {
        name: tensor.to("cpu", dtype if tensor.dim() > 1 and "gate_inp" not in name else torch.float32).contiguous()
        for name, tensor in gguf_tensors(model, tokenizer.vocab_size).items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        # 1 counts and metadata
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for name, value in metadata.items():
            number, data = gguf_value(value)
            file.write(gguf_value(name)[1] + struct.pack("<I", number) + data)
        # 2 the table of tensors: name, sizes from the fastest axis on, type, and where its numbers begin
        offset = 0
        for name, tensor in tensors.items():
            sizes = struct.pack(f"<I{tensor.dim()}Q", tensor.dim(), *reversed(tensor.shape))
            file.write(gguf_value(name)[1] + sizes + struct.pack("<IQ", GGUF_DTYPES[tensor.dtype], offset))
            offset += -(-tensor.nbytes // 32) * 32
        # 3 the numbers; each tensor begins at a multiple of 32 bytes
        for tensor in tensors.values():
            file.write(bytes(-file.tell() % 32))
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


# -- tokenizers and chat templates of other families -------------------------------------------------------------------

BYTE_LEVEL_BPE = {
    "type": "BPE",
    "byte_fallback": False,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
}
USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<|eos|>")
BESIDE = ("tokenizer_config.json", "generation_config.json")  # the files that belong to a tokenizer.json
CLOSE = "\ud803"  # closing mark of a content that TEXT, REPLY or TRAINED opens


class ImportedTokenizer(BPETokenizer):
    """Byte-level BPE that others trained: GPT-2's, Llama 3's, Qwen's, SmolLM2's and their like.

    The package `tokenizers` finds the ids, and jinja2 renders conversations by the model's own chat template.
    Text never becomes a special token; only the template and BOS do.
    """

    def __init__(self, path: AnyPath):
        """Read a tokenizer.json, and the files that Hugging Face puts beside it."""
        path, template = Path(path), Path(path).with_name("chat_template.jinja")
        files = [path.with_name(name) for name in BESIDE]
        self._config, self._generation = (read_json(file) if file.is_file() else {} for file in files)
        try:
            if template.is_file():  # transformers, too, takes it before the one in tokenizer_config.json
                self._config["chat_template"] = template.read_text(encoding="utf-8")
            self._text = path.read_text(encoding="utf-8")
            self._backend = read_byte_level_bpe(self._text)
            self._read_special_tokens()
            self._read_vocabulary()
            self._read_chat_template()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise UserError(f"{path} is not a tokenizer.json of byte-level BPE: {error!r}") from error

    def _read_special_tokens(self):
        """Find BOS, EOS and padding, and make special what the file has as ordinary, such as an EOS."""
        ids, added = self._backend.get_vocab(), self._backend.get_added_tokens_decoder()
        is_special = {token.content: token.special for token in added.values()}
        tokens = {}
        for name, token in self._config.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and text in ids:
                tokens[name] = text
        eos = tokens.get("eos_token") or next((text for text in USUAL_EOS if text in is_special), None)
        if eos is None:
            raise UserError("no token ends a text: name an eos_token in tokenizer_config.json, beside tokenizer.json")
        self._template_tokens = {"pad_token": eos} | tokens | {"eos_token": eos}
        self._config |= {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config | {"eos_token": eos}
        self.eos_id, self.pad_id = ids[eos], ids[self._template_tokens["pad_token"]]
        self.im_start_id, self.im_end_id = ids.get("<|im_start|>"), ids.get("<|im_end|>")
        # BOS is what the file puts before every text
        self.bos_id = next((i for i in self._backend.encode("a").ids[:1] if i in added), None)
        ends = self._generation.get("eos_token_id")
        self._ends = [ends] if isinstance(ends, int) else list(ends or [])
        # tokens that are special already are left out: to add them again would reset their flags
        ends = [token.content for i, token in added.items() if i in self._ends]
        names = (*self._template_tokens.values(), *ends, "<|im_start|>", "<|im_end|>")
        self._backend.add_special_tokens([text for text in names if text in ids and not is_special.get(text)])

    def _read_vocabulary(self):
        """Find the bytes of every id, and how to recognise special tokens in a template's text."""
        vocabulary, added = self._backend.get_vocab(), self._backend.get_added_tokens_decoder()
        # 1 the bytes: merges spell them in GPT-2's table, added tokens stand as they are
        last = max(vocabulary.values())
        if last > sys.maxunicode:  # a list of that length would take all memory
            raise UserError(f"a token has the id {last}: at most {sys.maxunicode} is supported")
        self.token_bytes = [b""] * (last + 1)
        for text, i in vocabulary.items():
            in_bytes = i not in added and CHAR_TO_BYTE.keys() >= set(text)
            self.token_bytes[i] = bytes(map(CHAR_TO_BYTE.get, text)) if in_bytes else text.encode()
        # 2 the special tokens, which have no bytes
        self.special_tokens, patterns = {}, []
        for i, token in sorted(added.items(), key=lambda item: -len(item[1].content)):  # the longest first
            if token.special:
                self.special_tokens[i], self.token_bytes[i] = token.content, b""
                # with lstrip or rstrip it takes the blanks beside it along
                patterns.append(r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip)
                if i in self.encode(token.content):  # merges make it, too
                    raise UserError(
                        f"the special token {token.content!r} is not supported: ordinary text can become it"
                    )
        self._special_pattern = "|".join(patterns)
        # 3 a normalizer or a pre-tokenizer may lose blanks or case of all that is trained on
        if (back := self.decode(self.encode(text := "A b\n c"))) != text:
            warnings.warn(f"this tokenizer changes texts: {text!r} comes back as {back!r}", stacklevel=5)

    def _read_chat_template(self):
        """Take the chat template, or ChatML where its tokens exist, and find the tokens that end a text or a turn."""
        ends = self._ends
        if not all(i in range(self.vocab_size) for i in ends):
            raise UserError(f"generation_config.json: eos_token_id={ends} is outside the vocabulary")
        template, self._template = self._config.get("chat_template"), None
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not template and None not in (self.im_start_id, self.im_end_id):
            template = CHAT_TEMPLATE
        if template:
            self._config["chat_template"], self._template = template, compile_chat_template(template)
            # the special token after a reply ends a turn: try it
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            with contextlib.suppress(ValueError):  # a template may want more than such a conversation
                ids, trained = self.encode_chat(chat)
                after = [i for i in ids[trained.index(True) :] if i in self.special_tokens]
                if not after:
                    warnings.warn(
                        "the chat template puts no special token after a reply: a model cannot learn where to stop",
                        stacklevel=5,
                    )
                ends = [*ends, *after[:1]]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *ends]))

    def _encode_text(self, text):
        ids = []
        for piece in re.split("([\udc80-\udcff])", text):  # bytes that are no UTF-8, which `tokenizers` does not take
            if "\udc80" <= piece <= "\udcff":
                ids.append(self._backend.token_to_id(BYTE_TO_CHAR[ord(piece) - 0xDC00]))
            else:  # one at a time: encode_batch starts threads, which a forked child lacks
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return [i for i in ids if i is not None]  # less the bytes that the vocabulary lacks

    def _render(self, messages, add_generation_prompt):
        if self._template is None:
            raise UserError("this tokenizer cannot hold conversations: it has no chat template")
        if not messages:
            raise UserError("a conversation needs a message")
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._template_tokens,
            )
        except Exception as error:  # the template is foreign code: it can fail in any way
            raise UserError(f"the chat template refuses this conversation: {error}") from error

    def _chat_pieces(self, messages, kinds, add_generation_prompt):
        """Render a conversation, and split it at special tokens and contents.

        To find the contents, they are rendered once more with marks around them, which say their kinds.
        """
        plain, special = self._render(messages, add_generation_prompt), self._special_pattern
        # blanks before the end of a turn belong to the reply: the model has to write them
        content = f"[{TEXT}{REPLY}{TRAINED}].*?{CLOSE}(?:\\s+(?={special}))?"
        # marks around all of a content are exact; a template that strips contents wants them further inside
        for inside in (False, True):
            marked = self._render(
                [
                    message | {"content": mark_content(message["content"], kind, inside)}
                    for message, kind in zip(messages, kinds, strict=True)
                ],
                add_generation_prompt,
            )
            pieces = []
            for i, piece in enumerate(re.split(f"({content}|{special})", marked, flags=re.DOTALL)):
                if i % 2 == 0:
                    pieces.append((TEXT, piece))
                elif CLOSE in piece:
                    pieces.append((piece[0], re.sub(f"[{piece[0]}{CLOSE}]", "", piece)))
                else:
                    pieces.append((self._backend.token_to_id(piece.strip()), piece))
            if "".join(text for _, text in pieces) == plain:
                return pieces  # else the template strips or inspects contents, where now are marks
        raise UserError("the chat template cannot be rendered for this conversation: it changes what messages contain")

    def to_json(self) -> str:
        """Return the tokenizer.json as it was read."""
        return self._text

    def content_hash(self) -> str:
        return hashlib.sha256(repr((self._text, self._config, self.stop_ids)).encode()).hexdigest()

    def save(self, path: AnyPath) -> None:
        """Write a tokenizer.json, and beside it tokenizer_config.json and generation_config.json."""
        write_file(path, self._text)
        for name, content in zip(BESIDE, (self._config, self._generation), strict=True):
            if content:
                write_file(Path(path).with_name(name), json.dumps(content, indent=1, ensure_ascii=False))

    def save_pretrained(self, folder: AnyPath) -> None:
        """Write what transformers' AutoTokenizer reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / "tokenizer.json")


def read_byte_level_bpe(text: str) -> typing.Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json, and refuse what is not byte-level BPE."""
    data = json.loads(text)
    for field, value in BYTE_LEVEL_BPE.items():
        if data["model"].get(field, value) not in (value, ""):
            raise UserError(f"model.{field}={data['model'][field]!r} is not supported: it must be {value!r}")
    pre_tokenizer = json.dumps(data.get("pre_tokenizer"))
    if '"ByteLevel"' not in pre_tokenizer or '"add_prefix_space": true' in pre_tokenizer:
        raise UserError(
            f"pre_tokenizer {pre_tokenizer} is not supported: it must be or contain ByteLevel, and not have "
            "add_prefix_space=True: what is decoded would not be what was encoded"
        )
    # ids must depend on the text alone
    backend = import_extra("tokenizers", "hf").Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    backend.model.unk_token = None  # a byte that the vocabulary lacks is dropped, and not a special token
    backend.encode_special_tokens = True
    return backend


def compile_chat_template(source: str) -> typing.Any:
    """Compile a chat template in a sandbox, with the settings and functions that transformers gives it."""
    jinja2, sandbox = import_extra("jinja2", "hf"), import_extra("jinja2.sandbox", "hf")

    def raise_exception(message):
        raise UserError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja2's escapes HTML
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    # transformers' tag around replies does nothing here: what is inside counts
    source = re.sub(r"(\{%-?\s*)(end)?generation\b", lambda tag: tag[1] + ("endif" if tag[2] else "if true"), source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not Jinja: {error}") from error


def mark_content(content: str, kind: str, inside: bool) -> str:
    """Put marks around a content, or `inside`, where templates leave them.

    That is inside outer blanks, which many strip, and after the tags of thoughts. Qwen3's template drops earlier
    thoughts and writes the tags itself. If it removes some marks, the remaining one is enough.
    """
    if not inside:
        return kind + content + CLOSE
    kept = content.rstrip()
    return re.sub(r"^\s*|</?think>\s*", lambda match: match[0] + kind, kept) + CLOSE + content[len(kept) :]


# -- the command line --------------------------------------------------------------------------------------------------


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass, from its line: "name: type = default  # comment"."""
    comments = {}
    for base in cls.__mro__[:-1]:  # inspect.getsource would take a second
        text = Path(inspect.getfile(base)).read_text(encoding="utf-8")
        source = re.search(rf"^class {base.__name__}\b.*?(?=^\S)", text, re.M | re.S)[0]
        comments |= dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.M))
    return comments


def add_flags(parser: argparse.ArgumentParser, defaults: object, title: str, skip: tuple = ()) -> None:
    """Give `parser` a flag for each field of a dataclass but `skip`; the help is the comment on the field's line.

    `defaults` is an instance whose values the help shows. Only flags that the user gives appear in the parsed
    namespace, so that presets can supply the rest.
    """
    group, comments = parser.add_argument_group(title), field_comments(type(defaults))
    for name, hint in typing.get_type_hints(type(defaults)).items():
        kind = (typing.get_args(hint) or (hint,))[0]  # int | None -> int
        if name in skip:
            continue
        elif typing.get_origin(hint) is Literal:
            options = {"choices": typing.get_args(hint)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}  # --flag and --no-flag
        elif typing.get_origin(kind) is list:
            choices = typing.get_args(*typing.get_args(kind)) or None
            options = {"action": "extend", "nargs": "+", "metavar": "TEXT", "choices": choices}  # again: more of them
        else:
            options = {"type": json_object if kind is dict else kind, "metavar": kind.__name__.upper()}
        default = getattr(defaults, name)
        options["help"] = comments[name].replace("%", "%%") + ("" if default is None else f" [{default}]")
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, **options)


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def json_object(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object like {{"factor": 2}}') from None


def given_flags(args: argparse.Namespace, cls: type) -> dict:
    """Return the fields of `cls` that the user gave on the command line."""
    return {name: value for name, value in vars(args).items() if name in typing.get_type_hints(cls)}


USES = {  # what trains no stage uses these flags, and --config, --stage and --out
    "--stage tokenizer": "data val_data vocab_size on_bad_record",
    "--stage eval": "data val_data init checkpoint device dtype batch_size seq_len compile eval_tokens eval_prompts "
    "reply_tokens on_bad_record",
    "--stage export": "init checkpoint overwrite dtype format",
    "--inspect": "inspect data val_data init seq_len reward reply_tokens on_bad_record",
    "--plot": "plot png",
}
NEEDS = {  # an option, the option it depends on, and the values of that which it takes (none listed: any but 0)
    "png": "plot",
    "format": "stage export",
    "lora_alpha": "lora_rank",
    "decay_fraction": "schedule wsd",
    "min_learning_rate": "schedule cosine wsd",
    "momentum": "optimizer muon",
    "num_experts_per_tok": "num_experts",
    "num_shared_experts": "num_experts",
    "moe_intermediate_size": "num_experts",
    "norm_topk_prob": "num_experts",
    "router_aux_loss_coef": "num_experts",
}


def check_use(mode: str, stages: Iterable[str], given: Iterable[str], classes: Iterable[type]) -> None:
    """Raise UserError for a given flag of `classes` that has no effect in `mode`: one of USES, or training of `stages`.

    A comment begins with the stages that use its field, "PPO, GRPO: …". Where it names none, all do. A stage that no
    comment names may use every field.
    """
    # 1 the stages that use each field
    users = {}
    for cls in classes:
        for name, comment in field_comments(cls).items():
            names = comment.partition(": ")[0].lower().split(", ")
            users[name] = names if set(names) <= {"export", *STAGES} else []
    # 2 the fields that this mode uses
    named = set(itertools.chain(*users.values()))
    used = [name for name, names in users.items() if not names or any(x in names or x not in named for x in stages)]
    if mode in USES:
        used = f"config stage out {USES[mode]}".split()
    # 3 the first that it does not
    for name in given:
        if name in users and name not in used:
            hint = did_you_mean(flag_of(name), map(flag_of, used))
            raise UserError(f"{flag_of(name)} has no effect in {mode}, but in {', '.join(users[name] or STAGES)}{hint}")


def check_needs(given: Iterable[str], *configs: object) -> None:
    """Raise UserError for a given flag whose switch is off in all of the configs that were made of the flags."""
    for name in NEEDS.keys() & set(given):
        switch, *values = NEEDS[name].split()
        states = [getattr(config, switch) for config in configs if hasattr(config, switch)]
        if states and not any(state in values if values else state for state in states):
            needed = " or ".join(f"{flag_of(switch)} {value}" for value in values) or flag_of(switch)
            raise UserError(f"{flag_of(name)} has no effect without {needed}")


RENAMED_FLAGS = {  # people's names, and those of version 0.1
    "--answer-tokens": "--reply-tokens",
    "--kl-target": "--kl-coef",
    "--lr": "--learning-rate",
    "--block-size": "--seq-len",
}

TEXTS = ("prompt", "system", "stop", "explain")  # flags that may be empty


def did_you_mean(flag: str, flags: Iterable[str]) -> str:
    """Return the end of a message: what a flag is called now, or the nearest of `flags`, if one is near."""
    near = RENAMED_FLAGS.get(flag) or "".join(difflib.get_close_matches(flag, flags, n=1, cutoff=0.7))
    return f": did you mean {near}?" if near else ""


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises UserError and suggests the nearest to an unknown flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")

    def _parse_optional(self, arg_string):
        """Take "-abc" for a text: flags begin with two dashes and a letter. (-config is a mistyped --config.)"""
        is_flag = re.match("--[a-z]|-h$", arg_string) or f"-{arg_string}" in self._option_string_actions
        return super()._parse_optional(arg_string) if is_flag else None

    def parse_args(self, args=None):
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{hint}")
        for name, value in vars(namespace).items():  # of a path it would mean the default, or this directory
            if name not in TEXTS and "" in (value if isinstance(value, list) else [value]):
                self.error(f"{flag_of(name)} is empty, as an unset variable of the shell is: give a value, or no flag")
        return namespace


def is_code(reward: str) -> bool:
    """Return whether a reward is a FILE.py:function."""
    return reward.rpartition(":")[0].endswith(".py")


def load_reward(source: str, tokenizer: BPETokenizer) -> RewardModel | Callable:
    """Return what --reward names: "answer", a reward model's run directory, or FILE.py:function, which is executed."""
    if source == "answer":
        return answer_reward
    path, _, name = source.rpartition(":")
    if is_code(source):
        if not Path(path).is_file():
            raise UserError(f"--reward {source}: there is no file {path}")
        try:
            # the one place where code of the user runs
            function = runpy.run_path(path).get(name)
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {source}: {place_and_error(error)}") from error
        if not callable(function):
            raise UserError(f"--reward {source}: {path} has no function {name}")
        return function
    model, its_tokenizer, _ = load_run(source) if holds_run(source) else (None, None, None)
    if not isinstance(model, RewardModel):
        raise UserError(
            f"--reward {source} is neither answer, nor FILE.py:function, nor the run directory of a reward "
            "model (trained with --stage reward)"
        )
    if its_tokenizer.content_hash() != tokenizer.content_hash():
        raise UserError(f"--reward {source}: its tokenizer is not the policy's")
    return model


def place_and_error(error: BaseException) -> str:
    """Return what went wrong in a user's code, and where."""
    place = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename}:{place.lineno}: {type(error).__name__}: {error}"


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system; other C libraries are left alone.

    Tensors of megabytes are allocated and freed thousands of times a second. When each is a fresh mapping, a CPU step
    spends a large part of its time on page faults. For drivers: it concerns the whole process.
    """
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest that every glibc takes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
