"""Prompts in other engines: model folders with virtual tokens, and embeddings for vLLM."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_models import STYLES, WITHOUT_SYSTEM, chat_folder
from models import WORDS, load, save_family, save_model, spaced_tokenizer
from small_jobs import Command
from test_artifact import manifest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orchestrator.artifact import BaseModelRecord, ChatRecord, PromptArtifact, VerbalizerEntry
from orchestrator.artifact.layout import expected_ids
from orchestrator.cli.workbench.other_engines import export_embeds, export_tokens
from orchestrator.data.chat import ChatFormat
from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone
from orchestrator.models.decoding import decode, start
from orchestrator.models.virtual_tokens import LOWEST
from orchestrator.registry import Registry
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt

P = 5
NEW = 8
FRONT, INSIDE = "{text}\nspam?", "say{*} {text}\n{*}spam?"
BASES = ("llama", "gpt2", "phi")
MORE_BASES = ("untied", "qwen2", "gemma3_text")
BOUNDED = {"gpt2": "normalization", "phi": "bias"}
"""Families whose head can hold a bound for every input, and what holds it."""


def text_of(count: int, seed: int) -> list[str]:
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(1, 5))) for _ in range(count)]


def register(
    registry: Registry, folder: Path, backbone: Backbone, name: str, **about: Any
) -> ServedPrompt:
    """Register a random prompt on a base model, and return it as it is served."""
    seed = torch.Generator().manual_seed(len(name))
    count = about.pop("count", P)
    scale = float(backbone.embed(torch.arange(20)).std())
    vectors = scale * torch.randn(count, backbone.table.shape[1], generator=seed)
    facts: dict[str, Any] = {
        "verbalizer": (VerbalizerEntry(label=0, text=" no"), VerbalizerEntry(label=1, text=" yes")),
        "template": FRONT, "num_virtual_tokens": count,
        "base_model": BaseModelRecord(**asdict(backbone.info)),
    }  # fmt: skip
    artifact = PromptArtifact(vectors.numpy(), manifest(**facts | about))
    saved = artifact.save(folder / f"{name}-artifact")
    with registry.start_search(name, {}, {}) as search:
        version = registry.register(saved, name, search.run_id)
        registry.set_alias(name, "champion", version)
    return load_prompt(backbone, saved, name, version)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def registry(place: Path) -> Registry:
    return Registry(f"sqlite:///{place}/mlflow.db", cache_dir=place / "cache" / "own")


class Exported:
    """A base model with two prompts, one with inner positions, and their token folder."""

    def __init__(self, place: Path, registry: Registry, base: str) -> None:
        folder = place / base
        if base in ("llama", "untied"):
            save_model(folder, tie_word_embeddings=base == "llama")
        else:
            save_family(folder, base)
        self.backbone = load(folder)
        self.prompts = [
            register(registry, place, self.backbone, f"{base}-front"),
            register(registry, place, self.backbone, f"{base}-inside", template=INSIDE),
        ]
        self.folder = place / f"{base}-tokens"
        names = [prompt.name for prompt in self.prompts]
        self.document = export_tokens(registry, names, self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        listed = json.loads((self.folder / "prompts.json").read_text())["prompts"]
        self.listed = {entry["name"]: entry for entry in listed}

    @property
    def virtual_ids(self) -> list[int]:
        return [token_id for entry in self.listed.values() for token_id in entry["ids"]]

    def inputs(self, prompt: ServedPrompt, texts: Sequence[str]) -> list[list[int]]:
        """The ids that stock software reads in the documented input."""
        pattern = self.listed[prompt.name]["input"]
        return [self.tokenizer(pattern.format(text=text))["input_ids"] for text in texts]


@pytest.fixture(
    scope="module",
    params=[*BASES, *(pytest.param(base, marks=pytest.mark.long) for base in MORE_BASES)],
)
def exported(request: pytest.FixtureRequest, place: Path, registry: Registry) -> Exported:
    return Exported(place, registry, request.param)


def our_tokens(
    backbone: Backbone, prompt: ServedPrompt, texts: Sequence[str], new: int = NEW
) -> list[list[int]]:
    """Our engine's greedy tokens."""
    ids = [prompt.encode(text, new) for text in texts]
    state = start(backbone, prompt.prepared, ids, [0] * len(ids))
    return decode(state, prompt.encoder.end_id or 0, new)


def stock_tokens(
    model: Any, inputs: Sequence[list[int]], end_id: int, new: int = NEW
) -> list[list[int]]:
    """The greedy tokens of transformers, of rows with equal lengths at a time."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    for length, rows in groupby(order, key=lambda row: len(inputs[row])):
        places = list(rows)
        ids = torch.tensor([inputs[row] for row in places])
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": end_id}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for row, answer in zip(places, made[:, length:].tolist(), strict=True):
            answers[row] = answer[: answer.index(end_id)] if end_id in answer else answer
    return [answers[row] for row in range(len(inputs))]


@pytest.mark.parametrize("index", [0, 1])
def test_stock_transformers_makes_our_greedy_tokens(exported: Exported, index: int) -> None:
    """100 rows, in float32, with virtual tokens in front and at inner positions.

    The folder is loaded by AutoModelForCausalLM and AutoTokenizer alone.
    """
    prompt, texts = exported.prompts[index], text_of(100, seed=index)
    end_id = prompt.encoder.end_id or 0
    made = stock_tokens(exported.model, exported.inputs(prompt, texts), end_id)
    assert made == our_tokens(exported.backbone, prompt, texts)
    assert len({tuple(answer) for answer in made}) > 10
    others = exported.inputs(exported.prompts[1 - index], texts)
    assert stock_tokens(exported.model, others, end_id) != made


def sampled(exported: Exported, texts: int, new: int = 12) -> torch.Tensor:
    """Tokens sampled at temperature 1 behind inputs of both prompts."""
    rows = [
        exported.inputs(prompt, ["is this message spam or ham?"])[0] for prompt in exported.prompts
    ]
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    made = []
    for row in rows:
        ids = torch.tensor([row] * (texts // len(rows)))
        answer = exported.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **options
        )
        made.append(answer[:, len(row) :].flatten())
    return torch.cat(made)


def count_virtual(exported: Exported, tokens: torch.Tensor) -> int:
    return int(torch.isin(tokens, torch.tensor(exported.virtual_ids)).sum())


def test_sampled_texts_contain_no_virtual_token(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 texts at temperature 1, by transformers.

    Where the head holds a bound, its logits alone do it, without ``suppress_tokens``. Rows of zeros
    in the head would be sampled.
    """
    by = exported.document["head"]["by"]
    assert by == BOUNDED.get(exported.document["base_model"].rsplit("/", 1)[-1], "avoided tokens")
    if by in BOUNDED.values():
        monkeypatch.setattr(exported.model.generation_config, "suppress_tokens", None)
    assert count_virtual(exported, sampled(exported, 1000)) == 0
    monkeypatch.setattr(exported.model.generation_config, "suppress_tokens", None)
    head = exported.model.get_output_embeddings()
    states = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for parameter in head.parameters():
        parameter.data[exported.virtual_ids] = 0
    assert count_virtual(exported, sampled(exported, 1000)) > 0
    head.load_state_dict(states)


def test_a_virtual_token_never_has_the_largest_logit(exported: Exported) -> None:
    """What the head promises holds for inputs that no text gives: 200 rows of random vectors."""
    seed = torch.Generator().manual_seed(3)
    width = exported.model.get_input_embeddings().weight.shape[1]
    vectors = 3 * torch.randn(200, 8, width, generator=seed)
    with torch.no_grad():
        logits = exported.model(inputs_embeds=vectors).logits.flatten(0, 1)
    virtual = logits[:, exported.virtual_ids]
    real = logits.clone()
    real[:, exported.virtual_ids] = -torch.inf
    assert (virtual < real.max(-1, keepdim=True).values).all()
    bound = exported.document["head"]["largest_logit"]
    if bound is None:
        # Each probability is below that of tokens that the model avoids, so below the average's.
        probabilities = logits.softmax(-1)[:, exported.virtual_ids]
        assert (probabilities < 1 / exported.backbone.info.vocab_size).all()
    else:
        assert virtual.max() <= bound <= 0
        assert (virtual < real.max(-1, keepdim=True).values - 50).all()


def test_a_head_with_a_bias_gives_the_lowest_logit(place: Path, exported: Exported) -> None:
    """The logit behind a bias is exact, and untied heads keep their other rows."""
    head, own = exported.model.get_output_embeddings(), exported.backbone.model
    before = own.get_output_embeddings().weight
    assert torch.equal(head.weight[: len(before)], before.float())
    assert exported.model.config.tie_word_embeddings is False
    if exported.document["head"]["by"] == "bias":
        assert exported.document["head"]["largest_logit"] == LOWEST


def test_each_virtual_token_is_one_id(exported: Exported) -> None:
    """The tokenizer neither splits nor normalises the words, and leaves them out of texts."""
    for entry in exported.listed.values():
        assert exported.tokenizer("".join(entry["tokens"]))["input_ids"] == entry["ids"]
        assert [exported.tokenizer.decode([one]) for one in entry["ids"]] == entry["tokens"]
        shown = exported.tokenizer.decode([5, *entry["ids"]], skip_special_tokens=True)
        assert shown == exported.tokenizer.decode([5])
        upper = entry["tokens"][0].upper()
        assert entry["ids"][0] not in exported.tokenizer(upper)["input_ids"]
    assert len(set(exported.virtual_ids)) == 2 * P


def test_a_message_becomes_the_input_of_a_bare_prompt(exported: Exported) -> None:
    """Without a chat template in the base model, a message fills the prompt's own template."""
    for prompt in exported.prompts:
        message = [{"role": "user", "content": "a fox"}]
        text = exported.tokenizer.apply_chat_template(message, tokenize=False, prompt=prompt.name)
        assert exported.tokenizer(text)["input_ids"] == exported.inputs(prompt, ["a fox"])[0]
    with pytest.raises(Exception, match="takes one message"):
        exported.tokenizer.apply_chat_template(message * 2, tokenize=False)


# Chat


def chat_prompt(
    registry: Registry, place: Path, style: str, name: str, template: str, **about: Any
) -> tuple[Backbone, ServedPrompt]:
    backbone = load(chat_folder(style))
    record = ChatRecord(template_sha256=ChatFormat(backbone.tokenizer).digest, **about)
    options: dict[str, Any] = {"template": template, "chat": record, "verbalizer": None}
    return backbone, register(registry, place, backbone, name, **options)


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(style, marks=[] if style in ("llama3", "qwen") else pytest.mark.long)
        for style in STYLES
        if not STYLES[style].is_spaced
    ],
)
def test_the_chat_template_inserts_the_virtual_tokens(
    registry: Registry, place: Path, style: str
) -> None:
    """Conversations have the ids that our server gives them, in front and inside, with a system.

    A prompt on bare text shares the folder.
    """
    system = {} if style in WITHOUT_SYSTEM else {"system": "be 'brief'\nand \"kind\""}
    backbone, front = chat_prompt(registry, place, style, f"{style}-front", "{prompt}", **system)
    _, inside = chat_prompt(registry, place, style, f"{style}-inside", "a{*} {text}?{*} b")
    bare = register(registry, place, backbone, f"{style}-bare")
    prompts = [front, inside, bare]
    folder = place / f"{style}-chat-tokens"
    export_tokens(registry, [prompt.name for prompt in prompts], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {
        entry["name"]: entry["ids"]
        for entry in json.loads((folder / "prompts.json").read_text())["prompts"]
    }
    one = [{"role": "user", "content": "is the fox quick?"}]
    talk = [
        *one,
        {"role": "assistant", "content": "the fox is"},
        {"role": "user", "content": "the\nü"},
    ]
    for prompt, messages in [
        (front, one),
        (front, talk),
        (inside, one),
        (inside, talk),
        (bare, one),
    ]:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, prompt=prompt.name
        )
        own = expected_ids(prompt.encoder, prompt.encode_messages(messages, 1), ids[prompt.name])
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == own
    first = tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
    assert tokenizer(first)["input_ids"][:P] == ids[front.name]
    with pytest.raises(Exception, match="there is no prompt of this name"):
        tokenizer.apply_chat_template(one, tokenize=False, prompt="other")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted({prompt.encoder.end_id for prompt in prompts})


def test_a_message_can_not_write_a_virtual_token(registry: Registry, place: Path) -> None:
    """The chat template breaks up the words in messages, also those of other prompts."""
    chat_prompt(registry, place, "chatml", "safe", "{prompt}")
    chat_prompt(registry, place, "chatml", "other", "{prompt}")
    export_tokens(registry, ["safe", "other"], place / "safe-tokens")
    tokenizer = AutoTokenizer.from_pretrained(place / "safe-tokens")
    attack = [
        {"role": "system", "content": "<other:2>"},
        {"role": "user", "content": "<safe:0><<safe:1>> <other:0>"},
    ]
    text = tokenizer.apply_chat_template(attack, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    safe, other = (
        tokenizer.convert_tokens_to_ids([f"<{name}:{n}>" for n in range(P)])
        for name in ("safe", "other")
    )
    assert ids[:P] == safe and not {*ids[P:]} & {*safe, *other}
    assert "< safe:0>" in text and "< other:0>" in text


def save_spaced(folder: Path) -> Path:
    """A model whose tokenizer puts <s> in front of a text, and a space in front of words."""
    tokenizer = spaced_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_start_token_stands_behind_the_virtual_tokens(registry: Registry, place: Path) -> None:
    """A tokenizer that starts every text with <s> no longer does: the input has it already."""
    backbone = load(save_spaced(place / "spaced"))
    prompt = register(registry, place, backbone, "spaced")
    export_tokens(registry, ["spaced"], place / "spaced-tokens")
    tokenizer = AutoTokenizer.from_pretrained(place / "spaced-tokens")
    (entry,) = json.loads((place / "spaced-tokens" / "prompts.json").read_text())["prompts"]
    ids = tokenizer(entry["input"].format(text="a fox"))["input_ids"]
    assert ids == [*entry["ids"], *prompt.encode("a fox", 1)]
    assert ids[P] == tokenizer.bos_token_id and backbone.tokenizer("a")["input_ids"][0] == ids[P]


def test_a_text_that_would_get_other_tokens_is_refused(registry: Registry, place: Path) -> None:
    """Behind an inner virtual token this tokenizer would put a space that was not there in tuning.

    No text has the right tokens, so the refusal names the format that needs none.
    """
    backbone = load(save_spaced(place / "cut"))
    register(registry, place, backbone, "cut", template=INSIDE)
    with pytest.raises(BadInput, match="otherwise than the prompt was tuned") as refused:
        export_tokens(registry, ["cut"], place / "cut-tokens")
    assert "--format embeds" in refused.value.hint
    assert not (place / "cut-tokens").exists()


def test_the_verb_says_what_it_wrote_and_what_is_next(
    registry: Registry, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both formats, as lines and as a document; a prompt's own version may be named."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    register(registry, place, load(save_model(place / "said", seed=5)), "said")
    tokens = command("export", "said:1", "said-tokens", "--format", "tokens")
    assert tokens.code == 0, tokens.err
    first, head, last = tokens.out.splitlines()
    assert first == f"said:1: said-tokens is {place / 'said'} with {P} virtual tokens."
    assert "Greedy decoding never produces them" in head
    assert last.startswith("next: vllm serve said-tokens   or   AutoModelForCausalLM")
    readme = (place / "said-tokens" / "README.md").read_text()
    assert "In a trial behind the prompts the largest was" in readme
    embeds = command("export", "said", "said-embeds", "--format", "embeds")
    assert embeds.out.splitlines()[0] == (f"said:1 is in said-embeds, as {P} vectors and a client.")
    document = command("export", "said", "again", "--format", "embeds", "--json").document
    assert document["format"] == "embeds" and document["num_virtual_tokens"] == P


# Refusals


def test_what_a_token_folder_refuses(
    registry: Registry, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes, other families, rounded weights, equal names and other models, each by its name.

    Nothing is written.
    """
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    one, other = load(save_model(place / "one", seed=1)), load(save_model(place / "two", seed=2))
    register(registry, place, one, "kept")
    register(registry, place, other, "elsewhere")
    record = BaseModelRecord(**asdict(one.info))
    for name, changes in {
        "t5": {"model_type": "t5"}, "bert": {"model_type": "bert"},
        "rounded": {"quantization": "int4"},
    }.items():  # fmt: skip
        register(registry, place, one, name, base_model=record.model_copy(update=changes))
    taken = save_model(place / "taken", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(taken)
    tokenizer.add_tokens(["<taken:4>"])
    LlamaForCausalLM.from_pretrained(taken).save_pretrained(taken)
    model = AutoModelForCausalLM.from_pretrained(taken)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(taken)
    tokenizer.save_pretrained(taken)
    register(registry, place, load(taken), "taken")
    there = set(place.iterdir())
    for models, told in {
        ("t5",): "on a seq2seq model (t5)", ("bert",): "on a masked model (bert)",
        ("rounded",): "rounded to int4", ("kept", "kept:1"): "would have the same tokens",
        ("kept", "elsewhere"): "elsewhere:1 is on base model", ("taken",): "has a token <taken:4>",
        ("none",): "none",
    }.items():  # fmt: skip
        said = command("export", *models, "refused", "--format", "tokens")
        assert said.code == 2 and told in said.err, said.err
        assert "next: " in said.err
    assert "named: kept, elsewhere" in command("export", "kept", "elsewhere", "refused").err
    assert "exists already" in command("export", "kept", place, "--format", "tokens").err
    assert command("export", "kept", "refused", "--format", "gguf").code == 2
    assert command("export", "kept", "refused", "--base-model", "x").code == 2
    moved = command("export", "kept", "refused", "--format", "tokens", "--base-model", taken)
    assert moved.code == 2 and "another base model" in moved.err
    assert set(place.iterdir()) - there <= {place / "cache"}


def test_a_folder_that_fails_half_way_is_not_there(
    registry: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the model is written leaves nothing behind."""
    register(registry, place, load(save_model(place / "half", seed=4)), "half")
    there = set(place.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(BadInput, match="No space left"):
        export_tokens(registry, ["half"], place / "half-tokens")
    assert set(place.iterdir()) == there


# Embeddings for vLLM


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """A server in the place of vLLM's, and the bodies that it was sent."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = json.dumps({"choices": [{"text": " yes"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def client_of(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_client", folder / "client.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("template", [FRONT, INSIDE])
@pytest.mark.parametrize("make", [save_model, save_spaced])
def test_the_client_sends_the_embeddings_that_our_engine_reads(
    registry: Registry, place: Path, requests: tuple[str, list[Any]], make: Any, template: str
) -> None:
    """The exported client joins virtual tokens and texts, and ends, as the engine does.

    That includes a tokenizer that puts spaces in front of texts, but not behind virtual tokens.
    """
    name = f"{make.__name__}-{'inside' if template == INSIDE else 'front'}"
    backbone = load(make(place / f"{name}-base"))
    prompt = register(registry, place, backbone, name, template=template)
    document = export_embeds(registry, name, place / f"{name}-embeds")
    assert document["num_virtual_tokens"] == P
    client = client_of(place / f"{name}-embeds")
    client.SERVER, bodies = requests
    assert client.ask({"text": "is this spam?"}, max_tokens=3) == " yes"
    (body,) = bodies
    data = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
    sent = torch.load(data, weights_only=True)
    ids = prompt.encode("is this spam?", 1)
    table = client.model.get_input_embeddings().weight
    rows = torch.cat([table, client.virtual])
    virtual = list(range(len(table), len(rows)))
    assert torch.equal(sent, rows[expected_ids(prompt.encoder, ids, virtual)])
    assert body["stop_token_ids"] == [prompt.encoder.end_id] and body["max_tokens"] == 3
    assert "prompt" not in body  # vLLM 0.32 takes it as a further prompt and refuses an empty one
    assert "--enable-prompt-embeds" in (place / f"{name}-embeds" / "README.md").read_text()


def test_embeddings_that_vllm_would_scale_are_refused(registry: Registry, place: Path) -> None:
    """Gemma scales its embeddings; vLLM does so with those that it is sent too."""
    backbone = load(save_family(place / "scaled", "gemma3_text"))
    register(registry, place, backbone, "scaled")
    with pytest.raises(BadInput, match="scales its embeddings"):
        export_embeds(registry, "scaled", place / "scaled-embeds")


@pytest.mark.long
def test_smollm2_as_tokens(registry: Registry, place: Path, smollm2_folder: Path) -> None:
    """Greedy tokens of 20 conversations are our engine's; 1,000 sampled texts are clean.

    The texts are sampled from the head's logits alone, without ``suppress_tokens``.
    """
    backbone = load(smollm2_folder)
    record = ChatRecord(template_sha256=ChatFormat(backbone.tokenizer).digest)
    about = {"template": "{prompt}", "chat": record, "verbalizer": None, "count": 20}
    prompt = register(registry, place, backbone, "smollm2", **about)
    document = export_tokens(registry, ["smollm2"], place / "smollm2-tokens")
    assert document["head"]["largest_probability"] < 1e-6
    model = AutoModelForCausalLM.from_pretrained(place / "smollm2-tokens").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "smollm2-tokens")
    texts = text_of(20, seed=0)
    inputs = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )["input_ids"]
        for text in texts
    ]
    end_id = prompt.encoder.end_id or 0
    assert stock_tokens(model, inputs, end_id) == our_tokens(backbone, prompt, texts)
    model.generation_config.suppress_tokens = None
    virtual = torch.tensor(tokenizer.convert_tokens_to_ids([f"<smollm2:{n}>" for n in range(20)]))
    torch.manual_seed(0)
    for text in inputs[:4]:
        ids = torch.tensor([text] * 250)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=12,
        )  # fmt: skip
        assert not torch.isin(made[:, len(text) :], virtual).any()
