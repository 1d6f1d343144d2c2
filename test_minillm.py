"""Tests of MiniLLM, section by section in the order of minillm.py, the worked examples of each section first.

     1 Config            sizes that follow from others, and every bad field by name; against numbers worked out by hand
     2 Model             attention, cache, experts, LoRA: against brute force, torch's own layers and finite differences
     3 Losses            every loss and estimate against its equation, token by token in float64, and against autograd
     4 Optimisation      schedules by hand, Muon against its definition and the SVD, memory against the system's count
     5 Tokenizer         words, merges, ids: against a textbook BPE and the package tokenizers; all bytes survive
     6 Data              every form of record, exact cursors, crash-safe caches: against files written by hand
     7 Generation        cached decoding against the naive loop, beams against exhaustive search, sampling by frequency
     8 Runs              checkpoints with every bit flipped; interrupted and resumed runs against straight ones
     9 Trainers          updates and evaluations against plain cross-entropy; each trainer learns what it should
    10 Reinforcement     rollouts, PPO and GRPO against figures worked out anew from plain prefixes
    11 Pipeline          every stage resumes bit for bit; changed parents and rewards are refused
    12 Edges             models, tokenizers and chat templates against transformers, tokenizers, jinja2; flags, rewards

    Several processes   what 2, 3 and 4 of them compute is what one does; resuming on other numbers; faults of one
    Drivers             train.py and sample.py as people call them, what they leave, show and refuse
    README              the snippet runs; every diff of "Hack it" applies and does what it says
    bench.py            its figures, tables, plans and messages
    Benchmarks          run once each as plain tests
    Faults              signals, full disks, two processes; then the table of mistakes, and the kill matrix

`pytest` runs all but what takes minutes, `pytest -m slow` that, `pytest --benchmark-only` times the benchmarks.
"""

import array
import codecs
import contextlib
import copy
import dataclasses
import doctest
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import bench
import minillm as m
import sample
import train

# ======================================================================================================================
# Helpers and fixtures
# ======================================================================================================================

HERE = Path(__file__).parent
FASTEST_DTYPE = m.fastest_dtype  # `quick_measurements` replaces it
TEXTS = [
    "你好，世界！小模型也能训练。",
    "Hello, world! It's a small model; don't panic.",
    "def f(x):\n    return x + 1\n",
    "小猫看见一条鱼，小猫很高兴。小狗也看见一条鱼。",
    "1 + 12 = 13。The cat has 3 apples  and\t2 pears.\r\n",
    "café naïve Ωμέγα 日本語のテスト 😀👍",
] * 3

# -- models and batches ------------------------------------------------------------------------------------------------


def shape(**changes) -> m.MiniGPTConfig:
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=64)
    return m.MiniGPTConfig(**heads | sizes | changes)


def moe_shape(**changes) -> m.MiniGPTConfig:
    experts = dict(num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=24)
    return shape(**experts | changes)


def random_model(config: m.MiniGPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32, module=m) -> m.MiniGPT:
    """A model whose weights are all random: the zeros and ones of initialisation would hide mistakes."""
    torch.manual_seed(seed)
    model = module.MiniGPT(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


def random_ids(B: int, T: int, V: int = 300, low: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, V, (B, T), generator=torch.Generator().manual_seed(seed))


def doubles(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lm_batch(B: int, T: int, seed: int = 0, ragged: bool = False) -> dict[str, torch.Tensor]:
    ids = random_ids(B, T, seed=seed)
    labels = ids.clone()
    if ragged:
        for row in range(B):
            labels[row, 2 + (row * 5) % (T - 2) :] = -100
    return {"input_ids": ids, "labels": labels}


def trainer_for(tokenizer, config=None, dtype=torch.float32, **options) -> m.PreTrainer:
    return m.PreTrainer(
        random_model(shape(), dtype=dtype), tokenizer, config=config or m.TrainConfig(warmup_steps=0), **options
    )


def settings(**changes) -> m.GenerationConfig:
    return m.GenerationConfig(**dict(max_new_tokens=12, temperature=1.0, top_p=1.0) | changes)


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(scope="session")
def tokenizer() -> m.BPETokenizer:
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train(TEXTS)
    assert tokenizer.vocab_size == 300
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> None:
    """What each run measures and reads anew takes longer than the tests themselves."""
    m.matmul_peak, inspect.getsource = functools.cache(m.matmul_peak), functools.cache(inspect.getsource)
    m.fastest_dtype = lambda device: "float32"  # the same path on every machine


@pytest.fixture(scope="session", autouse=True)
def usual_signals() -> None:
    """A shell's background, or nohup, ignores signals, and a run then leaves them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# -- data --------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


DOCUMENTS = [f"第{i}天，小猫吃了{i % 7}条鱼。The cat ate {i % 7} fish on day {i}." for i in range(60)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A file of the 60 documents."""
    return write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in DOCUMENTS])


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = itertools.cycle(("user", "assistant"))
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + said


def load(cls, tmp_path: Path, tokenizer, records: list[dict], name: str = "records.jsonl", **options):
    options = {"seq_len": 500, "split": "all", "shuffle": False, "cache_dir": tmp_path / "cache", **options}
    return cls(write_jsonl(tmp_path / name, records), tokenizer, **options)


CHATS = [
    {"messages": turns("你好", "你好！")},
    {"messages": turns("小猫吃什么？", "吃鱼。", "小狗呢？", "吃骨头 🦴。", system="你是助手。")},
    {"messages": turns("2 + 2?", "4")},
    {"messages": turns("a" * 30, "b" * 40, "c", "d")},
    {"messages": turns("ok?", "!")},
]


def record_for(cls, i: int) -> dict:
    if cls is m.DPODataLoader:
        return {"prompt": f"问题 {i}?", "chosen": "好" * (i % 5 + 1), "rejected": f"no {i}", "category": "ab"[i % 2]}
    if cls is m.PromptDataLoader:
        return {"prompt": f"question {i}" + "?" * (i % 7), "answer": i}
    return {"messages": turns(f"第{i}题", "答" * (i % 9) + str(i))}


def pairs() -> list[dict]:
    return [record_for(m.DPODataLoader, i) for i in range(12)]


# -- runs --------------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    """Whether two nestings of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        kinds = (a.dtype, a.shape) == (b.dtype, b.shape)
        return kinds and torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def everything(folder: Path) -> dict[str, bytes]:
    """All files under a folder but the caches."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "cache" not in path.parts)
    return {str(path): path.read_bytes() for path in files}


def stage_records(path: Path) -> dict[str, m.Source]:
    """Small data of each stage in files under `path`, as `sources`."""
    words = ["cat", "dog", "小猫", "小狗", "fox", "cow", "pig", "hen", "ant", "bee"]
    for part, chosen in (("train", words[:8]), ("val", words[8:])):
        (path / part).mkdir(parents=True)
        write_jsonl(path / part / "text.jsonl", [{"text": f"{a} and {b}" * 3} for a in words for b in chosen])
        write_jsonl(path / part / "sft.jsonl", [{"messages": turns(a, a), "answer": a} for a in chosen])
        write_jsonl(path / part / "pref.jsonl", [{"prompt": a, "chosen": "good", "rejected": "bad!"} for a in chosen])
        write_jsonl(path / part / "prompts.jsonl", [{"prompt": a, "answer": a} for a in chosen])
    return sources_in(path)


def sources_in(data: Path) -> dict[str, m.Source]:
    return {part: m.Source([str(data / part)], "all") for part in ("train", "val")}


def stage_config(**changes) -> m.TrainConfig:
    sizes = dict(max_steps=4, batch_size=3, warmup_steps=1, reply_tokens=6, eval_prompts=4, sample_tokens=0)
    return m.TrainConfig(**sizes | dict(eval_every=3, save_every=2, log_every=1) | changes)


def make_runs(path: Path, tokenizer: m.BPETokenizer) -> Path:
    """A directory with `data` of all stages and the runs `pretrain` and `reward`, hardly trained."""
    sources = stage_records(path / "data")
    config = m.TrainConfig(max_steps=2, warmup_steps=0, sample_tokens=0)
    model = random_model(shape(dropout=0.1))
    data = [lm_batch(2, 16)]
    m.PreTrainer(model, tokenizer, config=config, train_data=data, val_data=data, run_dir=path / "pretrain").fit()
    options = {"run_dir": path / "reward", "cache_dir": path / "cache"}
    m.make_trainer("reward", *m.load_run(path / "pretrain")[:2], sources, stage_config(max_steps=2), **options).fit()
    return path


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory, tokenizer) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"), tokenizer)


def stage_trainer(
    runs: Path,
    stage: str,
    run_dir: Path,
    parent: Path | None = None,
    config: m.TrainConfig | None = None,
    resume: bool = False,
    **options,
) -> m.Trainer:
    """The trainer of a stage on the data of `runs`, from its pretrained run or `parent`."""
    model, tokenizer, _ = m.load_run(parent or runs / "pretrain")
    reward = m.load_reward(str(runs / "reward") if stage == "ppo" else "answer", tokenizer)
    options = {"reward": reward, "run_dir": run_dir, "cache_dir": runs / "cache", **options}
    rl = m.RLHFConfig(group_size=4, minibatch_size=6)
    trainer = m.make_trainer(
        stage, model, tokenizer, sources_in(runs / "data"), config or stage_config(), rl, **options
    )
    if resume:
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
    return trainer


@pytest.fixture(scope="session")
def out_with_a_run(trained_runs, tmp_path_factory) -> Path:
    """An --out with a pretrained run, for the drivers."""
    out = tmp_path_factory.mktemp("out")
    shutil.copytree(trained_runs / "pretrain", out / "tiny/pretrain")
    return out


def quick(stage: str) -> list[str]:
    """Flags for a quick run of a stage; not every stage takes all of them."""
    flags = ["--batch-size", "3", "--sample-tokens", "4"]
    flags += ["--reply-tokens", "6"] * (stage not in ("pretrain", "reward"))
    return flags + ["--eval-prompts", "3"] * (stage not in ("pretrain", "dpo", "reward"))


QUICK = quick("sft")
SMALLEST = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --vocab-size 300".split()


def data_flags(runs: Path) -> list[str]:
    return ["--data", str(runs / "data/train"), "--val-data", str(runs / "data/val")]


@contextlib.contextmanager
def served(argv: list[str], log: Path, ready: str):
    """Run a server; yield what `ready` matches in its output, which goes to `log`."""
    env = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, cwd=HERE, env=env)
    try:
        until = time.monotonic() + 120
        while not (match := re.search(ready, log.read_text(encoding="utf-8"), re.M)):
            assert server.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield match[1]
    finally:
        server.kill()
        server.wait()


def one_error(capsys) -> str:
    """What was written to stderr since the last time: one line, after warnings."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if ": warning: " not in line]
    assert len(lines) == 1 and ".py: error: " in lines[0] and "Traceback" not in error, error
    return error


# ======================================================================================================================
# 1 Config
# ======================================================================================================================

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_sizes_that_are_left_out_follow_from_the_others():
    """Worked example: C = 96 and H = 4 give D = 96 / 4 = 24; F = 8/3 · 96 = 256; of 2 + 1 active experts each 64."""
    config = m.MiniGPTConfig(hidden_size=96, num_attention_heads=4)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (4, 24, 256)
    assert config.moe_intermediate_size is None
    config = m.MiniGPTConfig(hidden_size=96, num_attention_heads=4, num_experts=4, num_shared_experts=1)
    assert config.moe_intermediate_size == 64  # 256 / 3 = 85, down to a multiple of 32
    assert m.MiniGPTConfig(hidden_size=100, num_attention_heads=5).intermediate_size == 288  # 266.7, up
    assert m.MiniGPTConfig(hidden_size=100, num_attention_heads=7, head_dim=16).head_dim == 16
    tiny = m.MiniGPTConfig(hidden_size=16, num_attention_heads=2, num_experts=4, num_shared_experts=1)
    assert tiny.moe_intermediate_size == 32  # 64 / 3 = 21: never below 32
    with pytest.raises(m.UserError, match="num_experts_per_tok=2 is not possible: it must be at most num_experts=1"):
        m.MiniGPTConfig(num_experts=1)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (m.MiniGPTConfig, "vocab_size", 0),
        (m.MiniGPTConfig, "hidden_size", -1),
        (m.MiniGPTConfig, "hidden_size", True),
        (m.MiniGPTConfig, "num_hidden_layers", 2.0),
        (m.MiniGPTConfig, "num_attention_heads", 3),
        (m.MiniGPTConfig, "num_key_value_heads", 3),
        (m.MiniGPTConfig, "head_dim", 7),
        (m.MiniGPTConfig, "dropout", 1.0),
        (m.MiniGPTConfig, "qk_norm", 1),
        (m.MiniGPTConfig, "rope_theta", 0.5),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "dynamic", "factor": 2}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": ["yarn"], "factor": 2}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": 0.5}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": "2"}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": math.inf}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": 2, "beta_fast": 32}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "llama3", "factor": 2}),
        (m.MiniGPTConfig, "rope_scaling", YARN | {"mscale": 0.7}),
        (m.MiniGPTConfig, "rope_scaling", YARN | {"mscale_all_dim": 1.2}),
        (m.MiniGPTConfig, "rope_scaling", YARN | {"truncate": 1}),
        (m.MiniGPTConfig, "eos_token_id", 4096),
        (m.MiniGPTConfig, "num_experts", -1),
        (m.MiniGPTConfig, "rms_norm_eps", 0),
        (m.TrainConfig, "batch_size", 0),
        (m.TrainConfig, "learning_rate", math.nan),
        (m.TrainConfig, "beta2", 1.0),
        (m.TrainConfig, "min_learning_rate", 1.0),
        (m.TrainConfig, "schedule", "cosinus"),
        (m.TrainConfig, "minutes", -1),
        (m.TrainConfig, "dtype", "float8"),
        (m.TrainConfig, "grad_clip", math.inf),
        (m.TrainConfig, "seed", 2**32),
        (m.GenerationConfig, "temperature", math.inf),
        (m.GenerationConfig, "temperature", -1.0),
        (m.GenerationConfig, "temperature", True),
        (m.GenerationConfig, "temperature", "1"),
        (m.GenerationConfig, "top_p", 0.0),
        (m.GenerationConfig, "num_beams", 0),
        (m.GenerationConfig, "repetition_penalty", 1e-7),
        (m.GenerationConfig, "max_new_tokens", 0),
        (m.GenerationConfig, "stop", [""]),
        (m.RLHFConfig, "group_size", 1),
        (m.RLHFConfig, "dpo_beta", 0.0),
        (m.RLHFConfig, "dpo_kind", "hinge"),
        (m.RLHFConfig, "gamma", 1.1),
    ],
)
def test_config_names_the_bad_field(cls, field, value):
    with pytest.raises(m.UserError, match=f"^{field}={re.escape(repr(value))} is not possible: it must be "):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("tiny", 1e6, 2e6), ("small", 22e6, 28e6), ("medium", 70e6, 90e6), ("large", 320e6, 380e6), ("moe", 60e6, 90e6)],
)
def test_presets_have_their_size(name, low, high):
    with torch.device("meta"):
        model = m.MiniGPT(m.get_config(name))
    assert low <= model.num_params() <= high
    assert dataclasses.asdict(getattr(m, f"get_{name}_config")()) == dataclasses.asdict(model.config)
    if name == "moe":
        assert 22e6 <= model.num_params(active=True) <= 28e6


def sizes_of(config: m.MiniGPTConfig) -> dict[str, tuple]:
    return {name: tuple(p.shape) for name, p in m.MiniGPT(config).state_dict().items()}


def logits_of(config: m.MiniGPTConfig) -> list:
    return random_model(config)(random_ids(2, 12)).tolist()


def trained_logits_of(config: m.MiniGPTConfig) -> list:
    return random_model(config).train()(random_ids(2, 12)).tolist()


def loss_of(config: m.MiniGPTConfig) -> float:
    tokenizer = m.BPETokenizer()
    return m.PreTrainer(random_model(config).train(), tokenizer).loss(lm_batch(2, 8)).item()


def context_of(config: m.MiniGPTConfig) -> list[int]:
    model, fits = random_model(config), []
    for T in (16, 24, 32):
        with contextlib.suppress(m.UserError):
            fits.append(model(random_ids(1, T)).shape[1])
    return fits


# A field of MiniGPTConfig: two values, and what must differ between them.
FIELDS_OF_A_MODEL = {
    "vocab_size": (300, 320, sizes_of),
    "hidden_size": (32, 64, sizes_of),
    "num_hidden_layers": (1, 2, sizes_of),
    "num_attention_heads": (2, 4, sizes_of),
    "num_key_value_heads": (1, 2, sizes_of),
    "head_dim": (8, 16, sizes_of),
    "intermediate_size": (64, 96, sizes_of),
    "max_position_embeddings": (16, 24, context_of),
    "rms_norm_eps": (1e-6, 1e-2, logits_of),
    "rope_theta": (1e4, 1e3, logits_of),
    "rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}, logits_of),
    "qk_norm": (True, False, sizes_of),
    "tie_word_embeddings": (True, False, sizes_of),
    "dropout": (0.0, 0.5, trained_logits_of),
    "num_experts": (4, 5, sizes_of),
    "num_experts_per_tok": (1, 2, logits_of),
    "num_shared_experts": (1, 2, sizes_of),
    "moe_intermediate_size": (24, 48, sizes_of),
    "norm_topk_prob": (True, False, logits_of),
    "router_aux_loss_coef": (0.0, 0.5, loss_of),
    **{name: (0, 7, lambda config, name=name: m.hf_config(config)[name]) for name in m.TOKEN_IDS},
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(m.MiniGPTConfig)])
def test_every_field_of_a_model_has_an_effect(field):
    one, other, observe = FIELDS_OF_A_MODEL[field]
    fields = [field.name for field in dataclasses.fields(m.MiniGPTConfig)]
    is_sparse = "num_experts" in fields[: fields.index(field) + 1] and not field.endswith("token_id")
    base = moe_shape if is_sparse else shape
    first, second = (observe(base(**{field: value})) for value in (one, other))
    assert first != second and first == observe(base(**{field: one}))


@pytest.mark.parametrize(
    ("scaling", "option", "value"),
    [
        (YARN, "factor", 8.0),
        (YARN, "original_max_position_embeddings", 64),
        (YARN | {"original_max_position_embeddings": 4096}, "beta_fast", 8),
        (YARN, "beta_slow", 2),
        (YARN, "attention_factor", 1.0),
        (YARN | {"beta_fast": 3.0}, "truncate", False),
        (LLAMA3, "factor", 8.0),
        (LLAMA3, "original_max_position_embeddings", 64),
        (LLAMA3, "low_freq_factor", 0.5),
        (LLAMA3, "high_freq_factor", 2.0),
    ],
)
def test_every_option_of_rope_has_an_effect(scaling, option, value):
    one, other = (m.rope_tables(shape(head_dim=32, rope_scaling=s)) for s in (scaling, scaling | {option: value}))
    assert not torch.equal(torch.cat(one), torch.cat(other))


@pytest.mark.parametrize(
    ("theta", "D", "scaling", "slowed"),
    [
        (1e4, 32, YARN, [0, 1 / 3, 2 / 3, *[1] * 13]),  # from below 0, so from 0, to 3 (2.83, up)
        (10.0, 8, YARN | {"original_max_position_embeddings": 4096, "beta_fast": 600}, [0, 1 / 7, 2 / 7, 3 / 7]),
        (1e4, 32, YARN | {"beta_fast": 64, "beta_slow": 64}, [0, *[1] * 15]),  # an empty ramp is a step
    ],
)
def test_yarn_slows_rotations_by_hand(theta, D, scaling, slowed):
    """Worked example: the share of each rotation that is slowed rises in a line between two dimensions of 0 … D - 1."""
    config = shape(head_dim=D, rope_theta=theta, rope_scaling=scaling | {"attention_factor": 1.0})
    cos, sin = m.rope_tables(config)
    plain = theta ** -(torch.arange(0, D, 2) / D)
    share = (plain - torch.atan2(sin[1, D // 2 :], cos[1, : D // 2])) / (plain - plain / 4)
    torch.testing.assert_close(share, torch.tensor(slowed).float(), atol=2e-3, rtol=0)


def test_the_special_tokens_of_a_config_are_those_of_a_tokenizer():
    config, tokenizer = m.MiniGPTConfig(), m.BPETokenizer()
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_an_unknown_preset_is_named():
    with pytest.raises(m.UserError, match="'huge' is unknown: choose from tiny, small"):
        m.get_config("huge")


# ======================================================================================================================
# 2 Model
# ======================================================================================================================


def test_rms_norm_by_hand():
    """Worked example: the mean square of (1, 7) is 25, so (1, 7) / 5 = (0.2, 1.4), times the weight (10, 1)."""
    norm = m.RMSNorm(2, 1e-12)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([10.0, 1.0]))
    for x in (torch.tensor([[1.0, 7.0]]), torch.tensor([[1.0, 7.0]]).requires_grad_()):
        torch.testing.assert_close(norm(x), torch.tensor([[2.0, 1.4]]))


def test_rope_by_hand():
    """Worked example: D = 4 has the pairs (x0, x2), (x1, x3); θ = 100 turns them by p and p / 10 at position p."""
    cos, sin = m.rope_tables(shape(hidden_size=16, head_dim=4, rope_theta=100.0))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 3, 1, 4)
    turned = m.apply_rope(x, cos[None, :3, None], sin[None, :3, None])
    expected = [[math.cos(p), math.cos(p / 10), math.sin(p), math.sin(p / 10)] for p in range(3)]
    torch.testing.assert_close(turned[0, :, 0], torch.tensor(expected))


def test_visible_keys_by_hand():
    """Worked example: causal, behind a cache, with padding on the left, and with a sliding window of two."""

    def rows(queries, S, mask=None):
        visible = m.visible_keys(torch.tensor(queries), S, mask)
        assert visible.dtype == torch.bool
        return [["".join("x" if seen else "." for seen in row) for row in one[0]] for one in visible]

    assert rows([0, 1, 2], 3) == [["x..", "xx.", "xxx"]]
    assert rows([2, 3], 4) == [["xxx.", "xxxx"]]  # two keys are in the cache already
    assert rows([1], 4) == [["xx.."]]  # fixed shapes: slots that are not written yet
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])  # padding attends to itself, and nobody to padding
    assert rows([0, 1, 2, 3], 4, padded) == [["x...", ".x..", "..x.", "..xx"], ["x...", "xx..", "xxx.", "xxxx"]]
    assert rows([3], 4, padded) == [["..xx"], ["xxxx"]]
    window = torch.ones(4, 4).triu(-1)[None]  # (B, T, S): a query sees itself and the key before it
    assert rows([0, 1, 2, 3], 4, window) == [["x...", "xx..", ".xx.", "..xx"]]
    assert rows([2, 3], 4, window[:, 2:]) == [[".xx.", "..xx"]]


def test_attention_by_hand():
    """Worked example: scores ln 3 and 0 become weights 3/4 and 1/4; two query heads share one key head."""
    q = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 1)  # H = 2, T = 2, D = 1
    k, v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([8.0, 4.0]).view(1, 1, 2, 1)
    expected = torch.tensor([[8.0, 7.0], [8.0, 6.0]])  # head 0: 8, 3/4 · 8 + 1/4 · 4; head 1: 8, 1/2 · 8 + 1/2 · 4
    torch.testing.assert_close(m.attend(q, k, v, None)[0, :, :, 0], expected)
    torch.testing.assert_close(m.attend(q[:, :, :1], k, v, None)[0, :, 0, 0], expected[:, 1])
    apart = m.attention_bias(torch.eye(2, dtype=torch.bool)[None, None], torch.float32)
    assert apart.tolist() == [[[[0.0, -math.inf], [-math.inf, 0.0]]]]
    torch.testing.assert_close(m.attend(q, k, v, apart)[0, :, :, 0], torch.tensor([[8.0, 4.0], [8.0, 4.0]]))


def test_cache_rows_can_be_copied_and_dropped():
    """Worked example: rows 0, 1, 2 become 2, 0, 0, then two rows of them, then four."""
    model = random_model(shape(num_hidden_layers=1))
    cache, value = m.KVCache(model, 3, 4), torch.arange(3.0)[:, None, None, None].expand(3, 2, 2, 8)
    keys, values = cache.update(0, value, value + 10)
    assert keys.shape == values.shape == (3, 2, 2, 8)
    cache.length = 2
    for rows, expected in (([2, 0, 0], [2, 0, 0]), ([1, 0], [0, 2]), ([1, 1, 0, 1], [2, 2, 0, 2])):
        cache.reorder(torch.tensor(rows))
        assert cache.k[0][:, 0, 1, 0].tolist() == expected
        assert (cache.v[0][:, :, :2] == cache.k[0][:, :, :2] + 10).all()


def test_lora_by_hand():
    """Worked example: W = 0, A = (1, 2), B = (3, 0), alpha / rank = 4, x = (1, 1): 4 · 3 · (1 + 2) = 36, and 0."""
    base = m.Linear(2, 2)
    torch.nn.init.zeros_(base.weight)
    lora = m.LoRALinear(base, rank=1, alpha=4.0)
    with torch.no_grad():
        lora.lora_a.copy_(torch.tensor([[1.0, 2.0]]))
        assert lora(torch.ones(2)).tolist() == [0, 0]  # B starts at 0
        lora.lora_b.copy_(torch.tensor([[3.0], [0.0]]))
    assert lora(torch.ones(2)).tolist() == [36, 0]
    assert lora.merged().weight.tolist() == [[12, 24], [0, 0]]


def test_nothing_looks_ahead():
    for config in (shape(), moe_shape()):
        model, ids = random_model(config), random_ids(1, 12)
        x = model.embed_tokens(ids).detach().requires_grad_()
        model.embed_tokens.forward = lambda _, x=x: x
        for t in range(12):
            (grad,) = torch.autograd.grad(model(ids)[0, t].square().sum(), x)
            assert (grad[0, t + 1 :] == 0).all() and (grad[0, : t + 1].abs().sum(-1) > 0).all()


def test_rms_norm_against_torch_and_finite_differences():
    norm = m.RMSNorm(8, 1e-6).double()
    x, w = doubles(3, 5, 8).requires_grad_(), doubles(8, seed=1).abs().requires_grad_()

    def ours(x, w):
        return torch.func.functional_call(norm, {"weight": w}, (x,))

    plain = F.rms_norm(x, (8,), w, 1e-6)
    torch.testing.assert_close(ours(x, w), plain)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, w), plain)
    found, expected = (
        torch.autograd.grad((y * doubles(3, 5, 8, seed=2)).sum(), (x, w), retain_graph=True)
        for y in (ours(x, w), plain)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(ours, (x, w))
    (grad,) = torch.autograd.grad(ours(x.detach().requires_grad_(False), w).sum(), w)
    torch.testing.assert_close(grad, F.rms_norm(x, (8,), eps=1e-6).sum((0, 1)))  # a frozen model below


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_half_precision_is_computed_in_float32(dtype):
    norm, x = m.RMSNorm(8, 1e-6).to(dtype), (doubles(3, 8) * 1000).to(dtype)  # whose squares float16 cannot hold
    expected = F.rms_norm(x.float(), (8,), eps=1e-6).to(dtype)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)
    found = norm(x.requires_grad_())
    found.sum().backward()
    assert found.dtype == x.grad.dtype == norm.weight.grad.dtype == dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [((1,), 6), ((2, 3), 6), ((64,), 6), ((65,), 6), ((3,), 7), ((1,), 1)])
def test_a_linear_map_of_few_rows_is_the_same_map(rows, n, dtype):
    x, weight = doubles(*rows, 5).to(dtype), doubles(n, 5, seed=1).to(dtype)
    with torch.no_grad():
        found = m.linear(x, weight)
    torch.testing.assert_close(found, F.linear(x, weight))
    assert found.is_contiguous() and found.dtype == dtype


class WithOwnParts(m.MiniGPT):
    """A model as people extend it: a bias, learned positions, a scale."""

    def __init__(self, config: m.MiniGPTConfig) -> None:
        super().__init__(config)
        attention = self.layers[0].self_attn
        attention.qkv_proj = torch.nn.Linear(config.hidden_size, attention.qkv_proj.out_features)
        torch.nn.init.constant_(attention.qkv_proj.bias, 0.25)
        self.positions = torch.nn.Embedding(config.max_position_embeddings, config.hidden_size)
        torch.nn.init.constant_(self.positions.weight, 0.5)
        self.scale = torch.nn.Parameter(torch.full((3,), 0.75))
        self.reset_parameters()


@pytest.mark.parametrize("config", [shape(hidden_size=128, tie_word_embeddings=False), moe_shape(hidden_size=128)])
def test_weights_are_initialised_by_name_and_own_parts_keep_theirs(config):
    torch.manual_seed(0)
    plain, extended = m.MiniGPT(config), WithOwnParts(config)
    own = {"layers.0.self_attn.qkv_proj.bias": 0.25, "positions.weight": 0.5, "scale": 0.75}
    assert set(dict(extended.named_parameters())) == set(dict(plain.named_parameters())) | set(own)
    for name, p in itertools.chain(plain.named_parameters(), extended.named_parameters()):
        if name in own:
            assert (p == own[name]).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "o_proj" in name or "down_proj" in name:
            assert (p == 0).all(), name
        else:
            std = 2.5 / 128 if name in ("embed_tokens.weight", "lm_head.weight") else p.shape[-1] ** -0.5
            assert p.std().item() == pytest.approx(std, rel=0.1) and abs(p.mean().item()) < std / 5, name


def test_the_first_loss_is_that_of_guessing():
    for name in ("tiny", "moe"):
        config = m.get_config(name)
        torch.manual_seed(0)
        model, ids = m.MiniGPT(config), random_ids(2, 32, config.vocab_size)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("sizes", [(2, 4, 2, 7, 7), (2, 4, 4, 1, 9), (2, 4, 1, 3, 8), (3, 4, 4, 6, 6), (1, 1, 1, 5, 5)])
def test_attention_by_products_is_attention(sizes, dtype, tolerance):
    """Also its gradients; relative to float64."""
    B, H, K, T, S = sizes
    inputs = [torch.randn(B, n, length, 16, dtype=torch.float64) for n, length in ((H, T), (K, S), (K, S))]
    visible = (torch.rand(B, 1, T, S) > 0.4) | torch.eye(T, S).bool()
    bias = None if T in (1, S) else m.attention_bias(visible, torch.float64)
    results = []
    for attend, kind in ((m.attend, torch.float64), (m.attend_by_products, dtype)):
        q, k, v = (x.to(kind, copy=True).requires_grad_() for x in inputs)
        out = attend(q, k, v, bias if bias is None else bias.to(kind))
        (out * torch.arange(16)).sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for exact, near in zip(*results, strict=True):
        assert (exact - near).abs().max() <= tolerance * exact.abs().max()


def test_attention_by_products_leaves_its_bias_alone():
    """All layers share it; with one head it has the shape of the scores."""
    q, k, v = (torch.randn(3, 1, 5, 8) for _ in range(3))
    bias = m.attention_bias(torch.ones(3, 1, 5, 5).tril().bool(), q.dtype)
    first = m.attend_by_products(q, k, v, bias)
    assert torch.equal(m.attend_by_products(q, k, v, bias), first) and set(bias.unique().tolist()) == {-math.inf, 0}


def test_bfloat16_attention_on_a_cpu_sees_no_later_token():
    q, k, v = (torch.randn(1, 2, 6, 8).bfloat16() for _ in range(3))
    before = m.attend(q, k, v, None)
    k[:, :, 4:], v[:, :, 4:] = 9.0, 9.0
    assert torch.equal(m.attend(q, k, v, None)[:, :, :4], before[:, :, :4])


def test_grouped_query_attention_with_all_heads_is_plain_attention():
    grouped, plain = random_model(shape(num_key_value_heads=2)), random_model(shape(num_key_value_heads=4))
    state = grouped.state_dict()
    for name, value in state.items():
        if "qkv_proj" in name:
            q, k, v = value.split((32, 16, 16))
            state[name] = torch.cat(
                [q, *(part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (k, v))]
            )
    plain.load_state_dict(state)
    ids = random_ids(2, 20)
    torch.testing.assert_close(grouped(ids), plain(ids))


@pytest.mark.parametrize("config", [shape(), moe_shape(), shape(num_key_value_heads=4, qk_norm=False)])
def test_cached_equals_uncached_for_every_split(config):
    model, ids = random_model(config), random_ids(2, 14)
    with torch.no_grad():
        whole = model(ids)
        for split in range(1, 14):
            cache = m.KVCache(model, 2, 14)
            parts = [model(ids[:, :split], cache=cache), model(ids[:, split:], cache=cache)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        cache = m.KVCache(model, 2, 14)
        torch.testing.assert_close(torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(14)], dim=1), whole)
        cache, parts = m.KVCache(model, 2, 20), []
        for t in range(14):  # the fixed shapes of compiled code: all 20 slots are keys
            cache.position = torch.tensor([t])
            parts.append(model(ids[:, t : t + 1], cache=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_padding_on_either_side_changes_nothing():
    model, ids = random_model(shape()), random_ids(1, 9)
    with torch.no_grad():
        alone = model(ids)
        for left in (1, 5):
            row = torch.cat((torch.full((1, left), 0), ids), dim=1)
            mask = torch.cat((torch.zeros(1, left), torch.ones(1, 9)), dim=1)
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            torch.testing.assert_close(model(row, attention_mask=mask, position_ids=positions)[:, left:], alone)
        torch.testing.assert_close(model(F.pad(ids, (0, 4)))[:, :9], alone)


@pytest.mark.parametrize("config", [shape(), moe_shape(), shape(tie_word_embeddings=False, rope_scaling=YARN)])
def test_left_padded_rows_have_the_logits_of_rows_without_padding(config):
    """Rows of one batch, with and without a cache, whatever the padding's ids are."""
    model, rows = random_model(config), [random_ids(1, n, seed=n) for n in (9, 4, 1)]
    with torch.no_grad():
        alone = [model(row)[0] for row in rows]
        for padding in (0, 77):
            ids = torch.cat([F.pad(row, (9 - row.shape[1], 0), value=padding) for row in rows])
            mask = torch.cat([F.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            whole = model(ids, attention_mask=mask, position_ids=positions, token_mask=mask)
            cache = m.KVCache(model, 3, 9)
            parts = [
                model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part], cache=cache)
                for part in (slice(0, 6), slice(6, 8), slice(8, 9))
            ]
            for logits in (whole, torch.cat(parts, dim=1)):
                for found, expected in zip(logits, alone, strict=True):
                    torch.testing.assert_close(found[-len(expected) :], expected)


def test_rows_of_several_texts_are_as_if_alone():
    """A mask (B, T, S) that keeps texts of a row apart, with positions from 0 in each."""
    model, texts = random_model(shape()), [random_ids(1, n, seed=n) for n in (5, 3, 6)]
    segments = torch.cat([torch.full_like(text, k) for k, text in enumerate(texts)], dim=1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        row = model(
            torch.cat(texts, dim=1), position_ids=positions, attention_mask=segments[:, :, None] == segments[:, None]
        )
        torch.testing.assert_close(row, torch.cat([model(text) for text in texts], dim=1))


def test_positions_count_and_only_their_distances():
    """A gap in the positions is that of hidden tokens between; to begin later changes nothing."""
    model, ids, hidden = random_model(shape()), random_ids(1, 12), slice(4, 9)
    mask = torch.ones(1, 12)
    mask[:, hidden] = 0
    kept = mask[0].nonzero()[:, 0]
    with torch.no_grad():
        between = model(ids, attention_mask=mask)[:, kept]
        torch.testing.assert_close(model(ids[:, kept], position_ids=kept[None]), between)
        torch.testing.assert_close(model(ids[:, kept], position_ids=kept[None] + 20), between)
        assert (model(ids[:, kept]) - between).abs().max() > 0.01


def test_the_context_has_an_end():
    model = random_model(shape(max_position_embeddings=8))
    cache = m.KVCache(model, 1, 9)
    assert model(random_ids(1, 8), cache=cache).shape == (1, 8, 300)
    for options in ({"input_ids": random_ids(1, 9)}, {"input_ids": random_ids(1, 1), "cache": cache}):
        with pytest.raises(m.UserError, match="9 tokens exceed the context of max_position_embeddings=8"):
            model(**options)


def test_grouped_experts_equal_a_loop():
    torch.manual_seed(0)
    moe = m.MixtureOfExperts(moe_shape()).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    probs = F.linear(x, moe.gate.weight).float().softmax(-1)
    expected = moe.shared(x)
    for b, t in itertools.product(range(2), range(7)):
        top = probs[b, t].topk(2)
        for p, e in zip(top.values / top.values.sum(), top.indices, strict=True):
            gate, up = (moe.gate_up_proj[e] @ x[b, t]).chunk(2)
            expected[b, t] += p * (moe.down_proj[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(moe(x, None)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss(k):
    moe = m.MixtureOfExperts(moe_shape(num_experts_per_tok=k)).train()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate_up_proj.normal_()  # MiniGPT initialises them
        moe.down_proj.normal_()
    x = torch.randn(1, 8, 32)
    assert moe(x, None)[1].item() == pytest.approx(1)  # equal probabilities
    with torch.no_grad():
        moe.gate.weight.normal_()
    weights, experts, loss = moe.route(x[0], None)
    share = torch.bincount(experts.flatten(), minlength=4) / (8 * k)
    assert loss.item() == pytest.approx(
        4 * (share * (x[0] @ moe.gate.weight.T).softmax(-1).mean(0)).sum().item(), rel=1e-5
    )
    padded = torch.cat((x, torch.randn(1, 3, 32)), dim=1)
    token_mask = torch.tensor([[1] * 8 + [0] * 3])
    assert moe(padded, token_mask)[1].item() == pytest.approx(loss.item(), rel=1e-5)
    assert moe.eval()(x, None)[1] == 0


@pytest.mark.parametrize("config", [shape(dropout=0.5), moe_shape(dropout=0.5)], ids=["dense", "moe"])
@pytest.mark.parametrize("silent", ["o_proj", "down_proj"])
def test_dropout_follows_attention_and_the_mlp(config, silent):
    """With one of them silent, about half of what the block adds is 0, and the rest is doubled."""
    block, x = random_model(config).layers[0], torch.randn(1, 40, 32)
    rope = [table[None, :40, None] for table in m.rope_tables(config)]
    with torch.no_grad():
        for name, p in block.named_parameters():
            if silent in name:
                p.zero_()
        exact, dropped = (block.train(mode)(x, *rope, None, None)[0] - x for mode in (False, True))
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * exact[kept], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_and_dropout():
    for config in (shape(dropout=0.0), moe_shape()):
        model, ids = random_model(config).train(), random_ids(2, 10)
        plain = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
        model.gradient_checkpointing = True
        for a, b in zip(plain, torch.autograd.grad(model(ids).square().mean(), list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b)
    model = random_model(shape(dropout=0.5))
    assert torch.equal(model(ids), model(ids)) and not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.generate(ids, 3), model.eval().generate(ids, 3))  # without dropout, whatever the mode
    assert not model.train().generate(ids, 1).requires_grad and model.training


def test_flops_count_the_matrix_products():
    model = m.MiniGPT(shape(tie_word_embeddings=False, qk_norm=False))
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "embed_tokens.weight")
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # counted along, and negligible
    assert model.flops_per_token(64) == 6 * (products + vectors) + 6 * 2 * 32 * 64


@pytest.mark.parametrize("config", [shape(), shape(tie_word_embeddings=False), moe_shape()])
def test_flops_are_those_that_torch_counts(config):
    """All but attention's, of which torch counts the half that the mask hides, too."""
    model, ids = random_model(config), random_ids(2, 32)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "attention" not in str(op))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert products / ids.numel() == model.flops_per_token(0) - 6 * vectors


@pytest.mark.parametrize(
    "config",
    [shape(), moe_shape(), shape(tie_word_embeddings=False), moe_shape(num_shared_experts=0)],
    ids=["dense", "moe", "untied", "no_shared"],
)
def test_lora_merged_equals_unmerged(config):
    model, ids = random_model(config), random_ids(2, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids)
        m.add_lora(model, 3, 6.0)
        torch.testing.assert_close(model(ids), plain)
        for name, p in model.named_parameters():
            assert p.requires_grad == (".lora_" in name)
            if name.endswith("lora_b"):
                p.normal_(std=0.1)
        unmerged = model(ids)
        weight = model.layers[0].self_attn.qkv_proj
        expected = before["layers.0.self_attn.qkv_proj.weight"] + 2.0 * weight.lora_b @ weight.lora_a
        m.merge_lora(model)
        torch.testing.assert_close(model(ids), unmerged, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.layers[0].self_attn.qkv_proj.weight, expected)
    assert (unmerged - plain).abs().max() > 0.01 and model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(m.UserError, match="lora_rank=33 is not possible: it must be at most 32"):
        m.add_lora(model, 33, 6.0)


def test_the_reward_is_read_at_the_last_token():
    model = m.RewardModel(random_model(shape()))
    torch.nn.init.normal_(model.score.weight)
    rows = [random_ids(1, n, seed=n)[0] for n in (5, 9, 2)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    alone = torch.cat([model(row[None]) for row in rows])
    for padded in (ids, ids.where(mask == 1, 77)):
        torch.testing.assert_close(model(padded, mask), alone)
        torch.testing.assert_close(model.token_scores(padded)[range(3), mask.sum(1) - 1], alone)
    torch.testing.assert_close(alone[0], model.score(model.hidden_states(rows[0][None])[0])[0, -1, 0])
    again = m.RewardModel(model)
    torch.testing.assert_close(again(ids, mask), alone)
    assert m.RewardModel(m.MiniGPT(shape()))(ids, mask).tolist() == [0, 0, 0]


# ======================================================================================================================
# 3 Losses
# ======================================================================================================================


def spans(B: int, T: int, seed: int = 0) -> torch.Tensor:
    """(B, T) masks of one run of ones a row, of any place and length."""
    draw = random.Random(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for row in mask:
        start = draw.randrange(T)
        row[start : draw.randrange(start, T) + 1] = True
    return mask


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_cross_entropy_by_hand():
    """Worked example: logits (0, ln 3) are probabilities 1/4 and 3/4; labels 0 and 1 cost ln 4 + ln 4/3, -100 none."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [math.log(3)]])
    labels, nats = torch.tensor([0, 1, -100]), math.log(4) + math.log(4 / 3)
    assert m.chunked_cross_entropy(hidden, weight, labels).item() == pytest.approx(nats)
    logprobs = [math.log(1 / 4), math.log(3 / 4), 0]
    assert m.token_logprobs(hidden, weight, labels).tolist() == pytest.approx(logprobs)
    half = math.log(1 + 3**0.5)  # at temperature 2 the logits are 0 and ln √3
    assert m.token_logprobs(hidden, weight, labels, 2.0).tolist() == pytest.approx([-half, math.log(3) / 2 - half, 0])


def test_dpo_loss_by_hand():
    """Worked example: h = (-1 + 2) - (-3 + 2.5) = 1.5; sigmoid at β = ½: ln(1 + e^-0.75); ipo: (1.5 - 1)²."""
    one = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)]
    assert m.dpo_loss(*one, beta=0.5).item() == pytest.approx(0.386871, abs=1e-6)
    assert m.dpo_loss(*one, beta=0.5, kind="ipo").item() == pytest.approx(0.25)


def test_reward_loss_by_hand():
    """Worked example: ln(1 + e^-(2 - 1)), and ln 2 for equal scores."""
    assert m.reward_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(0.313262, abs=1e-6)
    assert m.reward_loss(torch.tensor([1.0]), torch.tensor([1.0])).item() == pytest.approx(math.log(2), abs=1e-6)


def test_masked_mean_and_whitening_by_hand():
    """Worked example: of 1, 3 and a hidden 100 the mean is 2 and the variance 1."""
    x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    assert m.masked_mean(x, mask).item() == 2
    torch.testing.assert_close(m.whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_kl_estimates_by_hand():
    """Worked example: policy 1/2, reference 1/4, so r = 1/2."""
    policy, reference = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    for kind, value in {"k1": math.log(2), "k3": 0.5 - 1 + math.log(2)}.items():
        assert m.kl_estimate(policy, reference, kind).item() == pytest.approx(value, abs=1e-6)


def test_gae_by_hand():
    """Worked example: three tokens, a reward of 1 at the last; see the δ of each discount."""
    rewards, values, mask = (torch.tensor([x]) for x in ([0.0, 0.0, 1.0], [0.5, 0.4, 0.6], [True] * 3))
    advantages, returns = m.gae(rewards, values, mask, gamma=1.0, lam=0.5)  # δ = -0.1, 0.2, 0.4
    torch.testing.assert_close(advantages, torch.tensor([[0.1, 0.4, 0.4]]))
    torch.testing.assert_close(returns, torch.tensor([[0.6, 0.8, 1.0]]))
    advantages, returns = m.gae(rewards, values, mask, gamma=0.5, lam=1.0)  # δ = -0.3, -0.1, 0.4
    torch.testing.assert_close(advantages, torch.tensor([[-0.25, 0.1, 0.4]]))
    torch.testing.assert_close(returns, torch.tensor([[0.25, 0.5, 1.0]]))
    padded = [torch.cat((torch.full((1, 1), 9), x, torch.full((1, 2), 9)), dim=1) for x in (rewards, values)]
    around = m.gae(*padded, F.pad(mask, (1, 2)), gamma=0.5, lam=1.0)  # a prompt before, padding after
    for found, expected in zip(around, (advantages, returns), strict=True):
        torch.testing.assert_close(found, F.pad(expected, (1, 2)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # beyond 1.2, where there is nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # too unlikely: may come back
        (1.1, -2.0, 2.2, 2.2),
        (1.5, -2.0, 3.0, 3.0),  # too likely: may come back
        (0.5, -2.0, 1.6, 0.0),  # below 0.8, where there is nothing more to gain
    ],
)
def test_ppo_policy_loss_by_hand(ratio, advantage, loss, slope):
    """Worked example: one token, clip_range 0.2, on both sides of the clip."""
    old, mask = torch.tensor([[-1.3]], dtype=torch.float64), torch.tensor([[True]])
    new = (old + math.log(ratio)).requires_grad_()
    found = m.ppo_policy_loss(new, old, torch.tensor([[advantage]]), mask, 0.2)
    (grad,) = torch.autograd.grad(found, new)
    assert found.item() == pytest.approx(loss, abs=1e-9) and grad.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (0.5, 0.0, 0.5, 0.045),  # right, but moved too far: ½ (0.2 - 0.5)²
        (1.0, 0.0, 0.5, 0.125),  # ½ (1 - 0.5)² is the larger
        (0.1, 0.0, 0.5, 0.08),  # not clipped
    ],
)
def test_ppo_value_loss_by_hand(value, old, target, loss):
    """Worked example: one token, value_clip 0.2."""
    found = m.ppo_value_loss(*(torch.tensor([[x]]) for x in (value, old, target)), torch.tensor([[1.0]]), 0.2)
    assert found.item() == pytest.approx(loss)


def test_grpo_advantages_by_hand():
    """Worked example: rewards 1, 0, 0, 1 have mean 1/2 and deviation √(1/3); equal ones teach nothing."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    assert m.grpo_advantages(rewards, 4).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    scaled = m.grpo_advantages(rewards, 4, "grpo")
    torch.testing.assert_close(scaled[0].item(), 0.5 / (3**-0.5 + 1e-4))
    assert (scaled[4:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_cross_entropy_equals_plain(chunk):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 8), (50, 8)))
    labels = random_ids(2, 7, 50, low=0)
    labels[0, 3:] = -100
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = m.chunked_cross_entropy(hidden, weight, labels, chunk)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * plain, (hidden, weight), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    frozen = m.chunked_cross_entropy(hidden, weight.detach(), labels, chunk)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden), torch.autograd.grad(plain, hidden))
    with torch.no_grad():
        torch.testing.assert_close(m.chunked_cross_entropy(hidden, weight, labels, chunk), plain)
        assert m.chunked_cross_entropy(hidden, weight, torch.full((2, 7), -100), chunk) == 0


def test_evaluation_computes_no_gradient_of_the_output_matrix():
    """One product of hidden states and matrix while evaluating; three with both gradients."""
    hidden, weight = doubles(2, 7, 8).requires_grad_(), doubles(50, 8, seed=1).requires_grad_()
    labels = random_ids(2, 7, 50, low=0)
    with FlopCounterMode(display=False) as training:
        loss = m.chunked_cross_entropy(hidden, weight, labels, 4)
        loss.backward()
    with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
        torch.testing.assert_close(m.chunked_cross_entropy(hidden, weight, labels, 4), loss)
    product = 2 * labels.numel() * weight.numel()
    assert (evaluation.get_total_flops(), training.get_total_flops()) == (product, 3 * product)
    weight.requires_grad_(False)  # LoRA: the matrix is frozen
    with FlopCounterMode(display=False) as frozen:
        m.chunked_cross_entropy(hidden, weight, labels, 4).backward()
    assert frozen.get_total_flops() == 2 * product


@pytest.mark.parametrize("grad", [True, False])
def test_cross_entropy_of_half_precision_is_summed_in_float32(grad):
    """4096 labels of 50 words: sums in bfloat16 would stand still at 256 or 512 nats."""
    hidden, weight = doubles(4096, 8).bfloat16(), doubles(50, 8, seed=1).bfloat16()
    labels = random_ids(1, 4096, 50, low=0)[0]
    with torch.set_grad_enabled(grad):
        loss = m.chunked_cross_entropy(hidden, weight, labels, 64)
        logprobs = m.token_logprobs(hidden, weight, labels, chunk=64)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="none")
    assert loss.dtype == logprobs.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-3)
    torch.testing.assert_close(-logprobs.double(), expected, rtol=0.02, atol=0.05)


def test_cross_entropy_under_autocast_is_that_of_bfloat16():
    hidden, weight = (torch.randn(*size, requires_grad=True) for size in ((6, 16), (30, 16)))
    labels = random_ids(1, 6, V=30)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = m.chunked_cross_entropy(hidden, weight, labels, chunk=4)
    half = m.chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, chunk=4)
    assert loss.dtype == half.dtype == torch.float32 and loss == half != m.chunked_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 100), (0.7, 3), (2.0, 1)])
def test_token_logprobs(temperature, chunk):
    hidden, weight = doubles(2, 7, 8).requires_grad_(), doubles(50, 8, seed=1).requires_grad_()
    labels = random_ids(2, 7, 50, low=0)
    labels[0, 3:5] = labels[1, 0] = -100
    found = m.token_logprobs(hidden, weight, labels, temperature, chunk)
    every = (hidden @ weight.T / temperature).log_softmax(-1)
    plain = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
    assert (found[labels == -100] == 0).all()
    ours, theirs = (torch.autograd.grad((x * doubles(2, 7, seed=2)).sum(), (hidden, weight)) for x in (found, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert m.token_logprobs(hidden, weight, torch.full((2, 7), -100)).abs().sum() == 0


def test_dpo_loss_against_its_equations():
    pc, pr, rc, rr = four = [doubles(9, seed=k) for k in range(4)]
    eq7 = [
        -math.log(sigmoid(0.3 * ((a - c) - (b - d))))
        for a, b, c, d in zip(*map(torch.Tensor.tolist, four), strict=True)
    ]
    eq17 = [(((a - c) - (b - d)) - 1 / 0.6) ** 2 for a, b, c, d in zip(*map(torch.Tensor.tolist, four), strict=True)]
    assert m.dpo_loss(*four, beta=0.3).item() == pytest.approx(sum(eq7) / 9, abs=1e-9)
    assert m.dpo_loss(*four, beta=0.3, kind="ipo").item() == pytest.approx(sum(eq17) / 9, abs=1e-9)
    assert m.dpo_loss(pc, pr, pc, pr, beta=0.3).item() == pytest.approx(math.log(2), abs=1e-12)
    huge = m.dpo_loss(*(torch.tensor([x]) for x in (-1e4, 0.0, 0.0, 0.0)), beta=1.0)
    assert huge.item() == pytest.approx(1e4)  # no overflow to infinity


def test_reward_loss_against_its_equation():
    chosen, rejected = doubles(9), doubles(9, seed=1)
    eq1 = [-math.log(sigmoid(a - b)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert m.reward_loss(chosen, rejected).item() == pytest.approx(sum(eq1) / 9, abs=1e-9)


def test_ppo_losses_against_their_equations():
    new, old, advantages = (doubles(4, 7, seed=k) for k in range(3))
    mask, policy, value = spans(4, 7), [], []
    values, before, returns = (doubles(4, 7, seed=k) for k in range(3, 6))
    for b, t in mask.nonzero().tolist():
        r, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
        policy.append(-min(r * a, min(max(r, 0.7), 1.3) * a))
        v, o, g = values[b, t].item(), before[b, t].item(), returns[b, t].item()
        value.append(0.5 * max((v - g) ** 2, (min(max(v, o - 0.4), o + 0.4) - g) ** 2))
    found = m.ppo_policy_loss(new, old, advantages, mask, 0.3)
    assert found.item() == pytest.approx(sum(policy) / len(policy), abs=1e-9)
    found = m.ppo_value_loss(values, before, returns, mask, 0.4)
    assert found.item() == pytest.approx(sum(value) / len(value), abs=1e-9)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.9, 1.0), (0.0, 0.5), (1.0, 1.0)])
def test_gae_equals_the_sum_of_its_definition(gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} and, the same recursively, δ_t + γλ A_{t+1}; δ_t = r_t + γ V_{t+1} - V_t."""
    rewards, values, mask = doubles(6, 11), doubles(6, 11, seed=1), spans(6, 11, seed=3)
    expected, summed = torch.zeros(6, 11, dtype=torch.float64), torch.zeros(6, 11, dtype=torch.float64)
    for b in range(6):
        after, advantage, deltas = 0.0, 0.0, {}
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            deltas[t] = rewards[b, t] + gamma * after - values[b, t]
            advantage = deltas[t] + gamma * lam * advantage
            after, expected[b, t] = values[b, t], advantage
        for t in deltas:
            summed[b, t] = sum((gamma * lam) ** (k - t) * delta for k, delta in deltas.items() if k >= t)
    advantages, returns = m.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(advantages, summed, rtol=0, atol=1e-9)
    torch.testing.assert_close((returns - values)[mask], expected[mask], rtol=0, atol=1e-9)
    assert (returns[~mask] == 0).all()


def test_whitening_looks_at_the_mask_alone():
    x, mask = doubles(5, 9) * 3 + 7, spans(5, 9)
    white = m.whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6) and (white[~mask] == 0).all()
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    other = torch.where(mask, x, 1e6)
    torch.testing.assert_close(m.whiten(other, mask), white)
    assert m.whiten(torch.ones(2, 3), torch.ones(2, 3)).abs().max() == 0  # nothing to scale


def test_expected_kl_estimates_are_the_divergence():
    """Over a whole vocabulary, with the policy's probabilities as weights."""
    p, q = doubles(50, 6).log_softmax(-1), doubles(50, 6, seed=1).log_softmax(-1)
    true = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert (true > 0).all() and (m.kl_estimate(p, q, "k3") >= 0).all()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * m.kl_estimate(p, q, kind)).sum(-1), true, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.kl_estimate(p, q), m.kl_estimate(p, q, "k1"))


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo"])
def test_grpo_advantages_against_their_definition(kind):
    rewards, expected = doubles(12), []
    for group in (rewards[:3], rewards[3:6], rewards[6:9], rewards[9:]):
        mean = sum(group.tolist()) / 3
        deviation = (sum((r - mean) ** 2 for r in group.tolist()) / 2) ** 0.5 + 1e-4
        expected += [(r - mean) / (deviation if kind == "grpo" else 1) for r in group.tolist()]
    assert m.grpo_advantages(rewards, 3, kind).tolist() == pytest.approx(expected, abs=1e-6)
    assert (m.grpo_advantages(torch.full((7,), 0.1), 7, kind) == 0).all()  # whose mean is not exactly 0.1


def test_weight_gradients_are_summed_in_float32_by_hand():
    """Worked example: 1024 equal terms, one a chunk; in bfloat16 their sum would stop growing at 256."""
    weight = torch.zeros(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        m.chunked_cross_entropy(torch.ones(1024, 8), weight, torch.zeros(1024, dtype=torch.long), chunk=1).backward()
    torch.testing.assert_close(weight.grad[1:], torch.full((3, 8), 1024 / 4), rtol=1e-2, atol=0)


# ======================================================================================================================
# 4 Optimisation
# ======================================================================================================================


def test_schedules():
    """Worked example: from 0.1 to a peak of 1; half of the cosine's way is their middle, 0.55."""
    config = m.TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rate = m.learning_rate_at
    assert [rate(step, 0.0, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(9, 0.5, config) == pytest.approx(0.55) and rate(9, 1.0, config) == pytest.approx(0.1)
    wsd = dataclasses.replace(config, schedule="wsd", decay_fraction=0.2)
    assert [round(rate(9, p, wsd), 6) for p in (0.0, 0.8, 0.9, 1.0, 1.1)] == [1.0, 1.0, 0.55, 0.1, 0.1]
    constant = dataclasses.replace(config, schedule="constant")
    assert [rate(step, 0.9, constant) for step in (0, 9)] == [0.25, 1.0]
    assert rate(0, 0.0, dataclasses.replace(config, warmup_steps=0)) == 1.0


def test_newton_schulz_by_hand():
    """Worked example: after division by the norm, a step takes s to 3.4445 s - 4.775 s³ + 2.0315 s⁵."""
    assert m.orthogonalize(torch.tensor([[[2.0]]]), steps=1).item() == pytest.approx(0.701)  # s = 1
    half = torch.eye(2)[None] * 3  # s = 3 / √18 = √½ twice
    torch.testing.assert_close(m.orthogonalize(half, steps=1), torch.eye(2)[None] * 1.106539, atol=1e-5, rtol=0)


def test_stacked_weights_are_taken_apart_by_hand():
    """Worked example: four rows of two matrices, and the same for each of two experts; the parts are views."""
    weight = torch.arange(4.0)[:, None]
    assert [part.tolist() for part in m.unstack(weight, [1, 3])] == [[[0.0]], [[1.0], [2.0], [3.0]]]
    experts = torch.stack((weight, weight + 10))
    first, *_, last = m.unstack(experts, [2, 2])
    assert (first.tolist(), last.tolist()) == ([[0.0], [1.0]], [[12.0], [13.0]])
    last.zero_()
    assert experts[1].flatten().tolist() == [10, 11, 0, 0]


def test_newton_schulz_makes_matrices_orthogonal():
    torch.manual_seed(0)
    for rows, cols in ((16, 16), (8, 40), (40, 8)):
        x = torch.randn(3, rows, cols)
        singular = torch.linalg.svdvals(m.orthogonalize(x, steps=9))
        assert singular.min() > 0.6 and singular.max() < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert (m.orthogonalize(x, steps=9) * (u @ v)).sum((-2, -1)).min() > 0.85 * min(rows, cols)  # the nearest one


def test_muon_against_its_definition():
    model = random_model(moe_shape(tie_word_embeddings=False))
    optimizers = m.build_optimizers(model, m.TrainConfig(learning_rate=0.1, weight_decay=0.5))
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    muon = optimizers[1]
    names = {id(p): n for n, p in model.named_parameters()}
    muon_names = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert not any(word in name for name in muon_names for word in ("embed", "lm_head", "norm", "mlp.gate.weight"))
    assert {n for n, p in model.named_parameters() if "_proj" in n} == muon_names
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    momentum = {n: 0.0 for n in before}
    for step in range(2):
        grads = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for n, p in before.items()}
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        muon.step()
        for n in muon_names:
            momentum[n] = 0.95 * momentum[n] + 0.05 * grads[n]
            update = 0.05 * grads[n] + 0.95 * momentum[n]
            rows = {"qkv_proj.weight": [32, 16, 16], "gate_up_proj": [24, 24], "gate_up_proj.weight": [24, 24]}
            rows = next((r for suffix, r in rows.items() if n.endswith(suffix)), [update.shape[-2]])
            parts = [
                m.orthogonalize(part.reshape(-1, *part.shape[-2:])).view_as(part) * 0.2 * max(part.shape[-2:]) ** 0.5
                for part in update.split(rows, dim=-2)
            ]
            before[n] = before[n] * (1 - 0.1 * 0.5) - 0.1 * torch.cat(parts, dim=-2)
            torch.testing.assert_close(dict(model.named_parameters())[n].detach(), before[n], rtol=1e-4, atol=1e-5)


def test_adamw_decays_the_matrices_of_blocks_alone():
    model = random_model(moe_shape(tie_word_embeddings=False))
    config = m.TrainConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    (adamw,) = m.build_optimizers(model, config)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay.pop(id(p)) == (0.5 if "_proj" in name else 0.0), name
    assert not decay and all(group["betas"] == (0.8, 0.9) for group in adamw.param_groups)


def test_lora_is_left_to_adamw():
    model = random_model(shape())
    m.add_lora(model, 2, 4.0)
    (adamw,) = m.build_optimizers(model, m.TrainConfig(optimizer="muon"))
    held = {p for group in adamw.param_groups for p in group["params"]}
    assert type(adamw) is torch.optim.AdamW and held == {p for n, p in model.named_parameters() if "lora_" in n}


def test_devices_and_dtypes_are_picked_by_name():
    cpu = m.pick_device("cpu")
    assert cpu == torch.device("cpu") and m.pick_device().type in ("cpu", "cuda", "mps")
    assert m.pick_dtype("auto", cpu) == torch.float32 and m.pick_dtype("bfloat16", cpu) == torch.bfloat16
    for name in ("gpu", "cuda:99"):
        with pytest.raises(m.UserError, match=f"device '{name}' cannot be used here"):
            m.pick_device(name)
    with pytest.raises(m.UserError, match="device 'meta' is not possible: it must be auto, cpu"):
        m.pick_device("meta")


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "on cpu in float32 (the fastest here)\n"), (["--dtype", "float32"], "on cpu in float32\n")],
)
def test_the_model_line_says_whether_the_dtype_was_chosen(tmp_path, trained_runs, capsys, flags, words):
    argv = [
        "--config",
        "tiny",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        *quick("pretrain"),
        *data_flags(trained_runs),
    ]
    assert train.main([*argv, "--max-steps", "1", *flags]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("speeds", "name"),
    [
        ({"float32": 100, "float32_onednn": 105, "bfloat16": 140}, "float32"),
        ({"float32": 100, "float32_onednn": 115, "bfloat16": 140}, "float32_onednn"),
        ({"float32": 100, "float32_onednn": 115, "bfloat16": 180}, "bfloat16"),
    ],
)
def test_the_fastest_dtype_is_measured(monkeypatch, speeds, name):
    """Worked example: oneDNN has to be 1.1 times as fast as MKL, bfloat16 1.5 times as fast as the better one."""
    monkeypatch.setattr(m, "matmul_peak", lambda device, dtype, n: speeds[dtype])
    close, error = torch.allclose, 0.0
    monkeypatch.setattr(torch, "allclose", lambda _, exact, **options: close(exact * (1 + error), exact, **options))
    assert FASTEST_DTYPE(torch.device("cpu")) == name
    if name == "float32_onednn":
        error = 2**-9  # a processor that rounds to bfloat16 on the way
        assert FASTEST_DTYPE(torch.device("cpu")) == "float32"


def test_a_product_s_speed_by_hand(monkeypatch):
    """Worked example: 2 · 8³ operations in a quarter of a second."""
    ticks = itertools.count(step=0.25)
    with monkeypatch.context() as clock:
        clock.setattr(time, "perf_counter", lambda: next(ticks))
        assert inspect.unwrap(m.matmul_peak)(torch.device("cpu"), "float32", 8) == 2 * 512 / 0.25


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_computes_in_bfloat16_where_it_can(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or supported)
    assert m.pick_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("dtype", ["float32_onednn", "bfloat16"])
def test_every_dtype_trains_like_float32(tokenizer, dtype):
    """The products' kernels differ; master weights, losses and what they learn do not."""
    losses = {}
    for name in ("float32", dtype):
        torch.manual_seed(0)
        trainer = m.PreTrainer(m.MiniGPT(shape()), tokenizer, config=m.TrainConfig(dtype=name, max_steps=30))
        batch = lm_batch(4, 16)
        losses[name] = [trainer.step([batch])["loss"] for _ in range(30)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert torch.get_float32_matmul_precision() == "highest"  # set around training only
    tolerance = 1e-4 if dtype == "float32_onednn" else 0.05
    assert losses[dtype] == pytest.approx(losses["float32"], rel=tolerance) and losses[dtype][-1] < losses[dtype][0] - 1


def test_an_error_of_the_compiler_is_told_by_its_first_line():
    assert str(m.compile_error("training", RuntimeError("\nno g++\nand 90 lines more"))).endswith("compiler): no g++")


def test_running_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert m.is_out_of_memory(caught.value) and m.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not m.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 5.0 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_running_out_of_memory_is_recognised_on_every_device(message):
    assert m.is_out_of_memory(RuntimeError(message))


def test_memory_that_the_system_does_not_tell_is_shown_as_unknown(tmp_path, tokenizer, monkeypatch, capsys):
    """Sandboxes lack lines of /proc/self/status, Windows all of it and the module resource."""
    plain = open
    for status in ("Name: x\nVmRSS:  2000 kB\n", "Name: x\n", None):

        def fake(path, *args, status=status, **options):
            if str(path) != "/proc/self/status":
                return plain(path, *args, **options)
            if status is None:
                raise FileNotFoundError(path)
            return io.StringIO(status)

        monkeypatch.setattr("builtins.open", fake)
        monkeypatch.setitem(sys.modules, "resource", None)
        monitor, known = m.MemoryMonitor(), bool(status and "VmRSS" in status)
        assert monitor.current_bytes() == monitor.peak_bytes() == 2048000 * known
        config = m.TrainConfig(max_steps=1, sample_tokens=0)
        trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / str(status)[-9:-4]).fit()
        assert ("| 0.00 GB (peak 0.00)" if known else "| ? GB (peak ?)") in capsys.readouterr().out


def test_the_memory_of_cuda_and_of_macos(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert (m.MemoryMonitor("cuda").current_bytes(), m.MemoryMonitor("cuda").peak_bytes()) == (5, 7)
    resource = pytest.importorskip("resource")
    with monkeypatch.context() as macos:  # which has no /proc
        macos.setattr("builtins.open", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
        macos.setattr(sys, "platform", "darwin")
        macos.setattr(resource, "getrusage", lambda who: resource.struct_rusage(range(16)))
        assert m.MemoryMonitor().peak_bytes() == 2  # ru_maxrss is the third


def test_the_monitor_agrees_with_the_operating_system():
    code = (
        "import torch, resource, minillm as m; x = torch.ones(60_000_000); del x; monitor = m.MemoryMonitor(); "
        "print(monitor.peak_bytes(), monitor.current_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    # a shell between: after exec, ru_maxrss still counts the memory of the process that it was forked from
    out = subprocess.run(["sh", "-c", f"{sys.executable} -c '{code}'; true"], cwd=HERE, capture_output=True, text=True)
    peak, current, os_peak = map(int, out.stdout.split())
    assert peak == pytest.approx(os_peak * (1 if sys.platform == "darwin" else 1024), rel=0.05)
    assert peak - current > 200e6 or sys.platform == "darwin"


# ======================================================================================================================
# 5 Tokenizer
# ======================================================================================================================


def words(text: str) -> list[str]:
    return re.findall(m.WORD_PATTERN, text)


def byte_ids(text: str) -> list[int]:
    """The ids of a tokenizer without merges."""
    return [m.FIRST_BYTE + b for b in text.encode()]


@pytest.fixture(scope="session")
def bytes_only() -> m.BPETokenizer:
    return m.BPETokenizer()


def test_a_text_is_cut_into_words_by_hand():
    """Worked example: spaces go to the word that follows, ends of lines to the mark before, each digit is alone."""
    assert words("Don't go, it's 12!\n\n  我有3只猫abc。\r\nx") == [
        *("Don", "'t", " go", ",", " it", "'s", " ", "1", "2", "!\n\n", " ", " "),
        *("我有", "3", "只猫", "abc", "。\r\n", "x"),
    ]


def test_merges_are_learned_by_hand():
    """Worked example: bc is seen 3 times, ab twice; then a+bc would be next, but no pair is left that occurs twice."""
    text = "bc\nbc\nbc\nab\nab\nabc"
    assert m.count_words([text]) == {"bc": 3, "ab": 2, "abc": 1, "\n": 5}
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train(text)
    assert tokenizer.merges == [(b"b", b"c"), (b"a", b"b")] and tokenizer.vocab_size == m.FIRST_MERGE + 2 == 263


def test_the_merge_that_was_learned_first_comes_first_by_hand():
    """Worked example: bc (261) was learned before ab (262), so abc is a + bc, and ababcc is ab + a + bc + c."""
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train("bc\nbc\nbc\nab\nab\nabc")
    a, c = byte_ids("ac")
    assert (a, c) == (5 + 97, 5 + 99)
    assert tokenizer.encode("abc") == [a, 261] and tokenizer.encode("ababcc") == [262, a, 261, c]
    assert tokenizer.encode("ab", add_special_tokens=True) == [1, 262]
    assert tokenizer.decode_bytes([262, 1, 261]) == b"abbc" and tokenizer.token_bytes[261:] == [b"bc", b"ab"]


def test_a_conversation_is_encoded_by_hand(bytes_only):
    """Worked example: <|im_start|> is 3 and <|im_end|> is 4; the reply and its end are trained, the newline is not."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids, trained = bytes_only.encode_chat(chat)
    asked = [3, *byte_ids("user\nhi"), 4, *byte_ids("\n")]
    opened = [3, *byte_ids("assistant\n")]
    assert ids == [*asked, *opened, *byte_ids("yo"), 4, *byte_ids("\n")]
    assert trained == [False] * (10 + 11) + [True] * 3 + [False]
    assert bytes_only.apply_chat_template(chat) == ids
    assert bytes_only.apply_chat_template(chat[:1], add_generation_prompt=True) == asked + opened
    assert bytes_only.encode_chat(chat, first=2) == (ids, [False] * len(ids))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it's IT'S we'll WE'LL We'Ll", ["it", "'s", " IT", "'S", " we", "'ll", " WE", "'LL", " We", "'Ll"]),
        (
            "I've I'VE they're I'm I'M I'd",
            ["I", "'ve", " I", "'VE", " they", "'re", " I", "'m", " I", "'M", " I", "'d"],
        ),
        ("l'abc 'x’s", ["l", "'", "abc", " '", "x", "’", "s"]),
        ("2024年", ["2", "0", "2", "4", "年"]),
        ("〇①１½٣Ⅳ²", ["〇", "①", "１", "½", "٣", "Ⅳ", "²"]),
        ("二〇二四 -12", ["二", "〇", "二四", " -", "1", "2"]),
        ("a.\n\nb?!\r\n\r\n c", ["a", ".\n\n", "b", "?!\r\n\r\n", " c"]),
        ("a\n\n \t\nb  \n", ["a", "\n\n", " \t\n", "b", "  \n"]),
        ("a   b\u3000 。", ["a", "  ", " b", "\u3000", " 。"]),
        ("中文，abc。C++代码", ["中文", "，", "abc", "。", "C", "++", "代码"]),
        ("日本語のテスト 한국어", ["日本語", "のテスト", " 한국어"]),
        ("e\u0301 😀👍🏽 \ufeffx\x00", ["e", "\u0301", " 😀👍🏽", " ", "\ufeff", "x", "\x00"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_every_number_is_a_word_of_its_own():
    numbers = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nd", "Nl", "No")]
    assert len(numbers) > 1500
    for c in [*numbers, "〇"]:
        assert words(f"a {c * 3}b") == ["a", " ", c, c, c, "b"], c


def nasty_texts() -> list[str]:
    draw = random.Random(0)
    pools = [
        "abc xyz'sdtllvere",
        "你好世界中国人𠮷々",
        " \t\n\r\u3000\xa0",
        "0123456789〇½①٣",
        "，。！？“”…—.,!?'\"-_()[]^\\",
        "éßЖωあ한😀👍🏽\u200d\u0301",
    ]
    mixed = ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(40))) for _ in range(3000)]
    any_char = [
        "".join(
            chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000), draw.randrange(256)]))
            for _ in range(20)
        )
        for _ in range(3000)
    ]
    runs = [
        run * n for run in ("a", "é", "中", "。", "\n", "\u3000", "1", "\u0301", ".\n", " \n") for n in (31, 33, 65)
    ]
    return [*mixed, *any_char, *runs, "我" * 2000, "abc" * 700, " " * 50, "", *m.SPECIAL_TOKENS, "x<|eos|>y", *TEXTS]


def test_words_add_up_to_the_text_and_are_short():
    """Long words would take quadratic time to merge."""
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzéßжω", k=100_000))
    runs = [
        run * (100_000 // len(run)) for run in ("a", "中", "。", " ", "\n", "1", "\x00", " .\n", "\u3000\n", "'", "'l")
    ]
    for text in [letters, *runs, *nasty_texts()]:
        found = words(text)
        assert "".join(found) == text
        assert max(map(len, found), default=0) <= 1 + 32 + 32  # a space, marks, ends of lines
        for kind, longest in (("[a-zé]+", 33), ("[一-鿿]+", 64), ("[0-9]+", 1)):
            assert max((len(word) for word in found if re.fullmatch(" ?" + kind, word)), default=0) <= longest


def test_a_text_of_one_word_takes_bounded_work(tokenizer):
    """No clock: of 100,000 letters no word is looked at that is longer than 32."""
    draw = random.Random(1)
    text = "".join(draw.choices("abcdefghij", k=100_000))
    assert len(words(text)) == 100_000 / 32 == len(set(words(text)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [i for at in range(0, len(text), 32) for i in tokenizer.encode(text[at : at + 32])]


def test_a_safe_cut_changes_no_word():
    cuts = 0
    for text in nasty_texts():
        places = [match.start() for match in m.SAFE_CUT.finditer(text)]
        cuts += len(places)
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
        assert [word for piece in pieces for word in words(piece)] == words(text), text
        for at in places[:30]:
            assert 0 < at < len(text) and words(text[:at]) + words(text[at:]) == words(text), (text, at)
    assert cuts > 5000


def test_tokenizer_round_trips_all_bytes(tokenizer):
    draw = random.Random(0)
    for i in range(100_000):
        data = draw.randbytes(i % 24)
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    for text in nasty_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def as_huggingface(tokenizer: m.BPETokenizer, pattern: str | None = None):
    """The same tokenizer in `tokenizers`, perhaps with another word pattern."""
    data = json.loads(tokenizer.to_json())
    if pattern:
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True
    return theirs


@functools.cache
def val_docs() -> list[str]:
    lines = (HERE / "data/val/pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def larger() -> m.BPETokenizer:
    """A tokenizer of 2,000 tokens, of Chinese and English."""
    tokenizer = m.BPETokenizer(vocab_size=2000)
    tokenizer.train(val_docs()[:300] + TEXTS)
    return tokenizer


def test_ids_equal_huggingface_tokenizers(tmp_path, larger):
    hf = pytest.importorskip("tokenizers")
    larger.save(tmp_path / "tokenizer.json")
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == larger.vocab_size == 2000
    for text in nasty_texts() + val_docs():
        ids = larger.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert theirs.decode(ids) == text
    for special, i in zip(m.SPECIAL_TOKENS, range(5), strict=True):
        assert theirs.token_to_id(special) == i and i not in larger.encode(special)


QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_ids_equal_those_under_qwen2s_pattern(larger):
    """llama.cpp knows only patterns of well-known families: what it makes of an export must be what we make."""
    qwen2 = as_huggingface(larger, QWEN2_PATTERN)
    mixed = (
        "我用Python 3写了2个程序，don't worry! It's 100% OK。\n\nWE'LL see… “好的”，he said：\r\n  1. 第一，\n\t2. b;\n"
    )
    marks = ["".join(pair) for pair in itertools.product((*" \n中.a1'。", "'s", "“", "\r\n", "  "), repeat=3)]
    other = 0
    for text in [mixed, mixed * 3, *TEXTS, *marks, *val_docs()]:
        assert larger.encode(text) == qwen2.encode(text).ids, text
        other += words(text) != [word for word, _ in qwen2.pre_tokenizer.pre_tokenize_str(text)]
    assert other > 0  # the words differ, the ids do not


_OLD = {
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\u8c48-\ufaff\U00020000-\U000323af",
    "space": "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
    "mark": "!-/:-@\\[-`{-~\xa1-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb-\xbf\xd7\xf7\u2010-\u2027\u2030-\u205e\u20a0-\u20bf"
    "\u2190-\u2bff\u3001-\u3004\u3008-\u3020\ufe30-\ufe4f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\U0001f000-\U0001faff",
}
_OLD["letter"] = "[^0-9{han}{space}{mark}]".format(**_OLD)
OLD_PATTERN = (
    "'(?:[sdmt]|ll|ve|re)(?!{letter})| ?{letter}+|[{han}]+|[0-9]| ?[{mark}]+|[{space}]*[\r\n]+|[{space}]+(?![^{space}])"
    "|[{space}]+"
).format(**_OLD)


def test_a_tokenizer_of_the_old_pattern_keeps_it(tmp_path, monkeypatch, tokenizer):
    """Its ids depend on the pattern that it was trained with, which its tokenizer.json holds."""
    monkeypatch.setattr(m, "WORD_PATTERN", OLD_PATTERN)
    old, long = m.BPETokenizer(vocab_size=700), "".join(map(chr, range(0x430, 0x430 + 32))) + "abcdefgh"
    old.train([*TEXTS, "½½½ ½½½", f"{long}\n{long}"])
    old.save(tmp_path / "tokenizer.json")
    monkeypatch.undo()
    loaded = m.BPETokenizer.load(tmp_path / "tokenizer.json")
    assert type(loaded) is m.BPETokenizer and loaded.pattern == OLD_PATTERN != m.WORD_PATTERN == tokenizer.pattern
    assert loaded.to_json() == old.to_json() and loaded.content_hash() == old.content_hash()
    theirs, new_words = as_huggingface(loaded), as_huggingface(loaded, m.WORD_PATTERN)
    for text in nasty_texts():
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")  # unknown to this Python
        ids = loaded.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert loaded.decode_bytes(ids) == text.encode()
    for text in ("½½½", long):  # where the patterns differ
        assert loaded.encode(text) != new_words.encode(text).ids, text
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "texts", [TEXTS, ["low lower lowest newest widest"] * 2, ["哈哈哈哈 中国人民中国人 aaaaaaa"] * 3]
)
def test_every_merge_is_the_most_frequent_pair(texts):
    """Against a textbook BPE that counts all pairs anew for every merge."""

    def whole(token: bytes) -> bool:
        return token.decode("utf-8", "ignore").encode() == token

    word_counts = m.count_words(texts)
    words = {word: [bytes([b]) for b in word.encode()] for word in word_counts}
    merges = m.learn_merges(word_counts, 150)
    assert merges == m.learn_merges(dict(reversed(word_counts.items())), 150)  # ties do not depend on the order
    for chosen in [*merges, None]:
        pairs = Counter()
        for word, tokens in words.items():
            for a, b in itertools.pairwise(tokens):
                if whole(a) and whole(b) or a[0] >= 0xC0 and not whole(a):
                    pairs[a, b] += word_counts[word]
        if chosen is None:
            assert len(merges) == 150 or max(pairs.values(), default=0) < 2
            return
        assert pairs[chosen] == max(pairs.values())
        for tokens in words.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == chosen:
                    tokens[i : i + 2] = [chosen[0] + chosen[1]]
                i += 1


def let_fork(monkeypatch) -> list[int]:
    """Two cores, however many there are; return a list that grows with every child process."""
    forks, fork = [], os.fork
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or fork())
    return forks


def test_training_is_deterministic_and_stops_cleanly(tokenizer, monkeypatch):
    again = m.BPETokenizer(vocab_size=300)
    again.train(iter(TEXTS))
    assert again.to_json() == tokenizer.to_json()
    forks = let_fork(monkeypatch)
    parallel, serial = m.BPETokenizer(vocab_size=600), m.BPETokenizer(vocab_size=600)
    parallel.train(val_docs() * 16)
    assert forks
    monkeypatch.delattr(os, "fork")
    serial.train(val_docs() * 16)
    assert parallel.to_json() == serial.to_json()
    small = m.BPETokenizer(vocab_size=5000)
    small.train("abab")
    assert small.vocab_size == m.FIRST_MERGE + 1 and small.decode(small.encode("abab")) == "abab"
    with pytest.warns(UserWarning, match="below the floor of 261"):
        m.BPETokenizer(vocab_size=10).train(["a"])
    with pytest.raises(m.UserError, match="vocab_size=131073 .* at most 131072"):
        m.BPETokenizer(vocab_size=(1 << 17) + 1).train(["a"])


def test_chat_template(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好<|im_end|>"}], add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\n你好<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.im_end_id) == 1 and ids.count(tokenizer.im_start_id) == 2


def test_a_loaded_tokenizer_can_be_trained_anew(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = m.BPETokenizer.load(tmp_path / "tokenizer.json")
    again.train(TEXTS)
    assert again.to_json() == tokenizer.to_json()


def test_tokenizer_manager_trains_once_for_each_content(tmp_path, monkeypatch):
    data = tmp_path / "data.txt"
    data.write_text("abc abc 你好 你好\n" * 20, encoding="utf-8")
    manager, trained = m.TokenizerManager(tmp_path / "cache"), []
    train_method = m.BPETokenizer.train
    monkeypatch.setattr(m.BPETokenizer, "train", lambda self, texts: (trained.append(1), train_method(self, texts)))
    first = manager.get_or_train_tokenizer(data, vocab_size=270)
    assert manager.get_or_train_tokenizer(str(data), vocab_size=270).to_json() == first.to_json() and len(trained) == 1
    data.write_text("abd abc 你好 你好\n" + "abc abc 你好 你好\n" * 19, encoding="utf-8")
    manager.get_or_train_tokenizer(data, vocab_size=270)
    manager.get_or_train_tokenizer(data, vocab_size=271)
    assert len(trained) == 3
    monkeypatch.setattr(m, "code_hash", lambda: "of a changed minillm.py")
    manager.get_or_train_tokenizer(data, vocab_size=270)
    assert len(trained) == 4
    with pytest.warns(UserWarning, match="only 8 of 3835 merges were learned"):  # 4096 - 5 special tokens - 256 bytes
        manager.get_or_train_tokenizer(data)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"model": {"merges": [["a"]]}}',
        '{"model": {"merges": [["Ġ", "§§"]]}}',
        "\x00",
        '{"model": {"merges": []}}',
    ],
)
def test_foreign_tokenizer_files_are_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(m.UserError, match="t.json"):
        m.BPETokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data["model"]["merges"].pop(), "differ"),
        (lambda data: data["model"]["merges"].reverse(), "not a tokenizer.json of byte-level BPE|differ"),
        (lambda data: data["model"]["merges"].append(["a"]), "not a tokenizer.json of byte-level BPE"),
        (lambda data: data["model"]["merges"].append(["§§", "好"]), "not a tokenizer.json of byte-level BPE"),
        (lambda data: data["model"]["vocab"].update(x=9999), "differ"),
        (lambda data: data["added_tokens"][4].update(special=False), "differ"),
        (lambda data: data["added_tokens"].append(data["added_tokens"][0]), "differ"),
        (lambda data: data.update(normalizer={"type": "NFC"}), "differ"),
        (lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), "not a tokenizer.json"),
        (lambda data: data["pre_tokenizer"]["pretokenizers"][0].pop("pattern"), "not a tokenizer.json"),
        (lambda data: data.pop("pre_tokenizer"), "not a tokenizer.json"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused(tmp_path, tokenizer, damage, message):
    data = json.loads(tokenizer.to_json())
    damage(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(m.UserError, match=f"t.json.* {message}"):
        m.BPETokenizer.load(tmp_path / "t.json")


def test_ids_outside_the_vocabulary_are_named(tokenizer):
    for i in (300, -1):
        with pytest.raises(m.UserError, match=rf"token id {i} is outside the vocabulary, 0 … 299"):
            tokenizer.decode([5, i])


# ======================================================================================================================
# 6 Data
# ======================================================================================================================


def as_lists(value):
    """Tensors as lists, through all lists and dicts: what == can compare."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {name: as_lists(part) for name, part in value.items()}
    return list(map(as_lists, value)) if isinstance(value, list) else value


def read_array(path: Path, typecode: str) -> list[int]:
    values = array.array(typecode)
    values.frombytes(path.read_bytes())
    return values.tolist()


def only_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_an_encoded_conversation_is_plain_arrays(tmp_path, bytes_only):
    """Worked example: the files of one conversation, read without MiniLLM. What follows the last reply is left out."""
    record = {"messages": turns("hi", "yo", "bye"), "answer": ["a", 2], "category": "c"}
    load(m.ConversationDataLoader, tmp_path, bytes_only, [record])
    folder = only_folder(tmp_path / "cache")
    assert re.fullmatch(r"[0-9a-f]{24}-[0-9a-f]{24}", folder.name) and folder.name.endswith("-" + m.code_hash())
    assert m.code_hash() == hashlib.sha256(Path(m.__file__).read_bytes()).hexdigest()[:24]
    names = ("ids", "trained", "lengths", "notes", "note_lengths")
    files = {f"{part}.{name}" for part in ("train", "val") for name in names}
    assert {f.name for f in folder.iterdir()} == files | {"report", "files", "sizes"}
    ids = [3, *byte_ids("user\nhi"), 4, *byte_ids("\n"), 3, *byte_ids("assistant\nyo"), 4]
    assert read_array(folder / "train.ids", "H") == ids
    assert read_array(folder / "train.trained", "b") == [0] * (len(ids) - 3) + [1, 1, 1]
    assert read_array(folder / "train.lengths", "i") == [len(ids)] == [24]
    note = (folder / "train.notes").read_bytes()
    assert json.loads(note) == {"messages": turns("hi"), "answer": "a\n2", "category": "c"}
    assert read_array(folder / "train.note_lengths", "i") == [len(note)]
    assert all((folder / f"val.{name}").stat().st_size == 0 for name in names)
    mapped = torch.from_file(str(folder / "train.ids"), size=24, dtype=torch.uint16)
    assert mapped.tolist() == ids


def test_an_encoded_pair_and_a_prompt_are_plain_arrays(tmp_path, bytes_only):
    """Worked example: a pair is two sequences, a prompt is one with nothing to train; records lie end to end."""
    pair = {"prompt": "q", "chosen": "yes", "rejected": "n"}
    loader = load(m.DPODataLoader, tmp_path / "a", bytes_only, [pair, pair | {"chosen": "好"}])
    folder = only_folder(tmp_path / "a/cache")
    asked = [3, *byte_ids("user\nq"), 4, *byte_ids("\n"), 3, *byte_ids("assistant\n")]
    sides = [[*asked, *byte_ids(reply), 4] for reply in ("yes", "n", "好", "n")]
    assert read_array(folder / "train.ids", "H") == list(itertools.chain(*sides))
    assert read_array(folder / "train.lengths", "i") == list(map(len, sides)) == [20 + 4, 20 + 2, 20 + 4, 20 + 2]
    assert read_array(folder / "train.trained", "b") == [i >= 20 for side in sides for i in range(len(side))]
    assert loader.sequence(1, 0)[0].tolist() == sides[2] and loader.note(1)["messages"] == turns("q")
    load(m.PromptDataLoader, tmp_path / "b", bytes_only, [{"prompt": "q"}, {"prompt": "r"}])
    folder = only_folder(tmp_path / "b/cache")
    assert read_array(folder / "train.ids", "H")[:20] == asked and read_array(folder / "train.lengths", "i") == [20, 20]
    assert not any(read_array(folder / "train.trained", "b"))


def test_blocks_of_pretraining_by_hand(tmp_path, bytes_only):
    """Worked example: <bos>abcd<eos><bos>e<eos> in blocks of 3 targets; neighbours share a token."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcd"}, {"text": "e"}])
    options = {"batch_size": 2, "seq_len": 3, "split": "all", "shuffle": False, "cache_dir": tmp_path / "cache"}
    loader = m.PretrainDataLoader(path, bytes_only, **options)
    a, b, c, d, e = byte_ids("abcde")
    assert loader.tokens.tolist() == read_array(only_folder(tmp_path / "cache") / "train.ids", "H")
    assert loader.tokens.tolist() == [1, a, b, c, d, 2, 1, e, 2]
    rows = [batch["input_ids"].tolist() for batch in loader]
    assert rows == [[[1, a, b, c], [c, d, 2, 1]], [[1, e, 2]]] and len(loader) == 2
    assert loader.epoch == 1 and loader.index == 0


def test_a_packed_row_by_hand(tmp_path, bytes_only):
    """Worked example: two conversations of 22 and 23 tokens lie in one row of 50; the third begins the next row."""
    records = [{"messages": turns("a", "b")}, {"messages": turns("a", "cd")}, {"messages": turns("", "b")}]
    loader = load(m.ConversationDataLoader, tmp_path, bytes_only, records, seq_len=50)
    assert loader.lengths == [22, 23, 21]
    (batch,) = loader
    assert batch["input_ids"].shape == (2, 45)
    assert batch["segments"].tolist() == [[1] * 22 + [2] * 23, [1] * 21 + [0] * 24]
    assert batch["position_ids"].tolist() == [[*range(22), *range(23)], [*range(21)] + [0] * 24]
    b, c, d = byte_ids("bcd")
    first, second = [-100] * 20 + [b, 4] + [-100] * 20 + [c, d, 4], [-100] * 19 + [b, 4] + [-100] * 24
    assert batch["labels"].tolist() == [first, second]
    assert batch["input_ids"][0].tolist() == [*loader.sequence(0)[0], *loader.sequence(1)[0]]


def test_prompts_and_pairs_are_padded_by_hand(tmp_path, bytes_only):
    """Worked example: what a reply follows on the left; pairs on the right."""
    batch = m.pad_left([[7, 8, 9], [5]], pad_id=0)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    pair = {"prompt": "q", "chosen": "yes", "rejected": "n", "category": "b"}
    loader = load(m.DPODataLoader, tmp_path, bytes_only, [pair, pair | {"category": "a"}])
    batch = next(iter(loader))
    assert batch.pop("category") == ["b", "a"]
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 2, 24), "labels": (2, 2, 24), "attention_mask": (2, 2, 24)
    }  # fmt: skip
    assert batch["labels"][0].tolist() == [
        [-100] * 20 + [*byte_ids("yes"), 4],
        [-100] * 20 + [*byte_ids("n"), 4, -100, -100],
    ]
    assert batch["input_ids"][0, 1, 20:].tolist() == [*byte_ids("n"), 4, 0, 0]
    assert batch["attention_mask"][0].tolist() == [[1] * 24, [1] * 22 + [0, 0]]


# -- files and text ----------------------------------------------------------------------------------------------------


def stream(tokens: torch.Tensor, tokenizer: m.BPETokenizer) -> str:
    return tokenizer.decode(tokens.long(), skip_special_tokens=False)


def encode_corpus(*args) -> torch.Tensor:
    """Ids of texts, each between BOS and EOS."""
    return m.encode_data("text", *args)[0]["ids"]


def encode(paths, tokenizer, split, cache) -> str:
    return stream(encode_corpus(paths, tokenizer, split, cache), tokenizer)


def test_every_container_gives_the_same_documents(tmp_path, tokenizer):
    records = [{"text": "一、二、三"}, {"text": "a\nb"}]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n\r\n"
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + lines.encode())
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (tmp_path / "e.json").write_text(json.dumps(records, indent=2))
    expected = "<|bos|>一、二、三<|eos|><|bos|>a\nb<|eos|>"
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.json"):
        assert encode(tmp_path / name, tokenizer, "all", tmp_path / "cache") == expected, name
    assert encode(tmp_path, tokenizer, "all", tmp_path / "cache2") == expected * 5
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + "第一行\r\n第二行\r\n".encode())
    assert encode(tmp_path / "t.txt", tokenizer, "all", tmp_path / "cache") == "<|bos|>第一行\n第二行\n<|eos|>"


def test_a_text_gives_its_last_tenth_of_characters(tmp_path, tokenizer):
    text = "".join(f"{i}：你好 hello\n" for i in range(101))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        assert encode(tmp_path / "t.txt", tokenizer, split, tmp_path / "c") == f"<|bos|>{part}<|eos|>"


@pytest.mark.parametrize("chunk", [7, 50, 333])
def test_cutting_a_text_into_pieces_changes_no_id(tmp_path, tokenizer, chunk):
    text = "你好，世界！  def f( x ):\n\n    return 'x'\t \n 中文，没有空格。" * 20 + "\u3000　多  空 格\n" * 20
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    pieces = list(m.read_text(tmp_path / "t.txt", chunk))
    assert "".join(pieces) == text and len(pieces) > 3
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_splits_are_disjoint_complete_and_independent_of_order(tmp_path, corpus, tokenizer):
    train_text = encode(corpus, tokenizer, "train", tmp_path / "c")
    val_text = encode(corpus, tokenizer, "val", tmp_path / "c")
    docs = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    for doc in docs:
        assert (f"<|bos|>{doc}<|eos|>" in train_text) != (f"<|bos|>{doc}<|eos|>" in val_text)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(reversed(lines)), encoding="utf-8")
    assert sorted(encode(corpus, tokenizer, "val", tmp_path / "c").split("<|eos|>")) == sorted(
        val_text.split("<|eos|>")
    )


def big_text(path: Path) -> Path:
    """A text large enough for child processes."""
    path.write_text("".join(f"{i} 只小猫 and {i} dogs\n" for i in range(190_000)), encoding="utf-8")
    return path


def test_warnings_are_shown_while_processes_work(monkeypatch):
    forks = let_fork(monkeypatch)
    texts = m.parallel_map(str, range(8))
    with pytest.warns(UserWarning, match="a remark"):
        assert next(texts) == "0"
        warnings.warn("a remark", stacklevel=1)
    assert list(texts) == list("1234567") and forks


def test_parallel_encoding_equals_serial(tmp_path, tokenizer, monkeypatch):
    path, forks = big_text(tmp_path / "big.txt"), let_fork(monkeypatch)
    parallel = encode_corpus(path, tokenizer, "train", tmp_path / "a")
    assert forks
    monkeypatch.delattr(os, "fork")
    assert torch.equal(parallel.long(), encode_corpus(path, tokenizer, "train", tmp_path / "b").long())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2:9: not JSON"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: .*string"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a.jsonl:1: unknown form of record \(txt\)"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1\[0\]: unknown form of record \(int\)"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', "a.jsonl:1: an escape"),
        ("a.json", b'[{"text": "a"},\n {"text": 3}]', r"a.json:1\[1\]: .*string"),
        ("a.json", b'[\n{"text": "a"},\n{"text" 3}]', "a.json:3:9: not JSON"),
        ("a.txt", b"abc\xff", "a.txt:1: not UTF-8"),
        ("a.txt", b"abc\nd\n\xffe\n", "a.txt:3: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.txt", "你".encode()[:2], "a.txt:1: not UTF-8 .*unexpected end"),
        ("a.txt", b"", "a.txt: (?!.*tenth).*holds no records"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: (?!.*tenth).*empty"),
        ("a.csv", b"a", "no data file: data are .txt"),
        ("a.jsonl", b"", "a.jsonl: nothing for this stage, which takes text.*: it holds no records"),
        ("a.json", b"[" * 100_000, "a.json:1:1: not JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl:1:1: not JSON"),
        (
            "a.jsonl",
            b'{"messages": []}\n',
            "a.jsonl: nothing for this stage, which takes text.*: it holds chat records",
        ),
        ("a.txt.gz", b"no gzip", "damaged .gz"),
        ("a.txt.gz", gzip.compress(b"abc" * 100, mtime=0)[:-9], "damaged .gz"),
    ],
)
def test_bad_data_is_named_with_its_place(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(m.UserError, match=message):
        encode_corpus(tmp_path / name, tokenizer, "all", tmp_path / "c")
    assert not list(tmp_path.glob("c/*"))


def test_bad_records_can_be_skipped_and_are_counted(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\nnot json\n{"text": 1}\n')
    with pytest.warns(UserWarning, match="2 × malformed, the first at .*a.jsonl:2"):
        tokens = encode_corpus(tmp_path / "a.jsonl", tokenizer, "all", tmp_path / "c", "skip")
    assert stream(tokens, tokenizer) == "<|bos|>ok<|eos|>"


def test_what_was_left_out_is_said_again_by_a_start_from_the_cache(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(PLAIN) + "\nnot json\n" + json.dumps(PLAIN) + "\n[[]]\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out or changed: 2 × malformed, the first at .*a.jsonl:2:"):
            options = {"cache_dir": tmp_path / "c", "on_bad_record": "skip"}
            m.ConversationDataLoader(tmp_path / "a.jsonl", tokenizer, 1, 99, "all", **options)
    reader = m.Reader(tmp_path / "a.jsonl", "skip")
    assert reader.report() == "" and len(list(reader.items("chat", "all"))) == 2 and reader.counts == {"malformed": 2}


def test_what_was_left_out_is_read_as_utf_8_in_every_locale(tmp_path, tokenizer, monkeypatch):
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="ascii", **options: read(path, encoding, **options))
    (tmp_path / "数据.jsonl").write_text(json.dumps(PLAIN) + "\nnot json\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 × malformed, the first at .*数据.jsonl:2:"):
            options = {"cache_dir": tmp_path / "c", "on_bad_record": "skip"}
            m.ConversationDataLoader(tmp_path / "数据.jsonl", tokenizer, 1, 99, "all", **options)


def test_a_folder_as_people_have_it(tmp_path, tokenizer):
    """Hidden copies are not read, links are followed but not round, and each file counts once; the rest is named."""
    data = tmp_path / "data"
    write_jsonl(data / "sub/A.JSONL", [{"text": "one"}, {"text": ""}])
    (data / "B.TXT").write_text("two")
    (data / "C.Json.GZ").write_bytes(gzip.compress(b'[{"text": "three"}]'))
    for name in (".hidden.txt", "._x.jsonl", ".ipynb_checkpoints/B-copy.txt", ".git/deep/x.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"\xff copy")
    for name in ("table.csv", "README.md"):
        (data / name).write_text("no data")
    for name in ("empty.json", "empty.txt", "blank.jsonl"):
        (data / name).write_text("")
    (data / "dataset_info.json").write_text(json.dumps({"splits": {"train": 3}, "features": {}}, indent=2))
    write_jsonl(tmp_path / "elsewhere/d.jsonl", [{"text": "four"}])
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "sub/round").symlink_to(data)
    (data / "twice.jsonl").symlink_to(data / "sub/A.JSONL")
    (data / "gone.txt").symlink_to(data / "nowhere")
    with pytest.warns(UserWarning) as said:
        found = encode(data, tokenizer, "all", tmp_path / "c")
    assert sorted(found.removesuffix("<|eos|>").split("<|eos|>")) == [
        "<|bos|>four", "<|bos|>one", "<|bos|>three", "<|bos|>two"
    ]  # fmt: skip
    first, second = sorted({str(warning.message) for warning in said})
    assert "passed over 3 files that are not .txt, .json" in first and first.endswith("README.md")
    assert "4 × file without records, the first at" in second and "1 × empty text, the first at" in second
    with pytest.warns(UserWarning, match="4 × file without records"):
        assert len(encode_corpus(data, tokenizer, "all", tmp_path / "c", "skip"))
    (data / "dataset_info.json").write_text('{"splits": 3}\n{"text": "a"}\n')  # data after all: one is odd
    with pytest.raises(m.UserError, match="dataset_info.json:1: unknown form"):
        encode(data, tokenizer, "all", tmp_path / "c")
    with pytest.raises(m.UserError, match="empty.json: nothing for this stage.*it holds no records"):
        encode([data / "empty.json", data / "B.TXT"], tokenizer, "all", tmp_path / "c")


def test_a_file_counts_once_however_often_it_is_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "data/a.jsonl", [{"text": "one"}])
    (tmp_path / "b.jsonl").symlink_to(path)
    for paths in ([path, path], [path.parent, path], [path, path.parent], [path, tmp_path / "b.jsonl"]):
        with pytest.warns(UserWarning, match=r"1 files are named already, and count once: .*\.jsonl"):
            assert encode(paths, tokenizer, "all", tmp_path / "cache") == "<|bos|>one<|eos|>"


def test_records_and_files_for_other_stages_are_counted(tmp_path, tokenizer):
    """On a start from the cache as well. A folder of whole files a stage is usual, and no warning."""
    data = tmp_path / "data"
    write_jsonl(data / "a.jsonl", [{"text": "one"}, {"text": "two"}, CHATS[0], pairs()[0]])
    write_jsonl(data / "b.jsonl", CHATS)
    for _ in range(2):
        with pytest.warns(UserWarning) as said:
            loader = m.PretrainDataLoader(data, tokenizer, 1, 2, "all", cache_dir=tmp_path / "cache")
        (text,) = (str(warning.message) for warning in said)
        for kind in ("chat", "preference"):
            assert f"1 × {kind} record, which other stages take, the first at {data}/a.jsonl" in text
        assert loader.files == "1 of 2 files"
    with warnings.catch_warnings(action="error"):
        loader = m.ConversationDataLoader(data / "b.jsonl", tokenizer, 1, 500, "all", cache_dir=tmp_path / "cache")
    assert loader.files == ""


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(CHATS),
        json.dumps(CHATS, indent=2),
        "[" + ",\n".join(map(json.dumps, CHATS)) + "]\n",
        "\n".join(json.dumps(chat, indent=1) for chat in CHATS),
        "\n\n".join(map(json.dumps, CHATS)),
        " ".join(map(json.dumps, CHATS)),
        "\n".join(json.dumps([chat]) for chat in CHATS),
    ],
)
def test_json_however_it_is_laid_out(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [record for _, record, _ in m.Reader(tmp_path / name).records(tmp_path / name)] == CHATS


def test_a_first_line_that_is_cut_short_ends_in_a_jsonl_and_goes_on_in_a_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a",\n{"text": "b"}\n')
    (tmp_path / "a.json").write_text('{"text": "a",\n "id": 1}\n')
    for name, read, malformed in (("a.jsonl", {"text": "b"}, 1), ("a.json", {"text": "a", "id": 1}, 0)):
        reader = m.Reader(tmp_path / name, "skip")
        assert [record for _, record, _ in reader.records(tmp_path / name)] == [read]
        assert reader.counts["malformed"] == malformed


def test_a_file_that_is_one_value_is_lost_from_its_error_on_and_the_report_says_so(tmp_path):
    texts = [json.dumps({"text": str(i)}) for i in range(9)]
    for name, content, read, lost in (
        ("list.json", "[\n" + ",\n".join(texts).replace('"4"', "oops") + "\n]", 0, "list.json:6:10"),
        ("over lines.json", "{\n" + "\n".join(texts).replace('"4"', "oops")[1:], 4, "over lines.json:6:10"),
    ):
        (tmp_path / name).write_text(content)
        reader = m.Reader(tmp_path / name, "skip")
        assert len(list(reader.records(tmp_path / name))) == read
        assert (
            f"1 × malformed file, of which the rest is lost, the first at {tmp_path}/{lost}: not JSON"
            in reader.report()
        )


def test_json_errors_name_the_line_in_every_layout(tmp_path, tokenizer):
    objects = [json.dumps({"text": str(i)}, indent=1) for i in range(3)]
    for name, where in (("a.json", "a.json:5:10"), ("a.jsonl", "a.jsonl:5:10")):
        (tmp_path / name).write_text("\n".join(objects).replace('"1"', "oops"))
        with pytest.raises(m.UserError, match=f"{where}: not JSON"):
            encode(tmp_path / name, tokenizer, "all", tmp_path / "c")
        (tmp_path / name).write_text("\n".join(objects).replace('"1"', "1"))
        with pytest.raises(m.UserError, match=f'{name}:4: "text" must be a string'):
            encode(tmp_path / name, tokenizer, "all", tmp_path / "c")


def test_parquet_holds_the_same_records(tmp_path, tokenizer, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = importlib.import_module("pyarrow").Table.from_pylist
    records = [chat | {"prompt": None, "text": None} for chat in CHATS]
    parquet.write_table(table([*records, {"text": "a"}, {"text": "b"}]), tmp_path / "a.PARQUET", row_group_size=2)
    write_jsonl(tmp_path / "a.jsonl", [*CHATS, {"text": "a"}, {"text": "b"}])
    options = {"seq_len": 500, "split": "all", "shuffle": False, "cache_dir": tmp_path / "cache"}
    found = [m.ConversationDataLoader(tmp_path / name, tokenizer, **options) for name in ("a.PARQUET", "a.jsonl")]
    assert contents(found[0]) == contents(found[1]) and len(found[0].items) == 5
    assert encode(tmp_path / "a.PARQUET", tokenizer, "all", tmp_path / "c") == "<|bos|>a<|eos|><|bos|>b<|eos|>"
    parquet.write_table(table([{"text": "a", "n": 1}, {"text": None, "n": 2}]), tmp_path / "b.parquet")
    with pytest.raises(m.UserError, match=r"b.parquet:2: unknown form of record \(n\)"):
        encode(tmp_path / "b.parquet", tokenizer, "all", tmp_path / "c")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.PARQUET").read_bytes()[:-9])
    with pytest.raises(m.UserError, match="b.parquet: damaged .parquet file"):
        encode(tmp_path / "b.parquet", tokenizer, "all", tmp_path / "c")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(m.UserError, match=r"this needs pyarrow: pip install -e '\.\[data\]'"):
        encode(tmp_path / "b.parquet", tokenizer, "all", tmp_path / "c")


def test_a_parquet_file_is_read_in_flat_memory(tmp_path):
    """One group of 24 MB: a thousand rows and a megabyte of the file are held."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": [f"{i:06}" * 1000 for i in range(4000)]})
    path = tmp_path / "a.parquet"
    importlib.import_module("pyarrow.parquet").write_table(table, path, compression="NONE", use_dictionary=False)
    del table
    before, held, last = arrow.total_allocated_bytes(), [], ""
    for i, (_, record, _) in enumerate(m.Reader(path).records(path)):
        last = record["text"]
        if i % 500 == 0:
            held.append(arrow.total_allocated_bytes() - before)
    assert last == "003999" * 1000 and max(held) < 16e6


def test_unknown_keys_of_texts_are_counted(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "title": "c"}, {"text": "d", "title": "e"}])
    with pytest.warns(UserWarning, match="2 × unknown key 'title', the first at .*a.jsonl:2"):
        assert encode(tmp_path / "a.jsonl", tokenizer, "all", tmp_path / "c").count("<|bos|>") == 3


def test_ids_above_65535_take_four_bytes(tmp_path):
    tokenizer = m.BPETokenizer()
    tokenizer.token_bytes += [b"x"] * 70_000
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "好"}])
    tokenizer.eos_id = 70_100
    tokens = encode_corpus(path, tokenizer, "all", tmp_path / "cache")
    assert tokens.dtype == torch.uint32 and tokens.tolist() == [1, *byte_ids("好"), 70_100]
    assert read_array(only_folder(tmp_path / "cache") / "train.ids", "I") == tokens.tolist()


def test_sequential_blocks_predict_every_token_once(tmp_path, corpus, tokenizer):
    loader = m.PretrainDataLoader(corpus, tokenizer, batch_size=3, seq_len=16, split="val", cache_dir=tmp_path)
    targets = torch.cat([batch["labels"][:, 1:].flatten() for batch in loader])
    assert torch.equal(targets, loader.tokens[1:].long())
    assert (targets == tokenizer.eos_id).sum() == encode(corpus, tokenizer, "val", tmp_path).count("<|eos|>") > 0
    assert torch.equal(targets, torch.cat([batch["labels"][:, 1:].flatten() for batch in loader]))  # and again


def batches(loader: m.PretrainDataLoader, n: int) -> list[torch.Tensor]:
    """The next n batches, over the ends of epochs."""
    return [b["input_ids"] for b in itertools.islice((b for _ in itertools.count() for b in loader), n)]


def test_the_cursor_is_exact(tmp_path, corpus, tokenizer):
    def loader():
        return m.PretrainDataLoader(corpus, tokenizer, batch_size=4, seq_len=16, seed=3, cache_dir=tmp_path)

    epoch = len(loader())
    whole = batches(loader(), 2 * epoch + 9)
    in_order = m.PretrainDataLoader(corpus, tokenizer, batch_size=4, seq_len=16, shuffle=False, cache_dir=tmp_path)
    rows = Counter(tuple(row) for b in whole[:epoch] for row in b.tolist())
    all_rows = Counter(tuple(row) for b in in_order for row in b["input_ids"].tolist())
    assert rows <= all_rows and rows.total() == 4 * epoch and not torch.equal(whole[0], whole[epoch])
    for stop in (1, 7, epoch - 1, epoch, epoch + 1, 2 * epoch + 2):
        first = loader()
        batches(first, stop)
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(map(torch.equal, batches(second, 2 * epoch + 9 - stop), whole[stop:]))
    other = m.PretrainDataLoader(corpus, tokenizer, batch_size=4, seq_len=16, split="all", cache_dir=tmp_path)
    with pytest.raises(m.UserError, match="corpus=.* in the checkpoint: give the same --data, --val-data, tok"):
        other.load_state_dict(loader().state_dict())


def test_language_modeling_dataset(tokenizer):
    dataset = m.LanguageModelingDataset(["你好", "a b c d e f g h"], tokenizer, max_length=6)
    predicted = Counter(itertools.chain.from_iterable(item["labels"][1:].tolist() for item in dataset))
    expected = Counter(i for text in ("你好", "a b c d e f g h") for i in [*tokenizer.encode(text), tokenizer.eos_id])
    del predicted[-100]
    assert predicted == expected
    for item in dataset:
        assert torch.equal(item["labels"] == -100, item["attention_mask"] == 0)
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch["input_ids"].shape == (2, 6)


# -- what a tokenizer learns from --------------------------------------------------------------------------------------


def alternating(path: Path, n: int = 2000) -> list[list[str]]:
    """Write conversations in turn Chinese and English; return the contents of each."""
    said = [(f"第{i}题", f"答案{i}") if i % 2 else (f"task {i}", f"answer {i}") for i in range(n)]
    write_jsonl(path, [{"messages": turns(*texts)} for texts in said])
    return [list(texts) for texts in said]


def test_a_tokenizer_learns_from_a_sample_of_whole_records(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    said = alternating(path)
    assert list(m.sample_texts([path], "all", "stop")) == list(itertools.chain(*said))  # small data: all of it
    monkeypatch.setattr(m, "TOKENIZER_BYTES", path.stat().st_size // 4)
    sample = list(m.sample_texts([path], "all", "stop"))
    pairs = list(map(list, zip(sample[::2], sample[1::2], strict=True)))
    assert all(pair in said for pair in pairs) and len(set(sample)) == len(sample)
    chinese = sum(pair[0].startswith("第") for pair in pairs)
    assert 170 < chinese < 330 and 170 < len(pairs) - chinese < 330  # a fourth of 1000 each
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines)), encoding="utf-8")
    assert set(m.sample_texts([path], "all", "stop")) == set(sample)  # chosen by content, not by place


def test_far_fewer_merges_than_asked_for_are_said():
    with pytest.warns(UserWarning, match="only 2 of 739 merges were learned.*too small or too uniform"):
        m.BPETokenizer(1000).train(["abc"] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.BPETokenizer(264).train(["abc"] * 9)  # two of three


def test_a_tokenizer_learns_from_every_part_of_a_large_text_in_turn(tmp_path, monkeypatch):
    text = "".join(f"{i} word\n" for i in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    parts = list(m.read_text(tmp_path / "a.txt"))
    assert len(parts) > 2 and list(m.sample_texts([tmp_path / "a.txt"], "all", "stop")) == parts
    monkeypatch.setattr(m, "TOKENIZER_BYTES", len(text) // 2)
    assert list(m.sample_texts([tmp_path / "a.txt"], "all", "stop")) == parts[::2]
    monkeypatch.undo()
    assert "".join(m.sample_texts([tmp_path / "a.txt"], "train", "stop")) == text[: int(0.9 * len(text))]


def test_a_tokenizer_never_learns_from_validation_text(tmp_path):
    docs = [f"document {i}" for i in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": doc} for doc in docs])
    learned = list(m.sample_texts([path], "train", "stop"))
    assert learned == [doc for doc in docs if m.hash_share(doc) >= 0.1] and 240 < len(learned) < 300
    assert list(m.sample_texts([path], "all", "stop")) == docs


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]},
        {"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]},
        {"prompt": "A", "chosen": "B", "rejected": "C"},
        {
            "prompt": [{"role": "user", "content": "A"}],
            "chosen": [{"role": "assistant", "content": "B"}],
            "rejected": "C",
        },
        {"instruction": "A", "input": "", "output": "B", "history": []},
        {"prompt": "A", "completion": "B", "category": "DDDD"},
        {"prompt": "A", "answer": ["BBBB", 3]},
    ],
)
def test_a_tokenizer_learns_no_names_of_roles_or_keys(tmp_path, record):
    path = write_jsonl(tmp_path / "a.jsonl", [record] * 50)
    assert Counter(m.sample_texts(path, "all", "stop")).keys() <= {"A", "B", "C"}
    tokenizer = m.TokenizerManager(tmp_path / "cache").get_or_train_tokenizer(path, vocab_size=300)
    assert tokenizer.merges == []


# -- the cache ---------------------------------------------------------------------------------------------------------


def contents(loader) -> list:
    return [[as_lists(list(loader.sequence(i))), loader.note(i)] for i in loader.items]


def test_data_are_encoded_once(tmp_path, tokenizer, monkeypatch):
    first = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS)
    folder = only_folder(tmp_path / "cache")
    monkeypatch.setattr(m.BPETokenizer, "encode_chat", lambda *_: pytest.fail("encoded again"))
    again = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=400, name="of another name.jsonl")
    assert only_folder(tmp_path / "cache") == folder and again.corpus == first.corpus
    assert contents(again) == contents(first)


def test_a_changed_minillm_encodes_anew(tmp_path, tokenizer, corpus, monkeypatch):
    """As does other content, another tokenizer, and another rule of reading."""

    def folders():
        load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS)
        encode_corpus(corpus, tokenizer, "train", tmp_path / "cache")
        return {folder.name for folder in (tmp_path / "cache").iterdir()}

    before = folders()
    assert len(before) == 2 and folders() == before
    monkeypatch.setattr(m, "code_hash", lambda: "changed")
    after = folders()
    assert after - before == {name.partition("-")[0] + "-changed" for name in before}
    monkeypatch.undo()
    for part in ("val", "all"):
        encode_corpus(corpus, tokenizer, part, tmp_path / "cache")
    assert len(folders()) == 5  # train and val of a split are encoded together
    encode_corpus(corpus, tokenizer, "all", tmp_path / "cache", "skip")
    encode_corpus(corpus, m.BPETokenizer(), "all", tmp_path / "cache")
    assert len(folders()) == 7


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_cache_folder_is_complete_or_absent(tmp_path, error):
    items = [bytes([i]) * 300_000 for i in range(3)]  # a list of two and one of one

    def fails_late(batch):
        if batch[0][0] == 2:
            raise error
        return {"a": b"".join(batch), "b": b"x"}

    def encode(batch):
        return {"a": b"".join(batch), "b": b"x"}

    with pytest.raises(error):
        m.encode_once(tmp_path / "deep/folder", map(fails_late, m.batched(items, len)))
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "deep/.folder.0123.tmp").mkdir()  # of a process that was killed
    (tmp_path / "deep/.tokenizer.json.4567.tmp").touch()
    m.encode_once(tmp_path / "deep/folder", map(encode, m.batched(items, len)))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    contents = {f.name: f.read_bytes() for f in (tmp_path / "deep/folder").iterdir()}
    assert json.loads(contents.pop("sizes")) == {"a": sum(map(len, items)), "b": 2}
    assert contents == {"a": b"".join(items), "b": b"xx"}
    m.encode_once(tmp_path / "deep/folder", map(fails_late, m.batched(items, len)))  # is there: nothing is encoded


def test_a_cache_folder_that_cannot_be_moved_into_place_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        m.encode_once(tmp_path / "folder", [{"a": b"x"}])
    assert not list(tmp_path.iterdir())


def test_two_encoders_at_once_do_not_damage_the_cache(tmp_path, tokenizer):
    """One does the work; the other waits for it, and both read it."""
    times = []

    def encode(batch):
        times.append(len(batch))
        time.sleep(0.1)
        return {"a": b"".join(batch)}

    lists = [[b"x" * 600_000], [b"y"]]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: m.encode_once(tmp_path / "folder", map(encode, lists)), range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and times == [1, 1]
    assert (tmp_path / "folder/a").read_bytes() == b"x" * 600_000 + b"y"
    (tmp_path / "folder").rename(tmp_path / "aside")
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    with ThreadPoolExecutor(4) as pool:
        options = {"split": "all", "seq_len": 500, "shuffle": False, "cache_dir": tmp_path / "cache"}
        loaders = list(pool.map(lambda _: m.ConversationDataLoader(path, tokenizer, **options), range(8)))
    assert only_folder(tmp_path / "cache").is_dir()
    assert all(contents(loader) == contents(loaders[0]) and len(loader.items) == 5 for loader in loaders)


def test_an_encoder_that_dies_is_an_error_not_a_hang(tmp_path, tokenizer, monkeypatch):
    path, forks, me = big_text(tmp_path / "big.txt"), let_fork(monkeypatch), os.getpid()
    monkeypatch.setattr(
        m.BPETokenizer, "encode", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != me else []
    )
    with pytest.raises(m.UserError, match="encodes the data was killed"):
        encode_corpus(path, tokenizer, "train", tmp_path / "cache")
    assert forks and not list((tmp_path / "cache").iterdir())


def test_an_encoder_that_dies_while_more_is_written_to_it_is_an_error_not_a_hang():
    """The pipe to the children holds 64 kB, and a write to it waits. Before Python 3.11.5 it waited for ever."""
    code = """if True:
        import os, signal, time
        import minillm as m
        os.sched_getaffinity = lambda _: {0, 1}

        def die(_):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            list(m.parallel_map(die, ("x" * 1_000_000 for _ in range(40))))
        except m.UserError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("a process that encodes the data was killed")


def test_without_locks_the_first_result_stays(tmp_path, monkeypatch):
    """As on Windows: both do the work."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    both = threading.Barrier(2, timeout=20)

    def encode(batch):
        both.wait()
        return {"a": b"".join(batch)}

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: m.encode_once(tmp_path / "folder", map(encode, [[b"x", b"y"]])), range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (tmp_path / "folder/a").read_bytes() == b"xy"


ENCODE = """
import pathlib, sys, minillm as m
path, cache = map(pathlib.Path, sys.argv[1:])
tokens = m.encode_data("text", path, m.BPETokenizer(), "all", cache)[0]["ids"]
print(len(tokens), int(tokens.long().sum()), flush=True)  # a pool may end its process before it does
"""


def encoder(path: Path, cache: Path, *before: str) -> subprocess.Popen:
    """A process that encodes a file, and prints the number of tokens and their sum."""
    command = [*before, sys.executable, "-c", ENCODE, str(path), str(cache)]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)


def test_two_processes_encode_into_one_cache(tmp_path):
    """Both have process id 1, as in containers, where the system allows it."""
    before = ["unshare", "-Urpf"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], stderr=subprocess.DEVNULL).returncode:
        before = []
    texts = [f"{i} words " * 70_000 for i in range(5)]  # for each of them a task of its own
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    expected = sum(len(text) + 2 for text in texts), sum(sum(text.encode()) + 5 * len(text) + 1 + 2 for text in texts)
    both = [encoder(path, tmp_path / "cache", *before) for _ in range(2)]
    assert [tuple(map(int, process.communicate(timeout=60)[0].split())) for process in both] == [expected] * 2
    assert only_folder(tmp_path / "cache").is_dir()


def processes() -> dict[int, int]:
    """All running processes and their parents, as Linux lists them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_encoders_end_with_their_parent(tmp_path, number):
    """And what they left is removed by the next start."""
    path = big_text(tmp_path / "big.txt")
    path.write_bytes(path.read_bytes() * 10)
    parent = encoder(path, tmp_path / "cache")
    wait_for(lambda: any((tmp_path / "cache").glob(".*.tmp/train.ids")))
    young = {pid for pid, above in processes().items() if above == parent.pid}
    parent.send_signal(number)
    parent.wait()
    assert young
    wait_for(lambda: not young & processes().keys(), 5)
    assert any((tmp_path / "cache").glob(".*.tmp"))
    path.write_bytes(b"other data")
    assert encoder(path, tmp_path / "cache").communicate(timeout=60)[0].split()[0] == "12"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_daemonic_process_encodes_by_itself(tmp_path):
    path = big_text(tmp_path / "big.txt")
    pool = "import multiprocessing\ndef encode():\n    " + ENCODE.strip().replace("\n", "\n    ")
    code = f"{pool}\nmultiprocessing.get_context('fork').Pool(1).apply(encode)"
    words = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    out = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert int(out.split()[0]) == len(path.read_bytes()) + 2


def test_a_damaged_tokenizer_is_trained_again(tmp_path, corpus):
    manager = m.TokenizerManager(tmp_path / "cache")
    first = manager.get_or_train_tokenizer(corpus, 300)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.warns(UserWarning, match="tokenizer-.*.json is damaged: training the tokenizer again"):
        assert manager.get_or_train_tokenizer(corpus, 300).to_json() == first.to_json()
    assert manager.get_or_train_tokenizer(corpus, 300).to_json() == first.to_json()


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(m, "LONGEST_RECORD", 1000)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        text = b'{"text": "short"}\n{"text": "' + b"x" * 5000 + b'"}\n'
        (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
        with pytest.raises(m.UserError, match=rf"{name}:2: a line of more than 1,000 characters"):
            encode_corpus(tmp_path / name, tokenizer, "all", tmp_path / "cache")


# -- conversations -----------------------------------------------------------------------------------------------------


def test_only_the_assistants_own_tokens_are_trained(tmp_path, tokenizer):
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, packing=False, batch_size=1)
    for batch, chat in zip(loader, [CHATS[i] for i in loader.order()], strict=True):
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert [*ids.tolist(), *tokenizer.encode("\n")] == tokenizer.apply_chat_template(chat["messages"])
        trained = (labels != -100).nonzero().flatten()
        assert torch.equal(labels[trained], ids[trained])
        said = [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
        shown = tokenizer.decode(ids[trained], skip_special_tokens=False)
        assert shown == "".join(text + "<|im_end|>" for text in said)
        # what comes just before a trained run is the assistant's header: not a token late, not a token early
        starts = [t for t in trained.tolist() if labels[t - 1] == -100]
        header = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        assert len(starts) == len(said) and all(ids[t - len(header) : t].tolist() == header for t in starts)


def test_what_follows_the_last_reply_is_dropped(tmp_path, tokenizer):
    """It teaches nothing; the question that stands open is no prompt either."""
    chats = [{"messages": turns("你好", "你好！", *more)} for more in ([], ["再见"], ["x" * 900])]
    chats.append({"messages": [*chats[0]["messages"], {"role": "tool", "content": "9"}]})
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, chats, seq_len=60)  # no warning: none is long
    assert len(loader.items) == 4 and all(found == contents(loader)[0] for found in contents(loader))
    assert loader.note(1)["messages"] == turns("你好")


def test_the_trained_positions_are_those_that_the_model_must_write(tmp_path, tokenizer):
    """SFT's loss is -log p(answer and its end | generation prompt), by the definition of each."""
    model = random_model(shape(max_position_embeddings=128))
    trainer = m.SFTTrainer(model, tokenizer)
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS[:1])
    batch = next(iter(loader))
    question = tokenizer.apply_chat_template(CHATS[0]["messages"][:1], add_generation_prompt=True)
    answer, total = [*tokenizer.encode("你好！"), tokenizer.im_end_id], 0.0
    with torch.no_grad():
        for token in answer:
            total -= model(torch.tensor([question]))[0, -1].log_softmax(-1)[token].item()
            question.append(token)
        assert trainer.loss(batch).item() == pytest.approx(total, abs=1e-4)
    assert trainer.count(batch) == len(answer)


@pytest.mark.parametrize(
    "config",
    [shape(max_position_embeddings=150), moe_shape(max_position_embeddings=150, router_aux_loss_coef=0.0)],
    ids=["dense", "moe"],
)
def test_packed_rows_equal_one_conversation_a_row(tmp_path, tokenizer, config):
    """In rows of 200 tokens, more than the positions that there are: each conversation begins at position 0."""
    found, loss = [], []
    for packing in (True, False):
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=200, packing=packing)
        batches = list(loader)
        assert batches[0]["segments"].max() == (4 if packing else 1)
        trainer = m.SFTTrainer(random_model(config, dtype=torch.float64), tokenizer)
        total = sum(map(trainer.loss, batches))
        (total / sum(map(trainer.count, batches))).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters()})
        loss.append(total.item())
        for batch in batches:
            if not packing:
                assert torch.equal((batch["segments"] > 0).sum(1), batch["position_ids"].max(1).values + 1)
            for row, segments in zip(batch["position_ids"], batch["segments"], strict=True):
                for k in range(1, int(segments.max()) + 1):
                    place = (segments == k).nonzero().flatten()
                    assert row[place].tolist() == list(range(len(place))) and place[-1] - place[0] == len(place) - 1
    assert loss[0] == pytest.approx(loss[1], rel=1e-6)
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=1e-5, msg=name)


def test_conversations_of_a_row_do_not_see_each_other(tmp_path, tokenizer):
    trainer = m.SFTTrainer(random_model(shape(max_position_embeddings=256)), tokenizer)
    found = []
    for other in ("第一。", "totally different words"):
        records = [{"messages": turns("x", other)}, CHATS[0], {"messages": turns(other, "z")}]
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=250)
        batch = next(iter(loader))
        assert batch["segments"].max() == 3
        batch["labels"] = batch["labels"].where(batch["segments"] == loader.order().index(1) + 1, -100)
        trainer.model.zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_long_conversations_lose_whole_turns(tmp_path, tokenizer):
    chat = turns("a" * 10, "b" * 10, "c" * 10, "d" * 10, "e", "f" * 20)
    whole = tokenizer.apply_chat_template(chat)[:-1]  # all but the newline after the last turn
    two, one = len(tokenizer.apply_chat_template(chat[:4])), len(tokenizer.apply_chat_template(chat[:2]))
    head = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True))
    records = [{"messages": chat}, {"messages": turns("q", "r")}]
    for seq_len, kept, cut in ((len(whole), len(whole), False), (len(whole) - 3, two - 1, False), (two, two - 1, False),
                               (two - 2, one - 1, False), (one - 1, one - 1, False), (one - 2, one - 2, True),
                               (head + 1, head + 1, True)):  # fmt: skip
        options = {"seq_len": seq_len, "packing": False, "batch_size": 1}
        if seq_len == len(whole):
            loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, **options)
        else:
            message = (
                f"of 2 conversations 1 exceed {seq_len} tokens: {1 - cut} lose turns at their end, {1 * cut} are t"
            )
            with pytest.warns(UserWarning, match=message):
                loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, **options)
        batch = list(loader)[loader.order().index(0)]
        assert batch["input_ids"][0].tolist() == whole[:kept]
        assert (batch["labels"][0, -1] == tokenizer.im_end_id) == (not cut)
        assert batch["labels"][0].max() >= 0
        assert loader.lengths[0] == kept and loader.truncated[0] == cut and not loader.truncated[1]
    with pytest.warns(
        UserWarning, match="1 are truncated .* 1 of which hold nothing .* left out: --seq-len takes longer"
    ):
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=head - 1)
    assert loader.items == [1] and loader.truncated[0]
    with pytest.raises(m.UserError, match="none of .* chat records fits 5 tokens"), pytest.warns(UserWarning):
        load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=5)
    for cls, record in (
        (m.DPODataLoader, {"prompt": "a", "chosen": "b" * 90, "rejected": "c"}),
        (m.PromptDataLoader, {"prompt": "a" * 90}),
    ):
        small = record | {"prompt": "b", **({"chosen": "b"} if "chosen" in record else {})}
        with pytest.warns(UserWarning, match="1 of 2 .* records exceed 60 tokens and are left out"):
            assert load(cls, tmp_path, tokenizer, [record, small], seq_len=60).items == [1]


# -- loaders of records ------------------------------------------------------------------------------------------------


def test_a_loader_by_its_defaults(tmp_path, tokenizer, corpus):
    loader = m.PretrainDataLoader(corpus, tokenizer, cache_dir=tmp_path / "cache")
    options = loader.batch_size, loader.seq_len, loader.source.split, loader.shuffle, loader.seed
    assert options == (16, 256, "train", True, 0)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (m.ConversationDataLoader, {"packing": True}),
        (m.ConversationDataLoader, {"packing": False}),
        (m.DPODataLoader, {}),
        (m.PromptDataLoader, {}),
    ],
)
def test_record_loaders_have_exact_cursors(tmp_path, tokenizer, cls, options):
    records = [record_for(cls, i) for i in range(40)]

    def loader(**changes):
        changes = {"shuffle": True, "seed": 3, "batch_size": 3, "seq_len": 120, **options, **changes}
        return load(cls, tmp_path, tokenizer, records, **changes)

    def take(loader, n):
        return as_lists(list(itertools.islice((batch for _ in itertools.count() for batch in loader), n)))

    epoch = len(list(loader()))
    whole = take(loader(), 2 * epoch + 3)
    assert whole[0] != take(loader(seed=4), 1)[0]
    count = len(list(loader(shuffle=False)))
    name = {m.PromptDataLoader: "answers"}.get(cls, "input_ids")
    assert whole[0][name] != whole[epoch][name] and abs(count - epoch) <= 2
    for stop in (1, epoch - 1, epoch, epoch + 2):
        first, second = loader(), loader()
        take(first, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 4) == take(first, 4)
        fresh = loader()
        take(fresh, stop)
        assert take(fresh, 2 * epoch + 3 - stop) == whole[stop:]
    with pytest.raises(m.UserError, match="seed=4"):
        loader(seed=4).load_state_dict(first.state_dict())
    with pytest.raises(m.UserError, match="corpus=.* in the checkpoint: give the same --data, --val-data, tok"):
        load(cls, tmp_path, tokenizer, records[:9], name="other.jsonl", **options).load_state_dict(first.state_dict())
    seen = Counter(itertools.chain.from_iterable(
        b["answers"] if cls is m.PromptDataLoader else [tuple(r.flatten().tolist()) for r in b["input_ids"]]
        for b in loader(batch_size=1)))  # fmt: skip
    assert max(seen.values()) == 1 and (options.get("packing") or len(seen) == 40)
    parts = [load(cls, tmp_path, tokenizer, records, split=split, **options) for split in ("train", "val")]
    texts = [{loader.tokenizer.decode(loader.prompt_ids(i)) for i in loader.items} for loader in parts]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 40
    assert parts[0].source == m.Source([str(tmp_path / "records.jsonl")], "train")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"messages": [], "text": "a"}, "chat"),
        ({"conversations": []}, "chat"),
        ({"instruction": "a", "output": "b"}, "chat"),
        ({"input": "a", "output": "b"}, "chat"),
        ({"prompt": "a", "completion": "b"}, "chat"),
        ({"prompt": "a", "response": "b"}, "chat"),
        ({"instruction": "a", "context": "b", "response": "c"}, "chat"),
        ({"question": "a", "answer": "b"}, "chat"),
        ({"question": "a", "response": "b"}, "chat"),
        ({"problem": "a", "solution": "b", "answer": 3}, "chat"),
        ({"query": "a", "response": "b"}, "chat"),
        ({"prompt": "a"}, "prompt"),
        ({"prompt": "a", "answer": "b"}, "prompt"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"messages": [], "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "chosen": "b"}, "prompt"),
        ({"instruction": "a"}, None),
        ({}, None),
        ([{"text": "a"}], None),
        ("text", None),
        (None, None),
    ],
)
def test_a_record_is_known_by_its_keys(record, kind):
    form = m.form_of(record)
    assert (form.kind if form else None) == kind


PLAIN = {"messages": turns("小猫吃什么？", "吃鱼。")}
WITH_SYSTEM = {"messages": turns("小猫吃什么？", "吃鱼。", system="你是助手。")}
LONG = {"messages": turns("你好", "你好！", "小猫吃什么？", "吃鱼。", system="你是助手。")}
TOOL = {
    "messages": [
        *turns("几点？", "查。"),
        {"role": "tool", "content": "9点"},
        {"role": "assistant", "content": "九点。"},
    ]
}


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        ({"conversations": PLAIN["messages"]}, PLAIN),
        ({"conversations": LONG["messages"]}, LONG),
        ({"conversations": [{"from": "human", "value": "小猫吃什么？"}, {"from": "gpt", "value": "吃鱼。"}]}, PLAIN),
        ({"conversations": [{"from": "human", "value": "小猫吃什么？"}, {"from": "gpt", "value": "吃鱼。"}],
          "system": "你是助手。"}, WITH_SYSTEM),
        ({"conversations": [{"from": "system", "value": "你是助手。"}, {"from": "human", "value": "小猫吃什么？"},
                            {"from": "gpt", "value": "吃鱼。"}]}, WITH_SYSTEM),
        ({"conversations": [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "查。"},
                            {"from": "observation", "value": "9点"}, {"from": "gpt", "value": "九点。"}]}, TOOL),
        ({"messages": PLAIN["messages"], "system": "你是助手。"}, WITH_SYSTEM),
        ({"question": "小猫吃什么？", "response": "吃鱼。", "system_prompt": "你是助手。"}, WITH_SYSTEM),
        ({"messages": [{"role": "developer", "content": "你是助手。"}, *PLAIN["messages"]]}, WITH_SYSTEM),
        ({"messages": PLAIN["messages"], "system": "a", "system_prompt": "b"},
         {"messages": [{"role": "system", "content": "a\n\nb"}, *PLAIN["messages"]]}),
        ({"instruction": "小猫吃什么？", "output": "吃鱼。"}, PLAIN),
        ({"instruction": "小猫吃什么？", "input": "", "output": "吃鱼。", "system": "", "history": []}, PLAIN),
        ({"instruction": "小猫吃什么？", "input": None, "output": "吃鱼。", "system": "你是助手。"}, WITH_SYSTEM),
        ({"instruction": "小猫吃什么？", "output": "吃鱼。", "system": "你是助手。", "history": [["你好", "你好！"]]},
         LONG),
        ({"instruction": "回答", "input": "小猫？", "output": "鱼"}, {"messages": turns("回答\n小猫？", "鱼")}),
        ({"prompt": "小猫吃什么？", "completion": "吃鱼。"}, PLAIN),
        ({"prompt": WITH_SYSTEM["messages"][:2], "completion": PLAIN["messages"][1:]}, WITH_SYSTEM),
        ({"prompt": "小猫吃什么？", "completion": "吃鱼。", "system": "你是助手。"}, WITH_SYSTEM),
        ({"input": "小猫吃什么？", "output": "吃鱼。"}, PLAIN),
        ({"prompt": "小猫吃什么？", "response": "吃鱼。"}, PLAIN),
        ({"query": "小猫吃什么？", "response": "吃鱼。", "context": ""}, PLAIN),
        ({"problem": "小猫吃什么？", "solution": "吃鱼。"}, PLAIN),
        ({"instruction": "回答", "context": "小猫？", "response": "鱼"}, {"messages": turns("回答\n小猫？", "鱼")}),
        ({"question": "回答", "input": "小猫？", "context": "猫", "response": "鱼"},
         {"messages": turns("回答\n小猫？\n猫", "鱼")}),
        ({"messages": PLAIN["messages"], "history": [["你好", "你好！"]], "system": "你是助手。"}, LONG),
        ({"messages": PLAIN["messages"], "text": ""}, PLAIN),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "小猫吃"}, {"text": "什么？"}]},
                       PLAIN["messages"][1] | {"weight": 1, "tool_calls": None, "images": []}]}, PLAIN),
    ],
)  # fmt: skip
def test_every_form_of_conversation(tmp_path, tokenizer, record, plain):
    forms = [
        load(m.ConversationDataLoader, tmp_path, tokenizer, [form | {"gt": "鱼"}], f"{k}.jsonl")
        for k, form in enumerate((record, plain))
    ]
    assert contents(forms[0]) == contents(forms[1]) and forms[0].note(0)["answer"] == "鱼"
    assert as_lists(list(forms[0])) == as_lists(list(forms[1]))
    assert forms[0].note(0)["messages"] == plain["messages"][:-1]
    if plain is TOOL:
        ids, trained = tokenizer.encode_chat(TOOL["messages"])
        assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == "查。九点。"
    # the same records as prompts: the conversation less its last answer
    asked = load(m.PromptDataLoader, tmp_path, tokenizer, [record | {"answer": 3}], "prompt.jsonl")
    assert asked.prompt_ids(0) == tokenizer.apply_chat_template(plain["messages"][:-1], add_generation_prompt=True)
    assert asked.sequence(0)[0].tolist() == asked.prompt_ids(0) == forms[0].prompt_ids(0)
    assert asked.note(0)["answer"] == "3" and not asked.sequence(0)[1].any()


ASK, GOOD, BAD = "小猫吃什么？", "吃鱼。", "吃石头。"
USER, CHOSEN, REJECTED = turns(ASK)[0], turns("", GOOD)[1], turns("", BAD)[1]
BEFORE = turns("你好", "你好！", ASK)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, [USER]),
        ({"prompt": ASK, "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}, [USER]),
        ({"prompt": [{"from": "human", "value": ASK}], "chosen": CHOSEN, "rejected": BAD}, [USER]),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, [USER]),
        ({"prompt": ASK, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
        ({"prompt": "", "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": None, "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": BEFORE, "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": BEFORE[:1], "chosen": [*BEFORE[1:], CHOSEN], "rejected": [*BEFORE[1:], REJECTED]}, BEFORE),
        ({"chosen": f"\n\nHuman: 你好\n\nAssistant: 你好！\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
          "rejected": f"\n\nHuman: 你好\n\nAssistant: 你好！\n\nHuman: {ASK}\n\nAssistant: {BAD}"}, BEFORE),
        ({"system": "你是助手。", "prompt": ASK, "chosen": GOOD, "rejected": BAD}, turns(ASK, system="你是助手。")),
        ({"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD},
          "rejected": {"from": "gpt", "value": BAD}}, [USER]),
        ({"messages": BEFORE, "chosen": GOOD, "rejected": BAD}, BEFORE),
        ({"instruction": "回答", "input": ASK, "chosen": GOOD, "rejected": BAD}, turns("回答\n" + ASK)),
        ({"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"question": ASK, "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"question": "回答", "context": ASK, "chosen": CHOSEN, "rejected": REJECTED}, turns("回答\n" + ASK)),
        ({"query": ASK, "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"input": ASK, "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"prompt": ASK, "messages": [USER, CHOSEN], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
        ({"system": "你是助手。", "history": [["你好", "你好！"]], "question": ASK, "chosen": GOOD, "rejected": BAD},
         turns("你好", "你好！", ASK, system="你是助手。")),
        ({"chosen": f"Human: 你好\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
          "rejected": f"Human: 你好\n\nHuman: {ASK}\n\nAssistant: {BAD}"}, turns("你好\n\n" + ASK)),
    ],
)  # fmt: skip
def test_every_form_of_preference(tmp_path, tokenizer, record, prompt):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, [record])
    assert loader.note(0)["messages"] == prompt
    batch = next(iter(loader))
    for side, answer in enumerate((CHOSEN, REJECTED)):
        ids = tokenizer.apply_chat_template([*prompt, answer])[:-1]  # ends with the end-of-turn, as a rollout does
        n = len(ids)
        assert ids[-1] == tokenizer.im_end_id
        assert batch["input_ids"][0, side, :n].tolist() == ids
        assert batch["attention_mask"][0, side].sum() == n and (batch["input_ids"][0, side, n:] == 0).all()
        labels = batch["labels"][0, side]
        assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=False) == answer["content"] + "<|im_end|>"
        begin = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True))
        assert labels[begin] >= 0 and (labels[:begin] == -100).all()


def test_a_prefix_that_both_sides_share_is_no_prompt_unless_it_is_one(tmp_path, tokenizer):
    """Plain strings that begin alike are answers that begin alike."""
    records = [{"prompt": ASK, "chosen": "好" + GOOD, "rejected": "好" + BAD}, {"chosen": "ab", "rejected": "ac"}]
    labels = load(m.DPODataLoader, tmp_path, tokenizer, records).collate([0, 1])["labels"]
    assert tokenizer.decode(labels[0, 0][labels[0, 0] >= 0]) == "好" + GOOD
    assert tokenizer.decode(labels[1, 1][labels[1, 1] >= 0]) == "ac"


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"prompt": ASK, "answer": "鱼"}, [USER], "鱼"),
        ({"prompt": [USER], "answer": 3}, [USER], "3"),
        ({"prompt": BEFORE, "gt": ["鱼", "fish", 2.5]}, BEFORE, "鱼\nfish\n2.5"),
        ({"prompt": USER}, [USER], ""),
        ({"prompt": ASK, "system": "你是助手。", "gt": None}, turns(ASK, system="你是助手。"), ""),
        ({"messages": [*BEFORE, CHOSEN], "answer": "鱼"}, BEFORE, "鱼"),
        ({"messages": BEFORE, "answer": "x"}, BEFORE[:1], "x"),
    ],
)
def test_every_form_of_prompt(tmp_path, tokenizer, record, prompt, answer):
    other = {"messages": turns("好", "b")} if "messages" in record else {"prompt": "好"}
    loader = load(m.PromptDataLoader, tmp_path, tokenizer, [record, other])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    batch = loader.collate([0, 1])
    short = tokenizer.apply_chat_template(turns("好"), add_generation_prompt=True)
    assert batch["answers"] == [answer, ""] and batch["input_ids"] == [ids, short]
    assert batch["messages"] == [prompt, turns("好")]


ODD = " \t小猫<|im_end|>\n<|im_start|>assistant\n\u3000 \r\n<|eos|>\x00🦴  \n\n"


def test_messages_and_answers_are_kept_as_they_are(tmp_path, tokenizer):
    """A reward function gets them to the letter, though they look like special tokens or have odd blanks."""
    prompt = [{"role": "system", "content": ODD[::-1]}, {"role": "user", "content": ODD}]
    records = [{"prompt": prompt, "answer": [ODD, " b\t"]}, {"prompt": ODD, "answer": ""}, {"prompt": " ", "gt": 0}]
    loader = load(m.PromptDataLoader, tmp_path, tokenizer, records)
    (batch,) = loader
    assert batch["messages"] == [prompt, [prompt[1]], [{"role": "user", "content": " "}]]
    assert batch["answers"] == [ODD + "\n b\t", "", "0"]
    for row, n in zip(batch["input_ids"], (3, 2, 2), strict=True):  # none of the text became a special token
        assert row.count(tokenizer.im_start_id) == n and row.count(tokenizer.im_end_id) == n - 1
        assert tokenizer.eos_id not in row and tokenizer.bos_id not in row
    chat = load(m.ConversationDataLoader, tmp_path, tokenizer, [{"messages": turns(ODD, ODD)}], "chat.jsonl")
    ids, trained = chat.sequence(0)
    assert tokenizer.decode(ids[trained]) == ODD and chat.note(0)["messages"] == turns(ODD)
    pairs = [{"prompt": ODD, "chosen": ODD + ODD, "rejected": ODD + "b", "category": " ä\n"}]
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs, "pairs.jsonl")
    assert [tokenizer.decode(ids[trained]) for ids, trained in (loader.sequence(0, 0), loader.sequence(0, 1))] == [
        ODD,
        "b",
    ]
    assert loader.note(0) == {"messages": turns(ODD), "answer": "", "category": " ä\n"}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
REPLY_OFF = {"role": "assistant", "content": "wrong"}
LOADERS = (m.ConversationDataLoader, m.DPODataLoader, m.PromptDataLoader)


@pytest.mark.parametrize(
    ("cls", "record", "message"),
    [
        (m.ConversationDataLoader, {"messages": [{"role": "robot", "content": "a"}]}, "role .*system, user"),
        (m.ConversationDataLoader, {"messages": [{"role": "user"}, CHOSEN]}, "content .* of type string"),
        (m.ConversationDataLoader, {"messages": [{"role": "user", "content": 3}, CHOSEN]}, "of type string"),
        (m.ConversationDataLoader, {"messages": [[USER]]}, "must be an object"),
        (m.ConversationDataLoader, {"messages": None}, "must be an object"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"images": ["a.png"]}]}, '"images" is not supported'),
        (
            m.ConversationDataLoader,
            {"messages": [USER, CHOSEN | {"function_call": {}, "audio": "a"}]},
            '"audio" is not',
        ),
        (m.ConversationDataLoader, PLAIN | {"videos": ["a.mp4"]}, '"videos" is not supported'),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"weight": 0.5}]}, '"weight" of a message must be 0'),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"train": "no"}]}, '"train" of a message must be 0'),
        (
            m.ConversationDataLoader,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHOSEN]},
            "parts with",
        ),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"tool_calls": [{"id": "x"}]}]}, "name and arguments"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"tool_calls": "[{"}]}, "name and arguments"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"content": None}]}, "of type string"),
        (m.ConversationDataLoader, PLAIN | {"tools": [3]}, "name and arguments"),
        (m.ConversationDataLoader, {"question": "a", "answer": []}, "without an assistant message"),
        (m.ConversationDataLoader, {"messages": [USER, {"role": "system", "content": "s"}, CHOSEN]}, "only come first"),
        (m.ConversationDataLoader, {"messages": [USER]}, "without an assistant message"),
        (m.ConversationDataLoader, {"messages": []}, "without an assistant message"),
        (m.ConversationDataLoader, {"instruction": "a", "output": "b", "history": [["a"]]}, '"history" must be'),
        (m.ConversationDataLoader, {"instruction": 3, "input": "a", "output": "b"}, "input, context must be strings"),
        (m.ConversationDataLoader, PLAIN | {"answer": {"a": 1}}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": ASK, "answer": True}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": ASK, "gt": [["a"]]}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": [USER, CHOSEN]}, "must end with a message to reply to"),
        (m.PromptDataLoader, {"prompt": []}, "must end with a message to reply to"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": [USER], "rejected": BAD}, '"chosen" must end with'),
        (
            m.DPODataLoader,
            {"prompt": ASK, "chosen": GOOD, "rejected": [USER, REJECTED, USER]},
            '"rejected" must end with',
        ),
        (m.DPODataLoader, {"context": ASK, "chosen": GOOD, "rejected": BAD}, '"context" may be the question'),
        (m.DPODataLoader, {"ask": ASK, "chosen": GOOD, "rejected": BAD}, '"ask" may be the question'),
        (m.DPODataLoader, {"turns": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, '"turns" may be the question'),
        (m.DPODataLoader, {"prompt": ASK, "chosen": [CHOSEN], "rejected": []}, '"rejected" must end with'),
        (m.DPODataLoader, {"prompt": ASK, "chosen": 3, "rejected": GOOD}, "must be an object"),
        (m.DPODataLoader, {"prompt": [USER, CHOSEN], "chosen": GOOD, "rejected": BAD}, "go on where the prompt ends"),
    ],
)
def test_bad_records_of_conversations(tmp_path, tokenizer, cls, record, message):
    good = {m.ConversationDataLoader: PLAIN, m.PromptDataLoader: {"prompt": "b"}}.get(cls, PAIR)
    with pytest.raises(m.UserError, match=f"records.jsonl:2: .*{message}"):
        load(cls, tmp_path, tokenizer, [good, record, good])
    assert not list((tmp_path / "cache").iterdir())
    with pytest.warns(UserWarning, match="2 × malformed, the first at .*records.jsonl:2: "):
        loader = load(cls, tmp_path, tokenizer, [good, record, good, record], on_bad_record="skip")
    assert len(loader.items) == 2


def trained_texts(loader) -> list[str]:
    """What is learned of each record; | stands for an end of turn."""
    sequences = [loader.sequence(i) for i in loader.items]
    return [loader.tokenizer.decode(ids[flags], False).replace("<|im_end|>", "|") for ids, flags in sequences]


@pytest.mark.parametrize(
    ("record", "trained", "remark"),
    [
        ({"messages": [*turns("a", "b", "c"), REPLY_OFF | {"weight": 0}]}, "b|", ""),
        ({"messages": [USER, REPLY_OFF | {"train": False}, USER, CHOSEN]}, GOOD + "|", ""),
        ({"messages": [USER, REPLY_OFF | {"loss": 0}, USER, CHOSEN | {"weight": 1}]}, GOOD + "|", ""),
        ({"messages": turns("a", " ", "c", "d")}, "d|", "empty reply, not trained"),
        ({"messages": turns("a", "b", "c", "\n")}, "b|", "empty reply, not trained"),
        ({"messages": [USER, USER, *turns("", "b", "", "")[1::2], CHOSEN]}, "b\n\n\n\n" + GOOD + "|", "two assistant"),
        ({"messages": [USER, CHOSEN], "id": 1, "label": True}, GOOD + "|", "unknown key 'label'"),
        ({"messages": [USER | {"name": "Tom", "id": None}, CHOSEN]}, GOOD + "|", "unknown key 'name' of a message"),
        ({"messages": turns(ASK, GOOD, system="a"), "system": "b"}, GOOD + "|", ""),
    ],
)
def test_what_of_a_conversation_is_trained(tmp_path, tokenizer, record, trained, remark):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, [PLAIN, record])
    assert trained_texts(loader) == ["吃鱼。|", trained]
    said = "".join(str(warning.message) for warning in found)
    assert f"1 × {remark}" in said and "records.jsonl:2" in said if remark else not said


THINK = "<think>\n想\n</think>\n\n"
CALL = '<tool_call>\n{"name": "find", "arguments": {"q": "鱼"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "b", "reasoning_content": "想"}, THINK + "b"),
        ({"content": None, "tool_calls": [{"function": {"name": "find", "arguments": '{"q": "鱼"}'}}]}, CALL),
        ({"content": "", "tool_calls": '[{"name": "find", "arguments": {"q": "鱼"}}]'}, CALL),
        (
            {"content": "b", "reasoning_content": "想", "tool_calls": [{"name": "find", "arguments": {"q": "鱼"}}] * 2},
            f"{THINK}b\n{CALL}\n{CALL}",
        ),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}, "a b"),
    ],
)
def test_thoughts_and_tool_calls_are_spelled_as_qwen_does(message, content):
    remarks = []
    assert m.as_messages(message | {"role": "assistant"}, "", remarks) == [{"role": "assistant", "content": content}]
    assert not remarks
    auto = pytest.importorskip("jinja2").Template(QWEN3_CALLS)  # the part of Qwen3's template about them
    if "tool_calls" in message and isinstance(message["tool_calls"], list):
        calls = [call.get("function", call) for call in message["tool_calls"]]
        assert content.removeprefix(THINK) == auto.render(content=message["content"] or "", tool_calls=calls)


QWEN3_CALLS = """{{- content }}
{%- for tool_call in tool_calls %}
    {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
    {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
    {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{"q": "鱼"}{%- endif %}
    {{- '}\\n</tool_call>' }}
{%- endfor %}"""


def test_tools_stand_in_the_system_prompt(tmp_path, tokenizer):
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    records = [{"messages": turns(ASK, GOOD, system=system), "tools": [tool, tool]} for system in ("", "你是助手。")]
    records.append({"messages": turns(ASK, GOOD, system="你是助手。"), "tools": json.dumps([tool, tool])})
    records.append({"prompt": ASK, "completion": GOOD, "system": "你是助手。", "tools": [tool, tool]})
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=2000)
    systems = [loader.note(i)["messages"][0] for i in loader.items]
    line = json.dumps(tool, ensure_ascii=False)
    assert [message["role"] for message in systems] == ["system"] * 4
    assert (
        systems[0]["content"].startswith("# Tools\n\nYou may call")
        and f"<tools>\n{line}\n{line}\n</tools>" in (systems[0]["content"])
    )
    assert systems[1]["content"] == "你是助手。\n\n" + systems[0]["content"] == systems[2]["content"]
    assert systems[3] == systems[1] and trained_texts(loader) == [GOOD + "|"] * 4


@pytest.mark.parametrize(
    ("cls", "record", "reason"),
    [
        (m.ConversationDataLoader, {"instruction": "a", "output": ""}, "no reply to learn from"),
        (m.ConversationDataLoader, {"messages": turns("a", " \n", "b", "\t")}, "no reply to learn from"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN | {"weight": 0}]}, "no reply to learn from"),
        (m.ConversationDataLoader, {"messages": [USER, REPLY_OFF | {"weight": 0}, CHOSEN]}, "no reply to learn from"),
        (m.ConversationDataLoader, {"prompt": "a", "completion": "b", "label": False}, "no reply to learn from"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN], "train": False}, "no reply to learn from"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, "both sides alike"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": "a  b", "rejected": " a b\n"}, "both sides alike"),
        (m.DPODataLoader, {"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]}, "both sides alike"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": GOOD, "rejected": ""}, "no reply to learn from"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": CHOSEN | {"weight": 0}, "rejected": BAD}, "no reply to learn from"),
    ],
)
def test_records_that_teach_nothing_are_left_out_and_counted(tmp_path, tokenizer, cls, record, reason):
    good = PAIR if cls is m.DPODataLoader else PLAIN
    with pytest.warns(UserWarning, match=f"2 × {reason}.*records.jsonl:2"):
        assert len(load(cls, tmp_path, tokenizer, [good, record, good, record]).items) == 2


def test_an_empty_reply_is_still_a_prompt(tmp_path, tokenizer):
    records = [{"messages": turns("a", "b", "c", "")}, {"instruction": "d", "output": ""}]
    loader = load(m.PromptDataLoader, tmp_path, tokenizer, records)
    assert [loader.note(i)["messages"] for i in loader.items] == [turns("a", "b", "c"), turns("d")]


def test_questions_with_answers_are_conversations_that_can_be_checked(tmp_path, tokenizer):
    records = [
        {"question": ASK, "answer": "鱼"},
        {"question": ASK, "answer": 3},
        {"question": ASK, "answer": ["a", "b"]},
    ]
    records.append({"problem": ASK, "solution": "1 + 2 = 3", "answer": 3})
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records)
    assert trained_texts(loader) == ["鱼|", "3|", "a|", "1 + 2 = 3|"]
    assert [loader.note(i)["answer"] for i in loader.items] == ["鱼", "3", "a\nb", "3"]
    asked = load(m.PromptDataLoader, tmp_path, tokenizer, [*records, {"prompt": ASK, "answer": "x"}], "mixed.jsonl")
    assert asked.collate(asked.items)["answers"] == ["x"]  # a prompt with its answer is a record of its own kind


def test_the_allowed_forms_are_those_of_the_table(tmp_path, tokenizer):
    with pytest.raises(m.UserError) as caught:
        load(m.ConversationDataLoader, tmp_path, tokenizer, [{"q": 1}])
    assert all("+".join(filter(None, form[1:])) in str(caught.value) for form in m.FORMS) and "question+answer" in str(
        caught.value
    )


def test_records_that_are_all_bad_are_no_matter_of_the_split(tmp_path, tokenizer):
    with pytest.raises(m.UserError, match="^(?!.*tenth).*1 × malformed, the first at .*records.jsonl:1"):
        load(m.ConversationDataLoader, tmp_path, tokenizer, [{"messages": [USER]}], on_bad_record="skip")


def test_a_file_without_records_of_the_kind_is_named(tmp_path, tokenizer):
    (tmp_path / "d").mkdir()
    for name, record in (("a", PLAIN), ("b", PAIR), ("c", {"text": "x"})):
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", [record])
    options = {"seq_len": 99, "split": "all", "cache_dir": tmp_path / "cache"}
    for cls in LOADERS:
        assert len(cls(tmp_path / "d", tokenizer, **options).items) == 1
        with pytest.raises(m.UserError, match="c.jsonl: nothing for this stage, which takes .*: it holds text records"):
            cls([tmp_path / "d/c.jsonl", tmp_path / "d/a.jsonl"], tokenizer, **options)
    assert m.kinds_of(tmp_path / "d") == {"chat": 1, "preference": 1, "text": 1}


def sides(cls, tmp_path, tokenizer, records, **options) -> list[list]:
    """The first questions on each side, which are disjoint."""
    loaders = [load(cls, tmp_path, tokenizer, records, split=split, **options) for split in ("train", "val")]
    found = [[loader.note(i)["messages"][0]["content"] for i in loader.items] for loader in loaders]
    assert sum(map(len, found)) == len(records) and all(found)
    return found


@pytest.mark.parametrize("cls", [m.ConversationDataLoader, m.DPODataLoader, m.PromptDataLoader])
def test_wherever_there_are_two_documents_one_is_on_each_side(tmp_path, tokenizer, cls):
    """Whatever their order, and of large data about a tenth."""
    for n in (2, 3, 5, 300):
        for start in (0, 10, 20):
            records = [record_for(cls, start + i) for i in range(n)]
            found = sides(cls, tmp_path, tokenizer, records)
            assert len(found[1]) == 1 if n < 4 else len(found[1]) <= max(2, n // 5)
            assert sorted(sides(cls, tmp_path, tokenizer, records[::-1])[1]) == sorted(found[1])
    alone = [record_for(cls, 0)] * 3
    assert len(load(cls, tmp_path, tokenizer, alone, split="train").items) == 3
    with pytest.raises(m.UserError, match="one document, or copies of one, .*--val-data"):
        load(cls, tmp_path, tokenizer, alone, split="val")


def test_all_of_whom_lie_below_a_tenth_leave_one_to_train_on(tmp_path, tokenizer):
    for below in (True, False):
        texts = [text for text in map(str, range(200)) if (m.hash_share(text) < 0.1) == below][:4]
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        found = [encode_corpus(path, tokenizer, split, tmp_path / "c") for split in ("train", "val")]
        assert [stream(tokens, tokenizer).count("<|eos|>") for tokens in found] == [3, 1]


def test_pairs_of_one_question_are_divided_by_their_completions(tmp_path, tokenizer):
    records = [{"prompt": "q", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(300)]
    found = sides(m.DPODataLoader, tmp_path, tokenizer, records)
    assert 10 < len(found[1]) < 60
    without = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    assert [len(load(m.DPODataLoader, tmp_path, tokenizer, without, split=s).items) > 0 for s in ("train", "val")]


def test_a_question_is_on_one_side_of_all_kinds(tmp_path, tokenizer):
    """However it is asked: alone, in a longer conversation, with a system prompt, in a pair, or as a prompt."""
    asked = [f"question {i}" for i in range(100)]
    kinds = {
        "chat": [{"messages": turns(q, "a")} for q in asked]
        + [{"messages": turns(q, "b", "more", "c", system="s")} for q in asked]
        + [{"instruction": "now", "output": "x", "history": [[q, "y"]]} for q in asked],
        "preference": [{"prompt": q + "\n", "chosen": "good", "rejected": "bad"} for q in asked],
        "prompt": [{"prompt": q} for q in asked],
    }
    held_out = set()
    for kind, records in kinds.items():
        path = write_jsonl(tmp_path / f"{kind}.jsonl", records)
        cls = next(cls for cls in LOADERS if cls.kind == kind)
        parts = [cls(path, tokenizer, 1, 200, split, cache_dir=tmp_path / "c") for split in ("train", "val")]
        train, val = (
            {next(t["content"] for t in part.note(i)["messages"] if t["role"] == "user").strip() for i in part.items}
            for part in parts
        )
        assert train | val == set(asked) and not train & val
        held_out |= val
        learned = "\n".join(m.sample_texts(path, "train", "stop")) + "\n"
        assert {q for q in asked if q + "\n" in learned} == train
    assert held_out == {q for q in asked if m.hash_share(q) < 0.1}


def test_every_text_file_gives_its_last_tenth(tmp_path, tokenizer):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 100)
    write_jsonl(tmp_path / "more.jsonl", [{"text": "one document beside them"}])
    for split, n in (("train", 90), ("val", 10)):
        assert "<|eos|>".join(f"<|bos|>{str(i) * n}" for i in range(5)) in encode(
            tmp_path, tokenizer, split, tmp_path / ".c"
        )


@pytest.mark.parametrize("name", ["train.ids", "train.lengths", "train.notes"])
def test_a_damaged_cache_is_made_again(tmp_path, tokenizer, name):
    records = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", records)

    def sizes() -> list[int]:
        loader = m.ConversationDataLoader(path, tokenizer, 2, 32, "all", cache_dir=tmp_path / "cache")
        return [len(loader.sequence(i)[0]) for i in loader.items]

    whole = sizes()
    (damaged,) = (tmp_path / "cache").glob(f"*/{name}")
    damaged.write_bytes(damaged.read_bytes()[:4])
    with pytest.warns(UserWarning, match="is damaged: encoding the data again"):
        assert sizes() == whole and len(whole) == 9


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("Tom", "tom", True),
        ("Tom. He is my brother.", "Tom", True),
        ("是小明。他很好", "小明", False),
        ("小明。他很好", "小明", True),
        ("  小明！", "小明", True),
        ("3.5", "3", False),
        ("3.5", "3.5", True),
        ("3.", "3", True),
        ("three  men\nand", "Three men", True),
        ("a", "b\nA", True),
        ("", "a", False),
        ("a b", "a", False),
        ("Mr. Jones", "Mr. Smith", False),
        ("Mr. Smith! How nice.", "Mr. Smith", True),
        ("Mr. Smithers", "Mr. Smith", False),
        ("", ".", False),
        # numbers
        ("18", "18.0", True),
        ("18.00", "18", True),
        ("18.5", "18", False),
        ("180", "18", False),
        ("1,000", "1000", True),
        ("1000", "1,000.0", True),
        ("12,34", "1234", False),
        ("１８。", "18", True),
        ("３．５", "3.50", True),
        ("１，０００！", "1000", True),
        ("$18.", "18", True),
        ("18", "$18", True),
        ("￥18", "¥18.00", True),
        ("$18", "¥18", True),
        ("18 apples", "18", False),
        ("18.0 apples. Yes", "18 apples", True),
        ("18", "18 apples", False),
        ("18 pears", "18 apples", False),
        ("5kg", "5.0 kg", True),
        ("-3", "\u22123.0", True),
        ("3", "-3", False),
        ("-$1,200.50", "-1200.5", True),
        ("50 %", "50%", True),
        ("50", "50%", False),
        (".5", "0.5", True),
        ("1e3", "1000", True),
        ("18 - 20", "18", False),
        ("9007199254740993", "9007199254740992", False),
        ("1e999999999999999999999", "3", False),
        ("第3个", "3", False),
        ("7", "6\n7.0", True),
    ],
)
def test_answer_matches(reply, answer, same):
    assert m.answer_matches(reply, answer) is same


# ======================================================================================================================
# 7 Generation
# ======================================================================================================================


@pytest.fixture(scope="module")
def generator(tokenizer) -> m.TextGenerator:
    return m.TextGenerator(random_model(shape()), tokenizer)


def ending_at(tokenizer, *stop_ids: int) -> m.BPETokenizer:
    """The tokenizer with other ends."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_ids = stop_ids
    return tokenizer


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {0: 0.4, 2: 0.3, 3: 0.2, 1: 0.1}),
        ({"top_k": 2}, {0: 0.5714, 2: 0.4286}),  # 4/7 and 3/7
        ({"top_p": 0.5}, {0: 0.5714, 2: 0.4286}),  # the token that crosses p stays
        ({"top_p": 0.39}, {0: 1.0}),
        ({"min_p": 0.6}, {0: 0.5714, 2: 0.4286}),  # 0.3 reaches 0.6 · 0.4
        ({"top_k": 3, "top_p": 0.75}, {0: 0.5714, 2: 0.4286}),  # of what top-k left, 4/9 and 3/9 reach 0.75
        ({"temperature": 0.5}, {0: 0.5333, 2: 0.3, 3: 0.1333, 1: 0.0333}),  # squares: 16, 9, 4 and 1 of 30
    ],
)
def test_sampling_filters_by_hand(changes, kept):
    """Worked example: probabilities 0.4, 0.1, 0.3, 0.2, and what each filter leaves of them."""
    probs = m.sampling_probs(torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log(), settings(**changes))
    assert {i: round(p, 4) for i, p in enumerate(probs[0].tolist()) if p > 0} == kept


def test_repetition_penalty_by_hand():
    """Worked example: of tokens that occurred, a logit above 0 is divided by the penalty, one below is multiplied."""
    seen, logits = torch.tensor([[True, False, True, False]]), torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    assert m.penalize_repetition(logits, seen, 2.0).tolist() == [[1, 2, -4, -2]]


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.49, 1), (0.5, 3), (0.87, 3), (0.875, 4), (0.99, 4), (1 - 2**-24, 4)]
)
def test_draw_by_hand(number, token):
    """Worked example: probabilities 0, 1/2, 0, 3/8, 1/8, 0 add up to 0, 1/2, 1/2, 7/8, 1, 1: the number falls in one.

    From 0 to the largest float32 below 1, no number draws what has no probability.
    """
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.375, 0.125, 0.0]]).expand(3, -1)
    assert m.draw(probs, torch.full((3, 1), number)).tolist() == [token] * 3


@pytest.mark.parametrize(
    ("text", "stops", "clipped", "held_back"),
    [
        ("one STOP two", ["STOP"], ("one ", True), 0),
        ("one STOP two", ["two", "one"], ("", True), 0),  # whichever comes first
        ("one ST", ["STOP", "zzz"], ("one ST", False), 2),  # may become STOP: not to be shown yet
        ("one", [], ("one", False), 0),
        ("one", None, ("one", False), 0),
    ],
)
def test_stop_texts_by_hand(text, stops, clipped, held_back):
    """Worked example: a text ends before its first stop text; what may become one is held back."""
    assert m.clip_at_stop(text, stops) == clipped
    assert clipped[1] or m.length_of_stop_prefix(text, stops) == held_back


def filtered_by_definition(logits: torch.Tensor, config: m.GenerationConfig) -> torch.Tensor:
    """One row's probabilities in float64, by sorting the whole vocabulary."""
    probs = (logits.double() / config.temperature).softmax(-1)
    falling, order = probs.sort(descending=True)
    if config.top_k:
        falling[config.top_k :] = 0
        falling /= falling.sum()
    keep = (falling.cumsum(0) - falling < config.top_p) & (falling >= config.min_p * falling[0])
    kept = falling * keep
    return torch.zeros_like(probs).scatter_(0, order, kept / kept.sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"top_k": 50},
        {"top_p": 0.7, "min_p": 0.2},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 4000, "top_p": 0.5, "min_p": 0.3},
        {"top_k": 9000, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])  # from nearly uniform, where thousands are kept, to a few
def test_sampling_filters_by_definition_on_a_large_vocabulary(changes, sharpness):
    logits = sharpness * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    config = settings(**changes)
    found = m.sampling_probs(logits, config)
    assert found.dtype == torch.float32
    for row, probs in zip(logits, found, strict=True):
        expected = filtered_by_definition(row, config)
        assert torch.equal(probs > 0, expected > 0)
        torch.testing.assert_close(probs.double(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "least", "most"), [({"top_p": 0.9}, 4499, 4501), ({"top_k": 7}, 7, 7), ({"min_p": 1.0}, 5000, 5000)]
)
def test_sampling_filters_of_equal_logits(changes, least, most):
    probs = m.sampling_probs(torch.full((2, 5000), 3.0), settings(**changes))
    kept = probs[0][probs[0] > 0]
    assert least <= len(kept) <= most
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / len(kept)))


def test_draw_takes_each_index_as_often_as_its_probability_says():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.375, 0.125, 0.0]).expand(20_000, -1)
    drawn = m.draw(probs, torch.rand(len(probs), 1, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (20_000,)
    share = drawn.bincount(minlength=6) / 20_000
    torch.testing.assert_close(share, probs[0], atol=0.015, rtol=0)
    assert not share[[0, 2, 5]].any()


def test_draw_treats_each_row_by_itself():
    """Rows with distributions of their own, of 200 tokens after filters; within five standard deviations."""
    logits, n = 2 * torch.randn(3, 200, generator=torch.Generator().manual_seed(1)), 20_000
    probs = m.sampling_probs(logits, settings(top_k=120, top_p=0.9, min_p=0.002))
    drawn = m.draw(probs.repeat(n, 1), torch.rand(3 * n, 1, generator=torch.Generator().manual_seed(2))).view(n, 3)
    for row, p in enumerate(probs):
        share = drawn[:, row].bincount(minlength=200) / n
        assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_sampling_draws_from_the_distribution(generator):
    ids = random_ids(1, 4)
    config = settings(max_new_tokens=1, top_k=3, seed=0)
    drawn = generator.sample_generate(ids.expand(4000, -1), config)[:, -1]
    with torch.no_grad():
        top = generator.model(ids)[0, -1].topk(3)
    for token, p in zip(top.indices, top.values.softmax(-1), strict=True):
        assert (drawn == token).float().mean().item() == pytest.approx(p.item(), abs=0.04)
    assert set(drawn.tolist()) <= set(top.indices.tolist())
    assert torch.equal(drawn, generator.sample_generate(ids.expand(4000, -1), config)[:, -1])  # the seed decides


@pytest.mark.parametrize(("prompts", "options"), [(256, {}), (12, {"batch_size": 3})])
def test_a_seed_draws_anew_in_each_batch_of_prompts(generator, prompts, options):
    """Equal prompts in the first 128 and in the next: the same random numbers would write the same texts twice."""
    rows, config = [[1, 70, 80]] * prompts, settings(seed=3, temperature=3.0)
    replies = generator.generate(rows, config, **options)
    assert replies == generator.generate(rows, config, **options)  # yet the seed decides
    size = options.get("batch_size", 128)
    batches = [replies[i : i + size] for i in range(0, prompts, size)]
    for one, other in itertools.combinations(batches, 2):
        assert sum(map(str.__eq__, one, other)) <= 0.02 * size


def test_a_given_generator_goes_on_from_call_to_call(generator):
    ids, config = random_ids(4, 5), settings(seed=9)
    numbers = torch.Generator().manual_seed(9)
    first, second = (generator.sample_generate(ids, config, random=numbers) for _ in range(2))
    assert torch.equal(first, generator.sample_generate(ids, config)) and not torch.equal(first, second)


def without_ends(model: m.MiniGPT) -> m.MiniGPT:
    """The model with EOS and <|im_end|> made impossible, as min_new_tokens does."""
    plain = type(model).forward
    model.forward = lambda ids, **kw: plain(model, ids, **kw).index_fill(-1, torch.tensor([2, 4]), -math.inf)
    return model


@pytest.mark.parametrize("config", [shape(), moe_shape(), shape(tie_word_embeddings=False, num_key_value_heads=1)])
def test_fast_generation_equals_naive(config, tokenizer):
    model, ids = random_model(config), random_ids(3, 6)
    fast = m.TextGenerator(model, tokenizer).greedy_search(ids, settings(min_new_tokens=12))
    assert torch.equal(fast, without_ends(model).generate(ids, 12))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_decoding_records_no_gradients(generator, monkeypatch, is_compiled, beams):
    modes, plain = [], m._decode_step

    def step(*args):
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return plain(*args)

    monkeypatch.setattr(m, "_decode_step", step)
    monkeypatch.setattr(generator, "compiled", step if is_compiled else None)  # in place of what torch.compile returns
    generator.generate("1 + 2", m.GenerationConfig(max_new_tokens=4, min_new_tokens=4, num_beams=beams))
    assert modes == [(False, not is_compiled)] * 4


@pytest.fixture
def recorded(monkeypatch) -> list:
    """Steps are recorded on a CPU, too: a CUDA graph is replaced by another call on the same tensors.

    None of these may have been exchanged. Returns their addresses, for each recording.
    """

    def addresses(state):
        tensors = [x for x in state.inputs if x is not None] + [state.seen, state.is_stop, state.position]
        return [x.data_ptr() for x in (*tensors, *state.cache.k, *state.cache.v)]

    def record_graph(fn, device):
        state, result = inspect.getclosurevars(fn).nonlocals["self"], fn()
        recordings.append(addresses(state))

        def repeat():
            assert addresses(state) == recordings[-1]
            return result.copy_(fn())

        return repeat

    recordings: list = []
    monkeypatch.setattr(m, "record_graph", record_graph)
    monkeypatch.setattr(m, "_is_recorded", lambda model: model.has_fixed_shapes)
    return recordings


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"seed": 0, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 9},
        {"num_beams": 3, "repetition_penalty": 1.5},
    ],
)
def test_a_recorded_step_decodes_the_same(tokenizer, recorded, options):
    generator, config = m.TextGenerator(random_model(shape()), tokenizer), settings(max_new_tokens=12, **options)
    for n, prompts in enumerate((["你", "Hello, world! It's", "1 + 12 ="], ["1 + 12 ="]), 1):  # padded, and not
        generator.model.has_fixed_shapes = False
        expected = generator.generate(prompts, config)
        generator.model.has_fixed_shapes = True
        assert generator.generate(prompts, config) == expected and len(recorded) == n


def test_what_is_generated_can_be_trained_on(generator):
    prompts, few = random_ids(2, 4), m.GenerationConfig(max_new_tokens=5)
    for ids in (generator.sample_generate(prompts, few), generator.beam_search(prompts, few)):
        generator.model(ids).sum().backward()  # tensors of inference mode cannot be saved for backward
    assert generator.model.embed_tokens.weight.grad.any()


def test_rows_of_unequal_length_are_as_if_alone(generator):
    prompts = ["你", "Hello, world! It's", "1 + 12 ="]
    config = settings(do_sample=False, max_new_tokens=20)
    together = generator.generate(prompts, config)
    assert together == [generator.generate(prompt, config) for prompt in prompts]
    for beams in (2, 3):
        config = settings(num_beams=beams)
        assert generator.generate(prompts, config) == [generator.generate(prompt, config) for prompt in prompts]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_long_prompt_leaves_its_neighbours_their_room(tokenizer, beams):
    generator = m.TextGenerator(random_model(shape(max_position_embeddings=64)), tokenizer)
    rows = [[200] * 63, [201] * 3, [202] * 50]
    config = settings(do_sample=False, max_new_tokens=20, min_new_tokens=20, num_beams=beams)
    together = generator.continue_ids(rows, config)
    assert [len(row) for row in together] == [1, 20, 14]
    assert together == [generator.continue_ids([row], config)[0] for row in rows]


def test_overlapping_streams_leave_the_mode_as_it_was(tokenizer):
    """The one that began first ends first; dropout would change what the other writes."""
    generator = m.TextGenerator(random_model(shape(dropout=0.5)), tokenizer)
    config = settings(do_sample=False, max_new_tokens=30, min_new_tokens=30)
    expected = generator.generate("abc", config)
    generator.model.train()
    first, second = (generator.stream(text, config) for text in ("x", "abc"))
    written = [next(first) and next(second)]
    list(first)
    assert "".join(written + list(second)) == expected and generator.model.training


def test_a_stream_begun_in_inference_mode_goes_on_outside_of_it(generator):
    config = settings(do_sample=False, max_new_tokens=9, min_new_tokens=9)
    with torch.inference_mode():
        stream = generator.stream("abc", config)
        written = [next(stream)]
    assert "".join(written + list(stream)) == generator.generate("abc", config)


def test_padding_does_not_count_as_repetition(generator):
    """Whatever the padding's id: here it is the token that the row alone would choose."""
    config, row = settings(max_new_tokens=6, repetition_penalty=1e6, do_sample=False), random_ids(1, 5)
    alone = generator.greedy_search(row, config)[0, 5:]
    padded = F.pad(row, (3, 0), value=alone[0].item())
    mask = F.pad(torch.ones_like(row), (3, 0))
    assert alone[0] not in row and torch.equal(generator.greedy_search(padded, config, mask)[0, 8:], alone)


def test_rows_after_their_end_are_padding_and_touch_nobody(generator, tokenizer):
    ids = random_ids(8, 5)
    config = settings(max_new_tokens=30)
    free = m.TextGenerator(generator.model, ending_at(tokenizer)).greedy_search(ids, config).tolist()
    stop = free[0][12]  # a token that occurs becomes an end
    rows = m.TextGenerator(generator.model, ending_at(tokenizer, stop)).greedy_search(ids, config).tolist()
    assert len({row.index(stop, 5) for row in free if stop in row[5:]}) > 0
    for row, whole in zip(rows, free, strict=True):
        end = row.index(stop, 5) if stop in row[5:] else len(row) - 1
        assert row[: end + 1] == whole[: end + 1] and set(row[end + 1 :]) <= {tokenizer.pad_id}
        assert stop not in whole[5:end]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_rows_that_go_on_keep_their_own_past(generator, tokenizer, penalty):
    """Rows that have ended leave the batch; the caches, masks and seen tokens of the others are not mixed up."""
    alone = m.TextGenerator(generator.model, ending_at(tokenizer))
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 9, 3, 7, 6, 4, 8)]
    batch = m.pad_left(rows, tokenizer.pad_id)
    config = settings(max_new_tokens=25, repetition_penalty=penalty, do_sample=False)
    steps = []
    for k, (tokens, ended) in enumerate(alone._decode(batch["input_ids"], config, batch["attention_mask"], None)):
        steps.append(tokens.clone())
        if k == 2:
            ended[[0, 2, 4, 5]] = True
    written = torch.stack(steps, dim=1)
    for i in (1, 3, 6):
        assert written[i].tolist() == alone.greedy_search(torch.tensor([rows[i]]), config)[0, len(rows[i]) :].tolist()
    assert not written[[0, 2, 4, 5], 3:].any()


def test_a_mixture_of_experts_is_not_compiled_for_decoding(tokenizer):
    with pytest.raises(m.UserError, match="cannot be compiled"):
        m.TextGenerator(random_model(moe_shape()), tokenizer, compile=True)


@needs_compiler
@pytest.mark.slow
def test_compiled_decoding_writes_the_same(tokenizer):
    model = random_model(shape(num_hidden_layers=1, max_position_embeddings=600))
    eager, compiled = (m.TextGenerator(model, tokenizer, compile=wanted) for wanted in (False, True))
    batch = m.pad_left([random_ids(1, n, seed=n)[0].tolist() for n in (5, 9)], tokenizer.pad_id)

    def graphs_of(config, write):  # how many were compiled; one serves all steps
        torch._dynamo.utils.counters.clear()
        assert torch.equal(*map(write, (eager, compiled)))
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    for config, graphs in (
        (settings(do_sample=False, max_new_tokens=30, min_new_tokens=30), 1),
        (settings(seed=0, max_new_tokens=300, min_new_tokens=300, repetition_penalty=1.1), 1),  # more slots
        (settings(do_sample=False), 0),
    ):
        sample = functools.partial(m.TextGenerator.sample_generate, config=config)
        write = functools.partial(sample, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert graphs_of(config, write) == graphs
    beams = settings(num_beams=2, min_new_tokens=30, max_new_tokens=30)
    assert graphs_of(beams, lambda g: g.beam_search(batch["input_ids"][1:], beams)) == 1


def test_decoding_without_a_compiler_is_one_message(tokenizer, monkeypatch):
    def fail(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: 0, RuntimeError("no g++"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    generator = m.TextGenerator(random_model(shape()), tokenizer, compile=True)
    with pytest.raises(m.UserError, match="C\\+\\+ compiler"):
        generator.generate("hello", settings(max_new_tokens=3))


def all_continuations(generator, ids, length) -> list[tuple[list[int], float]]:
    """Every continuation of `length` tokens, or shorter with an end, and its log-probability, by brute force."""
    rows = []
    with torch.no_grad():
        for tokens in itertools.product(range(generator.model.config.vocab_size), repeat=length):
            ends = [i for i, t in enumerate(tokens) if t in generator.tokenizer.stop_ids]
            if ends and any(tokens[ends[0] + 1 :]):
                continue  # one of many spellings of the same ended text: keep the one padded with 0
            n = ends[0] + 1 if ends else length
            rows.append((list(tokens[:n]), n))
        out = []
        for tokens, n in rows:
            logp = generator.model(torch.cat((ids, torch.tensor([tokens])), dim=1))[0].log_softmax(-1)
            out.append((tokens, sum(logp[ids.shape[1] - 1 + i, t].item() for i, t in enumerate(tokens[:n]))))
    return out


def test_beams_that_become_more_are_recorded_anew(recorded):
    test_beam_search_equals_exhaustive_search(1.0, False)
    assert len(recorded) > 4


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_equals_exhaustive_search(penalty, early):
    config = shape(vocab_size=5, max_position_embeddings=16)
    tokenizer = m.BPETokenizer()
    tokenizer.token_bytes = tokenizer.token_bytes[:5]  # a vocabulary of special tokens only
    for seed in range(4):
        generator = m.TextGenerator(random_model(config, seed), tokenizer)
        ids = torch.tensor([[1, 3]])
        best = max(all_continuations(generator, ids, 4), key=lambda c: c[1] / len(c[0]) ** penalty)
        beams = settings(max_new_tokens=4, num_beams=5**4, length_penalty=penalty, early_stopping=early)
        assert generator.beam_search(ids, beams)[0, 2:].tolist() == best[0]


def test_one_beam_is_greedy_and_more_are_likelier(generator):
    ids = random_ids(4, 6)
    config = settings(min_new_tokens=12)
    assert torch.equal(generator.beam_search(ids, config), generator.greedy_search(ids, config))

    def logp(out):
        with torch.no_grad():
            lp = generator.model(out)[:, 5:-1].log_softmax(-1)
        return lp.gather(2, out[:, 6:, None]).sum()

    wide = dataclasses.replace(config, num_beams=8)
    assert logp(generator.beam_search(ids, wide)) > logp(generator.greedy_search(ids, config))


# A field of GenerationConfig: two values between which what is written must differ, and the other options.
FIELDS_OF_GENERATION = {
    "max_new_tokens": (5, 7, {}),
    "min_new_tokens": (0, 9, {"do_sample": False}),
    "max_length": (10, 12, {"max_new_tokens": None}),
    "do_sample": (True, False, {}),
    "temperature": (0.5, 3.0, {}),
    "top_k": (0, 2, {}),
    "top_p": (1.0, 0.3, {}),
    "min_p": (0.0, 0.5, {}),
    "repetition_penalty": (1.0, 1.5, {"do_sample": False, "min_new_tokens": 12}),
    "num_beams": (2, 3, {}),
    "length_penalty": (-2.0, 2.0, {"num_beams": 3}),
    "early_stopping": (False, True, {"num_beams": 3}),
    "stop": (None, ["e", "a", "1", "的", "o"], {"min_new_tokens": 12}),
    "seed": (0, 1, {}),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(m.GenerationConfig)])
def test_every_field_of_generation_has_an_effect(tokenizer, field):
    """With many ends, so that beams end at different lengths."""
    generator = m.TextGenerator(random_model(shape()), ending_at(tokenizer, *range(5, 40)))
    rows = random_ids(8, 5).tolist()

    def write(value) -> list[str] | list[list[int]]:
        options = FIELDS_OF_GENERATION[field][2] | {field: value}
        config = settings(**{"seed": 0} | options)
        return generator.generate(rows, config) if field == "stop" else generator.continue_ids(rows, config)

    one, other, _ = FIELDS_OF_GENERATION[field]
    assert write(one) == write(one) != write(other)


def test_the_length_of_a_continuation_by_hand():
    lengths = [{}, {"max_length": 9}, {"max_length": 5}, {"max_new_tokens": 3, "max_length": 99}]
    assert [m.GenerationConfig(**given).new_tokens(6) for given in lengths] == [128, 3, 0, 3]


def test_temperature_0_is_greedy(generator):
    ids = random_ids(3, 5)
    greedy = generator.greedy_search(ids, settings())
    assert torch.equal(generator.sample_generate(ids, settings(temperature=0)), greedy)
    for nearly in (1e-5, 1e-6, 1e-45):
        assert torch.equal(generator.sample_generate(ids, settings(temperature=nearly, seed=0)), greedy)


def test_the_naive_loop_samples_from_the_distribution(generator):
    ids, model = random_ids(1, 4), generator.model
    drawn = model.generate(ids.expand(4000, -1), 1, temperature=0.5, generator=torch.Generator().manual_seed(0))
    probs = (model(ids)[0, -1] / 0.5).softmax(-1)
    share = drawn[:, -1].bincount(minlength=300) / 4000
    assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / 4000).sqrt() + 1e-3).all()


def test_an_empty_prompt_begins_as_a_document_does(generator, tokenizer):
    config = settings(do_sample=False)
    assert generator.generate("", config) == generator.generate([[tokenizer.bos_id]], config)[0]
    without_bos = copy.copy(tokenizer)
    without_bos.bos_id = None  # as Qwen's
    qwen = m.TextGenerator(generator.model, without_bos)
    assert (
        qwen.generate("", config) == "".join(qwen.stream("", config)) == qwen.generate([[tokenizer.eos_id]], config)[0]
    )


def test_texts_messages_and_ids_are_prompts(generator, tokenizer):
    config, messages = settings(do_sample=False), turns("hi")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    reply = generator.chat(messages, config)
    assert generator.generate([messages, ids, "hi"], config) == [reply, reply, generator.generate("hi", config)]


class Scripted(m.MiniGPT):
    """A model that always writes the ids that it is given."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(shape(max_position_embeddings=256))
        self.script = script

    def hidden_states(self, input_ids, *, cache, **_):
        at = cache.length + input_ids.shape[1] - self.prompt_len
        cache.length += input_ids.shape[1]
        hidden = torch.zeros(*input_ids.shape, 300)
        hidden[:, -1, self.script[min(at, len(self.script) - 1)]] = 1e4
        return hidden, 0.0

    def logits(self, hidden):
        return hidden


def scripted(tokenizer, text: str, prompt: str = "x") -> m.TextGenerator:
    model = Scripted([*tokenizer.encode(text), tokenizer.eos_id])
    model.prompt_len = len(tokenizer.encode(prompt)) + 1
    return m.TextGenerator(model, tokenizer)


def test_streaming_never_splits_a_character_and_stops_at_stop_texts(tokenizer):
    text = "龘靐齉😀，你好STOP再见"
    generator = scripted(tokenizer, text)
    config = settings(max_new_tokens=100, do_sample=False)
    pieces = list(generator.stream("x", config))
    assert "".join(pieces) == text == generator.generate("x", config) and len(pieces) > 5
    for n in range(1, len(tokenizer.encode(text))):
        cut = dataclasses.replace(config, max_new_tokens=n)
        shown = "".join(generator.stream("x", cut))
        assert text.startswith(shown) and shown == generator.generate("x", cut)
    for stop, want in (
        (["STOP"], "龘靐齉😀，你好"),
        (["OPq", "再见"], "龘靐齉😀，你好STOP"),
        (["😀"], "龘靐齉"),
        (["zzz"], text),
    ):
        with_stop = dataclasses.replace(config, stop=stop)
        pieces = list(generator.stream("x", with_stop))
        assert "".join(pieces) == want == generator.generate("x", with_stop) and all(pieces)
        assert generator.generate(["x"], with_stop) == [want]


def test_a_row_ends_with_its_stop_text(generator, monkeypatch):
    """Worked example: the stop text is that of the first three tokens, so that three are written."""
    monkeypatch.setattr(generator, "_text", lambda ids: "".join(f"<{i}>" for i in ids))
    ids, options = random_ids(1, 6), {"do_sample": False, "min_new_tokens": 12}
    whole = generator.sample_generate(ids, settings(**options))
    stop = [generator._text(whole[0, 6:9].tolist())]
    assert whole.shape == (1, 18)
    assert torch.equal(generator.sample_generate(ids, settings(**options, stop=stop)), whole[:, :9])


def test_limits_of_generation(generator, tokenizer):
    ids = random_ids(2, 6)
    assert generator.greedy_search(ids, m.GenerationConfig(max_length=10, min_new_tokens=9)).shape == (2, 10)
    whole_context = settings(max_new_tokens=500, min_new_tokens=500)
    assert generator.greedy_search(ids, whole_context).shape == (2, 64)
    large = m.TextGenerator(random_model(shape(vocab_size=2000)), tokenizer)  # ids that the tokenizer does not have
    out = large.sample_generate(
        random_ids(64, 4, V=2000), settings(min_new_tokens=8, max_new_tokens=8, temperature=5.0)
    )
    assert out[:, 4:].max() < 300
    penalized = generator.greedy_search(ids, settings(repetition_penalty=1e9, min_new_tokens=12))
    assert all(len(set(row[6:])) == 12 and not set(row[6:]) & set(row[:6]) for row in penalized.tolist())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda g: g.greedy_search(random_ids(1, 64)), "a prompt of 64 tokens leaves no room"),
        (lambda g: g.greedy_search(torch.tensor([[300]])), "prompt ids lie in"),
        (
            lambda g: g.beam_search(random_ids(2, 6), m.GenerationConfig(max_length=6, num_beams=2)),
            "max_length=6 leaves nothing",
        ),
        (
            lambda g: g.greedy_search(random_ids(2, 6), attention_mask=torch.tensor([[1] * 6, [1] * 5 + [0]])),
            "padded on the left",
        ),
        (lambda g: g.greedy_search(random_ids(2, 6).float()), "integers"),
        (lambda g: next(g.stream("x", settings(num_beams=2))), "cannot stream"),
    ],
)
def test_what_cannot_be_generated_is_one_message(generator, write, message):
    with pytest.raises(m.UserError, match=message):
        write(generator)


# ======================================================================================================================
# 8 Runs
# ======================================================================================================================


def test_a_checkpoint_is_what_was_saved_and_the_one_before_stays(tmp_path):
    """Worked example: of three saves the last is in checkpoint.pt, the second in checkpoint.prev.pt, and no more."""
    path = tmp_path / "run/checkpoint.pt"
    assert not m.holds_run(path.parent)
    for step in (1, 2, 3):
        m.save_checkpoint(path, {"step": step, "model": {"w": torch.full((2, 2), step / 2)}})
    assert same(m.load_checkpoint(path), {"step": 3, "model": {"w": torch.tensor([[1.5, 1.5], [1.5, 1.5]])}})
    assert m.load_checkpoint(path.with_name("checkpoint.prev.pt"))["step"] == 2
    assert {p.name for p in path.parent.iterdir()} == {"checkpoint.pt", "checkpoint.prev.pt"}
    path.unlink()
    assert m.holds_run(path.parent)  # the one before is enough to go on


def test_figures_in_words():
    """Worked example: known figures in their form and order, others by their name, absent ones left out."""
    result = {"exact_match": 0.5, "loss": 1.23456, "tokens": 12345, "my_part": 0.000123456}
    assert m.describe(result) == "loss 1.2346, exact match 50.0%, 12,345 tokens"
    assert m.describe(result, ("my_part", "loss", "bpb")) == "my part 0.0001235, loss 1.2346"


def test_metrics_are_a_row_a_line(tmp_path):
    """Worked example: two whole rows are read; a third that a kill cut short, without its line end, is not."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert m.read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    with pytest.raises(m.UserError, match="has no metrics.jsonl"):
        m.read_metrics(tmp_path / "nowhere")


def test_the_newest_run_is_the_one_saved_last(tmp_path):
    """Worked example: b/sft was saved after a/pretrain; a reward model cannot write, and an old run is set aside."""
    for age, run in enumerate(("a/pretrain", "b/sft", "b/reward", "b/sft.old-7")):
        m.save_checkpoint(tmp_path / run / "checkpoint.pt", {"step": 1})
        os.utime(tmp_path / run / "checkpoint.pt", (1e9 + age, 1e9 + age))
    assert m.newest_run(tmp_path) == tmp_path / "b/sft"
    with pytest.raises(m.UserError, match="no run in"):
        m.newest_run(tmp_path / "a")


def test_the_first_signal_is_noted_and_the_second_interrupts():
    """Worked example: SIGTERM, then SIGINT; afterwards the handlers are those from before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with m.catch_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_signal_that_asks_for_an_end_is_noted(name):
    with m.catch_signals() as caught:
        signal.raise_signal(getattr(signal, name))
    assert caught == [getattr(signal, name)]


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with m.catch_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ["ENOLCK", "EOPNOTSUPP", "EINPROGRESS"])
def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(getattr(errno, number), "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked.*no locks here"), m.locked(tmp_path):
        pass


@pytest.fixture
def overfitted(tmp_path, tokenizer) -> Path:
    """A run whose best evaluation was at step 2 of 4, as it said."""
    losses = iter([3.0, 2.0, 2.5, 4.0])

    class Measured(m.PreTrainer):
        def measure(self, batch):
            return super().measure(batch) | {"loss": (next(losses), 1)}

    config = m.TrainConfig(max_steps=4, eval_every=1, warmup_steps=0, sample_tokens=0)
    data = {"train_data": [lm_batch(2, 8)], "val_data": [lm_batch(2, 8)], "run_dir": tmp_path / "overfitted"}
    says = r"become worse, in the end loss 4\.0000.*best: the evaluation of step 2 \(loss 2\.0000"
    with pytest.warns(UserWarning, match=says):
        Measured(random_model(shape()), tokenizer, config=config, **data).fit()
    return tmp_path / "overfitted"


def test_a_run_is_its_best_evaluation_unless_the_last_is_wanted(overfitted):
    for which, name, step in (("best", "best.pt", 2), ("last", "checkpoint.pt", 4)):
        model, _, state = m.load_run(overfitted, which=which)
        assert state["step"] == step and same(
            dict(model.state_dict()), dict(m.load_checkpoint(overfitted / name)["model"])
        )
    assert m.load_run(overfitted)[2]["step"] == 2
    trainer = trainer_for(m.BPETokenizer.load(overfitted / "tokenizer.json"), m.TrainConfig())
    trainer.load_checkpoint(overfitted / "checkpoint.pt")
    assert (trainer.step_count, trainer.best, trainer.best_figures["step"]) == (4, -2.0, 2)


@pytest.mark.parametrize(("losses", "worse"), [([2.0, 3.0, 2.5], True), ([2.0, 3.0, 1.5], False), ([2.0, 2.01], False)])
def test_training_that_has_only_done_harm_says_so(tmp_path, tokenizer, losses, worse):
    left = iter(losses)

    class Measured(m.PreTrainer):
        stage = "mine"  # evaluated before the first step, as all but pretraining

        def measure(self, batch):
            return super().measure(batch) | {"loss": (next(left), 1)}

    config = m.TrainConfig(max_steps=len(losses) - 1, eval_every=1, warmup_steps=0, sample_tokens=0)
    data = {"train_data": [lm_batch(2, 8)], "val_data": [lm_batch(2, 8)], "run_dir": tmp_path}
    trainer = Measured(random_model(shape()), tokenizer, config=config, **data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
    says = [str(warning.message) for warning in caught if "before the first step" in str(warning.message)]
    assert len(says) == worse and all("loss 2.0000" in text and "--learning-rate" in text for text in says)


@pytest.mark.parametrize(("last", "says"), [(2.01, True), (1.5, False)])
def test_the_best_evaluation_is_named_unless_it_is_the_last(tmp_path, tokenizer, capsys, last, says):
    losses = iter([2.0, last])

    class Measured(m.PreTrainer):
        def measure(self, batch):
            return super().measure(batch) | {"loss": (next(losses), 1)}

    config = m.TrainConfig(max_steps=2, eval_every=1, warmup_steps=0, sample_tokens=0)
    data = {"train_data": [lm_batch(2, 8)], "val_data": [lm_batch(2, 8)], "run_dir": tmp_path}
    Measured(random_model(shape()), tokenizer, config=config, **data).fit()
    out = capsys.readouterr().out
    assert ("best: the evaluation of step 1 (loss 2.0000" in out) == ("best: the evaluation" in out) == says


def test_a_best_that_is_damaged_or_of_another_run_is_not_taken(overfitted, tmp_path):
    best, content = overfitted / "best.pt", (overfitted / "best.pt").read_bytes()
    best.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"best.pt is damaged.*taking the last weights, in checkpoint.pt"):
        assert m.load_run(overfitted)[2]["step"] == 4
    state = m.load_checkpoint(overfitted / "checkpoint.pt")
    for changed in ({"tokenizer_hash": "0"}, {"config": state["config"] | {"stage": "sft"}}):
        m.save_checkpoint(best, state | changed)
        with pytest.warns(UserWarning, match=r"best.pt is not of this run: taking the last"):
            assert m.load_run(overfitted)[2]["step"] == 4
    for path in overfitted.glob("checkpoint*.pt"):
        path.unlink()
    with pytest.raises(m.UserError, match="holds a run already"):  # with a best.pt that a new run might leave behind
        trainer_for(
            m.BPETokenizer.load(overfitted / "tokenizer.json"),
            m.TrainConfig(max_steps=1),
            train_data=[lm_batch(2, 8)],
            run_dir=overfitted,
        ).fit()


def test_a_fingerprint_is_of_the_weights():
    """Worked example: equal weights, equal fingerprints; one weight moves by one unit in the last place, another."""
    model, twin = random_model(shape()), random_model(shape())
    assert m.fingerprint(model) == m.fingerprint(twin)
    with torch.no_grad():
        twin.norm.weight[0] = torch.nextafter(twin.norm.weight[0], torch.tensor(math.inf))
    assert m.fingerprint(model) != m.fingerprint(twin)


def test_the_progress_line(capsys, monkeypatch):
    """Worked example: into a pipe a line every ten seconds, on a terminal one line again and again."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    line = m.ProgressLine()
    for second in (0, 4, 9, 10, 19):
        now[0] = second
        line.show(f"at {second} s")
    assert capsys.readouterr().out == "at 0 s\nat 10 s\n"
    line.live = True
    line.show("long text")
    line.show("short")
    line.say("stays")
    assert capsys.readouterr().out == "\rlong text\rshort    \r     \rstays\n"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        m.save_checkpoint(path, {"step": step, "model": {"w": torch.arange(1000.0) * step}})
    whole = path.read_bytes()
    assert m.load_checkpoint(path)["step"] == 2 and len(list(tmp_path.iterdir())) == 2
    at = whole.index(struct.pack("<2f", 500.0, 502.0))
    flipped = bytearray(whole)
    flipped[at] ^= 1
    for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="checkpoint.pt is damaged.*checkpoint.prev.pt"):
            assert m.load_checkpoint(path)["step"] == 1
    path.unlink()
    with pytest.warns(UserWarning, match="does not exist"):
        assert m.load_checkpoint(path)["step"] == 1
    (tmp_path / "checkpoint.prev.pt").write_bytes(b"")
    with pytest.raises(m.UserError, match="no checkpoint can be read"):
        m.load_checkpoint(path)


def test_a_repaired_checkpoint_survives_the_next_save(tmp_path):
    """The next save makes checkpoint.pt the one before: a damaged one must not push the good one out."""
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        m.save_checkpoint(path, {"step": step})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged"):
        assert m.load_checkpoint(path, repair=True)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"] and m.load_checkpoint(path)["step"] == 1
    m.save_checkpoint(path, {"step": 3})
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert m.load_checkpoint(path)["step"] == 1


def test_three_hundred_damaged_checkpoints(tmp_path):
    """Truncated or with a flipped bit: what loads is what was saved last, or with a warning what was saved before."""
    path, draw = tmp_path / "checkpoint.pt", torch.Generator().manual_seed(0)
    states = [{"step": k, "model": {"w": torch.arange(500.0) * k}, "text": f"step {k}"} for k in (1, 2)]
    for state in states:
        m.save_checkpoint(path, dict(state))
    whole, noticed = path.read_bytes(), 0
    for k in range(300):
        at = int(torch.randint(0, len(whole), (), generator=draw))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << k % 8
        path.write_bytes(whole[:at] if k % 3 == 0 else damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = m.load_checkpoint(path)
        wanted = states[0] if caught else states[1]  # zip files have bytes that nobody reads
        assert same(loaded, wanted), at
        noticed += bool(caught)
    assert noticed > 200


def test_every_flipped_bit_of_the_content_is_noticed(tmp_path):
    """Each byte of each part of the zip (pickle, tensors, version): its checksum speaks for all of them."""
    path = tmp_path / "checkpoint.pt"
    m.save_checkpoint(path, {"step": 1})
    m.save_checkpoint(path, {"step": 2, "w": torch.arange(5.0)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [whole.index(archive.read(name), info.header_offset) for name, info in archive.NameToInfo.items()]
        sizes = [info.file_size for info in archive.infolist()]
    places = [at + k for at, size in zip(parts, sizes, strict=True) for k in range(size)]
    assert len(places) > 100
    for k, at in enumerate(places):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << k % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged"):
            assert m.load_checkpoint(path)["step"] == 1, at


def test_checkpoints_run_no_code(tmp_path):
    torch.save({"x": Path("evil")}, tmp_path / "checkpoint.pt")
    with pytest.raises(m.UserError, match="no checkpoint can be read"):
        m.load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_whole_checkpoint_of_something_else_is_one_message(trained_runs, tmp_path):
    shutil.copytree(trained_runs / "pretrain", tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    state = m.load_checkpoint(tmp_path / "run/checkpoint.pt")
    shrunk = state["model"] | {"norm.weight": torch.ones(3)}
    for changed in ({"step": 1}, state | {"config": {}}, state | {"model": {}}, state | {"model": shrunk}):
        m.save_checkpoint(tmp_path / "run/checkpoint.pt", changed)
        with pytest.raises(m.UserError, match="checkpoint.pt does not hold such a run"):
            m.load_run(tmp_path / "run")
    torch.save([1, 2], tmp_path / "run/checkpoint.pt")
    (tmp_path / "run/checkpoint.prev.pt").unlink()
    with pytest.raises(m.UserError, match="it holds no dict"):
        m.load_run(tmp_path / "run")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, p=plain: (calls.append(n), p(*args))[1])
    m.save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the directory


def test_metrics_that_a_kill_cut_short_are_read(trained_runs, tmp_path):
    rows = m.read_metrics(trained_runs / "pretrain")
    text = (trained_runs / "pretrain/metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    assert m.read_metrics(tmp_path) == rows
    (tmp_path / "metrics.jsonl").write_text("nonsense\n" + text)
    with pytest.raises(m.UserError, match=r"metrics.jsonl:1"):
        m.read_metrics(tmp_path)


def test_metrics_of_steps_that_a_resumed_run_repeats_are_dropped(tmp_path, tokenizer):
    for steps in (2, 4):
        config = m.TrainConfig(max_steps=steps, log_every=1, warmup_steps=0, sample_tokens=0)
        trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path)
        if steps == 4:
            with open(tmp_path / "metrics.jsonl", "a") as file:  # of the steps before a kill
                file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "loss": 9.0}\n')
            trainer.load_checkpoint(tmp_path / "checkpoint.pt")
        trainer.fit()
    rows = m.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["loss"] < 9 for row in rows)


def test_metrics_that_are_none_stop_a_resumed_run_before_it_changes_anything(trained_runs, tmp_path):
    run = tmp_path / "tiny/pretrain"
    shutil.copytree(trained_runs / "pretrain", run)
    metrics, tokenizer = run / "metrics.jsonl", m.BPETokenizer.load(run / "tokenizer.json")
    whole = metrics.read_bytes()
    for line in (b"garbage", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"\xff\xfe"):
        metrics.write_bytes(whole + line + b"\n")
        before = everything(tmp_path)
        trainer = trainer_for(tokenizer, m.TrainConfig(max_steps=3), train_data=[lm_batch(2, 16)], run_dir=run)
        trainer.step_count = 1
        with pytest.raises(m.UserError, match="metrics.jsonl:[0-9]+: not a row"):
            trainer.fit()
        assert everything(tmp_path) == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", [shape(dropout=0.1), moe_shape(dropout=0.1)], ids=["dense", "moe"])
def test_interrupted_and_resumed_equals_straight(tmp_path, corpus, tokenizer, optimizer, config):
    def run(name: str, steps: int, resume: bool = False) -> m.PreTrainer:
        torch.manual_seed(7)
        settings = m.TrainConfig(
            batch_size=4,
            seq_len=16,
            max_steps=20,
            warmup_steps=3,
            optimizer=optimizer,
            eval_every=4,
            save_every=3,
            eval_tokens=200,
            sample_tokens=4,
            accumulation_steps=2,
        )
        data, val = (
            m.PretrainDataLoader(corpus, tokenizer, 4, 16, split, cache_dir=tmp_path / "c")
            for split in ("train", "val")
        )
        trainer = m.PreTrainer(
            m.MiniGPT(config), tokenizer, config=settings, train_data=data, val_data=val, run_dir=tmp_path / name
        )
        if resume:
            torch.manual_seed(99)  # whatever the new process has drawn so far
            trainer.load_checkpoint(tmp_path / name / "checkpoint.pt")
        plain_step = trainer.step

        def step(batches):
            if trainer.step_count == steps:
                raise KeyboardInterrupt
            return plain_step(batches)

        trainer.step = step
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
        return trainer

    straight = run("straight", 20)
    run("broken", 11)  # the last checkpoint is that of step 9
    resumed = run("broken", 20, resume=True)
    assert straight.step_count == resumed.step_count == 20
    for part in (
        lambda t: t.model.state_dict(),
        lambda t: {name: optimizer.state_dict() for name, optimizer in t.optimizers.items()},
        lambda t: t.train_data.state_dict(),
        lambda t: {name: getattr(t, name) for name in t.counters},
    ):
        assert same(part(straight), part(resumed))


# -- checkpoints of the version before this one, which have no "format" ------------------------------------------------


def of_the_old_version(state: dict) -> dict:
    """The checkpoint that the old version would have written in the place of `state`, key by key."""
    config, counters = state["config"], state["counters"]
    options = {("answer_tokens" if name == "reply_tokens" else name): v for name, v in config["train"].items()}
    rl = dataclasses.asdict(m.RLHFConfig()) | {"kl_target": 0.0, "kl_horizon": 2000}  # every stage had them
    return {
        "model": state["model"],
        "critic": [state["critic"]] if "critic" in state else [],
        "optimizers": list(state["optimizers"].values()),
        "scaler": state["scaler"],
        "rng": state["rng"],
        "config": config | {"train": options, "rl": rl},
        "data": state["data"],
        "tokenizer_hash": state["tokenizer_hash"],
        "step": state["step"],
        "tokens": counters["tokens_seen"],
        "skipped": counters["skipped"],
        "skipped_in_row": counters["skipped_in_row"],
        "micro_splits": counters["micro_splits"],
        "extra": state["extra"] | ({"kl_coef": 0.05} if "critic" in state else {}),
        "best": counters["best"],
        "finished": state["finished"],
        "elapsed_s": state["elapsed_s"],
        "digest": "0" * 64,
    }


@pytest.fixture(scope="session")
def old_runs(trained_runs, tmp_path_factory) -> Path:
    """An --out with the runs pretrain, reward and ppo (with a critic) as the old version left them."""
    out = tmp_path_factory.mktemp("old")
    shutil.copytree(trained_runs / "data", out / "data")
    for stage in ("pretrain", "reward"):
        shutil.copytree(trained_runs / stage, out / "tiny" / stage)
    stage_trainer(trained_runs, "ppo", out / "tiny/ppo", config=stage_config(max_steps=1)).fit()
    for run in (out / "tiny").iterdir():
        state = of_the_old_version(m.load_checkpoint(run / "checkpoint.pt"))
        assert "format" not in state
        (run / "checkpoint.prev.pt").unlink(missing_ok=True)
        m.save_checkpoint(run / "checkpoint.pt", state)
        (run / "config.json").write_text(json.dumps(state["config"]))
    return out


@pytest.mark.parametrize("stage", ["pretrain", "reward", "ppo"])
def test_a_run_of_the_old_version_is_loaded(trained_runs, old_runs, stage):
    model, tokenizer, state = m.load_run(old_runs / "tiny" / stage)
    assert same(dict(model.state_dict()), dict(state["model"])) and state["step"] > 0
    assert isinstance(model, m.RewardModel) == (stage == "reward") and not model.training
    if stage != "ppo":
        assert same(model.state_dict(), m.load_run(trained_runs / stage)[0].state_dict())
    if stage == "reward":
        assert isinstance(m.load_reward(str(old_runs / "tiny/reward"), tokenizer), m.RewardModel)


@pytest.mark.parametrize("stage", ["pretrain", "reward", "ppo"])
def test_a_run_of_the_old_version_is_evaluated_continued_and_trained_further(old_runs, tmp_path, stage, capsys):
    run, data = str(old_runs / "tiny" / stage), data_flags(old_runs)
    before = everything(old_runs)
    common = ["--init", run, "--out", str(tmp_path), *data]
    assert train.main(["--stage", "eval", *common, "--reply-tokens", "6"]) == 0
    if stage == "reward":
        assert train.main(["--stage", "reward", *common, *quick("reward"), "--max-steps", "1"]) == 0
    else:
        assert sample.main(["--run", run, "--prompt", "cat", "--max-new-tokens", "3"]) == 0
        assert train.main(["--stage", "sft", *common, *QUICK, "--max-steps", "1"]) == 0
    saved = m.load_checkpoint(tmp_path / "tiny" / ("reward" if stage == "reward" else "sft") / "checkpoint.pt")
    assert saved["format"] == m.FORMAT and everything(old_runs) == before


@pytest.mark.parametrize("stage", ["pretrain", "reward", "ppo"])
def test_a_run_of_the_old_version_is_not_resumed(old_runs, stage, capsys):
    before = everything(old_runs)
    argv = ["--stage", stage, "--out", str(old_runs), *data_flags(old_runs), *quick(stage), "--max-steps", "9"]
    if stage != "pretrain":
        argv += ["--init", str(old_runs / "tiny/pretrain")]
    assert train.main([*argv, "--resume"]) == 2
    error = one_error(capsys)
    assert f"{stage}/checkpoint.pt is of an older version" in error and "--init" in error
    assert everything(old_runs) == before


def test_a_pipeline_goes_on_after_finished_stages_of_the_old_version(old_runs, tmp_path, capsys):
    shutil.copytree(old_runs / "tiny", tmp_path / "tiny")
    stages = {stage: m.RLHFPipeline.is_finished(tmp_path / "tiny" / stage) for stage in ("sft", "reward", "ppo")}
    assert stages == {"sft": False, "reward": True, "ppo": True}
    argv = ["--stage", "rlhf", "--out", str(tmp_path), *data_flags(old_runs), *QUICK, "--max-steps", "1"]
    assert train.main(argv) == 0
    assert "ppo: finished already" in capsys.readouterr().out


# ======================================================================================================================
# 9 Trainers
# ======================================================================================================================


class Number(torch.nn.Module):
    """A model of one weight, which starts at 0."""

    config = shape()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def flops_per_token(self, seq_len: int) -> int:
        return 6


class NumberTrainer(m.Trainer):
    """Fits the number to the ids: the loss is the mean of (weight - id)²; beside it the mean id."""

    def loss(self, batch):
        x = batch["input_ids"].float()
        return (self.model.weight - x).square().sum(), {"mean_id": x.sum()}

    def count(self, batch):
        return batch["input_ids"].numel()


def test_a_trainer_of_ones_own_by_hand(tokenizer):
    """Worked example: batches [1, 2] and [6] are one update, of the three numbers' mean loss (1 + 4 + 36) / 3.

    The gradient is -2 · (1 + 2 + 6) / 3 = -6, clipped to -1; the first update of AdamW is the learning rate whatever
    the gradient is. A part of the loss that has a name is averaged alike: (1 + 2 + 6) / 3.
    """
    config = m.TrainConfig(warmup_steps=2, learning_rate=0.5, schedule="constant", optimizer="adamw", weight_decay=0.0)
    trainer = NumberTrainer(Number(), tokenizer, config=config)
    metrics = trainer.update([{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[6]])}])
    assert metrics == pytest.approx(
        {"loss": 41 / 3, "mean_id": 3.0, "count": 3, "grad_norm": 6.0, "lr": 0.25}, rel=1e-6
    )
    assert trainer.model.weight.item() == pytest.approx(0.25)
    assert trainer.step_count == 0  # a step of the run is what `step` makes


class WithPart(m.PreTrainer):
    """Pretraining that also reports "z", the mean id of the labels."""

    def loss(self, batch):
        labels = batch["labels"][:, 1:]
        return super().loss(batch), {"z": labels[labels != -100].float().sum()}


def test_a_line_of_metrics_holds_the_means_of_its_steps_by_hand(tmp_path, tokenizer, capsys):
    """Worked example: log_every=3 gives lines after step 1, of steps 2 and 3, and of steps 4 to 6.

    Everything is the mean of the steps, but the learning rate the last one, and tokens the sum so far. "z" of a step
    is Σ / Σ over its two batches, which hold unequally many trained tokens.
    """
    batches = [lm_batch(B, T, seed=B, ragged=True) for B, T in ((4, 12), (1, 20), (3, 9), (6, 7), (2, 15), (5, 11))]
    config = m.TrainConfig(max_steps=6, log_every=3, accumulation_steps=2, warmup_steps=2, sample_tokens=0)
    trainer = WithPart(random_model(shape()), tokenizer, config=config, train_data=batches, run_dir=tmp_path / "run")
    steps, plain, z = [], trainer.step, []
    trainer.step = lambda batches: steps.append(plain(batches)) or dict(steps[-1])
    trainer.fit()
    rows = [row for row in m.read_metrics(tmp_path / "run") if "loss" in row]
    for k in range(3):
        labels = [batch["labels"][:, 1:] for batch in batches[2 * k : 2 * k + 2]]
        trained = torch.cat([own[own != -100] for own in labels]).tolist()
        assert steps[k]["count"] == steps[k + 3]["count"] == len(trained)
        z.append(sum(trained) / len(trained))
    assert [step["z"] for step in steps] == pytest.approx(2 * z, rel=1e-6) and max(z) - min(z) > 1
    assert [row["step"] for row in rows] == [1, 3, 6]
    for row, window in zip(rows, (steps[:1], steps[1:3], steps[3:]), strict=True):
        for name in ("loss", "grad_norm", "z"):
            assert row[name] == pytest.approx(sum(step[name] for step in window) / len(window), rel=1e-9), name
        assert row["lr"] == window[-1]["lr"] and not row.keys() & {"count", "flops"}
        assert row["tokens"] == sum(step["tokens"] for step in steps[: row["step"]])
    assert rows[1]["grad_norm"] != steps[2]["grad_norm"] and rows[2]["lr"] != rows[1]["lr"] != steps[1]["lr"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step     1"))
    assert f"loss {steps[0]['loss']:.4f}, z {z[0]:.4g} |" in line


def test_tokens_and_operations_of_a_step_by_hand(tokenizer):
    """Worked example: rows of 9 and 5 ids are 8 and 4 inputs; operations are those of the first batch's width."""
    trainer = trainer_for(tokenizer)
    metrics = trainer.step([lm_batch(2, 9), lm_batch(3, 5)])
    assert metrics["tokens"] == 2 * 8 + 3 * 4 and metrics["flops"] == 28 * trainer.model.flops_per_token(8)
    padded = lm_batch(2, 9) | {"attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5])}
    assert trainer.tokens(padded) == 13  # padding is not counted


def test_the_time_that_is_left_by_hand(tmp_path, tokenizer, monkeypatch, capsys):
    """Worked example: steps take ten seconds, so twenty are left after step 4 of 6, the first of a resumption, too."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    shown = []
    for steps in (3, 6):
        config = m.TrainConfig(max_steps=steps, log_every=1, warmup_steps=0, sample_tokens=0)
        trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path)
        if steps == 6:
            trainer.load_checkpoint(tmp_path / "checkpoint.pt")
        plain = trainer.step

        def step(batches, plain=plain):
            clock[0] += 10
            return plain(batches)

        trainer.step = step
        trainer.fit()
        out = capsys.readouterr().out
        shown += re.findall(r"step +(\d+) .* eta (\d:\d\d) ", out)
        assert out.count(" | 1 tok/s |") == 3  # 2 rows predict 7 tokens each: not 0.0k
    assert shown == [("1", "0:20"), ("2", "0:10"), ("3", "0:00"), ("4", "0:20"), ("5", "0:10"), ("6", "0:00")]


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.5])
def test_epochs_end_a_run_by_hand(tmp_path, tokenizer, corpus, epochs):
    """Worked example: of a plain list of 4 batches, 2 a step, and of a loader with 6 batches, 1 a step."""
    loader = m.PretrainDataLoader(corpus, tokenizer, 8, 32, "all", cache_dir=tmp_path / "cache")
    loader.tokens = loader.tokens[: 32 * 48 + 32]  # 48 blocks whatever the offset
    for data, accumulation, steps in (
        ([lm_batch(2, 8)] * 4, 2, {0.5: 1, 1.0: 2, 2.5: 5}),
        (loader, 1, {0.5: 3, 1.0: 6, 2.5: 15}),
    ):
        config = m.TrainConfig(
            epochs=epochs,
            accumulation_steps=accumulation,
            warmup_steps=0,
            sample_tokens=0,
            log_every=1,
            schedule="wsd",
            decay_fraction=1.0,
        )
        run_dir = tmp_path / str(accumulation)
        trainer = trainer_for(tokenizer, config, train_data=data, run_dir=run_dir)
        trainer.fit()
        assert trainer.step_count == steps[epochs] and trainer.progress() == 1
        rates = [row["lr"] for row in m.read_metrics(run_dir)]
        assert rates == pytest.approx([3e-3 * (1 - k / steps[epochs]) for k in range(steps[epochs])])  # a straight line
        with pytest.raises(m.UserError, match=f"the run is over: {steps[epochs]} steps, {epochs:.3g} epochs"):
            trainer.fit()


def test_the_first_limit_that_is_reached_ends_a_run(tmp_path, tokenizer):
    for limits, steps in (({"epochs": 1.0, "max_steps": 2}, 2), ({"epochs": 1.0, "max_steps": 9}, 4)):
        config = m.TrainConfig(**limits, warmup_steps=0, sample_tokens=0)
        trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)] * 4, run_dir=tmp_path / str(steps))
        trainer.fit()
        assert trainer.step_count == steps


def test_epochs_of_a_resumed_run_go_on(tmp_path, tokenizer, corpus):
    steps = []
    for epochs in (1.0, 2.0):
        loader = m.PretrainDataLoader(corpus, tokenizer, 8, 32, "all", cache_dir=tmp_path / "cache")
        config = m.TrainConfig(epochs=epochs, warmup_steps=0, sample_tokens=0)
        trainer = trainer_for(tokenizer, config, train_data=loader, run_dir=tmp_path / "run")
        if epochs > 1:
            trainer.load_checkpoint(tmp_path / "run/checkpoint.pt")
            assert trainer.epochs_done == 1
        trainer.fit()
        steps.append(trainer.step_count)
    assert steps[1] in range(2 * steps[0] - 1, 2 * steps[0] + 2)


def test_epochs_of_data_without_a_length_are_refused(tmp_path, tokenizer):
    class Stream:
        def __iter__(self):
            return iter([lm_batch(2, 8)])

    trainer = trainer_for(tokenizer, m.TrainConfig(epochs=1.0), train_data=Stream(), run_dir=tmp_path / "run")
    with pytest.raises(m.UserError, match="epochs need train_data with a length"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("eval_every", "limits", "steps"),
    [
        (250, {"epochs": 3.0}, [4, 8, 12]),
        (250, {"max_steps": 12}, [12]),
        (0, {"epochs": 3.0}, [12]),
        (3, {"epochs": 2.0}, [3, 6, 8]),
    ],
)
def test_short_epochs_end_in_an_evaluation_by_hand(tmp_path, tokenizer, eval_every, limits, steps):
    data = [lm_batch(2, 8)] * 4
    config = m.TrainConfig(**limits, eval_every=eval_every, warmup_steps=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=data, val_data=data, run_dir=tmp_path)
    trainer.fit()
    assert [row["step"] for row in m.read_metrics(tmp_path) if "val_loss" in row] == steps


def test_exact_match_by_hand(tmp_path, tokenizer, monkeypatch):
    """Worked example: of five chats the first has no answer to check, the third no room for a reply.

    The first three that can be checked are taken, so two are asked, one of them is right, and the last one never.
    """
    records = [
        {"messages": turns("hm?", "ah")},
        {"messages": turns("2 + 2?", "4"), "answer": "4"},
        {"messages": turns("x" * 50, "y"), "answer": "y"},
        {"messages": turns("1 + 2?", "3"), "answer": 3},
        {"messages": turns("9 + 2?", "11"), "answer": "11"},
    ]
    val = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=128)
    config = m.TrainConfig(eval_prompts=3, reply_tokens=20)
    trainer = m.SFTTrainer(random_model(shape()), tokenizer, config=config, val_data=val)
    trainer.model.config.max_position_embeddings, asked = 64, []
    monkeypatch.setattr(trainer, "replies", lambda prompts: asked.extend(prompts) or ["4. Sure!", "4"])
    assert trainer.exact_match() == {"exact_match": 0.5}
    chats = [turns("2 + 2?"), turns("1 + 2?")]
    assert asked == [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    val = load(m.ConversationDataLoader, tmp_path, tokenizer, records[:1], "none.jsonl", seq_len=128)
    assert m.SFTTrainer(random_model(shape()), tokenizer, config=config, val_data=val).exact_match() == {}


def test_reward_trainer_scores_by_hand(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=5)
    model = m.RewardModel(random_model(shape(max_position_embeddings=128)))
    torch.nn.init.normal_(model.score.weight)
    rl = m.RLHFConfig(reward_center_coef=0.1, reward_sft_coef=0.25)
    trainer = m.RewardTrainer(model, tokenizer, val_data=loader, rl_config=rl)
    with torch.no_grad():
        alone = torch.tensor([[model(loader.sequence(i, s)[0][None]) for s in (0, 1)] for i in loader.items])
    gaps = alone[:, 0] - alone[:, 1]
    total = (-F.logsigmoid(gaps) + 0.1 * alone.sum(dim=1).square()).sum().item()
    for i in loader.items:  # and each chosen reply's mean loss a token
        ids, trained = loader.sequence(i, 0)
        labels = ids.where(trained, -100)[1:]
        with torch.no_grad():
            total += 0.25 * F.cross_entropy(m.MiniGPT.forward(model, ids[None])[0, :-1], labels).item()
    assert sum(trainer.loss(batch).item() for batch in loader) == pytest.approx(total, rel=1e-4)
    result = trainer.evaluate()
    assert result["loss"] == pytest.approx(-F.logsigmoid(gaps).mean().item(), abs=1e-4)
    assert result["pair_accuracy"] == pytest.approx((gaps > 0).float().mean().item())
    for k, name in enumerate("ab"):
        assert result[f"pair_accuracy_{name}"] == pytest.approx((gaps[k::2] > 0).float().mean().item())
    lengths = torch.tensor([[len(loader.sequence(i, s)[0]) for s in (0, 1)] for i in loader.items])
    assert result["tokens"] == lengths.sum()
    longer = (lengths[:, 0] - lengths[:, 1]).sign()
    assert result["longer_accuracy"] == pytest.approx(((longer + 1) / 2).mean().item())
    assert "第" not in trainer.samples() and "问题 0? → 好 [" in trainer.samples()


# -- one update --------------------------------------------------------------------------------------------------------


def gradients(trainer: m.Trainer, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients, before they are clipped, of one update; the weights stay as they are."""
    before, grads = copy.deepcopy(trainer.trained.state_dict()), {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: grads.update({name: p.grad.clone()}))
        for name, p in trainer.trained.named_parameters()
    ]
    loss = trainer.update(batches)["loss"]
    for hook in hooks:
        hook.remove()
    trainer.trained.load_state_dict(before)
    return loss, grads


def test_accumulation_is_weighted_by_tokens(tokenizer):
    rows = lm_batch(8, 20, ragged=True)
    trainer = trainer_for(tokenizer, dtype=torch.float64)
    _, one = gradients(trainer, [rows])
    _, eight = gradients(trainer, [{k: v[i : i + 1] for k, v in rows.items()} for i in range(8)])
    for name, grad in one.items():
        torch.testing.assert_close(eight[name], grad, rtol=0, atol=1e-10)
    logits = trainer.model(rows["input_ids"])[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=-100)
    for (name, p), grad in zip(
        trainer.model.named_parameters(), torch.autograd.grad(plain, list(trainer.model.parameters())), strict=True
    ):
        torch.testing.assert_close(one[f"model.{name}"], grad, rtol=0, atol=1e-10, msg=name)
        assert p.grad is None


def test_labels_are_shifted_by_one_and_ends_are_trained(tokenizer):
    trainer = trainer_for(tokenizer, m.TrainConfig(warmup_steps=0, learning_rate=0.02))
    ids = torch.tensor([[1, 10, 20, 30, 40, tokenizer.eos_id]])
    for _ in range(60):
        trainer.step([{"input_ids": ids, "labels": ids}])
    out = m.TextGenerator(trainer.model, tokenizer).greedy_search(ids[:, :1], settings(max_new_tokens=20))
    assert torch.equal(out, ids)  # the text by heart, and its end


def test_out_of_memory_halves_the_micro_batch_and_changes_no_update(tokenizer, monkeypatch, capsys):
    batch = lm_batch(6, 20, ragged=True)
    calm, pressed = (trainer_for(tokenizer, dtype=torch.float64) for _ in range(2))
    plain_loss = m.PreTrainer.loss

    def cramped(self, batch):
        if len(batch["input_ids"]) > 2:
            plain_loss(self, batch).backward()  # a gradient that must not survive
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain_loss(self, batch)

    calm.step([batch])
    monkeypatch.setattr(m.PreTrainer, "loss", cramped)
    pressed.step([batch])
    says = capsys.readouterr().out
    assert pressed.micro_splits == 4 and "micro-batches of 3 rows" in says and "micro-batches of 2 rows" in says
    for a, b in zip(calm.model.parameters(), pressed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    monkeypatch.setattr(m.PreTrainer, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(m.UserError, match="one row at a time"):
        pressed.step([batch])
    pressed.config.auto_micro_batch = False
    with pytest.raises(torch.OutOfMemoryError):
        pressed.step([batch])


def test_an_error_that_is_no_lack_of_memory_is_raised_at_once(tokenizer):
    calls = []

    def fail(parts):
        calls.append(parts)
        if len(calls) == 1:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        trainer_for(tokenizer).in_memory(fail, 4)
    assert calls == [1]


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def cramped(fn, limit: int):
    """`fn`, which runs out of memory on more rows than `limit`."""

    def limited(rows, *args, **options):
        if len(rows["input_ids"] if isinstance(rows, dict) else rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fn(rows, *args, **options)

    return limited


def test_out_of_memory_splits_evaluations_rollouts_and_scoring(tmp_path, tokenizer, monkeypatch, capsys):
    batches = [lm_batch(6, 20, seed=k, ragged=True) for k in range(2)]
    trainers = [trainer_for(tokenizer, val_data=batches) for _ in range(2)]
    trainers[1].measure = cramped(trainers[1].measure, 2)
    calm, pressed = (trainer.evaluate() for trainer in trainers)
    assert pressed == pytest.approx(calm, rel=1e-6) and trainers[1].micro_splits == 4
    pairs_data = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=6)
    calm = m.DPOTrainer(random_model(shape()), tokenizer, train_data=pairs_data)
    expected, pairs_data.reference_logprobs = pairs_data.reference_logprobs, None
    calm.reference_logprobs = cramped(calm.reference_logprobs, 2)
    calm.cache_reference(pairs_data)
    torch.testing.assert_close(pairs_data.reference_logprobs, expected)
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda *_: 1.0)
    plain = m.TextGenerator.sample_generate
    monkeypatch.setattr(
        m.TextGenerator,
        "sample_generate",
        lambda self, ids, *args: cramped(functools.partial(plain, self), 2)(ids, *args),
    )
    trainer.reference.hidden_states = cramped(trainer.reference.hidden_states, 2)
    experience = trainer.rollout(prompt_batch(tokenizer, ["a", "b", "c", "d", "e"]))[0]
    assert len(experience["input_ids"]) == 5 and trainer.micro_splits == 32
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["evaluate", "update"])
def test_an_error_costs_no_step_that_was_done(tmp_path, tokenizer, monkeypatch, where):
    config = m.TrainConfig(max_steps=9, eval_every=3, save_every=0, auto_micro_batch=False, sample_tokens=0)
    data = [lm_batch(2, 8)]
    trainer = trainer_for(tokenizer, config, train_data=data, val_data=data, run_dir=tmp_path)
    plain = getattr(trainer, where)

    def full(*args):
        if trainer.step_count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args)

    monkeypatch.setattr(trainer, where, full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    state = m.load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 3 and same(dict(state["model"]), dict(trainer.model.state_dict()))


def test_a_step_that_failed_is_done_again(tmp_path, tokenizer, corpus, monkeypatch):
    """Resumed after an error inside a step, a run equals a straight one: no batch and no random number is lost."""
    config = m.TrainConfig(max_steps=5, eval_every=0, save_every=0, sample_tokens=0, seq_len=8)

    def trainer(name):
        data = m.PretrainDataLoader(corpus, tokenizer, 4, 8, cache_dir=tmp_path / "cache")
        model = random_model(shape(dropout=0.3))
        return m.PreTrainer(model, tokenizer, config=config, train_data=data, run_dir=tmp_path / name)

    straight, broken = trainer("straight"), trainer("broken")
    torch.manual_seed(7)
    straight.fit()
    plain = m.PreTrainer.loss

    def fail(self, batch):
        loss = plain(self, batch)  # random numbers are drawn
        if self is broken and self.step_count == 3:
            raise RuntimeError("a worker died")
        return loss

    monkeypatch.setattr(m.PreTrainer, "loss", fail)
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="a worker died"):
        broken.fit()
    resumed = trainer("broken")
    resumed.load_checkpoint(tmp_path / "broken" / "checkpoint.pt")
    assert resumed.step_count == 3 and resumed.train_data.state_dict()["index"] == 12
    resumed.fit()
    assert same(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))


def test_training_that_cannot_be_compiled(tokenizer, monkeypatch, capsys):
    """--compile on is one error; auto, which only CUDA has, says it and goes on."""

    def fail(*_, **__):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    trainer, plain = (trainer_for(tokenizer, m.TrainConfig(compile=mode, warmup_steps=0)) for mode in ("on", "off"))
    with pytest.raises(m.UserError, match=r"training cannot be compiled here .*C\+\+ compiler"):
        trainer.step([lm_batch(2, 8)])
    trainer.config.compile = "auto"
    assert trainer.step([lm_batch(2, 8)])["loss"] == plain.step([lm_batch(2, 8)])["loss"]
    assert "cannot be compiled" in capsys.readouterr().out


def test_steps_that_are_not_finite_are_left_out_of_the_means_by_hand(tmp_path, tokenizer):
    """Worked example: of losses 1, NaN and 3 the mean is 2; of NaN alone there is none."""
    losses = iter([5.0, 1.0, math.nan, 3.0, math.nan])
    config = m.TrainConfig(max_steps=5, log_every=4, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path)
    plain = trainer.step
    trainer.step = lambda batches: plain(batches) | {"loss": next(losses)}
    trainer.fit()
    rows = m.read_metrics(tmp_path)
    assert [row["loss"] for row in rows] == [5.0, 2.0]


def test_float16_with_the_scaler_skips_overflow_and_learns(tokenizer):
    trainer = trainer_for(tokenizer, m.TrainConfig(dtype="float16", warmup_steps=0))
    trainer.step([lm_batch(4, 20)])
    before = weights_of(trainer.model)
    hook = trainer.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * math.inf)
    trainer.step([lm_batch(4, 20)])  # one bad matrix, which only Muon sees, must stop AdamW as well
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.skipped == 1
    hook.remove()
    trainer = trainer_for(tokenizer, m.TrainConfig(dtype="float16", warmup_steps=0))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)  # overflows at first
    before = weights_of(trainer.model)
    trainer.step([lm_batch(4, 20)])
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.skipped == 1
    losses = [trainer.step([lm_batch(4, 20)])["loss"] for _ in range(60)]
    assert trainer.skipped < 20 and losses[-1] < 0.8 * losses[0]


def test_a_step_that_is_not_finite_touches_nothing(tokenizer):
    trainer = trainer_for(tokenizer)
    trainer.step([lm_batch(2, 10)])

    def moments() -> list[dict]:
        return [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers.values()]

    weights, before = weights_of(trainer.model), moments()
    assert all(before)
    hook = trainer.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    trainer.step([lm_batch(2, 10)])
    assert all(map(torch.equal, weights, trainer.model.parameters())) and trainer.skipped == 1
    torch.testing.assert_close(moments(), before, rtol=0, atol=0)
    with pytest.raises(m.UserError, match="not finite in 20 steps in a row"):
        for _ in range(20):
            trainer.step([lm_batch(2, 10)])
    hook.remove()


def test_a_run_that_stays_not_finite_says_where(tmp_path, corpus, tokenizer):
    data = m.PretrainDataLoader(corpus, tokenizer, batch_size=2, seq_len=16, split="all", cache_dir=tmp_path / "cache")
    config = m.TrainConfig(max_steps=50, log_every=1, save_every=4, eval_every=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=data, run_dir=tmp_path / "run")
    plain = trainer.loss
    trainer.loss = lambda batch: plain(batch) * (math.nan if trainer.step_count in (2, *range(5, 50)) else 1)
    where = r"20 steps in a row, up to step 24, before item \d+ of epoch \d+ of the data"
    with pytest.raises(m.UserError, match=where):
        trainer.fit()
    rows = m.read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows][:6] == [0, 0, 1, 1, 1, 2] and rows[2]["loss"] is None
    assert m.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 24


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("config", [shape(num_hidden_layers=1), moe_shape(num_hidden_layers=1)])
def test_compiled_training_learns_the_same(config, tokenizer):
    losses = []
    for mode in ("off", "on"):
        trainer = m.PreTrainer(random_model(config), tokenizer, config=m.TrainConfig(compile=mode, max_steps=5))
        batches = [random_ids(2, 12, seed=k) for k in range(3)]
        losses.append([trainer.step([{"input_ids": ids, "labels": ids}])["loss"] for ids in batches])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_compile_auto_goes_by_the_length_of_a_run(tokenizer):
    for trainer, options, compiles in (
        (m.PreTrainer, {"minutes": 10.0}, True),
        (m.PreTrainer, {"minutes": 9.9}, False),
        (m.PreTrainer, {"max_steps": 5000}, False),  # on a CPU nobody knows how long that takes
        (m.PreTrainer, {"minutes": 10.0, "compile": "off"}, False),
        (m.PreTrainer, {"max_steps": 1, "compile": "on"}, True),
        (m.SFTTrainer, {"minutes": 10.0}, False),
    ):
        built = trainer(random_model(shape()), tokenizer, "cpu", config=m.TrainConfig(**{"max_steps": 0} | options))
        assert built.compiles == compiles == bool(built.model.layers[0]._compiled_call_impl)


@needs_compiler
@pytest.mark.slow
def test_what_is_compiled_is_for_training_alone(tokenizer):
    """Evaluations and samples, with their many shapes, compile nothing: torch keeps eight versions of a function."""
    model, config = random_model(shape(num_hidden_layers=2)), m.TrainConfig(compile="on", max_steps=5)
    trainer = m.PreTrainer(model, tokenizer, config=config, val_data=[lm_batch(3, 9), lm_batch(1, 7)])
    trainer.step([lm_batch(2, 13)])
    torch._dynamo.utils.counters.clear()
    trainer.evaluate()
    trainer.replies([[5, 6], [7]])
    trainer.step([lm_batch(2, 13)])
    assert not torch._dynamo.utils.counters["stats"]
    assert all(block._compiled_call_impl for block in trainer.model.layers)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_cross_entropy_is_the_same(dtype):
    hidden, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((70, 8), (50, 8)))
    labels = random_ids(1, 70, 50, low=0)[0]
    labels[3:9] = -100
    results = []
    for compiled in (False, True):
        loss = m.chunked_cross_entropy(hidden, weight, labels, 32, compiled)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sizes", [(2, 4, 2, 7, 7), (2, 4, 2, 1, 9), (2, 4, 1, 3, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cuda_is_that_of_a_cpu(sizes, causal):
    B, H, K, T, S = sizes
    q, k, v = (torch.randn(B, n, length, 16) for n, length in ((H, T), (K, S), (K, S)))
    visible = (torch.rand(B, 1, T, S) > 0.4) | torch.eye(T, S).bool()
    bias = None if causal and T in (1, S) else m.attention_bias(visible, torch.float32)
    on_cuda = m.attend(*(None if x is None else x.cuda().bfloat16() for x in (q, k, v, bias)))
    torch.testing.assert_close(on_cuda.float().cpu(), m.attend(q, k, v, bias), atol=0.03, rtol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("config", [shape(), moe_shape()])
def test_cuda_decodes_what_a_cpu_does(config, tokenizer):
    model, greedy = random_model(config), settings(do_sample=False)
    written = [m.TextGenerator(model.to(device), tokenizer).generate(["ab", "c"], greedy) for device in ("cpu", "cuda")]
    assert written[0] == written[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 0, "top_p": 0.9}])
def test_a_cuda_graph_decodes_what_single_kernels_do(tokenizer, is_compiled, options):
    model, config = random_model(shape()).cuda(), settings(**{"do_sample": False, "max_new_tokens": 12} | options)
    recorded = m.TextGenerator(model, tokenizer, is_compiled)
    for prompts in (["ab", "c"], ["abc"]):  # with padding, and without
        model.has_fixed_shapes = True
        reply = recorded.generate(prompts, config)
        model.has_fixed_shapes = False
        assert m.TextGenerator(model, tokenizer).generate(prompts, config) == reply


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_graph_outlives_the_weights_that_autocast_cast(tokenizer):
    model, ids = random_model(shape()).cuda(), random_ids(2, 5)
    config = settings(do_sample=False, max_new_tokens=40, min_new_tokens=40)
    generator = m.TextGenerator(model, tokenizer)
    with torch.autocast("cuda", torch.bfloat16):
        expected = generator.greedy_search(ids, config)[:, 5:]
        steps = generator._decode(ids, config)
        tokens = [next(steps)[0] for _ in range(3)]
    taken = [torch.full_like(p, 9.0, dtype=torch.bfloat16) for p in model.parameters()]  # the memory of those weights
    tokens += [step[0] for step in steps]
    assert taken and torch.equal(torch.stack(tokens, dim=1), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_that_no_cuda_graph_can_record(tokenizer):
    model = random_model(shape()).cuda()
    model.norm.register_forward_hook(lambda module, inputs, output: output.sum().item() and None)
    with pytest.raises(m.UserError, match="has_fixed_shapes"):
        m.TextGenerator(model, tokenizer).generate("abc")
    assert torch.cuda.get_sync_debug_mode() == 0 and torch.cuda.current_stream() == torch.cuda.default_stream()
    model.has_fixed_shapes = False
    assert isinstance(m.TextGenerator(model, tokenizer).generate("abc"), str)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_threads_decode_on_cuda_with_one_model(tokenizer):
    """As on the web page. Only the main thread records graphs."""
    generator = m.TextGenerator(random_model(shape()).cuda(), tokenizer)
    config = settings(do_sample=False, max_new_tokens=40, min_new_tokens=40)
    prompts = [f"{i} + {i} =" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        written = [list(pool.map(lambda prompt: generator.generate(prompt, config), prompts)) for _ in range(3)]
    assert written == [[generator.generate(prompt, config) for prompt in prompts]] * 3


# -- runs and evaluations ----------------------------------------------------------------------------------------------


def test_a_trainer_of_ones_own_fits_without_a_row_in_the_table_of_stages(tmp_path, tokenizer, capsys):
    config = m.TrainConfig(max_steps=3, warmup_steps=0)
    data = [{"input_ids": torch.tensor([[1, 2]])}]
    trainer = NumberTrainer(Number(), tokenizer, config=config, train_data=data, run_dir=tmp_path / "run")
    assert trainer.fit() == {} and "mean id 1.5" in capsys.readouterr().out
    assert m.read_metrics(tmp_path / "run")[0]["mean_id"] == 1.5


def test_steps_after_the_last_line_of_metrics_count_as_well(tmp_path, tokenizer):
    """The tokens in a checkpoint are those of all steps, not only of those that were logged."""
    config = m.TrainConfig(max_steps=4, log_every=3, eval_every=0, save_every=2, warmup_steps=0, sample_tokens=0)
    options = {"train_data": [lm_batch(2, 9)], "val_data": [lm_batch(1, 9)], "run_dir": tmp_path / "run"}
    trainer_for(tokenizer, config, **options).fit()
    for name, steps in (("checkpoint.prev.pt", 2), ("checkpoint.pt", 4)):
        state = m.load_checkpoint(tmp_path / "run" / name)
        assert state["step"] == steps and state["counters"]["tokens_seen"] == steps * 2 * 8
    last = m.read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 4 and "val_loss" in last and last["tokens"] == 4 * 2 * 8


def test_the_time_that_is_left_of_minutes_does_not_jump_at_an_evaluation(tmp_path, tokenizer, monkeypatch, capsys):
    """Steps take ten seconds of ten minutes, an evaluation sixty: what is left falls by as much, or a bit more."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    config = m.TrainConfig(minutes=10, compile="off", log_every=1, eval_every=4, warmup_steps=0, sample_tokens=0)
    data = {"train_data": [lm_batch(2, 8)], "val_data": [lm_batch(2, 8)], "run_dir": tmp_path}
    trainer = trainer_for(tokenizer, config, started=1000.0, **data)
    step, evaluate = trainer.step, trainer.evaluate

    def after(seconds, fn, *args):
        clock[0] += seconds
        return fn(*args)

    trainer.step = lambda batches: after(10, step, batches)
    trainer.evaluate = lambda *args: after(60, evaluate, *args)
    trainer.fit()
    left = [60 * int(a) + int(b) for a, b in re.findall(r" eta (\d+):(\d\d) ", capsys.readouterr().out)]
    passed = [10 * (k + 1) + 60 * (k // 4) for k in range(len(left))]
    assert len(left) > 12 and all(600 - t - 70 <= found <= 600 - t for found, t in zip(left, passed, strict=True))


def test_fit_from_python_guards_the_run_and_its_data(tmp_path, tokenizer):
    config = m.TrainConfig(max_steps=4, warmup_steps=0, sample_tokens=0)
    with pytest.raises(m.UserError, match="no more batches"):  # a generator can be gone through once
        trainer_for(tokenizer, config, train_data=(lm_batch(2, 8) for _ in range(3)), run_dir=tmp_path / "a").fit()
    trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "b").fit()
    with pytest.raises(m.UserError, match="holds a run already"):
        trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "b").fit()
    with pytest.raises(m.UserError, match="do not belong together"):
        m.PreTrainer(m.MiniGPT(shape(vocab_size=200)), tokenizer)


def test_a_resumed_run_keeps_its_optimizer(tmp_path, tokenizer):
    """Moments of another optimizer are not those of this one: it is named which one it must be."""
    path = tmp_path / "checkpoint.pt"
    for saved, other in (("muon", "adamw"), ("adamw", "muon")):
        trainer = trainer_for(tokenizer, m.TrainConfig(optimizer=saved, warmup_steps=0))
        trainer.step([lm_batch(2, 8)])
        trainer.save_checkpoint(path)
        changed = trainer_for(tokenizer, m.TrainConfig(optimizer=other, warmup_steps=0))
        weights = weights_of(changed.model)
        with pytest.raises(m.UserError, match=rf"checkpoint\.pt was trained with --optimizer {saved}"):
            changed.load_checkpoint(path)
        assert changed.step_count == 0 and all(map(torch.equal, weights, changed.model.parameters()))
        trainer_for(tokenizer, m.TrainConfig(optimizer=saved, learning_rate=1e-5)).load_checkpoint(path)  # may change


@pytest.mark.parametrize(
    ("stage", "flag", "values"),
    [
        ("sft", "lora_alpha", (4.0, 8.0)),
        ("sft", "lora_rank", (2, 4)),
        ("dpo", "dpo_beta", (0.1, 0.2)),
        ("dpo", "dpo_kind", ("sigmoid", "ipo")),
        ("ppo", "gamma", (1.0, 0.9)),
    ],
)
def test_a_resumed_run_keeps_what_its_weights_mean(tmp_path, trained_runs, stage, flag, values):
    """Everything else, like the learning rate and the precision, may change."""
    runs = []
    for k, value in enumerate(values):
        changes = {"lora_rank": 2} | ({flag: value} if "lora" in flag else {})
        more = {"learning_rate": 1e-4, "dtype": "bfloat16"} if k else {}
        trainer = stage_trainer(trained_runs, stage, tmp_path / "run", config=stage_config(**changes, **more))
        if hasattr(trainer.rl, flag):
            setattr(trainer.rl, flag, value)
        runs.append(trainer)
    runs[0].save_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(m.UserError, match=f"was trained with --{flag.replace('_', '-')} {values[0]}: give that"):
        runs[1].load_checkpoint(tmp_path / "checkpoint.pt")
    setattr(runs[1].rl if hasattr(runs[1].rl, flag) else runs[1].config, flag, values[0])
    if flag != "lora_rank":
        runs[1].load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_resumed_run_takes_the_settings_of_now(tmp_path, tokenizer):
    """Moments come from the checkpoint; decay and the like are those of the flags."""
    trainer = trainer_for(tokenizer, m.TrainConfig(weight_decay=0.1, momentum=0.9, beta1=0.8, warmup_steps=0))
    trainer.step([lm_batch(2, 8)])
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    trainer = trainer_for(tokenizer, m.TrainConfig(weight_decay=0.3, momentum=0.7, beta1=0.6, warmup_steps=0))
    trainer.load_checkpoint(tmp_path / "checkpoint.pt")
    adamw, muon = trainer.optimizers.values()
    assert {(group["weight_decay"], group["momentum"]) for group in muon.param_groups} == {(0.3, 0.7)}
    assert {group["betas"][0] for group in adamw.param_groups} == {0.6} and muon.state_dict()["state"]


def test_weight_decay_grows_with_the_passes_over_the_data(tokenizer):
    trainer = trainer_for(tokenizer, m.TrainConfig(weight_decay=0.1, warmup_steps=0))
    adamw, muon = trainer.optimizers.values()
    for passes, decay in ((0.0, 0.1), (1.0, 0.1), (2.5, 0.25), (10.0, 1.0), (1000.0, 1.0)):
        trainer.epochs_done = passes
        trainer.step([lm_batch(2, 8)])
        assert [group["weight_decay"] for group in muon.param_groups] == [pytest.approx(decay)] * len(muon.param_groups)
        assert {group["weight_decay"] for group in adamw.param_groups if group["params"]} == {0.0}  # norms, embeddings


def test_an_evaluation_that_is_not_finite_does_not_end_the_best_for_good(tmp_path, tokenizer):
    """Of losses NaN, 3, 2, NaN, 2.5 at steps 2, 4, … the best is at step 6, also after a resumption at step 8."""
    losses = iter([math.nan, 3.0, 2.0, math.nan, 2.5])
    best = []

    class Measured(m.PreTrainer):
        def measure(self, batch):
            return super().measure(batch) | {"loss": (next(losses), 1)}

    for steps in (8, 10):
        config = m.TrainConfig(max_steps=steps, eval_every=2, save_every=0, warmup_steps=0, sample_tokens=0)
        data = {"train_data": [lm_batch(2, 8)], "val_data": [lm_batch(2, 8)], "run_dir": tmp_path}
        trainer = Measured(random_model(shape()), tokenizer, config=config, **data)
        if steps == 10:
            trainer.load_checkpoint(tmp_path / "checkpoint.pt")
        plain = trainer.save_checkpoint

        def save(path, plain=plain):
            best.append(m.load_checkpoint(tmp_path / "best.pt")["step"] if (tmp_path / "best.pt").exists() else None)
            plain(path)

        trainer.save_checkpoint = save
        trainer.fit()
    assert best == [None, None, 4, 6, 6]  # what was there before each evaluation's checkpoint
    assert m.load_checkpoint(tmp_path / "best.pt")["step"] == 6
    val = [row["val_loss"] for row in m.read_metrics(tmp_path) if "val_loss" in row]
    assert val == [None, 3, 2, None, 2.5]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "reward"])
def test_evaluation_does_not_depend_on_the_batches(tmp_path, corpus, tokenizer, stage):
    """Means are Σ / Σ and totals Σ, though the last batches are smaller and rows differ in length."""
    config = moe_shape(max_position_embeddings=256)  # in evaluation the routers' balance is no part of the loss
    model = random_model(config)
    model = m.RewardModel(model) if stage == "reward" else model
    if stage == "reward":
        torch.nn.init.normal_(model.score.weight)
    results = []
    for size in (1, 5, 100):
        if stage == "pretrain":
            val = m.PretrainDataLoader(corpus, tokenizer, size, 30, "all", shuffle=False, cache_dir=tmp_path / "cache")
        elif stage == "sft":
            val = load(
                m.ConversationDataLoader,
                tmp_path,
                tokenizer,
                CHATS * 2,
                batch_size=size,
                packing=size == 5,
                seq_len=256,
            )
        else:
            val = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=size)
        options = {"reference": random_model(config, seed=4)} if stage == "dpo" else {}
        trainer = m.STAGES[stage].trainer(copy.deepcopy(model), tokenizer, val_data=val, **options)
        assert size > 1 or len({batch["input_ids"].shape for batch in val}) > 1
        results.append(trainer.evaluate())
    for result in results[1:]:
        assert result.keys() == results[0].keys() and result == pytest.approx(results[0], rel=1e-4)
    for name in {"tokens", "bytes"} & results[0].keys():
        assert type(results[0][name]) is int and results[0][name] == results[1][name] == results[2][name]
    assert {"dpo": "pair_accuracy_a", "reward": "pair_accuracy_b"}.get(stage, "bpb") in results[0]


def test_evaluation_of_text_against_plain_cross_entropy(tmp_path, corpus, tokenizer):
    """Each token but the first is predicted once, from its own block; bits are of the bytes of its text."""
    model = random_model(shape())
    val = m.PretrainDataLoader(corpus, tokenizer, 5, 30, "all", shuffle=False, cache_dir=tmp_path / "cache")
    tokens, nats = val.tokens.long(), 0.0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, 30):
            block = tokens[i : i + 31]
            nats += F.cross_entropy(model(block[None, :-1])[0], block[1:], reduction="sum").item()
    trainer = m.PreTrainer(model, tokenizer, val_data=val)
    result, size = trainer.evaluate(), len(tokenizer.decode_bytes(tokens[1:]))
    assert result == pytest.approx(
        {"loss": nats / (len(tokens) - 1), "bpb": nats / math.log(2) / size, "tokens": len(tokens) - 1, "bytes": size},
        rel=1e-5,
    )
    assert trainer.evaluate(301)["tokens"] == 450 and trainer.evaluate(150)["tokens"] == 150  # whole batches


def test_evaluation_of_conversations_against_plain_cross_entropy(tmp_path, tokenizer):
    model = random_model(shape(max_position_embeddings=256))
    val = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, batch_size=2, packing=False)
    nats, count = 0.0, 0
    with torch.no_grad():
        for i in val.items:
            ids, trained = val.sequence(i)
            labels = ids.where(trained, -100)[1:]
            nats += F.cross_entropy(model(ids[None, :-1])[0], labels, reduction="sum").item()
            count += int(trained.sum())
    said = [message["content"] for chat in CHATS for message in chat["messages"] if message["role"] == "assistant"]
    size = sum(len(text.encode()) for text in said)
    result = m.SFTTrainer(model, tokenizer, val_data=val).evaluate()
    assert result == pytest.approx(
        {"loss": nats / count, "bpb": nats / math.log(2) / size, "tokens": count, "bytes": size}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Once upon a time there was", "Once upon a time"),
        ("ab\n\ncd\nef", "ab"),  # neither four words nor six Chinese characters in a line
        ("\t$(x) \x1b[31m", "x"),
        ("\n\n\n", ""),
        ("a \x1b[31m b c d\n", "a"),  # no escapes for the terminal
    ],
)
def test_a_prompt_from_held_out_text_can_be_pasted(tokenizer, text, prompt):
    trainer = trainer_for(tokenizer)
    trainer.val_data = m.PretrainDataLoader.__new__(m.PretrainDataLoader)
    trainer.val_data.tokens = torch.tensor(tokenizer.encode(text))
    assert trainer.prompts() == [prompt]
    assert all(map(str.isprintable, trainer.prompts()))


def test_evaluation_without_anything_to_score(tokenizer):
    with pytest.raises(m.UserError, match="no validation data"):
        trainer_for(tokenizer).evaluate()
    with pytest.raises(m.UserError, match="nothing to score"):
        trainer_for(tokenizer, val_data=[]).evaluate()


def test_evaluations_of_a_part_take_the_same_batches(tmp_path, tokenizer, corpus):
    loader = m.PretrainDataLoader(corpus, tokenizer, 2, 16, "all", shuffle=False, cache_dir=tmp_path)
    trainer = trainer_for(tokenizer, val_data=loader)
    first = trainer.evaluate(40)
    assert first["tokens"] < 100 and trainer.evaluate(40) == first


def test_tensorboard_that_is_absent_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = m.TrainConfig(max_steps=1, sample_tokens=0, tensorboard=True)
    with pytest.raises(m.UserError, match=r"needs tensorboard: pip install -e '\.\[plot\]'"):
        trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run").fit()


def test_an_epoch_of_accumulated_batches_by_hand(tmp_path, tokenizer):
    """Worked example: four batches, two to a step, are gone through in two steps."""
    config = m.TrainConfig(epochs=1, accumulation_steps=2, warmup_steps=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)] * 4, run_dir=tmp_path)
    trainer.fit()
    assert (trainer.step_count, trainer.epochs_done) == (2, 1)


def test_tensorboard_gets_what_metrics_get(tmp_path, tokenizer):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = m.TrainConfig(max_steps=3, log_every=1, warmup_steps=0, sample_tokens=0, tensorboard=True)
    trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run").fit()
    events = loading.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = [row for row in m.read_metrics(tmp_path / "run") if "loss" in row]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]
    assert {"lr", "grad_norm", "tok_per_s"} <= set(events.Tags()["scalars"])


# -- preferences, and LoRA ---------------------------------------------------------------------------------------------


def test_dpo_compares_sums_of_logprobs(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=5)  # 5, 5 and 2 pairs
    model = random_model(shape(max_position_embeddings=128, dropout=0.3))
    reference = random_model(model.config, seed=4)
    alone = [[], []]
    for i in loader.order():
        for side in (0, 1):
            ids, trained = loader.sequence(i, side)
            for which, net in enumerate((model, reference)):
                with torch.no_grad():
                    logprobs = net.eval()(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                alone[which].append((logprobs * trained[1:]).sum())
    sums, references = (torch.stack(found).view(-1, 2) for found in alone)
    trainer = m.DPOTrainer(model, tokenizer, reference=reference, train_data=loader, val_data=loader)
    h = (sums - references) @ torch.tensor([1.0, -1.0])
    even = [i % 2 == 0 for i in loader.order()]
    for k, batch in enumerate(loader):
        own = slice(5 * k, 5 * k + 5)
        torch.testing.assert_close(m.completion_logprobs(trainer.model, batch), sums[own], rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["reference_logprobs"], references[own], rtol=0, atol=1e-4)
        expected = -F.logsigmoid(0.1 * h[own]).sum().item()
        assert trainer.loss(batch).item() == pytest.approx(expected, abs=1e-4)
        del batch["reference_logprobs"]  # nor does the cache differ from the model
        assert trainer.loss(batch).item() == pytest.approx(expected, abs=1e-4)
    result = trainer.evaluate()
    assert result["dpo_loss"] == pytest.approx(-F.logsigmoid(0.1 * h).mean().item(), abs=1e-5)
    assert result["pair_accuracy"] == pytest.approx((h > 0).float().mean().item())
    assert result["pair_accuracy_a"] == pytest.approx((h[even] > 0).float().mean().item())
    assert result["chosen_logprob"] == pytest.approx(sums[:, 0].mean().item(), abs=1e-3)
    assert result["loss"] * result["tokens"] == pytest.approx(-sums[:, 0].sum().item(), rel=1e-5)
    end = len(tokenizer.token_bytes[tokenizer.im_end_id])
    assert result["bytes"] == sum(len(record["chosen"].encode()) + end for record in pairs())


def test_many_pairs_to_score_are_announced(tmp_path, tokenizer, capsys):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs())
    trainer = m.DPOTrainer(random_model(shape()), tokenizer, train_data=loader)
    assert "the reference scores" not in capsys.readouterr().out
    loader.items = loader.items * 84
    trainer.cache_reference(loader)
    assert "the reference scores 1,008 pairs, once" in capsys.readouterr().out


def test_dpo_starts_at_ln_2_and_leaves_the_reference_alone(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=4)
    model = random_model(shape(max_position_embeddings=128, dropout=0.3)).train()
    trainer = m.DPOTrainer(model, tokenizer, config=m.TrainConfig(warmup_steps=0, learning_rate=1e-3))
    before = m.fingerprint(trainer.reference)
    assert not trainer.reference.training
    batches = list(loader)
    first = [trainer.reference_logprobs(batch) for batch in batches]
    results = [trainer.step([batch])["loss"] for batch in batches]
    assert results[0] == pytest.approx(math.log(2), abs=1e-6) and results[1] != pytest.approx(math.log(2), abs=1e-6)
    assert m.fingerprint(trainer.reference) == before != m.fingerprint(trainer.model)
    assert all(map(torch.equal, first, [trainer.reference_logprobs(batch) for batch in batches]))
    trainer = m.DPOTrainer(random_model(model.config), tokenizer, rl_config=m.RLHFConfig(dpo_sft_coef=2.0))
    policy = m.completion_logprobs(trainer.model, batches[0])[:, 0]
    lengths = (batches[0]["labels"][:, 0] != -100).sum(dim=1)
    expected = 4 * math.log(2) - 2 * (policy / lengths).sum().item()
    assert trainer.loss(batches[0]).item() == pytest.approx(expected, rel=1e-5)


def test_lora_trains_its_own_and_a_run_of_it_is_a_plain_model(tmp_path, tokenizer):
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=64, packing=False)
    config = m.TrainConfig(lora_rank=2, max_steps=3, warmup_steps=0, sample_tokens=0, learning_rate=0.05)
    model = random_model(shape(tie_word_embeddings=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = m.SFTTrainer(model, tokenizer, config=config, train_data=loader, run_dir=tmp_path / "run")
    trained = {p for p in trainer.model.parameters() if p.requires_grad}
    held = [p for o in trainer.optimizers.values() for group in o.param_groups for p in group["params"]]
    assert set(held) == trained and len(held) == len(trained) == 2 * 4 * 2
    trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    merged, _, state = m.load_run(tmp_path / "run")
    assert merged.state_dict().keys() == before.keys() and any("lora_a" in name for name in state["model"])
    ids = random_ids(2, 20)
    with torch.no_grad():
        difference = merged(ids) - random_model(model.config)(ids)
        torch.testing.assert_close(merged(ids), trainer.model.eval()(ids), rtol=0, atol=1e-5)
    assert difference.abs().max() > 0.01
    critic = m.RewardModel(random_model(shape()))
    reward = m.RewardTrainer(critic, tokenizer, config=m.TrainConfig(lora_rank=2))
    names = {name for name, p in reward.model.named_parameters() if p.requires_grad}
    assert "score.weight" in names and all(".lora_" in name for name in names - {"score.weight"})


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_checkpoint_of_lora_holds_what_lora_trains(tmp_path, trained_runs, stage):
    config = stage_config(lora_rank=2, max_steps=2, learning_rate=0.05)
    parent = tmp_path / "parent"
    shutil.copytree(trained_runs / "pretrain", parent)
    origin = {"parent": str(parent)}

    def trainer_from(parent: Path, **options) -> m.Trainer:
        trainer = stage_trainer(trained_runs, stage, tmp_path / stage, parent, config, **options)
        trainer.origin = origin
        return trainer

    trainer = trainer_from(parent)
    trainer.fit()
    # 1 it is small, and the run is the whole model
    path = tmp_path / stage / "checkpoint.pt"
    state = m.load_checkpoint(path)
    assert all("lora_" in name or name == "score.weight" for name in state["model"])
    whole = tmp_path / "whole.pt"
    trainer.origin, trainer.base = {}, {}  # as from Python, without a base
    trainer.save_checkpoint(whole)
    assert path.stat().st_size < 0.7 * whole.stat().st_size
    model = m.load_run(tmp_path / stage, which="last")[0]
    merged = copy.deepcopy(trainer.model).eval()
    m.merge_lora(merged)
    assert same(dict(model.state_dict()), dict(merged.state_dict()))
    # 2 it is resumed from its base and from whole weights
    again = trainer_from(parent, resume=True)
    assert same(dict(again.trained.state_dict()), dict(trainer.trained.state_dict()))
    # 3 a base that has changed or is missing is one error, in both ways
    for file in ("best.pt", "checkpoint.pt"):
        changed = m.load_checkpoint(parent / file)
        changed["model"]["norm.weight"] += 1
        m.save_checkpoint(parent / file, changed)
        if file == "best.pt":
            assert same(dict(m.load_run(tmp_path / stage, which="last")[0].state_dict()), dict(model.state_dict()))
    with pytest.raises(m.UserError, match="its base .* has changed since"):
        m.load_run(tmp_path / stage)
    with pytest.raises(m.UserError, match="is not the one that this run started with|its base has changed since"):
        stage_trainer(trained_runs, stage, tmp_path / stage, parent, config, resume=True)
    shutil.rmtree(parent)
    with pytest.raises(m.UserError, match="holds only what LoRA trained, and its base cannot be read"):
        m.load_run(tmp_path / stage)


def test_a_merged_model_has_the_same_bits_whatever_the_order_of_sums():
    torch.manual_seed(0)
    layer = m.LoRALinear(m.Linear(40, 50), 3, 6.0)
    torch.nn.init.normal_(layer.lora_b)
    expected = layer.weight.clone()
    for r in range(3):
        expected = expected + (layer.scale * layer.lora_b[:, r])[:, None] * layer.lora_a[r]
    assert torch.equal(layer.merged().weight, expected)


@pytest.mark.parametrize(
    "config", [shape(), moe_shape(), shape(tie_word_embeddings=False)], ids=["dense", "moe", "untied"]
)
def test_training_improves_held_out_text(tmp_path, corpus, tokenizer, config):
    data, val = (
        m.PretrainDataLoader(corpus, tokenizer, 8, 32, split, cache_dir=tmp_path / "c") for split in ("train", "val")
    )
    train = {"max_steps": 80, "warmup_steps": 5, "learning_rate": 1e-2, "sample_tokens": 4}
    settings = m.TrainConfig(batch_size=8, seq_len=32, eval_every=0, save_every=0, **train)
    torch.manual_seed(0)
    trainer = m.PreTrainer(
        m.MiniGPT(config), tokenizer, config=settings, train_data=data, val_data=val, run_dir=tmp_path / "run"
    )
    before = trainer.evaluate()
    after = trainer.fit()
    assert before["bpb"] > 3 and after["bpb"] < 0.75
    assert after["bytes"] == len(tokenizer.decode_bytes(val.tokens)) and after["tokens"] == len(val.tokens) - 1
    assert after["bpb"] == pytest.approx(after["loss"] * after["tokens"] / math.log(2) / after["bytes"])


def test_sft_learns_to_answer_held_out_questions(tmp_path, tokenizer):
    """The answer is the question's last letter, whatever stands before it."""
    draw = random.Random(0)
    words = {"".join(draw.choice("abcdef") for _ in range(3)) for _ in range(400)}
    words = sorted(words)
    draw.shuffle(words)
    records = [{"messages": turns(word, word[-1]), "answer": word[-1]} for word in words]
    data = load(m.ConversationDataLoader, tmp_path, tokenizer, records[40:], "t.jsonl", shuffle=True, seq_len=64)
    val = load(m.ConversationDataLoader, tmp_path, tokenizer, records[:40], "v.jsonl", seq_len=64)
    torch.manual_seed(0)
    config = m.TrainConfig(max_steps=100, warmup_steps=5, learning_rate=1e-2, batch_size=16, reply_tokens=4)
    options = {"config": config, "train_data": data, "val_data": val, "run_dir": tmp_path / "run"}
    trainer = m.SFTTrainer(m.MiniGPT(shape()), tokenizer, **options)
    before, after = trainer.evaluate(), trainer.fit()
    assert before["exact_match"] == 0 and after["exact_match"] > 0.9 and after["loss"] < 0.1 * before["loss"]
    assert after["tokens"] == 80 and after["bytes"] == 40 + 40 * len(tokenizer.token_bytes[tokenizer.im_end_id])


def test_the_reward_model_and_dpo_learn_what_is_preferred(tmp_path, tokenizer):
    draw = random.Random(0)
    names = sorted({"".join(draw.choice("abcdefgh") for _ in range(4)) for _ in range(150)})
    records = [
        {"prompt": name, "chosen": f"{name[::-1]} yes {name[0]}", "rejected": f"{name[::-1]} no {name[0]}"}
        for name in names
    ]
    options = {"batch_size": 16, "seq_len": 64}
    data = load(m.DPODataLoader, tmp_path, tokenizer, records[30:], "t.jsonl", shuffle=True, **options)
    val = load(m.DPODataLoader, tmp_path, tokenizer, records[:30], "v.jsonl", **options)
    torch.manual_seed(0)
    config = m.TrainConfig(max_steps=25, warmup_steps=5, learning_rate=1e-2, sample_tokens=0)
    options = {"config": config, "train_data": data, "val_data": val}
    trainer = m.RewardTrainer(m.RewardModel(m.MiniGPT(shape())), tokenizer, run_dir=tmp_path / "run", **options)
    assert trainer.evaluate()["pair_accuracy"] == 0.5  # all scores are 0
    assert trainer.fit()["pair_accuracy"] > 0.9
    policy = m.DPOTrainer(m.MiniGPT(shape()), tokenizer, run_dir=tmp_path / "dpo", **options)
    assert policy.evaluate()["dpo_loss"] == pytest.approx(math.log(2))
    result = policy.fit()
    assert result["pair_accuracy"] > 0.9 and result["dpo_loss"] < 0.5


# ======================================================================================================================
# 10 Reinforcement learning
# ======================================================================================================================


def prompt_batch(tokenizer, questions: list[str], answers: list[str] | None = None) -> dict:
    chats = [turns(question) for question in questions]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return {"input_ids": rows, "messages": chats, "answers": answers or [""] * len(rows)}


def rl_trainer(cls, tokenizer, reward=lambda messages, reply, answer: float(answer), model=None, train=None, **rl):
    train = {"warmup_steps": 0, "reply_tokens": 6, "optimizer": "adamw", "learning_rate": 1e-3, **(train or {})}
    model = random_model(shape(vocab_size=310)) if model is None else model
    reference = random_model(model.config, seed=5)
    return cls(
        model,
        tokenizer,
        reward=reward,
        reference=reference,
        config=m.TrainConfig(**train),
        rl_config=m.RLHFConfig(**{"critic_warmup": 0, **rl}),
    )


WRITTEN = torch.tensor([[10, 0, 11, 4, 0, 0], [20, 21, 22, 23, 24, 25], [2, 0, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0]])


def let_write(monkeypatch, replies: torch.Tensor = WRITTEN) -> None:
    """Whatever the policy is asked, it writes `replies`."""
    monkeypatch.setattr(m.TextGenerator, "sample_generate", lambda self, ids, *_: torch.cat((ids, replies), dim=1))


def four_prompts(tokenizer) -> dict:
    return prompt_batch(tokenizer, ["a", "你好吗", "hi there", "xy"], ["1", "2", "3", "4"])


def test_groups_of_like_lengths_by_hand():
    """Worked example: seven rows in groups of three, the shortest together; few enough stay as they are."""
    lengths = torch.tensor([5, 1, 9, 1, 7, 3, 8])
    assert [rows.tolist() for rows in m.length_groups(lengths, size=3)] == [[1, 3, 5], [0, 4, 6], [2]]
    assert [rows.tolist() for rows in m.length_groups(lengths, torch.tensor([6, 0, 2]), size=2)] == [[0, 6], [2]]
    assert [rows.tolist() for rows in m.length_groups(lengths, torch.tensor([6, 0, 2]))] == [[6, 0, 2]]
    batch = {"last": lengths, "wide": torch.arange(84).view(7, 12), "narrow": torch.arange(77).view(7, 11)}
    part = m.select_rows(batch, torch.tensor([3, 5]))  # the longest has 9, of these 3: six columns fall away
    assert part["last"].tolist() == [1, 3] and part["wide"].shape == (2, 6) and part["narrow"].shape == (2, 5)
    assert part["narrow"][0].tolist() == list(range(33, 38))


def test_a_reply_ends_with_its_first_end_of_turn(tokenizer, monkeypatch):
    """Worked example: replies of 4, 6, 1 and 2 tokens; the second never ends and loses 0.75 of its reward of 1."""
    let_write(monkeypatch)
    seen = []
    trainer = rl_trainer(
        m.GRPOTrainer,
        tokenizer,
        lambda messages, reply, answer: seen.append((messages, reply, answer)) or 1.0,
        missing_end_penalty=0.75,
    )
    prompts = four_prompts(tokenizer)
    batch, figures = trainer.rollout(prompts)
    stats = m.average([figures])
    assert not any(value.requires_grad for value in batch.values())
    for row, (prompt, length) in enumerate(zip(prompts["input_ids"], [4, 6, 1, 2], strict=True)):
        n = len(prompt)
        assert batch["mask"][row].nonzero().flatten().tolist() == list(range(n - 1, n - 1 + length))
        assert batch["input_ids"][row, n : n + length].tolist() == WRITTEN[row, :length].tolist()
        assert batch["input_ids"][row, :n].tolist() == prompt
        assert batch["token_mask"][row].sum() == n + length == batch["last"][row] + 2
    assert batch["scores"].tolist() == [1, 0.25, 1, 1] and stats["ended"] == 0.75 and stats["reward"] == 1
    assert stats["reply_length"] == 13 / 4 and stats["accuracy"] == 0
    said = [tokenizer.decode(WRITTEN[row, :n].tolist()) for row, n in enumerate((4, 6, 1, 2))]
    asked = [[{"role": "user", "content": text}] for text in ("a", "你好吗", "hi there", "xy")]
    assert seen == list(zip(asked, said, ["1", "2", "3", "4"], strict=True))


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo"])
def test_grpo_loss_against_its_equation(tokenizer, monkeypatch, kind):
    """Worked example: two groups of two replies with scores 1, -1 and 0, 3, and the loss token by token."""
    let_write(monkeypatch)
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, advantage_kind=kind, group_size=2, grpo_kl_coef=0.2)
    prompts = {k: v[:2] for k, v in four_prompts(tokenizer).items()}
    scores = iter([1.0, 0.0, 0.0, 3.0])
    trainer.reward = lambda *_: next(scores)
    batch, _ = trainer.experience(prompts)
    torch.testing.assert_close(batch["scores"], torch.tensor([1.0, -1.0, 0.0, 3.0]))  # the second lacks its end
    deviations = [1.0, 1.0] if kind == "dr_grpo" else [2**0.5 + 1e-4, 4.5**0.5 + 1e-4]
    expected_advantages = [1 / deviations[0], -1 / deviations[0], -1.5 / deviations[1], 1.5 / deviations[1]]
    assert batch["advantages"].tolist() == pytest.approx(expected_advantages, abs=1e-5)
    batch["logprobs"] = batch["logprobs"] + 0.5 * doubles(*batch["mask"].shape).float()  # an old policy that differs
    with torch.no_grad():
        new, total, moved = trainer.logprobs(trainer.model, batch), 0.0, []
        for i, length in enumerate([4, 6, 1, 2]):
            for t in batch["mask"][i].nonzero().flatten().tolist():
                a, log_ratio = batch["advantages"][i], new[i, t] - batch["logprobs"][i, t]
                ratio, log_r = log_ratio.exp(), batch["reference_logprobs"][i, t] - new[i, t]
                term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.2 * (log_r.exp() - 1 - log_r)
                total -= term.item() / (length if kind == "grpo" else 6)
                moved.append((ratio - 1 - log_ratio).item())
        loss, parts = trainer.loss(batch)
        assert loss.item() == pytest.approx(total, rel=1e-4)
    assert trainer.count(batch) == 4
    total, tokens = parts["moved"]
    assert (total / tokens).item() == pytest.approx(sum(moved) / 13, rel=1e-4)  # nats a token, as stop_kl is


def test_value_reward_and_logprob_belong_to_the_same_token(tokenizer, monkeypatch):
    """Position j is about token j + 1, whatever the padding: each figure is worked out anew from the plain prefix."""
    let_write(monkeypatch)
    rl = {"kl_coef": 0.3, "gamma": 0.5, "gae_lambda": 1.0, "temperature": 0.7, "missing_end_penalty": 0.5}
    trainer = rl_trainer(m.PPOTrainer, tokenizer, **rl)
    torch.nn.init.normal_(trainer.critic.score.weight)
    batch, stats = trainer.experience(four_prompts(tokenizer))
    kls, advantages = [], torch.zeros(batch["mask"].shape)
    with torch.no_grad():
        for row, ids in enumerate(batch["input_ids"]):
            places = batch["mask"][row].nonzero().flatten().tolist()
            earned, k1 = {}, {}
            for j in places:
                prefix, token = ids[None, : j + 1], ids[j + 1]
                policy, reference = (
                    (model(prefix)[0, -1, :300] / 0.7).log_softmax(-1)[token]
                    for model in (trainer.model, trainer.reference)
                )
                assert batch["logprobs"][row, j].item() == pytest.approx(policy.item(), abs=1e-5)
                assert batch["reference_logprobs"][row, j].item() == pytest.approx(reference.item(), abs=1e-5)
                value = trainer.critic(prefix).item()
                assert batch["values"][row, j].item() == pytest.approx(value, abs=1e-5)
                k1[j] = (policy - reference).item()
                earned[j] = -0.3 * k1[j]
            assert places[-1] == batch["last"][row]
            earned[places[-1]] += row + 1 - 0.5 * (row == 1)  # the reply's score; one reply lacks its end
            kls.append(sum(k1.values()))
            to_go = 0.0
            for j in reversed(places):  # λ = 1: returns are what is still to be earned
                to_go = earned[j] + 0.5 * to_go
                assert batch["returns"][row, j].item() == pytest.approx(to_go, abs=1e-4)
                advantages[row, j] = to_go - batch["values"][row, j]
    assert stats["kl"] == pytest.approx(sum(kls) / 4, abs=1e-4)
    mask = batch["mask"]
    white = (advantages - advantages[mask].mean()) / advantages[mask].std(correction=0)
    torch.testing.assert_close(batch["advantages"], white * mask, rtol=0, atol=1e-4)
    assert (batch["logprobs"][~mask] == 0).all() and (batch["advantages"][~mask] == 0).all()


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_the_ratio_is_one_at_first_and_nothing_old_has_a_gradient(tokenizer, monkeypatch, cls):
    ratios, plain = [], m.ppo_policy_loss

    def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range):
        assert logprobs.requires_grad and not old_logprobs.requires_grad and not advantages.requires_grad
        ratios.append((logprobs - old_logprobs).detach().exp())
        return plain(logprobs, old_logprobs, advantages, mask, clip_range)

    monkeypatch.setattr(m, "ppo_policy_loss", policy_loss)
    model = random_model(shape(dropout=0.3))
    draw = random.Random(0)
    trainer = rl_trainer(
        cls, tokenizer, lambda *_: draw.random(), model, minibatch_size=4, stop_kl=0.0, group_size=2, temperature=0.8
    )
    batch, _ = trainer.experience(four_prompts(tokenizer))
    assert not any(value.requires_grad for value in batch.values())
    result = trainer.step([four_prompts(tokenizer)])
    assert result["updates"] == len(ratios) == 2 * (1 if cls is m.PPOTrainer else 2)
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-5)
    assert (ratios[1] - 1).abs().max() > 1e-3


def mixed_prompts(tokenizer) -> dict:
    return prompt_batch(tokenizer, ["a" * n for n in (9, 1, 30, 4, 17, 2, 25)], list("1234567"))


def in_small_groups(monkeypatch) -> None:
    plain = m.length_groups
    monkeypatch.setattr(m, "length_groups", lambda lengths, rows=None, size=64: plain(lengths, rows, 2))


def test_a_rollout_in_groups_is_the_rollout(tokenizer, monkeypatch):
    """Rows keep their order and their figures, however they were grouped."""
    in_small_groups(monkeypatch)
    reward = m.RewardModel(random_model(shape(vocab_size=310), seed=3))
    torch.nn.init.normal_(reward.score.weight)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, reward, missing_end_penalty=0.0)
    prompts = mixed_prompts(tokenizer)
    batch, _ = trainer.experience(prompts)
    with torch.no_grad():
        for row, n in enumerate(map(len, prompts["input_ids"])):
            assert batch["input_ids"][row, :n].tolist() == prompts["input_ids"][row]
            ids, end = batch["input_ids"][row, : batch["last"][row] + 2][None], int(batch["last"][row]) + 1
            logprobs = trainer.model(ids)[0, :-1, :300].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert batch["mask"][row].nonzero().flatten().tolist() == list(range(n - 1, end))
            torch.testing.assert_close(batch["logprobs"][row, n - 1 : end], logprobs[n - 1 :], rtol=0, atol=1e-5)
            assert batch["scores"][row].item() == pytest.approx(trainer.reward(ids).item(), abs=1e-5)
            value = trainer.critic(ids[:, :n]).item()
            assert batch["values"][row, n - 1].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_an_update_in_groups_is_the_update(tokenizer, monkeypatch, cls):
    in_small_groups(monkeypatch)
    torch.manual_seed(0)
    trainer = rl_trainer(cls, tokenizer, lambda *_: random.random(), group_size=2)
    batch, _ = trainer.experience(mixed_prompts(tokenizer))
    parts = [m.select_rows(batch, rows) for rows in m.length_groups(batch["last"])]
    (whole_loss, whole), (loss, grads) = (gradients(trainer, batches) for batches in ([batch], parts))
    assert len(parts) > 3 and len(whole) > 10 and whole.keys() == grads.keys()
    assert loss == pytest.approx(whole_loss, rel=1e-4, abs=1e-6)
    for name, grad in whole.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_the_reference_stays_as_it_is(tokenizer, cls):
    model = random_model(shape(dropout=0.5)).train()
    reference = random_model(model.config, seed=5).train()
    trainer = cls(
        model,
        tokenizer,
        reward=lambda *_: random.random(),
        reference=reference,
        config=m.TrainConfig(reply_tokens=6),
        rl_config=m.RLHFConfig(critic_warmup=0),
    )
    assert not trainer.reference.training and not any(p.requires_grad for p in trainer.reference.parameters())
    before = m.fingerprint(trainer.reference)
    batch, _ = trainer.rollout(four_prompts(tokenizer))
    with torch.no_grad():
        assert torch.equal(trainer.logprobs(trainer.reference, batch), batch["reference_logprobs"])
    policy = m.fingerprint(trainer.model)
    trainer.step([four_prompts(tokenizer)])
    assert not trainer.reference.training and m.fingerprint(trainer.reference) == before
    assert m.fingerprint(trainer.model) != policy and before == m.fingerprint(reference)
    trainer.trained.train()
    with torch.no_grad():
        assert torch.equal(trainer.logprobs(trainer.reference, batch), batch["reference_logprobs"])


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo"])
def test_equal_rewards_give_no_gradient(tokenizer, kind):
    rl = {"missing_end_penalty": 0.0, "advantage_kind": kind, "group_size": 5}
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda messages, reply, answer: 0.1 * float(answer), **rl)
    trainer.rl.grpo_kl_coef = 1.0  # all replies are kept
    batch, stats = trainer.experience(four_prompts(tokenizer))
    assert len(batch["scores"]) == 20 and stats["equal_groups"] == 1 and (batch["advantages"] == 0).all()
    trainer.rl.grpo_kl_coef = 0.0
    trainer.loss(batch)[0].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in trainer.model.parameters())
    before = m.fingerprint(trainer.model)
    result = trainer.step([four_prompts(tokenizer)])  # and without it they are left out
    assert result["updates"] == 0 and trainer.step_count == 1 and m.fingerprint(trainer.model) == before
    scores = itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    trainer.reward = lambda *_: next(scores)
    batch, stats = trainer.experience(four_prompts(tokenizer))
    assert stats["equal_groups"] == 0.5 and all(len(value) == 10 for value in batch.values())
    assert (batch["scores"].view(2, 5) == torch.tensor([2.0, 1, 1, 1, 1])).all()
    assert trainer.count(batch) == 20  # the mean is over all replies, those that are left out too


@pytest.mark.parametrize("kind", ["reward_model", "python"])
def test_the_rewards_scores_reach_the_experience(tokenizer, monkeypatch, kind):
    let_write(monkeypatch)
    if kind == "python":
        for bad in (math.nan, math.inf, "1", None):
            trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda *_, bad=bad: bad)
            with pytest.raises(m.UserError, match="the reward function gave"):
                trainer.rollout(four_prompts(tokenizer))
        trainer = rl_trainer(m.PPOTrainer, tokenizer, missing_end_penalty=0.0)
        assert trainer.rollout(four_prompts(tokenizer))[0]["scores"].tolist() == [1, 2, 3, 4]
        return
    reward = m.RewardModel(random_model(shape(vocab_size=310, dropout=0.4), seed=3)).train()
    torch.nn.init.normal_(reward.score.weight)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, reward, missing_end_penalty=0.0)
    assert m.fingerprint(trainer.critic) == m.fingerprint(reward)  # where the critic starts
    batch, _ = trainer.rollout(four_prompts(tokenizer))
    for row, n in enumerate((batch["last"] + 2).tolist()):
        with torch.no_grad():
            score = trainer.reward(batch["input_ids"][row : row + 1, :n]).item()
        assert batch["scores"][row].item() == pytest.approx(score, abs=1e-5)


def test_a_rollout_is_scored_as_the_pairs_were(tmp_path, tokenizer, monkeypatch):
    """The reward model reads a sampled reply to the very token at which it was trained to judge."""
    records = [{"prompt": "你好吗", "chosen": "好。", "rejected": "bad"}]
    loader = load(m.DPODataLoader, tmp_path, tokenizer, records)
    model = m.RewardModel(random_model(shape(vocab_size=310)))
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():
        trained = m.RewardTrainer(model, tokenizer).scores(loader.collate([0]))[0]
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, model)
    rows = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in ("好。", "bad")]
    width = max(map(len, rows))
    let_write(monkeypatch, torch.tensor([row + [0] * (width - len(row)) for row in rows]))
    batch, _ = trainer.rollout(prompt_batch(tokenizer, ["你好吗", "你好吗"], ["", ""]))
    torch.testing.assert_close(batch["scores"], trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "says"), [(3, True), (4, False), (0, False)])
def test_ppo_says_when_the_policy_will_not_move(steps, says, tokenizer, capsys):
    rl_trainer(m.PPOTrainer, tokenizer, train={"max_steps": steps}, critic_warmup=3)
    assert ("the policy stays as it is" in capsys.readouterr().out) == says


def test_a_seeded_rollout_draws_anew_in_each_group(tokenizer, monkeypatch):
    in_small_groups(monkeypatch)
    trainer, prompts = rl_trainer(m.PPOTrainer, tokenizer), prompt_batch(tokenizer, ["ab"] * 6)["input_ids"]
    rows = [trainer.sample_replies(prompts, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert rows[0] == rows[1] and len(set(map(tuple, rows[0]))) > 2


def test_evaluation_takes_no_more_than_eval_prompts(tokenizer, monkeypatch):
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, train={"eval_prompts": 6})
    trainer.val_data, seen, plain = [four_prompts(tokenizer)] * 3, [], trainer.rollout
    monkeypatch.setattr(trainer, "rollout", lambda prompts, random: seen.append(prompts["answers"]) or plain(prompts))
    result = trainer.evaluate()
    assert [len(answers) for answers in seen] == [4, 2]
    assert result["reward"] == pytest.approx((1 + 2 + 3 + 4 + 1 + 2) / 6)  # each reply counts, not each batch


def test_evaluation_draws_the_same_replies_each_time(tokenizer):
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda messages, reply, answer: len(reply.encode()))
    trainer.val_data = [four_prompts(tokenizer)] * 3
    first = trainer.evaluate()
    torch.rand(5)
    assert trainer.evaluate() == first and first["reward"] > 0


@pytest.mark.parametrize("kind", ["partial", "object"])
def test_any_callable_is_a_reward(tokenizer, tmp_path, kind):
    class Score:
        def __call__(self, messages, reply, answer):
            return 1.0

    reward = Score() if kind == "object" else functools.partial(lambda x, *_: x, 1.0)
    rl_trainer(m.GRPOTrainer, tokenizer, reward).save_checkpoint(tmp_path / "checkpoint.pt")


def test_replies_are_drawn_from_the_distribution_that_is_scored(tokenizer, monkeypatch):
    """Neither top-k, top-p nor min-p cut the rollouts' distribution, and the temperature is that of `logprobs`."""
    plain, settings = m.TextGenerator.continue_ids, []

    def continue_ids(self, rows, config, *args):
        settings.append((config.top_p, config.top_k, config.min_p, config.temperature, config.repetition_penalty))
        return plain(self, rows, config, *args)

    monkeypatch.setattr(m.TextGenerator, "continue_ids", continue_ids)
    rl_trainer(m.GRPOTrainer, tokenizer, lambda *_: 1.0, temperature=0.7).rollout(prompt_batch(tokenizer, ["a"]))
    assert settings == [(1.0, 0, 0.0, 0.7, 1.0)]


@pytest.mark.parametrize("cls", [m.DPOTrainer, m.PPOTrainer, m.GRPOTrainer])
def test_every_model_of_a_trainer_is_on_its_device(tokenizer, monkeypatch, cls):
    monkeypatch.setattr(m, "pick_device", torch.device)  # it knows no "meta"
    reward = {} if cls is m.DPOTrainer else {"reward": m.RewardModel(shape())}
    trainer = cls(m.MiniGPT(shape()), tokenizer, device="meta", **reward)
    models = {name: part for name, part in vars(trainer).items() if isinstance(part, torch.nn.Module)}
    assert {"model", "reference", *reward} <= set(models)
    assert {name: p.device.type for name in models for p in models[name].parameters()} == dict.fromkeys(models, "meta")


def test_neither_policy_nor_critic_has_dropout(tokenizer):
    trainer = rl_trainer(m.PPOTrainer, tokenizer, model=random_model(shape(vocab_size=310, dropout=0.2)))
    assert {module.p for module in trainer.trained.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_entropy_is_minus_the_mean_log_probability_of_the_replies(tokenizer):
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda *_: 1.0)
    batch, figures = trainer.rollout(prompt_batch(tokenizer, ["a", "bc"]))
    stats = m.average([figures])
    assert stats["entropy"] == pytest.approx(-batch["logprobs"][batch["mask"]].mean().item(), rel=1e-5)


def test_the_update_that_moves_too_far_is_the_last_by_hand(tokenizer):
    """Worked example: of moves 0.04, 0.1, 0.11 and 0.3, with stop_kl=0.1, three are made; "moved" is the last one."""
    moves = [0.04, 0.1, 0.11, 0.3]
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda *_: len(moves), minibatch_size=8, update_epochs=4)
    batch = prompt_batch(tokenizer, ["a"])
    rewards = itertools.cycle([0.0, 1.0])
    trainer.reward = lambda *_: next(rewards)
    trainer.update = lambda batches: {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "moved": moves.pop(0)}
    metrics = trainer.step([batch])
    assert metrics["updates"] == 3 and metrics["moved"] == 0.11 and moves == [0.3]


def test_updates_end_early_when_the_policy_has_moved_too_far(tokenizer, monkeypatch):
    let_write(monkeypatch)
    rl = {"kl_coef": 0.1, "update_epochs": 5, "minibatch_size": 2}
    results = []
    for stop_kl in (0.1, 0.0):
        trainer = rl_trainer(m.PPOTrainer, tokenizer, train={"learning_rate": 0.1}, stop_kl=stop_kl, **rl)
        results.append(trainer.step([four_prompts(tokenizer)]))
    assert results[0]["updates"] < 10 and results[0]["moved"] > 0.1
    assert results[1]["updates"] == 10  # 0 is off


def test_the_figures_of_a_step_are_means_over_its_updates(tokenizer, monkeypatch):
    let_write(monkeypatch)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, update_epochs=2, minibatch_size=2)
    update, results = trainer.update, []
    trainer.update = lambda batches: results.append(update(batches)) or results[-1]
    step = trainer.step([four_prompts(tokenizer)])
    assert len(results) == 4
    assert 0 < step["rollout_share"] < 1
    for name in ("loss", "grad_norm", "lr"):
        assert step[name] == pytest.approx(sum(result[name] for result in results) / 4)


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_reinforcement_takes_any_iterable_of_prompts(tokenizer, cls):
    loss = rl_trainer(cls, tokenizer).train_epoch([four_prompts(tokenizer), four_prompts(tokenizer)])
    assert math.isfinite(loss)


def test_rollouts_cannot_be_accumulated(tokenizer):
    for trainer in (m.PPOTrainer, m.GRPOTrainer):
        with pytest.raises(m.UserError, match="accumulation_steps=2 has no meaning"):
            trainer(m.MiniGPT(shape()), tokenizer, reward=m.answer_reward, config=m.TrainConfig(accumulation_steps=2))


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_reinforcement_raises_the_reward(tokenizer, cls):
    """The reward is the share of a reply's characters that are ASCII digits or letters."""

    def reward(messages, reply, answer):
        return sum(c.isascii() and c.isalnum() for c in reply) / max(1, len(reply))

    torch.manual_seed(0)
    prompts = prompt_batch(tokenizer, [f"{a}{b}" for a in "abcd" for b in "xyzw"])
    rl = {"kl_coef": 0.0, "missing_end_penalty": 0.0, "stop_kl": 0.0}
    trainer = rl_trainer(cls, tokenizer, reward, m.MiniGPT(shape()), {"reply_tokens": 8, "learning_rate": 1e-2}, **rl)
    if cls is m.PPOTrainer:
        prompts = {k: v.repeat(4, 1) if isinstance(v, torch.Tensor) else v * 4 for k, v in prompts.items()}
    rewards = [trainer.step([prompts])["reward"] for _ in range(20)]
    assert rewards[0] < 0.5 and sum(rewards[-3:]) / 3 > rewards[0] + 0.3


# ======================================================================================================================
# 11 Pipeline
# ======================================================================================================================


def test_the_defaults_of_a_preset_and_a_stage():
    """Worked example: what the recipe names is the recipe's, the rest TrainConfig's."""
    config = m.get_train_config("tiny", "ppo")
    assert (config.batch_size, config.max_steps, config.minutes, config.optimizer) == (256, 30, 6, "adamw")
    assert config.beta2 == m.TrainConfig().beta2
    assert m.get_train_config("moe").max_steps == 10_000 and m.get_train_config("large").batch_size == 32
    assert (m.get_rlhf_config("tiny").update_epochs, m.get_rlhf_config("small").update_epochs) == (1, 2)
    for preset, stage in itertools.product(m.PRESETS, m.STAGES):
        config = m.get_train_config(preset, stage)
        assert config.max_steps or config.minutes, (preset, stage)
    for names, message in ((("huge",), "huge"), (("tiny", "dream"), "dream")):
        with pytest.raises(m.UserError, match=message):
            m.get_train_config(*names)


def test_the_table_of_stages():
    """Worked example: every stage's parent is a stage, and pretraining's is none."""
    parents = {name: stage.parent for name, stage in m.STAGES.items()}
    assert parents == {"pretrain": None, "sft": "pretrain", "dpo": "sft", "reward": "sft", "ppo": "sft", "grpo": "sft"}
    assert all(stage.trainer.stage == name for name, stage in m.STAGES.items())


def test_a_table_of_100_columns():
    """Worked example: shares in percent, other figures with four decimals, replies on one line and cut."""
    row = {"stage": "sft", "seconds": 61.4, "metric": "exact match", "before": None, "after": 0.5, "reply": "a\n b"}
    rows = [row, row | {"stage": "ppo", "metric": "reward", "before": -0.25, "reply": "long " * 40}]
    lines = sample.table(rows, "小猫？").splitlines()
    assert lines[0] == "stage     seconds  held-out metric   before   after  reply to: 小猫？"
    assert lines[1] == "sft            61  exact match                50.0%  a b"
    assert lines[2].startswith("ppo            61  reward           -0.2500  0.5000  long long")
    assert len(lines[2]) == 100 and lines[2].endswith("…")


@pytest.mark.parametrize("stage", m.STAGES)
@pytest.mark.parametrize("dtype", ["float32_onednn", "bfloat16"])
def test_every_stage_trains_and_evaluates_in_every_dtype(tmp_path, trained_runs, stage, dtype):
    results = []
    for name in ("float32", dtype):
        config = dataclasses.replace(stage_config(), dtype=name, max_steps=1)
        results.append(stage_trainer(trained_runs, stage, tmp_path / name, config=config).fit())
    assert results[0].keys() == results[1].keys()
    assert results[1] == pytest.approx(results[0], rel=0.05, abs=0.5)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_every_stage_resumes_bit_for_bit(tmp_path, trained_runs, stage):
    straight = stage_trainer(trained_runs, stage, tmp_path / "straight")
    straight.fit()
    broken = stage_trainer(trained_runs, stage, tmp_path / "broken")
    plain_step = broken.step

    def step(batches):
        if broken.step_count == 3:
            raise KeyboardInterrupt
        return plain_step(batches)

    broken.step = step
    with pytest.raises(KeyboardInterrupt):
        broken.fit()  # the last checkpoint is that of step 3, after its evaluation
    torch.manual_seed(99)
    resumed = stage_trainer(trained_runs, stage, tmp_path / "broken", resume=True)
    assert resumed.step_count == 3
    resumed.fit()
    states = [m.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("straight", "broken")]
    assert states[0].keys() == states[1].keys()
    for part in states[0].keys() - {"elapsed_s"}:
        assert same(states[0][part], states[1][part]), part
    assert ("critic" in states[0]) == (stage == "ppo") and states[0]["finished"] and states[0]["step"] == 4
    rows = [m.read_metrics(tmp_path / name) for name in ("straight", "broken")]
    timed = {"elapsed_s", "tok_per_s", "mfu", "peak_bytes", "rollout_tok_per_s", "rollout_share"}
    clean = [[{k: v for k, v in row.items() if k not in timed} for row in found] for found in rows]
    assert clean[0] == clean[1] and rows[0][-1]["step"] == 4 and rows[0][0]["step"] == 0


# -- every option does something ---------------------------------------------------------------------------------------

# field: (stage, what it must change, one value, another, what else is set)
OPTIONS = {
    "dtype": ("pretrain", "weights", "float32", "bfloat16"),
    "accumulation_steps": ("pretrain", "weights", 1, 2),
    "gradient_checkpointing": ("pretrain", "forwards", False, True),
    "lora_rank": ("sft", "weights", 0, 2),
    "lora_alpha": ("sft", "weights", 4.0, 8.0, {"lora_rank": 2}),
    "batch_size": ("pretrain", "weights", 3, 2),
    "packing": ("sft", "weights", True, False),
    "seq_len": ("pretrain", "weights", 16, 32),
    "learning_rate": ("pretrain", "weights", 3e-3, 4e-3),
    "min_learning_rate": ("pretrain", "weights", 0.0, 1e-3),
    "warmup_steps": ("pretrain", "weights", 1, 3),
    "schedule": ("pretrain", "weights", "cosine", "wsd"),
    "decay_fraction": ("pretrain", "weights", 0.4, 0.9, {"schedule": "wsd"}),
    "optimizer": ("pretrain", "weights", "muon", "adamw"),
    "weight_decay": ("pretrain", "weights", 0.1, 0.5),
    "beta1": ("pretrain", "weights", 0.9, 0.8),
    "beta2": ("pretrain", "weights", 0.95, 0.8),
    "momentum": ("pretrain", "weights", 0.95, 0.5),
    "grad_clip": ("pretrain", "weights", 1.0, 0.1),
    "max_steps": ("pretrain", "steps", 4, 3),
    "epochs": ("sft", "steps", 0.0, 1.0),
    "log_every": ("pretrain", "logged", 1, 2),
    "eval_every": ("pretrain", "evaluated", 3, 2),
    "save_every": ("pretrain", "saved", 2, 1),
    "eval_tokens": ("pretrain", "val_tokens", 100_000, 10),
    "eval_prompts": ("sft", "asked", 4, 1),
    "reply_tokens": ("grpo", "weights", 6, 3),
    "sample_tokens": ("pretrain", "shown", 0, 4),
    "seed": ("pretrain", "weights", 0, 1),
    "tensorboard": ("pretrain", "files", False, True),
    "dpo_beta": ("dpo", "weights", 0.1, 0.5),
    "dpo_kind": ("dpo", "weights", "sigmoid", "ipo"),
    "dpo_sft_coef": ("dpo", "weights", 0.0, 1.0),
    "reward_center_coef": ("reward", "weights", 0.01, 0.5),
    "reward_sft_coef": ("reward", "weights", 1.0, 0.0),
    "temperature": ("grpo", "weights", 1.0, 0.5),
    "missing_end_penalty": ("ppo", "weights", 1.0, 0.0),
    "minibatch_size": ("grpo", "weights", 6, 4),
    "update_epochs": ("grpo", "weights", 2, 1),
    "clip_range": ("ppo", "weights", 0.2, 1e-4),
    "kl_coef": ("ppo", "weights", 0.05, 1.0),
    "gamma": ("ppo", "weights", 1.0, 0.5),
    "gae_lambda": ("ppo", "weights", 0.95, 0.5),
    "value_clip": ("ppo", "weights", 1.0, 1e-4),
    "value_coef": ("ppo", "weights", 0.5, 0.0),
    "critic_rate": ("ppo", "weights", 5.0, 1.0),
    "critic_warmup": ("ppo", "weights", 0, 2),
    "group_size": ("grpo", "weights", 4, 2),
    "grpo_kl_coef": ("grpo", "weights", 0.0, 0.5),
    "advantage_kind": ("grpo", "weights", "dr_grpo", "grpo"),
}
TESTED_ELSEWHERE = {
    "auto_micro_batch": "test_out_of_memory_halves_the_micro_batch_and_changes_no_update",
    "minutes": "test_the_time_that_is_left_of_minutes_does_not_jump_at_an_evaluation",
    "compile": "test_training_that_cannot_be_compiled",
    "on_bad_record": "test_bad_records_can_be_skipped_and_are_counted",
    "stop_kl": "test_updates_end_early_when_the_policy_has_moved_too_far",
}


@pytest.fixture(scope="session")
def observe(trained_runs, tmp_path_factory):
    """A function of a stage and options that trains a little, and returns all that an option may change."""

    @functools.cache
    def train_with(stage: str, options: tuple) -> dict:
        rl_fields = {field.name for field in dataclasses.fields(m.RLHFConfig)}
        rl = {name: value for name, value in options if name in rl_fields}
        rl = {"group_size": 4, "minibatch_size": 6, "critic_warmup": 0, "stop_kl": 0.0} | rl
        config = stage_config(**{name: value for name, value in options if name not in rl_fields})
        model, tokenizer, _ = m.load_run(trained_runs / "pretrain")
        run_dir = tmp_path_factory.mktemp("observed")
        trainer = m.make_trainer(
            stage,
            model,
            tokenizer,
            sources_in(trained_runs / "data"),
            config,
            m.RLHFConfig(**rl),
            reward=lambda messages, reply, answer: float(len(reply.encode()) % 5),
            run_dir=run_dir,
            cache_dir=trained_runs / "cache",
        )
        seen = {"forwards": 0, "saved": [], "asked": []}
        block, save, replies = trainer.model.layers[0], trainer.save_checkpoint, trainer.replies

        def count_forward(*_) -> None:
            seen["forwards"] += block.training

        block.register_forward_pre_hook(count_forward)
        trainer.save_checkpoint = lambda path: seen["saved"].append(trainer.step_count) or save(path)
        trainer.replies = lambda prompts: seen["asked"].append(len(prompts)) or replies(prompts)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            trainer.fit()
        rows = m.read_metrics(run_dir)
        return seen | {
            "weights": m.fingerprint(trainer.trained),
            "steps": trainer.step_count,
            "logged": [row["step"] for row in rows if "loss" in row],
            "evaluated": [row["step"] for row in rows if "val_loss" in row],
            "val_tokens": [row["val_tokens"] for row in rows if "val_tokens" in row],
            "shown": "→" in shown.getvalue(),
            "files": sorted(path.name for path in run_dir.iterdir()),
        }

    return lambda stage, **options: train_with(stage, tuple(sorted(options.items())))


@pytest.mark.parametrize("field", OPTIONS)
def test_every_option_does_something(observe, field):
    stage, what, one, another, *more = OPTIONS[field]
    if field == "tensorboard":
        pytest.importorskip("tensorboard")
    fixed = more[0] if more else {}
    seen = [observe(stage, **fixed | ({} if value == default(field) else {field: value})) for value in (one, another)]
    assert seen[0][what] != seen[1][what]


def default(field: str):
    """The value that `observe` gives to an option."""
    rl = {"group_size": 4, "minibatch_size": 6, "critic_warmup": 0, "stop_kl": 0.0}
    configs = dataclasses.asdict(m.RLHFConfig()) | dataclasses.asdict(stage_config()) | rl
    return configs[field]


def test_the_same_options_do_the_same(observe, trained_runs, tmp_path):
    """Otherwise the test above would show nothing."""
    for stage in ("pretrain", "sft", "dpo", "reward", "ppo", "grpo"):
        assert observe(stage)["weights"] == observe(stage, learning_rate=0.003)["weights"]


def test_every_option_is_tested():
    fields = {field.name for cls in (m.TrainConfig, m.RLHFConfig) for field in dataclasses.fields(cls)}
    assert fields == OPTIONS.keys() | TESTED_ELSEWHERE.keys()
    assert set(TESTED_ELSEWHERE.values()) <= globals().keys()


def test_everything_in_a_checkpoint_is_restored(tmp_path, trained_runs):
    """Each part has a value that no new trainer has."""
    config = stage_config(max_steps=3, save_every=0)
    trainer = stage_trainer(trained_runs, "ppo", tmp_path / "a", config=config)
    trainer.rl.critic_warmup = 0
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    trainer.fit()
    for k, name in enumerate(trainer.counters):
        setattr(trainer, name, {"step": 7, "loss": 1.5} if "figures" in name else 3 + k)
    trainer.started -= 1000
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    expected = torch.rand(5)  # the first numbers after it
    new = stage_trainer(trained_runs, "ppo", tmp_path / "b", config=config)
    new.scaler = torch.amp.GradScaler("cpu")
    torch.manual_seed(99)
    new.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.rand(5), expected)
    assert same(dict(new.trained.state_dict()), dict(trainer.trained.state_dict()))
    assert new.optimizers.keys() == trainer.optimizers.keys() and len(new.optimizers) >= 3
    for name, optimizer in new.optimizers.items():
        state = optimizer.state_dict()["state"]
        assert state and same(state, trainer.optimizers[name].state_dict()["state"])
    assert new.scaler.get_scale() == trainer.scaler.get_scale() == 32
    assert new.train_data.state_dict() == trainer.train_data.state_dict()
    assert new.train_data.state_dict()["epoch"] + new.train_data.state_dict()["index"] > 0
    counters = {name: getattr(trainer, name) for name in trainer.counters}
    assert {name: getattr(new, name) for name in trainer.counters} == counters
    assert (
        len(counters) == 9 and new.elapsed_s() == pytest.approx(trainer.elapsed_s(), abs=60) and new.elapsed_s() > 900
    )


def test_the_second_gpu_has_random_numbers_of_its_own(tmp_path, tokenizer, monkeypatch):
    """Generators of the CPU stand for those of two GPUs."""
    generators = tuple(torch.Generator().manual_seed(seed) for seed in (1, 2))
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    trainer = trainer_for(tokenizer)
    trainer.device = torch.device("cuda:1")
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    first, second = (torch.rand(3, generator=generator) for generator in generators)
    trainer.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(torch.rand(3, generator=generators[1]), second)
    assert not torch.equal(torch.rand(3, generator=generators[0]), first)


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_a_parent_that_has_changed_is_refused(tmp_path, trained_runs, stage):
    parent = tmp_path / "parent"
    shutil.copytree(trained_runs / "pretrain", parent)
    (parent / "best.pt").unlink()
    stage_trainer(trained_runs, stage, tmp_path / stage, parent, stage_config(max_steps=1)).fit()
    state = m.load_checkpoint(parent / "checkpoint.pt")
    state["model"]["norm.weight"] += 1e-3
    m.save_checkpoint(parent / "checkpoint.pt", state)
    with pytest.raises(m.UserError, match="the reference is not the one"):
        stage_trainer(trained_runs, stage, tmp_path / stage, parent, resume=True)


def test_a_reward_that_has_changed_is_refused(tmp_path, trained_runs):
    stage_trainer(trained_runs, "ppo", tmp_path / "ppo", config=stage_config(max_steps=1)).fit()
    with pytest.raises(m.UserError, match="the reward is not the one"):
        stage_trainer(trained_runs, "ppo", tmp_path / "ppo", reward=m.answer_reward, resume=True)


def test_what_a_stage_cannot_begin_with_is_refused(tmp_path, trained_runs):
    with pytest.raises(m.UserError, match="a reward model cannot be the beginning of stage sft"):
        stage_trainer(trained_runs, "sft", tmp_path / "x", trained_runs / "reward")
    with pytest.raises(m.UserError, match="accumulation_steps=2"):
        stage_trainer(trained_runs, "grpo", tmp_path / "x", config=stage_config(accumulation_steps=2))
    with pytest.raises(m.UserError, match="reply_tokens=64 leave no room"):
        stage_trainer(trained_runs, "sft", tmp_path / "x", config=stage_config(reply_tokens=64))
    assert not (tmp_path / "x").exists()


def test_training_data_are_shuffled_and_validation_data_are_not(tmp_path, trained_runs, tokenizer):
    sources = sources_in(trained_runs / "data")
    loaders = m.make_loaders("sft", tokenizer, shape(), stage_config(), sources, tmp_path)
    assert {name: loader.shuffle for name, loader in loaders.items()} == {"train_data": True, "val_data": False}


def test_a_trainer_with_validation_data_only_evaluates(trained_runs):
    model, tokenizer, _ = m.load_run(trained_runs / "pretrain")
    sources = {"val": sources_in(trained_runs / "data")["val"]}
    trainer = m.make_trainer("sft", model, tokenizer, sources, stage_config(), cache_dir=trained_runs / "cache")
    assert trainer.evaluate()["tokens"] > 0
    with pytest.raises(m.UserError, match="needs train_data and run_dir"):
        trainer.fit()


def test_the_pipeline_resumes_and_ends(tmp_path, trained_runs, monkeypatch, capsys):
    sources = sources_in(trained_runs / "data")
    trains = {stage: stage_config(max_steps=3) for stage in ("sft", "reward", "ppo")}

    def pipeline():
        rl = m.RLHFConfig(minibatch_size=4)
        out = tmp_path / "out"
        return m.RLHFPipeline(rl, trained_runs / "pretrain", out, sources, trains, cache_dir=trained_runs / "cache")

    plain_step = m.RewardTrainer.step

    def step(self, batches):
        if self.step_count == 1:
            signal.raise_signal(signal.SIGTERM)
        return plain_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(m.RewardTrainer, "step", step)
        rows = pipeline().run()
    assert rows[-1]["signal"] == signal.SIGTERM and [row["stage"] for row in rows[:-1]] == ["pretrain", "sft"]
    assert m.load_checkpoint(tmp_path / "out/reward/checkpoint.pt")["step"] == 2
    capsys.readouterr()
    rows = pipeline().run()
    shown = capsys.readouterr().out
    assert "== sft" not in shown and "== reward" in shown and "== ppo" in shown
    assert [row["step"] for row in m.read_metrics(tmp_path / "out/reward") if "loss" in row] == [1, 2, 3]
    again = pipeline()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.pt")}
    assert again.run() == rows and "==" not in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.pt")}
    table = sample.table(rows, again.prompt).splitlines()
    assert [line.split()[0] for line in table] == ["stage", "pretrain", "sft", "reward", "ppo"]
    assert all(len(line) <= 100 for line in table) and "pair accuracy" in table[3]
    wide = sample.table([row | {"reply": "long " * 40} for row in rows], again.prompt).splitlines()
    assert max(map(len, wide)) == 100


def test_a_row_of_the_pipeline_is_of_the_best_evaluation(overfitted, trained_runs, tmp_path):
    """Worked example: the run's best evaluation was at step 2 of 4."""
    figures = {0: 5.0, 2: 3.0, 4: 4.0}
    rows = [{"step": step, "val_bpb": bpb, "elapsed_s": step} for step, bpb in figures.items()]
    write_jsonl(overfitted / "metrics.jsonl", rows)
    trains = {stage: stage_config() for stage in m.RLHFPipeline.stages}
    sources, options = sources_in(trained_runs / "data"), {"cache_dir": trained_runs / "cache"}
    pipeline = m.RLHFPipeline(m.RLHFConfig(), overfitted, tmp_path / "out", sources, trains, **options)
    pipeline.check()
    row = pipeline.row("pretrain", overfitted)
    assert (row["metric"], row["before"], row["after"], row["seconds"]) == ("bpb", 5.0, 3.0, 4)


def test_an_interrupt_in_the_last_evaluation_is_kept(trained_runs, tmp_path, monkeypatch):
    config = stage_config(max_steps=2, eval_every=0)
    trainer = stage_trainer(trained_runs, "sft", tmp_path / "sft", config=config)
    plain = trainer.evaluate

    def evaluate(*args):
        if trainer.step_count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    result = trainer.fit()
    assert result["signal"] == signal.SIGINT and result["loss"] > 0 and m.RLHFPipeline.is_finished(tmp_path / "sft")


# ======================================================================================================================
# 12 Edges: Hugging Face directories
# ======================================================================================================================

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "odd yarn": YARN | {"beta_fast": 2, "beta_slow": 0.25, "attention_factor": 1.2, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def huggingface_model(kind: str, tied: bool = True, rope: str = "default", **changes):
    """A randomised model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = (moe_shape if kind == "Qwen3Moe" else shape)(head_dim=16, max_position_embeddings=128, **changes)
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("qk_norm", "dropout", "rope_scaling")}
    options |= {"rope_parameters": {"rope_theta": 20000.0, **ROPES[rope]}, "tie_word_embeddings": tied}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "tied", "rope"),
    [
        ("Llama", True, "default"),
        ("Llama", False, "yarn"),
        ("Llama", False, "llama3"),
        ("Qwen3", True, "yarn"),
        ("Qwen3", False, "default"),
        ("Qwen3", False, "linear"),
        ("Llama", True, "odd yarn"),
        ("Qwen3Moe", True, "default"),
        ("Qwen3Moe", False, "yarn"),
    ],
)
def test_logits_equal_transformers_both_ways(tmp_path, kind, tied, rope):
    transformers = pytest.importorskip("transformers")
    theirs, ids = huggingface_model(kind, tied, rope), random_ids(3, 100)
    theirs.save_pretrained(tmp_path / "there", max_shard_size="20KB")
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 1
    ours = m.MiniGPT.from_pretrained(tmp_path / "there")
    assert (ours.config.rope_theta, ours.config.qk_norm, ours.config.tie_word_embeddings) == (
        20000.0,
        kind != "Llama",
        tied,
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


def test_older_spellings_and_half_precision(tmp_path):
    huggingface_model("Llama", rope="yarn").bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["eos_token_id"], config["pad_token_id"] = rope.pop("rope_theta"), [7, 9], -1
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}  # as releases of 2023 spell it
    config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, ids = m.MiniGPT.from_pretrained(tmp_path), random_ids(2, 60)
    assert ours.embed_tokens.weight.dtype == torch.float32
    assert ours.config.eos_token_id == ours.config.pad_token_id == 7
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(m.HF_KINDS))
def test_fields_left_out_of_a_config_json_are_those_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, intermediate_size=96)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | sizes))
    ours, theirs = m.read_hf_config(tmp_path), transformers.AutoConfig.for_model(kind, **sizes)
    for field in m.HF_KINDS[kind][1]:  # a Qwen3MoeConfig has no head_dim: the model takes hidden_size / heads
        assert getattr(ours, field) == getattr(theirs, field, 64 // 4), field


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ("config.json", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("config.json", {"use_sliding_window": True}, "use_sliding_window"),
        ("config.json", {"mlp_bias": True}, "mlp_bias=True"),
        ("config.json", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("config.json", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("config.json", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("config.json", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("config.json", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling"),
        ("config.json", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}, "rope_scaling=.*mscale"),
        ("config.json", {"num_hidden_layers": 3}, "lack model.layers.2"),
        ("config.json", {"num_hidden_layers": 1}, "hold, against config.json, model.layers.1"),
        ("config.json", {"intermediate_size": 96}, r"gate_proj.weight is torch.float32 \(64, 32\)"),
        ("config.json", {"tie_word_embeddings": False}, "lack lm_head.weight"),
        ("config.json", {"hidden_size": "32"}, "hidden_size='32'"),
        ("config.json", {"vocab_size": None}, "vocab_size=None"),
        ("config.json", {"num_hidden_layers": 10**30}, "num_hidden_layers=10"),
        ("config.json", {"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
        ("config.json", {"rope_parameters": {"rope_type": []}}, "rope_scaling="),
        ("config.json", {"eos_token_id": [-1]}, "eos_token_id=-1"),
        ("config.json", None, "hidden_size"),
        ("config.json", b"{", "config.json"),
        ("model.safetensors", b"\xff" * 8 + b"{}", "damaged"),
        ("model.safetensors", b"", "damaged"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, file, change, message):
    huggingface_model("Qwen3").save_pretrained(tmp_path)
    if isinstance(change, bytes):
        (tmp_path / file).write_bytes(change)
    else:
        config = json.loads((tmp_path / file).read_text()) | (change or {})
        if change is None:
            del config["hidden_size"]
        (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(m.UserError, match=message):
        m.MiniGPT.from_pretrained(tmp_path)


def test_weights_are_read_from_safetensors_in_the_folder_alone(tmp_path):
    """An index may name files elsewhere, and pickles may lie there: neither is opened."""
    huggingface_model("Qwen3").save_pretrained(tmp_path / "there")
    (tmp_path / "there/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "there/model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "there/pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(m.UserError, match="holds no weights: they are read from safetensors"):
        m.MiniGPT.from_pretrained(tmp_path / "there")
    with pytest.raises(m.UserError, match="is no Hugging Face directory: it has no config.json"):
        m.MiniGPT.from_pretrained(tmp_path)


def test_a_tied_checkpoint_may_hold_the_same_output_matrix_but_no_other(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, file = huggingface_model("Llama", tied=True), tmp_path / "model.safetensors"
    theirs.save_pretrained(tmp_path)
    tensors = safetensors.load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # of older releases
    safetensors.save_file(tensors | buffers | {"lm_head.weight": embedding.clone()}, file)
    ours, ids = m.MiniGPT.from_pretrained(tmp_path), random_ids(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    for other in (embedding + 1, embedding[:9].clone()):
        safetensors.save_file(tensors | {"lm_head.weight": other}, file)
        with pytest.raises(m.UserError, match="hold, against config.json, lm_head.weight"):
            m.MiniGPT.from_pretrained(tmp_path)
    safetensors.save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, file)
    with pytest.raises(m.UserError, match="model.norm.weight is torch.int8"):
        m.MiniGPT.from_pretrained(tmp_path)


def test_an_export_holds_what_lora_has_learned(tmp_path):
    pytest.importorskip("safetensors")
    model, ids = random_model(shape()), random_ids(1, 20)
    m.add_lora(model, 2, 4.0)
    torch.nn.init.normal_(model.layers[1].mlp.down_proj.lora_b)
    model.save_pretrained(tmp_path)
    assert any("lora" in name for name, _ in model.named_parameters())  # the caller keeps it
    with torch.no_grad():
        torch.testing.assert_close(m.MiniGPT.from_pretrained(tmp_path)(ids), model(ids), rtol=0, atol=1e-5)


def with_own(name: str, part: torch.nn.Module | torch.nn.Parameter) -> m.MiniGPT:
    """A model with a part of one's own."""
    model = m.MiniGPT(shape())
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, part)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: m.MiniGPT(moe_shape()), "num_shared_experts=1"),
        (lambda: m.MiniGPT(moe_shape(num_shared_experts=0, qk_norm=False)), "qk_norm=False"),
        (lambda: m.RewardModel(shape()), "reward model"),
        (lambda: WithOwnParts(shape()), "the parameter scale cannot be exported"),
        (lambda: with_own("positions", torch.nn.Embedding(64, 32)), "the parameter positions.weight"),
        (lambda: with_own("memory", torch.nn.Parameter(torch.ones(2, 3, 4))), "the parameter memory"),
        (lambda: with_own("norm.bias", torch.nn.Parameter(torch.ones(32))), "the parameter norm.bias"),
        (lambda: with_own("layers.1.self_attn.o_proj", torch.nn.Linear(32, 32)), r"layers.1.self_attn.o_proj.bias"),
        (lambda: with_own("layers.0.self_attn.qkv_proj", torch.nn.Linear(32, 64)), r"layers.0.self_attn.qkv_proj.bias"),
        (lambda: with_own("layers.1.second", m.SwiGLU(32, 64)), r"layers.1.second.\w+.weight"),
        (
            lambda: with_own("layers.1.second", torch.nn.ModuleDict({"gate_up_proj": m.Linear(32, 64)})),
            "layers.1.second",
        ),
        (lambda: with_own("layers.1.mlp.gate", m.Linear(32, 2)), "the parameter layers.1.mlp.gate.weight"),
        (lambda: with_own("lm_head", m.Linear(32, 300)), "the parameter lm_head.weight"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, model, message):
    with pytest.raises(m.UserError, match=message):
        model().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ======================================================================================================================
# 12 Edges: GGUF, for llama.cpp
# ======================================================================================================================

GGUF_CASES = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "untied": {"tie_word_embeddings": False, "rope_theta": 500},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn with its attention factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama3": {"qk_norm": False, "rope_scaling": LLAMA3},
    "qwen3moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "shared expert": {"num_experts": 4, "num_shared_experts": 1, "moe_intermediate_size": 24},
    "shared experts": {"num_experts": 4, "num_shared_experts": 2, "moe_intermediate_size": 24, "norm_topk_prob": False},
}


def asked(server: str, place: str, **question) -> dict:
    """What a server answers."""
    request = urllib.request.Request(
        server + place, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_computes_the_same_in_llama_cpp(tmp_path, tokenizer, name):
    """Ids, log-probabilities and greedy text, with more rows in the embedding than the tokenizer has tokens."""
    llama_cpp = pytest.importorskip("xllamacpp")
    model = random_model(shape(vocab_size=tokenizer.vocab_size + 8, **GGUF_CASES[name]))
    m.write_gguf(tmp_path / "model.gguf", model, tokenizer, add_bos=True)
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.cpuparams.n_threads = str(tmp_path / "model.gguf"), 64, 1
    options.warmup = False
    options.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cache_type_k = options.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(options)
    ask = functools.partial(asked, server.listening_address)
    settings = m.GenerationConfig(max_new_tokens=8, do_sample=False)
    for text in (*TEXTS[:3], "小猫吃了 12 条鱼。\n\nThe cat's fish!"):
        ids = tokenizer.encode(text[:40], add_special_tokens=True)
        assert ask("/tokenize", content=text[:40], add_special=True)["tokens"] == ids
        options = {"prompt": ids, "temperature": 0, "cache_prompt": False}
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
        letter = [[tokenizer.encode("a")[0], 100.0]]  # probabilities come with whole characters only
        answer = ask("/completion", n_predict=1, n_probs=5, logit_bias=letter, **options)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            assert token["logprob"] == pytest.approx(logprobs[token["id"]].item(), abs=1e-4)
        greedy = m.TextGenerator(model, tokenizer).continue_ids([ids], settings)[0]
        there = ask("/completion", n_predict=8, return_tokens=True, **options)["tokens"]
        assert [t for t in there if t not in (2, 4)] == [t for t in greedy if t not in (2, 4)]
    chat = turns("小猫吃什么？")
    assert ask("/apply-template", messages=chat)["prompt"] == tokenizer.decode(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True), skip_special_tokens=False
    )


@pytest.fixture(scope="module")
def exported_chat(tmp_path_factory, tokenizer) -> tuple[Path, list[list[dict]], list[str]]:
    """The export of a model that has learned to answer, 20 chats, and its greedy replies."""
    pytest.importorskip("safetensors")
    path, words = (
        tmp_path_factory.mktemp("chat"),
        ["cat", "dog", "小猫", "小狗", "fox", "cow", "pig", "hen", "ant", "bee"],
    )
    chats = [turns(f"What is {word}?", f"A {word} 🦴.", f"{i} × 2?", f"{2 * i}。") for i, word in enumerate(words)]
    chats += [turns(f"{word}是什么？", f"是{word}。", system="你是助手。") for word in words]
    data = load(m.ConversationDataLoader, path, tokenizer, [{"messages": chat} for chat in chats], seq_len=128)
    config = m.TrainConfig(max_steps=120, warmup_steps=5, learning_rate=1e-2, sample_tokens=0)
    model = random_model(shape(hidden_size=64, max_position_embeddings=128))
    m.SFTTrainer(model, tokenizer, config=config, train_data=data, val_data=data, run_dir=path / "run").fit()
    model.save_pretrained(path / "export", tokenizer)
    m.write_gguf(path / "export/model.gguf", model, tokenizer, add_bos=False)
    questions = [chat[:-1] for chat in chats]
    generator = m.TextGenerator(model, tokenizer)
    replies = [generator.chat(chat, m.GenerationConfig(max_new_tokens=20, do_sample=False)) for chat in questions]
    assert len(set(replies)) == 20 and "是小猫。" in replies and "\ufffd" not in "".join(replies)
    return path / "export", questions, replies


def served_replies(server: str, chats: list[list[dict]]) -> list[str]:
    """Greedy replies of a server that speaks OpenAI's protocol."""
    options = {"temperature": 0, "max_tokens": 20}
    answers = [asked(server, "/v1/chat/completions", messages=chat, **options) for chat in chats]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.slow
def test_llama_server_replies_as_chat_does(exported_chat):
    llama_cpp = pytest.importorskip("xllamacpp")
    options = llama_cpp.CommonParams()  # all as llama-server has it by default
    options.model.path = str(exported_chat[0] / "model.gguf")
    assert served_replies(llama_cpp.Server(options).listening_address, exported_chat[1]) == exported_chat[2]


@pytest.mark.slow
def test_transformers_serve_replies_as_chat_does(exported_chat, tmp_path):
    for module in ("transformers", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(exported_chat[0]), "--port", port]
    with served([*argv, "--host", "127.0.0.1"], tmp_path / "log", r"running on (http://127\.0\.0\.1:\d+)") as server:
        assert served_replies(server, exported_chat[1]) == exported_chat[2]


def test_export_writes_every_format_that_can_hold_the_model(tmp_path, tokenizer, capsys):
    for name, config in (("dense", shape()), ("moe", moe_shape()), ("odd", moe_shape(head_dim=16))):
        trainer = m.PreTrainer(m.MiniGPT(config), tokenizer, config=m.TrainConfig(max_steps=1))
        trainer.run_dir = tmp_path / name
        trainer.step([lm_batch(2, 8)])
        trainer.save_checkpoint(tmp_path / name / "checkpoint.pt")
        tokenizer.save(tmp_path / name / "tokenizer.json")
        (tmp_path / name / "config.json").write_text(json.dumps(trainer.config_dict()))

    def export(name: str, *flags: str) -> tuple[int, set[str], str]:
        argv = ["--stage", "export", "--init", str(tmp_path / name), "--out", str(tmp_path / f"out {name} {flags}")]
        status, folder = train.main([*argv, *flags]), Path(argv[-1]) / "tiny/export"
        return status, {path.suffix for path in folder.glob("model.*")}, "".join(capsys.readouterr())

    assert export("dense")[:2] == (0, {".safetensors", ".gguf"})
    copied = tmp_path / "out dense ()/tiny/export"  # a base model; in a directory of Hugging Face it may be a chat's
    argv = ["--stage", "export", "--init", str(copied), "--out", str(tmp_path / "again"), "--format", "gguf", "gguf"]
    assert train.main(argv) == 0 and capsys.readouterr().out.count("for llama.cpp") == 1
    for folder, add_bos in ((copied, True), (tmp_path / "again/export/export", False)):
        assert b"tokenizer.ggml.add_bos_token" + struct.pack("<I?", 7, add_bos) in (folder / "model.gguf").read_bytes()
    assert export("dense", "--format", "hf")[:2] == (0, {".safetensors"})
    assert export("dense", "--format", "gguf")[:2] == (0, {".gguf"})
    status, files, text = export("moe")  # no architecture of transformers has shared experts
    assert (status, files) == (0, {".gguf"}) and "not for transformers: num_shared_experts=1" in text
    assert export("moe", "--format", "hf")[:2] == (2, set())
    status, files, text = export("odd")
    assert (status, files) == (2, set()) and "head_dim=16" in text
    status, files, text = export("dense", "--format", "onnx")
    assert (status, files) == (2, set()) and "--format: invalid choice: 'onnx' (choose from" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_holds_every_weight(tmp_path, tokenizer, dtype):
    gguf = pytest.importorskip("gguf")
    model = random_model(shape(qk_norm=False))
    m.add_lora(model, 2, 4.0)
    torch.nn.init.normal_(model.layers[1].mlp.down_proj.lora_b)
    m.write_gguf(tmp_path / "model.gguf", model, tokenizer, add_bos=False, dtype=dtype)
    assert any("lora" in name for name, _ in model.named_parameters())  # the caller keeps it
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    there = {tensor.name: tensor for tensor in reader.tensors}
    m.merge_lora(model)
    assert len(there) == 2 + 2 * 9
    sizes = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    for name, expected in {
        "token_embd": model.embed_tokens.weight,
        "output_norm": model.norm.weight,
        "blk.1.ffn_down": model.layers[1].mlp.down_proj.weight,
        "blk.0.ffn_up": model.layers[0].mlp.gate_up_proj.weight[64:],
        "blk.0.attn_v": model.layers[0].self_attn.qkv_proj.weight[-16:],
    }.items():
        tensor = there[f"{name}.weight"]
        kind = dtype if expected.dim() > 1 else torch.float32
        assert tensor.tensor_type == sizes.get(kind, gguf.GGMLQuantizationType.BF16)
        held = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=kind).view(expected.shape)
        torch.testing.assert_close(held, expected.detach().to(kind), rtol=0, atol=0)
    # q and k: dimension d and d + D/2 of a head become neighbours
    q = model.layers[0].self_attn.qkv_proj.weight[:8].detach()
    held = torch.frombuffer(bytearray(there["blk.0.attn_q.weight"].data.tobytes()), dtype=dtype).view(32, 32)[:8]
    assert torch.equal(held, q[[0, 4, 1, 5, 2, 6, 3, 7]].to(dtype))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.chat_template"] == m.CHAT_TEMPLATE
    assert fields["tokenizer.ggml.eos_token_ids"] == [2, 4] and fields["tokenizer.ggml.token_type"][3:6] == [3, 3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4, "norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"num_experts": 4, "qk_norm": False}, "qk_norm=False"),
        ({"num_experts": 4, "num_shared_experts": 1, "head_dim": 16}, "head_dim=16"),
        ({"rope_scaling": LLAMA3}, "rope_scaling="),
        ({"rope_scaling": YARN | {"beta_fast": 16.0}}, "rope_scaling="),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling="),
    ],
)
def test_gguf_refuses_what_llama_cpp_computes_differently(tmp_path, tokenizer, changes, message):
    (tmp_path / "model.gguf").write_text("as before")
    reason = "to export a mixture of experts" if "qk_norm" in changes else "llama.cpp computes this model differently"
    with pytest.raises(m.UserError, match=f"{message}.*{reason}"):
        m.write_gguf(tmp_path / "model.gguf", random_model(shape(**changes)), tokenizer, add_bos=True)
    with pytest.raises(m.UserError, match="score.weight cannot be exported"):
        m.write_gguf(tmp_path / "model.gguf", m.RewardModel(shape()), tokenizer, add_bos=True)
    assert (tmp_path / "model.gguf").read_text() == "as before"


# ======================================================================================================================
# 12 Edges: tokenizers of other families
# ======================================================================================================================

FAMILIES = {  # the special tokens of each, the one named as EOS, and how it cuts words
    "gpt2": (["<|endoftext|>"], "<|endoftext|>", None),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        QWEN2_PATTERN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"),
    ),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", QWEN2_PATTERN),
    "smollm": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", QWEN2_PATTERN),
}
HF_TEXTS = [*TEXTS, *["<|im_start|>user\nhi<|im_end|>\n\n<think>\n\n</think>\n\nassistant model system"] * 3]
LACKING = [*range(0xF5, 0x100), *range(0xC0, 0xC2), *range(1, 9)]  # bytes that SmolLM2's vocabulary has not
families = pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen", "smollm"])


def huggingface_tokenizer(family: str, path: Path, template: str | None = None, **config):
    """Train a tokenizer as the releases of a family are made, save it into a directory, return it."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import normalizers, pre_tokenizers, processors

    byte_level, (specials, eos, pattern) = pre_tokenizers.ByteLevel, FAMILIES[family]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=family == "llama3"))
    before = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    before += [pre_tokenizers.Digits(individual_digits=True)] if family == "smollm" else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level(add_prefix_space=False, use_regex=not pattern)])
    if family == "gpt2":
        made.pre_tokenizer = byte_level(add_prefix_space=False)
    if family in ("qwen", "llama3"):
        made.normalizer = normalizers.NFC() if family == "qwen" else normalizers.Sequence([])
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = byte_level.alphabet()
    if family == "smollm":
        alphabet = [c for c in alphabet if m.CHAR_TO_BYTE[c] not in LACKING]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=specials if family in ("gpt2", "smollm") else [],  # the others come after the merges
    )
    made.train_from_iterator(HF_TEXTS, trainer)
    made.add_special_tokens(specials)
    if family == "qwen":
        made.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    config = {"eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"} | config
    if family in ("llama3", "gemma"):
        config["bos_token"] = begin = specials[0]
        put = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), put])
    if template:
        config["chat_template"] = template
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    change_json(path, "tokenizer_config.json", **config)
    made.encode_special_tokens = True
    return made


def change_json(path: Path, file: str = "tokenizer.json", **fields) -> None:
    data = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(data | fields))


def load_imported(path: Path) -> m.ImportedTokenizer:
    return m.BPETokenizer.load(path / "tokenizer.json")


def auto_tokenizer(path: Path):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(path)


@families
def test_ids_and_bytes_are_those_of_tokenizers(tmp_path, family):
    theirs, ours = huggingface_tokenizer(family, tmp_path), load_imported(tmp_path)
    assert type(ours) is m.ImportedTokenizer
    whole = family in ("gpt2", "llama3")  # qwen normalises, smollm lacks bytes
    more = [
        "It's IT'S 'ſ we'LL 12345 ٣½Ⅷ𝟘 <think> e\u0301 a</think><|endoftext|><|im_end|> <|eot_id|>x<|begin_of_text|>",
        "hello" * 400 + "你好世界" * 200,
        " \n\n \t x\x85\u3000\u00a0 y\r\n\r\nz \x1c\x1f",
        "小猫ー" + "".join(map(chr, range(0x2E80, 0x3100))),
        "中\U00031661文\U0002ebf1 x",  # of Unicode 15, later than some Pythons
    ]
    for text in [*nasty_texts(), *HF_TEXTS, *more]:
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text).ids, text
        plain = ours.encode(text)
        assert plain == theirs.encode(text, add_special_tokens=False).ids == ours.encode(text.encode())
        assert not set(plain) & set(ours.special_tokens)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if whole:
            assert ours.decode_bytes(plain) == text.encode()
    data = bytes(range(256)) + "小猫".encode() + b"\xff\xc3"
    if whole or family == "qwen":
        assert ours.decode_bytes(ours.encode(data)) == data
    else:
        assert ours.decode_bytes(ours.encode(data)) == bytes(b for b in data if bytes([b]) in ours.token_bytes)
        assert sum(bytes([b]) not in ours.token_bytes for b in range(256)) == len(LACKING) == 21
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.vocab_size == len(ours.token_bytes) == theirs.get_vocab_size()
    assert ours.bos_id == (theirs.token_to_id("<|begin_of_text|>") if family == "llama3" else None)
    assert ours.special_tokens == {theirs.token_to_id(text): text for text in FAMILIES[family][0]}


@families
def test_only_tokenizers_with_chatml_hold_conversations_without_a_template(tmp_path, family):
    theirs = huggingface_tokenizer(family, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    ours = load_imported(tmp_path)
    assert ours.eos_id == theirs.token_to_id("<|end_of_text|>" if family == "llama3" else "<|endoftext|>")
    chat = [{"role": "user", "content": "小猫 <|im_end|>"}]
    if family in ("qwen", "smollm"):
        ids = ours.apply_chat_template(chat, add_generation_prompt=True)
        assert ours.decode(ids, skip_special_tokens=False).endswith("<|im_end|><|im_end|>\n<|im_start|>assistant\n")
        assert ids.count(ours.im_end_id) == 1 and ours.stop_ids == (ours.eos_id, ours.im_end_id)
        change_json(tmp_path, "tokenizer_config.json", chat_template="")  # the same as none
        assert load_imported(tmp_path).apply_chat_template(chat, add_generation_prompt=True) == ids
    else:
        for ask in (ours.apply_chat_template, ours.encode_chat):
            with pytest.raises(m.UserError, match="cannot hold conversations"):
                ask(chat)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_out_of_order_and_twice_the_same_token(tmp_path, ignore_merges):
    """As in Llama 3's file, which lists every way to make a token, in the order of the results' ids."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(i): i - 33 for i in range(33, 127)}
    bytes_ = {c: i for i, c in enumerate(sorted(set(m.CHAR_TO_BYTE) - set(letters)), len(letters))}
    tokens = ["aba", "ab", "ba", "abab", "c" * 2, "c" * 3, "bc", "abc", "bcab"]  # no merges make the last
    vocab = letters | bytes_ | {token: 256 + i for i, token in enumerate(tokens)}
    merges = ["b c", "ab a", "a ba", "a b", "b a", "ab ab", "c c", "cc c", "c cc", "a bc"]
    merges = [tuple(pair.split()) for pair in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=ignore_merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = load_imported(tmp_path)
    for length in range(1, 9):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            assert ours.encode(text) == made.encode(text).ids, text
    assert (len(ours.encode("bcab")) == 1) == ignore_merges
    draw = torch.Generator().manual_seed(0)
    for length in range(31, 331):  # merged by the queue
        long = "".join("abc"[i] for i in torch.randint(0, 3, (length,), generator=draw).tolist())
        assert ours.encode(long) == made.encode(long).ids


def test_special_tokens_that_the_file_has_as_ordinary(tmp_path):
    theirs = huggingface_tokenizer("smollm", tmp_path, pad_token="</s>")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    added = [token | {"special": False} for token in data["added_tokens"]]
    change_json(tmp_path, added_tokens=added)
    ours = load_imported(tmp_path)
    assert set(ours.special_tokens.values()) == {"<|im_start|>", "<|im_end|>"}  # <|endoftext|> is not named here
    assert ours.encode("a<|im_end|>") == theirs.encode("a<|im_end|>").ids
    assert ours.encode("<|endoftext|>") == [theirs.token_to_id("<|endoftext|>")]
    assert ours.decode([*ours.encode("a"), ours.eos_id]) == "a"
    assert ours.pad_id == ours.eos_id == theirs.token_to_id("<|im_end|>")
    change_json(tmp_path, added_tokens=added[1:])  # in the vocabulary alone
    change_json(tmp_path, "tokenizer_config.json", eos_token={"content": "<|endoftext|>"}, pad_token="<|im_end|>")
    ours = load_imported(tmp_path)
    assert (ours.eos_id, ours.pad_id) == tuple(map(theirs.token_to_id, ("<|endoftext|>", "<|im_end|>")))
    assert ours.encode("<|endoftext|>") == theirs.encode("<|endoftext|>").ids


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    model = m.MiniGPT(shape(vocab_size=299))
    for use in (
        lambda: m.PreTrainer(model, tokenizer),
        lambda: m.TextGenerator(model, tokenizer),
        lambda: model.save_pretrained(tmp_path / "export", tokenizer),
    ):
        with pytest.raises(m.UserError, match="the tokenizer's 300 tokens exceed the model's vocab_size=299"):
            use()


def test_an_end_that_a_tokenizer_puts_after_a_text_is_no_bos(tmp_path):
    from tokenizers.processors import TemplateProcessing

    made = huggingface_tokenizer("qwen", tmp_path)
    end = "<|endoftext|>"
    made.post_processor = TemplateProcessing(f"$A {end}", special_tokens=[(end, made.token_to_id(end))])
    made.encode_special_tokens = False
    made.save(str(tmp_path / "tokenizer.json"))
    assert made.encode("a").ids[1:] == [made.token_to_id(end)] and load_imported(tmp_path).bos_id is None


def test_stops_come_from_all_files(tmp_path):
    find = huggingface_tokenizer("llama3", tmp_path, template=LLAMA).token_to_id
    change_json(tmp_path, "tokenizer_config.json", eos_token=None)
    assert load_imported(tmp_path).stop_ids == (find("<|end_of_text|>"), find("<|eot_id|>"))
    change_json(tmp_path, "generation_config.json", eos_token_id=[find("<|end_header_id|>"), find("<|eot_id|>")])
    ours = load_imported(tmp_path)
    assert ours.stop_ids == (find("<|end_of_text|>"), find("<|end_header_id|>"), find("<|eot_id|>"))
    ours.save_pretrained(tmp_path / "copy")
    assert load_imported(tmp_path / "copy").stop_ids == ours.stop_ids
    change_json(tmp_path, "generation_config.json", eos_token_id=10**6)
    with pytest.raises(m.UserError, match="eos_token_id"):
        load_imported(tmp_path)


@pytest.mark.parametrize(("family", "fields"), [("gemma", {}), ("gpt2", {"added_tokens": []})])
def test_a_tokenizer_without_an_end_is_refused(tmp_path, family, fields):
    huggingface_tokenizer(family, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    change_json(tmp_path, **fields)
    with pytest.raises(m.UserError, match="no token ends a text: name an eos_token in tokenizer_config.json"):
        load_imported(tmp_path)


ADDED = {
    "content": "<|new|>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace.* is not supported"),
        ({"pre_tokenizer": None}, "null is not supported"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"post_processor": {"type": "BertProcessing"}}, "is not a tokenizer.json"),
        ({"added_tokens": [ADDED | {"id": 10**12}]}, "is not a tokenizer.json"),
        ({"added_tokens": 3}, "is not a tokenizer.json"),
        ({"model": {"type": "Unigram"}}, "type='Unigram'"),
        ({"model": BPE | {"byte_fallback": True}}, "byte_fallback=True"),
        ({"model": BPE | {"dropout": 0.1}}, "dropout=0.1"),
        ({"model": BPE | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix='</w>'"),
        ({"model": BPE | {"merges": [["a", "b"]]}}, "is not a tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": 3}}, "is not a tokenizer.json"),
        ({"model": BPE | {"vocab": {"a": 0, "b": 10_000_000}}}, "id"),  # a list of so many tokens would be made
        ({"model": None}, "is not a tokenizer.json"),
    ],
)
def test_what_is_not_byte_level_bpe_is_named(tmp_path, fields, message):
    huggingface_tokenizer("gpt2", tmp_path)
    change_json(tmp_path, **fields)
    with pytest.raises(m.UserError, match=f"tokenizer.json.*{message}"):
        load_imported(tmp_path)


def split_by(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


@pytest.mark.parametrize(
    "fields",
    [
        *map(split_by, (r"\p{Han}+|a", r"\w+", r"[[:alpha:]]+", r"[a-z&&x]")),
        {"normalizer": {"type": "Lowercase"}},
        {"post_processor": {"type": "BertProcessing", "sep": ["a", 5], "cls": ["b", 6]}},
        {"added_tokens": [ADDED | {"content": "<|endoftext|>", "id": 9}]},  # the vocabulary's id counts
        {"added_tokens": [ADDED | {"id": 4_000_000_000}, ADDED | {"content": "<|endoftext|>", "id": 0}]},
    ],
)
def test_what_tokenizers_can_read_can_be_read(tmp_path, fields):
    """Any regular expression, normaliser and post-processor, and ids that the file has wrong."""
    huggingface_tokenizer("gpt2", tmp_path)
    change_json(tmp_path, **fields)
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours = load_imported(tmp_path)
    for text in [*HF_TEXTS, *nasty_texts()[:500], "xAbX 中文a x<|new|>"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size() and ours.eos_id == theirs.token_to_id("<|endoftext|>") == 0


def test_a_tokenizer_that_changes_texts_is_named(tmp_path, recwarn):
    huggingface_tokenizer("smollm", tmp_path)
    load_imported(tmp_path)
    assert not recwarn.list
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for fields, back in (
        ({"normalizer": {"type": "Lowercase"}}, r"a b\\n c"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, byte_level]}}, "ab"),
    ):
        change_json(tmp_path, **fields)
        with pytest.warns(UserWarning, match=f"this tokenizer changes texts: 'A b.* comes back as '{back}"):
            load_imported(tmp_path)


def test_broken_files_and_missing_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(m.UserError, match="does not exist"):
        load_imported(tmp_path)
    huggingface_tokenizer("qwen", tmp_path, template="{% if %}")
    with pytest.raises(m.UserError, match="is not Jinja"):
        load_imported(tmp_path)
    for package in ("jinja2", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(m.UserError, match=rf"needs {package}: pip install -e '.\[hf\]'"):
            load_imported(tmp_path)
    monkeypatch.undo()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(m.UserError, match="tokenizer_config.json: not JSON"):
        load_imported(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(m.UserError, match="tokenizer.json: not JSON"):
        load_imported(tmp_path)
    with pytest.raises(m.UserError, match="is not a tokenizer.json"):
        m.ImportedTokenizer(tmp_path / "tokenizer.json")


def test_a_word_of_the_vocabulary_cannot_be_special(tmp_path):
    huggingface_tokenizer("gpt2", tmp_path, pad_token="a")
    with pytest.raises(m.UserError, match="special token 'a' is not supported"):
        load_imported(tmp_path)


def test_unknown_bytes_are_no_special_token(tmp_path):
    huggingface_tokenizer("smollm", tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change_json(tmp_path, model=data["model"] | {"unk_token": "<|endoftext|>"})
    ours = load_imported(tmp_path)
    assert ours.encode("a\x01b") == ours.encode("a") + ours.encode("b")


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_again_by_transformers(tmp_path, family, side):
    theirs, ours = huggingface_tokenizer(family, tmp_path), load_imported(tmp_path)
    auto = auto_tokenizer(tmp_path)
    auto.padding_side, auto.truncation_side = side, side
    auto.add_special_tokens({"pad_token": "<|padding|>"})
    auto(["a b c", "d"], padding="max_length" if side == "left" else True, truncation=True, max_length=5)
    auto.save_pretrained(tmp_path / "again")
    assert '"truncation": {' in (tmp_path / "again/tokenizer.json").read_text()
    again = load_imported(tmp_path / "again")
    for text in [*HF_TEXTS, "a"]:
        assert again.encode(text) == ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert again.pad_id == ours.vocab_size == again.vocab_size - 1 and again.eos_id == ours.eos_id
    assert again.stop_ids == ours.stop_ids and again.bos_id == ours.bos_id
    data = json.loads((tmp_path / "tokenizer.json").read_text())  # releases before 2024 spell a merge in one string
    change_json(tmp_path, model=data["model"] | {"merges": [" ".join(pair) for pair in data["model"]["merges"]]})
    change_json(tmp_path, "tokenizer_config.json", eos_token={"content": FAMILIES[family][0][0]})
    spelled = load_imported(tmp_path)
    assert spelled.encode(TEXTS[0]) == ours.encode(TEXTS[0]) and spelled.eos_id == theirs.token_to_id(
        FAMILIES[family][0][0]
    )


def test_our_own_export_saved_again_by_transformers(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "ours")
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "ours")
    auto(["a b c", "d"], padding="max_length", truncation=True, max_length=5)
    auto.save_pretrained(tmp_path / "again")
    assert load_imported(tmp_path / "again").content_hash() == tokenizer.content_hash()
    auto.add_special_tokens({"pad_token": "<|padding|>"})
    auto.save_pretrained(tmp_path / "padded")
    padded, chat = load_imported(tmp_path / "padded"), turns("小猫 <|eos|>", "喵", "?")
    assert padded.pad_id == tokenizer.vocab_size and set(padded.stop_ids) == set(tokenizer.stop_ids)
    for text in [*TEXTS, "<|padding|>"]:
        assert padded.encode(text, add_special_tokens=True) == tokenizer.encode(text, add_special_tokens=True)
    assert padded.apply_chat_template(chat, True) == tokenizer.apply_chat_template(chat, True)
    auto.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare/tokenizer_config.json").unlink()  # then it may be damaged
    with pytest.raises(m.UserError, match="its special tokens, words or vocabulary differ"):
        load_imported(tmp_path / "bare")


@pytest.mark.parametrize("family", ["qwen", "smollm"])
def test_a_second_end_that_the_file_has_as_ordinary_stops_and_is_not_shown(tmp_path, family):
    """As in Qwen's releases: <|endoftext|> beside <|im_end|>, named by generation_config.json alone."""
    theirs = huggingface_tokenizer(family, tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change_json(tmp_path, added_tokens=[token | {"special": False} for token in data["added_tokens"]])
    ends = [theirs.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    change_json(tmp_path, "generation_config.json", eos_token_id=ends)
    ours = load_imported(tmp_path)
    assert set(ours.stop_ids) == set(ends) and ours.decode([*ours.encode("a"), *ends]) == "a"
    for text in ("<|endoftext|>", "a<|im_end|>b", "<|im_start|>"):
        ids = ours.encode(text)
        assert not set(ids) & set(ours.special_tokens) and ours.decode(ids) == text


@families
def test_an_imported_tokenizer_is_saved_and_loaded(tmp_path, family):
    huggingface_tokenizer(family, tmp_path, template=LLAMA if family == "llama3" else None)
    ours = load_imported(tmp_path)
    (tmp_path / "run").mkdir()
    ours.save(tmp_path / "run/tokenizer.json")
    copy = load_imported(tmp_path / "run")
    assert copy.content_hash() == ours.content_hash() and copy.stop_ids == ours.stop_ids
    assert copy.to_json() == ours.to_json()
    if family == "gpt2":
        with pytest.raises(m.UserError, match="cannot hold conversations: it has no chat template"):
            copy.apply_chat_template(CHAT)
        return
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "run")
    assert copy.apply_chat_template(CHAT) == ours.apply_chat_template(CHAT) == transformed(auto, CHAT)
    (tmp_path / "run/chat_template.jinja").write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    other = load_imported(tmp_path / "run")
    assert other.apply_chat_template(CHAT) == [*other.encode(CHAT[0]["content"]), other.eos_id]
    assert other.content_hash() != ours.content_hash()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}]
    change_json(tmp_path, "tokenizer_config.json", chat_template=named)
    assert load_imported(tmp_path).apply_chat_template(CHAT) == [ours.eos_id]


def test_threads_encode(tmp_path):
    huggingface_tokenizer("qwen", tmp_path)
    ours = load_imported(tmp_path)
    expected = ours.encode_batch(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for ids in pool.map(lambda _: ours.encode_batch(TEXTS), range(40)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork no children encode")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_encodes(tmp_path):
    theirs, ours = huggingface_tokenizer("qwen", tmp_path), load_imported(tmp_path)
    theirs.encode_batch(TEXTS * 50)  # starts the threads of `tokenizers`
    expected = ours.encode_batch(TEXTS)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ours.encode_batch(TEXTS) == expected else 1)
    assert os.waitpid(pid, 0)[1] == 0


# ======================================================================================================================
# 12 Edges: chat templates of other families
# ======================================================================================================================

CHAT = [{"role": "user", "content": "小猫 hi"}, {"role": "assistant", "content": "ok 12。"}]
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "x" %}
{%- endif %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}{% set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for turn in rest %}
    {%- if turn.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + turn.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + turn.role + "<|end_header_id|>\\n\\n" + turn.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""
QWEN2 = """{%- if messages[0]["role"] != "system" %}
    {{- "<|im_start|>system\\nYou help, 好。<|im_end|>\\n" }}
{%- endif %}
{%- for turn in messages %}
    {%- if turn.role != "tool" %}
        {{- "<|im_start|>" + turn.role + "\\n" + turn.content + "<|im_end|>" + "\\n" }}
    {%- else %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
        {{- "\\n<tool_response>\\n" + turn.content + "\\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ "<|im_end|>\\n" }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
QWEN3 = """{%- set ns = namespace(asked=-1) %}
{%- for turn in messages %}{% if turn.role == "user" %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in messages %}
    {%- if turn.role == "assistant" %}
        {%- set text = turn.content %}{% set thought = "" %}
        {%- if "</think>" in text %}
            {%- set thought = text.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set text = text.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- "<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" + text.lstrip("\\n") }}
        {%- else %}
            {{- text }}
        {%- endif %}
        {{- "<|im_end|>\\n" }}
    {%- elif turn.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + turn.content + "\\n</tool_response><|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" + turn.role + "\\n" + turn.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}"""
SMOLLM = """{% for turn in messages %}{% if loop.first and turn['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are small<|im_end|>\\n' }}{% endif %}{% generation %}
{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n' }}{% endgeneration %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}
    {%- set name = 'model' if turn.role == 'assistant' else turn.role %}
    {{- '<start_of_turn>' + name + '\\n' + turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
TEMPLATES = {
    "llama": ("llama3", LLAMA, "st"),  # with a system prompt, tools
    "qwen2": ("qwen", QWEN2, "st"),
    "qwen3": ("qwen", QWEN3, "st"),
    "smollm": ("smollm", SMOLLM, "s"),
    "gemma": ("gemma", GEMMA, ""),
}


def transformed(auto, chat, prompt=False):
    ids = auto.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt)
    return list(ids if isinstance(ids, list) else ids["input_ids"])


def random_text(draw, blanks=True):
    words = ["小猫看见", "一条鱼。", "Hello,", " world", "don't", " 123", "\n", "\n\n", "  ", "，", "é😀", "\ue000"]
    words.append("a+b\n")
    text = "".join(draw.choices(words, k=draw.randrange(1, 12)))
    return text if blanks else text.strip() or "x"


def random_chat(draw, allowed, text):
    chat = [{"role": "system", "content": text(draw)}] if "s" in allowed and draw.random() < 0.5 else []
    for _ in range(draw.randrange(1, 5)):
        chat += [{"role": "user", "content": text(draw)}, {"role": "assistant", "content": text(draw)}]
        if "t" in allowed and draw.random() < 0.3:
            chat += [{"role": "tool", "content": text(draw)}] * draw.randrange(1, 3)
            chat.append({"role": "assistant", "content": text(draw)})
    return chat if draw.random() < 0.7 else chat[:-1]


def test_a_template_has_the_settings_that_transformers_gives_it():
    """Worked example: tags leave no blanks and line ends, loops can be left, JSON is not escaped for HTML."""
    pytest.importorskip("jinja2")
    source = """{% for n in messages %}
        {% if n == 2 %}{% continue %}{% endif %}
{{ n }}
        {% if n == 3 %}{% break %}{% endif %}
{% endfor %}
{{ {"a": "<é>"} | tojson }}"""
    assert m.compile_chat_template(source).render(messages=[1, 2, 3, 4]) == '1\n3\n{"a": "<é>"}'


@pytest.mark.parametrize("kind", TEMPLATES)
def test_conversations_are_those_of_transformers(tmp_path, kind):
    family, template, allowed = TEMPLATES[kind]
    huggingface_tokenizer(family, tmp_path, template=template)
    ours, auto = load_imported(tmp_path), auto_tokenizer(tmp_path)
    draw = random.Random(1)
    for i in range(50):
        chat = random_chat(draw, allowed, lambda draw, i=i: random_text(draw, blanks=i % 2 == 0))
        for prompt in (False, True):
            assert ours.apply_chat_template(chat, prompt) == transformed(auto, chat, prompt)
        ids, own = ours.encode_chat(chat)
        assert len(ids) == len(own)
        assert ours.decode_bytes(ids) == ours.decode_bytes(transformed(auto, chat))
        if i % 2:  # nothing strips anything
            assert ids == transformed(auto, chat)
            answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
            end = ours.special_tokens[ours.stop_ids[-1]]
            trained = [token for token, is_own in zip(ids, own, strict=True) if is_own]
            assert ours.decode(trained, skip_special_tokens=False) == "".join(text + end for text in answers)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_contents_never_become_special_tokens(tmp_path, kind):
    family, template, allowed = TEMPLATES[kind]
    huggingface_tokenizer(family, tmp_path, template=template)
    ours = load_imported(tmp_path)
    draw = random.Random(2)
    for _ in range(50):
        chat = random_chat(draw, allowed, lambda draw: random_text(draw, blanks=False))
        counts = [sum(map(ids.count, ours.special_tokens)) for ids in [ours.apply_chat_template(chat)]]
        for turn in chat:
            turn["content"] += draw.choice([*FAMILIES[family][0], "<|im_end|>\n<|im_start|>assistant\n"]) + "\n y"
        for ids in (ours.apply_chat_template(chat), ours.encode_chat(chat)[0]):
            assert [sum(map(ids.count, ours.special_tokens))] == counts
        shown = ours.decode(ids)
        for turn in chat:
            assert turn["content"] in shown or "\\n" in shown  # JSON of a tool's answer


def trained_text(ours, chat, first=0):
    """The trained runs of a conversation, joined by |."""
    ids, own = ours.encode_chat(chat, first)
    text, before = "", True
    for token, is_own in zip(ids, own, strict=True):
        text += ("" if before or not text else "|") + ours.decode([token], False) if is_own else ""
        before = is_own
    return text


def test_a_record_that_a_chat_template_refuses_is_named_with_its_place(tmp_path):
    huggingface_tokenizer("gemma", tmp_path / "gemma", template=GEMMA)  # it has no system role
    tokenizer = load_imported(tmp_path / "gemma")
    chats = [{"messages": turns("hi", "yo")}, {"system": "Be brief.", "messages": turns("hi", "yo")}]
    with pytest.raises(m.UserError, match=r"chats\.jsonl:2: the chat template refuses"):
        m.ConversationDataLoader(
            write_jsonl(tmp_path / "chats.jsonl", chats), tokenizer, split="all", cache_dir=tmp_path / "cache"
        )


def test_records_that_a_chat_template_refuses_can_be_skipped_and_are_counted(tmp_path):
    huggingface_tokenizer("gemma", tmp_path / "gemma", template=GEMMA)
    tokenizer = load_imported(tmp_path / "gemma")
    good, bad = {"messages": turns("hi", "yo")}, {"system": "Be brief.", "messages": turns("hi", "yo")}
    records = [good, bad, good, bad, {"messages": 3}]
    for _ in range(2):  # a second start from the cache says it again
        with pytest.warns(UserWarning) as found:
            loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, on_bad_record="skip")
        said = str(found[0].message)
        assert re.search(r"2 × refused by the chat template, the first at \S+records.jsonl:2: .*no system role", said)
        assert "1 × malformed" in said and len(loader.items) == 2


def test_a_template_without_an_end_of_turn_is_named(tmp_path):
    template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    huggingface_tokenizer("qwen", tmp_path / "a", template=template)
    with pytest.warns(UserWarning, match="no special token after a reply: a model cannot learn where to stop"):
        load_imported(tmp_path / "a")
    huggingface_tokenizer("qwen", tmp_path / "b", template=QWEN2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_imported(tmp_path / "b")


def test_what_is_trained(tmp_path):
    chat = [
        {"role": role, "content": text}
        for role, text in (("system", "s"), ("user", "u"), ("assistant", "a b"), ("user", "v"), ("assistant", "c"))
    ]
    for kind, end in (("qwen2", "<|im_end|>"), ("llama", "<|eot_id|>"), ("smollm", "<|im_end|>")):
        huggingface_tokenizer(TEMPLATES[kind][0], tmp_path / kind, template=TEMPLATES[kind][1])
        ours = load_imported(tmp_path / kind)
        assert trained_text(ours, chat) == f"a b{end}|c{end}"
        assert trained_text(ours, chat, first=3) == f"c{end}"
        assert trained_text(ours, chat, first=5) == ""
        ids, own = ours.encode_chat(chat[:3])
        start = own.index(True)
        assert ours.decode(ids[start:]).startswith("a b") and own[start : start + 3] == [True] * 3
        empty = [*chat[:2], {"role": "assistant", "content": ""}]
        assert trained_text(ours, empty) == end
    blank = [{"role": "user", "content": " u "}, {"role": "assistant", "content": "\n a\n"}]
    assert trained_text(ours, blank) == "\n a\n<|im_end|>"  # smollm, which strips nothing
    assert trained_text(load_imported(tmp_path / "llama"), blank) == "a<|eot_id|>"
    huggingface_tokenizer("gemma", tmp_path / "gemma", template=GEMMA)
    ours = load_imported(tmp_path / "gemma")
    assert trained_text(ours, chat[1:]) == "a b<end_of_turn>|c<end_of_turn>"
    for ask in (ours.encode_chat, ours.apply_chat_template):
        with pytest.raises(m.UserError, match="no system role"):
            ask(chat)


def test_thoughts_are_trained(tmp_path):
    huggingface_tokenizer("qwen", tmp_path, template=QWEN3)
    ours, auto = load_imported(tmp_path), auto_tokenizer(tmp_path)
    thinks = "<think>\n hm,  \n</think>\n\nyes.\n"
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "\nu"), ("assistant", thinks), ("user", "v"), ("assistant", thinks))
    ]
    assert ours.apply_chat_template(chat) == transformed(auto, chat)
    assert trained_text(ours, chat) == "yes.\n<|im_end|>|hm,  \n</think>\n\nyes.\n<|im_end|>"
    assert trained_text(ours, CHAT) == "ok 12。<|im_end|>"


def test_a_template_that_changes_contents_is_refused(tmp_path):
    huggingface_tokenizer("qwen", tmp_path, template="{{ messages[0].content[:3] }}{{ messages | length }}<|im_end|>")
    with pytest.raises(m.UserError, match="cannot be rendered for this conversation"):
        load_imported(tmp_path).apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(m.UserError, match="needs a message"):
        load_imported(tmp_path).apply_chat_template([])


def test_special_tokens_that_swallow_blanks(tmp_path):
    made = huggingface_tokenizer("qwen", tmp_path, template=QWEN2)
    data = json.loads(made.to_str())
    change_json(
        tmp_path,
        added_tokens=[
            token | {"rstrip": True, "lstrip": token["content"] == "<|im_start|>"} for token in data["added_tokens"]
        ],
    )
    ours, auto = load_imported(tmp_path), auto_tokenizer(tmp_path)
    assert ours.apply_chat_template(CHAT, True) == transformed(auto, CHAT, True)
    assert trained_text(ours, CHAT) == "ok 12。<|im_end|>"


def test_loaders_take_imported_tokenizers(tmp_path):
    """Documents have a BOS only if the family has one; replies are trained up to their end; prompts are as asked."""
    for kind, (family, template, _) in TEMPLATES.items():
        folder = tmp_path / kind
        huggingface_tokenizer(family, folder, template=template)
        ours = load_imported(folder)
        text = write_jsonl(folder / "text.jsonl", [{"text": "小猫 a"}, {"text": "b"}])
        tokens = encode_corpus(text, ours, "all", folder / "cache")
        bos = [] if ours.bos_id is None else [ours.bos_id]
        assert tokens.tolist() == [*bos, *ours.encode("小猫 a"), ours.eos_id, *bos, *ours.encode("b"), ours.eos_id]
        chats = [{"messages": turns("小猫？", "吃鱼。", "ok?", "yes, ok"), "answer": "x"}]
        loader = load(m.ConversationDataLoader, folder, ours, chats)
        ids, trained = loader.sequence(0)
        end = ours.special_tokens[ours.stop_ids[-1]]
        assert ours.decode(ids[trained], skip_special_tokens=False) == f"吃鱼。{end}yes, ok{end}" and trained[-1]
        (batch,) = load(m.PromptDataLoader, folder, ours, chats)
        asked = ours.apply_chat_template(chats[0]["messages"][:3], add_generation_prompt=True)
        assert batch["input_ids"] == [asked] and batch["messages"] == [chats[0]["messages"][:3]]


# ======================================================================================================================
# 12 Edges: the command line and reward files
# ======================================================================================================================


@dataclasses.dataclass
class Colours:
    """Options as MiniLLM's dataclasses have them."""

    shade: float = 0.5  # how dark, 0 … 100%
    kind: Literal["warm", "cold"] = "warm"  # the family
    is_loud: bool = False  # whether people look
    layers: int | None = None  # of paint
    names: list[str] | None = None  # of the colours
    mixed: dict | None = None  # of what, and how much


def colours(**options) -> m.FlagParser:
    parser = m.FlagParser(add_help=False)
    m.add_flags(parser, Colours(shade=2.0), "colours", **options)
    return parser


def test_a_field_becomes_a_flag():
    """Worked example: the type becomes the choices or the metavar, the comment and the default become the help."""
    lines = [" ".join(line.split()) for line in colours().format_help().partition("colours:\n")[2].splitlines()]
    assert lines == [
        "--shade FLOAT how dark, 0 … 100% [2.0]",
        "--kind {warm,cold} the family [warm]",
        "--is-loud, --no-is-loud",
        "whether people look [False]",
        "--layers INT of paint",
        "--names TEXT [TEXT ...]",
        "of the colours",
        "--mixed DICT of what, and how much",
    ]
    assert "loud" not in colours(skip=("is_loud",)).format_help()


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ("", {}),
        ("--shade 3 --no-is-loud", {"shade": 3.0, "is_loud": False}),
        ("--is-loud --layers=4 --kind cold", {"is_loud": True, "layers": 4, "kind": "cold"}),
        ('--names red blue --mixed {"red":2}', {"names": ["red", "blue"], "mixed": {"red": 2}}),
        ("--names red blue --layers 1 --names pink", {"names": ["red", "blue", "pink"], "layers": 1}),
    ],
)
def test_only_given_flags_are_returned_in_their_types(argv, given):
    """Worked example: what is not given is absent, so that presets can supply it."""
    assert m.given_flags(colours().parse_args(argv.split()), Colours) == given


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shde", "1"], "unknown argument --shde: did you mean --shade?"),
        (["--shde=1"], "did you mean --shade?"),
        (["--answer-tokens", "1"], "did you mean --reply-tokens?"),
        (["--sha", "1"], "unknown argument --sha"),  # no abbreviations
        (["--zzz"], "unknown argument --zzz (see --help)"),
        (["--kind", "hot"], "invalid choice: 'hot'"),
        (["--layers", "x"], "invalid int value"),
        (["--shade"], "expected one argument"),
        (["--mixed", "[1]"], "--mixed: '[1]' is no JSON object like {"),
        (["--mixed", "yarn"], "--mixed"),
        (["--mixed", "3"], "--mixed"),
        (["--mixed", "{"], "--mixed"),
        (["--kind", ""], "invalid choice: ''"),
    ],
)
def test_a_mistyped_flag_is_a_user_error(argv, message):
    with pytest.raises(m.UserError, match=re.escape(message)):
        colours().parse_args(argv)


@pytest.mark.parametrize("cls", [m.MiniGPTConfig, m.TrainConfig, m.GenerationConfig, m.RLHFConfig])
def test_every_field_is_a_flag_that_shows_its_default(cls):
    parser = m.FlagParser()
    m.add_flags(parser, cls(), "options", skip=("seed",))
    text = " ".join(parser.format_help().split())
    for field in (field for field in dataclasses.fields(cls) if field.name != "seed"):
        assert "--" + field.name.replace("_", "-") in text
        assert getattr(cls(), field.name) is None or f"[{getattr(cls(), field.name)}]" in text
    assert "--seed" not in text and m.given_flags(parser.parse_args([]), cls) == {}
    if cls is m.TrainConfig:
        assert "largest norm of a module's whole gradient" in text and "when memory runs out" in text


def test_a_reward_in_a_file(tmp_path, tokenizer):
    """Worked example: FILE.py:function is executed, and is what PPO calls with (messages, reply, answer)."""
    (tmp_path / "mine.py").write_text("def f(messages, reply, answer):\n    return len(reply)\n\nx = 3\n")
    assert m.load_reward(f"{tmp_path}/mine.py:f", tokenizer)([], "four", "") == 4


def test_load_reward(tmp_path, trained_runs, tokenizer):
    assert m.load_reward("answer", tokenizer) is m.answer_reward
    assert isinstance(m.load_reward(str(trained_runs / "reward"), tokenizer), m.RewardModel)
    (tmp_path / "mine.py").write_text("def f(messages, reply, answer):\n    return len(reply)\n\nx = 3\n")
    (tmp_path / "torn.py").write_text("x = 1\ndef f(:\n")
    for source, message in (
        (str(trained_runs / "pretrain"), "nor the run directory of a reward model"),
        (str(tmp_path), "is neither answer, nor FILE.py:function, nor the run directory"),
        (f"{tmp_path}/mine.py:g", "no function g"),
        (f"{tmp_path}/mine.py:x", "no function x"),
        (f"{tmp_path}/nine.py:f", "there is no file"),
        (f"{tmp_path}/torn.py:f", "torn.py:2: "),
    ):
        with pytest.raises(m.UserError, match=message):
            m.load_reward(source, tokenizer)
    other = m.BPETokenizer(vocab_size=270)
    other.train(["another one another one"])
    with pytest.raises(m.UserError, match="its tokenizer is not the policy's"):
        m.load_reward(str(trained_runs / "reward"), other)
    with pytest.raises(m.UserError, match='needs prompts with an "answer"'):
        m.answer_reward(turns("hm?"), "a", "")
    assert m.answer_reward(turns("hm?"), "Yes.", "yes") == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nosuchmodule", "mine.py:1: ModuleNotFoundError"),
        ("def f(messages, reply):\n    return 1", "TypeError"),
        ("import sys\ndef f(*args):\n    sys.exit(3)", "mine.py:3: SystemExit"),
        ("def f(*args):\n    return 'good'", "gave 'good'"),
        ("f = 3", "no function f"),
    ],
)
def test_a_reward_that_fails_is_one_message(trained_runs, tmp_path, capsys, code, message):
    (tmp_path / "mine.py").write_text(code)
    argv = ["--stage", "grpo", "--init", str(trained_runs / "pretrain"), "--out", str(tmp_path), "--max-steps", "1"]
    assert train.main([*argv, *QUICK, *data_flags(trained_runs), "--reward", f"{tmp_path}/mine.py:f"]) == 2
    assert message in one_error(capsys)


# ======================================================================================================================
# Several processes: what n of them compute is what one computes
# ======================================================================================================================

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


def in_processes(size: int, fn, timeout: float = 60) -> list:
    """What fn() returns in each of `size` processes, joined as torchrun does it; an error's message, None if killed."""
    # torchrun's part: a store that outlives all of them, in a process of its own, so that this one forks alone
    read, write = os.pipe()
    if not (host := os.fork()):
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    port = os.read(read, 9).decode()
    files, children = [tempfile.TemporaryFile() for _ in range(size)], []
    for rank, file in enumerate(files):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.set_num_threads(1)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ["LOCAL_WORLD_SIZE"] = str(size)
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
                m.WORLD.start()
                try:
                    answer = fn()
                except m.UserError as error:
                    answer = f"UserError: {error}"
                torch.save(answer, file)
                file.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    running, end = set(children), time.monotonic() + timeout
    while running and time.monotonic() < end:
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.02)
    for child in (host, *running):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(read), os.close(write)
    assert not running, "no end in time"
    return [torch.load(file, weights_only=True) if file.seek(0, 2) and not file.seek(0) else None for file in files]


@needs_fork
def test_sums_gathers_and_shares_by_hand():
    def work():
        W, r = m.WORLD, m.WORLD.rank
        stack = torch.arange(10.0).view(5, 2)
        return {
            "sum": W.sum(torch.tensor([1.0, r])).tolist(),
            "max": W.max(r, -r),
            "gather": W.gather({"rank": r, "t": torch.full((r + 1,), r)}),
            "first": W.first(lambda: f"from {r}"),
            "add": W.add({"a": 1, **({"b": 0.5} if r == 1 else {})}),
            "mine": W.mine({"x": torch.arange(5), "y": list("abcde")}),
            "share": W.share(lambda rows: rows * 2, stack),
            "seed": W.seed(7),
            "first to": W.is_first_to("shout"),
        }

    results = in_processes(3, work)
    for r, found in enumerate(results):
        assert found["sum"] == [3, 3] and found["max"] == [2, 0] and found["first"] == "from 0"
        assert [part["rank"] for part in found["gather"]] == [0, 1, 2]
        assert [part["t"].tolist() for part in found["gather"]] == [[0], [1, 1], [2, 2, 2]]
        assert found["add"] == {"a": 3, "b": 0.5}
        assert found["mine"]["x"].tolist() == [[0, 3], [1, 4], [2]][r]
        assert found["mine"]["y"] == [["a", "d"], ["b", "e"], ["c"]][r]
        assert torch.equal(found["share"], 2 * torch.arange(10.0).view(5, 2))
    assert len({found["seed"] for found in results}) == 3 and results[0]["seed"] == 7
    assert sum(found["first to"] for found in results) == 1
    alone = m.World()
    assert alone.sum(torch.ones(2)).tolist() == [1, 1] and alone.max(1, 2) == [1, 2] and alone.gather("x") == ["x"]
    assert alone.first(lambda: 3) == 3 and alone.add({"a": 1}) == {"a": 1} and alone.mine([1, 2]) == [1, 2]
    assert alone.seed(5) == 5 and alone.is_first_to("x") and alone.is_first


def reply_to(prompt: list[int]) -> list[int]:
    """A reply that follows from the prompt: most end, all are of other lengths."""
    length = sum(prompt) % 5 + 1
    return [(sum(prompt) * (k + 3)) % 250 + 5 for k in range(length)] + [4] * (sum(prompt) % 3 > 0)


def three_steps(trainer: m.Trainer, steps: list[list[dict]]) -> dict:
    """What three steps log, and the weights after them."""
    logged = [trainer.step(batches) for batches in steps]
    keys = ("loss", "grad_norm", "count", "reward", "kl", "moved", "equal_groups", "tokens")
    return {
        "logged": [{key: row[key] for key in keys if key in row} for row in logged],
        "weights": {name: p.detach() for name, p in trainer.trained.state_dict().items()},
    }


def doubled_trainer(stage: str, tokenizer, lora: int = 0) -> m.Trainer:
    """A trainer of a stage in float64, with AdamW: Muon's iteration is in float32."""
    config = m.TrainConfig(
        optimizer="adamw",
        learning_rate=1e-2,
        warmup_steps=0,
        lora_rank=lora,
        reply_tokens=6,
        grad_clip=0.5,
        max_steps=9,
    )
    base = moe_shape(vocab_size=310) if stage == "moe" else shape(vocab_size=310)
    model, dtype = random_model(base, dtype=torch.float64), torch.float64
    rl = m.RLHFConfig(critic_warmup=1, minibatch_size=64, group_size=2, grpo_kl_coef=0.1, dpo_sft_coef=0.3)
    options = {"config": config, "rl_config": rl}
    if stage in ("ppo", "grpo", "dpo"):
        options["reference"] = random_model(base, seed=5, dtype=dtype)
    if stage in ("ppo", "grpo"):
        options["reward"] = lambda messages, reply, answer: float(len(reply) % 3)
    if stage == "reward":
        model = m.RewardModel(model).to(dtype)
        torch.nn.init.normal_(model.score.weight)
    torch.manual_seed(3)
    return m.STAGES["pretrain" if stage == "moe" else stage].trainer(model, tokenizer, **options)


def three_batches(stage: str, tmp_path: Path, tokenizer) -> list[list[dict]]:
    """Steps of unequal rows; in pretraining the rows that process 1 of 2 takes are not trained at all."""
    if stage in ("pretrain", "moe"):
        batches = [lm_batch(5, 12, seed=seed, ragged=True) for seed in range(4)]
        for batch in batches:
            batch["labels"][1::2] = -100
        return [[batches[0]], [batches[1], batches[2]], [batches[3]]]
    if stage in ("ppo", "grpo"):
        texts = ["a", "你好吗", "hi there", "xy", "z" * 9]
        return [[prompt_batch(tokenizer, [f"{text}{k}" for text in texts], ["1"] * 5)] for k in range(3)]
    cls = m.STAGES[stage].loader
    records = [record_for(cls, i) for i in range(15)]
    options = {"packing": False} if stage == "sft" else {}
    return [[batch] for batch in load(cls, tmp_path, tokenizer, records, batch_size=5, **options)]


def close(a: dict, b: dict, tolerance: float = 1e-10) -> None:
    for row, other in zip(a["logged"], b["logged"], strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    for name in a["weights"]:
        torch.testing.assert_close(a["weights"][name], b["weights"][name], rtol=0, atol=tolerance, msg=name)


@needs_fork
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["pretrain", "moe", "sft", "dpo", "reward", "ppo", "grpo", "lora"])
def test_several_processes_compute_what_one_does(tmp_path, tokenizer, monkeypatch, request, stage, size):
    """Losses, norms, counts and weights of three steps in float64, with rows of unequal lengths."""
    replies = lambda self, prompts, *_: [reply_to(prompt) for prompt in prompts]  # noqa: E731
    monkeypatch.setattr(m.TextGenerator, "continue_ids", replies)
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)
    stage, lora = ("sft", 4) if stage == "lora" else (stage, 0)
    steps = three_batches(stage, tmp_path, tokenizer)
    alone = [list(step) for step in steps]
    if stage == "moe":  # the balance is that of a micro-batch: one process with the same ones, by accumulation
        rows = [[{k: v[r::size] for k, v in batch.items()} for r in range(size)] for step in steps for batch in step]
        alone = [rows[0], rows[1] + rows[2], rows[3]]
    expected = three_steps(doubled_trainer(stage, tokenizer, lora), alone)
    results = in_processes(size, lambda: three_steps(doubled_trainer(stage, tokenizer, lora), steps))
    for found in results:
        assert not isinstance(found, str), found
        if stage == "moe":
            for row, other in zip(found["logged"], expected["logged"], strict=True):
                row["tokens"] = other["tokens"]
        close(found, expected)
        assert same(found["weights"], results[0]["weights"])
    start = doubled_trainer(stage, tokenizer, lora).trained.state_dict()
    assert not same(results[0]["weights"], start)


def run_on(size: int, make, stop_after: int = 0) -> list:
    """Fit make() on `size` processes, or go on with its run; with `stop_after` the last process gets a signal then."""

    def work():
        trainer = make()
        if m.holds_run(trainer.run_dir):
            trainer.load_checkpoint(trainer.run_dir / "checkpoint.pt")
        plain_step = trainer.step

        def step(batches):
            if trainer.step_count + 1 == stop_after and m.WORLD.rank == size - 1:
                signal.raise_signal(signal.SIGTERM)
            return plain_step(batches)

        trainer.step, plain_save = step, m.save_checkpoint
        m.save_checkpoint = lambda *args: plain_save(*args) if m.WORLD.rank == 0 else pytest.fail("it saves, too")
        result = trainer.fit()
        m.save_checkpoint = plain_save
        return {"result": result, "weights": trainer.trained.state_dict(), "step": trainer.step_count}

    if size == 1:
        return [work()]
    results = in_processes(size, work)
    assert not any(isinstance(found, str) for found in results), results
    assert all(same(found, results[0]) for found in results), "the processes differ"
    return results


@needs_fork
@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow), "ppo", "grpo"])
def test_two_processes_resume_bit_for_bit(trained_runs, tmp_path, stage):
    """With dropout and sampling, whose random numbers differ by process; one process alone gets the signal."""
    config = stage_config(max_steps=5, eval_every=2, schedule="constant", optimizer="muon", batch_size=4)
    straight = run_on(2, lambda: stage_trainer(trained_runs, stage, tmp_path / "straight", config=config))
    make = lambda: stage_trainer(trained_runs, stage, tmp_path / "halted", config=config)  # noqa: E731
    halted = run_on(2, make, stop_after=3)
    assert halted[0]["step"] == 3 and halted[0]["result"]["signal"] == signal.SIGTERM
    resumed = run_on(2, make)
    assert same(resumed[0]["weights"], straight[0]["weights"]) and resumed[0]["step"] == 5
    rows = [m.read_metrics(tmp_path / name) for name in ("straight", "halted")]
    for name in ("loss", "val_loss", "val_reward", "val_exact_match", "tokens"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]], name
    assert [row["step"] for row in rows[0]] == sorted(row["step"] for row in rows[0])  # one process wrote


@needs_fork
def test_a_run_goes_on_with_any_number_of_processes(tmp_path, tokenizer, corpus, capfd):
    """2 -> 1 -> 3 -> 2 processes against one process all the way, and against two."""
    config = m.TrainConfig(max_steps=8, learning_rate=1e-3, batch_size=6, warmup_steps=0, eval_every=4, sample_tokens=0)

    def make(name):
        options = {"batch_size": 6, "seq_len": 24, "cache_dir": tmp_path / "cache"}
        parts = {
            f"{part}_data": m.PretrainDataLoader(corpus, tokenizer, split=part, **options) for part in ("train", "val")
        }
        return m.PreTrainer(random_model(shape()), tokenizer, config=config, run_dir=tmp_path / name, **parts)

    straight = [run_on(size, lambda size=size: make(f"on {size}"))[0] for size in (1, 2)]
    for size, stop_after in ((2, 2), (1, 3), (3, 6), (2, 0)):
        changing = run_on(size, lambda: make("changing"), stop_after)
    said = capfd.readouterr().out
    assert "saved by 2 processes, now 1: new random numbers" in said and "saved by 1 processes, now 3" in said
    for other in straight:
        assert changing[0]["step"] == other["step"] == 8
        assert changing[0]["result"]["loss"] == pytest.approx(other["result"]["loss"], rel=1e-6)
        assert changing[0]["result"]["tokens"] == other["result"]["tokens"]  # not counted twice
        for name, weight in changing[0]["weights"].items():
            torch.testing.assert_close(weight, other["weights"][name], rtol=0, atol=2e-6, msg=name)


@needs_fork
def test_muons_work_is_shared(tokenizer):
    """Stacks of 1 to 8 matrices over 3 processes: the same updates as one process makes, in the same order."""

    def train():
        config = m.TrainConfig(optimizer="muon", warmup_steps=0, max_steps=4, grad_clip=0.0)
        model = random_model(moe_shape(vocab_size=310, router_aux_loss_coef=0.0))  # the balance is of a process's rows
        trainer = m.PreTrainer(model, tokenizer, config=config)
        shared, plain = [], m.orthogonalize
        m.orthogonalize = lambda x, **options: shared.append(len(x)) or plain(x, **options)
        for seed in range(2):
            trainer.step([lm_batch(3, 12, seed=seed)])
        m.orthogonalize = plain
        return {"weights": trainer.model.state_dict(), "sizes": shared}

    alone, (first, *others) = train(), in_processes(3, train)
    assert first["sizes"] == [-(-size // 3) for size in alone["sizes"]] and max(alone["sizes"]) > 3
    for found in others:
        assert same(found["weights"], first["weights"])
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=2e-5, msg=name)


@needs_fork
@pytest.mark.slow
def test_weights_stay_equal_for_fifty_steps(trained_runs, tmp_path):
    for stage in ("sft", "ppo"):
        run_on(
            3,
            lambda stage=stage: stage_trainer(
                trained_runs,
                stage,
                tmp_path / stage,
                config=stage_config(max_steps=50, eval_every=50, save_every=25, batch_size=4),
            ),
        )


@needs_fork
def test_processes_that_differ_are_noticed(tokenizer, tmp_path):
    def differ():
        data = [lm_batch(2, 8)]
        config = m.TrainConfig(max_steps=2, warmup_steps=0, sample_tokens=0)
        model = random_model(shape(), seed=m.WORLD.rank)
        m.PreTrainer(model, tokenizer, config=config, train_data=data, run_dir=tmp_path / "run").fit()

    assert (
        in_processes(2, differ)
        == ["UserError: processes [1] have other weights than the first: are machines and versions the same?"] * 2
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


@needs_fork
def test_dropout_and_sampling_differ_by_process(trained_runs, tmp_path):
    def work():
        trainer = stage_trainer(trained_runs, "grpo", tmp_path / "grpo", config=stage_config(max_steps=1))
        trainer.fit()
        trainer.held_out(None).__next__()
        return [torch.rand(3), torch.rand(3, generator=trainer.eval_random)]

    a, b = in_processes(2, work)
    assert not torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@needs_fork
def test_what_all_must_agree_on(trained_runs, tmp_path, monkeypatch):
    """The fastest dtype, the rows of each minibatch of a rollout, and the reference's figures of all pairs."""
    monkeypatch.setattr(m, "_measured_dtype", lambda device: f"the choice of {m.WORLD.rank}")

    def work():
        trainer = stage_trainer(trained_runs, "grpo", tmp_path / "grpo", config=stage_config(batch_size=4))
        torch.manual_seed(m.WORLD.rank)
        trainer.rl.minibatch_size, trainer.rl.grpo_kl_coef, seen = 3, 0.1, []
        result = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "moved": 0.0}
        trainer.update = lambda batches: seen.append([batch["input_ids"] for batch in batches]) or result
        trainer.step([next(iter(trainer.train_data))])
        pairs = stage_trainer(trained_runs, "dpo", tmp_path / "dpo").train_data.reference_logprobs
        return {"dtype": FASTEST_DTYPE(torch.device("cpu")), "seen": seen, "pairs": pairs}

    first, second = in_processes(2, work)
    assert same(first, second) and first["dtype"] == "the choice of 0" and len(first["seen"]) == 2 * 6
    alone = stage_trainer(trained_runs, "dpo", tmp_path / "dpo").train_data.reference_logprobs
    torch.testing.assert_close(first["pairs"], alone, rtol=0, atol=1e-4)
    assert (alone < 0).all()


@needs_fork
def test_one_process_without_memory_or_with_a_nan(tokenizer, monkeypatch):
    """Out of memory, a process splits its own rows; a NaN of one process skips the step in all."""

    def without_memory():
        trainer = trainer_for(tokenizer, m.TrainConfig(warmup_steps=0, optimizer="adamw"), dtype=torch.float64)
        plain = trainer.loss

        def loss(batch):
            if m.WORLD.rank == 1 and len(batch["input_ids"]) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return plain(batch)

        trainer.loss = loss
        rows = [trainer.step([lm_batch(6, 8, seed=seed)])["loss"] for seed in range(2)]
        return {"rows": rows, "splits": trainer.micro_splits, "weights": trainer.model.state_dict()}

    a, b = in_processes(2, without_memory)
    assert (a["splits"], b["splits"]) == (1, 4) and same(a["weights"], b["weights"]) and a["rows"] == b["rows"]
    alone = without_memory()
    for name, weight in a["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=1e-10, msg=name)

    def with_a_nan():
        trainer = trainer_for(tokenizer, m.TrainConfig(warmup_steps=0))
        plain, before = trainer.loss, copy.deepcopy(trainer.model.state_dict())
        trainer.loss = lambda batch: plain(batch) * (math.nan if m.WORLD.rank == 1 else 1.0)
        trainer.step([lm_batch(4, 8)])
        unchanged = same(before, trainer.model.state_dict())
        trainer.loss = plain
        trainer.step([lm_batch(4, 8)])
        return [unchanged, trainer.skipped, trainer.model.state_dict()]

    a, b = in_processes(2, with_a_nan)
    assert a[:2] == b[:2] == [True, 1] and same(a, b)


@needs_fork
def test_a_process_that_ends_is_named_by_the_others():
    def work():
        if m.WORLD.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        m.WORLD.sum(torch.ones(3))

    first, killed, last = in_processes(3, work)
    assert (
        killed is None
        and first
        == last
        == "UserError: process 1 of 3 has ended or does not answer: start again with --resume, from the last checkpoint"
    )


@needs_fork
def test_too_small_a_batch_is_refused(trained_runs, tmp_path, tokenizer):
    def work():
        trainer = rl_trainer(m.GRPOTrainer, tokenizer)
        trainer.step([prompt_batch(tokenizer, ["a"])])

    assert (
        in_processes(2, work) == ["UserError: a batch of 1 prompts cannot be divided among 2 processes: take fewer"] * 2
    )

    def start():
        stage_trainer(trained_runs, "sft", tmp_path / "sft", config=stage_config(batch_size=2))

    assert in_processes(3, start) == ["UserError: batch_size=2 cannot be divided among 3 processes: start fewer"] * 3


@needs_fork
def test_the_whole_chain_of_two_processes(rlhf, trained_runs, tmp_path, capfd):
    """SFT, reward model and PPO by the driver; figures are printed once, and a run is scored as by one process."""
    assert in_processes(2, lambda: train.main(rlhf)) == [0, 0]
    said = capfd.readouterr().out
    assert said.count("== reward") == said.count("== ppo") == said.count("next:") == 1
    rows = m.read_metrics(tmp_path / "out/tiny/sft")
    assert len({(row["step"], "val_loss" in row) for row in rows}) == len(rows)
    for run in ("sft", "reward"):
        score = [
            "--stage",
            "eval",
            "--init",
            str(tmp_path / "out/tiny" / run),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
        alone, both = (train.main(score), capfd.readouterr().out), in_processes(2, lambda: train.main(score))  # noqa: B023
        alone, both = (json.loads(text.splitlines()[-1]) for text in (alone[1], capfd.readouterr().out))
        assert both == pytest.approx(alone, rel=1e-5)


@needs_fork
def test_mistakes_are_said_once_and_some_stages_take_one_process(trained_runs, tmp_path, capfd):
    for argv, problem in (
        (["--config", "tinny"], "config 'tinny' is unknown"),
        (["--stage", "tokenizer"], "runs on one process"),
        (["--stage", "export"], "runs on one process"),
        (["--stage", "sft", "--inspect", "3"], "runs on one process"),
        (["--data", str(tmp_path / "nowhere")], "no such file or directory"),
    ):
        argv = [*argv, "--out", str(tmp_path / "out")]
        assert in_processes(2, lambda: train.main(argv)) == [2, 2]  # noqa: B023
        error = capfd.readouterr().err
        assert error.count("error:") == 1 and problem in error, error
    assert in_processes(2, lambda: bench.main(["--only", "decode"])) == [2, 2]
    assert capfd.readouterr().err.count("several processes measure --only train") == 1


def test_bytes_sent_by_hand():
    """Worked example: of 4 processes each sends 3/4 of the gradients twice, and of the matrices' updates once."""
    model = m.MiniGPT(shape())
    matrices = sum(p.numel() for block in model.layers for p in block.parameters() if p.dim() == 2)
    assert bench.sent_bytes(model, 4) == 3 * (2 * model.num_params() + matrices)
    assert bench.sent_bytes(model, 1) == 0


@needs_fork
def test_a_restarted_run_goes_on(trained_runs, tmp_path, monkeypatch, capfd):
    """torchrun --max-restarts starts the same command again, which would otherwise refuse its own run directory."""
    argv = ["--out", str(tmp_path), "--max-steps", "3", *data_flags(trained_runs), *quick("pretrain")]
    argv += [*SMALLEST, "--seq-len", "16", "--save-every", "2"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert train.main([*argv, "--overwrite"]) == 2  # a restart could take the old run for the new one
    assert "--overwrite and torchrun --max-restarts exclude each other" in capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([*argv, "--max-steps", "2"]) == 0  # the first start ended before it made a run directory
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert train.main(argv) == 0
    assert m.load_checkpoint(tmp_path / "tiny/pretrain/checkpoint.pt")["step"] == 3
    assert "resuming" in capfd.readouterr().out


@needs_fork
def test_a_restart_finds_nothing_of_the_start_before():
    """torchrun keeps its store: addresses, barriers and announcements there would pass for those of this start."""

    def work():
        W = m.WORLD
        W.is_first_to("error")
        W.barrier()
        m.dist.destroy_process_group()
        W.size, W.barriers = 1, 0
        if os.environ["RANK"] == "0":
            time.sleep(1)  # the other one looks first, and finds the old answers
        W.start()
        began = time.monotonic()
        if os.environ["RANK"] == "0":
            time.sleep(0.5)
        W.barrier()
        waited = time.monotonic() - began
        return W.is_first_to("error"), W.sum(torch.ones(1)).item(), waited > 0.4

    first, second = in_processes(2, work)
    assert first[0] != second[0] and first[1:] == second[1:] == (2, True)


@needs_fork
def test_nobody_leaves_before_all_have_joined():
    def work():
        return time.monotonic()

    def late(*args, **options):
        join(*args, **options)
        if int(os.environ["RANK"]) == 1:
            time.sleep(0.5)

    join, m.dist.init_process_group = m.dist.init_process_group, late
    try:
        first, second = in_processes(2, work)
    finally:
        m.dist.init_process_group = join
    assert abs(first - second) < 0.3


@needs_fork
def test_a_run_that_the_clock_ends_is_finished_for_all(tokenizer, tmp_path):
    """The processes' clocks began at different times: whether a run is over is what the first to be over says."""

    def work():
        config = m.TrainConfig(minutes=10, compile="off", sample_tokens=0)
        trainer = trainer_for(tokenizer, config, run_dir=tmp_path)
        trainer.started -= 600 * m.WORLD.rank
        trainer.save_checkpoint(tmp_path / "checkpoint.pt")

    in_processes(2, work)
    assert m.load_checkpoint(tmp_path / "checkpoint.pt")["finished"]


@needs_fork
def test_a_damaged_checkpoint_is_repaired_when_nobody_reads_it(tokenizer, tmp_path):
    trainer_for(tokenizer).save_checkpoint(path := tmp_path / "checkpoint.pt")
    path.rename(tmp_path / "checkpoint.prev.pt")
    path.write_bytes(b"torn")

    def work():
        if not m.WORLD.is_first:  # still reading for the shape of the model
            time.sleep(0.5)
            m.load_checkpoint(path)
            found = path.read_bytes() == b"torn"
        trainer_for(tokenizer).load_checkpoint(path)
        return m.WORLD.is_first or found

    assert in_processes(2, work) == [True, True]


def torchrun(folder: Path, *words: str, processes: int = 2) -> subprocess.Popen:
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(HERE / "train.py")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    return subprocess.Popen([*argv, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_torchrun_ends_when_a_process_is_killed(trained_runs, tmp_path):
    """Within 30 s, without a hang; the run goes on from its last checkpoint."""
    argv = [*data_flags(trained_runs), *SMALLEST, "--seq-len", "16", "--save-every", "5", "--sample-tokens", "0"]
    argv += ["--batch-size", "4", "--schedule", "constant", "--dtype", "float32", "--eval-every", "0"]
    run = torchrun(tmp_path, *argv, "--max-steps", "100000", "--out", "out")
    saved, end = tmp_path / "out/tiny/pretrain/checkpoint.pt", time.monotonic() + 100
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.1)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if int(parent) == run.pid and "\0RANK=1\0" in (folder / "environ").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
    error = run.communicate(timeout=30)[1]
    assert run.returncode == 1 and "SIGKILL" in error
    assert len([line for line in error.splitlines() if line.startswith("train.py: error:")]) <= 1
    step = m.load_checkpoint(saved)["step"]
    run = torchrun(tmp_path, *argv, "--max-steps", str(step + 5), "--out", "out", "--resume")
    error = run.communicate(timeout=100)[1]
    assert run.returncode == 0, error  # whole: pytest would shorten it
    assert m.load_checkpoint(saved)["step"] == step + 5


# ======================================================================================================================
# Drivers: train.py and sample.py
# ======================================================================================================================

SMALL = "--hidden-size 32 --num-attention-heads 2 --num-hidden-layers 2 --vocab-size 300 --seq-len 32".split()
SMALL += "--batch-size 4 --max-position-embeddings 64 --max-steps 6 --eval-every 3 --save-every 2".split()


@pytest.fixture(scope="session")
def pretraining(tmp_path_factory) -> dict:
    """A pretraining by train.py on 60 documents: its flags (without --out), its --out, and what it showed."""
    folder = tmp_path_factory.mktemp("pretraining")
    flags = ["--data", str(write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in DOCUMENTS])), *SMALL]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert train.main([*flags, "--out", str(folder / "out")]) == 0
    return {"flags": flags, "out": folder / "out", "shown": shown.getvalue()}


@pytest.fixture
def pretrained_copy(pretraining, tmp_path) -> tuple[list[str], Path]:
    """That pretraining's flags, with an --out that a test may change, and the run in it."""
    shutil.copytree(pretraining["out"], tmp_path / "out")
    return [*pretraining["flags"], "--out", str(tmp_path / "out")], tmp_path / "out/tiny/pretrain"


def test_one_command_trains_a_model(pretraining):
    """Worked example: six steps leave a whole run directory, metrics of every step, and say what to do next."""
    shown, run = pretraining["shown"], pretraining["out"] / "tiny/pretrain"
    assert "bits per byte" in shown and "next:  python sample.py" in shown and "→" in shown
    assert {p.name for p in run.iterdir()} == {
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "best.pt",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
    }
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    expected = {"step", "loss", "lr", "grad_norm", "tokens", "tok_per_s", "mfu", "peak_bytes", "elapsed_s"}
    assert expected <= rows[0].keys() and {"val_loss", "val_bpb"} <= rows[-1].keys()


INSPECTED = [
    {"messages": turns("hi", "yes", "and?", "no")},
    {"messages": turns("w" * 200, "x")},
    {"messages": turns("hi", "yes" * 50)},
    {"messages": [{"role": "assistant", "content": "<|bos|> is text"}]},
]


def test_inspect_marks_every_reply_and_names_problems(out_with_a_run, tmp_path, capsys, monkeypatch):
    """Worked example: two trained replies; a question and an answer that are too long; text that looks like a token."""
    data = str(write_jsonl(tmp_path / "chats.jsonl", INSPECTED))
    argv = ["--stage", "sft", "--inspect", "9", "--out", str(out_with_a_run), "--data", data, "--val-data", data]
    assert train.main([*argv, "--seq-len", "64"]) == 0
    first, second, third, fourth = re.split(r"^-- \d: .*\n", capsys.readouterr().out, flags=re.M)[1:]
    assert first == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n"
    )
    assert "«" not in second and "tokens beyond seq_len=64 cut off" in second and "nothing to train on" in second
    assert "over-long" in third and "«yesyes" in third and "missing end-of-turn" in third
    assert "«<|bos|> is text<|im_end|>»" in fourth and "warning" not in fourth
    lengths = re.search(
        r"lengths of 4 conversations in tokens: (\d+) … (\d+), half up to (\d+), .* (\d+) \(seq_len 64\)", fourth
    )
    shortest, longest, half, most = map(int, lengths.groups())
    assert 0 < shortest < half < most < longest and longest > 200
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert train.main(argv) == 0
    assert "\033[32myes<|im_end|>\033[0m" in capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_data(pretraining, capsys):
    run = pretraining["out"] / "tiny/pretrain"
    assert train.main(["--stage", "eval", "--init", str(run), "--out", str(pretraining["out"])]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["bpb"] == pytest.approx(m.read_metrics(run)[-1]["val_bpb"], rel=1e-6)


def test_sample_continues_prompts(pretraining, capsys):
    out, short = str(pretraining["out"]), ["--max-new-tokens", "5"]
    assert sample.main(["--out", out, "--prompt", "第", "The", *short, "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "\n第" in text and "\nThe" in text and "tok/s" in text
    for strategy in ("greedy", "beam"):
        assert sample.main(["--run", f"{out}/tiny/pretrain", "--prompt", "第", *short, "--strategy", strategy]) == 0


def shown_by(capsys, *argv: str) -> str:
    """What sample.py shows below its first line, without the speed."""
    assert sample.main(list(argv)) == 0
    return re.sub(r", \d+ tok/s", "", capsys.readouterr().out.partition("\n")[2])


def test_what_people_type_at_sample(pretraining, capsys, monkeypatch):
    run = ["--run", str(pretraining["out"] / "tiny/pretrain"), "--max-new-tokens", "5"]
    greedy = shown_by(capsys, *run, "--prompt", "The", "--strategy", "greedy")
    assert shown_by(capsys, *run, "--prompt", "The", "--temperature", "0") == greedy
    assert shown_by(capsys, *run, "--prompt", "-abc", "--3").startswith("\n-abc")  # texts, not flags
    assert "\n\n--3" in shown_by(capsys, *run, "--prompt", "-abc", "--prompt", "--3")
    assert "tokens]" in shown_by(capsys, *run, "--prompt", "")
    undecoded = "小".encode().decode("ascii", "surrogateescape")  # as Python gives it in a locale without Chinese
    assert shown_by(capsys, *run, "--prompt", undecoded, "--seed", "1").startswith("\n小")
    seen = []
    monkeypatch.setattr(m.TextGenerator, "stream", lambda _, prompt, config: seen.append((prompt, config.stop)) or [])
    shown_by(capsys, *run, "--prompt", "a\\n", "--stop", r"\n", r"\t\t", r"\\n", undecoded, "-")
    assert seen == [("a\\n", ["\n", "\t\t", r"\n", "小", "-"])]


def test_a_terminal_gets_no_control_characters(tokenizer, capsys, monkeypatch):
    """A model of bytes may write any; into a file or a pipe they go as they are."""
    text = "a\x1b[31m\x0e\x9b\tb\n小"
    for on_terminal, expected in ((True, "a�[31m��\tb\n小"), (False, text)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on_terminal=on_terminal: on_terminal)
        sample.write(scripted(tokenizer, text), "x", settings(do_sample=False, max_new_tokens=30))
        sample.print_reply(scripted(tokenizer, text), "x", settings(do_sample=False, max_new_tokens=30))
        assert capsys.readouterr().out.count(expected) == 2


def test_sample_counts_what_was_written(tokenizer, capsys):
    """The bytes of one character, a token each: encoded anew they could be fewer."""
    generator = scripted(tokenizer, "龘靐")
    assert len(list(generator.stream("x", settings(do_sample=False)))) == 2
    assert generator.written == len(tokenizer.encode("龘靐")) + 1  # with the end
    sample.write(generator, "x", settings(do_sample=False, max_new_tokens=2))
    assert "[2 tokens, " in capsys.readouterr().out  # which are no whole character
    assert generator.generate(["x", "x"], settings(do_sample=False, max_new_tokens=3)) and generator.written == 6


MODES = {  # what sets the mode, the flags without effect there, and what the error calls the mode
    "sample": (["--strategy", "sample"], "num_beams length_penalty early_stopping system", "--strategy sample"),
    "greedy": (
        ["--strategy", "greedy"],
        "temperature top_k top_p min_p seed num_beams length_penalty early_stopping system",
        "--strategy greedy",
    ),
    "zero": (
        ["--temperature", "0"],
        "top_k top_p min_p seed num_beams length_penalty early_stopping system",
        "--temperature 0",
    ),
    "beam": (["--strategy", "beam"], "temperature top_k top_p min_p seed system", "--strategy beam"),
    "chat": (["--chat"], "prompt num_beams length_penalty early_stopping", "--"),
}
SAMPLE_FLAGS = {
    "max_new_tokens": "3", "min_new_tokens": "2", "max_length": "60", "temperature": "0.5", "top_k": "3",
    "top_p": "0.5", "min_p": "0.1", "repetition_penalty": "1.2", "num_beams": "1", "length_penalty": "2",
    "early_stopping": None, "stop": "a", "seed": "1", "system": "b", "prompt": "c",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", SAMPLE_FLAGS)
def test_a_flag_of_sample_without_effect_is_an_error(out_with_a_run, monkeypatch, capsys, mode, field):
    """All flags in all modes: each is used, or refused by an error that names it and the mode."""
    assert {f.name for f in dataclasses.fields(m.GenerationConfig)} - {"do_sample"} < SAMPLE_FLAGS.keys()
    monkeypatch.setattr(m, "load_run", lambda *_, **__: (_ for _ in ()).throw(m.UserError("used")))
    flags, useless, name = MODES[mode]
    flag, value = "--" + field.replace("_", "-"), SAMPLE_FLAGS[field]
    argv = [*flags, flag, *([value] if value else []), "--run", "x"]
    if mode == "zero" and field == "temperature":
        argv = [*flags, "--strategy", "greedy", "--run", "x"]  # the same said twice
    assert sample.main(argv) == 2
    error = one_error(capsys)
    if field in useless.split():
        assert flag in error and (name in error or "--chat" in error)
    else:
        assert error == "sample.py: error: used\n"


def test_sample_takes_the_best_weights_or_the_last(pretrained_copy, tmp_path, capsys):
    run = pretrained_copy[1]
    best = m.load_checkpoint(run / "best.pt")
    for name, p in best["model"].items():
        best["model"][name] = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    m.save_checkpoint(run / "best.pt", best | {"step": 3})
    shown = {}
    for which in ("best", "last"):
        argv = ["--run", str(run), "--prompt", "The", "--strategy", "greedy", "--max-new-tokens", "9"]
        assert sample.main([*argv, "--checkpoint", which]) == 0
        shown[which] = capsys.readouterr().out.splitlines()
    assert "(step 3, " in shown["best"][0] and "(step 6, " in shown["last"][0] and shown["best"][2] != shown["last"][2]
    assert sample.main(argv) == 0 and capsys.readouterr().out.splitlines()[:3] == shown["best"][:3]  # the default
    (run / "best.pt").write_bytes(b"torn")
    assert sample.main(argv) == 0 and "sample.py: warning: " in capsys.readouterr().err
    folder = tmp_path / "imported"
    folder.mkdir()
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    assert sample.main(["--run", str(folder), "--checkpoint", "last"]) == 2
    assert "--checkpoint has no effect" in one_error(capsys)


def test_chat_without_a_terminal(every_stage, monkeypatch, capsys):
    argv = ["--run", str(every_stage["out"] / "tiny/sft"), "--chat", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))  # ends after one message
    assert sample.main(argv) == 0 and capsys.readouterr().out.count("> ") == 2
    assert "readline" in sys.modules or not importlib.util.find_spec("readline")
    for nothing in (None, io.StringIO()):
        if nothing:
            nothing.close()
        monkeypatch.setattr(sys, "stdin", nothing)
        assert sample.main(argv) == 2 and "stdin, which is closed: use --prompt" in one_error(capsys)
    monkeypatch.setattr(sys, "stdout", None)
    assert sample.main(["--run", argv[1]]) == 2 and "stdout is closed" in one_error(capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_sample_into_a_full_disk_is_one_message(out_with_a_run):
    argv = [sys.executable, "sample.py", "--run", str(out_with_a_run / "tiny/pretrain"), "--max-new-tokens", "3"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, cwd=HERE, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_base_model_in_chat_is_named(pretraining, every_stage, monkeypatch, capsys):
    for out, stage, is_base in ((pretraining["out"], "pretrain", True), (every_stage["out"], "sft", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        assert sample.main(["--run", str(out / "tiny" / stage), "--chat"]) == 0
        shown = capsys.readouterr().out
        assert ("a base model: it was never trained on conversations" in shown) == is_base
        assert (f"--stage sft --init {out}/tiny/pretrain" in shown) == is_base


def test_beams_in_chat_are_shown_at_the_end(every_stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    argv = ["--run", str(every_stage["out"] / "tiny/sft"), "--chat", "--strategy", "beam", "--max-new-tokens", "4"]
    assert sample.main(argv) == 0 and "cannot stream" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds a run already"),
        (["--resume"], "the run is over: 6 steps"),
        (["--resume", "--hidden-size", "64"], "hidden_size=64 (there 32)"),
        (["--overwrite", "--data", "/no/such"], "/no/such"),
        (["--resume", "--max-steps", "9", "--seed", "5"], "seed=5"),
    ],
)
def test_what_is_refused_leaves_a_run_as_it_was(pretrained_copy, capsys, more, message):
    flags, run = pretrained_copy
    before = everything(run)
    assert train.main([*flags, *more]) == 2 and message in one_error(capsys)
    assert everything(run) == before


def test_a_run_is_resumed_and_replaced(pretrained_copy, capsys):
    flags, run = pretrained_copy
    assert train.main([*flags, "--config", "tiny", "--resume", "--max-steps", "8"]) == 0
    assert "at step 6" in capsys.readouterr().out and m.load_checkpoint(run / "checkpoint.pt")["step"] == 8
    assert train.main([*flags, "--overwrite", "--max-steps", "1"]) == 0
    assert m.load_checkpoint(run / "checkpoint.pt")["step"] == 1


def test_a_tokenizer_of_its_own_is_what_pretraining_takes(pretraining, tmp_path, capsys):
    flags = [*pretraining["flags"], "--out", str(tmp_path), "--max-steps", "1"]
    assert train.main(["--stage", "tokenizer", *flags[:2], "--out", str(tmp_path), "--vocab-size", "280"]) == 0
    assert "tokens" in capsys.readouterr().out and [p.name for p in (tmp_path / "tiny").iterdir()] == ["tokenizer.json"]
    assert train.main(flags) == 0
    assert "tokenizer: 280 tokens, from" in capsys.readouterr().out
    written = [m.BPETokenizer.load(path).content_hash() for path in (tmp_path / "tiny").rglob("tokenizer.json")]
    assert len(written) == 2 and len(set(written)) == 1
    assert train.main([*flags, "--overwrite", "--vocab-size", "270"]) == 2
    assert "has 280 tokens, more than --vocab-size 270" in one_error(capsys)


def test_help_says_what_every_flag_does(capsys):
    for main in (train.main, sample.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        assert end.value.code == 0
    assert "--grad-clip" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="closed streams and names that are no UTF-8 are of POSIX")
def test_closed_streams_and_names_that_the_locale_cannot_spell(tmp_path):
    place = os.fsencode(tmp_path) + b"/x\xff\xe6\x97"
    os.mkdir(place)
    with open(place + b"/a.jsonl", "w") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    argv = [*SMALL, "--max-steps", "1", "--data", place + b"/a.jsonl", "--out", place + b"/out"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, HERE / "train.py", *argv]
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&- >&-', "sh", *command], env=env, stderr=subprocess.PIPE)
    assert closed.returncode == 0 and b"Traceback" not in closed.stderr, closed.stderr
    assert os.path.exists(place + b"/out/tiny/pretrain/checkpoint.pt")
    again = subprocess.run(command, env=env, capture_output=True)
    assert again.returncode == 2 and again.stderr.endswith(b"or another --out\n") and b"holds a run" in again.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")
def test_glibc_keeps_freed_memory_within_the_limits_of_its_older_versions(monkeypatch):
    calls = {}
    monkeypatch.setattr("os.confstr", lambda name: "glibc 2.28")
    monkeypatch.setattr("ctypes.CDLL", lambda name: types.SimpleNamespace(mallopt=calls.__setitem__))
    m.keep_freed_memory()
    assert 1 << 20 < calls[-3] <= 32 << 20 < calls[-1]  # HEAP_MAX_SIZE / 2: what is above is refused
    monkeypatch.setattr("os.confstr", lambda name: None)  # musl
    calls.clear()
    m.keep_freed_memory()
    assert not calls


def test_importing_has_no_side_effects():
    code = (
        "import torch, sys; state, threads = torch.get_rng_state(), torch.get_num_threads(); import minillm; "
        "assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert out.stdout == "" and out.stderr == ""


# -- every stage -------------------------------------------------------------------------------------------------------

STAGE_FLAGS = {
    "sft": [],
    "reward": ["--lora-rank", "2"],
    "dpo": ["--dpo-kind", "ipo"],
    "ppo": ["--minibatch-size", "2"],
    "grpo": ["--group-size", "2", "--reward", "{mine}:f"],
}


@pytest.fixture(scope="session")
def every_stage(trained_runs, tmp_path_factory) -> dict:
    """An --out where train.py has trained every stage: its "flags", by stage, and what was "shown"."""
    out = tmp_path_factory.mktemp("every stage")
    shutil.copytree(trained_runs / "pretrain", out / "tiny/pretrain")
    (out / "mine.py").write_text("def f(messages, reply, answer):\n    return len(reply)\n")
    common, flags, shown = ["--out", str(out), *data_flags(trained_runs), "--max-steps", "2"], {}, {}
    for stage, more in STAGE_FLAGS.items():
        flags[stage] = [
            "--stage",
            stage,
            *common,
            *quick(stage),
            *(word.replace("{mine}", f"{out}/mine.py") for word in more),
        ]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert train.main(flags[stage]) == 0
        shown[stage] = printed.getvalue()
    return {"out": out, "flags": flags, "shown": shown}


def test_a_newcomers_folder_trains(out_with_a_run, tmp_path, capsys):
    """Five conversations in several files beside what is no data: one command, which says what it used and what not."""
    data = tmp_path / "data"
    write_jsonl(data / "a.jsonl", CHATS[:2])
    write_jsonl(data / "sub/B.JSONL", CHATS[2:3])
    write_jsonl(data / ".ipynb_checkpoints/a-copy.jsonl", CHATS[:2])
    (data / "c.json").write_text(json.dumps([CHATS[3], {"messages": turns("5?", "five")}], indent=2))
    (data / "empty.json").touch()
    write_jsonl(data / "pairs.jsonl", pairs())
    for name in ("README.md", "table.csv"):
        (data / name).write_text("no data")
    flags = ["--stage", "sft", "--init", str(out_with_a_run / "tiny/pretrain"), "--data", str(data), "--max-steps", "1"]
    assert train.main([*flags, "--out", str(tmp_path / "out"), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert f"data: 4 records to train on, 1 to validate on, from 3 of 5 files in {data}\n" in out
    assert err.count("passed over 2 files that are not .txt, .json") == 1
    assert err.count("1 × file without records, the first at ") == 1
    assert train.main([*flags, "--val-data", str(data / "a.jsonl"), "--out", str(tmp_path / "other"), *QUICK]) == 0
    assert f"{data}/a.jsonl is in --data and in --val-data: a model is scored on" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGE_FLAGS)
def test_train_runs_every_stage(every_stage, stage, capsys):
    run, shown = every_stage["out"] / "tiny" / stage, every_stage["shown"][stage]
    assert "done: " in shown and "next:  python " in shown and str(run) in shown
    if stage == "reward":  # with the flags that say where things are
        places = " ".join(every_stage["flags"][stage][4:8])
        assert f"next:  python train.py --stage ppo {places} --out '{every_stage['out']}'\n" in shown
    config = m.run_config(run)
    assert config["stage"] == stage and config["parent"].endswith("pretrain" if stage == "sft" else "sft")
    expected = {"sft": "val_exact_match", "ppo": "val_reward", "grpo": "val_reward"}.get(stage, "val_pair_accuracy")
    assert expected in m.read_metrics(run)[0] and expected in m.read_metrics(run)[-1]
    before = everything(run)
    assert train.main(every_stage["flags"][stage]) == 2
    assert "holds a run already" in one_error(capsys) and everything(run) == before


def test_a_stage_without_a_parent_says_which(out_with_a_run, trained_runs, capsys):
    assert train.main(["--stage", "ppo", "--out", str(out_with_a_run), *data_flags(trained_runs), *QUICK]) == 2
    error = one_error(capsys)
    assert "to start from" in error and "--stage sft" in error


def test_a_stage_is_resumed_with_the_data_and_the_reward_it_had(every_stage, tmp_path, capsys):
    shutil.copytree(every_stage["out"] / "tiny/grpo", tmp_path / "tiny/grpo")
    argv = ["--stage", "grpo", "--out", str(tmp_path), "--resume", "--max-steps", "3"]
    before = everything(tmp_path)
    assert train.main(argv) == 2  # who can write a checkpoint must not run code
    assert "mine.py:f, which is code: name it with --reward" in one_error(capsys) and everything(tmp_path) == before
    assert train.main([*argv, "--reward", f"{every_stage['out']}/mine.py:f"]) == 0
    shown = capsys.readouterr().out
    assert "resuming" in shown and "at step 2" in shown and f"reward: {every_stage['out']}/mine.py:f" in shown
    assert m.load_checkpoint(tmp_path / "tiny/grpo/checkpoint.pt")["step"] == 3


@pytest.mark.parametrize(
    ("run", "where", "name"),
    [
        ("sft", "data/val/sft.jsonl", "exact_match"),
        ("ppo", "data/val/sft.jsonl", "exact_match"),
        ("sft", "data/val/pref.jsonl", "pair_accuracy"),
        ("dpo", "data/val/pref.jsonl", "pair_accuracy"),
        ("reward", "data/val", "pair_accuracy"),
        ("grpo", "data/val/prompts.jsonl", "exact_match"),
        ("sft", "data/val/text.jsonl", "bpb"),
    ],
)
def test_eval_scores_any_run_on_any_data(every_stage, trained_runs, capsys, run, where, name):
    argv = ["--stage", "eval", "--init", str(every_stage["out"] / "tiny" / run), "--out", str(every_stage["out"])]
    assert train.main([*argv, "--val-data", str(trained_runs / where)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert name in scores and (name == "bpb" or 0 <= scores[name] <= 1)
    assert run != "sft" or {"loss", "bpb", "tokens", "bytes"} <= scores.keys()


def test_inspect_shows_what_is_trained(out_with_a_run, trained_runs, capsys):
    argv = ["--stage", "sft", "--out", str(out_with_a_run), *data_flags(trained_runs)]
    before = everything(out_with_a_run)
    assert train.main([*argv, "--inspect", "2"]) == 0
    shown = capsys.readouterr().out
    assert "assistant\n«cat<|im_end|>»" in shown and "lengths of 8 conversations" in shown
    assert shown.count("-- ") == 2 and everything(out_with_a_run) == before


@pytest.mark.parametrize(
    ("stage", "shown", "count"),
    [
        ("pretrain", ["-- 1: 20 tokens, 20 trained\n«<|bos|>cat and cat", "<|eos|>", "-- 2: "], None),
        ("reward", ["-- 1, chosen: ", "assistant\n«good<|im_end|>»", "-- 1, rejected: ", "«bad!<|im_end|>»"], 16),
        ("dpo", ["-- 2, chosen: ", "-- 2, rejected: "], 16),
        ("ppo", ["user\ncat<|im_end|>\n<|im_start|>assistant\n-- a reply: ", "   answer 'cat', reward 6"], 8),
        ("grpo", ["-- 2: ", "-- a reply: ", "answer 'dog', reward "], 8),
    ],
)
def test_inspect_shows_every_stage(out_with_a_run, trained_runs, tmp_path, capsys, stage, shown, count):
    argv = ["--stage", stage, "--inspect", "2", "--out", str(out_with_a_run), *data_flags(trained_runs)]
    argv += ["--seq-len", "20"] if stage == "pretrain" else []
    if (
        stage == "ppo"
    ):  # a reward of one's own; without it there is no reward model yet, and only prompts are shown; no end costs 1
        assert train.main(argv) == 0
        assert "reward" not in capsys.readouterr().out
        (tmp_path / "mine.py").write_text("def f(messages, reply, answer):\n    return 7\n")
        argv += ["--reward", f"{tmp_path}/mine.py:f", "--reply-tokens", "6"]
    before = everything(out_with_a_run)
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in shown), printed
    assert count is None or f"lengths of {count} " in printed
    assert everything(out_with_a_run) == before


def test_inspect_needs_no_trained_model(trained_runs, tmp_path, capsys):
    argv = ["--stage", "sft", "--inspect", "1", "--out", str(tmp_path), *data_flags(trained_runs)]
    assert train.main([*argv, "--vocab-size", "300"]) == 0
    shown = capsys.readouterr().out
    assert "cat<|im_end|>»" in shown and not (tmp_path / "tiny").exists()


def test_chat_forgets_on_reset(every_stage, monkeypatch, capsys):
    said = iter(["hello", "/reset", "", "你好"])
    lengths = []
    plain = m.TextGenerator.stream

    def stream(self, messages, config):
        lengths.append(len(messages))
        return plain(self, messages, config)

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(m.TextGenerator, "stream", stream)
    run = str(every_stage["out"] / "tiny/sft")
    assert sample.main(["--run", run, "--chat", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert "(a new conversation)" in capsys.readouterr().out and lengths == [1, 1]


def test_explain_shows_tokens_surprise_and_what_was_likeliest(trained_runs, capsys, monkeypatch):
    run, text = trained_runs / "pretrain", "小猫 ate 1 fish.\n🦴"
    model, tokenizer, _ = m.load_run(run)
    ids = tokenizer.encode(text, add_special_tokens=True)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0, :, :300].log_softmax(-1)
    assert sample.main(["--run", str(run), "--explain", text]) == 0
    first, heading, *rows, following, total = capsys.readouterr().out.splitlines()
    assert [int(row[:6]) for row in rows] == ids and "<|bos|>" in rows[0] and len(rows[0].split()) == 2
    hexes = [re.search(r"  ((?:[0-9a-f]{2} ?)+)  ", row[24:])[1] for row in rows[1:]]
    assert bytes.fromhex("".join(hexes)).decode() == text
    for row, logprob, token in zip(rows[1:], logprobs, ids[1:], strict=False):
        assert float(re.search(r"\d+\.\d\d", row)[0]) == pytest.approx(-logprob[token].item(), abs=0.01)
        chances = [int(p) for p in re.findall(r" (\d+)%", row)]
        assert chances == [round(100 * p) for p in logprob.exp().topk(5).values.tolist()]
    assert following.split()[0] == "(next)" and following.count("%") == 5
    loss = F.nll_loss(logprobs[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    bits = loss / math.log(2) / len(text.encode())
    assert total == f"{loss / (len(ids) - 1):.4f} nats a token, {bits:.4f} bits a byte"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert sample.main(["--run", str(run), "--explain", text]) == 0
    assert capsys.readouterr().out.count("\033[31m") == sum(logprobs[t, token] < -4 for t, token in enumerate(ids[1:]))
    assert sample.main(["--run", str(run), "--explain", ""]) == 0 and "(next)" in capsys.readouterr().out
    assert sample.main(["--run", str(run), "--explain", "long" * 99]) == 2
    assert "397 tokens exceed the context" in one_error(capsys)


def test_explain_draws_the_attention_that_the_layer_computed(trained_runs, tmp_path, capsys, monkeypatch):
    """The weights times the values are what goes into the layer's last product."""
    pytest.importorskip("matplotlib")
    generator = m.TextGenerator(*m.load_run(trained_runs / "pretrain")[:2])
    attention, seen, attend = generator.model.layers[1].self_attn, {}, m.attend
    attention.qkv_proj.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    plain = sample.draw_explanation
    monkeypatch.setattr(sample, "draw_explanation", lambda *args: seen.update(maps=args[2]) or plain(*args))
    sample.explain(generator, "小猫 fish", str(tmp_path / "e.png"), 2)
    (H, K, D), T = attention.shape, seen["out"].shape[1]
    values = seen["qkv"].view(T, H + 2 * K, D)[:, H + K :].repeat_interleave(H // K, dim=1)  # (T, H, D)
    torch.testing.assert_close(torch.einsum("hts,shd->thd", seen["maps"], values), seen["out"].view(T, H, D))
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG" and m.attend is attend
    run = ["--run", str(trained_runs / "pretrain"), "--png", str(tmp_path / "f.png")]
    for more, message in (
        (["--explain", "x", "--layer", "3"], "of a --layer in 1 … 2"),
        (["--explain", "x", "--layer", "0"], "of a --layer in 1 … 2"),
        (["--explain", ""], "draws 2 tokens or more, not 1"),
    ):
        assert sample.main([*run, *more]) == 2
        assert message in one_error(capsys) and not (tmp_path / "f.png").exists()


# -- the page for a browser --------------------------------------------------------------------------------------------

SLOW_PAGE = """
import itertools, sys, time
import minillm, sample
stream, calls = minillm.TextGenerator.stream, itertools.count()

def slow(self, prompt, config):
    yield f"[{len(prompt)}] {next(calls)} "  # messages; no two replies are the same
    is_quick = "quick" in str(prompt)  # other replies go on until they are stopped
    for piece in itertools.chain(stream(self, prompt, config), itertools.repeat(".", 0 if is_quick else 9999)):
        time.sleep(0 if is_quick else 0.3)
        yield piece if piece.isalnum() else "."  # a browser shows random spaces and controls in its own way

minillm.TextGenerator.stream = slow
sys.exit(sample.main())
"""


def browser_page(browser, address: str, locale: str, requests: list[str]):
    """Open the page in a tab of a language, as another person would."""
    page = browser.new_context(locale=locale, viewport={"width": 1000, "height": 640}).new_page()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: requests.append(f"error {error}"))
    page.goto(address)
    return page


@pytest.mark.slow
def test_the_page_in_a_browser(trained_runs, tokenizer, tmp_path):
    """Stream, stop, retry, begin anew, two tabs at once, too long a message, several runs; text is never HTML."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    runs, requests = [str(tmp_path / name) for name in ("first", "second")], []
    for run in runs:
        random_model(shape(max_position_embeddings=256)).save_pretrained(run, tokenizer)
    runs.append(str(trained_runs / "pretrain"))
    flags = ["--max-new-tokens", "20", "--min-new-tokens", "20"]
    argv = [sys.executable, "-c", SLOW_PAGE, "--web", "--run", *runs, *flags]
    with served(argv, tmp_path / "log", r"^(http://127\.0\.0\.1:\d+/) ") as address:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser_page(browser, address, "zh-CN", requests)

            def enter(box, text: str):
                """Paste a text, as slowly as people: the page notices a moment later."""
                box.page.wait_for_timeout(300)
                box.click()
                box.page.keyboard.insert_text(text)
                box.page.wait_for_timeout(300)
                return box

            def send(page, text: str) -> None:
                enter(page.locator("textarea:visible").last, text).press("Enter")

            def said(page, who: str) -> list[str]:
                """Return the messages, or the replies without the name of the run, which is their first line."""
                texts = page.get_by_test_id(who).all_inner_texts()
                return [text.partition("\n")[2] for text in texts] if who == "bot" else texts

            def wait(condition) -> None:
                until = time.monotonic() + 60
                while not condition():
                    assert time.monotonic() < until

            def growing(read) -> str:
                """Wait until a text grows, and return it."""
                texts = [read()]
                wait(lambda: texts.append(read()) or texts[-1] > texts[-2] and texts[-1].startswith(texts[-2]))
                return texts[-1]

            # 1 a streamed reply; what is typed is shown as it is
            page.get_by_text("温度").wait_for()
            page.wait_for_timeout(1000)
            typed = "小猫吃什么？<b>x</b> &amp; <img src=x> **y** $$z$$"
            send(page, typed)
            bot = page.get_by_test_id("bot")
            bot.last.wait_for()
            growing(bot.last.inner_text)
            assert said(page, "user") == [typed] and said(page, "bot")[0].startswith("[1] ")
            assert not page.locator(".message b, .message img, .message .katex").count()

            # 2 stop it, and it stays as it is
            def stop(page) -> list[str]:
                page.get_by_test_id("stop-button").click()
                page.get_by_test_id("submit-button").wait_for()
                return said(page, "bot")

            stopped = stop(page)
            time.sleep(0.5)
            assert said(page, "bot") == stopped
            # 3 retry: the same message gets another reply
            page.get_by_label("重试").click()
            page.get_by_test_id("stop-button").wait_for()
            growing(bot.last.inner_text)
            assert len(again := stop(page)) == 1 and again != stopped and said(page, "user") == [typed]
            # 4 a second tab at the same time, in English
            other = browser_page(browser, address, "en-US", requests)
            other.get_by_text("Temperature").wait_for()
            send(page, also := "<i>小狗</i>呢？&lt;")
            send(other, "hi")
            other.get_by_test_id("bot").wait_for()
            for tab in (other, page, other, page):
                growing(tab.get_by_test_id("bot").last.inner_text)
            assert said(other, "bot")[0].startswith("[1] ") and said(page, "bot")[1].startswith("[3] ")
            assert said(page, "user") == [typed, also]
            # 5 a new conversation while a reply is written; of a message beyond the context the next knows nothing
            page.get_by_label("清空对话").click()
            wait(lambda: not said(page, "user"))
            page.wait_for_timeout(1000)
            assert not said(page, "user") and not said(page, "bot")
            send(page, "长" * 10_000)
            page.get_by_text("leaves no room in the context of 256").wait_for()
            page.get_by_test_id("submit-button").wait_for()
            send(page, "短")
            wait(lambda: [text[:3] for text in said(page, "bot")] == ["[1]", "[1]"])
            assert said(page, "user") == ["长" * 10_000, "短"]
            stop(page)
            # 6 two runs reply to one message, each to its own conversation
            page.get_by_label("模型 Runs").click()
            page.get_by_role("option", name=runs[1]).click()
            send(page, "quick <b> &amp;")
            wait(lambda: page.get_by_text(runs[1]).count() == 2)  # among the chosen, and above the reply
            page.get_by_test_id("submit-button").wait_for()
            replies = page.get_by_test_id("bot").all_inner_texts()[-2:]
            for reply, start in zip(replies, (f"{runs[0]}\n[3] ", f"{runs[1]}\n[1] "), strict=True):
                assert reply.startswith(start)
            page.get_by_label("撤销").click()  # what was typed returns to the box
            wait(lambda: page.locator("textarea:visible").last.input_value() == "quick <b> &amp;")
            # 7 a run that only continues texts
            other.get_by_title("Remove").first.click()
            other.get_by_label("模型 Runs").click()
            other.get_by_role("option", name=runs[2]).click()
            enter(other.get_by_label("文本 Text"), "第").press("Shift+Enter")
            written = other.get_by_label("续写 Continuation")
            wait(lambda: written.input_value().startswith("[1] "))
            text = growing(written.input_value)
            other.get_by_test_id("stop-button").last.click()
            time.sleep(0.3)
            stopped = written.input_value()
            time.sleep(0.5)
            assert stopped.startswith(text) and written.input_value() == stopped
            browser.close()
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")
    assert all(request.startswith(address) or request.startswith("data:") for request in requests), requests


def test_the_page_without_gradio_names_the_extra(every_stage, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert sample.main(["--web", "--out", str(every_stage["out"])]) == 2
    assert "this needs gradio: pip install -e '.[web]'" in one_error(capsys)


def test_a_reward_model_does_not_write(every_stage, capsys):
    assert sample.main(["--run", str(every_stage["out"] / "tiny/reward")]) == 2
    assert "holds a reward model" in one_error(capsys)


def test_a_scored_dpo_run_keeps_its_options(every_stage, trained_runs, capsys):
    run, scores = every_stage["out"] / "tiny/dpo", []
    state = m.load_checkpoint(run / "best.pt")
    for beta in (0.1, 0.7):
        state["config"]["rl"]["dpo_beta"] = beta
        m.save_checkpoint(run / "best.pt", state)
        assert train.main(["--stage", "eval", "--init", str(run), "--out", str(every_stage["out"])]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1])["dpo_loss"])
    assert scores[0] != scores[1]


def test_plot_draws_several_runs(every_stage, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [str(every_stage["out"] / "tiny" / stage) for stage in ("sft", "ppo")]
    assert train.main(["--plot", *runs, "--png", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


# -- a new stage: a row in m.STAGES is all that train.py needs ---------------------------------------------------------


class Echo(m.SFTTrainer):
    stage = "echo"


class Story(m.PreTrainer):
    stage = "story"


@pytest.fixture
def new_stages(monkeypatch) -> None:
    """Two stages that MiniLLM does not have: one after sft, with defaults of its own, and one from a new model."""
    monkeypatch.setitem(m.STAGES, "echo", m.Stage(Echo, m.ConversationDataLoader, "sft", ("exact_match",)))
    monkeypatch.setitem(m.STAGES, "story", m.Stage(Story, m.PretrainDataLoader, None, ("bpb",)))
    monkeypatch.setitem(m.RECIPES["tiny"], "echo", ({"max_steps": 2, "learning_rate": 0.0123, "log_every": 1},))


def test_a_new_stage_trains_resumes_and_is_scored(new_stages, every_stage, trained_runs, tmp_path, capsys):
    shutil.copytree(every_stage["out"] / "tiny/sft", tmp_path / "tiny/sft")
    argv = ["--stage", "echo", "--out", str(tmp_path), *data_flags(trained_runs), *QUICK]
    assert train.main(argv) == 0
    run, shown = tmp_path / "tiny/echo", capsys.readouterr().out
    config = m.run_config(run)
    assert config["stage"] == "echo" and config["parent"] == str(tmp_path / "tiny/sft")
    assert (config["train"]["learning_rate"], config["train"]["max_steps"]) == (0.0123, 2)
    assert "done: " in shown and f"sample.py --run {run} --chat" in shown
    assert [row["step"] for row in m.read_metrics(run) if "loss" in row] == [1, 2]
    assert "val exact match" in shown  # its headline
    assert train.main([*argv, "--resume", "--max-steps", "3"]) == 0 and "at step 2" in capsys.readouterr().out
    assert train.main(["--stage", "eval", "--init", str(run), "--out", str(tmp_path)]) == 0
    assert "exact_match" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(m.load_run(run)[0], m.MiniGPT) and sample.main(["--run", str(run), "--max-new-tokens", "2"]) == 0
    assert train.main(["--stage", "echo", "--out", str(tmp_path / "x")]) == 2
    assert "train it with --stage sft" in one_error(capsys)


def test_a_new_stage_without_parent_starts_from_a_new_model(new_stages, pretraining, tmp_path, capsys):
    flags = [*pretraining["flags"], "--out", str(tmp_path), "--stage", "story", "--max-steps"]
    assert train.main([*flags, "2"]) == 0
    run, config = tmp_path / "tiny/story", m.get_train_config("tiny", "story")
    assert m.run_config(run)["train"]["learning_rate"] == config.learning_rate == m.TrainConfig().learning_rate
    assert "parent" not in m.run_config(run) and "val_bpb" in m.read_metrics(run)[-1]
    assert train.main([*flags, "3", "--resume"]) == 0
    assert m.load_checkpoint(run / "checkpoint.pt")["step"] == 3
    assert train.main(["--stage", "eval", "--init", str(run), "--out", str(tmp_path)]) == 0


def test_a_stage_that_is_not_in_the_table_is_refused(capsys):
    assert train.main(["--stage", "echo"]) == 2
    assert "--stage echo is unknown" in one_error(capsys)


# -- models for and from transformers ----------------------------------------------------------------------------------

TEMPLATE = (  # as ChatML, but for the turn that it begins with
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def huggingface_run(path: Path, kind: str = "Qwen3", family: str = "qwen") -> Path:
    """A directory as transformers' users have them: a random model, a tokenizer of a family, a chat template."""
    made = huggingface_tokenizer(family, path, pad_token="<|endoftext|>")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    changes = {"eos_token_id": made.token_to_id("<|im_end|>"), "pad_token_id": made.token_to_id("<|endoftext|>")}
    changes |= {"num_shared_experts": 0} if kind == "Qwen3Moe" else {}
    size = made.get_vocab_size() + 3  # releases round it up
    huggingface_model(kind, vocab_size=size, **changes).save_pretrained(path)
    return path


def same_in_transformers(folder: Path, run: Path) -> None:
    """An exported directory against the run that it comes from: ids, chat prompts, logits, greedy text."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    model, tokenizer, _ = m.load_run(run)
    generator, unused = m.TextGenerator(model, tokenizer), range(tokenizer.vocab_size, model.config.vocab_size)
    for text in [*TEXTS[:6], "Once there was", "小猫", "\n\n a", " \n b \n"]:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert tokens(text)["input_ids"] == ids
        user = {"role": "user", "content": text}
        for chat in ([user], [{"role": "system", "content": "简短"}, user]):
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            assert tokens.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompt
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=2e-5)
        written = theirs.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=list(unused) or None)
        ours = generator.greedy_search(ids, m.GenerationConfig(max_new_tokens=12))
        assert written[0].tolist() == ours[0].tolist()


@pytest.mark.parametrize(
    "config",
    [shape(max_position_embeddings=128), moe_shape(max_position_embeddings=128, num_shared_experts=0)],
    ids=["dense", "moe"],
)
def test_an_exported_run_is_the_same_in_transformers_and_comes_back(tmp_path, tokenizer, config, capsys):
    pytest.importorskip("transformers")
    options = m.TrainConfig(max_steps=2, lora_rank=2, warmup_steps=0, sample_tokens=0)
    data = [lm_batch(2, 16)]
    run = tmp_path / "tiny/pretrain"
    m.PreTrainer(random_model(config), tokenizer, config=options, train_data=data, run_dir=run).fit()
    assert train.main(["--stage", "export", "--out", str(tmp_path)]) == 0  # the newest run
    folder = tmp_path / "tiny/export"
    assert str(folder) in capsys.readouterr().out
    same_in_transformers(folder, run)
    again, its_tokenizer, state = m.load_run(folder)
    assert its_tokenizer.content_hash() == tokenizer.content_hash() and state["step"] == 0
    merged = m.load_run(run)[0]
    assert all(map(torch.equal, again.parameters(), merged.parameters()))
    assert train.main(["--stage", "export", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    again = ["--stage", "export", "--out", str(tmp_path), "--overwrite", "--init", str(run), "--dtype"]
    assert train.main([*again, "bfloat16"]) == 0
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (
        theirs.dtype
        == torch.bfloat16
        == m.import_extra("safetensors.torch", "hf").load_file(folder / "model.safetensors")["model.norm.weight"].dtype
    )
    weights = zip(m.MiniGPT.from_pretrained(folder).parameters(), merged.parameters(), strict=True)
    assert all(torch.equal(half, full.bfloat16().float()) for half, full in weights)


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
def test_an_imported_model_is_trained_like_any_other(trained_runs, tmp_path, kind, capsys):
    there, out = huggingface_run(tmp_path / "there", kind), tmp_path / "out"
    data = [*data_flags(trained_runs), "--out", str(out)]
    common = [*data, *quick("pretrain"), "--seq-len", "64", "--save-every", "1", "--log-every", "1"]
    common += ["--eval-tokens", "200"]
    first = ["--stage", "sft", "--lora-rank", "2", "--init", str(there), *common, "--reply-tokens", "6"]
    assert train.main([*first, "--max-steps", "2"]) == 0
    assert train.main([*first, "--max-steps", "3", "--resume"]) == 0
    assert train.main(["--stage", "dpo", "--init", str(out / "there/sft"), *common, "--max-steps", "1"]) == 0
    assert train.main(["--init", str(there), *common, "--max-steps", "1"]) == 0
    assert train.main(["--stage", "eval", "--init", str(there), *data, "--seq-len", "64"]) == 0
    assert sample.main(["--run", str(there), "--prompt", "小猫", "--max-new-tokens", "4"]) == 0
    assert train.main(["--stage", "export", "--init", str(out / "there/dpo"), "--out", str(out)]) == 0
    capsys.readouterr()
    same_in_transformers(out / "there/export", out / "there/dpo")
    assert train.main(["--config", "tiny", "--stage", "sft", "--init", str(there), *common, "--overwrite"]) == 2
    assert "contradict the loaded model" in capsys.readouterr().err
    (there / "tokenizer.json").unlink()
    assert sample.main(["--run", str(there)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "4"]], ids=["whole", "lora"])
def test_a_model_from_elsewhere_learns_by_its_defaults(tmp_path, capsys, lora):
    """Shaped as SmolLM2, with a tokenizer that lacks 21 bytes: small rates, few tokens at once, a place of its own."""
    there, out = huggingface_run(tmp_path / "SmolLM2-1M", "Llama", "smollm"), tmp_path / "out"
    records = [{"messages": turns(f"Say cat {i} \x04", "cat " * (i % 4 + 1))} for i in range(90)]
    data = str(write_jsonl(tmp_path / "mine.jsonl", records))
    argv = ["--init", str(there), "--data", data, "--out", str(out)]
    assert train.main(["--stage", "sft", *argv, *lora]) == 0
    shown, run = capsys.readouterr().out, out / "SmolLM2-1M/sft"
    config, rows = m.run_config(run), [row for row in m.read_metrics(run) if "val_loss" in row]
    size = m.load_run(there)[0].num_params()
    assert config["train"]["learning_rate"] == pytest.approx((10 if lora else 1) * 0.6 / size**0.5)
    expected = {"optimizer": "adamw", "epochs": 3.0, "max_steps": 0, "minutes": 0.0, "batch_size": 8}
    assert expected.items() <= config["train"].items() and config["imported"] == "SmolLM2-1M"
    assert 20 < config["train"]["seq_len"] < 128  # the longest record, not the context
    assert rows[0]["step"] == 0 and rows[-1]["val_loss"] < rows[0]["val_loss"]
    for text in (
        f"records to train on, 9 to validate on, from {data}",
        "--optimizer adamw",
        "about 0.0 minutes",
        "3 epochs",
    ):
        assert text in shown or text.startswith("records"), text
    assert f"from {data}" in shown and f"next:  python sample.py --run {run} --chat" in shown
    assert sample.main(["--run", str(run), "--prompt", "a\x04b", "--max-new-tokens", "2"]) == 0
    # what follows stays in its place, at small rates; the user's flags win; pretraining, too, is evaluated at first
    more = ["--data", data, "--out", str(out), "--max-steps", "1"]
    words = [{"text": f"the cat {i} sat down on the mat"} for i in range(300)]
    text = ["--data", str(write_jsonl(tmp_path / "text.jsonl", words)), "--out", str(out), "--max-steps", "1"]
    flags = ["--optimizer", "muon", "--learning-rate", "0.5", "--seq-len", "16"]
    assert train.main(["--init", str(run), *text, *flags]) == 0
    config = m.run_config(out / "SmolLM2-1M/pretrain")["train"]
    assert (config["optimizer"], config["learning_rate"], config["seq_len"], config["epochs"]) == ("muon", 0.5, 16, 0)
    assert m.read_metrics(out / "SmolLM2-1M/pretrain")[0].keys() >= {"val_bpb", "step"}
    assert m.read_metrics(out / "SmolLM2-1M/pretrain")[0]["step"] == 0
    assert train.main(["--stage", "sft", "--init", str(run), *more, "--config", "tiny"]) == 2
    assert "contradict the loaded model" in one_error(capsys)


@pytest.mark.parametrize(("stage", "epochs"), [("sft", 3), ("dpo", 1), ("reward", 2)])
def test_the_users_own_data_are_gone_through_in_epochs(out_with_a_run, trained_runs, tmp_path, capsys, stage, epochs):
    shutil.copytree(out_with_a_run / "tiny/pretrain", tmp_path / "tiny/pretrain")
    argv = ["--stage", stage, "--init", str(tmp_path / "tiny/pretrain"), "--out", str(tmp_path), *quick(stage)]
    argv += data_flags(trained_runs)
    assert train.main(argv) == 0
    shown, state = capsys.readouterr().out, m.load_checkpoint(tmp_path / "tiny" / stage / "checkpoint.pt")
    config = state["config"]["train"]
    assert (config["epochs"], config["max_steps"], config["minutes"]) == (epochs, 0, 0)
    assert f"; {epochs} epochs on " in shown and state["finished"] and state["counters"]["epochs_done"] >= epochs
    assert train.main([*argv, "--overwrite", "--epochs", "0.5"]) == 0
    assert "; 0.5 epochs on " in capsys.readouterr().out
    assert train.main([*argv, "--overwrite", "--max-steps", "1"]) == 0
    config = m.run_config(tmp_path / "tiny" / stage)["train"]
    assert (config["epochs"], config["max_steps"], config["minutes"]) == (0, 1, 0)


def test_the_best_or_the_last_weights_are_taken(out_with_a_run, trained_runs, tmp_path, capsys):
    base = tmp_path / "tiny/pretrain"
    shutil.copytree(out_with_a_run / "tiny/pretrain", base)
    state = m.load_checkpoint(base / "checkpoint.pt")
    m.save_checkpoint(base / "best.pt", state | {"step": 1})
    state["model"]["embed_tokens.weight"] *= 3
    m.save_checkpoint(base / "checkpoint.pt", state)
    scores, flags = {}, ["--init", str(base), "--out", str(tmp_path)]
    for which, step in (("best", 1), ("last", 2)):
        argv = [*flags, "--checkpoint", which]
        assert train.main(["--stage", "eval", *argv, *data_flags(trained_runs)[2:]]) == 0
        shown = capsys.readouterr().out
        scores[which] = json.loads(shown.splitlines()[-1])["loss"]
        assert f"pretrain at step {step} on" in shown
        more = [*data_flags(trained_runs), *QUICK, "--max-steps", "1", "--overwrite"]
        assert train.main(["--stage", "sft", *argv, *more]) == 0
        assert f"sft: from {base} at step {step}" in capsys.readouterr().out
        assert m.run_config(tmp_path / "tiny/sft")["checkpoint"] == which
    assert scores["best"] != scores["last"]
    again = ["--stage", "sft", "--out", str(tmp_path), "--resume", "--max-steps", "2"]
    assert train.main(again) == 0 and "at step 2" in capsys.readouterr().out  # as it started
    ppo = ["--stage", "ppo", *flags, "--checkpoint", "last", "--reward", str(trained_runs / "reward")]
    assert train.main([*ppo, *data_flags(trained_runs), *quick("ppo"), "--max-steps", "1"]) == 0
    again = ["--stage", "ppo", "--out", str(tmp_path), "--resume", "--max-steps", "2"]
    assert train.main(again) == 0 and f"from {base} at step 2" in capsys.readouterr().out  # also its reference


# -- rlhf in one go ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rlhf(trained_runs, tmp_path) -> list[str]:
    """The command line of one step of each stage in tmp_path/out, which has a pretrained run; the data come last."""
    shutil.copytree(trained_runs / "pretrain", tmp_path / "out/tiny/pretrain")
    return ["--stage", "rlhf", "--out", str(tmp_path / "out"), *QUICK, "--max-steps", "1", *data_flags(trained_runs)]


def test_train_rlhf_in_one_go(rlhf, capsys):
    assert train.main(rlhf) == 0
    shown = capsys.readouterr().out
    assert "held-out metric" in shown and "ppo --chat" in shown
    assert train.main(rlhf) == 0
    shown = capsys.readouterr().out
    assert "== " not in shown and "changed since" not in shown
    base = Path(rlhf[3]) / "tiny/pretrain"  # other flags, or another base, are not passed over in silence
    shutil.copytree(base, base.parent.parent / "other")
    more = ["--kl-coef", "0.2", "--learning-rate", "0.5", "--init", str(base.parent.parent / "other")]
    assert train.main([*rlhf, *more]) == 0
    said = re.findall(r"^(\w+): finished already, in \S+; changed since it began: (.*)$", capsys.readouterr().out, re.M)
    changed = dict(said)
    assert list(changed) == ["sft", "reward", "ppo"]
    assert changed["sft"].startswith(f"parent {base} -> {base.parent.parent / 'other'}, learning_rate 0.004 -> 0.5")
    assert "parent" not in changed["ppo"] and "kl_coef 0.05 -> 0.2" in changed["ppo"]


def test_train_rlhf_begins_with_pretraining_where_there_is_none(rlhf, tmp_path, capsys):
    shutil.rmtree(tmp_path / "out")
    words = "--hidden-size 32 --num-attention-heads 2 --num-hidden-layers 1 --vocab-size 300 --seq-len 30".split()
    argv = [*rlhf, *words, "--max-position-embeddings", "64"]
    assert train.main(argv) == 0
    stages = ["pretrain", "sft", "reward", "ppo"]
    assert re.findall(r"^== (\w+)", capsys.readouterr().out, re.M) == stages
    assert all(m.load_checkpoint(tmp_path / f"out/tiny/{stage}/checkpoint.pt")["finished"] for stage in stages)


def test_rlhf_of_a_model_from_elsewhere(trained_runs, tmp_path):
    """All stages keep its name, take its defaults, and rows of the data's lengths."""
    there, out = huggingface_run(tmp_path / "there", "Qwen3"), tmp_path / "out"
    argv = ["--stage", "rlhf", "--init", str(there), "--out", str(out), *QUICK, "--max-steps", "1"]
    assert train.main([*argv, *data_flags(trained_runs)]) == 0
    for stage, parent in (("sft", there), ("reward", out / "there/sft"), ("ppo", out / "there/sft")):
        config = m.run_config(out / "there" / stage)
        assert (config["parent"], config["checkpoint"], config["imported"]) == (str(parent), "best", "there")
        assert config["train"]["optimizer"] == "adamw" and config["train"]["seq_len"] < 128


def test_rlhf_on_a_file_a_kind(rlhf, trained_runs, capsys):
    files = {
        part: [str(trained_runs / f"data/{part}/{name}.jsonl") for name in ("sft", "pref")] for part in ("train", "val")
    }
    argv = [*rlhf[:-4], "--data", *files["train"]]
    assert train.main([*argv, "--val-data", *files["val"]]) == 0  # the questions of the conversations are the prompts
    assert "ppo" in capsys.readouterr().out
    files = {part: [*paths, str(trained_runs / f"data/{part}/prompts.jsonl")] for part, paths in files.items()}
    argv = [*rlhf[:-4], "--data", *files["train"]]
    assert train.main([*argv, "--val-data", *files["val"], "--overwrite"]) == 0


def test_rlhf_on_data_without_answers_or_prompts(rlhf, tmp_path, capsys):
    """People's own data: nothing checkable, pairs and conversations that may lack a question."""
    chats = [{"messages": turns(f"hi {i}", "yes")} for i in range(9)]
    chats.append({"messages": [{"role": "assistant", "content": "hello"}]})
    pairs = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(9)]
    prompts = [{"prompt": f"say {i}"} for i in range(9)]
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name, records in (("chats", chats[::-1]), ("pairs", pairs), ("prompts", prompts)):
            write_jsonl(tmp_path / part / f"{name}.jsonl", records)
    argv = [*rlhf[:-4], "--data", str(tmp_path / "train"), "--val-data", str(tmp_path / "val")]
    assert train.main(argv) == 0
    table = capsys.readouterr().out
    assert re.search(r"^sft +\d+ +bpb ", table, re.M) and re.search(r"^ppo +\d+ +reward ", table, re.M)
    assert train.main(argv) == 0
    assert "sft: finished already" in capsys.readouterr().out
    dpo = ["--stage", "dpo", "--out", str(tmp_path / "out"), *quick("dpo"), "--max-steps", "1", *argv[-4:]]
    assert train.main(dpo) == 0
    mtimes = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.pt"))]
    argv[argv.index("--data") + 1] = str(tmp_path / "train/chats.jsonl")
    assert train.main([*argv, "--overwrite"]) == 2  # and nothing is lost
    assert "no preference records" in one_error(capsys)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.pt"))] == mtimes


def test_a_stopped_rlhf_does_not_mix_old_stages_with_new_ones(rlhf, tmp_path, monkeypatch, capsys):
    assert train.main(rlhf) == 0
    runs = tmp_path / "out/tiny"
    with monkeypatch.context() as patch:
        patch.setattr(m.RewardTrainer, "fit", lambda self: {"signal": signal.SIGTERM})
        assert train.main([*rlhf, "--overwrite"]) == 143
    assert not m.holds_run(runs / "reward") and not m.holds_run(runs / "ppo")
    assert all(len(list(runs.glob(f"{stage}.old-*/checkpoint.pt"))) == 1 for stage in ("reward", "ppo"))
    capsys.readouterr()
    assert train.main(rlhf) == 0
    shown = capsys.readouterr().out
    assert "sft: finished already" in shown and "ppo: finished already" not in shown


# -- what goes wrong on the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg", "tiny"], "did you mean --config"),
        (["--stage", "pretran"], "--stage pretran is unknown: choose from tokenizer, pretrain"),
        (["--config", "huge"], "config 'huge' is unknown: choose from tiny"),
        (["--learning-rate", "-1"], "learning_rate=-1.0"),
        (["--batch-size", "x"], "invalid int"),
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--resume"], "no run directory"),
        (["--stage", "eval"], "--init"),
        (["--stage", "eval", "--init", "/nowhere"], "no run directory"),
        (["--device", "tpu9"], "tpu9"),
        (["--device", "meta"], "meta"),
        (["--vocab-size", "100"], "--vocab-size 100"),
        (["--seq-len", "999"], "seq_len=999 exceeds the context"),
        (["--max-steps", "0"], "needs an end"),
        (["--seed", "99999999999999999999"], "seed="),
        (["--rope-scaling", "{a"], "rope-scaling"),
        (["--rope-scaling", '{"rope_type": "yarn", "factor": "4"}'], "rope_scaling="),
        (["--num-attention-heads", "5"], "num_attention_heads=5"),
        (["--dtype", "fp8"], "invalid choice"),
        (["--data", ""], "--data is empty, as an unset variable of the shell is"),
        (["--data", "a.txt", ""], "--data is empty"),
        (["--init="], "--init is empty"),
    ],
)
def test_train_reports_mistakes_in_one_message(tmp_path, capsys, argv, message):
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("train.py: error: ") and "Traceback" not in err and err.count("\n") == 1
    assert not (tmp_path / "out/tiny").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "{tmp}"], "no run in"),
        (["--temperature", "-1"], "temperature=-1.0 is not possible: it must be 0 or more"),
        (["--tempreture", "1"], "--temperature"),
        (["--web", "--chat"], "--chat and --web exclude each other"),
        (["--web", "--prompt", "x"], "--web and --prompt exclude each other"),
        (["--web", "--num-beams", "2"], "--strategy beam are only known at the end"),
        (["--web", "--explain", "x"], "--web and --explain exclude each other"),
        (["--explain", "x", "--seed", "1"], "--seed has no effect with --explain"),
        (["--explain", "x", "--png", "a.jpg"], "--png a.jpg is not possible"),
        (["--png", "a.png"], "--png has no effect without --explain"),
        (["--explain", "x", "--layer", "1"], "--layer has no effect without --png"),
        (["--run", "a", "b"], "--run names 2 directories: only --web takes several"),
        (["--run", "{tmp}"], "no run directory"),
        (["--run", "", "--prompt", ""], "--run is empty"),
    ],
)
def test_sample_reports_mistakes(tmp_path, capsys, argv, message):
    assert sample.main([str(tmp_path) if word == "{tmp}" else word for word in argv]) == 2
    assert message in one_error(capsys)


SHORT = ["--reply-tokens", "6", "--data", "{prompts}", "--val-data", "{prompts}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "sft", "--reward", "answer"], "--reward"),
        (["--stage", "rlhf", "--reward", "answer"], "--reward"),
        (["--stage", "sft", "--init", "/nowhere"], "/nowhere"),
        (["--stage", "sft", "--hidden-size", "64"], "hidden_size=64"),
        (["--stage", "sft", "--seq-len", "999"], "seq_len=999 exceeds the context"),
        (["--stage", "grpo", "--init", "{base}", *SHORT, "--reward", "nothing"], "nothing"),
        (
            ["--stage", "grpo", "--init", "{base}", *SHORT, "--reward", "{base}"],
            "nor the run directory of a reward model",
        ),
        (["--stage", "grpo", "--group-size", "1"], "group_size=1"),
        (["--stage", "dpo", "--init", "{base}", "--data", "{text}"], "nothing for this stage"),
        (["--stage", "ppo", "--kl-coef", "-1"], "kl_coef=-1.0"),
        (["--stage", "eval", "--inspect", "1"], "--inspect 1 is not possible"),
        (["--stage", "rlhf", "--inspect", "1"], "--inspect 1 is not possible"),
        (["--stage", "sft", "--inspect", "0"], "--inspect 0"),
        (["--stage", "sft", "--inspect", "1", "--reward", "answer"], "--reward has no effect in --stage sft"),
        (["--plot", "/nowhere"], "--init has no effect in --plot"),
    ],
)
def test_stages_report_mistakes_in_one_message(tmp_path, trained_runs, capsys, argv, message):
    places = {
        "{prompts}": str(trained_runs / "data/train/prompts.jsonl"),
        "{base}": str(trained_runs / "pretrain"),
        "{text}": str(trained_runs / "data/val/text.jsonl"),
    }
    argv = [*(places.get(word, word) for word in argv), "--out", str(tmp_path)]
    assert train.main(argv if "--init" in argv else [*argv, "--init", places["{base}"]]) == 2
    assert message in one_error(capsys) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {', "not JSON"),
        ("{}", "neither"),
        ("[]", "a JSON object is expected"),
        ("[" * 100_000, "not JSON"),
        ('{"model": {"colour": 3}, "train": {}}', "colour"),
        ('{"model": {"hidden_size": -3}, "train": {}}', "hidden_size=-3"),
    ],
)
def test_a_damaged_config_is_one_message(trained_runs, tmp_path, capsys, content, message):
    run = tmp_path / "run"
    shutil.copytree(trained_runs / "pretrain", run)
    (run / "config.json").write_text(content)
    for main, argv in (
        (sample.main, ["--run", str(run)]),
        (train.main, ["--stage", "eval", "--init", str(run)]),
        (train.main, ["--stage", "sft", "--init", str(run), "--out", str(tmp_path)]),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and "config.json" in error and len(error.splitlines()) == 1


# which options of RLHFConfig, and which others that not all stages use, a stage uses
PAIRS = {"dpo": "dpo_beta dpo_kind dpo_sft_coef", "reward": "reward_center_coef reward_sft_coef"}
BOTH = (
    "temperature missing_end_penalty minibatch_size update_epochs clip_range stop_kl reward eval_prompts reply_tokens"
)
SPECIAL = {
    "pretrain": "eval_tokens accumulation_steps",
    "sft": "eval_tokens eval_prompts reply_tokens accumulation_steps packing",
    "dpo": f"eval_tokens reply_tokens accumulation_steps {PAIRS['dpo']}",
    "reward": f"eval_tokens accumulation_steps {PAIRS['reward']}",
    "ppo": f"{BOTH} kl_coef gamma gae_lambda value_clip value_coef critic_rate critic_warmup",
    "grpo": f"{BOTH} group_size grpo_kl_coef advantage_kind",
}
SPECIAL["rlhf"] = " ".join(SPECIAL[stage] for stage in ("pretrain", "sft", "reward", "ppo"))
ALONE = {  # all that a stage uses
    "tokenizer": "config data val_data out vocab_size on_bad_record",
    "export": "config init checkpoint out overwrite dtype format",
    "eval": "config data val_data init checkpoint out device dtype batch_size seq_len compile eval_tokens eval_prompts "
    "reply_tokens on_bad_record",
}


@pytest.mark.parametrize("stage", [*SPECIAL, *ALONE])
def test_every_flag_is_used_or_refused(trained_runs, stage):
    run, known = str(trained_runs / "pretrain"), {"format", *" ".join(SPECIAL.values()).split()}
    values = {"init": run, "kind": "ipo", "config": "tiny", "inspect": "1", "rope_scaling": "{}"}
    shape = {field.name for field in dataclasses.fields(m.MiniGPTConfig)}
    used = set(ALONE.get(stage, SPECIAL.get(stage, "")).split()) | (shape if stage != "tokenizer" else set())
    for action in train.build_parser()._option_string_actions.values():
        name = action.dest
        if (
            name in ("help", "stage", "png", "plot", "inspect", "format")
            or name in ("reward", "checkpoint")
            and stage == "rlhf"
        ):
            continue
        value = [] if action.nargs == 0 else [values.get(name) or next(iter(action.choices or ["1"]))]
        try:
            train.parse(["--stage", stage, "--" + name.replace("_", "-"), *value])
            is_used = True
        except m.UserError as error:
            assert f"--{name.replace('_', '-')} has no effect in --stage {stage}, but in " in str(error)
            is_used = False
        assert is_used == (name in used or stage in SPECIAL and name not in known), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--stage grpo --kl-coef 5", "in ppo: did you mean --grpo-kl-coef?"),
        ("--stage sft --dpo-beta 1", "--dpo-beta has no effect in --stage sft, but in dpo"),
        ("--stage reward --dpo-sft-coef 1", "did you mean --reward-sft-coef?"),
        ("--stage dpo --no-packing", "--packing has no effect in --stage dpo, but in sft"),
        ("--stage ppo --accumulation-steps 2", "--accumulation-steps has no effect in --stage ppo"),
        ("--reply-tokens 5", "--reply-tokens has no effect in --stage pretrain"),
        ("--stage eval --init {run} --learning-rate 1", "--learning-rate has no effect in --stage eval"),
        ("--stage export --seed 1", "--seed has no effect in --stage export"),
        ("--stage tokenizer --hidden-size 64", "--hidden-size has no effect in --stage tokenizer"),
        ("--plot {run} --seed 1", "--seed has no effect in --plot"),
        ("--stage sft --inspect 1 --max-steps 1", "--max-steps has no effect in --inspect"),
        ("--png a.png", "--png has no effect without --plot"),
        ("--stage sft --init {run} --lora-alpha 8", "--lora-alpha has no effect without --lora-rank"),
        ("--schedule cosine --decay-fraction 0.1", "--decay-fraction has no effect without --schedule wsd"),
        ("--optimizer adamw --momentum 0.9", "--momentum has no effect without --optimizer muon"),
        ("--schedule constant --min-learning-rate 0", "without --schedule cosine or --schedule wsd"),
        ("--num-experts-per-tok 1", "--num-experts-per-tok has no effect without --num-experts"),
        ("--lr 1", "unknown argument --lr: did you mean --learning-rate?"),
        ("--stage rlhf --reward answer", "--reward has no effect in --stage rlhf"),
    ],
)
def test_a_flag_without_effect_is_refused(trained_runs, tmp_path, capsys, argv, message):
    words = argv.replace("{run}", str(trained_runs / "pretrain")).split()
    assert train.main([*words, "--out", str(tmp_path), *([] if "plot" in argv else data_flags(trained_runs))]) == 2
    assert message in one_error(capsys) and not list(tmp_path.glob("tiny/*"))


def test_resuming_says_what_is_different(trained_runs, tmp_path, capsys):
    argv = ["--stage", "sft", "--init", str(trained_runs / "pretrain"), "--out", str(tmp_path), *QUICK]
    argv += data_flags(trained_runs)
    assert train.main([*argv, "--max-steps", "1"]) == 0
    assert train.main([*argv, "--max-steps", "2", "--learning-rate", "0.25", "--resume"]) == 0
    assert "from here on: learning_rate 0.004 -> 0.25, max_steps 1 -> 2" in capsys.readouterr().out
    for more, message in (
        (["--batch-size", "2"], "batch_size=2, but batch_size=3 in the checkpoint"),
        (["--seed", "3"], "seed=3, but seed=0 in the checkpoint"),
        (["--lora-rank", "2"], "was trained with --lora-rank 0"),
        (["--optimizer", "adamw"], "was trained with --optimizer muon"),
        (["--data", str(trained_runs / "data/val")], "in the checkpoint: give the same --data, --val-data, tokenizer"),
    ):
        assert train.main([*argv, "--max-steps", "3", "--resume", *more]) == 2
        assert message in capsys.readouterr().err


# ======================================================================================================================
# README: the snippet, the docstrings' examples, the diffs of "Hack it"
# ======================================================================================================================


def test_the_snippet_of_the_readme(tmp_path):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    snippet = next(block.split("```")[0] for block in readme.split("```python\n")[1:] if "train_epoch" in block)
    out = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert out.stdout.startswith("epoch loss: ") and "Mini-LLM" in out.stdout
    assert out.stderr.count("below the floor") == 1 and not list(tmp_path.iterdir())


def test_docstring_examples():
    assert doctest.testmod(m) == (0, 7)


HACKS = HERE / "README.md"


def hacks_of_the_readme() -> dict[str, str]:
    """The diffs of the section "Hack it" by their titles."""
    section = HACKS.read_text(encoding="utf-8").partition("## Hack it\n")[2].partition("\n## ")[0]
    parts = [part for part in section.split("\n**") if "```diff" in part]
    return {part.partition("**")[0]: part.partition("```diff\n")[2].partition("```")[0] for part in parts}


def hacked_minillm(title: str, folder: Path, monkeypatch):
    """minillm.py with a diff of the README applied, as a module of its own."""
    source = Path(m.__file__).read_text(encoding="utf-8")
    hunks = hacks_of_the_readme()[title].split("@@\n")[1:]
    assert hunks
    for hunk in hunks:
        old, new = ("".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in side) for side in (" -", " +"))
        assert source.count(old) == 1, f"this does not occur once in minillm.py:\n{old}"
        source = source.replace(old, new)
    path = folder / "hacked_minillm.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def cannot_be_exported(hacked, model, folder: Path, name: str) -> None:
    with pytest.raises(hacked.UserError, match=rf"the parameter {name} cannot be exported"):
        model.save_pretrained(folder / "export")
    assert not (folder / "export").exists()


def check_norm(hacked, tmp_path, tokenizer, runs) -> None:
    """Layer norm everywhere, in QK-norm too; its biases start at 0 and are trained."""
    torch.manual_seed(0)
    model = hacked.MiniGPT(shape())
    biases = {name: p for name, p in model.named_parameters() if name.endswith("norm.bias") or "layernorm.bias" in name}
    assert len(biases) == 2 * 4 + 1 and not any(p.any() for p in biases.values())
    norm, x = model.layers[0].self_attn.q_norm, torch.randn(2, 3, 4, 8)
    with torch.no_grad():
        norm.bias.normal_()
        for inputs in (x, x.clone().requires_grad_()):
            torch.testing.assert_close(norm(inputs), F.layer_norm(x, (8,), norm.weight, norm.bias, norm.eps))
        norm.bias.zero_()
    trainer = hacked.PreTrainer(model, tokenizer, config=hacked.TrainConfig(warmup_steps=0))
    losses = [trainer.step([lm_batch(4, 20)])["loss"] for _ in range(4)]  # the last one is that after three steps
    assert losses[3] < losses[0] - 0.1 and all(p.any() for p in biases.values())
    cannot_be_exported(hacked, model, tmp_path, r"layers.0.\S*norm.bias")


def check_positions(hacked, tmp_path, tokenizer, runs) -> None:
    """Positions come from the embedding alone, and count from a row's first token."""
    model = random_model(shape(), module=hacked)
    generator = hacked.TextGenerator(model, tokenizer)
    config = hacked.GenerationConfig(do_sample=False, max_new_tokens=20)
    prompts = ["你", "Hello, world! It's", "1 + 12 ="]
    assert generator.generate(prompts, config) == [generator.generate(prompt, config) for prompt in prompts]
    cannot_be_exported(hacked, model, tmp_path, "embed_positions.weight")
    cached = generator.greedy_search(random_ids(3, 6), hacked.GenerationConfig(max_new_tokens=12, min_new_tokens=12))
    assert torch.equal(cached, without_ends(model).generate(random_ids(3, 6), 12))
    model, ids = random_model(shape(num_hidden_layers=1), module=hacked), random_ids(1, 9)
    with torch.no_grad():
        there, swapped = model(ids)[0, -1], model(ids[:, [3, 1, 2, 0, 4, 5, 6, 7, 8]])[0, -1]
        assert (there - swapped).abs().max() > 1e-3
        model.embed_positions.weight.zero_()
        there, swapped = model(ids)[0, -1], model(ids[:, [3, 1, 2, 0, 4, 5, 6, 7, 8]])[0, -1]
    torch.testing.assert_close(there, swapped)


def check_window(hacked, tmp_path, tokenizer, runs) -> None:
    """A token sees itself and the 63 before it, with a cache and without."""
    model, ids = random_model(shape(max_position_embeddings=128), module=hacked), random_ids(2, 90)
    config = hacked.GenerationConfig(max_new_tokens=12, min_new_tokens=12)
    cached = hacked.TextGenerator(model, tokenizer).greedy_search(ids, config)
    assert torch.equal(cached, without_ends(model).generate(ids, 12))
    model = random_model(shape(max_position_embeddings=128, num_hidden_layers=1), module=hacked)
    with torch.no_grad():
        plain, changed = model(ids)[:, -1], {}
        for back in (64, 63):
            other = ids.clone()
            other[:, -1 - back] = (other[:, -1 - back] + 1) % 300
            changed[back] = (model(other)[:, -1] - plain).abs().amax(dim=1)
    assert (changed[64] == 0).all() and (changed[63] > 1e-5).all()


def check_epsilon(hacked, tmp_path, tokenizer, runs) -> None:
    """Worked example: of 0.4, 0.1, 0.3, 0.2, an epsilon of 0.15 leaves 4/9, 3/9 and 2/9; one of 0.9 the likeliest."""
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().expand(20_000, -1)
    for epsilon, expected in ((0.0, [0.4, 0.1, 0.3, 0.2]), (0.15, [4 / 9, 0, 3 / 9, 2 / 9]), (0.9, [1, 0, 0, 0])):
        for top_p in (1.0, 0.999):  # without and with another filter
            config = hacked.GenerationConfig(temperature=1.0, top_p=top_p, epsilon=epsilon)
            numbers = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(0))
            drawn = hacked.draw(hacked.sampling_probs(logits, config), numbers)
            share = drawn.bincount(minlength=4) / len(drawn)
            torch.testing.assert_close(share, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)
            assert not share[[p == 0 for p in expected]].any()
    parser = hacked.FlagParser()
    hacked.add_flags(parser, hacked.GenerationConfig(), "generation")
    shown = " ".join(parser.format_help().split())
    assert "--epsilon FLOAT drop tokens less likely than this, except the likeliest [0.0]" in shown
    assert hacked.given_flags(parser.parse_args(["--epsilon", "0.1"]), hacked.GenerationConfig) == {"epsilon": 0.1}


def check_record(hacked, tmp_path, tokenizer, runs) -> None:
    """{"q", "a"} is read as the conversation that it stands for."""
    records = [{"q": "hi", "a": "yo"}], [{"messages": turns("hi", "yo")}]
    found, plain = (
        load(hacked.ConversationDataLoader, tmp_path, tokenizer, record, f"{k}.jsonl")
        for k, record in enumerate(records)
    )
    assert contents(found) == contents(plain) and found.note(0)["messages"] == turns("hi")
    assert as_lists(list(found)) == as_lists(list(plain))
    assert m.form_of(records[0][0]) is None and hacked.form_of(records[0][0]).kind == "chat"


def check_metric(hacked, tmp_path, tokenizer, runs) -> None:
    """Worked example: with log_every=3 there are lines of step 1, and of steps 2 and 3: the means of hidden_norm."""
    model, batches = (
        random_model(shape(), module=hacked),
        [lm_batch(B, T, seed=B) for B, T in ((4, 12), (1, 20), (3, 9))],
    )
    with torch.no_grad():
        first = model.hidden_states(batches[0]["input_ids"][:, :-1])[0].norm(dim=-1).mean().item()
    config = hacked.TrainConfig(max_steps=3, log_every=3, warmup_steps=0, sample_tokens=0, dtype="float32")
    trainer = hacked.PreTrainer(model, tokenizer, config=config, train_data=batches, run_dir=tmp_path / "run")
    steps, plain = [], trainer.step
    trainer.step = lambda batches: steps.append(plain(batches)) or dict(steps[-1])
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        trainer.fit()
    rows = [row["hidden_norm"] for row in hacked.read_metrics(tmp_path / "run") if "loss" in row]
    norms = [step["hidden_norm"] for step in steps]
    assert rows == pytest.approx([norms[0], (norms[1] + norms[2]) / 2]) and norms[0] == pytest.approx(first, rel=1e-5)
    assert f"hidden norm {first:.4g}"[:14] in shown.getvalue()


def check_stage(hacked, tmp_path, tokenizer, runs) -> None:
    """Worked example: chosen -0.5 and rejected -1 nats a token, β = 2, margin ½: ln(1 + e^-(2 · 0.5 - 0.5))."""
    one = hacked.simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.0]), beta=2.0, margin=0.5)
    assert one.item() == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-6)
    config = hacked.get_train_config("tiny", "simpo")
    assert hacked.STAGES["simpo"].parent == "sft" and (config.max_steps or config.minutes)  # or train.py refuses it
    model, config = random_model(shape(), module=hacked), hacked.TrainConfig(**vars(stage_config(max_steps=3)))
    sources = {part: hacked.Source(source.paths, "all") for part, source in sources_in(runs / "data").items()}
    options = {"run_dir": tmp_path / "simpo", "cache_dir": tmp_path / "cache"}
    trainer = hacked.make_trainer("simpo", model, tokenizer, sources, config, **options)
    loader, expected = trainer.train_data, 0.0
    batch = loader.collate([0, 1])
    with torch.no_grad():
        for i in (0, 1):
            means = []
            for side in (0, 1):
                ids, trained = loader.sequence(i, side)
                logprobs = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                means.append(logprobs[trained[1:]].mean().item())
            expected += math.log(1 + math.exp(-(2 * (means[0] - means[1]) - 0.5)))
        assert trainer.loss(batch).item() == pytest.approx(expected, rel=1e-4)
    result = trainer.fit()
    assert trainer.step_count == 3 and 0 <= result["pair_accuracy"] <= 1
    rows = hacked.read_metrics(tmp_path / "simpo")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and "val_pair_accuracy" in rows[-1]


HACK_CHECKS = {
    "Another norm": check_norm,
    "Another position code": check_positions,
    "Sliding-window attention": check_window,
    "Another sampling rule": check_epsilon,
    "Another record form": check_record,
    "An extra metric from inside a loss": check_metric,
    "A new stage": check_stage,
}


@pytest.mark.parametrize("title", HACK_CHECKS)
def test_hacks_of_the_readme(tmp_path, monkeypatch, tokenizer, trained_runs, title):
    hacked = hacked_minillm(title, tmp_path, monkeypatch)
    HACK_CHECKS[title](hacked, tmp_path, tokenizer, trained_runs)


def test_every_hack_of_the_readme_is_tested():
    assert list(hacks_of_the_readme()) == list(HACK_CHECKS)
    assert len(HACK_CHECKS) == HACKS.read_text(encoding="utf-8").partition("## Hack it\n")[2].count("```diff")


# ======================================================================================================================
# Drivers: bench.py
# ======================================================================================================================


@pytest.fixture
def quick_bench(monkeypatch) -> None:
    """Everything is small and measured once, and memory not in a process of its own."""
    monkeypatch.setattr(bench, "REPEATS", (1, 1))
    monkeypatch.setattr(bench, "BUDGET_S", {True: 0.0, False: 0.0})
    monkeypatch.setattr(m, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench, "in_new_process", lambda *_: (1_000_000, 3_000_000))
    small = bench.PEER_SHAPE | {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    monkeypatch.setattr(bench, "PEER_SHAPE", small)
    for name, config in (("tiny", shape()), ("moe", moe_shape())):
        monkeypatch.setitem(m.PRESETS, name, tuple(dataclasses.asdict(config).values()))
    monkeypatch.delitem(m.EXPERTS, "moe")


def test_bench_tells_noise_from_change():
    """Worked example: a change within twice both spreads, or 3 %, is noise; rates want to grow, times to shrink."""
    tables = {"t": {"c": {"a, tok/s": [100.0, 0.01], "b, ms": [10.0, 0.0], "d, MB": [10.0, 0.1], "e, M": [1.0, 0.0]}}}
    before = bench.measured_cells(tables)
    now = bench.measured_cells(
        {
            "t": {
                "c": {
                    "a, tok/s": bench.Measured(90.0, 0.01),
                    "b, ms": bench.Measured(8.0),
                    "d, MB": bench.Measured(11.9),
                    "e, M": bench.Measured(2.0),
                    "new, s": bench.Measured(1.0),
                    "text": "8 x 256",
                }
            }
        }
    )
    table = bench.compare(now, before)
    assert table["verdict"] == {"c: a, tok/s": "worse", "c: b, ms": "better", "c: d, MB": "noise"}
    assert table["ratio"]["c: b, ms"].value == pytest.approx(0.8)
    assert bench.summarize([1.0, 2.0, 4.0]) == (2.0, pytest.approx(0.375))


def test_bench_plans_a_batch_that_memory_has_to_split(quick_bench, capsys, monkeypatch):
    """Worked example: 16 rows measured take 3 MB and each further one 0.1 MB, so 4 MB hold 26 rows of 64."""
    monkeypatch.setattr(bench, "bytes_per_row", lambda *_: 100_000.0)
    argv = ["--quick", "--plan", "--config", "tiny", "--batch-size", "64", "--seq-len", "64", "--gpu-memory", "4M"]
    assert bench.main(argv) == 0
    shown = capsys.readouterr().out
    assert "64 rows do not fit into 0.004 GB: --batch-size 22 --accumulation-steps 3 does" in shown
    cells = {line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in shown.splitlines() if line}
    assert cells["largest batch in 0.004 GB, rows"] == "26" and cells["peak training memory, MB"] == "7.8"


@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_bench_measures_writes_and_compares(quick_bench, tmp_path, capsys, name):
    argv = ["--quick", "--all", "--config", name, "--only"]
    path = str(tmp_path / "figures.json")
    assert bench.main([*argv, "train", "decode", "--json", path]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    rows = json.loads(Path(path).read_text())["tables"]["presets"][name]
    assert rows["parameters, M"] == [m.MiniGPT(m.get_config(name)).num_params() / 1e6, 0.0]
    for row in (
        "eager training, tok/s",
        "  forward and backward, eager, ms",
        "MFU, eager, % of peak",
        "prefill, tok/s",
        "decode, batch 8, tok/s",
        "decode, 4 beams, tok/s",
        "  batch 8, % of memory's limit",
    ):
        assert rows[row][0] > 0 and row in shown
    assert rows["peak memory of that batch, MB"] == [3.0, 0.0]
    assert not any("compiled" in row for row in rows)
    assert bench.main([*argv, "decode", "--baseline", path, "--json", path]) == 0  # figures may replace figures
    shown = capsys.readouterr().out
    assert f"== against {path}" in shown and f"{name}: decode, batch 8, tok/s" in shown and "verdict" in shown


def test_bench_shows_the_headlines_and_writes_all(quick_bench, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert bench.main(["--quick", "--config", "tiny", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    tables = json.loads(path.read_text())["tables"]
    rows = [row for table in tables.values() for column in table.values() for row in column]
    details = {row for row in rows if row.startswith("  ")}
    assert len(details) == 8 and len(rows) > 20
    for row in rows:
        assert (row in shown) == (row not in details)
    assert set(tables["tokenizer"]["MiniLLM"]) == {"BPE training, MB/s", "encoding, MB/s"}


def test_bench_keeps_what_it_measured_before_it_was_killed(quick_bench, tmp_path, capsys, monkeypatch):
    def decode(setup, name):
        if name == "moe":
            raise KeyboardInterrupt
        return {"decode, batch 1, tok/s": bench.Measured(7.0)}

    monkeypatch.setattr(bench, "measure_decode", decode)
    path = tmp_path / "figures.json"
    argv = ["--quick", "--config", "tiny", "moe", "--only", "decode", "--json", str(path)]
    assert bench.main(argv) == 130
    assert "decode, batch 1, tok/s     7" in capsys.readouterr().out
    assert json.loads(path.read_text())["tables"]["presets"] == {"tiny": {"decode, batch 1, tok/s": [7.0, 0.0]}}


def test_bench_compares_with_figures_of_the_first_version(quick_bench, tmp_path, capsys):
    rows = {"eager training, tok/s": [1e-3, 0.01], "timed batch": "8 x 256", "weights, MB": [5.8, 0.0]}
    tables = {
        "presets": {"tiny": rows},
        "tokenizer": {"MiniLLM": {"  21 MB, s": [1.2, 0.0]}, "tiktoken": {"e": "absent"}},
    }
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"flags": {"quick": True, "check": False}, "tables": tables}))
    assert bench.main(["--quick", "--config", "tiny", "--only", "train", "--baseline", str(path)]) == 0
    compared = capsys.readouterr().out.partition("== against")[2].splitlines()
    assert [line.split()[-1] for line in compared if line.startswith("tiny: ")] == ["better"]


def test_bench_counts_what_forward_keeps(tokenizer):
    trainer = m.PreTrainer(random_model(shape()), tokenizer, config=m.TrainConfig(seq_len=64))
    one, two, four = (bench.saved_bytes(bench.Setup(torch.device("cpu")), trainer, rows) for rows in (1, 2, 4))
    assert 0 < two - one == pytest.approx((four - two) / 2, rel=0.02)
    C, H, K, D, F_ = 32, 4, 2, 8, 64
    least = 2 * (4 * C + (H + 2 * K) * D + (H + K) * D + 4 * F_)  # floats a token that the blocks cannot do without
    assert 4 * 64 * least <= two - one <= 1.5 * 4 * 64 * least


def test_bench_plans(quick_bench, capsys):
    argv = ["--quick", "--plan", "--config", "tiny", "moe", "--tokens", "1.5M", "--batch-size", "2", "--seq-len", "64"]
    assert bench.main([*argv, "--gpu-memory", "100G"]) == 0
    shown = capsys.readouterr().out
    assert "plan for 1.5M tokens" in shown and "largest batch in 100 GB" in shown and "step, s" in shown
    assert "peak training memory, MB" in shown and "do not fit" not in shown
    assert bench.main([*argv, "--gpu-memory", "1M", "--gradient-checkpointing"]) == 0
    assert "not even one does" in capsys.readouterr().out


def test_bench_peak_of_a_training():
    setup, train = bench.Setup(torch.device("cpu")), m.TrainConfig(batch_size=2, seq_len=64)
    start_bytes, peak_bytes = bench.train_a_little(setup, shape(), train)
    assert peak_bytes >= start_bytes > 1e6


def test_bench_profiles(quick_bench, tmp_path, capsys):
    assert bench.main(["--quick", "--config", "tiny", "--profile", str(tmp_path / "traces")]) == 0
    assert "aten::" in capsys.readouterr().out
    for kind in ("training", "decoding"):
        assert json.loads((tmp_path / f"traces/tiny-{kind}.json").read_text())["traceEvents"]


def test_bench_peers_side_by_side(quick_bench, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    assert bench.main(["--quick", "--peers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for row in ("training eager, tok/s", "decode, batch 8, tok/s", "decode, 4 beams, tok/s", "encoding, MB/s"):
        line = next(line for line in lines if line.startswith(row))
        own, peer, ratio = (float(cell.replace(",", "")) for cell in line.removeprefix(row).split())
        assert own / peer == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize(("part", "package"), [("train", "transformers"), ("tokenizer", "tokenizers")])
def test_bench_names_absent_peers(quick_bench, capsys, monkeypatch, part, package):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    assert bench.main(["--quick", "--peers", "--only", part]) == 2
    assert capsys.readouterr().err.startswith(f"bench.py: error: this needs {package}: pip install")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg", "tiny"], "did you mean --config"),
        (["--config", "huge"], "huge"),
        (["--only", "nothing"], "nothing"),
        (["--plan", "--tokens", "many"], "many"),
        (["--plan", "--tokens", "0M"], "0M"),
        (["--plan", "--peers"], "--peers and --plan exclude each other"),
        (["--tokens", "1G"], "--tokens belongs to --plan"),
        (["--gpu-memory", "1G"], "--plan"),
        (["--plan", "--config", "tiny", "--seq-len", "999"], "seq_len=999"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--device", "abacus"], "abacus"),
        (["--baseline", "/nowhere.json"], "/nowhere.json"),
        (["--baseline", "{other}"], "does not hold figures"),
        (["--baseline", "{odd}"], "does not hold figures"),
        (["--baseline", "{cell}"], "does not hold figures"),
        (["--json", "{other}"], "does not hold figures"),
        (["--json", "/nowhere/figures.json"], "no directory /nowhere"),
        (["--duel", "/nowhere"], "there is no train.py in it"),
        (["--duel", ".", "--seeds", "1"], "--seeds 1"),
        (["--duel", ".", "--steps", "0"], "--steps must be 1 or more"),
        (["--duel", ".", "--steps", "5", "--minutes", "1"], "excludes --minutes"),
        (["--duel", ".", "--data", "/nowhere"], "/nowhere"),
        (["--duel", ".", "--config", "small"], "--config does nothing in a duel"),
        (["--seeds", "4"], "--seeds belongs to --duel"),
        (["--minutes", "1"], "--minutes belongs to --duel"),
    ],
)
def test_bench_reports_mistakes_in_one_message(tmp_path, capsys, argv, message):
    texts = {"other": "{}", "odd": '{"tables": {"tokenizer": 5}}', "cell": '{"tables": {"t": {"c": {"r": ["x"]}}}}'}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    names = {f"{{{name}}}": str(tmp_path / f"{name}.txt") for name in texts}
    assert bench.main([names.get(word, word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and (tmp_path / "other.txt").read_text() == "{}"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([[(2.0, 2.0), (2.1, 2.1), (1.9, 1.9)]], "not to be told apart: +0.00%"),
        # by hand: both sides deviate by 0.01, so the standard error is 0.01 √(2/3) = 0.82 %, and t = 3.67 of 4.60; four
        # pairs have 4.24 and need 3.71
        (
            [[(1.0, 0.97), (1.01, 0.98), (0.99, 0.96)]],
            "not to be told apart: -3.00% bits per byte (standard error 0.82",
        ),
        ([[(1.0, 0.97), (1.01, 0.98), (0.99, 0.96)]], "3 pairs); 4 such pairs would tell"),
        ([[(1.0, 0.96), (1.01, 0.97), (0.99, 0.95)]], "better: -4.00% bits per byte (standard error 0.82%, 3 pairs)"),
        ([[(2.0, 2.08), (2.02, 2.10), (1.98, 2.06)]], "worse: +4.00%"),  # the same on another scale
        ([[(1.0, 1.06), (1.01, 1.07)]], "not to be told apart: +5.97%"),  # of two pairs t must reach 9.92: it is 8.5
        ([[(1.0, 0.97), (1.01, 0.98), (0.99, 0.96)], [(2.0, 1.94), (2.02, 1.96), (1.98, 1.92)]], "better: -3.00%"),
        ([[(1.0, 0.97), (1.01, 0.98)], [(2.0, 2.06), (2.02, 2.08)]], "not to be told apart: +0.00%"),
    ],
)
def test_bench_judges_a_duel(results, words):
    assert words in bench.verdict(results)


@pytest.mark.parametrize(
    ("rows", "last_line", "outcome"),
    [
        ([(1, 50), (10, 90), (20, 80), (20, 100), (25, None)], '{"bpb": 1.5}', [1.5, 25, 90, 2]),  # 50: the warm-up
        ([(1, 50), (3, None)], '{"bpb": 1.5}', [1.5, 3, 50, 2]),
        ([(1, 50)], '{"bpb": NaN}', "nan bits per byte"),
        ([(1, 50)], "goodbye", "left no figures to compare: JSONDecodeError"),
        ([(1, 50)], "", "left no figures to compare: JSONDecodeError"),
        ([(1, 50)], "[]", "left no figures to compare: TypeError"),
        ([(1, 50)], '{"loss": 1}', "left no figures to compare: KeyError('bpb')"),
        ([(1, None)], '{"bpb": 1.5}', "left no figures to compare"),
        ([], '{"bpb": 1.5}', "is no run directory"),
    ],
)
def test_a_side_of_a_duel_has_figures_or_loses(tmp_path, rows, last_line, outcome):
    lines = [
        json.dumps({"step": step, "peak_bytes": 2e6} | ({"tok_per_s": speed} if speed else {})) for step, speed in rows
    ]
    program = f"""
import pathlib, sys
if "--config" in sys.argv and {lines}:
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "tiny/pretrain"
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text("\\n".join({lines}))
print({last_line!r})
"""
    (tmp_path / "train.py").write_text(program)
    if isinstance(outcome, list):
        assert list(bench.train_in(tmp_path, []).values()) == outcome
    else:
        with pytest.raises(m.UserError, match=re.escape(outcome)):
            bench.train_in(tmp_path, [])


def test_both_sides_of_a_duel_get_the_same_flags(tmp_path, monkeypatch, capsys):
    flags, data = [], [tmp_path / name / "text.txt" for name in "ab"]  # two names that differ in their folder alone
    for path in data:
        path.parent.mkdir()
        path.write_text("text")
    bits = iter([1.0, 1.1, 1.2, 1.0, 2.0, 1.0, 1.1, 2.1])  # who begins changes: here and there, there and here, …
    monkeypatch.setattr(
        bench, "train_in", lambda folder, words: flags.append(words) or {"bits per byte": next(bits), "steps": 1}
    )
    argv = ["--duel", str(Path(m.__file__).parent), "--steps", "2", "--seeds", "2", "--json", str(tmp_path / "d.json")]
    argv += ["--data", *map(str, data), "--optimizer", "adamw", "--dtype", "float32", "--device", "cpu"]
    assert bench.main([*argv, "--no-gradient-checkpointing"]) == 0
    common = ["--max-steps", "2", "--dtype", "float32", "--optimizer", "adamw", "--device", "cpu"]
    pairs = [[*common, "--seed", str(seed), "--data", str(path)] for path in data for seed in (0, 1)]
    assert flags == [words for words in pairs for _ in range(2)]
    tables = json.loads((tmp_path / "d.json").read_text())["tables"]
    rows = [f"seed {seed}, {path}" for path in data for seed in (0, 1)]
    found = tables[f"there is {Path(m.__file__).parent.resolve()}"]
    assert list(found["there: bits per byte"]) == rows
    assert [cell[0] for cell in found["there: bits per byte"].values()] == [1.1, 1.2, 1.0, 1.1]
    verdicts = tables["verdict"]["there"]
    assert list(verdicts) == ["it is", f"on {data[0]}", f"on {data[1]}"]
    assert "4 pairs" in verdicts["it is"] and "+15.00%" in verdicts[f"on {data[0]}"]


@pytest.mark.slow
def test_bench_lets_forks_duel(tmp_path, capsys):
    here = Path(m.__file__).parent
    fork = tmp_path / "fork"
    fork.mkdir()
    for name in ("minillm.py", "train.py", "sample.py"):
        shutil.copy(here / name, fork)
    shutil.copytree(here / "data", fork / "data")
    argv = ["--duel", str(fork), "--steps", "3", "--seeds", "2", "--json", str(tmp_path / "duel.json")]
    assert bench.main(argv) == 0
    assert "not to be told apart: +0.00%" in capsys.readouterr().out  # equal steps, equal bits
    table = json.loads((tmp_path / "duel.json").read_text())["tables"][f"there is {fork}"]
    assert table["here: bits per byte"] == table["there: bits per byte"] and list(table["here: steps"]) == [
        "seed 0",
        "seed 1",
    ]
    (fork / "train.py").write_text("raise SystemExit('it does not even start')")
    assert bench.main(argv) == 0
    assert f"worse: {fork} failed with exit status 1: it does not even start" in capsys.readouterr().out


def test_bench_without_enough_memory(capsys, monkeypatch):
    def fail(error: Exception):
        raise error

    monkeypatch.setattr(m, "keep_freed_memory", lambda: None)
    error = torch.OutOfMemoryError("CUDA out of memory.\nand more")
    monkeypatch.setattr(bench, "measure", lambda *_: fail(error))
    assert bench.main(["--quick"]) == 2
    assert capsys.readouterr().err == "bench.py: error: CUDA out of memory. Try a smaller --batch-size.\n"
    monkeypatch.setattr(bench, "measure", lambda *_: fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        bench.main(["--quick"])


# ======================================================================================================================
# Benchmarks: run once as plain tests, timed by `pytest --benchmark-only`
# ======================================================================================================================


@pytest.fixture
def benchmark(request, benchmark):
    benchmark.disabled = not request.config.getoption("--benchmark-only")
    return benchmark


def test_benchmark_training_step(benchmark, tokenizer):
    trainer = m.PreTrainer(m.MiniGPT(shape(hidden_size=64, max_position_embeddings=128)), tokenizer)
    benchmark(trainer.step, [lm_batch(4, 128)])


def test_benchmark_prefill(benchmark, generator):
    benchmark(generator.greedy_search, random_ids(1, 63), settings(max_new_tokens=1))


def test_benchmark_decoding(benchmark, generator):
    benchmark(generator.greedy_search, random_ids(1, 8), settings(min_new_tokens=20, max_new_tokens=20))


def test_benchmark_bpe_training(benchmark):
    benchmark(m.BPETokenizer(vocab_size=400).train, TEXTS * 30)


def test_benchmark_bpe_encoding(benchmark, tokenizer):
    benchmark(tokenizer.encode, "".join(TEXTS) * 100)


def test_benchmark_ppo_rollout(benchmark, tokenizer):
    trainer = rl_trainer(m.PPOTrainer, tokenizer, lambda *_: 1.0, train={"reply_tokens": 16})
    benchmark(trainer.experience, prompt_batch(tokenizer, ["a", "bc", "def", "你好"] * 4))


# ======================================================================================================================
# Faults: signals, full disks, two processes
# ======================================================================================================================


def test_an_interrupt_ends_after_the_step_with_a_checkpoint(tmp_path, tokenizer):
    trainer = trainer_for(
        tokenizer, m.TrainConfig(max_steps=50, sample_tokens=0), train_data=[lm_batch(2, 8)], run_dir=tmp_path
    )
    plain_step = trainer.step

    def step(batches):
        if trainer.step_count == 3:
            signal.raise_signal(signal.SIGINT)
        return plain_step(batches)

    trainer.step, before = step, signal.getsignal(signal.SIGINT)
    assert trainer.fit()["signal"] == signal.SIGINT and m.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_the_first_step_saves_nothing(trained_runs, tmp_path, monkeypatch):
    trainer = stage_trainer(trained_runs, "sft", tmp_path / "sft")
    plain = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), plain(*args))[1])
    assert trainer.fit()["signal"] == signal.SIGTERM and not m.holds_run(tmp_path / "sft")


def test_one_process_a_run(out_with_a_run, trained_runs, tmp_path, capsys):
    argv = ["--out", str(tmp_path), *data_flags(trained_runs), *quick("pretrain")]
    shutil.copytree(out_with_a_run / "tiny/pretrain", tmp_path / "tiny/pretrain")
    before = everything(tmp_path)
    with m.locked(tmp_path / "tiny/pretrain"):
        for more in (["--resume", "--max-steps", "9"], ["--overwrite", "--max-steps", "1"]):
            assert train.main(["--seq-len", "16", *argv, *more]) == 2
            assert "in use by another process" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_an_export_that_fails_leaves_the_one_before_whole(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("safetensors")
    folder = tmp_path / "export"
    random_model(shape()).save_pretrained(folder, tokenizer)
    before, plain = everything(folder), m.atomic_write

    @contextlib.contextmanager
    def full(path):
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        with plain(path) as file:
            yield file

    monkeypatch.setattr(m, "atomic_write", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            random_model(shape(num_hidden_layers=1), seed=1).save_pretrained(target, tokenizer)
    assert everything(tmp_path) == before and list(tmp_path.iterdir()) == [folder]


def test_a_second_interrupt_during_a_save_costs_the_new_checkpoint_only(tmp_path, tokenizer, monkeypatch):
    config = m.TrainConfig(max_steps=9, save_every=2, eval_every=0, warmup_steps=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run")
    plain_open, plain_step = open, trainer.step

    class Slow(io.FileIO):
        def write(self, data):
            if trainer.step_count == 3:
                signal.raise_signal(signal.SIGINT)  # the second one: the first came in the step before
            return super().write(data)

    def step(batches):
        if trainer.step_count == 2:
            signal.raise_signal(signal.SIGINT)
        return plain_step(batches)

    def slow_open(path, mode="r", **options):
        return Slow(path, "w") if mode == "wb" else plain_open(path, mode, **options)

    monkeypatch.setattr(m, "open", slow_open, raising=False)
    trainer.step = step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step_count == 3 and m.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path, tokenizer, monkeypatch):
    config = m.TrainConfig(max_steps=4, save_every=2, eval_every=0, warmup_steps=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run")
    plain = open

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 20_000 if trainer.step_count == 4 else 10**9

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __iter__(self):
            return iter(self.file)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(m, "open", lambda *args, **options: Full(plain(*args, **options)), raising=False)
    with pytest.raises(OSError, match="disk is full"):
        trainer.fit()
    assert m.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob(".*.tmp"))


def test_overwriting_costs_nothing_until_a_new_run_stands(rlhf, trained_runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(rlhf) == 0
    (out / "tiny/sft.old").mkdir()
    (out / "tiny/sft.old/mine.txt").write_text("a user's own copy")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n{"chosen": "a", "rejected": "b"}\n')
    before = everything(out)
    for more in (
        ["--device", "cuda:77"],
        ["--reply-tokens", "300"],
        ["--accumulation-steps", "2"],
        ["--data", str(tmp_path / "bad.jsonl")],
        ["--resume"],
    ):
        assert train.main([*rlhf, "--overwrite", *more]) == 2, more
        assert everything(out) == before, more
    (tmp_path / "boom.py").write_text("def f(messages, reply, answer):\n    return 1 / 0\n")
    one_stage = ["--out", str(out), *data_flags(trained_runs), *QUICK, "--overwrite"]
    fails = ["--stage", "ppo", *one_stage, "--max-steps", "1"]
    assert train.main([*fails, "--reward", f"{tmp_path}/boom.py:f"]) == 2
    assert "boom.py:2: ZeroDivisionError" in capsys.readouterr().err and everything(out) == before
    (out / "tiny/sft.old-1").mkdir()  # of a process that was killed
    capsys.readouterr()
    assert train.main(["--stage", "sft", *one_stage, "--max-steps", "2"]) == 0
    assert f"{out}/tiny/sft.old-1 is of an --overwrite that did not end" in capsys.readouterr().out
    (out / "tiny/sft.old-1").rmdir()
    assert m.load_checkpoint(out / "tiny/sft/checkpoint.pt")["step"] == 2
    assert (out / "tiny/sft.old/mine.txt").exists() and not list((out / "tiny").glob("*.old-*"))


# ======================================================================================================================
# The table of mistakes: what people get wrong, and what the one line of the error says. Reading may stop here: one test
# goes through the rows.
# ======================================================================================================================


# A row: {name of a file: content}, command line, what the error says. {d} is where those files are, {out} an --out with
# a trained run, {run} that run, {val} data to validate on.


def data_mistake(content, message, stage="pretrain", name="a.jsonl", *more):
    content = content if isinstance(content, bytes) else content.encode()
    where = ["--init", "{run}"] if stage != "pretrain" else []
    return (
        {name: content},
        ["train", "--stage", stage, *where, "--data", "{d}/" + name, *RUN, *quick(stage), *more],
        message,
    )


RUN = ["--val-data", "{val}", "--out", "{out}", "--overwrite", "--max-steps", "1"]
SAY, REPLY = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
GARBAGE = pickle.dumps(subprocess.Popen)  # what a pickle may run must not run
MISTAKES = [
    data_mistake("café au lait".encode("latin-1"), "a.txt:1: not UTF-8", name="a.txt"),
    data_mistake("小".encode()[:2], "a.txt:1: not UTF-8 (unexpected end of data)", name="a.txt"),
    data_mistake(b"one\ntwo\nthr\xff", "a.txt:3: not UTF-8", name="a.txt"),
    data_mistake("你好".encode("utf-16"), "a.txt:1: not UTF-8", name="a.txt"),
    data_mistake("", "holds no records", name="a.txt"),
    data_mistake("too short", "fewer than seq_len", "pretrain", "a.txt", "--seq-len", "60"),
    data_mistake('{"text": "a"}\n{"text": ', "a.jsonl:2:9: not JSON"),
    data_mistake('{"text": 3}', 'a.jsonl:1: "text" must be a string, not int'),
    data_mistake('{"text": null}', "not NoneType"),
    data_mistake('{"text": ["a"]}', "not list"),
    data_mistake("[1, 2]", "a.jsonl:1[0]: unknown form of record (int)"),
    data_mistake("3", "a.jsonl:1: unknown form of record (int)"),
    data_mistake('{"txt": "a"}', "unknown form of record (txt)"),
    data_mistake("{}", "empty object"),
    data_mistake('{"text": "a\\ud800"}', "a.jsonl:1: an escape"),
    data_mistake("[" * 100_000, "a.jsonl:1:1: not JSON"),
    data_mistake('{"text": ' + "9" * 5000 + "}", "a.jsonl:1:1: not JSON"),
    data_mistake("", "and its kin: it holds no records", "sft"),
    data_mistake(" \n\n", 'nothing for this stage, which takes text: .txt files and {"text": …}: it holds no records'),
    data_mistake("a,b", "no data file: data are .txt", "pretrain", "a.csv"),
    # records laid out in other ways than one a line
    data_mistake('{\n "text": 3\n}', 'a.jsonl:1: "text" must be a string'),
    data_mistake('{\n "text": "a"\n}\n{\n "text": oops\n}', "a.jsonl:5:10: not JSON"),
    data_mistake('{\n "text": "a"\n}\n{\n "text": oops\n}', "a.json:5:10: not JSON", "pretrain", "a.json"),
    data_mistake('[{"text": "a"},\n{"text": 1}]', 'a.jsonl:1[1]: "text" must be a string'),
    data_mistake('[{"text": "a"}, {"text": 1}]', 'a.jsonl:1[1]: "text" must be a string'),
    data_mistake('{"text": "a"} {"text": 1}', 'a.jsonl:1: "text" must be a string'),
    data_mistake('{"text": "a"},\n', "a.jsonl:1:14: not JSON"),
    data_mistake('[{"text": "a"},\n', "a.jsonl:1:16: not JSON"),
    # files that are empty, of odd names, or no files
    data_mistake("", 'text: .txt files and {"text": …}: it holds no records', "pretrain", "a.json"),
    data_mistake("\ufeff", "it holds no records", "pretrain", "A.TXT"),
    data_mistake("not json", "A.JSONL:1:1: not JSON", "pretrain", "A.JSONL"),
    data_mistake('{"text": ""}', "(records left out or changed: 1 × empty text, the first at {d}/a.jsonl:1)"),
    data_mistake("PAR1 and no more", "a.parquet: damaged .parquet file", "pretrain", "a.parquet"),
    data_mistake("", "no data file: data are .txt", "pretrain", "a.parquet.gz"),
    (
        {"a.jsonl": b'{"a": 1}'},
        ["train", "--data", "{d}", *RUN],
        "1 × file without records, the first at {d}/a.jsonl:1: unknown form of record (a): allowed",
    ),
    (
        {"a.jsonl": b'{"a": 1}\n{"text": "b"}'},
        ["train", "--data", "{d}", *RUN],
        "a.jsonl:1: unknown form of record (a)",
    ),
    ({".a.txt": b"hidden"}, ["train", "--data", "{d}", *RUN], "no data file: data are .txt"),
    # one document cannot be divided
    *(
        (
            {"a.jsonl": content},
            ["train", "--stage", "sft", "--init", "{run}", "--data", "{d}/a.jsonl", *RUN[2:]],
            message,
        )
        for content, message in (
            (b'{"prompt": "a", "completion": "b"}', "a.jsonl: the val part is empty: one document"),
            (
                b'{"prompt": "a", "completion": "b"}\n' * 9,
                "or copies of one, cannot be divided into train and val: give more",
            ),
        )
    ),
    data_mistake('{"a": 1', "a.json:1:8: not JSON: Expecting ',' delimiter: line 1 column 8", "pretrain", "a.json"),
    data_mistake('[{"text": "a"},\n\n{"text" 1}]', "a.json:3:9: not JSON", "pretrain", "a.json"),
    data_mistake('[{"text": "a"}, {"b": 1}]', "a.json:1[1]: unknown form", "pretrain", "a.json"),
    data_mistake(b"no gzip", "damaged .gz", "pretrain", "a.txt.gz"),
    data_mistake(gzip.compress(b"hello" * 100, mtime=0)[:-9], "damaged .gz", "pretrain", "a.txt.gz"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + "]}", "it holds chat records"),
    data_mistake('{"text": "a"}', "it holds text records", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "images": ["a.png"]}]}', '"images" is not', "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "weight": 0.5}]}', '"weight" of a message', "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "loss": "no"}]}', '"loss" of a message', "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "function_call": {"name": "f"}}]}', "is not", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "tool_calls": [{}]}]}', "name and arguments", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY[:-1] + ', "tool_calls": "{"}]}', "name and arguments", "sft"),
    data_mistake(  # half a surrogate pair, in JSON in a text
        '{"messages": ['
        + SAY
        + ","
        + REPLY[:-1]
        + r', "tool_calls": [{"name": "f", "arguments": "{\"a\": \"\\ud800\"}"}]}]}',
        "a.jsonl:1: an escape",
        "sft",
    ),
    data_mistake('{"messages": [{"role": "user", "content": [{"image": "a"}]}]}', "parts with a text", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + '], "audio": "a.wav"}', '"audio" is not supported', "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + '], "tools": [1]}', "name and arguments", "sft"),
    data_mistake('{"instruction": "a", "output": " "}', "1 × no reply to learn from: empty", "sft"),
    data_mistake('{"prompt": "a", "completion": "b", "label": false}', "1 × no reply to learn from", "sft"),
    data_mistake('{"question": "a", "answer": {}}', '"answer" must be a text', "sft"),
    data_mistake('{"context": "a", "chosen": "b", "rejected": "c"}', '"context" may be the question', "dpo"),
    data_mistake('{"asked": [' + SAY + '], "chosen": "b", "rejected": "c"}', '"asked" may be the question', "dpo"),
    data_mistake('{"question": ["a", 3], "chosen": "b", "rejected": "c"}', "a message must be an object", "dpo"),
    data_mistake('{"prompt": "a", "chosen": "b c", "rejected": " b c"}', "1 × both sides alike", "reward"),
    data_mistake('{"messages": [' + SAY + "]}", "without an assistant message", "sft"),
    data_mistake('{"messages": []}', "without an assistant message", "sft"),
    data_mistake('{"messages": 3}', "a message must be an object", "sft"),
    data_mistake('{"messages": [3]}', "a message must be an object", "sft"),
    data_mistake('{"messages": [{"role": "user"}]}', "a message must be an object with a role", "sft"),
    data_mistake('{"messages": [{"role": "robot", "content": "a"}]}', "one of system, user", "sft"),
    data_mistake('{"messages": [{"role": "user", "content": 3}]}', "of type string", "sft"),
    data_mistake('{"messages": [' + SAY + ', {"role": "system", "content": "s"}]}', "may only come first", "sft"),
    data_mistake('{"conversations": [{"from": "gpt", "value": null}]}', "of type string", "sft"),
    data_mistake('{"instruction": 3, "input": "a", "output": "b"}', "input, context must be strings", "sft"),
    data_mistake('{"instruction": "a", "output": null}', "a message must be an object", "sft"),
    data_mistake('{"instruction": "a", "output": "b", "history": [["c"]]}', "pairs [question, answer]", "sft"),
    data_mistake('{"prompt": "a", "completion": 4}', "a message must be an object", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + '], "answer": {}}', '"answer" must be a text', "sft"),
    data_mistake('{"prompt": "a", "chosen": "b"}', "it holds prompt records", "dpo"),
    data_mistake('{"prompt": "a", "chosen": "b", "rejected": "b"}', "1 × both sides alike", "dpo"),
    data_mistake('{"prompt": "a", "chosen": 3, "rejected": "b"}', "a message must be an object", "reward"),
    data_mistake('{"prompt": "a", "chosen": "b", "rejected": [7]}', "a message must be an object", "dpo"),
    data_mistake('{"chosen": [' + SAY + '], "rejected": "b"}', '"chosen" must end with a reply', "dpo"),
    data_mistake('{"prompt": []}', "a prompt must end with a message to reply to", "grpo"),
    data_mistake('{"prompt": [' + REPLY + "]}", "a prompt must end with a message to reply to", "grpo"),
    data_mistake('{"prompt": 3}', "a message must be an object", "grpo"),
    data_mistake('{"prompt": "a", "gt": true}', '"answer" must be a text', "grpo"),
    data_mistake('{"prompt": "a"}', 'needs prompts with an "answer"', "grpo", "a.jsonl", "--reward", "answer"),
    data_mistake('{"prompt": "' + "long " * 99 + '"}', "none of 1 prompt records fits", "grpo"),
    *(
        ({}, ["train", *RUN, *words], message)
        for *words, message in (
            ("--data", "/no/such", "/no/such: no such file"),
            ("--data", "{d}", "no data file: data are .txt"),
            ("--val-data", "/no/such", "/no/such: no such file"),
            ("--leraning-rate", "1", "did you mean --learning-rate"),
            ("--max-steps", "many", "invalid int value: 'many'"),
            ("--max-steps", "-1", "max_steps=-1"),
            ("--max-steps", "0", "a run needs an end"),
            ("--batch-size", "0", "batch_size=0"),
            ("--learning-rate", "nan", "learning_rate=nan"),
            ("--learning-rate", "0", "learning_rate=0.0"),
            ("--beta1", "1", "beta1=1.0"),
            ("--seq-len", "0", "seq_len=0"),
            ("--seq-len", "9999", "seq_len=9999 exceeds the context"),
            ("--config", "huge", "config 'huge' is unknown"),
            ("--stage", "dream", "--stage dream is unknown"),
            ("--device", "tpu", "device 'tpu'"),
            ("--device", "cuda:99", "device 'cuda:99'"),
            ("--dtype", "int8", "invalid choice: 'int8'"),
            ("--seed", "-1", "seed=-1"),
            ("--minutes", "-1", "minutes=-1.0"),
            ("--schedule", "linear", "invalid choice: 'linear'"),
            ("--vocab-size", "10", "--vocab-size 10 is not possible"),
            ("--num-attention-heads", "3", "num_attention_heads=3"),
            ("--rope-scaling", "yarn", "'yarn' is no JSON object"),
            ("--rope-scaling", "5", "'5' is no JSON object"),
            ("--rope-scaling", '{"rope_type": "yarn"}', "rope_scaling="),
            ("--lora-rank", "4", "--lora-rank 4 needs a trained model"),
            ("--stage", "sft", "--init", "{run}", "--lora-rank", "4000", "lora_rank=4000"),
            ("--stage", "sft", "--init", "/no/such", "/no/such"),
            ("--resume", "--resume and --overwrite exclude each other"),
            ("--out", "{d}/file", "{d}/file"),
            ("--epochs", "-1", "epochs=-1"),
            ("--epochs", "0", "--max-steps", "0", "a run needs an end: give --max-steps, --epochs or --minutes"),
            ("--checkpoint", "newest", "invalid choice: 'newest'"),
            ("--stage", "grpo", "--init", "{run}", "--kl-coef", "5", "did you mean --grpo-kl-coef?"),
            ("--stage", "sft", "--init", "{run}", "--dpo-beta", "1", "--dpo-beta has no effect in --stage sft"),
            ("--stage", "dpo", "--init", "{run}", "--packing", "--packing has no effect in --stage dpo"),
            ("--stage", "ppo", "--init", "{run}", "--eval-tokens", "9", "--eval-tokens has no effect in --stage ppo"),
            ("--stage", "tokenizer", "no effect in --stage tokenizer"),
            ("--stage", "eval", "--init", "{run}", "no effect in --stage eval"),
            ("--stage", "rlhf", "--checkpoint", "last", "--checkpoint has no effect in --stage rlhf"),
            ("--lora-alpha", "8", "--lora-alpha has no effect without --lora-rank"),
            ("--lr", "1", "did you mean --learning-rate?"),
            ("--reward", "answer", "--reward has no effect in --stage pretrain, but in ppo, grpo"),
            ("--rope-scaling", "5", "'5' is no JSON object"),
        )
    ),
    *(
        ({}, ["sample", "--run", "{run}", *words], message)
        for *words, message in (
            ("--run", "/no/such", "/no/such is no run directory"),
            ("--run", "{base}/reward", "holds a reward model"),
            ("--temperature", "-0.5", "temperature=-0.5"),
            ("--top-p", "2", "top_p=2.0"),
            ("--top-k", "-1", "top_k=-1"),
            ("--min-p", "2", "min_p=2.0"),
            ("--num-beams", "0", "num_beams=0"),
            ("--num-beams", "2", "--strategy", "greedy", "--num-beams has no effect with --strategy greedy"),
            ("--num-beams", "2", "--length-penalty", "-1000", "length_penalty=-1000"),
            ("--repetition-penalty", "0", "repetition_penalty=0.0"),
            ("--seed", "-1", "seed=-1"),
            ("--stop", "", "stop=['']"),
            ("--max-length", "1", "--prompt", "小猫", "max_length=1"),
            ("--prompt", "very long " * 99, "leaves no room in the context"),
            ("--chat", "--prompt", "a", "--chat and --prompt exclude each other"),
            ("--system", "be brief", "--system has no effect without --chat"),
            ("--out", "{d}", "--out has no effect beside --run"),
            ("--strategy", "greedy", "--temperature", "1", "it is for --strategy sample"),
            ("--strategy", "beam", "--top-p", "0.5", "--top-p has no effect with --strategy beam"),
            ("--temperature", "0", "--seed", "1", "--seed has no effect with --temperature 0"),
            (
                "--length-penalty",
                "2",
                "--length-penalty has no effect with --strategy sample: it is for --strategy beam",
            ),
            ("--max-length", "9", "--max-new-tokens", "9", "--max-length has no effect beside --max-new-tokens"),
            ("--prompt", "a\udcff", "--prompt is not UTF-8"),
            ("--stop", "\ud800", "--stop is not UTF-8"),
            ("--prompt", "a", "-seed", "1", "unknown argument -seed: did you mean --seed?"),
            ("--chat", "--stop", "the end", "", "stop=['the end', '']"),
        )
    ),
    *(
        ({"run/" + name: content}, ["sample", "--run", "{d}/run"], message)
        for name, content, message in (
            ("checkpoint.pt", b"torn", "checkpoint.pt is damaged"),
            ("checkpoint.pt", GARBAGE, "checkpoint.pt is damaged"),
            ("checkpoint.pt", None, "checkpoint.pt does not exist"),
            ("tokenizer.json", b"{", "run/tokenizer.json: not JSON"),
            ("tokenizer.json", None, "tokenizer.json does not exist"),
            ("tokenizer.json", b"other", "is not the tokenizer that the checkpoint was trained with"),
            ("config.json", b"[]", "config.json: a JSON object"),
            ("config.json", None, "has no config.json"),
        )
    ),
]


@pytest.mark.parametrize(("files", "argv", "message"), MISTAKES, ids=map(str, range(len(MISTAKES))))
def test_mistakes_are_one_message_and_cost_nothing(
    out_with_a_run, trained_runs, tmp_path, capsys, files, argv, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file").write_text("")
    if any(name.startswith("run/") for name in files):
        shutil.copytree(out_with_a_run / "tiny/pretrain", tmp_path / "run")
    for name, content in files.items():
        path = tmp_path / name
        if content == b"other":
            m.BPETokenizer().save(path)
        elif content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        if "checkpoint" in name:
            for other in ("checkpoint.prev.pt", "best.pt"):  # which would take its place
                (tmp_path / "run" / other).unlink(missing_ok=True)
    here = tmp_path if files else tmp_path / "empty"
    names = {"{d}": here, "{out}": out_with_a_run, "{run}": out_with_a_run / "tiny/pretrain", "{base}": trained_runs}
    names["{val}"] = trained_runs / "data/val"

    def filled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    before = everything(out_with_a_run) | everything(trained_runs)
    main = {"train": train.main, "sample": sample.main}[argv[0]]
    assert main(list(map(filled, argv[1:]))) == 2
    assert filled(message) in one_error(capsys)
    assert everything(out_with_a_run) | everything(trained_runs) == before


# ======================================================================================================================
# The kill matrix: a run is killed at every boundary of a system call with which files are written, and at random
# instants; each time it must resume to the weights of a straight run. Reading may stop here: nothing below is needed to
# understand what is above.
# ======================================================================================================================


class Killing:
    """Kills its own process at the n-th boundary of a system call with which files are written."""

    def __init__(self, target: int) -> None:
        self.target, self.passed = target, 0

    def boundary(self) -> None:
        self.passed += 1
        if self.passed == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call):
        def wrapped(*args, **options):
            self.boundary()
            result = call(*args, **options)
            self.boundary()
            return result

        return wrapped

    def open(self, *args, **options):
        file = open(*args, **options)
        if "w" not in file.mode and "a" not in file.mode:
            return file

        class Watched:
            write = staticmethod(self.around(lambda data: (file.write(data), file.flush())[0]))
            __enter__ = staticmethod(lambda: watched)
            __exit__ = staticmethod(lambda *_: file.close())
            __iter__ = staticmethod(lambda: iter(file))

            def __getattr__(self, name):
                return getattr(file, name)

        watched = Watched()
        return watched

    def watch(self) -> None:
        m.open = self.open
        for name in ("fsync", "replace", "link"):
            setattr(os, name, self.around(getattr(os, name)))


def faulty_trainer(stage: str, runs: Path, run_dir: Path) -> m.Trainer:
    config = stage_config(max_steps=4, save_every=2, eval_every=0)
    if stage != "pretrain":
        return stage_trainer(runs, stage, run_dir, config=config, resume=m.holds_run(run_dir))
    torch.manual_seed(0)
    tokenizer, paths = m.BPETokenizer.load(runs / "tokenizer.json"), sources_in(runs / "data")["train"].paths
    data = m.PretrainDataLoader(paths, tokenizer, 2, 16, split="all", cache_dir=runs / "cache")
    trainer = m.PreTrainer(m.MiniGPT(shape(dropout=0.1)), tokenizer, config=config, train_data=data, run_dir=run_dir)
    if m.holds_run(run_dir):
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
    return trainer


def in_a_fork(work) -> tuple[int, float]:
    """Run it in a forked process: its status and how long it took."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def kill_matrix(stage: str, folder: str, every: int, instants: int) -> None:
    """Kill a run at boundaries of system calls and at random instants; each resumes to the weights of a straight run.

    In a process of its own, with one thread: only such a one can be forked.
    """
    torch.set_num_threads(1)
    folder = Path(folder)
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train(TEXTS)
    runs = make_runs(folder / "runs", tokenizer)
    tokenizer.save(runs / "tokenizer.json")
    faulty_trainer(stage, runs, folder / "warm")  # encodes the data

    def finish(run: Path) -> None:
        trainer = faulty_trainer(stage, runs, run)
        if trainer.step_count < 4:
            trainer.fit()

    def state_of(run: Path) -> dict:
        state = m.load_checkpoint(run / "checkpoint.pt")
        parts = ("step", "model", "critic", "optimizers", "data", "rng", "extra", "counters")
        return {part: state.get(part) for part in parts}

    counter = folder / "count"

    def straight() -> None:
        killing = Killing(0)
        killing.watch()
        finish(folder / "straight")
        counter.write_text(str(killing.passed))

    code, took = in_a_fork(straight)
    assert code == 0
    wanted, boundaries = state_of(folder / "straight"), int(counter.read_text())
    assert wanted["step"] == 4 and (wanted["critic"] is not None) == (stage == "ppo")
    random = torch.Generator().manual_seed(0)

    def attempt(run: Path, target: int) -> None:
        Killing(target).watch()
        finish(run)

    done = Counter()
    for target in range(1, boundaries + 1, every):
        run = folder / f"{stage}-{target}"
        assert in_a_fork(lambda r=run, t=target: attempt(r, t))[0] == -signal.SIGKILL
        assert in_a_fork(lambda r=run: finish(r))[0] == 0, target
        assert same(state_of(run), wanted), target
        done["boundaries"] += 1
        shutil.rmtree(run)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for k in range(instants if number == signal.SIGKILL else instants // 5 * 2):
            run, delay = folder / f"{number}-{k}", took * torch.rand((), generator=random).item()

            def interrupted(r=run, d=delay, n=number) -> None:
                me = os.getpid()
                if os.fork() == 0:
                    time.sleep(d)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(me, n)
                    os._exit(0)
                with contextlib.suppress(KeyboardInterrupt):
                    finish(r)

            in_a_fork(interrupted)
            assert in_a_fork(lambda r=run: finish(r))[0] == 0, (number, delay)
            assert same(state_of(run), wanted), (number, delay)
            done[signal.Signals(number).name] += 1
            shutil.rmtree(run)
    print(json.dumps({"stage": stage, "of": boundaries, **done}))


def run_kill_matrix(*args) -> dict:
    code = f"import {Path(__file__).stem} as tests; tests.kill_matrix(*{args!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_survives_being_killed_anywhere(tmp_path):
    done = run_kill_matrix("pretrain", str(tmp_path), 97, 5)
    assert done["boundaries"] > 10 and done["SIGKILL"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_a_run_survives_being_killed_everywhere(tmp_path, stage):
    done = run_kill_matrix(stage, str(tmp_path), 31, 20)  # with 1 it takes a quarter of an hour
    assert done["boundaries"] > done["of"] / 32 and done["SIGKILL"] == 20 and done["SIGTERM"] == done["SIGINT"] == 8
