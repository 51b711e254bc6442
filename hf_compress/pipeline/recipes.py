"""Recipes: configurations as YAML or JSON files, some of them packaged.

A recipe is the dictionary that `QuantConfig.from_dict` takes: the key `method`, the method's fields, and optionally
the `version` of hf_compress that it was written for. Of methods that need data it may also hold `calibration`: where
the data is and how much of it to use, never the data itself.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from .. import _version
from ..core.config import Calibration, QuantConfig
from ..core.errors import CalibrationError, ConfigError, MethodError, first_line, nearest

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent.parent / "configs"
"""The packaged recipes."""

SUFFIXES = (".yaml", ".yml", ".json")
DATA_KEYS = ("path", *(field.name for field in fields(Calibration) if field.name not in ("data", "tokenizer")))
"""Keys of `calibration`."""
GENERATED = "generated"
"""Instead of a path: the model makes its own data."""
LARGEST = 1 << 20
"""Bytes of the largest file that is taken for a recipe."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_config(name_or_path: str | Path) -> QuantConfig:
    """The configuration in a recipe.

    Args:
        name_or_path: The name of a packaged recipe, such as `hqq-int4`, or a YAML or JSON file.

    Raises:
        ConfigError: There is no such recipe, or it is not valid; says the file, and the line in YAML.
    """
    recipe = _read(_find(name_or_path))
    values = recipe.values
    newer = _is_newer(recipe, values.pop("version", None))
    calibration = _calibration(recipe, values.pop("calibration", None))
    try:
        made: QuantConfig = QuantConfig.from_dict(values)
    except (ConfigError, MethodError) as error:
        ordered = {key: values[key] for key in sorted(values, key=lambda key: key != "method")}
        problem = str(error)
        place = recipe.place(_culprit(ordered, lambda part: _problem(part) == problem))
        if newer is not None:
            raise ConfigError(
                f"{place}: {error.message} This recipe was written for hf_compress {newer}; this is "
                f"{_version.__version__}.",
                "pip install --upgrade hf-compress",
            ) from None
        raise ConfigError(f"{place}: {error.message}", error.fix) from None
    if newer is not None:
        logger.warning(
            "%s was written for hf_compress %s, and this is %s: defaults may differ.",
            *(recipe.file, newer, _version.__version__),
        )
    if calibration is None:
        return made
    try:
        return type(made)(**made.fields.model_dump(exclude_unset=True), calibration=calibration)
    except CalibrationError as error:
        raise ConfigError(f"{recipe.place(('calibration',))}: {error.message}", error.fix) from None


@dataclass(frozen=True)
class _Recipe:
    """A file that was read.

    Attributes:
        file: Where it lies.
        values: What it holds.
        node: Its YAML tree, for line numbers; None for JSON.
    """

    file: Path
    values: dict[str, Any]
    node: yaml.Node | None

    def place(self, path: tuple[str | int, ...]) -> str:
        """The file, with the line of a key where it is known."""
        node, line = self.node, None
        for step in path:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == step), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line
        return str(self.file) if line is None else f"{self.file}, line {line + 1}"


def _calibration(recipe: _Recipe, given: object) -> Calibration | None:
    """What a recipe says of its data; a path is relative to the recipe.

    Raises:
        ConfigError: A key is unknown, a value impossible, or there is no such file.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(
            f"{recipe.place(('calibration',))}: a recipe holds no calibration data, only where it is.",
            "calibration: {path: texts.txt, rows: 128}",
        )
    if unknown := [key for key in given if key not in DATA_KEYS]:
        raise ConfigError(
            f"{recipe.place(('calibration', unknown[0]))}: Unknown key {unknown[0]!r}. "
            f"{nearest(str(unknown[0]), DATA_KEYS)}".rstrip(),
            f"known keys: {', '.join(DATA_KEYS)}",
        )
    settings = {key: value for key, value in given.items() if key != "path"}
    if isinstance(size := settings.get("image_size"), list):
        settings["image_size"] = tuple(size)
    data = _data_path(recipe, given["path"]) if "path" in given else None
    try:
        return Calibration(data, **settings)
    except CalibrationError as error:
        culprit = next((key for key in settings if error.message.startswith(key)), None)
        place = recipe.place(("calibration",) if culprit is None else ("calibration", culprit))
        raise ConfigError(f"{place}: {error.message}", error.fix) from None


def _data_path(recipe: _Recipe, given: object) -> str | Path:
    """The file that a recipe names, or the word for generated data."""
    if given == GENERATED:
        return GENERATED
    place = recipe.place(("calibration", "path"))
    if not isinstance(given, str):
        raise ConfigError(f"{place}: path={given!r} is not the name of a file.", "path: texts.txt")
    path = recipe.file.parent / given
    if not path.is_file():
        raise ConfigError(f"{place}: There is no file {path}.", "a path is relative to the recipe")
    return path


class _Loader(yaml.SafeLoader):
    """Plain data only, without anchors, and every key once."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases: a small file could grow without bound, or hold itself."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a recipe", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that stands twice: the second would silently win."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _find(given: object) -> Path:
    """The file of a packaged name, or a file as it was given."""
    if not isinstance(given, str | Path):
        raise ConfigError(
            f"A recipe is a name or a file, got {type(given).__name__}.", f"one of {', '.join(recipe_names())}"
        )
    if isinstance(given, str) and given in recipe_names():
        return FOLDER / f"{given}.yaml"
    path = Path(given)
    if path.suffix.lower() in SUFFIXES:
        return path
    if isinstance(given, Path) or len(path.parts) > 1:
        raise ConfigError(f"{str(given)!r} is not named like a recipe.", f"its name must end in {', '.join(SUFFIXES)}")
    raise ConfigError(
        f"There is no recipe {given!r}. {nearest(given, recipe_names())}".rstrip(),
        f"one of {', '.join(recipe_names())}, or a file whose name ends in {', '.join(SUFFIXES)}",
    )


def _read(file: Path) -> _Recipe:
    """Parse a file."""
    text = _text(file)
    try:
        if file.suffix.lower() == ".json":
            node, values = None, json.loads(text, object_pairs_hook=_once)
        else:
            node, values = _yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _unreadable(f"{file}{line}", f"{error.problem}") from None
    except json.JSONDecodeError as error:
        raise _unreadable(f"{file}, line {error.lineno}", error.msg) from None
    except RecursionError:
        raise _unreadable(str(file), "nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _unreadable(str(file), first_line(error)) from None
    if not isinstance(values, dict):
        what = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{file} holds {what} instead of names and values.", "write lines such as `method: rtn`")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{file} has the key {odd[0]!r}, which is no name.", "write lines such as `method: rtn`")
    return _Recipe(file, values, node)


def _text(file: Path) -> str:
    """What a file holds, if it can be a recipe."""
    try:
        about = file.stat()
        content = file.read_bytes() if stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST else None
    except FileNotFoundError:
        hint = nearest(file.stem, recipe_names())
        raise ConfigError(
            f"There is no file {file}. {hint}".rstrip(),
            f"check the path, or name a packaged recipe: {', '.join(recipe_names())}",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} can't be read: {first_line(error)}.", "check the path") from None
    if content is None:
        what = f"has {about.st_size:,} bytes" if stat.S_ISREG(about.st_mode) else "is not a file"
        raise ConfigError(f"{file} {what}; a recipe is a file of at most {LARGEST:,}.", "pass a recipe's file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text: {error.reason} at byte {error.start}.", "save it as UTF-8") from None


def _yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """The tree and the values of a YAML document."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all stand once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return made


def _unreadable(place: str, problem: str) -> ConfigError:
    """What a parser has to say."""
    return ConfigError(f"{place}: {problem}.", "write lines such as `method: rtn`, or JSON in a file named *.json")


def _is_newer(recipe: _Recipe, written_for: object) -> str | None:
    """The version that a recipe was written for, if it is newer than this one."""
    if written_for is None:
        return None
    try:
        return str(written_for) if Version(str(written_for)) > Version(_version.__version__) else None
    except InvalidVersion:
        raise ConfigError(
            f"{recipe.place(('version',))}: version={written_for!r} is not a version number.", "remove the key"
        ) from None


def _culprit(value: Any, fails: Callable[[Any], bool]) -> tuple[str | int, ...]:
    """The path to what an error is about: the end of the shortest beginning of a value that still gives it."""
    if not isinstance(value, dict | list) or fails(type(value)()):
        return ()
    items: list[tuple[Any, Any]] = list(value.items() if isinstance(value, dict) else enumerate(value))

    def beginning(count: int, last: Any) -> Any:
        head = [*items[:count], (items[count][0], last)]
        return dict(head) if isinstance(value, dict) else [item for _, item in head]

    found = next((count for count, (_, item) in enumerate(items) if fails(beginning(count, item))), len(items))
    if found == len(items):
        return ()
    key, item = items[found]
    return (key, *_culprit(item, lambda last: fails(beginning(found, last))))


def _problem(values: dict[str, Any]) -> str | None:
    """The error that a dictionary gives, or None."""
    try:
        QuantConfig.from_dict(values)
    except (ConfigError, MethodError) as error:
        return str(error)
    return None
