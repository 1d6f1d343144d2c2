"""Tests of MiniLLM against oracles (transformers, tokenizers, float64, brute force); equivalences, faults, learning.

`pytest` runs everything, the benchmarks once each as plain tests; `pytest --benchmark-only` times them.
"""

import dataclasses
import doctest
import gzip
import itertools
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import minillm as m
import sample
import train

HERE = Path(__file__).parent
TEXTS = [
    "你好，世界！小模型也能训练。",
    "Hello, world! It's a small model; don't panic.",
    "def f(x):\n    return x + 1\n",
    "小猫看见一条鱼，小猫很高兴。小狗也看见一条鱼。",
    "1 + 12 = 13。The cat has 3 apples  and\t2 pears.\r\n",
    "café naïve Ωμέγα 日本語のテスト 😀👍",
] * 3


def shape(**changes) -> m.MiniGPTConfig:
    return m.MiniGPTConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            **changes,
        }
    )


def moe_shape(**changes) -> m.MiniGPTConfig:
    return shape(
        **{"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 24, **changes}
    )


def random_model(config: m.MiniGPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> m.MiniGPT:
    """A model whose weights are all random: the zeros and ones of initialisation would hide mistakes."""
    torch.manual_seed(seed)
    model = m.MiniGPT(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


def random_ids(B: int, T: int, V: int = 300, low: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokenizer() -> m.BPETokenizer:
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train(TEXTS)
    assert tokenizer.vocab_size == 300
    return tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 60 documents."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"text": f"第{i}天，小猫吃了{i % 7}条鱼。The cat ate {i % 7} fish on day {i}."}, ensure_ascii=False
            )
            + "\n"
            for i in range(60)
        ),
        encoding="utf-8",
    )
    return path


# -- config and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (m.MiniGPTConfig, "vocab_size", 0),
        (m.MiniGPTConfig, "hidden_size", -1),
        (m.MiniGPTConfig, "num_attention_heads", 3),
        (m.MiniGPTConfig, "num_key_value_heads", 3),
        (m.MiniGPTConfig, "head_dim", 7),
        (m.MiniGPTConfig, "dropout", 1.0),
        (m.MiniGPTConfig, "rope_theta", 0.5),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": 2}),
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
        (m.GenerationConfig, "temperature", 0),
        (m.GenerationConfig, "top_p", 0.0),
        (m.GenerationConfig, "num_beams", 0),
        (m.GenerationConfig, "max_new_tokens", 0),
        (m.GenerationConfig, "stop", [""]),
    ],
)
def test_config_names_the_bad_field(cls, field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("tiny", 1e6, 2e6), ("small", 22e6, 28e6), ("medium", 70e6, 90e6), ("large", 320e6, 380e6), ("moe", 60e6, 90e6)],
)
def test_presets_have_their_size(name, low, high):
    with torch.device("meta"):
        model = m.MiniGPT(m.get_config(name))
    assert low <= model.num_params() <= high
    if name == "moe":
        assert 22e6 <= model.num_params(active=True) <= 28e6


def test_flags_come_from_the_dataclass():
    parser = m.FlagParser()
    m.add_flags(parser, m.TrainConfig(), "training")
    help_text = parser.format_help()
    for field in dataclasses.fields(m.TrainConfig):
        assert "--" + field.name.replace("_", "-") in help_text
    assert "largest norm of the whole gradient" in help_text and "on out-of-memory" in help_text
    args = parser.parse_args(["--learning-rate", "0.1", "--seq-len", "7", "--no-auto-micro-batch", "--schedule", "wsd"])
    assert m.given_flags(args, m.TrainConfig) == {
        "learning_rate": 0.1,
        "seq_len": 7,
        "auto_micro_batch": False,
        "schedule": "wsd",
    }
    with pytest.raises(m.UserError, match="did you mean --learning-rate"):
        parser.parse_args(["--learing-rate", "1"])
    with pytest.raises(m.UserError, match="invalid choice"):
        parser.parse_args(["--schedule", "cosinus"])


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def nasty_texts() -> list[str]:
    draw = random.Random(0)
    pools = [
        "abc xyz'sdtllvere",
        "你好世界中国人𠮷々",
        " \t\n\r\u3000\xa0",
        "0123456789",
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
    return [*mixed, *any_char, "我" * 2000, "abc" * 700, " " * 50, "", *m.SPECIAL_TOKENS, "x<|eos|>y", *TEXTS]


def test_tokenizer_round_trips_all_bytes(tokenizer):
    draw = random.Random(0)
    for i in range(100_000):
        data = draw.randbytes(i % 24)
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    for text in nasty_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_equal_huggingface_tokenizers(tmp_path):
    hf = pytest.importorskip("tokenizers")
    ours = m.BPETokenizer(vocab_size=2000)
    docs = [json.loads(line)["text"] for line in open(HERE / "data/val/pretrain.jsonl", encoding="utf-8")]
    ours.train(docs[:300] + TEXTS)
    ours.save(tmp_path / "tokenizer.json")
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in nasty_texts() + docs:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert theirs.decode(ids) == text
    for special, i in zip(m.SPECIAL_TOKENS, range(5), strict=True):
        assert theirs.token_to_id(special) == i and i not in ours.encode(special)


@pytest.mark.parametrize(
    "texts", [TEXTS, ["low lower lowest newest widest"] * 2, ["哈哈哈哈 中国人民中国人 aaaaaaa"] * 3]
)
def test_every_merge_is_the_most_frequent_pair(texts):
    """Against a textbook BPE that counts all pairs anew for every merge."""

    def whole(token: bytes) -> bool:
        return token.decode("utf-8", "ignore").encode() == token

    word_counts = m._count_words(texts)
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


def test_training_is_deterministic_and_stops_cleanly(tokenizer, monkeypatch):
    again = m.BPETokenizer(vocab_size=300)
    again.train(iter(TEXTS))
    assert again.to_json() == tokenizer.to_json()
    docs = [json.loads(line)["text"] for line in open(HERE / "data/val/pretrain.jsonl", encoding="utf-8")]
    parallel, serial = m.BPETokenizer(vocab_size=600), m.BPETokenizer(vocab_size=600)
    parallel.train(docs * 12)  # large enough for child processes
    monkeypatch.delattr(os, "fork")
    serial.train(docs * 12)
    assert parallel.to_json() == serial.to_json()
    small = m.BPETokenizer(vocab_size=5000)
    small.train("abab")
    assert small.vocab_size == m.FIRST_MERGE + 1 and small.decode(small.encode("abab")) == "abab"
    with pytest.warns(UserWarning, match="below the floor of 261"):
        m.BPETokenizer(vocab_size=10).train(["a"])


def test_docstring_examples():
    assert doctest.testmod(m) == (0, 5)


def test_chat_template(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好<|im_end|>"}], add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\n你好<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.im_end_id) == 1 and ids.count(tokenizer.im_start_id) == 2


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


# -- data --------------------------------------------------------------------------------------------------------------


def stream(tokens: torch.Tensor, tokenizer: m.BPETokenizer) -> str:
    return tokenizer.decode(tokens.long(), skip_special_tokens=False)


def encode(paths, tokenizer, split, cache) -> str:
    return stream(m.encode_corpus(paths, tokenizer, split, cache)[0], tokenizer)


def test_every_container_gives_the_same_documents(tmp_path, tokenizer):
    records = [{"text": "一、二、三"}, {"text": "a\nb"}]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n\r\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    expected = "<|bos|>一、二、三<|eos|><|bos|>a\nb<|eos|>"
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz"):
        assert encode(tmp_path / name, tokenizer, "all", tmp_path / "cache") == expected, name
    assert encode(tmp_path, tokenizer, "all", tmp_path / "cache2") == expected * 4
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + "第一行\r\n第二行\r\n".encode())
    assert encode(tmp_path / "t.txt", tokenizer, "all", tmp_path / "cache") == "<|bos|>第一行\n第二行\n<|eos|>"


def test_a_lone_text_gives_its_last_tenth_of_characters(tmp_path, tokenizer):
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
    docs = [json.loads(line)["text"] for line in open(corpus, encoding="utf-8")]
    for doc in docs:
        assert (f"<|bos|>{doc}<|eos|>" in train_text) != (f"<|bos|>{doc}<|eos|>" in val_text)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(reversed(lines)), encoding="utf-8")
    assert sorted(encode(corpus, tokenizer, "val", tmp_path / "c").split("<|eos|>")) == sorted(
        val_text.split("<|eos|>")
    )


def test_parallel_encoding_equals_serial(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "big.txt"
    path.write_text("".join(f"{i} 只小猫 and {i} dogs\n" for i in range(90_000)), encoding="utf-8")
    assert path.stat().st_size > 2e6
    parallel = m.encode_corpus(path, tokenizer, "train", tmp_path / "a")[0]
    monkeypatch.delattr(os, "fork")
    assert torch.equal(parallel.long(), m.encode_corpus(path, tokenizer, "train", tmp_path / "b")[0].long())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2:9: not JSON"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: .*string"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a.jsonl:1: unknown form of record \(txt\)"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: unknown"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', "a.jsonl:1: an escape"),
        ("a.txt", b"abc\xff", "a.txt: byte 3 is not UTF-8"),
        ("a.txt", "你".encode()[:2], "a.txt: ends inside"),
        ("a.txt", b"", "a.txt: no text to train on, but no records"),
        ("a.csv", b"a", "unknown kind of data file"),
        ("a.jsonl", b"", "a.jsonl: nothing for this stage, but no records: it takes text"),
        ("a.json", b"[" * 100_000, "a.json:1: JSON that can not be read"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a.jsonl:1: JSON that can not be read"),
        ("a.jsonl", b'{"messages": []}\n', "a.jsonl: nothing for this stage, but chat records: it takes text"),
        ("a.txt.gz", b"no gzip", "damaged .gz"),
    ],
)
def test_bad_data_is_named_with_its_place(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(m.UserError, match=message):
        m.encode_corpus(tmp_path / name, tokenizer, "all", tmp_path / "c")
    assert not list(tmp_path.glob("c/*"))


def test_bad_records_can_be_skipped_and_are_counted(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\nnot json\n{"text": 1}\n')
    with pytest.warns(UserWarning, match="skipped 2 malformed records, the first at .*a.jsonl:2"):
        tokens, _ = m.encode_corpus(tmp_path / "a.jsonl", tokenizer, "all", tmp_path / "c", "skip")
    assert stream(tokens, tokenizer) == "<|bos|>ok<|eos|>"


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
    with pytest.raises(m.UserError, match="the data, its split or the tokenizer"):
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


# -- model -------------------------------------------------------------------------------------------------------------


def load_huggingface(model: m.MiniGPT, state: dict[str, torch.Tensor]) -> None:
    """Copy a transformers state dict into a MiniGPT: the same names, with what is one product here joined."""
    state = {name.removeprefix("model."): value for name, value in state.items()}
    joined = {}
    for name in model.state_dict():
        if "qkv_proj" in name:
            joined[name] = torch.cat([state[name.replace("qkv", x)] for x in "qkv"])
        elif "mlp.gate_up_proj.weight" in name:
            joined[name] = torch.cat([state[name.replace("gate_up", x)] for x in ("gate", "up")])
        elif name.endswith(("mlp.gate_up_proj", "mlp.down_proj")):
            joined[name] = state[name.replace("mlp.", "mlp.experts.")]
        else:
            joined[name] = state[name]
    model.load_state_dict(joined)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "tied", "yarn"),
    [
        ("Llama", True, False),
        ("Llama", False, False),
        ("Llama", True, True),
        ("Qwen3", True, False),
        ("Qwen3", False, True),
        ("Qwen3Moe", True, False),
        ("Qwen3Moe", False, False),
    ],
)
def test_logits_equal_transformers(kind, tied, yarn):
    transformers = pytest.importorskip("transformers")
    config = (moe_shape if kind == "Qwen3Moe" else shape)(
        head_dim=16,
        qk_norm=kind != "Llama",
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        rope_scaling=YARN if yarn else None,
        **({"num_shared_experts": 0} if kind == "Qwen3Moe" else {}),
    )
    options = {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("qk_norm", "dropout", "rope_scaling", "rope_theta")
    }
    options["rope_parameters"] = {"rope_theta": config.rope_theta, **(YARN if yarn else {"rope_type": "default"})}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
    ours = m.MiniGPT(config).eval()
    load_huggingface(ours, theirs.state_dict())
    ids = random_ids(3, 100)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_nothing_looks_ahead():
    for config in (shape(), moe_shape()):
        model, ids = random_model(config), random_ids(1, 12)
        x = model.embed_tokens(ids).detach().requires_grad_()
        model.embed_tokens.forward = lambda _, x=x: x
        for t in range(12):
            (grad,) = torch.autograd.grad(model(ids)[0, t].square().sum(), x)
            assert (grad[0, t + 1 :] == 0).all() and (grad[0, : t + 1].abs().sum(-1) > 0).all()


def test_rms_norm_against_torch_and_finite_differences():
    x, w = (
        torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True),
        torch.rand(5, 8, dtype=torch.float64, requires_grad=True),
    )
    torch.testing.assert_close(m.rms_norm(x, w, 1e-6), F.rms_norm(x, (8,), eps=1e-6) * w)
    assert torch.autograd.gradcheck(lambda x, w: m.rms_norm(x, w, 1e-6), (x, w))


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
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss(k):
    moe = m.MixtureOfExperts(moe_shape(num_experts_per_tok=k)).train()
    with torch.no_grad():
        moe.gate.weight.zero_()
    x = torch.randn(1, 8, 32)
    assert moe(x)[1].item() == pytest.approx(1)  # equal probabilities
    with torch.no_grad():
        moe.gate.weight.normal_()
    weights, experts, loss = moe.route(x[0], None)
    share = torch.bincount(experts.flatten(), minlength=4) / (8 * k)
    assert loss.item() == pytest.approx(
        4 * (share * (x[0] @ moe.gate.weight.T).softmax(-1).mean(0)).sum().item(), rel=1e-5
    )
    padded = torch.cat((x, torch.randn(1, 3, 32)), dim=1)
    real = torch.tensor([[1] * 8 + [0] * 3])
    assert moe(padded, real)[1].item() == pytest.approx(loss.item(), rel=1e-5)
    assert moe.eval()(x)[1] == 0


def test_gradient_checkpointing_and_dropout():
    for config in (shape(dropout=0.0), moe_shape()):
        model, ids = random_model(config).train(), random_ids(2, 10)
        plain = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
        model.gradient_checkpointing = True
        for a, b in zip(plain, torch.autograd.grad(model(ids).square().mean(), list(model.parameters())), strict=True):
            torch.testing.assert_close(a, b)
    model = random_model(shape(dropout=0.5))
    assert torch.equal(model(ids), model(ids)) and not torch.equal(model.train()(ids), model(ids))


def test_the_first_loss_is_that_of_guessing():
    for name in ("tiny", "moe"):
        config = m.get_config(name)
        torch.manual_seed(0)
        model, ids = m.MiniGPT(config), random_ids(2, 32, config.vocab_size)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.2)


def test_flops_count_the_matrix_products():
    model = m.MiniGPT(shape(tie_word_embeddings=False, qk_norm=False))
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "embed_tokens.weight")
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # counted along, and negligible
    assert model.flops_per_token(64) == 6 * (products + vectors) + 6 * 2 * 32 * 64


# -- losses ------------------------------------------------------------------------------------------------------------


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
        torch.autograd.grad(3 * loss, (hidden, weight)), torch.autograd.grad(3 * plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(m.chunked_cross_entropy(hidden, weight, labels, chunk), plain)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tokenizer) -> m.TextGenerator:
    return m.TextGenerator(random_model(shape()), tokenizer)


def settings(**changes) -> m.GenerationConfig:
    return m.GenerationConfig(**{"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, **changes})


@pytest.mark.parametrize("config", [shape(), moe_shape(), shape(tie_word_embeddings=False, num_key_value_heads=1)])
def test_fast_generation_equals_naive(config, tokenizer):
    model, ids = random_model(config), random_ids(3, 6)
    fast = m.TextGenerator(model, tokenizer).greedy_search(ids, settings(min_new_tokens=12))
    assert torch.equal(fast, without_ends(model).generate(ids, 12))


def without_ends(model: m.MiniGPT) -> m.MiniGPT:
    """The model with EOS and <|im_end|> made impossible, as min_new_tokens does."""
    plain = type(model).forward
    model.forward = lambda ids, **kw: plain(model, ids, **kw).index_fill(-1, torch.tensor([2, 4]), -math.inf)
    return model


def test_rows_of_unequal_length_are_as_if_alone(generator, tokenizer):
    prompts = ["你", "Hello, world! It's", "1 + 12 ="]
    config = settings(do_sample=False, max_new_tokens=20)
    together = generator.generate(prompts, config)
    assert together == [generator.generate(prompt, config) for prompt in prompts]
    for beams in (2, 3):
        config = settings(num_beams=beams)
        assert generator.generate(prompts, config) == [generator.generate(prompt, config) for prompt in prompts]


def test_rows_after_their_end_are_padding_and_touch_nobody(generator, tokenizer):
    ids = random_ids(8, 5)
    config = settings(max_new_tokens=30)
    endless, ending = (m.TextGenerator(generator.model, tokenizer) for _ in range(2))
    endless.stop_ids = ()
    free = endless.greedy_search(ids, config).tolist()
    stop = free[0][12]  # a token that occurs becomes an end
    ending.stop_ids = (stop,)
    rows = ending.greedy_search(ids, config).tolist()
    assert len({row.index(stop, 5) for row in free if stop in row[5:]}) > 0
    for row, whole in zip(rows, free, strict=True):
        end = row.index(stop, 5) if stop in row[5:] else len(row) - 1
        assert row[: end + 1] == whole[: end + 1] and set(row[end + 1 :]) <= {tokenizer.pad_id}
        assert stop not in whole[5:end]


def test_sampling_filters_by_hand():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()

    def kept(**changes):
        probs, ids = m.sampling_probs(logits, settings(**changes))
        return {i: round(p, 4) for i, p in zip(ids[0].tolist(), probs[0].tolist(), strict=True) if p > 0}

    assert kept() == {0: 0.4, 2: 0.3, 3: 0.2, 1: 0.1}
    assert kept(top_k=2) == {0: 0.5714, 2: 0.4286}
    assert kept(top_p=0.5) == {0: 0.5714, 2: 0.4286}  # the token that crosses p stays
    assert kept(top_p=0.39) == {0: 1.0}
    assert kept(min_p=0.6) == {0: 0.5714, 2: 0.4286}
    assert kept(top_k=3, top_p=0.75) == {0: 0.5714, 2: 0.4286}  # of what top-k left, 4/9 and 3/9 reach 0.75
    assert kept(temperature=0.5) == {0: 0.5333, 2: 0.3, 3: 0.1333, 1: 0.0333}
    seen = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(
        m.penalise_repetition(torch.tensor([[2.0, 2.0, -2.0, -2.0]]), seen, 2.0), torch.tensor([[1.0, 2.0, -4.0, -2.0]])
    )


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


def all_continuations(generator, ids, length) -> list[tuple[list[int], float]]:
    """Every continuation of `length` tokens, or shorter with an end, and its log-probability, by brute force."""
    rows = []
    with torch.no_grad():
        for tokens in itertools.product(range(generator.model.config.vocab_size), repeat=length):
            ends = [i for i, t in enumerate(tokens) if t in generator.stop_ids]
            if ends and any(tokens[ends[0] + 1 :]):
                continue  # one of many spellings of the same ended text: keep the one padded with 0
            n = ends[0] + 1 if ends else length
            rows.append((list(tokens[:n]), n))
        out = []
        for tokens, n in rows:
            logp = generator.model(torch.cat((ids, torch.tensor([tokens])), dim=1))[0].log_softmax(-1)
            out.append((tokens, sum(logp[ids.shape[1] - 1 + i, t].item() for i, t in enumerate(tokens[:n]))))
    return out


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


def test_limits_of_generation(generator, tokenizer):
    ids = random_ids(2, 6)
    assert generator.greedy_search(ids, m.GenerationConfig(max_length=10, min_new_tokens=9)).shape == (2, 10)
    assert generator.greedy_search(ids, settings(max_new_tokens=500, min_new_tokens=500)).shape == (
        2,
        64,
    )  # the context
    with pytest.raises(m.UserError, match="a prompt of 64 tokens leaves no room"):
        generator.greedy_search(random_ids(1, 64))
    with pytest.raises(m.UserError, match="prompt ids lie in"):
        generator.greedy_search(torch.tensor([[300]]))
    with pytest.raises(m.UserError, match="max_length=6 leaves nothing"):
        generator.beam_search(ids, m.GenerationConfig(max_length=6, num_beams=2))
    with pytest.raises(m.UserError, match="padded on the left"):
        generator.greedy_search(ids, attention_mask=torch.tensor([[1] * 6, [1] * 5 + [0]]))
    with pytest.raises(m.UserError, match="integers"):
        generator.greedy_search(ids.float())
    with pytest.raises(m.UserError, match="can not stream"):
        next(generator.stream("x", settings(num_beams=2)))
    large = m.TextGenerator(random_model(shape(vocab_size=2000)), tokenizer)  # ids that the tokenizer does not have
    out = large.sample_generate(
        random_ids(64, 4, V=2000), settings(min_new_tokens=8, max_new_tokens=8, temperature=5.0)
    )
    assert out[:, 4:].max() < 300
    penalised = generator.greedy_search(ids, settings(repetition_penalty=1e9, min_new_tokens=12))
    assert all(len(set(row[6:])) == 12 and not set(row[6:]) & set(row[:6]) for row in penalised.tolist())


# -- optimisation and memory -------------------------------------------------------------------------------------------


def test_schedules():
    config = m.TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rate = m.learning_rate_at
    assert [rate(step, 0.0, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(9, 0.5, config) == pytest.approx(0.55) and rate(9, 1.0, config) == pytest.approx(0.1)
    wsd = dataclasses.replace(config, schedule="wsd", decay_fraction=0.2)
    assert [round(rate(9, p, wsd), 6) for p in (0.0, 0.8, 0.9, 1.0, 1.1)] == [1.0, 1.0, 0.55, 0.1, 0.1]


def test_newton_schulz_makes_matrices_orthogonal():
    torch.manual_seed(0)
    for rows, cols in ((16, 16), (8, 40), (40, 8)):
        x = torch.randn(3, rows, cols)
        singular = torch.linalg.svdvals(m.orthogonalise(x, steps=9))
        assert singular.min() > 0.6 and singular.max() < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert (m.orthogonalise(x, steps=9) * (u @ v)).sum((-2, -1)).min() > 0.85 * min(rows, cols)  # the nearest one


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
                m.orthogonalise(part.reshape(-1, *part.shape[-2:])).view_as(part) * 0.2 * max(part.shape[-2:]) ** 0.5
                for part in update.split(rows, dim=-2)
            ]
            before[n] = before[n] * (1 - 0.1 * 0.5) - 0.1 * torch.cat(parts, dim=-2)
            torch.testing.assert_close(dict(model.named_parameters())[n].detach(), before[n], rtol=1e-4, atol=1e-5)


def lm_batch(B: int, T: int, seed: int = 0, ragged: bool = False) -> dict[str, torch.Tensor]:
    ids = random_ids(B, T, seed=seed)
    labels = ids.clone()
    if ragged:
        for row in range(B):
            labels[row, 2 + (row * 5) % (T - 2) :] = -100
    return {"input_ids": ids, "labels": labels}


def trainer_for(tokenizer, config=None, dtype=torch.float32, shape_=None, **options) -> m.PreTrainer:
    model = random_model(shape_ or shape(), dtype=dtype)
    return m.PreTrainer(model, tokenizer, config=config or m.TrainConfig(warmup_steps=0), **options)


def gradients(trainer, batches) -> dict[str, torch.Tensor]:
    trainer._accumulate(batches)
    return {n: p.grad for n, p in trainer.model.named_parameters()}


def test_accumulation_is_weighted_by_tokens(tokenizer):
    rows = lm_batch(8, 20, ragged=True)
    one = gradients(trainer_for(tokenizer, dtype=torch.float64), [rows])
    eight = gradients(
        trainer_for(tokenizer, dtype=torch.float64), [{k: v[i : i + 1] for k, v in rows.items()} for i in range(8)]
    )
    for name, grad in one.items():
        torch.testing.assert_close(eight[name], grad, rtol=0, atol=1e-10)
    trainer = trainer_for(tokenizer, dtype=torch.float64)
    logits = trainer.model(rows["input_ids"])[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=-100)
    for (name, p), grad in zip(
        trainer.model.named_parameters(), torch.autograd.grad(plain, list(trainer.model.parameters())), strict=True
    ):
        torch.testing.assert_close(one[name], grad, rtol=0, atol=1e-10, msg=name)
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
    assert pressed.micro_splits == 4 and "out of memory" in capsys.readouterr().out
    for a, b in zip(calm.model.parameters(), pressed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    monkeypatch.setattr(m.PreTrainer, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(m.UserError, match="one row at a time"):
        pressed.step([batch])
    pressed.config.auto_micro_batch = False
    with pytest.raises(torch.OutOfMemoryError):
        pressed.step([batch])


def test_float16_with_the_scaler_skips_overflow_and_learns(tokenizer):
    trainer = trainer_for(tokenizer, m.TrainConfig(dtype="float16", warmup_steps=0))
    trainer.step([lm_batch(4, 20)])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    hook = trainer.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * math.inf)
    trainer.step([lm_batch(4, 20)])  # one bad matrix, which only Muon sees, must stop AdamW as well
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.skipped == 1
    hook.remove()
    trainer = trainer_for(tokenizer, m.TrainConfig(dtype="float16", warmup_steps=0))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)  # overflows at first
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step([lm_batch(4, 20)])
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.skipped == 1
    losses = [trainer.step([lm_batch(4, 20)])["loss"] for _ in range(60)]
    assert trainer.skipped < 20 and losses[-1] < 0.8 * losses[0]


def test_a_step_that_is_not_finite_touches_nothing(tokenizer):
    trainer = trainer_for(tokenizer)
    trainer.step([lm_batch(2, 10)])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    moments = m.digest([o.state_dict() for o in trainer.optimizers])
    hook = trainer.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    trainer.step([lm_batch(2, 10)])
    assert all(map(torch.equal, before, trainer.model.parameters())) and trainer.skipped == 1
    assert moments == m.digest([o.state_dict() for o in trainer.optimizers])
    with pytest.raises(m.UserError, match="not finite in 20 steps on end"):
        for _ in range(20):
            trainer.step([lm_batch(2, 10)])
    hook.remove()


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


# -- runs --------------------------------------------------------------------------------------------------------------


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


def test_fit_from_python_guards_the_run_and_its_data(tmp_path, tokenizer):
    config = m.TrainConfig(max_steps=4, warmup_steps=0, sample_tokens=0)
    with pytest.raises(m.UserError, match="no more batches"):  # a generator can be gone through once
        trainer_for(tokenizer, config, train_data=(lm_batch(2, 8) for _ in range(3)), run_dir=tmp_path / "a").fit()
    trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "b").fit()
    with pytest.raises(m.UserError, match="holds a run already"):
        trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "b").fit()
    with pytest.raises(m.UserError, match="do not belong together"):
        m.PreTrainer(m.MiniGPT(shape(vocab_size=200)), tokenizer)


def test_an_interrupt_ends_after_the_step_with_a_checkpoint(tmp_path, tokenizer):
    trainer = trainer_for(
        tokenizer, m.TrainConfig(max_steps=50, sample_tokens=0), train_data=[lm_batch(2, 8)], run_dir=tmp_path
    )
    plain_step = trainer.step

    def step(batches):
        if trainer.step_count == 3:
            signal.raise_signal(signal.SIGINT)
        return plain_step(batches)

    trainer.step = step
    assert trainer.fit()["signal"] == signal.SIGINT and m.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_checkpoints_run_no_code(tmp_path):
    torch.save({"x": Path("evil")}, tmp_path / "checkpoint.pt")
    with pytest.raises(m.UserError, match="no checkpoint can be read"):
        m.load_checkpoint(tmp_path / "checkpoint.pt")


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
        try:
            trainer.fit()
        except KeyboardInterrupt:
            pass
        return trainer

    straight = run("straight", 20)
    run("broken", 11)  # the last checkpoint is that of step 9
    resumed = run("broken", 20, resume=True)
    assert straight.step_count == resumed.step_count == 20
    for part in (
        lambda t: t.model.state_dict(),
        lambda t: [o.state_dict() for o in t.optimizers],
        lambda t: t.train_data.state_dict(),
    ):
        assert m.digest(part(straight)) == m.digest(part(resumed))
    states = [m.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("straight", "broken")]
    assert m.digest(states[0]["rng"]) == m.digest(states[1]["rng"])
    assert torch.equal(batches(straight.train_data, 1)[0], batches(resumed.train_data, 1)[0])
    steps = [
        [json.loads(line)["step"] for line in open(tmp_path / name / "metrics.jsonl")]
        for name in ("straight", "broken")
    ]
    assert steps[0] == steps[1]
    assert len(list((tmp_path / "broken").glob("*.pt"))) == 3


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [shape(), moe_shape(), shape(tie_word_embeddings=False)], ids=["dense", "moe", "untied"]
)
def test_training_improves_held_out_text(tmp_path, corpus, tokenizer, config):
    data, val = (
        m.PretrainDataLoader(corpus, tokenizer, 8, 32, split, cache_dir=tmp_path / "c") for split in ("train", "val")
    )
    settings = m.TrainConfig(
        batch_size=8,
        seq_len=32,
        max_steps=80,
        warmup_steps=5,
        learning_rate=1e-2,
        eval_every=0,
        save_every=0,
        sample_tokens=4,
    )
    torch.manual_seed(0)
    trainer = m.PreTrainer(
        m.MiniGPT(config), tokenizer, config=settings, train_data=data, val_data=val, run_dir=tmp_path / "run"
    )
    before = trainer.evaluate()
    after = trainer.fit()
    assert before["bpb"] > 3 and after["bpb"] < 0.75
    assert after["bytes"] == len(
        encode(corpus, tokenizer, "val", tmp_path / "c").replace("<|bos|>", "").replace("<|eos|>", "").encode()
    )
    assert after["bpb"] == pytest.approx(after["loss"] * after["tokens"] / math.log(2) / after["bytes"])


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
    assert (
        out.stdout.startswith("epoch loss: ") and "Mini-LLM" in out.stdout and out.stderr.count("below the floor") == 1
    )
    assert not list(tmp_path.iterdir())


# -- drivers -----------------------------------------------------------------------------------------------------------

SMALL = [
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--num-hidden-layers",
    "2",
    "--vocab-size",
    "300",
    "--seq-len",
    "32",
    "--batch-size",
    "4",
    "--max-position-embeddings",
    "64",
]


def test_train_eval_sample_resume(tmp_path, corpus, capsys):
    out = str(tmp_path / "out")
    args = ["--data", str(corpus), "--out", out, *SMALL, "--max-steps", "6", "--eval-every", "3", "--save-every", "2"]
    assert train.main(args) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "next:  python sample.py" in shown and "→" in shown
    run = tmp_path / "out/tiny/pretrain"
    assert {p.name for p in run.iterdir()} == {
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "best.pt",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
    }
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tok_per_s", "mfu", "peak_bytes", "elapsed_s"} <= rows[
        0
    ].keys()
    assert {"val_loss", "val_bpb"} <= rows[-1].keys()
    assert train.main(["--stage", "eval", "--init", str(run), "--out", out]) == 0  # on the run's own data
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["bpb"] == pytest.approx(rows[-1]["val_bpb"], rel=1e-6)
    assert sample.main(["--out", out, "--prompt", "第", "The", "--max-new-tokens", "5", "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "\n第" in text and "\nThe" in text and "tok/s" in text
    for strategy in ("greedy", "beam"):
        assert sample.main(["--run", str(run), "--prompt", "第", "--max-new-tokens", "5", "--strategy", strategy]) == 0
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert train.main(args) == 2 and "holds a run already" in capsys.readouterr().err
    assert train.main([*args, "--resume"]) == 2 and "no time left to train" in capsys.readouterr().err
    assert (
        train.main([*args, "--resume", "--hidden-size", "64"]) == 2
        and "hidden_size=64 (there 32)" in capsys.readouterr().err
    )
    assert train.main([*args, "--overwrite", "--data", "/no/such"]) == 2 and "/no/such" in capsys.readouterr().err
    assert (
        train.main([*args, "--resume", "--max-steps", "9", "--seed", "5"]) == 2 and "seed=5" in capsys.readouterr().err
    )
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert (
        train.main([*args, "--config", "tiny", "--resume", "--max-steps", "8"]) == 0
        and "at step 6" in capsys.readouterr().out
    )
    assert train.main([*args, "--overwrite", "--max-steps", "1"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg", "tiny"], "did you mean --config"),
        (["--stage", "pretran"], "invalid choice"),
        (["--config", "huge"], "invalid choice"),
        (["--learning-rate", "-1"], "learning_rate=-1.0"),
        (["--batch-size", "x"], "invalid int"),
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--resume"], "no run directory"),
        (["--stage", "eval"], "--init"),
        (["--stage", "eval", "--init", "/nowhere"], "no run directory"),
        (["--device", "tpu9"], "tpu9"),
        (["--device", "meta"], "meta"),
        (["--vocab-size", "100"], "--vocab-size 100"),
        (["--seq-len", "999"], "--seq-len 999"),
        (["--max-steps", "0"], "needs an end"),
        (["--seed", "99999999999999999999"], "seed="),
        (["--rope-scaling", "{a"], "rope-scaling"),
        (["--rope-scaling", '{"rope_type": "yarn", "factor": "4"}'], "rope_scaling="),
        (["--num-attention-heads", "5"], "num_attention_heads=5"),
        (["--dtype", "fp8"], "invalid choice"),
    ],
)
def test_train_reports_mistakes_in_one_message(tmp_path, capsys, argv, message):
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("train.py: error: ") and "Traceback" not in err and err.count("\n") == 1
    assert not (tmp_path / "out/tiny").exists()


def test_sample_reports_mistakes(tmp_path, capsys):
    for argv, message in (
        (["--out", str(tmp_path)], "no run in"),
        (["--temperature", "0"], "temperature=0.0"),
        (["--tempreture", "1"], "--temperature"),
        (["--run", str(tmp_path)], "no run directory"),
    ):
        assert sample.main(argv) == 2 and message in capsys.readouterr().err


def test_help_says_what_every_flag_does(capsys):
    for main in (train.main, sample.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        assert end.value.code == 0
    assert "--grad-clip" in capsys.readouterr().out


def test_importing_has_no_side_effects():
    code = (
        "import torch, sys; state, threads = torch.get_rng_state(), torch.get_num_threads(); import minillm; "
        "assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert out.stdout == "" and out.stderr == ""


def test_the_diffs_of_the_readme_apply():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    diffs = [block.split("```")[0] for block in readme.split("```diff\n")[1:]]
    assert len(diffs) == 3
    for diff in diffs:
        source = (HERE / "minillm.py").read_text(encoding="utf-8")
        for hunk in diff.split("@@\n")[1:]:
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] in " -")
            new = "\n".join(line[1:] for line in lines if line[:1] in " +")
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        compile(source, "minillm.py", "exec")


# -- benchmarks: run once as plain tests, timed by `pytest --benchmark-only` -------------------------------------------


@pytest.fixture
def benchmark(request, benchmark):
    benchmark.disabled = not request.config.getoption("--benchmark-only")
    return benchmark


def test_benchmark_training_step(benchmark, tokenizer):
    trainer = m.PreTrainer(m.MiniGPT(shape(hidden_size=64, max_position_embeddings=128)), tokenizer)
    benchmark(trainer.step, [lm_batch(4, 128)])


def test_benchmark_decoding(benchmark, generator):
    benchmark(generator.greedy_search, random_ids(1, 8), settings(min_new_tokens=20, max_new_tokens=20))


def test_benchmark_encoding(benchmark, tokenizer):
    benchmark(tokenizer.encode, "".join(TEXTS) * 100)
