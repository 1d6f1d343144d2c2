"""Measure the speed and memory of training and decoding; compare runs; plan a training; let two forks duel."""

# ruff: noqa: E402
import argparse
import collections
import copy
import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch
from torch import Tensor, nn

import minillm as m
import sample

DATA = Path(m.__file__).parent / "data/train"
TRAINING_FLAGS = ("dtype", "gradient_checkpointing", "batch_size", "seq_len", "optimizer")
PROMPT_TOKENS = 16  # before those that are decoded
NEW_TOKENS = {True: 32, False: 200}  # --quick and not
SAMPLING = dict(do_sample=True, temperature=1.0, top_k=50, top_p=1.0)
REPEATS = (3, 25)  # at least, and at most: as many as fit into BUDGET_S
BUDGET_S = {True: 2.0, False: 8.0}  # seconds for each thing that is timed
PEER_SHAPE = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=768)


class Measured(NamedTuple):
    """A median, and half the interquartile range as a share of it."""

    value: float
    spread: float = 0.0

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if self.value >= 100 else f"{self.value:.4g}"
        return number + (f" ±{self.spread:.0%}" if self.spread else "")


Rows = dict[str, Measured | str]
Table = dict[str, Rows]  # column -> row -> cell; after the last comma of a name stands the unit
# a row whose name begins with two spaces is a detail, shown by --all
Tables = Iterator[tuple[str, Table]]  # titles, and what to add to the tables under them


@dataclasses.dataclass
class Setup:
    """The settings that all measurements share."""

    device: torch.device
    quick: bool = True
    modes: tuple[str, ...] = ("eager",)
    options: dict = dataclasses.field(default_factory=dict)  # of training: fields of TrainConfig
    dtype: torch.dtype = torch.float32  # of decoding
    line: m.ProgressLine = dataclasses.field(default_factory=m.ProgressLine)

    def peak(self, dtype: str) -> float:
        """Measure the floating-point operations per second of a matrix product, which is the peak of a dtype."""
        return m.matmul_peak(self.device, dtype, 8192 if self.device.type == "cuda" else 1024)

    def train_config(self, name: str) -> m.TrainConfig:
        train = dataclasses.replace(m.get_train_config(name), **self.options)
        train.seq_len = train.seq_len or m.get_config(name).max_position_embeddings
        return train

    def rows(self, train: m.TrainConfig) -> int:
        """Return the rows of a batch to time: few on a CPU, whose speed hardly depends on them."""
        tokens = 32_768 if self.device.type == "cuda" else 1024 if self.quick else 2048
        return max(1, min(train.batch_size, tokens // train.seq_len))


# -- command line ------------------------------------------------------------------------------------------------------


class Amount(float):
    """A number above 0, with or without a suffix: 100M, 1.5B, 24G, 1e8."""

    def __new__(cls, text: str):
        units = {"k": "e3", "M": "e6", "G": "e9", "B": "e9", "T": "e12"}
        number = super().__new__(cls, "".join(units.get(letter, letter) for letter in text))
        if not 0 < number < math.inf:
            raise ValueError(text)
        return number


@dataclasses.dataclass
class Command:
    """The flags of bench.py itself; a few of training follow."""

    config: list[str] | None = None  # presets: tiny small medium large moe [tiny small; without --quick moe, too]
    only: list[Literal["train", "decode", "tokenizer"]] | None = None  # parts to measure: train decode tokenizer [all]
    quick: bool = False  # fewer and smaller measurements
    compile: Literal["auto", "on", "off"] = "auto"  # compiled as well; auto: unless --quick
    all: bool = False  # show the details, too; a --json file always holds them all
    json: str | None = None  # write the figures into this file
    baseline: str | None = None  # compare with the figures of an earlier --json
    peers: bool = False  # instead: side by side with transformers and tokenizers
    profile: str | None = None  # instead: write traces into this directory, and print the operators that take longest
    plan: bool = False  # instead: predict memory and time of a training
    duel: str | None = None  # instead: train tiny here and with the MiniLLM in this folder; which one learns better?
    minutes: Amount = 1.0  # --duel: length of each training, its start included
    steps: int | None = None  # --duel: compare after so many steps instead of minutes
    seeds: int = 3  # --duel: trainings of each side on each data set
    data: list[str] | None = None  # --duel: data sets, each a file or directory [the example data]
    tokens: Amount | None = None  # --plan: how many to train on [100M]
    gpu_memory: Amount | None = None  # --plan: the memory there is, in bytes [this device's]
    processes: int = 1  # --plan: on so many devices like this one
    link: Amount | None = None  # --plan: bytes a second between two of them [12.5G: 100 Gbit/s]
    device: str = "auto"  # auto, cpu, cuda, mps


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, checked before anything is loaded or measured."""
    parser = m.FlagParser(prog="bench.py", description=__doc__, usage="bench.py [--config NAME ...] [any flag below]")
    m.add_flags(parser, Command(), "what to measure")
    others = {field.name for field in dataclasses.fields(m.TrainConfig)}.difference(TRAINING_FLAGS)
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of --config tiny]", skip=others)
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**dataclasses.asdict(Command()) | given)
    args.config = args.config or ["tiny", "small"] + ["moe"] * (not args.quick)
    args.only = args.only or ["train", "decode", "tokenizer"]
    args.options = {name: given[name] for name in TRAINING_FLAGS if name in given}
    modes = [name for name in ("peers", "profile", "plan", "duel") if getattr(args, name)]
    if len(modes) > 1:
        raise m.UserError(f"{' and '.join(map(m.flag_of, modes))} exclude each other")
    if m.WORLD.size > 1 and (args.only != ["train"] or modes):
        raise m.UserError("several processes measure --only train: start the rest with python, not torchrun")
    for name, comment in m.field_comments(Command).items():
        if name in given and comment.startswith("--") and (mode := comment.partition(":")[0][2:]) not in modes:
            raise m.UserError(f"{m.flag_of(name)} belongs to --{mode}: give that, too")
    for name in args.config:
        m.check_stage("pretrain", m.TrainConfig(**args.options), m.get_config(name))
    if args.duel:
        if not all((Path(args.duel) / name).is_file() for name in ("train.py", "minillm.py")):
            raise m.UserError(f"--duel {args.duel}: there is no train.py in it: name a copy of MiniLLM's folder")
        if args.seeds < 2:
            raise m.UserError(f"--seeds {args.seeds} is not possible: it must be 2 or more, to tell luck from skill")
        if "steps" in given and (args.steps < 1 or "minutes" in given):
            raise m.UserError("--steps must be 1 or more, and excludes --minutes")
        if unused := [name for name in ("config", "only", "quick", "compile") if name in given]:
            raise m.UserError(f"{m.flag_of(unused[0])} does nothing in a duel, which trains tiny: leave it out")
        m.data_files(args.data or DATA)
    if args.json and Path(args.json).exists():
        read_figures(args.json)  # nothing but figures is overwritten
    elif args.json and not Path(args.json).parent.is_dir():
        raise m.UserError(f"--json {args.json}: there is no directory {Path(args.json).parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    with sample.user_errors("bench.py", memory_advice="Try a smaller --batch-size.") as ended:
        m.WORLD.start()
        args, tables = parse(argv), {}
        before = read_figures(args.baseline) if args.baseline else None
        m.keep_freed_memory()
        warnings.simplefilter("ignore")
        for title, more in measure(args):
            for column, rows in more.items():
                tables.setdefault(title, {}).setdefault(column, {}).update(rows)
            # a run that is killed later has shown and written what it measured
            if m.WORLD.is_first and args.json:
                with m.atomic_write(args.json) as file:
                    file.write(json.dumps({"flags": vars(args), "tables": tables}, indent=1, default=str).encode())
            print(render(title, tables[title], args.all), flush=True)
        if before:
            print(render(f"against {args.baseline}", compare(measured_cells(tables), before)))
        return 0
    return ended[0]


def measure(args: argparse.Namespace) -> Tables:
    """Yield what the command line asks for, part by part."""
    is_compiled = args.compile == "on" or args.compile == "auto" and not args.quick
    modes = ("eager", "compiled") if is_compiled else ("eager",)
    device, dtype = m.pick_device(args.device), args.options.get("dtype", "auto")
    options = args.options | {"dtype": m.fastest_dtype(device) if dtype == "auto" else dtype}
    setup = Setup(device, args.quick, modes, options, m.pick_dtype(dtype, device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtypes = f"training in {options['dtype']}, decoding in {str(setup.dtype).removeprefix('torch.')}"
    setup.line.say(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtypes}")
    if args.plan:
        yield from plan(setup, args)
    elif args.duel:
        yield from duel(setup, args)
    elif args.profile:
        profile(setup, args.config, Path(args.profile))
    elif args.peers:
        yield from peers(setup, args.only)
    elif m.WORLD.size > 1:
        for name in args.config:
            yield "processes", {name: measure_processes(setup, name)}
    else:
        paths = ("float32", "float32_onednn", "bfloat16") if device.type == "cpu" else ("float32", "bfloat16")
        machine = {f"product in {path}, GFLOP/s": Measured(setup.peak(path) / 1e9) for path in paths}
        yield "machine", {"": machine | {"reading memory, GB/s": bandwidth(setup)}}
        for name in args.config if {"train", "decode"} & {*args.only} else ():
            trained = measure_train(setup, name) if "train" in args.only else {}
            yield "presets", {name: trained | (measure_decode(setup, name) if "decode" in args.only else {})}
        if "tokenizer" in args.only:
            yield "tokenizer", measure_tokenizers(setup)


# -- timing and training -----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def summarize(samples: list[float]) -> Measured:
    middle = statistics.median(samples)
    if len(samples) < 2:
        return Measured(middle)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Measured(middle, (high - low) / 2 / middle)


def time_in_turns(setup: Setup, work: dict[str, Callable]) -> dict[str, list[float]]:
    """Return the seconds of each piece of work. They alternate, so that a disturbance hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    fewest, most = REPEATS
    for run in work.values():
        run()  # to warm up
    end = time.perf_counter() + BUDGET_S[setup.quick] * len(work)
    for k in range(most):
        if k >= fewest and m.WORLD.max(time.perf_counter() - end)[0] > 0:  # several processes stop together
            break
        for name, run in work.items():
            synchronize(setup.device)
            start = time.perf_counter()
            run()
            synchronize(setup.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rates(setup: Setup, jobs: Iterable[tuple[str, float, dict[str, Callable]]]) -> Table:
    """Return rows of so many a second; of each peer, too, how many times as fast MiniLLM is, turn by turn."""
    table: Table = collections.defaultdict(dict)
    for row, count, work in jobs:
        setup.line.show(f"measuring {row}")
        seconds = time_in_turns(setup, work)
        for name, times in seconds.items():
            table[name][row] = summarize([count / s for s in times])
        for peer in seconds.keys() - {"MiniLLM"}:
            pairs = zip(seconds[peer], seconds["MiniLLM"], strict=True)
            table[f"x {peer}"][row] = summarize([other / own for other, own in pairs])
    return table


def in_new_process(work: Callable, *args: Any) -> Any:
    """Return work(*args) from a process of its own: there it is alone, and nothing else has raised the peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def random_ids(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> Tensor:
    return torch.randint(m.FIRST_BYTE, config.vocab_size, (rows, length), device=setup.device)


def random_batch(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> dict[str, Tensor]:
    ids = random_ids(setup, rows, length + 1, config).cpu()  # where loaders leave it
    return {"input_ids": ids, "labels": ids}


def bandwidth(setup: Setup) -> Measured:
    """Measure the gigabytes per second at which a sum reads memory that no cache holds."""
    x = torch.ones(1 << (28 if setup.device.type == "cuda" else 26), device=setup.device)
    return rates(setup, [("memory bandwidth", x.nbytes / 1e9, {"MiniLLM": x.sum})])["MiniLLM"]["memory bandwidth"]


class TimedTrainer(m.PreTrainer):
    """A trainer that notes the seconds of forward and backward; the rest of a step is clipping and the optimizer."""

    def in_memory(self, fn: Callable, rows: int) -> Any:
        start = time.perf_counter()
        result = super().in_memory(fn, rows)
        synchronize(self.device)
        self.passes_s.append(time.perf_counter() - start)
        return result


def new_trainer(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig, mode: str = "eager") -> TimedTrainer:
    torch.manual_seed(0)
    # without limits the schedule stays at its peak; and no smaller batch may hide a lack of memory
    changes = {"max_steps": 0, "minutes": 0.0, "auto_micro_batch": False}
    train = dataclasses.replace(train, compile="on" if mode == "compiled" else "off", **changes)
    trainer = TimedTrainer(m.MiniGPT(config), m.BPETokenizer(), setup.device, config=train)
    trainer.passes_s = []
    return trainer


def measure_train(setup: Setup, name: str) -> Rows:
    """Return a model's size, the speed of training and its parts, and peak memory."""
    config, train = m.get_config(name), setup.train_config(name)
    rows, T = setup.rows(train), train.seq_len
    setup.line.show(f"{name}: training")
    batch, peak = random_batch(setup, rows, T, config), setup.peak(setup.options["dtype"])
    trainers = {mode: new_trainer(setup, config, train, mode) for mode in setup.modes}
    seconds = time_in_turns(setup, {mode: functools.partial(t.step, [batch]) for mode, t in trainers.items()})
    model, flops = trainers["eager"].model, trainers["eager"].model.flops_per_token(T)
    result: Rows = {
        "parameters, M": Measured(model.num_params() / 1e6),
        "  a token uses, M": Measured(model.num_params(active=True) / 1e6),
        "  training, MFLOP a token": Measured(flops / 1e6),
        "  timed batch": f"{rows} x {T}",
    }
    for mode, trainer in trainers.items():
        pairs = list(zip(trainer.passes_s[1:], seconds[mode], strict=True))  # without the warm-up
        # the whole batch takes more passes and one update
        updates_s = [step + (train.batch_size / rows - 1) * passes for passes, step in pairs]
        tokens_per_s = summarize([train.batch_size * T / s for s in updates_s])
        result[f"{mode} training, tok/s"] = tokens_per_s
        result[f"MFU, {mode}, % of peak"] = Measured(100 * flops * tokens_per_s.value / peak, tokens_per_s.spread)
        result[f"  forward and backward, {mode}, ms"] = summarize([1e3 * passes for passes, _ in pairs])
        result[f"  optimizer, {mode}, ms"] = summarize([1e3 * (step - passes) for passes, step in pairs])
    setup.line.show(f"{name}: memory")
    start_bytes, peak_bytes = in_new_process(train_a_little, setup, config, dataclasses.replace(train, batch_size=rows))
    result["peak memory of that batch, MB"] = Measured(peak_bytes / 1e6)
    result["  before there is a model, MB"] = Measured(start_bytes / 1e6)
    return result


def train_a_little(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> tuple[int, int]:
    """Return the bytes in use before there is a model, and the peak of three steps of training."""
    m.keep_freed_memory()
    monitor = m.MemoryMonitor(setup.device)
    start_bytes = monitor.current_bytes()
    trainer = new_trainer(setup, config, train)
    batch = random_batch(setup, train.batch_size, train.seq_len, config)
    for _ in range(3):
        trainer.step([batch])
        monitor.peak_bytes()  # MPS keeps no record: its peak is the most at any of these calls
    return start_bytes, monitor.peak_bytes()


def measure_processes(setup: Setup, name: str) -> Rows:
    """Return the speed of all processes, and which share it is of so many times one that works alone."""
    alone = in_new_process(speed_of_one, setup, name) if m.WORLD.is_first else [math.nan]
    m.WORLD.barrier()  # the others wait meanwhile
    together, size = speed_of_one(setup, name), m.WORLD.size
    return {
        "processes": str(size),
        "one alone, tok/s": summarize(alone),
        "all, tok/s": summarize([size * speed for speed in together]),
        "share of so many times one, %": Measured(100 * statistics.median(together) / statistics.median(alone)),
    }


def speed_of_one(setup: Setup, name: str) -> list[float]:
    """Return the tokens per second of each process, in steps with a few rows for each."""
    config, train = m.get_config(name), setup.train_config(name)
    rows, T = setup.rows(train), train.seq_len
    trainer, batch = new_trainer(setup, config, train), random_batch(setup, rows * m.WORLD.size, T, config)
    return [rows * T / s for s in time_in_turns(setup, {"": lambda: trainer.step([batch])})[""]]


# -- decoding and tokenizers -------------------------------------------------------------------------------------------


def new_generator(setup: Setup, config: m.MiniGPTConfig, mode: str = "eager") -> m.TextGenerator:
    torch.manual_seed(0)
    model = m.MiniGPT(config).to(setup.device, setup.dtype).eval()
    return m.TextGenerator(model, m.BPETokenizer(), mode == "compiled")


def measure_decode(setup: Setup, name: str) -> Rows:
    """Return the speed of prefill, sampling and beam search, and its share of the speed that memory allows."""
    config, bytes_per_s = m.get_config(name), 1e9 * bandwidth(setup).value
    rows, model = time_decoding(setup, config)["MiniLLM"], m.MiniGPT(config)
    keys = PROMPT_TOKENS + NEW_TOKENS[setup.quick] / 2  # on average
    floats = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of each key
    for batch in (1, 8):
        read = model.num_params() + batch * keys * floats
        if config.num_experts:  # less the share of one row's idle experts that no other row chooses
            idle = (1 - config.num_experts_per_tok / config.num_experts) ** (batch - 1)
            read -= idle * (model.num_params() - model.num_params(active=True))
        least_s = read * setup.dtype.itemsize / bytes_per_s
        tokens_per_s = rows[f"decode, batch {batch}, tok/s"]
        share = 100 * least_s * tokens_per_s.value / batch
        rows[f"  batch {batch}, % of memory's limit"] = Measured(share, tokens_per_s.spread)
    return rows


def time_decoding(setup: Setup, config: m.MiniGPTConfig, peer: nn.Module | None = None) -> Table:
    """Time prefill, sampling and beam search. A peer decodes eagerly in all rows."""
    own, prefill, jobs = new_generator(setup, config), min(512, config.max_position_embeddings - 1), []
    cases = [  # row, batch, our method, options of both sides
        ("prefill", 1, own.greedy_search, {"do_sample": False}),
        ("decode, batch 1", 1, own.sample_generate, SAMPLING),
        ("decode, batch 8", 8, own.sample_generate, SAMPLING),
        ("decode, 4 beams", 1, own.beam_search, {"do_sample": False, "num_beams": 4}),
    ]
    if "compiled" in setup.modes and not config.num_experts:
        faster = new_generator(setup, config, "compiled").sample_generate
        cases += [(f"decode compiled, batch {batch}", batch, faster, SAMPLING) for batch in (1, 8)]
    for row, batch, decode, options in cases:
        length, new = (prefill, 1) if row == "prefill" else (PROMPT_TOKENS, NEW_TOKENS[setup.quick])
        ids = random_ids(setup, batch, length, config)
        options = {"max_new_tokens": new, "min_new_tokens": new, **options}
        work = {"MiniLLM": functools.partial(decode, ids, m.GenerationConfig(**options))}
        if peer is not None:
            work["transformers"] = functools.partial(peer.generate, ids, **options)
        jobs.append((f"{row}, tok/s", batch * (length if row == "prefill" else new), work))
    return rates(setup, jobs)


def measure_tokenizers(setup: Setup, with_peer: bool = False) -> Table:
    """Time BPE training on the example data, repeated up to 20 MB (--quick: 2), and encoding them once."""
    texts = [json.loads(line)["text"] for line in (DATA / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    copies = math.ceil((2 if setup.quick else 20) / size)
    training = {"MiniLLM": lambda: m.BPETokenizer(4096).train(texts * copies)}
    own = m.BPETokenizer(4096)
    own.train(texts)
    with tempfile.TemporaryDirectory() as folder:
        own.save(f"{folder}/tokenizer.json")
        encoding = {"MiniLLM": encode_afresh(lambda: m.BPETokenizer.load(f"{folder}/tokenizer.json"), texts)}
    if with_peer:
        peer = train_peer(texts)
        training["tokenizers"] = lambda: train_peer(texts * copies)
        encoding["tokenizers"] = encode_afresh(lambda: copy.deepcopy(peer), texts)
    return rates(setup, [("BPE training, MB/s", copies * size, training), ("encoding, MB/s", size, encoding)])


def encode_afresh(load: Callable, texts: list[str]) -> Callable[[], list]:
    """Return a function that encodes text by text, each time with a fresh tokenizer, whose cache is empty."""
    tokenizers = [load() for _ in range(REPEATS[1] + 1)]
    return lambda: list(map(tokenizers.pop().encode, texts))


def train_peer(texts: list[str]) -> Any:
    tokenizer = m.import_extra("tokenizers", "hf").ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, 4096, min_frequency=0, show_progress=False)
    return tokenizer


# -- instead: peers, duels, profiles, plans ----------------------------------------------------------------------------


def peers(setup: Setup, parts: tuple[str, ...]) -> Tables:
    """Time both sides in turns. A column "x PEER" says how many times as fast MiniLLM is."""
    title = "peers: 6 layers x 256, 8 heads, ffn 768, vocabulary 4096"
    for mode in setup.modes if "train" in parts else ():
        yield title, time_training(setup, mode)
    if "decode" in parts:
        config = m.MiniGPTConfig(**PEER_SHAPE, num_key_value_heads=2, max_position_embeddings=1024)
        yield title, time_decoding(setup, config, qwen3(config).to(setup.device, setup.dtype).eval())
    if "tokenizer" in parts:
        yield "peers: tokenizers", measure_tokenizers(setup, with_peer=True)


def time_training(setup: Setup, mode: str) -> Table:
    """Time a training step of both sides; the peer's is as its user writes it."""
    B, T = (4 if setup.quick else 16), 256
    config = m.MiniGPTConfig(**PEER_SHAPE, max_position_embeddings=T)
    batch = random_batch(setup, B, T, config)
    ids = batch["input_ids"][:, 1:].to(setup.device)
    train = m.TrainConfig(optimizer="adamw", dtype=setup.options["dtype"])
    trainer = new_trainer(setup, config, train, mode)
    peer = qwen3(config).to(setup.device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4, fused=True)
    forward = torch.compile(peer) if mode == "compiled" else peer

    def peer_step() -> None:
        with trainer.autocast():
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = {"MiniLLM": lambda: trainer.step([batch]), "transformers": peer_step}
    return rates(setup, [(f"training {mode}, tok/s", B * T, work)])


def qwen3(config: m.MiniGPTConfig) -> nn.Module:
    transformers = m.import_extra("transformers", "test")
    fields = m.hf_config(config) | {"eos_token_id": None}  # it writes on, as ours does
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))


def duel(setup: Setup, args: argparse.Namespace) -> Tables:
    """Train both sides in turns with equal seeds, data and flags, as processes of their own; tabulate and judge."""
    folders = {"here": Path(m.__file__).parent, "there": Path(args.duel).resolve()}
    common = ["--max-steps", str(args.steps)] if args.steps else ["--minutes", str(args.minutes)]
    for option, value in (setup.options | {"device": args.device}).items():  # the dtype that was measured, too
        common += [m.flag_of(option)] * value if isinstance(value, bool) else [m.flag_of(option), str(value)]
    runs = [(data, seed) for data in args.data or [None] for seed in range(args.seeds)]
    results: dict[str | None, list[tuple[float, float]]] = collections.defaultdict(list)  # by data set
    for k, (data, seed) in enumerate(runs):
        name, flags, figures = f"seed {seed}", [*common, "--seed", str(seed)], {}
        if data:
            name, flags = f"{name}, {data}", [*flags, "--data", str(Path(data).absolute())]
        for side in ("here", "there") if k % 2 == 0 else ("there", "here"):  # who goes first changes
            setup.line.show(f"duel {k + 1} of {len(runs)}: {name}, {side}")
            try:
                figures[side] = train_in(folders[side], flags)
            except m.UserError as error:
                if side == "here":
                    raise m.UserError(f"{folders[side]} {error}") from error
                yield "verdict", {"there": {"it is": f"worse: {folders[side]} {error}"}}
                return
        results[data].append((figures["here"]["bits per byte"], figures["there"]["bits per byte"]))
        columns = [(f"{side}: {figure}", figures[side][figure]) for figure in figures["here"] for side in folders]
        yield f"there is {folders['there']}", {column: {name: Measured(value)} for column, value in columns}
    by_data = {f"on {data}": verdict([pairs]) for data, pairs in results.items() if len(results) > 1}
    yield "verdict", {"there": {"it is": verdict([*results.values()])} | by_data}


def train_in(folder: Path, flags: list[str]) -> dict[str, float]:
    """Train with the MiniLLM in `folder`; return its figures on all validation data, or raise what is wrong."""
    with tempfile.TemporaryDirectory() as out:
        run_dir = Path(out) / "tiny/pretrain"
        for words in (["--config", "tiny", *flags], ["--stage", "eval", "--init", str(run_dir)]):
            command = [sys.executable, "train.py", "--out", out, *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                message = (done.stderr.strip() or "no message").splitlines()[-1]
                raise m.UserError(f"failed with exit status {done.returncode}: {message}")
        try:
            bits, rows = json.loads(done.stdout.splitlines()[-1])["bpb"], m.read_metrics(run_dir)
            timed = [row for row in rows if "tok_per_s" in row]
            speed = statistics.median(row["tok_per_s"] for row in timed[1:] or timed)  # the first step warms up
            peak = timed[-1]["peak_bytes"] / 1e6
            figures = {"bits per byte": bits, "steps": rows[-1]["step"], "tok/s": speed, "peak, MB": peak}
            if not math.isfinite(sum(figures.values())):
                raise ValueError(f"{bits} bits per byte")
            return figures
        except (ValueError, LookupError, TypeError) as error:
            raise m.UserError(f"left no figures to compare: {error!r}") from error


def verdict(results: list[list[tuple[float, float]]]) -> str:
    """Judge a fork by the bits per byte here and there, for each data set and seed: is Student's t test sure?

    The test is that of two samples. The test of pairs has half as many degrees of freedom, and pairs of equal seeds
    remove little noise: on a shared machine the number of steps varies more.
    """
    sets, n = len(results), sum(map(len, results))  # data sets, pairs
    gaps, squares = [], 0.0  # of each data set, all relative to the mean here
    for pairs in results:
        here, there = zip(*pairs, strict=True)
        base = statistics.mean(here)
        gaps.append(statistics.mean(there) / base - 1)
        squares += sum((x - statistics.mean(side)) ** 2 for side in (here, there) for x in side) / base**2
    mean, deviation = statistics.mean(gaps), math.sqrt(squares / (2 * (n - sets)))
    # Student's t, 99 % two-sided, by half the degrees of freedom; the last serves for all larger numbers
    t_99 = (9.92, 4.60, 3.71, 3.36, 3.17, 3.06, 2.98, 2.92, 2.88, 2.85)

    def is_sure(pairs: int) -> bool:
        return abs(mean) > t_99[min(pairs - sets, len(t_99)) - 1] * deviation * math.sqrt(2 / pairs)

    words = f"{mean:+.2%} bits per byte (standard error {deviation * math.sqrt(2 / n):.2%}, {n} pairs)"
    if is_sure(n):
        return f"{'better' if mean < 0 else 'worse'}: {words}"
    enough = next(filter(is_sure, range(n + sets, 1000, sets)), None)
    return f"not to be told apart: {words}" + (f"; {enough} such pairs would tell" if enough else "")


def profile(setup: Setup, names: list[str], folder: Path) -> None:
    """Write traces for ui.perfetto.dev, each of one call; print the 15 operators that take longest by themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    options = m.GenerationConfig(max_new_tokens=16, min_new_tokens=16, **SAMPLING)
    field = "self_device_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    for name in names:
        config, train = m.get_config(name), setup.train_config(name)
        batch = random_batch(setup, setup.rows(train), train.seq_len, config)
        step = functools.partial(new_trainer(setup, config, train).step, [batch])
        ids = random_ids(setup, 1, PROMPT_TOKENS, config)
        decode = functools.partial(new_generator(setup, config).sample_generate, ids, options)
        for kind, work in (("training", step), ("decoding", decode)):
            work()  # to warm up
            synchronize(setup.device)
            with torch.profiler.profile() as profiler:
                work()
                synchronize(setup.device)
            profiler.export_chrome_trace(str(path := folder / f"{name}-{kind}.json"))
            table = profiler.key_averages().table(sort_by=field, row_limit=15, max_name_column_width=40)
            setup.line.say(f"\n== {path}\n{table}")


def plan(setup: Setup, args: argparse.Namespace) -> Tables:
    """Predict what training takes on devices like this one, within their memory or --gpu-memory."""
    memory = args.gpu_memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.gpu_memory is None and setup.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setup.device).total_memory
    tokens, link = args.tokens or 1e8, args.link or 12.5e9
    title = f"{tokens / 1e6:,.4g}M tokens"
    for name in args.config:
        config, all_rows = m.get_config(name), setup.train_config(name).batch_size
        if not 1 <= args.processes <= all_rows:
            raise m.UserError(f"--processes {args.processes} is not possible: 1 … --batch-size {all_rows}")
        # 1 measure a few rows of the process that has most, and add as much memory for every further row
        rows = math.ceil(all_rows / args.processes)
        part = dataclasses.replace(setup, modes=("eager",), options=setup.options | {"batch_size": rows})
        measured, train, model = measure_train(part, name), part.train_config(name), m.MiniGPT(config)
        few, T, row_bytes = setup.rows(train), train.seq_len, bytes_per_row(setup, config, train)
        few_bytes = 1e6 * measured["peak memory of that batch, MB"].value
        # however few rows: weights, gradients, moments
        least_bytes = 1e6 * measured["  before there is a model, MB"].value + 16 * model.num_params()
        fits = max(0, few + math.floor((memory - few_bytes) / row_bytes)) if memory > least_bytes else 0
        if fits < rows:
            steps = math.ceil(rows / max(1, fits))
            advice = f"--batch-size {args.processes * math.ceil(rows / steps)} --accumulation-steps {steps} does"
            advice = advice if fits else "not even one does: try --gradient-checkpointing or a smaller --seq-len"
            setup.line.say(f"{name}: {rows} rows do not fit into {memory / 1e9:.3g} GB: {advice}")
        # 2 of several processes each step sends, too
        sent = sent_bytes(model, args.processes)
        step_s = rows * T / measured["eager training, tok/s"].value + sent / link
        result: Rows = {
            "batch": f"{all_rows} x {T}",
            "peak training memory, MB": Measured(max(least_bytes, few_bytes + (rows - few) * row_bytes) / 1e6),
            f"largest batch in {memory / 1e9:.3g} GB, rows": Measured(fits),
            "step, s": Measured(step_s),
            f"{title}, h": Measured(tokens / (all_rows * T) * step_s / 3600),
        }
        if args.processes > 1:
            result["sent by a process a step, MB"] = Measured(sent / 1e6)
            result["part of a step that computes, %"] = Measured(100 * (1 - sent / link / step_s))
        yield f"plan for {title}", {name: result}


def sent_bytes(model: m.MiniGPT, processes: int) -> float:
    """Return the bytes that each process sends in a step: a ring's all-reduce of gradients, all-gather of Muon's."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("layers."))
    return 4 * (2 * model.num_params() + matrices) * (processes - 1) / processes


def bytes_per_row(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> float:
    """Return the memory of a further row: all that forward keeps, and the needs of backward inside a block."""
    trainer = new_trainer(setup, config, train)
    row_bytes = saved_bytes(setup, trainer, 2) - saved_bytes(setup, trainer, 1)
    trainer.model.gradient_checkpointing = False
    blocks_bytes = saved_bytes(setup, trainer, 2) - saved_bytes(setup, trainer, 1)
    # recomputed activations, gradients, gaps: three blocks fit what was measured on CPUs
    return row_bytes + 3 * blocks_bytes / config.num_hidden_layers


def saved_bytes(setup: Setup, trainer: m.Trainer, rows: int) -> int:
    """Count the bytes that forward keeps for backward, weights included."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    trainer.model.train()
    batch = random_batch(setup, rows, trainer.config.seq_len, trainer.model.config)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), trainer.autocast():
        loss = trainer.loss({name: value.to(setup.device) for name, value in batch.items()})
    del loss  # it kept everything alive until here, so that no address was used twice
    return sum(sizes.values())


# -- tables ------------------------------------------------------------------------------------------------------------


def render(title: str, table: Table, with_details: bool = True) -> str:
    names = list(dict.fromkeys(row for rows in table.values() for row in rows if with_details or row[:2] != "  "))
    first = min(max(map(len, names), default=0), 48)
    lines = [f"{name[:first]:<{first}}" for name in ("", *names)]
    for column, rows in table.items():
        cells = [column, *(str(rows.get(name, "-")) for name in names)]
        width = max(map(len, cells))
        lines = [f"{line}  {cell:>{width}}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(["", f"== {title}", *(line.rstrip() for line in lines if line.strip())])


def compare(now: dict[tuple, Measured], before: dict[tuple, Measured]) -> Table:
    """Tabulate what both runs measured. A change within twice both spreads, or 3 %, is noise."""
    table: Table = {"before": {}, "now": {}, "ratio": {}, "noise": {}, "verdict": {}}
    for title, column, row in (key for key in now if key in before):
        new, old = now[title, column, row], before[title, column, row]
        unit = (column if "," in column else row).rpartition(", ")[2]
        more_is_better = unit.endswith("/s") or unit.startswith("%")
        if not old.value or not (more_is_better or unit in ("s", "ms", "MB", "h")):
            continue
        ratio, noise = new.value / old.value, max(0.03, 2 * math.hypot(new.spread, old.spread))
        verdict = "noise" if abs(ratio - 1) <= noise else "better" if (ratio > 1) == more_is_better else "worse"
        cells = (old, new, Measured(ratio), f"±{noise:.0%}", verdict)
        for rows, cell in zip(table.values(), cells, strict=True):
            rows[f"{column}: {row.strip()}".removeprefix(": ")] = cell
    return table


def measured_cells(tables: dict[str, Table]) -> dict[tuple, Measured]:
    """Return the cells that hold a number, by title, column and row; JSON made lists of them."""
    return {
        (title, column, row): Measured(*map(float, cell))
        for title, table in tables.items()
        for column, rows in table.items()
        for row, cell in rows.items()
        if not isinstance(cell, str)
    }


def read_figures(path: str) -> dict[tuple, Measured]:
    try:
        return measured_cells(json.loads(Path(path).read_bytes())["tables"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise m.UserError(f"{path} does not hold figures that --json wrote") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the trainings of a duel end, too
    sys.exit(main())
