"""Tiny Hugging Face models, the oracles of the parity tests: small in every size, with every branch of the real ones.

Five local layers, a global one and two more; a window shorter than a sequence; N * H is not D; scores are not scaled by
H; two images of 2 x 2 soft tokens fit a short prompt. transformers mutates the config of a model, so each call makes a
new one.
"""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

IMAGE_ID, START_OF_IMAGE_ID, END_OF_IMAGE_ID = 380, 377, 378

_SIZES = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tiny_text_config(**changes) -> Gemma3TextConfig:
    """Gemma 3, text only, with a rope factor on the global layer; `changes` replace fields."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    return Gemma3TextConfig(**(_SIZES | {"num_hidden_layers": 8, "rope_parameters": rope} | changes))


def tiny_multimodal_config(**changes) -> Gemma3Config:
    """`tiny_text_config(**changes)` with a SigLIP tower of 4 x 4 patches, pooled to 2 x 2 soft tokens."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=tiny_text_config(**changes),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=START_OF_IMAGE_ID,
        eoi_token_index=END_OF_IMAGE_ID,
        image_token_index=IMAGE_ID,
    )


def tiny_gemma2_config(**changes) -> Gemma2Config:
    """Gemma 2 with soft caps small enough to bite."""
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    return Gemma2Config(**(_SIZES | {"num_hidden_layers": 4} | caps | changes))


_MODELS = {
    "gemma3_text": Gemma3ForCausalLM,
    "gemma3": Gemma3ForConditionalGeneration,
    "gemma2": Gemma2ForCausalLM,
}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every parameter with seeded normals, std 0.2 (embedding 0.05), and return the model in evaluation mode.

    Without this the projector and all norms are zero as transformers makes them, and a comparison proves little.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.05 if "embed_tokens" in name else 0.2
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_model(config, seed: int = 0):
    """The randomised float32 model of a config, with eager attention, the implementation that is easiest to follow."""
    return randomize(_MODELS[config.model_type]._from_config(config, attn_implementation="eager"), seed)
