"""Every spelling of `config.json` is read as transformers reads it, and what cannot be honoured is refused."""

import json

import pytest
import transformers
from tiny_models import tiny_gemma2_config, tiny_multimodal_config, tiny_text_config

from gemma3.files.config_json import config_from_dict, config_to_dict, read_config
from gemma3.files.published import CONFIGS, NANO

SPARSE_4B = {  # the published gemma-3-4b-it
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
HUB_1B = {  # the published gemma-3-1b-it, in the spelling of 2025
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
HUB_GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}

CLASSES = {
    "gemma3": transformers.Gemma3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma2": transformers.Gemma2Config,
}


def facts_of_transformers(content: dict) -> dict:
    """What transformers makes of a config.json, under our names."""
    top = CLASSES[content["model_type"]](**json.loads(json.dumps(content)))
    text = getattr(top, "text_config", top)
    rope = text.rope_parameters
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    facts = {
        "model_type": top.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_layers": text.num_hidden_layers,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "sliding_window": text.sliding_window,
        "layer_types": tuple(text.layer_types),
        "query_pre_attn_scalar": text.query_pre_attn_scalar,
        "global_rope_base": full["rope_theta"],
        "global_rope_factor": full.get("factor", 1.0),
        "local_rope_base": sliding["rope_theta"],
        "attention_softcap": text.attn_logit_softcapping,
        "final_softcap": text.final_logit_softcapping,
        "norm_eps": text.rms_norm_eps,
        "max_positions": text.max_position_embeddings,
        "pad_id": text.pad_token_id,
        "bos_id": text.bos_token_id,
    }
    if top.model_type == "gemma3":
        vision = top.vision_config
        facts |= {
            "image_token_id": top.image_token_index,
            "start_of_image_id": top.boi_token_index,
            "end_of_image_id": top.eoi_token_index,
            "vision.hidden_size": vision.hidden_size,
            "vision.intermediate_size": vision.intermediate_size,
            "vision.num_layers": vision.num_hidden_layers,
            "vision.num_heads": vision.num_attention_heads,
            "vision.image_size": vision.image_size,
            "vision.patch_size": vision.patch_size,
            "vision.norm_eps": vision.layer_norm_eps,
            "vision.tokens_per_image": top.mm_tokens_per_image,
        }
    return facts


def facts_of_ours(config, names) -> dict:
    def value(name: str):
        head, _, tail = name.partition(".")
        return getattr(getattr(config, head), tail) if tail else getattr(config, name)

    return {name: value(name) for name in names}


SPELLINGS = {
    "sparse 4b": SPARSE_4B,
    "4b with type for rope_type": SPARSE_4B
    | {"text_config": SPARSE_4B["text_config"] | {"rope_scaling": {"type": "linear", "factor": 8.0}}},
    "4b with nulls": SPARSE_4B
    | {"text_config": SPARSE_4B["text_config"] | {"rope_parameters": None, "layer_types": None}},
    "no text_config": {"model_type": "gemma3", "vision_config": SPARSE_4B["vision_config"]},
    "no vision_config": {"model_type": "gemma3", "mm_tokens_per_image": 49},
    "2025 1b": HUB_1B,
    "other pattern and bases": HUB_1B
    | {"sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 7e3, "num_hidden_layers": 7},
    "270m, explicit layers": HUB_1B
    | {"_sliding_window_pattern": 6, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma3 class defaults": {"model_type": "gemma3_text"},
    "2024 gemma 2": HUB_GEMMA2_2B,
    "gemma2 class defaults": {"model_type": "gemma2"},
    "gemma2 without caps": HUB_GEMMA2_2B | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "5.x text": tiny_text_config().to_dict(),
    "5.x multimodal": tiny_multimodal_config().to_dict(),
    "5.x gemma 2": tiny_gemma2_config().to_dict(),
    "5.x rope without bases": tiny_text_config(rope_parameters={"full_attention": {"rope_type": "default"}}).to_dict(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_transformers_reads_it(spelling):
    expected = facts_of_transformers(SPELLINGS[spelling])
    assert facts_of_ours(config_from_dict(SPELLINGS[spelling]), expected) == expected


def test_the_published_files_are_the_named_sizes():
    assert config_from_dict(SPARSE_4B) == CONFIGS["gemma-3-4b-it"]
    assert config_from_dict(HUB_1B) == CONFIGS["gemma-3-1b-it"]
    assert config_from_dict(HUB_GEMMA2_2B) == CONFIGS["gemma-2-2b"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back_here_and_in_transformers(name):
    content = json.loads(json.dumps(config_to_dict(CONFIGS[name])))
    assert config_from_dict(content) == CONFIGS[name]
    expected = facts_of_transformers(content)
    assert facts_of_ours(CONFIGS[name], expected) == expected


def in_text_config(change: dict) -> dict:
    return SPARSE_4B | {"text_config": SPARSE_4B["text_config"] | change}


REFUSED = [
    ({"model_type": "gemma3n"}, "model_type 'gemma3n'; supported are Gemma 3 .* and 'gemma2'"),
    ({"model_type": "gemma4"}, "model_type 'gemma4'"),
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({}, "model_type None"),
    (in_text_config({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}), "asks for rope .*'yarn'.* supported are"),
    (in_text_config({"rope_scaling": {"rope_type": "linear"}}), "'linear' with a factor"),
    (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        },
        "asks for rope .*'linear'",
    ),
    (HUB_GEMMA2_2B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "in Gemma 3's full_attention layers"),
    (in_text_config({"attention_bias": True}), "sets attention_bias to true; only false is supported"),
    (HUB_1B | {"hidden_activation": "gelu"}, 'hidden_activation to "gelu"; only "gelu_pytorch_tanh" is supported'),
    (HUB_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention to true"),  # EmbeddingGemma
    (SPARSE_4B | {"tie_word_embeddings": False}, "tie_word_embeddings to false"),
    (HUB_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0; only null is supported"),
    (in_text_config({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping to 50.0"),
    (HUB_1B | {"quantization_config": {"bits": 4}}, "quantization_config to .*only null"),
    (HUB_1B | {"layer_types": ["chunked_attention"] * 26}, "layer types \\['chunked_attention'\\]"),
    (SPARSE_4B | {"vision_config": {"vision_use_head": True}}, "vision_use_head to true"),
    (SPARSE_4B | {"vision_config": {"model_type": "clip_vision_model"}}, 'model_type to "clip_vision_model"'),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_honoured_is_refused_with_its_value(content, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(content)


def write(directory, name: str, content) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_stop_ids_of_the_generation_config_are_added(tmp_path):
    write(tmp_path, "config.json", HUB_GEMMA2_2B)
    write(tmp_path, "generation_config.json", {"eos_token_id": [1, 107]})
    assert read_config(tmp_path) == CONFIGS["gemma-2-2b-it"]


def test_a_directory_is_read(tmp_path):
    write(tmp_path, "config.json", config_to_dict(NANO))
    assert read_config(tmp_path) == NANO


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "gemma3", "text_config": 3}', '{"model_type": "llama"}']
)
def test_an_unusable_file_is_named(tmp_path, content):
    write(tmp_path, "config.json", content)
    with pytest.raises(ValueError, match=r"/config\.json cannot be used: "):
        read_config(tmp_path)


def test_an_unusable_generation_config_is_named(tmp_path):
    write(tmp_path, "config.json", HUB_1B)
    write(tmp_path, "generation_config.json", "")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be used: "):
        read_config(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model directory: it has no config\.json"):
        read_config(tmp_path)
