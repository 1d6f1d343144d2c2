"""MiniLLM: the whole life of a small language model in one readable file of pure PyTorch.

Text goes in at the top and a talking model comes out at the bottom; every section uses only what stands above it:

    1 Config            what a model, a run and a sampler are made of, and how that becomes command-line flags
    2 Tokenizer         byte-level BPE that is friendly to Chinese; Hugging Face tokenizer.json files in and out
    3 Data              files -> records -> a memory-mapped stream of token ids -> batches
    4 Model             RMSNorm, RoPE/YaRN, grouped-query attention, SwiGLU, mixture of experts, KV cache, LoRA;
                        Hugging Face directories in and out
    5 Generation        greedy, sampling, beam search, streaming, chat
    6 Losses            pure functions of tensors
    7 Optimisation      schedules, Muon, AdamW, precision, memory
    8 Runs              checkpoints that survive crashes, run directories
    9 Trainers          one loop: accumulate -> clip -> step -> log -> evaluate -> save; pretraining, SFT, DPO, rewards
   10 Reinforcement     rollouts, PPO and GRPO
   11 RLHF pipeline     a stage from its parent's run; SFT -> reward model -> PPO in one resumable go

Contract: importing this file does nothing but define names. A mistake of the user's raises UserError (a ValueError),
whose message says what, where, found, allowed and what to do. Weights follow the Hugging Face Llama/Qwen3 conventions.
Axes, everywhere: B batch, T time, S keys (cached time), C hidden, H heads, K key/value heads, D head dim, F ffn,
V vocabulary, E experts, N tokens of a batch laid end to end.
"""
from __future__ import annotations

import argparse
import array
import codecs
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import gzip
import hashlib
import heapq
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:
    fcntl = None

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

# ======================================================================================================================
# 1 Config: dataclasses with one comment a field; the comments are the help texts of the command line.
# ======================================================================================================================


class UserError(ValueError):
    """A mistake that the user can mend. Drivers print its message and exit with status 2."""


def check(owner: object, ok: bool, field: str, allowed: str) -> None:
    """Raise UserError unless `ok`, naming the field of `owner`, its value and what is allowed."""
    if not ok:
        raise UserError(f"{field}={getattr(owner, field)!r} is not possible: it must be {allowed}")


def check_types(owner: object) -> None:
    """Every field of a dataclass holds a value of its annotation; floats are finite."""
    for field, hint in typing.get_type_hints(type(owner)).items():
        value = getattr(owner, field)
        if typing.get_origin(hint) is Literal:
            check(owner, value in typing.get_args(hint), field, f"one of {', '.join(typing.get_args(hint))}")
            continue
        kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,)]
        ok = isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))
        check(owner, ok and (bool in kinds or not isinstance(value, bool)), field,
              "of type " + " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds))
        check(owner, not isinstance(value, float) or math.isfinite(value), field, "finite")


def check_least(owner: object, least: int, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        check(owner, value is None or value >= least, field, f"{least} or more")


@dataclass
class MiniGPTConfig:
    """Shape of a model, with Hugging Face's field names. A bad value raises a ValueError that names the field."""

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
    moe_intermediate_size: int | None = None  # SwiGLU width of one expert (default: F / experts active for a token)
    norm_topk_prob: bool = True  # scale the chosen experts' probabilities to sum 1
    router_aux_loss_coef: float = 0.01  # weight of the load-balancing loss
    bos_token_id: int = 1  # begins a document
    eos_token_id: int = 2  # ends a document
    pad_token_id: int = 0  # fills rows; never seen by attention or loss

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                    "num_key_value_heads", "intermediate_size", "moe_intermediate_size", "num_experts_per_tok",
                    "max_position_embeddings")
        check_least(self, 0, "num_experts", "num_shared_experts", "router_aux_loss_coef")
        C, H = self.hidden_size, self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = H
        check(self, H % self.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads={H}")
        if self.head_dim is None:
            check(self, C % H == 0, "num_attention_heads", f"a divisor of hidden_size={C} unless head_dim is given")
            self.head_dim = C // H
        check(self, self.head_dim % 2 == 0, "head_dim", "even, as RoPE turns pairs")
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * C // 3 // 32) * 32
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        check(self, self.rms_norm_eps > 0, "rms_norm_eps", "above 0")
        check(self, self.rope_theta > 1, "rope_theta", "above 1")
        if self.num_experts:
            check(self, self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok",
                  f"at most num_experts={self.num_experts}")
            if self.moe_intermediate_size is None:
                active = self.num_experts_per_tok + self.num_shared_experts
                self.moe_intermediate_size = max(32, self.intermediate_size // active // 32 * 32)
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            check(self, 0 <= getattr(self, field) < self.vocab_size, field, f"in 0 … {self.vocab_size - 1}")
        if self.rope_scaling is not None:
            numbers = {k: v for k, v in self.rope_scaling.items() if k not in ("rope_type", "truncate")}
            kind, least = self.rope_scaling.get("rope_type"), {"factor": 1, "original_max_position_embeddings": 1}
            needed = {"linear": ["factor"], "yarn": [*least], "llama3": [*least, "low_freq_factor", "high_freq_factor"]}
            optional = ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"]
            optional = optional if kind == "yarn" else []
            ok = kind in needed and isinstance(self.rope_scaling.get("truncate", True), bool)
            ok = ok and set(needed[kind]) <= numbers.keys() <= {*needed[kind], *optional}
            ok = ok and all(type(v) in (int, float) and math.isfinite(v) and v >= least.get(k, 0)
                            for k, v in numbers.items())
            check(self, ok, "rope_scaling", "none or numbers with a rope_type, " + ", ".join(
                f"{kind} ({', '.join(keys)})" for kind, keys in needed.items())
                + "; yarn may have beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate")


def get_tiny_config() -> MiniGPTConfig:
    """~1.4 M parameters: learns to write on a laptop CPU in minutes."""
    return MiniGPTConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=6, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=384, max_position_embeddings=256)


def get_small_config() -> MiniGPTConfig:
    """~25 M parameters: an evening on a CPU, minutes on a GPU."""
    return MiniGPTConfig(vocab_size=6400, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=2, intermediate_size=1408, max_position_embeddings=512)


def get_medium_config() -> MiniGPTConfig:
    """~80 M parameters: the size of GPT-2 small without its large vocabulary."""
    return MiniGPTConfig(vocab_size=8192, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                         num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=1024)


def get_large_config() -> MiniGPTConfig:
    """~350 M parameters: for one serious GPU."""
    return MiniGPTConfig(vocab_size=16384, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                         num_key_value_heads=8, intermediate_size=3072, max_position_embeddings=2048)


def get_moe_config() -> MiniGPTConfig:
    """Sparse: ~75 M parameters, of which a token uses ~25 M (one shared expert, 2 of 8 routed ones)."""
    return MiniGPTConfig(vocab_size=6400, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=2, max_position_embeddings=512, num_experts=8, num_experts_per_tok=2,
                         num_shared_experts=1, intermediate_size=1408, moe_intermediate_size=480)


PRESETS: dict[str, Callable[[], MiniGPTConfig]] = {
    "tiny": get_tiny_config, "small": get_small_config, "medium": get_medium_config, "large": get_large_config,
    "moe": get_moe_config}


def get_config(name: str) -> MiniGPTConfig:
    """The preset called `name`: tiny, small, medium, large or moe."""
    if name not in PRESETS:
        raise UserError(f"config {name!r} is unknown: choose from {', '.join(PRESETS)}")
    return PRESETS[name]()


@dataclass
class MemoryConfig:
    """The part of the training options that trades time for memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16/float16 on CUDA, else float32
    accumulation_steps: int = 1  # batches whose gradients are added up before one update
    gradient_checkpointing: bool = False  # keep only each block's input and recompute the rest in backward
    auto_micro_batch: bool = True  # on out-of-memory go on with smaller micro-batches of the same total
    lora_rank: int = 0  # train low-rank updates of the blocks' matrices alone (LoRA); 0 trains everything
    lora_alpha: float = 16.0  # LoRA's updates are scaled by alpha / rank


@dataclass
class TrainConfig(MemoryConfig):
    """Every knob of training. `max_steps` or `minutes` ends a run; with both, whichever comes first."""

    batch_size: int = 16  # rows, pairs or prompts of a batch
    packing: bool = True  # several conversations a row, blind to each other; off is one a row
    seq_len: int | None = None  # tokens of a row (default: the model's max_position_embeddings)
    learning_rate: float = 3e-3  # peak, for Muon's matrices and AdamW's vectors alike
    min_learning_rate: float = 0.0  # where the schedule ends
    warmup_steps: int = 20  # steps of linear warm-up
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, linear decay
    decay_fraction: float = 0.4  # part of the run that wsd spends decaying
    optimizer: Literal["muon", "adamw"] = "muon"  # what trains the matrices; the rest always gets AdamW
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    momentum: float = 0.95  # Muon's momentum
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 is off
    max_steps: int = 0  # end after so many updates; 0 is no limit
    minutes: float = 0.0  # end so many minutes after the process started; 0 is no limit
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 250  # steps between evaluations, each with a sample; 0 is only at the end
    save_every: int = 250  # steps between checkpoints; 0 is only at the end
    eval_tokens: int = 100_000  # validation tokens an evaluation, always the same ones
    eval_prompts: int = 200  # validation questions that an evaluation lets the model answer
    answer_tokens: int = 48  # longest answer to them, and in the rollouts of PPO and GRPO
    sample_tokens: int = 48  # length of the samples shown during training; 0 is none
    seed: int = 0  # of initialisation, data order and dropout, below 2 ** 32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile each block; auto: long runs on CUDA
    on_bad_record: Literal["stop", "skip"] = "stop"  # a malformed line of data ends the run, or is counted and skipped
    tensorboard: bool = False  # write the metrics for TensorBoard, too, into the run directory

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "batch_size", "accumulation_steps", "eval_tokens", "eval_prompts", "answer_tokens",
                    "log_every", "seq_len")
        check_least(self, 0, "lora_rank", "warmup_steps", "max_steps", "minutes", "eval_every", "save_every",
                    "sample_tokens", "weight_decay", "grad_clip", "min_learning_rate")
        check(self, 0 <= self.seed < 2 ** 32, "seed", "in 0 … 2 ** 32 - 1")
        check(self, self.learning_rate > 0, "learning_rate", "above 0")
        check(self, self.lora_alpha > 0, "lora_alpha", "above 0")
        check(self, self.min_learning_rate <= self.learning_rate, "min_learning_rate",
              f"at most learning_rate={self.learning_rate}")
        check(self, 0 < self.decay_fraction <= 1, "decay_fraction", "in (0, 1]")
        for field in ("beta1", "beta2", "momentum"):
            check(self, 0 <= getattr(self, field) < 1, field, "in [0, 1)")


STAGES = ("pretrain", "sft", "dpo", "reward", "ppo", "grpo")  # in the order of a model's life


def get_train_config(preset: str = "tiny", stage: str = "pretrain") -> TrainConfig:
    """The training defaults of a preset and a stage."""
    get_config(preset)
    if stage not in STAGES:
        raise UserError(f"stage {stage!r} has no training defaults: choose from {', '.join(STAGES)}")
    if preset == "tiny":
        reinforced = {"learning_rate": 3e-4, "optimizer": "adamw", "weight_decay": 0.0, "schedule": "wsd",
                      "decay_fraction": 0.5, "warmup_steps": 5, "log_every": 1, "eval_every": 10, "save_every": 10,
                      "eval_prompts": 600, "answer_tokens": 32}
        return TrainConfig(**{
            "pretrain": {"minutes": 3, "batch_size": 8, "learning_rate": 1e-2, "schedule": "wsd",
                         "decay_fraction": 0.6},
            "sft": {"minutes": 4, "max_steps": 1200, "batch_size": 4, "learning_rate": 4e-3, "schedule": "wsd",
                    "decay_fraction": 0.7, "eval_every": 300, "save_every": 300, "eval_prompts": 500},
            "dpo": {"minutes": 4, "max_steps": 800, "batch_size": 16, "learning_rate": 2e-3, "schedule": "wsd",
                    "decay_fraction": 0.7, "eval_every": 200, "save_every": 200},
            "reward": {"minutes": 5, "max_steps": 1800, "batch_size": 16, "learning_rate": 2e-3, "schedule": "wsd",
                       "decay_fraction": 0.7, "eval_every": 300, "save_every": 300},
            "ppo": {"minutes": 6, "max_steps": 30, "batch_size": 256, **reinforced},
            "grpo": {"minutes": 6, "max_steps": 50, "batch_size": 32, **reinforced},
        }[stage])
    steps = {"small": 10_000, "moe": 10_000, "medium": 20_000, "large": 50_000}[preset]
    common = {"eval_every": 500, "save_every": 500, "eval_tokens": 131_072}
    return TrainConfig(**common | {
        "pretrain": {"batch_size": 32, "max_steps": steps, "warmup_steps": 200, "learning_rate": 2e-3},
        "sft": {"batch_size": 32, "max_steps": 3000, "warmup_steps": 100, "learning_rate": 5e-4},
        "dpo": {"batch_size": 32, "max_steps": 1000, "learning_rate": 1e-5, "optimizer": "adamw"},
        "reward": {"batch_size": 32, "max_steps": 1000, "learning_rate": 1e-4, "optimizer": "adamw"},
        "ppo": {"batch_size": 64, "max_steps": 300, "learning_rate": 1e-5, "optimizer": "adamw",
                "schedule": "constant", "log_every": 1, "eval_every": 25, "save_every": 25},
        "grpo": {"batch_size": 16, "max_steps": 300, "learning_rate": 1e-5, "optimizer": "adamw",
                 "schedule": "constant", "log_every": 1, "eval_every": 25, "save_every": 25},
    }[stage])


@dataclass
class RLHFConfig:
    """What only learning from preferences and rewards needs. `kl` always means divergence from the reference model."""

    dpo_beta: float = 0.1  # DPO: how much staying near the reference counts
    dpo_kind: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO: the loss; ipo regresses to a margin and never saturates
    dpo_sft_coef: float = 0.0  # DPO: weight of the chosen answer's loss a token beside it, against its collapse
    reward_center_coef: float = 0.01  # reward model: weight of (chosen + rejected)², which keeps scores around 0
    reward_sft_coef: float = 1.0  # reward model: weight of the chosen answer's loss a token beside it, as regulariser
    temperature: float = 1.0  # PPO, GRPO: of the rollouts' sampling
    missing_end_penalty: float = 1.0  # PPO, GRPO: taken off the score of an answer that does not end
    minibatch_size: int = 128  # PPO, GRPO: answers of an update
    update_epochs: int = 2  # PPO, GRPO: passes over a rollout
    clip_range: float = 0.2  # PPO, GRPO: how far the ratio of probabilities counts, 1 ± this
    stop_kl: float = 0.1  # PPO, GRPO: end a rollout's updates when the policy has moved so far (nats a token); 0 is off
    kl_coef: float = 0.05  # PPO: penalty on each token's KL, taken off its reward
    kl_target: float = 0.0  # PPO: adapt kl_coef to keep the KL of an answer (nats) near this; 0 keeps kl_coef
    kl_horizon: int = 2000  # PPO: answers over which kl_coef adapts
    gamma: float = 1.0  # PPO: discount of later rewards
    gae_lambda: float = 0.95  # PPO: generalised advantage estimation, 0 trusts the critic, 1 the rewards
    value_clip: float = 1.0  # PPO: how far the critic's estimate may move in a rollout's updates, in units of the score
    value_coef: float = 0.5  # PPO: weight of the critic's loss
    critic_rate: float = 5.0  # PPO: the critic's learning rate, as a multiple of the policy's
    critic_warmup: int = 8  # PPO: first steps that train the critic alone, so that the policy is not misled
    group_size: int = 8  # GRPO: answers to each prompt, each compared with the others
    grpo_kl_coef: float = 0.0  # GRPO: weight of the KL in the loss
    advantage_kind: Literal["dr_grpo", "grpo"] = "dr_grpo"  # GRPO: grpo divides by the group's deviation, too

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "minibatch_size", "update_epochs", "kl_horizon")
        check_least(self, 2, "group_size")
        check_least(self, 0, "dpo_sft_coef", "reward_center_coef", "reward_sft_coef", "missing_end_penalty", "stop_kl",
                    "kl_coef", "kl_target", "value_coef", "critic_warmup", "grpo_kl_coef")
        for field in ("dpo_beta", "clip_range", "value_clip", "critic_rate"):
            check(self, getattr(self, field) > 0, field, "above 0")
        check(self, self.temperature >= 1e-5, "temperature", "1e-5 or more")
        for field in ("gamma", "gae_lambda"):
            check(self, 0 <= getattr(self, field) <= 1, field, "in [0, 1]")


def get_rlhf_config(preset: str = "tiny") -> RLHFConfig:
    """The defaults of a preset. A tiny model forgets right answers under plain DPO: it keeps learning them beside."""
    get_config(preset)
    if preset == "tiny":  # one update on each rollout: the policy that learns is the one that wrote
        return RLHFConfig(dpo_sft_coef=1.0, minibatch_size=256, update_epochs=1, critic_warmup=3)
    return RLHFConfig()


@dataclass
class GenerationConfig:
    """How to continue a prompt. Lengths are in tokens."""

    max_new_tokens: int | None = None  # longest continuation (default: 128, or what max_length leaves)
    min_new_tokens: int = 0  # no end before so many
    max_length: int | None = None  # longest prompt (with its padding) and continuation; max_new_tokens wins
    do_sample: bool = True  # draw from the distribution; off is greedy
    temperature: float = 0.8  # below 1 sharpens, above 1 flattens
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 0.95  # keep the fewest tokens whose probabilities reach p; 1 keeps all
    min_p: float = 0.0  # keep tokens at least so likely, relative to the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred already less likely (CTRL)
    num_beams: int = 1  # hypotheses of beam search; 1 is none
    length_penalty: float = 1.0  # beams are ranked by log-probability / length ** penalty
    early_stopping: bool = False  # beams end as soon as num_beams are finished, not when none can win any more
    stop: list[str] | None = None  # texts that end the continuation; they are not part of it
    seed: int | None = None  # of the drawing; without one each call differs

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        check_types(self)
        check_least(self, 1, "max_new_tokens", "max_length", "num_beams")
        check_least(self, 0, "min_new_tokens", "top_k")
        check(self, self.seed is None or 0 <= self.seed < 2 ** 32, "seed", "in 0 … 2 ** 32 - 1")
        check(self, self.temperature >= 1e-5, "temperature", "1e-5 or more (greedy is do_sample=False)")
        check(self, 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(self, 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(self, 1e-6 <= self.repetition_penalty <= 1e9, "repetition_penalty", "in [1e-6, 1e9]")
        check(self, abs(self.length_penalty) <= 10, "length_penalty", "in [-10, 10]")
        check(self, all(isinstance(text, str) and text for text in self.stop or []), "stop", "texts that are not empty")

    def new_tokens(self, prompt_len: int) -> int:
        """How many tokens to add to a prompt of `prompt_len`."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return 128 if self.max_length is None else max(0, self.max_length - prompt_len)


def json_object(text: str) -> dict:
    return dict(json.loads(text))


def add_flags(parser: argparse.ArgumentParser, defaults: object, title: str, skip: tuple = ()) -> None:
    """Give `parser` a flag for each field of a dataclass but `skip`; the help is the comment on the field's line.

    `defaults` is an instance whose values the help shows. Only flags that the user gives appear in the parsed
    namespace, so that presets can supply the rest.
    """
    cls = type(defaults)
    hints, comments = typing.get_type_hints(cls), {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(base), re.M))
    group = parser.add_argument_group(title)
    for field in (f for f in dataclasses.fields(cls) if f.name not in skip):
        kind = next(t for t in typing.get_args(hints[field.name]) or [hints[field.name]] if t is not type(None))
        if typing.get_origin(hints[field.name]) is Literal:
            options = {"choices": typing.get_args(hints[field.name])}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is list:
            options = {"type": str, "nargs": "+", "metavar": "TEXT"}
        else:
            options = {"type": json_object if kind is dict else kind, "metavar": kind.__name__.upper()}
        value = getattr(defaults, field.name)
        default = "" if value is None else f" [{value}]"
        group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=comments[field.name].replace("%", "%%") + default, **options)


def given_flags(args: argparse.Namespace, cls: type) -> dict:
    """The fields of `cls` that the user gave on the command line."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises UserError and suggests the nearest to an unknown flag."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            self.error(f"unknown argument {word}" + (f": did you mean {near[0]}?" if near else ""))
        return namespace


# ======================================================================================================================
# 2 Tokenizer: byte-level BPE on the standard library's `re`; no <unk>, so every byte string survives the round trip.
# ======================================================================================================================

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")  # ids 0-4; then 256 bytes; then merges
FIRST_BYTE, FIRST_MERGE = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256

# Text is first cut into words that merges never cross. Classes are spelled out as literal characters and not as \w or
# \s, whose meaning differs between engines, so that Python's `re` and the Rust `tokenizers` cut at the same places.
_HAN = "々〇㐀-䶿一-鿿豈-\ufaff\U00020000-\U000323af"
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PUNCTUATION = ("!-/:-@\\[-`{-~¡-©«-±´¶-¸»-¿×÷\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2190-\u2bff"
                "\u3001-\u3004\u3008-\u3020\ufe30-\ufe4f！-／：-＠［-｀｛-･\U0001f000-\U0001faff")
_LETTER = f"[^0-9{_HAN}{_SPACE}{_PUNCTUATION}]"  # every other script, and whatever else there is
WORD_PATTERN = "|".join((
    f"'(?:[sdmt]|ll|ve|re)(?!{_LETTER})",  # English contractions
    f" ?{_LETTER}+",  # a word, with the space before it
    f"[{_HAN}]+",  # a run of Chinese characters
    "[0-9]",  # one digit a token: the same number always looks the same, so that sums can be learned
    f" ?[{_PUNCTUATION}]+",
    f"[{_SPACE}]*[\r\n]+",  # the end of a line with the blanks before it
    f"[{_SPACE}]+(?![^{_SPACE}])",  # blanks, less the last one, which goes to the word that follows
    f"[{_SPACE}]+"))
_find_words = re.compile(WORD_PATTERN).findall
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel cuts by
CHAT_TEMPLATE = (  # in Jinja, for transformers
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# no word spans such a place
_SAFE_CUT = re.compile(f"(?<=[^{_SPACE}])(?=[{_SPACE}])|(?<=[{_HAN}])(?=[{_PUNCTUATION}])")

# GPT-2's table, which tokenizer.json uses: bytes that print stand for themselves, the others for U+0100 and up.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_TO_CHAR = {b: chr(b) if b in _PRINTABLE else chr(256 + b - sum(p < b for p in _PRINTABLE)) for b in range(256)}
_CHAR_TO_BYTE = {c: b for b, c in _BYTE_TO_CHAR.items()}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[typing.BinaryIO]:
    """Open a file for writing bytes that appears under `path` whole and on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is on the disk only once the directory is
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def parallel_map(fn: Callable, items: Iterable, size: int, setup: Callable | None = None, setup_args: tuple = ()
                 ) -> Iterator:
    """`map(fn, items)` over the machine's cores, in order and with few items in flight, so that memory stays flat.

    Children are forked: they never import the caller's `__main__` again. Where there is no fork (Windows), with one
    core, or for less than 2 MB of work (`size`, in bytes), everything runs in this process.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if size < 2e6 or workers < 2 or not hasattr(os, "fork"):
        if setup:
            setup(*setup_args)
        yield from map(fn, items)
        return
    start = (_start_child, (setup, setup_args))
    try:
        with warnings.catch_warnings(), ProcessPoolExecutor(workers, get_context("fork"), *start) as pool:
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads; children use none
            waiting = deque()
            for item in items:
                waiting.append(pool.submit(fn, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a process that encodes the data was killed, perhaps for want of memory: start again"
                        ) from error


def _start_child(setup: Callable | None, setup_args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if setup:
        setup(*setup_args)


def _count_words(texts: list[str]) -> Counter:
    return Counter(itertools.chain.from_iterable(map(_find_words, texts)))


def _batched(items: Iterable, size: Callable[[object], int], limit: int = 1 << 19) -> Iterator[list]:
    """Lists of consecutive items whose sizes add up to about `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def joinable(word: str, between: bool) -> Iterable[str]:
    """The pairs of a word's symbols that may merge; inside a character only the first, as it grows from the left."""
    return map(str.__add__, word, word[1:]) if between else [word[:2]] if len(word) > 1 else []


def learn_merges(word_counts: dict[str, int], count: int) -> list[tuple[bytes, bytes]]:
    """The `count` most useful merges of byte-level BPE (arXiv:1508.07909), fewer if no pair occurs twice any more.

    Merges join whole characters, or the bytes of one character from left to right; never pieces of two characters, so
    that Chinese tokens are characters and words. Words are `str` with one code point a symbol, so that a merge is
    `str.replace`. A whole character is its own symbol from the start, and how its bytes join is worked out beside the
    words on the distinct characters alone: since a pair is never more frequent than its members, and on a tie bytes go
    first, a character is always complete before it is joined to another.

    >>> learn_merges({"low": 5, "lower": 2}, 2)
    [(b'l', b'o'), (b'lo', b'w')]
    """
    char_counts: Counter = Counter()
    for word, n in word_counts.items():
        for char in word:
            char_counts[char] += n
    fresh = (chr(i) for i in range(0xF0000, sys.maxunicode) if chr(i) not in char_counts)  # symbols from private planes
    byte_symbol = [chr(b) if b < 128 else next(fresh) for b in range(256)]
    symbol_bytes = {s: bytes([b]) for b, s in enumerate(byte_symbol)}
    chars = {c: "".join(byte_symbol[b] for b in c.encode()) for c in char_counts}
    whole = {symbols: c for c, symbols in chars.items()}  # spelled in bytes -> the character
    words = [s for s in whole if len(s) > 1] + [w for w in word_counts if len(w) > 1]
    counts = [char_counts[whole[s]] for s in whole if len(s) > 1] + [n for w, n in word_counts.items() if len(w) > 1]
    n_chars = sum(len(s) > 1 for s in whole)

    pair_counts: dict[str, int] = defaultdict(int)
    where: dict[str, set[int]] = defaultdict(set)
    for i, (word, n) in enumerate(zip(words, counts, strict=True)):
        for pair in joinable(word, i >= n_chars):
            pair_counts[pair] += n
            where[pair].add(i)
    heap = [(-n, min(where[pair]) >= n_chars, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < count:
        n, between, pair = heapq.heappop(heap)
        if pair_counts[pair] != -n:  # older merges have eaten some of it: back into the queue with today's count
            heapq.heappush(heap, (-pair_counts[pair], between, pair))
            continue
        if -n < 2:
            break
        token = symbol_bytes[pair[0]] + symbol_bytes[pair[1]]
        spelled = "".join(byte_symbol[b] for b in token)
        symbol = (None if between else whole.get(spelled)) or next(fresh)
        merges.append((symbol_bytes[pair[0]], symbol_bytes[pair[1]]))
        symbol_bytes[symbol] = token
        born = set()
        for i in where.pop(pair):
            old, n = words[i], counts[i]
            new = words[i] = old.replace(pair, symbol)
            if new == old:
                continue
            for p in joinable(old, between):
                pair_counts[p] -= n
            for p in joinable(new, between):
                pair_counts[p] += n
                if symbol in p:
                    where[p].add(i)
                    born.add(p)
        pair_counts[pair] = 0
        for p in born:
            heapq.heappush(heap, (-pair_counts[p], between, p))
    return merges


class _WordCache(dict):
    """word -> its tokens, one code point each. Starts anew when it is full: memory stays bounded on any text."""

    def __init__(self, encode_word: Callable[[str], str], limit: int = 200_000) -> None:
        self.encode_word, self.limit = encode_word, limit

    def __missing__(self, word: str) -> str:
        if len(self) >= self.limit:
            self.clear()
        tokens = self[word] = self.encode_word(word)
        return tokens


class BPETokenizer:
    """Byte-level BPE: `decode_bytes(encode(x)) == x` for every text and every byte string.

    Text never becomes a special token, whatever it looks like; only the chat template and BOS/EOS do. Ids are those
    that `tokenizers.Tokenizer.from_file` gives for the saved file (with its `encode_special_tokens = True`).

    >>> tokenizer = BPETokenizer(vocab_size=300)
    >>> tokenizer.train(["你好，世界！ hello world"] * 2)
    >>> tokenizer.decode(tokenizer.encode("你好 world"))
    '你好 world'
    """

    special_tokens: dict[int, str] = dict(enumerate(SPECIAL_TOKENS))
    pad_id: int = 0
    bos_id: int | None = 1  # an imported tokenizer may have none, nor those of the chat template
    eos_id: int = 2
    im_start_id: int | None = 3
    im_end_id: int | None = 4

    def __init__(self, vocab_size: int = 4096) -> None:
        self.requested_size = vocab_size
        self._split: Callable[[str], list[str]] = _find_words  # text -> words that merges never cross
        self._source: tuple[str, dict] | None = None  # an imported one's tokenizer.json and tokenizer_config.json
        self._added: re.Pattern | None = None  # tokens that an imported one finds in text as they are
        self._set_merges([])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text or a turn."""
        return tuple(dict.fromkeys(i for i in (self.eos_id, self.im_end_id) if i is not None))

    @property
    def vocab_size(self) -> int:
        """Tokens that exist now: special tokens, bytes and merges learned."""
        return len(self.token_bytes)

    def _set_merges(self, merges: list[tuple[bytes, bytes]]) -> None:
        tokens = [b""] * len(SPECIAL_TOKENS) + [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
        self._set_tokens(tokens, merges, {token: i for i, token in enumerate(tokens) if token})
        # No merge joins parts of two characters, so a character's own merges can run first, once for each character.
        self._chars = _WordCache(self._merge_bytes)
        self._words = _WordCache(lambda word: self._merge("".join(map(self._chars.__getitem__, word))))

    def _set_tokens(self, token_bytes: list[bytes], merges: list[tuple[bytes, bytes]], ids: dict[bytes, int]) -> None:
        """Take up tokens by id, merges by rank, and which id a string of bytes has."""
        self.token_bytes, self.merges = token_bytes, merges
        # Inside _merge a token is the code point of its id, a rank that of itself; so a word is a str, and a merge a
        # str.replace.
        self._byte_symbols = [chr(ids[bytes([b])]) for b in range(256)]
        self._pair_of = {chr(rank): chr(ids[a]) + chr(ids[b]) for rank, (a, b) in enumerate(merges)}
        self._joined = {chr(rank): chr(ids[a + b]) for rank, (a, b) in enumerate(merges)}
        self._ranks = {pair: rank for rank, pair in self._pair_of.items()}

    def train(self, texts: Iterable[str]) -> None:
        """Learn `vocab_size` tokens from `texts`, or as many as there are pairs that occur twice."""
        floor = FIRST_MERGE
        if self.requested_size > 1 << 17:
            raise UserError(f"vocab_size={self.requested_size} is not possible: at most {1 << 17} can be learned")
        if self.requested_size < floor:
            warnings.warn(f"vocab_size={self.requested_size} is below the floor of {floor} (256 bytes and "
                          f"{len(SPECIAL_TOKENS)} special tokens): using {floor}", stacklevel=2)
            self.requested_size = floor
        texts = iter([texts] if isinstance(texts, str) else texts)
        batches = _batched(texts, len)
        first = list(itertools.islice(batches, 4))  # 2 MB or all there is: tells whether other processes pay
        words: Counter = Counter()
        size = sum(len(text) for batch in first for text in batch)
        for counts in parallel_map(_count_words, itertools.chain(first, batches), size):
            words.update(counts)
        self._set_merges(learn_merges(words, self.requested_size - floor))

    def _merge_bytes(self, text: str) -> str:
        return self._merge("".join(map(self._byte_symbols.__getitem__, text.encode("utf-8", "surrogateescape"))))

    def _merge(self, symbols: str) -> str:
        """Apply the merges: always the one learned first, from left to right."""
        if len(symbols) > 30:
            return self._merge_long(symbols)
        ranks, none, at_once = self._ranks, "\U0010ffff", 1 if self._source else -1
        while len(symbols) > 1:
            first = min(map(ranks.get, map(str.__add__, symbols, symbols[1:]), itertools.repeat(none)))
            if first == none:
                break
            # One after another where what it makes may merge with its neighbour before the next of its kind: in an
            # imported tokenizer, whose ranks need not be the order in which tokens came into being.
            symbols = symbols.replace(self._pair_of[first], self._joined[first], at_once)
        return symbols

    def _merge_long(self, symbols: str) -> str:
        """The same for long words: a queue of the pairs, by rank and place."""
        parts, n = list(symbols), len(symbols)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        queue = [(rank, i) for i in range(n - 1) if (rank := self._ranks.get(parts[i] + parts[i + 1]))]
        heapq.heapify(queue)
        while queue:
            rank, i = heapq.heappop(queue)
            j = after[i]
            if j == n or self._ranks.get(parts[i] + parts[j]) != rank:
                continue  # one of the two has merged meanwhile
            parts[i], parts[j], after[i] = self._joined[rank], "", after[j]
            if after[i] < n:
                before[after[i]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < n and (rank := self._ranks.get(parts[left] + parts[right])):
                    heapq.heappush(queue, (rank, left))
        return "".join(parts)

    def encode(self, text: str | bytes, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`, after BOS if `add_special_tokens`. Bytes need not be UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        words = self._split(text) if self._added is None else itertools.chain.from_iterable(
            [part] if self._added.fullmatch(part) else self._split(part) for part in self._added.split(text))
        ids = list(map(ord, "".join(map(self._words.__getitem__, words))))
        return [self.bos_id, *ids] if add_special_tokens and self.bos_id is not None else ids

    def encode_batch(self, texts: Iterable[str | bytes], add_special_tokens: bool = False) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special tokens have none."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for i in ids:
            if not 0 <= i < len(self.token_bytes):
                raise UserError(f"token id {i} is outside the vocabulary, 0 … {len(self.token_bytes) - 1}")
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if skip_special_tokens:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        runs = itertools.groupby(ids, lambda i: i if i in self.special_tokens else None)
        return "".join(self.decode(run) if special is None else self.special_tokens[special] * len(list(run))
                       for special, run in runs)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` a message; the generation prompt opens the assistant's."""
        ids = self.encode_chat(messages)[0]
        return ids + [self.im_start_id, *self.encode("assistant\n")] if add_generation_prompt else ids

    def encode_chat(self, messages: list[dict], first: int = 0) -> tuple[list[int], list[bool]]:
        """The template's ids, and which are the assistant's own (content and end-of-turn) from message `first` on."""
        if self.im_start_id is None or self.im_end_id is None:
            raise UserError("this tokenizer can not hold conversations: it has no <|im_start|> and <|im_end|>")
        newline, ids, own = self.encode("\n"), [], []
        for i, message in enumerate(messages):
            role, content = message["role"] + "\n", message["content"]
            # in one piece, as transformers encode it, but for an answer, which the model begins after the newline
            texts = (role, content) if message["role"] == "assistant" else (role + content, "")
            head, body = [self.im_start_id, *self.encode(texts[0])], [*self.encode(texts[1]), self.im_end_id]
            ids += head + body + newline
            own += [False] * len(head) + [message["role"] == "assistant" and i >= first] * len(body)
            own += [False] * len(newline)
        return ids, own

    def decode_chat(self, ids: list[int]) -> list[dict]:
        """The messages that `apply_chat_template` made into `ids`; a generation prompt is left out."""
        starts = [i for i, token in enumerate(ids) if token == self.im_start_id]
        turns = [ids[start + 1:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
        parts = [self.decode(turn[:turn.index(self.im_end_id)]).partition("\n") for turn in turns
                 if self.im_end_id in turn]
        return [{"role": role, "content": content} for role, _, content in parts]

    def to_json(self) -> str:
        """The Hugging Face `tokenizer.json`. Equal tokenizers give equal text."""
        if self._source:
            return self._source[0]
        spell = lambda token: "".join(map(_BYTE_TO_CHAR.__getitem__, token))  # noqa: E731
        vocab = {text: i for i, text in enumerate(SPECIAL_TOKENS)}
        vocab |= {spell(token): i for i, token in enumerate(self.token_bytes) if i >= FIRST_BYTE}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIAL_TOKENS)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": [[spell(a), spell(b)] for a, b in self.merges]},
        }, ensure_ascii=False, indent=1)

    def content_hash(self) -> str:
        described = self.to_json() + (json.dumps(self._source[1], sort_keys=True) if self._source else "")
        return hashlib.sha256(described.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json; of an imported one, its tokenizer_config.json beside it."""
        with atomic_write(path) as file:
            file.write(self.to_json().encode())
        if self._source:
            with atomic_write(Path(path).with_name("tokenizer_config.json")) as file:
                file.write(json.dumps(self._source[1], indent=1, ensure_ascii=False).encode())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what transformers' AutoTokenizer reads; it adds BOS and has the chat template, as here.

        There, text that looks like a special token becomes one, as in every tokenizer of transformers.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._source:
            self.save(folder / "tokenizer.json")
            return
        bos, first = SPECIAL_TOKENS[self.bos_id], {"Sequence": {"id": "A", "type_id": 0}}
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, first]
        post_processor = {"type": "TemplateProcessing", "single": single,
                          "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
                          "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  "bos_token": bos, "eos_token": SPECIAL_TOKENS[self.eos_id], "pad_token": SPECIAL_TOKENS[self.pad_id],
                  "chat_template": CHAT_TEMPLATE}
        for name, content in (("tokenizer.json", json.loads(self.to_json()) | {"post_processor": post_processor}),
                              ("tokenizer_config.json", config)):
            with atomic_write(folder / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a tokenizer.json of byte-level BPE: one of `save`, or of the families of GPT-2, Llama 3, Qwen, SmolLM2.

        An imported one gives the ids that `tokenizers` gives (with encode_special_tokens = True). Its BOS is what its
        post-processor puts first; its EOS and padding are those of the tokenizer_config.json beside it, or usual ones.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text)
            if [token["content"] for token in data["added_tokens"]] != list(SPECIAL_TOKENS):
                config = Path(path).with_name("tokenizer_config.json")
                return cls._imported(data, text, read_json(config) if config.is_file() else {})
            merges = [_merge_of(pair) for pair in data["model"]["merges"]]
            tokenizer = cls(FIRST_MERGE + len(merges))
            tokenizer._set_merges(merges)
            same = json.loads(tokenizer.to_json()) == data | {"post_processor": None}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: it comes with every run and every model of Hugging Face") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path} is not a tokenizer.json of byte-level BPE: {error!r}") from error
        if not same:
            raise UserError(f"{path} is a tokenizer.json that MiniLLM did not write: its special tokens, word pattern "
                            "or vocabulary differ")
        return tokenizer

    @classmethod
    def _imported(cls, data: dict, text: str, config: dict) -> BPETokenizer:
        model, added = data["model"], data["added_tokens"]
        fixed = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                 "byte_fallback": False}
        for field, value in fixed.items():
            if model.get(field, value) not in (value, ""):
                raise UserError(f"model.{field}={model[field]!r} is not supported: it must be {value!r}")
        special = {token["id"]: token["content"] for token in added if token["special"]}
        plain = {token["content"]: token["id"] for token in added if not token["special"]}
        for token in added:
            if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
                raise UserError(f"added token {token['content']!r} with lstrip, rstrip or single_word is not supported")
        ids = {spelled: i for spelled, i in model["vocab"].items() if i not in special and spelled not in plain}
        ids = {bytes(map(_CHAR_TO_BYTE.__getitem__, spelled)): i for spelled, i in ids.items()}
        for token in added:
            if not token["content"] or model["vocab"].get(token["content"], token["id"]) != token["id"]:
                raise UserError(f"added token {token['content']!r} with id {token['id']} is not supported: it must "
                                "have a text, and the id of the vocabulary")
        numbers = [*ids.values(), *special, *plain.values()]
        if not all(isinstance(i, int) and 0 <= i < sys.maxunicode for i in numbers):
            raise UserError(f"a token's id is not in 0 … {sys.maxunicode - 1}")
        tokens = [b""] * (1 + max(numbers))
        for token, i in [*ids.items(), *((content.encode(), i) for content, i in plain.items())]:
            tokens[i] = token
        tokenizer = cls(len(tokens))
        tokenizer._source, tokenizer.special_tokens = (text, config), special
        tokenizer._set_tokens(tokens, [_merge_of(pair) for pair in model["merges"]], ids)
        tokenizer._split = _splitter(data.get("normalizer"), data.get("pre_tokenizer"))
        if plain:  # the longest first
            tokenizer._added = re.compile("(" + "|".join(map(re.escape, sorted(plain, key=len, reverse=True))) + ")")
        whole = {content: chr(i) for content, i in plain.items()}
        if model.get("ignore_merges"):  # a word that is a token is that token
            whole |= {token.decode(): chr(i) for token, i in ids.items() if _is_utf8(token)}
        tokenizer._words = _WordCache(lambda word: whole.get(word) or tokenizer._merge_bytes(word))
        by_content = {content: i for i, content in special.items()} | plain

        def named(field: str, *usual: str) -> int | None:
            given = config.get(field)
            given = given.get("content") if isinstance(given, dict) else given
            return next((by_content[name] for name in (given, *usual) if name in by_content), None)

        tokenizer.bos_id = _first_special(data.get("post_processor"), by_content)
        tokenizer.im_start_id, tokenizer.im_end_id = named("", "<|im_start|>"), named("", "<|im_end|>")
        eos = named("eos_token", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<|eos|>")
        if eos is None:
            raise UserError("no token ends a text: name an eos_token in tokenizer_config.json, beside it")
        pad = named("pad_token")
        tokenizer.eos_id, tokenizer.pad_id = eos, eos if pad is None else pad
        if tokenizer.im_start_id is not None:  # whatever its own template adds, here conversations are plain ChatML
            tokenizer._source = text, config | {"chat_template": CHAT_TEMPLATE}
        return tokenizer


def _merge_of(pair: str | list[str]) -> tuple[bytes, bytes]:
    """A merge of a tokenizer.json in either spelling, "a b" or ["a", "b"]."""
    a, b = pair.split(" ") if isinstance(pair, str) else pair
    return bytes(map(_CHAR_TO_BYTE.__getitem__, a)), bytes(map(_CHAR_TO_BYTE.__getitem__, b))


def _is_utf8(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


def _first_special(node: dict | None, ids: dict[str, int]) -> int | None:
    """The token that a post-processor puts before every text, if it does."""
    if node is None or node["type"] == "ByteLevel":
        return None
    if node["type"] == "Sequence":
        return next((i for i in (_first_special(child, ids) for child in node["processors"]) if i is not None), None)
    kinds = [next(iter(part)) for part in node["single"]] if node["type"] == "TemplateProcessing" else []
    if kinds not in (["Sequence"], ["SpecialToken", "Sequence"]):
        raise UserError(f"post_processor {node['type']} is not supported: it may put one special token before a text")
    return ids[node["single"][0]["SpecialToken"]["id"]] if len(kinds) == 2 else None


def _splitter(normalizer: dict | None, pre_tokenizer: dict | None) -> Callable[[str], list[str]]:
    """What a tokenizer.json does to a text before it merges, as one function: normalise, cut into words."""
    steps: list[Callable[[str], list[str]]] = []

    def add(node: dict) -> None:
        kind = node["type"]
        if kind == "Sequence":
            for child in node.get("normalizers") or node["pretokenizers"]:
                add(child)
        elif kind == "NFC":
            steps.append(lambda text: [unicodedata.normalize("NFC", text)])
        elif kind == "Digits" and node["individual_digits"]:
            steps.append(_isolator(r"\p{N}"))
        elif kind == "Split" and (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
            pattern = node["pattern"]
            steps.append(_isolator(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])))
        elif kind == "ByteLevel" and not node["add_prefix_space"]:
            if node.get("use_regex", True):
                steps.append(_isolator(GPT2_PATTERN))
        else:
            raise UserError(f"{kind} {dict(node)} before the merges is not supported: it may be NFC, Split, Digits "
                            "(individual) and ByteLevel (without add_prefix_space)")

    for node in (normalizer, pre_tokenizer):
        if node is not None:
            add(node)

    if "'ByteLevel'" not in repr(pre_tokenizer):
        raise UserError("a pre_tokenizer without ByteLevel is not supported")

    def split(text: str) -> list[str]:
        words = [text]
        for step in steps:
            words = list(itertools.chain.from_iterable(map(step, words)))
        return words

    return split


def _isolator(pattern: str) -> Callable[[str], list[str]]:
    """Cut a text into what a regular expression of `tokenizers` matches, and what lies between."""
    compiled = re.compile(_python_pattern(pattern))

    def isolate(text: str) -> list[str]:
        spans = [match.span() for match in compiled.finditer(text)]
        cuts = sorted({0, len(text), *itertools.chain.from_iterable(spans)})
        return [text[a:b] for a, b in itertools.pairwise(cuts)]

    return isolate


@functools.lru_cache
def _unicode_class(category: str) -> str:
    """The characters of a general category (L, Lu, N …) as the inside of a [class] of Python's `re`.

    `tokenizers` knows Unicode 16, an older Python less: of what came later, the Chinese characters are added here.
    """
    later = {*range(0x2EBF0, 0x2EE5E), *range(0x31350, 0x323B0)} if "Lo".startswith(category) else ()
    inside = [i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith(category) or i in later]
    runs = itertools.groupby(enumerate(inside), lambda pair: pair[1] - pair[0])
    spans = [[i for _, i in run] for _, run in runs]
    return "".join(f"{re.escape(chr(span[0]))}-{re.escape(chr(span[-1]))}" for span in spans)


def _python_pattern(pattern: str) -> str:
    r"""A regular expression of `tokenizers` for Python's `re`, which has no \p{L}, and another \s."""
    out, inside = "", False
    for token, category in re.findall(r"(\\[pP]\{(\w+)\}|\\.|\[\^?|[^\\\[])", pattern, re.S):
        chars = _unicode_class(category) if category else {
            "\\s": _SPACE, "\\S": _SPACE, "\\d": _unicode_class("Nd")}.get(token)
        if category and not chars or token[0] == "\\" and token[1:].isalnum() and not chars and token[1] not in "rnt" \
                or inside and token[0] == "[" or "&&" in pattern:
            raise UserError(f"the pattern {pattern!r} is not supported: it has {token}")
        if chars is None:
            inside = token[0] == "[" or inside and token != "]"
            out += token
        elif inside and token[1] in "SP":
            raise UserError(f"the pattern {pattern!r} is not supported: it has {token} in a class")
        else:
            out += chars if inside else f"[^{chars}]" if token[1] in "SP" else f"[{chars}]"
    try:
        re.compile(out)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not supported: {error}") from error
    return out


# ======================================================================================================================
# 3 Data: files -> records -> documents -> a memory-mapped stream of token ids -> batches.
# ======================================================================================================================

LONGEST_RECORD = 1 << 26  # characters of a line of JSON: more is no record but a mistake
SUFFIXES = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]").search
TOKENIZER_BYTES = 20_000_000  # a tokenizer learns from at most about so much text, evenly picked


def path_list(paths: str | Path | list) -> list[Path]:
    return [Path(path) for path in (paths if isinstance(paths, (list, tuple)) else [paths])]


def data_files(paths: str | Path | list) -> list[Path]:
    """The data files that `paths` name: files as they are, of directories every .txt/.json/.jsonl(.gz), sorted."""
    files: list[Path] = []
    for path in path_list(paths):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
            if not found:
                raise UserError(f"{path}: a directory without any data file ({', '.join(SUFFIXES)})")
            files += found
        elif not path.exists():
            raise UserError(f"{path}: no such file or directory (data is a {', '.join(SUFFIXES)} file or a directory)")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of data file, allowed are {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(files: list[Path], *rules: object) -> str:
    """A name for what `rules` make of the content of `files`; rules may be source code, so that a hack counts."""
    content = [(is_plain_text(path), hash_file(path)) for path in files]
    return hashlib.sha256(repr((content, rules)).encode()).hexdigest()[:24]


def is_plain_text(path: Path) -> bool:
    return path.name.endswith((".txt", ".txt.gz"))


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[typing.TextIO]:
    """Open UTF-8 text, .gz or not, without BOM and with \\n line ends; a UserError says where it is not UTF-8."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        with opener(path, "rb") as file:
            decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
            while chunk := file.read(1 << 20):
                held = len(decoder.getstate()[0])
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as bad:
                    raise UserError(f"{path}: byte {read - held + bad.start} is not UTF-8 ({bad.reason}): convert the "
                                    "file, for example with iconv") from error
                read += len(chunk)
        raise UserError(f"{path}: ends inside a UTF-8 character") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged .gz file ({error})") from error


def read_text(path: Path, chunk_chars: int = 1 << 20) -> Iterator[str]:
    """A text file in pieces of about `chunk_chars` characters, cut where no word of the tokenizer is cut."""
    with open_text(path) as file:
        rest = ""
        while chunk := file.read(chunk_chars):
            rest += chunk
            cut = None
            for start in (max(0, len(rest) - 1000), 0):  # a cut is nearly always near the end
                for match in _SAFE_CUT.finditer(rest, start):
                    cut = match.start()
                if cut:
                    break
            if not cut and len(rest) >= 4 * chunk_chars:
                cut = len(rest)  # millions of characters without a blank: memory matters more than that word
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


class BadRecords:
    """What to do about malformed records: stop with file:line, or skip them, count, and say so at the end."""

    def __init__(self, policy: str) -> None:
        self.policy, self.count, self.first = policy, 0, ""

    def add(self, where: str, problem: str) -> None:
        if self.policy == "stop":
            raise UserError(f"{where}: {problem} (--on-bad-record skip goes on without such records)")
        self.count, self.first = self.count + 1, self.first or f"{where}: {problem}"

    def report(self) -> None:
        if self.count:
            warnings.warn(f"skipped {self.count} malformed records, the first at {self.first}", stacklevel=3)


def record_kind(record: object) -> str | None:
    """text, chat, preference or prompt, by the record's content (README lists the forms); None is none of them."""
    if not isinstance(record, dict):
        return None
    for kind, keys in (("preference", ("chosen", "rejected")), ("chat", ("messages",)), ("chat", ("conversations",)),
                       ("chat", ("instruction", "output")), ("chat", ("prompt", "completion")),
                       ("chat", ("input", "output")), ("prompt", ("prompt",)), ("text", ("text",))):
        if all(key in record for key in keys):
            return kind
    return None


def read_records(path: Path, bad: BadRecords) -> Iterator[tuple[str, dict]]:
    """(file:line, record) for every JSON object of a .jsonl, or of a .json holding one object, a list or lines."""
    def parse(text: str, line: int) -> Iterator[tuple[str, object]]:
        try:
            yield f"{path}:{line}", json.loads(text)
        except json.JSONDecodeError as error:
            bad.add(f"{path}:{line + error.lineno - 1}:{error.colno}", f"not JSON: {error.msg}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
            bad.add(f"{path}:{line}", f"JSON that can not be read: {error}")

    def parse_all(file: typing.TextIO) -> Iterator[tuple[str, object]]:
        whole_file = 16 * LONGEST_RECORD  # what may be read at once; a larger .json must be lines
        if ".jsonl" not in path.name and len(text := file.read(whole_file + 1)) <= whole_file:
            try:
                whole = json.loads(text)
            except (ValueError, RecursionError) as error:
                if getattr(error, "msg", "") != "Extra data":  # values one after another are lines, whatever the name
                    yield from parse(text, 1)
                    return
            else:
                items = whole if isinstance(whole, list) else [whole]
                yield from ((f"{path}[{i}]", record) for i, record in enumerate(items))
                return
        file.seek(0)
        for line in itertools.count(1):
            text = file.readline(LONGEST_RECORD + 1)
            if len(text) > LONGEST_RECORD:
                raise UserError(f"{path}:{line}: a line of more than {LONGEST_RECORD:,} characters: one record a line")
            if not text:
                return
            if text.strip():
                yield from parse(text.rstrip(), line)

    with open_text(path) as file:
        for where, record in parse_all(file):
            kind = record_kind(record)
            if kind is None:
                found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
                bad.add(where, f"unknown form of record ({found or 'empty object'}): allowed are objects with text, "
                               "messages, conversations, instruction+output, prompt(+completion), chosen+rejected")
            elif kind == "text" and not isinstance(record["text"], str):
                bad.add(where, f"\"text\" must be a string, not {type(record['text']).__name__}")
            elif _LONE_SURROGATE(json.dumps(record, ensure_ascii=False)):
                bad.add(where, "an escape \\ud800 … \\udfff without its other half is no character")
            else:
                yield where, record


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "tool": "tool", "observation": "tool"}


def as_messages(value: object, role: str) -> list[dict]:
    """A text said by `role`, one message or a list of them ({role, content} or {from, value}), as {role, content}."""
    messages = []
    for item in value if isinstance(value, list) else [value]:
        item = {"role": role, "content": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise ValueError(f"a message must be an object with role and content, not {type(item).__name__}")
        who, said = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(who, str) or who not in ROLES or not isinstance(said, str):
            raise ValueError(f"a message needs a role (or from), one of {', '.join(ROLES)}, and a content (or value) "
                             f"of type string: found {str(item)[:80]}")
        messages.append({"role": ROLES[who], "content": said})
    return messages


def with_system(record: dict, messages: list[dict]) -> list[dict]:
    """Messages behind the record's own system prompt, if it has one; their order is checked."""
    messages = as_messages(record.get("system") or [], "system") + messages
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message may only come first")
    for a, b in itertools.pairwise(roles):
        if a == b != "tool":
            raise ValueError(f"roles out of order: two {a} messages one after the other")
    return messages


def chat_messages(record: dict) -> list[dict]:
    """The messages of a chat record in any of its forms; a ValueError says what is wrong with it."""
    if "messages" in record or "conversations" in record:
        messages = as_messages(record.get("messages", record.get("conversations")), "user")
    elif "completion" in record and "prompt" in record:
        messages = as_messages(record["prompt"], "user") + as_messages(record["completion"], "assistant")
    else:
        history, ask = record.get("history") or [], [record.get("instruction") or "", record.get("input") or ""]
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError("\"history\" must be a list of pairs [question, answer]")
        if not all(isinstance(text, str) for text in ask):
            raise ValueError('"instruction" and "input" must be strings')
        said = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
        said += [("user", "\n".join(filter(None, ask))), ("assistant", record["output"])]
        messages = [message for role, text in said for message in as_messages(text, role)]
    messages = with_system(record, messages)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("a conversation without an assistant message holds nothing to train on")
    return messages


def preference_messages(record: dict) -> tuple[list[dict], list[dict], list[dict]]:
    """(prompt, chosen, rejected) of a preference record. What both sides begin with belongs to the prompt."""
    prompt, sides = record.get("prompt") or [], [record["chosen"], record["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, str) and all(len(prompt) < len(side) and side.startswith(prompt) for side in sides):
            sides = [side[len(prompt):] for side in sides]
        elif not prompt and all(re.match(r"\s*Human: ", side) for side in sides):  # Anthropic's transcripts
            sides = [[{"from": {"Human": "human", "Assistant": "gpt"}[who], "value": said.strip()} for who, said in
                      re.findall(r"(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", side, re.S)]
                     for side in sides]
    prompt, (chosen, rejected) = as_messages(prompt, "user"), (as_messages(side, "assistant") for side in sides)
    if prompt and chosen[:len(prompt)] == rejected[:len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    while chosen and rejected and chosen[0] == rejected[0]:
        prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant":
            raise ValueError(f"\"{name}\" must end with an answer of the assistant that the other side does not share")
        with_system(record, prompt + side)
    return with_system(record, prompt), chosen, rejected


def before_answer(messages: list[dict]) -> list[dict]:
    """What stands before the last assistant turn."""
    return messages[:max(i for i, message in enumerate(messages) if message["role"] == "assistant")]


def last_content(messages: list[dict]) -> str:
    """What was said last, "" of an empty conversation: an answer may stand alone."""
    return messages[-1]["content"] if messages else ""


def prompt_messages(record: dict) -> list[dict]:
    """What the assistant has to answer: a record's prompt, or a conversation less its last assistant turn."""
    if record_kind(record) == "prompt":
        messages = with_system(record, as_messages(record["prompt"], "user"))
    else:
        messages = before_answer(chat_messages(record))
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("a prompt must end with a message to answer")
    return messages


def checkable_answer(record: dict) -> str:
    """The record's "answer" or "gt": a text, a number, or a list of answers that count, one a line; "" without one."""
    answer = record.get("answer", record.get("gt"))
    answers = [] if answer is None else answer if isinstance(answer, list) else [answer]
    if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in answers):
        raise ValueError(f"\"answer\" must be a text, a number or a list of them, not {str(answer)[:80]}")
    return "\n".join(map(str, answers))


def answer_matches(reply: str, answer: str) -> bool:
    """Whether the reply's first sentence is the answer (one of the lines of `answer`), in any case.

    >>> answer_matches("Tom. I hope that helps!", "tom"), answer_matches("是小明。", "小明"), answer_matches("3.5", "3")
    (True, False, False)
    """
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    def sentence(text: str) -> str:
        return plain(re.split(r"[。！？!?\n]|\.(?![0-9])", text.strip(), maxsplit=1)[0])

    for one in answer.split("\n"):
        whole, said = plain(one).rstrip("。！？!?."), plain(reply)
        if sentence(one) != whole:  # the end of a sentence inside, as in Mr. Smith
            if whole and said.startswith(whole) and not said[len(whole):len(whole) + 1].isalnum():
                return True
        elif whole and sentence(reply) == whole:
            return True
    return False


def in_validation(key: str) -> bool:
    """Whether a document is one of the tenth set aside for validation: its content alone decides."""
    return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) % 10 == 0


Piece = tuple[str, str, bool, bool]  # (train or val, text, begins a document, ends it)


def text_pieces(path: Path, split: str, alone: bool) -> Iterator[Piece]:
    """A .txt file, which is one document. A lone one is split: its last tenth of characters is for validation."""
    total = sum(map(len, read_text(path)))
    if split == "all":
        cut = total
    else:
        cut = int(total * 0.9) if alone else 0 if in_validation(hash_file(path)) else total
    at = 0
    for text in read_text(path):
        k = max(0, cut - at)
        for target, part, begin, end in (("train", text[:k], 0, cut), ("val", text[k:], cut, total)):
            if part:
                yield target, part, at == begin, at + len(part) == end
                at += len(part)


WANTED = {"text": 'text: .txt files and {"text": …}', "chat": 'conversations: {"messages": […]} and its kin',
          "preference": 'pairs: {"prompt", "chosen", "rejected"}',
          "prompt": '{"prompt"} records, or conversations where no file has any'}


def select(files: list[Path], named: set[Path], kind: str, bad: BadRecords, wanted: str = ""
           ) -> Iterator[tuple[Path, str, dict | None]]:
    """(file, file:line, record) for the records of a kind; (file, "", None) for a .txt file, if that kind is text.

    A file without any is an error if the user `named` it, and passed over if it only stands in a directory. `wanted`:
    the kind that the error speaks of, if it is not this one.
    """
    total = 0
    for path in files:
        kinds: Counter = Counter()
        records = [("", None)] if is_plain_text(path) else read_records(path, bad)
        for where, record in records:
            found = "text" if record is None else record_kind(record)
            kinds[found] += 1
            if found == kind:
                yield path, where, record
        total += kinds[kind]
        if not kinds[kind] and path in named:
            raise UserError(f"{path}: nothing for this stage, but {', '.join(kinds) or 'no'} records: it takes "
                            f"{WANTED[wanted or kind]}")
    bad.report()
    if not total:
        raise UserError(f"nothing for this stage in {', '.join(map(str, files))}: it takes {WANTED[wanted or kind]}")


def kinds_of(paths: str | Path | list) -> dict[str, int]:
    """How many records of each kind the files hold."""
    kinds: Counter = Counter()
    for path in data_files(paths):
        if is_plain_text(path):
            kinds["text"] += 1
        else:
            kinds.update(record_kind(record) for _, record in read_records(path, BadRecords("skip")))
    return dict(kinds)


def documents(files: list[Path], named: set[Path], split: str, on_bad_record: str) -> Iterator[Piece]:
    """The pieces of every document of the text records and .txt files among `files`."""
    total = 0
    for path, _, record in select(files, named, "text", BadRecords(on_bad_record)):
        if record is None:
            for piece in text_pieces(path, split, len(files) == 1):
                total += 1
                yield piece
        elif record["text"]:
            total += 1
            yield "val" if split != "all" and in_validation(record["text"]) else "train", record["text"], True, True
    if not total:
        raise UserError(f"no text to train on in {', '.join(map(str, files))}: all of it is empty")


def sample_texts(files: list[Path], split: str, on_bad_record: str) -> Iterator[str]:
    """Text for a tokenizer to learn from: every string in the data but validation text; an even part of large data."""
    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    def all_texts() -> Iterator[str]:
        bad = BadRecords(on_bad_record)
        for path in files:
            if is_plain_text(path):
                pieces = text_pieces(path, split, len(files) == 1)
                yield from (text for target, text, _, _ in pieces if target == "train")
            else:
                for _, record in read_records(path, bad):
                    if record_kind(record) != "text":
                        yield from strings(record)
                    elif split == "all" or not in_validation(record["text"]):
                        yield record["text"]

    size = sum(f.stat().st_size * (4 if f.name.endswith(".gz") else 1) for f in files)
    yield from itertools.islice(all_texts(), 0, None, max(1, round(size / TOKENIZER_BYTES)))


class TokenizerManager:
    """Trains a tokenizer once for each content of the data, and finds it again by that content's hash."""

    def __init__(self, cache_dir: str | Path = "out/cache") -> None:
        self.cache_dir = Path(cache_dir)

    def get_or_train_tokenizer(self, data_path: str | Path | list, vocab_size: int = 4096, split: str = "train",
                               on_bad_record: str = "stop") -> BPETokenizer:
        """A tokenizer of `vocab_size` tokens for `data_path` (a file, a directory or a list of them).

        With split="train" it never sees the validation part of the data, with "all" it learns from the whole.
        """
        files = data_files(data_path)
        key = content_key(files, vocab_size, split, on_bad_record, WORD_PATTERN, *map(inspect.getsource, (
            learn_merges, sample_texts, read_text, read_records)))
        path = self.cache_dir / f"tokenizer-{key}.json"
        if path.exists():
            return BPETokenizer.load(path)
        tokenizer = BPETokenizer(vocab_size)
        tokenizer.train(sample_texts(files, split, on_bad_record))
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
        return tokenizer


_worker_tokenizer: BPETokenizer | None = None  # set in each child of the encoder, once


def _set_worker_tokenizer(tokenizer: BPETokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_pieces(pieces: list[Piece]) -> dict[str, bytes]:
    """Each split's ids as raw numbers of two or four bytes."""
    tokenizer = _worker_tokenizer
    ids = {split: array.array("H" if tokenizer.vocab_size <= 1 << 16 else "I") for split in ("train", "val")}
    for split, text, begins, ends in pieces:
        ids[split].extend(tokenizer.encode(text, add_special_tokens=begins))
        if ends:
            ids[split].append(tokenizer.eos_id)
    return {split: values.tobytes() for split, values in ids.items()}


def encode_once(files: list[Path], rules: tuple, names: tuple[str, ...], items: Iterable, encode: Callable,
                size: Callable[[object], int], tokenizer: BPETokenizer, cache_dir: str | Path) -> list[Path]:
    """The files KEY.NAME under `cache_dir` for each of `names`, keyed by the content of `files`, `rules` and tokenizer.

    Made once, in parallel and in pieces: `encode` turns a list of `items` into {name: bytes to append}.
    """
    cache_dir = Path(cache_dir)
    key = content_key(files, rules, tokenizer.content_hash(), *map(inspect.getsource, (
        text_pieces, read_text, read_records, select, in_validation, encode)))
    targets = [cache_dir / f"{key}.{name}" for name in names]
    if not all(target.exists() for target in targets):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            out = {name: stack.enter_context(atomic_write(target)) for name, target in zip(names, targets, strict=True)}
            work = sum(f.stat().st_size for f in files)
            for encoded in parallel_map(encode, _batched(items, size), work, _set_worker_tokenizer, (tokenizer,)):
                for name, values in encoded.items():
                    out[name].write(values)
    return targets


def open_encoded(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file of numbers as a memory-mapped (N,) tensor."""
    size = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)


def check_part(part: torch.Tensor, files: list[Path], split: str) -> None:
    if not len(part):
        raise UserError(f"{', '.join(map(str, files))}: the {split} part is empty: there is too little to set a tenth "
                        "of it aside: give validation data of its own with --val-data")


def encode_corpus(paths: str | Path | list, tokenizer: BPETokenizer, split: str = "train",
                  cache_dir: str | Path = "out/cache", on_bad_record: str = "stop") -> tuple[torch.Tensor, str]:
    """The token ids of a split of a corpus, as one memory-mapped (N,) tensor of uint16 or uint32, and the corpus's key.

    Encoded once into a file under `cache_dir`. Every document stands between BOS and EOS. `split`: "train" and "val"
    share a corpus (val is the last tenth of the characters of one .txt, otherwise the documents whose content hash says
    so), "all" takes it whole.
    """
    files, named = data_files(paths), set(path_list(paths))
    rules = (split == "all", [path in named for path in files], on_bad_record, inspect.getsource(documents))
    train, val = encode_once(files, rules, ("train", "val"), documents(files, named, split, on_bad_record),
                             _encode_pieces, lambda piece: len(piece[1]), tokenizer, cache_dir)
    path = val if split == "val" else train
    tokens = open_encoded(path, torch.uint16 if tokenizer.vocab_size <= 1 << 16 else torch.uint32)
    check_part(tokens, files, split)
    return tokens, path.name


Example = tuple[str, list]  # (train or val, three sequences, each a text or (messages, first message to train on))


def examples(files: list[Path], named: set[Path], kind: str, split: str, on_bad_record: str) -> Iterator[Example]:
    """Every record of a kind as three sequences.

    chat: conversation, answer, category; preference: prompt with chosen, prompt with rejected, category; prompt: the
    messages to answer, answer, category. A prompt decides the split, so that no question is on both sides.
    """
    bad = BadRecords(on_bad_record)
    as_chat = kind == "prompt" and "prompt" not in kinds_of(files)
    for _, where, record in select(files, named, "chat" if as_chat else kind, bad, kind):
        try:
            category = str(record.get("category", ""))
            if kind == "preference":
                prompt, chosen, rejected = preference_messages(record)
                parts = [(prompt + chosen, len(prompt)), (prompt + rejected, len(prompt)), category]
            elif kind == "chat":
                messages = chat_messages(record)
                prompt, parts = before_answer(messages), [(messages, 0), checkable_answer(record), category]
            else:
                prompt = prompt_messages(record)
                parts = [(prompt, None), checkable_answer(record), category]
        except (ValueError, TypeError) as error:
            bad.add(where, str(error))
            continue
        target = "val" if split != "all" and in_validation(json.dumps(prompt, ensure_ascii=False)) else "train"
        yield target, parts


def _encode_examples(batch: list[Example]) -> dict[str, bytes]:
    """Each split's ids, twice the id and one more where it is trained, and the length of each sequence."""
    tokenizer, encoded = _worker_tokenizer, {}
    for split in ("train", "val"):
        tokens, lengths = array.array("i"), array.array("i")
        for sequence in (part for target, parts in batch if target == split for part in parts):
            if isinstance(sequence, str):
                values = [2 * i for i in tokenizer.encode(sequence)]
            elif sequence[1] is None:
                values = [2 * i for i in tokenizer.apply_chat_template(sequence[0], add_generation_prompt=True)]
            else:
                values = [2 * i + own for i, own in zip(*tokenizer.encode_chat(*sequence), strict=True)]
                del values[-len(tokenizer.encode("\n")):]  # end with the end-of-turn, as answers do that are sampled
            tokens.extend(values)
            lengths.append(len(values))
        encoded |= {split: tokens.tobytes(), split + ".lengths": lengths.tobytes()}
    return encoded


class BatchLoader:
    """What all loaders share: batches in an order that seed and epoch decide, and the exact cursor as `state_dict`."""

    fixed: tuple[str, ...] = ("seed", "seq_len")  # what the order depends on

    def __init__(self, paths: str | Path | list, corpus: str, batch_size: int, seq_len: int, split: str,
                 shuffle: bool | None, seed: int) -> None:
        self.corpus, self.batch_size, self.seq_len, self.seed = corpus, batch_size, seq_len, seed
        self.source = {"paths": [str(path.absolute()) for path in path_list(paths)], "split": split}  # for config.json
        self.shuffle = split != "val" if shuffle is None else shuffle
        self.epoch = self.index = 0  # items of this epoch that have been given out

    def generator(self) -> torch.Generator:
        """This epoch's source of chance."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)

    def rewind(self) -> None:
        self.epoch = self.index = 0

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("epoch", "index", "corpus", *self.fixed)}

    def load_state_dict(self, state: dict) -> None:
        if state["corpus"] != self.corpus:
            raise UserError("the data, its split or the tokenizer are not those of the checkpoint: give the same "
                            "--data and --val-data as before")
        for name in self.fixed:
            if state[name] != getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)}, but the checkpoint stands in an epoch with "
                                f"{name}={state[name]}: give that")
        self.epoch, self.index = state["epoch"], state["index"]


class PretrainDataLoader(BatchLoader):
    """Batches of blocks of `seq_len` + 1 consecutive tokens; neighbours share a token, so that each is predicted once.

    Iterating gives {"input_ids", "labels"}, both (B, seq_len + 1) int64 and equal, until the epoch ends; the next
    iteration is the next epoch. Shuffled blocks start at an offset that changes with the epoch. `state_dict` is the
    exact cursor. In order (`shuffle=False`) nothing is left out: the last rows may be fewer, and the last one shorter.
    """

    def __init__(self, paths: str | Path | list, tokenizer: BPETokenizer, batch_size: int = 16, seq_len: int = 256,
                 split: str = "train", *, shuffle: bool | None = None, seed: int = 0,
                 cache_dir: str | Path = "out/cache", on_bad_record: str = "stop") -> None:
        self.tokens, corpus = encode_corpus(paths, tokenizer, split, cache_dir, on_bad_record)
        super().__init__(paths, corpus, batch_size, seq_len, split, shuffle, seed)
        if len(self.tokens) < 2 or self.shuffle and len(self.tokens) <= seq_len:
            raise UserError(f"{', '.join(self.source['paths'])}: the {split} part holds {len(self.tokens)} tokens, "
                            f"fewer than seq_len={seq_len} and one: give more data, or a smaller --seq-len")

    def _starts(self) -> torch.Tensor:
        """Where this epoch's blocks start, in the order in which they are given out."""
        T, n = self.seq_len, len(self.tokens)
        if not self.shuffle:
            return torch.arange(0, n - 1, T)
        draw = self.generator()
        offset = int(torch.randint(0, min(T, n - T), (), generator=draw)) if self.epoch else 0
        blocks = (n - 1 - offset) // T
        starts = offset + T * torch.randperm(blocks, generator=draw)
        return starts if blocks < self.batch_size else starts[:blocks - blocks % self.batch_size]

    def __len__(self) -> int:
        return -(-len(self._starts()) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        starts, T = self._starts().tolist(), self.seq_len
        while self.index < len(starts):
            rows = [self.tokens[i:i + T + 1].long() for i in starts[self.index:self.index + self.batch_size]]
            if len(rows) > 1 and len(rows[-1]) < T + 1:
                rows.pop()  # the short end of the stream comes alone
            self.index += len(rows)
            batch = torch.stack(rows)  # (B, T + 1)
            yield {"input_ids": batch, "labels": batch}
        self.epoch, self.index = self.epoch + 1, 0


class RecordDataLoader(BatchLoader):
    """Batches of records of a `kind`, each three sequences of ids (see `examples`); a subclass makes the batches.

    `paths` are files and directories; every record form of the README is recognised. `items` are the records in use:
    those too long for `seq_len` are left out (or shortened by the subclass), with one warning that counts them.
    """

    kind, fixed, too_long = "", ("seed", "seq_len", "batch_size"), 0
    window = 16  # batches whose records are sorted by length together

    def __init__(self, paths: str | Path | list, tokenizer: BPETokenizer, batch_size: int = 16, seq_len: int = 256,
                 split: str = "train", *, shuffle: bool | None = None, seed: int = 0,
                 cache_dir: str | Path = "out/cache", on_bad_record: str = "stop") -> None:
        files, named = data_files(paths), set(path_list(paths))
        rules = (self.kind, split == "all", [path in named for path in files], on_bad_record, *map(inspect.getsource, (
            examples, chat_messages, preference_messages, prompt_messages, before_answer, checkable_answer, as_messages,
            with_system,
            BPETokenizer.encode_chat, BPETokenizer.apply_chat_template)))
        parts = ("train", "train.lengths", "val", "val.lengths")
        made = encode_once(files, rules, parts, examples(files, named, self.kind, split, on_bad_record),
                           _encode_examples, lambda item: len(str(item)), tokenizer, cache_dir)
        self.tokens, lengths = (open_encoded(path, torch.int32) for path in (made[2:] if split == "val" else made[:2]))
        check_part(lengths, files, split)
        super().__init__(paths, made[2 if split == "val" else 0].name, batch_size, seq_len, split, shuffle, seed)
        self.tokenizer = tokenizer
        self.ends = lengths.cumsum(0, dtype=torch.int64)
        self.lengths = lengths.view(-1, 3)[:, :2].amax(dim=1).tolist()  # of each record's longer sequence
        self.items = [i for i in range(len(lengths) // 3) if self.usable(i)]
        self.warn()
        if not self.items:
            raise UserError(f"{', '.join(self.source['paths'])}: none of {len(lengths) // 3} {self.kind} records fits "
                            f"{seq_len} tokens (--seq-len; of a prompt, what --answer-tokens leave)")

    def usable(self, i: int) -> bool:
        """Whether record i can be used; called once for each."""
        fits = self.lengths[i] <= self.seq_len
        self.too_long += not fits
        return fits

    def warn(self) -> None:
        if self.too_long:
            warnings.warn(f"{self.too_long} of {len(self.ends) // 3} {self.kind} records exceed {self.seq_len} tokens "
                          "and are left out", stacklevel=4)

    def sequence(self, i: int, part: int) -> torch.Tensor:
        """A sequence of record i as stored, (n,) int64: twice the id, and one more where it is trained."""
        k = 3 * i + part
        return self.tokens[int(self.ends[k - 1]) if k else 0:int(self.ends[k])].long()

    def text(self, i: int, part: int) -> str:
        return self.tokenizer.decode(self.sequence(i, part) >> 1)

    def order(self) -> list[int]:
        """The records of this epoch; shuffled, a batch's are of similar length, so that it needs little padding."""
        if not self.shuffle:
            return self.items
        draw, size = self.generator(), self.batch_size
        mixed = [self.items[i] for i in torch.randperm(len(self.items), generator=draw).tolist()]
        window = self.window * size
        windows = [sorted(mixed[i:i + window], key=self.lengths.__getitem__) for i in range(0, len(mixed), window)]
        batches = [window[i:i + size] for window in windows for i in range(0, len(window), size)]
        if len(batches) > 1 and len(batches[-1]) < size:
            batches.pop()  # a small batch would be a noisy step; its records have their turn in another epoch
        return [i for k in torch.randperm(len(batches), generator=draw).tolist() for i in batches[k]]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = self.order()
        while self.index < len(order):
            items = order[self.index:self.index + self.batch_size]
            self.index += len(items)
            yield self.collate(items)
        self.epoch, self.index = self.epoch + 1, 0

    def question(self, i: int) -> list[int]:
        """The ids that record i lets the assistant answer: all up to where its last answer begins."""
        row = self.sequence(i, 0)
        begins = ((row & 1).diff() == 1).nonzero()
        return ((row[:int(begins[-1]) + 1] if len(begins) else row) >> 1).tolist()

    def questions(self, limit: int) -> list[tuple[list[int], str]]:
        """The first `limit` questions that have a checkable answer, and that answer."""
        answered = (i for i in self.items if self.kind != "preference" and self.text(i, 1))
        return [(self.question(i), self.text(i, 1)) for i in itertools.islice(answered, limit)]


class ConversationDataLoader(RecordDataLoader):
    """Batches of conversations for SFT; only the assistant's content and end-of-turn are trained, in every turn.

    Gives {"input_ids", "labels" (-100 where not trained), "position_ids", "segments"}, each (B, T) int64, T at most
    `seq_len`. With `packing` a row holds several conversations: `segments` numbers them from 1 (0 is padding), and
    positions restart with each. A conversation that is too long loses whole turns at its end; if the first answer
    alone is too long, it is cut and lacks its end-of-turn.
    """

    kind, fixed = "chat", (*RecordDataLoader.fixed, "packing")

    def __init__(self, *args, packing: bool = True, **options) -> None:
        self.packing, self.shortened, self.cut, self.useless = packing, [], [], []
        super().__init__(*args, **options)

    def usable(self, i: int) -> bool:
        whole = self.sequence(i, 0)
        part = self.conversation(i)
        if len(part) < len(whole):
            (self.shortened if part[-1] == 2 * self.tokenizer.im_end_id + 1 else self.cut).append(i)
        if not (part & 1).any():
            self.useless.append(i)
        return bool((part & 1).any())

    def warn(self) -> None:
        if self.shortened or self.cut:
            warnings.warn(f"of {len(self.ends) // 3} conversations {len(self.shortened) + len(self.cut)} exceed "
                          f"{self.seq_len} tokens: {len(self.shortened)} lose turns at their end, {len(self.cut)} are "
                          f"cut and lack their end-of-turn, {len(self.useless)} of which hold nothing to train on and "
                          "are left out", stacklevel=4)

    def conversation(self, i: int) -> torch.Tensor:
        """Conversation i as stored, of at most `seq_len` tokens."""
        row = self.sequence(i, 0)
        if len(row) <= self.seq_len:
            return row
        row = row[:self.seq_len]
        ends = (row == 2 * self.tokenizer.im_end_id + 1).nonzero()
        return row[:int(ends[-1]) + 1] if len(ends) else row

    def report(self, count: int, colour: bool) -> str:
        """`count` conversations as the model will see them, what is trained in green (or «…»), and all lengths."""
        on, off = ("\033[32m", "\033[0m") if colour else ("«", "»")
        lines = []
        for i in range(min(count, len(self.ends) // 3)):
            row, lost = self.conversation(i), len(self.sequence(i, 0)) - len(self.conversation(i))
            own, ids = row & 1, (row >> 1).tolist()
            warned = {f"over-long: {lost} tokens beyond seq_len={self.seq_len} cut off": lost > 0,
                      "nothing to train on: left out": not own.any(),
                      "missing end-of-turn": i in self.cut and own.any(),
                      "doubled BOS": ids.count(self.tokenizer.bos_id) > 1}
            runs = itertools.groupby(zip(ids, own.tolist(), strict=True), key=lambda pair: pair[1])
            texts = [(trained, self.tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
                     for trained, run in runs]
            lines += [f"-- {i + 1}: {len(ids)} tokens, {int(own.sum())} trained"]
            lines += ["".join(on + text + off if trained else text for trained, text in texts).rstrip("\n")]
            lines += [f"   warning: {text}" for text, applies in warned.items() if applies]
        lengths = [len(self.sequence(i, 0)) for i in range(len(self.ends) // 3)]
        step = max(1, -(-max(lengths) // 12))
        bars = Counter(length // step for length in lengths)
        lines.append(f"lengths of {len(lengths)} conversations in tokens (seq_len {self.seq_len}):")
        scale = 50 / max(bars.values())
        lines += [f"{k * step:>6} … {(k + 1) * step - 1:<6}{bars[k]:>8} {'#' * round(scale * bars[k])}"
                  for k in range(max(bars) + 1)]
        return "\n".join(lines)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = self.order()
        while self.index < len(order):
            rows: list[list[torch.Tensor]] = []
            while self.index < len(order):
                new = self.conversation(order[self.index])
                room = [row for row in rows if self.packing and sum(map(len, row)) + len(new) <= self.seq_len]
                if room:
                    room[0].append(new)
                elif len(rows) < self.batch_size:
                    rows.append([new])
                else:
                    break
                self.index += 1
            yield self.collate(rows)
        self.epoch, self.index = self.epoch + 1, 0

    def collate(self, rows: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of conversations as stored -> a batch."""
        T = max(sum(map(len, row)) for row in rows)
        batch = {"input_ids": torch.full((len(rows), T), self.tokenizer.pad_id),
                 "labels": torch.full((len(rows), T), -100)}
        batch |= {name: torch.zeros(len(rows), T, dtype=torch.long) for name in ("position_ids", "segments")}
        for b, row in enumerate(rows):
            packed = torch.cat(row)
            n = len(packed)
            batch["input_ids"][b, :n] = packed >> 1
            batch["labels"][b, :n] = (packed >> 1).where(packed & 1 == 1, -100)
            batch["position_ids"][b, :n] = torch.cat([torch.arange(len(part)) for part in row])
            batch["segments"][b, :n] = torch.cat([torch.full_like(part, k) for k, part in enumerate(row, 1)])
        return batch


class DPODataLoader(RecordDataLoader):
    """Batches of preference pairs: "input_ids", "labels" (-100 outside the answers), "attention_mask", each (B, 2, T).

    Row 0 of a pair is prompt and chosen answer, row 1 prompt and rejected answer, both padded on the right. "category"
    (B,) indexes `categories`. Once a trainer has set `reference_logprobs` (pairs, 2), batches carry their rows of it.
    """

    kind = "preference"

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.categories, self.reference_logprobs = sorted({self.text(i, 2) for i in self.items}), None

    def collate(self, items: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.sequence(i, side) for i in items for side in (0, 1)]
        stored = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2 * self.tokenizer.pad_id)  # (2 B, T)
        real = torch.arange(stored.shape[1]) < torch.tensor([[len(row)] for row in rows])
        batch = {"input_ids": stored >> 1, "labels": (stored >> 1).where(stored & 1 == 1, -100),
                 "attention_mask": real.long()}
        batch = {name: value.view(len(items), 2, -1) for name, value in batch.items()}
        batch["category"] = torch.tensor([self.categories.index(self.text(i, 2)) for i in items])
        if self.reference_logprobs is not None:
            batch["reference_logprobs"] = self.reference_logprobs[items]
        return batch


class PromptDataLoader(RecordDataLoader):
    """Batches of prompts for PPO and GRPO: {"input_ids", "attention_mask", "answers"}, the first two (B, T).

    Prompts are padded on the left and have at most `seq_len` tokens. "answers": the checkable ones, "" where none is.
    """

    kind, window = "prompt", 1  # like lengths are like tasks: a step on one of them would unlearn the others

    def collate(self, items: list[int]) -> dict[str, torch.Tensor | list[str]]:
        return pad_left([self.question(i) for i in items], self.tokenizer.pad_id) | {
            "answers": [self.text(i, 1) for i in items]}


def pad_left(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of ids as {"input_ids", "attention_mask"}, both (B, T), padded on the left."""
    T = max(map(len, rows))
    return {"input_ids": torch.tensor([[pad_id] * (T - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])}


class LanguageModelingDataset(torch.utils.data.Dataset):
    """Texts as rows of `max_length` tokens for a plain torch DataLoader; long texts take several rows.

    An item is {"input_ids", "labels", "attention_mask"}, each (max_length,) int64: BOS text EOS, then padding, whose
    labels are -100. A text's next row begins with the last token of the row before, so that each token is predicted.
    """

    def __init__(self, texts: Iterable[str], tokenizer: BPETokenizer, max_length: int) -> None:
        if max_length < 2:
            raise UserError(f"max_length={max_length} is not possible: it must be 2 or more")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = [*tokenizer.encode(text, add_special_tokens=True), tokenizer.eos_id]
            rows += [ids[i:i + max_length] for i in range(0, len(ids) - 1, max_length - 1)]
        self.input_ids = torch.full((len(rows), max_length), tokenizer.pad_id)
        self.lengths = [len(row) for row in rows]
        for i, row in enumerate(rows):
            self.input_ids[i, :len(row)] = torch.tensor(row)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        real = torch.arange(self.input_ids.shape[1]) < self.lengths[i]
        return {"input_ids": self.input_ids[i], "labels": self.input_ids[i].where(real, torch.tensor(-100)),
                "attention_mask": real.long()}


# ======================================================================================================================
# 4 Model: a pre-norm Transformer with Hugging Face's Llama/Qwen3 conventions.
# ======================================================================================================================


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, and as before behind."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm with its gradient by hand: half of autograd's passes over memory, several times faster on a CPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if weight.dim() == 1 and x.device.type == "cpu":
            # layer norm's own kernel, told that the mean is 0; it still takes off what a mean would add to the gradient
            d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False])
            return d_x.add_((grad @ weight).unsqueeze(-1).mul(scale).div_(len(weight))), d_weight, None
        unit = x * scale
        d_weight = (grad * unit).flatten(0, -1 - weight.dim()).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(x.shape[-1])
        return grad.addcmul_(unit, along, value=-1).mul_(scale), d_weight, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32 or better (arXiv:1910.07467).

    `weight` may have further leading axes, one row a head: (D,) or (H, D) for x (…, H, D).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the mean of squares needs more than half precision
    if torch.is_grad_enabled():
        return _RMSNormFunction.apply(wide, weight.to(wide), eps).to(x.dtype)
    return F.rms_norm(wide, x.shape[-1:], None, eps).mul_(weight).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (…, in) · weightᵀ -> (…, out)."""
    rows, (n, width) = x.numel() // x.shape[-1], weight.shape
    if rows > 16 or n % 2 or x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_grad_enabled():
        return F.linear(x, weight)
    # A few rows on a CPU, as in decoding: MKL's matrix-vector products reach a quarter of memory's speed, the kernel of
    # batched products nearly all of it. So the weight becomes a batch of two halves.
    halves = torch.bmm(weight.view(2, n // 2, width), x.reshape(rows, width).T.expand(2, width, rows))
    return halves.view(n, rows).T.reshape(*x.shape[:-1], n).contiguous()  # from (2, n / 2, rows)


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(config: MiniGPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of rotary position embedding (arXiv:2104.09864), each (max_position_embeddings, D).

    YaRN (arXiv:2309.00071) stretches the slow waves by `factor`, leaves the fast ones, and blends between: a dimension
    counts as fast if it turns more than beta_fast times within the original context, as slow below beta_slow times.
    Llama 3 does so along another line between its high_freq_factor and low_freq_factor; linear stretches all of them.
    """
    D, base = config.head_dim, config.rope_theta
    inv_freq = 1.0 / base ** (torch.arange(0, D, 2, dtype=torch.float32) / D)  # (D / 2,)
    attention_factor = 1.0
    scaling = config.rope_scaling or {"rope_type": "linear", "factor": 1.0}
    factor, original = scaling["factor"], scaling.get("original_max_position_embeddings", 1)
    if scaling["rope_type"] == "linear":
        inv_freq = inv_freq / factor
    elif scaling["rope_type"] == "llama3":
        low, turns = scaling["low_freq_factor"], original / (2 * math.pi / inv_freq)
        fast = ((turns - low) / (scaling["high_freq_factor"] - low)).clamp(0, 1)
        inv_freq = (1 - fast) * inv_freq / factor + fast * inv_freq
    else:
        def dimension(turns: float) -> float:  # the dimension that turns so often within the original context
            return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        slow = ((torch.arange(D // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        inv_freq = inv_freq / factor * slow + inv_freq * (1 - slow)
        growth = 0.1 * math.log(factor)
        attention_factor = growth + 1.0
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention_factor = (growth * scaling["mscale"] + 1.0) / (growth * scaling["mscale_all_dim"] + 1.0)
        attention_factor = scaling.get("attention_factor", attention_factor)
    angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), inv_freq)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[d], x[d + D/2]) of x (B, T, H, D) by their angles; cos and sin broadcast as (B, T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """Keys and values, allocated once: for each layer two tensors (B, K, S, D), of which `length` slots are filled.

    With `position`, an int64 tensor (1,), one token goes into that slot and all S come back, for a mask to choose from:
    every shape is fixed then, as compiled code wants it.
    """

    def __init__(self, model: MiniGPT, batch_size: int, max_length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.k, self.v = ([weight.new_zeros(shape) for _ in model.layers] for _ in range(2))
        self.length, self.position = 0, None

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k and v (B, K, T, D) to a layer; all that it holds now comes back, (B, K, length + T, D)."""
        all_k, all_v, T = self.k[layer], self.v[layer], k.shape[2]
        if self.position is not None:
            return all_k.index_copy_(2, self.position, k), all_v.index_copy_(2, self.position, v)
        all_k.narrow(2, self.length, T).copy_(k)
        all_v.narrow(2, self.length, T).copy_(v)
        return all_k.narrow(2, 0, self.length + T), all_v.narrow(2, 0, self.length + T)

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was; there may be more rows than before, or fewer."""
        for layers in (self.k, self.v):
            for i, old in enumerate(layers):
                layers[i] = old if len(old) == len(rows) else old.new_zeros(len(rows), *old.shape[1:])
                layers[i][:, :, :self.length] = old[:, :, :self.length].index_select(0, rows)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245): H query heads share K key/value heads."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = Linear(config.hidden_size, (self.H + 2 * self.K) * self.D)  # one product for all
        self.o_proj = Linear(self.H * self.D, config.hidden_size)
        self.qk_norm, self.eps = config.qk_norm, config.rms_norm_eps
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.D, self.eps), RMSNorm(self.D, self.eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None,
                cache: KVCache | None, layer: int) -> torch.Tensor:
        B, T, _ = x.shape
        H, K, D = self.H, self.K, self.D
        qk, v = self.qkv_proj(x).view(B, T, H + 2 * K, D).split((H + K, K), dim=2)
        if self.qk_norm:
            weight = torch.cat((self.q_norm.weight.expand(H, D), self.k_norm.weight.expand(K, D)))
            qk = rms_norm(qk, weight, self.eps)
        q, k = apply_rope(qk, cos, sin).to(v.dtype).split((H, K), dim=2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        if T == 1:  # one query sees all that the mask lets it: a group's heads become its queries, nothing is copied
            out = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None,
                                                 enable_gqa=H != K).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, H * D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv:2002.05202), gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Each token visits its `num_experts_per_tok` likeliest experts and every shared one; no token is dropped.

    Routing is Qwen3-MoE's, the balance loss Switch Transformer's (arXiv:2101.03961), shared experts DeepSeekMoE's
    (arXiv:2401.06066). Tokens are sorted by expert, so that an expert's work is one product over its own.
    """

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(C, E)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))
        # the sum of n SwiGLUs is one of n times the width
        self.shared = SwiGLU(C, config.num_shared_experts * width) if config.num_shared_experts else None

    def route(self, x: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights and indices (N, k) of the experts of x (N, C), and the balance loss E · Σ f P over real tokens."""
        with torch.autocast(x.device.type, enabled=False):  # float32: a rounding error would send a token elsewhere
            probs = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)  # (N, E)
        weights, experts = probs.topk(self.k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if not self.training:
            return weights, experts, probs.new_zeros(())
        E = probs.shape[-1]
        counted = torch.ones(len(x), device=x.device) if real is None else real.flatten().float()  # (N,)
        share = torch.zeros(E, device=x.device).index_add_(0, experts.flatten(), counted.repeat_interleave(self.k))
        share = share / share.sum().clamp(min=1)  # f: of all visits, those to each expert
        mean_prob = (probs * counted[:, None]).sum(0) / counted.sum().clamp(min=1)  # P
        return weights, experts, E * (share * mean_prob).sum()

    def forward(self, x: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> its mixture (B, T, C) and the balance loss; `real` (B, T): tokens that are no padding."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        weights, experts, balance = self.route(flat, real)
        order = experts.flatten().argsort(stable=True)  # visits (N · k) in the order of their experts
        visits = flat.index_select(0, order // self.k)
        counts = experts.flatten().bincount(minlength=len(self.gate.weight)).tolist()
        outs = [self._expert(e, part) for e, part in enumerate(visits.split(counts)) if len(part)]
        outs = torch.cat(outs) * weights.flatten()[order, None].to(x.dtype)
        mixed = outs.new_zeros(flat.shape).index_add_(0, order // self.k, outs).view_as(x)
        return (mixed if self.shared is None else mixed + self.shared(x)), balance

    def _expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.down_proj[e])


class Block(nn.Module):
    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else SwiGLU(config.hidden_size,
                                                                             config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None = None,
                real: torch.Tensor | None = None, cache: KVCache | None = None, layer: int = 0
                ) -> tuple[torch.Tensor, torch.Tensor | float]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer))
        out, balance = self.post_attention_layernorm(x), 0.0
        if isinstance(self.mlp, MixtureOfExperts):
            out, balance = self.mlp(out, real)
        else:
            out = self.mlp(out)
        return x + self.dropout(out), balance


class MiniGPT(nn.Module):
    """A decoder-only Transformer. `model(input_ids)`: (B, T) int64 -> logits (B, T, V)."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in keep the scale of activations from layer to layer.

        What writes to the residual stream (o_proj, down_proj) starts at zero: each block begins as the identity, so
        that depth costs nothing at first and the gradient reaches every layer whole. With tied weights such a model
        would predict the token that it reads, with a logit of C · std: a standard deviation of 2.5 / C keeps that
        small, so that the first loss is ln V.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                p.zero_()
            elif name in ("embed_tokens.weight", "lm_head.weight"):
                p.normal_(std=2.5 / self.config.hidden_size)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)

    @property
    def output_weight(self) -> torch.Tensor:
        """The (V, C) matrix that turns hidden states into logits."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden_states(self, input_ids: torch.Tensor, *, position_ids: torch.Tensor | None = None,
                      attention_mask: torch.Tensor | None = None, token_mask: torch.Tensor | None = None,
                      cache: KVCache | None = None) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(B, T) int64 -> the normalised last hidden states (B, T, C) and the routers' mean balance loss.

        `position_ids` (B, T): default 0 … T-1, after what the cache holds. `attention_mask`: keys that may be seen,
        bool, (B, S) or (B, T, S), besides causality; the default None is causal alone, and fast. `token_mask` (B, T):
        tokens that are no padding, for the routers. With a `cache`, the T tokens follow those in it and are added.
        """
        B, T = input_ids.shape
        start = cache.length if cache is not None else 0
        if position_ids is None:
            if start + T > self.config.max_position_embeddings:
                raise UserError(f"{start + T} tokens exceed the context of max_position_embeddings="
                                f"{self.config.max_position_embeddings}")
            position_ids = torch.arange(start, start + T, device=input_ids.device)[None]
        mask = self._mask(T, start + T, attention_mask)
        out = self._blocks(input_ids, position_ids, mask, token_mask, cache)
        if cache is not None:
            cache.length += T
        return out

    def _blocks(self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None,
                token_mask: torch.Tensor | None, cache: KVCache | None) -> tuple[torch.Tensor, torch.Tensor | float]:
        cos, sin = self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)  # (B or 1, T, 1, D)
        x, balances = self.dropout(self.embed_tokens(input_ids)), []
        for i, block in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x, balance = recompute(block, x, cos, sin, mask, token_mask, use_reentrant=False)
            else:
                x, balance = block(x, cos, sin, mask, token_mask, cache, i)
            balances.append(balance)
        return self.norm(x), sum(balances) / len(balances)

    def decode_step(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after one more token (B, 1) at `cache.position`, which sees the slots in `mask` (B, 1, 1, S).

        All shapes are fixed: what torch.compile turns into one graph, and CUDA into a replayed one.
        """
        return self.logits(self._blocks(input_ids, cache.position[None], mask, None, cache)[0][:, -1])

    def _mask(self, T: int, S: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of S keys each of the last T tokens sees, (B or 1, 1, T, S); None where a fast path says it."""
        if attention_mask is None and T in (1, S):
            return None
        keys = torch.arange(S, device=self.cos.device)
        queries = keys[S - T:, None]
        if attention_mask is None:
            return keys <= queries
        seen = attention_mask[:, None, None] if attention_mask.dim() == 2 else attention_mask[:, None]
        # padding sees itself: a row without any key would be NaN
        return (keys < queries) & seen.bool() | (keys == queries)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, C) -> logits (…, V)."""
        return linear(hidden, self.output_weight)

    def forward(self, input_ids: torch.Tensor, **options) -> torch.Tensor:
        """(B, T) int64 -> logits (B, T, V); options as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, **options)[0])

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, temperature: float = 0.0,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Continue (B, T) by the whole model over the whole text for every token: the slow oracle of TextGenerator.

        Greedy at temperature 0, else sampling. Returns (B, T + max_new_tokens).
        """
        with eval_mode(self):
            for _ in range(max_new_tokens):
                logits = self(input_ids)[:, -1]  # (B, V)
                if temperature > 0:
                    chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
                else:
                    chosen = logits.argmax(dim=-1, keepdim=True)
                input_ids = torch.cat((input_ids, chosen), dim=1)
        return input_ids

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MiniGPT:
        """The model of a Hugging Face directory of the Llama, Qwen3 or Qwen3-MoE kind, in float32 and eval mode.

        Reads config.json and safetensors, one file or shards with their index. What differs from these architectures
        (biases, sliding windows, other weights) raises a UserError that names it.
        """
        config = read_hf_config(folder)
        model = cls(config)
        copy_hf_weights(Path(folder), model)
        return model.eval()

    def save_pretrained(self, folder: str | Path, tokenizer: BPETokenizer | None = None) -> None:
        """Write a directory that transformers' AutoModelForCausalLM (and AutoTokenizer) read; LoRA is merged.

        A model with qk_norm becomes a Qwen3 or Qwen3-MoE, one without a Llama. What those do not have (shared experts,
        a reward model's head) raises a UserError.
        """
        write_hf(Path(folder), self, tokenizer)

    def num_params(self, active: bool = False) -> int:
        """Parameters; with `active` only those that a token uses (all of a dense model)."""
        total = sum(p.numel() for p in self.parameters())
        if active and self.config.num_experts:
            idle = self.config.num_experts - self.config.num_experts_per_tok
            one = 3 * self.config.hidden_size * self.config.moe_intermediate_size
            total -= self.config.num_hidden_layers * idle * one
        return total

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward for a token in a row of `seq_len` (arXiv:2204.02311, B).

        Six for each weight of a matrix product, and six for each element of the two products of causal attention, of
        which the mask leaves half.
        """
        c = self.config
        weights = self.num_params(active=True)
        if not c.tie_word_embeddings:
            weights -= c.vocab_size * c.hidden_size  # a look-up is no product
        return 6 * weights + 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len


class LoRALinear(nn.Module):
    """A frozen linear map and a trainable update of low rank, W + alpha / rank · B A (arXiv:2106.09685); B starts at 0.
    """

    def __init__(self, base: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.scale = base.weight.requires_grad_(False), alpha / rank
        rows, columns = base.weight.shape
        self.lora_a = nn.Parameter(torch.randn(rank, columns, device=base.weight.device) * columns ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @torch.no_grad()
    def merged(self) -> Linear:
        """The same map as one matrix."""
        merged = Linear(*self.weight.shape[::-1]).to(self.weight)
        merged.weight.copy_(self.weight + self.scale * self.lora_b @ self.lora_a)
        return merged


def add_lora(model: MiniGPT, rank: int, alpha: float) -> None:
    """Freeze the model but for LoRA updates of the matrices of its blocks (routed experts stay as they are)."""
    narrowest = min(model.config.hidden_size, model.config.num_attention_heads * model.config.head_dim)
    if rank > narrowest:
        raise UserError(f"lora_rank={rank} is not possible: it must be at most {narrowest}, the rank of the matrices")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score."))  # a reward model's head is new: it learns whole
    for block in model.layers:
        for parent in [block.self_attn, block.mlp, getattr(block.mlp, "shared", None)]:
            for name, child in list(parent.named_children()) if parent is not None else []:
                if isinstance(child, Linear) and name != "gate":
                    setattr(parent, name, LoRALinear(child, rank, alpha))


def merge_lora(model: MiniGPT) -> None:
    """Fold LoRA's updates into the matrices; the model is a plain one again, all of it trainable."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    model.requires_grad_(True)


class RewardModel(MiniGPT):
    """The backbone with a scalar head: a score for a conversation, or, as PPO's critic, an estimate at every token.

    `RewardModel(model)` takes over the weights of a MiniGPT; `RewardModel(config)` starts anew. The head starts at 0.
    """

    def __init__(self, source: MiniGPT | MiniGPTConfig) -> None:
        super().__init__(source.config if isinstance(source, MiniGPT) else source)
        if isinstance(source, MiniGPT):
            self.load_state_dict(source.state_dict(), strict=not isinstance(source, RewardModel))
            self.to(source.embed_tokens.weight)
        self.score = Linear(self.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        if isinstance(source, RewardModel):
            self.score.load_state_dict(source.score.state_dict())
        self.score.to(self.embed_tokens.weight)

    def token_scores(self, input_ids: torch.Tensor, **options) -> torch.Tensor:
        """(B, T) int64 -> a score after each token, (B, T) float32; options as in `hidden_states`."""
        return self.head(self.hidden_states(input_ids, **options)[0])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) int64, padded on the right where `attention_mask` is 0 -> the score at the last real token, (B,)."""
        return self.final_score(self.hidden_states(input_ids, token_mask=attention_mask)[0], attention_mask)

    def final_score(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, T, C) -> the score at the last real token, (B,)."""
        rows = torch.arange(len(hidden), device=hidden.device)
        last = -1 if attention_mask is None else attention_mask.long().sum(dim=1) - 1
        return self.head(hidden[rows, last])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, C) -> scores (…)."""
        with torch.autocast(hidden.device.type, enabled=False):  # float32: in bf16 near scores would be ties
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return F.linear(hidden.to(wide), self.score.weight.to(wide))[..., 0]


def check_vocabulary(model: nn.Module, tokenizer: BPETokenizer) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer's {tokenizer.vocab_size} tokens exceed the model's vocab_size="
                        f"{model.config.vocab_size}: they do not belong together")


# -- Hugging Face directories ------------------------------------------------------------------------------------------

_HF_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_HF_DEFAULTS = {  # what transformers takes for fields that a config.json leaves out
    "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False}
_HF_MOE = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
           "router_aux_loss_coef": 0.001}
_HF_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False,
             "mlp_only_layers": [], "decoder_sparse_step": 1, "partial_rotary_factor": 1.0, "rope_interleaved": False,
             "quantization_config": None}


def import_safetensors() -> tuple:
    """(safe_open, SafetensorError, save), or a UserError that names the extra."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save
    except ImportError:
        raise UserError("Hugging Face directories need safetensors: pip install -e '.[hf]'") from None
    return safe_open, SafetensorError, save


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(data).__name__}")
    return data


def read_hf_config(folder: str | Path) -> MiniGPTConfig:
    """The shape that a Hugging Face config.json describes."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no Hugging Face directory: it has no config.json")
    data = read_json(path)
    kind, rope = data.get("model_type"), data.get("rope_parameters") or data.get("rope_scaling") or {}
    if kind not in ("llama", "qwen3", "qwen3_moe"):
        raise UserError(f"{path}: model_type={kind!r} is not supported: it must be llama, qwen3 or qwen3_moe")
    if lacking := [field for field in _HF_SHAPE if field not in data]:
        raise UserError(f"{path}: {', '.join(lacking)} is missing")
    for field in (*_HF_SHAPE, "max_position_embeddings"):
        if not isinstance(size := data.get(field, 1), int) or not 0 < size < 1 << 24:
            raise UserError(f"{path}: {field}={size!r} is not possible: it must be a number in 1 … {(1 << 24) - 1}")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_type", rope.get("type", "default")), str):
        raise UserError(f"{path}: rope_parameters={rope!r} is not possible: it must be an object with a rope_type")
    for field, value in _HF_FIXED.items():
        if data.get(field, value) not in (value, None):
            raise UserError(f"{path}: {field}={data[field]!r} is not supported: it must be {value!r}")
    defaults = _HF_DEFAULTS | ({} if kind == "llama" else {"head_dim": 128, "max_position_embeddings": 32768})
    fields = {field: data[field] for field in _HF_SHAPE} | {k: data.get(k, v) for k, v in defaults.items()}
    if kind == "qwen3_moe":
        fields |= {field: data.get(field, value) for field, value in _HF_MOE.items()}
        fields["num_experts"] = data.get("num_experts", data.get("num_local_experts", 128))
    # transformers 5 keeps theta inside of rope_parameters, earlier ones beside rope_scaling, whose kind was once "type"
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "type") and v is not None} | {
        "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    if scaling["rope_type"] in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", data.get("original_max_position_embeddings")
                           or fields["max_position_embeddings"])
    ends = data.get("eos_token_id")
    eos = (ends or [None])[0] if isinstance(ends, list) else ends
    eos = min(MiniGPTConfig.eos_token_id, fields["vocab_size"] - 1) if eos is None else eos
    if not isinstance(eos, int) or not 0 <= eos < fields["vocab_size"]:
        raise UserError(f"{path}: eos_token_id={ends!r} is not possible: it must be in 0 … {fields['vocab_size'] - 1}")
    ids = {name: eos if data.get(name) is None else data[name] for name in ("bos_token_id", "pad_token_id")}
    try:
        return MiniGPTConfig(**fields, **ids, eos_token_id=eos, qk_norm=kind != "llama", rope_theta=theta,
                             rope_scaling=None if scaling["rope_type"] == "default" else scaling)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def hf_config(config: MiniGPTConfig) -> dict:
    """The config.json with which transformers builds the same model; a UserError names what it can not have."""
    if config.num_shared_experts or config.num_experts and not config.qk_norm:
        raise UserError(f"num_shared_experts={config.num_shared_experts}, qk_norm={config.qk_norm} of a mixture of "
                        "experts can not be exported: a Qwen3-MoE has no shared experts, and qk_norm")
    kind = "Qwen3Moe" if config.num_experts else "Qwen3" if config.qk_norm else "Llama"
    fields = (*_HF_SHAPE, *_HF_DEFAULTS, *(("num_experts", *_HF_MOE) if config.num_experts else ()), "rope_theta",
              "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id")
    return {"architectures": [kind + "ForCausalLM"],
            "model_type": {"Qwen3Moe": "qwen3_moe", "Qwen3": "qwen3", "Llama": "llama"}[kind],
            "hidden_act": "silu", "attention_bias": False, "dtype": "float32",
            **{field: getattr(config, field) for field in fields}}


def hf_parts(model: MiniGPT) -> dict[str, dict[str, int]]:
    """For each parameter the tensors that Hugging Face has in its place, one below the other, and their rows."""
    c, table = model.config, {}
    for name, p in model.named_parameters():
        stem = name if name.startswith("lm_head") else "model." + name
        if name.endswith("qkv_proj.weight"):
            heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
            table[name] = {stem.replace("qkv", kind): n * c.head_dim for kind, n in heads.items()}
        elif name.endswith("gate_up_proj.weight"):
            table[name] = {stem.replace("gate_up", kind): len(p) // 2 for kind in ("gate", "up")}
        elif p.dim() == 3:  # of all experts
            kinds = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            table[name] = {f"{stem.rpartition('.')[0]}.experts.{e}.{kind}.weight": p.shape[1] // len(kinds)
                           for e in range(c.num_experts) for kind in kinds}
        else:
            table[name] = {stem: len(p)}
    return table


@torch.no_grad()
def copy_hf_weights(folder: Path, model: MiniGPT) -> None:
    """Fill the model from the safetensors in `folder`: nothing may lack, be left over or have another shape."""
    safe_open, SafetensorError, _ = import_safetensors()
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name
                                                   for name in shards.values()):
            raise UserError(f"{index}: weight_map must name files in the same directory")
        files = [folder / name for name in sorted(set(shards.values()))]
    parts, found = hf_parts(model), {}
    with contextlib.ExitStack() as stack:
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} does not exist: weights are read from safetensors, one file or shards")
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
                found |= dict.fromkeys(opened.keys(), opened)
            except SafetensorError as error:
                raise UserError(f"{file} is damaged, or no safetensors file: {error}") from error
        wanted = {part for rows in parts.values() for part in rows}
        extra = {name for name in found.keys() - wanted if not name.endswith("rotary_emb.inv_freq")}
        extra -= {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        for names, problem in ((wanted - found.keys(), "lack"), (extra, "hold, against config.json,")):
            if names:
                raise UserError(f"the weights in {folder} {problem} {', '.join(sorted(names)[:4])}"
                                + f" and {len(names) - 4} more" * (len(names) > 4))
        for name, p in model.named_parameters():
            tensors = []
            for part, rows in parts[name].items():
                tensor, shape = found[part].get_tensor(part), (rows, *p.shape[1:][-1:])
                if tensor.shape != shape or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    raise UserError(f"the weights in {folder}: {part} is {tensor.dtype} {tuple(tensor.shape)}: it must "
                                    f"be float32, bfloat16 or float16, and by config.json {shape}")
                tensors.append(tensor)
            p.copy_(torch.cat(tensors).view_as(p))


@torch.no_grad()
def write_hf(folder: Path, model: MiniGPT, tokenizer: BPETokenizer | None) -> None:
    save = import_safetensors()[2]
    if isinstance(model, RewardModel):
        raise UserError("a reward model can not be exported: its head has no counterpart")
    config = hf_config(model.config)
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        model = copy.deepcopy(model)
        merge_lora(model)
    parts, tensors = hf_parts(model), {}
    for name, p in model.named_parameters():
        rows = p.detach().cpu().float().flatten(0, -2) if p.dim() > 1 else p.detach().cpu().float()
        split = rows.split(list(parts[name].values()))
        tensors |= {part: tensor.clone() for part, tensor in zip(parts[name], split, strict=True)}
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")  # a failure leaves what was there, all of it
    try:
        aside.mkdir(parents=True)
        if tokenizer is not None:
            check_vocabulary(model, tokenizer)
            generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids),
                          "pad_token_id": tokenizer.pad_id}
            config |= generation | {"eos_token_id": tokenizer.eos_id}
            tokenizer.save_pretrained(aside)
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            with atomic_write(aside / name) as file:
                file.write(json.dumps(content, indent=2).encode())
        with atomic_write(aside / "model.safetensors") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        folder.mkdir(exist_ok=True)
        for path in aside.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ======================================================================================================================
# 5 Generation: one cached decoder under greedy search, sampling, streaming and chat; beam search beside it.
# ======================================================================================================================


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's penalty (arXiv:1909.05858): logits (B, V) of `seen` (B, V) tokens shrink, or sink if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sampling_probs(logits: torch.Tensor, config: GenerationConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, V) -> what temperature, top-k, top-p and min-p leave: probabilities and their token ids, (B, n) each.

    top-p (arXiv:1904.09751) keeps the token that crosses p; min-p is arXiv:2407.01082.
    """
    V, logits = logits.shape[-1], logits.float() / config.temperature
    if config.top_k:
        logits, all_ids = logits.topk(min(config.top_k, V), dim=-1)
    else:
        all_ids = torch.arange(V, device=logits.device).expand_as(logits)
    all_probs = logits.softmax(dim=-1)
    if config.top_p == 1 and not config.min_p:
        return all_probs, all_ids
    for n in (256, V):  # the likeliest 256 hold all that is kept, mostly; sorting everything takes much longer
        probs, order = all_probs.topk(min(n, all_probs.shape[-1]), dim=-1)  # falling
        likelier = probs.cumsum(dim=-1) - probs  # what is reached without a token
        keep = (likelier < config.top_p) & (probs >= config.min_p * probs[:, :1])
        if not keep[:, -1].any():
            break
    probs = probs * keep
    return probs / probs.sum(dim=-1, keepdim=True), all_ids.gather(1, order)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """An index for each row of probabilities (B, n), (B, 1).

    The first at which the distribution function exceeds a random number: torch.multinomial takes n numbers a row.
    """
    reached = probs.cumsum(dim=-1)
    reached = reached / reached[:, -1:]  # ends at 1 exactly, which a number below 1 can not miss
    number = torch.rand(len(probs), 1, device=probs.device, generator=generator)
    return torch.searchsorted(reached, number, right=True)


class _Session:
    """A batch of prompts in decoding: the cache, left padding, and what must not or should less be written next."""

    def __init__(self, generator: TextGenerator, input_ids: torch.Tensor, config: GenerationConfig,
                 attention_mask: torch.Tensor | None) -> None:
        self.model, self.config, self.device = generator.model, config, generator.model.embed_tokens.weight.device
        self.stop_ids = torch.tensor(generator.stop_ids, device=self.device, dtype=torch.long)
        self.vocab_size = generator.tokenizer.vocab_size
        if input_ids.dim() != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int64, torch.int32):
            raise UserError(f"prompts must be integers (B, T), int64, not {input_ids.dtype} {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise UserError(f"attention_mask must be {tuple(input_ids.shape)} like the prompts, not "
                            f"{tuple(attention_mask.shape)}")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise UserError("prompts of unequal length must be padded on the left, where attention_mask is 0")
        limit, (B, T) = self.model.config.max_position_embeddings, input_ids.shape
        if T >= limit:
            raise UserError(f"a prompt of {T} tokens leaves no room in the context of {limit}: shorten it")
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= self.model.config.vocab_size:
            raise UserError(f"prompt ids lie in {low} … {high}, the model's in 0 … {self.model.config.vocab_size - 1}")
        self.prompt_len, self.new_tokens = T, min(config.new_tokens(T), limit - T)
        if self.new_tokens < 1:
            raise UserError(f"max_length={config.max_length} leaves nothing to add to a prompt of {T} tokens")
        size = T + self.new_tokens
        if generator.compiled:  # code is compiled for a shape: sizes in steps of 256 let calls share it
            size = min(limit, -(-size // 256) * 256)
            self.slots = torch.zeros(B, 1, 1, size, dtype=torch.bool, device=self.device)  # that hold a token to see
            self.slots[..., :T] = True if attention_mask is None else attention_mask[:, None, None].bool()
        self.compiled, self.compiling = generator.compiled, True
        self.cache = KVCache(self.model, B, size)
        self.mask = self.seen = None
        if attention_mask is not None and not attention_mask.all():  # RoPE is relative: positions may stay as they are
            self.mask = F.pad(attention_mask.to(self.device).bool(), (0, self.new_tokens), value=True)  # (B, T + new)
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(B, self.model.config.vocab_size, dtype=torch.bool, device=self.device)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Append ids (B, t) to every row -> logits (B, V), in float32, of what comes next."""
        start, end = self.cache.length, self.cache.length + ids.shape[1]
        mask = None if self.mask is None else self.mask[:, :end]
        if self.compiled and start:
            logits = self._compiled_step(ids).float()
        else:
            hidden, _ = self.model.hidden_states(ids, attention_mask=mask, cache=self.cache)
            logits = self.model.logits(hidden[:, -1]).float()
        if self.seen is not None:  # padding is on the left: the last token of a row is a real one
            self.seen.scatter_(1, ids if mask is None else ids.where(mask[:, start:], ids[:, -1:]), True)
            logits = penalise_repetition(logits, self.seen, self.config.repetition_penalty)
        if self.vocab_size < logits.shape[-1]:
            logits[:, self.vocab_size:] = -math.inf  # ids that the tokenizer does not have
        if end - self.prompt_len < self.config.min_new_tokens:
            logits.index_fill_(1, self.stop_ids, -math.inf)
        return logits

    def _compiled_step(self, ids: torch.Tensor) -> torch.Tensor:
        self.cache.position = torch.tensor([self.cache.length], device=self.device)
        self.slots[..., self.cache.length] = True
        # freezing lays out the weights for the processor; it asks for the setting while it compiles, if it does
        settings = torch._inductor.config.patch(freezing=self.device.type == "cpu") if self.compiling \
            else contextlib.nullcontext()
        try:
            with settings:
                logits = self.compiled(ids, self.slots, self.cache)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError("decoding can not be compiled here (on a CPU it takes a C++ compiler): "
                            f"{str(error).strip().splitlines()[0]}") from error
        self.cache.length, self.compiling = self.cache.length + 1, False
        return logits

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was; there may be more rows than before, or fewer."""
        self.cache.reorder(rows)
        self.mask, self.seen = (None if x is None else x[rows] for x in (self.mask, self.seen))
        if self.compiled:
            self.slots = self.slots[rows]


class _Finished:
    """The ended hypotheses of one prompt in beam search, the best first, at most `num_beams`."""

    def __init__(self, config: GenerationConfig) -> None:
        self.config, self.found = config, []

    def add(self, logprob: float, ids: list[int]) -> None:
        if logprob > -math.inf:
            self.found.append((logprob / len(ids) ** self.config.length_penalty, ids))
            self.found = sorted(self.found, key=lambda hypothesis: -hypothesis[0])[:self.config.num_beams]

    def is_final(self, best_running: float, length: int, longest: int) -> bool:
        """Whether a beam of log-probability `best_running` and `length` tokens can no longer get among the found.

        Log-probabilities only fall; dividing by a power of the length may still lift them up to the longest one.
        """
        if len(self.found) < self.config.num_beams:
            return best_running == -math.inf
        reach = best_running / (longest if self.config.length_penalty > 0 else length) ** self.config.length_penalty
        return self.config.early_stopping or self.found[-1][0] >= reach


class TextGenerator:
    """Continues text with a model. Tensor methods take prompts (B, T) and give prompt and continuation (B, ≤ T + new).

    A row ends at EOS or <|im_end|>; after that it is padding. Rows of unequal length are padded on the left and come
    with an `attention_mask` (B, T), 1 where a token is real. A continuation also ends where the model's context does.

    With `compile`, steps go through torch.compile: seconds for the first of each batch size, then up to several times
    faster. It may keep the weights as they are then: not for a model that goes on training, nor for one of experts.
    """

    def __init__(self, model: MiniGPT, tokenizer: BPETokenizer, compile: bool = False) -> None:
        check_vocabulary(model, tokenizer)
        self.model, self.tokenizer, self.compiled = model, tokenizer, None
        if compile:
            if model.config.num_experts:
                raise UserError("a mixture of experts can not be compiled for decoding: its shapes depend on the data")
            on_cpu = model.embed_tokens.weight.device.type == "cpu"
            options = {"options": {"cpp_wrapper": True}} if on_cpu else {"mode": "reduce-overhead"}  # CUDA graphs
            self.compiled = torch.compile(model.decode_step, dynamic=False, **options)
        self.stop_ids = tokenizer.stop_ids

    def greedy_search(self, input_ids: torch.Tensor, config: GenerationConfig | None = None,
                      attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Always the likeliest token."""
        config = dataclasses.replace(config or GenerationConfig(), do_sample=False)
        return self._complete(input_ids, config, attention_mask)

    def sample_generate(self, input_ids: torch.Tensor, config: GenerationConfig | None = None,
                        attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Draw each token from the distribution that temperature, top-k, top-p and min-p leave."""
        config = dataclasses.replace(config or GenerationConfig(), do_sample=True)
        return self._complete(input_ids, config, attention_mask)

    def generate(self, prompts: str | list[str], config: GenerationConfig | None = None) -> str | list[str]:
        """The continuation of each prompt, without the prompt: a text for a text, a list for a list."""
        rows = [self._prompt_ids(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        answers = self.continue_rows(rows, config or GenerationConfig()) if rows else []
        return answers[0] if isinstance(prompts, str) else answers

    def continue_rows(self, rows: list[list[int]], config: GenerationConfig, batch_size: int = 128) -> list[str]:
        """The text that continues each row of ids; rows of similar length go together, `batch_size` at a time."""
        answers = [""] * len(rows)
        for part in _batched(sorted(range(len(rows)), key=lambda i: len(rows[i])), lambda _: 1, batch_size):
            batch = pad_left([rows[i] for i in part], self.tokenizer.pad_id)
            complete = self.beam_search if config.num_beams > 1 else self._complete
            output = complete(batch["input_ids"], config, batch["attention_mask"])
            for i, ids in zip(part, output[:, batch["input_ids"].shape[1]:].tolist(), strict=True):
                answers[i] = _clip_at_stop(self._text(ids), config.stop or [])[0]
        return answers

    def stream(self, prompt: str | list[dict], config: GenerationConfig | None = None) -> Iterator[str]:
        """The continuation of a text, or the answer to chat messages, in pieces that never end inside a character."""
        config = config or GenerationConfig()
        if config.num_beams > 1:
            raise UserError(f"num_beams={config.num_beams} can not stream: beams are only known at the end")
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # holds back the bytes of an unfinished character
        text, shown, stops = "", 0, config.stop or []
        for token, _ in self._tokens(torch.tensor([self._prompt_ids(prompt)]), config, None):
            text, found = _clip_at_stop(text + decoder.decode(self.tokenizer.decode_bytes(token.tolist())), stops)
            # what may be the beginning of a stop text waits
            held = 0 if found else max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            if len(text) - held > shown:
                yield text[shown:len(text) - held]
                shown = len(text) - held
            if found:
                return
        if len(text) > shown:
            yield text[shown:]

    def chat(self, messages: list[dict], config: GenerationConfig | None = None) -> str:
        """The assistant's answer to [{"role", "content"}, …]."""
        return "".join(self.stream(messages, config))

    def _prompt_ids(self, prompt: str | list[dict]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        try:
            messages = as_messages(prompt, "user")
        except ValueError as error:
            raise UserError(str(error)) from error
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode_bytes(ids).decode("utf-8", "ignore")  # a last character may be unfinished

    @torch.no_grad()
    def _tokens(self, input_ids: torch.Tensor, config: GenerationConfig, attention_mask: torch.Tensor | None
                ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (tokens (B,), ended (B,)) step by step until all rows have ended; the caller may set `ended` too.

        Rows that have ended are computed no more once they are half of those in the cache.
        """
        with eval_mode(self.model):
            session = _Session(self, input_ids, config, attention_mask)
            device = session.device
            random = None if config.seed is None else torch.Generator(device).manual_seed(config.seed)
            ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
            running, feed = torch.arange(len(input_ids), device=device), input_ids.to(device)
            for _ in range(session.new_tokens):
                logits = session.feed(feed)
                if config.do_sample:
                    probs, ids = sampling_probs(logits, config)
                    tokens = ids.gather(1, draw(probs, random))[:, 0]
                else:
                    tokens = logits.argmax(dim=-1)
                written = tokens
                if len(running) < len(ended):
                    written = torch.full_like(ended, self.tokenizer.pad_id, dtype=torch.long).index_copy_(
                        0, running, tokens)
                written = written.masked_fill(ended, self.tokenizer.pad_id)
                ended |= (written[:, None] == session.stop_ids).any(dim=1)
                yield written, ended
                left = len(ended) - int(ended.sum())
                if not left:
                    return
                if 2 * left <= len(running) and not self.compiled:  # leave the rows that have ended
                    going_on = (~ended[running]).nonzero()[:, 0]
                    session.reorder(going_on)
                    running, tokens = running[going_on], tokens[going_on]
                feed = tokens[:, None]

    @torch.no_grad()
    def _complete(self, input_ids: torch.Tensor, config: GenerationConfig, attention_mask: torch.Tensor | None
                  ) -> torch.Tensor:
        """Prompt and continuation (B, ≤ T + new), rows ended at a stop text too."""
        steps: list[torch.Tensor] = []
        for tokens, ended in self._tokens(input_ids, config, attention_mask):
            steps.append(tokens[:, None])
            if config.stop:
                for row, ids in enumerate(torch.cat(steps, dim=1).tolist()):
                    ended[row] |= _clip_at_stop(self._text(ids), config.stop)[1]
        return torch.cat((input_ids.to(self.model.embed_tokens.weight.device), *steps), dim=1)

    @torch.no_grad()
    def beam_search(self, input_ids: torch.Tensor, config: GenerationConfig | None = None,
                    attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The best of `num_beams` hypotheses a row by log-probability / length ** length_penalty (arXiv:1609.08144).

        The length is that of the continuation with its end. With as many beams as there are continuations it is exact.
        """
        config, B = config or GenerationConfig(num_beams=4), len(input_ids)
        k, rows, finished = config.num_beams, range(B), [_Finished(config) for _ in range(B)]
        with eval_mode(self.model):
            session = _Session(self, input_ids, config, attention_mask)
            device, stop_ids = session.device, session.stop_ids
            logits = session.feed(input_ids.to(device)).repeat_interleave(k, dim=0)  # (B k, V)
            first_beam = torch.arange(B, device=device)[:, None] * k
            session.reorder(torch.arange(B, device=device).repeat_interleave(k))  # a prompt is computed once for all
            scores = torch.full((B, k), -math.inf, device=device)
            scores[:, 0] = 0.0  # at first all beams are the same: one of them counts
            beams = torch.empty(B, k, 0, dtype=torch.long, device=device)
            for step in range(session.new_tokens):
                totals = (scores[..., None] + logits.log_softmax(dim=-1).view(B, k, -1)).flatten(1)  # (B, k V)
                # so many candidates that k go on even if every beam's likeliest tokens are ends
                top, flat = totals.topk(min(k * (len(stop_ids) + 1), totals.shape[1]), dim=-1)
                parents, tokens = flat // logits.shape[-1], flat % logits.shape[-1]
                longer = beams.gather(1, parents[..., None].expand(-1, -1, step))
                longer = torch.cat((longer, tokens[..., None]), dim=-1)  # (B, candidates, step + 1)
                ends = torch.isin(tokens, stop_ids)
                for b in rows:
                    for rank in ends[b, :k].nonzero()[:, 0].tolist():  # an end counts only among the best k
                        finished[b].add(top[b, rank].item(), longer[b, rank].tolist())
                scores, keep = top.masked_fill(ends, -math.inf).topk(k, dim=-1)  # (B, k)
                beams = longer.gather(1, keep[..., None].expand(-1, -1, step + 1))
                rows = [b for b in rows if not finished[b].is_final(scores[b, 0].item(), step + 1, session.new_tokens)]
                if not rows or step == session.new_tokens - 1:
                    break
                session.reorder((parents.gather(1, keep) + first_beam).flatten())
                logits = session.feed(beams[..., -1].reshape(-1, 1).contiguous())
        for b in rows:  # the context is full: what still runs counts as it stands
            for score, ids in zip(scores[b].tolist(), beams[b].tolist(), strict=True):
                finished[b].add(score, ids)
        best = [hypotheses.found[0][1] for hypotheses in finished]
        width = max(map(len, best))
        best = [ids + [self.tokenizer.pad_id] * (width - len(ids)) for ids in best]
        return torch.cat((input_ids.to(device), torch.tensor(best, device=device)), dim=1)


def _clip_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` up to the first of the stop texts in it, and whether there was one."""
    cut = min((i for i in map(text.find, stops) if i >= 0), default=-1)
    return (text, False) if cut < 0 else (text[:cut], True)


# ======================================================================================================================
# 6 Losses: functions of tensors and numbers, each testable against a value worked out by hand.
# ======================================================================================================================


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradients are made in forward, chunk by chunk: (N, V) logits never exist at once."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            half = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(half), weight.to(half)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, len(labels), chunk):
            h, y = hidden[start:start + chunk], labels[start:start + chunk]
            keep = y != -100
            y = y.where(keep, 0)[:, None]
            logits = (h @ weight.T).to(wide)  # (chunk, V)
            lse = logits.logsumexp(dim=-1)
            loss += ((lse - logits.gather(1, y)[:, 0]) * keep).sum()
            if need_hidden or need_weight:  # d loss / d logits = softmax - onehot, written over the logits
                grad = logits.sub_(lse[:, None]).exp_()
                grad.scatter_add_(1, y, torch.full_like(y, -1, dtype=wide)).mul_(keep[:, None])
                grad = grad.to(h.dtype)
                if need_hidden:
                    d_hidden[start:start + chunk] = grad @ weight
                if need_weight:
                    d_weight.addmm_(grad.T.to(wide), h.to(wide)) if wide == h.dtype else d_weight.add_(grad.T @ h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (None if d_hidden is None else d_hidden.mul(grad.to(d_hidden.dtype)),
                None if d_weight is None else d_weight.mul(grad), None, None)


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int = 2048
                          ) -> torch.Tensor:
    """Σ -log softmax(hidden · weightᵀ)[label], in nats, over the labels that are not -100.

    hidden (…, C), weight (V, C), labels (…) int64 aligned with hidden: labels[i] is what follows hidden[i]. Holds
    `chunk` x V logits at a time.
    """
    return _ChunkedCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), chunk)


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0,
                   chunk: int = 2048) -> torch.Tensor:
    """log softmax(hidden · weightᵀ / temperature)[label] for each label, in nats; 0 where the label is -100.

    hidden (…, C), weight (V, C), labels (…) aligned with hidden. Only trained positions are computed, and `chunk` x V
    logits at a time: backward computes them anew.
    """
    def part(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(dim=-1)

    keep = labels != -100
    pairs = zip(hidden[keep].split(chunk), labels[keep].split(chunk), strict=True)
    found = torch.cat([recompute(part, h, y, use_reentrant=False) for h, y in pairs])
    return found.new_zeros(labels.shape).masked_scatter(keep, found)


def dpo_loss(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, reference_chosen: torch.Tensor,
             reference_rejected: torch.Tensor, beta: float, kind: str = "sigmoid") -> torch.Tensor:
    """Mean DPO loss of pairs (B,), whose log-probabilities are summed over each answer (arXiv:2305.18290, eq. 7).

    sigmoid: -log σ(β h) with h = (chosen - its reference) - (rejected - its reference), ln 2 at policy = reference.
    ipo: (h - 1 / (2 β))² (arXiv:2310.12036, eq. 17).
    """
    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (-F.logsigmoid(beta * h) if kind == "sigmoid" else (h - 1 / (2 * beta)).square()).mean()


def reward_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log σ(chosen - rejected) over pairs of scores (B,) (Bradley-Terry; arXiv:2203.02155, eq. 1)."""
    return -F.logsigmoid(chosen - rejected).mean()


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x where mask is true, over everything."""
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """x with mean 0 (unless not `shift_mean`) and variance 1 over where mask is true, 0 elsewhere."""
    mean = masked_mean(x, mask)
    centred = x - mean
    scaled = centred * (masked_mean(centred.square(), mask) + 1e-8).rsqrt()
    return (scaled if shift_mean else scaled + mean) * mask


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, kind: str = "k1") -> torch.Tensor:
    """KL(policy || reference) from tokens that the policy sampled, one estimate each (joschu.net/blog/kl-approx.html).

    With r = reference / policy: k1 = -ln r; k2 = (ln r)² / 2; k3 = r - 1 - ln r, which is unbiased and never negative.
    """
    log_r = reference_logprobs - logprobs
    return {"k1": -log_r, "k2": log_r.square() / 2, "k3": log_r.exp() - 1 - log_r}[kind]


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages and returns, both (B, T), of answers, which lie where mask is true (arXiv:1506.02438).

    rewards, values and mask (B, T): values[t] is the estimate before token t is written, rewards[t] what it earned.
    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, as one matrix product. Nothing follows the last token.
    """
    T = rewards.shape[1]
    rewards, values = rewards * mask, values * mask
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    ahead = torch.arange(T, device=rewards.device)
    ahead = ahead[:, None] - ahead  # (later s, earlier t)
    decay = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0).to(rewards.dtype), 0.0)
    advantages = (deltas * mask) @ decay * mask
    return advantages, advantages + values


def ppo_policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
                    clip_range: float) -> torch.Tensor:
    """Mean over mask of -min(ρ A, clip(ρ, 1 ± clip_range) A), ρ = new / old probability (arXiv:1707.06347, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def ppo_value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
                   value_clip: float) -> torch.Tensor:
    """Mean over mask of ½ max((V - R)², (V clipped to its old value ± value_clip - R)²) (arXiv:2310.10505)."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def grpo_advantages(rewards: torch.Tensor, group_size: int, kind: str = "dr_grpo") -> torch.Tensor:
    """Rewards (N,) of consecutive groups less their group's mean (Dr. GRPO, arXiv:2503.20783).

    grpo also divides by the group's standard deviation (arXiv:2402.03300). A group of equal rewards gives exactly 0.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    centred = torch.where((groups == groups[:, :1]).all(dim=1, keepdim=True), 0.0, centred)  # no rounding error left
    return (centred if kind == "dr_grpo" else centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


# ======================================================================================================================
# 7 Optimisation and memory: schedules, Muon and AdamW, devices and precision, what memory is in use.
# ======================================================================================================================


def learning_rate_at(step: int, progress: float, config: TrainConfig) -> float:
    """The rate of update `step` (from 0) when `progress` (0 … 1) of the run is over: warm-up, then the schedule.

    cosine falls all the way (arXiv:1608.03983); wsd stays at the peak, then falls in a line (arXiv:2404.06395).
    """
    low, high = config.min_learning_rate, config.learning_rate
    if config.schedule == "cosine":
        rate = low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    elif config.schedule == "wsd":
        rate = low + (high - low) * min(1.0, (1 - min(progress, 1.0)) / config.decay_fraction)
    else:
        rate = high
    return rate * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else rate


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of each matrix of (n, rows, cols) to about 1 by the Newton-Schulz iteration of Muon.

    In bfloat16 on a GPU; in float32 elsewhere, since CPUs without bf16 units take many times as long in it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's quintic: steepest at 0, lands in [0.7, 1.2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices (kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    The update's root mean square is made AdamW's (0.2), so that one learning rate suits both. A group's `rows` tell how
    its weights are made of matrices one below the other (query, key and value, say), each of which is orthogonalised by
    itself. Equal shapes go through the iteration together.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                for whole, target in zip(update, p, strict=True) if p.dim() == 3 else [(update, p)]:  # experts
                    for matrix, part in zip(whole.split(group["rows"]), target.split(group["rows"]), strict=True):
                        by_shape[matrix.shape].append((matrix, part, group["lr"]))
        for shape, items in by_shape.items():
            updates = orthogonalise(torch.stack([matrix for matrix, _, _ in items]))
            for update, (_, part, lr) in zip(updates, items, strict=True):
                part.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv:1711.05101), fused; with optimizer="muon", Muon beside it for the matrices inside the blocks."""
    rows: dict[nn.Parameter, list[int]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            rows[module.qkv_proj.weight] = [module.H * module.D, module.K * module.D, module.K * module.D]
        elif isinstance(module, (SwiGLU, MixtureOfExperts)):
            weight = module.gate_up_proj if isinstance(module, MixtureOfExperts) else module.gate_up_proj.weight
            rows[weight] = [weight.shape[-2] // 2] * 2
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = p.dim() >= 2 and ".layers." in "." + name and not name.endswith("gate.weight")
            inside = inside and "lora_" not in name  # orthogonal updates would use the whole rank for every step
            (matrices if inside else others).append(p)
    adam_groups = [{"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw" and matrices:
        adam_groups.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adam_groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)]
    if config.optimizer == "muon" and matrices:
        groups: dict[tuple, list] = defaultdict(list)
        for p in matrices:
            groups[tuple(rows.get(p, [p.shape[-2]]))].append(p)
        optimizers.append(Muon([{"params": params, "rows": list(split)} for split, params in groups.items()],
                               config.learning_rate, config.momentum, config.weight_decay))
    return optimizers


def pick_device(name: str = "auto") -> torch.device:
    """auto is CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} can not be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not possible: it must be auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: auto is bfloat16 on CUDA with bf16 units, float16 on older CUDA, else float32."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, name)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured in a fraction of a second.

    A CPU's is that of float32, since other types may be emulated.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=torch.float32 if device.type == "cpu" else dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of giving it back to the system; other C libraries are left alone.

    Tensors of megabytes are allocated and freed thousands of times a second; when each is a fresh mapping, a CPU step
    spends a large part of its time on page faults. For drivers: it concerns the whole process.
    """
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) \
        or "can't allocate memory" in str(error)


class MemoryMonitor:
    """Memory in use: what torch holds on a CUDA or MPS device; on the CPU, the resident memory of the process."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._highest = 0

    def current_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """The most there ever was; MPS keeps no such record, so there it is the most that was asked for here."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            self._highest = max(self._highest, self.current_bytes())
            return self._highest
        return self._status("VmHWM")

    def _status(self, field: str) -> int:
        try:
            with open("/proc/self/status") as file:  # getrusage's peak would include the parent's before exec
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
        except FileNotFoundError:
            import resource  # macOS counts bytes and knows only the peak
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ======================================================================================================================
# 8 Runs and checkpoints: a run directory holds checkpoint.pt, config.json, tokenizer.json and metrics.jsonl.
# ======================================================================================================================


def digest(state: object) -> str:
    """SHA-256 over every tensor and value of nested dicts and lists: torch.load itself accepts a flipped bit."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous()
            if flat.numel():
                sha.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` with its digest, whole or not at all; the checkpoint that was there becomes NAME.prev.pt."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save(state | {"digest": digest(state)}, file)
        except RuntimeError as error:  # what torch makes of a write that fails
            raise OSError(f"{path} can not be written, perhaps because the disk is full: {str(error).splitlines()[0]}; "
                          "what stood there before is whole: go on from it with --resume") from error
        if path.exists():  # a second name for it, so that there is a whole checkpoint at every instant
            previous = path.with_name(path.stem + ".prev.pt")
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:  # a file system without second names
                shutil.copyfile(path, previous)


def load_checkpoint(path: str | Path, repair: bool = False) -> dict:
    """Read what `save_checkpoint` wrote, without running anything in it; a damaged one gives way to the one before.

    With `repair` the one before takes the damaged one's place, lest the next save throw the good one out.
    """
    path = Path(path)
    problems = []
    for candidate in (path, path.with_name(path.stem + ".prev.pt")):
        try:
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.pop("digest", None) != digest(state):
                raise ValueError("its digest is wrong")
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


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, so that no second process trains in it; the lock ends with the process, however it ends."""
    if fcntl is None:  # Windows
        yield
        return
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{run_dir} is in use by another process: wait for it, or take another --out") from None
    finally:
        os.close(directory)


def holds_run(run_dir: str | Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any((Path(run_dir) / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt"))


def run_config(run_dir: str | Path) -> dict:
    """The config.json of a run directory; of a Hugging Face directory, what a run with such a model would have."""
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.json")
    config = read_json(path)
    if "model_type" in config:
        return {"model_type": config["model_type"], "stage": "pretrain", "train": {}, "data": {},
                "model": dataclasses.asdict(read_hf_config(run_dir))}
    if not all(isinstance(config.get(part), dict) for part in ("model", "train")):
        raise UserError(f'{path} has neither "model" and "train", as that of a run, nor a "model_type"')
    try:
        MiniGPTConfig(**config["model"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return config


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            rows.append(dict(json.loads(line)))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            if line.endswith("\n"):  # else a line that was being written when the run was killed
                raise UserError(f"{path}:{number}: not a row of metrics ({error!r}): mend or delete it") from error
    return rows


def load_run(run_dir: str | Path, device: str | torch.device = "cpu") -> tuple[MiniGPT, BPETokenizer, dict]:
    """The model (in eval mode; LoRA merged), the tokenizer and the whole checkpoint of a run directory.

    Of a Hugging Face directory likewise; its checkpoint has only "config" and "step".
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir)
    tokenizer = BPETokenizer.load(run_dir / "tokenizer.json")
    if "model_type" in config:
        model = MiniGPT.from_pretrained(run_dir).to(device)
        check_vocabulary(model, tokenizer)
        return model, tokenizer, {"config": config, "step": 0}
    state = load_checkpoint(run_dir / "checkpoint.pt")
    try:
        config = state["config"]
        model = (RewardModel if config["stage"] == "reward" else MiniGPT)(MiniGPTConfig(**config["model"]))
        if rank := config["train"].get("lora_rank", 0):
            add_lora(model, rank, config["train"]["lora_alpha"])
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError) as error:  # whole, but not what a run of today's code writes
        raise UserError(f"{run_dir / 'checkpoint.pt'} does not hold such a run: {str(error)[:200]}") from error
    merge_lora(model)
    if state["tokenizer_hash"] != tokenizer.content_hash():
        raise UserError(f"{run_dir / 'tokenizer.json'} is not the tokenizer that the checkpoint was trained with")
    return model.to(device).eval(), tokenizer, state


def newest_run(out: str | Path = "out") -> Path:
    """The run directory under `out` whose checkpoint is the latest."""
    found = [path for path in Path(out).glob("*/*/checkpoint.pt") if path.parent.name != "reward"]  # it can not write
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no run in {out}/: train one with `python train.py --config tiny`, or name one with --run")
    return found[-1].parent


# ======================================================================================================================
# 9 Trainers: one loop for all of them; a subclass says what its loss is.
# ======================================================================================================================


def silence_stdout() -> None:
    """After a broken pipe: let what is still printed go nowhere, and the interpreter end in peace."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ProgressLine:
    """One line that lives: rewritten in place on a terminal, printed every few seconds into a file or pipe."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.live, self.every_s, self.last, self.width = sys.stdout.isatty(), every_s, -math.inf, 0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            print("\r" + text.ljust(self.width), end="", flush=True)
            self.width = len(text)
        elif now - self.last >= self.every_s:
            self.say(text)
            self.last = now

    def say(self, text: str) -> None:
        """Print lines that stay. Whoever reads them may go away; training goes on."""
        try:
            if self.live and self.width:
                print("\r" + " " * self.width + "\r", end="")
                self.width = 0
            print(text, flush=True)
        except BrokenPipeError:
            silence_stdout()


SHOWN = {"loss": "loss {:.4f}", "bpb": "{:.4f} bits per byte", "exact_match": "exact match {:.1%}",
         "pair_accuracy": "pair accuracy {:.1%}", "longer_accuracy": "the longer answer would be {:.1%}",
         "chosen_logprob": "log-prob of chosen {:.2f}", "accuracy": "accuracy {:.0%}", "reward": "reward {:.3f}",
         "kl": "KL {:.3f}", "answer_length": "{:.1f} tokens an answer", "tokens": "{:,} tokens"}


def describe(result: dict[str, float], names: Iterable[str] = tuple(SHOWN)) -> str:
    """The figures of `result` among `names`, in words."""
    return ", ".join(SHOWN[name].format(result[name]) for name in names if name in result)


class Trainer:
    """Accumulate -> clip -> step -> log -> evaluate -> save. A subclass gives `loss`, and `weight` if not of tokens.

    `config`: TrainConfig. `train_data`, `val_data`: iterables of batches (`fit` goes round train_data as often as it
    takes; one with `state_dict` is resumed where it stood). `run_dir`: where `fit` keeps checkpoints and metrics.
    `started`: the time.monotonic() from which `minutes` count. Precision, compilation and memory follow the config.
    """

    stage = ""

    def __init__(self, model: nn.Module, tokenizer: BPETokenizer, device: str | torch.device = "cpu", *,
                 config: TrainConfig | None = None, train_data: Iterable | None = None,
                 val_data: Iterable | None = None, run_dir: str | Path | None = None,
                 started: float | None = None, rl_config: RLHFConfig | None = None,
                 critic: RewardModel | None = None) -> None:
        check_vocabulary(model, tokenizer)
        self.device = pick_device(str(device))
        self.config = config = config or TrainConfig()
        self.rl = rl_config or RLHFConfig()
        self.model, self.tokenizer = model.to(self.device), tokenizer
        self.modules = nn.ModuleList([model] if critic is None else [model, critic]).to(self.device)
        self.train_data, self.val_data = train_data, val_data
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        long = config.minutes >= 10 or not config.minutes and config.max_steps >= 1000
        for module in self.modules:
            if config.lora_rank:
                add_lora(module, config.lora_rank, config.lora_alpha)
            module.gradient_checkpointing = config.gradient_checkpointing
            if config.compile == "on" or config.compile == "auto" and self.device.type == "cuda" and long:
                for block in module.layers:  # the shapes inside a mixture of experts depend on the data
                    (block.self_attn if module.config.num_experts else block).compile()
        rates = (1.0, self.rl.critic_rate)  # of the model's and the critic's optimizers, as multiples of the run's
        built = [(optimizer, rate) for module, rate in zip(self.modules, rates, strict=False)
                 for optimizer in build_optimizers(module, config)]
        self.optimizers, self.rates = map(list, zip(*built, strict=True))
        self.monitor, self.line = MemoryMonitor(self.device), ProgressLine()
        self.step_count = self.tokens_seen = self.skipped = self.skipped_in_row = 0
        self.micro_splits = 1  # into how many micro-batches a batch is cut, since memory ran out
        self.best = -math.inf
        self.started, self.elapsed_before = time.monotonic() if started is None else started, 0.0
        self.reserve_s = 0.0  # what the evaluation, sample and checkpoint at the end will take
        self.step_s = 0.0  # what a step takes of late, for the ETA
        self.origin: dict[str, str] = {}  # the runs that this one goes out from, for config.json
        self.token_bytes = torch.tensor([len(b) for b in tokenizer.token_bytes])

    # -- what a subclass says ------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Σ of the loss over what the batch trains on; its mean is that sum over `weight`."""
        raise TypeError(f"{type(self).__name__} does not say what its loss is")

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        """How many terms `loss` sums up: the trained tokens, unless a subclass says otherwise."""
        return int((batch["labels"][:, 1:] != -100).sum())

    def extra_state(self) -> dict:
        """What a checkpoint must hold besides."""
        return {}

    def load_extra_state(self, state: dict) -> None:
        """Take up what `extra_state` gave."""

    def quality(self, result: dict[str, float]) -> float:
        """What best.pt is the best in, higher is better."""
        return -result["loss"]

    # -- one update ----------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """What counts as a step of the run: here one update. Returns what to log, its "tokens" and the loss's "weight".
        """
        result = self.update(batches) | {"tokens": sum(map(self.tokens, batches)),
                                         "weight": sum(map(self.weight, batches))}
        self.step_count += 1
        return result

    def tokens(self, batch: dict[str, torch.Tensor]) -> int:
        """Tokens that a batch puts through the model, padding not counted."""
        mask = batch.get("segments", batch.get("attention_mask"))
        return batch["input_ids"][:, 1:].numel() if mask is None else int((mask > 0).sum())

    def update(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """One update from `batches` together: the gradient of Σ loss / Σ weight, whatever their sizes."""
        self.modules.train()
        rate = learning_rate_at(self.step_count, self.progress(), self.config)
        while True:
            try:
                loss = self._accumulate([m for batch in batches for m in self._micro_batches(batch)])
                break
            except RuntimeError as error:
                rows = max(-(-len(batch["input_ids"]) // self.micro_splits) for batch in batches)
                if not is_out_of_memory(error) or not self.config.auto_micro_batch:
                    raise
                if rows <= 1:
                    raise UserError("out of memory with one row at a time: try a smaller --seq-len or model, "
                                    "--gradient-checkpointing, or --optimizer adamw") from error
            # outside of except, where the error no longer holds on to the tensors of the failed attempt
            self.micro_splits *= 2
            self._zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.line.say(f"out of memory: going on with micro-batches of {-(-rows // 2)} rows, the same batch in all")
        for optimizer, multiple in zip(self.optimizers, self.rates, strict=True):
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate * multiple
        norms = [torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None],
                                                self.config.grad_clip or math.inf).item() for module in self.modules]
        norm = norms[0] if all(map(math.isfinite, norms)) else math.nan  # a critic's is clipped by itself
        self._update(norm, loss)
        self._zero_grad()
        return {"loss": loss, "grad_norm": norm, "lr": rate}

    def _accumulate(self, micro_batches: list[dict[str, torch.Tensor]]) -> float:
        """Add up the gradients of Σ loss / Σ weight over all micro-batches; returns that mean loss."""
        total = sum(self.weight(batch) for batch in micro_batches)
        if not total:
            raise UserError("a batch holds nothing to train on: all of its labels are -100")
        mean = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with self.autocast():
                part = self.loss(self._to_device(batch)) / total
            self.scaler.scale(part).backward()
            mean += part.detach()
        return mean.item()

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def _micro_batches(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        if self.micro_splits == 1:
            return [batch]
        parts = {key: value.chunk(self.micro_splits) for key, value in batch.items()}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def _update(self, norm: float, loss: float) -> None:
        """Let the optimizers step, unless the gradient is not finite: then weights and moments stay as they are."""
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            for optimizer in self.optimizers:
                if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                    self.scaler.step(optimizer)
        self.scaler.update()  # lowers the scale if unscaling met an infinity
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        if self.skipped_in_row >= 20:
            at = self.train_data.state_dict() if isinstance(self.train_data, BatchLoader) else {}
            where = f", before item {at['index']} of epoch {at['epoch']} of the data" if at else ""
            raise UserError(f"loss or gradient was not finite in 20 steps on end, up to step {self.step_count}{where}: "
                            "try a smaller --learning-rate, or --dtype float32")

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # -- loops ---------------------------------------------------------------------------------------------------------

    def train_epoch(self, dataloader: Iterable[dict[str, torch.Tensor]]) -> float:
        """One pass over any iterable of batches; returns the mean loss of what it trained on."""
        total = weight = 0.0
        batches = iter(dataloader)
        while group := list(itertools.islice(batches, self.config.accumulation_steps)):
            result = self.step(group)
            total += result["loss"] * result["weight"]
            weight += result["weight"]
        if not weight:
            raise UserError("the dataloader gave no batch")
        return total / weight

    @torch.no_grad()
    def evaluate(self, max_tokens: int | None = None) -> dict[str, float]:
        """Over val_data or its first `max_tokens`: {"loss" (nats a token), "bpb" (bits a byte), "tokens", "bytes"}.

        Where the data have checkable answers, "exact_match" too: the share of questions answered right, greedily.
        """
        total, tokens, size = 0.0, 0, 0
        with self.evaluating():
            for batch in self.val_data:
                total += self.loss(self._to_device(batch)).item()
                labels = batch["labels"][:, 1:]
                labels = labels[labels != -100]
                tokens += len(labels)
                size += self.token_bytes[labels].sum().item()
                if max_tokens and tokens >= max_tokens:
                    break
        if not size:
            raise UserError("the validation data holds nothing to score")
        return {"loss": total / tokens, "bpb": total / math.log(2) / size, "tokens": tokens, "bytes": size} \
            | self.exact_match()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The models in evaluation mode, val_data at its beginning."""
        if self.val_data is None:
            raise UserError("there is no validation data to evaluate on")
        if isinstance(self.val_data, BatchLoader):
            self.val_data.rewind()
        with eval_mode(self.modules), self.autocast():
            yield

    def exact_match(self) -> dict[str, float]:
        """{"exact_match"}: the share of val_data's first `eval_prompts` questions answered right; {} without such."""
        if not isinstance(self.val_data, RecordDataLoader):
            return {}
        room = self.model.config.max_position_embeddings - self.config.answer_tokens
        questions = [(ids, answer) for ids, answer in self.val_data.questions(self.config.eval_prompts)
                     if len(ids) <= room]
        if not questions:
            return {}
        replies = self.answers([ids for ids, _ in questions])
        right = sum(answer_matches(reply, answer) for reply, (_, answer) in zip(replies, questions, strict=True))
        return {"exact_match": right / len(questions)}

    def answers(self, questions: list[list[int]]) -> list[str]:
        """Greedy answers to chats that end in a generation prompt."""
        settings = GenerationConfig(max_new_tokens=self.config.answer_tokens, do_sample=False)
        return TextGenerator(self.model, self.tokenizer).continue_rows(questions, settings)

    def samples(self) -> str:
        """Text to show beside an evaluation: answers to a few held-out questions."""
        if not isinstance(self.val_data, RecordDataLoader):
            return ""
        items = [i for i in self.val_data.items[:20] if len(self.val_data.question(i)) + self.config.answer_tokens
                 <= self.model.config.max_position_embeddings][:3]
        questions = [self.val_data.question(i) for i in items]
        asked = [last_content(self.tokenizer.decode_chat(ids)) for ids in questions]
        return "\n".join(f"  {question} → {reply}".replace("\n", "\n  ")
                         for question, reply in zip(asked, self.answers(questions), strict=True))

    def elapsed_s(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def progress(self) -> float:
        """How much of the run is over, 0 … 1: by steps or by the clock, whichever is further."""
        by_step = self.step_count / self.config.max_steps if self.config.max_steps else 0.0
        budget = self.config.minutes * 60 - self.reserve_s
        by_clock = self.elapsed_s() / max(budget, 1e-3) if self.config.minutes else 0.0
        return max(by_step, by_clock)

    def fit(self) -> dict[str, float]:
        """Train until max_steps or minutes, evaluate, save. Ctrl-C or SIGTERM end it after the step, with a checkpoint.

        Returns the last evaluation (empty without val_data) and, if it was interrupted, {"signal": number} too.
        """
        config = self.config
        if self.train_data is None or self.run_dir is None:
            raise UserError("fit() needs train_data and run_dir")
        if not config.max_steps and not config.minutes:
            raise UserError("a run needs an end: give max_steps or minutes")
        if self.progress() >= 1:
            raise UserError(f"there is no time left to train: {self.elapsed_s():.0f} s have gone by, {self.step_count} "
                            "steps are done: give a larger --max-steps or --minutes")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.run_dir), self._signals() as caught:
            self._open_run()
            return self._fit(caught)

    def _fit(self, caught: list[int]) -> dict[str, float]:
        config, evaluated = self.config, {}
        if self.step_count == 0 and self.val_data is not None and self.stage != "pretrain":
            evaluated = self._evaluate()  # what there was before: it has been trained already
        peak_flops = matmul_peak(self.device, self.dtype)
        batches = self._endless()
        losses, tokens, since = [], 0, time.monotonic()  # since the last line of metrics
        while self.progress() < 1 and not caught:
            group = list(itertools.islice(batches, config.accumulation_steps))
            result = self.step(group)
            losses.append(result["loss"])
            count = result.pop("tokens")
            del result["weight"]
            tokens, self.tokens_seen = tokens + count, self.tokens_seen + count
            if self.step_count % config.log_every == 0 or self.step_count == 1:
                speed = tokens / (time.monotonic() - since)
                self.step_s = (time.monotonic() - since) / len(losses)
                flops = speed * self.model.flops_per_token(group[0]["input_ids"].shape[-1] - 1)
                row = {**result, "loss": sum(losses) / len(losses), "tok_per_s": speed, "mfu": flops / peak_flops}
                self._log(row)
                self._show(row, evaluated)
                if not evaluated and self.val_data is not None:  # a guess until it has been timed
                    size = len(self.val_data.tokens) if isinstance(self.val_data, PretrainDataLoader) else math.inf
                    guess = min(config.eval_tokens, size) / (2.5 * speed) + 2.0
                    self.reserve_s = min(guess, 6.0 * config.minutes)
                losses, tokens, since = [], 0, time.monotonic()
            if self.progress() >= 1 or caught:
                break
            pause = time.monotonic()
            if config.eval_every and self.step_count % config.eval_every == 0:
                evaluated = self._evaluate_and_save()
            elif config.save_every and self.step_count % config.save_every == 0:
                self.save_checkpoint(self.run_dir / "checkpoint.pt")
            since += time.monotonic() - pause
        if self.progress() < 1:
            if self.step_count:
                self.save_checkpoint(self.run_dir / "checkpoint.pt")
            return evaluated | {"signal": caught[0]}
        result = self._evaluate_and_save()
        return result | ({"signal": caught[0]} if caught else {})

    @contextlib.contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """A list in which SIGINT and SIGTERM are noted; a second one interrupts at once."""
        caught: list[int] = []

        def note(number: int, _: object) -> None:
            if caught:
                raise KeyboardInterrupt
            caught.append(number)

        main = threading.current_thread() is threading.main_thread()  # signals are its alone
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            yield caught
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _endless(self) -> Iterator[dict[str, torch.Tensor]]:
        resumed = self.step_count > 0  # may stand at the very end of an epoch
        while True:
            found = False
            for batch in self.train_data:
                found = True
                yield batch
            if not found and not resumed:
                raise UserError("train_data gives no more batches: fit() needs data that can be iterated again")
            resumed = False

    def _evaluate(self) -> dict[str, float]:
        """Evaluate on the first `eval_tokens`, log and show it."""
        result = self.evaluate(self.config.eval_tokens)
        self._log({f"val_{name}": value for name, value in result.items()})
        self.line.say(f"step {self.step_count}: validation {describe(result)}")
        return result

    def _evaluate_and_save(self) -> dict[str, float]:
        """Evaluate, save, keep the best, show a sample; returns the evaluation."""
        start = time.monotonic()
        result, is_best = {}, False
        if self.val_data is not None:
            result = self._evaluate()
            is_best, self.best = self.quality(result) > self.best, max(self.quality(result), self.best)
        self.save_checkpoint(self.run_dir / "checkpoint.pt")
        if is_best:
            with atomic_write(self.run_dir / "best.pt") as out, open(self.run_dir / "checkpoint.pt", "rb") as file:
                shutil.copyfileobj(file, out)
        if self.config.sample_tokens and (text := self.samples()):
            self.line.say(text)
        self.reserve_s = 1.1 * (time.monotonic() - start) + 0.3
        return result

    def _show(self, row: dict[str, float], evaluated: dict[str, float]) -> None:
        by_step = (self.config.max_steps - self.step_count) * self.step_s if self.config.max_steps else math.inf
        by_clock = self.config.minutes * 60 - self.elapsed_s() if self.config.minutes else math.inf
        left = max(0, round(min(by_step, by_clock)))
        headline = [name for name in ("exact_match", "pair_accuracy", "bpb") if name in evaluated][:1]
        val = f" | val {describe(evaluated, headline)}" if headline else ""
        now = describe(row, ("loss", "accuracy", "reward", "kl", "answer_length"))
        self.line.show(f"step {self.step_count:>5} {min(self.progress(), 1):>4.0%} | eta {left // 60}:{left % 60:02} | "
                       f"{now}{val} | {row['tok_per_s'] / 1e3:.1f}k tok/s | mfu {row['mfu']:.0%} | "
                       f"{self.monitor.current_bytes() / 1e9:.2f} GB (peak {self.monitor.peak_bytes() / 1e9:.2f})")

    # -- the run directory ---------------------------------------------------------------------------------------------

    def _open_run(self) -> None:
        """Write config.json and tokenizer.json, and drop metrics of steps that a resumed run will take again."""
        if self.step_count == 0 and (self.run_dir / "checkpoint.pt").exists():
            raise UserError(f"{self.run_dir} holds a run already: load its checkpoint, or take another run_dir")
        metrics = self.run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.run_dir) if row["step"] <= self.step_count] if metrics.exists() else []
        with atomic_write(self.run_dir / "config.json") as file:
            file.write(json.dumps(self._config_dict(), indent=2).encode())
        self.tokenizer.save(self.run_dir / "tokenizer.json")
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs tensorboard: pip install -e '.[plot]'") from None
            self.writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=self.step_count + 1)
        with atomic_write(metrics) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())

    def _log(self, row: dict[str, float]) -> None:
        row = {"step": self.step_count, **row, "tokens": self.tokens_seen, "skipped": self.skipped,
               "peak_bytes": self.monitor.peak_bytes(), "elapsed_s": round(self.elapsed_s(), 2)}
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON knows no NaN
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.config.tensorboard:
            for name, value in row.items():
                if value is not None and name != "step":
                    self.writer.add_scalar(name, value, self.step_count)
            self.writer.flush()

    def _config_dict(self) -> dict:
        sources = {"train": self.train_data, "val": self.val_data}
        return {"stage": self.stage, **self.origin, "model": dataclasses.asdict(self.model.config),
                "train": dataclasses.asdict(self.config), "rl": dataclasses.asdict(self.rl),
                "data": {name: data.source for name, data in sources.items() if hasattr(data, "source")}}

    def save_checkpoint(self, path: str | Path) -> None:
        """Everything that going on needs: weights, moments, scaler, cursor, random states, counters, configuration."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            rng["mps"] = torch.mps.get_rng_state()
        save_checkpoint(path, {
            "model": self.model.state_dict(), "critic": [module.state_dict() for module in self.modules[1:]],
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(), "rng": rng, "config": self._config_dict(),
            "data": self.train_data.state_dict() if hasattr(self.train_data, "state_dict") else None,
            "tokenizer_hash": self.tokenizer.content_hash(), "step": self.step_count, "tokens": self.tokens_seen,
            "skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "micro_splits": self.micro_splits,
            "extra": self.extra_state(), "best": self.best, "finished": self.progress() >= 1,
            "elapsed_s": self.elapsed_s()})

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on where `save_checkpoint` left off."""
        state = load_checkpoint(path, repair=True)
        shape = dataclasses.asdict(self.model.config)
        if state["config"]["model"] != shape:
            other = {k: v for k, v in state["config"]["model"].items() if v != shape.get(k)}
            raise UserError(f"{path} holds a model of another shape: there {other}, "
                            f"here { {k: shape.get(k) for k in other} }")
        if state["tokenizer_hash"] != self.tokenizer.content_hash():
            raise UserError(f"{path} was trained with another tokenizer")
        if state["config"]["train"].get("lora_rank", 0) != self.config.lora_rank:
            raise UserError(f"{path} was trained with --lora-rank {state['config']['train'].get('lora_rank', 0)}")
        if len(state["optimizers"]) != len(self.optimizers):
            raise UserError(f"{path} was trained with --optimizer {state['config']['train']['optimizer']}")
        for module, saved in zip(self.modules, [state["model"], *state.get("critic", [])], strict=True):
            module.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)  # moments as they were; settings as they are now
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        self.load_extra_state(state.get("extra", {}))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if state["data"] is not None and hasattr(self.train_data, "load_state_dict"):
            self.train_data.load_state_dict(state["data"])
        self.step_count, self.tokens_seen = state["step"], state["tokens"]
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self.micro_splits, self.best = state["micro_splits"], state["best"]
        self.elapsed_before = state["elapsed_s"]
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        elif "mps" in state["rng"] and self.device.type == "mps":
            torch.mps.set_rng_state(state["rng"]["mps"])


class PreTrainer(Trainer):
    """Next-token prediction on blocks of text: cross-entropy of token t+1 given 0 … t, and the balance loss."""

    stage = "pretrain"

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"][:, 1:]
        mask = batch.get("attention_mask")  # padding is on the right, where causality already hides it
        hidden, balance = self.model.hidden_states(batch["input_ids"][:, :-1],
                                                   token_mask=None if mask is None else mask[:, :-1])
        loss = chunked_cross_entropy(hidden, self.model.output_weight, labels)
        if self.model.config.num_experts:
            loss = loss + self.model.config.router_aux_loss_coef * balance * self.weight(batch)
        return loss

    def samples(self) -> str:
        """A Chinese and an English continuation of how held-out documents begin, as far as there are such documents."""
        generator = TextGenerator(self.model, self.tokenizer)
        settings = GenerationConfig(max_new_tokens=self.config.sample_tokens, temperature=0.7, seed=self.config.seed)
        continuations = [(p, generator.generate(p, settings)) for p in self.prompts()]
        return "\n".join("  " + f"{prompt}→{text}".replace("\n", "\n  ") for prompt, text in continuations)

    def prompts(self, length: int = 8) -> list[str]:
        """How a held-out text begins, one with Chinese characters and one without, where there are such."""
        if not isinstance(self.val_data, PretrainDataLoader):
            return ["Once there was"]
        text = self.tokenizer.decode(self.val_data.tokens[:50_000].long(), skip_special_tokens=False)
        ends = self.tokenizer.special_tokens[self.tokenizer.eos_id]
        text = text.replace(self.tokenizer.special_tokens.get(self.tokenizer.bos_id, ends), ends)
        starts = [document.strip().split("\n")[0] for document in text.split(ends)]
        if len(starts) < 10:  # long documents: begin with their lines
            starts = text.split("\n")[1:] or starts
        found: dict[bool, str] = {}
        for start in starts:
            ids = self.tokenizer.encode(start)
            if len(ids) > length:
                prompt = self.tokenizer.decode_bytes(ids[:length]).decode("utf-8", "ignore")  # no half characters
                chinese = bool(re.search(f"[{_HAN}]", prompt))
                found.setdefault(chinese, prompt if chinese else prompt.rpartition(" ")[0] or prompt)  # nor half words
        return list(found.values()) or ["Once there was"]


class SFTTrainer(Trainer):
    """Supervised fine-tuning: next-token prediction on the assistant's tokens of conversations, packed or not."""

    stage = "sft"

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        segments, positions = batch["segments"][:, :-1], batch["position_ids"][:, :-1]
        hidden, balance = self.model.hidden_states(
            batch["input_ids"][:, :-1], position_ids=positions, token_mask=segments > 0,
            attention_mask=segments[:, :, None] == segments[:, None])
        labels = batch["labels"][:, 1:]
        trained = labels != -100
        loss = chunked_cross_entropy(hidden[trained], self.model.output_weight, labels[trained])
        if self.model.config.num_experts:
            loss = loss + self.model.config.router_aux_loss_coef * balance * trained.sum()
        return loss


def frozen_copy(model: nn.Module) -> nn.Module:
    """A model of its own that stays as `model` is now, without dropout."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def remove_dropout(modules: nn.Module) -> None:
    """Let nothing but the weights decide log-probabilities: a policy equals its reference at first, to the last bit."""
    for module in modules.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def pair_accuracies(margins: torch.Tensor, categories: torch.Tensor, names: list[str]) -> dict[str, float]:
    """{"pair_accuracy"}: the share of pairs with a margin (pairs,) above 0, and that share in each named category."""
    right = torch.where(margins.abs() < 1e-4, 0.5, (margins > 0).float())  # rounding errors are ties
    found = {f"pair_accuracy_{name}": right[categories == k].mean().item() for k, name in enumerate(names) if name}
    return {"pair_accuracy": right.mean().item()} | found


def answer_logprobs(model: MiniGPT, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities (B, 2) of the answers of a batch of pairs, summed over their tokens."""
    ids, labels, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask"))
    hidden, _ = model.hidden_states(ids[:, :-1], token_mask=mask[:, :-1])
    return token_logprobs(hidden, model.output_weight, labels[:, 1:]).sum(dim=1).view(-1, 2)


class DPOTrainer(Trainer):
    """Direct preference optimisation (arXiv:2305.18290) of a policy against the frozen model that it starts as.

    `reference`: that model (default: a copy of `model`); its log-probabilities are computed once for each pair.
    """

    stage = "dpo"

    def __init__(self, model: MiniGPT, tokenizer: BPETokenizer, device: str | torch.device = "cpu", *,
                 reference: MiniGPT | None = None, **options) -> None:
        self.reference = frozen_copy(reference or model)
        super().__init__(model, tokenizer, device, **options)
        remove_dropout(self.modules)
        self.reference.to(self.device)
        for loader in (self.train_data, self.val_data):
            if isinstance(loader, DPODataLoader) and loader.reference_logprobs is None:
                self.cache_reference(loader)

    def cache_reference(self, loader: DPODataLoader) -> None:
        if len(loader.items) > 1000:
            self.line.say(f"the reference scores {len(loader.items):,} pairs, once")
        logprobs = torch.zeros(len(loader.ends) // 3, 2)
        for part in _batched(sorted(loader.items, key=loader.lengths.__getitem__), lambda _: 1, loader.batch_size):
            logprobs[part] = self.reference_logprobs(self._to_device(loader.collate(part))).cpu()
        loader.reference_logprobs = logprobs

    def reference_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, 2), from the batch where the loader has them."""
        if "reference_logprobs" in batch:
            return batch["reference_logprobs"]
        with torch.no_grad(), self.autocast():
            return answer_logprobs(self.reference, batch)

    def extra_state(self) -> dict:
        return {"reference": digest(self.reference.state_dict())}

    def load_extra_state(self, state: dict) -> None:
        if state != self.extra_state():
            raise UserError("the reference is not the one that this run started with: give that")

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["input_ids"])

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        policy, reference = answer_logprobs(self.model, batch), self.reference_logprobs(batch)
        loss = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], self.rl.dpo_beta,
                        self.rl.dpo_kind)
        if self.rl.dpo_sft_coef:
            lengths = (batch["labels"][:, 0] != -100).sum(dim=1)
            loss = loss - self.rl.dpo_sft_coef * (policy[:, 0] / lengths).mean()
        return loss * len(policy)

    def quality(self, result: dict[str, float]) -> float:
        return -result["dpo_loss"]

    @torch.no_grad()
    def evaluate(self, max_tokens: int | None = None) -> dict[str, float]:
        """Of val_data's chosen answers "loss" (nats a token), "bpb", "tokens", "bytes", "chosen_logprob" (an answer).

        "pair_accuracy": the share of pairs whose chosen answer has gained more on the reference than the rejected one,
        also by category; "dpo_loss".
        """
        logprobs, references, categories, labels = [], [], [], []
        with self.evaluating():
            for batch in map(self._to_device, self.val_data):
                logprobs.append(answer_logprobs(self.model, batch))
                references.append(self.reference_logprobs(batch))
                categories.append(batch["category"])
                labels.append(batch["labels"][:, 0][batch["labels"][:, 0] != -100])
        policy, reference, labels = torch.cat(logprobs), torch.cat(references), torch.cat(labels)
        gain = policy - reference
        nats, size = -policy[:, 0].sum().item(), self.token_bytes[labels.cpu()].sum().item()
        loss = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], self.rl.dpo_beta,
                        self.rl.dpo_kind)
        return {"loss": nats / len(labels), "bpb": nats / math.log(2) / size, "tokens": len(labels), "bytes": size,
                "dpo_loss": loss.item(), "chosen_logprob": -nats / len(policy),
                **pair_accuracies(gain[:, 0] - gain[:, 1], torch.cat(categories),
                                  getattr(self.val_data, "categories", []))}


class RewardTrainer(Trainer):
    """Trains a RewardModel to score chosen answers above rejected ones (Bradley-Terry; arXiv:2203.02155).

    It goes on to learn to write the chosen answers, too, which makes scores hold on unseen ones (arXiv:2406.10216).
    """

    stage = "reward"

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["input_ids"])

    def scores(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, 2): of the chosen and of the rejected answers."""
        return self.model(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)).view(-1, 2)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, labels, mask = (batch[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask"))
        hidden, _ = self.model.hidden_states(ids, token_mask=mask)
        scores = self.model.final_score(hidden, mask).view(-1, 2)
        loss = reward_loss(scores[:, 0], scores[:, 1]) + self.rl.reward_center_coef * scores.sum(dim=1).square().mean()
        if self.rl.reward_sft_coef:
            hidden, labels = hidden[::2, :-1], labels[::2, 1:]  # the chosen answers
            logprobs = token_logprobs(hidden, self.model.output_weight, labels).sum(dim=1)
            loss = loss - self.rl.reward_sft_coef * (logprobs / (labels != -100).sum(dim=1)).mean()
        return loss * len(scores)

    @torch.no_grad()
    def evaluate(self, max_tokens: int | None = None) -> dict[str, float]:
        """"loss" (nats a pair), "pair_accuracy" (also by category), "longer_accuracy" of taking the longer answer."""
        scores, lengths, categories, tokens = [], [], [], 0
        with self.evaluating():
            for batch in map(self._to_device, self.val_data):
                scores.append(self.scores(batch))
                lengths.append(batch["attention_mask"].sum(dim=2))
                categories.append(batch["category"])
                tokens += self.tokens(batch)
        scores, lengths, categories = torch.cat(scores), torch.cat(lengths), torch.cat(categories)
        longer = pair_accuracies(lengths[:, 0] - lengths[:, 1], categories, [])["pair_accuracy"]
        return {"loss": reward_loss(scores[:, 0], scores[:, 1]).item(), "tokens": tokens, "longer_accuracy": longer,
                **pair_accuracies(scores[:, 0] - scores[:, 1], categories, getattr(self.val_data, "categories", []))}

    @torch.no_grad()
    def samples(self) -> str:
        """The scores of a few held-out pairs."""
        batch = self.val_data.collate(self.val_data.items[:2])
        with eval_mode(self.model):
            scores = self.scores(self._to_device(batch)).tolist()
        chats = [[self.tokenizer.decode_chat(row) for row in pair] for pair in batch["input_ids"].tolist()]
        return "\n".join(f"  {chat[-2]['content'] if len(chat) > 1 else ''} → {chat[-1]['content']} [{score:.2f}]"
                         for pair, both in zip(chats, scores, strict=True)
                         for chat, score in zip(pair, both, strict=True))


# ======================================================================================================================
# 10 Reinforcement learning: the policy writes answers, a reward scores them, an update makes good ones likelier.
# ======================================================================================================================


def answer_reward(messages: list[dict], reply: str, answer: str) -> float:
    """1 for a reply whose first sentence is the prompt's checkable answer, else 0."""
    if not answer:
        raise UserError('--reward answer needs prompts with an "answer" (or "gt"): one has none: '
                        f"{messages[-1]['content'][:80]!r}")
    return float(answer_matches(reply, answer))


def failure(error: BaseException) -> str:
    """What went wrong in a user's code, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}: {type(error).__name__}: {error}"


def pieces(lengths: torch.Tensor, rows: torch.Tensor | None = None, size: int = 64) -> list[torch.Tensor]:
    """Rows (default: all) in pieces of at most `size` of similar length: mixed ones would be mostly padding."""
    rows = torch.arange(len(lengths), device=lengths.device) if rows is None else rows.to(lengths.device)
    return list((rows if len(rows) <= size else rows[lengths[rows].argsort(stable=True)]).split(size))


def take(batch: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of an experience, without the columns on the right that only longer rows need."""
    cut = int(batch["last"].max() - batch["last"][rows].max())
    return {name: value[rows, :value.shape[1] - cut] if value.dim() > 1 else value[rows]
            for name, value in batch.items()}


def in_pieces(fn: Callable[[dict[str, torch.Tensor]], torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """fn(batch), which is (N,) or (N, T - 1), worked out in pieces of rows of similar length."""
    parts, width = pieces(batch["last"]), batch["mask"].shape[1]
    found = [fn(take(batch, rows)) for rows in parts]
    found = [F.pad(x, (0, width - x.shape[1])) if x.dim() > 1 else x for x in found]
    return torch.cat(found)[torch.cat(parts).argsort()]


def check_stage(stage: str, train: TrainConfig, shape: MiniGPTConfig) -> None:
    """Whether a model of that shape can go through a stage with such options."""
    if train.answer_tokens >= shape.max_position_embeddings:
        raise UserError(f"answer_tokens={train.answer_tokens} leave no room for a question in the context of "
                        f"max_position_embeddings={shape.max_position_embeddings}")
    if stage in ("ppo", "grpo") and train.accumulation_steps > 1:
        raise UserError(f"accumulation_steps={train.accumulation_steps} has no meaning here: batch_size prompts make a "
                        "rollout, minibatch_size answers an update")


class RLTrainer(Trainer):
    """What PPO and GRPO share: rollouts, their scores, minibatch updates, held-out evaluation.

    A step takes a batch of a PromptDataLoader. `reward`: a RewardModel, or a function of (messages, reply, answer) that
    gives a number. `reference`: the model to stay near (default: a copy of `model`). A subclass's `experience` is a
    rollout with its advantages, one row an answer, in which position j predicts token j + 1: log-probabilities, values
    and rewards at j, (N, T - 1), all belong to that token.
    """

    def __init__(self, model: MiniGPT, tokenizer: BPETokenizer, device: str | torch.device = "cpu", *,
                 reward: RewardModel | Callable[[list[dict], str, str], float], reference: MiniGPT | None = None,
                 **options) -> None:
        self.reference = frozen_copy(reference or model)
        self.reward = frozen_copy(reward) if isinstance(reward, RewardModel) else reward
        super().__init__(model, tokenizer, device, **options)
        remove_dropout(self.modules)
        self.reference.to(self.device)
        if isinstance(self.reward, RewardModel):
            self.reward.to(self.device)
        check_stage(self.stage, self.config, model.config)
        self.kl_coef, self.moves = self.rl.kl_coef, []

    def extra_state(self) -> dict:
        parts = {"reference": self.reference, "reward": self.reward}
        return {"kl_coef": self.kl_coef} | {
            name: digest(part.state_dict()) if isinstance(part, nn.Module)
            else getattr(part, "__qualname__", type(part).__qualname__) for name, part in parts.items()}

    def load_extra_state(self, state: dict) -> None:
        for name in ("reference", "reward"):
            if state.get(name) != self.extra_state().get(name):
                raise UserError(f"the {name} is not the one that this run started with: give that")
        self.kl_coef = state["kl_coef"] if self.rl.kl_target else self.rl.kl_coef

    def logprobs(self, model: MiniGPT, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probability of each answer token under a model, (N, T - 1); of ids that can be sampled, as sampled."""
        ids = batch["input_ids"]
        hidden, _ = model.hidden_states(ids[:, :-1], token_mask=batch["token_mask"][:, :-1])
        labels = ids[:, 1:].where(batch["mask"], -100)
        return token_logprobs(hidden, model.output_weight[:self.tokenizer.vocab_size], labels, self.rl.temperature)

    def write(self, prompts: dict, seed: int | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of each row, prompt and the policy's answer up to its first end-of-turn, without padding; whether it has one.
        """
        settings = GenerationConfig(max_new_tokens=self.config.answer_tokens, temperature=self.rl.temperature,
                                    top_p=1.0)
        generator, asked = TextGenerator(self.model, self.tokenizer), prompts["attention_mask"].sum(dim=1)
        whole, ended = {}, torch.zeros(len(asked), dtype=torch.bool, device=self.device)
        for k, rows in enumerate(pieces(asked)):
            n = int(asked[rows].max())
            if seed is not None:
                settings = dataclasses.replace(settings, seed=(seed + 7919 * k) % 2 ** 32)  # else pieces draw alike
            with self.autocast():
                written = generator.sample_generate(prompts["input_ids"][rows, -n:], settings,
                                                    prompts["attention_mask"][rows, -n:])
            stops = torch.isin(written[:, n:], torch.tensor(generator.stop_ids, device=self.device))
            ended[rows] = stops.any(dim=1)
            lengths = torch.where(ended[rows], stops.int().argmax(dim=1) + 1, stops.shape[1]).tolist()
            for i, row, begin, length in zip(rows.tolist(), written, (n - asked[rows]).tolist(), lengths, strict=True):
                whole[i] = row[begin:n + length]
        return [whole[i] for i in range(len(asked))], ended

    @torch.no_grad()
    def rollout(self, prompts: dict, seed: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Let the policy answer a batch of prompts -> the experience and what to log.

        Experience: "input_ids", "token_mask" (N, T), padded on the right; "mask" (answer tokens), "logprobs",
        "reference_logprobs" (N, T - 1); "scores", "last" (N,), the position of the last token. An answer ends with its
        first end-of-turn, whatever ids come before; one without any loses `missing_end_penalty`.
        """
        began = time.monotonic()
        whole, ended = self.write(prompts, seed)
        took = time.monotonic() - began
        begins, ends = prompts["attention_mask"].sum(dim=1).to(self.device), torch.tensor(list(map(len, whole)))
        replies = [self.tokenizer.decode(row[n:]) for row, n in zip(whole, begins.tolist(), strict=True)]
        lengths = (ends := ends.to(self.device)) - begins
        ids = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=self.tokenizer.pad_id)  # (N, T)
        at = torch.arange(ids.shape[1], device=self.device)
        batch = {"input_ids": ids, "token_mask": at < ends[:, None], "last": ends - 2}
        batch["mask"] = ((at >= begins[:, None]) & batch["token_mask"])[:, 1:]
        with eval_mode(self.model), self.autocast():
            batch["logprobs"] = in_pieces(lambda part: self.logprobs(self.model, part), batch)
            batch["reference_logprobs"] = in_pieces(lambda part: self.logprobs(self.reference, part), batch)
            scores = self.score(batch, prompts, replies)
        batch["scores"] = scores - self.rl.missing_end_penalty * ~ended
        kl = kl_estimate(batch["logprobs"], batch["reference_logprobs"])
        stats = {"reward": scores.mean().item(), "kl": (kl * batch["mask"]).sum(dim=1).mean().item(),
                 "entropy": -masked_mean(batch["logprobs"], batch["mask"]).item(), "ended": ended.float().mean().item(),
                 "answer_length": lengths.float().mean().item(), "rollout_s": took,
                 "rollout_tok_per_s": lengths.sum().item() / took, "tokens": batch["token_mask"].sum().item()}
        if all(prompts["answers"]):
            stats["accuracy"] = sum(map(answer_matches, replies, prompts["answers"])) / len(replies)
        return batch, stats

    def score(self, batch: dict[str, torch.Tensor], prompts: dict, replies: list[str]) -> torch.Tensor:
        """What the reward says of each answer, (N,)."""
        if isinstance(self.reward, RewardModel):
            return in_pieces(lambda part: self.reward(part["input_ids"], part["token_mask"]), batch)
        rows = zip(prompts["input_ids"].tolist(), prompts["attention_mask"].sum(dim=1).tolist(), strict=True)
        asked = [self.tokenizer.decode_chat(row[len(row) - n:]) for row, n in rows]
        try:
            scores = [self.reward(*args) for args in zip(asked, replies, prompts["answers"], strict=True)]
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"the reward function failed: {failure(error)}") from error
        for value in scores:
            if not hasattr(value, "__float__") or not math.isfinite(float(value)):
                raise UserError(f"the reward function gave {value!r}: it must give a finite number")
        return torch.tensor(list(map(float, scores)), device=self.device)

    def step(self, batches: list[dict]) -> dict[str, float]:
        """A rollout, and a few epochs of minibatch updates on it, fewer if the policy has moved by `stop_kl`."""
        began = time.monotonic()
        batch, stats = self.experience(batches[0])
        count = len(batch["input_ids"])  # 0 where nothing is to be learned from the rollout
        minibatches = (rows for _ in range(self.rl.update_epochs if count else 0)
                       for rows in torch.randperm(count).chunk(-(-count // self.rl.minibatch_size)))
        results, moved = [], 0.0
        for rows in minibatches:
            self.moves = []
            results.append(self.update([take(batch, part) for part in pieces(batch["last"], rows, 32)]))
            moved = (sum(kl for kl, _ in self.moves) / sum(tokens for _, tokens in self.moves)).item()
            if self.rl.stop_kl and moved > self.rl.stop_kl:
                break
        self.step_count += 1
        updates, results = len(results), results or [{"loss": 0.0, "grad_norm": 0.0}]
        mean = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
        share = stats.pop("rollout_s") / (time.monotonic() - began)
        return {**mean, **stats, "rollout_share": share, "updates": updates, "moved": moved,
                "kl_coef": self.kl_coef, "weight": max(1, count)}

    def note_move(self, batch: dict[str, torch.Tensor], logprobs: torch.Tensor) -> None:
        """Note how far the policy is from the one that wrote the answers (nats a token), for `stop_kl`."""
        kl = kl_estimate(batch["logprobs"], logprobs.detach(), "k3")
        self.moves.append(((kl * batch["mask"]).sum(), batch["mask"].sum()))

    def quality(self, result: dict[str, float]) -> float:
        return result.get("exact_match", result["reward"])

    @torch.no_grad()
    def evaluate(self, max_tokens: int | None = None) -> dict[str, float]:
        """Of answers sampled to val_data's first `eval_prompts`: "reward", "kl"; greedily: "exact_match", if checkable.
        """
        stats, seen = Counter(), 0
        with self.evaluating():
            for k, prompts in enumerate(self.val_data):
                prompts = {name: value[:self.config.eval_prompts - seen] for name, value in prompts.items()}
                found = self.rollout(prompts, self.config.seed + k)[1]
                seen += len(prompts["answers"])
                for name in ("reward", "kl", "answer_length"):
                    stats[name] += found[name] * len(prompts["answers"])
                if seen >= self.config.eval_prompts:
                    break
        return {name: value / seen for name, value in stats.items()} | self.exact_match()


class PPOTrainer(RLTrainer):
    """Proximal policy optimisation with a critic (arXiv:1707.06347; details as in arXiv:2310.10505).

    Each token earns -kl_coef · k1, the last one the score besides. The critic is a model of its own, which starts as
    the reward model where the reward is one, else as the policy.
    """

    stage = "ppo"

    def __init__(self, model: MiniGPT, tokenizer: BPETokenizer, device: str | torch.device = "cpu", *,
                 reward: RewardModel | Callable[[list[dict], str, str], float], **options) -> None:
        self.critic = RewardModel(reward if isinstance(reward, RewardModel) else model)
        super().__init__(model, tokenizer, device, reward=reward, critic=self.critic, **options)
        if 0 < self.config.max_steps <= self.rl.critic_warmup:
            self.line.say(f"critic_warmup={self.rl.critic_warmup}: all of max_steps={self.config.max_steps} will train "
                          "the critic alone, and the policy stays as it is")

    def values(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The critic's estimate before each token is written, (N, T - 1)."""
        return self.critic.token_scores(batch["input_ids"][:, :-1], token_mask=batch["token_mask"][:, :-1])

    @torch.no_grad()
    def experience(self, prompts: dict) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        batch, stats = self.rollout(prompts)
        with eval_mode(self.critic), self.autocast():
            batch["values"] = in_pieces(self.values, batch)
        rewards = -self.kl_coef * kl_estimate(batch["logprobs"], batch["reference_logprobs"]) * batch["mask"]
        rewards.scatter_add_(1, batch["last"][:, None], batch["scores"][:, None])
        advantages, batch["returns"] = gae(rewards, batch["values"], batch["mask"], self.rl.gamma, self.rl.gae_lambda)
        batch["advantages"] = whiten(advantages, batch["mask"])
        if self.rl.kl_target:  # arXiv:1909.08593, section 2.2
            error = min(max(stats["kl"] / self.rl.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * min(1.0, len(rewards) / self.rl.kl_horizon)
        return batch, stats

    def weight(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["mask"].sum())

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask, logprobs = batch["mask"], self.logprobs(self.model, batch)
        self.note_move(batch, logprobs)
        value = ppo_value_loss(self.values(batch), batch["values"], batch["returns"], mask, self.rl.value_clip)
        loss = self.rl.value_coef * value
        if self.step_count >= self.rl.critic_warmup:
            loss = loss + ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"], mask, self.rl.clip_range)
        return loss * mask.sum()


class GRPOTrainer(RLTrainer):
    """Group-relative policy optimisation (arXiv:2402.03300): several answers a prompt, each compared with their mean.

    By default with the normalisation of Dr. GRPO (arXiv:2503.20783): no division by the group's deviation, and token
    losses summed over an answer and divided by `answer_tokens`, so that neither ease nor length weighs.
    """

    stage = "grpo"

    @torch.no_grad()
    def experience(self, prompts: dict) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        G = self.rl.group_size
        batch, stats = self.rollout({
            name: value.repeat_interleave(G, dim=0) if isinstance(value, torch.Tensor)
            else [item for item in value for _ in range(G)] for name, value in prompts.items()})
        batch["advantages"] = grpo_advantages(batch["scores"], G, self.rl.advantage_kind)
        equal = (batch["advantages"].view(-1, G) == 0).all(dim=1)
        stats["equal_groups"] = equal.float().mean().item()
        if not self.rl.grpo_kl_coef:  # they have no gradient: why compute it?
            keep = ~equal.repeat_interleave(G)
            share = keep.float().mean()
            batch = {name: value[keep] for name, value in batch.items()}
        else:
            share = torch.ones(())
        batch["rows"] = torch.ones_like(batch["scores"]) / share  # they count in the mean all the same
        return batch, stats

    def weight(self, batch: dict[str, torch.Tensor]) -> float:
        return batch["rows"].sum().item()

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask, logprobs = batch["mask"], self.logprobs(self.model, batch)
        self.note_move(batch, logprobs)
        each = mask.sum(dim=1, keepdim=True) if self.rl.advantage_kind == "grpo" else self.config.answer_tokens
        weights = mask / each  # (N, T - 1)
        loss = ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"][:, None], weights, self.rl.clip_range)
        if self.rl.grpo_kl_coef:
            kl = kl_estimate(logprobs, batch["reference_logprobs"], "k3")
            loss = loss + self.rl.grpo_kl_coef * masked_mean(kl, weights)
        return loss * weights.sum()


# ======================================================================================================================
# 11 RLHF pipeline: a stage goes out from its parent's run; the pipeline strings SFT, reward model and PPO together.
# ======================================================================================================================

PARENTS = {"sft": "pretrain", "dpo": "sft", "reward": "sft", "ppo": "sft", "grpo": "sft"}
LOADERS = {"pretrain": PretrainDataLoader, "sft": ConversationDataLoader, "dpo": DPODataLoader,
           "reward": DPODataLoader, "ppo": PromptDataLoader, "grpo": PromptDataLoader}


def load_reward(source: str, tokenizer: BPETokenizer) -> RewardModel | Callable[[list[dict], str, str], float]:
    """What --reward names: "answer", the run directory of a reward model, or FILE.py:function, which is executed."""
    if source == "answer":
        return answer_reward
    path, _, name = source.rpartition(":")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise UserError(f"--reward {source}: there is no file {path}")
        try:
            function = runpy.run_path(path).get(name)
        except SyntaxError as error:
            raise UserError(f"--reward {source}: {path}:{error.lineno}: {error.msg}") from error
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {source}: {failure(error)}") from error
        if not callable(function):
            raise UserError(f"--reward {source}: {path} has no function {name}")
        return function
    if not holds_run(source):
        raise UserError(f"--reward {source} is neither answer, nor FILE.py:function, nor the run directory of a reward "
                        "model (trained with --stage reward)")
    model, its_tokenizer, _ = load_run(source)
    if not isinstance(model, RewardModel):
        raise UserError(f"--reward {source}: that run holds no reward model: train one with --stage reward")
    if its_tokenizer.content_hash() != tokenizer.content_hash():
        raise UserError(f"--reward {source}: its tokenizer is not the policy's")
    return model


def open_data(stage: str, tokenizer: BPETokenizer, shape: MiniGPTConfig, train: TrainConfig, source: dict,
              shuffle: bool, cache_dir: str | Path) -> BatchLoader:
    """The batches of a stage from `source`, {"paths", "split"}."""
    seq_len = train.seq_len or shape.max_position_embeddings
    if stage in ("ppo", "grpo"):  # what a prompt leaves is for the answer
        seq_len = min(seq_len, shape.max_position_embeddings) - train.answer_tokens
    options = {"packing": train.packing} if stage == "sft" else {}
    return LOADERS[stage](source["paths"], tokenizer, train.batch_size, seq_len, source["split"], shuffle=shuffle,
                          seed=train.seed, cache_dir=cache_dir, on_bad_record=train.on_bad_record, **options)


def open_stage(stage: str, run_dir: str | Path, parent: str | Path, sources: dict[str, dict], train: TrainConfig,
               rl: RLHFConfig | None = None, *, reward: str = "answer", device: str | torch.device = "cpu",
               cache_dir: str | Path = "out/cache", started: float | None = None, resume: bool = False) -> Trainer:
    """The trainer of a stage after pretraining, ready to `fit`: the model of the run `parent`, data, reward, reference.

    `sources`: {"train": {"paths", "split"}, "val": …}. With `resume` it goes on from run_dir's checkpoint.
    """
    model, tokenizer, _ = load_run(parent)
    if isinstance(model, RewardModel):
        raise UserError(f"{parent} holds a reward model, which can not be the beginning of another stage")
    check_stage(stage, train, model.config)
    reward_source = load_reward(reward, tokenizer) if stage in ("ppo", "grpo") else None
    torch.manual_seed(train.seed)
    data = {part: open_data(stage, tokenizer, model.config, train, sources[part], part == "train", cache_dir)
            for part in ("train", "val")}
    for loader in data.values() if reward_source is answer_reward else ():
        if lacking := sum(not loader.text(i, 1) for i in loader.items):
            raise UserError(f'{", ".join(loader.source["paths"])}: --reward answer needs prompts with an "answer" (or '
                            f'"gt"): {lacking} of {len(loader.items)} have none')
    options = {"config": train, "rl_config": rl, "train_data": data["train"], "val_data": data["val"],
               "run_dir": run_dir, "started": started}
    origin = {"parent": str(Path(parent).absolute())}
    if stage in ("ppo", "grpo"):
        trainer = (PPOTrainer if stage == "ppo" else GRPOTrainer)(
            model, tokenizer, device, reward=reward_source, **options)
        origin["reward"] = reward if reward == "answer" else str(Path(reward).absolute())
    else:
        model = RewardModel(model) if stage == "reward" else model
        trainer = {"sft": SFTTrainer, "dpo": DPOTrainer, "reward": RewardTrainer}[stage](
            model, tokenizer, device, **options)
    trainer.origin = origin
    if resume:
        trainer.load_checkpoint(Path(run_dir) / "checkpoint.pt")
    return trainer


class RLHFPipeline:
    """SFT -> reward model -> PPO (arXiv:2203.02155), each in its own run directory under `out`, from a pretrained run.

    `config`: for the reward model and PPO. `base`: the pretrained run. `sources`: as in `open_stage`. `train`: the
    TrainConfig of a stage, where it is not the preset's. `run` goes on where it stopped, after the finished stages.
    """

    stages = ("sft", "reward", "ppo")
    metrics = {"pretrain": ("bpb",), "sft": ("exact_match", "bpb"), "reward": ("pair_accuracy",),
               "ppo": ("exact_match", "reward")}  # the first that was logged: data need not have checkable answers

    def __init__(self, config: RLHFConfig, base: str | Path = "out/tiny/pretrain", out: str | Path = "out/tiny",
                 sources: dict[str, dict] | None = None, train: dict[str, TrainConfig] | None = None, *,
                 preset: str = "tiny", device: str | torch.device = "cpu", cache_dir: str | Path = "out/cache") -> None:
        self.config, self.base, self.out, self.cache_dir = config, Path(base), Path(out), Path(cache_dir)
        self.sources = sources or {part: {"paths": [f"data/{part}"], "split": "all"} for part in ("train", "val")}
        self.train = {stage: get_train_config(preset, stage) for stage in self.stages} | (train or {})
        self.device = device

    def run(self) -> list[dict]:
        """Train what is not finished yet; returns the rows of the table, of the stages that are finished.

        A row: "stage", "seconds", "metric" (its name), "before", "after", "answer" (to the same held-out prompt).
        """
        rows = [self.row("pretrain", self.base)]
        for stage in self.stages:
            run_dir = self.out / stage
            if self.finished(run_dir):
                print(f"{stage}: finished already, in {run_dir}", flush=True)
            else:
                print(f"\n== {stage}: {run_dir}", flush=True)
                trainer = open_stage(stage, run_dir, self.base if stage == "sft" else self.out / "sft",
                                     self.sources_of(stage), self.train[stage], self.config,
                                     reward=str(self.out / "reward"), device=self.device, cache_dir=self.cache_dir,
                                     resume=holds_run(run_dir))
                result = trainer.fit()
                if "signal" in result:
                    return [*rows, result]
            rows.append(self.row(stage, run_dir))
        return rows

    def sources_of(self, stage: str) -> dict[str, dict]:
        """The sources without the files that have nothing for a stage, but something for another."""
        kind, found = LOADERS[stage].kind, {}
        for part, source in self.sources.items():
            kinds = {path: kinds_of(path) for path in path_list(source["paths"])}
            wanted = kind if kind in set().union(*kinds.values()) else "chat"  # whose questions are prompts, too
            found[part] = source | {"paths": [path for path, there in kinds.items() if wanted in there]}
        return found

    def check(self) -> None:
        """Read all data, and check what each stage needs: what is wrong with them shows before anything is trained."""
        model, tokenizer, _ = load_run(self.base)
        for stage in self.stages:
            check_stage(stage, self.train[stage], model.config)
            for part, source in self.sources_of(stage).items():
                open_data(stage, tokenizer, model.config, self.train[stage], source, part == "train", self.cache_dir)

    @staticmethod
    def finished(run_dir: Path) -> bool:
        return holds_run(run_dir) and load_checkpoint(run_dir / "checkpoint.pt").get("finished", True)

    def row(self, stage: str, run_dir: Path) -> dict:
        """What a finished stage comes to."""
        logged = read_metrics(run_dir)
        name = next((n for n in self.metrics[stage] if any(f"val_{n}" in row for row in logged)), "")
        found = [row for row in logged if f"val_{name}" in row] or [logged[-1] | {"val_": None}]
        row = {"stage": stage, "seconds": found[-1]["elapsed_s"], "metric": name.replace("_", " "),
               "before": found[0][f"val_{name}"] if len(found) > 1 and found[0]["step"] == 0 else None,
               "after": found[-1][f"val_{name}"], "answer": ""}
        model, tokenizer, state = load_run(run_dir, self.device)
        if not isinstance(model, RewardModel):
            prompts = open_data("ppo", tokenizer, model.config, self.train["ppo"], self.sources_of("ppo")["val"], False,
                                self.cache_dir)
            question = prompts.question(prompts.items[0])
            self.question = last_content(tokenizer.decode_chat(question))
            row["answer"] = TextGenerator(model, tokenizer).continue_rows(
                [question], GenerationConfig(max_new_tokens=self.train["ppo"].answer_tokens, do_sample=False))[0]
        return row

    def table(self, rows: list[dict]) -> str:
        """The rows in 100 columns."""
        lines = [f"{'stage':<9}{'seconds':>8}  {'held-out metric':<16}{'before':>8}{'after':>8}  "
                 f"answer to: {self.question}"]
        for row in rows:
            share = row["metric"] in ("exact match", "pair accuracy")
            before, after = ("" if value is None else f"{value:.1%}" if share else f"{value:.4f}"
                             for value in (row["before"], row["after"]))
            answer = " ".join(row["answer"].split())
            lines.append(f"{row['stage']:<9}{row['seconds']:>8.0f}  {row['metric']:<16}{before:>8}{after:>8}  {answer}")
        return "\n".join((line if len(line) <= 100 else line[:99] + "…").rstrip() for line in lines)
