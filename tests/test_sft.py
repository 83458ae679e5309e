"""Supervised training on given solutions."""

import itertools

import numpy as np
from test_step import Q, begin, make_trainer, row, tokenizer

from grpo.sft import sft_step


def test_supervised_steps_lower_the_loss_of_the_solutions():
    trainer = make_trainer(objective="sft", learning_rate=1e-2)
    state, losses = begin(trainer), []
    rows = itertools.cycle([row(place, completions=(str(2 * place),)) for place in range(Q)])
    for step in range(5):
        state, metrics, *_ = sft_step(trainer, state, rows, step)
        losses.append(metrics["loss"])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    lengths = [len(tokenizer().encode(str(2 * place))) + 1 for place in range(Q)]
    assert metrics["completions/mean_length"] == np.mean(lengths) and metrics["finite"] == 1
