"""Made-up parameters and tools, and the ways in which a person says what should go into them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from mistral.demo.words import (
    ADJECTIVES,
    CHOICES,
    CITIES,
    COMPANIES,
    NAMES,
    NOUNS,
    SURNAMES,
    VERBS,
    pseudo_word,
    split,
)

# (name, kind, how its value is said). Kinds are those of `make_value`.
FAMILIAR = (
    ("city", "city", ("in {v}", "for {v}", "in the city of {v}")),
    ("location", "city", ("in {v}", "for {v}", "at {v}", "near {v}")),
    ("origin", "city", ("from {v}", "leaving {v}")),
    ("destination", "city", ("to {v}", "going to {v}")),
    ("name", "person", ("for {v}", "named {v}", "of {v}", "with the name {v}")),
    ("customer", "person", ("for {v}", "for the customer {v}", "of {v}")),
    ("author", "person", ("by {v}", "written by {v}")),
    ("recipient", "person", ("to {v}", "addressed to {v}")),
    ("title", "phrase", ("called {v}", "titled {v}", 'with the title "{v}"', 'called "{v}"')),
    ("query", "phrase", ("for {v}", "about {v}", 'matching "{v}"')),
    ("topic", "phrase", ("about {v}", "on {v}", "on the topic of {v}")),
    ("date", "date", ("on {v}", "for {v}", "dated {v}")),
    ("start_date", "date", ("from {v}", "starting on {v}", "beginning {v}")),
    ("end_date", "date", ("until {v}", "ending on {v}", "up to {v}")),
    ("time", "time", ("at {v}", "at {v} sharp")),
    ("symbol", "symbol", ("of {v}", "for {v}", "for the symbol {v}")),
    ("company", "company", ("of {v}", "for {v}", "at {v}")),
    ("days", "small", ("for {v} days", "over the next {v} days", "for the next {v} days")),
    ("limit", "small", ("at most {v}", "with a limit of {v}", "no more than {v}")),
    ("people", "small", ("for {v} people", "with {v} people")),
    ("quantity", "small", ("{v} times", "{v} of them", "in a quantity of {v}")),
    ("amount", "number", ("of {v}", "in the amount of {v}", "worth {v}")),
    ("max_price", "number", ("under {v} dollars", "for at most {v} dollars", "below {v}")),
    ("email", "email", ("to {v}", "with the email {v}", "for {v}")),
    ("id", "code", ("with id {v}", "number {v}", "{v}", "with the id {v}")),
    ("path", "path", ("in {v}", "at {v}", "from the file {v}")),
)
GENERIC_CUES = {
    "boolean": (("with {w}", "without {w}"), ("with {w} on", "with {w} off"), ("and {w}: yes", "and {w}: no")),
    "": (
        "with {w} {v}",
        "with {w} set to {v}",
        "with a {w} of {v}",
        "where {w} is {v}",
        "using {v} as {w}",
        "with {v} as the {w}",
        "{w}: {v}",
        "{w} = {v}",
        "and {w} {v}",
    ),
}
GENERIC_KINDS = ("word", "word", "phrase", "choice", "choice", "integer", "number", "boolean", "list", "code", "city")
TYPES = {"small": "integer", "integer": "integer", "number": "number", "boolean": "boolean", "list": "array"}


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool, or one property of a JSON schema."""

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
        schema: dict[str, Any] = {"type": TYPES.get(self.kind, "string")}
        if self.kind == "choice":
            schema["enum"] = list(self.choices)
        if self.kind == "list":
            schema["items"] = {"type": "string"}
        if self.description:
            schema["description"] = self.description
        return schema

    def say(self, cue: Any, value: Any) -> str:
        """A cue with the value filled in."""
        if isinstance(cue, tuple):  # a boolean: what is said for true, and for false
            cue = cue[0] if value else cue[1]
        said = value
        if isinstance(value, list):
            said = " and ".join((", ".join(value[:-1]), value[-1])) if len(value) > 1 else value[0]
        return cue.format(v=said, w=self.words)


@dataclass(frozen=True)
class Tool:
    """A made-up function."""

    name: str
    verb: str
    noun: str  # one word or more
    description: str
    parameters: tuple[Parameter, ...]
    returns: str | None = None

    def schema(self) -> dict[str, Any]:
        """The function as a system prompt lists it."""
        properties = {p.name: p.schema() for p in self.parameters}
        required = [p.name for p in self.parameters if p.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        schema = {"name": self.name, "description": self.description, "parameters": parameters}
        return schema | ({"return": {"type": self.returns}} if self.returns else {})


def make_noun(random: Random, held_out: bool) -> str:
    """One or two words for a thing; every third is a word that does not exist."""
    kind = random.random()
    if kind < 0.3:
        return pseudo_word(random, held_out)
    noun = random.choice(split(NOUNS, held_out))
    if kind < 0.55:
        return noun
    first = random.choice((split(NOUNS, held_out), split(ADJECTIVES, held_out), [pseudo_word(random, held_out)]))
    return f"{random.choice(first)} {noun}"


def make_value(random: Random, parameter: Parameter, held_out: bool) -> Any:
    """A value of the parameter's kind."""

    def one(words: list[str]) -> str:
        return random.choice(split(words, held_out))

    made_up = pseudo_word(random, held_out)
    match parameter.kind:
        case "city":
            return one(CITIES) if random.random() < 0.5 else made_up.capitalize()
        case "person":
            first = one(NAMES) if random.random() < 0.6 else made_up.capitalize()
            return first if random.random() < 0.4 else f"{first} {one(SURNAMES)}"
        case "company":
            return one(COMPANIES).split("=")[0] if random.random() < 0.5 else made_up.capitalize()
        case "symbol":
            letters = "".join(random.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=random.randint(2, 4)))
            return one(COMPANIES).split("=")[1] if random.random() < 0.4 else letters
        case "phrase":
            return " ".join(make_noun(random, held_out) for _ in range(random.randint(1, 2)))
        case "word":
            return made_up if random.random() < 0.5 else one(NOUNS)
        case "date":
            return f"20{random.randint(10, 39)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}"
        case "time":
            return f"{random.randint(0, 23):02}:{random.choice((0, 10, 15, 20, 30, 45)):02}"
        case "email":
            return f"{made_up}@{random.choice(('example', 'mail', 'test'))}.{random.choice(('com', 'org', 'net'))}"
        case "code":
            letters = "".join(random.choices("ABCDEFGHKLMNPRSTXZ", k=random.randint(1, 3)))
            return f"{letters}{random.choice(('-', '', '_'))}{random.randint(1, 9999)}"
        case "path":
            return f"{random.choice(('', 'docs/', '/tmp/', 'data/'))}{made_up}.{random.choice(('txt', 'csv', 'md'))}"
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
                one(NOUNS) if random.random() < 0.5 else pseudo_word(random, held_out)
                for _ in range(random.randint(2, 3))
            ]
        case "choice":
            return random.choice(parameter.choices)
    raise ValueError(f"there is no kind {parameter.kind!r}")


def make_parameter(random: Random, held_out: bool) -> Parameter:
    """A parameter with a familiar name, or one that is named by any noun."""
    if random.random() < 0.4:
        made = Parameter(*random.choice(FAMILIAR))
    else:
        kind = random.choice(GENERIC_KINDS)
        name = make_noun(random, held_out).replace(" ", "_")
        made = Parameter(name, kind, GENERIC_CUES["boolean" if kind == "boolean" else ""])
        if kind == "choice":
            words = (
                split(CHOICES, held_out) if random.random() < 0.7 else [pseudo_word(random, held_out) for _ in range(4)]
            )
            made = replace(made, choices=tuple(random.sample(words, random.randint(2, 4))))
    if random.random() < 0.35:
        forms = ("The {}.", "The {} to use.", "Which {}.", "{} of the request.", "The {}")
        made = replace(made, description=random.choice(forms).format(made.words))
    return made


def make_parameters(
    random: Random, held_out: bool, most: int, known: tuple[Parameter, ...] = ()
) -> tuple[Parameter, ...]:
    """One or more parameters of different names; some may be taken over from `known`, perhaps under a new name."""
    made: dict[str, Parameter] = {}
    for _ in range(random.choice([n for n in (1, 1, 2, 2, 3, 4) if n <= most])):
        take = known and random.random() < 0.35
        parameter = random.choice(known) if take else make_parameter(random, held_out)
        made.setdefault(parameter.name, parameter)
    return tuple(made.values())


def make_tool(random: Random, held_out: bool, beside: Tool | None = None) -> Tool:
    """A tool; beside another, often one that is easily taken for it: the same verb or thing, the same parameters."""
    verb, noun = random.choice(list(VERBS)), make_noun(random, held_out)
    if beside is not None and (alike := random.random()) < 0.6:
        verb, noun = (verb, beside.noun) if alike < 0.3 else (beside.verb, noun)
    words = [*verb.split("_"), *noun.split()]
    name = "_".join(words)
    if (style := random.random()) < 0.12:
        name = words[0] + "".join(word.capitalize() for word in words[1:])
    elif style < 0.16:
        name = "_".join(noun.split() + verb.split("_"))
    parameters = make_parameters(random, held_out, 4, beside.parameters if beside else ())
    if random.random() < 0.05:
        parameters = ()
    if len(parameters) > 1 and random.random() < 0.3:
        parameters = (*parameters[:-1], replace(parameters[-1], required=False))
    said = verb.replace("_", " ")
    by = ""
    if parameters:
        by = f" {random.choice(('for', 'by', 'with'))} {random.choice(('a', 'the', 'the given'))} {parameters[0].words}"
    form = random.choice(
        ("{V} the {n}{by}.", "{V} {n}{by}", "{V} the {n}.", "{V} a {n}.", "Use this to {v} the {n}{by}.")
    )
    description = form.format(V=said.capitalize(), v=said, n=noun, by=by)
    returns = random.choice((None, None, None, "string", "object", "number"))
    return Tool(name, verb, noun, description, parameters, returns)


def make_tools(random: Random, held_out: bool, most: int = 3) -> list[Tool]:
    """One to `most` tools of different names, in any order."""
    tools = [make_tool(random, held_out)]
    for _ in range(random.randint(1, most) - 1):
        other = make_tool(random, held_out, beside=random.choice(tools))
        if other.name not in {tool.name for tool in tools}:
            tools.append(other)
    random.shuffle(tools)
    return tools


def say_all(random: Random, parameters: Sequence[Parameter], arguments: dict[str, Any]) -> list[str]:
    """What is said for each argument; no two are introduced by the same words."""
    used, said = set(), []
    for parameter in parameters:
        if parameter.name in arguments:
            free = [cue for cue in parameter.cues if "{w}" in cue or cue not in used] or ["with {w} {v}"]
            cue = random.choice(free)
            used.add(cue)
            said.append(parameter.say(cue, arguments[parameter.name]))
    return said


def request(random: Random, tool: Tool, arguments: dict[str, Any]) -> str:
    """A sentence that asks for the tool with these arguments."""
    verb = random.choice(VERBS[tool.verb])
    cues = say_all(random, tool.parameters, arguments)
    if random.random() < 0.3:
        random.shuffle(cues)
    joined = cues[0] if cues else ""
    for cue in cues[1:]:
        joined += random.choice((" ", ", ", " and ")) + cue.removeprefix("and ")
    thing = random.choice(("the ", "the ", "a ", "my ", "")) + tool.noun
    if verb == "what is":
        return f"What is the {tool.noun} {joined}?".replace(" ?", "?")
    if verb in ("turn on", "turn off", "switch on", "switch off") and random.random() < 0.3:
        verb, thing = verb.split()[0], f"{thing} {verb.split()[1]}"
    opening = random.choice(
        ("", "", "", "please ", "can you ", "could you ", "I want you to ", "I need you to ", "now ", "hi, ")
    )
    question = opening.startswith(("can", "could"))
    sentence = f"{opening}{verb} {thing} {joined}".strip()
    if joined and random.random() < 0.1:
        sentence = f"{joined}: {verb} {thing}"
        question = False
    sentence = sentence[0].upper() + sentence[1:] if random.random() < 0.9 else sentence
    return sentence + ("?" if question else random.choice((".", ".", ".", "", "!")))
