"""How long a tier takes for so many bytes, learned from what its gets took. Knows nothing of tiers."""

from __future__ import annotations

from threading import Lock

__all__ = ["Speed"]

KEEP = 0.75  # weight of all earlier gets beside the newest
LEAST = 2  # gets before anything is predicted: the first one may have opened a connection
FURTHER = 4.0  # times the largest get so far; beyond that nothing is predicted


class Speed:
    """A latency (ms) and ms per byte, fitted to the recent gets by weighted least squares. Thread safe.

    Where all gets were of about one size, the whole time is taken to grow with the bytes. Too low a prediction is corrected by
    the next get, too high a one keeps gets from being made: so a get of a usual size in under half of what was predicted
    begins the fit anew.
    """

    def __init__(self) -> None:
        self._gets = 0
        self._largest = 0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # weights, bytes, ms, bytes * bytes, bytes * ms
        self._lock = Lock()

    def observe(self, nbytes: int, ms: float) -> None:
        """One round trip brought `nbytes`, at least one, in `ms`."""
        with self._lock:
            predicted = self._predicted(nbytes)
            weight, total, *_ = self._sums
            keep = KEEP
            measured = total <= 2 * nbytes * weight and nbytes <= self._largest  # a size for which the fit speaks
            if predicted is not None and ms < predicted / 2 and measured:
                keep, self._largest = 0.0, 0
            new = (1.0, nbytes, ms, nbytes * nbytes, nbytes * ms)
            w, n, t, nn, nt = (keep * old + add for old, add in zip(self._sums, new, strict=True))
            self._sums = (w, n, t, nn, nt)
            self._largest = max(self._largest, nbytes)
            self._gets += 1

    def predicted_ms(self, nbytes: int) -> float | None:
        """Of one round trip for `nbytes`; None where too little was measured to tell."""
        with self._lock:
            return self._predicted(nbytes)

    def _predicted(self, nbytes: int) -> float | None:
        if self._gets < LEAST or nbytes > FURTHER * self._largest:
            return None
        weight, n, t, nn, nt = self._sums
        mean_n, mean_t = n / weight, t / weight
        slope = mean_t / mean_n  # no latency at all
        alike = (mean_n / 10) ** 2  # sizes that differ less than that say little of the slope
        variance = max(nn / weight - mean_n**2, 0.0)
        covariance = nt / weight - mean_n * mean_t
        slope = min(max((covariance + alike * slope) / (variance + alike), 0.0), slope)
        return mean_t + slope * (nbytes - mean_n)
