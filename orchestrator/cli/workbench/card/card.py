"""The text of a model card, in markdown, behind its metadata.

Texts of the job and of people (templates, labels, reasons) stand in code spans and blocks of code,
where they are shown and can't become markdown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from orchestrator.cli.workbench.card.facts import CardFacts, Place
from orchestrator.cli.workbench.card.metadata import card_data
from orchestrator.cli.workbench.card.usage import job_text, peft_code, server_commands
from orchestrator.data.template import Template
from orchestrator.errors import JobFailed
from orchestrator.job.labels import spelled
from orchestrator.utils.markdown import code, fenced, quoted, table
from orchestrator.utils.wording import BASELINE_NAMES, counted

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

Metrics = Mapping[str, float]
OWN = "this prompt"


def model_card(facts: CardFacts) -> ModelCard:
    """Write a version's card, and read it back as the hub's library does.

    Raises JobFailed if its metadata are not read back as they were written.
    """
    from huggingface_hub import ModelCard

    data = card_data(facts)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}\n")
    if card.data.to_dict() != data.to_dict():
        raise JobFailed(
            "the model card's metadata can't be read back", "export without --card, and report this"
        )
    return card


def _text(facts: CardFacts) -> str:
    sections = {
        "Task": _task(facts),
        "Data": _data(facts),
        "Results": _results(facts),
        "Use with PEFT": _peft(facts),
        "Use with prompt-orchestrator": _server(facts),
        "Limits": ["\n".join(f"- {limit}" for limit in _limits(facts))],
        "Licence": [_licence(facts)],
    }
    parts = [f"# {code(facts.name)}, version {facts.version}", _summary(facts)]
    for heading, paragraphs in sections.items():
        parts += [f"## {heading}", *paragraphs]
    return "\n\n".join(parts)


def _summary(facts: CardFacts) -> str:
    manifest = facts.manifest
    tokens = counted(manifest.num_virtual_tokens, "virtual token")
    if manifest.method == "prefix_tuning":
        tokens += ", as keys and values of every layer,"
    origin = (
        "It was imported from a PEFT folder."
        if facts.is_imported
        else f"It was trained for {counted(manifest.steps, 'step')} by "
        f"prompt-orchestrator {code(manifest.orchestrator_version)}."
    )
    return (
        f"A soft prompt ({code(manifest.method)}): {tokens} in front of the input of "
        f"{_linked(facts.base, '')}, whose own weights are unchanged. {origin}"
    )


def _linked(place: Place, prefix: str) -> str:
    """Name a model or data; names on the hub get a link, whose path starts with ``prefix``."""
    if place.kind == "hub":
        return f"[{code(place.name)}](https://huggingface.co/{prefix}{place.name})"
    kind = "a local folder or files" if place.kind == "local" else "built into prompt-orchestrator"
    return f"{code(place.name)} ({kind})"


def _task(facts: CardFacts) -> Iterator[str]:
    manifest = facts.manifest
    columns = ", ".join(code(column) for column in Template(manifest.template).columns)
    if manifest.verbalizer is None:
        answer = f"The model writes a text of up to {manifest.max_target_tokens} tokens"
    else:
        answer = f"The model chooses one of {counted(len(manifest.verbalizer), 'label')}"
    yield f"{answer} for a row with {columns or 'no column'}. The template makes its input:"
    yield fenced(manifest.template, "text")
    if manifest.verbalizer is not None:
        yield "Each label is scored as the text that stands for it (the verbalizer):"
        rows = [
            [code(spelled(entry.label)), code(quoted(entry.text))] for entry in manifest.verbalizer
        ]
        yield "\n".join(table(["label", "text"], rows))
    if (chat := manifest.chat) is not None:
        system = "" if chat.system is None else f" System message: {code(quoted(chat.system))}."
        yield f"The input is the user's turn in the base model's chat template.{system}"


def _data(facts: CardFacts) -> Iterator[str]:
    data = facts.manifest.data
    rows = [["data", _linked(facts.data, "datasets/")]]
    rows += [[f"{split} rows", f"{count:,}"] for split, count in data.rows.items()]
    rows.append(["sha256 of all rows", code(data.fingerprint)])
    if data.test_fingerprint:
        rows.append(["sha256 of the test rows", code(data.test_fingerprint)])
    yield "\n".join(table(["", ""], rows))


# Results


def _results(facts: CardFacts) -> Iterator[str]:
    manifest = facts.manifest
    if not any(manifest.metrics.values()):
        yield (
            "**This version has no metrics of its own**: nobody has measured it on the data above, "
            "so nothing is known of how good it is there."
        )
    elif facts.metric is not None:
        yield f"The search ranked its trials by {code(facts.metric.name)} on the validation rows."
    for split in sorted(manifest.metrics, key=lambda split: split != "test"):
        if manifest.metrics[split]:
            yield from _split_results(facts, split)
    yield from _seeds(facts)
    yield from _other_data(facts)
    yield from _aliases(facts)


def _split_results(facts: CardFacts, split: str) -> Iterator[str]:
    metrics = facts.manifest.metrics[split]
    rows: dict[str, list[str]] = {OWN: _values(metrics, metrics)}
    intervals = facts.intervals if split == "test" else None
    if intervals:
        rows["95 % interval"] = [_interval(intervals.get(name)) for name in metrics]
    for name, found in facts.manifest.baselines.items():
        if known := found.get(split):
            rows[BASELINE_NAMES.get(name) or code(name)] = _values(known, metrics)
    count = facts.manifest.data.rows.get(split)
    yield f"On the {code(split)} rows{'' if count is None else f' ({count:,})'}:"
    yield _metric_table(facts, metrics, rows)
    if intervals:
        yield (
            "The intervals come from samples of the test rows (bootstrap): other rows of the same "
            "kind would give values in them. They say nothing about other seeds or other data."
        )
    elif split == "test":
        yield "The outcomes of single test rows were not kept, so the confidence is unknown."


def _metric_table(facts: CardFacts, metrics: Metrics, rows: Mapping[str, list[str]]) -> str:
    header = [
        f"{code(name)}, lower is better" if facts.lower_is_better(name) else code(name)
        for name in metrics
    ]
    return "\n".join(table(["", *header], [[label, *cells] for label, cells in rows.items()]))


def _values(metrics: Metrics, columns: Metrics) -> list[str]:
    return [f"{metrics[name]:.4g}" if name in metrics else "" for name in columns]


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"


def _seeds(facts: CardFacts) -> Iterator[str]:
    config, spread = facts.manifest.config, facts.seeds
    if facts.is_imported:
        return
    if spread is None:
        seed = f"seed {code(config['seed'])}" if "seed" in config else "an unknown seed"
        yield f"This prompt was trained with {seed}. Its spread over seeds is not recorded."
        return
    own = facts.manifest.metrics.get("validation", {})
    rows = {
        f"{OWN}, seed {code(config.get('seed'))}": _values(own, spread.mean),
        f"mean of {counted(len(spread.seeds), 'seed')}": _values(spread.mean, spread.mean),
        "standard deviation": _values(spread.std, spread.mean),
    }
    names = ", ".join(map(str, spread.seeds))
    chosen = (
        "The seeds are fresh: the configuration was chosen before they were tried."
        if spread.fresh
        else "The search chose the configuration among others by these values, which flatters them."
    )
    yield f"The same configuration under seeds {names}, on the validation rows:"
    yield _metric_table(facts, spread.mean, rows)
    yield chosen


def _other_data(facts: CardFacts) -> Iterator[str]:
    if not facts.evaluations:
        return
    columns = dict.fromkeys(name for record in facts.evaluations for name in record.metrics)
    header = ["data", "split", "rows", *map(code, columns)]
    rows = [
        [
            code(record.data),
            code(record.split),
            f"{record.rows:,}",
            *_values(record.metrics, dict.fromkeys(columns, 0.0)),
        ]
        for record in facts.evaluations
    ]
    yield "On other data:"
    yield "\n".join(table(header, rows))


def _aliases(facts: CardFacts) -> Iterator[str]:
    for move in facts.moves:
        reason = f" Why: {code(move.reason)}" if move.reason else ""
        yield (
            f"When this was exported, the alias {code(move.alias)} was on this version, since "
            f"{code(move.at)}.{reason}"
        )


# Use


def _peft(facts: CardFacts) -> Iterator[str]:
    yield fenced(peft_code(facts), "python")
    if facts.family == "masked":
        yield (
            "An answer of this model fills the template's blank, with as many mask tokens as the "
            "answer has. The server below does that."
        )
    yield "Run one row at a time: PEFT puts padding between the prompt and the input."


def _server(facts: CardFacts) -> Iterator[str]:
    yield (
        "A server with many prompts on one base model, batching and OpenAI's API. `import` needs a "
        "job file with the task:"
    )
    yield fenced(job_text(facts), "yaml")
    yield fenced(server_commands(facts), "sh")


def _limits(facts: CardFacts) -> Iterator[str]:
    manifest = facts.manifest
    base = manifest.base_model
    rounding = "" if base.quantization == "none" else f", rounded to {code(base.quantization)}"
    yield (
        f"It works with these weights of the base model only (sha256 {code(base.fingerprint[:16])}"
        f"{rounding}), and is meaningless on any other model, also on a newer version of it."
    )
    yield "Inputs need the template above, to the character; other wording gives other answers."
    yield f"Inputs are cut to {manifest.max_input_tokens:,} tokens, the longest column first."
    if manifest.verbalizer is not None:
        yield "It gives one of its labels to any text, also to one that none of them suits."
    if not facts.evaluations:
        yield "It was not measured on other data than those above."
    yield "Virtual tokens are vectors, not words: what it asks of the model can't be read."
    yield "What the base model gets wrong, and its biases, it may get wrong too."


def _licence(facts: CardFacts) -> str:
    known = f"is {code(facts.licence)}" if facts.licence else "is not known here: see its own page"
    return (
        f"The licence of the base model {known}. It applies to the model that this prompt steers. "
        "The prompt's own licence is up to whoever publishes it."
    )
