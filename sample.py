"""Let a trained model write: `python sample.py` continues a text with the newest run, `--chat` talks with it."""
import sys
import time
import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import minillm as m  # noqa: E402

PROMPTS = ["从前，", "Once there was"]


def build_parser() -> m.FlagParser:
    parser = m.FlagParser(prog="sample.py", description=__doc__,
                          usage="sample.py [--run RUN_DIR] [--prompt TEXT ...] [any flag below]")
    parser.add_argument("--run", metavar="RUN_DIR", help="run directory [the newest under --out]")
    parser.add_argument("--out", default="out", metavar="DIR", help="where to look for the newest run [out]")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue [one Chinese, one English]")
    parser.add_argument("--chat", action="store_true", help="hold a conversation; /reset begins a new one")
    parser.add_argument("--system", metavar="TEXT", help="system prompt of the conversation")
    parser.add_argument("--strategy", choices=("sample", "greedy", "beam"), help="[sample; beam with --num-beams]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--compile", action="store_true", help="compile decoding: slow to start, then faster")
    m.add_flags(parser, m.GenerationConfig(max_new_tokens=200), "generation", skip=("do_sample",))
    return parser


def generation_config(args) -> m.GenerationConfig:
    given = {"max_new_tokens": 200} if not hasattr(args, "max_length") else {}
    given |= m.given_flags(args, m.GenerationConfig)
    strategy = args.strategy or ("beam" if given.get("num_beams", 1) > 1 else "sample")
    if strategy == "beam":
        given.setdefault("num_beams", 4)
    elif given.get("num_beams", 1) > 1:
        raise m.UserError(f"--num-beams {given['num_beams']} contradicts --strategy {strategy}")
    return m.GenerationConfig(do_sample=strategy == "sample", **given)


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows ?
    try:
        args = build_parser().parse_args(argv)
        config = generation_config(args)
        if args.chat and args.prompt:
            raise m.UserError("--chat and --prompt exclude each other: say it in the conversation")
        run_dir = args.run or m.newest_run(args.out)
        model, tokenizer, state = m.load_run(run_dir, m.pick_device(args.device))
        if isinstance(model, m.RewardModel):
            raise m.UserError(f"{run_dir} holds a reward model: it scores and does not write")
        generator = m.TextGenerator(model, tokenizer, args.compile)
        print(f"{run_dir} (step {state['step']}, {model.num_params() / 1e6:.2f} M parameters)")
        if args.chat:
            chat(generator, config, args.system)
        else:
            for prompt in args.prompt or PROMPTS:
                write(generator, prompt, config)
    except BrokenPipeError:
        m.silence_stdout()
    except (m.UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not m.is_out_of_memory(error):
            raise
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def write(generator: m.TextGenerator, prompt: str, config: m.GenerationConfig) -> None:
    """Print the prompt and its continuation as it comes, then the speed."""
    start, text = time.monotonic(), ""
    pieces = [generator.generate(prompt, config)] if config.num_beams > 1 else generator.stream(prompt, config)
    print(f"\n{prompt}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    count = len(generator.tokenizer.encode(text))
    print(f"\n[{count} tokens, {count / (time.monotonic() - start):.0f} tok/s]")


def chat(generator: m.TextGenerator, config: m.GenerationConfig, system: str | None) -> None:
    """A conversation until the end of input. Ctrl-C ends an answer, and at the prompt the conversation."""
    start = [{"role": "system", "content": system}] if system else []
    messages, limit = list(start), generator.model.config.max_position_embeddings
    print("(/reset begins anew, Ctrl-D or Ctrl-C ends)")
    while True:
        try:
            said = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/reset":
            messages = list(start)
            print("(a new conversation)")
        elif said:
            messages.append({"role": "user", "content": said})
            room = limit - min(config.new_tokens(0), limit // 2)
            while len(messages) > len(start) + 1 and len(
                    generator.tokenizer.apply_chat_template(messages, add_generation_prompt=True)) > room:
                del messages[len(start):len(start) + 2]  # the context is full: the oldest turn is forgotten
            if reply := answer(generator, messages, config):
                messages.append({"role": "assistant", "content": reply})
            else:
                messages.pop()  # what got no answer is not part of the conversation


def answer(generator: m.TextGenerator, messages: list[dict], config: m.GenerationConfig) -> str:
    """Print the answer as it comes; after Ctrl-C what there is of it."""
    text = ""
    try:
        for piece in [generator.continue_rows([generator.tokenizer.apply_chat_template(messages, True)], config)[0]] \
                if config.num_beams > 1 else generator.stream(messages, config):
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" …", end="")
    except m.UserError as error:
        print(f"({error})", end="")
    print()
    return text


if __name__ == "__main__":
    sys.exit(main())
