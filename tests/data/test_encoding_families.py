"""Encoding for each model family: special tokens, the answer's place and the end of targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import closing_tokenizer, cloze_tokenizer, spaced_tokenizer, tiny_tokenizer

from orchestrator.data.encoding import SENTINEL, Encoder
from orchestrator.data.template import Mark, Template, Verbalizer
from orchestrator.errors import BadInput
from orchestrator.models.placeholders import BLANK, marker
from orchestrator.models.source import Family

TOKENIZERS = {
    "causal": tiny_tokenizer(),
    "seq2seq": closing_tokenizer(),
    "masked": cloze_tokenizer(),
}
FAMILIES: list[Family] = ["causal", "seq2seq", "masked"]
every_family = pytest.mark.parametrize("family", FAMILIES)
texts = st.text(max_size=30)


def encoder(
    family: Family, template: str, verbalizer: Verbalizer | None = None, limit: int = 200
) -> Encoder:
    return Encoder(TOKENIZERS[family], Template(template), verbalizer, limit, 64, family)


def decoded(family: Family, ids: list[int]) -> str:
    return str(
        TOKENIZERS[family].decode([i for i in ids if i >= 0], clean_up_tokenization_spaces=False)
    )


@every_family
@given(text=texts)
def test_any_text_is_whole_between_its_special_tokens(family: Family, text: str) -> None:
    """Any text, even an empty one, decodes back between the family's special tokens."""
    ids = encoder(family, "a{text}").encode_input({"text": text})
    front, back = {"causal": ("", ""), "seq2seq": ("", "<end>"), "masked": ("<cls>", "<sep>")}[
        family
    ]
    assert decoded(family, ids) == f"{front}a{text}{back}"
    assert min(ids) >= 0


@every_family
@given(text=texts, tail=st.sampled_from(["", "!", " spam?"]))
def test_marks_keep_their_place(family: Family, text: str, tail: str) -> None:
    """Markers are numbered in order and keep their place between the template's tokens."""
    ids = encoder(family, "a{*}{text}{*}" + tail).encode_input({"text": text})
    assert [entry for entry in ids if entry < 0] == [marker(0), marker(1)]
    first, second = ids.index(marker(0)), ids.index(marker(1))
    assert decoded(family, ids[first + 1 : second]) == text
    assert (
        decoded(family, ids[second + 1 :])
        == tail + {"causal": "", "seq2seq": "<end>", "masked": "<sep>"}[family]
    )


@every_family
@given(text=texts)
def test_the_blank_is_where_the_answer_goes(family: Family, text: str) -> None:
    """A masked model keeps the text behind the blank.

    For the other families the input ends at the blank, and for a causal model the space in front of
    it becomes part of the answer.
    """
    made = encoder(family, "a {text} is {_}.")
    ids = made.encode_input({"text": text})
    if family == "masked":
        assert ids.count(BLANK) == 1 and decoded(family, ids) == f"<cls>a {text} is .<sep>"
    else:
        assert decoded(family, ids) == f"a {text} is" + ("<end>" if family == "seq2seq" else "")
    if family == "causal":
        assert decoded(family, made.answer_ids("fox")) == " fox"


@every_family
@given(answer=st.text(min_size=1, max_size=12))
def test_targets_end_where_their_family_ends_them(family: Family, answer: str) -> None:
    """A generated target has the end token; a target for a blank does not.

    Both decode to the text.
    """
    ids, label = encoder(family, "{text}:").encode_target({"label": answer}, "label")
    assert label == -1 and decoded(family, ids) == answer + ("" if family == "masked" else "<end>")


def test_an_empty_target_can_not_be_filled_in() -> None:
    """A blank of no tokens is refused, since nothing could be learned from it.

    A generated target of only the end token is allowed.
    """
    assert encoder("causal", "{text}").encode_target({"label": ""}, "label")[0] == [
        tiny_tokenizer().eos_token_id
    ]
    with pytest.raises(BadInput, match="a target has no tokens"):
        encoder("masked", "{text}").encode_target({"label": ""}, "label")


@every_family
def test_a_verbalizer_scores_what_the_target_has(family: Family) -> None:
    """Scored answers are the target's tokens without the end token.

    Where one answer begins another, the end token is scored too, if the family has one.
    """
    plain = encoder(family, "{text}\nspam?", Verbalizer((0, 1), (" good", " a place")))
    assert plain.scored_answers == plain.answers
    assert [
        plain.encode_target({"label": label}, "label")[0] for label in (0, 1)
    ] == plain.ended_answers
    nested = encoder(family, "{text}\nspam?", Verbalizer((0, 1), (" good", " good movie")))
    assert (nested.scored_answers == nested.ended_answers) and (
        nested.ended_answers == nested.answers
    ) == (family == "masked")


@every_family
@given(text=st.text(min_size=60, max_size=200), limit=st.integers(14, 30))
def test_long_inputs_lose_their_column_not_their_marks(
    family: Family, text: str, limit: int
) -> None:
    """An input cut to the limit keeps its markers and its blank."""
    ids = encoder(family, "a{*}{text} is{*}{_}", limit=limit).encode_input({"text": text})
    assert len(ids) <= limit
    marks = [entry for entry in ids if entry < 0]
    assert marks == [marker(0), marker(1), *([BLANK] if family == "masked" else [])]


def test_a_written_instruction_stands_in_front_of_everything() -> None:
    """The instruction is in front of a marker at the template's beginning too."""
    made = encoder("causal", "{*}{text}")
    ids = made.encode_input({"text": "fox"}, before="a place\n")
    assert decoded("causal", ids[: ids.index(marker(0))]) == "a place\n"


def test_a_tokenizer_that_adds_spaces_adds_none_behind_a_mark() -> None:
    """Text behind a marker is tokenised as written, with SentencePiece too."""
    made = Encoder(spaced_tokenizer(), Template("the{*}fox {text}"), None, 100, 10, "causal")
    ids = made.encode_input({"text": "jumps"})
    behind = ids[ids.index(marker(0)) + 1 :]
    anchor = spaced_tokenizer()("a", add_special_tokens=False)["input_ids"]
    assert spaced_tokenizer().decode([*anchor, *behind]) == "afox jumps"


def test_segments_are_texts_and_marks() -> None:
    """Adjacent texts form one segment, doubled braces are braces, and marks are no columns."""
    template = Template("{{{x}}} and {*}{y}{_}!")
    assert template.columns == ("x", "y")
    assert template.segments({"x": "1", "y": "2"}) == ["{1} and ", Mark("*"), "2", Mark("_"), "!"]
    assert template.fill({"x": "1", "y": "2"}) == "{1} and 2!"
    assert template.places_virtual_tokens and template.has_blank and template.tail == ""


def with_sentinel() -> Any:
    tokenizer = copy.deepcopy(closing_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": [SENTINEL]})
    return tokenizer


def test_a_sentinel_stands_in_front_of_every_target() -> None:
    """Answers, targets and ranked texts begin with the sentinel.

    The answer words that inits are made from do not.
    """
    tokenizer = with_sentinel()
    verbalizer = Verbalizer((0, 1), ("no", "yes"))
    plain, marked = (
        Encoder(tokenizer, Template("{text}"), verbalizer, 20, 20, "seq2seq", sentinel)
        for sentinel in (False, True)
    )
    mark = tokenizer.convert_tokens_to_ids(SENTINEL)
    assert (
        marked.answers == [[mark, *ids] for ids in plain.answers]
        and marked.answer_words == plain.answers
    )
    row = {"text": "is this spam", "label": 1}
    assert marked.encode_target(row, "label")[0] == [mark, *plain.encode_target(row, "label")[0]]
    texts = Encoder(tokenizer, Template("{text}"), None, 20, 20, "seq2seq", sentinel=True)
    target, _ = texts.encode_target({"text": "is", "label": "spam"}, "label")
    assert (
        target[0] == mark and tokenizer.decode(target, skip_special_tokens=True).strip() == "spam"
    )


def test_a_model_without_a_sentinel_is_refused() -> None:
    """A tokenizer without a sentinel and a family that does not use one are refused."""
    with pytest.raises(BadInput, match="the base model's tokenizer has no <extra_id_0>"):
        Encoder(closing_tokenizer(), Template("{text}"), None, 20, 20, "seq2seq", sentinel=True)
    with pytest.raises(BadInput, match="a causal model has none"):
        Encoder(with_sentinel(), Template("{text}"), None, 20, 20, "causal", sentinel=True)
