"""This project's part of `peers.py`, and the weights, adapters and batches that every system gets."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer_job as common
from benchmarks.peer_job import Job
from gemma3.config import CONFIGS, Config, VisionConfig
from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import make_mesh
from gemma3.model import Params, init_params
from gemma3.sample import Prompts, Sampling, encode, sample
from grpo.algorithm import LossBatch, LossConfig, group_advantages, token_weights
from grpo.rollout import split_over_data
from grpo.update import init_optimizer, make_optimizer, score, update

LOSS = LossConfig(epsilon=common.EPSILON, beta=common.BETA, use_bias_correction_kl=False)


def model_config(job: Job) -> Config:
    """The 270m shape with fewer words, and where asked SigLIP's width in two layers: 448 pixels, 256 soft tokens."""
    config = replace(CONFIGS["gemma-3-270m"], vocab_size=job.vocab_size)
    vision = VisionConfig(num_layers=2, image_size=448)
    if job.quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32}
        config = replace(config, **sizes, num_layers=6, layer_types=config.layer_types[:6], sliding_window=16)
        vision = VisionConfig(64, 128, 2, 4, image_size=112, tokens_per_image=16)
    if not job.pictures:
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
    """Random weights, norms and biases too: one that does nothing would hide a difference.

    Embeddings are small beside what the blocks add, or greedy decoding would repeat one token; the final norm makes up
    for it. Those of special ids are zero but <bos>'s, so that greedy decoding never draws one.
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
    """Random words after <bos>, and where the model sees a random picture before them."""
    rng = np.random.default_rng(2)
    ids = rng.integers(len(common.SPECIAL), config.vocab_size, (job.prompts, job.prompt_length)).astype(np.int32)
    ids[:, 0] = common.BOS
    if config.vision is None:
        return {"prompt_ids": ids}
    tokens, size = config.vision.tokens_per_image, config.vision.image_size
    ids[:, 1], ids[:, 2 : 2 + tokens], ids[:, 2 + tokens] = common.START_OF_IMAGE, common.IMAGE, common.END_OF_IMAGE
    return {"prompt_ids": ids, "pixels": rng.integers(0, 256, (job.prompts, size, size, 3), dtype=np.uint8)}


def make_completions(config: Config, job: Job) -> dict[str, np.ndarray]:
    """Completions as if drawn by an older policy; its log-probs and the reference's are added by `prepare`."""
    rng, rows = np.random.default_rng(3), (job.prompts, job.group)
    return {
        "completion_ids": rng.integers(len(common.SPECIAL), config.vocab_size, (*rows, job.length)).astype(np.int32),
        "advantages": np.asarray(group_advantages(rng.standard_normal(rows, np.float32))),
    }


class Model:
    """A model on one device with its settings, as the functions of the project take them."""

    def __init__(self, job: Job):
        self.mesh, self.job = make_mesh(1, 1), job
        self.config, self.params = load_checkpoint(job.model, dtype=jnp.dtype(job.dtype), mesh=self.mesh)
        self.config = replace(self.config, stop_ids=(-1,))  # no id: every completion runs to its full length
        self.allowed = jnp.ones(self.config.vocab_size, bool).at[jnp.arange(len(common.SPECIAL))].set(False)

    def prompts(self, batch: dict[str, np.ndarray]) -> Prompts:
        ids = split_over_data(batch["prompt_ids"], self.mesh)
        index = split_over_data(np.arange(len(ids), dtype=np.int32), self.mesh)
        if self.config.vision is None:
            return Prompts(ids, None, index)
        pixels = split_over_data(batch["pixels"][:, None], self.mesh)
        return Prompts(ids, encode(self.params, pixels, config=self.config, mesh=self.mesh), index)

    def sample(self, lora, prompts: Prompts, key: jax.Array, temperature: float):
        return sample(
            self.params,
            lora,
            prompts,
            key,
            self.allowed,
            config=self.config,
            mesh=self.mesh,
            num_generations=self.job.group,
            max_completion_length=self.job.length,
            sampling=Sampling(temperature),
        )

    def score(self, lora, prompts: Prompts, completion_ids) -> jax.Array:
        compute = {"config": self.config, "mesh": self.mesh, "temperature": 1.0, "micro_batch": len(prompts.ids)}
        return score(self.params, lora, prompts, completion_ids, **compute).logps


class Trainer:
    """An adapter, its optimizer's state and the step that changes both."""

    def __init__(self, model: Model):
        self.model, config, mesh = model, model.config, model.mesh
        self.lora = load_adapter(model.job.adapter, config, mesh)
        rate = lambda count: common.LEARNING_RATE  # noqa: E731
        clip = common.MAX_GRAD_NORM
        self.optimizer = make_optimizer(rate, weight_decay=0.0, adam_beta2=common.ADAM_BETA2, max_grad_norm=clip)
        self.state = init_optimizer(self.optimizer, self.lora, config, mesh)

    def update(self, prompts: Prompts, completion_ids, batch: LossBatch) -> dict[str, jax.Array]:
        self.lora, self.state, metrics, *_ = update(
            self.lora,
            self.state,
            self.model.params,
            prompts,
            completion_ids,
            batch,
            optimizer=self.optimizer,
            config=self.model.config,
            mesh=self.model.mesh,
            dtype=jnp.dtype(self.model.job.dtype),
            loss=LOSS,
            temperature=1.0,
            micro_batch=len(prompts.ids),
        )
        return metrics


def loss_batch(mesh, advantages, mask, length: int, **logps) -> LossBatch:
    weights = token_weights("dapo", mask, max_completion_length=length)
    return jax.tree.map(partial(split_over_data, mesh=mesh), LossBatch(advantages, mask, np.asarray(weights), **logps))


def prepare(job: Job) -> None:
    """Write the job's model and adapter, where they are not there yet, and its batch."""
    config = model_config(job)
    if not Path(job.model).exists():
        save_checkpoint(job.model, config, random_params(config))
        lora = init_lora(jax.random.key(4), config, LoraConfig(common.LORA_R, common.LORA_ALPHA))
        save_adapter(job.adapter, config, lora, job.model)
    batch = make_prompts(config, job)
    if job.part == "update":
        batch |= make_completions(config, job)
        model = Model(job)
        logps = model.score(None, model.prompts(batch), split_over_data(batch["completion_ids"], model.mesh))
        rng = np.random.default_rng(5)
        for name, spread in (("old_logps", 0.3), ("ref_logps", 0.1)):
            batch[name] = np.asarray(logps) + spread * rng.standard_normal(logps.shape, np.float32)
    np.savez(job.batch, **batch)


def sampling(job: Job) -> None:
    model, batch = Model(job), common.load_batch(job)

    def call():
        samples = model.sample(None, model.prompts(batch), jax.random.key(0), temperature=0.0)
        return jax.block_until_ready(samples)

    samples, times = common.measure(job, call)
    common.write_result(job, times, memory(job), tokens=samples.completion_ids[:, 0].tolist())


def one_update(job: Job) -> None:
    """The pictures are encoded in every call, though in training the sampler's soft tokens are used again."""
    batch = common.load_batch(job)
    model = Model(job)
    trainer = Trainer(model)
    completion_ids = split_over_data(batch["completion_ids"], model.mesh)
    mask = np.ones(completion_ids.shape, bool)
    logps = {name: batch[name] for name in ("old_logps", "ref_logps")}
    given = loss_batch(model.mesh, batch["advantages"], mask, job.length, **logps)

    def call():
        return jax.device_get(trainer.update(model.prompts(batch), completion_ids, given))

    metrics, times = common.measure(job, call)
    seen = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    common.write_result(job, times, memory(job), **seen)


def whole_steps(job: Job) -> None:
    """Draw, decode and reward, score by the reference, update."""
    batch = common.load_batch(job)
    model = Model(job)
    trainer = Trainer(model)
    keys = iter(jax.random.split(jax.random.key(0), job.repeats + 1))

    def call():
        prompts = model.prompts(batch)
        samples = model.sample(trainer.lora, prompts, next(keys), temperature=1.0)
        ids, mask = jax.device_get((samples.completion_ids, samples.completion_mask))
        rewards = [[common.reward(common.words(row)) for row in of_prompt] for of_prompt in ids]
        advantages = np.asarray(group_advantages(np.array(rewards, np.float32)))
        reference = model.score(None, prompts, samples.completion_ids)
        given = loss_batch(model.mesh, advantages, mask, job.length, old_logps=None)._replace(ref_logps=reference)
        jax.device_get(trainer.update(prompts, samples.completion_ids, given))
        return int(mask.sum())

    drawn, times = common.measure(job, call)
    common.write_result(job, times, memory(job), drawn=drawn)


def memory(job: Job) -> int | None:
    return None if job.device == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def main() -> None:
    job = common.read_job()
    parts = {"sampling": sampling, "update": one_update, "step": whole_steps}
    work = prepare if sys.argv[2:] == ["prepare"] else parts[job.part]
    work(job)


if __name__ == "__main__":
    main()
