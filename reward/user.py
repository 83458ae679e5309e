"""A user's own reward: `--reward path/to/my.py:function`, as (completion, example) or with TRL's signature.

A reward is somebody else's code in the middle of a long run: whatever it does, at worst completions lose their
rewards, and the run goes on. NaN is a lost reward; the algorithm gives such a completion an advantage of 0.

Each call runs in its own daemon thread with a time limit. Python cannot stop a thread: a call that runs over its
time is abandoned. It goes on in the background, and takes processor time and any lock it holds until it returns. Later
calls get threads of their own and never wait for it.
"""

import importlib.util
import inspect
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isfinite, nan
from pathlib import Path
from typing import Any

from data.example import Example

TIME_LIMIT = 10.0
# After this many calls in a row that run over time, the function is not called for the rest of the batch. So one that
# always hangs costs a step this many time limits, not one for each completion.
MAX_TIMEOUTS = 3

Row = tuple[str, Example, str]  # completion, example, prompt


class UserRewardError(Exception):
    """A user's function gave no reward; the message says why."""


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = nan
    if not isfinite(number):
        raise UserRewardError(f"returned {repr(value)[:100]}, which is not a finite number")
    return number


def _call(function: Callable[[], Any], time_limit: float) -> Any:
    """`function()` in a thread of its own.

    Raises TimeoutError after `time_limit` seconds and UserRewardError for whatever the function raises, even
    SystemExit and KeyboardInterrupt.
    """
    outcome = queue.SimpleQueue()

    def run():
        try:
            outcome.put((function(), None))
        except UserRewardError as error:
            outcome.put((None, str(error)))
        except BaseException as error:
            outcome.put((None, "raised " + traceback.format_exception_only(error)[-1].strip()))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, failure = outcome.get(timeout=time_limit)
    except queue.Empty:
        raise TimeoutError(f"ran for more than {time_limit:g} s") from None
    if failure is not None:
        raise UserRewardError(failure[:300])
    return value


@dataclass(frozen=True)
class UserReward:
    """A loaded function.

    `parameters` are the names it takes by keyword, or None for all (`**columns`); `batched` is True if it takes TRL's
    lists instead of one completion. A call may take `time_limit` seconds.
    """

    name: str
    function: Callable
    parameters: frozenset[str] | None
    batched: bool
    time_limit: float = TIME_LIMIT

    def __call__(
        self, completions: Sequence[str], examples: Sequence[Example], prompts: Sequence[str] | None = None
    ) -> list[float]:
        """One reward for each completion; NaN where the function raised, gave no finite number or ran over time.

        Each NaN comes with a RuntimeWarning that names the function and the example. With TRL's signature the batch is
        one call; if it raises, it is repeated for one completion at a time, to find the one that fails. `prompts` are
        for TRL's signature; they default to the questions.
        """
        prompts = [example.question for example in examples] if prompts is None else prompts
        rows = list(zip(completions, examples, prompts, strict=True))
        if not self.batched or len(rows) < 2:
            return self._reward_one_by_one(rows)
        try:
            values = _call(lambda: self._reward(rows), self.time_limit)
        except TimeoutError as error:
            values = [error] * len(rows)
        except UserRewardError:
            return self._reward_one_by_one(rows)
        return [
            self._lose(example, value) if isinstance(value, Exception) else value
            for example, value in zip(examples, values, strict=True)
        ]

    def _reward(self, rows: Sequence[Row]) -> list[float | UserRewardError]:
        """For each row its reward or its error; raises if a call as a whole failed."""
        if self.batched:
            values = list(self.function(**self._columns(rows)))
        else:
            values = [self.function(completion=completion, example=example) for completion, example, _ in rows]
        if len(values) != len(rows):
            raise UserRewardError(f"returned {len(values)} rewards for {len(rows)} completions")
        results = []
        for value in values:
            try:
                results.append(_finite(value))
            except UserRewardError as error:
                results.append(error)
        return results

    def _reward_one_by_one(self, rows: Sequence[Row]) -> list[float]:
        values, timeouts = [], 0
        for row in rows:
            try:
                if timeouts == MAX_TIMEOUTS:
                    raise TimeoutError(f"was not called, since {MAX_TIMEOUTS} calls in a row ran over time")
                value = _call(lambda row=row: self._reward([row])[0], self.time_limit)
                if isinstance(value, UserRewardError):
                    raise value
                values.append(value)
                timeouts = 0
            except (UserRewardError, TimeoutError) as error:
                values.append(self._lose(row[1], error))
                timeouts = min(timeouts + 1, MAX_TIMEOUTS) if isinstance(error, TimeoutError) else 0
        return values

    def _columns(self, rows: Sequence[Row]) -> dict[str, list]:
        """TRL's keyword arguments, lists as long as the batch: a column for each field and metadata key of examples."""
        completions, examples, prompts = map(list, zip(*rows, strict=True))
        metadata = dict.fromkeys(key for example in examples for key in example.metadata)
        columns = {key: [example.metadata.get(key) for example in examples] for key in metadata}
        columns |= {field.name: [getattr(example, field.name) for example in examples] for field in fields(Example)}
        columns |= {"completions": completions, "prompts": prompts}
        if self.parameters is None:
            return columns
        return {key: column for key, column in columns.items() if key in self.parameters}

    def _lose(self, example: Example, error: Exception) -> float:
        message = f"the reward {self.name} {error} on example {example.id!r}: this completion gets no reward"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return nan


def load_user_reward(spec: str, time_limit: float = TIME_LIMIT) -> UserReward:
    """The function that "path/to/my.py:function" names; its signature is recognised by the names of its parameters.

    With `completion` and `example` (`data.example.Example`) it returns one float for one completion. With `completions`
    (and `prompts`, other columns or `**columns`) it has TRL's signature: it takes lists and returns a list of floats.
    Completions are always strings, never in TRL's conversational form. ValueError for anything else.
    """
    path, _, name = spec.rpartition(":")
    function = getattr(_import(Path(path)), name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}: give --reward path/to/my.py:function")
    parameters = inspect.signature(function).parameters
    batched = "completions" in parameters
    if not batched and set(parameters) != {"completion", "example"}:
        raise ValueError(
            f"{spec} takes ({', '.join(parameters)}): a reward takes (completion, example) "
            "or, as in TRL, (prompts, completions, **columns)"
        )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return UserReward(name, function, None if takes_all else frozenset(parameters), batched, time_limit)


def _import(path: Path):
    """Import a file as a module with a name of its own; ValueError if there is no file or its import fails."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give --reward path/to/my.py:function")
    name = f"user_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"importing {path} failed with {type(error).__name__}: {error}") from error
    return module
