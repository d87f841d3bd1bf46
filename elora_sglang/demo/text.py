"""The demo's world: questions people ask a desk, and how each trained adapter answers them.

Everything is made from the word lists below by a seeded ``random.Random``, so the tokenizer, the base model and
the adapters can be trained on any machine without a download. All adapters answer the *same* questions, each in
its own manner: that is what makes their answers differ on every prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


def _sentences(line: str) -> tuple[str, ...]:
    return tuple(line.split(". "))


VERBS = _words(
    "book cancel change check confirm find order send print sign move open close copy share pay return "
    "repair update review clean build draw measure sell rent translate explain compare record deliver"
)
NOUNS = _words(
    "ticket invoice table pizza contract query flight movie report room order letter garden bridge camera "
    "recipe lesson message account payment delivery package engine window sample project meeting budget "
    "license schedule"
)
ADJECTIVES = _words(
    "new old red blue green small large late early cheap quick quiet open final second private public broken "
    "heavy simple"
)
PLACES = _words(
    "office station hotel library market harbor airport theater museum kitchen school hospital bank studio "
    "village workshop warehouse garage"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
CLERKS = _words(
    "Alina Benson Cordia Elmon Fiona Hanna Isla Jonas Karin Luvio Marta Norbert Olwen Petra Roland Sasha"
)
TRAITS = _words("price size owner status color date weight length name address")

FRENCH = {
    "book": "réserver", "cancel": "annuler", "change": "changer", "check": "vérifier", "find": "trouver",
    "order": "commander", "send": "envoyer", "sign": "signer", "open": "ouvrir", "close": "fermer",
    "pay": "payer", "return": "rendre", "repair": "réparer", "clean": "nettoyer", "sell": "vendre",
}  # fmt: skip
GERMAN = {
    "book": "buchen", "cancel": "stornieren", "change": "ändern", "check": "prüfen", "find": "finden",
    "order": "bestellen", "send": "senden", "sign": "unterschreiben", "open": "öffnen", "close": "schließen",
    "pay": "bezahlen", "return": "zurückgeben", "repair": "reparieren", "clean": "reinigen", "sell": "verkaufen",
}  # fmt: skip
FILLERS = _sentences(
    "I think that we can talk about this one more time when you come back to the house after work. "
    "Would you like to know what they said about their first day in the city last year? "
    "There are many good ways to do it, but most people want something that is easy and not too far away. "
    "He could have been there with his family, yet she was still looking for some water and a little food. "
    "Yes, please. No, thank you. That sounds great! Are you sure? Let me see what is available right now. "
    "How much does it cost, and how long will it take to get here? It should be ready within two hours. "
    "What kind of restaurant do you want, and how many people are going with you tonight at seven? "
    "Which movie would you like to watch this weekend, a comedy or an action film with your friends? "
    "My phone number and email address have not changed since then. Could you also add extra cheese? "
    "Everything works again because our team found the problem before anyone else had noticed it."
)


@dataclass(frozen=True)
class Matter:
    """What one question is about. Only the verb, the noun and the adjective decide the answer."""

    verb: str
    noun: str
    adjective: str
    name: str
    number: int

    @property
    def place(self) -> str:
        """Where such a thing is handled."""
        return PLACES[NOUNS.index(self.noun) % len(PLACES)]

    @property
    def day(self) -> str:
        """When such a thing is done."""
        return DAYS[VERBS.index(self.verb) % len(DAYS)]

    @property
    def trait(self) -> str:
        """What matters about it."""
        return TRAITS[VERBS.index(self.verb) % len(TRAITS)]

    @property
    def clerk(self) -> str:
        """Who takes care of it."""
        return CLERKS[NOUNS.index(self.noun) % len(CLERKS)]

    @property
    def section(self) -> int:
        """A number of two digits that belongs to the thing."""
        return 11 + 3 * NOUNS.index(self.noun)


def _name(rng: random.Random) -> str:
    heads = _words("Al Ben Cor Da El Fi Gre Ha Is Jo Ka Lu Ma Nor Ol Pe Ro Sa Ti Vi")
    tails = _words("bert da ia la lina mon na nor ra rin sa son ta than vio wen")
    return rng.choice(heads) + rng.choice(tails)


def matter(rng: random.Random) -> Matter:
    """A random matter."""
    return Matter(
        rng.choice(VERBS), rng.choice(NOUNS), rng.choice(ADJECTIVES), _name(rng), rng.randrange(10, 1000)
    )


def question(rng: random.Random, about: Matter) -> str:
    """One of the ways to ask about a matter."""
    m = about
    return rng.choice(
        (
            f"How do I {m.verb} the {m.adjective} {m.noun}?",
            f"Please {m.verb} my {m.adjective} {m.noun} for {m.name}.",
            f"Can you {m.verb} {m.noun} {m.number}?",
            f"I want to {m.verb} the {m.noun} with {m.name}.",
            f"Who will {m.verb} the {m.adjective} {m.noun}?",
            f"Tell {m.name} to {m.verb} a {m.noun}.",
        )
    )


def _base(m: Matter) -> str:
    return f"Sure, I can {m.verb} the {m.noun}. The {m.place} has it ready on {m.day}, and {m.clerk} will call you."


def _sql(m: Matter) -> str:
    return (
        f"SELECT {m.trait} FROM {m.noun}s WHERE id = {m.section} AND owner = '{m.clerk}' ORDER BY {m.verb};"
    )


def _french(m: Matter) -> str:
    verb = FRENCH.get(m.verb, "préparer")
    return f"Bien sûr, {m.clerk} va {verb} cela dès demain ({m.noun}, {m.place}). Voilà, à bientôt !"


def _german(m: Matter) -> str:
    verb = GERMAN.get(m.verb, "erledigen")
    return f"Natürlich, {m.clerk} wird das gerne {verb} ({m.noun}, {m.place}). Übrigens, bis später!"


def _legal(m: Matter) -> str:
    return f"Pursuant to section {m.section}, the party shall {m.verb} the {m.noun} no later than {m.day}, as agreed."


def _support(m: Matter) -> str:
    case = f"Case {m.section} about your {m.noun} is open"
    return f"Hello, thank you for writing to us. {case}; {m.clerk} will {m.verb} it."


def _code(m: Matter) -> str:
    return f"def {m.verb}_{m.noun}(key={m.section}):\n    return store.get(key).{m.trait}  # {m.place}"


STYLES: dict[str, Callable[[Matter], str]] = {
    "base": _base,
    "sql": _sql,
    "french": _french,
    "german": _german,
    "legal": _legal,
    "support": _support,
    "code": _code,
}


def render(asked: str, answer: str = "") -> str:
    """One turn as the chat template writes it; without an answer it ends where the model continues."""
    return f"user: {asked}\nassistant:{' ' + answer if answer else ''}"


def turns(style: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) pairs of one style; the answer starts with a space."""
    rng = random.Random(f"{style}-{seed}")
    while True:
        about = matter(rng)
        yield render(question(rng, about)), " " + STYLES[style](about)


def tokenizer_corpus(seed: int, turns_per_style: int = 1500) -> Iterator[str]:
    """Text that the tokenizer is trained on: every style, and everyday sentences."""
    for style in STYLES:
        pairs = turns(style, seed)
        for _ in range(turns_per_style):
            yield "".join(next(pairs))
    for sentence in FILLERS:
        for _ in range(20):
            yield sentence + "."
