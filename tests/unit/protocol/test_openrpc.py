import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from mlx_sidecar.protocol import errors, messages, openrpc
from mlx_sidecar.protocol.methods import CLIENT_NOTIFICATIONS, METHODS, SERVER_NOTIFICATIONS

Json = dict[str, Any]

ROOT = Path(__file__).parents[3]
NODE_MODULES = ROOT / "clients/typescript/node_modules"
DOCUMENT = openrpc.document()
SCHEMAS: Json = DOCUMENT["components"]["schemas"]
ERRORS: Json = DOCUMENT["components"]["errors"]
ENTRIES: list[Json] = [*DOCUMENT["methods"], *DOCUMENT["x-notifications"]]
CALLS: list[Json] = [entry for entry in DOCUMENT["methods"] if "result" in entry]


def name_of(entry: Json) -> str:
    return entry["name"]


def references(node: Any) -> Iterator[str]:
    """Every `$ref` anywhere below."""
    if isinstance(node, dict):
        for key, value in cast(Json, node).items():
            yield from [value] if key == "$ref" else references(value)
    elif isinstance(node, list):
        for item in cast(list[Any], node):
            yield from references(item)


def at(reference: str) -> Any:
    """What a `$ref` leads to."""
    node: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        node = node[step]
    return node


def types_below(schema: Json) -> Iterator[Json]:
    """The objects that a schema is made of, itself included."""
    if "properties" in schema:
        yield schema
    for reference in references(schema):
        yield from types_below(at(reference))


def test_the_checked_in_document_is_current() -> None:
    assert (ROOT / "protocol/openrpc.json").read_text() == openrpc.text(), "It is stale. Run: make generate"


def test_the_stored_document_fits_into_a_line_and_is_the_same() -> None:
    assert b"\n" not in openrpc.stored()
    assert json.loads(openrpc.stored()) == DOCUMENT


@pytest.mark.skipif(not NODE_MODULES.exists(), reason="The npm packages are not installed.")
def test_it_is_a_document_by_the_rules_of_openrpc() -> None:
    rules = json.loads((NODE_MODULES / "@open-rpc/spec/dist/1_4/schema.json").read_text())
    # The rules name a schema of JSON Schema that no package has; schemas have a test of their own below.
    anything = {"definitions": {"JSONSchemaObject": {"properties": {"$ref": {"type": "string"}}}}}
    resource = Resource[Any].from_contents(anything, default_specification=DRAFT7)
    names = ("https://meta.json-schema.tools", "https://meta.json-schema.tools/")
    registry = Registry[Any]().with_resources((name, resource) for name in names)
    check = Draft7Validator(rules, registry=registry)
    assert [error.message for error in check.iter_errors(DOCUMENT)] == []
    assert [*check.iter_errors(DOCUMENT | {"methods": [{"name": "without params"}]})] != []


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_valid_and_says_what_it_describes(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["title"] == name
    assert SCHEMAS[name]["description"]


def test_every_reference_leads_somewhere() -> None:
    assert {reference for reference in references(DOCUMENT) if not at(reference)} == set()


def test_it_lists_everything_that_can_be_said_and_when() -> None:
    assert [entry["name"] for entry in CALLS] == [*METHODS]
    assert {entry["name"] for entry in DOCUMENT["methods"]} == METHODS.keys() | CLIENT_NOTIFICATIONS.keys()
    assert {entry["name"] for entry in DOCUMENT["x-notifications"]} == SERVER_NOTIFICATIONS.keys()
    for entry in CALLS:
        method = METHODS[entry["name"]]
        assert entry["x-beforeInitialize"] == method.before_initialize
        assert entry["x-inBatch"] == method.in_batch
        assert ("x-partialResult" in entry) == (method.progress is not None)
    assert DOCUMENT["x-protocolVersion"] == messages.PROTOCOL_VERSION


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_parameters_are_those_of_the_whole_object_with_the_required_ones_first(entry: Json) -> None:
    whole = at(entry["x-params"]["$ref"])
    assert entry["paramStructure"] == "by-name"
    assert {param["name"] for param in entry["params"]} == whole["properties"].keys()
    assert [param["name"] for param in entry["params"] if param["required"]] == whole["required"]
    order = [param["required"] for param in entry["params"]]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("entry", DOCUMENT["methods"], ids=name_of)
def test_what_a_client_sends_is_closed(entry: Json) -> None:
    assert all(schema.get("additionalProperties") is False for schema in types_below(entry["x-params"]))


@pytest.mark.parametrize("entry", CALLS, ids=name_of)
def test_what_the_server_sends_may_grow(entry: Json) -> None:
    answers = [entry["result"]["schema"], entry.get("x-partialResult", {"schema": {}})["schema"]]
    assert all("additionalProperties" not in schema for answer in answers for schema in types_below(answer))


@pytest.mark.parametrize("entry", CALLS, ids=name_of)
def test_the_errors_of_a_method_have_different_codes(entry: Json) -> None:
    listed = [at(error["$ref"]) for error in entry["errors"]]
    codes = [error["code"] for error in listed]
    assert len(set(codes)) == len(codes)
    own = {error.kind for error in METHODS[entry["name"]].errors}
    assert own | {"invalid_params", "internal_error"} <= {error["data"]["kind"] for error in listed}


def test_a_request_that_has_to_wait_for_initialize_can_fail_for_want_of_it() -> None:
    waiting = {
        entry["name"] for entry in CALLS if {"$ref": "#/components/errors/not_initialized"} in entry["errors"]
    }
    assert waiting == {name for name, method in METHODS.items() if not method.before_initialize}


def test_every_kind_of_error_is_listed_once() -> None:
    kinds = [error.kind for error in openrpc.error_types()]
    assert len(set(kinds)) == len(kinds) > 10
    assert [*ERRORS] == kinds
    assert SCHEMAS["ErrorKind"]["enum"] == sorted(kinds)
    assert all(error["message"] for error in ERRORS.values())


def test_every_member_that_an_error_brings_along_is_described() -> None:
    tree = ast.parse(inspect.getsource(errors))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    brought = {
        keyword.arg
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
        for keyword in call.keywords
    }
    data = SCHEMAS["ErrorData"]["properties"]
    assert brought - {None} == data.keys() - {"kind", "retryable"}
