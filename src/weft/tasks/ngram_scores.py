"""BLEU and NIST as NIST's mteval-v13a prints them, lower-cased, with any number of references per
segment.

sacrebleu provides the tokenisation ("13a") and the clipped n-gram counts. Only the differences in
the E2E challenge's scorer are implemented here:

BLEU   an n-gram order counts (tokens - segments (n - 1)) positions, even if a segment is shorter than n; an empty
       output counts as one token; an order without a hit counts as 1e-15 hits, so the score is always defined.
NIST   hits are clipped against all references of a segment together, and the length penalty compares with their mean
       length. nltk's corpus_nist takes the best single reference instead, which scores lower.

For outputs of at least four tokens with a hit in each order, BLEU is sacrebleu's (lowercase,
smoothing "none") / 100.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

NO_HITS, NO_PLACES = 1e-15, 1e-9
NIST_ORDER = 5
# Chosen by NIST so that two thirds of the references' length costs half the score.
_BETA = -math.log(0.5) / math.log(1.5) ** 2


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus BLEU up to 4-grams, in [0, 1], for one output and one or more references per
    segment.
    """
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    found = BLEU(lowercase=True, smooth_method="none", force=True).corpus_score(outputs, streams)
    length = found.sys_len + sum(not text.strip() for text in outputs)
    places = [length - len(outputs) * n for n in range(len(found.counts))]
    logs = [
        math.log(max(hits, NO_HITS) / max(total, NO_PLACES))
        for hits, total in zip(found.counts, places, strict=True)
    ]
    penalty = min(0.0, 1 - found.ref_len / length)
    return math.exp(penalty + sum(logs) / len(logs))


def nist(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns corpus NIST up to 5-grams: hits weighted by the information of an n-gram's last word
    after the words before it.
    """
    in_references: Counter[tuple[str, ...]] = Counter()
    hits: Counter[tuple[str, ...]] = Counter()
    length, mean_length = 0, 0.0
    for output, group in zip(outputs, references, strict=True):
        found, tokens = _ngrams(output)
        counted = [_ngrams(reference) for reference in group]
        allowed: Counter[tuple[str, ...]] = Counter()
        for ngrams, _ in counted:
            in_references.update(ngrams)
            allowed |= ngrams
        hits.update(found & allowed)
        words = sum(size for _, size in counted)
        in_references[()] += words
        length += max(tokens, 1)
        mean_length += words / len(group)
    total = 0.0
    for n in range(1, NIST_ORDER + 1):
        told = sum(
            count * math.log2(in_references[ngram[:-1]] / in_references[ngram])
            for ngram, count in hits.items()
            if len(ngram) == n
        )
        if told:
            total += told / (length - len(outputs) * (n - 1))
    ratio = min(1.0, length / mean_length)
    return total * math.exp(-_BETA * math.log(ratio) ** 2)


def _ngrams(text: str) -> tuple[Counter[tuple[str, ...]], int]:
    """All n-grams of up to five tokens with their counts, and the number of tokens."""
    from sacrebleu.metrics.helpers import extract_all_word_ngrams
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    counts, size = extract_all_word_ngrams(Tokenizer13a()(text).lower(), 1, NIST_ORDER)
    return counts, size
