"""Rows to token ids: within their limits, template whole, no end token in the input."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import encoder_for, spaced_tokenizer, text_rows, tiny_tokenizer, train_tokenizer
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from orchestrator.data.dataset import RowSplits
from orchestrator.data.encoding import (
    Encoded,
    Encoder,
    check_context,
    check_generation,
    make_encoder,
    reference_texts,
)
from orchestrator.data.source_row import SourceRow
from orchestrator.data.template import Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec

TOKENIZERS = {"bytes": tiny_tokenizer, "spaced": spaced_tokenizer}
cells = st.text(max_size=80) | st.text("ab {}é日", max_size=80) | st.none() | st.integers()
literals = st.text("ab {}é日?\n", max_size=10)


def encoder(
    template: str = "{text}\nspam?", limit: int = 40, targets: int = 8, tokenizer: Any = None
) -> Encoder:
    return Encoder(tokenizer or tiny_tokenizer(), Template(template), None, limit, targets)


def decoded(ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(ids, clean_up_tokenization_spaces=False))


@given(literals, literals, literals, cells, cells, st.integers(1, 60), literals)
@example("", "", "?", "a" * 70, None, 4, "")
@example("", "", "", None, "\x80", 1, "")
@example("", "long template" * 4, "", None, "", 3, "")
@settings(deadline=None)
def test_inputs_fit_and_keep_the_template(
    head: str, middle: str, tail: str, one: Any, two: Any, limit: int, before: str
) -> None:
    """An input never exceeds its limit and keeps all of the template, from head to tail.

    A template longer than the limit is refused as soon as a row has to be cut.
    """
    plain = [text.replace("{", "{{").replace("}", "}}") for text in (head, middle, tail)]
    made = encoder(f"{plain[0]}{{one}}{plain[1]}{{two}}{plain[2]}", limit)
    row = {"one": one, "two": two, "unused": "x" * 99}
    if len(tiny_tokenizer()(head + middle + tail)["input_ids"]) > limit:
        with pytest.raises(BadInput, match="the template alone takes"):
            made.encode_input(row, before)
        return
    ids = made.encode_input(row, before)
    room = limit + len(tiny_tokenizer()(before)["input_ids"])
    assert 1 <= len(ids) <= room
    if not before + made.template.fill(row):
        assert ids == [made.end_id]
    elif len(made.input_ids(before + head + middle + tail)) <= room:
        text = "" if ids == [made.end_id] else decoded(ids)  # all of it cut away
        assert text.startswith(before + head) and text.endswith(tail) and middle in text
        if len(made.input_ids(before + made.template.fill(row))) <= room:
            assert text == before + made.template.fill(row)
        shown = ["" if cell is None else str(cell) for cell in (one, two)]
        assert any(
            text == before + head + shown[0][:a] + middle + shown[1][:b] + tail
            for a in range(len(shown[0]) + 1)
            for b in range(len(shown[1]) + 1)
        )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("limit", [9, 12, 20])
def test_the_longest_column_is_cut_at_its_end(name: str, limit: int) -> None:
    """A long column loses its end, and no more of it than needed.

    A short column beside it and the template stay whole.
    """
    tokenizer = TOKENIZERS[name]()
    made = encoder("{a}: {b} ?", limit, tokenizer=tokenizer)
    row = {"a": "the quick brown fox jumps over the lazy dog and is great", "b": "x"}
    ids = made.encode_input(row)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    kept = text.removesuffix(": x ?")
    assert row["a"].startswith(kept) and text.endswith(": x ?")
    assert limit - 2 <= len(ids) <= limit
    # The caller's row is unchanged.
    assert row["a"] == "the quick brown fox jumps over the lazy dog and is great"


@pytest.mark.parametrize("cell", ["words", None, ""])
def test_a_template_longer_than_the_limit_is_refused(cell: str | None) -> None:
    """No text of the row would be left; the message has the template's length and the limit."""
    made = encoder("a template that is long enough {text}", 5)
    count = len(tiny_tokenizer()("a template that is long enough ")["input_ids"])
    wanted = (
        rf"the template alone takes {count} tokens, and max_input_tokens is 5(.|\n)*"
        rf"well above {count}"
    )
    with pytest.raises(BadInput, match=wanted):
        made.encode_input({"text": cell})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_template_needs_room_for_a_text(name: str) -> None:
    """A template as long as the limit is refused; one token less is allowed.

    Tokens that the tokenizer puts in front count. A template that is only a column has no tokens of
    its own.
    """
    tokenizer = TOKENIZERS[name]()
    count = len(tokenizer("is this message spam?")["input_ids"])
    encoder("{text}is this message spam?", count + 1, tokenizer=tokenizer).check_template()
    with pytest.raises(BadInput, match=f"the template alone takes {count} tokens"):
        encoder("{text}is this message spam?", count, tokenizer=tokenizer).check_template()
    encoder("{text}", 1 + len(tokenizer("")["input_ids"]), tokenizer=tokenizer).check_template()


def test_an_empty_input_still_has_a_token() -> None:
    """The input is the end token where a row's text is empty."""
    assert encoder("{text}").encode_input({"text": ""}) == [tiny_tokenizer().eos_token_id]
    assert encoder("{text}").encode_input({"text": None}) == [tiny_tokenizer().eos_token_id]


def test_special_tokens_in_front_stay_and_an_end_token_goes() -> None:
    """Inputs keep the tokenizer's special tokens in front.

    The end token of a tokenizer that closes every text is removed from inputs.
    """
    spaced = spaced_tokenizer()
    start = spaced.convert_tokens_to_ids("<s>")
    assert encoder(tokenizer=spaced).input_ids("the fox")[0] == start
    closing = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<end>"
    )
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>",
        pair="$A <end> $B <end>",
        special_tokens=[("<end>", closing.eos_token_id)],
    )
    assert closing("fox")["input_ids"][-1] == closing.eos_token_id
    made = encoder(tokenizer=closing)
    assert (
        made.input_ids("the fox")
        == tiny_tokenizer()("the fox", add_special_tokens=False)["input_ids"]
    )
    assert made.encode_target({"answer": " fox"}, "answer")[0].count(closing.eos_token_id) == 1
    assert made.input_ids("") == [closing.eos_token_id]


@given(st.text(max_size=6))
def test_targets_end_in_the_end_token(text: str) -> None:
    """A generated target is the text's tokens and one end token, even for an empty text."""
    made = encoder(targets=64)
    ids, place = made.encode_target({"answer": text}, "answer")
    assert place == -1 and ids[-1] == made.end_id and made.end_id not in ids[:-1]
    assert decoded(ids[:-1]) == text


def test_a_target_beyond_the_limit_is_refused() -> None:
    """Targets are never cut: the message has the length, the limit, the text and the setting."""
    made = encoder(targets=3)
    assert len(made.encode_target({"n": 12}, "n")[0]) == 3  # numbers are written out
    with pytest.raises(
        BadInput, match=r"a target has 4 tokens .* is 3: '123'(.|\n)*max_target_tokens to 4 or more"
    ):
        made.encode_target({"n": 123}, "n")


def test_labels_become_their_answers() -> None:
    """With a verbalizer the target is the answer's tokens and the end token.

    The label is the index of the answer.
    """
    made = encoder_for("several tokens")
    split = made.encode([{"text": "a", "label": 1}, {"text": "b", "label": 0}], "label")
    assert split.targets == [[*made.answers[1], made.end_id], [*made.answers[0], made.end_id]]
    assert split.labels == [1, 0] and len(split) == 2
    assert split.lengths == [
        len(i) + len(t) for i, t in zip(split.inputs, split.targets, strict=True)
    ]


def test_answers_have_the_tokens_that_they_have_in_a_whole_text() -> None:
    """Input and answer tokenised apart give the same tokens as the whole text."""
    made = encoder_for("several tokens")
    for row in text_rows(10, 0):
        whole = tiny_tokenizer()(made.template.fill(row) + made.verbalizer.texts[row["label"]])[
            "input_ids"
        ]  # type: ignore[union-attr]
        assert made.encode_input(row) + made.answers[row["label"]] == whole


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((" yes", ""), r"text '' has no tokens"),
        ((" yes", " yes"), r"text ' yes' has the same tokens as another"),
    ],
)
def test_answers_that_can_not_be_told_apart(texts: tuple[str, ...], message: str) -> None:
    """Each answer needs at least one token, and different tokens from every other answer."""
    with pytest.raises(BadInput, match=message):
        Encoder(tiny_tokenizer(), Template("{text}"), Verbalizer((0, 1), texts), 10, 10)


def test_an_instruction_in_front_takes_no_room_from_the_input() -> None:
    """An input keeps as much text behind an instruction as without one."""
    row = {"text": "the quick brown fox jumps over the lazy dog, " * 3}
    made = encoder(limit=12)
    alone, behind = made.encode_input(row), made.encode_input(row, "Is this message spam?\n")
    assert decoded(behind) == "Is this message spam?\n" + decoded(alone)


def data(**changes: Any) -> DataSpec:
    return DataSpec.model_validate(
        {
            "path": "x",
            "template": "{text}?",
            "target": "label",
            "verbalizer": {0: " no", 1: " yes"},
            **changes,
        }
    )


def splits(**labels: list[Any]) -> RowSplits:
    return RowSplits(
        **{
            name: [{"text": "a", "label": label} for label in given]
            for name, given in labels.items()
        }
    )


def test_the_jobs_encoder_covers_all_splits() -> None:
    """A label that only the test split has needs a verbalizer text too."""
    made = make_encoder(data(), splits(train=[0], validation=[0], test=[1]), tiny_tokenizer())
    assert made.verbalizer is not None and made.verbalizer.labels == (0, 1)
    with pytest.raises(BadInput, match="does not cover label 2"):
        make_encoder(data(), splits(train=[0], validation=[0], test=[2]), tiny_tokenizer())
    generating = make_encoder(
        data(verbalizer=None), splits(train=[0], validation=[0], test=[2]), tiny_tokenizer()
    )
    assert generating.answers == [] and generating.scored_answers == []


def test_prompt_input_and_target_have_to_fit_into_the_context() -> None:
    """A full context is allowed; one token more is refused, and the message has both remedies."""
    given = {
        "train": Encoded([[1] * 7], [[1] * 3], [0]),
        "test": Encoded([[1] * 9, [1]], [[1] * 2, [1]], [0, 0]),
    }
    check_context(encoder(), given, prompt_tokens=5, context=16)
    with pytest.raises(
        BadInput, match=r"6 virtual tokens and 11 tokens .* exceed the context of 16(.|\n)*now 40"
    ):
        check_context(encoder(), given, prompt_tokens=6, context=16)


def test_generated_texts_have_to_fit_into_the_context() -> None:
    """The longest input of any split counts; targets do not.

    A full context is allowed, one token more is refused.
    """
    given = {
        "validation": Encoded([[1] * 7], [[1] * 30], [0]),
        "test": Encoded([[1] * 9, [1]], [[1], [1]], [0, 0]),
    }
    check_generation(given, prompt_tokens=5, context=16, max_tokens=2)
    with pytest.raises(
        BadInput, match=r"5 virtual tokens, an input of 9 .* text of 3 exceed the context of 16"
    ):
        check_generation(given, prompt_tokens=5, context=16, max_tokens=3)


def test_references_are_the_target_where_there_are_none() -> None:
    """References are the column's texts, stripped.

    An empty list, None or a job without the column gives the target.
    """
    rows = [
        {"label": " yes ", "right": [" yes", "aye\n"]},
        {"label": " no", "right": []},
        {"label": 7, "right": None},
    ]
    spec = data(verbalizer=None)
    assert reference_texts(rows, spec) == [["yes"], ["no"], ["7"]]
    with_lists = spec.model_copy(update={"references": "right"})
    assert reference_texts(rows, with_lists) == [["yes", "aye"], ["no"], ["7"]]


def byte_tokenizer(**options: Any) -> ByT5Tokenizer:
    """Return a tokenizer written in Python, which gives no offsets."""
    return ByT5Tokenizer(**options)


@given(st.text(min_size=1, max_size=60), st.integers(1, 40))
@example("é" * 20, 3)
@settings(deadline=None)
def test_a_tokenizer_without_offsets_cuts_alike(text: str, limit: int) -> None:
    """A text keeps as many whole characters as fit into the limit, and the template stays."""
    tokenizer = byte_tokenizer()
    made = Encoder(tokenizer, Template("{text}?"), None, limit + 1, 8)
    kept = next(end for end in range(len(text), -1, -1) if len(text[:end].encode()) <= limit)
    wanted = tokenizer(text[:kept] + "?", add_special_tokens=False)["input_ids"]
    assert made.encode_input({"text": text}) == wanted


@given(st.text("ab é日", min_size=1, max_size=60), st.data())
def test_bisection_finds_a_cut_within_the_limit(text: str, data: st.DataObject) -> None:
    """The kept part has at most ``tokens`` tokens and is shorter than the text.

    This holds even where a token covers several characters, or where part of a word has other
    tokens than the whole word.
    """
    tokens = data.draw(st.integers(0, len(tiny_tokenizer()(text)["input_ids"]) - 1))
    end = encoder("{text}")._characters_of(text, tokens)
    assert len(tiny_tokenizer()(text[:end])["input_ids"]) <= tokens
    assert 0 <= end < len(text)


def grown_tokenizer() -> tuple[PreTrainedTokenizerFast, int]:
    """Return a tokenizer with a token added behind the model's table, and the table's size."""
    tokenizer = train_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<url>"])
    return tokenizer, size


def test_a_token_beyond_the_table_is_refused_where_it_occurs() -> None:
    """The message has the token, its id and the table's size.

    Inputs, answers and targets are all checked. A tokenizer that merely knows such a token is fine.
    """
    tokenizer, size = grown_tokenizer()
    made = Encoder(tokenizer, Template("{text}\nspam?"), None, 40, 8, table_size=size)
    assert made.encode_input({"text": "the fox"})
    wanted = (
        rf"the text 'see <url>\\nspam\?' holds token '<url>', id {size}, "
        rf"and .* table has {size} rows"
    )
    with pytest.raises(BadInput, match=wanted) as refused:
        made.encode_input({"text": "see <url>"})
    assert (
        f"ids 0 to {size - 1}" in refused.value.message
        and "resize_token_embeddings" in refused.value.hint
    )
    with pytest.raises(BadInput, match=f"the answer ' <url>' holds token '<url>', id {size}"):
        made.encode_target({"answer": " <url>"}, "answer")
    with pytest.raises(BadInput, match="the text 'a <url>' holds"):
        made.segment_ids(["a <url>"])
    with pytest.raises(BadInput, match="the answer '<url>' holds"):
        Encoder(tokenizer, Template("{text}"), Verbalizer((0,), ("<url>",)), 40, 8, table_size=size)


@pytest.mark.parametrize(
    ("family", "token"),
    [("causal", "eos_token"), ("seq2seq", "eos_token"), ("masked", "mask_token")],
)
def test_a_special_token_beyond_the_table_is_refused_at_once(family: Any, token: str) -> None:
    """An end or mask token occurs in every row, so it is checked before any row is read."""
    tokenizer = train_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({token: "<added>"})
    with pytest.raises(BadInput, match=f"every row holds token '<added>', id {size}"):
        Encoder(tokenizer, Template("{text}"), None, 40, 8, family, table_size=size)


def test_a_padding_token_beyond_the_table_does_no_harm() -> None:
    """Rows are padded with another token of the table, since padding is never read."""
    tokenizer = train_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert Encoder(tokenizer, Template("{text}"), None, 40, 8, table_size=size).encode_input(
        {"text": "fox"}
    )


def test_an_error_names_the_place_of_its_row() -> None:
    """A row that can't be encoded is found by its file and line."""
    rows = [
        SourceRow({"text": "a", "label": label}, source="train.csv", number=number, line=number + 1)
        for number, label in enumerate(["1", "123"], start=1)
    ]
    with pytest.raises(BadInput, match=r"^train\.csv:3 \(row 2\): a target has 4 tokens"):
        encoder(targets=3).encode(rows, "label")
