"""The task of next-token prediction: its losses against Hugging Face's own, its data, its models."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

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
    Pretrained,
    Problems,
    PythonSource,
    Reasoning,
    TextFile,
    WikiText,
    save_pruned,
)
from fedsim.parameters import Layout
from fedsim.pruning import Random
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


def family(architecture: str, **changes) -> Decoder:
    """``TINY`` in an architecture, with key-value heads where it has them."""
    return replace(TINY, architecture=architecture, kv_heads=None if architecture in ("opt", "gpt2") else 2, **changes)


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
    lm = task(model=family(architecture), pack=False, length=50)
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
    lm = task(model=family(architecture, attention=attention))
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
    odd = pa.array([10**8, 10**8], pa.date32())  # days that Python cannot read, and nobody asked for
    pq.write_table(pa.table({"q": ["one", "two"], "day": odd}), tmp_path / "x.parquet")
    assert Parquet(tmp_path / "x.parquet", "q").read() == Documents(("one", "two"))
    for who in (None, float("nan")):
        with pytest.raises(
            ValueError, match="row 1 of column 'who' of the table names no author; name one in every row, or set author=None"
        ):
            Columns({"q": ["one", "two"], "who": ["a", who]}, "q", "who").read()
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
        ({"texts": ("a.txt", "b.txt")}, r"texts must be a source of text, or pairs of a name and a source, got 'a.txt' in"),
        (
            {"model": Decoder(architecture="gpt2", positions=19)},
            "length=20 is over the positions=19 of this gpt2; lower it, or raise positions",
        ),
        ({"model": Decoder(architecture="opt", positions=19)}, "length=20 is over the positions=19 of this opt"),
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
    with pytest.raises(ValueError, match="no author of domain '' fills a run of 96 tokens in the train split"):
        CausalLM(texts=Documents(("abc", "abc")), tokenizer=LETTERS).data()
    with pytest.raises(ValueError, match=r"domain 'short' fills .* in the train split \(2 authors\); lower length, or set pack=False"):
        task(texts={"up": sentences(60, 1, 0), "short": Documents(("abc", "abd", "abe"), ("a", "b", "c"))}).data()
    with pytest.raises(ValueError, match="model must be a Decoder or a local folder, got 'nowhere'"):
        task(model="nowhere").build(0)
    task().build(0).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the tokenizer has 258 tokens, the model in .* knows 13; they do not belong together"):
        task(model=str(tmp_path / "model"), tokenizer=Bytes()).build(0)
    for fields, message in (
        ({"heads": 3}, "width must be a multiple"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"layers": 0}, "layers must be"),
        ({"architecture": "opt"}, "kv_heads must be None in opt, where every head has its own, got 2"),
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


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path):
    task().build(0).save_pretrained(tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    for name, found in (
        ("model.layers.1.mlp.down_proj.weight", "lacks 1 weights"),
        ("bias", "has, and its model has no place for, 1 weights"),
    ):
        changed = {n: w for n, w in weights.items() if n != name} if name in weights else {**weights, name: torch.zeros(2)}
        safetensors.torch.save_file(changed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"holds no causal language model that can be read: .* {found}, among them '{name}'"):
            task(model=str(tmp_path / "model")).build(0)


def test_a_folder_of_layers_of_unequal_sizes_is_a_model_to_build_from(tmp_path):
    lm = task()
    model = lm.build(0)
    smap = lm.structures(model)
    submodel = Random(levels=(0.4,)).trajectory(model, smap, None, [lm.data().test.batch([0])]).at(0.4)
    save_pruned(model, submodel, smap, tmp_path / "model")
    found, batch = task(model=str(tmp_path / "model")).build(0), lm.data().test.batch(np.arange(4))
    torch.testing.assert_close(lm.losses(found, batch), lm.losses(submodel.sliced(model, smap), batch))
    assert found.config.use_cache is False


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_a_folder_whose_positions_end_before_the_texts_is_refused(architecture, tmp_path):
    task(model=family(architecture, positions=20)).build(0).save_pretrained(tmp_path / "model")
    task(model=str(tmp_path / "model")).build(0)
    with pytest.raises(ValueError, match=f"texts of length=21 need 21 positions, and this {architecture} has 20"):
        task(model=str(tmp_path / "model"), length=21).build(0)


def test_losses_of_a_model_in_bfloat16_are_those_of_its_logits_in_float32():
    lm = task(model=replace(TINY, dtype="bfloat16"))
    model, batch = lm.build(0), lm.data().test.batch(np.arange(4))
    exact = torch.nn.functional.cross_entropy(lm.logits(model, batch.inputs).float().transpose(1, 2), batch.targets, reduction="none")
    assert torch.equal(lm.losses(model, batch), exact.mean(1))
    assert lm.losses(task(model=replace(TINY, dtype="float64")).build(0), batch).dtype == torch.float64


def test_a_pretrained_tokenizer_opens_documents_and_questions_where_asked_to(tmp_path):
    letters = {c: i for i, c in enumerate("abc ?")} | {"<s>": 5, "</s>": 6}
    plain = Tokenizer(WordLevel(letters, unk_token=" "))
    plain.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "opened")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(tmp_path / "plain")
    opened, closed = Pretrained(tmp_path / "opened", start=True), Pretrained(tmp_path / "opened")
    for tokenizer, first in ((opened, [5]), (closed, [])):
        assert tokenizer.opening.tolist() == first
        lm = CausalLM(texts=Documents(("ab", "ab")), tokenizer=tokenizer, length=8, pack=False)
        assert lm._tokens("ab").tolist() == [*first, 0, 1, 6]
        solved = Reasoning(problems=Problems(("ab", "ab"), ("c", "c")), tokenizer=tokenizer, length=8)
        assert solved.prompt("ab").tolist() == [*first, 0, 1, 4]
        assert solved.batch(["ab"], ["c"]).targets[0].tolist() == [-100] * (len(first) + 2) + [2, 6] + [-100] * (4 - len(first))
        assert tokenizer.decode([*first, 0, 1, 6]).replace(" ", "") == "ab"
    with pytest.raises(ValueError, match="has no beginning of text; set its bos_token, or start=False"):
        Pretrained(tmp_path / "plain", start=True).encode("ab")


def test_a_token_outside_the_vocabulary_is_refused_even_at_the_end():
    @dataclass(frozen=True)
    class Wrong(Characters):
        end = 13

    with pytest.raises(ValueError, match=r"tokens must lie in 0..12, got 0 to 13"):
        task(tokenizer=Wrong("abcdefghij "), pack=False, length=50).data()


def test_the_package_lists_what_it_exports():
    for name in ("Checkpointed", "Choices", "Margin", "characters", "generate", "save_pruned"):
        assert name in dir(fs.llm)
        assert getattr(fs.llm, name).__name__ == name


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in FAMILIES} == {"llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"}
