"""LoRA adapters, also of the vision tower, go both ways between PEFT and here with the same logits. Anything beyond
plain LoRA is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import logits_of_transformers, prompt
from tiny_models import tiny_model, tiny_multimodal_config, tiny_text_config

from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.files.published import NANO
from gemma3.files.weights import load_checkpoint
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.model import forward

torch.set_num_threads(1)
CONFIGURATIONS = {"text": tiny_text_config, "multimodal": tiny_multimodal_config}
LANGUAGE = r".*language_model.*\."
TOWER = r".*vision_tower.*encoder.*\."


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def base(request, tmp_path_factory):
    """(kind, directory of the base model, our config and params, prompt, logits of the base model)."""
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_model(CONFIGURATIONS[request.param]())
    model.save_pretrained(directory)
    given = prompt(request.param)
    return request.param, directory, load_checkpoint(directory), given, logits_of_transformers(model, *given)


def base_model(kind: str):
    return tiny_model(CONFIGURATIONS[kind]())


def save_with_peft(kind: str, directory, given, **settings) -> np.ndarray:
    """Make a random adapter with PEFT, save it, and return the logits of the adapted model."""
    model = peft.get_peft_model(base_model(kind), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(directory)
    return logits_of_transformers(model, *given)


def random_lora(config, settings: LoraConfig):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), config, settings))
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes)


def modules(kind: str, *names: str):
    return list(names) if kind == "text" else f"{LANGUAGE}({'|'.join(names)})"


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {  # ours, and the same for PEFT
    "all": (LoraConfig(r=5, alpha=7.0), {"r": 5, "lora_alpha": 7}, ALL),
    "some": (LoraConfig(r=3, alpha=6.0, targets=("v", "o", "down")), {"r": 3, "lora_alpha": 6}, ALL[2:4] + ALL[6:]),
    "rslora": (LoraConfig(r=3, alpha=4.0, rslora=True), {"r": 3, "lora_alpha": 4, "use_rslora": True}, ALL),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_peft_saves_gives_its_logits_here(case, base, tmp_path):
    kind, _, (config, params), given, plain = base
    _, settings, names = SETTINGS[case]
    expected = save_with_peft(kind, tmp_path, given, target_modules=modules(kind, *names), **settings)
    assert np.abs(expected - plain).max() > 0.05
    lora = load_adapter(tmp_path, config)
    np.testing.assert_allclose(forward(Policy(params, lora), *given, config=config), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", SETTINGS)
def test_what_is_saved_here_gives_the_same_logits_in_peft(case, base, tmp_path):
    kind, _, (config, params), given, plain = base
    settings = SETTINGS[case][0]
    lora = random_lora(config, settings)
    save_adapter(tmp_path / "adapter", config, lora, "google/gemma-3-4b-it", rslora=settings.rslora)
    expected = forward(Policy(params, lora), *given, config=config)
    assert np.abs(expected - plain).max() > 0.05
    adapted = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "adapter").eval()
    np.testing.assert_allclose(logits_of_transformers(adapted, *given), expected, atol=1e-5, rtol=0)
    assert not [name for name, _ in adapted.named_parameters() if "lora_" in name and "vision" in name]
    again = load_adapter(tmp_path / "adapter", config)
    assert again.scale == pytest.approx(lora.scale)
    jax.tree.map(np.testing.assert_array_equal, again.blocks, lora.blocks)


def test_settings_and_keys_are_those_peft_writes(base, tmp_path):
    """The file has the names PEFT itself gives this adapter, in float32, and states r and alpha as they were set."""
    kind, _, (config, _), given, _ = base
    lora = random_lora(config, LoraConfig(r=3, alpha=4.0, rslora=True))
    save_adapter(tmp_path / "ours", config, lora, "google/gemma-3-4b-it", rslora=True)
    save_with_peft(kind, tmp_path / "theirs", given, r=3, target_modules=modules(kind, *ALL))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (3, 4, True)
    assert settings["base_model_name_or_path"] == "google/gemma-3-4b-it"


multimodal = pytest.mark.parametrize("base", ["multimodal"], indirect=True)


@multimodal
@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (f"{LANGUAGE}(q_proj|down_proj)|{TOWER}(k_proj|out_proj|fc1)", ["key", "out", "fc1"]),
        (["q_proj", "v_proj", "up_proj"], ["query", "value"]),  # PEFT takes these names in both towers
    ],
)
def test_what_peft_saves_of_both_towers_gives_its_logits_here(targets, adapted, base, tmp_path):
    _, _, (config, params), given, _ = base
    expected = save_with_peft("multimodal", tmp_path, given, target_modules=targets, r=5, lora_alpha=7)
    lora = load_adapter(tmp_path, config)
    assert [name for name, pair in lora.vision._asdict().items() if pair is not None] == adapted
    np.testing.assert_allclose(forward(Policy(params, lora), *given, config=config), expected, atol=1e-5, rtol=0)
    text_only = forward(Policy(params, lora._replace(vision=None)), *given, config=config)
    assert np.abs(expected - text_only).max() > 0.01


@multimodal
def test_what_is_saved_here_of_both_towers_is_as_peft_saves_it_and_gives_the_same_logits_there(base, tmp_path):
    kind, _, (config, params), given, _ = base
    lora = random_lora(config, LoraConfig(r=5, alpha=7.0, targets=("q", "down"), vision=True))
    save_adapter(tmp_path / "ours", config, lora, "google/gemma-3-4b-it")
    expected = forward(Policy(params, lora), *given, config=config)
    text_only = forward(Policy(params, lora._replace(vision=None)), *given, config=config)
    assert np.abs(expected - text_only).max() > 0.01
    adapted = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of_transformers(adapted, *given), expected, atol=1e-5, rtol=0)
    adapted.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "ours", config), lora)


def test_on_a_mesh_an_adapter_is_split_as_its_layers_are(base, tmp_path):
    _, _, (config, _), _, _ = base
    lora = random_lora(config, LoraConfig(r=3, vision=config.vision is not None))
    save_adapter(tmp_path / "adapter", config, lora, "base")
    mesh = make_mesh(2, 4)
    whole, split = load_adapter(tmp_path / "adapter", config), load_adapter(tmp_path / "adapter", config, mesh)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert jax.tree.map(lambda x: x.sharding, split) == Model(config, mesh).shardings(whole)


@pytest.fixture
def nano_adapter(tmp_path):
    save_adapter(tmp_path / "adapter", NANO, random_lora(NANO, LoraConfig(r=3, targets=("q", "down"))), "nano")
    return tmp_path / "adapter"


def change_settings(directory, **settings):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_adapters_are_float32_even_from_a_bfloat16_file(nano_adapter):
    change_tensors(nano_adapter, lambda t: t.update({name: x.to(torch.bfloat16) for name, x in t.items()}))
    assert {x.dtype for x in jax.tree.leaves(load_adapter(nano_adapter, NANO))} == {jnp.dtype(jnp.float32)}


def test_prefixes_of_older_trainers_are_read(nano_adapter):
    expected = load_adapter(nano_adapter, NANO)
    for old in ("language_model.model.", "model.language_model.model."):
        rename = lambda t, old=old: [t.update({n.replace("model.language_model.", old): t.pop(n)}) for n in list(t)]  # noqa: E731
        source = {p.name: p.read_bytes() for p in nano_adapter.iterdir()}
        change_tensors(nano_adapter, rename)
        jax.tree.map(np.testing.assert_array_equal, load_adapter(nano_adapter, NANO), expected)
        for name, content in source.items():
            (nano_adapter / name).write_bytes(content)


REFUSED_SETTINGS = [
    ({"use_dora": True}, "sets use_dora to True; only plain LoRA"),
    ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save to \['lm_head'\]"),
    ({"bias": "all"}, "sets bias to 'all'; only 'none' is supported"),
    ({"rank_pattern": {"q_proj": 4}}, "sets rank_pattern to"),
    ({"alpha_pattern": {"q_proj": 4}}, "sets alpha_pattern to"),
    ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
    ({"layers_to_transform": [0]}, "sets layers_to_transform"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa', which changes the base model too"),
    ({"peft_type": "IA3"}, "an adapter of type IA3; only LORA is supported"),
    ({"r": None}, "gives r as None; a number above 0 is needed"),
    ({"lora_alpha": None}, "gives lora_alpha as None"),
    ({"r": 0}, "gives r as 0"),
    ({"r": 3.5}, "gives r as 3.5"),
    ({"r": 4}, r"lora_A\.weight in .* is \[3, 64\]; the config asks for \[4, 64\]"),
    ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"lacks the tensor .*v_proj\.lora_A\.weight and 11 more"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SETTINGS, ids=[m for _, m in REFUSED_SETTINGS])
def test_settings_beyond_plain_lora_are_refused(settings, message, nano_adapter):
    change_settings(nano_adapter, **settings)
    with pytest.raises(ValueError, match=message):
        load_adapter(nano_adapter, NANO)


LAYER = "base_model.model.model.language_model.layers.5."
VISION = "base_model.model.model.vision_tower."
PROJECTOR = "base_model.model.model.multi_modal_projector."
REFUSED_TENSORS = [
    (
        lambda t: t.pop(LAYER + "mlp.down_proj.lora_B.weight"),
        r"lacks the tensor model\.layers\.5\.mlp\.down_proj\.lora_B",
    ),
    (lambda t: t.update({LAYER + "x.lora_A.weight": torch.ones(2)}), r"holds the tensor model\.layers\.5\.x\.lora_A"),
    (
        lambda t: t.update({VISION + "embeddings.patch_embedding.lora_A.weight": torch.ones(2)}),
        r"holds the tensor vision_tower\.vision_model\.embeddings\.patch_embedding\.lora_A\.weight, which this",
    ),
    (
        lambda t: t.update({PROJECTOR + "mm_input_projection.lora_A.weight": torch.ones(2)}),
        r"holds the tensor multi_modal_projector\.mm_input_projection\.lora_A\.weight, which this model",
    ),
    (
        lambda t: t.update({VISION + "encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(3, 64)}),
        r"lacks the tensor vision_tower\.vision_model\.encoder\.layers\.0\.mlp\.fc1\.lora_B",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS, ids=[m for _, m in REFUSED_TENSORS])
def test_tensors_that_do_not_fit_are_named(change, message, nano_adapter):
    change_tensors(nano_adapter, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(nano_adapter, NANO)


def test_an_adapter_of_the_vision_tower_is_refused_by_a_model_without_one(nano_adapter):
    lora = random_lora(NANO, LoraConfig(r=3, vision=True))
    save_adapter(nano_adapter, NANO, lora, "nano")
    with pytest.raises(ValueError, match="adapts the vision tower, and a gemma3_text model has none"):
        load_adapter(nano_adapter, replace(NANO, model_type="gemma3_text", vision=None))


def test_an_adapter_of_nothing_is_refused(nano_adapter):
    change_tensors(nano_adapter, lambda tensors: tensors.clear())
    with pytest.raises(ValueError, match="adapts no layer of the language model; one of q_proj, k_proj"):
        load_adapter(nano_adapter, NANO)


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"adapter_config\.json is missing or damaged .*pass a PEFT adapter's directory"
    ):
        load_adapter(tmp_path, NANO)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3}))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing, damaged"):
        load_adapter(tmp_path, NANO)
