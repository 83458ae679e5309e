"""The lines of samples.jsonl: what a step asked, what was answered, and what each answer was worth."""

import jax.numpy as jnp
import numpy as np

from grpo.algorithm import clipped, importance_ratio
from grpo.run.processes import held_rows, rows_on_host
from grpo.step import StepResult
from grpo.trainer import Trainer

# samples.jsonl holds every token, and the images, of so many prompts of a step.
SHOWN_PROMPTS = 2


def told_tokens(trainer: Trainer, result: StepResult) -> dict[int, list[dict]]:
    """The tokens of each completion, for the first prompts that this process holds: each token's piece of text, its
    log-prob by the sampler, its ratio in the last update, and whether it was clipped.
    """
    groups, batch, loss = result.groups, result.batch, trainer.learner.loss
    old = result.logps if batch.old_logps is None else batch.old_logps
    ids, mask, sampler_logps, _ = groups.completions
    arrays = [rows_on_host(x) for x in (ids, mask, sampler_logps, result.logps, old)]
    tokens = {}
    here = [q for q in held_rows(len(groups.rows), trainer.reader.model.mesh) if groups.rows[q].prompt is not None]
    for q in here[:SHOWN_PROMPTS]:
        ids, mask, sampler_logps, new, old = (array[q] for array in arrays)
        ratio = importance_ratio(new, old, mask, level=loss.ratio_level)
        ratio = jnp.broadcast_to(ratio, mask.shape)
        low, high = clipped(ratio, result.advantages[q][:, None], loss)
        ratio, beyond = np.asarray(ratio), np.asarray(low | high)
        tokens[q] = [
            {
                "tokens": trainer.reader.tokenizer.pieces(ids[g][m]),
                "logps": sampler_logps[g][m],
                "ratios": ratio[g][m],
                "clipped": beyond[g][m],
            }
            for g, m in enumerate(mask)
        ]
    return tokens


def told(trainer: Trainer, result: StepResult) -> list[dict]:
    """Each prompt of a step with its completions, their rewards by part and their advantages. The first prompts also
    have tokens and images, uint8[h, w, 3].
    """
    groups, advantages, tokens = result.groups, np.asarray(result.advantages), told_tokens(trainer, result)
    lines = []
    for q, row in enumerate(groups.rows):
        completions = [
            {
                "text": text,
                "reward": groups.rewards[q, g],
                "rewards": {name: values[q, g] for name, values in groups.parts.items()},
                "correct": groups.correct[q, g],
                "advantage": advantages[q, g],
                "finished": groups.finished[q, g],
            }
            for g, text in enumerate(groups.texts[q])
        ]
        line = {"id": row.example.id, "prompt": trainer.reader.render(row.example), "answer": row.example.answer}
        if q in tokens:
            line["images"] = row.prompt.images
            completions = [whole | parts for whole, parts in zip(completions, tokens[q], strict=True)]
        lines.append(line | {"completions": completions})
    return lines
