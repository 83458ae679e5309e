"""What surrounds the steps of a training run: its progress, its log, its evaluations and its checkpoints."""

import itertools
import os
import shlex
import signal
import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from gemma3.filters import Sampling
from gemma3.params import param_shapes
from grpo.pages import report
from grpo.reader import Row, read_rows
from grpo.run import checkpoint
from grpo.run.describe import described
from grpo.run.log import RunLog, write_json
from grpo.run.memory import choose_gather, decoding_bytes, device_memory
from grpo.run.processes import is_first, on_any_process
from grpo.run.samples import told
from grpo.run.setup import Data, make_schedule
from grpo.run.trackers import tracker
from grpo.step import StepResult
from grpo.trainer import Trainer
from grpo.update import TrainState
from grpo.use.evaluate import evaluate, given_logps
from reward.report import preference_accuracy, spoken, summary


class Interrupt:
    """Ctrl-C or SIGTERM once: finish the step and save. Twice: stop at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, _) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True


def shuffled(size: int, seed: int, start: int) -> Iterator[int]:
    """An endless order of a dataset's examples, its first `start` skipped; the seed fixes each epoch's permutation."""
    for epoch in itertools.count(start // size):
        yield from np.random.default_rng([seed, epoch]).permutation(size)[start % size :].tolist()
        start = 0


class TrainingRun:
    """A run in progress, as a context manager.

    step: the number of steps done; cursor: the number of prompts they took from the stream; metrics: those of the
    newest step; before, after: held-out accuracy.
    """

    def __init__(self, trainer: Trainer, data: Data):
        self.trainer, self.settings, self.data = trainer, trainer.settings, data
        self.step, self.cursor, self.before, self.after = 0, 0, None, None
        self._sizes: set[int] = set()
        self._started, self._rate = time.perf_counter(), make_schedule(trainer.settings)

    def restored(self, state: TrainState) -> TrainState:
        """The state to begin with: the given one, or the saved one if a run is continued."""
        if not self.settings.resume:
            return state
        model, step = self.trainer.reader.model, self.settings.resume_step
        state, extra, self.step = checkpoint.restore(self.settings.out, state, model=model, step=step)
        self.cursor, self.before = extra["cursor"], extra["before"]
        return state

    def __enter__(self) -> "TrainingRun":
        out, about = self.settings.out, described(self.settings)
        out.mkdir(parents=True, exist_ok=True)
        self._interrupt = Interrupt()
        track = tracker(self.settings.log if is_first() else None, out, about["settings"])
        resumed = self.step if self.settings.resume else None
        self._log = RunLog(out, self.settings.steps, resume_step=resumed, track=track)
        self._log.__enter__()
        write_json(out / "config.json", about)
        return self

    def __exit__(self, *error) -> None:
        self._log.__exit__(*error)

    @property
    def is_complete(self) -> bool:
        return self.step >= self.settings.steps

    def goes_on(self) -> bool:
        """Whether there is another step: not after the last one, and not if someone asked to stop."""
        return not self.is_complete and not on_any_process(self._interrupt.requested)

    def accuracy(self, state: TrainState) -> dict:
        """Greedy accuracy on held-out examples; if all bring completions, how often the policy prefers the better."""
        policy, reader, s = self.trainer.policy(state.trainable), self.trainer.reader, self.settings
        if self.data.asked:
            greedy = Sampling(temperature=0.0, max_completion_length=s.max_completion_length)
            how = {"sampling": greedy, "batch_size": s.eval_batch, "watch": self._log.evaluating}
            return summary(evaluate(policy, self.data.asked, reader, **how))
        logps = given_logps(policy, self.data.given, reader, s.max_completion_length, s.eval_batch)
        return preference_accuracy(self.data.given, logps)

    def begin(self, state: TrainState) -> Iterator[Row]:
        """Measure the accuracy before training, and return the stream of prompts from where the run stands."""
        s, reader = self.settings, self.trainer.reader
        if self.before is None:
            self._log.say("evaluating on held-out examples; the first batch compiles")
            self.before = self.accuracy(state)
            self._log.say(spoken("held-out accuracy before", self.before))
        write_json(s.out / "summary.json", {"before": self.before})
        shapes = param_shapes(reader.model.config, self.trainer.learner.dtype)
        sizes = (s.prompts_per_step, reader.max_prompt_length, self.trainer.settings.sampling)
        self._log.say(choose_gather(decoding_bytes(shapes, reader.model, *sizes), device_memory())[1])
        order = shuffled(len(self.data.train), s.seed, self.cursor)
        return read_rows(self.data.train, order, reader, s.prompts_per_step, first_index=self.cursor)

    def _say_new_size(self, size: int) -> None:
        """Say to what size completions were cut, the first time they are cut to it; updates are compiled for each."""
        limit = self.settings.max_completion_length
        if size not in {limit, *self._sizes}:
            mean, longest = (self.metrics[f"completions/{name}_length"] for name in ("mean", "max"))
            found = f"completions: mean {mean:.0f}, longest {longest:.0f} of {limit}"
            self._log.say(f"{found}; updates run on {size} tokens of each and are compiled once a size")
        self._sizes.add(size)

    def advance(self, result: StepResult) -> TrainState:
        """Count a step, log its samples and return its state; a step whose update was not finite ends the run."""
        s, self.metrics = self.settings, dict(result.metrics)
        if result.groups is not None:
            self._say_new_size(result.groups.completions.ids.shape[2])
            self._log.samples(self.step + 1, told(self.trainer, result))
        if not self.metrics.pop("finite"):
            self.give_up(result.state, f"the loss, {self.metrics['loss']:g}, or its gradient is not finite")
        self.metrics["learning_rate"] = float(self._rate(self.step * s.num_iterations))
        if (peak := device_memory("peak_bytes_in_use")) is not None:
            self.metrics["memory/peak_gib"] = peak / 2**30
        self.step += 1
        self.cursor += self.metrics.get("prompts_drawn", s.prompts_per_step)
        return result.state

    @property
    def evaluation_is_due(self) -> bool:
        every = self.settings.eval_every
        return bool(every) and self.step % every == 0 and not self.is_complete

    def evaluate(self, state: TrainState) -> None:
        """Add held-out accuracy to the step's metrics."""
        found = self.accuracy(state)
        low, high = found["interval"]
        self.metrics |= {"eval/accuracy": found["accuracy"], "eval/accuracy_low": low, "eval/accuracy_high": high}

    def log(self) -> None:
        """Write the step's metrics, and show them."""
        self._log.metrics(self.step, self.metrics)
        self._log.progress(self.step, self.metrics)

    @property
    def save_is_due(self) -> bool:
        return self.step % self.settings.save_every == 0 or self.is_complete

    def save(self, state: TrainState) -> None:
        """Write a checkpoint and the report."""
        s, trainer = self.settings, self.trainer
        checkpoint.save(
            s.out,
            self.step,
            state,
            config=trainer.reader.model.config,
            frozen_vision=trainer.frozen.vision,
            base_model=s.model,
            extra={"cursor": self.cursor, "before": self.before},
            keep=s.keep,
            rslora=s.lora_rslora,
        )
        self.write_report()

    def write_report(self) -> None:
        if is_first():
            report.write(self.settings.out)

    def give_up(self, state: TrainState, reason: object) -> NoReturn:
        """End a run at a step whose numbers are not finite, and save the state before that step."""
        self.save(state)
        raise ValueError(
            f"step {self.step + 1}: {reason}; the update was not applied, and the state before it is saved in "
            f"{self.settings.out}: try a lower --learning-rate"
        )

    def end(self, state: TrainState) -> None:
        """Measure the accuracy after training, or save a run that was stopped."""
        if not self.is_complete:
            return self.save(state)
        self.after = self.accuracy(state)
        write_json(self.settings.out / "summary.json", {"before": self.before, "after": self.after})
        return self.write_report()

    def say_goodbye(self) -> None:
        """Print what came out of the run, and where it is."""
        s, out = self.settings, shlex.quote(str(self.settings.out))
        if self.after is None:
            print(f"stopped after step {self.step}; continue with: python train.py --resume {out}")
            return
        print(spoken("held-out accuracy before", self.before))
        print(spoken("held-out accuracy after ", self.after))
        trained = s.out / ("adapter" if s.lora_r else "model")
        print(f"{s.steps} steps in {(time.perf_counter() - self._started) / 60:.1f} minutes; the result is {trained}")
        print(f"look at it: {s.out / 'report.html'}")
        print(f"evaluate it with: python eval.py --ckpt {out}")
