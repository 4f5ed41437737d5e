"""`Engine.generate` spells out its keywords, though Request and generate_batch are the only ones that define them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

import pytest

from realisid_trt import Engine, Request
from realisid_trt.request import BatchOptions, GenerateOptions, RequestOptions

POSITIONAL = ["prompt", "persons"]
BATCH = {
    name: parameter
    for name, parameter in inspect.signature(Engine.generate_batch).parameters.items()
    if name not in ("self", "requests", "errors")
}


def test_its_keywords_are_a_requests_fields_and_a_batchs_options() -> None:
    fields = {name: hint for name, hint in get_type_hints(Request).items() if name not in POSITIONAL}
    assert get_type_hints(RequestOptions) == fields
    batch = get_type_hints(Engine.generate_batch)
    assert get_type_hints(BatchOptions) == {name: batch[name] for name in BATCH}
    assert get_type_hints(GenerateOptions) == get_type_hints(RequestOptions) | get_type_hints(BatchOptions)


def test_its_signature_and_its_docstring_name_each() -> None:
    parameters = inspect.signature(Engine.generate).parameters
    fields = [field.name for field in dataclasses.fields(Request)]
    assert list(parameters) == ["self", *fields, *BATCH]
    for name, parameter in parameters.items():
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (name not in ("self", *POSITIONAL)), name
    defaults: dict[str, Any] = {name: each.default for name, each in parameters.items()}
    asked = {field.name: field.default for field in dataclasses.fields(Request) if field.name != "prompt"}
    assert {name: defaults[name] for name in asked} == asked
    assert {name: defaults[name] for name in BATCH} == {name: each.default for name, each in BATCH.items()}
    assert all(name in str(Engine.generate.__doc__) for name in (*fields[2:], *BATCH))


def test_a_keyword_that_there_is_not() -> None:
    nobody: Any = object()
    with pytest.raises(TypeError, match=r"Engine\.generate\(\) got an unexpected keyword argument 'guidance'"):
        Engine.generate(nobody, "a beach", guidance=7.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'errors'"):
        Engine.generate(nobody, "a beach", errors="return")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Engine.generate(nobody, "a beach", [], 7)  # type: ignore[call-arg, arg-type]
