"""A run's settings as text: printed on the terminal, written to its config.json, and read back from there."""

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import jax

from grpo.run.cli import topics
from grpo.run.settings import Settings


def git_commit() -> str | None:
    """The commit of this code, or None without git or outside a git checkout."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() or None


def described(settings: Settings) -> dict:
    """The content of a run's config.json: the resolved flags, the command, and the software and devices used."""
    packages = ("jax", "jaxlib", "numpy", "optax", "sentencepiece", "pillow", "safetensors")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    return {
        "settings": flags,
        "command": " ".join(["python", *sys.argv]),
        "packages": {name: version(name) for name in packages},
        "git": git_commit(),
        "devices": f"{len(jax.devices())} {jax.devices()[0].device_kind}",
    }


def spelled_out(settings: Settings) -> str:
    """The resolved flags by topic, for the terminal."""
    by_topic: dict[str, list[str]] = {}
    for topic, entry in topics(type(settings)):
        value = getattr(settings, entry.name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        by_topic.setdefault(topic, []).append(f"{entry.name}={shown}")
    return "\n".join(
        textwrap.fill(f"{topic:<11}{'  '.join(values)}", width=110, subsequent_indent=" " * 11, break_on_hyphens=False)
        for topic, values in by_topic.items()
    )


def stored_settings(run: Path) -> Settings:
    """The settings that a run was started with, to continue it; ValueError where there is no such run."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run}: there is no run, since {path} does not exist")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
        typed = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        adapter = typed["adapter"] and Path(typed["adapter"])
        of_this_start = dict.fromkeys(("resume_step", "coordinator", "num_processes", "process_id"))
        return Settings(**typed | of_this_start | {"out": run, "adapter": adapter, "resume": run})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {run}: {path} is damaged or of another version ({error})") from error
