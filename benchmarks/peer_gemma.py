"""The worker of `peers.py` for gemma (google-deepmind's library, in flax): its sampler, on text."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from safetensors import safe_open

from benchmarks import peer_job as common
from benchmarks.peer_job import Job

NO_ID = -1  # used as the stop tokens, so that every completion runs to its full length
ATTENTION = {
    "sliding_attention": gm.nn.AttentionType.LOCAL_SLIDING,
    "full_attention": gm.nn.AttentionType.GLOBAL,
}


class Words:
    """The tokenizer that the sampler asks for; its text is that of `peer_job.words`."""

    VERSION, FORBIDDEN_TOKENS = None, ()

    class special_tokens:
        EOS = END_OF_TURN = NO_ID

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        return [common.BOS] * add_bos + [int(word) for word in text.split()]

    def decode(self, ids: jax.Array) -> str:
        return common.words(ids.tolist())


def load_model(job: Job) -> gm.nn.Transformer:
    sizes = json.loads(Path(job.model, "config.json").read_text())
    config = gm.nn.config.TransformerConfig(
        num_embed=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        attention_types=tuple(ATTENTION[kind] for kind in sizes["layer_types"]),
        sliding_window_size=sizes["sliding_window"],
        local_base_frequency=sizes["rope_local_base_freq"],
        global_base_frequency=sizes["rope_theta"],
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        transpose_gating_einsum=True,
    )
    return gm.nn.Transformer(config=config, dtype=jnp.dtype(job.dtype))


def load_params(job: Job, config: gm.nn.config.TransformerConfig) -> dict:
    """The job's weights in the library's tree; flax refuses one that is missing or of another shape."""
    stored = safe_open(Path(job.model, "model.safetensors"), "numpy")

    def tensor(name: str) -> jax.Array:
        return jnp.asarray(stored.get_tensor(f"model.{name}.weight"), job.dtype)

    def norm(name: str) -> dict[str, jax.Array]:
        return {"scale": tensor(name)}  # the library adds it to 1, as transformers does

    def heads(name: str) -> jax.Array:
        """(N H) D -> N D H"""
        return tensor(name).reshape(-1, config.head_dim, config.embed_dim).swapaxes(1, 2)

    def layer(at: str) -> dict:
        return {
            "pre_attention_norm": norm(f"{at}.input_layernorm"),
            "attn": {
                "q_einsum": {"w": heads(f"{at}.self_attn.q_proj")},
                "kv_einsum": {"w": jnp.stack([heads(f"{at}.self_attn.{name}_proj") for name in "kv"])},
                "_query_norm": norm(f"{at}.self_attn.q_norm"),
                "_key_norm": norm(f"{at}.self_attn.k_norm"),
                "attn_vec_einsum": {
                    "w": tensor(f"{at}.self_attn.o_proj").T.reshape(-1, config.head_dim, config.embed_dim)
                },
            },
            "post_attention_norm": norm(f"{at}.post_attention_layernorm"),
            "pre_ffw_norm": norm(f"{at}.pre_feedforward_layernorm"),
            "mlp": {
                "gating_einsum": jnp.stack([tensor(f"{at}.mlp.{name}_proj") for name in ("gate", "up")]),
                "linear": tensor(f"{at}.mlp.down_proj").T,
            },
            "post_ffw_norm": norm(f"{at}.post_feedforward_layernorm"),
        }

    params = {"embedder": {"input_embedding": tensor("embed_tokens")}, "final_norm": norm("norm")}
    return params | {f"layer_{i}": layer(f"layers.{i}") for i in range(config.num_layers)}


def memory(job: Job) -> int | None:
    return None if job.device == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def sampling(job: Job) -> None:
    """The sampler has no groups, so each prompt is repeated G times; it adds <bos> itself."""
    batch, model = common.load_batch(job), load_model(job)
    sampler = gm.text.Sampler(
        model=model,
        params=load_params(job, model.config),
        tokenizer=Words(),
        cache_length=job.prompt_length + job.length,
        max_out_length=job.length,
        pad_length=job.prompt_length,
    )
    prompts = [common.words(ids[1:]) for ids in batch["prompt_ids"] for _ in range(job.group)]
    how = gm.text.RandomSampling(temperature=job.temperature) if job.temperature else gm.text.Greedy()

    def call():
        return np.asarray(sampler.sample(prompts, sampling=how, rng=0, return_state=True).tokens)

    tokens, times = common.measure(job, call)
    common.write_result(job, times, memory(job), tokens=tokens.tolist())


if __name__ == "__main__":
    sampling(common.read_job())
