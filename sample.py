"""Generate with a trained model: `python sample.py` continues texts with the newest run, `--chat` talks with it.

`--web` does both in a browser.
"""

import contextlib
import dataclasses
import functools
import html
import itertools
import math
import os
import re
import shlex
import sys
import time
import unicodedata
import unittest.mock
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so where there is none; nothing needs it

import torch  # noqa: E402

import minillm as m  # noqa: E402

PROMPTS = ["从前，", "Once there was"]


def build_parser() -> m.FlagParser:
    usage = "sample.py [--run RUN_DIR] [--prompt TEXT ...] [any flag below]"
    parser = m.FlagParser(prog="sample.py", description=__doc__, usage=usage)
    runs = "run directory [the newest under --out]; --web takes several [all under --out]"
    parser.add_argument("--run", nargs="+", metavar="RUN_DIR", help=runs)
    parser.add_argument("--out", metavar="DIR", help="where to look for runs [out]")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="weights of the best evaluation, or last [best]")
    texts = "texts to continue, also empty ones [one Chinese, one English]"
    parser.add_argument("--prompt", action="extend", nargs="+", metavar="TEXT", help=texts)
    parser.add_argument("--chat", action="store_true", help="hold a conversation; /reset begins a new one")
    parser.add_argument("--web", action="store_true", help="serve a page for a browser on this machine (.[web])")
    parser.add_argument("--system", metavar="TEXT", help="system prompt of the conversation")
    tokens = "show a text's tokens, and what the model expects before each"
    parser.add_argument("--explain", metavar="TEXT", help=tokens)
    parser.add_argument("--png", metavar="FILE", help="--explain: draw losses and attention, too (.[plot])")
    parser.add_argument("--layer", type=int, metavar="INT", help="--png: whose attention, from 1 on [the last]")
    parser.add_argument("--strategy", choices=("sample", "greedy", "beam"), help="[sample; beam with --num-beams]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--compile", action="store_true", help="compile decoding: slow to start, then faster")
    m.add_flags(parser, m.GenerationConfig(max_new_tokens=200), "generation", skip=("do_sample",))
    return parser


ONLY_WITH = {  # options that one strategy alone uses
    "sample": ("temperature", "top_k", "top_p", "min_p", "seed"),
    "beam": ("num_beams", "length_penalty", "early_stopping"),
}
CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # of --stop: people type '\n' where they mean a newline


def typed_texts(flag: str, texts: list[str]) -> list[str]:
    """Return the texts of a flag. Bytes that the locale cannot spell are read as UTF-8."""
    try:
        return [text.encode("utf-8", "surrogateescape").decode() for text in texts]
    except UnicodeError as error:
        raise m.UserError(f"{flag} is not UTF-8 ({error.reason}): convert it, or check the locale") from None


def generation_config(args) -> m.GenerationConfig:
    """Return the options that the flags give; a flag that would have no effect is an error."""
    given = m.given_flags(args, m.GenerationConfig)
    if "stop" in given:
        stops = typed_texts("--stop", given["stop"])
        given["stop"] = [re.sub(r"\\[nt\\]", lambda typed: ESCAPES[typed[0]], text) for text in stops]
    if "max_length" in given and "max_new_tokens" in given:
        raise m.UserError("--max-length has no effect beside --max-new-tokens: give one of them")
    config = m.GenerationConfig(**{"max_new_tokens": None if "max_length" in given else 200} | given)
    strategy = args.strategy or ("beam" if config.num_beams > 1 else "sample")
    mode = f"--strategy {strategy}"
    if config.temperature == 0 and args.strategy != "beam":
        strategy, mode = "greedy", "--temperature 0"
        del given["temperature"]
    for owner, names in ONLY_WITH.items():
        if owner != strategy and (useless := given.keys() & set(names)):
            raise m.UserError(f"{m.flag_of(min(useless))} has no effect with {mode}: it is for --strategy {owner}")
    if strategy == "beam" and "num_beams" not in given:
        config.num_beams = 4
    return dataclasses.replace(config, do_sample=strategy == "sample")


def check_flags(args, config: m.GenerationConfig) -> None:
    """Raise UserError for flags that exclude each other or have no effect, and for a stdin that is closed."""
    modes = [f"--{name}" for name in ("chat", "web", "explain", "prompt") if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise m.UserError(f"{modes[0]} and {modes[1]} exclude each other: give one of them")
    useless = [*m.given_flags(args, m.GenerationConfig), *["compile"] * args.compile]
    if args.explain is not None and useless:
        raise m.UserError(f"{m.flag_of(useless[0])} has no effect with --explain, which writes nothing")
    if args.png and not args.png.endswith(".png"):
        raise m.UserError(f"--png {args.png} is not possible: it must end in .png")
    for name, needed in (("png", "explain"), ("layer", "png")):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise m.UserError(f"--{name} has no effect without --{needed}")
    if args.system is not None and not (args.chat or args.web):
        raise m.UserError("--system has no effect without --chat or --web")
    if args.run and args.out:
        raise m.UserError("--out has no effect beside --run, which names the run already")
    if len(args.run or []) > 1 and not args.web:
        raise m.UserError(f"--run names {len(args.run)} directories: only --web takes several")
    if args.web and config.num_beams > 1:
        raise m.UserError("--web shows replies as they come, but those of --strategy beam are only known at the end")
    if args.chat and getattr(sys.stdin, "closed", True):
        raise m.UserError("--chat reads from stdin, which is closed: use --prompt")


def main(argv: list[str] | None = None) -> int:
    is_closed = getattr(sys.stdout, "closed", True)  # None where the process was started without one
    with user_errors("sample.py") as ended:
        args = build_parser().parse_args(argv)
        config = generation_config(args)
        check_flags(args, config)
        if is_closed:
            raise m.UserError("stdout is closed: there is nowhere to write to")
        runs = args.run or [str(m.newest_run(args.out or "out"))]
        load = functools.lru_cache(maxsize=2)(functools.partial(load_generator, args))
        generator, system = load(runs[0]), typed_texts("--system", [args.system or ""])[0]
        if args.web:
            others = [] if args.run else filter(can_write, sorted(Path(args.out or "out").glob("*/*")))
            web(list(dict.fromkeys([*runs, *map(str, others)])), load, config, system)
        elif args.chat:
            if only_continues(runs[0]):
                print("(a base model: it was never trained on conversations and only continues texts.", end=" ")
                print(f"Teach it to answer:\npython train.py --stage sft --init {shlex.quote(runs[0])})")
            chat(generator, config, system)
        elif args.explain is not None:
            explain(generator, typed_texts("--explain", [args.explain])[0], args.png, args.layer)
        else:
            for prompt in typed_texts("--prompt", args.prompt or PROMPTS):
                write(generator, prompt, config)
        sys.stdout.flush()
        return 0
    return ended[0]


def load_generator(args, run_dir: str) -> m.TextGenerator:
    """Return the generator of a run, and print which it is."""
    if args.checkpoint and "model_type" in m.run_config(run_dir):
        raise m.UserError(f"--checkpoint has no effect with {run_dir}: a Hugging Face directory holds one model")
    model, tokenizer, state = m.load_run(run_dir, m.pick_device(args.device), args.checkpoint or "best")
    if isinstance(model, m.RewardModel):
        raise m.UserError(f"{run_dir} holds a reward model: it scores and does not write")
    print(f"{run_dir} (step {state['step']}, {model.num_params() / 1e6:.2f} M parameters)", flush=True)
    if args.explain is None and m.pick_dtype("auto", model.embed_tokens.weight.device) == torch.bfloat16:
        model.bfloat16()  # as training multiplies on such a GPU; half the bytes to read
    return m.TextGenerator(model, tokenizer, args.compile)


def can_write(run_dir: Path) -> bool:
    return m.holds_run(run_dir) and ".old-" not in run_dir.name and m.run_config(run_dir).get("stage") != "reward"


def only_continues(run_dir: str) -> bool:
    """Return whether a run was never trained on conversations."""
    config = m.run_config(run_dir)
    return config.get("stage") == "pretrain" and "model_type" not in config


def pieces(generator: m.TextGenerator, prompt: str | list[dict], config: m.GenerationConfig) -> Iterable[str]:
    """Return the continuation of a text, or the reply to messages, as it comes; that of beams at the end."""
    return generator.generate([prompt], config) if config.num_beams > 1 else generator.stream(prompt, config)


def shown(text: str) -> str:
    """Return a text as a terminal can show it: without control characters, which would change its colors or charset."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def write(generator: m.TextGenerator, prompt: str, config: m.GenerationConfig) -> None:
    """Print the prompt and its continuation as it comes, then the count of tokens and the speed."""
    start = time.monotonic()
    print(f"\n{prompt}", end="", flush=True)
    for piece in pieces(generator, prompt, config):
        print(shown(piece), end="", flush=True)
    print(f"\n[{generator.written} tokens, {generator.written / (time.monotonic() - start):.0f} tok/s]")


def chat(generator: m.TextGenerator, config: m.GenerationConfig, system: str) -> None:
    """Hold a conversation until the end of input. Ctrl-C ends a reply, and at the prompt the conversation."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with contextlib.suppress(ImportError):  # where there is one, arrow keys edit the line and bring back earlier ones
        import readline  # noqa: F401
    print("(/reset begins anew, Ctrl-D or Ctrl-C ends)")
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/reset":
            messages = list(start)
            print("(a new conversation)")
        elif text:
            messages = recent(generator, [*messages, {"role": "user", "content": text}], config.new_tokens(0))
            if reply := print_reply(generator, messages, config):
                messages.append({"role": "assistant", "content": reply})
            else:
                messages.pop()  # a message without a reply is not part of the conversation


def recent(generator: m.TextGenerator, messages: list[dict], new_tokens: int) -> list[dict]:
    """Return the messages without the oldest turns, if the context has no room for all and a reply."""
    limit, start = generator.model.config.max_position_embeddings, int(messages[0]["role"] == "system")
    room, encode = limit - min(new_tokens, limit // 2), generator.tokenizer.apply_chat_template
    while len(messages) > start + 1 and len(encode(messages, add_generation_prompt=True)) > room:
        messages = messages[:start] + messages[start + 2 :]
    return messages


def print_reply(generator: m.TextGenerator, messages: list[dict], config: m.GenerationConfig) -> str:
    """Print the reply as it comes and return it, after Ctrl-C as far as it came."""
    text = ""
    try:
        for piece in pieces(generator, messages, config):
            print(shown(piece), end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" …", end="")
    except m.UserError as error:
        print(f"({error})", end="")
    print()
    return text


# -- a page for a browser ----------------------------------------------------------------------------------------------


STOP = """async () => {  // a reply that is being written would come back
    const stop = () => document.querySelector("[data-testid=stop-button]")
    stop()?.click()
    for (let waits = 0; waits < 5 || stop() && waits < 100; waits++) await new Promise(done => setTimeout(done, 100))
}"""


def texts_so_far(load, config, default, prompt, chosen, temperature, top_p, length) -> Iterator[str]:
    """Yield what a run makes of a text or messages, as it grows; a mistake becomes a note on the page."""
    changes = {"temperature": temperature, "top_p": top_p, "max_new_tokens": length, "do_sample": True}
    try:
        generator = load((chosen or [default])[0])
        prompt = prompt if isinstance(prompt, str) else recent(generator, prompt, length)
        yield from itertools.accumulate(pieces(generator, prompt, dataclasses.replace(config, **changes)))
    except m.UserError as error:  # after gradio's Error the box for messages would stay closed
        m.import_extra("gradio", "web").Warning(str(error), title="不行 / Not possible")


def replies(load, config, default, text, history, system, chosen, *controls) -> Iterator[list[dict]]:
    """Yield the replies of all chosen runs to a message; each run has a conversation of its own."""
    cards, start = {}, [{"role": "system", "content": system}] if system else []
    for run in chosen or [default]:
        turns = [turn for turn in history if turn["role"] == "user" or turn["metadata"]["title"] == run]
        turns.append({"role": "user", "content": text})
        answered = [turn for turn, after in itertools.pairwise(turns) if turn["role"] != after["role"]]
        messages = m.as_messages([*start, *answered, turns[-1]], "user", [])
        for so_far in texts_so_far(load, config, default, messages, [run], *controls):
            cards[run] = {"content": so_far, "metadata": {"title": run}}
            yield [*cards.values()]


def escape_messages(chatbot: Any) -> None:
    """Let messages travel escaped: the page takes texts for HTML."""
    read, shown = chatbot.preprocess, chatbot.postprocess

    def with_texts(value, change):
        for part in itertools.chain.from_iterable(message.content for message in value.root if value):
            part.text = change(part.text)
        return value

    chatbot.preprocess = lambda value: read(with_texts(value, html.unescape))
    chatbot.postprocess = lambda value: with_texts(shown(value), html.escape)


def web(runs: list[str], load: Callable, config: m.GenerationConfig, system: str) -> None:
    """Serve a page on 127.0.0.1 until Ctrl-C: a conversation, or a text where the chosen runs only continue texts."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would report its use, and look for newer versions
    gr = m.import_extra("gradio", "web")
    temperature, length = config.temperature * config.do_sample, config.new_tokens(0)

    def pages(chosen):
        is_text = all(map(only_continues, chosen or runs[:1]))
        return gr.Column(visible=not is_text), gr.Column(visible=is_text)

    with gr.Blocks(title="MiniLLM", fill_height=True, fill_width=True) as page:
        with gr.Sidebar():
            controls = [
                gr.Dropdown(runs, value=runs[:1], label="模型 Runs", multiselect=True),
                gr.Slider(0, max(2, temperature), temperature, label="温度 Temperature", step=0.05),
                gr.Slider(min(0.05, config.top_p), 1, config.top_p, label="Top-p", step=0.05),
                gr.Slider(1, max(1000, length), length, label="长度 Length", step=1),
            ]
        chat_page, text_page = pages(runs[:1])
        with chat_page:
            system = gr.Textbox(system, label="系统提示 System prompt")
            chatbot = gr.Chatbot(render_markdown=False, latex_delimiters=[], buttons=[], show_label=False, scale=1)
            escape_messages(chatbot)
            reply = functools.partial(replies, load, config, runs[0])
            chat = gr.ChatInterface(reply, chatbot=chatbot, additional_inputs=[system, *controls])
            chatbot.clear(lambda: [[]] * 3, None, [chatbot, chat.chatbot_state, chat.chatbot_value], js=STOP)
        with text_page:
            text = gr.Textbox(label="文本 Text", lines=6, submit_btn=True, stop_btn=True)
            continuation = gr.Textbox(label="续写 Continuation", lines=9)
            go_on = functools.partial(texts_so_far, load, config, runs[0])
            text.stop(None, cancels=text.submit(go_on, [text, *controls], continuation))
        controls[0].change(pages, controls[0], [chat_page, text_page])
    page.queue(default_concurrency_limit=8)  # by default a second tab would wait for the first
    options = {"share": False, "footer_links": [], "quiet": True, "prevent_thread_lock": True}
    _, address, _ = page.launch(server_name="127.0.0.1", **options)
    print(f"{address} (Ctrl-C ends)", flush=True)
    page.block_thread()


# -- what a model sees -------------------------------------------------------------------------------------------------


def token_name(tokenizer: m.BPETokenizer, token: int) -> str:
    """Return a token in one line: spaces as ␣, control characters and bytes that are no character as escapes."""
    text = tokenizer.decode_bytes([token], skip_special_tokens=False).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.replace(" ", "␣"))


def explain(generator: m.TextGenerator, text: str, png: str | None, layer: int | None) -> None:
    """Print a text's tokens with ids and bytes, how much each surprises the model, and what it held for likeliest."""
    model, tokenizer = generator.model, generator.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=True) or [tokenizer.eos_id]
    if png and (len(ids) < 2 or layer is not None and not 1 <= layer <= len(model.layers)):
        raise m.UserError(f"--png draws 2 tokens or more, not {len(ids)}, of a --layer in 1 … {len(model.layers)}")
    with torch.no_grad(), unittest.mock.patch.object(m, "attend", wraps=m.attend) as attend:
        logits = model(torch.tensor([ids], device=model.embed_tokens.weight.device))[0, :, : tokenizer.vocab_size]
    logprobs = logits.float().log_softmax(dim=-1).cpu()  # (T, V): of what follows each token
    losses = [math.nan, *(-logprobs[t, token].item() for t, token in enumerate(ids[1:]))]
    names = [token_name(tokenizer, token) for token in ids]
    print(f"{'id':>6}  {'token':<14}   nats  {'bytes':<18}  likeliest")
    for t, (token, loss, name) in enumerate(zip([*ids, ""], [*losses, math.nan], [*names, "(next)"], strict=True)):
        top = zip(*logprobs[t - 1].exp().topk(5), strict=True) if t else ()
        likeliest = "  ".join(f"{token_name(tokenizer, int(guess))} {p:.0%}" for p, guess in top)
        name += " " * (14 - sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in name))  # Chinese is wide
        if loss == loss and sys.stdout.isatty():  # green where it was expected, yellow, red
            name = f"\033[{32 if loss < 1 else 33 if loss < 4 else 31}m{name}\033[0m"
        nats, shown = f"{loss:.2f}".replace("nan", ""), tokenizer.decode_bytes(ids[t : t + 1]).hex(" ")
        print(f"{token:>6}  {name}  {nats:>5}  {shown:<18}  {likeliest}".rstrip())
    total, size = sum(losses[1:]), len(tokenizer.decode_bytes(ids[1:]))
    print(f"{total / max(1, len(ids) - 1):.4f} nats a token, {total / math.log(2) / max(1, size):.4f} bits a byte")
    if png:
        q, k, _, bias = attend.call_args_list[-1 if layer is None else layer - 1].args
        identity = torch.eye(len(ids)).to(k).expand(*k.shape[:3], -1)  # the output for such values: the weights
        draw_explanation(names, losses, m.attend(q, k, identity, bias)[0].cpu(), png)


def draw_explanation(names: list[str], losses: list[float], maps: torch.Tensor, png: str) -> None:
    """Draw the losses of tokens, and beside them the attention maps (H, T, T) of a layer's heads."""
    pyplot, fonts = import_pyplot(), m.import_extra("matplotlib.font_manager", "plot")
    warnings.filterwarnings("ignore", "Glyph")  # boxes, where no font has Chinese
    has_chinese = re.compile("CJK.*Regular|PingFang|msyh|simhei|wqy")
    for path in filter(has_chinese.search, fonts.findSystemFonts()):  # matplotlib's list may be older than the fonts
        fonts.fontManager.addfont(path)
        pyplot.rcParams["font.family"] = ["DejaVu Sans", fonts.FontProperties(fname=path).get_name()]
    places, inches = range(len(names)), min(20, 3 + len(names) / 8)
    figure, axes = pyplot.subplots(1, 1 + len(maps), figsize=(inches * (1 + len(maps)), inches), layout="constrained")
    axes[0].barh(places, losses)
    axes[0].set(title="loss of each token, nats", ylim=(len(names) - 0.5, -0.5))
    for head, (axis, weights) in enumerate(zip(axes[1:], maps.tolist(), strict=True), 1):
        axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"attention of head {head}")
        axis.set_xticks(places, names, rotation=90)
    for axis in axes:
        axis.set_yticks(places, names)
    figure.savefig(png, dpi=80)


# -- what train.py shows -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def user_errors(program: str, memory_advice: str = "") -> Iterator[list[int]]:
    """Print mistakes of the user, and warnings once each, in one line; the yielded list gets the exit status."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None is closed
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows ? and training goes on
    status: list[int] = []
    with warnings.catch_warnings():
        warn_once = functools.cache(lambda text: print(f"{program}: warning: {text}", file=sys.stderr))
        warnings.showwarning = lambda message, *_, **__: warn_once(str(message))
        try:
            yield status
        except KeyboardInterrupt:
            if m.WORLD.is_first_to("error"):
                print("\ninterrupted", file=sys.stderr)
            status.append(130)
        except BrokenPipeError:
            m.silence_stdout()
            status.append(0)
        except (m.UserError, OSError, RuntimeError, UnicodeError) as error:
            message = str(error)
            if isinstance(error, RuntimeError):
                if not m.is_out_of_memory(error):
                    raise
                first_line = message.partition("\n")[0]
                message = f"{first_line} {memory_advice}".rstrip()
            if m.WORLD.is_first_to("error"):  # of several processes the one that it began with, or any if all have it
                print(f"{program}: error: {message}", file=sys.stderr)
            status.append(2)
            try:
                sys.stdout.flush()
            except OSError:  # a full disk: what is left must not fail again at the end
                m.silence_stdout()


def show_end(trainer: m.Trainer, result: dict) -> None:
    """Print how a run went."""
    is_text = trainer.train_data.kind == "text"
    held_out = f" on {result['bytes']:,} held-out bytes" if is_text else ""
    figures = m.describe(result, ("bpb",) if is_text else m.FIGURES)
    print(f"done: {figures}{held_out} after {trainer.elapsed_s():.0f} s; saved in {trainer.run_dir}")


def show_run(trainer: m.Trainer, imported: str | None) -> None:
    """Print what a run learns from and trains; of a model from elsewhere also how, and for how long."""
    config, data, model, size = trainer.config, trainer.train_data, trainer.model, trainer.model.num_params()
    is_text = data.kind == "text"
    sizes = [len(part.tokens if is_text else part.items) for part in (data, trainer.val_data)]
    unit, places = "tokens" if is_text else "records", ", ".join(map(str, data.source.paths))
    places = f"{data.files} in " * bool(data.files) + places
    print(f"data: {sizes[0]:,} {unit} to train on, {sizes[1]:,} to validate on, from {places}")
    limits = [f"{config.minutes:g} minutes", f"{config.epochs:g} epochs", f"{config.max_steps} steps"]
    limits = " or ".join(text for text in limits if not text.startswith("0 "))
    details = f", {model.num_params(active=True) / 1e6:.1f} M active" if model.config.num_experts else ""
    if config.lora_rank:
        details += f", of which LoRA trains {sum(p.numel() for p in trainer.trained.parameters() if p.requires_grad):,}"
    where = f"on {trainer.device} in {config.dtype.replace('auto', str(trainer.dtype)[6:])}"  # torch.float32, say
    where += " (the fastest here)" * trainer.has_chosen_dtype + ", compiled" * trainer.compiles
    print(f"model: {size / 1e6:.2f} M parameters{details}; {limits} {where}", flush=True)
    if imported is None:
        return
    print(f"{imported}: --optimizer {config.optimizer} --learning-rate {config.learning_rate:.1e}", end=" ")
    print(f"--batch-size {config.batch_size} --seq-len {config.seq_len}")
    if size > 1e8 and trainer.device.type == "cpu" and not config.lora_rank:
        print("on a CPU it takes long to train so many parameters: try --lora-rank 8")
    if data.kind != "prompt":  # at 40 % of the speed of a matrix product
        tokens = sizes[0] if is_text else data.sides * sum(data.lengths[i] for i in data.items)  # of an epoch
        rows = tokens / config.seq_len if is_text else sizes[0]
        epochs = config.epochs or config.max_steps * config.batch_size * config.accumulation_steps / rows
        seconds = (
            epochs * tokens * model.flops_per_token(config.seq_len) / 0.4 / m.matmul_peak(trainer.device, config.dtype)
        )
        minutes = min(seconds / 60, config.minutes or math.inf)
        print(f"about {minutes:.1f} minutes, and some for evaluations", flush=True)


def table(rows: list[dict], prompt: str) -> str:
    """Return the pipeline's rows in 100 columns."""
    lines = [f"{'stage':<9}{'seconds':>8}  {'held-out metric':<16}{'before':>8}{'after':>8}  reply to: {prompt}"]
    for row in rows:
        form = "{:.1%}" if row["metric"] in ("exact match", "pair accuracy") else "{:.4f}"
        before, after = ("" if value is None else form.format(value) for value in (row["before"], row["after"]))
        reply = " ".join(row["reply"].split())
        lines.append(f"{row['stage']:<9}{row['seconds']:>8.0f}  {row['metric']:<16}{before:>8}{after:>8}  {reply}")
    return "\n".join((line if len(line) <= 100 else line[:99] + "…").rstrip() for line in lines)


def show_records(data: m.BatchLoader, count: int, trainer: m.RLTrainer | None = None) -> None:
    """Print records as a stage sees them, what is trained in green (or «…»), and all lengths; a trainer replies."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("«", "»")

    def show(title, ids, trained):
        text = ""
        for is_trained, run in itertools.groupby(range(len(ids)), trained.__getitem__):
            part = data.tokenizer.decode([ids[at] for at in run], skip_special_tokens=False)
            text += on + part + off if is_trained else part
        print(f"-- {title}: {len(ids)} tokens, {sum(trained)} trained\n{text.rstrip()}")

    if data.kind == "text":
        for i, row in enumerate(data.tokens.split(data.seq_len)[:count], 1):
            show(i, row.tolist(), [True] * len(row))
        return
    for i in data.items[:count] if data.kind != "chat" else range(min(count, len(data.lengths))):
        for side in range(data.sides):
            ids, trained = (x.tolist() for x in data.sequence(i, side))
            show(f"{i + 1}, {('chosen', 'rejected')[side]}" if data.sides == 2 else i + 1, ids, trained)
        if data.kind == "chat":
            if lost := data.ends[i + 1] - data.ends[i] - len(ids):
                print(f"   warning: over-long: {lost} tokens beyond seq_len={data.seq_len} cut off")
            if data.truncated[i]:
                print("   warning:", "missing end-of-turn" if any(trained) else "nothing to train on: left out")
        if trainer:
            batch = trainer.rollout(data.collate([i]))[0]
            reply = batch["input_ids"][0][batch["labels"][0] != -100].tolist()
            show("a reply", reply, [True] * len(reply))
            print(f"   answer {data.note(i)['answer']!r}, reward {batch['scores'].item():.4g}")
    full = sorted(end - start for start, end in itertools.pairwise(data.ends))
    least, half, most, longest = (full[(len(full) - 1) * tenths // 10] for tenths in (0, 5, 9, 10))
    noun = {"chat": "conversations", "preference": "completions, with prompts,"}.get(data.kind, "prompts")
    spread = f"{least} … {longest}, half up to {half}, nine tenths up to {most}"
    print(f"lengths of {len(full)} {noun} in tokens: {spread} (seq_len {data.seq_len})")


PANELS = (
    ("loss", "val_loss"), ("val_bpb",), ("reward", "val_reward"), ("kl", "val_kl"),
    ("val_exact_match", "val_pair_accuracy"), ("reply_length",), ("lr",), ("grad_norm",),
)  # fmt: skip
NOT_DRAWN = re.compile(
    "step|(val_)?(tokens|bytes)|tok_per_s|mfu|skipped|peak_bytes|elapsed_s|rollout_.*|updates|count|val_.*"
)


def import_pyplot() -> Any:
    m.import_extra("matplotlib", "plot").use("Agg")  # it draws into files only
    return m.import_extra("matplotlib.pyplot", "plot")


def plot(runs: list[str], path: Path) -> int:
    """Draw what runs have logged, a panel a figure, all runs together."""
    rows = {run: m.read_metrics(run) for run in runs}
    if path.suffix != ".png":
        raise m.UserError(f"--png {path} is not possible: it must end in .png")
    pyplot = import_pyplot()
    logged = dict.fromkeys(name for run in rows.values() for row in run for name in row)
    known = set(itertools.chain.from_iterable(PANELS))
    others = [(name,) for name in logged if name not in known and not NOT_DRAWN.fullmatch(name)]  # parts of a loss
    panels = [[name for name in names if name in logged] for names in (*PANELS, *others)]
    panels = [names for names in panels if names]
    if not panels:
        raise m.UserError(f"{', '.join(runs)}: nothing has been logged yet")
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, squeeze=False, figsize=(4.2 * columns, 3 * height))
    for axis, names in itertools.zip_longest(axes.flat, panels):
        if names is None:
            axis.remove()
            continue
        for (k, run), name in itertools.product(enumerate(runs), names):
            points = [(row["step"], row[name]) for row in rows[run] if row.get(name) is not None]
            held_out = name.startswith("val_")
            label = "/".join(Path(run).parts[-2:]) + ", held out" * (held_out and len(names) > 1)
            style = {"marker": "o", "markersize": 4} if held_out else {"linewidth": 0.8, "alpha": 0.6}
            if points:
                axis.plot(*zip(*points, strict=True), color=f"C{k}", label=label, **style)
        axis.set(title=names[-1].removeprefix("val_").replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"{path}: {len(panels)} panels of {', '.join(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
