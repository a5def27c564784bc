"""The files that a job takes to the cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import small_job, write_job

from orchestrator.cluster.submit import package as packing
from orchestrator.cluster.submit.package import code_files, pack, unpacked
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataFiles
from orchestrator.job.yaml import load_job

MODEL = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
    "notes.md": "no",
    "old.bin": "no",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a base model's folder with some files that are not needed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name, text in MODEL.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """Make a prompt's folder with a subfolder."""
    folder = tmp_path / "prompt"
    (folder / "inner").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "inner" / "weights.safetensors").write_text("w")
    return folder


def test_everything_that_the_spec_names_is_taken_along(
    tmp_path: Path, model: Path, prompt: Path
) -> None:
    """Data, the model's folder and prompts are packed, each in its own place.

    An unpacked job finds them in another folder; values that are no paths stay as they are.
    """
    inits = ["random", {"artifact": str(prompt)}, {"artifact": "registered@champion"}]
    job = small_job(tmp_path, base_model__id=str(model), search__space__init=inits)
    package = pack(job)
    assert package.elsewhere == ()
    written = tmp_path / "package"
    package.write(written)
    assert sorted(
        str(file.relative_to(written)) for file in written.rglob("*") if file.is_file()
    ) == [
        "inputs/base_model-id/config.json",
        "inputs/base_model-id/model.safetensors",
        "inputs/base_model-id/tokenizer.json",
        "inputs/data-path-test.jsonl",
        "inputs/data-path-train.jsonl",
        "inputs/data-path-validation.jsonl",
        "inputs/search-space-init-1/inner/weights.safetensors",
        "inputs/search-space-init-1/manifest.json",
        "job.yaml",
    ]
    text, copies = unpacked(written, tmp_path / "kept")
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    again = load_job(tmp_path / "again.yaml")
    assert again.base_model.id == str(tmp_path / "kept" / "base_model-id")
    assert isinstance(again.data.path, DataFiles) and isinstance(job.data.path, DataFiles)
    targets = {str(target): source for source, target in copies}
    for split, file in job.data.path:
        assert targets[getattr(again.data.path, split)].read_bytes() == Path(file).read_bytes()
    started = [init if isinstance(init, str) else init.artifact for init in again.search.space.init]
    assert started == ["random", f"{tmp_path}/kept/search-space-init-1", "registered@champion"]
    back = {"base_model": job.base_model, "data": job.data, "search": job.search}
    assert again.model_copy(update=back) == job


def test_names_of_the_hub_stay_names(tmp_path: Path) -> None:
    """A job that names no file packs nothing."""
    text = write_job(tmp_path, base_model__id="owner/model", data__path="owner/rows")
    package = pack(load_job(text))
    assert (package.files, package.elsewhere) == ((), ())
    assert (package.job.base_model.id, package.job.data.path) == ("owner/model", "owner/rows")


def test_what_the_nodes_have_too_is_not_packed(tmp_path: Path, model: Path) -> None:
    """Files below --shared are not packed and keep their absolute path; the rest is packed."""
    job = small_job(tmp_path, base_model__id=str(model))
    package = pack(job, [model])
    assert package.elsewhere == (str(model),) and package.job.base_model.id == str(model)
    assert len(package.files) == 3
    assert len(pack(job, [tmp_path]).files) == 0


def test_a_whole_path_that_is_not_here_is_the_clusters(tmp_path: Path) -> None:
    """An absolute path that does not exist here is taken to be on the cluster.

    A relative path that does not exist is BadInput.
    """
    job = small_job(tmp_path, base_model__id="/only/there")
    assert pack(job).elsewhere == ("/only/there",)
    with pytest.raises(BadInput, match=r"base_model.id: not/here/at-all does not exist"):
        pack(small_job(tmp_path, base_model__id="not/here/at-all"))
    with pytest.raises(BadInput, match=r"data.path.train: rows.jsonl does not exist"):
        pack(small_job(tmp_path, data__path={"train": "rows.jsonl"}))


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """A package above the cluster's limit is BadInput that names the largest file."""
    (model / "model.safetensors").write_bytes(b"0" * 20_000)
    monkeypatch.setattr(packing, "MOST_BYTES", 10_000)
    with pytest.raises(BadInput, match=r"(?s)model\.safetensors.* --shared"):
        pack(small_job(tmp_path, base_model__id=str(model)))


def test_the_code_is_this_package(tmp_path: Path) -> None:
    """The code package has all modules, under orchestrator/, without compiled files."""
    names = [file.name for file in code_files()]
    assert {
        "orchestrator/__init__.py",
        "orchestrator/cli/entry.py",
        "orchestrator/cluster/submit/package.py",
    } <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_a_package_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    """A package has no path of this machine, so that equal jobs get equal ids."""
    texts = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        package = pack(small_job(folder, base_model__id="owner/model"))
        texts.append((package.text, [(file.name, file.digest) for file in package.files]))
    assert texts[0] == texts[1] and str(tmp_path) not in json.dumps(texts)
