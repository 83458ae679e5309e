"""Each recipe in configs/ is read, names a published model, and divides over the devices that it is for."""

from pathlib import Path

import pytest

from data import NAMES
from gemma3.files.published import CONFIGS
from gemma3.mesh import Model, make_mesh
from grpo.run.cli import parse
from grpo.run.devices import check_mesh, mesh_shape
from grpo.run.settings import Settings, check_batch, loss_config, resolve_defaults
from reward import make_reward_function

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_run(path):
    settings = resolve_defaults(parse(Settings, ["--config", str(path)], prog="train.py", description=""))
    mesh = make_mesh(*mesh_shape(settings.mesh))
    check_mesh(Model(CONFIGS[settings.model.removeprefix("google/")], mesh))
    assert check_batch(settings, mesh) >= 1 and settings.data in NAMES
    assert loss_config(settings).loss_type == settings.loss_type
    make_reward_function(settings.reward, settings.format, max_tokens=settings.max_completion_length)
    command = f"python train.py --config configs/{path.name}"
    assert command in path.read_text().splitlines()[0]
    assert path.name in (path.parents[1] / "README.md").read_text()


def test_there_are_recipes():
    assert len(RECIPES) == 3
