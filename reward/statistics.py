"""How sure an accuracy is, and accuracies over several samples per problem. Plain Python on counts."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, sqrt

Z_95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion, as fractions (low, high).

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = correct / n,   n = total

    E. B. Wilson, JASA 22 (1927), 209-212. Unlike p +- z sqrt(p(1-p)/n) it stays within [0, 1] and is wider than 0 at
    p = 0 and p = 1. `correct` may be a sum of fractions, such as pass@k over problems; the interval is then on the safe
    side. Raises ValueError unless 0 <= correct <= total and total > 0.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} is no proportion; give 0 <= correct <= total with total above 0")
    p, z2 = correct / total, Z_95**2
    centre = p + z2 / (2 * total)
    half = Z_95 * sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, (centre - half) / (1 + z2 / total)), min(1.0, (centre + half) / (1 + z2 / total))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k samples is right), from `correct` of `samples` right ones.

        1 - C(n - c, k) / C(n, k),   n = samples,   c = correct

    Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1. Raises ValueError
    unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} of {correct} right in {samples} samples is undefined; take at least k samples")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def maj_at_k(answers: Sequence[Hashable | None], verdicts: Sequence[bool]) -> float:
    """Whether the most frequent of k answers is right: 1 or 0, or the fraction of right ones where several tie.

    `answers` are normalised values, one per sample; None means that there is no answer, and no vote. Equal answers must
    have equal `verdicts`. The fraction is the expectation of breaking the tie at random. 0 without any vote.
    """
    right = {answer: verdict for answer, verdict in zip(answers, verdicts, strict=True) if answer is not None}
    votes = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(right[answer] for answer in winners) / len(winners) if winners else 0.0
