"""Metrics to the trackers people already use, beside the run's own files: --log tensorboard or --log wandb.

Neither package is a requirement; one that is asked for and not installed is refused with the line that installs it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

TRACKERS = ("tensorboard", "wandb")
Track = Callable[[int, Mapping[str, float]], None]


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _tensorboard(run: Path, config: Mapping) -> Track:
    from tensorboard.summary import DirectoryOutput, Writer

    writer = Writer(DirectoryOutput(str(run / "tensorboard")))

    def track(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _numbers(metrics).items():
            writer.add_scalar(name, np.float32(value), step)
        writer.flush()

    return track


def _wandb(run: Path, config: Mapping) -> Track:
    import wandb

    # The directory's name is the run's id too, so that a resumed run goes on in its own curves.
    started = wandb.init(project="grpo-gemma3", id=run.name, dir=run, config=dict(config), resume="allow")
    return lambda step, metrics: started.log(_numbers(metrics), step=step)


def tracker(name: str | None, run: Path, config: Mapping) -> Track:
    """A function of (step, metrics) that sends what is finite to the tracker of this name; None sends nothing.

    run: its directory, in which tensorboard writes its events; config: the settings shown beside the curves. ValueError
    where the package is not installed.
    """
    if name is None:
        return lambda step, metrics: None
    try:
        return {"tensorboard": _tensorboard, "wandb": _wandb}[name](run, config)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--log {name}: it is not installed ({error}); pip install {name}, or leave --log out"
        ) from error
