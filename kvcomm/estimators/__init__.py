"""Estimators: the deviation of a text behind a new context, from anchors. The contract in `base`, one estimator per module.

An estimator serves one model and one tenant: it is told neither, so whoever feeds it keeps them apart.
"""

from kvcomm.estimators.base import Estimate, Estimator, Place
from kvcomm.estimators.fallback import Fallback
from kvcomm.estimators.knn import Knn
from kvcomm.estimators.mean import Mean
from kvcomm.estimators.paper import Paper
from kvcomm.estimators.ridge import Ridge

__all__ = ["Estimate", "Estimator", "Fallback", "Knn", "Mean", "Paper", "Place", "Ridge"]
