"""The reference pages docs/jobs.md and docs/commands.md, written from the code.

    python -m tests.reference_pages

writes both. The page of jobs comes from the JSON schema of the job spec, whose descriptions are the
docstrings below each key; the page of commands comes from the command line's own help.
``tests/docs/test_docs_reference.py`` fails while a page differs from the code.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

from orchestrator.cli.entry import INTERRUPTED, TERMINATED, app
from orchestrator.cli.groups import GROUPS
from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.job.spec import SPACES, job_schema
from orchestrator.job.spec.methods import REPARAMETERIZATIONS

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "make reference"
WIDTH = 100
NOTICE = f"<!-- Written by `{COMMAND}` from the code; edit the docstrings there instead. -->"
# What a docstring means literally: what is code already, quoted templates, braces, brackets with
# numbers, <tokens>, options, addresses, file endings, and names with a dot, underscore or colon.
LITERAL = re.compile(
    r"""
      `[^`]*`
    | "[^"]*[{}\\][^"]*"
    | \{[^{}]+\}
    | \[[\d., ]+\]
    | <[^<>\s]+>
    | (?<![\w-])--[a-z][\w-]*
    | \b\w+://[\w.:/]+
    | (?<![\w.])(?:\.[a-z]\w*)+
    | \b[A-Za-z][\w-]*(?:[.:_@][A-Za-z]\w*[\w-]*)+
    """,
    re.VERBOSE,
)
LEVEL = 4 * " "
EXAMPLE = """\
name: sms-spam
base_model:
  id: Qwen/Qwen2.5-0.5B
data:
  path: {train: train.csv, test: test.csv}
  template: "{text}\\nSpam or not?"
  target: label
  verbalizer: {0: " ham", 1: " spam"}
method: prompt_tuning
search:
  space:
    init: [random, class_labels, {text: "Classify the message as spam or ham."}]
    num_virtual_tokens: [5, 20]
    learning_rate: {loguniform: [0.003, 0.5]}
  trials: 16
  scheduler: asha
  metric: accuracy
train:
  steps: 500
"""
JOBS_OPENING = f"""\
# Job spec

{NOTICE}

```yaml
{EXAMPLE}```

A job is one YAML file. `orchestrator init` writes a commented one, `orchestrator validate JOB`
checks it and names every problem with its line, and `orchestrator schema` prints this page as a
JSON schema for editors. `--set search.trials=4` overrides a key on the command line. A key that
this page does not have is refused, and so are values that do not fit together.

Each key is followed by its type and its default. The keys below are in the order of the spec.
"""
SEVERAL_METHODS = """\
## Several methods in one search

`search.space.method` gives each method a space of its own, and `method` at the top is left out:

```yaml
search:
  space:
    seed: [0, 1, 2]                 # shared by all methods that have it
    method:
      prompt_tuning:
        num_virtual_tokens: [5, 20]
        learning_rate: {loguniform: [0.03, 0.5]}
      prefix_tuning: {learning_rate: {loguniform: [0.001, 0.03]}}
      lora: {rank: [2, 8], learning_rate: {loguniform: [0.001, 0.03]}}
  trials: 18
```

The trials are divided evenly among the methods, and those of a method are the ones that `random` or
`grid` gives a search of it alone for the same number of trials. A trial has the results that it has
there: to the last digit where the same trials are packed together, and up to the rounding of
another pack otherwise. The searcher `optuna` chooses a method from the results of all trials, and
then its own dimensions from the results of that method's. `asha` and `median` compare trials of all
methods. Prompts of one method train packed; baselines such as LoRA train one at a time beside them.
`pbt` is refused.

The summary, `run --json` (`methods`), the report and the search's MLflow run have the best trial of
each method with its trained parameters, stored bytes, seconds and memory. Only prompts can be
registered. If a baseline is better than every prompt by `search.metric`, its result is kept in the
search's folder, and the best prompt is registered with `registry.alias` (`challenger` where that is
champion) but does not become champion. The summary says so and names the command that promotes it.
At equal values of the metric the prompt is promoted as usual.
"""
COMMANDS_OPENING = f"""\
# Commands

{NOTICE}

`orchestrator --help` lists the verbs, and `orchestrator run --help` the options of one.

JOB is a [job spec](jobs.md). MODEL is `name` (its champion), `name@alias`, `name:version`, or a
`models:/` address as MLflow writes it. SEARCH is the id of a search, its beginning, its folder, or
`latest`.

With `--json`, a verb prints one JSON document on standard output and nothing else there. Progress
and logs go to standard error.
"""


def wrapped(text: str, indent: str = "") -> str:
    """Wrap a text of one or more paragraphs, with what it means literally as code."""
    paragraphs = [literals(" ".join(part.split())) for part in text.split("\n\n")]
    return "\n\n".join(filled(paragraph, indent, indent) for paragraph in paragraphs)


def literals(text: str) -> str:
    return LITERAL.sub(lambda match: code(match.group().strip("`")), text)


def code(text: str) -> str:
    return f"`{text}`"


def filled(text: str, first: str, later: str) -> str:
    """Break a text into lines, but not within code."""
    unbroken = re.sub(r"`[^`]*`", lambda match: match.group().replace(" ", "\0"), text)
    lines = textwrap.wrap(
        unbroken,
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace("\0", " ")


def entry(opening: str, text: str, indent: str = "") -> str:
    """Write a list's entry: its first line, and below it the text."""
    # Four columns a level: Python-Markdown, which the site uses, takes fewer for the end of a list.
    first = filled(opening, f"{indent}- ", f"{indent}    ")
    return f"{first}\n\n{wrapped(text, indent + LEVEL)}\n"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# docs/jobs.md


def jobs_page() -> str:
    """Write the page of the job spec from its schema."""
    schema = job_schema()
    return "\n".join([JOBS_OPENING, *section(schema, schema["$defs"], ""), methods_table()])


def section(model: dict[str, Any], models: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the entries of a section's own keys, then its sections, each with a heading."""
    required = model.get("required", [])
    inner: list[tuple[str, dict[str, Any]]] = []
    if not path:
        yield "## Top level\n"
    for name, key in model["properties"].items():
        target = only_section(key)
        if target:
            # A description that only repeats the section's own is left out of the schema.
            text = key.get("description", models[target]["description"])
            inner.append((f"{path}{name}", models[target]))
            opening = f"{code(name)}: the section [{path}{name}](#{anchor(path + name)})"
            if name in required:
                opening += "; required"
        else:
            text = key["description"]
            opening = f"{code(name)}: {kind(key, models)}; {default(name, key, required)}"
        yield entry(opening, text)
        if not target:
            yield from forms(key, models)
    for inner_path, inner_model in inner:
        yield f"{'#' * (2 + inner_path.count('.'))} {inner_path}\n"
        yield f"{wrapped(inner_model['description'])}\n"
        yield from section(inner_model, models, f"{inner_path}.")


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, without dots."""
    return heading.lower().replace(".", "")


def alternatives(key: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a key may be, without the null that stands for a key that is left out."""
    if "anyOf" in key:
        return [option for inner in key["anyOf"] for option in alternatives(inner)]
    return [] if key.get("type") == "null" else [key]


def only_section(key: dict[str, Any]) -> str | None:
    """Return the name of the model that a key is, unless it may be something else too."""
    options = alternatives(key)
    return referred(options[0]) if len(options) == 1 else None


def referred(option: dict[str, Any]) -> str | None:
    reference = option.get("$ref", "")
    return reference.rpartition("/")[2] or None


def kind(key: dict[str, Any], models: dict[str, Any]) -> str:
    """Name the type of a key in words, with its choices or limits."""
    options = alternatives(key)
    names = list(dict.fromkeys(one_kind(option, models) for option in options))
    lists = {f"list of {name}" for name in (*names, alternation(names[:-1]))}
    return alternation(["list of such values" if name in lists else name for name in names])


def alternation(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def one_kind(option: dict[str, Any], models: dict[str, Any]) -> str:
    target = referred(option)
    if target:
        return code(f"{{{', '.join(f'{name}: ...' for name in models[target]['properties'])}}}")
    choices = option.get("enum") or ([option["const"]] if "const" in option else [])
    if choices:
        return ", ".join(code(plain(choice)) for choice in choices)
    return KINDS[option["type"]](option, models)


def text_kind(option: dict[str, Any], models: dict[str, Any]) -> str:
    return f"text that matches {code(option['pattern'])}" if "pattern" in option else "text"


def number_kind(option: dict[str, Any], models: dict[str, Any]) -> str:
    noun = "whole number" if option["type"] == "integer" else "number"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{word} {option[limit]:,}" for limit, word in words.items() if limit in option]
    return " ".join([noun, " and ".join(limits)]) if limits else noun


def list_kind(option: dict[str, Any], models: dict[str, Any]) -> str:
    if "items" in option:
        return f"list of {kind(option['items'], models)}"
    places = [one_kind(place, models) for place in option["prefixItems"]]
    return f"list of {len(places)} values, each a {places[0]}"


def mapping_kind(option: dict[str, Any], models: dict[str, Any]) -> str:
    if referred(option["additionalProperties"]) == "MethodSpace":
        return "mapping from a method to a mapping with the keys above"
    return f"mapping to {kind(option['additionalProperties'], models)}"


Kind = Callable[[dict[str, Any], dict[str, Any]], str]
KINDS: dict[str, Kind] = {
    "string": text_kind,
    "integer": number_kind,
    "number": number_kind,
    "boolean": lambda option, models: "boolean",
    "array": list_kind,
    "object": mapping_kind,
}


def plain(value: Any) -> str:
    """Write a value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def default(name: str, key: dict[str, Any], required: list[str]) -> str:
    if name in required:
        return "required"
    value = key.get("default")
    return "optional" if value in (None, {}) else f"default {code(plain(value))}"


def forms(key: dict[str, Any], models: dict[str, Any]) -> Iterator[str]:
    """Yield an entry for each mapping that a key may be besides other values."""
    options = [inner for each in alternatives(key) for inner in (each, each.get("items", {}))]
    for name in dict.fromkeys(filter(None, map(referred, options))):
        model = models[name]
        fields = model["properties"]
        yield entry(f"{one_kind({'$ref': name}, models)}:", model["description"], LEVEL)
        for field, value in fields.items():
            opening = f"{code(field)}: {kind(value, models)}"
            if field not in model.get("required", []):
                opening += f"; {default(field, value, [])}"
            yield entry(opening, value["description"], 2 * LEVEL)


def methods_table() -> str:
    """Write the table of the dimensions of each method."""
    rows = [
        (
            code(method),
            ", ".join(map(code, names)),
            ", ".join(map(code, REPARAMETERIZATIONS.get(method, ()))) or "none",
        )
        for method, names in SPACES.items()
    ]
    header = ("method", "keys of `search.space`", "`reparameterization.type`, default first")
    text = "The keys of `search.space` that a method has; others are refused beside it."
    more = "What the metrics measure is in [metrics.md](metrics.md)."
    parts = [f"## Keys of each method\n\n{text}\n\n{table(header, rows)}", more, SEVERAL_METHODS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# docs/commands.md


def commands_page() -> str:
    """Write the page of the command line from its own help."""
    root = typer.main.get_command(app)
    verbs = [(name, verb) for name, verb in root.commands.items() if not verb.hidden]  # type: ignore[attr-defined]
    parts = [COMMANDS_OPENING, exit_codes()]
    for group in GROUPS:
        parts.append(f"## {group}\n")
        for name, verb in verbs:
            if verb.rich_help_panel == group:
                parts += verb_parts(name, verb)
    return "\n".join(parts)


def exit_codes() -> str:
    rows = [
        ("0", "done"),
        (str(JobFailed.exit_code), "the job failed"),
        (str(BadInput.exit_code), "bad input; nothing was started"),
        (str(Unreachable.exit_code), "something that is needed is missing or can't be reached"),
        (str(INTERRUPTED), "interrupted; the message names the command that goes on"),
        (str(TERMINATED), "ended by SIGTERM; as after an interrupt"),
    ]
    return f"## Exit codes\n\n{table(('code', 'meaning'), rows)}"


def verb_parts(name: str, verb: Any) -> Iterator[str]:
    """Yield a verb's heading, usage, help, arguments and options."""
    context = verb.context_class(verb, info_name=name)
    arguments = [each for each in verb.params if each.param_type_name == "argument"]
    needed = [each for each in verb.params if each.required and each not in arguments]
    options = [option_names(each.get_help_record(context)[0]) for each in needed]
    usage = " ".join(["orchestrator", name, *options, "[OPTIONS]", *map(argument_usage, arguments)])
    yield f"### {name}\n\n```text\n{usage}\n```\n"
    yield f"{wrapped(verb.help)}\n"
    lines = [line for each in verb.params if (line := parameter_line(each, context))]
    if lines:
        yield "".join(lines)


def argument_usage(argument: Any) -> str:
    dots = "..." if argument.nargs == -1 else ""
    usage = f"{argument_name(argument).removesuffix('...')}{dots}"
    return usage if argument.required else f"[{usage}]"


def argument_name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def parameter_line(parameter: Any, context: Any) -> str:
    """Write an argument or option with its help, as ``--help`` shows it."""
    record = parameter.get_help_record(context)
    if record is None:
        return ""
    names, text = record
    is_argument = parameter.param_type_name == "argument"
    opening = code(argument_name(parameter) if is_argument else option_names(names))
    text = literals(" ".join(text.split()))
    return filled(f"{opening}: {text}" if text else opening, "- ", "  ") + "\n"


def option_names(names: str) -> str:
    """Name the kind of value as metavars do: ``--port N`` for ``--port <int range>``."""
    shown = re.sub(r"<([^\s>]+)[^>]*>", lambda match: VALUE_NAMES[match.group(1)], names)
    return " ".join(shown.split())


VALUE_NAMES = {
    "str": "TEXT",
    "list[str]": "TEXT",
    "int": "N",
    "float": "X",
    "path": "PATH",
    "list[path]": "PATH",
}
"""The words for values of options that have no metavar."""


PAGES: dict[str, Callable[[], str]] = {"jobs.md": jobs_page, "commands.md": commands_page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
