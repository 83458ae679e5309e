"""The worker of `peers.py` for Tunix (google-tunix), on text: its sampler, its GRPO train step, its GRPO learner."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma3.model import ModelConfig
from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors
from tunix.rl import algo_core
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from benchmarks import peer_job as common
from benchmarks.peer_job import Job

PROJECTIONS = ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj"
NO_ID = -1  # used as the stop token, so that every completion runs to its full length


class Words:
    """The tokenizer that Tunix asks for; its text is that of `peer_job.words`."""

    def encode(self, text: str) -> list[int]:
        return [common.SPECIAL.index(word) if word in common.SPECIAL else int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return common.words(ids)

    def bos_id(self) -> int:
        return common.BOS

    def eos_id(self) -> int:
        return common.EOS

    def pad_id(self) -> int:
        return common.PAD


def load_model(job: Job, mesh) -> nnx.Module:
    sizes = json.loads(Path(job.model, "config.json").read_text())
    config = ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        num_embed=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        sliding_window_size=sizes["sliding_window"],
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        param_dtype=jnp.dtype(job.dtype),
    )
    return create_model_from_safe_tensors(job.model, config, mesh, dtype=jnp.dtype(job.dtype))


def adapted(model: nnx.Module) -> nnx.Module:
    provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=common.LORA_R, alpha=common.LORA_ALPHA)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def make_mesh():
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def memory(job: Job) -> int | None:
    return None if job.device == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def optimizer() -> optax.GradientTransformation:
    adamw = optax.adamw(common.LEARNING_RATE, b1=0.9, b2=common.ADAM_BETA2, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(common.MAX_GRAD_NORM), adamw)


def algorithm(job: Job) -> GRPOConfig:
    """The loss of the other systems, under Tunix's names."""
    return GRPOConfig(
        num_generations=job.group,
        beta=common.BETA,
        epsilon=common.EPSILON,
        loss_agg_mode="token-mean",
        kl_loss_mode="low_var_kl",
    )


def sampling(job: Job) -> None:
    mesh, batch = make_mesh(), common.load_batch(job)
    model = load_model(job, mesh)
    c = model.config
    cache = CacheConfig(job.prompt_length + job.length, c.num_layers, c.num_kv_heads, c.head_dim)
    sampler = Sampler(model, Words(), cache)
    prompts = [common.words(ids) for ids in batch["prompt_ids"] for _ in range(job.group)]
    # Only with a top_p it samples; at 1.0 it neither sorts nor filters.
    how = {"temperature": job.temperature, "top_p": 1.0} if job.temperature else {}

    def call():
        return sampler(prompts, job.length, max_prompt_length=job.prompt_length, eos_tokens=[NO_ID], **how)

    with mesh:
        output, times = common.measure(job, call)
    tokens = [np.asarray(ids).tolist() for ids in output.tokens]
    common.write_result(job, times, memory(job), tokens=tokens)


def one_update(job: Job) -> None:
    """The train step that Tunix's learner runs, with its GRPO loss."""
    mesh, batch = make_mesh(), common.load_batch(job)
    settings = algorithm(job)
    settings.temperature = 1.0

    def loss(model, train_example, algo_config):
        return algo_core.grpo_loss_fn(model, train_example, settings, pad_id=common.PAD, eos_id=common.EOS)

    def rows(name: str) -> jax.Array:
        return jnp.asarray(batch[name].reshape(-1, *batch[name].shape[2:]))

    prompts = jnp.asarray(batch["prompt_ids"].repeat(job.group, axis=0))
    completions = rows("completion_ids")
    example = TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != common.PAD,
        completion_ids=completions,
        completion_mask=completions != common.PAD,
        advantages=rows("advantages"),
        ref_per_token_logps=rows("ref_logps"),
        old_per_token_logps=rows("old_logps"),
    )
    with mesh:
        config = TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        trainer = Trainer(adapted(load_model(job, mesh)), optimizer(), config, lambda: {})
        trainer.with_loss_fn(loss, has_aux=True)
        trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": settings})
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

        def call():
            value, _, norm = step(example)
            jax.block_until_ready(nnx.state(trainer.model, nnx.LoRAParam))
            return {"loss": float(value), "lora_norm": float(norm)}

        seen, times = common.measure(job, call)
    common.write_result(job, times, memory(job), **seen)


def whole_steps(job: Job) -> None:
    """GRPOLearner.train, with a reference, on the same prompts in every step."""
    mesh, batch, lengths, moments = make_mesh(), common.load_batch(job), [], []

    def reward(prompts, completions, **columns) -> list[float]:
        lengths.append(sum(len(text.split()) for text in completions))
        return [common.reward(text) for text in completions]

    with mesh:
        reference = load_model(job, mesh)

        def note() -> None:
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.LoRAParam))
            moments.append(common.now())

        def steps() -> Iterator[dict]:
            for _ in range(job.repeats + 1):
                note()
                yield {"prompts": np.array([common.words(ids) for ids in batch["prompt_ids"]])}
            note()

        cluster = RLCluster(
            actor=adapted(reference),
            reference=reference,
            tokenizer=Words(),
            cluster_config=ClusterConfig(
                role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
                training_config=RLTrainingConfig(
                    actor_optimizer=optimizer(), eval_every_n_steps=1000, max_steps=job.repeats + 2
                ),
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=job.length,
                    max_prompt_length=job.prompt_length,
                    kv_cache_size=job.prompt_length + job.length,
                    temperature=1.0,
                    eos_tokens=[NO_ID],
                ),
            ),
        )
        GRPOLearner(cluster, algorithm(job), reward).train(steps())
    common.write_result(job, common.times_between(job, moments), memory(job), drawn=lengths[-1])


def main() -> None:
    job = common.read_job()
    {"sampling": sampling, "update": one_update, "step": whole_steps}[job.part](job)


if __name__ == "__main__":
    main()
