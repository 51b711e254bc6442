"""Configuration base: a frozen, forbid-extra pydantic model behind a thin transformers config shell.

`QuantConfig` is the one class registered with transformers (under `hf_compress`). It is a *request*: it never
ends up in a checkpoint, whose `config.json` names only what stock transformers knows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _version
from .errors import CalibrationError, ConfigError, nearest
from .registry import METHODS

if TYPE_CHECKING:
    import torch

    from .registry import Method

REQUEST = "hf_compress"
"""The `quant_method` of requests. Never written to a checkpoint."""


def _channel(value: Any) -> Any:
    """The field's convention: -1 means one group per output channel."""
    return "channel" if type(value) is int and value == -1 else value


GroupSize = Annotated[
    Annotated[int, Field(strict=True, ge=1)] | Literal["channel", "tensor"], BeforeValidator(_channel)
]
Pattern = Annotated[str, Field(min_length=1)]
Format = Literal["auto", "compressed-tensors", "bitsandbytes", "gptq", "gptq_v2", "awq", "guarded"]
Bits = Annotated[int, Field(strict=True, ge=2, le=8)]

logger = logging.getLogger(__name__)


class Settings(BaseModel):
    """Base of what users configure: frozen, without unknown keys, its errors told in our words.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type or range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(type(self), error) from None


class Rule(Settings):
    """One line of the rules: which weights, and what is different for them.

    Attributes:
        pattern: Glob, or regular expression after `re:`, on weight names without `.weight`.
        keep: True keeps the matched weights as they are; False takes back an earlier rule that kept them.
        bits: Bit width for the matched weights.
        group_size: Group size for the matched weights, `"channel"` or `"tensor"`.
        symmetric: Whether the matched weights are quantized without zero point.
    """

    pattern: Pattern
    keep: Annotated[bool, Field(strict=True)] | None = None
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: Annotated[bool, Field(strict=True)] | None = None

    def settings(self) -> dict[str, Any]:
        """The scheme settings that this rule changes."""
        names = ("bits", "group_size", "symmetric")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class QuantFields(BaseModel):
    """Fields common to all methods.

    Attributes:
        skip: Patterns of weights to keep, added to the defaults.
        rules: Further rules; the last rule that matches a weight decides.
        default_rules: Whether heads, routers, norms and embeddings are kept.
        embeddings: `"int8"` quantizes embedding tables, 8 bits and one scale per row.
        min_coverage: Smallest fraction of the weights in scope that must be quantized.
        format: Checkpoint format, or `"auto"` for the best stock format that holds the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    skip: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    default_rules: Annotated[bool, Field(strict=True)] = True
    embeddings: Literal["keep", "int8"] = "keep"
    min_coverage: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.9
    format: Format = "auto"


class UniformFields(QuantFields):
    """Fields of methods that choose a uniform integer grid.

    Attributes:
        bits: Bits per weight, 2 to 8.
        group_size: Consecutive inputs that share a scale; `"channel"` (or -1) one scale per output channel,
            `"tensor"` one for the whole weight.
        symmetric: Whether zero is the middle of the grid (no zero points).
    """

    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: Annotated[bool, Field(strict=True)] = True


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Calibration data and how to make batches of it: copied by reference, never serialised.

    transformers deep-copies configs hundreds of times while loading; data must not travel with them. What a
    checkpoint records of it is its `CalibrationRecord`.

    Attributes:
        data: Texts, conversations, a `datasets.Dataset`, a file (.txt, .jsonl or .parquet), a `DataLoader`, images,
            sound, or ready batches (dictionaries of tensors). None takes the text that comes with Python, for
            language models; `"generated"` lets the model make its own.
        tokenizer: Tokenizer, image processor, feature extractor or processor; None takes the model's own.
        rows: Most rows that are used; more are drawn from by `seed`.
        sequence_length: Most tokens per row; None takes 512, or the model's limit if that is lower.
        seed: Seed of the draw, and of what is generated.
        pack: Whether texts are joined, with the end token between them, and cut into rows of equal length; None
            packs for models that generate text.
        chat_template: Template for conversations; None takes the tokenizer's own.
        batch_size: Most rows per batch.
        min_rows: Fewest rows that are accepted; where fewer are asked for, these.
        min_tokens: Fewest tokens that are accepted, padding not counted; only of text.
        column: Column of a dataset, or key of a file's objects; None finds it by the usual names.
        image_size: Side of generated images in pixels, or (height, width); None takes the model's.

    Raises:
        CalibrationError: A value has the wrong type or range.
    """

    data: Any = None
    _: KW_ONLY
    tokenizer: Any = None
    rows: int = 128
    sequence_length: int | None = None
    seed: int = 0
    pack: bool | None = None
    chat_template: str | None = None
    batch_size: int = 8
    min_rows: int = 8
    min_tokens: int = 256
    column: str | None = None
    image_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("batch_size", 1), ("min_rows", 1), ("min_tokens", 0), ("seed", 0)):
            self._check_count(name, least)
        if self.sequence_length is not None:
            self._check_count("sequence_length", 2)
        if self.pack is not None and type(self.pack) is not bool:
            raise CalibrationError(f"pack={self.pack!r} is not True, False or None.", "pack=True")
        for name in ("chat_template", "column"):
            if not isinstance(getattr(self, name), str | None):
                raise CalibrationError(f"{name} is a {type(getattr(self, name)).__name__}.", f'{name}="..."')
        if isinstance(self.data, Calibration):
            raise CalibrationError("The data is a Calibration already.", "pass it as it is")
        size = self.image_size
        sides: tuple[Any, ...] = size if isinstance(size, tuple) else (size, size)
        if size is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
            raise CalibrationError(f"image_size={size!r} is no size in pixels.", "image_size=(224, 224)")

    @classmethod
    def generated(cls, **options: Any) -> Calibration:
        """Data that the model makes itself: sampled tokens, or images distilled from its batch statistics.

        Args:
            **options: `rows`, `sequence_length`, `seed` and the other attributes except `data`.

        Raises:
            CalibrationError: A value has the wrong type or range.
        """
        return cls("generated", **options)

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value < 2**63:
            raise CalibrationError(f"{name}={value!r} is no integer from {least} on.", f"{name}={max(least, 8)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self

    def __repr__(self) -> str:
        return f"Calibration({type(self.data).__name__}, rows={self.rows}, seed={self.seed})"


class QuantConfig(QuantizationConfigMixin):
    """A compression request for `from_pretrained(quantization_config=...)` or `hf_compress.quantize`.

    Args:
        calibration: Calibration data, for methods that need it.
        fields: The method's fields; see its configuration class.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type or range.
        CalibrationError: Data was given to a method that needs none.
    """

    method: ClassVar[str]
    fields_type: ClassVar[type[QuantFields]] = QuantFields

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = cls.fields_type.__signature__

    def __init__(self, *, calibration: Any = None, **fields: Any) -> None:
        if type(self) is QuantConfig:
            raise ConfigError(
                "QuantConfig is the base of all configurations.", "use for example RTNQuantConfig(bits=4)"
            )
        self.quant_method = REQUEST
        self.fields = validate(self.fields_type, fields)
        self.progress: Callable[[int, int], None] | None = None
        self.calibration = (
            calibration if isinstance(calibration, Calibration) or calibration is None else Calibration(calibration)
        )
        if self.calibration is not None and not self.spec.needs_data:
            raise CalibrationError(
                f"{type(self).__name__} needs no calibration data, but some was given.",
                "leave `calibration` out",
            )

    @property
    def spec(self) -> Method:
        """The registered method behind this configuration."""
        return METHODS.get(self.method)

    @property
    def load_dtype(self) -> torch.dtype | None:
        """The data type that the whole model is loaded in, where the request decides it."""
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).fields_type.model_fields:
            raise ConfigError(
                f"{type(self).__name__} is frozen; {name} can't be changed.", f"make a new one with {name}={value!r}"
            )
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.fields == vars(other).get("fields")

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields_type.model_fields:
            return getattr(self.fields, name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from its dictionary; the class follows from the key `method`.

        Raises:
            ConfigError: `method` is missing, or a key is unknown and the dictionary isn't of a newer version.
            MethodError: The method is not registered.
        """
        if not isinstance(config_dict, dict) or not all(  # type: ignore[redundant-expr]
            isinstance(key, str) for key in config_dict
        ):
            raise ConfigError(
                f"Expected a dictionary with names as keys, got {config_dict!r}.", 'write {"method": "rtn"}'
            )
        values = {**config_dict, **kwargs}
        values.pop("quant_method", None)
        written_by = values.pop("version", None)
        if "method" not in values:
            raise ConfigError(
                "A configuration given as a dictionary needs the key 'method'.",
                f"add one of {', '.join(METHODS.names())}",
            )
        config = METHODS.get(values.pop("method")).config
        if _is_newer(written_by):
            values = _known(values, config.fields_type, str(written_by))
        made = config(**values)
        return (made, {}) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Everything but the data, as JSON types."""
        head = {"quant_method": self.quant_method, "method": self.method, "version": _version.__version__}
        return {**head, **self.fields.model_dump(mode="json")}

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary without fields at their defaults."""
        head = {"quant_method": self.quant_method, "method": self.method, "version": _version.__version__}
        return {**head, **self.fields.model_dump(mode="json", exclude_defaults=True)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """transformers' hook to overwrite attributes; requests are frozen, so everything is unused."""
        return kwargs

    def __repr__(self) -> str:
        set_ = ", ".join(f"{key}={value!r}" for key, value in self.fields.model_dump(exclude_defaults=True).items())
        return f"{type(self).__name__}({set_})"


def validate(fields_type: type[QuantFields], values: dict[str, Any]) -> QuantFields:
    """Build the pydantic model, with its errors told in our words.

    Raises:
        ConfigError: With the key, the value seen, and the nearest known key.
    """
    try:
        return fields_type(**values)
    except ValidationError as error:
        raise _config_error(fields_type, error) from None


def _config_error(fields_type: type[BaseModel], error: ValidationError) -> ConfigError:
    """The first problem that pydantic found, as a `ConfigError`."""
    errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    field, *inner = first["loc"]
    place = ".".join(str(part) for part in (field, *inner[:2])) if field in ("rules", "skip") else str(field)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(f"In {place}: {cause.message}", cause.fix)
    if first["type"] == "extra_forbidden":
        owner = Rule if inner else fields_type
        hint = nearest(str(first["loc"][-1]), owner.model_fields)
        return ConfigError(f"Unknown key {place!r}. {hint}".rstrip(), f"known keys: {', '.join(owner.model_fields)}")
    if first["type"] == "missing":
        return ConfigError(f"The key {place!r} is missing.", f"write {place}=...")
    if first["type"] == "too_long":
        return ConfigError(f"This method takes no {place}, got {first['input']!r}.", f"leave {place} out")
    if first["type"] in ("tuple_type", "iterable_type"):
        example = '[{"pattern": "lm_head", "bits": 8}]' if field == "rules" else '["pattern"]'
        return ConfigError(f"{place}={first['input']!r} is not a list.", f"write {place}={example}")
    expected = "; ".join(sorted({item["msg"] for item in errors if item["loc"][0] == field}))
    known = ", ".join(fields_type.model_fields)
    return ConfigError(f"{place}={first['input']!r} is not possible: {expected}.", f"see the fields {known}")


def _is_newer(written_by: object) -> bool:
    """Whether a dictionary was written by a newer version than this one."""
    if written_by is None:
        return False
    try:
        return Version(str(written_by)) > Version(_version.__version__)
    except InvalidVersion:
        raise ConfigError(f"version={written_by!r} is not a version number.", "remove the key") from None


def _known(values: dict[str, Any], fields_type: type[QuantFields], written_by: str) -> dict[str, Any]:
    """Drop keys that a newer version may have added, with one warning that names them."""
    unknown = sorted(set(values) - set(fields_type.model_fields))
    if unknown:
        logger.warning(
            "This configuration was written by hf_compress %s (this is %s); ignored: %s. Upgrade to use them.",
            written_by,
            _version.__version__,
            ", ".join(unknown),
        )
    return {key: value for key, value in values.items() if key not in unknown}
