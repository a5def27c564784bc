"""The commands in docs/ are run if they need no cluster, engine or cloud, else parsed.

RUN lists the commands that are run, page by page in the page's order, on a small registry;
docs/decisions/0028-deploy-checks.md says so. Of the others, commands of our own, of Ray, of Serve
and of MLflow are parsed by their own command lines, including verbs, options and types. Other
programs' commands are read as shell, and the files that they name must exist.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from small_jobs import Command

from orchestrator import cli
from orchestrator.artifact import (
    BaseModelRecord,
    DataRecord,
    Manifest,
    PromptArtifact,
    VerbalizerEntry,
)
from orchestrator.registry import Registry

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "cluster").glob("*.md")])
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS_WITH_COMMANDS = {
    "first-job", "install", "kuberay", "operations", "registry", "scaling", "security", "serving",
    "troubleshooting",
}  # fmt: skip
ENDS_A_COMMAND = {"|", "&&", "||", ";"}
OTHERS = {
    ".", "aws", "base64", "cd", "chmod", "docker", "export", "helm", "kubectl", "make", "mkdir",
    "pg_restore", "python", "rm", "vllm",
}  # fmt: skip

RUN = {
    "first-job": [
        "orchestrator validate jobs/sms-spam.yaml",
        "mkdir -p -m 700 ~/.ray",
    ],
    "install": [
        "orchestrator validate jobs/quickstart.yaml",
        "deploy/kubernetes/secrets --compose deploy/compose/secrets",
        "orchestrator key web --file deploy/compose/secrets/keys.json",
        (
            "orchestrator key metrics --file deploy/compose/secrets/keys.json"
            " > deploy/compose/secrets/metrics"
        ),
        "chmod 644 deploy/compose/secrets/keys.json",
    ],
    "kuberay": [
        "orchestrator key web --file keys.json",
        "orchestrator key metrics --file keys.json > metrics.key",
        "rm metrics.key",
        "kubectl kustomize deploy/kubernetes/overlays/small",
    ],
    "operations": [
        "orchestrator models --json",
        "orchestrator key web-2026-07 --file keys.json --model sms-spam",
    ],
    "registry": [
        "orchestrator models",
        "orchestrator models sms-spam",
        "orchestrator models sms-spam@champion",
        "orchestrator compare sms-spam:1 sms-spam:2",
        "orchestrator promote sms-spam 2",
        'orchestrator rollback sms-spam --reason "worse on invoices"',
        "orchestrator models --json",
    ],
    "security": [
        "orchestrator key web --file keys.json --model sms-spam --per-minute 600",
        "orchestrator validate jobs/sms-spam.yaml --set base_model.allow_remote_code=false",
    ],
    "serving": [
        "orchestrator key web --file keys.json --model sms-spam --per-minute 600",
        "orchestrator canary sms-spam challenger --percent 10",
        "orchestrator canary sms-spam --end",
        "orchestrator promote sms-spam 2 --alias champion",
        "orchestrator rollback sms-spam",
        "orchestrator key metrics --file keys.json",
    ],
    "troubleshooting": ["orchestrator validate jobs/sms-spam.yaml"],
}


def page_of(name: str) -> Path:
    """Return the file of the page of a name."""
    return next(page for page in PAGES if page.stem == name)


def blocks(page: Path) -> list[str]:
    return FENCE.findall(page.read_text())


def lines(page: Path) -> list[str]:
    """Return a page's commands as people paste them, with continued lines joined."""
    joined = "".join(blocks(page)).replace("\\\n", " ")
    return [
        line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")
    ]


@dataclass(frozen=True)
class Simple:
    """A program with its arguments, without redirections and leading variables."""

    program: str
    arguments: tuple[str, ...]


def simple_commands(line: str) -> Iterator[Simple]:
    """Yield the programs of a line, one for each part of a pipe or list."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in ENDS_A_COMMAND:
            words.append(word)
            continue
        for place, one in enumerate(words):
            if one in (">", ">>", "<"):
                del words[place : place + 2]
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if words:
            yield Simple(words[0], tuple(words[1:]))
        words = []


def parse(command: Simple) -> str:
    """Parse a command with its program's own command line, without running it.

    Returns an empty string on success. The program's usage errors are raised.
    """
    group = command_line(command.program)
    context = group.make_context(command.program, list(command.arguments))
    rest: Any = context
    for _ in range(3):
        name, found, arguments = group.resolve_command(rest, [*rest._protected_args, *rest.args])
        rest = found.make_context(name, list(arguments), parent=rest)
        if not hasattr(found, "resolve_command"):
            return ""
        group = found
    return "no command was reached"


@lru_cache
def command_line(program: str) -> Any:
    """Return the command line object of a program that is written with click."""
    if program == "orchestrator":
        return typer.main.get_command(cli.app)
    if program == "ray":
        from ray.scripts.scripts import cli as ray

        return ray
    if program == "serve":
        from ray.serve.scripts import cli as serve

        return serve
    from mlflow.cli import cli as mlflow

    return mlflow


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_its_program_takes(page: Path) -> None:
    """bash parses every block, and the verbs, options and files in it exist."""
    for block in blocks(page):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
    for line in lines(page):
        for command in simple_commands(line):
            if command.program in ("orchestrator", "ray", "serve", "mlflow"):
                check_parses(command, line)
            elif "/" in command.program:
                assert (ROOT / command.program).is_file(), line
            else:
                assert command.program in OTHERS, f"{line!r}: who knows {command.program}?"
            for word in command.arguments:
                if (
                    re.match(r"(deploy|jobs|docs)/", word)
                    and "/secrets/" not in word
                    and "compose/secrets" not in word
                ):
                    assert (ROOT / word).exists(), f"{line!r} names {word}"


def check_parses(command: Simple, line: str) -> None:
    try:
        assert not parse(command), line
    except Exception as error:  # usage errors of click, or of the copy of click in typer
        raise AssertionError(f"{line!r}: {getattr(error, 'message', '') or error}") from error


@pytest.mark.parametrize(
    "wrong",
    ["orchestrator modles", "orchestrator models --jsn", "ray up", "orchestrator serve --port x"],
)
def test_a_wrong_command_would_be_noticed(wrong: str) -> None:
    """Unknown verbs and options, missing arguments and values of a wrong type are found."""
    (command,) = simple_commands(wrong)
    with pytest.raises(AssertionError, match=re.escape(wrong)):
        check_parses(command, wrong)


def test_pages_start_with_their_commands() -> None:
    """The first thing below a page's title is a command to type."""
    for name in STARTS_WITH_COMMANDS:
        text = page_of(name).read_text()
        assert text.startswith("# ") and "```sh" in text[:250], name


def test_links_lead_somewhere() -> None:
    """Links between pages and to files of the project have existing targets."""
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_what_is_said_to_be_run_stands_in_the_pages() -> None:
    """Every command in RUN is on its page, in the page's order."""
    for name, commands in RUN.items():
        there = iter(lines(page_of(name)))
        missing = [command for command in commands if command not in there]
        assert not missing, f"{name}: {missing}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions of sms-spam.

    The first is the champion; the second is better, and the challenger.
    """
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        registry = Registry("sqlite:///mlflow.db", cache_dir=folder / "cache")
        registry.check()
        with registry.start_search("sms-spam", {"trials": 1}, {}) as search:
            for number, accuracy in enumerate((0.8, 0.9), start=1):
                registry.register(
                    artifact(folder / f"artifact-{number}", accuracy), "sms-spam", search.run_id
                )
        registry.promote("sms-spam", 1)
        registry.promote("sms-spam", 2, "challenger")
    return folder


def artifact(folder: Path, accuracy: float) -> Path:
    base = BaseModelRecord(
        id="builtin:quickstart",
        revision="main",
        model_type="llama",
        hidden_size=8,
        vocab_size=100,
        context_length=128,
        fingerprint="f" * 64,
        tokenizer_digest="t" * 64,
    )
    manifest = Manifest(
        method="prompt_tuning",
        num_virtual_tokens=5,
        config={"init": "random", "num_virtual_tokens": 5, "learning_rate": 0.3, "seed": 0},
        template="{text}\nSpam or not?",
        target="label",
        verbalizer=(VerbalizerEntry(label=0, text=" ham"), VerbalizerEntry(label=1, text=" spam")),
        max_input_tokens=32,
        max_target_tokens=4,
        base_model=base,
        data=DataRecord(path="sms", fingerprint="d" * 64, rows={"train": 10, "test": 5}),
        metrics={"validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy}},
        baselines={"zero_shot": {"test": {"accuracy": 0.2}}},
        steps=100,
        search="sms-spam",
        trial="t1",
        orchestrator_version="0.1.0",
    )
    weights = np.random.default_rng(int(100 * accuracy)).normal(size=(5, 8)).astype(np.float32)
    return PromptArtifact(weights, manifest).save(folder)


@pytest.mark.parametrize("name", RUN)
def test_commands_do_what_the_page_says(
    name: str, store: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's commands succeed in order, in a copy of the project with two versions."""
    for folder in ("deploy", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.rmtree(tmp_path / "deploy" / "compose" / "secrets", ignore_errors=True)
    shutil.copy(store / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    for line in RUN[name]:
        parts = list(simple_commands(line))
        if parts[0].program == "orchestrator":
            said = command(*parts[0].arguments)
            assert said.code == 0, f"{line}: {said.err}"
            if ">" in line:
                Path(line.split(">")[1].strip()).write_text(said.out)
        elif parts[0].program == "kubectl" and shutil.which("kubectl") is None:
            pytest.skip("kubectl is not installed")
        else:
            done = subprocess.run(
                ["bash", "-euc", line], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"
