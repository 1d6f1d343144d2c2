"""Train a language model: `python train.py --config tiny` learns Chinese and English in minutes on a laptop's CPU."""
import time

STARTED = time.monotonic()  # before torch is imported: --minutes count from here

import dataclasses  # noqa: E402
import json  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import minillm as m  # noqa: E402

STAGES = ("tokenizer", "pretrain", "eval")
DATA = Path(__file__).parent / "data"


def build_parser() -> m.FlagParser:
    parser = m.FlagParser(prog="train.py", description=__doc__, epilog="Runs land in OUT/CONFIG/STAGE.",
                          usage="train.py [--config NAME] [--stage STAGE] [--data PATH ...] [any flag below]")
    parser.add_argument("--config", choices=m.PRESETS, help="preset of the model's shape [tiny]")
    parser.add_argument("--stage", choices=STAGES, default="pretrain", help="what to do [pretrain]; eval scores a run")
    parser.add_argument("--data", nargs="+", metavar="PATH",
                        help=".txt, .json, .jsonl(.gz) files or directories [the data/train that comes with MiniLLM]")
    parser.add_argument("--val-data", nargs="+", metavar="PATH", help="to validate on [data/val, or a tenth of --data]")
    parser.add_argument("--init", metavar="RUN_DIR", help="run whose weights and tokenizer to start from, or to score")
    parser.add_argument("--out", default="out", metavar="DIR", help="where runs and caches go [out]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT/CONFIG/STAGE")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUT/CONFIG/STAGE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of --config tiny]")
    m.add_flags(parser, m.get_config("tiny"), "shape of a new model [defaults of --config tiny]",
                skip=("bos_token_id", "eos_token_id", "pad_token_id"))  # the tokenizer's, always
    return parser


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line `argv`; `started` is the time.monotonic() from which --minutes count (default: now)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows ? and training goes on
    try:
        args = build_parser().parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else argv
        args.started = time.monotonic() if started is None else started
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"train.py: warning: {message}", file=sys.stderr)
            return {"tokenizer": train_tokenizer, "pretrain": pretrain, "eval": evaluate}[args.stage](args)
    except KeyboardInterrupt:
        print("\ninterrupted: what was not saved yet is lost", file=sys.stderr)
        return 130
    except BrokenPipeError:
        m.silence_stdout()
        return 0
    except (m.UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not m.is_out_of_memory(error):
            raise
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


def data_paths(args) -> tuple[list, list | None]:
    """Training paths, and validation paths or None: then validation is a tenth of the training data."""
    if args.data is None:
        return [DATA / "train"], args.val_data or [DATA / "val"]
    return args.data, args.val_data


def get_tokenizer(args, vocab_size: int) -> m.BPETokenizer:
    data, val = data_paths(args)
    chosen = Path(args.out) / (args.config or "tiny") / "tokenizer.json"
    if args.stage != "tokenizer" and chosen.exists():
        tokenizer = m.BPETokenizer.load(chosen)
        if tokenizer.vocab_size > vocab_size:
            raise m.UserError(f"{chosen} has {tokenizer.vocab_size} tokens, more than --vocab-size {vocab_size}")
        print(f"tokenizer: {tokenizer.vocab_size} tokens, from {chosen}")
        return tokenizer
    start = time.monotonic()
    tokenizer = m.TokenizerManager(Path(args.out) / "cache").get_or_train_tokenizer(
        data, vocab_size, split="all" if val else "train", on_bad_record=train_config(args).on_bad_record)
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {time.monotonic() - start:.1f} s")
    return tokenizer


def train_config(args, base: m.TrainConfig | None = None) -> m.TrainConfig:
    """The preset's (or base's) options with the user's in their place; a limit of the user's replaces the preset's."""
    given = m.given_flags(args, m.TrainConfig)
    if "max_steps" in given or "minutes" in given:
        given = {"max_steps": 0, "minutes": 0.0} | given
        if not given["max_steps"] and not given["minutes"]:
            raise m.UserError("a run needs an end: give --max-steps or --minutes above 0")
    return dataclasses.replace(base or m.get_train_config(args.config or "tiny"), **given)


def model_config(args) -> m.MiniGPTConfig:
    """The preset's shape with the user's values in their place; what depends on a changed one is worked out anew."""
    base, given = m.get_config(args.config or "tiny"), m.given_flags(args, m.MiniGPTConfig)
    if given.keys() & {"hidden_size", "num_attention_heads"}:
        base.head_dim = base.num_key_value_heads = None
    if "hidden_size" in given:
        base.intermediate_size = base.moe_intermediate_size = None
    if given.get("vocab_size", m.FIRST_MERGE) < m.FIRST_MERGE:
        raise m.UserError(f"--vocab-size {given['vocab_size']} is not possible: bytes and special tokens alone are "
                          f"{m.FIRST_MERGE}")
    return m.MiniGPTConfig(**dataclasses.asdict(base) | given)


def train_tokenizer(args) -> int:
    tokenizer = get_tokenizer(args, model_config(args).vocab_size)
    path = Path(args.out) / (args.config or "tiny") / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    text = "小模型也能训练。A small model can learn."
    print(f"{path}: {text!r} is {len(text.encode())} bytes and {len(tokenizer.encode(text))} tokens")
    return 0


def can_resume(run_dir: Path, args) -> bool:
    """Whether there is a checkpoint to go on from; what may not be touched is an error. Changes nothing."""
    holds_run = any((run_dir / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt"))
    if args.resume and args.overwrite:
        raise m.UserError("--resume and --overwrite exclude each other")
    if args.resume and not run_dir.is_dir():
        raise m.UserError(f"--resume: there is no run directory {run_dir}: start it without --resume")
    if holds_run and not args.resume and not args.overwrite:
        raise m.UserError(f"{run_dir} holds a run already: give --resume to go on with it, --overwrite to replace it, "
                          "or another --out")
    return args.resume and holds_run


def check_shape(args, shape: m.MiniGPTConfig) -> None:
    """The shape comes from the weights: a --config or a flag that contradicts it is an error."""
    wanted = dataclasses.asdict(model_config(args)) if args.config else m.given_flags(args, m.MiniGPTConfig)
    wrong = [f"{k}={v} (there {getattr(shape, k)})" for k, v in wanted.items() if v != getattr(shape, k)]
    if wrong:
        raise m.UserError(f"--config or its flags contradict the loaded model: {', '.join(wrong)}: leave them out")


def command(args) -> str:
    words = [word for word in args.argv if word not in ("--resume", "--overwrite")]
    return " ".join(["python train.py", *map(shlex.quote, words)])


def pretrain(args) -> int:
    train, device = train_config(args), m.pick_device(args.device)
    run_dir = Path(args.out) / (args.config or "tiny") / "pretrain"
    saved = None
    if resuming := can_resume(run_dir, args):
        model, tokenizer, state = m.load_run(run_dir)
        train, saved = train_config(args, m.TrainConfig(**state["config"]["train"])), state["config"]["data"]
        check_shape(args, model.config)
    elif args.init:
        model, tokenizer, _ = m.load_run(args.init)
        check_shape(args, model.config)
    else:
        config = model_config(args)
        check_seq_len(train, config)
        tokenizer = get_tokenizer(args, config.vocab_size)
        m.torch.manual_seed(train.seed)
        model = m.MiniGPT(config)
    m.torch.manual_seed(train.seed)
    check_seq_len(train, model.config)
    train_data, val_data = (load_data(args, part, tokenizer, train, saved) for part in ("train", "val"))
    print(f"data: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} to validate on")
    m.keep_freed_memory()  # from here on; what the tokenizer and the encoder took goes back first
    trainer = m.PreTrainer(model, tokenizer, device, config=train, train_data=train_data, val_data=val_data,
                           run_dir=run_dir, started=args.started)
    if resuming:
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
        print(f"resuming {run_dir} at step {trainer.step_count}")
    active = f", {model.num_params(active=True) / 1e6:.1f} M active" if model.config.num_experts else ""
    limits = [f"{train.minutes:g} minutes"] * bool(train.minutes) + [f"{train.max_steps} steps"] * bool(train.max_steps)
    print(f"model: {model.num_params() / 1e6:.2f} M parameters{active}; {' or '.join(limits)} on {device} in "
          f"{str(trainer.dtype).removeprefix('torch.')}", flush=True)
    if args.overwrite and run_dir.exists():  # not before all that can go wrong has gone well
        shutil.rmtree(run_dir)
    result = trainer.fit()
    if "signal" in result:
        print(f"stopped at step {trainer.step_count}; saved in {run_dir}\ngo on:  {command(args)} --resume")
        return 128 + result["signal"]
    print(f"done: {result['bpb']:.4f} bits per byte on {result['bytes']:,} held-out bytes after "
          f"{trainer.elapsed_s():.0f} s; saved in {run_dir}")
    print(f"next:  python sample.py --run {shlex.quote(str(run_dir))} --prompt {shlex.quote(trainer.prompts()[0])}")
    return 0


def check_seq_len(train: m.TrainConfig, shape: m.MiniGPTConfig) -> None:
    train.seq_len = train.seq_len or shape.max_position_embeddings
    if train.seq_len > shape.max_position_embeddings:
        raise m.UserError(f"--seq-len {train.seq_len} exceeds the context, max_position_embeddings="
                          f"{shape.max_position_embeddings}")


def load_data(args, part: str, tokenizer: m.BPETokenizer, train: m.TrainConfig, saved: dict | None = None
              ) -> m.PretrainDataLoader:
    """The "train" or "val" batches of the flags' data; without such flags, those that a run has `saved`."""
    data, val = data_paths(args)
    source = {"paths": val if val and part == "val" else data, "split": "all" if val else part}
    if saved and part in saved and args.data is None and args.val_data is None:
        source = saved[part]
    return m.PretrainDataLoader(
        source["paths"], tokenizer, train.batch_size, train.seq_len, source["split"], shuffle=part == "train",
        seed=train.seed, cache_dir=Path(args.out) / "cache", on_bad_record=train.on_bad_record)


def evaluate(args) -> int:
    """Score a run on --val-data, else on the validation part of --data or of its own data; the last line is JSON."""
    m.keep_freed_memory()
    if not args.init:
        raise m.UserError("--stage eval scores a run: name its directory with --init, for example "
                          f"--init {args.out}/{args.config or 'tiny'}/pretrain")
    model, tokenizer, state = m.load_run(args.init)
    check_shape(args, model.config)
    train = train_config(args, m.TrainConfig(**state["config"]["train"]))
    check_seq_len(train, model.config)
    val_data = load_data(args, "val", tokenizer, train, state["config"]["data"])
    trainer = m.PreTrainer(model, tokenizer, m.pick_device(args.device), config=train, val_data=val_data)
    print(f"{args.init} at step {state['step']} on {', '.join(map(str, val_data.source['paths']))} "
          f"({val_data.source['split']})")
    print(json.dumps(trainer.evaluate(vars(args).get("eval_tokens"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
