"""Tests of MiniLLM against oracles (transformers, tokenizers, float64, brute force); equivalences, faults, learning.

`pytest` runs everything, the benchmarks once each as plain tests; `pytest --benchmark-only` times them.
"""

import dataclasses
import doctest
import functools
import gzip
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import bench
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


@pytest.fixture(scope="session", autouse=True)
def quick_measurements() -> None:
    """What each run measures and reads anew takes longer than the tests themselves."""
    m.matmul_peak, inspect.getsource = functools.cache(m.matmul_peak), functools.cache(inspect.getsource)


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
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "dynamic", "factor": 2}),
        (m.MiniGPTConfig, "rope_scaling", {"rope_type": "linear", "factor": 0.5}),
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
        ("a.txt", b"", "a.txt: (?!.*tenth).*(no text|empty)"),  # fails: speaks of a tenth, leaves a cache
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


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "odd yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def huggingface_model(kind: str, tied: bool = True, rope: str = "default", **changes):
    """A randomised model of transformers."""
    transformers = pytest.importorskip("transformers")
    config = (moe_shape if kind == "Qwen3Moe" else shape)(head_dim=16, max_position_embeddings=128, **changes)
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("qk_norm", "dropout", "rope_scaling")}
    options |= {"rope_parameters": {"rope_theta": 20000.0, **ROPES[rope]}, "tie_word_embeddings": tied}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    ("kind", "tied", "rope"),
    [
        ("Llama", True, "default"),
        ("Llama", False, "yarn"),
        ("Llama", False, "llama3"),
        ("Qwen3", True, "yarn"),
        ("Qwen3", False, "default"),
        ("Qwen3", False, "linear"),
        ("Llama", True, "odd yarn"),
        ("Qwen3Moe", True, "default"),
        ("Qwen3Moe", False, "yarn"),
    ],
)
def test_logits_equal_transformers_both_ways(tmp_path, kind, tied, rope):
    transformers = pytest.importorskip("transformers")
    theirs, ids = huggingface_model(kind, tied, rope), random_ids(3, 100)
    theirs.save_pretrained(tmp_path / "there", max_shard_size="20KB")
    assert len(list((tmp_path / "there").glob("*.safetensors"))) > 1
    ours = m.MiniGPT.from_pretrained(tmp_path / "there")
    assert (ours.config.rope_theta, ours.config.qk_norm, ours.config.tie_word_embeddings) == (
        20000.0,
        kind != "Llama",
        tied,
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


def test_older_spellings_and_half_precision(tmp_path):
    huggingface_model("Llama", rope="yarn").bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["eos_token_id"] = rope.pop("rope_theta"), [7, 9]
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}  # as releases of 2023 spell it
    config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, ids = m.MiniGPT.from_pretrained(tmp_path), random_ids(2, 60)
    assert ours.embed_tokens.weight.dtype == torch.float32 and ours.config.eos_token_id == 7
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ("config.json", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("config.json", {"use_sliding_window": True}, "use_sliding_window"),
        ("config.json", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling"),
        ("config.json", {"num_hidden_layers": 3}, "lack model.layers.2"),
        ("config.json", {"num_hidden_layers": 1}, "hold, against config.json, model.layers.1"),
        ("config.json", {"intermediate_size": 96}, r"gate_proj.weight is torch.float32 \(64, 32\)"),
        ("config.json", {"tie_word_embeddings": False}, "lack lm_head.weight"),
        ("config.json", {"hidden_size": "32"}, "hidden_size='32'"),
        ("config.json", {"vocab_size": None}, "vocab_size=None"),
        ("config.json", {"num_hidden_layers": 10**30}, "num_hidden_layers=10"),
        ("config.json", {"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
        ("config.json", {"rope_parameters": {"rope_type": []}}, "rope_parameters="),
        ("config.json", {"eos_token_id": [-1]}, r"eos_token_id=\[-1\]"),
        ("config.json", None, "hidden_size"),
        ("model.safetensors", b"\xff" * 8 + b"{}", "damaged"),
        ("model.safetensors", b"", "damaged"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../outside.safetensors"}}, "same directory"),
        ("model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}, "b.safetensors does not exist"),
        ("model.safetensors.index.json", {}, "weight_map"),
    ],
)
def test_what_can_not_be_imported_is_named(tmp_path, file, change, message):
    huggingface_model("Qwen3").save_pretrained(tmp_path)
    if "index" in file:
        (tmp_path / "model.safetensors").unlink()
    if isinstance(change, bytes):
        (tmp_path / file).write_bytes(change)
    elif "index" in file:
        (tmp_path / file).write_text(json.dumps(change))
    else:
        config = json.loads((tmp_path / file).read_text()) | (change or {})
        if change is None:
            del config["hidden_size"]
        (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(m.UserError, match=message):
        m.MiniGPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: m.MiniGPT(moe_shape()), "num_shared_experts=1"),
        (lambda: m.MiniGPT(moe_shape(num_shared_experts=0, qk_norm=False)), "qk_norm=False"),
        (lambda: m.RewardModel(shape()), "reward model"),
    ],
)
def test_what_can_not_be_exported_is_named(tmp_path, model, message):
    with pytest.raises(m.UserError, match=message):
        model().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def huggingface_tokenizer(family: str, path: Path) -> object:
    """Train a tokenizer as the releases of a family are made, save it into a directory, return it."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import normalizers, pre_tokenizers, processors

    byte_level, regex = pre_tokenizers.ByteLevel, tokenizers.Regex
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"qwen": qwen, "llama3": qwen.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")}
    specials = {
        "gpt2": ["<|endoftext|>"],
        "llama3": ["<|begin_of_text|>", "<|end_of_text|>"],
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[family]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=family == "llama3"))
    if family in split:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(regex(split[family]), "isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ]
        )
    elif family == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        )
    else:
        made.pre_tokenizer = byte_level(add_prefix_space=False)
    if family == "qwen":
        made.normalizer = normalizers.NFC()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
        special_tokens=specials if family in ("gpt2", "smollm") else [],  # the others come after the merges
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_special_tokens(specials)
    if family == "qwen":
        made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    if family == "llama3":
        begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
        made.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    made.encode_special_tokens = True
    return made


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen", "smollm"])
def test_imported_tokenizers_give_the_same_ids(tmp_path, family):
    theirs = huggingface_tokenizer(family, tmp_path)
    ours = m.BPETokenizer.load(tmp_path / "tokenizer.json")
    texts = [
        *TEXTS,
        *nasty_texts(),
        "It's IT'S 'ſ we'LL 12345 ٣½Ⅷ𝟘 <think> e\u0301 a</think><|endoftext|><|im_end|>",
        "hello" * 400 + "你好世界" * 200,
        " \n\n \t x\x85\u3000\u00a0 y\r\n\r\nz \x1c\x1f",
        "小猫ー" + "".join(map(chr, range(0x2E80, 0x3100))),
    ]
    for text in texts:
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")  # unknown to this Python
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text).ids, text
        if family != "qwen":  # which normalises
            assert ours.decode_bytes(ours.encode(text)) == text.encode()
    rare = "中\U00031661文\U0002ebf1 x"  # of Unicode 15, later than some Pythons
    assert ours.encode(rare, add_special_tokens=True) == theirs.encode(rare).ids
    assert ours.vocab_size == theirs.get_vocab_size()
    has_chat = family in ("qwen", "smollm")
    chat = [{"role": "user", "content": "小猫 <|im_end|>"}]
    if has_chat:
        ids = ours.apply_chat_template(chat, add_generation_prompt=True)
        assert ours.decode(ids, skip_special_tokens=False).endswith("<|im_end|><|im_end|>\n<|im_start|>assistant\n")
        assert ids.count(ours.im_end_id) == 1 and ours.stop_ids == (ours.eos_id, ours.im_end_id)
    else:
        with pytest.raises(m.UserError, match="can not hold conversations"):
            ours.apply_chat_template(chat)
    data = json.loads((tmp_path / "tokenizer.json").read_text())  # releases before 2024 spell merges in one string
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": theirs.id_to_token(0)}}))
    assert m.BPETokenizer.load(tmp_path / "tokenizer.json").encode(TEXTS[0]) == ours.encode(TEXTS[0])
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy/tokenizer.json")
    assert m.BPETokenizer.load(tmp_path / "copy/tokenizer.json").content_hash() == ours.content_hash()


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_out_of_order_and_twice_the_same_token(tmp_path, ignore_merges):
    """As in Llama 3's file, which lists every way to make a token, in the order of the results' ids."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(i): i - 33 for i in range(33, 127)}
    bytes_ = {c: i for i, c in enumerate(sorted(set(m._CHAR_TO_BYTE) - set(letters)), len(letters))}
    tokens = ["aba", "ab", "ba", "abab", "c" * 2, "c" * 3, "bc", "abc", "bcab"]  # no merges make the last
    vocab = letters | bytes_ | {token: 256 + i for i, token in enumerate(tokens)}
    merges = ["b c", "ab a", "a ba", "a b", "b a", "ab ab", "c c", "cc c", "c cc", "a bc"]
    merges = [tuple(pair.split()) for pair in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=ignore_merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = m.BPETokenizer.load(tmp_path / "tokenizer.json")
    for length in range(1, 9):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            assert ours.encode(text) == made.encode(text).ids, text
    assert (len(ours.encode("bcab")) == 1) == ignore_merges
    draw = torch.Generator().manual_seed(0)
    for length in range(31, 331):  # merged by the queue
        long = "".join("abc"[i] for i in torch.randint(0, 3, (length,), generator=draw).tolist())
        assert ours.encode(long) == made.encode(long).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        ({"added_tokens": []}, "no token ends a text"),
        ({"added_tokens": [{"id": 10**12, "content": "<|new|>", "special": True}]}, "id is not in 0"),
        ({"added_tokens": [{"id": 9, "content": "<|endoftext|>", "special": True}]}, "with id 9 is not supported"),
        ({"pre_tokenizer": None}, "without ByteLevel"),
    ],
)
def test_what_a_tokenizer_can_not_have_is_named(tmp_path, change, message):
    huggingface_tokenizer("gpt2", tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | change))
    with pytest.raises(m.UserError, match=message):
        m.BPETokenizer.load(tmp_path / "tokenizer.json")
    patterns = {r"\p{Han}+|a": r"\\p\{Han\}", r"\w+": r"\\w", r"[[:alpha:]]+": r"\[", r"[a-z&&x]": ""}
    for pattern, found in patterns.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"pre_tokenizer": split}))
        with pytest.raises(m.UserError, match=f"it has {found}"):
            m.BPETokenizer.load(tmp_path / "tokenizer.json")


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


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_rows_that_go_on_keep_their_own_past(generator, tokenizer, penalty):
    """Rows that have ended leave the batch; the caches, masks and seen tokens of the others are not mixed up."""
    alone = m.TextGenerator(generator.model, tokenizer)
    alone.stop_ids = ()
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 9, 3, 7, 6, 4, 8)]
    batch = m.pad_left(rows, tokenizer.pad_id)
    config = settings(max_new_tokens=25, repetition_penalty=penalty, do_sample=False)
    steps = []
    for k, (tokens, ended) in enumerate(alone._tokens(batch["input_ids"], config, batch["attention_mask"])):
        steps.append(tokens.clone())
        if k == 2:
            ended[[0, 2, 4, 5]] = True
    written = torch.stack(steps, dim=1)
    for i in (1, 3, 6):
        assert written[i].tolist() == alone.greedy_search(torch.tensor([rows[i]]), config)[0, len(rows[i]) :].tolist()
    assert not written[[0, 2, 4, 5], 3:].any()


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("config", [shape(num_hidden_layers=1), moe_shape(num_hidden_layers=1)])
def test_compiled_training_learns_the_same(config, tokenizer):
    losses = []
    for mode in ("off", "on"):
        trainer = m.PreTrainer(random_model(config), tokenizer, config=m.TrainConfig(compile=mode, max_steps=5))
        batches = [random_ids(2, 12, seed=k) for k in range(3)]
        losses.append([trainer.step([{"input_ids": ids, "labels": ids}])["loss"] for ids in batches])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_mixture_of_experts_is_not_compiled_for_decoding(tokenizer):
    with pytest.raises(m.UserError, match="can not be compiled"):
        m.TextGenerator(random_model(moe_shape()), tokenizer, compile=True)


@needs_compiler
def test_compiled_decoding_writes_the_same(tokenizer):
    model = random_model(shape(num_hidden_layers=1, max_position_embeddings=600))
    eager, compiled = (m.TextGenerator(model, tokenizer, compile=wanted) for wanted in (False, True))
    batch = m.pad_left([random_ids(1, n, seed=n)[0].tolist() for n in (5, 9)], tokenizer.pad_id)
    for config in (
        settings(do_sample=False, min_new_tokens=12),
        settings(seed=0, max_new_tokens=300, min_new_tokens=300, repetition_penalty=1.1),  # more slots: another graph
        settings(do_sample=False),
    ):
        rows = [g._complete(batch["input_ids"], config, batch["attention_mask"]) for g in (eager, compiled)]
        assert torch.equal(*rows)
    beams = settings(num_beams=2, min_new_tokens=30, max_new_tokens=30)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(*(g.beam_search(batch["input_ids"][1:], beams) for g in (eager, compiled)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1  # one for all steps


def test_decoding_without_a_compiler_is_one_message(tokenizer, monkeypatch):
    generator = m.TextGenerator(random_model(shape()), tokenizer, compile=True)

    def fail(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: 0, RuntimeError("no g++"), None)

    monkeypatch.setattr(generator, "compiled", fail)
    with pytest.raises(m.UserError, match="C\\+\\+ compiler"):
        generator.generate("hello", settings(max_new_tokens=3))


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


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"min_p": 0.01}, {"top_p": 0.7, "min_p": 0.2}])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])  # from nearly uniform, where thousands are kept, to a few
def test_sampling_filters_by_definition_on_a_large_vocabulary(changes, sharpness):
    logits = sharpness * torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    config = settings(**changes)
    probs, ids = m.sampling_probs(logits, config)
    got = torch.zeros(3, 3000).scatter_(1, ids, probs)
    for row, found in zip(logits.softmax(-1), got, strict=True):
        falling = row.sort(descending=True).values
        count = int((falling.cumsum(0) - falling < config.top_p).sum())
        expected = row * (row >= max(falling[count - 1], config.min_p * falling[0]))
        torch.testing.assert_close(found, expected / expected.sum())


def test_draw_takes_each_index_as_often_as_its_probability_says():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.375, 0.125, 0.0]).expand(20_000, -1)
    drawn = m.draw(probs, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    share = drawn.flatten().bincount(minlength=6) / 20_000
    torch.testing.assert_close(share, probs[0], atol=0.015, rtol=0)
    assert not share[[0, 2, 5]].any()


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


def test_a_run_that_stays_not_finite_says_where(tmp_path, corpus, tokenizer):
    data = m.PretrainDataLoader(corpus, tokenizer, batch_size=2, seq_len=16, split="all", cache_dir=tmp_path / "cache")
    config = m.TrainConfig(max_steps=50, log_every=1, save_every=4, eval_every=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=data, run_dir=tmp_path / "run")
    plain = trainer.loss
    trainer.loss = lambda batch: plain(batch) * (math.nan if trainer.step_count in (2, *range(5, 50)) else 1)
    with pytest.raises(m.UserError, match=r"20 steps on end, up to step 24, before item \d+ of epoch \d+ of the data"):
        trainer.fit()
    rows = m.read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows][:6] == [0, 0, 1, 1, 1, 2] and rows[2]["loss"] is None
    assert m.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 24


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


def test_a_whole_checkpoint_of_something_else_is_one_message(base, tmp_path):
    m.shutil.copytree(base / "pretrain", tmp_path / "run")
    state = m.load_checkpoint(tmp_path / "run/checkpoint.pt")
    shrunk = state["model"] | {"norm.weight": torch.ones(3)}
    for changed in ({"step": 1}, state | {"config": {}}, state | {"model": {}}, state | {"model": shrunk}):
        m.save_checkpoint(tmp_path / "run/checkpoint.pt", changed)
        with pytest.raises(m.UserError, match="checkpoint.pt does not hold such a run"):
            m.load_run(tmp_path / "run")


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

    trainer.step, before = step, signal.getsignal(signal.SIGINT)
    assert trainer.fit()["signal"] == signal.SIGINT and m.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before


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


# -- from base model to assistant: losses ------------------------------------------------------------------------------


def doubles(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spans(B: int, T: int, seed: int = 0) -> torch.Tensor:
    """(B, T) masks of one run of ones a row, of any place and length."""
    draw = random.Random(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for row in mask:
        start = draw.randrange(T)
        row[start : draw.randrange(start, T) + 1] = True
    return mask


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_loss():
    one = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)]  # h = (-1 + 2) - (-3 + 2.5) = 1.5
    assert m.dpo_loss(*one, beta=0.5).item() == pytest.approx(0.386871, abs=1e-6)  # ln(1 + e^-0.75)
    assert m.dpo_loss(*one, beta=0.5, kind="ipo").item() == pytest.approx(0.25)  # (1.5 - 1)²
    pc, pr, rc, rr = four = [doubles(9, seed=k) for k in range(4)]
    eq7 = [
        -math.log(sigmoid(0.3 * ((a - c) - (b - d))))
        for a, b, c, d in zip(*map(torch.Tensor.tolist, four), strict=True)
    ]
    eq17 = [(((a - c) - (b - d)) - 1 / 0.6) ** 2 for a, b, c, d in zip(*map(torch.Tensor.tolist, four), strict=True)]
    assert m.dpo_loss(*four, beta=0.3).item() == pytest.approx(sum(eq7) / 9, abs=1e-9)
    assert m.dpo_loss(*four, beta=0.3, kind="ipo").item() == pytest.approx(sum(eq17) / 9, abs=1e-9)
    assert m.dpo_loss(pc, pr, pc, pr, beta=0.3).item() == pytest.approx(math.log(2), abs=1e-12)
    huge = m.dpo_loss(*(torch.tensor([x]) for x in (-1e4, 0.0, 0.0, 0.0)), beta=1.0)
    assert huge.item() == pytest.approx(1e4)  # no overflow to infinity


def test_reward_loss():
    assert m.reward_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(0.313262, abs=1e-6)
    chosen, rejected = doubles(9), doubles(9, seed=1)
    eq1 = [-math.log(sigmoid(a - b)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert m.reward_loss(chosen, rejected).item() == pytest.approx(sum(eq1) / 9, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.5, 2.0, -2.4, 0.0),  # beyond 1.2, where there is nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # too unlikely: may come back
        (1.1, -2.0, 2.2, 2.2),
        (1.5, -2.0, 3.0, 3.0),  # too likely: may come back
        (0.5, -2.0, 1.6, 0.0),  # below 0.8, where there is nothing more to gain
    ],
)
def test_ppo_policy_loss_by_hand(ratio, advantage, loss, slope):
    old, mask = torch.tensor([[-1.3]], dtype=torch.float64), torch.tensor([[True]])
    new = (old + math.log(ratio)).requires_grad_()
    found = m.ppo_policy_loss(new, old, torch.tensor([[advantage]]), mask, 0.2)
    (grad,) = torch.autograd.grad(found, new)
    assert found.item() == pytest.approx(loss, abs=1e-9) and grad.item() == pytest.approx(slope, abs=1e-9)


def test_ppo_losses_against_their_equations():
    new, old, advantages = (doubles(4, 7, seed=k) for k in range(3))
    mask, policy, value = spans(4, 7), [], []
    values, before, returns = (doubles(4, 7, seed=k) for k in range(3, 6))
    for b, t in mask.nonzero().tolist():
        r, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
        policy.append(-min(r * a, min(max(r, 0.7), 1.3) * a))
        v, o, g = values[b, t].item(), before[b, t].item(), returns[b, t].item()
        value.append(0.5 * max((v - g) ** 2, (min(max(v, o - 0.4), o + 0.4) - g) ** 2))
    found = m.ppo_policy_loss(new, old, advantages, mask, 0.3)
    assert found.item() == pytest.approx(sum(policy) / len(policy), abs=1e-9)
    found = m.ppo_value_loss(values, before, returns, mask, 0.4)
    assert found.item() == pytest.approx(sum(value) / len(value), abs=1e-9)


def test_ppo_value_loss_by_hand():
    def loss(value, old, target):
        return m.ppo_value_loss(*(torch.tensor([[x]]) for x in (value, old, target)), torch.tensor([[1.0]]), 0.2).item()

    assert loss(0.5, 0.0, 0.5) == pytest.approx(0.045)  # right, but moved too far: ½ (0.2 - 0.5)²
    assert loss(1.0, 0.0, 0.5) == pytest.approx(0.125)  # ½ (1 - 0.5)² is the larger
    assert loss(0.1, 0.0, 0.5) == pytest.approx(0.08)  # not clipped


def test_gae_by_hand():
    rewards, values, mask = (torch.tensor([x]) for x in ([0.0, 0.0, 1.0], [0.5, 0.4, 0.6], [True] * 3))
    advantages, returns = m.gae(rewards, values, mask, gamma=1.0, lam=0.5)  # δ = -0.1, 0.2, 0.4
    torch.testing.assert_close(advantages, torch.tensor([[0.1, 0.4, 0.4]]))
    torch.testing.assert_close(returns, torch.tensor([[0.6, 0.8, 1.0]]))
    advantages, _ = m.gae(rewards, values, mask, gamma=0.5, lam=1.0)  # δ = -0.3, -0.1, 0.4
    torch.testing.assert_close(advantages, torch.tensor([[-0.25, 0.1, 0.4]]))
    torch.testing.assert_close(m.gae(rewards, values, mask, 0.5, 1.0)[1], torch.tensor([[0.25, 0.5, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.9, 1.0), (0.0, 0.5), (1.0, 1.0)])
def test_gae_equals_the_loop(gamma, lam):
    rewards, values, mask = doubles(6, 11), doubles(6, 11, seed=1), spans(6, 11, seed=3)
    expected = torch.zeros(6, 11, dtype=torch.float64)
    for b in range(6):
        after = advantage = 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            delta = rewards[b, t] + gamma * after - values[b, t]
            advantage = delta + gamma * lam * advantage
            after, expected[b, t] = values[b, t], advantage
    advantages, returns = m.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close((returns - values)[mask], expected[mask], rtol=0, atol=1e-9)


def test_whitening_looks_at_the_mask_alone():
    x, mask = doubles(5, 9) * 3 + 7, spans(5, 9)
    white = m.whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6) and (white[~mask] == 0).all()
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    other = torch.where(mask, x, 1e6)
    torch.testing.assert_close(m.whiten(other, mask), white)
    kept = m.whiten(x, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item())
    torch.testing.assert_close((kept - white)[mask], x[mask].mean().expand(int(mask.sum())))
    assert m.whiten(torch.ones(2, 3), torch.ones(2, 3)).abs().max() == 0  # nothing to scale


def test_kl_estimates():
    """By hand, and: over a whole vocabulary the expectations of k1 and k3 are the divergence itself."""
    policy, reference = torch.tensor(0.5).log(), torch.tensor(0.25).log()  # r = 1/2
    by_hand = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    for kind, value in by_hand.items():
        assert m.kl_estimate(policy, reference, kind).item() == pytest.approx(value, abs=1e-6)
    p, q = doubles(50, 6).log_softmax(-1), doubles(50, 6, seed=1).log_softmax(-1)
    true = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert (true > 0).all() and (m.kl_estimate(p, q, "k3") >= 0).all()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * m.kl_estimate(p, q, kind)).sum(-1), true, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.kl_estimate(p, q), m.kl_estimate(p, q, "k1"))


def test_grpo_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    assert m.grpo_advantages(rewards, 4).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    scaled = m.grpo_advantages(rewards, 4, "grpo")
    torch.testing.assert_close(scaled[0].item(), 0.5 / (3**-0.5 + 1e-4))  # deviation √(1 / 3)
    assert (scaled[4:] == 0).all()
    rewards = doubles(12)
    for kind in ("dr_grpo", "grpo"):
        expected = []
        for group in (rewards[:3], rewards[3:6], rewards[6:9], rewards[9:]):
            mean = sum(group.tolist()) / 3
            deviation = (sum((r - mean) ** 2 for r in group.tolist()) / 2) ** 0.5 + 1e-4
            expected += [(r - mean) / (deviation if kind == "grpo" else 1) for r in group.tolist()]
        assert m.grpo_advantages(rewards, 3, kind).tolist() == pytest.approx(expected, abs=1e-6)
        assert (m.grpo_advantages(torch.full((7,), 0.1), 7, kind) == 0).all()  # whose mean is not exactly 0.1


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 100), (0.7, 3), (2.0, 1)])
def test_token_logprobs(temperature, chunk):
    hidden, weight = doubles(2, 7, 8).requires_grad_(), doubles(50, 8, seed=1).requires_grad_()
    labels = random_ids(2, 7, 50, low=0)
    labels[0, 3:5] = labels[1, 0] = -100
    found = m.token_logprobs(hidden, weight, labels, temperature, chunk)
    every = (hidden @ weight.T / temperature).log_softmax(-1)
    plain = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
    assert (found[labels == -100] == 0).all()
    ours, theirs = (torch.autograd.grad((x * doubles(2, 7, seed=2)).sum(), (hidden, weight)) for x in (found, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert m.token_logprobs(hidden, weight, torch.full((2, 7), -100)).abs().sum() == 0


# -- from base model to assistant: reinforcement -----------------------------------------------------------------------


def prompt_batch(tokenizer, questions: list[str], answers: list[str] | None = None) -> dict:
    chats = [[{"role": "user", "content": question}] for question in questions]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return m.pad_left(rows, tokenizer.pad_id) | {"answers": answers or [""] * len(rows)}


def rl_trainer(cls, tokenizer, reward=lambda messages, reply, answer: float(answer), model=None, train=None, **rl):
    train = {"warmup_steps": 0, "answer_tokens": 6, "optimizer": "adamw", "learning_rate": 1e-3, **(train or {})}
    model = random_model(shape(vocab_size=310)) if model is None else model
    reference = random_model(model.config, seed=5)
    return cls(
        model,
        tokenizer,
        reward=reward,
        reference=reference,
        config=m.TrainConfig(**train),
        rl_config=m.RLHFConfig(**{"critic_warmup": 0, **rl}),
    )


WRITTEN = torch.tensor([[10, 0, 11, 4, 0, 0], [20, 21, 22, 23, 24, 25], [2, 0, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0]])


def let_write(monkeypatch, answers: torch.Tensor = WRITTEN) -> None:
    """Whatever the policy is asked, it writes `answers`."""
    monkeypatch.setattr(m.TextGenerator, "sample_generate", lambda self, ids, *_: torch.cat((ids, answers), dim=1))


def four_prompts(tokenizer) -> dict:
    return prompt_batch(tokenizer, ["a", "你好吗", "hi there", "xy"], ["1", "2", "3", "4"])


def test_an_answer_ends_with_its_first_end_of_turn(tokenizer, monkeypatch):
    let_write(monkeypatch)
    seen = []
    trainer = rl_trainer(
        m.GRPOTrainer,
        tokenizer,
        lambda messages, reply, answer: seen.append((messages, reply, answer)) or 1.0,
        missing_end_penalty=0.75,
    )
    prompts = four_prompts(tokenizer)
    batch, stats = trainer.rollout(prompts)
    assert not any(value.requires_grad for value in batch.values())
    begins = prompts["attention_mask"].sum(dim=1)
    for row, (n, length) in enumerate(zip(begins.tolist(), [4, 6, 1, 2], strict=True)):
        assert batch["mask"][row].nonzero().flatten().tolist() == list(range(n - 1, n - 1 + length))
        assert batch["input_ids"][row, n : n + length].tolist() == WRITTEN[row, :length].tolist()
        width = prompts["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :n], prompts["input_ids"][row, width - n :])
        assert batch["token_mask"][row].sum() == n + length == batch["last"][row] + 2
    assert batch["scores"].tolist() == [1, 0.25, 1, 1] and stats["ended"] == 0.75 and stats["reward"] == 1
    assert stats["answer_length"] == 13 / 4 and stats["accuracy"] == 0
    said = [tokenizer.decode(WRITTEN[row, :n].tolist()) for row, n in enumerate((4, 6, 1, 2))]
    asked = [[{"role": "user", "content": text}] for text in ("a", "你好吗", "hi there", "xy")]
    assert seen == list(zip(asked, said, ["1", "2", "3", "4"], strict=True))


def test_value_reward_and_logprob_belong_to_the_same_token(tokenizer, monkeypatch):
    """Position j is about token j + 1, whatever the padding: each figure is worked out anew from the plain prefix."""
    let_write(monkeypatch)
    rl = {"kl_coef": 0.3, "gamma": 0.5, "gae_lambda": 1.0, "temperature": 0.7, "missing_end_penalty": 0.5}
    trainer = rl_trainer(m.PPOTrainer, tokenizer, **rl)
    torch.nn.init.normal_(trainer.critic.score.weight)
    batch, stats = trainer.experience(four_prompts(tokenizer))
    kls, advantages = [], torch.zeros(batch["mask"].shape)
    with torch.no_grad():
        for row, ids in enumerate(batch["input_ids"]):
            places = batch["mask"][row].nonzero().flatten().tolist()
            earned, k1 = {}, {}
            for j in places:
                prefix, token = ids[None, : j + 1], ids[j + 1]
                policy, reference = (
                    (model(prefix)[0, -1, :300] / 0.7).log_softmax(-1)[token]
                    for model in (trainer.model, trainer.reference)
                )
                assert batch["logprobs"][row, j].item() == pytest.approx(policy.item(), abs=1e-5)
                assert batch["reference_logprobs"][row, j].item() == pytest.approx(reference.item(), abs=1e-5)
                value = trainer.critic(prefix).item()
                assert batch["values"][row, j].item() == pytest.approx(value, abs=1e-5)
                k1[j] = (policy - reference).item()
                earned[j] = -0.3 * k1[j]
            assert places[-1] == batch["last"][row]
            earned[places[-1]] += row + 1 - 0.5 * (row == 1)  # the answer's score; one answer lacks its end
            kls.append(sum(k1.values()))
            to_go = 0.0
            for j in reversed(places):  # λ = 1: returns are what is still to be earned
                to_go = earned[j] + 0.5 * to_go
                assert batch["returns"][row, j].item() == pytest.approx(to_go, abs=1e-4)
                advantages[row, j] = to_go - batch["values"][row, j]
    assert stats["kl"] == pytest.approx(sum(kls) / 4, abs=1e-4)
    mask = batch["mask"]
    white = (advantages - advantages[mask].mean()) / advantages[mask].std(correction=0)
    torch.testing.assert_close(batch["advantages"], white * mask, rtol=0, atol=1e-4)
    assert (batch["logprobs"][~mask] == 0).all() and (batch["advantages"][~mask] == 0).all()


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_the_ratio_is_one_at_first_and_nothing_old_has_a_gradient(tokenizer, monkeypatch, cls):
    ratios, plain = [], m.ppo_policy_loss

    def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range):
        assert logprobs.requires_grad and not old_logprobs.requires_grad and not advantages.requires_grad
        ratios.append((logprobs - old_logprobs).detach().exp())
        return plain(logprobs, old_logprobs, advantages, mask, clip_range)

    monkeypatch.setattr(m, "ppo_policy_loss", policy_loss)
    model = random_model(shape(dropout=0.3))
    draw = random.Random(0)
    trainer = rl_trainer(
        cls, tokenizer, lambda *_: draw.random(), model, minibatch_size=4, stop_kl=0.0, group_size=2, temperature=0.8
    )
    batch, _ = trainer.experience(four_prompts(tokenizer))
    assert not any(value.requires_grad for value in batch.values())
    result = trainer.step([four_prompts(tokenizer)])
    assert result["updates"] == len(ratios) == 2 * (1 if cls is m.PPOTrainer else 2)
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-5)
    assert (ratios[1] - 1).abs().max() > 1e-3


def mixed_prompts(tokenizer) -> dict:
    return prompt_batch(tokenizer, ["a" * n for n in (9, 1, 30, 4, 17, 2, 25)], list("1234567"))


def in_small_pieces(monkeypatch) -> None:
    plain = m.pieces
    monkeypatch.setattr(m, "pieces", lambda lengths, rows=None, size=64: plain(lengths, rows, 2))


def test_pieces_hold_every_row_once_and_like_lengths():
    lengths = torch.tensor([5, 1, 9, 1, 7, 3, 8])
    assert [part.tolist() for part in m.pieces(lengths, size=3)] == [[1, 3, 5], [0, 4, 6], [2]]
    assert [part.tolist() for part in m.pieces(lengths, torch.tensor([6, 0, 2]), size=2)] == [[0, 6], [2]]
    assert [part.tolist() for part in m.pieces(lengths, torch.tensor([6, 0, 2]))] == [[6, 0, 2]]
    rows = torch.tensor([3, 5])
    part = m.take({"last": lengths, "wide": torch.arange(84).view(7, 12), "narrow": torch.arange(77).view(7, 11)}, rows)
    assert part["last"].tolist() == [1, 3] and part["wide"].shape == (2, 6) and part["narrow"].shape == (2, 5)
    assert part["narrow"][0].tolist() == list(range(33, 38))


def test_a_rollout_in_pieces_is_the_rollout(tokenizer, monkeypatch):
    """Rows keep their order and their figures, however they were grouped."""
    in_small_pieces(monkeypatch)
    reward = m.RewardModel(random_model(shape(vocab_size=310), seed=3))
    torch.nn.init.normal_(reward.score.weight)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, reward, missing_end_penalty=0.0)
    prompts = mixed_prompts(tokenizer)
    batch, _ = trainer.experience(prompts)
    with torch.no_grad():
        for row, n in enumerate(prompts["attention_mask"].sum(dim=1).tolist()):
            assert torch.equal(batch["input_ids"][row, :n], prompts["input_ids"][row, -n:])
            ids, end = batch["input_ids"][row, : batch["last"][row] + 2][None], int(batch["last"][row]) + 1
            logprobs = trainer.model(ids)[0, :-1, :300].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert batch["mask"][row].nonzero().flatten().tolist() == list(range(n - 1, end))
            torch.testing.assert_close(batch["logprobs"][row, n - 1 : end], logprobs[n - 1 :], rtol=0, atol=1e-5)
            assert batch["scores"][row].item() == pytest.approx(trainer.reward(ids).item(), abs=1e-5)
            value = trainer.critic(ids[:, :n]).item()
            assert batch["values"][row, n - 1].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_an_update_in_pieces_is_the_update(tokenizer, monkeypatch, cls):
    in_small_pieces(monkeypatch)
    torch.manual_seed(0)
    trainer = rl_trainer(cls, tokenizer, lambda *_: random.random(), group_size=2)
    batch, _ = trainer.experience(mixed_prompts(tokenizer))
    found = []
    for parts in ([batch], [m.take(batch, rows) for rows in m.pieces(batch["last"])]):
        trainer.modules.zero_grad()
        loss = trainer._accumulate(parts)
        found.append([torch.tensor(loss), *(p.grad for p in trainer.modules.parameters() if p.grad is not None)])
    assert len(parts) > 3 and len(found[0]) > 10
    for whole, pieced in zip(*found, strict=True):
        torch.testing.assert_close(pieced, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_the_reference_stays_as_it_is(tokenizer, cls):
    model = random_model(shape(dropout=0.5)).train()
    reference = random_model(model.config, seed=5).train()
    trainer = cls(
        model,
        tokenizer,
        reward=lambda *_: random.random(),
        reference=reference,
        config=m.TrainConfig(answer_tokens=6),
        rl_config=m.RLHFConfig(critic_warmup=0),
    )
    assert not trainer.reference.training and not any(p.requires_grad for p in trainer.reference.parameters())
    before = m.digest(trainer.reference.state_dict())
    batch, _ = trainer.rollout(four_prompts(tokenizer))
    with torch.no_grad():
        assert torch.equal(trainer.logprobs(trainer.reference, batch), batch["reference_logprobs"])
    policy = m.digest(trainer.model.state_dict())
    trainer.step([four_prompts(tokenizer)])
    assert not trainer.reference.training and m.digest(trainer.reference.state_dict()) == before
    assert m.digest(trainer.model.state_dict()) != policy and before == m.digest(reference.state_dict())
    trainer.modules.train()
    with torch.no_grad():
        assert torch.equal(trainer.logprobs(trainer.reference, batch), batch["reference_logprobs"])


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo"])
def test_equal_rewards_give_no_gradient(tokenizer, kind):
    rl = {"missing_end_penalty": 0.0, "advantage_kind": kind, "group_size": 5}
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda messages, reply, answer: 0.1 * float(answer), **rl)
    trainer.rl.grpo_kl_coef = 1.0  # all answers are kept
    batch, stats = trainer.experience(four_prompts(tokenizer))
    assert len(batch["scores"]) == 20 and stats["equal_groups"] == 1 and (batch["advantages"] == 0).all()
    trainer.rl.grpo_kl_coef = 0.0
    trainer.loss(batch).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in trainer.model.parameters())
    before = m.digest(trainer.model.state_dict())
    result = trainer.step([four_prompts(tokenizer)])  # and without it they are left out
    assert result["updates"] == 0 and trainer.step_count == 1 and m.digest(trainer.model.state_dict()) == before
    scores = itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    trainer.reward = lambda *_: next(scores)
    batch, stats = trainer.experience(four_prompts(tokenizer))
    assert stats["equal_groups"] == 0.5 and all(len(value) == 10 for value in batch.values())
    assert (batch["scores"].view(2, 5) == torch.tensor([2.0, 1, 1, 1, 1])).all()


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo"])
def test_grpo_loss_against_its_equation(tokenizer, monkeypatch, kind):
    let_write(monkeypatch)
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, advantage_kind=kind, group_size=2, grpo_kl_coef=0.2)
    prompts = {k: v[:2] for k, v in four_prompts(tokenizer).items()}
    scores = iter([1.0, 0.0, 0.0, 3.0])
    trainer.reward = lambda *_: next(scores)
    batch, _ = trainer.experience(prompts)
    torch.testing.assert_close(batch["scores"], torch.tensor([1.0, -1.0, 0.0, 3.0]))  # the second lacks its end
    deviations = [1.0, 1.0] if kind == "dr_grpo" else [2**0.5 + 1e-4, 4.5**0.5 + 1e-4]
    expected_advantages = [1 / deviations[0], -1 / deviations[0], -1.5 / deviations[1], 1.5 / deviations[1]]
    assert batch["advantages"].tolist() == pytest.approx(expected_advantages, abs=1e-5)
    batch["logprobs"] = batch["logprobs"] + 0.5 * doubles(*batch["mask"].shape).float()  # an old policy that differs
    with torch.no_grad():
        new, total = trainer.logprobs(trainer.model, batch), 0.0
        for i, length in enumerate([4, 6, 1, 2]):
            for t in batch["mask"][i].nonzero().flatten().tolist():
                a, ratio = batch["advantages"][i], (new[i, t] - batch["logprobs"][i, t]).exp()
                log_r = batch["reference_logprobs"][i, t] - new[i, t]
                term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.2 * (log_r.exp() - 1 - log_r)
                total -= term.item() / (length if kind == "grpo" else 6)
        assert trainer.loss(batch).item() == pytest.approx(total, rel=1e-4)
    assert trainer.weight(batch) == 4


def test_the_reward_is_read_at_the_last_real_token(tokenizer):
    model = m.RewardModel(random_model(shape()))
    torch.nn.init.normal_(model.score.weight)
    rows = [random_ids(1, n, seed=n)[0] for n in (5, 9, 2)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    alone = torch.cat([model(row[None]) for row in rows])
    for padded in (ids, ids.where(mask == 1, 77)):
        torch.testing.assert_close(model(padded, mask), alone)
    torch.testing.assert_close(alone[0], model.score(model.hidden_states(rows[0][None])[0])[0, -1, 0])
    again = m.RewardModel(model)
    torch.testing.assert_close(again(ids, mask), alone)
    assert m.RewardModel(m.MiniGPT(shape()))(ids, mask).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["reward_model", "python"])
def test_the_rewards_scores_reach_the_experience(tokenizer, monkeypatch, kind):
    let_write(monkeypatch)
    reward = m.RewardModel(random_model(shape(vocab_size=310, dropout=0.4), seed=3)).train()
    torch.nn.init.normal_(reward.score.weight)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, reward, missing_end_penalty=0.0)
    assert m.digest(trainer.critic.state_dict()) == m.digest(reward.state_dict())  # where the critic starts
    batch, _ = trainer.rollout(four_prompts(tokenizer))
    for row, n in enumerate((batch["last"] + 2).tolist()):
        with torch.no_grad():
            score = trainer.reward(batch["input_ids"][row : row + 1, :n]).item()
        assert batch["scores"][row].item() == pytest.approx(score, abs=1e-5)
    for bad in (math.nan, math.inf, "1", None):
        trainer = rl_trainer(m.GRPOTrainer, tokenizer, lambda *_, bad=bad: bad)
        with pytest.raises(m.UserError, match="the reward function gave"):
            trainer.rollout(four_prompts(tokenizer))


@pytest.mark.parametrize(("steps", "says"), [(3, True), (4, False), (0, False)])
def test_ppo_says_when_the_policy_will_not_move(steps, says, tokenizer, capsys):
    rl_trainer(m.PPOTrainer, tokenizer, train={"max_steps": steps}, critic_warmup=3)
    assert ("the policy stays as it is" in capsys.readouterr().out) == says


def test_a_seeded_rollout_draws_anew_in_each_piece(tokenizer, monkeypatch):
    in_small_pieces(monkeypatch)
    trainer = rl_trainer(m.PPOTrainer, tokenizer)
    rows = [trainer.write(prompt_batch(tokenizer, ["ab"] * 6), 5)[0] for _ in range(2)]
    assert all(map(torch.equal, *rows)) and len({tuple(row.tolist()) for row in rows[0]}) > 2


def test_evaluation_takes_no_more_than_eval_prompts(tokenizer, monkeypatch):
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, train={"eval_prompts": 6})
    trainer.val_data, seen, plain = [four_prompts(tokenizer)] * 3, [], trainer.rollout
    monkeypatch.setattr(trainer, "rollout", lambda prompts, seed: seen.append(prompts["answers"]) or plain(prompts))
    trainer.evaluate()
    assert [len(answers) for answers in seen] == [4, 2]


@pytest.mark.parametrize("kind", ["partial", "object"])
def test_any_callable_is_a_reward(tokenizer, tmp_path, kind):
    class Score:
        def __call__(self, messages, reply, answer):
            return 1.0

    reward = Score() if kind == "object" else functools.partial(lambda x, *_: x, 1.0)
    rl_trainer(m.GRPOTrainer, tokenizer, reward).save_checkpoint(tmp_path / "checkpoint.pt")


def test_a_reward_file_with_a_mistake_is_one_message(tokenizer, tmp_path):
    (tmp_path / "r.py").write_text("def f(:\n")
    with pytest.raises(m.UserError, match=r"r\.py:1: "):
        m.load_reward(f"{tmp_path}/r.py:f", tokenizer)


def test_adaptive_kl_and_early_end_of_updates(tokenizer, monkeypatch):
    let_write(monkeypatch)
    trainer = rl_trainer(m.PPOTrainer, tokenizer, kl_coef=0.1, kl_target=1e-3, kl_horizon=1)
    trainer.experience(four_prompts(tokenizer))
    assert trainer.kl_coef == pytest.approx(0.08)  # however short the horizon: never negative
    trainer = rl_trainer(m.PPOTrainer, tokenizer, kl_coef=0.1, kl_target=1e-3, kl_horizon=40)
    trainer.experience(four_prompts(tokenizer))
    assert trainer.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 4 / 40))  # what is written here is likelier there: KL < 0
    trainer.reference, trainer.model = trainer.model, trainer.reference
    trainer.experience(four_prompts(tokenizer))
    assert trainer.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 4 / 40) * (1 + 0.2 * 4 / 40))
    trainer = rl_trainer(m.PPOTrainer, tokenizer, train={"learning_rate": 0.1}, update_epochs=5, minibatch_size=2)
    trainer.config.warmup_steps = 0
    result = trainer.step([four_prompts(tokenizer)])
    assert result["updates"] < 10 and result["moved"] > 0.1


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_reinforcement_takes_any_iterable_of_prompts(tokenizer, cls):
    # PPO fails: train_epoch asks weight() of prompts, which have no mask yet
    loss = rl_trainer(cls, tokenizer).train_epoch([four_prompts(tokenizer), four_prompts(tokenizer)])
    assert math.isfinite(loss)


# -- from base model to assistant: conversations, pairs, prompts -------------------------------------------------------


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = itertools.cycle(("user", "assistant"))
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + said


def load(cls, tmp_path: Path, tokenizer, records: list[dict], name: str = "records.jsonl", **options):
    options = {"seq_len": 500, "split": "all", "shuffle": False, "cache_dir": tmp_path / "cache", **options}
    return cls(write_jsonl(tmp_path / name, records), tokenizer, **options)


def contents(loader) -> list[list[list[int]]]:
    return [[loader.sequence(i, part).tolist() for part in range(3)] for i in loader.items]


CHATS = [
    {"messages": turns("你好", "你好！")},
    {"messages": turns("小猫吃什么？", "吃鱼。", "小狗呢？", "吃骨头 🦴。", system="你是助手。")},
    {"messages": turns("2 + 2?", "4")},
    {"messages": turns("a" * 30, "b" * 40, "c", "d")},
    {"messages": turns("ok?", "")},
]


def test_only_the_assistants_own_tokens_are_trained(tmp_path, tokenizer):
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, packing=False, batch_size=1)
    for batch, chat in zip(loader, [CHATS[i] for i in loader.order()], strict=True):
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert [*ids.tolist(), *tokenizer.encode("\n")] == tokenizer.apply_chat_template(chat["messages"])
        trained = (labels != -100).nonzero().flatten()
        assert torch.equal(labels[trained], ids[trained])
        said = [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
        shown = tokenizer.decode(ids[trained], skip_special_tokens=False)
        assert shown == "".join(text + "<|im_end|>" for text in said)
        # what comes just before a trained run is the assistant's header: not a token late, not a token early
        starts = [t for t in trained.tolist() if labels[t - 1] == -100]
        header = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        assert len(starts) == len(said) and all(ids[t - len(header) : t].tolist() == header for t in starts)


def test_the_trained_positions_are_those_that_the_model_must_write(tmp_path, tokenizer):
    """SFT's loss is -log p(answer and its end | generation prompt), by the definition of each."""
    model = random_model(shape(max_position_embeddings=128))
    trainer = m.SFTTrainer(model, tokenizer)
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS[:1])
    batch = next(iter(loader))
    question = tokenizer.apply_chat_template(CHATS[0]["messages"][:1], add_generation_prompt=True)
    answer, total = [*tokenizer.encode("你好！"), tokenizer.im_end_id], 0.0
    with torch.no_grad():
        for token in answer:
            total -= model(torch.tensor([question]))[0, -1].log_softmax(-1)[token].item()
            question.append(token)
        assert trainer.loss(batch).item() == pytest.approx(total, abs=1e-4)
    assert trainer.weight(batch) == len(answer)


@pytest.mark.parametrize(
    "config",
    [shape(max_position_embeddings=150), moe_shape(max_position_embeddings=150, router_aux_loss_coef=0.0)],
    ids=["dense", "moe"],
)
def test_packed_rows_equal_one_conversation_a_row(tmp_path, tokenizer, config):
    """In rows of 200 tokens, more than the positions that there are: each conversation begins at position 0."""
    found, loss = [], []
    for packing in (True, False):
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=200, packing=packing)
        batches = list(loader)
        assert batches[0]["segments"].max() == (4 if packing else 1)
        trainer = m.SFTTrainer(random_model(config, dtype=torch.float64), tokenizer)
        found.append(gradients(trainer, batches))
        loss.append(sum(trainer.loss(batch).item() for batch in batches))
        for batch in batches:
            if not packing:
                assert torch.equal((batch["segments"] > 0).sum(1), batch["position_ids"].max(1).values + 1)
            for row, segments in zip(batch["position_ids"], batch["segments"], strict=True):
                for k in range(1, int(segments.max()) + 1):
                    place = (segments == k).nonzero().flatten()
                    assert row[place].tolist() == list(range(len(place))) and place[-1] - place[0] == len(place) - 1
    assert loss[0] == pytest.approx(loss[1], rel=1e-6)
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=1e-5, msg=name)


def test_conversations_of_a_row_do_not_see_each_other(tmp_path, tokenizer):
    trainer = m.SFTTrainer(random_model(shape(max_position_embeddings=256)), tokenizer)
    found = []
    for other in ("第一。", "totally different words"):
        records = [{"messages": turns("x", other)}, CHATS[0], {"messages": turns(other, "z")}]
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=250)
        batch = next(iter(loader))
        assert batch["segments"].max() == 3
        batch["labels"] = batch["labels"].where(batch["segments"] == loader.order().index(1) + 1, -100)
        trainer._zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_long_conversations_lose_whole_turns(tmp_path, tokenizer):
    chat = turns("a" * 10, "b" * 10, "c" * 10, "d" * 10, "e", "f" * 20)
    whole = tokenizer.apply_chat_template(chat)[:-1]  # all but the newline after the last turn
    two, one = len(tokenizer.apply_chat_template(chat[:4])), len(tokenizer.apply_chat_template(chat[:2]))
    head = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True))
    records = [{"messages": chat}, {"messages": turns("q", "r")}]
    for seq_len, kept, cut in ((len(whole), len(whole), False), (len(whole) - 3, two - 1, False), (two, two - 1, False),
                               (two - 2, one - 1, False), (one - 1, one - 1, False), (one - 2, one - 2, True),
                               (head + 1, head + 1, True)):  # fmt: skip
        options = {"seq_len": seq_len, "packing": False, "batch_size": 1}
        if seq_len == len(whole):
            loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, **options)
        else:
            message = f"of 2 conversations 1 exceed {seq_len} tokens: {1 - cut} lose turns at their end, {1 * cut} are"
            with pytest.warns(UserWarning, match=message):
                loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, **options)
        batch = list(loader)[loader.order().index(0)]
        assert batch["input_ids"][0].tolist() == whole[:kept]
        assert (batch["labels"][0, -1] == tokenizer.im_end_id) == (not cut)
        assert batch["labels"][0].max() >= 0
    with pytest.warns(UserWarning, match="1 are cut .* 1 of which hold nothing to train on"):
        loader = load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=head - 1)
    assert loader.items == [1] and len(loader.cut) == 1
    with pytest.raises(m.UserError, match="none of .* chat records fits 5 tokens"), pytest.warns(UserWarning):
        load(m.ConversationDataLoader, tmp_path, tokenizer, records, seq_len=5)
    for cls, record in (
        (m.DPODataLoader, {"prompt": "a", "chosen": "b" * 90, "rejected": "c"}),
        (m.PromptDataLoader, {"prompt": "a" * 90}),
    ):
        small = record | {"prompt": "b", **({"chosen": "b"} if "chosen" in record else {})}
        with pytest.warns(UserWarning, match="1 of 2 .* records exceed 60 tokens and are left out"):
            assert load(cls, tmp_path, tokenizer, [record, small], seq_len=60).items == [1]


def test_report_shows_what_is_trained(tmp_path, tokenizer):
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS)
    text = loader.report(2, colour=False)
    assert "assistant\n«你好！<|im_end|>»" in text and "-- 2: " in text and "lengths of 5 conversations" in text
    assert "\033[32m你好！<|im_end|>\033[0m" in loader.report(1, colour=True)
    with pytest.warns(UserWarning):
        text = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=60).report(9, colour=False)
    assert "over-long: " in text and "missing end-of-turn" in text


def record_for(cls, i: int) -> dict:
    if cls is m.DPODataLoader:
        return {"prompt": f"问题 {i}?", "chosen": "好" * (i % 5 + 1), "rejected": f"no {i}", "category": "ab"[i % 2]}
    if cls is m.PromptDataLoader:
        return {"prompt": f"question {i}" + "?" * (i % 7), "answer": i}
    return {"messages": turns(f"第{i}题", "答" * (i % 9) + str(i))}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (m.ConversationDataLoader, {"packing": True}),
        (m.ConversationDataLoader, {"packing": False}),
        (m.DPODataLoader, {}),
        (m.PromptDataLoader, {}),
    ],
)
def test_record_loaders_have_exact_cursors(tmp_path, tokenizer, cls, options):
    records = [record_for(cls, i) for i in range(40)]

    def loader(**changes):
        changes = {"shuffle": True, "seed": 3, "batch_size": 3, "seq_len": 120, **options, **changes}
        return load(cls, tmp_path, tokenizer, records, **changes)

    def take(loader, n):
        return list(itertools.islice((batch for _ in itertools.count() for batch in loader), n))

    epoch = len(list(loader()))
    whole = take(loader(), 2 * epoch + 3)
    assert m.digest(whole[0]) != m.digest(take(loader(seed=4), 1)[0])
    count = len(list(loader(shuffle=False)))
    name = {m.PromptDataLoader: "answers"}.get(cls, "input_ids")
    assert m.digest(whole[0][name]) != m.digest(whole[epoch][name]) and abs(count - epoch) <= 2
    for stop in (1, epoch - 1, epoch, epoch + 2):
        first, second = loader(), loader()
        take(first, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert m.digest(take(second, 4)) == m.digest(take(first, 4))
        fresh = loader()
        take(fresh, stop)
        assert m.digest(take(fresh, 2 * epoch + 3 - stop)) == m.digest(whole[stop:])
    with pytest.raises(m.UserError, match="seed=4"):
        loader(seed=4).load_state_dict(first.state_dict())
    with pytest.raises(m.UserError, match="the data, its split or the tokenizer"):
        load(cls, tmp_path, tokenizer, records[:9], name="other.jsonl", **options).load_state_dict(first.state_dict())
    seen = Counter(itertools.chain.from_iterable(
        b["answers"] if cls is m.PromptDataLoader else [tuple(r.flatten().tolist()) for r in b["input_ids"]]
        for b in loader(batch_size=1)))  # fmt: skip
    assert max(seen.values()) == 1 and (options.get("packing") or len(seen) == 40)
    parts = [load(cls, tmp_path, tokenizer, records, split=split, **options) for split in ("train", "val")]
    texts = [{loader.tokenizer.decode(loader.question(i)) for i in loader.items} for loader in parts]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 40


PLAIN = {"messages": turns("小猫吃什么？", "吃鱼。")}
WITH_SYSTEM = {"messages": turns("小猫吃什么？", "吃鱼。", system="你是助手。")}
LONG = {"messages": turns("你好", "你好！", "小猫吃什么？", "吃鱼。", system="你是助手。")}
TOOL = {
    "messages": [
        *turns("几点？", "查。"),
        {"role": "tool", "content": "9点"},
        {"role": "assistant", "content": "九点。"},
    ]
}


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        ({"conversations": PLAIN["messages"]}, PLAIN),
        ({"conversations": LONG["messages"]}, LONG),
        ({"conversations": [{"from": "human", "value": "小猫吃什么？"}, {"from": "gpt", "value": "吃鱼。"}]}, PLAIN),
        ({"conversations": [{"from": "human", "value": "小猫吃什么？"}, {"from": "gpt", "value": "吃鱼。"}],
          "system": "你是助手。"}, WITH_SYSTEM),
        ({"conversations": [{"from": "system", "value": "你是助手。"}, {"from": "human", "value": "小猫吃什么？"},
                            {"from": "gpt", "value": "吃鱼。"}]}, WITH_SYSTEM),
        ({"conversations": [{"from": "human", "value": "几点？"}, {"from": "gpt", "value": "查。"},
                            {"from": "observation", "value": "9点"}, {"from": "gpt", "value": "九点。"}]}, TOOL),
        ({"messages": PLAIN["messages"], "system": "你是助手。"}, WITH_SYSTEM),
        ({"instruction": "小猫吃什么？", "output": "吃鱼。"}, PLAIN),
        ({"instruction": "小猫吃什么？", "input": "", "output": "吃鱼。", "system": "", "history": []}, PLAIN),
        ({"instruction": "小猫吃什么？", "input": None, "output": "吃鱼。", "system": "你是助手。"}, WITH_SYSTEM),
        ({"instruction": "小猫吃什么？", "output": "吃鱼。", "system": "你是助手。", "history": [["你好", "你好！"]]},
         LONG),
        ({"instruction": "回答", "input": "小猫？", "output": "鱼"}, {"messages": turns("回答\n小猫？", "鱼")}),
        ({"prompt": "小猫吃什么？", "completion": "吃鱼。"}, PLAIN),
        ({"prompt": WITH_SYSTEM["messages"][:2], "completion": PLAIN["messages"][1:]}, WITH_SYSTEM),
        ({"prompt": "小猫吃什么？", "completion": "吃鱼。", "system": "你是助手。"}, WITH_SYSTEM),
        ({"input": "小猫吃什么？", "output": "吃鱼。"}, PLAIN),
    ],
)  # fmt: skip
def test_every_form_of_conversation(tmp_path, tokenizer, record, plain):
    forms = [
        load(m.ConversationDataLoader, tmp_path, tokenizer, [form | {"gt": "鱼"}], f"{k}.jsonl")
        for k, form in enumerate((record, plain))
    ]
    assert contents(forms[0]) == contents(forms[1]) and forms[0].text(0, 1) == "鱼"
    assert m.digest(list(forms[0])) == m.digest(list(forms[1]))
    if plain is TOOL:
        ids, own = tokenizer.encode_chat(TOOL["messages"])
        assert tokenizer.decode([i for i, o in zip(ids, own, strict=True) if o]) == "查。九点。"
    # the same records as prompts: the conversation less its last answer
    asked = load(m.PromptDataLoader, tmp_path, tokenizer, [record | {"answer": 3}], "prompt.jsonl")
    assert asked.question(0) == tokenizer.apply_chat_template(plain["messages"][:-1], add_generation_prompt=True)
    assert asked.text(0, 1) == "3" and forms[0].question(0) == asked.question(0)


ASK, GOOD, BAD = "小猫吃什么？", "吃鱼。", "吃石头。"
USER, CHOSEN, REJECTED = turns(ASK)[0], turns("", GOOD)[1], turns("", BAD)[1]
BEFORE = turns("你好", "你好！", ASK)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, [USER]),
        ({"prompt": ASK, "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}, [USER]),
        ({"prompt": [{"from": "human", "value": ASK}], "chosen": CHOSEN, "rejected": BAD}, [USER]),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, [USER]),
        ({"prompt": ASK, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
        ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
        ({"prompt": "", "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": None, "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": BEFORE, "chosen": [*BEFORE, CHOSEN], "rejected": [*BEFORE, REJECTED]}, BEFORE),
        ({"prompt": BEFORE[:1], "chosen": [*BEFORE[1:], CHOSEN], "rejected": [*BEFORE[1:], REJECTED]}, BEFORE),
        ({"chosen": f"\n\nHuman: 你好\n\nAssistant: 你好！\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
          "rejected": f"\n\nHuman: 你好\n\nAssistant: 你好！\n\nHuman: {ASK}\n\nAssistant: {BAD}"}, BEFORE),
        ({"system": "你是助手。", "prompt": ASK, "chosen": GOOD, "rejected": BAD}, turns(ASK, system="你是助手。")),
    ],
)  # fmt: skip
def test_every_form_of_preference(tmp_path, tokenizer, record, prompt):
    batch = next(iter(load(m.DPODataLoader, tmp_path, tokenizer, [record])))
    for side, answer in enumerate((CHOSEN, REJECTED)):
        ids = tokenizer.apply_chat_template([*prompt, answer])[:-1]  # ends with the end-of-turn, as a rollout does
        n = len(ids)
        assert ids[-1] == tokenizer.im_end_id
        assert batch["input_ids"][0, side, :n].tolist() == ids
        assert batch["attention_mask"][0, side].sum() == n and (batch["input_ids"][0, side, n:] == 0).all()
        labels = batch["labels"][0, side]
        assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=False) == answer["content"] + "<|im_end|>"
        begin = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True))
        assert labels[begin] >= 0 and (labels[:begin] == -100).all()


def test_a_prefix_that_both_sides_share_is_no_prompt_unless_it_is_one(tmp_path, tokenizer):
    """Plain strings that begin alike are answers that begin alike."""
    records = [{"prompt": ASK, "chosen": "好" + GOOD, "rejected": "好" + BAD}, {"chosen": "ab", "rejected": "ac"}]
    labels = load(m.DPODataLoader, tmp_path, tokenizer, records).collate([0, 1])["labels"]
    assert tokenizer.decode(labels[0, 0][labels[0, 0] >= 0]) == "好" + GOOD
    assert tokenizer.decode(labels[1, 1][labels[1, 1] >= 0]) == "ac"


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"prompt": ASK, "answer": "鱼"}, [USER], "鱼"),
        ({"prompt": [USER], "answer": 3}, [USER], "3"),
        ({"prompt": BEFORE, "gt": ["鱼", "fish", 2.5]}, BEFORE, "鱼\nfish\n2.5"),
        ({"prompt": USER}, [USER], ""),
        ({"prompt": ASK, "system": "你是助手。", "gt": None}, turns(ASK, system="你是助手。"), ""),
        ({"messages": [*BEFORE, CHOSEN], "answer": "鱼"}, BEFORE, "鱼"),
        ({"messages": BEFORE, "answer": "x"}, BEFORE[:1], "x"),
    ],
)
def test_every_form_of_prompt(tmp_path, tokenizer, record, prompt, answer):
    other = {"messages": turns("好", "b")} if "messages" in record else {"prompt": "好"}
    loader = load(m.PromptDataLoader, tmp_path, tokenizer, [record, other])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    batch = loader.collate([0, 1])
    assert batch["answers"] == [answer, ""] and batch["input_ids"][0].tolist() == ids
    short = int(batch["attention_mask"][1].sum())
    assert batch["attention_mask"][1].tolist() == [0] * (len(ids) - short) + [1] * short
    assert (batch["input_ids"][1, : len(ids) - short] == tokenizer.pad_id).all()
    assert tokenizer.decode_chat(ids) == prompt


@pytest.mark.parametrize(
    ("cls", "record", "message"),
    [
        (m.ConversationDataLoader, {"messages": [{"role": "robot", "content": "a"}]}, "role .*system, user"),
        (m.ConversationDataLoader, {"messages": [{"role": "user"}, CHOSEN]}, "content .* of type string"),
        (m.ConversationDataLoader, {"messages": [{"role": "user", "content": 3}, CHOSEN]}, "of type string"),
        (m.ConversationDataLoader, {"messages": [[USER]]}, "must be an object"),
        (m.ConversationDataLoader, {"messages": None}, "must be an object"),
        (m.ConversationDataLoader, {"messages": [USER, USER, CHOSEN]}, "two user messages"),
        (m.ConversationDataLoader, {"messages": [USER, CHOSEN, CHOSEN]}, "two assistant messages"),
        (m.ConversationDataLoader, {"messages": [USER, {"role": "system", "content": "s"}, CHOSEN]}, "only come first"),
        (m.ConversationDataLoader, {"messages": [USER]}, "without an assistant message"),
        (m.ConversationDataLoader, {"messages": []}, "without an assistant message"),
        (m.ConversationDataLoader, {"instruction": "a", "output": "b", "history": [["a"]]}, ""),
        (m.ConversationDataLoader, {"instruction": 3, "output": "b"}, ""),
        (m.ConversationDataLoader, PLAIN | {"answer": {"a": 1}}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": ASK, "answer": True}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": ASK, "gt": [["a"]]}, '"answer" must be'),
        (m.PromptDataLoader, {"prompt": [USER, CHOSEN]}, "must end with a message to answer"),
        (m.PromptDataLoader, {"prompt": []}, "must end with a message to answer"),
        (m.DPODataLoader, {"prompt": ASK, "chosen": GOOD, "rejected": GOOD}, '"chosen" must end with'),
        (m.DPODataLoader, {"prompt": ASK, "chosen": [CHOSEN], "rejected": []}, '"rejected" must end with'),
        (m.DPODataLoader, {"prompt": ASK, "chosen": 3, "rejected": GOOD}, "must be an object"),
        (m.DPODataLoader, {"prompt": [USER, USER], "chosen": GOOD, "rejected": BAD}, "two user messages"),
    ],
)
def test_bad_records_of_conversations(tmp_path, tokenizer, cls, record, message):
    good = {m.ConversationDataLoader: PLAIN, m.PromptDataLoader: {"prompt": "b"}}.get(
        cls, {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    with pytest.raises(m.UserError, match=f"records.jsonl:2: .*{message}"):
        load(cls, tmp_path, tokenizer, [good, record, good])
    with pytest.warns(UserWarning, match="skipped 2 malformed records, the first at .*records.jsonl:2: "):
        loader = load(cls, tmp_path, tokenizer, [good, record, good, record], on_bad_record="skip")
    assert len(loader.items) == 2


def test_a_file_without_records_of_the_kind_is_named(tmp_path, tokenizer):
    (tmp_path / "d").mkdir()
    for name, record in (("a", PLAIN), ("b", {"prompt": "a", "chosen": "b", "rejected": "c"}), ("c", {"text": "x"})):
        write_jsonl(tmp_path / "d" / f"{name}.jsonl", [record])
    options = {"seq_len": 99, "split": "all", "cache_dir": tmp_path / "cache"}
    for cls in (m.ConversationDataLoader, m.DPODataLoader, m.PromptDataLoader):
        assert len(cls(tmp_path / "d", tokenizer, **options).items) == 1
        with pytest.raises(m.UserError, match="c.jsonl: nothing for this stage, but text records: it takes"):
            cls([tmp_path / "d/c.jsonl", tmp_path / "d/a.jsonl"], tokenizer, **options)
    assert m.kinds_of(tmp_path / "d") == {"chat": 1, "preference": 1, "text": 1}


@pytest.mark.parametrize(
    ("reply", "answer", "same"),
    [
        ("Tom", "tom", True),
        ("Tom. He is my brother.", "Tom", True),
        ("是小明。他很好", "小明", False),
        ("小明。他很好", "小明", True),
        ("  小明！", "小明", True),
        ("3.5", "3", False),
        ("3.5", "3.5", True),
        ("3.", "3", True),
        ("three  men\nand", "Three men", True),
        ("a", "b\nA", True),
        ("", "a", False),
        ("a b", "a", False),
        ("Mr. Jones", "Mr. Smith", False),
        ("Mr. Smith! How nice.", "Mr. Smith", True),
        ("Mr. Smithers", "Mr. Smith", False),
        ("", ".", False),
    ],
)
def test_answer_matches(reply, answer, same):
    assert m.answer_matches(reply, answer) is same


# -- from base model to assistant: trainers ----------------------------------------------------------------------------


def pairs() -> list[dict]:
    return [record_for(m.DPODataLoader, i) for i in range(12)]


def test_a_rollout_is_scored_as_the_pairs_were(tmp_path, tokenizer, monkeypatch):
    """The reward model reads a sampled answer to the very token at which it was trained to judge."""
    records = [{"prompt": "你好吗", "chosen": "好。", "rejected": "bad"}]
    loader = load(m.DPODataLoader, tmp_path, tokenizer, records)
    model = m.RewardModel(random_model(shape(vocab_size=310)))
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():
        trained = m.RewardTrainer(model, tokenizer).scores(loader.collate([0]))[0]
    trainer = rl_trainer(m.GRPOTrainer, tokenizer, model)
    rows = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in ("好。", "bad")]
    width = max(map(len, rows))
    let_write(monkeypatch, torch.tensor([row + [0] * (width - len(row)) for row in rows]))
    batch, _ = trainer.rollout(prompt_batch(tokenizer, ["你好吗", "你好吗"], ["", ""]))
    torch.testing.assert_close(batch["scores"], trained, rtol=0, atol=1e-5)


def test_dpo_compares_sums_of_logprobs(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=4)
    model = random_model(shape(max_position_embeddings=128, dropout=0.3))
    reference = random_model(model.config, seed=4)
    alone = [[], []]
    for i in loader.order():
        for side in (0, 1):
            row = loader.sequence(i, side)
            ids, own = row >> 1, row & 1
            for which, net in enumerate((model, reference)):
                with torch.no_grad():
                    logprobs = net.eval()(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                alone[which].append((logprobs * own[1:]).sum())
    sums, references = (torch.stack(found).view(-1, 2) for found in alone)
    trainer = m.DPOTrainer(model, tokenizer, reference=reference, train_data=loader, val_data=loader)
    h = (sums - references) @ torch.tensor([1.0, -1.0])
    even = [i % 2 == 0 for i in loader.order()]
    for k, batch in enumerate(loader):
        torch.testing.assert_close(m.answer_logprobs(trainer.model, batch), sums[4 * k : 4 * k + 4], rtol=0, atol=1e-4)
        torch.testing.assert_close(batch["reference_logprobs"], references[4 * k : 4 * k + 4], rtol=0, atol=1e-4)
        expected = -F.logsigmoid(0.1 * h[4 * k : 4 * k + 4]).sum().item()
        assert trainer.loss(batch).item() == pytest.approx(expected, abs=1e-4)
        del batch["reference_logprobs"]  # nor does the cache differ from the model
        assert trainer.loss(batch).item() == pytest.approx(expected, abs=1e-4)
    result = trainer.evaluate()
    assert result["dpo_loss"] == pytest.approx(-F.logsigmoid(0.1 * h).mean().item(), abs=1e-5)
    assert result["pair_accuracy"] == pytest.approx((h > 0).float().mean().item())
    assert result["pair_accuracy_a"] == pytest.approx((h[even] > 0).float().mean().item())
    assert result["chosen_logprob"] == pytest.approx(sums[:, 0].mean().item(), abs=1e-3)
    assert result["loss"] * result["tokens"] == pytest.approx(-sums[:, 0].sum().item(), rel=1e-5)
    end = len(tokenizer.token_bytes[tokenizer.im_end_id])
    assert result["bytes"] == sum(len(record["chosen"].encode()) + end for record in pairs())


def test_dpo_starts_at_ln_2_and_leaves_the_reference_alone(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=4)
    model = random_model(shape(max_position_embeddings=128, dropout=0.3)).train()
    trainer = m.DPOTrainer(model, tokenizer, config=m.TrainConfig(warmup_steps=0, learning_rate=1e-3))
    before = m.digest(trainer.reference.state_dict())
    assert not trainer.reference.training
    batches = list(loader)
    first = [trainer.reference_logprobs(batch) for batch in batches]
    results = [trainer.step([batch])["loss"] for batch in batches]
    assert results[0] == pytest.approx(math.log(2), abs=1e-6) and results[1] != pytest.approx(math.log(2), abs=1e-6)
    assert m.digest(trainer.reference.state_dict()) == before != m.digest(trainer.model.state_dict())
    assert all(map(torch.equal, first, [trainer.reference_logprobs(batch) for batch in batches]))
    trainer = m.DPOTrainer(random_model(model.config), tokenizer, rl_config=m.RLHFConfig(dpo_sft_coef=2.0))
    policy = m.answer_logprobs(trainer.model, batches[0])[:, 0]
    lengths = (batches[0]["labels"][:, 0] != -100).sum(dim=1)
    expected = 4 * math.log(2) - 2 * (policy / lengths).sum().item()
    assert trainer.loss(batches[0]).item() == pytest.approx(expected, rel=1e-5)


def test_reward_trainer_scores_by_hand(tmp_path, tokenizer):
    loader = load(m.DPODataLoader, tmp_path, tokenizer, pairs(), batch_size=5)
    model = m.RewardModel(random_model(shape(max_position_embeddings=128)))
    torch.nn.init.normal_(model.score.weight)
    rl = m.RLHFConfig(reward_center_coef=0.1, reward_sft_coef=0.25)
    trainer = m.RewardTrainer(model, tokenizer, val_data=loader, rl_config=rl)
    with torch.no_grad():
        alone = torch.tensor([[model((loader.sequence(i, s) >> 1)[None]) for s in (0, 1)] for i in loader.items])
    gaps = alone[:, 0] - alone[:, 1]
    total = (-F.logsigmoid(gaps) + 0.1 * alone.sum(dim=1).square()).sum().item()
    for i in loader.items:  # and each chosen answer's mean loss a token
        stored = loader.sequence(i, 0)
        labels = (stored >> 1).where(stored & 1 == 1, -100)[1:]
        with torch.no_grad():
            total += 0.25 * F.cross_entropy(m.MiniGPT.forward(model, (stored >> 1)[None])[0, :-1], labels).item()
    assert sum(trainer.loss(batch).item() for batch in loader) == pytest.approx(total, rel=1e-4)
    result = trainer.evaluate()
    assert result["loss"] == pytest.approx(-F.logsigmoid(gaps).mean().item(), abs=1e-4)
    assert result["pair_accuracy"] == pytest.approx((gaps > 0).float().mean().item())
    longer = torch.tensor([len(loader.sequence(i, 0)) - len(loader.sequence(i, 1)) for i in loader.items]).sign()
    assert result["longer_accuracy"] == pytest.approx(((longer + 1) / 2).mean().item())
    assert "第" not in trainer.samples() and "问题 0? → 好 [" in trainer.samples()


@pytest.mark.parametrize(
    "config",
    [shape(), moe_shape(), shape(tie_word_embeddings=False), moe_shape(num_shared_experts=0)],
    ids=["dense", "moe", "untied", "no_shared"],
)
def test_lora_merged_equals_unmerged(config):
    model, ids = random_model(config), random_ids(2, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids)
        m.add_lora(model, 3, 6.0)
        torch.testing.assert_close(model(ids), plain)
        for name, p in model.named_parameters():
            assert p.requires_grad == (".lora_" in name)
            if name.endswith("lora_b"):
                p.normal_(std=0.1)
        unmerged = model(ids)
        weight = model.layers[0].self_attn.qkv_proj
        expected = before["layers.0.self_attn.qkv_proj.weight"] + 2.0 * weight.lora_b @ weight.lora_a
        m.merge_lora(model)
        torch.testing.assert_close(model(ids), unmerged, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.layers[0].self_attn.qkv_proj.weight, expected)
    assert (unmerged - plain).abs().max() > 0.01 and model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_lora_trains_its_own_and_a_run_of_it_is_a_plain_model(tmp_path, tokenizer):
    loader = load(m.ConversationDataLoader, tmp_path, tokenizer, CHATS, seq_len=64, packing=False)
    config = m.TrainConfig(lora_rank=2, max_steps=3, warmup_steps=0, sample_tokens=0, learning_rate=0.05)
    model = random_model(shape(tie_word_embeddings=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = m.SFTTrainer(model, tokenizer, config=config, train_data=loader, run_dir=tmp_path / "run")
    trained = {p for p in trainer.model.parameters() if p.requires_grad}
    held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert set(held) == trained and len(held) == len(trained) == 2 * 4 * 2
    trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    merged, _, state = m.load_run(tmp_path / "run")
    assert merged.state_dict().keys() == before.keys() and any("lora_a" in name for name in state["model"])
    ids = random_ids(2, 20)
    with torch.no_grad():
        difference = merged(ids) - random_model(model.config)(ids)
        torch.testing.assert_close(merged(ids), trainer.model.eval()(ids), rtol=0, atol=1e-5)
    assert difference.abs().max() > 0.01
    critic = m.RewardModel(random_model(shape()))
    reward = m.RewardTrainer(critic, tokenizer, config=m.TrainConfig(lora_rank=2))
    names = {name for name, p in reward.model.named_parameters() if p.requires_grad}
    assert "score.weight" in names and all(".lora_" in name for name in names - {"score.weight"})


def stage_records(path: Path) -> dict[str, dict]:
    """Small data of each stage in files under `path`, as `sources`."""
    words = ["cat", "dog", "小猫", "小狗", "fox", "cow", "pig", "hen", "ant", "bee"]
    for part, chosen in (("train", words[:8]), ("val", words[8:])):
        (path / part).mkdir(parents=True)
        write_jsonl(path / part / "text.jsonl", [{"text": f"{a} and {b}" * 3} for a in words for b in chosen])
        write_jsonl(path / part / "sft.jsonl", [{"messages": turns(a, a), "answer": a} for a in chosen])
        write_jsonl(path / part / "pref.jsonl", [{"prompt": a, "chosen": "good", "rejected": "bad!"} for a in chosen])
        write_jsonl(path / part / "prompts.jsonl", [{"prompt": a, "answer": a} for a in chosen])
    return {part: {"paths": [str(path / part)], "split": "all"} for part in ("train", "val")}


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), tokenizer)


def make_base(path: Path, tokenizer: m.BPETokenizer) -> Path:
    """A directory with data (`sources.json`) and the runs `pretrain` and `reward`, hardly trained."""
    sources = stage_records(path / "data")
    (path / "sources.json").write_text(json.dumps(sources))
    config = m.TrainConfig(max_steps=2, warmup_steps=0, sample_tokens=0)
    model = random_model(shape(dropout=0.1))
    data = [lm_batch(2, 16)]
    m.PreTrainer(model, tokenizer, config=config, train_data=data, val_data=data, run_dir=path / "pretrain").fit()
    config = stage_config(max_steps=2)
    m.open_stage("reward", path / "reward", path / "pretrain", sources, config, cache_dir=path / "cache").fit()
    return path


def stage_config(**changes) -> m.TrainConfig:
    settings = {
        "max_steps": 4,
        "batch_size": 3,
        "warmup_steps": 1,
        "answer_tokens": 6,
        "eval_prompts": 4,
        "sample_tokens": 0,
        "eval_every": 3,
        "save_every": 2,
        "log_every": 1,
    }
    return m.TrainConfig(**settings | changes)


def open_from(base: Path, stage: str, run_dir: Path, parent: Path | None = None, config=None, **options) -> m.Trainer:
    rl = m.RLHFConfig(group_size=4, minibatch_size=6, kl_target=0.1)
    sources = json.loads((base / "sources.json").read_text())
    config = config or stage_config()
    options = {"cache_dir": base / "cache", "reward": str(base / "reward") if stage == "ppo" else "answer", **options}
    return m.open_stage(stage, run_dir, parent or base / "pretrain", sources, config, rl, **options)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_every_stage_resumes_bit_for_bit(tmp_path, base, stage):
    straight = open_from(base, stage, tmp_path / "straight")
    straight.fit()
    broken = open_from(base, stage, tmp_path / "broken")
    plain_step = broken.step

    def step(batches):
        if broken.step_count == 3:
            raise KeyboardInterrupt
        return plain_step(batches)

    broken.step = step
    with pytest.raises(KeyboardInterrupt):
        broken.fit()  # the last checkpoint is that of step 3, after its evaluation
    torch.manual_seed(99)
    resumed = open_from(base, stage, tmp_path / "broken", resume=True)
    assert resumed.step_count == 3
    resumed.fit()
    states = [m.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("straight", "broken")]
    for part in ("model", "critic", "optimizers", "data", "rng", "extra", "step", "tokens", "best", "finished"):
        assert m.digest(states[0][part]) == m.digest(states[1][part]), part
    assert len(states[0]["critic"]) == (stage == "ppo") and states[0]["finished"]
    rows = [m.read_metrics(tmp_path / name) for name in ("straight", "broken")]
    timed = {"elapsed_s", "tok_per_s", "mfu", "peak_bytes", "rollout_tok_per_s", "rollout_share", "skipped"}
    clean = [[{k: v for k, v in row.items() if k not in timed} for row in found] for found in rows]
    assert clean[0] == clean[1] and rows[0][-1]["step"] == 4 and rows[0][0]["step"] == 0


def test_a_parent_that_has_changed_is_refused(tmp_path, base):
    for stage in ("dpo", "ppo", "grpo"):
        parent = tmp_path / f"parent of {stage}"
        m.shutil.copytree(base / "pretrain", parent)
        open_from(base, stage, tmp_path / stage, parent, stage_config(max_steps=1)).fit()
        state = m.load_checkpoint(parent / "checkpoint.pt")
        state["model"]["norm.weight"] += 1e-3
        m.save_checkpoint(parent / "checkpoint.pt", state)
        with pytest.raises(m.UserError, match="the reference is not the one"):
            open_from(base, stage, tmp_path / stage, parent, resume=True)
    with pytest.raises(m.UserError, match="holds a reward model"):
        open_from(base, "sft", tmp_path / "x", base / "reward")
    with pytest.raises(m.UserError, match="accumulation_steps=2"):
        open_from(base, "grpo", tmp_path / "x", config=stage_config(accumulation_steps=2))


def test_load_reward(tmp_path, base, tokenizer):
    assert m.load_reward("answer", tokenizer) is m.answer_reward
    assert isinstance(m.load_reward(str(base / "reward"), tokenizer), m.RewardModel)
    (tmp_path / "mine.py").write_text("def f(messages, reply, answer):\n    return len(reply)\n\nx = 3\n")
    assert m.load_reward(f"{tmp_path}/mine.py:f", tokenizer)([], "four", "") == 4
    for source, message in (
        (str(base / "pretrain"), "no reward model"),
        (str(tmp_path), "is neither answer, nor FILE.py:function, nor the run directory"),
        (f"{tmp_path}/mine.py:g", "no function g"),
        (f"{tmp_path}/mine.py:x", "no function x"),
        (f"{tmp_path}/nine.py:f", "there is no file"),
    ):
        with pytest.raises(m.UserError, match=message):
            m.load_reward(source, tokenizer)
    other = m.BPETokenizer(vocab_size=270)
    other.train(["another one another one"])
    with pytest.raises(m.UserError, match="its tokenizer is not the policy's"):
        m.load_reward(str(base / "reward"), other)
    with pytest.raises(m.UserError, match='needs prompts with an "answer"'):
        m.answer_reward(turns("hm?"), "a", "")
    assert m.answer_reward(turns("hm?"), "Yes.", "yes") == 1


# -- from base model to assistant: learning ----------------------------------------------------------------------------


def test_sft_learns_to_answer_held_out_questions(tmp_path, tokenizer):
    """The answer is the question's last letter, whatever stands before it."""
    draw = random.Random(0)
    words = {"".join(draw.choice("abcdef") for _ in range(3)) for _ in range(400)}
    words = sorted(words)
    draw.shuffle(words)
    records = [{"messages": turns(word, word[-1]), "answer": word[-1]} for word in words]
    data = load(m.ConversationDataLoader, tmp_path, tokenizer, records[40:], "t.jsonl", shuffle=True, seq_len=64)
    val = load(m.ConversationDataLoader, tmp_path, tokenizer, records[:40], "v.jsonl", seq_len=64)
    torch.manual_seed(0)
    config = m.TrainConfig(max_steps=100, warmup_steps=5, learning_rate=1e-2, batch_size=16, answer_tokens=4)
    trainer = m.SFTTrainer(m.MiniGPT(shape()), tokenizer, config=config, train_data=data, val_data=val,
                           run_dir=tmp_path / "run")  # fmt: skip
    before, after = trainer.evaluate(), trainer.fit()
    assert before["exact_match"] == 0 and after["exact_match"] > 0.9 and after["loss"] < 0.1 * before["loss"]
    assert after["tokens"] == 80 and after["bytes"] == 40 + 40 * len(tokenizer.token_bytes[tokenizer.im_end_id])


def test_the_reward_model_learns_what_is_preferred(tmp_path, tokenizer):
    draw = random.Random(0)
    names = sorted({"".join(draw.choice("abcdefgh") for _ in range(4)) for _ in range(150)})
    records = [
        {"prompt": name, "chosen": f"{name[::-1]} yes {name[0]}", "rejected": f"{name[::-1]} no {name[0]}"}
        for name in names
    ]
    options = {"batch_size": 16, "seq_len": 64}
    data = load(m.DPODataLoader, tmp_path, tokenizer, records[30:], "t.jsonl", shuffle=True, **options)
    val = load(m.DPODataLoader, tmp_path, tokenizer, records[:30], "v.jsonl", **options)
    torch.manual_seed(0)
    config = m.TrainConfig(max_steps=25, warmup_steps=5, learning_rate=1e-2, sample_tokens=0)
    trainer = m.RewardTrainer(m.RewardModel(m.MiniGPT(shape())), tokenizer, config=config, train_data=data,
                              val_data=val, run_dir=tmp_path / "run")  # fmt: skip
    assert trainer.evaluate()["pair_accuracy"] == 0.5  # all scores are 0
    assert trainer.fit()["pair_accuracy"] > 0.9
    policy = m.DPOTrainer(m.MiniGPT(shape()), tokenizer, config=config, train_data=data, val_data=val,
                          run_dir=tmp_path / "dpo")  # fmt: skip
    assert policy.evaluate()["dpo_loss"] == pytest.approx(math.log(2))
    result = policy.fit()
    assert result["pair_accuracy"] > 0.9 and result["dpo_loss"] < 0.5


@pytest.mark.parametrize("cls", [m.PPOTrainer, m.GRPOTrainer])
def test_reinforcement_raises_the_reward(tokenizer, cls):
    """The reward is the share of an answer's characters that are ASCII digits or letters."""

    def reward(messages, reply, answer):
        return sum(c.isascii() and c.isalnum() for c in reply) / max(1, len(reply))

    torch.manual_seed(0)
    prompts = prompt_batch(tokenizer, [f"{a}{b}" for a in "abcd" for b in "xyzw"])
    rl = {"kl_coef": 0.0, "missing_end_penalty": 0.0, "stop_kl": 0.0}
    trainer = rl_trainer(cls, tokenizer, reward, m.MiniGPT(shape()), {"answer_tokens": 8, "learning_rate": 1e-2}, **rl)
    if cls is m.PPOTrainer:
        prompts = {k: v.repeat(4, 1) if isinstance(v, torch.Tensor) else v * 4 for k, v in prompts.items()}
    rewards = [trainer.step([prompts])["reward"] for _ in range(20)]
    assert rewards[0] < 0.5 and sum(rewards[-3:]) / 3 > rewards[0] + 0.3


# -- from base model to assistant: pipeline and drivers ----------------------------------------------------------------


def test_the_pipeline_resumes_and_ends(tmp_path, base, monkeypatch, capsys):
    sources = json.loads((base / "sources.json").read_text())
    trains = {stage: stage_config(max_steps=3) for stage in ("sft", "reward", "ppo")}

    def pipeline():
        rl = m.RLHFConfig(minibatch_size=4)
        out = tmp_path / "out"
        return m.RLHFPipeline(rl, base / "pretrain", out, sources, trains, cache_dir=base / "cache")

    plain_step = m.RewardTrainer.step

    def step(self, batches):
        if self.step_count == 1:
            signal.raise_signal(signal.SIGTERM)
        return plain_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(m.RewardTrainer, "step", step)
        rows = pipeline().run()
    assert rows[-1]["signal"] == signal.SIGTERM and [row["stage"] for row in rows[:-1]] == ["pretrain", "sft"]
    assert m.load_checkpoint(tmp_path / "out/reward/checkpoint.pt")["step"] == 2
    capsys.readouterr()
    rows = pipeline().run()
    shown = capsys.readouterr().out
    assert "== sft" not in shown and "== reward" in shown and "== ppo" in shown
    assert [row["step"] for row in m.read_metrics(tmp_path / "out/reward") if "loss" in row] == [1, 2, 3]
    again = pipeline()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.pt")}
    assert again.run() == rows and "==" not in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.pt")}
    table = again.table(rows).splitlines()
    assert [line.split()[0] for line in table] == ["stage", "pretrain", "sft", "reward", "ppo"]
    assert all(len(line) <= 100 for line in table) and "pair accuracy" in table[3]
    wide = again.table([row | {"answer": "long " * 40} for row in rows]).splitlines()
    assert max(map(len, wide)) == 100


@pytest.fixture(scope="session")
def driven(base, tmp_path_factory) -> Path:
    """An --out with a pretrained run, for the drivers."""
    out = tmp_path_factory.mktemp("driven")
    m.shutil.copytree(base / "pretrain", out / "tiny/pretrain")
    return out


QUICK = ["--batch-size", "3", "--answer-tokens", "6", "--eval-prompts", "3", "--sample-tokens", "4"]


def huggingface_run(path: Path, kind: str = "Qwen3") -> Path:
    """A directory as transformers' users have them: a random model, a tokenizer with a chat template."""
    made = huggingface_tokenizer("qwen", path)
    ids = {name: made.token_to_id(token) for name, token in (("eos", "<|im_end|>"), ("pad", "<|endoftext|>"))}
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    (path / "chat_template.jinja").write_text("{{ messages }}")  # exported runs have plain ChatML instead
    changes = {"num_shared_experts": 0} if kind == "Qwen3Moe" else {}
    size = made.get_vocab_size() + 3  # releases round it up
    model = huggingface_model(kind, vocab_size=size, eos_token_id=ids["eos"], pad_token_id=ids["pad"], **changes)
    model.save_pretrained(path)
    return path


def same_in_transformers(folder: Path, run: Path) -> None:
    """An exported directory against the run that it comes from: ids, chat prompts, logits, greedy text."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    model, tokenizer, _ = m.load_run(run)
    generator = m.TextGenerator(model, tokenizer)
    for text in [*TEXTS[:6], "Once there was", "小猫", "\n\n a", " \n b \n"]:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert tokens(text)["input_ids"] == ids
        chat = [{"role": "system", "content": "简短"}, {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        assert tokens.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == prompt
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=2e-5)
        written = theirs.generate(ids, max_new_tokens=12, do_sample=False)
        ours = generator.greedy_search(ids, settings(max_new_tokens=12))
        assert written[0].tolist() == ours[0].tolist()


@pytest.mark.parametrize(
    "config",
    [shape(max_position_embeddings=128), moe_shape(max_position_embeddings=128, num_shared_experts=0)],
    ids=["dense", "moe"],
)
def test_an_exported_run_is_the_same_in_transformers_and_comes_back(tmp_path, tokenizer, config, capsys):
    pytest.importorskip("transformers")
    options = m.TrainConfig(max_steps=2, lora_rank=2, warmup_steps=0, sample_tokens=0)
    data = [lm_batch(2, 16)]
    run = tmp_path / "tiny/pretrain"
    m.PreTrainer(random_model(config), tokenizer, config=options, train_data=data, run_dir=run).fit()
    assert train.main(["--stage", "export", "--out", str(tmp_path)]) == 0  # the newest run
    folder = tmp_path / "tiny/export"
    assert str(folder) in capsys.readouterr().out
    same_in_transformers(folder, run)
    again, its_tokenizer, state = m.load_run(folder)
    assert its_tokenizer.content_hash() == tokenizer.content_hash() and state["step"] == 0
    merged = m.load_run(run)[0]
    assert all(map(torch.equal, again.parameters(), merged.parameters()))
    assert train.main(["--stage", "export", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train.main(["--stage", "export", "--out", str(tmp_path), "--overwrite", "--init", str(run)]) == 0


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
def test_an_imported_model_is_trained_like_any_other(base, tmp_path, kind, capsys):
    there, out = huggingface_run(tmp_path / "there", kind), tmp_path / "out"
    data = ["--data", str(base / "data/train"), "--val-data", str(base / "data/val"), "--out", str(out)]
    common = [*data, *QUICK, "--seq-len", "64", "--save-every", "1", "--log-every", "1", "--eval-tokens", "200"]
    first = ["--stage", "sft", "--lora-rank", "2", "--init", str(there), *common]
    assert train.main([*first, "--max-steps", "2"]) == 0
    assert train.main([*first, "--max-steps", "3", "--resume"]) == 0
    assert train.main(["--stage", "dpo", *common, "--max-steps", "1"]) == 0
    assert train.main(["--init", str(there), *common, "--max-steps", "1"]) == 0
    assert train.main(["--stage", "eval", "--init", str(there), *data, "--seq-len", "64"]) == 0
    assert sample.main(["--run", str(there), "--prompt", "小猫", "--max-new-tokens", "4"]) == 0
    assert train.main(["--stage", "export", "--init", str(out / "tiny/dpo"), "--out", str(out)]) == 0
    capsys.readouterr()
    same_in_transformers(out / "tiny/export", out / "tiny/dpo")
    assert train.main(["--config", "tiny", "--stage", "sft", "--init", str(there), *common, "--overwrite"]) == 2
    assert "contradict the loaded model" in capsys.readouterr().err
    (there / "tokenizer.json").unlink()
    assert sample.main(["--run", str(there)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_train_every_stage_eval_inspect_plot_chat(driven, base, tmp_path, monkeypatch, capsys):
    data = ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    common = ["--out", str(driven), *data, *QUICK, "--max-steps", "2"]
    assert train.main(["--stage", "ppo", *common]) == 2 and "there is no run" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("def f(messages, reply, answer):\n    return len(reply)\n")
    for stage, more in (
        ("sft", []),
        ("reward", ["--lora-rank", "2"]),
        ("dpo", ["--dpo-kind", "ipo"]),
        ("ppo", ["--minibatch-size", "2"]),
        ("grpo", ["--group-size", "2", "--reward", f"{tmp_path}/mine.py:f"]),
    ):
        assert train.main(["--stage", stage, *common, *more]) == 0
        shown = capsys.readouterr().out
        run = driven / "tiny" / stage
        assert "done: " in shown and "next:  python " in shown and str(run) in shown
        config = m.run_config(run)
        assert config["stage"] == stage and config["parent"].endswith("pretrain" if stage == "sft" else "sft")
        expected = {"sft": "val_exact_match", "ppo": "val_reward", "grpo": "val_reward"}.get(stage, "val_pair_accuracy")
        assert expected in m.read_metrics(run)[0] and expected in m.read_metrics(run)[-1]
        assert train.main(["--stage", stage, *common, *more]) == 2
        assert "holds a run already" in capsys.readouterr().err
    resumed = ["--stage", "grpo", "--out", str(driven), "--resume", "--max-steps", "3"]  # data and reward as before
    assert train.main(resumed) == 0 and "resuming at step 2" in capsys.readouterr().out
    for run, where, name in (
        ("sft", "data/val/sft.jsonl", "exact_match"),
        ("ppo", "data/val/sft.jsonl", "exact_match"),
        ("sft", "data/val/pref.jsonl", "pair_accuracy"),
        ("dpo", "data/val/pref.jsonl", "pair_accuracy"),
        ("reward", "data/val", "pair_accuracy"),
        ("grpo", "data/val/prompts.jsonl", "exact_match"),
        ("sft", "data/val/text.jsonl", "bpb"),
    ):
        argv = ["--stage", "eval", "--init", str(driven / "tiny" / run), "--val-data", str(base / where)]
        assert train.main([*argv, "--out", str(driven)]) == 0
        scores = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert name in scores and (name == "bpb" or 0 <= scores[name] <= 1)
        assert run != "sft" or where.endswith("prompts.jsonl") or {"loss", "bpb", "tokens", "bytes"} <= scores.keys()
    assert train.main(["--stage", "sft", "--inspect", "2", "--out", str(driven), *data]) == 0
    shown = capsys.readouterr().out
    assert "assistant\n«cat<|im_end|>»" in shown and "lengths of 8 conversations" in shown
    said = iter(["hello", "/reset", "", "你好"])
    lengths = []
    plain = m.TextGenerator.stream

    def stream(self, messages, config):
        lengths.append(len(messages))
        return plain(self, messages, config)

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(m.TextGenerator, "stream", stream)
    assert sample.main(["--run", str(driven / "tiny/sft"), "--chat", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert "(a new conversation)" in capsys.readouterr().out and lengths == [1, 1]
    assert sample.main(["--run", str(driven / "tiny/reward")]) == 2
    assert "reward model" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    runs = [str(driven / "tiny" / stage) for stage in ("sft", "ppo")]
    assert train.main(["--plot", *runs, "--png", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


SHORT = ["--answer-tokens", "6", "--data", "{prompts}", "--val-data", "{prompts}"]


def test_train_rlhf_in_one_go(base, tmp_path, capsys):
    m.shutil.copytree(base / "pretrain", tmp_path / "tiny/pretrain")
    data = ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    argv = ["--stage", "rlhf", "--out", str(tmp_path), *data, *QUICK, "--max-steps", "1"]
    assert train.main(argv) == 0
    shown = capsys.readouterr().out
    assert "held-out metric" in shown and "ppo --chat" in shown
    assert train.main(argv) == 0 and "== " not in capsys.readouterr().out


def everything(folder: Path) -> dict[str, bytes]:
    """All files under a folder but the caches."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
            and "cache" not in path.parts}  # fmt: skip


# What people get wrong: {name of a file: content}, command line, what the one line of the error says. {d} is where
# those files are, {out} an --out with a trained run, {run} that run.
def data_mistake(content, message, stage="pretrain", name="a.jsonl", *more):
    content = content if isinstance(content, bytes) else content.encode()
    where = ["--init", "{run}"] if stage != "pretrain" else []
    return {name: content}, ["train", "--stage", stage, *where, "--data", "{d}/" + name, *RUN, *more], message


RUN = ["--val-data", "{val}", "--out", "{out}", "--overwrite", "--max-steps", "1", *QUICK]
SAY, REPLY = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
GARBAGE = pickle.dumps(subprocess.Popen)  # what a pickle may run must not run
MISTAKES = [
    data_mistake("café au lait".encode("latin-1"), "byte 3 is not UTF-8", name="a.txt"),
    data_mistake("小".encode()[:2], "ends inside a UTF-8 character", name="a.txt"),
    data_mistake("你好".encode("utf-16"), "byte 0 is not UTF-8", name="a.txt"),
    data_mistake("", "empty", name="a.txt"),
    data_mistake("too short", "fewer than seq_len", "pretrain", "a.txt", "--seq-len", "60"),
    data_mistake('{"text": "a"}\n{"text": ', "a.jsonl:2:9: not JSON"),
    data_mistake('{"text": 3}', "a.jsonl:1: \"text\" must be a string, not int"),
    data_mistake('{"text": null}', "not NoneType"),
    data_mistake('{"text": ["a"]}', "not list"),
    data_mistake("[1, 2]", "a.jsonl:1: unknown form of record (list)"),
    data_mistake("3", "a.jsonl:1: unknown form of record (int)"),
    data_mistake('{"txt": "a"}', "unknown form of record (txt)"),
    data_mistake("{}", "empty object"),
    data_mistake('{"text": "a\\ud800"}', "a.jsonl:1: an escape"),
    data_mistake("[" * 100_000, "a.jsonl:1: JSON that can not be read"),
    data_mistake('{"text": ' + "9" * 5000 + "}", "a.jsonl:1: JSON that can not be read"),
    data_mistake("", "nothing for this stage, but no records"),
    data_mistake(" \n\n", "nothing for this stage, but no records"),
    data_mistake("a,b", "unknown kind of data file", "pretrain", "a.csv"),
    data_mistake('{"a": 1', "a.json:1:8: not JSON", "pretrain", "a.json"),
    data_mistake('[{"text": "a"}, {"b": 1}]', "a.json[1]: unknown form", "pretrain", "a.json"),
    data_mistake(b"no gzip", "damaged .gz", "pretrain", "a.txt.gz"),
    data_mistake(gzip.compress(b"hello" * 100)[:-9], "damaged .gz", "pretrain", "a.txt.gz"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + "]}", "nothing for this stage, but chat records"),
    data_mistake('{"text": "a"}', "nothing for this stage, but text records", "sft"),
    data_mistake('{"messages": [' + SAY + "," + SAY + "," + REPLY + "]}", "two user messages", "sft"),
    data_mistake('{"messages": [' + SAY + "]}", "without an assistant message", "sft"),
    data_mistake('{"messages": []}', "without an assistant message", "sft"),
    data_mistake('{"messages": 3}', "a message must be an object", "sft"),
    data_mistake('{"messages": [3]}', "a message must be an object", "sft"),
    data_mistake('{"messages": [{"role": "user"}]}', "a message needs a role", "sft"),
    data_mistake('{"messages": [{"role": "robot", "content": "a"}]}', "one of system, user", "sft"),
    data_mistake('{"messages": [{"role": "user", "content": 3}]}', "of type string", "sft"),
    data_mistake('{"messages": [' + SAY + ', {"role": "system", "content": "s"}]}', "may only come first", "sft"),
    data_mistake('{"conversations": [{"from": "gpt", "value": null}]}', "of type string", "sft"),
    data_mistake('{"instruction": 3, "output": "b"}', '"instruction" and "input" must be strings', "sft"),
    data_mistake('{"instruction": "a", "output": null}', "a message must be an object", "sft"),
    data_mistake('{"instruction": "a", "output": "b", "history": [["c"]]}', "pairs [question, answer]", "sft"),
    data_mistake('{"prompt": "a", "completion": 4}', "a message must be an object", "sft"),
    data_mistake('{"messages": [' + SAY + "," + REPLY + '], "answer": {}}', '"answer" must be a text', "sft"),
    data_mistake('{"prompt": "a", "chosen": "b"}', "nothing for this stage, but prompt records", "dpo"),
    data_mistake('{"prompt": "a", "chosen": "b", "rejected": "b"}', '"chosen" must end with an answer', "dpo"),
    data_mistake('{"prompt": "a", "chosen": 3, "rejected": "b"}', "a message must be an object", "reward"),
    data_mistake('{"prompt": "a", "chosen": "b", "rejected": [7]}', "a message must be an object", "dpo"),
    data_mistake('{"chosen": [' + SAY + '], "rejected": "b"}', '"chosen" must end with an answer', "dpo"),
    data_mistake('{"prompt": []}', "a prompt must end with a message to answer", "grpo"),
    data_mistake('{"prompt": [' + REPLY + "]}", "a prompt must end with a message to answer", "grpo"),
    data_mistake('{"prompt": 3}', "a message must be an object", "grpo"),
    data_mistake('{"prompt": "a", "gt": true}', '"answer" must be a text', "grpo"),
    data_mistake('{"prompt": "a"}', 'needs prompts with an "answer"', "grpo", "a.jsonl", "--reward", "answer"),
    data_mistake('{"prompt": "' + "long " * 99 + '"}', "none of 1 prompt records fits", "grpo"),
    *(
        ({}, ["train", *RUN, *words], message)
        for *words, message in (
            ("--data", "/no/such", "/no/such: no such file"),
            ("--data", "{d}", "a directory without any data file"),
            ("--val-data", "/no/such", "/no/such: no such file"),
            ("--leraning-rate", "1", "did you mean --learning-rate"),
            ("--max-steps", "many", "invalid int value: 'many'"),
            ("--max-steps", "-1", "max_steps=-1"),
            ("--max-steps", "0", "a run needs an end"),
            ("--batch-size", "0", "batch_size=0"),
            ("--learning-rate", "nan", "learning_rate=nan"),
            ("--learning-rate", "0", "learning_rate=0.0"),
            ("--beta1", "1", "beta1=1.0"),
            ("--seq-len", "0", "seq_len=0"),
            ("--seq-len", "9999", "--seq-len 9999 exceeds the context"),
            ("--config", "huge", "invalid choice: 'huge'"),
            ("--stage", "dream", "invalid choice: 'dream'"),
            ("--device", "tpu", "device 'tpu'"),
            ("--device", "cuda:99", "device 'cuda:99'"),
            ("--dtype", "int8", "invalid choice: 'int8'"),
            ("--seed", "-1", "seed=-1"),
            ("--minutes", "-1", "minutes=-1.0"),
            ("--schedule", "linear", "invalid choice: 'linear'"),
            ("--vocab-size", "10", "--vocab-size 10 is not possible"),
            ("--num-attention-heads", "3", "num_attention_heads=3"),
            ("--rope-scaling", "yarn", "invalid json_object value"),
            ("--rope-scaling", '{"rope_type": "yarn"}', "rope_scaling="),
            ("--lora-rank", "4", "--lora-rank 4 needs a trained model"),
            ("--stage", "sft", "--init", "{run}", "--lora-rank", "4000", "lora_rank=4000"),
            ("--stage", "sft", "--init", "/no/such", "/no/such"),
            ("--resume", "--resume and --overwrite exclude each other"),
            ("--stage", "sft", "--inspect", "0", "--inspect 0"),
            ("--plot", "/no/such", "/no/such is no run directory"),
            ("--plot", "{run}", "--png", "a.jpg", "must end in .png"),
            ("--out", "{d}/file", "{d}/file"),
        )
    ),
    *(
        ({}, ["sample", "--run", "{run}", *words], message)
        for *words, message in (
            ("--run", "/no/such", "/no/such is no run directory"),
            ("--run", "{base}/reward", "holds a reward model"),
            ("--temperature", "0", "temperature=0.0"),
            ("--top-p", "2", "top_p=2.0"),
            ("--top-k", "-1", "top_k=-1"),
            ("--min-p", "2", "min_p=2.0"),
            ("--num-beams", "0", "num_beams=0"),
            ("--num-beams", "2", "--strategy", "greedy", "contradicts --strategy greedy"),
            ("--num-beams", "2", "--length-penalty", "-1000", "length_penalty=-1000"),
            ("--repetition-penalty", "0", "repetition_penalty=0.0"),
            ("--seed", "-1", "seed=-1"),
            ("--stop", "", "stop=['']"),
            ("--max-length", "1", "--prompt", "小猫", "max_length=1"),
            ("--prompt", "very long " * 99, "leaves no room in the context"),
            ("--chat", "--prompt", "a", "--chat and --prompt exclude each other"),
        )
    ),
    *(
        ({"run/" + name: content}, ["sample", "--run", "{d}/run"], message)
        for name, content, message in (
            ("checkpoint.pt", b"torn", "checkpoint.pt is damaged"),
            ("checkpoint.pt", GARBAGE, "checkpoint.pt is damaged"),
            ("checkpoint.pt", None, "checkpoint.pt does not exist"),
            ("tokenizer.json", b"{", "tokenizer.json is not a tokenizer.json"),
            ("tokenizer.json", None, "tokenizer.json does not exist"),
            ("tokenizer.json", b"other", "is not the tokenizer that the checkpoint was trained with"),
            ("config.json", b"[]", "config.json: a JSON object"),
            ("config.json", None, "has no config.json"),
        )
    ),
]


@pytest.mark.parametrize(("files", "argv", "message"), MISTAKES, ids=map(str, range(len(MISTAKES))))
def test_mistakes_are_one_message_and_cost_nothing(driven, base, tmp_path, capsys, files, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file").write_text("")
    if any(name.startswith("run/") for name in files):
        m.shutil.copytree(driven / "tiny/pretrain", tmp_path / "run")
    for name, content in files.items():
        path = tmp_path / name
        if content == b"other":
            m.BPETokenizer().save(path)
        elif content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        if "checkpoint" in name:
            (tmp_path / "run/checkpoint.prev.pt").unlink(missing_ok=True)
    here = tmp_path if files else tmp_path / "empty"
    names = {"{d}": here, "{out}": driven, "{run}": driven / "tiny/pretrain", "{base}": base}
    names["{val}"] = base / "data/val"

    def filled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    before = everything(driven) | everything(base)
    main = {"train": train.main, "sample": sample.main}[argv[0]]
    assert main(list(map(filled, argv[1:]))) == 2
    error = capsys.readouterr().err
    last = [line for line in error.splitlines() if ": warning: " not in line]
    assert filled(message) in error and len(last) == 1 and "Traceback" not in error
    assert everything(driven) | everything(base) == before


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, p=plain: (calls.append(n), p(*args))[1])
    m.save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the directory


def test_three_hundred_damaged_checkpoints(tmp_path):
    """Truncated or with a flipped bit: what loads is what was saved last, or with a warning what was saved before."""
    path, draw = tmp_path / "checkpoint.pt", torch.Generator().manual_seed(0)
    states = [{"step": k, "model": {"w": torch.arange(500.0) * k}, "text": f"step {k}"} for k in (1, 2)]
    for state in states:
        m.save_checkpoint(path, dict(state))
    whole, noticed = path.read_bytes(), 0
    for k in range(300):
        at = int(torch.randint(0, len(whole), (), generator=draw))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << k % 8
        path.write_bytes(whole[:at] if k % 3 == 0 else damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = m.load_checkpoint(path)
        wanted = states[0] if caught else states[1]  # zip files have bytes that nobody reads
        assert m.digest(loaded) == m.digest(wanted), at
        noticed += bool(caught)
    assert noticed > 200


def test_one_process_a_run(driven, base, tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--data", str(base / "data/train"), "--val-data", str(base / "data/val"), *QUICK]
    m.shutil.copytree(driven / "tiny/pretrain", tmp_path / "tiny/pretrain")
    before = everything(tmp_path)
    with m.locked(tmp_path / "tiny/pretrain"):
        for more in (["--resume", "--max-steps", "9"], ["--overwrite", "--max-steps", "1"]):
            assert train.main(["--seq-len", "16", *argv, *more]) == 2
            assert "in use by another process" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_resuming_says_what_is_different(base, tmp_path, capsys):
    argv = ["--stage", "sft", "--init", str(base / "pretrain"), "--out", str(tmp_path), *QUICK]
    argv += ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    assert train.main([*argv, "--max-steps", "1"]) == 0
    assert train.main([*argv, "--max-steps", "2", "--learning-rate", "0.25", "--resume"]) == 0
    assert "from here on: learning_rate 0.004 -> 0.25, max_steps 1 -> 2" in capsys.readouterr().out
    for more, message in (
        (["--batch-size", "2"], "batch_size=2, but the checkpoint"),
        (["--seed", "3"], "seed=3, but the checkpoint"),
        (["--lora-rank", "2"], "was trained with --lora-rank 0"),
        (["--optimizer", "adamw"], "was trained with --optimizer muon"),
        (["--data", str(base / "data/val")], "the data, its split or the tokenizer are not those"),
    ):
        assert train.main([*argv, "--max-steps", "3", "--resume", *more]) == 2
        assert message in capsys.readouterr().err


def test_metrics_that_are_none_stop_a_resumed_run_before_it_changes_anything(base, tmp_path):
    m.shutil.copytree(base / "pretrain", tmp_path / "tiny/pretrain")
    metrics = tmp_path / "tiny/pretrain/metrics.jsonl"
    whole = metrics.read_bytes()
    for line in (b"garbage", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"\xff\xfe"):
        metrics.write_bytes(whole + line + b"\n")
        before = everything(tmp_path)
        trainer = trainer_for(m.BPETokenizer.load(base / "pretrain/tokenizer.json"), run_dir=tmp_path / "tiny/pretrain")
        trainer.step_count = 1
        with pytest.raises(m.UserError, match="metrics.jsonl:[0-9]+: not a row"):
            trainer._open_run()
        assert everything(tmp_path) == before


def test_a_signal_before_the_first_step_saves_nothing(base, tmp_path, monkeypatch):
    sources = json.loads((base / "sources.json").read_text())
    trainer = m.open_stage(
        "sft", tmp_path / "sft", base / "pretrain", sources, stage_config(), cache_dir=tmp_path / "cache"
    )
    plain = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), plain(*args))[1])
    assert trainer.fit()["signal"] == signal.SIGTERM and not m.holds_run(tmp_path / "sft")


def test_an_export_that_fails_leaves_the_one_before_whole(tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("safetensors")
    folder = tmp_path / "export"
    random_model(shape()).save_pretrained(folder, tokenizer)
    before, plain = everything(folder), m.atomic_write

    @m.contextlib.contextmanager
    def full(path):
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        with plain(path) as file:
            yield file

    monkeypatch.setattr(m, "atomic_write", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            random_model(shape(num_hidden_layers=1), seed=1).save_pretrained(target, tokenizer)
    assert everything(tmp_path) == before


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path, tokenizer, monkeypatch):
    config = m.TrainConfig(max_steps=4, save_every=2, eval_every=0, warmup_steps=0, sample_tokens=0)
    trainer = trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run")
    plain = open

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 20_000 if trainer.step_count == 4 else 10**9

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __iter__(self):
            return iter(self.file)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(m, "open", lambda *args, **options: Full(plain(*args, **options)), raising=False)
    with pytest.raises(OSError, match="disk is full"):
        trainer.fit()
    assert m.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_encoder_that_dies_is_an_error_not_a_hang(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "big.txt"
    path.write_text("".join(f"{i} 只小猫 and {i} dogs\n" for i in range(90_000)), encoding="utf-8")
    me = os.getpid()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(
        m.BPETokenizer, "encode", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != me else []
    )
    with pytest.raises(m.UserError, match="encodes the data was killed"):
        m.encode_corpus(path, tokenizer, "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(m, "LONGEST_RECORD", 1000)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        text = b'{"text": "short"}\n{"text": "' + b"x" * 5000 + b'"}\n'
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        with pytest.raises(m.UserError, match=rf"{name}:2: a line of more than 1,000 characters"):
            m.encode_corpus(tmp_path / name, tokenizer, "all", tmp_path / "cache")


def test_tensorboard_gets_what_metrics_get(tmp_path, tokenizer):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = m.TrainConfig(max_steps=3, log_every=1, warmup_steps=0, sample_tokens=0, tensorboard=True)
    trainer_for(tokenizer, config, train_data=[lm_batch(2, 8)], run_dir=tmp_path / "run").fit()
    events = loading.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    rows = [row for row in m.read_metrics(tmp_path / "run") if "loss" in row]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]
    assert {"lr", "grad_norm", "tok_per_s"} <= set(events.Tags()["scalars"])


class Killing:
    """Kills its own process at the n-th boundary of a system call with which files are written."""

    def __init__(self, target: int) -> None:
        self.target, self.passed = target, 0

    def boundary(self) -> None:
        self.passed += 1
        if self.passed == self.target:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call):
        def wrapped(*args, **options):
            self.boundary()
            result = call(*args, **options)
            self.boundary()
            return result

        return wrapped

    def open(self, *args, **options):
        file = open(*args, **options)
        if "w" not in file.mode and "a" not in file.mode:
            return file

        class Watched:
            write = staticmethod(self.around(lambda data: (file.write(data), file.flush())[0]))
            __enter__ = staticmethod(lambda: watched)
            __exit__ = staticmethod(lambda *_: file.close())
            __iter__ = staticmethod(lambda: iter(file))

            def __getattr__(self, name):
                return getattr(file, name)

        watched = Watched()
        return watched

    def watch(self) -> None:
        m.open = self.open
        for name in ("fsync", "replace", "link"):
            setattr(os, name, self.around(getattr(os, name)))


def faulty_trainer(stage: str, base: Path, run_dir: Path) -> m.Trainer:
    sources, tokenizer = json.loads((base / "sources.json").read_text()), m.BPETokenizer.load(base / "tokenizer.json")
    config = stage_config(max_steps=4, save_every=2, eval_every=0)
    if stage != "pretrain":
        options = {"reward": str(base / "reward")} if stage == "ppo" else {}
        return m.open_stage(stage, run_dir, base / "pretrain", sources, config, m.RLHFConfig(minibatch_size=6),
                            cache_dir=base / "cache", resume=m.holds_run(run_dir), **options)  # fmt: skip
    torch.manual_seed(0)
    data = m.PretrainDataLoader(sources["train"]["paths"], tokenizer, 2, 16, split="all", cache_dir=base / "cache")
    trainer = m.PreTrainer(m.MiniGPT(shape(dropout=0.1)), tokenizer, config=config, train_data=data, run_dir=run_dir)
    if m.holds_run(run_dir):
        trainer.load_checkpoint(run_dir / "checkpoint.pt")
    return trainer


def in_a_fork(work) -> tuple[int, float]:
    """Run it in a forked process: its status and how long it took."""
    began = m.time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), m.time.monotonic() - began


def kill_matrix(stage: str, folder: str, every: int, instants: int) -> None:
    """Kill a run at boundaries of system calls and at random instants; each resumes to the weights of a straight run.

    In a process of its own, with one thread: only such a one can be forked.
    """
    torch.set_num_threads(1)
    folder = Path(folder)
    tokenizer = m.BPETokenizer(vocab_size=300)
    tokenizer.train(TEXTS)
    base = make_base(folder / "base", tokenizer)
    tokenizer.save(base / "tokenizer.json")
    faulty_trainer(stage, base, folder / "warm")  # encodes the data

    def finish(run: Path) -> None:
        trainer = faulty_trainer(stage, base, run)
        if trainer.step_count < 4:
            trainer.fit()

    def weights(run: Path) -> str:
        state = m.load_checkpoint(run / "checkpoint.pt")
        return m.digest([state[part] for part in ("step", "model", "critic", "optimizers", "data", "rng", "extra")])

    counter = folder / "count"

    def straight() -> None:
        killing = Killing(0)
        killing.watch()
        finish(folder / "straight")
        counter.write_text(str(killing.passed))

    code, took = in_a_fork(straight)
    assert code == 0
    wanted, boundaries = weights(folder / "straight"), int(counter.read_text())
    random = m.torch.Generator().manual_seed(0)

    def attempt(run: Path, target: int) -> None:
        Killing(target).watch()
        finish(run)

    done = Counter()
    for target in range(1, boundaries + 1, every):
        run = folder / f"{stage}-{target}"
        assert in_a_fork(lambda r=run, t=target: attempt(r, t))[0] == -signal.SIGKILL
        assert in_a_fork(lambda r=run: finish(r))[0] == 0, target
        assert weights(run) == wanted, target
        done["boundaries"] += 1
        m.shutil.rmtree(run)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for k in range(instants if number == signal.SIGKILL else instants // 5 * 2):
            run, delay = folder / f"{number}-{k}", took * torch.rand((), generator=random).item()

            def interrupted(r=run, d=delay, n=number) -> None:
                me = os.getpid()
                if os.fork() == 0:
                    m.time.sleep(d)
                    with m.contextlib.suppress(ProcessLookupError):
                        os.kill(me, n)
                    os._exit(0)
                m.contextlib.suppress(KeyboardInterrupt).__enter__()
                finish(r)

            in_a_fork(interrupted)
            assert in_a_fork(lambda r=run: finish(r))[0] == 0, (number, delay)
            assert weights(run) == wanted, (number, delay)
            done[signal.Signals(number).name] += 1
            m.shutil.rmtree(run)
    print(json.dumps({"stage": stage, "of": boundaries, **done}))


def run_kill_matrix(*args) -> dict:
    code = f"import test_minillm as t; t.kill_matrix(*{args!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_survives_being_killed_anywhere(tmp_path):
    done = run_kill_matrix("pretrain", str(tmp_path), 97, 5)
    assert done["boundaries"] > 10 and done["SIGKILL"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_a_run_survives_being_killed_everywhere(tmp_path, stage):
    done = run_kill_matrix(stage, str(tmp_path), 31, 20)  # with 1 it takes a quarter of an hour
    assert done["boundaries"] > done["of"] / 32 and done["SIGKILL"] == 20 and done["SIGTERM"] == done["SIGINT"] == 8


def test_overwriting_costs_nothing_until_a_new_run_stands(base, tmp_path, capsys):
    out, data = tmp_path / "out", ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    m.shutil.copytree(base / "pretrain", out / "tiny/pretrain")
    argv = ["--stage", "rlhf", "--out", str(out), *data, *QUICK, "--max-steps", "1"]
    assert train.main(argv) == 0
    (out / "tiny/sft.old").mkdir()
    (out / "tiny/sft.old/mine.txt").write_text("a user's own copy")
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n{"chosen": "a", "rejected": "b"}\n')
    before = everything(out)
    for more in (
        ["--device", "cuda:77"],
        ["--answer-tokens", "300"],
        ["--accumulation-steps", "2"],
        ["--data", str(tmp_path / "bad.jsonl")],
        ["--resume"],
    ):
        assert train.main([*argv, "--overwrite", *more]) == 2, more
        assert everything(out) == before, more
    (tmp_path / "boom.py").write_text("def f(messages, reply, answer):\n    return 1 / 0\n")
    fails = ["--stage", "ppo", "--out", str(out), *data, *QUICK, "--max-steps", "1", "--overwrite"]
    assert train.main([*fails, "--reward", f"{tmp_path}/boom.py:f"]) == 2
    assert "boom.py:2: ZeroDivisionError" in capsys.readouterr().err and everything(out) == before
    assert train.main(["--stage", "sft", "--out", str(out), *data, *QUICK, "--max-steps", "2", "--overwrite"]) == 0
    assert m.load_checkpoint(out / "tiny/sft/checkpoint.pt")["step"] == 2
    assert (out / "tiny/sft.old/mine.txt").exists() and not list((out / "tiny").glob("*.old-*"))


def test_rollouts_can_not_be_accumulated(tokenizer):
    for trainer in (m.PPOTrainer, m.GRPOTrainer):
        with pytest.raises(m.UserError, match="accumulation_steps=2 has no meaning"):
            trainer(m.MiniGPT(shape()), tokenizer, reward=m.answer_reward, config=m.TrainConfig(accumulation_steps=2))


def test_a_stopped_rlhf_does_not_mix_old_stages_with_new_ones(base, tmp_path, monkeypatch, capsys):
    data = ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    m.shutil.copytree(base / "pretrain", tmp_path / "tiny/pretrain")
    argv = ["--stage", "rlhf", "--out", str(tmp_path), *data, *QUICK, "--max-steps", "1"]
    assert train.main(argv) == 0
    plain = m.RewardTrainer.fit
    monkeypatch.setattr(m.RewardTrainer, "fit", lambda self: {"signal": signal.SIGTERM})
    assert train.main([*argv, "--overwrite"]) == 143
    assert not m.holds_run(tmp_path / "tiny/reward") and not m.holds_run(tmp_path / "tiny/ppo")
    assert all(len(list(tmp_path.glob(f"tiny/{stage}.old-*/checkpoint.pt"))) == 1 for stage in ("reward", "ppo"))
    monkeypatch.setattr(m.RewardTrainer, "fit", plain)
    capsys.readouterr()
    assert train.main(argv) == 0
    shown = capsys.readouterr().out
    assert "sft: finished already" in shown and "ppo: finished already" not in shown


def test_rlhf_on_a_file_a_kind(base, tmp_path, capsys):
    m.shutil.copytree(base / "pretrain", tmp_path / "tiny/pretrain")
    files = {part: [str(base / f"data/{part}/{name}.jsonl") for name in ("sft", "pref")] for part in ("train", "val")}
    argv = ["--stage", "rlhf", "--out", str(tmp_path), *QUICK, "--max-steps", "1", "--data", *files["train"]]
    assert train.main([*argv, "--val-data", *files["val"]]) == 0  # the questions of the conversations are the prompts
    assert "ppo" in capsys.readouterr().out
    files["val"].append(str(base / "data/val/prompts.jsonl"))
    assert train.main([*argv, str(base / "data/train/prompts.jsonl"), "--val-data", *files["val"], "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nosuchmodule", "mine.py:1: ModuleNotFoundError"),
        ("def f(messages, reply):\n    return 1", "TypeError"),
        ("import sys\ndef f(*args):\n    sys.exit(3)", "mine.py:3: SystemExit"),
        ("def f(*args):\n    return 'good'", "gave 'good'"),
        ("f = 3", "no function f"),
    ],
)
def test_a_reward_that_fails_is_one_message(base, tmp_path, capsys, code, message):
    (tmp_path / "mine.py").write_text(code)
    argv = ["--stage", "grpo", "--init", str(base / "pretrain"), "--out", str(tmp_path), *QUICK, "--max-steps", "1"]
    argv += ["--data", str(base / "data/train"), "--val-data", str(base / "data/val")]
    assert train.main([*argv, "--reward", f"{tmp_path}/mine.py:f"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {', "not JSON"),
        ("{}", "neither"),
        ("[]", "a JSON object is expected"),
        ("[" * 100_000, "not JSON"),
        ('{"model": {"colour": 3}, "train": {}}', "colour"),
        ('{"model": {"hidden_size": -3}, "train": {}}', "hidden_size=-3"),
    ],
)
def test_a_damaged_config_is_one_message(base, tmp_path, capsys, content, message):
    run = tmp_path / "run"
    m.shutil.copytree(base / "pretrain", run)
    (run / "config.json").write_text(content)
    for main, argv in (
        (sample.main, ["--run", str(run)]),
        (train.main, ["--stage", "eval", "--init", str(run)]),
        (train.main, ["--stage", "sft", "--init", str(run), "--out", str(tmp_path)]),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and "config.json" in error and len(error.splitlines()) == 1


def test_metrics_that_a_kill_cut_short_are_read(base, tmp_path):
    rows = m.read_metrics(base / "pretrain")
    text = (base / "pretrain/metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    assert m.read_metrics(tmp_path) == rows
    (tmp_path / "metrics.jsonl").write_text("nonsense\n" + text)
    with pytest.raises(m.UserError, match=r"metrics.jsonl:1"):
        m.read_metrics(tmp_path)


def test_rlhf_on_data_without_answers_or_prompts(base, tmp_path, capsys):
    """People's own data: nothing checkable, pairs and conversations that may lack a question."""
    m.shutil.copytree(base / "pretrain", tmp_path / "tiny/pretrain")
    chats = [{"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]}
             for i in range(9)]  # fmt: skip
    chats.append({"messages": [{"role": "assistant", "content": "hello"}]})
    pairs = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(9)]
    prompts = [{"prompt": f"say {i}"} for i in range(9)]
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name, records in (("chats", chats[::-1]), ("pairs", pairs), ("prompts", prompts)):
            write_jsonl(tmp_path / part / f"{name}.jsonl", records)
    argv = ["--data", str(tmp_path / "train"), "--val-data", str(tmp_path / "val"), "--out", str(tmp_path), *QUICK]
    assert train.main(["--stage", "rlhf", *argv, "--max-steps", "1"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^sft +\d+ +bpb ", table, re.M) and re.search(r"^ppo +\d+ +reward ", table, re.M)
    assert train.main(["--stage", "rlhf", *argv, "--max-steps", "1"]) == 0
    assert "sft: finished already" in capsys.readouterr().out
    assert train.main(["--stage", "dpo", *argv, "--max-steps", "1"]) == 0
    mtimes = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.pt"))]
    argv[argv.index("--data") + 1] = str(tmp_path / "train/chats.jsonl")
    assert train.main(["--stage", "rlhf", *argv, "--overwrite", "--max-steps", "1"]) == 2  # and nothing is lost
    assert "no preference records" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.pt"))] == mtimes


def test_an_interrupt_in_the_last_evaluation_is_kept(base, tmp_path, monkeypatch):
    sources = json.loads((base / "sources.json").read_text())
    trainer = m.open_stage("sft", tmp_path / "sft", base / "pretrain", sources, stage_config(max_steps=2, eval_every=0),
                           cache_dir=tmp_path / "cache")  # fmt: skip
    plain = trainer.evaluate

    def evaluate(*args):
        if trainer.step_count == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    result = trainer.fit()
    assert result["signal"] == signal.SIGINT and result["loss"] > 0 and m.RLHFPipeline.finished(tmp_path / "sft")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "sft", "--reward", "answer"], "--reward answer has no meaning"),
        (["--stage", "rlhf", "--reward", "answer"], "--reward answer has no meaning"),
        (["--stage", "sft", "--init", "/nowhere"], "/nowhere"),
        (["--stage", "sft", "--hidden-size", "64"], "hidden_size=64"),
        (["--stage", "sft", "--seq-len", "999"], "--seq-len 999"),
        (["--stage", "grpo", "--init", "{base}", *SHORT, "--reward", "nothing"], "nothing"),
        (["--stage", "grpo", "--init", "{base}", *SHORT, "--reward", "{base}"], "no reward model"),
        (["--stage", "grpo", "--group-size", "1"], "group_size=1"),
        (["--stage", "dpo", "--init", "{base}", "--data", "{text}"], "nothing for this stage"),
        (["--stage", "ppo", "--kl-coef", "-1"], "kl_coef=-1.0"),
        (["--stage", "dpo", "--inspect", "1"], "--inspect"),
        (["--plot", "/nowhere"], "/nowhere"),
    ],
)
def test_stages_report_mistakes_in_one_message(tmp_path, base, capsys, argv, message):
    places = {
        "{prompts}": str(base / "data/train/prompts.jsonl"),
        "{base}": str(base / "pretrain"),
        "{text}": str(base / "data/val/text.jsonl"),
    }
    argv = [*(places.get(word, word) for word in argv), "--out", str(tmp_path)]
    assert train.main(argv if "--init" in argv else [*argv, "--init", str(base / "pretrain")]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not list(tmp_path.rglob("*.pt"))


# -- bench.py ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Everything is measured once, and nothing in a process of its own."""
    monkeypatch.setattr(bench, "REPEATS", (1, 1))
    monkeypatch.setattr(bench, "BUDGET_S", {True: 0.0, False: 0.0})
    monkeypatch.setattr(m, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench, "in_new_process", lambda *_: {"start_bytes": 1e6, "peak_bytes": 3e6, "step_s": 0.5})
    small = bench.PEER_SHAPE | {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    monkeypatch.setattr(bench, "PEER_SHAPE", small)
    monkeypatch.setitem(m.PRESETS, "tiny", shape)
    monkeypatch.setitem(m.PRESETS, "moe", moe_shape)


def test_bench_measures_writes_and_compares(hasty, tmp_path, capsys):
    argv = ["--quick", "--config", "tiny", "--only"]
    path = str(tmp_path / "figures.json")
    assert bench.main([*argv, "train", "decode", "--json", path]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    rows = json.loads(Path(path).read_text())["tables"]["presets"]["tiny"]
    assert rows["parameters, M"] == [m.MiniGPT(m.get_config("tiny")).num_params() / 1e6, 0.0]
    for row in ("eager training, tok/s", "  backward, eager, ms", "prefill, tok/s", "decode, batch 8, tok/s"):
        assert rows[row][0] > 0 and row in shown
    assert not any("compiled" in row for row in rows)
    assert bench.main([*argv, "decode", "--baseline", path, "--json", path]) == 0  # figures may replace figures
    shown = capsys.readouterr().out
    assert f"== against {path}" in shown and "tiny: decode, batch 8, tok/s" in shown and "verdict" in shown


def test_bench_tells_noise_from_change():
    before = {"t": {"c": {"a, tok/s": [100.0, 0.01], "b, ms": [10.0, 0.0], "d, MB": [10.0, 0.1], "e, M": [1.0, 0.0]}}}
    now = {"t": {"c": {"a, tok/s": bench.Figure(90.0, 0.01), "b, ms": bench.Figure(8.0), "d, MB": bench.Figure(11.9),
                       "e, M": bench.Figure(2.0), "new, s": bench.Figure(1.0)}}}
    found = bench.compare(now, before)
    assert found["verdict"] == {"c: a, tok/s": "worse", "c: b, ms": "better", "c: d, MB": "noise"}
    assert found["ratio"]["c: b, ms"].value == pytest.approx(0.8)
    assert bench.figure([1.0, 2.0, 4.0]) == (2.0, pytest.approx(0.375))


def test_bench_counts_what_forward_keeps(tokenizer):
    trainer = m.PreTrainer(random_model(shape()), tokenizer, config=m.TrainConfig(seq_len=64))
    one, two, four = (bench.saved_bytes(bench.Setup(torch.device("cpu")), trainer, rows) for rows in (1, 2, 4))
    assert 0 < two - one == pytest.approx((four - two) / 2, rel=0.02)
    C, H, K, D, F_ = 32, 4, 2, 8, 64
    least = 2 * (4 * C + (H + 2 * K) * D + (H + K) * D + 4 * F_)  # floats a token that the blocks can not do without
    assert 4 * 64 * least <= two - one <= 1.5 * 4 * 64 * least


def test_bench_measures_experts_and_growth(hasty, capsys, monkeypatch):
    cases = [("1 row", {}, 1, 64), ("2 experts", {"num_experts": 2, "moe_intermediate_size": 32}, 2, 64)]
    monkeypatch.setattr(bench, "GROWTH", {"rows": cases})
    assert bench.main(["--quick", "--config", "moe", "--only", "moe", "growth"]) == 0
    shown = capsys.readouterr().out
    assert "MoE's training, % of dense" in shown and "== growth: rows" in shown and "arithmetic x" in shown


def test_bench_plans(hasty, capsys):
    argv = ["--quick", "--plan", "--config", "tiny", "moe", "--tokens", "1.5M", "--batch-size", "2", "--seq-len", "64"]
    assert bench.main([*argv, "--check", "--gpu-memory", "100G"]) == 0
    shown = capsys.readouterr().out
    assert "plan for 1.5M tokens" in shown and "largest batch in 100 GB" in shown and "moe: step, s" in shown
    assert bench.main([*argv, "--gpu-memory", "1M", "--gradient-checkpointing"]) == 0
    assert "not even one does" in capsys.readouterr().out


def test_bench_peak_of_a_training(tokenizer):
    config, train_ = dataclasses.asdict(shape()), dataclasses.asdict(m.TrainConfig(batch_size=2, seq_len=64))
    for kind in ("train", "plain", "decode"):
        found = bench.run_alone(kind, "cpu", config, train_, torch.get_num_threads())
        assert found["peak_bytes"] >= found["start_bytes"] > 1e6 and found["step_s"] > 0


def test_bench_profiles(hasty, tmp_path, capsys):
    assert bench.main(["--quick", "--config", "tiny", "--profile", str(tmp_path / "traces")]) == 0
    assert "aten::" in capsys.readouterr().out
    for kind in ("training", "decoding"):
        assert json.loads((tmp_path / f"traces/tiny-{kind}.json").read_text())["traceEvents"]


def test_bench_names_absent_peers(hasty, capsys, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda package: False)
    assert bench.main(["--quick", "--peers", "--only", "train", "decode", "tokenizer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("decode, batch 8")).split()
    assert "absent" in row and max(map(len, lines)) <= 100
    assert any(line.split()[:1] == ["encoding,"] and line.count("absent") == 3 for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--confg", "tiny"], "did you mean --config"),
        (["--config", "huge"], "huge"),
        (["--only", "nothing"], "nothing"),
        (["--plan", "--tokens", "many"], "many"),
        (["--plan", "--peers"], "exclude each other"),
        (["--check"], "--plan"),
        (["--plan", "--config", "tiny", "--seq-len", "999"], "--seq-len 999"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--device", "abacus"], "abacus"),
        (["--baseline", "/nowhere.json"], "/nowhere.json"),
        (["--baseline", "{other}"], "does not hold figures"),
        (["--baseline", "{odd}"], "does not hold figures"),
        (["--json", "{other}"], "does not hold figures"),
    ],
)
def test_bench_reports_mistakes_in_one_message(tmp_path, capsys, argv, message):
    (tmp_path / "other.txt").write_text("{}")
    (tmp_path / "odd.txt").write_text('{"tables": {"tokenizer": 5}}')
    names = {"{other}": str(tmp_path / "other.txt"), "{odd}": str(tmp_path / "odd.txt")}
    assert bench.main([names.get(word, word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and (tmp_path / "other.txt").read_text() == "{}"


def test_bench_without_enough_memory(capsys, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.\nand more")
    monkeypatch.setattr(bench, "measure", lambda *_: (_ for _ in ()).throw(error))
    assert bench.main(["--quick"]) == 2
    assert capsys.readouterr().err == "bench.py: error: CUDA out of memory. Try a smaller --batch-size.\n"


# -- benchmarks: run once as plain tests, timed by `pytest --benchmark-only` -------------------------------------------


@pytest.fixture
def benchmark(request, benchmark):
    benchmark.disabled = not request.config.getoption("--benchmark-only")
    return benchmark


def test_benchmark_training_step(benchmark, tokenizer):
    trainer = m.PreTrainer(m.MiniGPT(shape(hidden_size=64, max_position_embeddings=128)), tokenizer)
    benchmark(trainer.step, [lm_batch(4, 128)])


def test_benchmark_prefill(benchmark, generator):
    benchmark(generator.greedy_search, random_ids(1, 63), settings(max_new_tokens=1))


def test_benchmark_decoding(benchmark, generator):
    benchmark(generator.greedy_search, random_ids(1, 8), settings(min_new_tokens=20, max_new_tokens=20))


def test_benchmark_bpe_training(benchmark):
    benchmark(m.BPETokenizer(vocab_size=400).train, TEXTS * 30)


def test_benchmark_bpe_encoding(benchmark, tokenizer):
    benchmark(tokenizer.encode, "".join(TEXTS) * 100)


def test_benchmark_ppo_rollout(benchmark, tokenizer):
    trainer = rl_trainer(m.PPOTrainer, tokenizer, lambda *_: 1.0, train={"answer_tokens": 16})
    benchmark(trainer.experience, prompt_batch(tokenizer, ["a", "bc", "def", "你好"] * 4))
