"""Files become rows exactly as they are written, or are refused with the faulty line."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.data import text_files
from orchestrator.data.cells import is_missing
from orchestrator.data.dataset import load_rows, read_file
from orchestrator.data.tables import Table, read_table, table_suffix
from orchestrator.errors import BadInput
from orchestrator.job.spec import CsvSpec, DataSpec

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
WORDS = [
    "None", "NA", "N/A", "null", "nan", "NaN", "#N/A", "-inf", "", " ", "007", "1.10", "1e5",
    "0x1F", "1_000", "true", "TRUE", "yes", "2024-01-02", "2024-01-02T03:04:05Z", "12:30", "1,5",
    'a "quoted" word', '"', '""', "'", "\\", "\\n", "=1+1", "#", "{text}", "[1, 2]", "ä",
    "\u2028", "\x85", "\x0b", "\x1c", "\ufeff", "e\u0301", "𝄞",
]  # fmt: skip


def texts(without: str = "") -> st.SearchStrategy[str]:
    """Return any texts that a file can hold, and words that readers tend to convert."""
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0" + without)
    words = [word for word in WORDS if not set(word) & set(without)]
    return st.sampled_from(words) | st.text(characters, max_size=12)


@st.composite
def tables(
    draw: st.DrawFn, without: str = "", blank: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Return column names and rows of cells.

    Without ``blank``, every row has some text.
    """
    # The reader drops a byte order mark in front of the first column's name.
    names = texts(without + '\ufeff"').filter(lambda name: blank or bool(name))
    columns = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    rows = st.lists(texts(without), min_size=len(columns), max_size=len(columns))
    return columns, draw(
        st.lists(rows.filter(lambda row: blank or len(row) > 1 or row != [""]), max_size=6)
    )


def read(name: str, data: bytes, options: CsvSpec | None = None) -> Table:
    """Read a file with this name and these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(data)
        return read_table(file, "data.path.train", options)


def check(table: Table, columns: list[str], rows: list[list[str]], lines: list[int | None]) -> None:
    """Compare cells, row numbers, lines and types."""
    assert [list(row.items()) for row in table.rows] == [
        list(zip(columns, row, strict=True)) for row in rows
    ]
    assert [row.number for row in table.rows] == list(range(1, len(rows) + 1))
    assert [row.line for row in table.rows] == lines
    assert all(type(cell) is str for row in table.rows for cell in row.values())


def written(rows: list[list[str]], **dialect: Any) -> tuple[str, list[int | None]]:
    """Return the rows as the csv module writes them, and the line on which each begins."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, **dialect)
    lines: list[int | None] = []
    for row in rows:
        lines.append(stream.getvalue().count("\n") + 1)
        writer.writerow(row)
    return stream.getvalue(), lines


@given(
    tables(),
    st.sampled_from(["csv", "CSV", "tsv"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(sorted(COMPRESSIONS)),
    st.booleans(),
)
@settings(deadline=None)
def test_a_quoted_table_reads_back(
    table: tuple[list[str], list[list[str]]],
    suffix: str,
    end: str,
    everywhere: bool,
    compression: str,
    mark: bool,
) -> None:
    """Each cell and line number is right.

    CSV has quotes where needed or everywhere, TSV has quotes everywhere.
    """
    columns, rows = table
    # The csv module quotes a carriage return only if the line terminator has one.
    everywhere = everywhere or suffix == "tsv" or end == "\n"
    text, lines = written(
        [columns, *rows],
        delimiter="\t" if suffix == "tsv" else ",",
        quoting=csv.QUOTE_ALL if everywhere else csv.QUOTE_MINIMAL,
        lineterminator=end,
    )
    data = COMPRESSIONS[compression](text.encode("utf-8-sig" if mark else "utf-8"))
    found = read(f"a.{suffix}{compression}", data)
    check(found, columns, rows, lines[1:])
    assert found.dialect and found.dialect.quoted
    assert not found.notes or len(columns) == 1


@given(
    tables("\t\r\n", blank=False),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(sorted(COMPRESSIONS)),
)
@settings(deadline=None)
def test_an_unquoted_tsv_reads_back(
    table: tuple[list[str], list[list[str]]], end: str, compression: str
) -> None:
    """Quotes are part of the text in every cell, even where one opens and never closes."""
    columns, rows = table
    text = "".join("\t".join(row) + end for row in [columns, *rows])
    found = read(f"a.tsv{compression}", COMPRESSIONS[compression](text.encode()))
    check(found, columns, rows, list(range(2, len(rows) + 2)))
    assert found.dialect and not found.dialect.quoted


@given(
    tables(),
    st.sampled_from(["jsonl", "ndjson", "json", "array", "indented"]),
    st.booleans(),
    st.sampled_from(sorted(COMPRESSIONS)),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(deadline=None)
def test_a_json_table_reads_back(
    table: tuple[list[str], list[list[str]]],
    form: str,
    ascii_only: bool,
    compression: str,
    encoding: str,
) -> None:
    """One object a line or an array, in every encoding with a byte order mark, reads back."""
    columns, rows = table
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    if form in ("array", "indented"):
        shown = [json.dumps(row, ensure_ascii=ascii_only) for row in objects]
        text = "[\n" + ",\n".join(shown) + "\n]\n"
        lines: list[int | None] = [number + 2 for number in range(len(rows))]
        if form == "indented":
            text = json.dumps(objects, indent=1, ensure_ascii=ascii_only)
            lines = [2 + number * (len(columns) + 2) for number in range(len(rows))]
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in objects)
        lines = [number + 1 for number in range(len(rows))]
    suffix = form if form in ("jsonl", "ndjson") else "json"
    check(
        read(f"a.{suffix}{compression}", COMPRESSIONS[compression](text.encode(encoding))),
        columns,
        rows,
        lines,
    )


@given(tables(), st.sampled_from(sorted(COMPRESSIONS)))
@settings(deadline=None)
def test_a_parquet_table_reads_back(
    table: tuple[list[str], list[list[str]]], compression: str
) -> None:
    """Texts stay texts, and rows of a parquet file have no line numbers."""
    columns, rows = table
    cells = [pa.array([row[place] for row in rows], pa.string()) for place in range(len(columns))]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(cells, names=columns), stream)
    found = read(f"a.parquet{compression}", COMPRESSIONS[compression](stream.getvalue()))
    check(found, columns, rows, [None] * len(rows))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES}), max_size=5), st.booleans())
@settings(deadline=None)
def test_json_values_keep_their_types(rows: list[dict[str, Any]], lines: bool) -> None:
    """1, 1.0, true and "1" stay four values, and no row changes the types of another row."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    found = read("a.jsonl", text.encode())
    assert [json.dumps(row) for row in found.rows] == [json.dumps(row) for row in rows]


def test_parquet_values_keep_their_types(tmp_path: Path) -> None:
    """Integers, lists, missing values and dictionary-encoded texts are read unchanged."""
    rows = [
        {"text": "2024-01-02", "n": 1, "many": ["a"], "half": 0.5},
        {"text": "x", "n": None, "many": [], "half": 1.0},
    ]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(0, "text", table["text"].dictionary_encode())
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", "x").rows == rows


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_unused_columns_do_not_matter(suffix: str) -> None:
    """A column that is empty in 20,000 rows before its first text is read like any other."""
    comma = "\t" if suffix == "tsv" else ","
    lines = (
        ["text", "label", "note"],
        *([f"row {n}", "yes", ""] for n in range(20_000)),
        ["last", "no", "seen"],
    )
    found = read(f"a.{suffix}", "\n".join(map(comma.join, lines)).encode())
    assert len(found.rows) == 20_001
    assert (
        found.rows[-1] == {"text": "last", "label": "no", "note": "seen"}
        and found.rows[0]["note"] == ""
    )


def test_names_that_the_header_has_twice() -> None:
    """Neither of two columns with the same name gets the name, so none is taken by chance.

    The other columns are read as usual.
    """
    for name, data in {
        "a.csv": b"text,text,label\na,b,c\n",
        "a.tsv": b"text\ttext\tlabel\na\tb\tc\n",
    }.items():
        assert read(name, data).rows == [
            {"text (column 1)": "a", "text (column 2)": "b", "label": "c"}
        ]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), stream)
    assert read("a.parquet", stream.getvalue()).rows == [
        {"text (column 1)": "a", "text (column 2)": "b"}
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\n\na,b\n\r\n\nc,d\n\n\n"),
        ("a.csv", "\n\ntext,label\r\na,b\r\nc,d"),
        ("a.tsv", "text\tlabel\n\na\tb\n\r\nc\td"),
        ("a.csv", "text,label\ra,b\rc,d\r"),
        ("a.jsonl", '\n{"text": "a", "label": "b"}\n  \n{"text": "c", "label": "d"}\r\n\n'),
        ("a.json", '{"text": "a",\n"label": "b"}\n{"text": "c",\n"label": "d"}'),
        ("a.json", '{"data": [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]}'),
    ],
)
def test_blank_lines_and_line_ends(name: str, text: str) -> None:
    """Blank lines hold no row, any line end is accepted, and the last line needs none."""
    assert read(name, text.encode()).rows == [
        {"text": "a", "label": "b"},
        {"text": "c", "label": "d"},
    ]


def test_line_numbers_count_blank_lines_and_line_breaks_in_cells() -> None:
    """The line number of a row is the line on which the row begins."""
    found = read("a.csv", b'text,label\n\n"a\nb\n",x\n"c",y\n\nd,"z\n"\ne,f\n')
    assert [(row.number, row.line) for row in found.rows] == [(1, 3), (2, 6), (3, 8), (4, 10)]
    found = read("a.tsv", b"text\tlabel\n\na\tb\n\n\nc\td\n")
    assert [row.line for row in found.rows] == [3, 6]


def test_a_json_row_without_a_key_has_none_there() -> None:
    """All rows have the same columns, with None where a row lacks the key.

    An array of texts is read as a column of texts.
    """
    found = read("a.jsonl", b'{"a": 1}\n{"b": 2}\n{"b": 3, "a": 4, "c": null}\n')
    assert found.rows == [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": 2, "c": None},
        {"b": 3, "a": 4, "c": None},
    ]
    assert found.columns == ["a", "b", "c"]
    assert read("a.json", b'["x", "y"]').rows == [{"text": "x"}, {"text": "y"}]
    assert read("a.json", b'{"a": [1], "b": [2]}').rows == [{"a": [1], "b": [2]}]


def test_nan_in_json_is_a_missing_value() -> None:
    """NaN, which Python and pandas write, is read as missing, and its row has a line number."""
    found = read("a.jsonl", b'{"text": "a", "score": NaN}\n{"text": NaN, "score": 1}\n')
    assert [is_missing(row["text"]) for row in found.rows] == [False, True] and found.rows[
        1
    ].line == 2
    assert is_missing(found.rows[0]["score"])


def test_reading_holds_no_more_than_a_part_of_the_file_beside_the_rows(tmp_path: Path) -> None:
    """Peak memory is that of the rows plus less than twice the file's size."""
    file = tmp_path / "a.csv"
    file.write_text(
        "text,label\n" + "".join(f"{n:08}{'x' * 86},{n % 2:03}\n" for n in range(100_000))
    )
    tracemalloc.start()
    try:
        table = read_table(file, "data.path.train")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table.rows) == 100_000
    assert peak - held < 2 * file.stat().st_size


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.csv.gz", "a.jsonl.bz2"]
)
def test_a_file_of_no_bytes(name: str) -> None:
    """An empty file has no rows, whatever its format."""
    assert read(name, b"").rows == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"text,label"),
        ("a.tsv", b"text\tlabel\n\n"),
        ("a.csv", b"\n \n"),
        ("a.jsonl", b"\n\n"),
        ("a.json", b" [ ] "),
        ("a.csv", codecs.BOM_UTF8),
        ("a.csv.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_a_file_without_rows(name: str, data: bytes) -> None:
    """A header alone, blank lines or an empty array give no rows and no error."""
    assert read(name, data).rows == []


def test_cells_of_any_length() -> None:
    """There is no limit on a cell's length, quoted or not."""
    long = "x, " * 700_000
    assert read("a.csv", f'text,label\n"{long}",a\n'.encode()).rows == [
        {"text": long, "label": "a"}
    ]
    assert read("a.tsv", f"text\tlabel\n{long}\ta\n".encode()).rows == [
        {"text": long, "label": "a"}
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 64])
def test_pieces_end_anywhere(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk may end inside a character, a line end or a quoted line break."""
    # The byte order mark has to be in the first chunk.
    monkeypatch.setattr(text_files, "CHUNK_BYTES", size + 4)
    text = 'text,label\r\n"ä\r\n𝄞","„“"\r\n"é,é",x\n'
    expected = [{"text": "ä\r\n𝄞", "label": "„“"}, {"text": "é,é", "label": "x"}]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        found = read("a.csv", text.encode(encoding))
        assert found.rows == expected and [row.line for row in found.rows] == [2, 4]
    with pytest.raises(BadInput, match=r"a\.csv:5: byte 0xe9 is not UTF-8"):
        read("a.csv", text.encode() + b"\xe9,x\n")
    with pytest.raises(BadInput, match=r"a\.csv:6: holds a NUL character"):
        read("a.csv", f"{text}a,b\na\0,b\n".encode())


# Quotes in TSV


FULLY_QUOTED = '"text"\t"label"\n"a ""b"""\t"x"\n"c\td"\t""\n'


def test_a_tsv_file_in_which_every_cell_is_quoted() -> None:
    """The quotes enclose cells, which may hold tabs; an empty cell needs no quotes."""
    found = read("a.tsv", FULLY_QUOTED.encode())
    assert found.rows == [{"text": 'a "b"', "label": "x"}, {"text": "c\td", "label": ""}]
    assert str(found.dialect) == "delimiter tab, with quoting, utf-8" and not found.notes
    assert read("a.tsv", b'"text"\t"label"\n"a"\t\n').rows == [{"text": "a", "label": ""}]


def test_a_tsv_file_with_some_quotes() -> None:
    """The quotes are part of the text.

    A note has the first such line and the setting that changes this.
    """
    found = read("a.tsv", b'text\tlabel\nplain\tx\n"so he said\ty\n"a ""b"""\t"z"\n')
    assert found.rows == [
        {"text": "plain", "label": "x"},
        {"text": '"so he said', "label": "y"},
        {"text": '"a ""b"""', "label": '"z"'},
    ]
    assert str(found.dialect) == "delimiter tab, without quoting, utf-8"
    (note,) = found.notes
    assert (
        "3 cells begin with a quote, the first in line 3" in note
        and "data.csv.quoting: standard" in note
    )
    assert not read("a.tsv", b'text\tlabel\n5" pipe\tx\n').notes
    assert not read("a.tsv", b'text\tlabel\n"a\tx\n', CsvSpec(quoting="none")).notes


@pytest.mark.parametrize(
    "row", ["a\tb", '"a"\tb', "1\t2", '"a"\t2', '"a" b\t"c"', 'a "b"\t"c"', '"a\t"b"']
)
def test_a_tsv_file_of_which_the_header_alone_is_quoted(row: str) -> None:
    """It is unclear whether quotes enclose cells, so the file is refused.

    The message has the line and the two ways on.
    """
    data = f'"text"\t"label"\n"a\nb"\t"c"\n{row}\n'.encode()
    with pytest.raises(
        BadInput, match=r"a\.tsv:4: the row that begins in this line has"
    ) as refused:
        read("a.tsv", data)
    assert "data.csv.quoting" in refused.value.hint
    plain = f'"text"\t"label"\n{row}\n'.encode()
    assert list(read("a.tsv", plain, CsvSpec(quoting="none")).rows[0].values()) == row.split("\t")


def test_quoting_that_the_spec_sets() -> None:
    """``standard`` parses quotes in a TSV file with few of them.

    ``none`` keeps quotes as text in a CSV file.
    """
    found = read("a.tsv", b'text\tlabel\n"a\tb"\tx\nc\ty\n', CsvSpec(quoting="standard"))
    assert found.rows == [{"text": "a\tb", "label": "x"}, {"text": "c", "label": "y"}]
    found = read("a.csv", b'text,label\n"a,x\n', CsvSpec(quoting="none"))
    assert (
        found.rows == [{"text": '"a', "label": "x"}] and found.dialect and not found.dialect.quoted
    )


@pytest.mark.parametrize("delimiter", [";", "|", "\t", ":", "¦", " "])
def test_a_delimiter_that_the_spec_sets(delimiter: str) -> None:
    """Any character can separate cells, and can occur in quoted cells."""
    data = f'text{delimiter}label\n"a{delimiter}b"{delimiter}x,y\n'.encode()
    assert read("a.csv", data, CsvSpec(delimiter=delimiter)).rows == [
        {"text": f"a{delimiter}b", "label": "x,y"}
    ]


def test_a_delimiter_that_the_name_does_not_tell() -> None:
    """A header of one cell that holds another delimiter gives a note with the key to set."""
    (note,) = read("a.csv", b"text;label\na;x\n").notes
    assert "a single cell, 'text;label'" in note and "data.csv.delimiter" in note
    assert not read("a.csv", b"text\na\n").notes


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_byte_order_mark_decides(encoding: str, order: str) -> None:
    """The mark identifies UTF-8, UTF-16 and UTF-32, whatever the spec says.

    The mark is no part of the first column's name.
    """
    marks = {("utf-16", ">"): codecs.BOM_UTF16_BE, ("utf-32", ">"): codecs.BOM_UTF32_BE}
    text = "text,label\nä𝄞,x\n"
    big = marks.get((encoding, order))
    data = big + text.encode(f"{encoding}-be") if big else text.encode(encoding)
    for options in (CsvSpec(), CsvSpec(encoding="latin-1")):
        assert read("a.csv", data, options).rows == [{"text": "ä𝄞", "label": "x"}]


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "ISO-8859-15", "utf-16-le", "shift_jis", "gb18030", "koi8-r"]
)
def test_an_encoding_that_the_spec_sets(encoding: str) -> None:
    """Files without a byte order mark are read in the encoding of the spec."""
    word = {"shift_jis": "日本", "gb18030": "中文", "koi8-r": "мир"}.get(encoding, "déjà")
    data = f"text,label\n{word},x\n".encode(encoding)
    found = read("a.csv", data, CsvSpec(encoding=encoding))
    assert found.rows == [{"text": word, "label": "x"}]
    assert found.dialect and found.dialect.encoding == codecs.lookup(encoding).name


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.csv", "data.csv.encoding"),
        ("a.tsv.gz", "latin-1"),
        ("a.jsonl", "convert"),
        ("a.json", "UTF-8"),
    ],
)
def test_text_that_is_not_utf_8(name: str, remedy: str) -> None:
    """The message has the line, the byte and a remedy; no character is replaced silently."""
    lines = (
        ["text\tlabel", "abc\tx", "caf\xe9\ty"]
        if "sv" in name
        else ['{"a": "b"}', '{"a": "c"}', '{"a": "caf\xe9"}']
    )
    data = COMPRESSIONS[".gz" if name.endswith(".gz") else ""]("\n".join(lines).encode("latin-1"))
    with pytest.raises(
        BadInput, match=rf"{name}:3: byte 0xe9 is not UTF-8 \(behind '.*caf'\)"
    ) as refused:
        read(name, data)
    assert remedy in refused.value.hint


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_a_mark(encoding: str) -> None:
    """Such a file is valid UTF-8 with NUL characters, and is refused with the likely cause."""
    with pytest.raises(BadInput, match=r"a\.csv:1: holds a NUL character") as refused:
        read("a.csv", "text,label\na,b\n".encode(encoding))
    assert "UTF-16" in refused.value.hint and "data.csv.encoding" in refused.value.hint


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "utf-16-le", "shift_jis"])
def test_bytes_that_the_set_encoding_does_not_have(encoding: str) -> None:
    """Bytes that the spec's encoding can't decode are refused with their line."""
    odd = (
        b"\x81\xff\xff\n"
        if encoding != "utf-16-le"
        else "\ud800".encode("utf-16-le", "surrogatepass") + b"\n\0"
    )
    with pytest.raises(BadInput, match=r"a\.csv:3: byte 0x"):
        read("a.csv", "text,label\na,b\n".encode(encoding) + odd, CsvSpec(encoding=encoding))


# What is refused


REFUSED = {
    "a cell too many": (
        "a.csv",
        b"text,label\na,b\ndear, you,no\n",
        r"a\.csv:3 \(row 2\) has 3 cells, and the header has 2",
    ),
    "a cell too few": (
        "a.csv",
        b'text,label\n"a\nb",c\n\nd\n',
        r"a\.csv:5 \(row 2\) has 1 cell, and the header has 2",
    ),
    "a tab too many": (
        "a.tsv",
        b"text\tlabel\na\tb\t\n",
        r"a\.tsv:2 \(row 1\) has 3 cells, and the header has 2",
    ),
    "a tab too few": ("a.tsv", b"text\tlabel\na\n", r"a\.tsv:2 \(row 1\) has 1 cell, and"),
    "a quote that never closes": (
        "a.csv",
        b'text,label\na,b\n"c,d\ne,f\n',
        r"a\.csv:3: .* begins a quoted cell that never ends",
    ),
    "a quote in a quoted cell": (
        "a.csv",
        b'text,label\n"a" b,c\n',
        r"a\.csv:2: .* has text behind the closing quote",
    ),
    "a carriage return": (
        "a.csv",
        b"text,label\na\rb,c\n",
        r"a\.csv:2: .* has a carriage return outside quotes",
    ),
    "a carriage return in TSV": (
        "a.tsv",
        b"text\tlabel\na\rb\tc\n",
        r"a\.tsv:2: .* has a carriage return in the middle",
    ),
    "a NUL": ("a.csv", b"text,label\na,b\nc\0,d\n", r"a\.csv:3: holds a NUL character"),
    "a NUL in TSV": ("a.tsv", b"text\tlabel\na\tb\0\n", r"a\.tsv:2: holds a NUL character"),
    "a repeated key": (
        "a.jsonl",
        b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n',
        r"a\.jsonl:2 has the key 'c' more than once",
    ),
    "a repeated key first": (
        "a.jsonl",
        b'{"a": 1, "a": 1}\n{"a": 1}\n',
        r"a\.jsonl:1 has the key 'a' more than once",
    ),
    "a repeated key in an array": (
        "a.json",
        b'[\n{"a": 1},\n{"a": 1, "a": 2}]',
        r"a\.json:3 has the key 'a' more than once",
    ),
    "a broken line": (
        "a.jsonl",
        b'{"a": 1}\n{"a": \n{"a": 2}\n',
        r"a\.jsonl:2 can't be read as JSON: .+ at character",
    ),
    "a broken first line": (
        "a.jsonl",
        b'{"a": 1\n{"a": 2}\n',
        r"a\.jsonl:2 can't be read as JSON: .+ \(the value begins in line 1\)",
    ),
    "a cut-off line": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "b',
        r"a\.jsonl:2 can't be read as JSON: Unterminated",
    ),
    "two objects in a line": (
        "a.jsonl",
        b'{"a": 1}\n{"a": 1} {"a": 2}\n',
        r"a\.jsonl:2 can't be read as JSON: Extra data",
    ),
    "a list for a row": (
        "a.jsonl",
        b'{"a": 1}\n[1, 2]\n',
        r"a\.jsonl:2 \(row 2\) holds a list, not an object",
    ),
    "a text for a row": ("a.jsonl", b'"a"\n', r"a\.jsonl:1 \(row 1\) holds a text, not an object"),
    "null for a row": (
        "a.json",
        b'[{"a": 1},\nnull]',
        r"a\.json:2 \(row 2\) holds null, not an object",
    ),
    "lists in an array": (
        "a.json",
        b"[[1], [2]]",
        r"a\.json:1 \(row 1\) holds a list, not an object",
    ),
    "an array that does not end": (
        "a.json",
        b'[{"a": 1},\n{"a": 2}',
        r"a\.json:2 has nothing where ',' or '\]' belongs",
    ),
    "an array without commas": ("a.json", b'[{"a": 1}\n{"a": 2}]', r"a\.json:2 has '\{' where"),
    "more behind an array": (
        "a.json",
        b'[\n{"a": 1}]\n5',
        r"a\.json:3 has more text behind the end of the array",
    ),
    "half a character": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "x\\ud83d"}\n',
        r"a\.jsonl:2 has half of a surrogate pair, \\ud83d",
    ),
    "half a character in an array": (
        "a.json",
        b'[\n{"a": "\\udc00"}]',
        r"a\.json:2 has half of a surrogate pair",
    ),
    "a number of 5,000 digits": (
        "a.jsonl",
        b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n",
        r"a\.jsonl:2 can't be read as JSON: Exceeds",
    ),
    "brackets without end": (
        "a.jsonl",
        b'{"a": 1}\n' + b"[" * 99_999 + b"\n",
        r"a\.jsonl:2 is nested too deeply",
    ),
    "no parquet": ("a.parquet", b"PAR1 no", r"a\.parquet can't be read as parquet: "),
    "no gzip": ("a.csv.gz", b"text,label\n", r"a\.csv\.gz can't be decompressed as gzip: "),
    "no zstd": ("a.csv.zst", b"text,label\n", r"a\.csv\.zst can't be decompressed as zstd: "),
    "no bzip2": ("a.csv.bz2", b"text,label\n", r"a\.csv\.bz2 can't be decompressed as bzip2: "),
    "gzip without the suffix": (
        "a.csv",
        gzip.compress(b"text,label\n", mtime=0),
        r"a\.csv is compressed with gzip, and its name",
    ),
    "an Excel workbook": (
        "a.csv",
        b"PK\x03\x04...",
        r"a\.csv is a zip archive or an Excel workbook",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_read_as_it_stands(case: str) -> None:
    """The message has the file's key and name, the line, the fault and a next step."""
    name, data, message = REFUSED[case]
    with pytest.raises(BadInput, match=rf"^data\.path\.train: .*{message}") as refused:
        read(name, data)
    assert refused.value.hint


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("part", [0.3, 0.9])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_compressed_file_that_is_cut_off(name: str, compression: str, part: float) -> None:
    """A truncated archive is refused, even though its first part could be read."""
    rows = "".join(f"{n * 7919 % 1000},{n}\n" for n in range(5000))
    whole = COMPRESSIONS[compression](f"text,label\n{rows}".encode())
    with pytest.raises(BadInput, match=rf"{name}{compression} can't be decompressed as"):
        read(name + compression, whole[: int(len(whole) * part)])


def test_compressed_parts_one_after_another() -> None:
    """Concatenated archives are read to the end."""
    for suffix, compress in COMPRESSIONS.items():
        data = compress(b"text,label\na,b\n") + compress(b"c,d\n")
        assert [row["text"] for row in read(f"a.csv{suffix}", data).rows] == ["a", "c"]


# Names


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.CSV", ".csv"),
        ("A.Tsv.GZ", ".tsv.gz"),
        ("a.b.ndjson", ".ndjson"),
        ("a.jsonl.ZST", ".jsonl.zst"),
        ("a.gz", ""),
        ("a.json.bz2", ".json.bz2"),
        ("a.parquet", ".parquet"),
        ("csv", ""),
        ("a.csv.zip", ""),
        ("a.txt", ""),
        (".csv", ""),
    ],
)
def test_names_tell_the_format(name: str, suffix: str) -> None:
    """Suffixes are matched in any case, and a compression suffix may follow the format."""
    assert table_suffix(Path(name)) == suffix


@pytest.mark.parametrize("name", ["a.xlsx", "a.gz", "a", "a.csv.zip"])
def test_names_that_tell_no_format(name: str) -> None:
    """The message lists all suffixes that are accepted."""
    with pytest.raises(BadInput, match=rf"can't tell the format of .*{name}") as refused:
        read(name, b"x")
    for suffix in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".bz2"):
        assert suffix in refused.value.hint


# The spec


def spec(path: Any, **changes: Any) -> DataSpec:
    return DataSpec.model_validate(
        {"path": path, "template": "{text}?", "target": "label", **changes}
    )


def test_the_spec_says_how_csv_files_are_read(tmp_path: Path) -> None:
    """data.csv applies to every CSV and TSV file of the job and to no other file."""
    (tmp_path / "a.csv").write_bytes('text;label\n"é";x\n'.encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"text": "é", "label": "x"}\n')
    path = {
        "train": str(tmp_path / "a.csv"),
        "validation": str(tmp_path / "b.jsonl"),
        "test": str(tmp_path / "a.csv"),
    }
    found = load_rows(spec(path, csv={"delimiter": ";", "encoding": "latin-1"}))
    assert found.train == found.validation == found.test == [{"text": "é", "label": "x"}]


@pytest.mark.parametrize(
    "csv",
    [
        {"delimiter": ";;"},
        {"delimiter": ""},
        {"delimiter": '"'},
        {"delimiter": "\n"},
        {"delimiter": "\\t"},
        {"encoding": "latin-99"},
        {"encoding": "base64"},
        {"encoding": "rot13"},
        {"encoding": ""},
        {"encoding": "undefined"},
        {"quoting": "some"},
        {"quoting": True},
        {"separator": ";"},
    ],
)
def test_values_of_csv_that_can_not_be(csv: dict[str, Any]) -> None:
    """Two characters, an unknown encoding and a misspelt key are refused with the spec."""
    with pytest.raises(ValidationError):
        CsvSpec.model_validate(csv)


def test_csv_without_a_csv_file_is_a_conflict() -> None:
    """A data.csv setting that no file would use is reported as having no effect."""
    for path in ({"train": "a.jsonl", "test": "b.parquet"}, "builtin:quickstart", "owner/name.csv"):
        with pytest.raises(ValidationError, match=r"csv: has no effect"):
            spec(path, csv={"delimiter": ";"})
        assert spec(path, csv={"delimiter": "auto"}) == spec(path)
    assert (
        spec({"train": "a.jsonl", "test": "b.TSV.gz"}, csv={"delimiter": ";"}).csv.delimiter == ";"
    )


def test_notes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The decision about quotes is logged with the key of the file."""
    file = tmp_path / "a.tsv"
    file.write_text('text\tlabel\n"a\tx\n')
    with caplog.at_level(logging.WARNING):
        read_file(file, "data.path.test")
    assert "data.path.test: " in caplog.text and "without quoting" in caplog.text
