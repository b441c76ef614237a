"""Checks a recipe of requests for what its types cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.data.questions import normalise
from lilliput.recipes.request_recipe import SLOT, Function, Parameter, RequestRecipe, Scalar, Wording, Wordings


def problems(recipe: RequestRecipe) -> Iterator[str]:
    """Yields what is inconsistent: unknown entities and slots, wordings that lack an argument, repeated wordings."""
    yield from _problems_of_entities(recipe)
    sections = {"functions": recipe.functions, "extra": recipe.extra, "held_out": recipe.held_out}
    names = [name for functions in sections.values() for name in functions]
    yield from (f"the function {name} occurs twice" for name in sorted({n for n in names if names.count(n) > 1}))
    for section, functions in sections.items():
        for name, function in functions.items():
            yield from _problems_of_function(f"{section}.{name}", function, recipe)
    for kind, spec in recipe.no_function.items():
        unknown = {slot for text in spec.say for slot in SLOT.findall(text)} - recipe.entities.keys()
        yield from (f"no_function.{kind}: {{{slot}}} is no entity" for slot in sorted(unknown))
        if bool(spec.say) == (kind == "absent"):
            yield f"no_function.{kind}: `say` belongs to every kind except `absent`"
    yield from _repeated_wordings(recipe)
    if recipe.extra and len(recipe.extra) < recipe.added_functions:
        yield f"extra has {len(recipe.extra)} functions, fewer than `added_functions`"


def _problems_of_entities(recipe: RequestRecipe) -> Iterator[str]:
    inside: dict[str, set[str]] = {}
    for name, entity in recipe.entities.items():
        slots = {slot for pattern in entity.patterns or () for slot in SLOT.findall(pattern)}
        yield from (f"entities.{name}: {{{slot}}} is no entity" for slot in sorted(slots - recipe.entities.keys()))
        inside[name] = slots & recipe.entities.keys()
    while ready := {name for name, slots in inside.items() if not slots & inside.keys()}:
        inside = {name: slots for name, slots in inside.items() if name not in ready}
    if inside:
        yield f"entities: {', '.join(sorted(inside))} contain each other"


def _problems_of_function(place: str, function: Function, recipe: RequestRecipe) -> Iterator[str]:
    for name, parameter in function.parameters.items():
        if parameter.draw is not None and parameter.draw not in recipe.entities:
            yield f"{place}.parameters.{name}: {parameter.draw} is no entity"
    yield from _problems_of_wordings(place, function, frozenset(), function, recipe)
    for name, missing in function.missing.items():
        if name in function.required:
            yield from _problems_of_wordings(f"{place}.missing.{name}", missing, frozenset({name}), function, recipe)
        else:
            yield f"{place}.missing.{name}: not a required parameter"


def _problems_of_wordings(
    place: str, wordings: Wordings, lacking: frozenset[str], function: Function, recipe: RequestRecipe
) -> Iterator[str]:
    """Checks wordings that lack exactly `lacking` of the required parameters."""
    if not wordings.wordings:
        yield f"{place}: no requests; fill `say` or `fixed`"
    for wording in wordings.wordings:
        yield from _problems_of_wording(place, wording, function, recipe)
        if (found := function.required - wording.given) != lacking:
            wanted = ", ".join(sorted(lacking)) or "nothing"
            yield f"{place}: {wording.text!r} lacks {', '.join(sorted(found)) or 'nothing'} instead of {wanted}"


def _problems_of_wording(place: str, wording: Wording, function: Function, recipe: RequestRecipe) -> Iterator[str]:
    for slot in wording.slots:
        draw = wording.draw.get(slot) or (function.parameters[slot].draw if slot in function.parameters else None)
        if draw is None or draw not in recipe.entities:
            yield f"{place}: {{{slot}}} in {wording.text!r} is no parameter with an entity under `draw`"
    given = [*wording.slots, *wording.arguments]
    if twice := {name for name in given if given.count(name) > 1}:
        yield f"{place}: {wording.text!r} gives {', '.join(sorted(twice))} twice"
    for name, value in wording.arguments.items():
        if name not in function.parameters:
            yield f"{place}: the fixed argument {name} is no parameter"
        elif not _fits(value, function.parameters[name]):
            yield f"{place}: the fixed argument {name}: {value!r} does not fit its type"


def _fits(value: Scalar, parameter: Parameter) -> bool:
    types = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float), "array": ()}
    return type(value) in types[parameter.type] and (parameter.enum is None or value in parameter.enum)


def _repeated_wordings(recipe: RequestRecipe) -> Iterator[str]:
    seen: dict[str, str] = {}
    for text in _all_wordings(recipe):
        if twin := seen.get(normalise(text)):
            yield f"the wordings {twin!r} and {text!r} are the same"
        seen[normalise(text)] = text


def _all_wordings(recipe: RequestRecipe) -> Iterator[str]:
    for function in (*recipe.functions.values(), *recipe.extra.values(), *recipe.held_out.values()):
        for wordings in (function, *function.missing.values()):
            yield from (wording.text for wording in wordings.wordings)
    for kind in recipe.no_function.values():
        yield from kind.say
