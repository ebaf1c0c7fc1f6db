"""YAML files, `base:` files and `a.b=c` overrides become one strict, typed Config, and every value knows where it came from.

Layers, later ones win: defaults < base files (depth first, in order) < the file itself < overrides. Anything that is not in the
schema, has the wrong type or lies outside its range is one ConfigError sentence that names the file, the key, what was expected
and the nearest key.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megaflow.config.schema import Config, entries, keys
from megaflow.errors import UserError
from megaflow.flow import choice


class ConfigError(UserError):
    """A config that cannot be used, said in one sentence."""


@dataclasses.dataclass
class Loaded:
    """A config and the origin of each of its leaf keys: 'default', a file's path, 'command line', 'teacher …' or 'auto'."""

    config: Config
    origin: dict[str, str]


def load(path: str | Path, overrides: list[str] | None = None, inherited: dict[str, Any] | None = None, inherited_from: str = "") -> Loaded:
    """Read a config file, its bases and overrides. `inherited` is a flat layer {'model.hidden': 256, …} above the defaults only.

    Raises ConfigError.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if inherited:
        layers.append((inherited_from, inherited))
    layers += _file_layers(Path(path), ())
    layers += [("command line", {name: value}) for name, value in map(_override, overrides or [])]
    return assemble(layers)


def load_recorded(path: str | Path) -> Loaded:
    """Read the config that a run has recorded, which is whole: a file that it names is not read. Raises ConfigError."""
    return assemble(_file_layers(Path(path), (), whole=True))


def frozen(path: str | Path, folder: Path) -> tuple[Path, str]:
    """A file below `folder` for what a config and its bases say now, and its content: one key a line, each with the file that it is of.

    What waits in a queue reads that file, whatever becomes of the others meanwhile. It is named by its content, and called as the config
    is. Raises ConfigError.
    """
    values: dict[str, tuple[Any, str]] = {}
    for source, layer in _file_layers(Path(path), ()):
        values |= {name: (value, source) for name, value in layer.items()}
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}  # {' '.join(source.split())}\n" for name, (value, source) in values.items()]
    told = json.dumps({name: value for name, (value, _) in values.items()}, sort_keys=True, default=str)
    name = hashlib.sha256(told.encode()).hexdigest()[:8]
    return folder / name / Path(path).name, "".join(lines) or "{}\n"


def assemble(layers: list[tuple[str, dict[str, Any]]]) -> Loaded:
    """Put flat layers of (origin, {key: value}) over the defaults, checking each value where it enters. Raises ConfigError."""
    schema = keys()
    values = {
        name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory() for name, item in schema.items()
    }
    origin = dict.fromkeys(values, "default")
    for source, layer in layers:
        for name, value in layer.items():
            values[name] = checked(source, name, value)
            origin[name] = source
    return Loaded(_build(Config, values, ""), origin)


def checked(source: str, name: str, value: Any) -> Any:
    """The value as its key's type, or a ConfigError that says what was expected. int passes for float; nothing else is converted."""
    schema = keys()
    if name not in schema:
        near = difflib.get_close_matches(name, schema, n=1, cutoff=0.5) or difflib.get_close_matches(
            name.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in schema], n=1
        )
        section = [k for k in schema if k.startswith(name + ".")]
        if section:
            raise ConfigError(f"{source}: {name} is a section, not a value; set one of its keys, such as {section[0]}")
        hint = next((k for k in schema if near and k.endswith(near[0])), None)
        raise ConfigError(
            f"{source}: there is no key {name}" + (f"; the nearest is {hint}" if hint else "; megaflow config --keys lists all of them")
        )
    item = schema[name]
    rule = item.metadata
    if isinstance(value, bool) and rule["choices"] and (word := "on" if value else "off") in rule["choices"]:
        value = word  # YAML reads an unquoted on or off as true or false
    expected = describe(item)
    wrong = ConfigError(f"{source}: {name} must be {expected}, not {value!r}")
    if rule["auto"] and value == "auto":
        return value
    kind = int if item.type is Any else item.type  # every key that accepts auto counts something
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind == list[str]:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise wrong
        return value
    if type(value) is not kind:
        raise wrong
    if rule["choices"] is not None and value not in rule["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in rule["choices"]], n=1)
        raise ConfigError(f"{wrong}" + (f"; did you mean {near[0]}?" if near else ""))
    if rule["table"]:
        try:
            choice.split(entries(item), str(value))
        except choice.ChoiceError as error:
            raise ConfigError(f"{source}: {name} must be {error}") from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, above = rule["low"], rule["high"], rule["above"]
        bounded = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        if not (bounded and math.isfinite(value)):
            raise wrong
    return value


def describe(item: dataclasses.Field) -> str:
    """What a key accepts, in words: 'an integer of at least 1, or auto'."""
    rule = item.metadata
    if rule["table"]:
        words = "one of " + ", ".join(choice.described(entries(item)))
    elif rule["choices"] is not None:
        words = str(rule["choices"][0]) if len(rule["choices"]) == 1 else "one of " + ", ".join(map(str, rule["choices"]))
    else:
        kinds: dict[object, str] = {int: "an integer", Any: "an integer", float: "a number", str: "a string", bool: "true or false"}
        words = kinds.get(item.type, "a list of strings")
        limits = [
            f"at least {rule['low']:g}" if rule["low"] is not None else "",
            f"above {rule['above']:g}" if rule["above"] is not None else "",
        ]
        limits += [f"at most {rule['high']:g}" if rule["high"] is not None else ""]
        limits = [limit for limit in limits if limit]
        if limits:
            words += ("" if limits[0].startswith("above") else " of") + " " + " and ".join(limits)
    return words + (", or auto" if rule["auto"] else "")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping or a config dataclass as {'a.b.c': value}."""
    if dataclasses.is_dataclass(node):
        node = {item.name: getattr(node, item.name) for item in dataclasses.fields(node)}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if (isinstance(value, dict) and value) or dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def meant(config: Config) -> dict[str, Any]:
    """{'a.b.c': value} of all keys, of choices with all their options: equal of configs that mean the same in other words."""
    schema = keys()
    values = flatten(config)
    tables = {name: entries(schema[name]) for name in values if schema[name].metadata["table"]}
    return {name: choice.canonical(tables[name], value) if name in tables and value != "auto" else value for name, value in values.items()}


def to_yaml(config: Config) -> str:
    """The whole tree as YAML; reading it back gives the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _build(kind: type, values: dict[str, Any], prefix: str) -> Any:
    made = {}
    for item in dataclasses.fields(kind):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            made[item.name] = _build(item.type, values, f"{prefix}{item.name}.")
        else:
            made[item.name] = values[prefix + item.name]
    return kind(**made)


def _file_layers(path: Path, above: tuple[Path, ...], whole: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Layers of one file: those of its bases, then its own. above: the files that lead here, to find circles; whole: it has none."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: base files lead back to this file ({' -> '.join(p.name for p in above)})")
    if not path.is_file():
        where = f", named as base by {above[-1]}" if above else ""
        resolved = path / "config.yaml"
        where += f"; this is a folder, its config is {resolved}" if resolved.is_file() else ""
        raise ConfigError(f"{path}: no such config file{where}")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path.resolve()), resolve=True)  # load would take ".." of a link by its name
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # a YAML parser's errors have no common base class that OmegaConf promises
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections such as run: and train:, not {type(content).__name__}")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base must be a path or a list of paths, relative to this file")
    if bases and whole:
        raise ConfigError(f"{path}: the config of a run has no base, which somebody has written into it; take it out, or copy the run anew")
    layers: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        layers += _file_layers(path.parent / base, (*above, path.resolve()))
    for name, value in content.items():
        if not isinstance(name, str) or (not isinstance(value, dict) and any(k.startswith(f"{name}.") for k in keys())):
            raise ConfigError(f"{path}: {name} must be a section of keys, not {value!r}")
    flat = {name: value for name, value in flatten(content).items() if value != {} or name in keys()}  # an empty section says nothing
    return [*layers, (str(path), flat)]


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"command line: {text!r} is not an override; write key=value, such as train.steps=100")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)["value"]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: the value of {name} cannot be read: {str(error).splitlines()[0]}") from None
    except Exception as error:  # same reason as above
        raise ConfigError(f"command line: the value of {name} cannot be read: {' '.join(str(error).split())}") from None
    schema = keys()
    if name in schema and schema[name].type is str and not value.lstrip().startswith(("'", '"')):
        parsed = value.strip()  # a run called 1, an empty path and 'a #1' stay what they are
    return name, parsed
