"""Train a language model: `python train.py --config tiny` learns Chinese and English in minutes on a laptop's CPU."""

import time

STARTED = time.monotonic()  # before torch is imported: --minutes count from here

# ruff: noqa: E402
import argparse
import contextlib
import dataclasses
import functools
import json
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch

import minillm as m

DATA = Path(__file__).parent / "data"


@dataclass
class Command:
    """The flags of train.py itself; those of training, preferences and shape follow."""

    config: str = "tiny"  # preset of the model's shape: tiny, small, medium, large or moe
    stage: str = "pretrain"  # pretrain sft dpo reward ppo grpo; tokenizer; rlhf: sft, reward and ppo; eval; export
    data: list[str] | None = None  # .txt, .json, .jsonl(.gz) files or directories [MiniLLM's own data/train]
    val_data: list[str] | None = None  # the same, to validate on [data/val, or a tenth of --data]
    init: str | None = None  # run or Hugging Face directory to start from, score or export [the parent stage's run]
    reward: str | None = None  # what ppo and grpo maximise: answer, a reward model's RUN_DIR, FILE.py:function (runs)
    inspect: int | None = None  # show so many conversations as sft would train on them, train nothing
    plot: list[str] | None = None  # run directories: draw what they logged into a PNG, train nothing
    png: str = "plot.png"  # file that --plot draws
    out: str = "out"  # where runs and caches go
    resume: bool = False  # go on with the run in OUT/CONFIG/STAGE
    overwrite: bool = False  # replace the run in OUT/CONFIG/STAGE
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def build_parser() -> m.FlagParser:
    usage = "train.py [--config NAME] [--stage STAGE] [--data PATH ...] [any flag below]"
    parser = m.FlagParser(prog="train.py", description=__doc__, epilog="Runs land in OUT/CONFIG/STAGE.", usage=usage)
    m.add_flags(parser, Command(), "what to do")
    title = "training [defaults of --config tiny --stage pretrain; each stage has its own]"
    m.add_flags(parser, m.get_train_config("tiny"), title)
    m.add_flags(parser, m.get_rlhf_config("tiny"), "learning from preferences and rewards")
    fixed = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's, always
    m.add_flags(parser, m.get_config("tiny"), "shape of a new model [defaults of --config tiny]", skip=fixed)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, with Command's defaults, and the places that follow from them."""
    given = vars(build_parser().parse_args(argv))
    args = argparse.Namespace(**dataclasses.asdict(Command()) | given)
    m.get_config(args.config)
    stages = ("tokenizer", *m.STAGES, "rlhf", "eval", "export")
    if args.stage not in stages:
        raise m.UserError(f"--stage {args.stage} is unknown: choose from {', '.join(stages)}")
    args.is_config_given, args.argv = "config" in given, sys.argv[1:] if argv is None else argv
    args.runs, args.cache = Path(args.out) / args.config, Path(args.out) / "cache"
    return args


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line `argv`; `started` is the time.monotonic() from which --minutes count (default: now)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows ? and training goes on
    try:
        args = parse(argv)
        args.started = time.monotonic() if started is None else started
        with warnings.catch_warnings():
            warn_once = functools.cache(lambda text: print(f"train.py: warning: {text}", file=sys.stderr))
            warnings.showwarning = lambda message, *_, **__: warn_once(str(message))
            if args.plot:
                import sample

                return sample.plot(args.plot, Path(args.png))
            if args.inspect is not None:
                return inspect(args)
            stages = {"tokenizer": train_tokenizer, "rlhf": rlhf, "eval": evaluate, "export": export}
            return stages.get(args.stage, train)(args)
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


# -- what the flags say ------------------------------------------------------------------------------------------------


def data_sources(args, saved: dict | None = None) -> dict[str, m.Source]:
    """Return the sources of the flags, else those that a run has `saved`, else the example data."""
    if args.data is None and args.val_data is None and saved:
        return {part: m.Source(**source) for part, source in saved.items()}
    data, val = args.data or [DATA / "train"], args.val_data or ([DATA / "val"] if args.data is None else None)
    return {"train": m.Source(data, "all" if val else "train"), "val": m.Source(val or data, "all" if val else "val")}


def train_config(args, base: m.TrainConfig | None = None) -> m.TrainConfig:
    """Return the options of the preset (or `base`) with the user's; a limit of the user's replaces all others."""
    given = m.given_flags(args, m.TrainConfig)
    if "max_steps" in given or "minutes" in given:
        given = {"max_steps": 0, "minutes": 0.0} | given
        if not given["max_steps"] and not given["minutes"]:
            raise m.UserError("a run needs an end: give --max-steps or --minutes above 0")
    stage = args.stage if args.stage in m.STAGES else "pretrain"
    return dataclasses.replace(base or m.get_train_config(args.config, stage), **given)


def rlhf_config(args, base: m.RLHFConfig | None = None) -> m.RLHFConfig:
    return dataclasses.replace(base or m.get_rlhf_config(args.config), **m.given_flags(args, m.RLHFConfig))


def model_config(args) -> m.MiniGPTConfig:
    """Return the preset's shape with the user's values; what depends on a changed one takes its default again."""
    base, given = m.get_config(args.config), m.given_flags(args, m.MiniGPTConfig)
    if given.keys() & {"hidden_size", "num_attention_heads"}:
        base.head_dim = base.num_key_value_heads = None
    if "hidden_size" in given:
        base.intermediate_size = base.moe_intermediate_size = None
    if given.get("vocab_size", m.FIRST_MERGE) < m.FIRST_MERGE:
        raise m.UserError(f"--vocab-size {given['vocab_size']} is not possible: it must be {m.FIRST_MERGE} or more")
    return m.MiniGPTConfig(**dataclasses.asdict(base) | given)


def check_shape(args, shape: m.MiniGPTConfig) -> None:
    """Raise UserError if --config or a flag contradicts the shape of the weights."""
    expected = dataclasses.asdict(model_config(args)) if args.is_config_given else m.given_flags(args, m.MiniGPTConfig)
    pairs = [(name, value, getattr(shape, name)) for name, value in expected.items()]
    if wrong := [f"{name}={value} (there {theirs})" for name, value, theirs in pairs if value != theirs]:
        raise m.UserError(f"--config or its flags contradict the loaded model: {', '.join(wrong)}: leave them out")


def set_seq_len(config: m.TrainConfig, shape: m.MiniGPTConfig) -> None:
    config.seq_len = config.seq_len or shape.max_position_embeddings
    if config.seq_len > shape.max_position_embeddings:
        context = f"max_position_embeddings={shape.max_position_embeddings}"
        raise m.UserError(f"--seq-len {config.seq_len} exceeds the context, {context}")


def check_flags(args) -> None:
    if args.reward and args.stage not in ("ppo", "grpo"):
        raise m.UserError(f"--reward {args.reward} has no meaning in --stage {args.stage}: ppo and grpo take one")
    if args.resume and args.overwrite:
        raise m.UserError("--resume and --overwrite exclude each other")


def can_resume(run_dir: Path, args) -> bool:
    """Return whether there is a checkpoint to go on from; a run that must not be touched is an error."""
    if args.resume and not run_dir.is_dir():
        raise m.UserError(f"--resume: there is no run directory {run_dir}: start it without --resume")
    if m.holds_run(run_dir) and not args.resume and not args.overwrite:
        ways = "--resume to go on with it, --overwrite to replace it, or another --out"
        raise m.UserError(f"{run_dir} holds a run already: give {ways}")
    return args.resume and m.holds_run(run_dir)


# -- training ----------------------------------------------------------------------------------------------------------


def get_tokenizer(args, vocab_size: int) -> m.BPETokenizer:
    source, chosen, start = data_sources(args)["train"], args.runs / "tokenizer.json", time.monotonic()
    if args.stage != "tokenizer" and chosen.exists():
        tokenizer = m.BPETokenizer.load(chosen)
        if tokenizer.vocab_size > vocab_size:
            raise m.UserError(f"{chosen} has {tokenizer.vocab_size} tokens, more than --vocab-size {vocab_size}")
        print(f"tokenizer: {tokenizer.vocab_size} tokens, from {chosen}")
        return tokenizer
    manager, on_bad_record = m.TokenizerManager(args.cache), train_config(args).on_bad_record
    tokenizer = manager.get_or_train_tokenizer(source.paths, vocab_size, source.split, on_bad_record)
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {time.monotonic() - start:.1f} s")
    return tokenizer


def train_tokenizer(args) -> int:
    tokenizer, path = get_tokenizer(args, model_config(args).vocab_size), args.runs / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    text = "小模型也能训练。A small model can learn."
    print(f"{path}: {text!r} is {len(text.encode())} bytes and {len(tokenizer.encode(text))} tokens")
    return 0


def new_model(args, config: m.TrainConfig) -> tuple[m.MiniGPT, m.BPETokenizer]:
    shape = model_config(args)
    set_seq_len(config, shape)
    if config.lora_rank:
        raise m.UserError(f"--lora-rank {config.lora_rank} needs a trained model: give --init RUN_DIR")
    tokenizer = get_tokenizer(args, shape.vocab_size)
    torch.manual_seed(config.seed)
    return m.MiniGPT(shape), tokenizer


def find_parent(args, saved: dict, run_dir: Path) -> Path | None:
    """Return the run that a stage starts from; None is a new model."""
    stage = m.STAGES[args.stage].parent
    if args.init or saved.get("parent"):
        return Path(args.init or saved["parent"])
    if stage is None:
        return run_dir if saved else None  # a resumed pretraining takes its shape and tokenizer from itself
    parent = args.runs / stage
    if not (parent / "config.json").exists():
        ways = f"train it with --stage {stage}, or name another with --init"
        raise m.UserError(f"{args.stage} starts from {parent}, where there is no run: {ways}")
    return parent


def train(args) -> int:
    """Run one of m.STAGES: pretraining from a new model, another stage from its parent's run."""
    config, rl = train_config(args), rlhf_config(args)  # flags are checked before anything is loaded
    check_flags(args)
    device, run_dir, saved = m.pick_device(args.device), args.runs / args.stage, {}
    if is_resumed := can_resume(run_dir, args):
        saved = m.load_run(run_dir, which="last")[2]["config"]
        config = train_config(args, m.TrainConfig(**saved["train"]))
        rl = rlhf_config(args, m.RLHFConfig(**saved["rl"]) if saved.get("rl") else None)
    parent = find_parent(args, saved, run_dir)
    model, tokenizer = new_model(args, config) if parent is None else m.load_run(parent)[:2]
    if parent is not None:
        check_shape(args, model.config)
        set_seq_len(config, model.config)
    origin = {} if parent in (None, run_dir) else {"parent": str(parent.absolute())}
    reward = None
    if args.stage in ("ppo", "grpo"):
        name = args.reward or saved.get("reward") or ("answer" if args.stage == "grpo" else str(args.runs / "reward"))
        reward = m.load_reward(name, tokenizer)
        origin["reward"] = name if name == "answer" else str(Path(name).absolute())
    m.keep_freed_memory()
    sources = data_sources(args, saved.get("data"))
    options = {"run_dir": run_dir, "device": device, "cache_dir": args.cache, "started": args.started}
    trainer = m.make_trainer(args.stage, model, tokenizer, sources, config, rl, reward=reward, **options)
    trainer.origin = origin
    if "parent" in origin:
        print(f"{args.stage}: from {parent}" + (f", reward: {origin['reward']}" if reward else ""))
    if is_resumed:
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
        print(f"resuming {run_dir} at step {trainer.step_count}")
        before = {**saved["train"], **saved.get("rl", {})}
        now = dataclasses.asdict(config) | dataclasses.asdict(rl)
        changed = [f"{name} {before[name]} -> {now[name]}" for name in before if now.get(name) != before[name]]
        if changed:
            print(f"from here on: {', '.join(changed)}")
    return fit(args, trainer)


def fit(args, trainer: m.Trainer) -> int:
    """Train, and say how it went and what to do next."""
    config, run_dir, model, is_text = (
        trainer.config,
        trainer.run_dir,
        trainer.model,
        m.STAGES[trainer.stage].loader.kind == "text",
    )
    sizes = [len(loader.tokens if is_text else loader.items) for loader in (trainer.train_data, trainer.val_data)]
    print("data: {:,} {unit} to train on, {:,} to validate on".format(*sizes, unit="tokens" if is_text else "records"))
    limits = [f"{config.minutes:g} minutes", f"{config.max_steps} steps"]
    limits = " or ".join(text for text in limits if not text.startswith("0 "))
    details = f", {model.num_params(active=True) / 1e6:.1f} M active" if model.config.num_experts else ""
    if config.lora_rank:
        details += f", of which LoRA trains {sum(p.numel() for p in trainer.trained.parameters() if p.requires_grad):,}"
    where = f"on {trainer.device} in {str(trainer.dtype).removeprefix('torch.')}"
    print(f"model: {model.num_params() / 1e6:.2f} M parameters{details}; {limits} {where}", flush=True)
    with replacing(args, run_dir):
        result = trainer.fit()
    if "signal" in result and trainer.progress() < 1:
        saved = f"saved in {run_dir}\ngo on:  {command(args)} --resume" if trainer.step_count else "nothing to save yet"
        print(f"stopped at step {trainer.step_count}; {saved}")
        return 128 + result["signal"]
    held_out = f" on {result['bytes']:,} held-out bytes" if is_text else ""
    figures = m.describe(result, ("bpb",) if is_text else m.FIGURES)
    print(f"done: {figures}{held_out} after {trainer.elapsed_s():.0f} s; saved in {run_dir}")
    run = shlex.quote(str(run_dir))
    follow_up = {
        "pretrain": lambda: f"sample.py --run {run} --prompt {shlex.quote(trainer.prompts()[0])}",
        "reward": lambda: f"train.py --config {args.config} --out {shlex.quote(args.out)} --stage ppo",
    }
    print(f"next:  python {follow_up.get(trainer.stage, lambda: f'sample.py --run {run} --chat')()}")
    return 128 + result["signal"] if "signal" in result else 0


def command(args) -> str:
    words = [word for word in args.argv if word not in ("--resume", "--overwrite")]
    return " ".join(["python train.py", *map(shlex.quote, words)])


@contextlib.contextmanager
def replacing(args, *run_dirs: Path):
    """With --overwrite, move the old runs aside; they come back unless a new one with a checkpoint takes their place.

    Of several, those that were not reached stay aside: beside new parents they would pass for finished.
    """
    aside = {}
    try:
        for run_dir in run_dirs if args.overwrite else ():
            if run_dir.exists():
                with m.locked(run_dir):  # unless somebody trains in it
                    pass
                aside[run_dir] = run_dir.rename(run_dir.with_name(f"{run_dir.name}.old-{time.time_ns()}"))
        yield
    finally:
        some_new = any(map(m.holds_run, aside))
        for run_dir, old in aside.items():
            if m.holds_run(run_dir):
                shutil.rmtree(old)
            elif some_new:
                print(f"not replaced yet: the old {run_dir} is in {old}")
            else:
                shutil.rmtree(run_dir, ignore_errors=True)
                old.rename(run_dir)


def rlhf(args) -> int:
    """SFT, reward model and PPO, one after the other, after pretraining if there is no base model; resumable."""
    base, rl, device = Path(args.init or args.runs / "pretrain"), rlhf_config(args), m.pick_device(args.device)
    check_flags(args)
    stages = m.RLHFPipeline.stages
    configs = {stage: train_config(argparse.Namespace(**vars(args) | {"stage": stage})) for stage in stages}
    for source in data_sources(args).values():
        if lacking := {"chat", "preference"} - m.kinds_of(source.paths).keys():
            problem = (
                f"no {' and no '.join(sorted(lacking))} records: --stage rlhf takes conversations, pairs and prompts"
            )
            raise m.UserError(f"{', '.join(map(str, source.paths))}: {problem}")
    if not args.init and not m.RLHFPipeline.is_finished(base):
        print(f"== pretrain: {base}")
        changes = {"stage": "pretrain", "resume": m.holds_run(base), "overwrite": False}
        if status := train(argparse.Namespace(**vars(args) | changes)):
            return status
    shape = m.MiniGPTConfig(**m.run_config(base)["model"])
    check_shape(args, shape)
    for config in configs.values():
        set_seq_len(config, shape)
    m.keep_freed_memory()
    pipeline = m.RLHFPipeline(rl, base, args.runs, data_sources(args), configs, device=device, cache_dir=args.cache)
    with replacing(args, *(args.runs / stage for stage in pipeline.stages)):
        rows = pipeline.run()
    if "signal" in rows[-1]:
        print(f"stopped; what is done is saved\ngo on:  {command(args)}")
        return 128 + rows[-1]["signal"]
    run = shlex.quote(str(args.runs / "ppo"))
    print(f"\n{table(rows, pipeline.prompt)}\n\nnext:  python sample.py --run {run} --chat")
    return 0


def table(rows: list[dict], prompt: str) -> str:
    """Return the pipeline's rows in 100 columns."""
    lines = [f"{'stage':<9}{'seconds':>8}  {'held-out metric':<16}{'before':>8}{'after':>8}  reply to: {prompt}"]
    for row in rows:
        form = "{:.1%}" if row["metric"] in ("exact match", "pair accuracy") else "{:.4f}"
        before, after = ("" if value is None else form.format(value) for value in (row["before"], row["after"]))
        reply = " ".join(row["reply"].split())
        lines.append(f"{row['stage']:<9}{row['seconds']:>8.0f}  {row['metric']:<16}{before:>8}{after:>8}  {reply}")
    return "\n".join((line if len(line) <= 100 else line[:99] + "…").rstrip() for line in lines)


# -- what does not train -----------------------------------------------------------------------------------------------


def evaluate(args) -> int:
    """Score a run on --val-data, else on the validation part of --data or of its own data; the last line is JSON."""
    if not args.init:
        raise m.UserError(f"--stage eval scores a run: name its directory, for example --init {args.runs}/pretrain")
    m.keep_freed_memory()
    model, tokenizer, state = m.load_run(args.init)
    check_shape(args, model.config)
    saved = state["config"]
    config = train_config(args, m.TrainConfig(**saved["train"] | {"lora_rank": 0}))  # LoRA is merged already
    set_seq_len(config, model.config)
    if not hasattr(args, "eval_prompts"):
        config.eval_prompts = sys.maxsize
    source = data_sources(args, saved["data"])["val"]
    kinds, own = m.kinds_of(source.paths), m.STAGES[saved["stage"]].loader.kind
    kind = own if own in kinds or saved["stage"] == "reward" else next(iter(kinds), "text")
    stage = {"text": "pretrain", "chat": "sft", "preference": "dpo", "prompt": "ppo"}[kind]
    stage = "reward" if saved["stage"] == "reward" else stage
    options = {"device": m.pick_device(args.device), "cache_dir": args.cache}
    if stage == "dpo" and saved["stage"] == "dpo":
        options["reference"] = m.load_run(saved["parent"])[0]
    paths = ", ".join(map(str, source.paths))
    print(f"{args.init} at step {state['step']} on {kind} records of {paths} ({source.split})")
    if stage == "ppo":
        trainer = m.make_trainer("sft", model, tokenizer, {}, config, **options)
        trainer.val_data = m.make_loader("ppo", tokenizer, model.config, config, source, False, args.cache)
        result = trainer.exact_match()
    else:
        trainer = m.make_trainer(stage, model, tokenizer, {"val": source}, config, **options)
        if stage == "dpo" and "reference" not in options:  # the model's own preference, beside no reference
            trainer.val_data.reference_logprobs = torch.zeros_like(trainer.val_data.reference_logprobs)
        result = trainer.evaluate(vars(args).get("eval_tokens"))
    if not result:
        raise m.UserError(f'{paths}: prompts without any "answer" cannot be scored')
    print(json.dumps(result))
    return 0


def export(args) -> int:
    """Write a run as a directory that transformers read."""
    run_dir, folder = Path(args.init or m.newest_run(args.out)), args.runs / "export"
    if folder.exists() and not args.overwrite:
        raise m.UserError(f"{folder} exists: give --overwrite to replace what is in it, or another --out")
    model, tokenizer, _ = m.load_run(run_dir)
    check_shape(args, model.config)
    model.save_pretrained(folder, tokenizer)
    print(f"{run_dir} is now in {folder}, for AutoModelForCausalLM and AutoTokenizer.from_pretrained({str(folder)!r})")
    return 0


def inspect(args) -> int:
    """Show conversations as the model will see them, what is trained in green (or «…»), and all lengths."""
    parent, config = Path(args.init or args.runs / "pretrain"), train_config(args)
    if args.stage != "sft" or args.inspect < 1:
        problem = "is not possible: it shows 1 or more of what --stage sft would train on"
        raise m.UserError(f"--inspect {args.inspect} --stage {args.stage} {problem}")
    if (parent / "config.json").exists():
        model, tokenizer, _ = m.load_run(parent)
        shape = model.config
    else:
        shape = model_config(args)
        tokenizer = get_tokenizer(args, shape.vocab_size)
    set_seq_len(config, shape)
    data = m.make_loader("sft", tokenizer, shape, config, data_sources(args)["train"], False, args.cache)
    import sample

    sample.show_conversations(data, args.inspect)
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
