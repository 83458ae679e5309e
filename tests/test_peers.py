"""The benchmark beside its peers runs, and what it times is the same work: toy sizes, prompts with an image."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_peers_sample_the_same_tokens_and_take_the_same_update(tmp_path):
    """transformers' generate and TRL's loss with PEFT, each in a process of its own, on weights written by ours.

    Prompts are longer than the sliding window, and there are two, so that PrefixGrouper's masks are put to the test.
    """
    out = tmp_path / "peers.json"
    options = ["--quick", "--repeats", "1", "--prompts", "2", "--group", "3", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.peers", "sampling-image-greedy", "update-image", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    results = json.loads(out.read_text())["results"]
    sampled, updated = results["sampling-image-greedy"], results["update-image"]
    assert sampled["transformers"]["tokens"] == sampled["ours"]["tokens"]
    assert len({token for row in sampled["ours"]["tokens"] for token in row}) > 5
    for system in ("trl", "trl, checkpointing", "prefix-grouper"):
        for name in ("loss", "grad_norm"):
            assert updated[system][name] == pytest.approx(updated["ours"][name], rel=1e-5, abs=1e-6), (system, name)
