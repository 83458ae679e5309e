"""Send metrics to a tracker that people already use, beside the run's own files: --log tensorboard or --log wandb.

Neither package is a requirement. If the chosen one is not installed, the error says how to install it.
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

    # The directory's name is the run's id too, so that a resumed run continues its own curves.
    started = wandb.init(project="grpo-gemma3", id=run.name, dir=run, config=dict(config), resume="allow")
    return lambda step, metrics: started.log(_numbers(metrics), step=step)


def tracker(name: str | None, run: Path, config: Mapping) -> Track:
    """A function of (step, metrics) that sends finite values to the tracker `name`, or nothing if that is None.

    run: the run's directory, in which tensorboard writes its events; config: the settings shown beside the curves.
    ValueError if the package is not installed.
    """
    if name is None:
        return lambda step, metrics: None
    try:
        return {"tensorboard": _tensorboard, "wandb": _wandb}[name](run, config)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--log {name}: it is not installed ({error}); pip install {name}, or leave --log out"
        ) from error
