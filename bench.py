"""Measure what a machine makes of MiniLLM: speed, memory, and the share of what its hardware could do; plan a run."""
from __future__ import annotations

import bisect
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import minillm as m  # noqa: E402

HERE = Path(__file__).parent
PARTS = ("train", "decode", "moe", "tokenizer", "growth")
PROMPT = 16  # tokens before those that are decoded
REPEATS = (3, 25)  # of a measurement: at least, and at most as far as they fit into its seconds
BUDGET_S = {True: 2.0, False: 8.0}  # those seconds, with --quick and without
PEER_SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
              "intermediate_size": 768}
GROWTH = {  # of the tiny shape: (what it is called, what changes, rows, tokens of a row)
    "context, 2 rows": [(f"{n:,} tokens", {"max_position_embeddings": n}, 2, n) for n in (128, 256, 512, 1024, 2048)],
    "batch, of 256 tokens": [(f"{n} rows", {}, n, 256) for n in (1, 2, 4, 8, 16)],
    "vocabulary, 4 x 256": [(f"{n:,} tokens", {"vocab_size": n}, 4, 256) for n in (1024, 4096, 16_384, 50_000)],
    "experts, one a token, 4 x 256": [
        (f"{n} experts", {"num_experts": n, "num_experts_per_tok": 1, "moe_intermediate_size": 384}, 4, 256)
        for n in (1, 2, 4, 8, 16)]}
CLONES = {"nanogpt": "model.py", "minimind": "model/model_minimind.py"}  # the file of a clone that has the model
DATA_SHEETS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
               "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}  # dense TFLOP/s in bfloat16, or float16


class Figure(NamedTuple):
    """A median, and half the interquartile range as a share of it."""

    value: float
    spread: float = 0.0


Rows = dict[str, Figure | str]
Table = dict[str, Rows]  # column -> row -> cell; what stands behind the last comma of a name is the unit


@dataclass
class Setup:
    """What all measurements share."""

    device: torch.device
    quick: bool = True
    modes: tuple[str, ...] = ("eager",)
    given: dict = dataclasses.field(default_factory=dict)  # the fields of TrainConfig that the user gave
    cache: Path = HERE  # where this run keeps tokenizers and encoded text
    line: m.ProgressLine = dataclasses.field(default_factory=m.ProgressLine)

    @property
    def dtype(self) -> torch.dtype:
        return m.pick_dtype(self.given.get("dtype", "auto"), self.device)

    def train_config(self, name: str) -> m.TrainConfig:
        train = dataclasses.replace(m.get_train_config(name), **self.given)
        train.seq_len = train.seq_len or m.get_config(name).max_position_embeddings
        return train

    def rows(self, train: m.TrainConfig) -> int:
        """Rows of a timed batch: few on a CPU, whose speed hardly depends on them."""
        tokens = 32_768 if self.device.type == "cuda" else 1024 if self.quick else 2048
        return max(1, min(train.batch_size, tokens // train.seq_len))


# -- command line ------------------------------------------------------------------------------------------------------


def amount(text: str) -> float:
    """A number above 0, with or without a suffix: 100M, 1.5B, 24G, 1e8."""
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)([kKMGBT]?)B?", text)
    if not found or float(found[1]) <= 0:
        raise ValueError(text)
    return float(found[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}[found[2]]


def build_parser() -> m.FlagParser:
    parser = m.FlagParser(prog="bench.py", description=__doc__, usage="bench.py [--config NAME ...] [any flag below]")
    parser.add_argument("--config", nargs="+", choices=m.PRESETS, metavar="NAME",
                        help=f"presets, of {', '.join(m.PRESETS)} [tiny small moe; with --quick tiny small]")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"what to measure, of {', '.join(PARTS)} [all but growth]")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                        help="train with compiled blocks as well [auto: unless --quick]")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--baseline", metavar="FILE", help="compare with the figures of an earlier --json")
    parser.add_argument("--peers", action="store_true", help="instead: side by side with other installed libraries")
    parser.add_argument("--peer-path", nargs="+", default=[], metavar="NAME=DIR",
                        help=f"--peers: clones to race, too, of {', '.join(CLONES)}")
    parser.add_argument("--profile", nargs="?", const="profile", metavar="DIR",
                        help="instead: write traces of training and decoding, and print their operators [profile]")
    parser.add_argument("--plan", action="store_true", help="instead: predict memory and time of a training")
    parser.add_argument("--tokens", type=amount, default=1e8, metavar="N", help="--plan: how many to train on [100M]")
    parser.add_argument("--gpu-memory", type=amount, metavar="BYTES", help="--plan: what there is [this device's]")
    parser.add_argument("--check", action="store_true", help="--plan: measure what is predicted, too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    wanted = ("dtype", "gradient_checkpointing", "batch_size", "seq_len", "optimizer")
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of --config tiny]",
                skip=tuple(field.name for field in dataclasses.fields(m.TrainConfig) if field.name not in wanted))
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        args = build_parser().parse_args(argv)
        args.config = args.config or ["tiny", "small", "moe"][:2 if args.quick else 3]
        check_flags(args)
        before = read_figures(args.baseline) if args.baseline else None
        m.keep_freed_memory()
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
            warnings.simplefilter("ignore")
            tables = measure(args, Path(cache))
        for title, table in tables.items():
            print(render(title, table))
        if args.json:
            with m.atomic_write(args.json) as file:
                file.write(json.dumps({"flags": vars(args), "tables": tables}, indent=1, default=str).encode())
        if before:
            print(render(f"against {args.baseline}", compare(tables, before)))
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        m.silence_stdout()
        return 0
    except torch.OutOfMemoryError as error:
        print(f"bench.py: error: {str(error).splitlines()[0]} Try a smaller --batch-size.", file=sys.stderr)
        return 2
    except (m.UserError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2


def check_flags(args) -> None:
    """Whatever can be wrong with the flags, before anything is loaded or measured."""
    seq_len = m.TrainConfig(**m.given_flags(args, m.TrainConfig)).seq_len or 0
    for name in args.config:
        if seq_len > (limit := m.get_config(name).max_position_embeddings):
            raise m.UserError(f"--seq-len {seq_len} exceeds the context of --config {name}, {limit}")
    if sum(map(bool, (args.plan, args.profile, args.peers))) > 1:
        raise m.UserError("--plan, --profile and --peers exclude each other: give one")
    if (args.check or args.gpu_memory) and not args.plan:
        raise m.UserError("--check and --gpu-memory belong to --plan: give that, too")
    if args.peer_path and not args.peers:
        raise m.UserError("--peer-path belongs to --peers: give that, too")
    for name, folder in (pair.partition("=")[::2] for pair in args.peer_path):
        if name not in CLONES or not Path(folder, CLONES[name]).is_file():
            raise m.UserError(f"--peer-path {name}={folder} is not possible: it must be nanogpt=DIR or minimind=DIR, "
                              f"where DIR holds {' or '.join(CLONES.values())}")
    if args.json and Path(args.json).exists():
        read_figures(args.json)  # nothing but figures is overwritten
    elif args.json and not Path(args.json).parent.is_dir():
        raise m.UserError(f"--json {args.json}: there is no directory {Path(args.json).parent}")


def read_figures(path: str) -> dict[str, Table]:
    try:
        tables = dict(json.loads(Path(path).read_bytes())["tables"])
        return {title: {column: dict(rows) for column, rows in table.items()} for title, table in tables.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise m.UserError(f"{path} does not hold figures that --json wrote") from error


def measure(args, cache: Path) -> dict[str, Table]:
    """The tables that the command line asks for, by title."""
    modes = ("eager", "compiled")[:1 + (args.compile == "on" or args.compile == "auto" and not args.quick)]
    setup = Setup(m.pick_device(args.device), args.quick, modes, m.given_flags(args, m.TrainConfig), cache)
    setup.line.say(f"{device_name(setup)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
                   f"{str(setup.dtype).removeprefix('torch.')}; ± is half the interquartile range")
    parts = args.only or PARTS[:-1]
    if args.plan:
        return plan(setup, args)
    if args.profile:
        return profile(setup, args.config, Path(args.profile))
    if args.peers:
        return peers(setup, parts, dict(pair.partition("=")[::2] for pair in args.peer_path))
    tables: dict[str, Table] = {"machine": {"": machine(setup)}, "presets": {name: {} for name in args.config}}
    for name, rows in tables["presets"].items():
        for part, found in (("train", measure_train), ("decode", measure_decode), ("moe", measure_moe)):
            if part in parts:
                setup.line.show(f"{name}: {part}")
                rows |= found(setup, name)
    if "tokenizer" in parts:
        setup.line.show("tokenizer")
        tables["tokenizer"] = measure_tokenizers(setup)
    tables |= growth(setup) if "growth" in parts else {}
    return {title: table for title, table in tables.items() if any(table.values())}


# -- timing ------------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def figure(samples: list[float]) -> Figure:
    middle = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0, 0, 0)
    return Figure(middle, (high - low) / 2 / middle if middle else 0.0)


def per_second(count: float, seconds: list[float]) -> Figure:
    return figure([count / s for s in seconds])


def race(setup: Setup, work: dict[str, Callable[[], object]], warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each piece of work, taken in turns (A B A B), so that what disturbs one disturbs all."""
    for _, fn in itertools.product(range(warm_up), work.values()):
        fn()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + BUDGET_S[setup.quick] * len(work)
    for k in range(REPEATS[1]):
        if k >= REPEATS[0] and time.perf_counter() > end:
            break
        for name, fn in work.items():
            synchronise(setup.device)
            start = time.perf_counter()
            fn()
            synchronise(setup.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


class TimedTrainer(m.PreTrainer):
    """Notes the seconds of a step's parts in `spent`. The gradient of the embedding is the last to arrive."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.spent: dict[str, list[float]] = defaultdict(list)
        self.last = 0.0
        self.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda _: self.note("backward"))

    def note(self, part: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.spent[part].append(now - self.last)
        self.last = now

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = super().loss(batch)
        self.note("forward")
        return loss

    def timed_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self.last = time.perf_counter()
        batch = next(batches)
        self.note("data")
        self.step([batch])
        self.note("optimizer")  # with clipping

    def sums(self, *parts: str) -> list[float]:
        """Seconds of some parts together, step by step without the first."""
        return [sum(times) for times in zip(*(self.spent[part][1:] for part in parts), strict=True)]

    def update_seconds(self, rows: int) -> list[float]:
        """Seconds a step of the whole batch, added up from micro-batches of so many rows, and one update, would take.
        """
        micro_batches = self.config.batch_size * self.config.accumulation_steps / rows
        passes, update = self.sums("data", "forward", "backward"), self.sums("optimizer")
        return [a * micro_batches + b for a, b in zip(passes, update, strict=True)]


def new_trainer(setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig, mode: str = "eager") -> TimedTrainer:
    torch.manual_seed(0)
    train = dataclasses.replace(train, compile="on" if mode == "compiled" else "off", max_steps=0, minutes=0.0,
                                auto_micro_batch=False)
    return TimedTrainer(m.MiniGPT(config), m.BPETokenizer(), setup.device, config=train)


def new_generator(setup: Setup, config: m.MiniGPTConfig, mode: str = "eager") -> m.TextGenerator:
    torch.manual_seed(0)
    dtype = setup.dtype if setup.device.type == "cuda" else torch.float32
    return m.TextGenerator(m.MiniGPT(config).to(setup.device, dtype).eval(), m.BPETokenizer(), mode == "compiled")


def timed_trainers(setup: Setup, train: m.TrainConfig, rows: int, *configs: m.MiniGPTConfig) -> list[TimedTrainer]:
    """Trainers of some shapes that have been timed in turns on random batches."""
    trainers = [new_trainer(setup, config, train) for config in configs]
    batches = itertools.repeat(random_batch(setup, rows, train.seq_len, configs[0]))
    race(setup, {str(k): lambda t=trainer: t.timed_step(batches) for k, trainer in enumerate(trainers)})
    return trainers


def random_ids(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> torch.Tensor:
    return torch.randint(m.FIRST_BYTE, config.vocab_size, (rows, length), device=setup.device)


def random_batch(setup: Setup, rows: int, length: int, config: m.MiniGPTConfig) -> dict[str, torch.Tensor]:
    ids = random_ids(setup, rows, length + 1, config)
    return {"input_ids": ids, "labels": ids}


def settings(new_tokens: int, **changes) -> m.GenerationConfig:
    return m.GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, temperature=1.0, top_k=50,
                              top_p=1.0, **changes)


# -- the machine and the presets ---------------------------------------------------------------------------------------


def device_name(setup: Setup) -> str:
    return torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else setup.device.type


def bandwidth(device: torch.device) -> float:
    """Bytes a second at which a sum reads memory that no cache holds."""
    x = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.numel() * x.element_size() / best


def machine(setup: Setup) -> Rows:
    return {"matrix product, GFLOP/s": figure([m.matmul_peak(setup.device, setup.dtype) / 1e9 for _ in range(3)]),
            "reading memory, GB/s": figure([bandwidth(setup.device) / 1e9 for _ in range(3)])}


def optimizer_bytes(trainer: m.Trainer) -> int:
    """Two moments a parameter under AdamW, one under Muon, in float32."""
    return sum(p.numel() * (4 if isinstance(optimizer, m.Muon) else 8)
               for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])


def saved_bytes(setup: Setup, trainer: m.Trainer, rows: int) -> int:
    """What forward keeps for backward, weights aside: counted, so that it is right for a changed model, too."""
    own = {x.untyped_storage().data_ptr() for x in (*trainer.model.parameters(), *trainer.model.buffers())}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), trainer.autocast():
        loss = m.PreTrainer.loss(trainer, random_batch(setup, rows, trainer.config.seq_len, trainer.model.config))
    del loss  # as long as it lived, so did all that was kept: each address counts once
    return sum(size for start, size in kept.items() if start not in own)


def measure_train(setup: Setup, name: str) -> Rows:
    """Size, speed with its parts, the data loader, and peak memory in a process of its own."""
    config, train = m.get_config(name), setup.train_config(name)
    rows, T, cache = setup.rows(train), train.seq_len, setup.cache
    tokenizer = m.TokenizerManager(cache).get_or_train_tokenizer(HERE / "data/train", config.vocab_size, split="all")
    loader = m.PretrainDataLoader(HERE / "data/train", tokenizer, rows, T, "all", cache_dir=cache)
    batches, update = itertools.chain.from_iterable(itertools.repeat(loader)), train.batch_size * T
    trainer = new_trainer(setup, config, dataclasses.replace(train, gradient_checkpointing=False))
    flops, params = trainer.model.flops_per_token(T), trainer.model.num_params()
    found: Rows = {
        "parameters, M": Figure(params / 1e6), "  a token uses, M": Figure(trainer.model.num_params(True) / 1e6),
        "training, MFLOP a token": Figure(flops / 1e6), "weights, MB": Figure(4 * params / 1e6),
        "optimizer's moments, MB": Figure(optimizer_bytes(trainer) / 1e6),
        "activations a row, MB": Figure((saved_bytes(setup, trainer, 2) - saved_bytes(setup, trainer, 1)) / 1e6),
        "timed batch": f"{rows} x {T}", "tokens an update": Figure(update)}
    found["data loader, batches/s"] = per_second(len(loader), race(setup, {"": lambda: list(loader)})[""])
    sheet = next((1e12 * v for k, v in DATA_SHEETS.items() if k in device_name(setup)), None)
    setup.line.show(f"{name}: training")
    peak = m.matmul_peak(setup.device, setup.dtype)
    trainers = {mode: new_trainer(setup, config, train, mode) for mode in setup.modes}
    race(setup, {mode: lambda t=trainer: t.timed_step(batches) for mode, trainer in trainers.items()})
    for mode, trainer in trainers.items():
        speed = found[f"{mode} training, tok/s"] = per_second(update, trainer.update_seconds(rows))
        found |= {f"  {part}, {mode}, ms": figure([1e3 * s for s in trainer.sums(part)]) for part in trainer.spent}
        found[f"  passes, {mode}, % of peak"] = per_second(100 * flops * rows * T / peak,
                                                           trainer.sums("forward", "backward"))
        for label, limit in (("peak", peak), ("data sheet", sheet)):
            if limit:
                found[f"  MFU, {mode}, % of {label}"] = Figure(100 * flops * speed.value / limit, speed.spread)
    setup.line.show(f"{name}: memory")
    alone = in_new_process("train", setup, config, dataclasses.replace(train, batch_size=rows))
    return found | {"peak memory of that batch, MB": Figure(alone["peak_bytes"] / 1e6),
                    "  before there is a model, MB": Figure(alone["start_bytes"] / 1e6)}


def bytes_a_step(setup: Setup, c: m.MiniGPTConfig, batch: int, keys: float) -> float:
    """What decoding a token for each row has to read: the weights that they use, and `keys` cached positions a row."""
    with torch.device("meta"):
        weights = m.MiniGPT(c).num_params() - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    if c.num_experts:
        idle = c.num_experts * (1 - c.num_experts_per_tok / c.num_experts) ** batch  # chosen by no row, on average
        weights -= c.num_hidden_layers * idle * 3 * c.hidden_size * c.moe_intermediate_size
    cached = 2 * c.num_hidden_layers * batch * c.num_key_value_heads * c.head_dim * keys
    return (weights + cached) * (setup.dtype.itemsize if setup.device.type == "cuda" else 4)


def measure_decode(setup: Setup, name: str) -> Rows:
    """Prefill, sampling, beam search, and what share of the speed at which weights and cache can be read."""
    config, read = m.get_config(name), bandwidth(setup.device)
    found = race_decoding(setup, config, {})["MiniLLM"]
    for batch in (1, 8):
        speed = found[f"decode, batch {batch}, tok/s"]
        least_s = bytes_a_step(setup, config, batch, PROMPT + new_tokens(setup) / 2) / read
        found[f"  batch {batch}, % of memory's limit"] = Figure(100 * least_s * speed.value / batch, speed.spread)
    return found


def race_decoding(setup: Setup, config: m.MiniGPTConfig, peers: dict[str, torch.nn.Module]) -> Table:
    """Rates of prefill, sampling and beam search; what peers do of it, they do eagerly."""
    own, new, sampled = new_generator(setup, config), new_tokens(setup), {"do_sample": True, "top_k": 50}
    length, table = min(512, config.max_position_embeddings - 1), {name: {} for name in ("MiniLLM", *peers)}
    cases = [("prefill, tok/s", 1, length, 1, own.greedy_search, {"do_sample": False}),
             ("decode, batch 1, tok/s", 1, PROMPT, new, own.sample_generate, sampled),
             ("decode, batch 8, tok/s", 8, PROMPT, new, own.sample_generate, sampled),
             ("decode, 4 beams, tok/s", 1, PROMPT, new, own.beam_search, {"do_sample": False, "num_beams": 4})]
    if "compiled" in setup.modes and not config.num_experts:
        compiled = new_generator(setup, config, "compiled").sample_generate
        cases += [(f"decode compiled, batch {n}, tok/s", n, PROMPT, new, compiled, sampled) for n in (1, 8)]
    for row, batch, prompt, n, decode, options in cases:
        setup.line.show(row)
        ids, beams = random_ids(setup, batch, prompt, config), options.get("num_beams", 1)
        work = {"MiniLLM": lambda d=decode, i=ids, k=n, b=beams: d(i, settings(k, num_beams=b))}
        for name, model in peers.items():
            if name == "transformers":
                work[name] = lambda f=model.generate, i=ids, k=n, o=options: f(
                    i, max_new_tokens=k, min_new_tokens=k, **o)
            elif options == sampled:
                given = {"max_new_tokens": n, "top_k": 50} | ({} if name == "nanogpt" else {
                    "temperature": 1.0, "top_p": 1.0, "eos_token_id": None})
                work[name] = lambda f=model.generate, i=ids, g=given: f(i, **g)
        with torch.no_grad():
            enter(table, row, batch * (prompt if n == 1 else n), race(setup, work))
    return table


def new_tokens(setup: Setup) -> int:
    return 32 if setup.quick else 200


def measure_moe(setup: Setup, name: str) -> Rows:
    """A mixture of experts against the dense model whose MLP is as wide as what a token visits, in turns."""
    config, train = m.get_config(name), setup.train_config(name)
    if not config.num_experts:
        return {}
    rows, width = setup.rows(train), config.moe_intermediate_size * (config.num_experts_per_tok
                                                                     + config.num_shared_experts)
    dense = dataclasses.replace(config, num_experts=0, intermediate_size=width)
    trainers = timed_trainers(setup, train, rows, dense, config)
    pairs = {"MoE's training, % of dense": zip(*(t.update_seconds(rows) for t in trainers), strict=True),
             "  its passes, % of dense": zip(*(t.sums("forward", "backward") for t in trainers), strict=True)}
    return {row: figure([100 * a / b for a, b in times]) for row, times in pairs.items()}


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def example_texts() -> list[str]:
    with open(HERE / "data/train/pretrain.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def encode_afresh(load: Callable, texts: list[str]) -> Callable[[], int]:
    """Encode text by text on one thread, each time with a copy whose cache is empty yet."""
    copies = [load() for _ in range(REPEATS[1])]
    return lambda: sum(map(len, map(copies.pop().encode, texts)))


def measure_tokenizers(setup: Setup, names: tuple[str, ...] = ()) -> Table:
    """Train on the example data (again and again, to 20 MB, or 2 with --quick), encode it (once), as peers do, too."""
    texts, table = example_texts(), {name: {} for name in ("MiniLLM", *names)}
    learn = texts * math.ceil((2 if setup.quick else 20) / megabytes(texts))
    own, there = m.BPETokenizer(vocab_size=4096), [name for name in names if installed(name)]
    own.train(texts)
    own.save(setup.cache / "tokenizer.json")
    trains: dict[str, Callable] = {"MiniLLM": lambda: m.BPETokenizer(4096).train(learn)}
    encodes = {"MiniLLM": encode_afresh(lambda: m.BPETokenizer.load(setup.cache / "tokenizer.json"), texts)}
    if "tokenizers" in there:
        from tokenizers import Tokenizer
        trained = train_tokenizers(texts).to_str()
        trains["tokenizers"] = lambda: train_tokenizers(learn)
        encodes["tokenizers"] = encode_afresh(lambda: Tokenizer.from_str(trained), texts)
    if "tiktoken" in there:
        import tiktoken
        ranks = {token: i for i, token in enumerate(own.token_bytes) if token}
        tik = tiktoken.Encoding("bench", pat_str=m.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        encodes["tiktoken"] = lambda: sum(map(len, map(tik.encode_ordinary, texts)))
    if "rustbpe" in there:
        import rustbpe
        trains["rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator(iter(learn), 4096)
    seconds = race(setup, trains, warm_up=0)
    enter(table, "BPE training, MB/s", megabytes(learn), seconds)
    for name, values in seconds.items():
        table[name][f"  {megabytes(learn):.0f} MB, s"] = figure(values)
    enter(table, "encoding, MB/s", megabytes(texts), race(setup, encodes, warm_up=0))
    return table


def train_tokenizers(texts: list[str]):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, initial_alphabet=byte_level.alphabet(),
                                                             show_progress=False))
    return tokenizer


# -- growth ------------------------------------------------------------------------------------------------------------


def growth(setup: Setup) -> dict[str, Table]:
    """Step time of the tiny shape as one number grows, beside the arithmetic; memory of a large vocabulary."""
    tables: dict[str, Table] = {}
    for title, cases in GROWTH.items():
        table = tables[f"growth: {title}"] = {"passes, ms": {}, "optimizer, ms": {}, "time x": {}, "arithmetic x": {}}
        first = None
        for row, changes, rows, length in cases:
            setup.line.show(f"growth: {row}")
            train = dataclasses.replace(m.get_train_config("tiny"), seq_len=length)
            trainer, = timed_trainers(setup, train, rows, dataclasses.replace(m.get_config("tiny"), **changes))
            passes = figure([1e3 * s for s in trainer.sums("forward", "backward")])
            work = rows * length * trainer.model.flops_per_token(length)
            first = first or (passes.value, work)
            cells = (passes, figure([1e3 * s for s in trainer.sums("optimizer")]), Figure(passes.value / first[0]),
                     Figure(work / first[1]))
            for column, cell in zip(table, cells, strict=True):
                table[column][row] = cell
    tables["growth: corpus"] = corpus_growth(setup)
    return tables if setup.quick else tables | {"memory: vocabulary 50,000, 8,192 tokens a step": logits_memory(setup)}


def corpus_growth(setup: Setup) -> Table:
    """From a text file to the first batch, when it is new and when it is known, and what an epoch's batches take."""
    text, table = "\n".join(example_texts()), {"first start, s": {}, "MB/s": {}, "second start, s": {}, "batches/s": {}}
    for size in (1, 10) if setup.quick else (1, 10, 100, 300):
        setup.line.show(f"growth: a corpus of {size} MB")
        path, row, began = setup.cache / f"{size}.txt", f"{size} MB", time.perf_counter()
        with open(path, "w", encoding="utf-8") as file:
            written = 0
            while written < 1e6 * size:
                written += file.write(text) and len(text.encode())
        began = time.perf_counter()
        for column in ("first start, s", "second start, s"):
            tokenizer = m.TokenizerManager(setup.cache).get_or_train_tokenizer(path, 2048)
            loader = m.PretrainDataLoader(path, tokenizer, 8, 256, cache_dir=setup.cache)
            next(iter(loader))
            table[column][row] = Figure(time.perf_counter() - began)
            began = time.perf_counter()
        table["MB/s"][row] = Figure(written / 1e6 / table["first start, s"][row].value)
        count = sum(1 for _ in itertools.islice(iter(loader), 2000))
        table["batches/s"][row] = Figure(count / (time.perf_counter() - began))
        path.unlink()
    return table


def logits_memory(setup: Setup) -> Table:
    config = m.MiniGPTConfig(**PEER_SHAPE | {"vocab_size": 50_000}, max_position_embeddings=256)
    train, table = m.TrainConfig(optimizer="adamw", batch_size=32, seq_len=256), {"peak, MB": {}, "% of plain": {}}
    for row, kind in (("plain logits", "plain"), ("MiniLLM", "train"), ("transformers' Qwen3", "transformers")):
        setup.line.show(f"memory: {row}")
        if kind == "transformers" and not installed(kind):
            table["peak, MB"][row] = "absent"
            continue
        table["peak, MB"][row] = Figure(in_new_process(kind, setup, config, train)["peak_bytes"] / 1e6)
        table["% of plain"][row] = Figure(100 * table["peak, MB"][row].value / table["peak, MB"]["plain logits"].value)
    return table


# -- a process of its own: what happened in a process before counts into its peak --------------------------------------


def in_new_process(kind: str, setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> dict[str, float]:
    """{"start_bytes", "peak_bytes", "step_s"} of three steps of training, or of answering a prompt."""
    job = [kind, str(setup.device), dataclasses.asdict(config), dataclasses.asdict(train), torch.get_num_threads()]
    code = "import bench, json, sys; print(json.dumps(bench.run_alone(*json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {kind} in a process of its own failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(kind: str, device: str, config: dict, train: dict, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    m.keep_freed_memory()
    config, train = m.MiniGPTConfig(**config), m.TrainConfig(**train)
    setup, monitor, seconds = Setup(torch.device(device), given={"dtype": train.dtype}), m.MemoryMonitor(device), []
    if kind == "transformers":
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401 (counts as what there is before the model)
    start, work = monitor.current_bytes(), lone_work(kind, setup, config, train)
    for _ in range(1 if kind == "decode" else 3):
        began = time.perf_counter()
        work()
        synchronise(setup.device)
        seconds.append(time.perf_counter() - began)
    return {"start_bytes": start, "peak_bytes": monitor.peak_bytes(), "step_s": min(seconds)}


def lone_work(kind: str, setup: Setup, config: m.MiniGPTConfig, train: m.TrainConfig) -> Callable[[], object]:
    if kind == "decode":
        generator, ids = new_generator(setup, config), random_ids(setup, 1, config.max_position_embeddings - 8, config)
        return lambda: generator.sample_generate(ids, settings(8))
    batch = random_batch(setup, train.batch_size, train.seq_len, config)
    if kind == "train":
        trainer = new_trainer(setup, config, train)
        return lambda: trainer.step([batch])
    return plain_step(setup, m.MiniGPT(config) if kind == "plain" else qwen3(config), batch["input_ids"])


# -- peers -------------------------------------------------------------------------------------------------------------


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def qwen3(config: m.MiniGPTConfig) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM
    fields = (*PEER_SHAPE, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    return Qwen3ForCausalLM(Qwen3Config(**{field: getattr(config, field) for field in fields}, eos_token_id=None,
                                        pad_token_id=0))


def clone_model(name: str, folder: str, c: m.MiniGPTConfig) -> torch.nn.Module:
    """The model of a peer's clone, as wide and deep; nanoGPT has its own kind of MLP and of positions."""
    spec = importlib.util.spec_from_file_location(f"clone_{name}", Path(folder, CLONES[name]))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "nanogpt":
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its size
            return module.GPT(module.GPTConfig(
                block_size=c.max_position_embeddings, vocab_size=c.vocab_size, n_layer=c.num_hidden_layers,
                n_head=c.num_attention_heads, n_embd=c.hidden_size, dropout=0.0, bias=False))
    return module.MiniMindForCausalLM(module.MiniMindConfig(
        hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, vocab_size=c.vocab_size,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size, max_position_embeddings=c.max_position_embeddings))


def peer_models(clones: dict[str, str], config: m.MiniGPTConfig) -> dict[str, torch.nn.Module]:
    """Of the same shape: transformers' Qwen3, if it is installed, and the clones."""
    there = {"transformers": qwen3(config)} if installed("transformers") else {}
    return there | {name: clone_model(name, folder, config) for name, folder in clones.items()}


def plain_step(setup: Setup, model: torch.nn.Module, ids: torch.Tensor, mode: str = "eager") -> Callable[[], None]:
    """A training step as a script of a peer's user has it: whole logits, AdamW, clipping."""
    model = model.to(setup.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    forward = torch.compile(model) if mode == "compiled" else model
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32):
            if hasattr(model, "crop_block_size"):  # nanoGPT gives its loss, and whole logits only together with it
                loss = forward(inputs, labels)[1]
            else:
                out = forward(inputs)
                loss = F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peers(setup: Setup, parts: list[str], clones: dict[str, str]) -> dict[str, Table]:
    """Side by side, in turns. A column "x PEER" says how many times as fast MiniLLM is."""
    models: Table = {"MiniLLM": {}, "transformers": {}, **{name: {} for name in clones}}
    if "train" in parts:
        for mode in setup.modes:
            setup.line.show(f"peers: training, {mode}")
            peer_training(setup, models, mode, clones)
    if "decode" in parts:
        config = m.MiniGPTConfig(**PEER_SHAPE, num_key_value_heads=2, max_position_embeddings=1024)
        dtype = setup.dtype if setup.device.type == "cuda" else torch.float32
        there = {name: model.to(setup.device, dtype).eval() for name, model in peer_models(clones, config).items()}
        for column, rows in race_decoding(setup, config, there).items():
            models.setdefault(column, {}).update(rows)
    tables = {"peers: 6 layers x 256, 8 heads, ffn 768, vocabulary 4096": models} if models["MiniLLM"] else {}
    if "tokenizer" in parts:
        setup.line.show("peers: tokenizers")
        tables["peers: tokenizers"] = measure_tokenizers(setup, ("tokenizers", "tiktoken", "rustbpe"))
    for table in tables.values():
        for rows in table.values():
            if not rows:
                rows |= dict.fromkeys(table["MiniLLM"], "absent")
    return tables


def enter(table: Table, row: str, count: float, seconds: dict[str, list[float]]) -> None:
    """A row of rates, and how MiniLLM's compare turn by turn."""
    for name, values in seconds.items():
        table[name][row] = per_second(count, values)
        if name != "MiniLLM":
            ratios = [theirs / own for theirs, own in zip(values, seconds["MiniLLM"], strict=True)]
            table.setdefault(f"x {name}", {})[row] = figure(ratios)


def peer_training(setup: Setup, table: Table, mode: str, clones: dict[str, str]) -> None:
    B, T = (4 if setup.quick else 16), 256
    config = m.MiniGPTConfig(**PEER_SHAPE, max_position_embeddings=T)
    batch = random_batch(setup, B, T, config)
    trainer = new_trainer(setup, config, m.TrainConfig(optimizer="adamw"), mode)
    work: dict[str, Callable[[], object]] = {"MiniLLM": lambda: trainer.step([batch])}
    flops = {"MiniLLM": trainer.model.flops_per_token(T)}
    attention = flops["MiniLLM"] - 6 * trainer.model.num_params()
    for name, model in peer_models(clones, config).items():
        work[name] = plain_step(setup, model, batch["input_ids"], mode)
        looked_up = T * config.hidden_size if name == "nanogpt" else 0  # its table of positions is no product
        flops[name] = 6 * (sum(p.numel() for p in model.parameters()) - looked_up) + attention
    peak, seconds = m.matmul_peak(setup.device, setup.dtype), race(setup, work, warm_up=2)
    enter(table, f"training {mode}, tok/s", B * T, seconds)
    for name, values in seconds.items():
        table[name][f"  MFU {mode}, % of peak"] = per_second(100 * flops[name] * B * T / peak, values)


# -- profile -----------------------------------------------------------------------------------------------------------


def profile(setup: Setup, names: list[str], folder: Path) -> dict[str, Table]:
    """Traces for ui.perfetto.dev, tables of operators, and on CUDA a snapshot for pytorch.org/memory_viz."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Table] = {}
    for name in names:
        config, train = m.get_config(name), setup.train_config(name)
        trainer, generator = new_trainer(setup, config, train), new_generator(setup, config)
        batch, ids = (random_batch(setup, setup.rows(train), train.seq_len, config),
                      random_ids(setup, 1, 16, config))
        works = {"training step": lambda t=trainer, b=batch: t.step([b]),
                 "decoding of 16": lambda g=generator, i=ids: g.sample_generate(i, settings(16))}
        if setup.device.type == "cuda":
            works["training step"]()
            torch.cuda.memory._record_memory_history()
            works["training step"]()
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        for kind, work in works.items():
            path = folder / f"{name}-{kind.partition(' ')[0]}.json"
            tables[f"{name}: {kind}; trace in {path}"] = operators(setup, work, path)
    return tables


def operators(setup: Setup, work: Callable[[], object], path: Path) -> Table:
    """Trace one call after a warm-up; its operators by their own time, without what they call."""
    work()
    synchronise(setup.device)
    with torch.profiler.profile() as prof:
        work()
        synchronise(setup.device)
    prof.export_chrome_trace(str(path))
    unit = "self_device_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"  # microseconds
    spent = sorted(((getattr(event, unit), event) for event in prof.key_averages()), key=lambda pair: -pair[0])
    total, top = sum(us for us, _ in spent), spent[:15]
    return {"calls": {event.key: Figure(event.count) for _, event in top},
            "own, ms": {event.key: Figure(us / 1e3) for us, event in top},
            "of all, %": {event.key: Figure(100 * us / total) for us, event in top}}


# -- plan: formulas, and one short calibration -------------------------------------------------------------------------


@dataclass
class Plan:
    """What training a preset will take. All of it is linear in the rows of a batch, or independent of them."""

    trainer: TimedTrainer
    start_bytes: int  # before there is a model: Python and torch on a CPU
    extra_bytes: int  # what a short training was measured to take beyond the formula: libraries, lost space
    kept: tuple[int, int]  # bytes that forward keeps for backward: whatever the batch, and for each of its rows
    row_s: float  # data, forward and backward
    update_s: float  # optimizer and clipping

    def training_bytes(self, rows: float) -> int:
        """The highest of four moments: logits at the end of forward, backward's begin and end, the optimizer."""
        c, T, weights = self.trainer.model.config, self.trainer.config.seq_len, 4 * self.trainer.model.num_params()
        kept, per_row = self.kept
        block = rows * per_row / c.num_hidden_layers  # a block's gradients take what it keeps
        if self.trainer.config.gradient_checkpointing:  # the input of each block, and one block computed again
            per_row = per_row / c.num_hidden_layers + 4 * c.num_hidden_layers * T * c.hidden_size
        chunk = 2 * 4 * min(2048, rows * T) * c.vocab_size  # chunked cross-entropy: logits and their exponentials
        moments = (kept + rows * per_row + chunk, kept + rows * per_row + block, weights + block,
                   weights + muon_scratch(self.trainer.optimizers))
        return int(self.start_bytes + self.extra_bytes + weights + optimizer_bytes(self.trainer) + max(moments))

    def inference_bytes(self) -> int:
        """Weights, keys and values of the whole context, and what a block computes from a prompt that fills it."""
        c, model = self.trainer.model.config, self.trainer.model
        cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        wide = c.moe_intermediate_size * c.num_experts_per_tok if c.num_experts else c.intermediate_size
        floats = model.num_params() + c.max_position_embeddings * (cached + 4 * c.hidden_size + 4 * wide)
        return self.start_bytes + floats * (4 if self.trainer.device.type == "cpu" else self.trainer.dtype.itemsize)

    def step_s(self, rows: int) -> float:
        return rows * self.row_s + self.update_s

    def largest_batch(self, memory: float) -> int:
        return bisect.bisect_right(range(1, 1 << 30), memory, key=self.training_bytes)


def muon_scratch(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes that Muon's step holds: every update, and for one shape at a time what Newton-Schulz computes."""
    groups = [group for optimizer in optimizers if isinstance(optimizer, m.Muon) for group in optimizer.param_groups]
    counts: Counter = Counter()
    for group in groups:
        for p, rows in itertools.product(group["params"], group["rows"]):
            counts[rows, p.shape[-1]] += p.numel() // (p.shape[-1] * sum(group["rows"]))
    stacks = [4 * n * (3 * a * b + 2 * min(a, b) ** 2) for (a, b), n in counts.items()]
    return sum(4 * n * a * b for (a, b), n in counts.items()) + max(stacks, default=0)


def calibrate(setup: Setup, name: str) -> Plan:
    config, train = m.get_config(name), setup.train_config(name)
    rows = setup.rows(train)
    alone = in_new_process("train", setup, config, dataclasses.replace(train, batch_size=rows))
    trainer, = timed_trainers(setup, train, rows, config)
    trainer.model.gradient_checkpointing = False
    one, two = (saved_bytes(setup, trainer, k) for k in (1, 2))
    found = Plan(trainer, alone["start_bytes"], 0, (2 * one - two, two - one),
                 statistics.median(trainer.sums("data", "forward", "backward")) / rows,
                 statistics.median(trainer.sums("optimizer")))
    found.extra_bytes = alone["peak_bytes"] - found.training_bytes(rows)
    return found


def total_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(setup: Setup, args) -> dict[str, Table]:
    memory, wanted = args.gpu_memory or total_memory(setup.device), f"{args.tokens / 1e6:,.4g}M tokens"
    table, checks = {}, {"predicted": {}, "measured": {}, "of measured, %": {}}
    for name in args.config:
        setup.line.show(f"{name}: calibrating")
        train, found = setup.train_config(name), calibrate(setup, name)
        rows, fits, model = train.batch_size, found.largest_batch(memory), found.trainer.model
        table[name] = {
            "parameters, M": Figure(model.num_params() / 1e6),
            "training, MFLOP a token": Figure(model.flops_per_token(train.seq_len) / 1e6),
            "batch": f"{rows} x {train.seq_len}",
            "peak training memory, MB": Figure(found.training_bytes(rows) / 1e6),
            f"largest batch in {memory / 1e9:.3g} GB, rows": Figure(fits),
            "peak inference memory, MB": Figure(found.inference_bytes() / 1e6),
            "step, s": Figure(found.step_s(rows)),
            "training, tok/s": Figure(rows * train.seq_len / found.step_s(rows)),
            f"{wanted}, h": Figure(args.tokens / (rows * train.seq_len) * found.step_s(rows) / 3600)}
        if fits < rows:
            parts = -(-rows // max(fits, 1))
            setup.line.say(f"{name}: {rows} rows do not fit into {memory / 1e9:.3g} GB: " + (
                f"--batch-size {-(-rows // parts)} --accumulation-steps {parts} does" if fits else
                "not even one does: try --gradient-checkpointing or a smaller --seq-len"))
        if args.check:
            check_plan(setup, name, found, checks)
    return {f"plan for {wanted}": table} | ({"predicted and measured": checks} if args.check else {})


def check_plan(setup: Setup, name: str, found: Plan, checks: Table) -> None:
    """Measure, each in a process of its own, what the plan predicts."""
    setup.line.show(f"{name}: checking")
    config, train = m.get_config(name), setup.train_config(name)
    training, answering = (in_new_process(kind, setup, config, train) for kind in ("train", "decode"))
    pairs = {"training memory, MB": (found.training_bytes(train.batch_size) / 1e6, training["peak_bytes"] / 1e6),
             "inference memory, MB": (found.inference_bytes() / 1e6, answering["peak_bytes"] / 1e6),
             "step, s": (found.step_s(train.batch_size), training["step_s"])}
    for row, (predicted, measured) in pairs.items():
        for column, value in zip(checks, (predicted, measured, 100 * predicted / measured), strict=True):
            checks[column][f"{name}: {row}"] = Figure(value)


# -- tables ------------------------------------------------------------------------------------------------------------


def show(cell: Figure | str, spread: bool = True) -> str:
    if isinstance(cell, str):
        return cell
    size = abs(cell.value)
    digits = 0 if size >= 100 or size == int(size) and not cell.spread else 1 if size >= 10 else 2 if size >= 0.1 else 4
    return f"{cell.value:,.{digits}f}" + (f" ±{cell.spread:.0%}" if spread and cell.spread else "")


def render(title: str, table: Table, spread: bool = True) -> str:
    """The table as text; spreads are left out where it would be wider than 100 columns."""
    names = list(dict.fromkeys(row for rows in table.values() for row in rows))
    first = min(max(map(len, names), default=0), 48)
    lines = [f"{name[:first]:<{first}}" for name in ("", *names)]
    for column, rows in table.items():
        cells = [column, *(show(rows.get(name, "-"), spread) for name in names)]
        width = max(map(len, cells))
        lines = [f"{line}  {cell:>{width}}" for line, cell in zip(lines, cells, strict=True)]
    if spread and max(map(len, lines)) > 100:
        return render(title, table, spread=False)
    return "\n".join(line.rstrip() for line in ("", f"== {title}", *lines) if line.strip() or not line)


def compare(tables: dict[str, Table], before: dict[str, Table]) -> Table:
    """What has changed. Within twice both spreads, or 3 %, it is noise."""
    found: Table = {"before": {}, "now": {}, "ratio": {}, "noise": {}, "verdict": {}}
    cells = ((title, column, row, cell) for title, table in tables.items() for column, rows in table.items()
             for row, cell in rows.items() if isinstance(cell, Figure))
    for title, column, row, cell in cells:
        old = before.get(title, {}).get(column, {}).get(row)
        unit = (column if "," in column else row).rpartition(", ")[2]
        more = unit.endswith("/s") or unit.startswith("%")
        if not isinstance(old, list) or not old[0] or not (more or unit in ("s", "ms", "MB", "h")):
            continue
        ratio, noise = cell.value / old[0], max(0.03, 2 * math.hypot(cell.spread, old[1]))
        verdict = "noise" if abs(ratio - 1) <= noise else "better" if (ratio > 1) == more else "worse"
        for name, value in zip(found, (Figure(*old), cell, Figure(ratio), f"±{noise:.0%}", verdict), strict=True):
            found[name][f"{column}: {row.strip()}".removeprefix(": ")] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
