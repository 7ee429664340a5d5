"""A pruned model that was saved is the same model, with fedsim and without it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from fedsim.errors import CheckpointError
from fedsim.llm.saving import load_pruned, save_pruned
from fedsim.llm.structures import language_structures
from fedsim.pruning import Random, Submodel
from tests.fedsim.llm.models import FAMILIES, TOKENS, built, llama, tokens

ELSEWHERE = """
import sys
sys.modules["fedsim"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(inputs).logits
written = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, pad_token_id=0)
torch.save([logits, written], sys.argv[3])
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where transformers puts modules of saved folders."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def pruned(name, level=0.45):
    model = built(name)
    smap = language_structures(model, TOKENS)
    return model, smap, Random(levels=(level,)).trajectory(model, smap, None, [(tokens(),)]).at(level)


def figures(model, inputs):
    with torch.no_grad():
        logits = model(inputs).logits
    ones = torch.ones_like(inputs)
    return logits, model.generate(inputs, attention_mask=ones, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_machine_without_fedsim_loads_the_same_bits(name, tmp_path):
    model, smap, submodel = pruned(name)
    save_pruned(model, submodel, smap, tmp_path / "model")
    torch.save(tokens(2), tmp_path / "inputs")
    arguments = [str(tmp_path / part) for part in ("model", "inputs", "found")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", ELSEWHERE, *arguments], check=True, cwd=tmp_path, timeout=120)
    logits, written = torch.load(tmp_path / "found", weights_only=True)
    expected = figures(submodel.sliced(model, smap), tokens(2))
    assert torch.equal(logits, expected[0])
    assert torch.equal(written, expected[1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_what_was_saved_gives_the_same_bits(name, dtype, tmp_path):
    model, _, _ = pruned(name)
    for parameter in model.parameters():  # rotary frequencies stay float32, as in models that are loaded
        parameter.data = parameter.data.to(dtype)
    smap = language_structures(model, TOKENS)
    kept = np.random.default_rng(0).random(len(smap)) < 0.5
    kept[smap.starts[0] : smap.starts[1]] = False  # no heads in the first layer
    kept[smap.starts[3] : smap.starts[4]] = False  # no channels in the second
    submodel = Submodel(kept, smap.fingerprint)
    save_pruned(model, submodel, smap, tmp_path / "model")
    loaded, small = load_pruned(tmp_path / "model"), submodel.sliced(model, smap)
    for found, expected in zip(figures(loaded, tokens(2)), figures(small, tokens(2)), strict=True):
        assert torch.equal(found, expected)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in small.named_parameters()}
    assert json.loads((tmp_path / "model" / "pruning.json").read_text())["sparsity"] == submodel.sparsity(smap)
    assert model.config.use_cache is False
    assert not list((tmp_path / "model").glob("*.bin"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3, wide heads", "mistral"])
def test_layers_that_ended_alike_make_an_ordinary_folder(name, tmp_path):
    model = built(name)
    smap = language_structures(model, TOKENS)
    kept = np.concatenate([np.arange(len(b)) < len(b) // 2 for b in smap.blocks])
    submodel = Submodel(kept, smap.fingerprint)
    save_pruned(model, submodel, smap, tmp_path / "model")
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock) is type(model)
    for found, expected in zip(figures(stock, tokens(2)), figures(submodel.sliced(model, smap), tokens(2)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_masked_form_is_an_ordinary_folder_of_the_dense_shape(name, tmp_path):
    model, smap, submodel = pruned(name)
    save_pruned(model, submodel, smap, tmp_path / "model", form="masked")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad(), submodel.masked(model, smap):
        assert torch.equal(stock(tokens(2)).logits, model(tokens(2)).logits)
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_llama_whose_hidden_size_is_no_multiple_of_its_heads_is_saved_layer_by_layer(tmp_path):
    model = llama(4).eval()
    smap = language_structures(model, TOKENS)
    kept = np.concatenate([np.arange(len(b)) < (3 if b.kind == "head_group" else len(b)) for b in smap.blocks])
    submodel = Submodel(kept, smap.fingerprint)
    save_pruned(model, submodel, smap, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(tokens()).logits, submodel.sliced(model, smap)(tokens()).logits)


def alike(smap, groups, channels):
    """The same structures of every layer."""
    kept = np.concatenate([np.arange(len(b)) < (groups if b.kind == "head_group" else channels) for b in smap.blocks])
    return Submodel(kept, smap.fingerprint)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_layers_that_ended_alike_are_saved_where_a_head_has_no_size_of_its_own(name, tmp_path):
    model = built(name)
    smap = language_structures(model, TOKENS)
    submodel = alike(smap, 2, 20)
    save_pruned(model, submodel, smap, tmp_path / "model")
    assert torch.equal(load_pruned(tmp_path / "model")(tokens()).logits, submodel.sliced(model, smap)(tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_pruned_model_is_pruned_and_saved_again(name, tmp_path):
    model, smap, submodel = pruned(name)
    save_pruned(model, submodel, smap, tmp_path / "model")
    first = load_pruned(tmp_path / "model")
    smap = language_structures(first, TOKENS)
    for submodel in (alike(smap, 1, 5), Random(levels=(0.5,)).trajectory(first, smap, None, [(tokens(),)]).at(0.5)):
        for form in ("per_layer", "masked"):
            save_pruned(first, submodel, smap, tmp_path / form, form=form)
            found = load_pruned(tmp_path / form)
            with torch.no_grad(), submodel.masked(first, smap) as masked:
                expected = masked(tokens()).logits
            torch.testing.assert_close(found(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
            config = json.loads((tmp_path / form / "config.json").read_text())
            assert ("auto_map" in config) == ("per_layer_config" in config) == (tmp_path / form / "pruned_model.py").exists()
            assert config["architectures"] == [type(model).__name__]


def test_a_weight_that_the_saved_architecture_has_no_place_for_is_refused_and_the_older_folder_stays(tmp_path):
    model, smap, submodel = pruned("llama")
    save_pruned(model, submodel, smap, tmp_path / "model")
    model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32))
    smap = language_structures(model, TOKENS)
    for form in ("per_layer", "masked"):
        with pytest.raises(
            ValueError, match=r"layers.0.mlp.down_proj.bias' has shape \(32,\) here and None in the saved architecture llama"
        ):
            save_pruned(model, Submodel.dense(smap), smap, tmp_path / "model", form=form)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    load_pruned(tmp_path / "model")


def test_saving_again_replaces_the_folder_but_never_another_one(tmp_path):
    model, smap, submodel = pruned("llama")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="other exists and is no folder of a pruned model"):
        save_pruned(model, submodel, smap, tmp_path / "other")
    with pytest.raises(ValueError, match="form must be 'per_layer' or 'masked', got 'sparse'"):
        save_pruned(model, submodel, smap, tmp_path / "model", form="sparse")
    for _ in range(2):
        save_pruned(model, submodel, smap, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    safetensors.torch.save_file({n: w for n, w in weights.items() if n != name}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 weights, among them '{name}'"):
        load_pruned(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00" * 100)
    for broken in ("model", "nowhere", "other"):
        with pytest.raises(CheckpointError, match="holds no pruned language model that can be read"):
            load_pruned(tmp_path / broken)
