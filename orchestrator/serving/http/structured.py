"""The fields of a request that constrain its texts: OpenAI's, and those of vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

from orchestrator.serving.engine.grammars import Kind, OutputRule
from orchestrator.serving.http.fields import field_error

MAX_CHOICES = 1000
MAX_SOURCE = 1 << 16

Choice: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
ChoiceList: TypeAlias = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]
Choices: TypeAlias = Literal["labels"] | ChoiceList
"""The texts to choose from; ``labels`` are those of the prompt's verbalizer."""
Source: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_SOURCE)]
JsonSchema: TypeAlias = dict[str, Any] | Source
"""A JSON schema as an object or as its text."""

ANY_OBJECT = {"type": "object"}


class NamedFields(BaseModel):
    """An object in a request that refuses unknown fields by their names."""

    model_config = ConfigDict(strict=True, extra="ignore")

    place: ClassVar[str]
    """The object's place in the request."""

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in value:
                if name not in known:
                    allowed = ", ".join(sorted(known))
                    raise field_error(
                        f"{cls.place}.{name}", f"is not recognised; allowed: {allowed}"
                    )
        return value


class NamedSchema(NamedFields):
    """A JSON schema with a name; the name and the description do not affect the answer."""

    place: ClassVar[str] = "response_format.json_schema"

    name: Annotated[str, Field(max_length=512)] | None = None
    description: str | None = None
    strict: bool | None = None
    """Ignored: answers keep to the schema in any case."""
    body: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(NamedFields):
    """OpenAI's description of an answer's format."""

    place: ClassVar[str] = "response_format"

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    """The schema, for the type ``json_schema`` only."""

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_error("response_format.json_schema", "is required")
        if self.type != "json_schema" and self.json_schema is not None:
            raise field_error(
                "response_format.json_schema", "is allowed with the type 'json_schema' only"
            )
        return self


class StructuredOutputs(NamedFields):
    """vLLM's constraint on an answer; exactly one of the fields is given."""

    place: ClassVar[str] = "structured_outputs"

    choice: Choices | None = None
    regex: Source | None = None
    """A regular expression that the whole text matches."""
    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    json_object: bool | None = None
    grammar: Source | None = None
    """A grammar in the notation of Lark or of llama.cpp."""


@dataclass(frozen=True)
class AskedRule:
    """A rule and the field of the request that states it."""

    field: str
    rule: OutputRule


class ConstrainedFields(BaseModel):
    """The fields of a request that constrain its texts; at most one of them is given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Choices | None = None
    guided_regex: Source | None = None
    guided_json: JsonSchema | None = None
    guided_grammar: Source | None = None

    @cached_property
    def asked_rule(self) -> AskedRule | None:
        """The rule for the request's texts; None if they are free."""
        rules = list(self._rules())
        if len(rules) > 1:
            raise field_error(rules[1].field, f"can't be combined with {rules[0].field!r}")
        return rules[0] if rules else None

    @model_validator(mode="after")
    def _at_most_one_rule(self) -> ConstrainedFields:
        _ = self.asked_rule
        return self

    def _rules(self) -> Iterator[AskedRule]:
        if (form := self.response_format) is not None and form.type != "text":
            schema = form.json_schema.body if form.json_schema else ANY_OBJECT
            yield _asked("response_format", "json", schema)
        if self.structured_outputs is not None:
            yield _only_rule(self.structured_outputs)
        if self.guided_choice is not None:
            yield _asked("guided_choice", "choice", self.guided_choice)
        if self.guided_regex is not None:
            yield _asked("guided_regex", "regex", self.guided_regex)
        if self.guided_json is not None:
            yield _asked("guided_json", "json", self.guided_json)
        if self.guided_grammar is not None:
            yield _asked("guided_grammar", "grammar", self.guided_grammar)


def _only_rule(outputs: StructuredOutputs) -> AskedRule:
    values: dict[Kind, Any] = {
        "choice": outputs.choice,
        "regex": outputs.regex,
        "json": ANY_OBJECT if outputs.json_object else outputs.json_,
        "grammar": outputs.grammar,
    }
    given = [(kind, value) for kind, value in values.items() if value is not None]
    both_json = bool(outputs.json_object) and outputs.json_ is not None
    if len(given) != 1 or both_json:
        raise field_error(
            "structured_outputs",
            "needs exactly one of choice, regex, json, json_object and grammar",
        )
    return _asked("structured_outputs", *given[0])


def _asked(field: str, kind: Kind, value: Any) -> AskedRule:
    if kind == "json":
        return AskedRule(field, OutputRule(kind, _schema_text(field, value)))
    if kind == "choice":
        if value == "labels":
            return AskedRule(field, OutputRule("labels", ""))
        return AskedRule(field, OutputRule(kind, _within_limit(field, json.dumps(value))))
    return AskedRule(field, OutputRule(kind, value))


def _schema_text(field: str, schema: dict[str, Any] | str) -> str:
    if isinstance(schema, str):
        try:
            document = from_json(schema, allow_inf_nan=False)
        except ValueError as error:
            raise field_error(field, f"holds a schema that is not valid JSON: {error}") from None
        if not isinstance(document, dict):
            raise field_error(field, "holds a schema that is not a JSON object")
        schema = document
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError:
        raise field_error(field, "holds a schema with a number that JSON can't write") from None
    return _within_limit(field, text)


def _within_limit(field: str, text: str) -> str:
    if len(text) > MAX_SOURCE:
        raise field_error(field, f"takes {len(text)} characters, at most {MAX_SOURCE} are allowed")
    return text
