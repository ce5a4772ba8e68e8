"""Every event is in the union, frozen, and holds plain values alone."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from int8convert import events

PLAIN = {str, int, float, bool, type(None), tuple[str, ...]}
UNION = typing.get_args(events.Event)


def test_union_holds_every_event() -> None:
    classes = [value for value in vars(events).values() if inspect.isclass(value)]
    assert set(UNION) == {cls for cls in classes if cls.__module__ == events.__name__}


@pytest.mark.parametrize("event", UNION)
def test_event_is_frozen_and_holds_plain_values(event: type) -> None:
    assert event.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field, kind in typing.get_type_hints(event).items():
        kinds = set(typing.get_args(kind)) if typing.get_origin(kind) is not tuple and typing.get_args(kind) else {kind}
        assert kinds <= PLAIN, f"{field} is {kind}"
    assert {field.name for field in dataclasses.fields(event)} == set(typing.get_type_hints(event))
