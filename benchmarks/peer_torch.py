"""The worker of `peers.py` for torch: transformers' generate, TRL's loss with PEFT, TRL's GRPOTrainer.

TRL's `_compute_loss` runs on a given batch as in the trainer, but with only the state that it reads.
"""

import tempfile
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
import trl.trainer.utils
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks import peer_job as common
from benchmarks.peer_job import Job

# TRL's best setting: on a GPU it computes no logits of the prompt's tokens, but on a CPU only if told that it is a GPU.
# The name is read in this one place of that module; the kernels have their own.
trl.trainer.utils._use_triton = lambda device: True


def load_model(job: Job) -> torch.nn.Module:
    kind = Gemma3ForConditionalGeneration if job.images else Gemma3ForCausalLM
    model = kind.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.generation_config.eos_token_id = None  # every completion runs to its full length
    return model.to(torch_device(job))


def load_adapted(job: Job, model: torch.nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True).train()


def torch_device(job: Job) -> str:
    return "cpu" if job.device == "cpu" else "cuda"


def wait(job: Job) -> None:
    if job.device == "gpu":
        torch.cuda.synchronize()


def memory(job: Job) -> int | None:
    return None if job.device == "cpu" else torch.cuda.max_memory_allocated()


def image_inputs(job: Job, batch: dict[str, np.ndarray], rows: torch.Tensor) -> dict:
    """Each row's own copy of its prompt's image, as TRL passes it to the model; rows: int64[Q * G, T]."""
    if not job.images:
        return {}
    pixels = torch.from_numpy(batch["pixels"]).to(rows.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    pixels = pixels.repeat_interleave(job.group, dim=0).to(getattr(torch, job.dtype))
    return {"pixel_values": pixels, "token_type_ids": (rows == common.IMAGE).long()}


def sampling(job: Job) -> None:
    """Each prompt is repeated G times, as TRL does."""
    model, batch = load_model(job).eval(), common.load_batch(job)
    prompts = torch.from_numpy(batch["prompt_ids"]).long().to(model.device).repeat_interleave(job.group, dim=0)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    inputs |= image_inputs(job, batch, prompts)
    how = {"do_sample": True, "temperature": job.temperature, "top_k": 0, "top_p": 1.0}  # nothing is filtered out
    if not job.temperature:
        how = {"do_sample": False}

    def call():
        with torch.no_grad():
            ids = model.generate(**inputs, **how, max_new_tokens=job.length, pad_token_id=common.PAD)
        wait(job)
        return ids[:, prompts.shape[1] :]

    ids, times = common.measure(job, call)
    common.write_result(job, times, memory(job), tokens=ids.tolist())


def bare_trainer(kind: type[GRPOTrainer], job: Job, model: PeftModel) -> GRPOTrainer:
    """A GRPOTrainer, or what derives from it, with just the state that `_compute_loss` reads."""
    trainer = object.__new__(kind)
    trainer.__dict__.update(
        accelerator=Accelerator(cpu=job.device == "cpu"),
        model=model,
        state=SimpleNamespace(global_step=0),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1, report_to=[]),
        beta=common.BETA,
        loss_type="dapo",
        importance_sampling_level="token",
        epsilon_low=common.EPSILON,
        epsilon_high=common.EPSILON,
        num_generations=job.group,
        max_completion_length=job.length,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )
    return trainer


def take_updates(job: Job, trainer: GRPOTrainer) -> None:
    """The trainer's loss, its gradient and torch's AdamW."""
    batch, model = common.load_batch(job), trainer.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (0.9, common.ADAM_BETA2)
    optimizer = torch.optim.AdamW(parameters, lr=common.LEARNING_RATE, betas=betas, weight_decay=0.0)

    def rows(name: str) -> torch.Tensor:
        return torch.from_numpy(batch[name]).flatten(0, 1).to(model.device)

    prompts = torch.from_numpy(batch["prompt_ids"]).long().to(model.device).repeat_interleave(job.group, dim=0)
    completions = rows("completion_ids").long()
    given = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": rows("advantages"),
        "num_items_in_batch": torch.tensor(completions.numel(), device=model.device),
        "old_per_token_logps": rows("old_logps"),
        "ref_per_token_logps": rows("ref_logps"),
    }
    if job.images:
        given |= image_inputs(job, batch, torch.cat([prompts, completions], dim=1))
        given["num_images"] = [1] * len(prompts)

    def call():
        loss = trainer._compute_loss(model, given)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, common.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    seen, times = common.measure(job, call)
    common.write_result(job, times, memory(job), **seen)


def one_update(job: Job) -> None:
    """TRL's own log-probs."""
    model = load_model(job)
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    take_updates(job, bare_trainer(GRPOTrainer, job, load_adapted(job, model)))


CHAT = (
    "<bos>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<boi>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "{% endif %}{% endfor %}"
)


def make_processor(job: Job):
    """A tokenizer for the text of `peer_job.words`; with images a processor that puts their soft tokens in."""
    names = [*common.SPECIAL, *map(str, range(len(common.SPECIAL), job.vocab_size))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in common.SPECIAL])
    roles = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=roles,
        padding_side="left",
    )
    if not job.images:
        return tokenizer
    config = Gemma3Config.from_pretrained(job.model)
    size = config.vision_config.image_size
    images = Gemma3ImageProcessor(size={"height": size, "width": size})
    return Gemma3Processor(images, tokenizer, chat_template=CHAT, image_seq_length=config.mm_tokens_per_image)


def examples(job: Job, batch: dict[str, np.ndarray]) -> list[dict]:
    """The prompts as TRL's data set holds them."""
    if not job.images:
        return [{"prompt": common.words(ids)} for ids in batch["prompt_ids"]]
    first = 1 + int(np.argmax(batch["prompt_ids"][0] == common.END_OF_IMAGE))
    return [
        {"prompt": [{"role": "user", "content": common.words(ids[first:])}], "image": Image.fromarray(image)}
        for ids, image in zip(batch["prompt_ids"], batch["pixels"], strict=True)
    ]


class Watch(TrainerCallback):
    """Notes when training began and when each step ended."""

    def __init__(self, job: Job):
        self.job, self.moments = job, []

    def note(self, *args, **kwargs) -> None:
        wait(self.job)
        self.moments.append(common.now())

    on_train_begin = on_step_end = note


def whole_steps(job: Job) -> None:
    """GRPOTrainer.train, with a reference, on the same prompts in every step."""
    batch, steps = common.load_batch(job), job.repeats + 1
    model, watch, lengths, seen = load_adapted(job, load_model(job)), Watch(job), [], []

    def reward(prompts, completions, completion_ids, **columns) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [common.reward(text) for text in texts]

    with tempfile.TemporaryDirectory() as directory:
        args = GRPOConfig(
            output_dir=directory,
            use_cpu=job.device == "cpu",
            bf16=False,  # the model's own dtype is the job's
            gradient_checkpointing=job.checkpointing,
            per_device_train_batch_size=job.prompts * job.group,
            num_generations=job.group,
            max_completion_length=job.length,
            generation_kwargs={"eos_token_id": None},
            temperature=1.0,
            top_k=0,
            beta=common.BETA,
            loss_type="dapo",
            use_bias_correction_kl=False,
            max_steps=steps,
            learning_rate=common.LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=common.ADAM_BETA2,
            max_grad_norm=common.MAX_GRAD_NORM,
            weight_decay=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        rows = examples(job, batch) * steps
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_processor(job),
            callbacks=[watch],
        )
        generate = trainer._generate_single_turn

        def watched(prompt_ids, *rest):
            seen.append(prompt_ids)
            return generate(prompt_ids, *rest)

        trainer._generate_single_turn = watched
        trainer.train()
    same = {tuple(ids) for ids in seen[0]} == {tuple(ids) for ids in batch["prompt_ids"].tolist()}
    times = common.times_between(job, watch.moments)
    common.write_result(job, times, memory(job), drawn=lengths[-1], same_prompts=same)


def main() -> None:
    job = common.read_job()
    {"sampling": sampling, "update": one_update, "step": whole_steps}[job.part](job)


if __name__ == "__main__":
    main()
