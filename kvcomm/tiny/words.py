"""The small language that the embedded model speaks: word lists and the three domains built from them.

A domain is what a workload talks about: owners, their attributes and one attribute that links an owner to another owner
(for two-hop questions). Every word is one token, see `tokenizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODE", "DOMAINS", "MATH", "RETRIEVAL", "ROLES", "STYLES", "Domain", "all_words"]

PEOPLE = (
    "alice bob carol dan erin frank grace henry iris jack karen leo mona nick olga paul quinn rosa sam tina uma victor wendy "
    "xavier yara zane amy ben clara david elsa fred gina hugo ines jonas kim lars mia noel otto pia ralf sara tom ute vera will"
).split()
CITIES = (
    "rome oslo paris berlin madrid lima cairo delhi tokyo seoul milan lyon porto turin dublin prague vienna athens warsaw "
    "geneva boston miami denver austin sydney perth quito havana kyoto osaka hanoi manila"
).split()
PETS = "dog cat horse parrot rabbit turtle snake hamster goat pony ferret lizard frog duck goose owl".split()
FOODS = "pizza pasta rice soup bread cheese salad curry sushi steak noodles tacos apples grapes beans honey".split()
COLORS = "red blue green yellow black white purple orange pink brown gray gold".split()
FUNCTIONS = (
    "parse load save merge sort find split join read write open close scan print push pop map trim pack send copy move wrap "
    "lock hash sum fold zip seek flush"
).split()
TYPES = "int str list dict bool float tuple bytes set none path date".split()
ERRORS = "timeout overflow missing denied broken stale refused empty full unknown expired corrupt".split()
VARIABLES = "x y z n m k".split()
DIGITS = [str(i) for i in range(10)]
NUMBERS = [str(i) for i in range(21)]
STEPS = "a b c d e".split()

ADJECTIVES = "old new small large quiet busy warm cold bright dark".split()
NOUNS = "river market garden train window library bridge morning letter street".split()
VERBS = "waits moves shines rests opens closes turns falls grows stays".split()
ADVERBS = "slowly quickly often again today softly alone there early late".split()

ROLES = (
    "clerk analyst writer critic judge planner coder tester lawyer doctor teacher scout auditor editor worker reviewer".split()
)
STYLES = ("plain", "loud")

GLUE = (
    "you are the a careful agent of team . , : ? your style is use only what said below about next and so plus minus says "
    "questions now write final answer in role ( )"
).split()


@dataclass(frozen=True)
class Domain:
    """What one workload talks about."""

    name: str
    document: str  # the word that opens a document
    owners: tuple[str, ...]
    values: dict[str, tuple[str, ...]]  # attribute -> what it may be; several words are several tokens
    link: str  # the attribute whose value is another owner
    memo: str  # the word for a result that later agents build on
    arithmetic: bool = False  # memos are running totals


RETRIEVAL = Domain(
    "retrieval",
    "report",
    tuple(PEOPLE),
    {
        "city": tuple(CITIES),
        "pet": tuple(PETS),
        "food": tuple(FOODS),
        "color": tuple(COLORS),
        "code": tuple(f"{a} {b}" for a in DIGITS for b in DIGITS),
    },
    "boss",
    "note",
)
MATH = Domain(
    "math",
    "sheet",
    tuple(PEOPLE),
    {thing: tuple(DIGITS[1:]) for thing in ("pears", "plums", "nuts", "eggs", "figs")},
    "friend",
    "total",
    arithmetic=True,
)
LINES = tuple(f"{f} ( {VARIABLES[i % len(VARIABLES)]} )" for i, f in enumerate(FUNCTIONS))  # a line of code, quoted whole
CODE = Domain(
    "code",
    "spec",
    tuple(PEOPLE),  # modules are named after people
    {"takes": tuple(TYPES), "returns": tuple(TYPES), "raises": tuple(ERRORS), "head": LINES, "tail": LINES},
    "calls",
    "patch",
)
DOMAINS = {d.name: d for d in (RETRIEVAL, MATH, CODE)}


def all_words() -> list[str]:
    """Every word of the language, each once, in a fixed order."""
    values = [v for d in DOMAINS.values() for vs in d.values.values() for v in vs]
    lower = [*GLUE, *ROLES, *STYLES, *PEOPLE, *FUNCTIONS, *NUMBERS, *STEPS, *ADJECTIVES, *NOUNS, *VERBS, *ADVERBS]
    lower += [word for d in DOMAINS.values() for word in (d.document, d.link, d.memo, *d.values)]
    lower += [word for v in values for word in v.split()]
    upper = [word.upper() for v in values for word in v.split()]
    return list(dict.fromkeys([*lower, *upper]))
