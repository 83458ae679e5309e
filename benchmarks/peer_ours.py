"""The worker of `peers.py` for this project; it also makes the weights, adapters and batches that every system gets."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peer_job as common
from benchmarks.peer_job import Job
from gemma3.config import Config, VisionConfig
from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.files.published import CONFIGS
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.filters import Sampling
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.params import Params, init_params
from gemma3.sample import Completions, PromptBatch, sample
from grpo.algorithm import LossBatch, LossConfig, group_advantages, token_weights
from grpo.rollout import encode_on_mesh, split_over_data
from grpo.update import Learner, completion_logps, init_state, update

LOSS = LossConfig(epsilon=common.EPSILON, beta=common.BETA, use_bias_correction_kl=False)


def model_config(job: Job) -> Config:
    """The 270m shape with a smaller vocabulary; for images two layers of SigLIP's width, 448 pixels, 256 tokens."""
    config = replace(CONFIGS["gemma-3-270m"], vocab_size=job.vocab_size)
    vision = VisionConfig(num_layers=2, image_size=448)
    if job.quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32}
        config = replace(config, **sizes, num_layers=6, layer_types=config.layer_types[:6], sliding_window=16)
        vision = VisionConfig(64, 128, 2, 4, image_size=112, tokens_per_image=16)
    if not job.images:
        return config
    return replace(
        config,
        model_type="gemma3",
        image_token_id=common.IMAGE,
        start_of_image_id=common.START_OF_IMAGE,
        end_of_image_id=common.END_OF_IMAGE,
        vision=vision,
    )


def random_params(config: Config) -> Params:
    """Random weights, norms and biases included: a norm or bias that does nothing would hide a difference.

    Embeddings are small beside what the blocks add, or greedy decoding would repeat one token; the final norm makes up
    for it. Special ids other than <bos> have zero embeddings, so that greedy decoding never samples one.
    """

    def noisy(path, x: jax.Array) -> jax.Array:
        if "norm" not in path[-1].name and "bias" not in path[-1].name:
            return x
        key = jax.random.key(sum(map(ord, jax.tree_util.keystr(path))))
        return x + 0.1 * jax.random.normal(key, x.shape)

    params = jax.tree_util.tree_map_with_path(noisy, init_params(jax.random.key(0), config))
    special = jnp.array([i for i in range(len(common.SPECIAL)) if i != common.BOS])
    embedding = 0.3 * params.text.embedding.at[special].set(0.0)
    return params._replace(text=params.text._replace(embedding=embedding, final_norm=params.text.final_norm + 2.0))


def make_prompts(config: Config, job: Job) -> dict[str, np.ndarray]:
    """Random words after <bos>; if the model has a vision tower, a random image stands before the words."""
    rng = np.random.default_rng(2)
    ids = rng.integers(len(common.SPECIAL), config.vocab_size, (job.prompts, job.prompt_length)).astype(np.int32)
    ids[:, 0] = common.BOS
    if config.vision is None:
        return {"prompt_ids": ids}
    tokens, size = config.vision.tokens_per_image, config.vision.image_size
    ids[:, 1], ids[:, 2 : 2 + tokens], ids[:, 2 + tokens] = common.START_OF_IMAGE, common.IMAGE, common.END_OF_IMAGE
    return {"prompt_ids": ids, "pixels": rng.integers(0, 256, (job.prompts, size, size, 3), dtype=np.uint8)}


def make_completions(config: Config, job: Job) -> dict[str, np.ndarray]:
    """Completions as if sampled by an older policy; `prepare` adds its log-probs and the reference's."""
    rng, rows = np.random.default_rng(3), (job.prompts, job.group)
    return {
        "completion_ids": rng.integers(len(common.SPECIAL), config.vocab_size, (*rows, job.length)).astype(np.int32),
        "advantages": np.asarray(group_advantages(rng.standard_normal(rows, np.float32))),
    }


class Ours:
    """A model on one device, as the functions of the project take it."""

    def __init__(self, job: Job):
        config, params = load_checkpoint(job.model, dtype=jnp.dtype(job.dtype), mesh=make_mesh(1, 1))
        config = replace(config, stop_ids=(-1,))  # no id: every completion runs to its full length
        self.job, self.model, self.base = job, Model(config, make_mesh(1, 1)), Policy(params)
        self.allowed = jnp.ones(config.vocab_size, bool).at[jnp.arange(len(common.SPECIAL))].set(False)

    def split(self, array: np.ndarray) -> jax.Array:
        return split_over_data(array, self.model.mesh)

    def prompts(self, batch: dict[str, np.ndarray]) -> PromptBatch:
        ids, index = self.split(batch["prompt_ids"]), self.split(np.arange(self.job.prompts, dtype=np.int32))
        if not self.job.images:
            return PromptBatch(ids, None, index)
        soft = encode_on_mesh(self.base, self.split(batch["pixels"][:, None]), model=self.model)
        return PromptBatch(ids, soft, index)

    def sample(self, policy: Policy, prompts: PromptBatch, key: jax.Array, temperature: float) -> Completions:
        how = Sampling(temperature, num_generations=self.job.group, max_completion_length=self.job.length)
        return sample(policy, prompts, key, self.allowed, model=self.model, sampling=how)

    def base_logps(self, prompts: PromptBatch, completion_ids: jax.Array) -> jax.Array:
        how = {"model": self.model, "temperature": 1.0, "micro_batch": self.job.prompts}
        return completion_logps(self.base, prompts, completion_ids, **how)

    def loss_batch(self, advantages: np.ndarray, mask: np.ndarray, **logps: np.ndarray | None) -> LossBatch:
        weights = np.asarray(token_weights("dapo", mask, max_completion_length=self.job.length))
        return jax.tree.map(self.split, LossBatch(advantages, mask, weights, **logps))


class Trainer:
    """An adapter, its optimizer's state and the update that changes both."""

    def __init__(self, ours: Ours):
        job, model = ours.job, ours.model
        adamw = optax.adamw(common.LEARNING_RATE, b2=common.ADAM_BETA2, weight_decay=0.0)
        optimizer = optax.chain(optax.clip_by_global_norm(common.MAX_GRAD_NORM), adamw)
        self.params = ours.base.params
        self.learner = Learner(model, optimizer, LOSS, jnp.dtype(job.dtype), temperature=1.0, micro_batch=job.prompts)
        self.state = init_state(load_adapter(job.adapter, model.config, model.mesh), optimizer, model)

    @property
    def policy(self) -> Policy:
        return Policy(self.params, self.state.trainable)

    def update(self, prompts: PromptBatch, completion_ids: jax.Array, batch: LossBatch) -> dict[str, jax.Array]:
        self.state, metrics, _ = update(self.state, self.params, prompts, completion_ids, batch, learner=self.learner)
        return metrics


def prepare(job: Job) -> None:
    """Write the job's model and adapter, unless they exist, and its batch."""
    config = model_config(job)
    if not Path(job.model).exists():
        save_checkpoint(job.model, config, random_params(config))
        lora = init_lora(jax.random.key(4), config, LoraConfig(common.LORA_R, common.LORA_ALPHA))
        save_adapter(job.adapter, config, lora, job.model)
    batch = make_prompts(config, job)
    if job.part == "update":
        batch |= make_completions(config, job)
        ours = Ours(job)
        logps = ours.base_logps(ours.prompts(batch), ours.split(batch["completion_ids"]))
        rng = np.random.default_rng(5)
        for name, spread in (("old_logps", 0.3), ("ref_logps", 0.1)):
            batch[name] = np.asarray(logps) + spread * rng.standard_normal(logps.shape, np.float32)
    np.savez(job.batch, **batch)


def sampling(job: Job) -> None:
    ours, batch = Ours(job), common.load_batch(job)

    def call():
        completions = ours.sample(ours.base, ours.prompts(batch), jax.random.key(0), job.temperature)
        return jax.block_until_ready(completions)

    completions, times = common.measure(job, call)
    common.write_result(job, times, memory(job), tokens=completions.ids.reshape(-1, job.length).tolist())


def one_update(job: Job) -> None:
    """The images are encoded in every call, though in training the sampler's soft tokens are used again."""
    batch = common.load_batch(job)
    ours = Ours(job)
    trainer = Trainer(ours)
    completion_ids = ours.split(batch["completion_ids"])
    mask = np.ones(completion_ids.shape, bool)
    given = ours.loss_batch(batch["advantages"], mask, old_logps=batch["old_logps"], ref_logps=batch["ref_logps"])

    def call():
        return jax.device_get(trainer.update(ours.prompts(batch), completion_ids, given))

    metrics, times = common.measure(job, call)
    seen = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    common.write_result(job, times, memory(job), **seen)


def whole_steps(job: Job) -> None:
    """Sample, decode and reward, take the reference's log-probs, update."""
    batch = common.load_batch(job)
    ours = Ours(job)
    trainer = Trainer(ours)
    keys = iter(jax.random.split(jax.random.key(0), job.repeats + 1))

    def call():
        prompts = ours.prompts(batch)
        completions = ours.sample(trainer.policy, prompts, next(keys), temperature=1.0)
        ids, mask = jax.device_get((completions.ids, completions.mask))
        rewards = [[common.reward(common.words(row)) for row in of_prompt] for of_prompt in ids]
        advantages = np.asarray(group_advantages(np.array(rewards, np.float32)))
        reference = ours.base_logps(prompts, completions.ids)
        given = ours.loss_batch(advantages, mask, old_logps=None)._replace(ref_logps=reference)
        jax.device_get(trainer.update(prompts, completions.ids, given))
        return int(mask.sum())

    sampled, times = common.measure(job, call)
    common.write_result(job, times, memory(job), drawn=sampled)


def memory(job: Job) -> int | None:
    return None if job.device == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def main() -> None:
    job = common.read_job()
    parts = {"sampling": sampling, "update": one_update, "step": whole_steps}
    work = prepare if sys.argv[2:] == ["prepare"] else parts[job.part]
    work(job)


if __name__ == "__main__":
    main()
