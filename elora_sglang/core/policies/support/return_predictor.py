"""Will this session come back? A predictor that learns online, and abstains where it has not proved itself.

Every end of a request opens a question: does it go on within :data:`HORIZON_S`? Questions fall into
buckets: by adapter and number of turns so far, and by number of turns alone. A bucket predicts its own share
of returns. Before an answer is learned, the prediction made at the time is scored against it (Brier score, the squared
error), and so is the base rate of all sessions at that time. A bucket acts only when it is calibrated and beats
the base rate by a margin that chance does not explain. On traffic without structure no bucket does.

Every answer is learned when its horizon is over, a return too: learned at once, returns would come in before the
"no" of the same minute, and every rate would look too high.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

#: A session that has not come back after so many seconds counts as ended.
HORIZON_S = 600.0

#: Answers a bucket needs before it may act.
LEAST_ANSWERS = 30.0

#: Answers after which an old one has faded to a third: in the rates, and in the scores that judge them.
MEMORY, SCORE_MEMORY = 500.0, 100.0

#: Predictions of a bucket that had fewer answers are not scored: they say nothing about it.
INFORMED = 10.0

#: The base rate counts like so many answers of every bucket.
PRIOR = 2.0

#: The mean gain in Brier score over the base rate must exceed this, and this many standard errors of it.
LEAST_GAIN, SIGMAS = 0.02, 3.0

#: Largest difference between the mean prediction and the share of returns in a bucket that acts.
LARGEST_BIAS = 0.1

#: Open questions and buckets kept; beyond, the oldest question and the bucket not asked for longest are forgotten.
MOST_QUESTIONS, MOST_BUCKETS = 65_536, 4_096

Bucket = tuple[str | None, int]


class Score:
    """One bucket's running figures, faded exponentially: answers, returns, predictions and gains."""

    __slots__ = ("answers", "gain", "gain2", "outcomes", "predicted", "returns", "scored")

    def __init__(self) -> None:
        self.answers = self.returns = 0.0
        self.scored = self.predicted = self.outcomes = self.gain = self.gain2 = 0.0

    def rate(self, base: float) -> float:
        """Share of returns, drawn towards ``base`` while there are few answers."""
        return (self.returns + PRIOR * base) / (self.answers + PRIOR)

    def learn(self, predicted: float | None, base: float, returned: bool) -> None:
        """Score what was ``predicted``, if anything, and the ``base`` rate then, against the answer; take it in."""
        fade = 1.0 - 1.0 / MEMORY
        outcome = float(returned)
        self.answers = fade * self.answers + 1.0
        self.returns = fade * self.returns + outcome
        if predicted is None:
            return
        gain = (base - outcome) ** 2 - (predicted - outcome) ** 2
        fade = 1.0 - 1.0 / SCORE_MEMORY
        self.scored = fade * self.scored + 1.0
        self.outcomes = fade * self.outcomes + outcome
        self.predicted = fade * self.predicted + predicted
        self.gain = fade * self.gain + gain
        self.gain2 = fade * self.gain2 + gain * gain

    @property
    def acts(self) -> bool:
        """Whether the bucket is calibrated, and better than the base rate beyond chance."""
        n = self.scored
        if n < LEAST_ANSWERS:
            return False
        mean = self.gain / n
        error = math.sqrt(max(self.gain2 / n - mean * mean, 0.0) / n)
        bias = abs(self.predicted - self.outcomes) / n
        return mean > LEAST_GAIN and mean > SIGMAS * error and bias < LARGEST_BIAS


class Question:
    """One end of a request that waits for its answer: predictions made then, and when it is too late to return."""

    __slots__ = ("base", "buckets", "deadline", "predicted", "returned", "turns")

    def __init__(
        self,
        deadline: float,
        turns: int,
        buckets: tuple[Bucket, ...],
        predicted: list[float | None],
        base: float,
    ) -> None:
        self.deadline = deadline
        self.buckets = buckets
        self.predicted = predicted
        self.base = base
        self.turns = turns
        self.returned = False


class ReturnPredictor:
    """Asks, answers and predicts; O(1) an operation. Times are seconds of the tree's clock."""

    def __init__(self) -> None:
        self._base = Score()
        self._scores: OrderedDict[Bucket, Score] = OrderedDict()
        self._questions: deque[Question] = deque()

    @property
    def base_rate(self) -> float:
        """Share of all questions that were answered by a return; 0.5 before the first."""
        return self._base.rate(0.5)

    @staticmethod
    def buckets(adapter: str | None, turns: int) -> tuple[Bucket, ...]:
        """The buckets of a session with so many turns, the finest first. Turns count 1, 2, 3-4, 5-8, more."""
        band = min(max(turns, 1) - 1, 15).bit_length()
        return (f"={adapter}", band), (None, band)

    def ask(self, adapter: str | None, turns: int, now: float) -> Question:
        """Open the question whether a session that just finished its ``turns``-th turn returns."""
        names, base = self.buckets(adapter, turns), self.base_rate
        scores = [self._score(name) for name in names]
        predicted = [score.rate(base) if score.answers >= INFORMED else None for score in scores]
        question = Question(now + HORIZON_S, turns, names, predicted, base)
        self._questions.append(question)
        if len(self._questions) > MOST_QUESTIONS:
            self._questions.popleft()
        return question

    def predict(self, adapter: str | None, turns: int) -> float | None:
        """Probability of a return within the horizon by the finest bucket that may act; ``None``: abstains."""
        base = self.base_rate
        for name in self.buckets(adapter, turns):
            score = self._scores.get(name)
            if score is not None and score.acts:
                return score.rate(base)
        return None

    def returned(self, question: Question, now: float) -> None:
        """The session of ``question`` is back; too late counts as not returned."""
        question.returned = question.returned or now <= question.deadline

    def expire(self, now: float, limit: int = 256) -> None:
        """Learn the answers of at most ``limit`` questions whose time is up."""
        questions = self._questions
        while questions and limit and questions[0].deadline < now:
            question = questions.popleft()
            for name, predicted in zip(question.buckets, question.predicted, strict=True):
                self._score(name).learn(predicted, question.base, question.returned)
            self._base.learn(question.base, question.base, question.returned)
            limit -= 1

    def _score(self, name: Bucket) -> Score:
        score = self._scores.get(name)
        if score is None:
            score = self._scores[name] = Score()
            if len(self._scores) > MOST_BUCKETS:
                self._scores.popitem(last=False)
        else:
            self._scores.move_to_end(name)
        return score
