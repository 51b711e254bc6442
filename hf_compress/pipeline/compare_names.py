"""Names of the configurations in a comparison, and what they asked for as data."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..apply.planning import refuse_trained
from ..core.config import QuantConfig
from ..core.errors import ConfigError
from ..evaluation.comparison import ORIGINAL

_POSSIBLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")
_EXAMPLE = "[RTNQuantConfig(bits=4), Int8DynamicQuantConfig()]"


def named_configs(configs: object) -> dict[str, QuantizationConfigMixin]:
    """Configurations by name, in order; two that say the same are told apart by a number.

    Args:
        configs: A mapping from names, or a sequence.

    Raises:
        ConfigError: There is none, one is no configuration or trains, or a name can't be that of a directory.
    """
    if isinstance(configs, Mapping):
        pairs: list[tuple[object, object]] = list(configs.items())
    elif isinstance(configs, Sequence) and not isinstance(configs, str):
        pairs = [(None, config) for config in configs]
    else:
        raise ConfigError(f"configs is a {type(configs).__name__}, no list of configurations.", _EXAMPLE)
    named: dict[str, QuantizationConfigMixin] = {}
    for name, config in pairs:
        if not isinstance(config, QuantizationConfigMixin):
            raise ConfigError(f"configs has a {type(config).__name__}, which is no configuration.", _EXAMPLE)
        if isinstance(config, QuantConfig):
            refuse_trained(config)
        named[unique_name(config_name(config), named) if name is None else _checked(name, named)] = config
    if not named:
        raise ConfigError("There is no configuration to compare.", _EXAMPLE)
    return named


def config_name(config: QuantizationConfigMixin) -> str:
    """A short name that says what a configuration does, such as `rtn-4bit-g64` or `bitsandbytes-nf4`."""
    if isinstance(config, QuantConfig):
        return "-".join(_own_parts(config))
    if isinstance(config, BitsAndBytesConfig):
        return f"bitsandbytes-{'int8' if config.load_in_8bit else config.bnb_4bit_quant_type}"
    if isinstance(config, TorchAoConfig):
        kind = type(config.quant_type).__name__.removesuffix("Config")
        return f"torchao-{re.sub('(?<=[a-z0-9])(?=[A-Z])', '-', kind).lower()}"
    return str(json.loads(json.dumps(config.quant_method)))


def request_of(config: QuantizationConfigMixin) -> dict[str, Any]:
    """What a configuration asks for as JSON types, without data."""
    if isinstance(config, QuantConfig):
        return {"method": config.method, **config.fields.model_dump(mode="json")}
    made: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return made


def unique_name(name: str, taken: Container[str]) -> str:
    """The name, or with the next number where it is taken; characters that are not possible become dashes."""
    made = re.sub("[^A-Za-z0-9._+-]+", "-", name).strip("-._+")[:70] or "config"
    return made if made not in taken else next(f"{made}-{n}" for n in count(2) if f"{made}-{n}" not in taken)


def _own_parts(config: QuantConfig) -> list[str]:
    """Method or codebook, then what it is given, then what differs from the defaults."""
    fields = config.fields.model_dump(mode="json")
    changed = config.fields.model_dump(mode="json", exclude_defaults=True)
    codebook = fields.get("codebook")
    parts = [str(codebook or config.method.replace("_", "-"))]
    if "bits" in fields and codebook not in ("nf4", "fp4"):  # whose names tell
        parts.append(f"{fields['bits']}bit")
    if "group_size" in fields:
        group = fields["group_size"]
        parts.append(f"g{group}" if isinstance(group, int) else str(group))
    if "dtype" in fields:
        parts.append(str(fields["dtype"]))
    told = {"symmetric": "asym", "embeddings": "emb8", "skip": "skip", "rules": "rules", "default_rules": "all"}
    told |= {"smoothing": "smooth", "act_order": "in-order"}
    parts += [word for name, word in told.items() if name in changed]
    parts += [str(changed[name]).replace("_", "-") for name in ("observer", "preset") if name in changed]
    parts += [f"{changed['iterations']}it"] if "iterations" in changed else []
    return parts + ([str(changed["format"])] if "format" in changed else [])


def _checked(name: object, taken: Iterable[str]) -> str:
    """A name that a directory can have beside others, on any file system.

    Raises:
        ConfigError: It can't, or is taken by the original, or by another but for upper and lower case.
    """
    if not isinstance(name, str) or not _POSSIBLE.fullmatch(name) or name.lower() == ORIGINAL:
        raise ConfigError(
            f"{name!r} can't be the name of a configuration.",
            f'letters, digits and . _ + -, such as "int4-g64"; {ORIGINAL!r} is the model before',
        )
    if same := [other for other in taken if other.lower() == name.lower()]:
        raise ConfigError(
            f"{same[0]!r} and {name!r} are one name where file systems ignore case.", f'such as "{name}-2"'
        )
    return name
