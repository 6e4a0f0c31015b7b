"""Converted models saved and taken back: by save_pretrained, by state dicts, in part and as a whole."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import attnres
from tests.attnres.converted import EPS, prepared
from tests.attnres.families import FAMILIES, logits_of

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("Llama", "GPT-2", "ViT") else pytest.param(name, marks=pytest.mark.long)
        for name in FAMILIES
        if name != "DiT"
    ],
)
def test_saved_and_loaded_with_save_pretrained(name, tmp_path):
    _, _, model, inputs = prepared(name, dtype=torch.float32)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded, "block", 4, example=inputs, weights=tmp_path)
    assert loaded.attnres.reads[0].eps == EPS  # as it was saved
    assert torch.equal(logits_of(loaded.eval()(**inputs)), logits_of(model(**inputs)))
    another = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another residual or layers_per_block"):
        attnres.convert(another, "block", 2, example=inputs, weights=tmp_path)
    with pytest.raises(ValueError, match=f"was saved with eps={EPS:g}: give the same eps, or none"):
        attnres.convert(another, "block", 4, example=inputs, eps=0.5, weights=tmp_path)
    assert not hasattr(another, "attnres")


@pytest.fixture
def inner():
    """A language model that was converted by its inner module alone, and inputs."""
    family = FAMILIES["Llama"]
    model, inputs = family.seeded().eval(), family.inputs()
    attnres.convert(model.model, "block", 4, example=inputs, eps=1e-5)
    with torch.no_grad():
        for read in model.model.attnres.reads:
            read.query.normal_()
    return model, inputs


def outputs_of(model, inputs):
    return logits_of(model.eval()(**inputs))


@pytest.mark.parametrize("part", ["model", ""])
def test_a_part_converted_is_saved_with_the_whole_and_taken_back_by_either(inner, part, tmp_path):
    model, inputs = inner
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded.get_submodule(part), "block", 4, example=inputs, weights=tmp_path)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_a_whole_converted_is_taken_back_by_a_part(tmp_path):
    _, _, model, inputs = prepared("Llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    attnres.convert(loaded.model, "block", 4, example=inputs, weights=tmp_path)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_a_converted_model_is_kept_by_torch_save_whole_or_by_its_state_dict(inner, tmp_path):
    model, inputs = inner
    expected = outputs_of(model, inputs)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(outputs_of(whole, inputs), expected)
    attnres.revert(whole.model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    again = FAMILIES["Llama"].seeded()
    attnres.convert(again.model, "block", 4, example=inputs, eps=1e-5)
    again.load_state_dict(state)
    assert torch.equal(outputs_of(again, inputs), expected)


def test_a_state_dict_of_another_eps_or_size_is_refused(inner):
    model, inputs = inner
    for size, eps, says in (
        (4, 1e-6, "^eps: .* convert the model with eps=1e-05"),
        (2, 1e-5, "layers_per_block"),
    ):
        other = FAMILIES["Llama"].seeded()
        attnres.convert(other.model, "block", size, example=inputs, eps=eps)
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(model.state_dict())


def test_what_was_converted_in_part_is_not_converted_or_reverted_as_a_whole(inner):
    model, _ = inner
    with pytest.raises(ValueError, match="was converted already, by model: revert that"):
        attnres.convert(model, "full")
    with pytest.raises(ValueError, match="its part model was: pass the module"):
        attnres.revert(model)
    attnres.revert(model.model)
    attnres.convert(model, "full")
    with pytest.raises(ValueError, match="was converted already, by a module that holds it"):
        attnres.convert(model.model, "full")


def test_weights_of_two_converted_models_in_one_folder_are_refused(inner, tmp_path):
    model, _ = inner
    pair = nn.ModuleDict({"one": model, "two": copy.deepcopy(model)})
    save_file(
        {name: x.contiguous() for name, x in pair.state_dict().items() if "attnres" in name},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match=r"several converted modules, one\.model, two\.model"):
        attnres.convert(FAMILIES["Llama"].seeded(), "block", 4, weights=tmp_path)
