"""Training: one loop (`loop.Trainer`), one recipe per model."""

from __future__ import annotations

import importlib
import os
from typing import Any

from .config import TrainConfig, load_config

#: Recipe -> (module, class).
RECIPES = {
    "pancrafter": ("pancrafter", "PANCrafterRecipe"),
    "prior": ("uknow", "PriorRecipe"),
    "teacher": ("uknow", "TeacherRecipe"),
    "student": ("uknow", "StudentRecipe"),
}

__all__ = ["RECIPES", "TrainConfig", "load_config", "recipe_class", "train"]


def recipe_class(name: str) -> Any:
    """The recipe of that name (`loop.Recipe`).

    Raises:
        ValueError: no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    module, attribute = RECIPES[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)


def train(
    name: str,
    config: str | os.PathLike[str] | TrainConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    **overrides: Any,
) -> dict[str, float]:
    """Train a model by recipe `name`.

    Args:
        name: one of `RECIPES`.
        config: YAML file or a configuration of the recipe's class.
        resume: continue the run in the configuration's folder `out`, if there is one.
        progress: show a progress bar.
        overrides: keys over those of a file.

    Returns:
        psnr, sam and ergas of the last validation.

    Raises:
        ValueError: a key, file or combination that cannot be; see the message.
    """
    from .loop import Trainer

    recipe = recipe_class(name)
    if not isinstance(config, TrainConfig):
        settings: TrainConfig = load_config(recipe.config_class, config, **overrides)
    elif overrides:
        raise ValueError(f"overrides: expected none beside a ready configuration, got {', '.join(overrides)}")
    else:
        settings = config
    return Trainer(recipe(settings), settings, progress=progress).run(resume)
