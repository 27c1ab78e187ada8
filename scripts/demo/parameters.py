"""Made-up parameters: names, values, and the ways in which a person asks for a value."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from demo.words import (
    ADJECTIVES,
    CHOICES,
    CITIES,
    COLORS,
    COMPANIES,
    LANGUAGES,
    NAMES,
    NOUNS,
    SURNAMES,
    draw,
    foreign_word,
    pseudo_word,
)

# (name, kind, cues): the fields of a `Parameter`
_FAMILIAR = (
    ("city", "city", ("in {v}", "for {v}", "in the city of {v}")),
    ("location", "city", ("in {v}", "at {v}", "near {v}", "at the location {v}")),
    ("origin", "city", ("from {v}", "leaving {v}", "starting in {v}")),
    ("destination", "city", ("to {v}", "going to {v}", "with the destination {v}")),
    ("country", "city", ("in {v}", "in the country {v}")),
    ("name", "person", ("for {v}", "named {v}", "with the name {v}")),
    ("customer", "person", ("for {v}", "for the customer {v}", "of the customer {v}")),
    ("author", "person", ("by {v}", "written by {v}", "by the author {v}")),
    ("recipient", "person", ("to {v}", "addressed to {v}", "for the recipient {v}")),
    ("sender", "person", ("from {v}", "sent by {v}")),
    ("manager", "person", ("managed by {v}", "with {v} as manager")),
    ("title", "phrase", ("called {v}", "titled {v}", 'with the title "{v}"', 'called "{v}"')),
    ("query", "phrase", ("for {v}", 'matching "{v}"', "with the query {v}")),
    ("topic", "phrase", ("about {v}", "on {v}", "on the topic of {v}")),
    ("keyword", "word", ("with the keyword {v}", "containing {v}", "with the word {v}")),
    ("category", "word", ("in the category {v}", "of category {v}")),
    ("tag", "word", ("tagged {v}", "with the tag {v}")),
    ("ingredient", "word", ("with {v}", "made with {v}", "containing {v}")),
    ("username", "word", ("of the user {v}", "for the username {v}", "for user {v}")),
    ("note", "phrase", ('with the note "{v}"', "with a note saying {v}", "noting {v}")),
    ("date", "date", ("on {v}", "for {v}", "dated {v}")),
    ("start_date", "date", ("from {v}", "starting on {v}", "beginning {v}")),
    ("end_date", "date", ("until {v}", "ending on {v}", "up to {v}")),
    ("due_date", "date", ("due on {v}", "due {v}", "by {v}")),
    ("time", "time", ("at {v}", "at {v} sharp", "for {v} o'clock")),
    ("symbol", "symbol", ("of {v}", "for {v}", "for the symbol {v}")),
    ("company", "company", ("of {v}", "for the company {v}", "at {v}")),
    ("brand", "company", ("of the brand {v}", "made by {v}", "by {v}")),
    ("days", "small", ("for {v} days", "over the next {v} days", "for the next {v} days")),
    ("hours", "small", ("for {v} hours", "lasting {v} hours")),
    ("limit", "small", ("at most {v}", "with a limit of {v}", "no more than {v}")),
    ("people", "small", ("for {v} people", "with {v} people")),
    ("quantity", "small", ("{v} times", "{v} of them", "in a quantity of {v}")),
    ("age", "small", ("aged {v}", "who is {v} years old", "of age {v}")),
    ("year", "year", ("in {v}", "of {v}", "from the year {v}", "for the year {v}")),
    ("amount", "number", ("of {v}", "in the amount of {v}", "worth {v}")),
    ("max_price", "number", ("under {v} dollars", "for at most {v} dollars", "below {v}")),
    ("min_price", "number", ("over {v} dollars", "for at least {v} dollars", "above {v}")),
    ("distance", "number", ("within {v} kilometers", "at a distance of {v}")),
    ("email", "email", ("to {v}", "with the email {v}", "for {v}")),
    ("id", "code", ("with id {v}", "number {v}", "with the id {v}")),
    ("order_id", "code", ("of order {v}", "for order {v}", "with the order id {v}")),
    ("path", "path", ("in {v}", "at {v}", "from the file {v}")),
    ("color", "color", ("in {v}", "colored {v}", "in the color {v}")),
    ("language", "language", ("in {v}", "into {v}", "in the language {v}")),
)
_GENERIC_CUES = (
    "with {w} {v}",
    "with {w} set to {v}",
    "with the {w} {v}",
    "where {w} is {v}",
    "using {v} as {w}",
    "with {v} as the {w}",
    "{w}: {v}",
    "{w} = {v}",
)
_BOOLEAN_CUES = (
    ("with {w}", "without {w}"),
    ("with {w} on", "with {w} off"),
    ("{w}: yes", "{w}: no"),
)
_GENERIC_KINDS = (
    "word",
    "word",
    "phrase",
    "choice",
    "choice",
    "integer",
    "number",
    "boolean",
    "list",
    "code",
)
_TYPES = {
    "small": "integer",
    "year": "integer",
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
    "list": "array",
}


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool, or one property of a JSON schema.

    kind     what its values are: a case of `make_value`
    cues     ways to say a value: texts with {v} for the value and {w} for the name; for a boolean
             pairs of them, what is said for true and for false
    choices  the values of the kind "choice"
    """

    name: str
    kind: str
    cues: tuple
    choices: tuple[str, ...] = ()
    description: str = ""
    required: bool = True

    @property
    def words(self) -> str:
        """The name as it is said."""
        return self.name.replace("_", " ")

    def schema(self) -> dict[str, Any]:
        """JSON schema of its values."""
        schema: dict[str, Any] = {"type": _TYPES.get(self.kind, "string")}
        if self.kind == "choice":
            schema["enum"] = list(self.choices)
        if self.kind == "list":
            schema["items"] = {"type": "string"}
        if self.description:
            schema["description"] = self.description
        return schema

    def say(self, cue: Any, value: Any) -> str:
        """A cue with the value filled in."""
        if isinstance(cue, tuple):
            cue = cue[0] if value else cue[1]
        said = value
        if isinstance(value, list):
            said = " and ".join((", ".join(value[:-1]), value[-1])) if len(value) > 1 else value[0]
        return cue.format(v=said, w=self.words)


def make_noun(random: Random, held_out: bool) -> str:
    """One or two words for a thing; every tenth is a word that does not exist."""
    kind = random.random()
    if kind < 0.1:
        return pseudo_word(random, held_out)
    noun = draw(random, NOUNS, held_out)
    if kind < 0.55:
        return noun
    return f"{draw(random, random.choice((NOUNS, ADJECTIVES)), held_out)} {noun}"


def make_value(random: Random, parameter: Parameter, held_out: bool) -> Any:  # noqa: PLR0912
    """A value of the parameter's kind."""

    def one(words: tuple[str, ...]) -> str:
        return draw(random, words, held_out)

    made_up = pseudo_word(random, held_out)
    match parameter.kind:
        case "city" | "person" if not held_out and random.random() < 0.05:
            return foreign_word(random)
        case "city":
            return one(CITIES) if random.random() < 0.6 else made_up.capitalize()
        case "person":
            first = one(NAMES) if random.random() < 0.6 else made_up.capitalize()
            return first if random.random() < 0.4 else f"{first} {one(SURNAMES)}"
        case "company":
            return one(COMPANIES).split("=")[0] if random.random() < 0.6 else made_up.capitalize()
        case "symbol":
            letters = "".join(random.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=random.randint(2, 4)))
            return one(COMPANIES).split("=")[1] if random.random() < 0.4 else letters
        case "phrase":
            return " ".join(make_noun(random, held_out) for _ in range(random.randint(1, 2)))
        case "word":
            return made_up if random.random() < 0.3 else one(NOUNS)
        case "date":
            return (
                f"20{random.randint(10, 39)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}"
            )
        case "time":
            return f"{random.randint(0, 23):02}:{random.choice((0, 10, 15, 20, 30, 45)):02}"
        case "email":
            return f"{made_up}@{random.choice(('example', 'mail', 'test'))}.{random.choice(('com', 'org', 'net'))}"
        case "code":
            letters = "".join(random.choices("ABCDEFGHKLMNPRSTXZ", k=random.randint(1, 3)))
            return f"{letters}{random.choice(('-', '', '_'))}{random.randint(1, 9999)}"
        case "path":
            return f"{random.choice(('', 'docs/', '/tmp/', 'data/'))}{made_up}.{random.choice(('txt', 'csv', 'md'))}"
        case "color":
            return one(COLORS)
        case "language":
            return one(LANGUAGES)
        case "year":
            return random.randint(1950, 2030)
        case "small":
            return random.randint(1, 30)
        case "integer":
            return random.choice((random.randint(0, 99), random.randint(100, 99999)))
        case "number":
            return round(random.uniform(0, 10 ** random.randint(1, 4)), random.randint(1, 2))
        case "boolean":
            return random.random() < 0.5
        case "list":
            return [
                one(NOUNS) if random.random() < 0.7 else pseudo_word(random, held_out)
                for _ in range(random.randint(2, 3))
            ]
        case "choice":
            return random.choice(parameter.choices)
    raise ValueError(f"there is no kind {parameter.kind!r}")


def make_parameter(random: Random, held_out: bool) -> Parameter:
    """A parameter with a familiar name, or one that is named by any noun."""
    if random.random() < 0.65:
        made = Parameter(*random.choice(_FAMILIAR))
    else:
        kind = random.choice(_GENERIC_KINDS)
        name = make_noun(random, held_out).replace(" ", "_")
        made = Parameter(name, kind, _BOOLEAN_CUES if kind == "boolean" else _GENERIC_CUES)
        if kind == "choice":
            real = random.random() < 0.85
            words = [
                draw(random, CHOICES, held_out) if real else pseudo_word(random, held_out)
                for _ in range(6)
            ]
            made = replace(made, choices=tuple(dict.fromkeys(words))[: random.randint(2, 4)])
    if random.random() < 0.35:
        forms = ("The {}.", "The {} to use.", "Which {}.", "{} of the request.", "The {}")
        made = replace(made, description=random.choice(forms).format(made.words))
    return made


def make_parameters(
    random: Random, held_out: bool, most: int, known: tuple[Parameter, ...] = ()
) -> tuple[Parameter, ...]:
    """One or more parameters of different names; some come from `known`, perhaps renamed."""
    made: dict[str, Parameter] = {}
    numbers = (1, 1, 2, 2, 3) if held_out else (1, 2, 2, 3, 3)  # training has more of what is hard
    for _ in range(random.choice([n for n in numbers if n <= most])):
        take = known and random.random() < 0.35
        parameter = random.choice(known) if take else make_parameter(random, held_out)
        made.setdefault(parameter.name, parameter)
    return tuple(made.values())
