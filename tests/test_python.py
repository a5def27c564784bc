"""Searches and registered prompts in Python, on a working directory of an earlier release."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from earlier_release import expected, unpacked
from peft import PeftConfig
from small_jobs import Command, small_job
from test_progress import SPECS, report

import orchestrator as po
from orchestrator.cli.progress import ConsoleProgress
from orchestrator.cli.python.notebook import NotebookProgress
from orchestrator.cli.python.searches import SearchResult, _as_guest, progress_display
from orchestrator.cluster.ray_internals.settings import SEARCH, set_defaults
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.trials import TrialStatus

MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A working directory with two searches and a registered version."""
    with unpacked() as folder:
        yield folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in that directory, with a cache of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture(scope="module")
def prompt(folder: Path) -> po.RegisteredPrompt:
    """The registered version, whose base model is loaded once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return po.load("finished:1")


# Searches


def test_trials_and_curves_are_data_frames(folder: Path) -> None:
    """The frames hold what the search's document and journal say, best trial first."""
    result = po.load_search("finished")
    document = json.loads((result.folder / "result.json").read_text())
    assert result.finished and result.document == document and result.job.name == "finished"
    trials = result.trials
    assert trials.index[0] == document["best"]["trial"] and len(trials) == 4
    for trial in document["trials"]:
        row = trials.loc[trial["id"]]
        assert (row.status, row.steps) == (trial["status"], trial["steps"])
        assert row["loss"] == trial["metrics"]["loss"]
        assert row.learning_rate == trial["config"]["learning_rate"]
    assert {"init", "num_virtual_tokens", "seed"} <= {*trials} and "bottleneck" not in trials
    curves = result.curves.pivot(index="step", columns="trial", values="loss")
    assert [*curves.columns] == sorted(trials.index) and curves.index[0] == 4
    best = result.curves[result.curves.trial == document["best"]["trial"]]
    assert best.loss.min() == document["best"]["metrics"]["validation"]["loss"]


def test_the_best_trial_stands_beside_the_baselines() -> None:
    """The best trial, the registered version and the baselines are those of the document."""
    result = po.load_search("finished")
    document = result.document
    assert result.best is not None
    assert vars(result.best).items() <= document["best"].items()
    assert result.model == "finished:1"
    frame = result.baselines
    assert frame.loc["tuned prompt", "test"] == document["best"]["metrics"]["test"]["loss"]
    assert (
        frame.loc["without a prompt", "test"] == document["baselines"]["zero_shot"]["test"]["loss"]
    )
    assert [*frame.columns] == ["validation", "test"] and len(frame) > 2


def test_a_search_that_is_not_finished_can_be_looked_at() -> None:
    """It has trials and a best one so far, and says how to go on."""
    result = po.load_search("interrupted")
    assert not result.finished and result.model is None and result.document == {}
    assert result.best is not None and [*result.best.metrics] == ["validation"]
    assert set(result.trials.index) >= {"t000", "t001"}
    assert f"orchestrator.resume('{result.id}')" in str(result)
    assert "not finished" in repr(result) and "not finished" in result._repr_html_()


def test_a_search_without_a_trial_has_empty_frames(folder: Path, tmp_path: Path) -> None:
    """A search that has begun has frames without rows, and no best trial."""
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("job.yaml", "search.json"):
        source = po.load_search("interrupted").folder / name
        (begun / name).write_bytes(source.read_bytes())
    result = SearchResult(SearchFolder(begun))
    assert result.best is None and result.trials.empty and result.curves.empty
    assert "step" in result.curves and "0 of 0" in result._repr_html_()


def test_the_report_is_the_page_of_the_command_line(tmp_path: Path, command: Command) -> None:
    """Both write the same page; a notebook shows it in a frame that runs no scripts."""
    page = po.load_search("finished").report(tmp_path / "page.html")
    said = command("report", "finished", "--out", tmp_path / "other.html", "--no-log", "--json")
    assert said.code == 0 and said.document["search"] == po.load_search("finished").id
    pages = [Path(page).read_text(), (tmp_path / "other.html").read_text()]
    # Figures have random ids.
    one, other = (re.sub(r"base64,[^\"]+", "", text) for text in pages)
    assert one == other and "<h1>" in one
    html = page._repr_html_()
    assert html.startswith("<iframe sandbox srcdoc=") and html.count("<") == 2


def test_a_search_is_shown_in_a_notebook(folder: Path) -> None:
    """Summary, curves and trials are shown; what a job's author wrote is escaped."""
    result = po.load_search("finished")
    html = result._repr_html_()
    assert "tuned prompt" in html and "data:image/svg+xml;base64," in html
    assert all(trial in html for trial in result.trials.index)
    job = result.job.model_copy(update={"name": MARKUP})
    document = result.document | {"search": MARKUP, "warnings": [MARKUP]}
    assert MARKUP not in SearchResult(result._folder, job, document)._repr_html_()
    trials = result._facts.trials
    trials[0].note = MARKUP
    del result.trials
    assert MARKUP in result.trials.note.tolist() and MARKUP not in result._repr_html_()
    listed = po.load_job("finished.yaml", [f"data.template='{{text}} {MARKUP}'"])
    assert "&lt;script&gt;" in listed._repr_html_()


def test_a_finished_search_is_not_run_again(
    capfd: pytest.CaptureFixture[str], command: Command
) -> None:
    """Resuming returns what was found, as the verb does, and shows nothing without progress."""
    assert command("resume", "finished", "--json").document == po.load_search("finished").document
    result = po.resume("finished", progress=False)
    assert result.document == po.load_search("finished").document
    assert "is finished" not in capfd.readouterr().err
    po.resume("finished")
    assert "is finished" in capfd.readouterr().err
    with pytest.raises(po.BadInput, match="no search 'nothing'"):
        po.load_search("nothing")


def test_an_interrupt_says_how_to_go_on_in_python() -> None:
    """The error for an interrupt names the call and the command that resume the search."""
    with pytest.raises(po.Interrupted) as found, _as_guest():
        raise po.Interrupted("interrupted", "orchestrator resume tiny-1")
    assert found.value.hint == (
        "orchestrator.resume('tiny-1') in Python, or orchestrator resume tiny-1"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A signal interrupts once; handlers and Ray's settings are then those of before."""
    # Ignored in the background jobs of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in SEARCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def search() -> None:
        with _as_guest():
            set_defaults(SEARCH)
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        search()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    signal.signal(signal.SIGINT, before)
    left = {name for name in SEARCH if name in os.environ and name.startswith(("RAY", "TUNE"))}
    assert left == {"RAY_USAGE_STATS_ENABLED"}


def test_a_search_in_a_thread_sets_no_handlers() -> None:
    """Only the main thread may set handlers, so a search in another thread goes without."""

    def search() -> object:
        with _as_guest():
            return signal.getsignal(signal.SIGTERM)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        assert threads.submit(search).result() == signal.getsignal(signal.SIGTERM)


def test_a_notebook_shows_an_error_without_our_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython asks an error for its lines; the traceback is there for those who want it."""
    with pytest.raises(po.BadInput) as found:
        po.load_search("nothing")
    assert found.value._render_traceback_() == [f"BadInput: {found.value}"]
    monkeypatch.setenv("ORCHESTRATOR_TRACEBACK", "1")
    assert "saved.py" in "".join(found.value._render_traceback_())


# Progress in a notebook


def test_a_notebook_has_one_output_that_is_updated(tmp_path: Path) -> None:
    """Lines and the table of trials replace each other in place, and are escaped."""
    outputs: list[list[str]] = []

    def show(html: str) -> Any:
        outputs.append([html])
        return outputs[-1].append

    progress = NotebookProgress(small_job(tmp_path), show)
    progress.stage("reading <b>data</b>")
    with progress.trials(SPECS, 3):
        progress.trial_started("t000", SPECS[0][1])
        progress.trial_reported("t000", report("t000", 4))
        spec = replace(SPECS[1][1], init_text=MARKUP)
        progress.trial_started("t003", spec)
        progress.trial_reported("t003", report("t003", 4, loss=1.0))
        for trial in ("t000", "t003"):
            progress.trial_ended(trial, TrialStatus.FINISHED, "")
    (output,) = outputs
    assert len(output) < 6, "the output was updated at every event"
    assert "&lt;b&gt;data&lt;/b&gt; ..." in output[0] and "t000" not in output[0]
    assert "t000" in output[-1] and "2 finished" in output[-1]
    assert "<script" not in output[-1] and "&lt;script" in output[-1]


def test_progress_goes_where_it_can_be_seen(tmp_path: Path) -> None:
    """Outside a notebook it is the command line's, and an object of one's own is taken as it is."""
    job = small_job(tmp_path)
    assert type(progress_display(job, True)) is ConsoleProgress
    own = NotebookProgress(job, lambda html: lambda newer: None)
    assert progress_display(job, own) is own


# Registered prompts


def test_a_prompt_answers_as_the_server_does(folder: Path, prompt: po.RegisteredPrompt) -> None:
    """Texts, rows, a series, a frame and a data set give the labels that were registered."""
    known = expected(folder)["answers"]
    texts = [row["text"] for row in known]
    labels = [row["label"] for row in known]
    frame = pd.DataFrame({"text": texts, "other": 1})
    inputs: list[Any] = [texts, [{"text": text} for text in texts], frame.text, frame]
    inputs.append(datasets.Dataset.from_dict({"text": texts}))
    for given in inputs:
        answers = prompt.classify(given)
        assert [answer["label"] for answer in answers] == labels
    assert answers[0]["probs"] == pytest.approx(known[0]["probs"], abs=1e-4)
    assert prompt.labels == (0, 1) and (prompt.name, prompt.version) == ("finished", 1)
    assert prompt.classify([]) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("a text", "a single text or row"),
        ({"text": "a"}, "a single text or row"),
        (3, "the input is a int"),
        (["a", 3], "row 2 is a int"),
        ([{"other": "a"}], r"row 1: a row lacks \['text'\]"),
    ],
)
def test_what_is_no_list_of_inputs_is_refused(
    prompt: po.RegisteredPrompt, inputs: Any, message: str
) -> None:
    """A single text would otherwise be read letter by letter."""
    with pytest.raises(po.BadInput, match=message):
        prompt.classify(inputs)


def test_a_prompt_generates_text(prompt: po.RegisteredPrompt) -> None:
    """A text for each input, the same for the same seed, and cut at a stop text."""
    texts = prompt.generate(["the quick", "a fox"], max_tokens=4)
    assert len(texts) == 2 and texts == prompt.generate(["the quick", "a fox"], max_tokens=4)
    drawn = [prompt.generate(["a"], temperature=2.0, seed=seed, max_tokens=6) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    letter = texts[0].strip()[1]
    assert letter not in prompt.generate(["the quick"], max_tokens=4, stop=letter)[0]


def test_a_prompt_is_evaluated_on_a_frame(folder: Path, prompt: po.RegisteredPrompt) -> None:
    """A frame gives the figures of the file with its rows, whole and by the values of a column."""
    frame = pd.read_json(folder / "train.jsonl", lines=True)
    frame["length"] = ["long" if len(text) > 30 else "short" for text in frame.text]
    found = prompt.evaluate(frame, by="length", log=False)
    same = prompt.evaluate(folder / "train.jsonl", log=False)
    assert found.metrics == same.metrics and found.document["metric"] == "loss"
    assert found.drop == pytest.approx(found.metrics["loss"] - prompt.metrics["test"]["loss"])
    assert found.groups.rows.to_dict() == frame.groupby("length").size().to_dict()
    assert found.labels.support.sum() == len(frame) == 80
    assert "own test split" in str(found) and "loss" in repr(found)
    renamed = frame.rename(columns={"text": "message"})
    assert prompt.evaluate(renamed, rename={"message": "text"}, limit=9, log=False).metrics
    with pytest.raises(po.BadInput, match="label"):
        prompt.evaluate(frame.assign(label=7), log=False)


def test_an_evaluation_is_kept_with_the_version(
    folder: Path, prompt: po.RegisteredPrompt, command: Command
) -> None:
    """By default the registry keeps the result, as after the verb."""
    assert prompt.evaluate(folder / "train.jsonl", limit=8).document["logged"]
    assert "on " in command("compare", "finished:1", "finished:1").out


def test_a_prompt_is_exported(prompt: po.RegisteredPrompt, tmp_path: Path) -> None:
    """PEFT reads the folder; a folder that exists is refused."""
    folder = prompt.export(tmp_path / "adapter")
    tokens = po.load_search("finished").trials.num_virtual_tokens
    assert PeftConfig.from_pretrained(str(folder)).num_virtual_tokens in {*tokens}
    with pytest.raises(po.BadInput, match="exists"):
        prompt.export(folder)


def test_a_prompt_is_shown_with_its_facts(prompt: po.RegisteredPrompt) -> None:
    """A notebook shows the page of the verb ``models``, escaped."""
    assert repr(prompt) == "<RegisteredPrompt finished:1>"
    html = prompt._repr_html_()
    assert "finished version 1" in html and "spam?" in html and html.count("<") == 2


def test_a_prompt_that_is_not_there_is_named() -> None:
    """Unknown names and versions are refused before a base model is loaded."""
    with pytest.raises(po.BadInput, match="finised"):
        po.load("finised")
    with pytest.raises(po.BadInput, match="finished"):
        po.load("finished:9")
