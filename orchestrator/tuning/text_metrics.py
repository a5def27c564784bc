"""Metrics of generated texts against one or several reference texts a row; all lie in 0..1, and more is better.

``bleu``: corpus BLEU as sacreBLEU has it (Post 2018: tokenizer 13a, exponential smoothing), divided by 100. The corpus
counts as a whole, so it is no mean over rows. ``rouge_1``, ``rouge_2``, ``rouge_l``: F-measure of ROUGE (Lin 2004)
without stemming, mean over rows of the best reference. Its tokenizer knows only a-z and 0-9: texts in another script
have no tokens and score 0. ``f1``: F1 over words as SQuAD has it (Rajpurkar et al. 2016: lower case, without
punctuation and articles), mean over rows of the best reference. ``exact_text``: part of the rows whose text is one of
its references to the character.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

References = Sequence[Sequence[str]]


def text_metrics(texts: Sequence[str], references: References) -> dict[str, float]:
    """All metrics of ``texts[row]`` against ``references[row]``, of which each row has at least one.

    Raises ValueError without rows, or when a row has no reference.
    """
    if not texts or len(texts) != len(references) or not all(references):
        counts = f"{len(texts)} texts, {len(references)} rows with {sum(map(bool, references))} that have references"
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
    """Corpus BLEU, 0 to 1; rows may have different numbers of references."""
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    # sacreBLEU wants the first reference of every row, then the second, and so on, with None where a row has no more.
    streams: Any = [
        [row[place] if place < len(row) else None for row in references] for place in range(most)
    ]
    # force: a text that ends in " ." is a model's doing, no mistake in the data to warn of. Rounding may pass 100.
    return min(1.0, float(corpus_bleu(texts, streams, force=True).score) / 100)


def rouge(texts: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, each with the reference that is best for it."""
    from rouge_score.rouge_scorer import RougeScorer  # takes two seconds: nltk brings scikit-learn

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names))
    scores = [scorer.score_multi(row, text) for text, row in zip(texts, references, strict=True)]
    return {
        ours: sum(float(row[theirs].fmeasure) for row in scores) / len(scores)
        for theirs, ours in names.items()
    }


def f1(text: str, reference: str) -> float:
    """F1 over the words of one pair; where either has no words, 1 if both have none and 0 otherwise."""
    made, wanted = words(text), words(reference)
    if not made or not wanted:
        return float(made == wanted)
    common = sum((Counter(made) & Counter(wanted)).values())
    return 2 * common / (len(made) + len(wanted))


def words(text: str) -> list[str]:
    """What SQuAD compares: lower case, ASCII punctuation and English articles removed, split at white space."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _mean_of_best(
    score: Callable[[str, str], float], texts: Sequence[str], references: References
) -> float:
    best = [
        max(score(text, one) for one in row) for text, row in zip(texts, references, strict=True)
    ]
    return sum(best) / len(best)
