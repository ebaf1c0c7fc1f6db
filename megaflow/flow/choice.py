"""Choices by name: 'linear', or with options 'power:exponent=3', as configs write them and tables of functions offer them.

A table maps names to functions; what a function takes by keyword, with a number as default, are the options of its name. One whose
default is above zero is a size, and takes numbers above zero only. A function that takes any keyword (**) takes shares, above zero, of the
other names of its table, and one at least.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

Table = Mapping[str, Callable[..., Any]]


class ChoiceError(ValueError):
    """A value that names no entry of a table, or an option that it does not take; the sentence says what there is."""


def options(table: Table, name: str) -> dict[str, float] | None:
    """Options of an entry and their defaults; None where it takes a number for every name of the table."""
    parameters = inspect.signature(table[name]).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and isinstance(p.default, float)}


def split(table: Table, value: str) -> tuple[str, dict[str, float]]:
    """The entry's name, and the options that are given. Raises ChoiceError."""
    name, colon, rest = value.partition(":")
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        raise ChoiceError(f"one of {', '.join(table)}, not {value!r}" + (f"; did you mean {near[0]}?" if near else ""))
    known = options(table, name)
    names = [other for other in table if other != name] if known is None else list(known)
    given: dict[str, float] = {}
    for item in rest.split(",") if colon else []:
        key, equals, number = item.partition("=")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            takes = f"takes {', '.join(names)}" if names else "takes no options"
            raise ChoiceError(f"{name}, which {takes}, not {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if key in given:
            raise ChoiceError(f"{name} with {key} once, not twice: {value!r}")
        try:
            given[key] = float(number)
        except ValueError:
            given[key] = math.nan
        size = known is None or known[key] > 0.0
        endless = known is not None and math.isinf(known[key])
        if not equals or math.isnan(given[key]) or math.isinf(given[key]) and not endless or size and given[key] <= 0.0:
            raise ChoiceError(f"{name}:{key}=NUMBER{' above 0' if size else ''}, not {item!r}")
    if known is None and math.isinf(sum(given.values())):
        raise ChoiceError(f"{name}:NAME=SHARE,… with shares that have a sum, not {value!r}")
    if known is None and not given:
        raise ChoiceError(f"{name}:NAME=SHARE,… with shares of {', '.join(names)}, not {value!r}")
    return name, given


def canonical(table: Table, value: str) -> str:
    """The one way to write a value, with all options of its entry, those that are not given by their defaults. Raises ChoiceError."""
    name, given = split(table, value)
    whole = (options(table, name) or {}) | given
    return name + (":" if whole else "") + ",".join(f"{key}={number!r}" for key, number in sorted(whole.items()))


def mixed(table: Table, value: str) -> set[str]:
    """The entry's name, or where it has shares of others theirs. Raises ChoiceError."""
    name, given = split(table, value)
    return set(given) if options(table, name) is None else {name}


def call(table: Table, value: str, *arguments: Any) -> Any:
    """table[name](*arguments, **options) of a value. Raises ChoiceError, and what the function raises."""
    name, given = split(table, value)
    return table[name](*arguments, **given)


def described(table: Table) -> list[str]:
    """Every entry as it is written with its options' defaults: ['linear', 'power:exponent=2', …]."""
    found = []
    for name in table:
        known = options(table, name)
        words = ["NAME=SHARE,…"] if known is None else [f"{key}={default:g}" for key, default in known.items()]
        found.append(name + (":" if words else "") + ",".join(words))
    return found
