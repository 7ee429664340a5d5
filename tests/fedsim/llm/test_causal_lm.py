"""The task of next-token prediction: its losses against Hugging Face's own, its data, its models."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fedsim as fs
from fedsim.clock import forward_flops
from fedsim.llm import (
    Bytes,
    CausalLM,
    Characters,
    Columns,
    Decoder,
    Documents,
    Folder,
    JSONLines,
    Parquet,
    Play,
    PythonSource,
    TextFile,
    WikiText,
)
from fedsim.parameters import Layout
from fedsim.tasks.base import Batch
from tests.fedsim.llm.models import FAMILIES

LETTERS = Characters("abcdefghij ")
TINY = Decoder(layers=2, width=32, heads=4, kv_heads=2, hidden=48)


def sentences(number: int, step: int, seed: int) -> Documents:
    """Letters that go round the alphabet by ``step``, with a slip now and then."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(number):
        at = rng.integers(10)
        letters = []
        for slip in rng.random(40) < 0.05:
            at = (at + step + int(slip)) % 10
            letters.append("abcdefghij"[at])
        texts.append("".join(letters))
    return Documents(tuple(texts), tuple(f"author {i % 4}" for i in range(number)))


def task(**changes) -> CausalLM:
    fields = {
        "texts": {"up": sentences(60, 1, 0), "down": sentences(60, 9, 1)},
        "model": TINY,
        "tokenizer": LETTERS,
        "length": 20,
        "test_share": 0.3,
    }
    return CausalLM(**{**fields, **changes})


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"])
def test_losses_are_those_of_hugging_face(architecture):
    lm = task(model=replace(TINY, architecture=architecture), pack=False, length=50)
    batch, model = lm.data().test.batch(np.arange(8)), lm.build(0)
    assert (batch.targets == -100).any()
    for i in range(8):
        tokens = torch.cat([batch.inputs[i : i + 1, :1], batch.targets[i : i + 1]], 1)
        tokens = torch.where(tokens < 0, LETTERS.pad, tokens)
        labels = torch.where(torch.cat([tokens[:, :1], batch.targets[i : i + 1]], 1) < 0, -100, tokens)
        expected = model(tokens, labels=labels).loss
        torch.testing.assert_close(lm.losses(model, Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1]))[0], expected)
    each = lm.token_losses(model, batch)
    torch.testing.assert_close(each.sum(1) / (batch.targets >= 0).sum(1), lm.losses(model, batch))
    assert (each[batch.targets < 0] == 0).all()


def test_padding_at_the_right_changes_nothing():
    lm = task(pack=False, length=44)
    model, batch = lm.build(0), lm.data().test.batch([0])
    length = int((batch.targets >= 0).sum())
    short = Batch(batch.inputs[:, :length], batch.targets[:, :length])
    torch.testing.assert_close(lm.losses(model, short), lm.losses(model, batch))
    own = lm.self_targets(model, batch.inputs)
    assert ((own >= 0) == (batch.targets >= 0)).all()
    assert torch.equal(own[own >= 0], lm.logits(model, batch.inputs).argmax(-1)[batch.targets >= 0])


def test_packed_runs_hold_the_text_of_one_author_in_order():
    lm = task()
    splits = lm.data()
    assert set(splits.train.keys) == {"domain", "author"}
    assert splits.train.inputs.shape[1] == 20
    assert set(splits.train.keys["author"].tolist()) == set(range(8))
    for author in range(4):
        rows = splits.train.keys["author"] == author
        stream = np.concatenate([splits.train.inputs[rows].reshape(-1), splits.train.targets[rows][-1, -1:]])
        np.testing.assert_array_equal(splits.train.targets[rows].reshape(-1), stream[1:])
        texts = LETTERS.decode(stream)
        source = sentences(60, 1, 0)
        own = {t for t, a in zip(source.texts, source.authors, strict=True) if a == f"author {author}"}
        assert {texts[i : i + 40] for i in range(0, len(texts) - 39, 40)} <= own


def test_documents_held_out_are_never_trained_on_and_without_packing_none_meet():
    lm = task(pack=False, length=16)
    train, test = lm.data()
    assert not set(train.keys["document"].tolist()) & set(test.keys["document"].tolist())
    assert len(set(train.keys["document"].tolist()) | set(test.keys["document"].tolist())) == 120
    rows = train.keys["document"] == train.keys["document"][0]
    asked = train.targets[rows]
    text = sentences(60, 1, 0).texts[int(train.keys["document"][0])]
    assert LETTERS.decode(train.inputs[rows][0, :1]) + LETTERS.decode(asked[asked >= 0]) == text
    assert asked[asked >= 0][-1] == LETTERS.end


def test_a_fleet_is_divided_by_author_and_domain():
    lm = task()
    train = lm.data().train
    by_author = fs.Fleet.sample(8, partition=fs.ByKey("author"), seed=0).shards(train)
    assert sorted({tuple(np.unique(train.keys["author"][by_author.shard(c)])) for c in range(8)}) == [(a,) for a in range(8)]
    by_domain = fs.Fleet.sample(6, partition=fs.Dirichlet(alpha=0.1, by="domain"), seed=0).shards(train)
    assert sum(len(by_domain.shard(c)) for c in range(6)) == len(train)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"])
def test_forward_flops_are_those_of_the_projections_and_of_attention(architecture, attention):
    lm = task(model=replace(TINY, architecture=architecture, attention=attention))
    model = lm.build(0)
    assert model.config._attn_implementation == attention
    heads, groups, matrices = (4, 4, 2) if architecture in ("opt", "gpt2") else (4, 2, 3)
    length, width, hidden, head = 20, 32, 48, 8
    layer = 2 * length * (2 * width * heads * head + 2 * width * groups * head + matrices * width * hidden)
    attended = 4 * length * length * heads * head  # queries by keys, weights by values, for every pair of positions
    assert forward_flops(model, lm.example) == 2 * (layer + attended) + 2 * length * width * LETTERS.vocabulary
    smap = lm.structures(model)
    assert forward_flops(model, lm.example) == smap.cost("flops", np.zeros(len(smap.blocks), np.int64))


def test_every_source_of_text_reads_what_it_says(tmp_path):
    (tmp_path / "wiki.txt").write_text(" = One = \n\n text of one \n\n = = Part = = \n\n more \n = Two = \n\n text of two \n")
    assert [t.split("\n")[0].strip() for t in WikiText(tmp_path / "wiki.txt").read().texts] == ["= One =", "= Two ="]
    (tmp_path / "play.txt").write_text("First Citizen:\nSpeak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nWe are.\n")
    play = Play(tmp_path / "play.txt").read()
    assert (play.texts, play.authors) == (("Speak.", "Speak, speak.", "We are."), ("First Citizen", "All", "First Citizen"))
    assert Play(tmp_path / "play.txt", speakers=("All",)).read().texts == ("Speak, speak.",)
    with pytest.raises(ValueError, match=r"speakers \['ROMEO'\] say nothing"):
        Play(tmp_path / "play.txt", speakers=("ROMEO",)).read()
    lines = [{"q": "one", "who": "a"}, {"q": "two", "who": "b"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.table({"q": ["one", "two"], "who": ["a", "b"]}), tmp_path / "x.parquet")
    table = {"q": ["one", "two"], "who": ["a", "b"]}
    for source in (JSONLines(tmp_path / "x.jsonl", "q", "who"), Parquet(tmp_path / "x.parquet", "q", "who"), Columns(table, "q", "who")):
        assert source.read() == Documents(("one", "two"), ("a", "b"))
    with pytest.raises(ValueError, match="has no column 'text'; its columns are q, who"):
        Parquet(tmp_path / "x.parquet").read()
    (tmp_path / "x.jsonl").write_text('{"text": "one\u2028line"}\n\n{"text": "two"}\n', encoding="utf-8")
    assert JSONLines(tmp_path / "x.jsonl").read().texts == ("one\u2028line", "two")
    for line, what in (("[1, 2]", "line 2 of .* must be a JSON object, got"), ("{text", "line 2 of .* is no JSON")):
        (tmp_path / "x.jsonl").write_text("\n" + line)
        with pytest.raises(ValueError, match=what):
            JSONLines(tmp_path / "x.jsonl").read()
    (tmp_path / "wiki.txt").write_text(" = I = \n\n a letter \n = Two = \n\n more \n")
    assert len(WikiText(tmp_path / "wiki.txt").read()) == 2
    (tmp_path / "plain.txt").write_text("one\ntwo\n\nthree\n")
    assert TextFile(tmp_path / "plain.txt", size=None).read().texts == ("one\ntwo", "three\n")
    assert TextFile(tmp_path / "plain.txt", size=5).read().texts == ("one\ntwo\n", "\nthree\n")
    assert any("def " in text for text in PythonSource(("heapq",)).read().texts)
    for broken, what in ((TextFile(tmp_path / "none.txt"), "no such file"), (PythonSource(("math",)), "no Python source")):
        with pytest.raises((ValueError, FileNotFoundError), match=what):
            broken.read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"test_share": 1.0}, "test_share"),
        ({"texts": {}}, "texts must name at least one domain"),
        ({"texts": {"a": "a string"}}, r"texts\['a'\] must be a source of text"),
        ({"train_limit": 0}, "train_limit must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)


def test_text_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ValueError, match="domain '' has 1 document"):
        CausalLM(texts=Documents(("one",)), tokenizer=LETTERS).data()
    with pytest.raises(ValueError, match="character 'z' is not in the alphabet"):
        CausalLM(texts=Documents(("ahab", "a z")), tokenizer=LETTERS).data()
    with pytest.raises(ValueError, match="no text of the train split fills a run of 96 tokens; lower length, or set pack=False"):
        CausalLM(texts=Documents(("abc", "abc")), tokenizer=LETTERS).data()
    with pytest.raises(ValueError, match="model must be a Decoder or a local folder, got 'nowhere'"):
        task(model="nowhere").build(0)
    task().build(0).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the tokenizer has 258 tokens, the model in .* knows 13; they do not belong together"):
        task(model=str(tmp_path / "model"), tokenizer=Bytes()).build(0)
    for fields, message in (
        ({"heads": 3}, "width must be a multiple"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"layers": 0}, "layers must be"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **fields)


def test_a_model_from_a_folder_is_the_model_that_was_saved(tmp_path):
    lm = task()
    lm.build(3).save_pretrained(tmp_path / "model")
    found, batch = task(model=str(tmp_path / "model")).build(0), lm.data().test.batch(np.arange(4))
    assert torch.equal(lm.losses(found, batch), lm.losses(lm.build(3), batch))
    assert found.config.use_cache is False


def test_a_folder_is_read_in_the_dtype_that_is_asked_for(tmp_path):
    task(model=replace(TINY, dtype="bfloat16")).build(0).save_pretrained(tmp_path / "model")
    whole, half = task(model=str(tmp_path / "model")), task(model=Folder(tmp_path / "model", dtype="bfloat16", attention="eager"))
    assert next(whole.build(0).parameters()).dtype == torch.float32
    assert next(half.build(0).parameters()).dtype == torch.bfloat16
    assert half.build(0).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="cannot exchange parameters of dtype bfloat16; build the model in float32"):
        Layout.of(half.build(0)).flatten(half.build(0))
    for name in ("dtype", "attention"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'best'"):
            Folder("model", **{name: "best"})
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'best'"):
            replace(TINY, **{name: "best"})


def test_a_token_outside_the_vocabulary_is_refused_even_at_the_end():
    @dataclass(frozen=True)
    class Wrong(Characters):
        end = 13

    with pytest.raises(ValueError, match=r"tokens must lie in 0..12, got 0 to 13"):
        task(tokenizer=Wrong("abcdefghij "), pack=False, length=50).data()


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in FAMILIES} == {"llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"}
