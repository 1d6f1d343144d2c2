"""Train a language model: `python train.py --config tiny` learns Chinese and English in minutes on a laptop's CPU."""

import time

STARTED = time.monotonic()  # before torch is imported: --minutes count from here

# ruff: noqa: E402
import argparse
import dataclasses
import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Literal

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch

import minillm as m
import sample


@dataclasses.dataclass
class Command:
    """The flags of train.py itself; those of training, preferences and shape follow."""

    config: str = "tiny"  # preset of the model's shape: tiny, small, medium, large or moe
    stage: str = "pretrain"  # pretrain sft dpo reward ppo grpo; tokenizer; rlhf: sft, reward and ppo; eval; export
    data: list[str] | None = None  # .txt, .json, .jsonl(.gz), .parquet files or directories [MiniLLM's own data/train]
    val_data: list[str] | None = None  # the same, to validate on [data/val, or a tenth of --data]
    init: str | None = None  # run or Hugging Face directory to start from, score or export [the parent stage's run]
    checkpoint: Literal["best", "last"] = "best"  # weights of --init and parents: of the best evaluation, or the last
    reward: str | None = None  # PPO, GRPO: what they maximise: answer, a reward model's RUN_DIR, or FILE.py:function
    inspect: int | None = None  # show so many records as the stage would train on them, train nothing
    plot: list[str] | None = None  # run directories: draw what they logged into a PNG, train nothing
    png: str = "plot.png"  # file that --plot draws
    out: str = "out"  # where runs and caches go
    format: list[Literal["hf", "gguf"]] | None = None  # hf (transformers), gguf (llama.cpp) [both if possible]
    resume: bool = False  # go on with the run in OUT/CONFIG/STAGE
    overwrite: bool = False  # replace the run in OUT/CONFIG/STAGE
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def build_parser() -> m.FlagParser:
    usage = "train.py [--config NAME] [--stage STAGE] [--data PATH ...] [any flag below]"
    parser = m.FlagParser(prog="train.py", description=__doc__, epilog="Runs land in OUT/CONFIG/STAGE.", usage=usage)
    m.add_flags(parser, Command(), "what to do")
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of tiny's pretraining; each stage has its own]")
    m.add_flags(parser, m.get_rlhf_config("tiny"), "learning from preferences and rewards")
    fixed = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's, always
    m.add_flags(parser, m.get_config("tiny"), "shape of a new model [defaults of tiny]", skip=fixed)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, with Command's defaults, and the places that follow from them."""
    given = vars(build_parser().parse_args(argv))
    args = argparse.Namespace(**dataclasses.asdict(Command()) | given)
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--resume", "--overwrite")]
    program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if m.WORLD.size > 1 else ["python"]
    args.given, args.command = given, shlex.join([*program, "train.py", *words])
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # --max-restarts: what has begun goes on
    check_flags(args)
    args.imported = m.run_config(args.init).get("imported") if args.init else None  # the name of a foreign model
    name = args.config if "config" in given else args.imported or args.config
    args.runs, args.cache = Path(args.out) / name, Path(args.out) / "cache"
    return args


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line `argv`; `started` is the time.monotonic() from which --minutes count (default: now)."""
    with sample.user_errors("train.py") as ended:
        m.WORLD.start()
        args = parse(argv)
        m.keep_freed_memory()
        args.started, args.device = started or time.monotonic(), m.pick_device(args.device)
        stages = {"tokenizer": train_tokenizer, "rlhf": rlhf, "eval": evaluate, "export": export}
        run = stages.get(args.stage, train) if args.inspect is None else inspect
        return sample.plot(args.plot, Path(args.png)) if args.plot else run(args)
    return ended[0]


# -- what the flags say ------------------------------------------------------------------------------------------------


def check_flags(args) -> None:
    """Raise UserError for flags that contradict each other, or have no effect."""
    if m.WORLD.size > 1 and (args.plot or args.inspect is not None or args.stage in ("tokenizer", "export")):
        raise m.UserError("this runs on one process: start it with python, not torchrun")
    mode = "--plot" if args.plot else "--inspect" if args.inspect is not None else f"--stage {args.stage}"
    stages = ("tokenizer", *m.STAGES, "rlhf", "eval", "export")
    if args.stage not in stages:
        raise m.UserError(f"--stage {args.stage} is unknown: choose from {', '.join(stages)}")
    if mode == "--inspect" and (args.stage not in m.STAGES or args.inspect < 1):
        raise m.UserError(f"--inspect {args.inspect} is not possible: it shows 1 or more records of one training stage")
    if args.resume and args.overwrite:
        raise m.UserError("--resume and --overwrite exclude each other")
    if args.overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):  # later it cannot tell old from new
        raise m.UserError("--overwrite and torchrun --max-restarts exclude each other: remove the old run, or move it")
    if name := next((name for name in ("reward", "checkpoint") if name in args.given and args.stage == "rlhf"), None):
        raise m.UserError(f"--{name} has no effect in --stage rlhf: its stages take the best of each other's runs")
    shape = (m.MiniGPTConfig,) if mode in ("--stage tokenizer", "--plot") else ()  # elsewhere it is compared
    parts = ("pretrain", *m.RLHFPipeline.stages) if args.stage == "rlhf" else (args.stage,)
    for place in {mode, f"--stage {args.stage}"} if mode == "--inspect" else {mode}:
        m.check_use(place, parts, args.given, (Command, m.TrainConfig, m.RLHFConfig, *shape))
    m.check_needs(args.given, args)


def data_sources(args, saved: dict | None = None) -> m.Sources:
    """Return the sources of the flags, else those that a run has `saved`, else the example data."""
    if args.data is None and args.val_data is None and saved:
        return {part: m.Source(**source) for part, source in saved.items()}
    ours = Path(__file__).parent / "data"
    data, val = args.data or [ours / "train"], args.val_data or ([ours / "val"] if args.data is None else None)
    files, val_files = ({file.resolve() for file in m.data_files(paths or [])} for paths in (data, val))
    if both := sorted(files & val_files):
        warnings.warn(f"{both[0]} is in --data and in --val-data: a model is scored on what it learns", stacklevel=1)
    return {"train": m.Source(data, "all" if val else "train"), "val": m.Source(val or data, "all" if val else "val")}


def train_config(args, base: m.TrainConfig | None = None) -> m.TrainConfig:
    """Return the options of the preset (or `base`) with the user's; a limit of the user's replaces all others."""
    given, stage = m.given_flags(args, m.TrainConfig), args.stage if args.stage in m.STAGES else "pretrain"
    limits = {name: given.get(name, 0) for name in ("max_steps", "epochs", "minutes")}
    if limits.keys() & given:
        given |= limits
        if not any(limits.values()):
            raise m.UserError("a run needs an end: give --max-steps, --epochs or --minutes above 0")
    elif args.data and base is None and m.STAGES[stage].epochs:  # a preset's steps fit the example data only
        given |= limits | {"epochs": m.STAGES[stage].epochs}
    return dataclasses.replace(base or m.get_train_config(args.config, stage), **given)


def imported_config(args, model: m.MiniGPT, tokenizer: m.BPETokenizer, sources: m.Sources) -> m.TrainConfig:
    """Return the options for a model from elsewhere; a row has the longest record's length, or what memory allows."""
    config = train_config(args, m.get_imported_config(args.stage, model, "lora_rank" in args.given))
    limit = 512 if args.device.type == "cpu" else 2048  # 8 rows of 512 tokens in 135 M parameters take 6 GB
    if config.seq_len is None and m.STAGES[args.stage].loader.kind != "text":
        data = m.make_loaders(args.stage, tokenizer, model.config, config, sources, args.cache)["train_data"]
        limit = min(limit, max(data.lengths) + (config.reply_tokens if data.kind == "prompt" else 0))
    config.seq_len = config.seq_len or min(limit, model.config.max_position_embeddings)
    return config


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
    expected = dataclasses.asdict(model_config(args)) if "config" in args.given else m.given_flags(args, type(shape))
    pairs = [(name, value, getattr(shape, name)) for name, value in expected.items()]
    if wrong := [f"{name}={value} (there {theirs})" for name, value, theirs in pairs if value != theirs]:
        raise m.UserError(f"--config or its flags contradict the loaded model: {', '.join(wrong)}: leave them out")


def complete(args, config: m.TrainConfig, shape: m.MiniGPTConfig, seq_len: int | None = None) -> None:
    """Fill in the length of rows [`seq_len`, or the context], and check it."""
    check_shape(args, shape)
    config.seq_len = config.seq_len or seq_len or shape.max_position_embeddings
    m.check_stage(args.stage, config, shape)


# -- training ----------------------------------------------------------------------------------------------------------


def get_tokenizer(args) -> m.BPETokenizer:
    """Return the tokenizer of --stage tokenizer, or train one."""
    chosen, size, start = args.runs / "tokenizer.json", model_config(args).vocab_size, time.monotonic()
    if args.stage != "tokenizer" and chosen.exists():
        tokenizer, how = m.BPETokenizer.load(chosen), f"from {chosen}"
        if tokenizer.vocab_size > size:
            raise m.UserError(f"{chosen} has {tokenizer.vocab_size} tokens, more than --vocab-size {size}")
    else:
        manager, source = m.TokenizerManager(args.cache), data_sources(args)["train"]
        tokenizer = manager.get_or_train_tokenizer(source.paths, size, source.split, train_config(args).on_bad_record)
        how = f"{time.monotonic() - start:.1f} s"
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {how}")
    return tokenizer


def train_tokenizer(args) -> int:
    tokenizer, path = get_tokenizer(args), args.runs / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    print(f"{path}: {(text := '小模型也能训练。A small model can learn.')!r} is {len(tokenizer.encode(text))} tokens")
    return 0


def new_model(args, config: m.TrainConfig) -> tuple[m.MiniGPT, m.BPETokenizer, dict]:
    shape = model_config(args)
    complete(args, config, shape)
    if config.lora_rank:
        raise m.UserError(f"--lora-rank {config.lora_rank} needs a trained model: give --init RUN_DIR")
    tokenizer = get_tokenizer(args)
    torch.manual_seed(config.seed)
    return m.MiniGPT(shape), tokenizer, {"step": 0}


def find_parent(args, saved: dict, run_dir: Path) -> Path | None:
    """Return the run that a stage starts from; None is a new model."""
    stage, named = m.STAGES[args.stage].parent, args.init or saved.get("parent")
    if stage is None and not named:
        return run_dir if saved else None  # a resumed pretraining takes its shape and tokenizer from itself
    parent = Path(named or args.runs / stage)
    if not named and not (parent / "config.json").exists():
        raise m.UserError(f"no run in {parent} to start from: train it with --stage {stage}, or give --init")
    return parent


def train(args) -> int:
    """Run one of m.STAGES: pretraining from a new model, another stage from its parent's run."""
    config, rl = train_config(args), rlhf_config(args)  # flags are checked before anything is loaded
    run_dir, saved, options = args.runs / args.stage, {}, {}
    if args.given.get("resume") and not run_dir.is_dir():  # after --max-restarts it may not have begun
        raise m.UserError(f"--resume: there is no run directory {run_dir}: start it without --resume")
    if m.holds_run(run_dir) and args.resume:
        saved = m.load_run(run_dir, which="last")[2]["config"]
        config, rl = train_config(args, m.TrainConfig(**saved["train"])), rlhf_config(args, m.RLHFConfig(**saved["rl"]))
    elif m.holds_run(run_dir) and not args.overwrite:
        raise m.UserError(f"{run_dir} holds a run already: give --resume to go on, --overwrite, or another --out")
    # 1 data and model
    sources = data_sources(args, saved.get("data"))
    parent, which = find_parent(args, saved, run_dir), args.given.get("checkpoint") or saved.get("checkpoint", "best")
    model, tokenizer, state = new_model(args, config) if parent is None else m.load_run(parent, which=which)
    if args.imported and not saved:
        config = imported_config(args, model, tokenizer, sources)
    complete(args, config, model.config)
    m.check_needs(args.given, config, model.config)
    # 2 where it comes from, and what RL maximises
    origin = {} if parent in (None, run_dir) else {"parent": str(parent.absolute()), "checkpoint": which}
    origin |= {"imported": args.imported} if args.imported else {}
    if m.STAGES[args.stage].loader.kind == "prompt":
        name = args.reward or saved.get("reward") or ("answer" if args.stage == "grpo" else str(args.runs / "reward"))
        if not args.reward and m.is_code(name):  # whoever can write a checkpoint must not run code here
            raise m.UserError(f"--resume: this run names {name}, which is code: name it with --reward")
        options["reward"] = m.load_reward(name, tokenizer)
        origin["reward"] = name if name == "answer" else str(Path(name).absolute())
    # 3 the trainer
    options |= {"run_dir": run_dir, "device": args.device, "cache_dir": args.cache, "started": args.started}
    trainer = m.make_trainer(args.stage, model, tokenizer, sources, config, rl, **options)
    trainer.origin = origin
    if "parent" in origin:
        reward = f", reward: {origin['reward']}" if "reward" in origin else ""
        print(f"{args.stage}: from {parent} at step {state['step']}{reward}")
    if saved:
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
        changed = m.changed_options(saved, trainer.config_dict())
        print(f"resuming {run_dir} at step {trainer.step_count}" + f"; from here on: {changed}" * bool(changed))
    return fit(args, trainer)


def fit(args, trainer: m.Trainer) -> int:
    """Train, and say how it went and what to do next."""
    sample.show_run(trainer, args.imported)
    with m.replacing(args.overwrite, run_dir := trainer.run_dir):
        result = trainer.fit()
    if "signal" in result and trainer.progress() < 1:
        saved = f"saved in {run_dir}\ngo on:  {args.command} --resume" if trainer.step_count else "nothing to save yet"
        print(f"stopped at step {trainer.step_count}; {saved}")
        return 128 + result["signal"]
    sample.show_end(trainer, result)
    following = ["sample.py", "--run", str(run_dir)]
    following += ["--prompt", trainer.prompts()[0]] if trainer.stage == "pretrain" else ["--chat"]
    if trainer.stage == "reward":  # with the flags that place it, as the user gave them
        following = ["train.py", "--stage", "ppo"]
        for name in [name for name in ("config", "init", "data", "val_data", "out") if name in args.given]:
            value = args.given[name]
            following += [m.flag_of(name), *([value] if isinstance(value, str) else value)]
    print(f"next:  python {shlex.join(following)}")
    return 128 + result["signal"] if "signal" in result else 0


def rlhf(args) -> int:
    """SFT, reward model and PPO, one after the other, after pretraining if there is no base model; resumable."""
    base, rl, sources = Path(args.init or args.runs / "pretrain"), rlhf_config(args), data_sources(args)
    stages = {stage: argparse.Namespace(**vars(args) | {"stage": stage}) for stage in m.RLHFPipeline.stages}
    configs = {stage: train_config(its_args) for stage, its_args in stages.items()}
    for source in sources.values():
        if lacking := {"chat", "preference"} - m.kinds_of(source.paths).keys():
            paths, kinds = ", ".join(map(str, source.paths)), " and no ".join(sorted(lacking))
            raise m.UserError(f"{paths}: no {kinds} records: --stage rlhf takes conversations and pairs")
    if not args.init and not m.RLHFPipeline.is_finished(base):
        print(f"== pretrain: {base}")
        changes = {"stage": "pretrain", "resume": m.holds_run(base), "overwrite": False}
        if status := train(argparse.Namespace(**vars(args) | changes)):
            return status
    pipeline = m.RLHFPipeline(rl, base, args.runs, sources, configs, device=args.device, cache_dir=args.cache)
    model, tokenizer, _ = m.load_run(base)
    for stage, its_args in stages.items():
        if args.imported:
            pipeline.train[stage] = imported_config(its_args, model, tokenizer, pipeline.sources_of(stage))
        complete(its_args, pipeline.train[stage], model.config)
    m.check_needs(args.given, *pipeline.train.values(), model.config)
    with m.replacing(args.overwrite, *(args.runs / stage for stage in stages)):
        rows = pipeline.run()
    if "signal" in rows[-1]:
        print(f"stopped; what is done is saved\ngo on:  {args.command}")
        return 128 + rows[-1]["signal"]
    run = shlex.quote(str(args.runs / "ppo"))
    print(f"\n{sample.table(rows, pipeline.prompt)}\n\nnext:  python sample.py --run {run} --chat")
    return 0


# -- what does not train -----------------------------------------------------------------------------------------------


def evaluate(args) -> int:
    """Score a run on --val-data, else on the validation part of --data or of its own data; the last line is JSON."""
    if not args.init:
        raise m.UserError(f"--stage eval scores a run: name its directory, for example --init {args.runs}/pretrain")
    model, tokenizer, state = m.load_run(args.init, which=args.checkpoint)
    saved = state["config"]
    changes = {"lora_rank": 0, "eval_prompts": sys.maxsize}  # LoRA is merged already; all prompts
    config = train_config(args, m.TrainConfig(**saved["train"] | changes))
    complete(args, config, model.config, min(1024, model.config.max_position_embeddings))
    source = data_sources(args, saved["data"])["val"]
    kinds, stage = m.kinds_of(source.paths), saved["stage"]
    if m.STAGES[stage].loader.kind not in kinds and stage != "reward":
        stage = {"text": "pretrain", "chat": "sft", "preference": "dpo"}.get(next(iter(kinds), "text"), "ppo")
    paths, kind = ", ".join(map(str, source.paths)), m.STAGES[stage].loader.kind
    print(f"{args.init} at step {state['step']} on {kind} records of {paths} ({source.split})")
    options = {"rl": m.RLHFConfig(**saved.get("rl", {})), "device": args.device, "cache_dir": args.cache}
    if kind == "prompt":
        data = m.make_loaders(stage, tokenizer, model.config, config, {"val": source}, args.cache)
        result = m.make_trainer("sft", model, tokenizer, {}, config, **options, **data).exact_match()
    else:
        if compared := saved["stage"] == stage == "dpo":
            options["reference"] = m.load_run(saved["parent"], which=saved.get("checkpoint", "last"))[0]
        trainer = m.make_trainer(stage, model, tokenizer, {"val": source}, config, **options)
        if stage == "dpo" and not compared:  # the model's own preference, beside no reference
            trainer.val_data.reference_logprobs = torch.zeros_like(trainer.val_data.reference_logprobs)
        result = trainer.evaluate(args.given.get("eval_tokens"))
    if not result:
        raise m.UserError(f'{paths}: prompts without any "answer" cannot be scored')
    print(json.dumps(result))
    return 0


def export(args) -> int:
    """Write a run as a directory for transformers, with a GGUF file."""
    run_dir, folder = Path(args.init or m.newest_run(args.out)), args.runs / "export"
    if folder.exists() and not args.overwrite:
        raise m.UserError(f"{folder} exists: give --overwrite to replace what is in it, or another --out")
    model, tokenizer, state = m.load_run(run_dir, which=args.checkpoint)
    check_shape(args, model.config)
    dtype = args.given.get("dtype", "auto").replace("auto", "float32").removesuffix("_onednn")
    add_bos = sample.only_continues(run_dir)  # texts begin with one, conversations do not
    users, written = {"hf": "for transformers", "gguf": "for llama.cpp and ollama"}, []
    for name in dict.fromkeys(args.format or users):
        try:
            if name == "hf":
                model.save_pretrained(folder, tokenizer, dtype)
            else:
                m.write_gguf(folder / "model.gguf", model, tokenizer, add_bos, getattr(torch, dtype))
            written.append(users[name])
        except m.UserError as error:
            if args.format or name == "gguf" and not written:
                raise
            print(f"not {users[name]}: {error}")
    print(f"{run_dir} at step {state['step']} is now in {folder} in {dtype}, {', and '.join(written)}")
    return 0


def inspect(args) -> int:
    """Show records as a stage will see them, what is trained in green (or «…»), and all lengths; RL also a reply."""
    config, stage, trainer = train_config(args), m.STAGES[args.stage], None
    sources = {"train": data_sources(args)["train"]}
    runs = [args.runs / name for name in (stage.parent, "pretrain") if name]
    parent = args.init or next(filter(m.holds_run, runs), None)
    model, tokenizer, _ = m.load_run(parent) if parent else new_model(args, config)
    complete(args, config, model.config)
    reward = args.reward or ("answer" if args.stage == "grpo" else str(args.runs / "reward"))
    if stage.loader.kind == "prompt" and (args.reward or reward == "answer" or m.holds_run(reward)):
        options = {"reward": m.load_reward(reward, tokenizer), "device": args.device, "cache_dir": args.cache}
        trainer = m.make_trainer(args.stage, model, tokenizer, sources, config, rlhf_config(args), **options)
    data = m.make_loaders(args.stage, tokenizer, model.config, config, sources, args.cache)["train_data"]
    sample.show_records(data, args.inspect, trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
