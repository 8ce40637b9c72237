"""Run recipes: the stages of a training, each a `TrainingConfig`, from a file of the package or the caller's own.

A recipe is YAML: `embedder`, the settings of a new one, and `stages`, each with a `name`, its `share` of the tokens
and any other field of `TrainingConfig`. Every stage starts from the result of the one before.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from extemb_core.errors import ConfigError
from extemb_core.training.checkpoints import is_finished, is_saved
from extemb_core.training.config import TrainingConfig
from extemb_core.training.trainable import TrainableModel, holds_reader_alone
from extemb_core.training.trainer import full_disk_error, is_first_process, only_run_in, train
from extemb_core.utils.validation import path_of

logger = logging.getLogger(__name__)

_NOT_A_STAGES = ("llm", "data", "questions", "output", "cache", "eval_data", "embedder", "start_from", "total_tokens",
                 "max_minutes", "device")  # fmt: skip
_STAGE_FIELDS = sorted({field.name for field in fields(TrainingConfig)} - set(_NOT_A_STAGES))
_STAGE_NAME = re.compile(r"\w[\w. -]{,59}")
_MAX_SHARE = 1e12


@dataclass(frozen=True)
class Recipe:
    """Checked content of a recipe's file.

    Raises:
        ConfigError: The content is not a recipe's.
    """

    name: str
    embedder: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.embedder, Mapping):
            raise ConfigError(f"recipe {self.name}: embedder={self.embedder!r:.60} is no mapping of settings; fix it")
        for number, stage in enumerate(self.stages, start=1):
            where = f"recipe {self.name}, stage {number}"
            if not isinstance(stage, Mapping) or not stage.get("name") or not _is_share(stage.get("share")):
                raise ConfigError(f'{where} needs a "name" and a "share" of the tokens above 0, a number; add them')
            if not isinstance(stage["name"], str):
                raise ConfigError(
                    f"{where} has the name {stage['name']!r}, which YAML takes for no text; put it in quotes"
                )
            if not _STAGE_NAME.fullmatch(stage["name"]):  # it names a folder, which must be inside the output
                raise ConfigError(
                    f"{where} has the name {stage['name']!r:.60}; a name is up to 60 letters, digits, spaces, '.', '-' "
                    "and '_'"
                )
            if unknown := sorted(map(str, stage.keys() - {"name", "share", *_STAGE_FIELDS})):
                raise ConfigError(f"{where}: {unknown[0]!r} is not one of {', '.join(_STAGE_FIELDS)}; fix or remove it")


def recipe_names() -> list[str]:
    """List the names of the package's recipes."""
    files = resources.files("extemb_core").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe of the package by name, or a YAML file.

    Raises:
        ConfigError: There is no such recipe, or the file is not a recipe.
    """
    names, name = recipe_names(), os.fspath(name)
    if name in names:
        text = resources.files("extemb_core").joinpath(f"recipes/{name}.yaml").read_bytes()
    elif path_of(name).is_file():
        text = path_of(name).read_bytes()
    else:
        raise ConfigError(f"recipe={name!r} is neither a file nor one of {', '.join(names)}; pass one of them")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"recipe {name} is not YAML ({' '.join(str(error).split())}); fix it") from error
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list) or not values["stages"]:
        raise ConfigError(f'recipe {name} has no list of "stages"; see the recipes {", ".join(names)}')
    if unknown := sorted(map(str, values.keys() - {"embedder", "stages"})):
        raise ConfigError(f"recipe {name}: {unknown[0]!r} is neither embedder nor stages; fix or remove it")
    return Recipe(name, values.get("embedder") or {}, tuple(values["stages"]))


def stage_configs(
    recipe: Recipe, output: str | os.PathLike[str], total_tokens: int, **settings: Any
) -> list[TrainingConfig]:
    """Configure the run of every stage, each in a folder of its own under `output`.

    Args:
        recipe: The recipe.
        output: Folder of the whole training.
        total_tokens: Tokens of all stages together.
        **settings: Fields of `TrainingConfig` for every stage, which override the recipe's. `embedder` adds to the
            recipe's; `start_from` is for the first stage.
    """
    whole = sum(stage["share"] for stage in recipe.stages)
    embedder = {**recipe.embedder, **settings.pop("embedder", {})}
    start_from = settings.pop("start_from", None)
    has_embedder = start_from is not None and not holds_reader_alone(path_of(start_from))
    configs = []
    for number, stage in enumerate(recipe.stages, start=1):
        folder = path_of(output) / "stages" / f"{number}-{stage['name']}"
        of_stage = {key: _plain(value) for key, value in stage.items() if key not in ("name", "share")}
        configs.append(
            TrainingConfig(
                **(of_stage | settings),
                embedder={} if has_embedder else embedder,
                start_from=start_from,
                total_tokens=max(1, round(total_tokens * stage["share"] / whole)),
                output=str(folder),
                cache=str(path_of(output) / "data"),
            )
        )
        start_from = str(folder)
        has_embedder = has_embedder or configs[-1].trained != "reader"
    return configs


def train_recipe(
    recipe: Recipe, output: str | os.PathLike[str], total_tokens: int, *, resume: bool = True, **settings: Any
) -> TrainableModel | None:
    """Run a recipe's stages one after another and leave the result in `output`; finished stages are not run again.

    Args:
        recipe: The recipe.
        output: Folder of the whole training.
        total_tokens: Tokens of all stages together.
        resume: Go on where an earlier run stopped. Stages after one that is trained further begin anew.
        **settings: See `stage_configs`; `max_minutes` is for all stages together.

    Returns:
        Result of the last stage, or None if `max_minutes` ended it or an earlier one.

    Raises:
        ConfigError, TrainingError: See `trainer.train`.
    """
    configs = stage_configs(recipe, output, total_tokens, **settings)
    with only_run_in(path_of(output)):
        return _train_stages(configs, path_of(output), resume)


def _train_stages(configs: Sequence[TrainingConfig], output: Path, resume: bool) -> TrainableModel | None:
    start = time.monotonic()
    trained = None
    for number, config in enumerate(configs, start=1):
        if resume and config is not configs[-1] and is_saved(config):
            continue
        if config.max_minutes is not None:
            left = config.max_minutes - (time.monotonic() - start) / 60
            config = replace(config, max_minutes=max(left, 1e-6))  # at least one step, however little time is left
        # Results of later stages from an earlier state of this one are out of date.
        trained = train(config, resume=resume, outdated=[Path(later.output) for later in configs[number:]])
        if not is_finished(config):
            logger.warning("%s is not finished; a call that resumes goes on", config.output)
            return None
    if trained is not None and is_first_process():
        with full_disk_error():
            trained.save(output)
    return trained


def _is_share(share: Any) -> bool:
    return isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < _MAX_SHARE


def _plain(value: Any) -> Any:
    """Convert YAML's lists to tuples, as settings need."""
    return tuple(value) if isinstance(value, list) else value
