"""The compilation of the constraints that requests ask for, and a cache of those compiled.

llguidance compiles grammars and computes which tokens may come next. It is an optional dependency:
the extra ``structured``.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone
from orchestrator.models.tokenizer import Tokenizer
from orchestrator.serving.engine import grammar_check
from orchestrator.serving.engine.constraints import (
    AnswerConstraint,
    Constraint,
    ConstraintFailed,
    GrammarConstraint,
)
from orchestrator.serving.engine.engine import Overloaded
from orchestrator.serving.engine.grammar_check import GrammarFault, compile_grammar, translate
from orchestrator.serving.prompts.served_prompt import ServedPrompt

CPU_SECONDS = 5
"""The CPU time that compiling one grammar may take."""
WAIT_SECONDS = 60  # on a busy machine; the limit where a platform can't limit CPU time
MAX_COMPILED = 128
"""The number of grammars that are kept compiled."""
MAX_COMPILING = 32
"""The number of grammars that may wait to be compiled."""
THREADS = 2
MAX_MESSAGE = 300
SPACE = "\u2581"  # SentencePiece's mark for a space

Kind = Literal["json", "regex", "choice", "grammar", "labels"]


@dataclass(frozen=True)
class OutputRule:
    """The rule that a request sets for its texts."""

    kind: Kind
    source: str
    """A JSON schema, a regular expression, a JSON list of texts or a grammar.

    Empty for ``labels``, which are those of the prompt's verbalizer."""


class BadRule(BadInput):
    """A rule can't be used: it does not compile, or this prompt or server can't follow it."""


class TooComplex(BadRule):
    """A rule took more time or memory than compiling may take."""


Outcome: TypeAlias = GrammarConstraint | BadRule
"""The result of compiling a rule."""


class Grammars:
    """The compiled grammars of a server; each belongs to the base model's tokenizer.

    Grammars are compiled on threads, after a trial in a process that is killed when it exceeds its
    limits. Faults are kept like compiled grammars, except for exceeded limits.
    """

    def __init__(self, backbone: Backbone, cpu_seconds: int = CPU_SECONDS) -> None:
        self._tokenizer = backbone.tokenizer
        self._starts_afresh = backbone.family == "seq2seq"
        self._cpu_seconds = cpu_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[OutputRule, int], Future[Outcome]] = OrderedDict()
        self._vocabularies: dict[int, Any] = {}
        self._reading = threading.Lock()

    async def constraint(self, rule: OutputRule, prompt: ServedPrompt) -> Constraint:
        """Return the constraint that keeps a prompt's texts to a rule.

        Raises BadRule, and Overloaded when too many rules wait to be compiled.
        """
        end_id = prompt.encoder.end_id
        assert end_id is not None, "a masked model generates no text"
        if rule.kind == "labels":
            if not prompt.encoder.answers:
                raise BadRule(f"the model {prompt.why_no_labels}", "list the texts to choose from")
            return AnswerConstraint(prompt.encoder.answers, end_id)
        # Other requests may wait for the same future, so hanging up must not cancel it.
        outcome = await asyncio.shield(asyncio.wrap_future(self._future(rule, end_id)))
        if isinstance(outcome, BadRule):
            # A new error for each request: one error raised again and again would keep all frames.
            raise type(outcome)(outcome.message, outcome.hint)
        return outcome

    def close(self) -> None:
        """Stop the threads; rules that still wait are not compiled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _future(self, rule: OutputRule, end_id: int) -> Future[Outcome]:
        key = (rule, end_id)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            waiting = sum(not future.done() for future in self._compiled.values())
            if waiting >= MAX_COMPILING:
                raise Overloaded(waiting)
            future = self._threads.submit(self._compile, rule, end_id)
            self._compiled[key] = future
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return future

    def _compile(self, rule: OutputRule, end_id: int) -> Outcome:
        try:
            return self._compiled_rule(rule, end_id)
        except GrammarFault as fault:
            reason = " ".join(str(fault).split())[:MAX_MESSAGE]
            return BadRule(f"the {NAMES[rule.kind]} can't be used: {reason}")
        except ConstraintFailed as error:
            return BadRule(error.message, error.hint)
        except TooComplex as error:
            with self._lock:  # on a less busy machine it may compile
                self._compiled.pop((rule, end_id), None)
            return error
        except BadRule as error:
            return error

    def _compiled_rule(self, rule: OutputRule, end_id: int) -> GrammarConstraint:
        vocabulary = self._vocabulary(end_id)
        spaced = self._starts_afresh and _drops_leading_space(self._tokenizer, vocabulary)
        self._try(rule, spaced)
        grammar = translate(rule.kind, rule.source, spaced)
        constraint = GrammarConstraint(compile_grammar(vocabulary, grammar))
        constraint.start().allowed(0)  # the vocabulary may lack every character to begin with
        return constraint

    def _vocabulary(self, end_id: int) -> Any:
        """Return the tokenizer as llguidance reads it; this takes a second for a large one."""
        with self._reading:
            if end_id not in self._vocabularies:
                self._vocabularies[end_id] = _read_vocabulary(self._tokenizer, end_id)
            return self._vocabularies[end_id]

    def _try(self, rule: OutputRule, spaced: bool) -> None:
        """Compile in another process. Raises GrammarFault, and TooComplex beyond the limits."""
        import llguidance

        package = Path(llguidance.__file__).parent
        command = [sys.executable, "-P", grammar_check.__file__, str(package.parent)]
        try:
            ended = subprocess.run(
                [*command, str(self._cpu_seconds)],
                input=json.dumps({**asdict(rule), "leading_space": spaced}),
                capture_output=True,
                text=True,
                timeout=WAIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            ended = None
        if ended is None or ended.returncode != 0:
            raise TooComplex(
                f"the {NAMES[rule.kind]} takes more time or memory than this server allows",
                "simplify it: fewer repetitions, smaller numbers",
            )
        if fault := json.loads(ended.stdout)["fault"]:
            raise GrammarFault(fault)


NAMES: dict[Kind, str] = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
}


def _read_vocabulary(tokenizer: Tokenizer, end_id: int) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise BadRule(
            "structured outputs need llguidance, which this server does not have",
            "on the server: pip install 'prompt-orchestrator[structured]'",
        ) from None
    with suppress(ValueError):
        return from_tokenizer(tokenizer, eos_token=end_id)
    pieces = _Pieces(tokenizer, end_id)
    if pieces.are_the_text_of(tokenizer):
        return LLTokenizer(TokenizerWrapper(pieces))
    raise BadRule("the base model's tokenizer can't be used for structured outputs")


class _Pieces:
    """A vocabulary of SentencePiece without bytes, such as T5's, which llguidance can't read."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self.eos_token_id = end_id
        self.special_token_ids = list(tokenizer.all_special_ids)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens = [_bytes_of(piece or "") for piece in pieces]
        special = set(self.special_token_ids)
        self._ids = {
            piece: token
            for token, piece in enumerate(self.tokens)
            if piece and token not in special
        }
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text that is forced, up to what no token can write.

        Each is the longest that fits, as the tokenizer itself would put a space in front.
        """
        ids, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    def are_the_text_of(self, tokenizer: Tokenizer) -> bool:
        """Tell whether the pieces of a text, put together, are the text."""
        ids = tokenizer("a aa", add_special_tokens=False)["input_ids"]
        return b"".join(self.tokens[token] for token in ids).strip() == b"a aa"


def _bytes_of(piece: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace(SPACE, " ").encode()


def _drops_leading_space(tokenizer: Tokenizer, vocabulary: Any) -> bool:
    """Tell whether the tokenizer begins a text with a space that decoding removes."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return str(vocabulary.decode_str(ids)).startswith(" ") and not decoded.startswith(" ")
