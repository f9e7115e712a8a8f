"""What a run is watched for: warnings that come when they are true, each once per spell. State of one process alone."""

from __future__ import annotations

from collections import deque

import torch

from detectors.padded import PaddedTargets

WINDOW = 5  # log lines that are looked at together
FALLEN = 0.9  # of the teacher's AP at the end of burn-in, below which it has got worse,
FALLEN_BY = 2.0  # if also by so many AP, which is more than noise
ONE_CLASS = 0.99  # share of the pseudo labels that are of one class
ENOUGH = 30  # pseudo labels from which that share means something


class Spells:
    """Which things hold at the moment, so that each is told once when it begins."""

    def __init__(self) -> None:
        self._holds: set[str] = set()

    def begins(self, name: str, holds: bool) -> bool:
        """Whether something that holds now did not when it was last asked for."""
        began = holds and name not in self._holds
        (self._holds.add if holds else self._holds.discard)(name)
        return began


class LossWatch:
    """The loss of labelled images, over windows of log lines."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._first = self._lowest = float("inf")

    def diverges(self, loss: float) -> bool:
        """Takes the loss of a log line; whether the last ones are twice the first, or fell to half and came back."""
        self._recent.append(loss)
        if len(self._recent) < WINDOW:
            return False
        mean = sum(self._recent) / WINDOW
        if self._first == float("inf"):
            self._first = mean
        self._lowest = min(self._lowest, mean)
        return mean >= 2 * self._first or (self._lowest <= self._first / 2 and mean >= self._first)


class TeacherWatch:
    """The teacher's AP, as evaluations find it."""

    def __init__(self, start: int) -> None:
        self._start = start  # the first step with a teacher that teaches
        self._at_start: float | None = None
        self._now: float | None = None

    def scored(self, steps: int, ap: float | None) -> None:
        """Takes the AP after so many steps; the last one until the burn-in's end is what others are held against."""
        if ap is None:
            return
        if steps <= self._start or self._at_start is None:
            self._at_start, self._now = ap, None
        else:
            self._now = ap

    def fell(self) -> tuple[float, float] | None:
        """AP at the end of burn-in and now, where the latter is clearly below."""
        if self._at_start is None or self._now is None:
            return None
        if self._now >= FALLEN * self._at_start or self._now > self._at_start - FALLEN_BY:
            return None
        return self._at_start, self._now


class LabelWatch:
    """The pseudo labels of the last log lines."""

    def __init__(self) -> None:
        self._found: deque[float] = deque(maxlen=WINDOW)  # per image
        self._classes: deque[torch.Tensor] = deque(maxlen=WINDOW)  # counts by label

    def take(self, per_image: float, labels: PaddedTargets | None) -> None:
        """Takes the pseudo labels per image of a log line, and those of its last forward. Waits for the device."""
        self._found.append(per_image)
        if labels is not None:
            self._classes.append(torch.bincount(labels.labels[labels.valid].cpu(), minlength=1))

    def are_missing(self) -> bool:
        """Whether there were none for a window of log lines."""
        return len(self._found) == WINDOW and not any(self._found)

    def only_class(self) -> int | None:
        """The label of nearly all of them."""
        if len(self._classes) < WINDOW:
            return None
        total = torch.nn.utils.rnn.pad_sequence(list(self._classes), batch_first=True).sum(0)
        label = int(total.argmax())
        enough = int(total.sum()) >= ENOUGH and float(total[label]) >= ONE_CLASS * float(total.sum())
        return label if enough else None
