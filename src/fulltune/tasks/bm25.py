from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

K1, B = 1.2, 0.75  # BM25's usual parameters, as in Lucene
_WITHOUT_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Japanese, Chinese
_TERM = rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+"


def bm25_terms(queries: Sequence[str], documents: Sequence[str]) -> tuple[csr_array, csr_array]:
    """Return the terms of queries and documents, both [texts, terms], whose products are the scores of BM25 (Robertson
    and Zaragoza 2009). Terms are lower-cased words, or letters of scripts without spaces."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=_TERM, dtype=np.float64)
    stored = csr_array(counter.fit_transform([*documents, "one term at least"])[:-1])
    asked = csr_array(counter.transform(queries))
    length, frequency = stored.sum(axis=1), np.bincount(stored.indices, minlength=stored.shape[1])
    rarity = np.log1p((len(documents) - frequency + 0.5) / (frequency + 0.5))
    norm = np.repeat(K1 * (1 - B + B * length / max(length.mean(), 1.0)), np.diff(stored.indptr))
    stored.data = rarity[stored.indices] * stored.data * (K1 + 1) / (stored.data + norm)
    return asked, stored
