"""Keys whose values people type freely, paths and text, and how Hydra's grammar gets them whole.

The schemas say which keys these are: every field of type `str`. A path is marked with PATH and may
begin with ~; prose (PROSE) is one text even in a sweep, where a comma separates other values.
"""

from __future__ import annotations

import os
import re
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from experiments.refused import Refused
from minigpt.checks import PATH, PROSE

# what Hydra takes for text that is exactly itself: no number, no flag, no sign of its grammar
PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z/][\w/.-]*", re.ASCII | re.IGNORECASE)
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
ELEMENT = re.compile(rf"(?:^|(?<=,))(?:(?:{QUOTED})(?=,|$)|[^,]*)", re.DOTALL)
FUNCTION = re.compile(r"(?:choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)


@dataclass(frozen=True)
class FreeKey:
    """A key that takes any text."""

    path: bool  # a leading ~ is the home folder
    prose: bool  # commas are its own
    optional: bool  # null is no text
    default: Any


@cache
def free_keys(schema: type) -> dict[str, FreeKey]:
    """Return every key of a schema whose type is text, dotted."""
    return dict(_free_keys(schema, ""))


def _free_keys(schema: type, prefix: str) -> list[tuple[str, FreeKey]]:
    found = []
    hints: dict[str, Any] = get_type_hints(schema)
    for field in fields(schema):
        hint, name = hints[field.name], prefix + field.name
        if is_dataclass(hint):
            found += _free_keys(hint, f"{name}.")  # type: ignore[arg-type]
        elif str in (hint, *get_args(hint)) and not _holds_list(hint):
            found.append((name, _free_key(field, type(None) in get_args(hint))))
    return found


def _holds_list(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) in (list, dict, tuple)


def _free_key(field: Field, optional: bool) -> FreeKey:
    path, prose = field.metadata == PATH, field.metadata == PROSE
    return FreeKey(path, prose, optional, field.default)


def quoted(argument: str, schema: type, sweep: bool = False) -> str:
    """Put the value of a free key in the quotes that Hydra's grammar wants, if it needs any.

    A value that is in quotes already, one pair around it all, is Hydra's own way and stays.
    Raises Refused where the value is null and the key has no null.
    """
    name, equals, value = argument.partition("=")
    key = free_keys(schema).get(name.lstrip("+"))
    if key is None or not equals:
        return argument
    whole = not sweep or key.prose
    if not whole and FUNCTION.fullmatch(value):
        return argument
    values = [value] if whole else ELEMENT.findall(value)
    if "null" in map(str.lower, values) and not (key.optional or key.prose):
        raise Refused(f"{argument}: {name} has no null; as text it is {name}=\"'null'\"")
    return f"{name}={','.join(_quoted(one, key) for one in values)}"


def _quoted(value: str, key: FreeKey) -> str:
    is_null = key.optional and value.lower() == "null"
    if not value or is_null or PLAIN.fullmatch(value) or re.fullmatch(QUOTED, value, re.DOTALL):
        return value
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def path_in(value: str) -> Path:
    """Return the path that an override's value stands for, quotes and ~ resolved."""
    if re.fullmatch(QUOTED, value, re.DOTALL):
        value = str(OverridesParser.create().parse_override(f"x={value}").value())
    return Path(value).expanduser()


def settle_text(config: DictConfig, schema: type) -> None:
    """Expand ~ in the paths of a composed configuration. Raises Refused where a text is empty.

    A default is left as it is, and expanded where it is used.
    """
    for name, key in free_keys(schema).items():
        if OmegaConf.is_missing(config, name) or key.prose:
            continue
        value = OmegaConf.select(config, name)
        if value == "":
            null = f", or {name}=null" if key.optional else ""
            raise Refused(f"{name}= is empty: give it a value{null}")
        if key.path and value != key.default and str(value).startswith("~"):
            OmegaConf.update(config, name, os.path.expanduser(str(value)))
