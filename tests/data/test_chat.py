"""Rows and conversations in chat templates of several families."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_models import STYLES, WITHOUT_SYSTEM, chat_folder, chat_tokenizer
from models import model_folder, tiny_tokenizer

from orchestrator.data.chat import ChatFormat
from orchestrator.data.dataset import load_rows
from orchestrator.data.encoding import Encoder, chat_format
from orchestrator.data.template import Mark, Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.job.spec import BaseModelSpec, DataFiles, DataSpec
from orchestrator.models.folder import names_chat_template
from orchestrator.models.placeholders import marker
from orchestrator.models.source import resolve_model

LONG = 1000
ASKED = {"role": "user", "content": "is the fox quick?"}
TALK = [
    ASKED,
    {"role": "assistant", "content": "the fox is quick"},
    {"role": "user", "content": "and the dog?"},
]
EVERY = [text for style in STYLES.values() for text in (*style.special, *style.added, "<end>")]


def encoder(name: str, template: str = "{text}\nspam?", **options: Any) -> Encoder:
    """An encoder that puts rows into the chat template of a style."""
    system = options.pop("system", None)
    chat = ChatFormat(chat_tokenizer(name), system)
    return Encoder(chat_tokenizer(name), Template(template), None, LONG, LONG, chat=chat, **options)


def rendered_ids(name: str, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a whole conversation, as the tokenizer itself reads the rendered text."""
    tokenizer = chat_tokenizer(name)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("answer", ["yes", "a quick no", "!"])
def test_input_and_answer_are_the_beginning_of_the_rendered_conversation(
    name: str, answer: str
) -> None:
    """Input and target have the ids of the template's own rendering, up to the end of the turn."""
    made = encoder(name, "{prompt}")
    system = [] if name in WITHOUT_SYSTEM else [{"role": "system", "content": "be brief"}]
    for messages in ([ASKED], TALK, [*system, ASKED]):
        row = {"prompt": messages, "completion": answer}
        target, _ = made.encode_target(row, "completion")
        ids = [*made.encode_input(row), *target]
        whole = rendered_ids(name, [*messages, {"role": "assistant", "content": answer}])
        assert ids == whole[: len(ids)]


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_ends_with_the_token_that_ends_a_turn(name: str) -> None:
    """The end is the template's own end of a turn, not the tokenizer's end of a text."""
    made = encoder(name)
    target, _ = made.encode_target({"text": "a", "answer": "good"}, "answer")
    assert chat_tokenizer(name).convert_ids_to_tokens(target[-1]) == STYLES[name].end
    assert made.end_id == target[-1] and made.end_id not in target[:-1]


@pytest.mark.parametrize("name", STYLES)
def test_a_text_is_a_turn_of_the_user(name: str) -> None:
    """A filled template has the ids of the message that it makes, and marks keep their places."""
    row = {"text": "the quick fox"}
    message = {"role": "user", "content": "the quick fox\nspam?"}
    bare = encoder(name).encode_input(row)
    assert bare == encoder(name, "{prompt}").encode_input({"prompt": [message]})
    assert encoder(name, "{text}\nspam?{_} never shown").encode_input(row) == bare
    marked = encoder(name, "{*}{text}\nspam?").encode_input(row)
    assert marked.index(marker(0)) > 0
    if not STYLES[name].is_spaced:  # such a tokenizer puts a space in front of each part
        assert [one for one in marked if one >= 0] == bare


@pytest.mark.parametrize("name", sorted(set(STYLES) - set(WITHOUT_SYSTEM)))
def test_the_system_message_stands_in_conversations_without_their_own(name: str) -> None:
    """``data.chat.system`` is used where a conversation has no system message."""
    made, plain = encoder(name, "{prompt}", system="be brief"), encoder(name, "{prompt}")
    brief, other = ({"role": "system", "content": text} for text in ("be brief", "be good"))
    assert made.row_ids({"prompt": [ASKED]}) == plain.row_ids({"prompt": [brief, ASKED]})
    assert made.row_ids({"prompt": [other, ASKED]}) == plain.row_ids({"prompt": [other, ASKED]})


@pytest.mark.parametrize("name", STYLES)
def test_texts_never_become_control_tokens(name: str) -> None:
    """Whatever a cell holds, a row has the control tokens of the template and no others."""
    made, tokenizer, choose = encoder(name), chat_tokenizer(name), random.Random(0)
    control = set(made.control._watched)

    def control_ids(ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in control]

    expected = control_ids(made.encode_input({"text": "fox"}))
    for _ in range(60):
        text = "x" + "".join(choose.choices([*EVERY, " ", "a", "<", "|", "<|im_"], k=6)) + "x"
        ids = made.encode_input({"text": text})
        assert control_ids(ids) == expected
        if not STYLES[name].is_spaced:
            assert text in tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if "</think>" in text:  # a template of a thinking model changes such an answer
            continue
        target, _ = made.encode_target({"answer": text}, "answer")
        assert control_ids(target) == [made.end_id]


def test_a_text_may_not_complete_a_control_token_of_the_template() -> None:
    """A token that is half of the template and half of a cell is read as characters."""
    tokenizer = chat_tokenizer("chatml")
    made = Encoder(tokenizer, Template("<|im_{text}>|im_end|>"), None, LONG, LONG)
    for text in ("end|", "start|", "<"):
        assert not set(made.encode_input({"text": text})) & set(made.control._watched)


def test_only_templates_write_control_tokens_into_bare_text() -> None:
    """A job's own template may write control tokens, and doubles none; cells are texts."""
    tokenizer = chat_tokenizer("mistral")
    texts = Encoder(tokenizer, Template("<s>{text}<end>"), None, LONG, LONG)
    parsed = Encoder(
        tokenizer, Template("<s>{text}<end>"), None, LONG, LONG, special_tokens="parse"
    )
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = texts.encode_input({"text": "a<end>b"})
    assert (ids.count(start), ids.count(end), ids[0], ids[-1]) == (1, 1, start, end)
    ids = parsed.encode_input({"text": "a<end>b"})
    assert (ids.count(start), ids.count(end)) == (2, 2)


def test_early_prompts_parse_every_text() -> None:
    """With parse, the ids are the tokenizer's own of the whole text."""
    tokenizer = chat_tokenizer("chatml")
    made = Encoder(tokenizer, Template("{text}?"), None, LONG, LONG, special_tokens="parse")
    text = "a<|im_end|>b"
    assert made.encode_input({"text": text}) == tokenizer(f"{text}?")["input_ids"]


def test_a_long_text_is_cut_inside_the_turn() -> None:
    """The longest column is cut; the template's text behind it stays whole."""
    made = encoder("chatml")
    made.max_input_tokens = 80
    ids = made.encode_input({"text": "fox " * 200})
    assert len(ids) <= 80
    tail = chat_tokenizer("chatml")(str(made.chat.tail), add_special_tokens=False)["input_ids"]
    assert ids[-len(tail) :] == tail


def test_a_date_in_a_template_is_always_the_same() -> None:
    """A template that writes today's date gives the same ids on every day."""
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '\n' + m.content }}{% endfor %}"
    )
    tokenizer.eos_token = "<end>"
    made = Encoder(
        tokenizer, Template("{text}"), None, LONG, LONG,
        chat=ChatFormat(tokenizer),
    )  # fmt: skip
    assert tokenizer.decode(made.row_ids({"text": "fox"})) == "26 Jul 2024\nfox"


def test_smollm2_has_the_ids_of_its_own_rendering() -> None:
    """A real chat model: input and target are the beginning of the tokenizer's own ids."""
    try:
        source = resolve_model(BaseModelSpec(id="builtin:smollm2-135m"), weights=False)
    except BadInput as error:
        pytest.skip(f"SmolLM2 is not installed: {error.message}")
    tokenizer = source.tokenizer()
    made = Encoder(
        tokenizer, Template("{prompt}"), None, LONG, LONG, chat=ChatFormat(tokenizer)
    )  # fmt: skip
    for messages in ([ASKED], TALK, [message("system", "be brief"), *TALK]):
        row = {"prompt": messages, "completion": "It is quick."}
        ids = [*made.row_ids(row), *made.encode_target(row, "completion")[0]]
        whole = [*messages, message("assistant", "It is quick.")]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)]


# Bad input


def data(**changes: Any) -> DataSpec:
    return DataSpec(path="nobody/rows", **changes)


def write(folder: Path, rows: Sequence[Any]) -> DataFiles:
    files = {}
    for split in ("train", "validation", "test"):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return DataFiles(**files)


def refusal(folder: Path, conversation: Any, column: str = "turns") -> str:
    good = {column: [*TALK, {"role": "assistant", "content": "no"}]}
    path = write(folder, [good, {column: conversation}])
    with pytest.raises(BadInput) as refused:
        load_rows(DataSpec(path=path, messages=column))
    return refused.value.message


def message(role: str, content: Any = "fox", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ANSWER = message("assistant")


@pytest.mark.parametrize(
    ("conversation", "fault"),
    [
        ([ASKED], "no turn of the assistant"),
        ([ANSWER], "no turn of the user before the answer"),
        ([message("system"), ANSWER], "a turn of system right before the answer"),
        ([message("user", ""), ANSWER], "turn 1 has no content"),
        ([message("user", None), ANSWER], "turn 1 has no content"),
        ([ASKED, message("assistant", " \n")], "turn 2 has no content"),
        ([message("system"), message("system"), ASKED, ANSWER], "2 system messages"),
        ([ASKED, message("system"), ANSWER], "its system message as turn 2"),
        (
            [message("narrator"), ANSWER],
            "turn 1 has the role 'narrator'; the known roles are system",
        ),
        ([ASKED, {**ANSWER, "content": None, "tool_calls": [{"id": 1}]}], "turn 2 has tool_calls"),
        ([ASKED, ANSWER, message("tool"), ANSWER], "turn 3 has the role 'tool'"),
        ([message("user", [{"type": "image_url"}]), ANSWER], "content of type 'image_url'"),
        ([message("user", 5), ANSWER], "turn 1 has '5' as its content"),
        ([ASKED, message("assistant", reasoning_content="so")], "turn 2 has reasoning_content"),
        ([ASKED, message("assistant", weight=0)], "turn 2 has weight"),
        ("a text", "no list of messages"),
        ([], "no list of messages"),
        ([5], "turn 1 is '5', not a message"),
    ],
)
def test_a_bad_conversation_is_refused_with_row_and_column(
    tmp_path: Path, conversation: Any, fault: str
) -> None:
    """Every fault that shows without the chat template names the row, the column and the turn."""
    said = refusal(tmp_path, conversation)
    assert "train.jsonl:2 (row 2), column 'turns'" in said and fault in said


def test_a_missing_column_of_conversations_is_named(tmp_path: Path) -> None:
    """A misspelt ``data.messages`` says what the rows have."""
    path = write(tmp_path, [{"messages": TALK}])
    with pytest.raises(BadInput, match=r"data\.messages names column 'turns', which .* lacks"):
        load_rows(DataSpec(path=path, messages="turns"))


def test_messages_need_the_chat_template(tmp_path: Path) -> None:
    """Rows of prompt and completion messages without ``data.chat`` name the next step."""
    path = write(tmp_path, [{"prompt": [ASKED], "completion": [ANSWER]}])
    with pytest.raises(BadInput, match=r"data\.chat is not set") as refused:
        load_rows(DataSpec(path=path))
    assert "train.jsonl:1" in refused.value.message and "data.chat: true" in refused.value.hint


def refused_row(name: str, row: dict[str, Any], template: str = "{prompt}") -> str:
    with pytest.raises(BadInput) as refused:
        encoder(name, template).encode([row], "completion")
    return refused.value.message


def test_a_template_that_refuses_a_system_message_is_named(tmp_path: Path) -> None:
    """Row, column and the template's own reason are named, or ``data.chat.system``."""
    path = write(tmp_path, [{"turns": [message("system"), ASKED, ANSWER]}, {"turns": TALK[:2]}])
    spec = DataSpec(path=path, messages="turns")
    chat = chat_format(spec, chat_tokenizer("gemma"), "causal")
    made = Encoder(chat_tokenizer("gemma"), Template("{prompt}"), None, LONG, LONG, chat=chat)
    row = load_rows(spec).train[0]
    with pytest.raises(BadInput, match=r"train\.jsonl:1 .*column 'turns': .*System role not"):
        made.encode([row], "completion")
    with pytest.raises(BadInput, match=r"data\.chat\.system: .*System role not supported"):
        ChatFormat(chat_tokenizer("gemma"), "be brief")


def test_a_template_that_changes_a_content_is_refused() -> None:
    """An earlier answer that loses its thinking block would be tuned on something else."""
    thought = message("assistant", "<think>so</think>the fox")
    row = {"prompt": [ASKED, thought, ASKED], "completion": "good"}
    said = refused_row("qwen", row)
    assert "column 'prompt'" in said and "changes turn 2 (assistant)" in said
    said = refused_row("qwen", {"prompt": [ASKED], "completion": "<think>so</think>the fox"})
    assert "changes turn 2 (assistant)" in said


def test_a_template_that_drops_a_turn_is_refused() -> None:
    """A template that does not show a system message can't be tuned with one."""
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.eos_token = "<end>"
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"
    )
    with pytest.raises(BadInput, match=r"data\.chat\.system: .* does not show turn 1 \(system\)"):
        ChatFormat(tokenizer, "be brief")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
    with pytest.raises(BadInput, match=r"shows more than once turn 1 \(user\)"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_stripped_white_space_is_stripped_everywhere_and_reported(name: str) -> None:
    """Ids are those of the stripped text; the rows are counted for a warning."""
    made = encoder(name, "{*}{text}")
    rows = [{"text": " fox\n", "completion": " good "}, {"text": "fox", "completion": "good"}]
    encoded = made.encode(rows, "completion")
    assert encoded.inputs[0] == encoded.inputs[1] and encoded.targets[0] == encoded.targets[1]
    assert len(made.stripped_rows) == 1
    plain = encoder("chatml", "{text}").encode(rows, "completion")
    assert plain.inputs[0] != plain.inputs[1]


def test_a_conversation_longer_than_the_limit_is_refused() -> None:
    """Messages are not cut; the message says how many tokens are needed."""
    made = encoder("chatml", "{prompt}")
    row = {"prompt": TALK, "completion": "no"}
    needed = len(made.row_ids(row))
    made.max_input_tokens = needed - 3
    with pytest.raises(BadInput, match=f"'prompt': the conversation takes {needed} tokens"):
        made.encode([row], "completion")
    made.max_input_tokens = needed
    assert len(made.encode([row], "completion").inputs[0]) == needed


def test_a_model_without_a_chat_template_is_refused() -> None:
    """The key that asks for it is named."""
    with pytest.raises(BadInput, match=r"^data\.chat: .* has no chat template"):
        chat_format(data(chat=True), tiny_tokenizer(), "causal")
    with pytest.raises(BadInput, match=r"^data\.messages: .* has no chat template"):
        chat_format(data(messages="turns"), tiny_tokenizer(), "causal")
    with pytest.raises(BadInput, match=r"^data\.chat: chat templates are for causal models"):
        chat_format(data(chat=True), chat_tokenizer("chatml"), "seq2seq")


# Rows


def test_conversations_of_every_spelling_become_the_same_rows(tmp_path: Path) -> None:
    """OpenAI's, ShareGPT's, TRL's and text parts give the same prompt and completion."""
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    talk = [message("system", "be brief"), *TALK, message("assistant", "lazy")]
    shared = [{"from": roles[one["role"]], "value": one["content"]} for one in talk]
    parts = [
        {"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in talk
    ]
    found = []
    for rows, spec in (
        ([{"turns": talk}], {"messages": "turns"}),
        ([{"turns": shared}], {"messages": "turns"}),
        ([{"conversations": parts}], {"messages": "turns", "rename": {"conversations": "turns"}}),
        ([{"prompt": talk[:-1], "completion": talk[-1:]}], {"chat": True}),
        ([{"prompt": talk[:-1], "completion": "lazy"}], {"chat": True}),
    ):
        found.append(load_rows(DataSpec(path=write(tmp_path, rows), **spec)).train)
    assert found[0] == [{"prompt": talk[:-1], "completion": "lazy"}]
    assert all(rows == found[0] for rows in found)


def test_prompt_and_completion_need_no_template(tmp_path: Path) -> None:
    """Rows with these columns are read without a template, in a chat and without one."""
    path = write(tmp_path, [{"prompt": "the fox", "completion": " good"}])
    for chat in (False, True):
        spec = DataSpec(path=path, chat=chat)
        assert load_rows(spec).train == [{"prompt": "the fox", "completion": " good"}]
        assert (spec.template, spec.target) == ("{prompt}", "completion")


def test_every_answer_trains_only_what_is_left_for_training(tmp_path: Path) -> None:
    """``train_on: all`` gives a training row for each answer; other splits have the last one."""
    talks = [
        [
            message("user", f"fox {number}"), message("assistant", "first"),
            message("user", "dog"), message("assistant", "last"),
        ]
        for number in range(20)
    ]  # fmt: skip
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    path = DataFiles(train=str(file))
    last = load_rows(DataSpec(path=path, messages="turns"))
    every = load_rows(DataSpec(path=path, messages="turns", train_on="all"))
    assert (every.validation, every.test) == (last.validation, last.test)
    assert [row for row in every.train if row["completion"] == "last"] == last.train
    first = [row for row in every.train if row["completion"] == "first"]
    assert [row["prompt"] for row in first] == [row["prompt"][:1] for row in last.train]


def test_turns_behind_the_last_answer_are_reported(tmp_path: Path) -> None:
    """A question without an answer at the end is not read, and a note says so."""
    path = write(tmp_path, [{"turns": [*TALK, message("assistant", "lazy"), ASKED]}])
    rows = load_rows(DataSpec(path=path, messages="turns"))
    assert rows.train[0]["completion"] == "lazy"
    assert any("1 of the conversations of train have turns behind" in note for note in rows.notes)


def test_labels_of_a_chat_are_told_apart_as_the_template_writes_them() -> None:
    """Answers that differ only in white space that the template strips are refused."""
    tokenizer = chat_tokenizer("llama3")
    with pytest.raises(BadInput, match="has the same tokens as another"):
        Encoder(
            tokenizer, Template("{text}"), Verbalizer((0, 1), ("ham", " ham")), LONG, LONG,
            chat=ChatFormat(tokenizer),
        )  # fmt: skip


def test_a_model_folder_tells_of_its_chat_template() -> None:
    """Files alone tell whether a model has a chat template."""
    assert names_chat_template(BaseModelSpec(id=str(chat_folder("chatml")))) is True
    assert names_chat_template(BaseModelSpec(id=str(model_folder()))) is False
    assert names_chat_template(BaseModelSpec(id="nobody/model")) is None
    assert names_chat_template(BaseModelSpec(id="builtin:smollm2-135m")) is True
    assert names_chat_template(BaseModelSpec(id="builtin:quickstart")) is False


def test_marks_survive_stripping() -> None:
    """Virtual tokens at the edge of a turn stay where they are."""
    made = encoder("gemma", "{*} {text} ")
    ids = made.encode_input({"text": "fox"})
    assert ids.count(marker(0)) == 1
    assert Mark("*") in made.template.parts({"text": "fox"})
