from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosearch.core.errors import UserError
from cosearch.paths import CONF
from cosearch.quality import Recipe


def test_a_recipe_survives_json():
    recipe = Recipe(steps=20, seed=7)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("path", sorted((CONF / "quality").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_in_conf_says_all_of_itself(path: Path):
    data = yaml.safe_load(path.read_text())
    assert Recipe.from_json(data).to_json() == data
    assert path.stem != "short" or Recipe.from_json(data) == Recipe()


@pytest.mark.parametrize("key", ["recovery_steps", "distillation", "recall_rows", "seed"])
def test_what_may_be_0_can_be(key: str):
    assert Recipe.from_json({key: 0}) == replace(Recipe(), **{key: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 20}, "quality: unknown key 'step'; did you mean 'steps'? Allowed: steps, "),
        ({"steps": 0}, "quality.steps: 0 is not a whole number of at least 1"),
        ({"steps": -10}, "quality.steps: -10 is not a whole number of at least 1"),
        ({"steps": 15}, "quality.steps: 15 is not a multiple of 10"),
        ({"steps": 20.0}, "quality.steps: 20.0"),
        ({"steps": True}, "quality.steps: True"),
        ({"steps": "20"}, "quality.steps: '20'"),
        ({"length": 200}, "quality.length: a recall row needs at least 256 bytes, not 200"),
        ({"recovery_steps": -10}, "quality.recovery_steps: -10 is not a whole number of at least 0"),
        ({"recovery_rate": 0}, "quality.recovery_rate: 0 is not a number above 0"),
        ({"recovery_rate": True}, "quality.recovery_rate: True is not a number above 0"),
        ({"distillation": 1.5}, "quality.distillation: 1.5 is not a number from 0 to 1"),
        ({"distillation": float("nan")}, "quality.distillation: nan is not a number from 0 to 1"),
        ({"distillation": "1"}, "quality.distillation: '1' is not a number from 0 to 1"),
        ({"matrix_rate": 0}, "quality.matrix_rate: 0"),
        ({"matrix_rate": float("nan")}, "quality.matrix_rate: nan"),
        ({"vector_rate": float("inf")}, "quality.vector_rate: inf"),
        ({"seed": -1}, "quality.seed: -1"),
        ({"recall_rows": None}, "quality.recall_rows: None"),
        ({"warmup_steps": 30}, "quality.warmup_steps: 30"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused_by_its_key(change: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Recipe.from_json({"steps": 20, **change})
    assert str(error.value).startswith(message)
