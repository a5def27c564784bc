"""Reading of text files in pieces, with decompression, decoding and the line numbers of faults."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import NoReturn

from orchestrator.errors import BadInput
from orchestrator.job.spec import AUTO

CHUNK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2"}
# Longer marks come first: the mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# First bytes of files that are not plain text, whatever their names say.
SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "add .zst to its name"),
    (b"BZh", "is compressed with bzip2", "add .bz2 to its name"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook", "save its table as .csv"),
    (b"PAR1", "is a parquet file", "let its name end in .parquet"),
)


def compression_of(file: Path) -> str:
    """Return the suffix of the file's compression, or an empty string."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


@contextmanager
def open_binary(file: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading, decompressed.

    Raises BadInput if opening or reading it fails inside the block.
    """
    compression = compression_of(file)
    try:
        with _opened(file, compression) as stream:
            yield stream
    except BadInput:
        raise
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not compression:
            raise BadInput(
                f"{file} can't be read: {reason}", "check the file and its permissions"
            ) from None
        raise BadInput(
            f"{file} can't be decompressed as {COMPRESSIONS[compression]}: {reason}",
            "the file is damaged or cut off, or its name is wrong; make or copy it again",
        ) from None


def _opened(file: Path, compression: str) -> BufferedIOBase:
    if compression == ".gz":
        return gzip.open(file)
    if compression == ".bz2":
        return bz2.open(file)
    if compression == ".zst":
        import pyarrow

        stream: BufferedIOBase = pyarrow.input_stream(str(file), compression="zstd")
        return stream
    return file.open("rb")


class TextFile:
    """A text file, compressed or not, that can be read repeatedly without loading it as a whole.

    ``encoding`` applies to files without a byte order mark; ``used_encoding`` is the encoding that
    was actually used. ``remedy`` tells the user what to do about text in another encoding.
    """

    def __init__(self, file: Path, remedy: str, encoding: str = AUTO) -> None:
        self.file = file
        self.used_encoding = "utf-8" if encoding == AUTO else codecs.lookup(encoding).name
        self._remedy = remedy

    def __str__(self) -> str:
        return str(self.file)

    def lines(self) -> Iterator[str]:
        """Yield the lines with their line ends.

        Lines end at line feeds, or at carriage returns if the file's first piece has no line feed.
        """
        rest, newline = "", ""
        for number, text in enumerate(self._texts()):
            if number == 0:
                newline = "\n" if "\n" in text or "\r" not in text else "\r"
            buffer = rest + text
            end = buffer.rfind(newline) + 1
            rest = buffer[end:]
            # Both values of newline leave line ends untranslated; "" also ends lines at carriage
            # returns.
            yield from io.StringIO(buffer[:end], newline="\n" if newline == "\n" else "")
        if rest:
            yield rest

    def text(self) -> str:
        """Return the whole text."""
        return "".join(self._texts())

    def _texts(self) -> Iterator[str]:
        """Yield the text in pieces. Raises BadInput with the line of bytes that are not text."""
        with open_binary(self.file) as stream:
            data = stream.read(CHUNK_BYTES)
            data = data[self._skip_mark(data) :]
            decoder = codecs.getincrementaldecoder(self.used_encoding)("strict")
            lines = 0
            while True:
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeError as error:
                    self._refuse_bytes(error, lines)
                if "\0" in text:
                    self._refuse_nul(lines + text[: text.index("\0")].count("\n") + 1)
                if text:
                    yield text
                if not data:
                    return
                lines += text.count("\n")
                data = stream.read(CHUNK_BYTES)

    def _skip_mark(self, data: bytes) -> int:
        """Return the length of the byte order mark, and set the encoding that it stands for.

        Raises BadInput if the file is of another format than its name says.
        """
        for mark, encoding in BYTE_ORDER_MARKS:
            if data.startswith(mark):
                self.used_encoding = encoding
                return len(mark)
        for signature, fault, remedy in SIGNATURES:
            if data.startswith(signature):
                raise BadInput(f"{self.file} {fault}, and its name says otherwise", remedy)
        return 0

    def _refuse_bytes(self, error: UnicodeError, lines: int) -> NoReturn:
        """Raise BadInput for bytes that can't be decoded.

        ``lines`` is the number of lines that end before the piece at fault.
        """
        if not isinstance(error, UnicodeDecodeError):
            raise BadInput(
                f"{self.file} can't be decoded as {self.used_encoding}: {error}", self._remedy
            ) from None
        before = error.object[: error.start].decode(self.used_encoding, "ignore")
        raise BadInput(
            f"{self.file}:{lines + before.count(chr(10)) + 1}: "
            f"byte 0x{error.object[error.start]:02x} is not {self.used_encoding.upper()} "
            f"(behind {before[before.rfind(chr(10)) + 1 :][-40:]!r})",
            self._remedy,
        ) from None

    def _refuse_nul(self, line: int) -> NoReturn:
        raise BadInput(
            f"{self.file}:{line}: holds a NUL character, which no text has",
            "the file is damaged, or is UTF-16 or UTF-32 without a byte order mark: "
            f"{self._remedy}",
        )
