"""Metrics of generated texts against one or several reference texts per row.

All metrics lie in 0..1, and higher is better.

* ``bleu``: corpus BLEU as computed by sacreBLEU (Post 2018: tokenizer 13a, exponential smoothing),
  divided by 100. It is computed over the corpus as a whole, so it is not a mean over rows.
* ``rouge_1``, ``rouge_2``, ``rouge_l``: F-measure of ROUGE (Lin 2004) without stemming, with each
  row's best reference, averaged over rows. The tokenizer knows only a-z and 0-9, so texts in
  another script have no tokens and score 0.
* ``f1``: F1 over words as in SQuAD (Rajpurkar et al. 2016: lower case, without punctuation and
  articles), with each row's best reference, averaged over rows.
* ``exact_text``: share of the rows whose text equals one of the row's references exactly.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from orchestrator.data.outcomes.rows import BLEU_COUNTS, F1, ROUGE_L, RowOutcomes

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

References = Sequence[Sequence[str]]


def text_metrics(texts: Sequence[str], references: References) -> dict[str, float]:
    """Compute all metrics of ``texts[row]`` against the texts in ``references[row]``.

    Raises ValueError when there are no rows, when the lengths differ, or when a row has no
    reference.
    """
    if not texts or len(texts) != len(references) or not all(references):
        counts = (
            f"{len(texts)} texts, {len(references)} rows "
            f"with {sum(map(bool, references))} that have references"
        )
        raise ValueError(f"every text needs a reference: {counts}")
    return {
        "bleu": bleu(texts, references),
        **rouge(texts, references),
        "f1": _mean_of_best(f1, texts, references),
        "exact_text": _mean_of_best(
            lambda text, reference: float(text == reference), texts, references
        ),
    }


def bleu(texts: Sequence[str], references: References) -> float:
    """Compute corpus BLEU, 0 to 1; rows may have different numbers of references."""
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    # sacreBLEU wants a list of all rows' first references, a list of their second ones and so on,
    # with None for rows that have fewer.
    streams: Any = [
        [row[place] if place < len(row) else None for row in references] for place in range(most)
    ]
    # force: sacreBLEU would warn of tokenised data when texts end in " .", but the model wrote
    # them. min: the rounded score may exceed 100.
    return min(1.0, float(corpus_bleu(texts, streams, force=True).score) / 100)


def row_scores(texts: Sequence[str], references: References) -> RowOutcomes:
    """Compute what each row contributes to ``bleu``, ``rouge_l`` and ``f1``."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    scorer, counter = RougeScorer(["rougeL"]), BLEU(effective_order=True)
    longest, words_f1, counts = [], [], []
    for text, row in zip(texts, references, strict=True):
        longest.append(float(scorer.score_multi(row, text)["rougeL"].fmeasure))
        words_f1.append(max(f1(text, reference) for reference in row))
        score = counter.sentence_score(text, row)
        counts.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return RowOutcomes(
        {
            ROUGE_L: np.array(longest),
            F1: np.array(words_f1),
            BLEU_COUNTS: np.array(counts, dtype=np.int64),
        }
    )


def rouge(texts: Sequence[str], references: References) -> dict[str, float]:
    """Compute ROUGE-1, ROUGE-2 and ROUGE-L, each with the reference that is best for it."""
    from rouge_score.rouge_scorer import RougeScorer  # takes two seconds: nltk brings scikit-learn

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names))
    scores = [scorer.score_multi(row, text) for text, row in zip(texts, references, strict=True)]
    return {
        ours: sum(float(row[theirs].fmeasure) for row in scores) / len(scores)
        for theirs, ours in names.items()
    }


def f1(text: str, reference: str) -> float:
    """Compute F1 over the words of a text and a reference.

    If either has no words, F1 is 1 when both have none, and 0 otherwise.
    """
    made, wanted = words(text), words(reference)
    if not made or not wanted:
        return float(made == wanted)
    common = sum((Counter(made) & Counter(wanted)).values())
    return 2 * common / (len(made) + len(wanted))


def words(text: str) -> list[str]:
    """Split a text into the words that SQuAD compares.

    The text is lower-cased and split at white space, without ASCII punctuation and English
    articles.
    """
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _mean_of_best(
    score: Callable[[str, str], float], texts: Sequence[str], references: References
) -> float:
    best = [
        max(score(text, one) for one in row) for text, row in zip(texts, references, strict=True)
    ]
    return sum(best) / len(best)
