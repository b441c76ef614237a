"""Turns a recipe of requests into conversations, split by wording and by entity."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lilliput.config import DataConfig
from lilliput.data.conversations import (
    Conversation,
    Expectation,
    ExpectedAbstention,
    ExpectedCall,
    ExpectedCalls,
    Message,
    ToolCall,
)
from lilliput.errors import DataError
from lilliput.recipes.request_entities import Entities, Side, Tables, Value
from lilliput.recipes.request_recipe import SLOT, Function, RequestRecipe, Wording, Wordings
from lilliput.tool_calls import invalid_call

# Sizes of lists in requests ("milk, eggs and bread"); most have one item.
_LIST_SIZES = (1, 1, 1, 1, 2, 2, 3)
# After this many draws in a row without a new text, the requests of a family are exhausted.
_FRUITLESS_DRAWS = 60


Tools = tuple[dict[str, Any], ...]
ToolList = Callable[[random.Random], Tools]


@dataclass(frozen=True)
class Family:
    """Requests of one kind: wordings of one side for one function, or for none.

    Attributes:
        relation: before the first slash of the rows' ids.
        name: of the family, after the slash.
        function: its name and specification; None if no function serves the request.
        wordings: of one side of the split.
        answer: the assistant's text; None if the answer is a call.
        tools: draws the list of functions of a row.
    """

    relation: str
    name: str
    function: tuple[str, Function] | None
    wordings: Sequence[Wording]
    answer: str | None
    tools: ToolList


def make_requests(recipe: RequestRecipe, tables: Tables, config: DataConfig) -> list[Conversation]:
    """Returns the rows of both sides, with `split` and `group` set; deterministic for recipe, tables and `config`.

    Raises:
        DataError: the recipe gives fewer different requests than its `rows` ask for, or a value that the schema of its
            parameter forbids.
    """
    maker = _Maker(recipe, Entities(recipe, tables, config.train_share, config.seed), config)
    train, test, share = recipe.rows.train, recipe.rows.test, config.unanswerable_share
    missing = round((train.calls + train.extra + train.no_function) * share / (1.0 - share))
    parts: list[tuple[str, Iterator[Conversation], int]] = [
        ("train.calls", maker.calls("train"), train.calls),
        ("train.extra", maker.extra(), train.extra),
        ("train.no_function", maker.no_function("train"), train.no_function),
        ("train.missing", maker.missing("train"), missing),
        ("test.calls", maker.calls("test"), test.calls),
        ("test.no_function", maker.no_function("test"), test.no_function),
        ("test.held_out", maker.held_out(), test.held_out),
        ("test.missing", maker.missing("test"), config.unanswerable_questions),
    ]
    return [row for part, rows, count in parts for row in _exactly(count, rows, part)]


def split_wordings(
    wordings: Sequence[Wording], train_share: float, seed: str, alike: Callable[[Wording], Hashable]
) -> dict[Side, list[Wording]]:
    """Splits wordings; each group of `alike` ones gives its share to the test, and keeps at least one for training."""
    groups: dict[Hashable, list[Wording]] = {}
    for wording in wordings:
        groups.setdefault(alike(wording), []).append(wording)
    sides: dict[Side, list[Wording]] = {"train": [], "test": []}
    before = 0
    for place, group in enumerate(groups.values()):
        shuffled = random.Random(f"{seed}/{place}").sample(group, len(group))
        share = 1.0 - train_share
        # Rounds over all groups together; a half is rounded up, so that small groups are tested as well.
        count = int(share * (before + len(group)) + 0.5) - int(share * before + 0.5)
        count = min(count, len(group) - 1)
        sides["test"] += shuffled[:count]
        sides["train"] += shuffled[count:]
        before += len(group)
    return sides


class _Maker:
    """Makes the rows of one corpus."""

    def __init__(self, recipe: RequestRecipe, entities: Entities, config: DataConfig) -> None:
        self._recipe, self._entities = recipe, entities
        self._share, self._seed = config.train_share, config.seed
        self._main = tuple(function.as_tool(name) for name, function in recipe.functions.items())
        self._extra = {name: function.as_tool(name) for name, function in recipe.extra.items()}
        self._held_out = tuple(function.as_tool(name) for name, function in recipe.held_out.items())

    def calls(self, side: Side) -> Iterator[Conversation]:
        """Yields requests to the recipe's functions, which take turns."""
        share = self._recipe.added_share if side == "train" else 0.0
        families = []
        for name, function in self._recipe.functions.items():
            wordings = self._split(name, function, _by_form)[side]
            families.append(Family(name, "call", (name, function), wordings, None, self._without("", share)))
        return self._turns(side, families)

    def extra(self) -> Iterator[Conversation]:
        """Yields training requests to extra functions, which are in the row's list."""
        families = []
        for name, function in self._recipe.extra.items():
            wordings = self._split(name, function, _as_one)["train"]
            families.append(Family("extra", name, (name, function), wordings, None, self._with(name)))
        return self._turns("train", families)

    def held_out(self) -> Iterator[Conversation]:
        """Yields test requests to held-out functions."""
        tools = (*self._main, *self._held_out)
        return self._turns(
            "test",
            [
                Family("held-out", name, (name, function), function.wordings, None, lambda rng: tools)
                for name, function in self._recipe.held_out.items()
            ],
        )

    def missing(self, side: Side) -> Iterator[Conversation]:
        """Yields requests without a required argument; the functions' parameters take turns."""
        tools = self._without("", self._recipe.added_share if side == "train" else 0.0)
        families = []
        for name, function in self._recipe.functions.items():
            for parameter, spec in function.missing.items():
                wordings = self._split(f"{name}/{parameter}", spec, _as_one)[side]
                family = f"missing-{parameter}"
                families.append(Family(name, family, (name, function), wordings, spec.ask, tools))
        return self._turns(side, families)

    def no_function(self, side: Side) -> Iterator[Conversation]:
        """Yields requests that no function of the row's list serves; the kinds take turns."""
        share = self._recipe.added_share if side == "train" else 0.0
        kinds = []
        for kind, spec in self._recipe.no_function.items():
            if kind == "absent":
                families = self._absent(side, spec.answer, share)
            else:
                wordings = self._split(kind, Wordings(say=spec.say), _as_one)[side]
                name = kind.replace("_", "-")
                families = [Family("no-function", name, None, wordings, spec.answer, self._without("", share))]
            kinds.append(self._turns(side, families))
        return _take_turns(kinds)

    def _absent(self, side: Side, answer: str, share: float) -> list[Family]:
        families = []
        for name, function in self._recipe.extra.items():
            wordings = self._split(name, function, _as_one)[side]
            tools = self._without(name, share)
            families.append(Family("no-function", f"absent-{name}", (name, function), wordings, answer, tools))
        return families

    def _turns(self, side: Side, families: Sequence[Family]) -> Iterator[Conversation]:
        return _take_turns([self._stream(side, family) for family in families])

    def _split(self, name: str, wordings: Wordings, alike: Callable[[Wording], Hashable]) -> dict[Side, list[Wording]]:
        return split_wordings(wordings.wordings, self._share, f"{self._seed}/wordings/{name}", alike)

    def _without(self, name: str, share: float) -> ToolList:
        """Returns the draw of a list that has extra functions other than `name` at its end in `share` of the rows."""
        others = [other for other in self._extra if other != name]

        def draw(rng: random.Random) -> Tools:
            if rng.random() >= share or not others:
                return self._main
            return (*self._main, *(self._extra[name] for name in rng.sample(others, self._added(others))))

        return draw

    def _with(self, name: str) -> ToolList:
        """Returns the draw of a list that has the extra function `name` among those at its end."""
        others = [other for other in self._extra if other != name]

        def draw(rng: random.Random) -> Tools:
            names = [name, *rng.sample(others, self._recipe.added_functions - 1)]
            return (*self._main, *(self._extra[name] for name in rng.sample(names, len(names))))

        return draw

    def _added(self, others: Sequence[str]) -> int:
        return min(self._recipe.added_functions, len(others))

    def _stream(self, side: Side, family: Family) -> Iterator[Conversation]:
        """Yields rows with different texts, the wordings by turns, until no new text is found."""
        rng = random.Random(f"{self._seed}/{side}/{family.relation}/{family.name}")
        wordings = rng.sample(family.wordings, len(family.wordings))
        texts: set[str] = set()
        fruitless = 0
        while wordings and fruitless < _FRUITLESS_DRAWS:
            wording = wordings[(len(texts) + fruitless) % len(wordings)]
            values = self._draw(wording, family, side, rng)
            text = SLOT.sub(lambda match, values=values: _said(values[match[1]]), wording.text)
            if text in texts:
                fruitless += 1
                continue
            fruitless = 0
            texts.add(text)
            group = f"{family.relation}/{family.name}-{wording.number + 1}"
            answer, expect = _answer(family, wording, values)
            yield Conversation(
                id=f"{group}/{len(texts)}",
                messages=(Message(role="user", content=text), answer),
                tools=family.tools(rng),
                expect=expect,
                group=group,
                split=side,
            )

    def _draw(self, wording: Wording, family: Family, side: Side, rng: random.Random) -> dict[str, list[Value]]:
        """Returns the values of each slot: one, or several for an array."""
        values: dict[str, list[Value]] = {}
        slots = {slot: self._entity(slot, wording, family) for slot in wording.slots}
        for entity in dict.fromkeys(slots.values()):
            own = [slot for slot in wording.slots if slots[slot] == entity]
            sizes = [rng.choice(_LIST_SIZES) if _is_array(family, slot) else 1 for slot in own]
            drawn = iter(self._entities.draw_several(entity, sum(sizes), side, rng))
            values |= {slot: [next(drawn) for _ in range(size)] for slot, size in zip(own, sizes, strict=True)}
        return values

    @staticmethod
    def _entity(slot: str, wording: Wording, family: Family) -> str:
        if family.function is None:
            return slot
        entity = wording.draw.get(slot) or family.function[1].parameters[slot].draw
        assert entity is not None, "checked when the recipe was read"
        return entity


def _exactly(count: int, rows: Iterator[Conversation], part: str) -> list[Conversation]:
    taken = list(islice(rows, count))
    if len(taken) < count:
        raise DataError(
            f"the recipe gives {len(taken)} different requests for {part}, but {count} are asked for; add wordings or "
            "entities, or ask for fewer (under `rows`; for missing arguments, in the data section of the parameters)"
        )
    return taken


def _take_turns(streams: Iterable[Iterator[Conversation]]) -> Iterator[Conversation]:
    """Yields one row of each stream by turns; an exhausted stream drops out."""
    waiting = deque(streams)
    while waiting:
        stream = waiting.popleft()
        if (row := next(stream, None)) is not None:
            waiting.append(stream)
            yield row


def _by_form(wording: Wording) -> Hashable:
    """Wordings with the same slots and fixed arguments are alike, so that training sees each form."""
    return frozenset(wording.slots), tuple(sorted(wording.arguments.items()))


def _as_one(wording: Wording) -> Hashable:
    del wording
    return None


def _is_array(family: Family, slot: str) -> bool:
    return family.function is not None and family.function[1].parameters[slot].type == "array"


def _said(values: Sequence[Value]) -> str:
    *first, last = (value.said for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def _answer(family: Family, wording: Wording, values: dict[str, list[Value]]) -> tuple[Message, Expectation]:
    if family.answer is not None:
        asks = family.name.startswith("missing-")
        expect = ExpectedAbstention() if asks else ExpectedCalls(tool_calls=())
        return Message(role="assistant", content=family.answer), expect
    assert family.function is not None
    name, function = family.function
    accepted: dict[str, list[Any]] = {}
    for parameter in function.parameters:
        if parameter in wording.arguments:
            accepted[parameter] = [wording.arguments[parameter]]
        elif parameter in values:
            accepted[parameter] = _accepted(values[parameter], is_array=_is_array(family, parameter))
    call = ToolCall(name=name, arguments={parameter: forms[0] for parameter, forms in accepted.items()})
    if problem := invalid_call(call, [function.as_tool(name)]):
        raise DataError(f"{wording.text!r} gives arguments that do not fit: {problem}; correct the recipe")
    expected = ExpectedCall(name=name, arguments=accepted)
    return Message(role="assistant", tool_calls=(call,)), ExpectedCalls(tool_calls=(expected,))


def _accepted(values: Sequence[Value], *, is_array: bool) -> list[Any]:
    if not is_array:
        return list(values[0].accepted)
    forms = [[value.argument for value in values], [value.accepted[-1] for value in values]]
    return forms if forms[0] != forms[1] else forms[:1]
