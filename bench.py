"""Measure the speed and memory of training and decoding; compare runs; plan a training; let two forks duel."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import minillm as m  # noqa: E402

DATA = Path(m.__file__).parent / "data/train"
PARTS = ("train", "decode", "tokenizer")
HEADLINES = (  # the rows that are shown without --all
    "parameters, M",
    "eager training, tok/s",
    "  MFU, eager, % of peak",
    "compiled training, tok/s",
    "peak memory of that batch, MB",
    "prefill, tok/s",
    "decode, batch 1, tok/s",
    "decode, batch 8, tok/s",
    "BPE training, MB/s",
    "encoding, MB/s",
)
PROMPT_TOKENS = 16  # before those that are decoded
SAMPLING = dict(do_sample=True, temperature=1.0, top_k=50, top_p=1.0)
REPEATS = (3, 25)  # at least, and at most: as many as fit into BUDGET_S
BUDGET_S = {"quick": 2.0, "full": 8.0}  # seconds for each thing that is timed
PEER_SHAPE = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=768)


class Measured(NamedTuple):
    """A median, and half the interquartile range as a share of it."""

    value: float
    spread: float = 0.0


Rows = dict[str, Measured | str]
Table = dict[str, Rows]  # column -> row -> cell; after the last comma of a name stands the unit


@dataclass
class Setup:
    """The settings that all measurements share."""

    device: torch.device
    quick: bool = True
    modes: tuple[str, ...] = ("eager",)
    options: dict = dataclasses.field(default_factory=dict)  # fields of TrainConfig, from the command line
    folder: Path = Path()  # for temporary files
    line: m.ProgressLine = dataclasses.field(default_factory=m.ProgressLine)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of decoding."""
        return m.pick_dtype(self.options.get("dtype", "auto"), self.device)

    @functools.cached_property
    def training_dtype(self) -> str:
        chosen = self.options.get("dtype", "auto")
        return m.fastest_dtype(self.device) if chosen == "auto" else chosen

    def peak(self, dtype: str) -> float:
        """Measure the floating-point operations per second of a matrix product, which is the peak of a dtype."""
        return m.matmul_peak(self.device, dtype, 8192 if self.device.type == "cuda" else 1024)

    @property
    def new_tokens(self) -> int:
        return 32 if self.quick else 200

    def train_config(self, name: str) -> m.TrainConfig:
        train = dataclasses.replace(m.get_train_config(name), **self.options | {"dtype": self.training_dtype})
        train.seq_len = train.seq_len or m.get_config(name).max_position_embeddings
        return train

    def rows(self, train: m.TrainConfig) -> int:
        """Return the rows of a batch to time: few on a CPU, whose speed hardly depends on them."""
        tokens = 32_768 if self.device.type == "cuda" else 1024 if self.quick else 2048
        return max(1, min(train.batch_size, tokens // train.seq_len))


# -- command line ------------------------------------------------------------------------------------------------------


def amount(text: str) -> float:
    """Parse a number above 0, with or without a suffix: 100M, 1.5B, 24G, 1e8."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    number = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def build_parser() -> m.FlagParser:
    parser = m.FlagParser(prog="bench.py", description=__doc__, usage="bench.py [--config NAME ...] [any flag below]")
    flag = parser.add_argument
    presets = f"presets, of {', '.join(m.PRESETS)} [tiny small; without --quick moe, too]"
    flag("--config", nargs="+", choices=m.PRESETS, metavar="NAME", help=presets)
    parts = f"parts to measure, of {', '.join(PARTS)} [all]"
    flag("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=parts)
    flag("--quick", action="store_true", help="fewer and smaller measurements")
    flag("--compile", choices=("auto", "on", "off"), default="auto", help="compiled as well [auto: unless --quick]")
    flag("--all", action="store_true", help="show every row; a --json file always holds them all")
    flag("--json", metavar="FILE", help="write the figures")
    flag("--baseline", metavar="FILE", help="compare with the figures of an earlier --json")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--peers", action="store_true", help="instead: side by side with transformers and tokenizers")
    traces = "instead: write traces of training and decoding into DIR, and print their operators [profile]"
    mode("--profile", nargs="?", const="profile", metavar="DIR", help=traces)
    mode("--plan", action="store_true", help="instead: predict memory and time of a training")
    forks = "instead: train the tiny preset here and with the MiniLLM in DIR, and say which one learns better"
    mode("--duel", metavar="DIR", help=forks)
    minutes = "--duel: length of each training, its start included [1]"
    flag("--minutes", type=amount, default=argparse.SUPPRESS, metavar="M", help=minutes)
    flag("--steps", type=int, metavar="N", help="--duel: compare after so many steps instead of minutes")
    flag("--seeds", type=int, metavar="N", help="--duel: trainings of each side on each data set [3]")
    sets = "--duel: data sets, each a file or directory [the example data]"
    flag("--data", action="extend", nargs="+", metavar="PATH", help=sets)
    flag("--tokens", type=amount, default=1e8, metavar="N", help="--plan: how many to train on [100M]")
    flag("--gpu-memory", type=amount, metavar="BYTES", help="--plan: the memory there is [this device's]")
    flag("--processes", type=int, metavar="N", help="--plan: on so many devices like this one [1]")
    flag("--link", type=amount, metavar="BYTES", help="--plan: a second between two of them [12.5G: 100 Gbit/s]")
    flag("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    flags = ("dtype", "gradient_checkpointing", "batch_size", "seq_len", "optimizer")
    others = tuple(field.name for field in dataclasses.fields(m.TrainConfig) if field.name not in flags)
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of --config tiny]", skip=others)
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        m.WORLD.start()
        args = build_parser().parse_args(argv)
        args.config = args.config or ["tiny", "small"] + ["moe"] * (not args.quick)
        check_flags(args)
        before = read_figures(args.baseline) if args.baseline else None
        m.keep_freed_memory()
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            tables = measure(args, Path(folder))
        if m.WORLD.is_first:
            report(args, tables, before)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        m.silence_stdout()
        return 0
    except (m.UserError, OSError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, RuntimeError):
            if not m.is_out_of_memory(error):
                raise
            message = f"{message.splitlines()[0]} Try a smaller --batch-size."
        if m.WORLD.is_first_to("error"):
            print(f"bench.py: error: {message}", file=sys.stderr)
        return 2


def check_flags(args: argparse.Namespace) -> None:
    """Check all flags before anything is loaded or measured."""
    if m.WORLD.size > 1 and (args.only != ["train"] or args.peers or args.profile or args.plan or args.duel):
        raise m.UserError("several processes measure --only train: start the rest with python, not torchrun")
    seq_len = m.TrainConfig(**m.given_flags(args, m.TrainConfig)).seq_len or 0
    for name in args.config:
        limit = m.get_config(name).max_position_embeddings
        if seq_len > limit:
            raise m.UserError(f"--seq-len {seq_len} exceeds the context of --config {name}, {limit}")
    plans = dict.fromkeys(("gpu_memory", "processes", "link"), "plan")
    for name, mode in {**plans, **dict.fromkeys(("minutes", "steps", "seeds", "data"), "duel")}.items():
        if getattr(args, name, None) is not None and not getattr(args, mode):
            raise m.UserError(f"--{name.replace('_', '-')} belongs to --{mode}: give that, too")
    if args.duel:
        check_duel(args)
    if args.json and Path(args.json).exists():
        read_figures(args.json)  # nothing but figures is overwritten
    elif args.json and not Path(args.json).parent.is_dir():
        raise m.UserError(f"--json {args.json}: there is no directory {Path(args.json).parent}")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Table]:
    """Return the tables that the command line asks for, by title."""
    options = m.given_flags(args, m.TrainConfig)
    is_compiled = not args.plan and (args.compile == "on" or args.compile == "auto" and not args.quick)
    modes = ("eager", "compiled") if is_compiled else ("eager",)
    setup = Setup(m.pick_device(args.device), args.quick, modes, options, folder)
    cuda, decoding = setup.device.type == "cuda", str(setup.dtype).removeprefix("torch.")
    dtype = f"training in {setup.training_dtype}, decoding in {decoding}"
    name = torch.cuda.get_device_name(setup.device) if cuda else setup.device.type
    setup.line.say(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
    if args.plan:
        return plan(setup, args)
    if args.duel:
        return duel(setup, args)
    if args.profile:
        profile(setup, args.config, Path(args.profile))
        return {}
    if args.peers:
        return peers(setup, args.only)
    paths = ("float32", "float32_onednn", "bfloat16") if setup.device.type == "cpu" else ("float32", "bfloat16")
    machine = {f"product in {path}, GFLOP/s": Measured(setup.peak(path) / 1e9) for path in paths}
    machine["reading memory, GB/s"] = bandwidth(setup)
    tables: dict[str, Table] = {"machine": {"": machine}, "presets": {}}
    for name in args.config:
        rows = tables["presets"][name] = {}
        if "train" in args.only:
            rows |= measure_train(setup, name)
        if "decode" in args.only:
            rows |= measure_decode(setup, name)
    if "tokenizer" in args.only:
        tables["tokenizer"] = measure_tokenizers(setup)
    return {title: table for title, table in tables.items() if any(table.values())}


# -- timing ------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def summarize(samples: list[float]) -> Measured:
    middle = statistics.median(samples)
    if len(samples) < 2:
        return Measured(middle)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Measured(middle, (high - low) / 2 / middle)


def per_second(count: float, seconds: list[float]) -> Measured:
    return summarize([count / s for s in seconds])


def time_in_turns(setup: Setup, work: dict[str, Callable]) -> dict[str, list[float]]:
    """Return the seconds of each piece of work. They alternate, so that a disturbance hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    fewest, most = REPEATS
    for run in work.values():
        run()  # to warm up
    end = time.perf_counter() + BUDGET_S["quick" if setup.quick else "full"] * len(work)
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


class TimedTrainer(m.PreTrainer):
    """A trainer that notes the seconds of each part of its steps."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        self.last = 0.0
        # the embedding's gradient is the last to arrive: it ends the backward pass
        self.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda _: self.end("backward"))

    def end(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part].append(now - self.last)
        self.last = now

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().loss(batch)
        self.end("forward")
        return loss

    def timed_step(self, batch: dict[str, Tensor]) -> None:
        self.last = time.perf_counter()
        self.step([batch])
        self.end("optimizer")  # with clipping

    def update_seconds(self, rows: int) -> list[float]:
        """Return the seconds of updates of the whole batch, from steps of `rows` rows; the first was a warm-up."""
        steps = zip(*self.seconds.values(), strict=True)
        micro_batches = self.config.batch_size / rows
        return [micro_batches * (forward + backward) + optimizer for forward, backward, optimizer in steps][1:]


def new_trainer(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig, mode: str = "eager") -> TimedTrainer:
    torch.manual_seed(0)
    # without limits the schedule stays at its peak; and no smaller batch may hide a lack of memory
    changes = {"max_steps": 0, "minutes": 0.0, "auto_micro_batch": False}
    train = dataclasses.replace(train, compile="on" if mode == "compiled" else "off", **changes)
    return TimedTrainer(m.MiniGPT(config), m.BPETokenizer(), setup.device, config=train)


def timed_trainers(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> dict[str, TimedTrainer]:
    """Return a trainer for each mode, after their steps on a few rows were timed in turns."""
    batch = random_batch(setup, setup.rows(train), train.seq_len, config)
    trainers = {mode: new_trainer(setup, config, train, mode) for mode in setup.modes}
    time_in_turns(setup, {mode: functools.partial(t.timed_step, batch) for mode, t in trainers.items()})
    return trainers


def new_generator(setup: Setup, config: m.MiniGPTConfig, mode: str = "eager") -> m.TextGenerator:
    torch.manual_seed(0)
    model = m.MiniGPT(config).to(setup.device, setup.dtype).eval()
    return m.TextGenerator(model, m.BPETokenizer(), mode == "compiled")


def random_ids(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> Tensor:
    return torch.randint(m.FIRST_BYTE, config.vocab_size, (rows, length), device=setup.device)


def random_batch(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> dict[str, Tensor]:
    ids = random_ids(setup, rows, length + 1, config)
    return {"input_ids": ids, "labels": ids}


def bandwidth(setup: Setup) -> Measured:
    """Measure the gigabytes per second at which a sum reads memory that no cache holds."""
    x = torch.ones(1 << (28 if setup.device.type == "cuda" else 26), device=setup.device)
    return per_second(x.nbytes / 1e9, time_in_turns(setup, {"sum": x.sum})["sum"])


# -- training ----------------------------------------------------------------------------------------------------------


def measure_processes(setup: Setup, name: str) -> Rows:
    """Return the speed of all processes, and which share it is of so many times one that works alone."""
    config, train, size = m.get_config(name), setup.train_config(name), m.WORLD.size
    rows, T, seconds = setup.rows(train), train.seq_len, []
    for processes in (1, size):
        if processes == size or m.WORLD.is_first:
            m.WORLD.size = processes
            trainer = new_trainer(setup, config, train)
            batch = random_batch(setup, rows * processes, T, config)
            seconds += time_in_turns(setup, {"": functools.partial(trainer.step, [batch])}).values()
        m.WORLD.size = size
        m.WORLD.barrier()  # the others wait while the first one works alone
    one, together = (statistics.median(times) for times in (seconds[0], seconds[-1]))
    return {
        "processes": str(size),
        "timed batch of each": f"{rows} x {T}",
        "one alone, tok/s": per_second(rows * T, seconds[0]),
        "all, tok/s": per_second(rows * T * size, seconds[-1]),
        "share of so many times one, %": Measured(100 * one / together),
    }


def measure_train(setup: Setup, name: str) -> Rows:
    """Return a model's size, the speed of training and its parts, and peak memory."""
    if m.WORLD.size > 1:
        return measure_processes(setup, name)
    config, train = m.get_config(name), setup.train_config(name)
    rows, T = setup.rows(train), train.seq_len
    setup.line.show(f"{name}: training")
    trainers, peak = timed_trainers(setup, config, train), setup.peak(setup.training_dtype)
    model = trainers["eager"].model
    result: Rows = {
        "parameters, M": Measured(model.num_params() / 1e6),
        "  a token uses, M": Measured(model.num_params(active=True) / 1e6),
        "training, MFLOP a token": Measured(model.flops_per_token(T) / 1e6),
        "timed batch": f"{rows} x {T}",
    }
    for mode, trainer in trainers.items():
        tokens_per_s = per_second(train.batch_size * T, trainer.update_seconds(rows))
        mfu = 100 * model.flops_per_token(T) * tokens_per_s.value / peak
        result[f"{mode} training, tok/s"] = tokens_per_s
        for part, seconds in trainer.seconds.items():
            result[f"  {part}, {mode}, ms"] = summarize([1e3 * s for s in seconds[1:]])
        result[f"  MFU, {mode}, % of peak"] = Measured(mfu, tokens_per_s.spread)
    setup.line.show(f"{name}: memory")
    start_bytes, peak_bytes = isolated_memory(setup, config, dataclasses.replace(train, batch_size=rows))
    result["peak memory of that batch, MB"] = Measured(peak_bytes / 1e6)
    result["  before there is a model, MB"] = Measured(start_bytes / 1e6)
    return result


def saved_bytes(setup: Setup, trainer: m.Trainer, rows: int) -> int:
    """Count the bytes that forward keeps for backward, without the weights."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    trainer.model.train()
    batch = random_batch(setup, rows, trainer.config.seq_len, trainer.model.config)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), trainer.autocast():
        loss = m.PreTrainer.loss(trainer, batch)  # a TimedTrainer's own would count as a step
    del loss  # it kept everything alive until here, so that no address was used twice
    for weight in (*trainer.model.parameters(), *trainer.model.buffers()):
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def isolated_memory(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> tuple[int, int]:
    """Call `isolated_work` in a process of its own, where nothing else has raised the peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(isolated_work, setup, config, train).result()


def isolated_work(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> tuple[int, int]:
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


# -- decoding ----------------------------------------------------------------------------------------------------------


def measure_decode(setup: Setup, name: str) -> Rows:
    """Return the speed of prefill, sampling and beam search, and its share of the speed that memory allows."""
    config, bytes_per_s = m.get_config(name), 1e9 * bandwidth(setup).value
    table: Table = {}
    time_decoding(setup, config, table)
    rows = table["MiniLLM"]
    for batch in (1, 8):
        tokens_per_s = rows[f"decode, batch {batch}, tok/s"]
        least_s = bytes_per_step(setup, config, batch) / bytes_per_s
        share = 100 * least_s * tokens_per_s.value / batch
        rows[f"  batch {batch}, % of memory's limit"] = Measured(share, tokens_per_s.spread)
    return rows


def bytes_per_step(setup: Setup, config: m.MiniGPTConfig, batch: int) -> float:
    """Count the bytes that decoding a token for each row has to read: weights, keys and values, on average."""
    with torch.device("meta"):
        weights = m.MiniGPT(config).num_params()
    if config.num_experts:
        idle = config.num_experts * (1 - config.num_experts_per_tok / config.num_experts) ** batch  # no row visits them
        weights -= config.num_hidden_layers * idle * 3 * config.hidden_size * config.moe_intermediate_size
    keys = PROMPT_TOKENS + setup.new_tokens / 2
    floats = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of each key
    return (weights + batch * keys * floats) * setup.dtype.itemsize


def time_decoding(setup: Setup, config: m.MiniGPTConfig, table: Table, peer: nn.Module | None = None) -> None:
    """Time prefill, sampling and beam search. A peer decodes eagerly in all rows."""
    own, prefill = new_generator(setup, config), min(512, config.max_position_embeddings - 1)
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
        setup.line.show(row)
        length, new = (prefill, 1) if row == "prefill" else (PROMPT_TOKENS, setup.new_tokens)
        ids = random_ids(setup, batch, length, config)
        options = {"max_new_tokens": new, "min_new_tokens": new, **options}
        work = {"MiniLLM": functools.partial(decode, ids, m.GenerationConfig(**options))}
        if peer is not None:
            work["transformers"] = functools.partial(peer.generate, ids, **options)
        with torch.no_grad():
            seconds = time_in_turns(setup, work)
        add_row(table, f"{row}, tok/s", batch * (length if row == "prefill" else new), seconds)


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def measure_tokenizers(setup: Setup, with_peer: bool = False) -> Table:
    """Time BPE training on the example data, repeated up to 20 MB (--quick: 2), and encoding them once."""
    with open(DATA / "pretrain.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    size = sum(len(text.encode()) for text in texts) / 1e6
    copies = math.ceil((2 if setup.quick else 20) / size)
    own = m.BPETokenizer(vocab_size=4096)
    own.train(texts)
    own.save(setup.folder / "tokenizer.json")
    training = {"MiniLLM": lambda: m.BPETokenizer(4096).train(texts * copies)}
    encoding = {"MiniLLM": encode_afresh(lambda: m.BPETokenizer.load(setup.folder / "tokenizer.json"), texts)}
    if with_peer:
        peer = train_tokenizers(texts)
        peer_json = peer.to_str()
        training["tokenizers"] = lambda: train_tokenizers(texts * copies)
        encoding["tokenizers"] = encode_afresh(lambda: type(peer).from_str(peer_json), texts)
    table: Table = {}
    add_row(table, "BPE training, MB/s", copies * size, time_in_turns(setup, training))
    add_row(table, "encoding, MB/s", size, time_in_turns(setup, encoding))
    return table


def encode_afresh(load: Callable, texts: list[str]) -> Callable[[], list]:
    """Return a function that encodes text by text, each time with a fresh tokenizer, whose cache is empty."""
    tokenizers = [load() for _ in range(REPEATS[1] + 1)]
    return lambda: list(map(tokenizers.pop().encode, texts))


def train_tokenizers(texts: list[str]) -> object:
    tokenizers = m.import_extra("tokenizers", "hf")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = {"initial_alphabet": byte_level.alphabet(), "show_progress": False}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=4096, **options))
    return tokenizer


# -- peers -------------------------------------------------------------------------------------------------------------


def peers(setup: Setup, parts: tuple[str, ...]) -> dict[str, Table]:
    """Time both sides in turns. A column "x PEER" says how many times as fast MiniLLM is."""
    models: Table = {}
    tables = {"peers: 6 layers x 256, 8 heads, ffn 768, vocabulary 4096": models}
    if "train" in parts:
        for mode in setup.modes:
            setup.line.show(f"peers: training, {mode}")
            time_training(setup, models, mode)
    if "decode" in parts:
        config = m.MiniGPTConfig(**PEER_SHAPE, num_key_value_heads=2, max_position_embeddings=1024)
        peer = qwen3(config).to(setup.device, setup.dtype).eval()
        time_decoding(setup, config, models, peer)
    if "tokenizer" in parts:
        setup.line.show("peers: tokenizers")
        tables["peers: tokenizers"] = measure_tokenizers(setup, with_peer=True)
    return {title: table for title, table in tables.items() if table}


def add_row(table: Table, row: str, count: float, seconds: dict[str, list[float]]) -> None:
    """Add a row of rates, and how many times as fast MiniLLM is, turn by turn."""
    for name, times in seconds.items():
        table.setdefault(name, {})[row] = per_second(count, times)
        if name != "MiniLLM":
            ratios = [other / own for other, own in zip(times, seconds["MiniLLM"], strict=True)]
            table.setdefault(f"x {name}", {})[row] = summarize(ratios)


def time_training(setup: Setup, table: Table, mode: str) -> None:
    """Time a training step of both sides; the peer's is as its user writes it."""
    B, T = (4 if setup.quick else 16), 256
    config = m.MiniGPTConfig(**PEER_SHAPE, max_position_embeddings=T)
    batch = random_batch(setup, B, T, config)
    ids = batch["input_ids"][:, 1:]
    train = m.TrainConfig(optimizer="adamw", dtype=setup.options.get("dtype", "auto"))
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
    add_row(table, f"training {mode}, tok/s", B * T, time_in_turns(setup, work))


def qwen3(config: m.MiniGPTConfig) -> nn.Module:
    transformers = m.import_extra("transformers", "test")
    fields = m.hf_config(config) | {"eos_token_id": None}  # it writes on, as ours does
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))


# -- duel --------------------------------------------------------------------------------------------------------------

SIDES = ("here", "there")
# Student's t, 99 % two-sided, by the number of pairs less one; the last serves for all larger numbers
T_99 = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25)


def check_duel(args: argparse.Namespace) -> None:
    for name in ("train.py", "minillm.py"):
        if not (Path(args.duel) / name).is_file():
            raise m.UserError(f"--duel {args.duel}: there is no {name} in it: name a copy of MiniLLM's folder")
    args.seeds = 3 if args.seeds is None else args.seeds
    if args.seeds < 2:
        raise m.UserError(f"--seeds {args.seeds} is not possible: it must be 2 or more, to tell luck from skill")
    if args.steps is not None and (args.steps < 1 or "minutes" in args):
        raise m.UserError("--steps must be 1 or more, and excludes --minutes")
    m.data_files(args.data or DATA)


def duel(setup: Setup, args: argparse.Namespace) -> dict[str, Table]:
    """Train both sides in turns with equal seeds, data and limits, as processes of their own; tabulate and judge."""
    folders = {"here": Path(m.__file__).parent, "there": Path(args.duel).absolute()}
    limit = ["--max-steps", str(args.steps)] if args.steps else ["--minutes", str(getattr(args, "minutes", 1))]
    table: Table = {}
    differences, failure = [], ""
    runs = [(data, seed) for data in args.data or [None] for seed in range(args.seeds)]
    for k, (data, seed) in enumerate(runs):
        name, flags = f"seed {seed}", [*limit, "--seed", str(seed)]
        if data:
            name, flags = f"{Path(data).stem}, {name}", [*flags, "--data", str(Path(data).absolute())]
        for side in SIDES if k % 2 == 0 else SIDES[::-1]:  # who goes first changes
            setup.line.show(f"duel {k + 1} of {len(runs)}: {name}, {side}")
            try:
                figures = train_in(folders[side], setup.folder / f"{k}-{side}", flags)
            except m.UserError as error:
                if side == "here":
                    raise
                failure = f"worse: {error}"
                break
            for figure, value in figures.items():
                table.setdefault(f"{side}: {figure}", {})[name] = Measured(value)
        if failure:
            break
        here, there = (table[f"{side}: bits per byte"][name].value for side in SIDES)
        differences.append(there / here - 1)
    table = {column: table[column] for column in sorted(table, key=lambda name: name.split(": ")[1])}
    words = failure or verdict(differences)
    setup.line.say(words)
    return {f"there is {folders['there']}": table, "verdict": {"there": {"it is": words}}}


def train_in(folder: Path, out: Path, flags: list[str]) -> dict[str, float]:
    """Train with the MiniLLM in `folder`; return its figures on all validation data."""

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "train.py", "--out", str(out), *words], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            message = (done.stderr.strip() or "no message").splitlines()[-1]
            raise m.UserError(f"{folder} failed with exit status {done.returncode}: {message}")
        return done.stdout

    run("--config", "tiny", *flags)
    run_dir = out / "tiny/pretrain"
    score = json.loads(run("--stage", "eval", "--init", str(run_dir)).splitlines()[-1])
    rows = [row for row in m.read_metrics(run_dir) if "tok_per_s" in row]
    return {
        "bits per byte": score["bpb"],
        "steps": rows[-1]["step"],
        "tok/s": statistics.median(row["tok_per_s"] for row in rows),
        "peak, MB": rows[-1]["peak_bytes"] / 1e6,
    }


def verdict(differences: list[float]) -> str:
    """Judge a fork by its relative differences in bits per byte, one a pair of trainings; below 0 is better.

    It is better or worse where Student's t test is 99 % sure.
    """
    n, mean, deviation = len(differences), statistics.mean(differences), statistics.stdev(differences)

    def is_sure(pairs: int) -> bool:
        return abs(mean) > T_99[min(pairs - 2, len(T_99) - 1)] * deviation / math.sqrt(pairs)

    words = f"{mean:+.2%} bits per byte (standard error {deviation / math.sqrt(n):.2%}, {n} pairs)"
    if is_sure(n):
        return f"{'better' if mean < 0 else 'worse'}: {words}"
    enough = next(filter(is_sure, range(n + 1, 1000)), None)
    return f"not to be told apart: {words}" + (f"; {enough} such pairs would tell" if enough else "")


# -- profile -----------------------------------------------------------------------------------------------------------


def profile(setup: Setup, names: list[str], folder: Path) -> None:
    """Write traces for ui.perfetto.dev, and print the operators."""
    folder.mkdir(parents=True, exist_ok=True)
    options = m.GenerationConfig(max_new_tokens=16, min_new_tokens=16, **SAMPLING)
    for name in names:
        config, train = m.get_config(name), setup.train_config(name)
        batch = random_batch(setup, setup.rows(train), train.seq_len, config)
        ids = random_ids(setup, 1, PROMPT_TOKENS, config)
        step = functools.partial(new_trainer(setup, config, train).step, [batch])
        decode = functools.partial(new_generator(setup, config).sample_generate, ids, options)
        trace(setup.device, step, folder / f"{name}-training.json")
        trace(setup.device, decode, folder / f"{name}-decoding.json")


def trace(device: torch.device, work: Callable, path: Path) -> None:
    """Trace one call after a warm-up; print the 15 operators that take longest by themselves."""
    work()
    synchronize(device)
    with torch.profiler.profile() as profiler:
        work()
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n== {path}")
    print(profiler.key_averages().table(sort_by=field, row_limit=15, max_name_column_width=40))


# -- plan --------------------------------------------------------------------------------------------------------------


def plan(setup: Setup, args: argparse.Namespace) -> dict[str, Table]:
    """Predict what training takes on devices like this one, within their memory or --gpu-memory."""
    memory = args.gpu_memory
    if memory is None and setup.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setup.device).total_memory
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table: Table = {}
    for name in args.config:
        setup.line.show(f"{name}: calibrating")
        table[name] = plan_training(setup, name, args.tokens, memory, args.processes or 1, args.link or 12.5e9)
    return {f"plan for {args.tokens / 1e6:,.4g}M tokens": table}


def plan_training(setup: Setup, name: str, tokens: float, memory: float, processes: int, link: float) -> Rows:
    """Measure a few rows, and add as much memory and time for every further row; of several processes, the link's."""
    config, train = m.get_config(name), setup.train_config(name)
    if not 1 <= processes <= train.batch_size:
        raise m.UserError(f"--processes {processes} is not possible: 1 … --batch-size {train.batch_size}")
    all_rows, T = train.batch_size, train.seq_len
    train.batch_size = rows = math.ceil(all_rows / processes)  # of the process that has most
    few = setup.rows(train)
    start_bytes, few_bytes = isolated_memory(setup, config, dataclasses.replace(train, batch_size=few))
    trainer = timed_trainers(setup, config, train)["eager"]
    row_bytes, size = bytes_per_row(setup, trainer), trainer.model.num_params()
    least_bytes = start_bytes + 16 * size  # however few rows: weights, gradients, moments
    training_bytes = max(least_bytes, few_bytes + (rows - few) * row_bytes)
    fits = max(0, few + math.floor((memory - few_bytes) / row_bytes)) if memory > least_bytes else 0
    if fits < rows:
        advice = "not even one does: try --gradient-checkpointing or a smaller --seq-len"
        if fits:
            steps = math.ceil(rows / fits)
            advice = f"--batch-size {processes * math.ceil(rows / steps)} --accumulation-steps {steps} does"
        setup.line.say(f"{name}: {rows} rows do not fit into {memory / 1e9:.3g} GB: {advice}")
    step_s, sent = statistics.median(trainer.update_seconds(few)), sent_bytes(trainer.model, processes)
    step_s += sent / link
    result: Rows = {
        "batch": f"{all_rows} x {T}",
        "peak training memory, MB": Measured(training_bytes / 1e6),
        f"largest batch in {memory / 1e9:.3g} GB, rows": Measured(fits),
        "step, s": Measured(step_s),
        f"{tokens / 1e6:,.4g}M tokens, h": Measured(tokens / (all_rows * T) * step_s / 3600),
    }
    if processes > 1:
        result["sent by a process a step, MB"] = Measured(sent / 1e6)
        result["part of a step that computes, %"] = Measured(100 * (1 - sent / link / step_s))
    return result


def sent_bytes(model: m.MiniGPT, processes: int) -> float:
    """Return the bytes that each process sends in a step: a ring's all-reduce of gradients, all-gather of Muon's."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("layers."))
    return 4 * (2 * model.num_params() + matrices) * (processes - 1) / processes


def bytes_per_row(setup: Setup, trainer: m.Trainer) -> float:
    """Return the memory of a further row: all that forward keeps, and the needs of backward inside a block."""

    def forward_bytes() -> int:
        return saved_bytes(setup, trainer, 2) - saved_bytes(setup, trainer, 1)

    row_bytes, model = forward_bytes(), trainer.model
    model.gradient_checkpointing = False
    block_bytes = forward_bytes() / model.config.num_hidden_layers
    return row_bytes + 3 * block_bytes  # recomputed activations, gradients, gaps: three fits what was measured on CPUs


# -- tables ------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, tables: dict[str, Table], before: dict[tuple, Measured] | None) -> None:
    if args.json:
        with m.atomic_write(args.json) as file:
            file.write(json.dumps({"flags": vars(args), "tables": tables}, indent=1, default=str).encode())
    if "machine" in tables and not args.all:
        tables = headlines(tables)
    for title, table in tables.items():
        print(render(title, table))
    if before:
        print(render(f"against {args.baseline}", compare(measured_cells(tables), before)))


def headlines(tables: dict[str, Table]) -> dict[str, Table]:
    """Return the rows that matter most; where there are none, all."""
    short = {
        title: {column: {row: rows[row] for row in HEADLINES if row in rows} for column, rows in table.items()}
        for title, table in tables.items()
    }
    return {title: table for title, table in short.items() if any(table.values())} or tables


def show(cell: Measured | str) -> str:
    if isinstance(cell, str):
        return cell
    number = f"{cell.value:,.0f}" if cell.value >= 100 else f"{cell.value:.4g}"
    return number + (f" ±{cell.spread:.0%}" if cell.spread else "")


def render(title: str, table: Table) -> str:
    names = list(dict.fromkeys(row for rows in table.values() for row in rows))
    first = min(max(map(len, names), default=0), 48)
    lines = [f"{name[:first]:<{first}}" for name in ("", *names)]
    for column, rows in table.items():
        cells = [column, *(show(rows.get(name, "-")) for name in names)]
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
    sys.exit(main())
