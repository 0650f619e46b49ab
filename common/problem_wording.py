"""Sentences of the generated word problems: settings, clauses, names and number words.

Slots of a clause: {N} who or what the problem is about, {S}/{s}/{o}/{p} the pronoun as subject
(capital, small), object and possessive, {x} the counted thing, {c} the container, {n} a number in
digits, and for a factor or divisor {T} "three times", {V} "triples", {F} "a third".  No clause puts
a number directly before a full stop or directly after a punctuation mark: the former would hide it
from the key-token rule, the latter would cost a token for the blank.
"""

from dataclasses import dataclass

TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
GROWS = {2: "doubles", 3: "triples", 4: "quadruples", 5: "grows fivefold"}
FRACTION = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}

_SHE = ("She", "she", "her", "her")
_HE = ("He", "he", "him", "his")
_THEY = ("They", "they", "them", "their")
_IT = ("It", "it", "it", "its")


def _people(pronoun: tuple[str, ...], names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name, *pronoun) for name in names.split())


_PEOPLE = _people(_SHE, "Nina Mia Ruth Ada Lena Zoe Iris Tara Ella Jade Rosa Vera") + _people(
    _HE, "Leo Omar Tom Ravi Hugo Ivan Noah Paul Eric Luke Ben Amir"
)
_NOBODY = (("", *_IT),)


@dataclass(frozen=True)
class Setting:
    """One everyday scene with its own clauses.

    Attributes:
        subjects: (name, subject pronoun capital, small, object, possessive) to choose from.
        things: plural nouns for {x}.
        containers: nouns for {c}.
        opening: clauses that state the start value.
        steps: operation sign -> clauses that apply it to the running result.
        question: closing questions that ask for the running result.
    """

    subjects: tuple[tuple[str, ...], ...]
    things: tuple[str, ...]
    containers: tuple[str, ...]
    opening: tuple[str, ...]
    steps: dict[str, tuple[str, ...]]
    question: tuple[str, ...]


_COLLECTION = Setting(
    subjects=_PEOPLE,
    things=("pens", "cards", "shells", "stamps", "coins", "beads", "marbles", "books", "plums"),
    containers=("box", "bag", "drawer"),
    opening=(
        "{N} has {n} {x}.",
        "{N} owns {n} {x}.",
        "{N} finds {n} {x} in a {c}.",
        "{N} keeps {n} {x} in a {c}.",
        "{N} starts the day with {n} {x}.",
    ),
    steps={
        "+": (
            "{S} buys {n} more.",
            "{S} gets {n} more from a friend.",
            "Then {s} finds {n} more.",
            "A cousin brings {o} {n} extra {x}.",
            "{S} wins {n} new {x}.",
            "{S} adds {n} {x} to the rest.",
            "Later {s} picks up {n} more.",
        ),
        "-": (
            "{S} gives away {n} of them.",
            "{S} loses {n} of them.",
            "{S} sells {n} {x}.",
            "{S} hands {n} {x} to a friend.",
            "{S} drops {n} of them in a river.",
            "A neighbor takes {n} of them.",
            "{S} throws out {n} old ones.",
        ),
        "*": (
            "Then {p} pile {V}.",
            "Soon {s} has {T} as many.",
            "{S} swaps all {x} for {T} as many.",
            "Now {s} owns {T} as many {x}.",
            "By noon the number {V}.",
            "Then {p} number of {x} {V}.",
        ),
        "/": (
            "{S} keeps only {F} of all {x}.",
            "Then only {F} of the {x} are left.",
            "{S} makes {n} equal heaps of all, keeping one.",
            "Now {s} has only {F} as many.",
            "{S} splits all {x} into {n} equal parts, keeping one.",
            "Then {p} pile shrinks to {F} its size.",
        ),
    },
    question=(
        "How many {x} does {s} have now?",
        "How many are left with {o}?",
        "How many {x} does {N} have in the end?",
        "Now how many does {s} have?",
    ),
)

_MONEY = Setting(
    subjects=_PEOPLE,
    things=("dollars",),
    containers=("jar", "purse"),
    opening=(
        "{N} has {n} dollars.",
        "{N} saves ${n} in a {c}.",
        "{N} starts the day with ${n} in a {c}.",
    ),
    steps={
        "+": (
            "{S} earns {n} dollars more.",
            "An aunt gives {o} ${n} as a gift.",
            "{S} finds ${n} on the road.",
            "{S} gets {n} more dollars from a friend.",
            "A job pays {o} ${n} more.",
        ),
        "-": (
            "{S} spends {n} dollars on lunch.",
            "{S} pays ${n} for a book.",
            "A ticket costs {o} {n} dollars.",
            "{S} lends {n} dollars to a friend.",
            "{S} gives ${n} to a school.",
        ),
        "*": (
            "Then {p} money {V}.",
            "Soon {s} has {T} as much.",
            "After a smart deal {s} has {T} as much.",
            "By noon the amount {V}.",
        ),
        "/": (
            "{S} keeps only {F} of {p} money.",
            "{S} loses all but {F} of {p} money.",
            "Now {s} has only {F} as much.",
            "Then {p} money shrinks to {F} of that.",
        ),
    },
    question=(
        "How much money does {s} have now?",
        "How many dollars does {N} have in the end?",
        "How many dollars are left with {o}?",
    ),
)

_RIDERS = Setting(
    subjects=_NOBODY,
    things=("riders",),
    containers=("bus", "train", "tram", "ferry"),
    opening=(
        "A {c} starts with {n} riders.",
        "A {c} leaves town with {n} riders.",
        "There are {n} riders on a {c}.",
    ),
    steps={
        "+": (
            "Then {n} more get on.",
            "At a stop another {n} get on.",
            "It picks up {n} more riders.",
            "Next {n} new riders get on.",
        ),
        "-": (
            "Then {n} of them get off.",
            "At a stop {n} riders step off.",
            "It drops off {n} riders.",
            "Soon {n} riders leave the {c}.",
        ),
        "*": (
            "At a stop the number {V}.",
            "Soon it carries {T} as many.",
            "After a game it has {T} as many riders.",
            "Then the number of riders {V}.",
        ),
        "/": (
            "At a stop only {F} of the riders stay.",
            "Soon just {F} of the riders remain.",
            "Then it carries only {F} as many.",
            "After a game only {F} of the riders remain.",
        ),
    },
    question=(
        "How many riders are on the {c} now?",
        "How many riders does it carry now?",
        "How many are still on it?",
    ),
)

_WATER = Setting(
    subjects=_NOBODY,
    things=("liters",),
    containers=("tank", "barrel", "pool", "tub"),
    opening=(
        "A {c} holds {n} liters of water.",
        "There are {n} liters in a {c}.",
        "A {c} starts with {n} liters of water.",
    ),
    steps={
        "+": (
            "Rain adds {n} liters.",
            "Then {n} more liters flow in.",
            "A hose pours in {n} liters more.",
            "At night {n} extra liters flow in.",
        ),
        "-": (
            "Then {n} liters leak out.",
            "A cow drinks {n} liters of it.",
            "A pump takes out {n} liters.",
            "The sun dries up {n} liters.",
        ),
        "*": (
            "By noon the amount {V}.",
            "After a storm it holds {T} as much.",
            "Soon it holds {T} as much.",
            "After rain the amount {V}.",
        ),
        "/": (
            "Then only {F} of the water is left.",
            "A crack leaves only {F} of the water.",
            "Soon it holds only {F} as much.",
            "A leak drains all but {F} of the water.",
        ),
    },
    question=(
        "How many liters does it hold now?",
        "How much water is in it, in liters?",
        "How many liters are left in the {c}?",
    ),
)

_SCORE = Setting(
    subjects=_PEOPLE,
    things=("points",),
    containers=("game", "match", "quiz"),
    opening=(
        "{N} scores {n} points in a {c}.",
        "{N} starts a {c} with {n} points.",
        "In a {c} {N} has {n} points.",
    ),
    steps={
        "+": (
            "{S} gains {n} more points.",
            "A lucky card gives {o} {n} points.",
            "{S} wins {n} more points in a round.",
            "Next {s} adds {n} to the score.",
        ),
        "-": (
            "A foul costs {o} {n} points.",
            "{S} loses {n} points in a round.",
            "A mistake takes {n} points from {o}.",
            "Next {s} drops {n} points.",
        ),
        "*": (
            "Then {p} score {V}.",
            "A bonus makes the score {T} as high.",
            "Soon {s} has {T} that score.",
            "With a star card {p} score {V}.",
        ),
        "/": (
            "A penalty leaves only {F} of the score.",
            "Then {p} score falls to {F} of that.",
            "A trap cuts the score to {F}.",
            "Now {s} has only {F} as many points.",
        ),
    },
    question=(
        "What is {p} score now?",
        "How many points does {s} have now?",
        "What score does {N} have in the end?",
    ),
)

_PLANT = Setting(
    subjects=_NOBODY,
    things=("cm",),
    containers=("vine", "bush", "tree", "fern"),
    opening=(
        "A {c} is {n} cm tall.",
        "A young {c} is {n} cm high.",
        "A {c} starts the year at {n} cm tall.",
    ),
    steps={
        "+": (
            "It grows {n} cm more.",
            "In spring it gains {n} cm.",
            "Warm rain adds {n} cm to it.",
            "Then it grows another {n} cm.",
        ),
        "-": (
            "A goat bites off {n} cm.",
            "Wind breaks off {n} cm of it.",
            "A farmer trims off {n} cm.",
            "Then it loses {n} cm in a storm.",
        ),
        "*": (
            "Then its height {V}.",
            "By fall it is {T} as tall.",
            "In a year it gets {T} as tall.",
            "In spring the height {V}.",
        ),
        "/": (
            "Frost cuts it to {F} its height.",
            "A storm leaves only {F} of its height.",
            "Now it is only {F} as tall.",
            "A saw cuts it to {F} its height.",
        ),
    },
    question=(
        "How tall is it now in cm?",
        "How many cm tall is the {c} now?",
        "What is its height now, in cm?",
    ),
)

_FARM = Setting(
    subjects=_NOBODY,
    things=("hens", "goats", "sheep", "ducks", "cows", "geese"),
    containers=("farm",),
    opening=(
        "A farm has {n} {x}.",
        "A farmer raises {n} {x}.",
        "There are {n} {x} on a farm.",
    ),
    steps={
        "+": (
            "Then {n} more are born.",
            "The farmer buys {n} more.",
            "Next another {n} arrive by truck.",
            "A truck brings {n} more {x}.",
        ),
        "-": (
            "The farmer sells {n} of them.",
            "At night {n} {x} run off.",
            "A fox scares off {n} of them.",
            "Then {n} {x} move to a zoo.",
        ),
        "*": (
            "After a year the herd {V}.",
            "By May there are {T} as many.",
            "In spring the number {V}.",
            "Soon {T} as many live there.",
        ),
        "/": (
            "After a flood only {F} of all {x} remain.",
            "The farmer keeps only {F} of all {x}.",
            "Soon just {F} as many live there.",
            "A storm leaves only {F} of the {x}.",
        ),
    },
    question=(
        "How many {x} are there now?",
        "How many {x} does the farm have now?",
        "How many live on the farm now?",
    ),
)

_BAKERS = Setting(
    subjects=tuple((f"The {name}", *_THEY) for name in ("twins", "scouts", "pupils", "players")),
    things=("cakes", "pies", "rolls", "buns", "muffins"),
    containers=("kitchen",),
    opening=(
        "{N} bake {n} {x}.",
        "{N} have {n} {x} for a fair.",
        "{N} bring {n} {x} to school.",
    ),
    steps={
        "+": (
            "They bake {n} more.",
            "A teacher brings {n} more {x}.",
            "Then they make {n} extra {x}.",
            "A friend gives them {n} more.",
        ),
        "-": (
            "They eat {n} of them.",
            "They sell {n} {x} at a fair.",
            "A dog takes {n} of them.",
            "They hand out {n} {x}.",
        ),
        "*": (
            "By night they have {T} as many.",
            "With help the number {V}.",
            "They swap all {x} for {T} as many.",
            "Then their pile {V}.",
        ),
        "/": (
            "They keep only {F} of all {x}.",
            "By noon only {F} of the {x} are left.",
            "They split all {x} into {n} equal parts, keeping one.",
            "Rain ruins all but {F} of the {x}.",
        ),
    },
    question=(
        "How many {x} do they have now?",
        "How many are left with them?",
        "How many {x} do they have in the end?",
    ),
)

_SHOP = Setting(
    subjects=_NOBODY,
    things=("lamps", "radios", "bikes", "vases", "hats", "shirts", "chairs"),
    containers=("shop", "store"),
    opening=(
        "A {c} stocks {n} {x}.",
        "There are {n} {x} in a {c}.",
        "A {c} starts the week with {n} {x}.",
    ),
    steps={
        "+": (
            "A van brings {n} more.",
            "The owner orders {n} more {x}.",
            "Then {n} new {x} arrive.",
            "It takes back {n} sold {x}.",
        ),
        "-": (
            "It sells {n} {x}.",
            "People buy {n} of them.",
            "The owner sends back {n} of them.",
            "A thief steals {n} {x}.",
        ),
        "*": (
            "Next week the stock {V}.",
            "For a sale it stocks {T} as many.",
            "Then it has {T} as many {x}.",
            "In May the stock {V}.",
        ),
        "/": (
            "A sale leaves only {F} of the {x}.",
            "The stock shrinks to {F} its size.",
            "Soon it holds only {F} as many.",
            "A flood ruins all but {F} of the {x}.",
        ),
    },
    question=(
        "How many {x} are in stock now?",
        "How many {x} does the {c} have now?",
        "How many {x} are left in the {c}?",
    ),
)

SETTINGS = (_COLLECTION, _MONEY, _RIDERS, _WATER, _SCORE, _PLANT, _FARM, _BAKERS, _SHOP)
