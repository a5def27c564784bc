"""Compilation of grammars by llguidance, also as a script that can be killed.

llguidance limits most of the work that a grammar causes, but not all: the schema
``{"type": "integer", "multipleOf": 9999991}`` takes minutes and gigabytes, and a thread can't be
ended. So each new grammar is first compiled by this file as a process of its own, within limits of
time and memory. It imports nothing of the project, so that it starts quickly.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

MEMORY_BYTES = 2 << 30
# White space between the parts of a JSON text: a space, or a new line and an indentation. If any
# white space were allowed, some models would write it without end.
WHITE_SPACE = r"(?:\x20|\x0A[\x20\x09]{0,32})"
MAX_LEXER_STATES = 50_000  # each takes 1 to 2 kB


class GrammarFault(Exception):
    """A grammar can't be used; the message says why."""


def translate(kind: str, source: str, leading_space: bool = False) -> str:
    """Return the grammar in llguidance's own format.

    ``kind`` is ``json`` (a JSON schema), ``regex``, ``choice`` (a JSON list of texts) or
    ``grammar`` (in Lark's or llama.cpp's notation). With ``leading_space``, a space may stand in
    front of the text. Raises GrammarFault.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        if kind == "json":
            options = {"whitespace_pattern": WHITE_SPACE}
            grammar = LLMatcher.grammar_from_json_schema(source, defaults=options)
        elif kind == "choice":
            grammar = _choice(json.loads(source))
        else:
            grammar = grammar_from(kind, source)
    except ValueError as error:
        raise GrammarFault(str(error)) from None
    return _with_leading_space(grammar) if leading_space else grammar


def _choice(texts: list[str]) -> str:
    # As a terminal, since the alternatives of a rule count against llguidance's limits.
    alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return f"start: CHOICE\nCHOICE: {alternatives}"


def _with_leading_space(grammar: str) -> str:
    is_json = grammar.lstrip().startswith("{")
    body = json.loads(grammar)["grammars"][0] if is_json else {"lark_grammar": grammar}
    outer = {"lark_grammar": 'start: " "? @body'}
    return json.dumps({"grammars": [outer, {**body, "name": "body"}]})


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """Return an ``LLMatcher`` at the beginning of a text. Raises GrammarFault."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarFault(matcher.get_error())
    return matcher


def check_beginning(matcher: Any) -> None:
    """Raise GrammarFault unless some text can begin."""
    matcher.compute_bitmask()
    if matcher.is_error():
        fault = matcher.get_error()
        raise GrammarFault("no text can satisfy it" if "NoExtension" in fault else fault)


class _Bytes:
    """A vocabulary of all bytes and an end token."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def limit(cpu_seconds: int) -> None:
    """Limit this process's CPU time and memory, where the platform can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    """Compile the grammar on standard input, and write what is wrong with it.

    Arguments: the folder that llguidance is imported from, and the limit on CPU seconds.
    """
    sys.path.append(sys.argv[1])
    limit(int(sys.argv[2]))
    from llguidance import LLTokenizer, TokenizerWrapper

    asked = json.load(sys.stdin)
    try:
        tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
        check_beginning(compile_grammar(tokenizer, translate(**asked)))
        fault = ""
    except GrammarFault as error:
        fault = str(error)
    json.dump({"fault": fault}, sys.stdout)


if __name__ == "__main__":
    main()
