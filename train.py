"""Train a language model: `python train.py --config tiny` learns Chinese and English in minutes on a laptop's CPU."""
import time

STARTED = time.monotonic()  # before torch is imported: --minutes count from here

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import minillm as m  # noqa: E402

STAGES = ("tokenizer", *m.STAGES, "rlhf", "eval", "export")
DATA = Path(__file__).parent / "data"


def build_parser() -> m.FlagParser:
    parser = m.FlagParser(prog="train.py", description=__doc__, epilog="Runs land in OUT/CONFIG/STAGE.",
                          usage="train.py [--config NAME] [--stage STAGE] [--data PATH ...] [any flag below]")
    parser.add_argument("--config", choices=m.PRESETS, help="preset of the model's shape [tiny]")
    parser.add_argument("--stage", choices=STAGES, default="pretrain",
                        help="what to do [pretrain]; rlhf is sft, reward and ppo in one go; eval scores a run; export "
                        "writes it for transformers, into OUT/CONFIG/export")
    parser.add_argument("--data", nargs="+", metavar="PATH",
                        help=".txt, .json, .jsonl(.gz) files or directories [the data/train that comes with MiniLLM]")
    parser.add_argument("--val-data", nargs="+", metavar="PATH", help="to validate on [data/val, or a tenth of --data]")
    parser.add_argument("--init", metavar="RUN_DIR", help="run, or Hugging Face directory (Llama, Qwen3, Qwen3-MoE), "
                        "whose weights and tokenizer to start from, to score or to export [OUT/CONFIG/pretrain for "
                        "sft, OUT/CONFIG/sft for dpo, reward, ppo and grpo, the newest run for export]")
    parser.add_argument("--reward", metavar="REWARD", help="what ppo and grpo maximise: the run directory of a reward "
                        "model, FILE.py:function, which is executed, or answer, the prompts' checkable answers "
                        "[ppo: OUT/CONFIG/reward, grpo: answer]")
    parser.add_argument("--inspect", type=int, metavar="N",
                        help="show N conversations as sft would train on them, train "
                        "nothing")
    parser.add_argument("--plot", nargs="+", metavar="RUN_DIR", help="draw what runs logged into a PNG, train nothing")
    parser.add_argument("--png", default="plot.png", metavar="FILE", help="where --plot draws [plot.png]")
    parser.add_argument("--out", default="out", metavar="DIR", help="where runs and caches go [out]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT/CONFIG/STAGE")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUT/CONFIG/STAGE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    m.add_flags(parser, m.get_train_config("tiny"), "training [defaults of --config tiny --stage pretrain; each stage "
                "has its own]")
    m.add_flags(parser, m.get_rlhf_config("tiny"), "learning from preferences and rewards")
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
            if args.plot:
                return plot(args.plot, Path(args.png))
            if args.inspect is not None:
                return inspect(args)
            stages = {"tokenizer": train_tokenizer, "pretrain": pretrain, "rlhf": rlhf, "eval": evaluate,
                      "export": export}
            return stages.get(args.stage, post_train)(args)
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


def data_sources(args, saved: dict | None = None) -> dict[str, dict]:
    """{"train": {"paths", "split"}, "val": …} of the flags, else those a run has `saved`, else the example data."""
    if args.data is None and args.val_data is None and saved:
        return saved
    data, val = args.data or [DATA / "train"], args.val_data or ([DATA / "val"] if args.data is None else None)
    return {"train": {"paths": data, "split": "all" if val else "train"},
            "val": {"paths": val or data, "split": "all" if val else "val"}}


def get_tokenizer(args, vocab_size: int) -> m.BPETokenizer:
    source = data_sources(args)["train"]
    chosen = Path(args.out) / (args.config or "tiny") / "tokenizer.json"
    if args.stage != "tokenizer" and chosen.exists():
        tokenizer = m.BPETokenizer.load(chosen)
        if tokenizer.vocab_size > vocab_size:
            raise m.UserError(f"{chosen} has {tokenizer.vocab_size} tokens, more than --vocab-size {vocab_size}")
        print(f"tokenizer: {tokenizer.vocab_size} tokens, from {chosen}")
        return tokenizer
    start = time.monotonic()
    tokenizer = m.TokenizerManager(Path(args.out) / "cache").get_or_train_tokenizer(
        source["paths"], vocab_size, split=source["split"], on_bad_record=train_config(args).on_bad_record)
    print(f"tokenizer: {tokenizer.vocab_size} tokens, {time.monotonic() - start:.1f} s")
    return tokenizer


def train_config(args, base: m.TrainConfig | None = None) -> m.TrainConfig:
    """The preset's (or base's) options with the user's in their place; a limit of the user's replaces the preset's."""
    given = m.given_flags(args, m.TrainConfig)
    if "max_steps" in given or "minutes" in given:
        given = {"max_steps": 0, "minutes": 0.0} | given
        if not given["max_steps"] and not given["minutes"]:
            raise m.UserError("a run needs an end: give --max-steps or --minutes above 0")
    stage = args.stage if args.stage in m.STAGES else "pretrain"
    return dataclasses.replace(base or m.get_train_config(args.config or "tiny", stage), **given)


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
    holds_run = m.holds_run(run_dir)
    if args.resume and args.overwrite:
        raise m.UserError("--resume and --overwrite exclude each other")
    if args.resume and not run_dir.is_dir():
        raise m.UserError(f"--resume: there is no run directory {run_dir}: start it without --resume")
    if holds_run and not args.resume and not args.overwrite:
        raise m.UserError(f"{run_dir} holds a run already: give --resume to go on with it, --overwrite to replace it, "
                          "or another --out")
    return args.resume and holds_run


def report_changes(saved: dict, config: m.TrainConfig | m.RLHFConfig) -> None:
    """Say which options a resumed run has otherwise than before."""
    changed = [f"{name} {saved[name]} -> {value}" for name, value in dataclasses.asdict(config).items()
               if name in saved and saved[name] != value]
    if changed:
        print(f"from here on: {', '.join(changed)}")


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
        if train.lora_rank:
            raise m.UserError(f"--lora-rank {train.lora_rank} needs a trained model: give --init RUN_DIR")
        tokenizer = get_tokenizer(args, config.vocab_size)
        m.torch.manual_seed(train.seed)
        model = m.MiniGPT(config)
    m.torch.manual_seed(train.seed)
    check_seq_len(train, model.config)
    sources = data_sources(args, saved)
    train_data, val_data = (m.open_data("pretrain", tokenizer, model.config, train, sources[part], part == "train",
                                        Path(args.out) / "cache") for part in ("train", "val"))
    print(f"data: {len(train_data.tokens):,} tokens to train on, {len(val_data.tokens):,} to validate on")
    m.keep_freed_memory()  # from here on; what the tokenizer and the encoder took goes back first
    trainer = m.PreTrainer(model, tokenizer, device, config=train, train_data=train_data, val_data=val_data,
                           run_dir=run_dir, started=args.started)
    if resuming:
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
        print(f"resuming {run_dir} at step {trainer.step_count}")
        report_changes(state["config"]["train"], train)
    active = f", {model.num_params(active=True) / 1e6:.1f} M active" if model.config.num_experts else ""
    return fit(args, trainer, f"{model.num_params() / 1e6:.2f} M parameters{active}")


def fit(args, trainer: m.Trainer, size: str) -> int:
    """Train, and say how it went and what to do next."""
    train, run_dir = trainer.config, trainer.run_dir
    limits = [f"{train.minutes:g} minutes"] * bool(train.minutes) + [f"{train.max_steps} steps"] * bool(train.max_steps)
    print(f"model: {size}; {' or '.join(limits)} on {trainer.device} in {str(trainer.dtype).removeprefix('torch.')}",
          flush=True)
    with replacing(args, run_dir):
        result = trainer.fit()
    if "signal" in result and trainer.progress() < 1:
        saved = f"saved in {run_dir}\ngo on:  {command(args)} --resume" if trainer.step_count else "nothing to save yet"
        print(f"stopped at step {trainer.step_count}; {saved}")
        return 128 + result["signal"]
    there = shlex.quote(str(run_dir))
    followers = {"pretrain": f"sample.py --run {there} --prompt {shlex.quote(trainer.prompts()[0])}"
                 if trainer.stage == "pretrain" else "",
                 "reward": f"train.py --config {args.config or 'tiny'} --out {shlex.quote(args.out)} --stage ppo"}
    held_out = f" on {result['bytes']:,} held-out bytes" if trainer.stage == "pretrain" else ""
    figures = m.describe(result, ("bpb",) if trainer.stage == "pretrain" else m.SHOWN)
    print(f"done: {figures}{held_out} after {trainer.elapsed_s():.0f} s; saved in {run_dir}")
    print(f"next:  python {followers.get(trainer.stage, f'sample.py --run {there} --chat')}")
    return 128 + result["signal"] if "signal" in result else 0


@contextlib.contextmanager
def replacing(args, *run_dirs: Path):
    """With --overwrite the old runs stand aside, and come back if no new one with a checkpoint is in their place.

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
        for run_dir, old in aside.items():
            if m.holds_run(run_dir):
                shutil.rmtree(old)
            elif any(map(m.holds_run, aside)):
                print(f"not replaced yet: the old {run_dir} is in {old}")
            else:
                shutil.rmtree(run_dir, ignore_errors=True)
                old.rename(run_dir)


def post_train(args) -> int:
    """sft, dpo, reward, ppo, grpo: from the parent's run."""
    train_config(args), m.RLHFConfig(**m.given_flags(args, m.RLHFConfig))  # flags are checked before anything else
    check_reward(args)
    stage, runs = args.stage, Path(args.out) / (args.config or "tiny")
    run_dir, saved = runs / stage, {}
    if resuming := can_resume(run_dir, args):
        saved = m.load_run(run_dir)[2]["config"]
    parent = Path(args.init or saved.get("parent") or runs / m.PARENTS[stage])
    if not args.init and not saved and not (parent / "config.json").exists():
        raise m.UserError(f"{stage} goes out from {parent}, where there is no run: train it with --stage "
                          f"{m.PARENTS[stage]}, or name another with --init")
    reward = args.reward or saved.get("reward") or ("answer" if stage == "grpo" else str(runs / "reward"))
    shape = m.MiniGPTConfig(**m.run_config(parent)["model"])
    check_shape(args, shape)
    train = train_config(args, m.TrainConfig(**saved["train"]) if saved else None)
    check_seq_len(train, shape)
    rl = m.RLHFConfig(**saved["rl"]) if saved else m.get_rlhf_config(args.config or "tiny")
    rl = dataclasses.replace(rl, **m.given_flags(args, m.RLHFConfig))
    m.keep_freed_memory()
    trainer = m.open_stage(stage, run_dir, parent, data_sources(args, saved.get("data")), train, rl, reward=reward,
                           device=m.pick_device(args.device), cache_dir=Path(args.out) / "cache", started=args.started,
                           resume=resuming)
    print(f"{stage}: from {parent}" + (f", reward: {reward}" if stage in ("ppo", "grpo") else "")
          + (f", resuming at step {trainer.step_count}" if resuming else ""))
    if resuming:
        report_changes(saved["train"], train)
        report_changes(saved["rl"], rl)
    counts = [len(data.items) for data in (trainer.train_data, trainer.val_data)]
    print("data: {:,} records to train on, {:,} to validate on".format(*counts))
    trained = sum(p.numel() for p in trainer.modules.parameters() if p.requires_grad)
    lora = f", of which LoRA trains {trained:,}" if train.lora_rank else ""
    return fit(args, trainer, f"{trainer.model.num_params() / 1e6:.2f} M parameters{lora}")


def check_reward(args) -> None:
    if args.reward and args.stage not in ("ppo", "grpo"):
        raise m.UserError(f"--reward {args.reward} has no meaning in --stage {args.stage}: ppo and grpo take one")


def rlhf(args) -> int:
    """SFT, reward model and PPO, one after the other, after pretraining if there is no base model; resumable."""
    runs = Path(args.out) / (args.config or "tiny")
    base = Path(args.init or runs / "pretrain")
    trains = {stage: train_config(with_values(args, stage=stage)) for stage in m.RLHFPipeline.stages}
    rl = dataclasses.replace(m.get_rlhf_config(args.config or "tiny"), **m.given_flags(args, m.RLHFConfig))
    check_reward(args)
    device = m.pick_device(args.device)
    if args.resume and args.overwrite:
        raise m.UserError("--resume and --overwrite exclude each other")
    for source in data_sources(args).values():
        there = m.kinds_of(source["paths"])
        if lacking := {"chat", "preference"} - there.keys():
            raise m.UserError(f"{', '.join(map(str, source['paths']))}: no {' and no '.join(sorted(lacking))} records: "
                              "--stage rlhf takes conversations, pairs and prompts")
    if not args.init and not m.RLHFPipeline.finished(base):
        print(f"== pretrain: {base}")
        if status := pretrain(with_values(args, stage="pretrain", resume=m.holds_run(base), overwrite=False)):
            return status
    shape = m.MiniGPTConfig(**m.run_config(base)["model"])
    check_shape(args, shape)
    for train in trains.values():
        check_seq_len(train, shape)
    m.keep_freed_memory()
    pipeline = m.RLHFPipeline(rl, base, runs, data_sources(args), trains, device=device,
                              cache_dir=Path(args.out) / "cache")
    pipeline.check()
    with replacing(args, *(runs / stage for stage in pipeline.stages)):
        rows = pipeline.run()
    if "signal" in rows[-1]:
        print(f"stopped; what is done is saved\ngo on:  {command(args)}")
        return 128 + rows[-1]["signal"]
    print(f"\n{pipeline.table(rows)}\n\nnext:  python sample.py --run {shlex.quote(str(runs / 'ppo'))} --chat")
    return 0


def with_values(args, **changes):
    """The parsed flags with other values for some of them."""
    return type(args)(**vars(args) | changes)


def check_seq_len(train: m.TrainConfig, shape: m.MiniGPTConfig) -> None:
    train.seq_len = train.seq_len or shape.max_position_embeddings
    if train.seq_len > shape.max_position_embeddings:
        raise m.UserError(f"--seq-len {train.seq_len} exceeds the context, max_position_embeddings="
                          f"{shape.max_position_embeddings}")


def evaluate(args) -> int:
    """Score a run on --val-data, else on the validation part of --data or of its own data; the last line is JSON."""
    m.keep_freed_memory()
    if not args.init:
        raise m.UserError("--stage eval scores a run: name its directory with --init, for example "
                          f"--init {args.out}/{args.config or 'tiny'}/pretrain")
    model, tokenizer, state = m.load_run(args.init)
    check_shape(args, model.config)
    saved = state["config"]
    train = train_config(args, m.TrainConfig(**saved["train"]))
    train.lora_rank = 0  # merged already
    check_seq_len(train, model.config)
    if not hasattr(args, "eval_prompts"):
        train.eval_prompts = sys.maxsize
    source = data_sources(args, saved["data"])["val"]
    there = m.kinds_of(source["paths"])
    own = {"sft": "chat", "dpo": "preference", "reward": "preference", "ppo": "prompt", "grpo": "prompt"}.get(
        saved["stage"], "text")
    kind = own if own in there or saved["stage"] == "reward" else next(iter(there), "text")
    stage = {"text": "pretrain", "chat": "sft", "preference": "dpo", "prompt": "ppo"}[kind]
    val_data = m.open_data(stage, tokenizer, model.config, train, source, False, Path(args.out) / "cache")
    if stage == "dpo" and saved["stage"] != "dpo":
        val_data.reference_logprobs = m.torch.zeros(len(val_data.ends) // 3, 2)  # the model's own preference
    options = {"reference": m.load_run(saved["parent"])[0]} if saved["stage"] == "dpo" and stage == "dpo" else {}
    trainer = {"pretrain": m.PreTrainer, "dpo": m.DPOTrainer}.get(stage, m.SFTTrainer)
    trainer = (m.RewardTrainer if saved["stage"] == "reward" else trainer)(
        model, tokenizer, m.pick_device(args.device), config=train, val_data=val_data, **options)
    print(f"{args.init} at step {state['step']} on {kind} records of {', '.join(map(str, source['paths']))} "
          f"({source['split']})")
    result = trainer.exact_match() if kind == "prompt" else trainer.evaluate(vars(args).get("eval_tokens"))
    if not result:
        raise m.UserError(f'{", ".join(map(str, source["paths"]))}: prompts without any "answer" can not be scored')
    print(json.dumps(result))
    return 0


def export(args) -> int:
    """Write a run as a directory that transformers read."""
    run_dir, folder = Path(args.init or m.newest_run(args.out)), Path(args.out) / (args.config or "tiny") / "export"
    if folder.exists() and not args.overwrite:
        raise m.UserError(f"{folder} exists: give --overwrite to replace what is in it, or another --out")
    model, tokenizer, _ = m.load_run(run_dir)
    check_shape(args, model.config)
    model.save_pretrained(folder, tokenizer)
    print(f"{run_dir} is now in {folder}, for AutoModelForCausalLM and AutoTokenizer.from_pretrained({str(folder)!r})")
    return 0


def inspect(args) -> int:
    """Show conversations as the model will see them."""
    runs = Path(args.out) / (args.config or "tiny")
    parent = Path(args.init or runs / "pretrain")
    if args.stage != "sft" or args.inspect < 1:
        raise m.UserError(f"--inspect {args.inspect} --stage {args.stage} is not possible: it shows 1 or more of what "
                          "--stage sft would train on")
    train = train_config(args)
    if (parent / "config.json").exists():
        model, tokenizer, _ = m.load_run(parent)
        shape = model.config
    else:
        shape = model_config(args)
        tokenizer = get_tokenizer(args, shape.vocab_size)
    check_seq_len(train, shape)
    data = m.open_data("sft", tokenizer, shape, train, data_sources(args)["train"], False, Path(args.out) / "cache")
    print(data.report(args.inspect, colour=sys.stdout.isatty()))
    return 0


def plot(runs: list[str], path: Path) -> int:
    """Draw what runs have logged, a panel a figure, all runs together."""
    rows = {run: m.read_metrics(run) for run in runs}
    if path.suffix != ".png":
        raise m.UserError(f"--png {path} is not possible: it must end in .png")
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise m.UserError("--plot needs matplotlib: pip install -e '.[plot]'") from None
    logged = {name for found in rows.values() for row in found for name in row}
    wanted = (("loss", "val_loss"), ("val_bpb",), ("reward", "val_reward"), ("kl", "val_kl"),
              ("val_exact_match", "val_pair_accuracy"), ("answer_length",), ("lr",), ("grad_norm",))
    panels = [[name for name in names if name in logged] for names in wanted]
    panels = [names for names in panels if names]
    if not panels:
        raise m.UserError(f"{', '.join(runs)}: nothing has been logged yet")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False)
    for axis, names in zip(axes.flat, panels, strict=False):
        for k, (run, found) in enumerate(rows.items()):
            for name in names:
                points = [(row["step"], row[name]) for row in found if row.get(name) is not None]
                if points:
                    held_out = name.startswith("val_")
                    label = "/".join(Path(run).parts[-2:]) + (", held out" if held_out and len(names) > 1 else "")
                    axis.plot(*zip(*points, strict=True), "o-" if held_out else "-", color=f"C{k}", label=label,
                              markersize=4, linewidth=1.5 if held_out else 0.8, alpha=1 if held_out else 0.6)
        axis.set(title=names[-1].removeprefix("val_").replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"{path}: {len(panels)} panels of {', '.join(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
