"""Linear classifiers on the untouched model: the start of a new head, and a rival that trains nothing.

A new head that starts at random drags the body away in the first steps (Kumar et al. 2022, arXiv 2202.10054). So its
last layer starts as the linear classifier that scikit-learn finds on what the untouched model gives it, and a dense
layer before it, such as a pooler's, is kept or replaced by whichever gives the better classifier on held-out rows. The
model stays the plain class: only values of its head are set. Test rows are never looked at.
"""

from fulltune.probe.features import Extractor, separators
from fulltune.probe.fit import SEED, fitted, predicted, put_head, rival_of

__all__ = ["SEED", "Extractor", "fitted", "predicted", "put_head", "rival_of", "separators"]
