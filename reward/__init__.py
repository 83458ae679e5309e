"""Rewards: text in, numbers out. Small named parts, weighted and summed for a batch of completions.

A part is a plain function of (completion, example, format) in the file of its kind; `answer.py` decides what is
right. `make_reward_function("answer=2,format=1")` turns what `--reward` names into one object that rewards a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from data.example import Example, tag_names
from reward.answer import answer_reward
from reward.format import format_reward, graded_format_reward
from reward.rubric import correctness_reward, rubric_reward
from reward.style import length_reward, overlong_reward, quality_reward, reasoning_reward, self_correction_reward
from reward.user import TIME_LIMIT, UserReward, load_user_reward

PARTS: dict[str, Callable[[str, Example, str], float]] = {
    "format": format_reward,
    "graded_format": graded_format_reward,
    "answer": answer_reward,
    "correctness": correctness_reward,
    "reasoning": reasoning_reward,
    "self_correction": self_correction_reward,
    "length": length_reward,
    "quality": quality_reward,
    "rubric": rubric_reward,
}
# The one part that counts tokens instead of reading text.
OVERLONG = "overlong"

# Known recipes. `mathvista` is that of the public vision GRPO notebooks; the exact reading of the answer is ours.
PRESETS: dict[str, dict[str, float]] = {
    "mathvista": {"graded_format": 1.0, "answer": 2.0},
    "weighted": {"format": 0.25, "reasoning": 0.30, "answer": 0.45, "self_correction": 0.05, "length": 0.05},
    "quality": {"format": 0.2, "correctness": 0.6, "quality": 0.2},
    "rubric": {"rubric": 1.0},
}


def parse_weights(spec: str) -> dict[str, float]:
    """The weight of each part that "answer=2,format=1", "mathvista" or "my.py:function=2,length" names.

    A name without "=" has weight 1; a preset stands for its parts, each times the given weight; the weights of a part
    that is named twice are added. ValueError for a name that is not a part, a preset or path/to/my.py:function, and
    for a weight that is not a finite number.
    """
    weights = {}
    for item in spec.split(","):
        name, equals, weight = item.strip().partition("=")
        if name not in PARTS and name not in PRESETS and name != OVERLONG and ".py:" not in name:
            known = ", ".join([*PARTS, OVERLONG, *PRESETS])
            raise ValueError(f"reward {name!r} is unknown: name some of {known}, or path/to/my.py:function")
        factor = _parse_weight(name, weight) if equals else 1.0
        for part, share in PRESETS.get(name, {name: 1.0}).items():
            weights[part] = weights.get(part, 0.0) + factor * share
    return weights


def _parse_weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not isfinite(weight):
        raise ValueError(f"the weight of reward {name} is {text!r}: give a number, as in {name}=1")
    return weight


@dataclass(frozen=True)
class Rewards:
    """The rewards of a batch of N completions. NaN: the completion could not be rewarded, and it teaches nothing."""

    total: list[float]  # N weighted sums
    parts: dict[str, list[float]]  # N unweighted values for each part's name


@dataclass(frozen=True)
class RewardFunction:
    """Rewards batches; made by `make_reward_function`. Called from one thread at a time."""

    reward_weights: Mapping[str, float]
    users: Mapping[str, UserReward]
    format: str
    max_tokens: int | None

    def __call__(
        self,
        completions: Sequence[str],
        examples: Sequence[Example],
        num_tokens: Sequence[int] | None = None,
        finished: Sequence[bool] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Rewards:
        """The rewards of N completions, one example for each.

        `num_tokens` [N] and `finished` [N] (the completion ended by itself, not at the limit) are read by
        `overlong` alone, `prompts` [N] by a user's function with TRL's signature. A total is NaN where a part with a
        weight is NaN; a part of weight 0 is reported and not summed.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions came with {len(examples)} examples: give one for each")
        parts = {}
        for name in self.reward_weights:
            if name == OVERLONG:
                parts[name] = self._overlong(len(completions), num_tokens, finished)
            elif name in self.users:
                parts[name] = self.users[name](completions, examples, prompts)
            else:
                rows = zip(completions, examples, strict=True)
                parts[name] = [PARTS[name](completion, example, self.format) for completion, example in rows]
        terms = [[weight * value for value in parts[name]] for name, weight in self.reward_weights.items() if weight]
        total = [float(sum(row)) for row in zip(*terms, strict=True)] if terms else [0.0] * len(completions)
        return Rewards(total, parts)

    def _overlong(self, n: int, num_tokens: Sequence[int] | None, finished: Sequence[bool] | None) -> list[float]:
        if num_tokens is None or finished is None:
            raise ValueError("the overlong reward counts tokens: give num_tokens and finished for each completion")
        if not len(num_tokens) == len(finished) == n:
            raise ValueError(f"{n} completions came with {len(num_tokens)} token counts and {len(finished)} flags")
        return [overlong_reward(*row, self.max_tokens) for row in zip(num_tokens, finished, strict=True)]


def make_reward_function(
    spec: str, format: str = "answer", max_tokens: int | None = None, time_limit: float = TIME_LIMIT
) -> RewardFunction:
    """The reward function that `spec`, the value of `--reward`, describes (see `parse_weights`).

    `format` is one of `data.example.FORMATS`. `max_tokens` is the longest completion that the run samples; `overlong`
    needs it. A user's function is loaded here, a call of it may take `time_limit` seconds, and its part has the
    function's name. ValueError for an argument that cannot be used.
    """
    tag_names(format)  # refuses an unknown format
    weights, users = {}, {}
    for name, weight in parse_weights(spec).items():
        if ".py:" in name:
            user = load_user_reward(name, time_limit)
            name, users[user.name] = user.name, user
        if name in weights or (name in users and name in (*PARTS, OVERLONG)):
            raise ValueError(f"two rewards are called {name!r}: rename the function in your file")
        weights[name] = weight
    if OVERLONG in weights and max_tokens is None:
        raise ValueError("the overlong reward needs max_tokens, the longest completion in tokens")
    return RewardFunction(weights, users, format, max_tokens)
