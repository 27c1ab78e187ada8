"""Made-up tools, and the sentences that ask for them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from demo.parameters import Parameter, make_noun, make_parameters
from demo.words import VERBS


@dataclass(frozen=True)
class Tool:
    """A made-up function."""

    name: str
    verb: str  # a key of `VERBS`
    noun: str  # one word or more
    description: str
    parameters: tuple[Parameter, ...]
    returns: str | None = None  # JSON's name of the result's type

    def schema(self) -> dict[str, Any]:
        """The function as a system prompt lists it."""
        properties = {p.name: p.schema() for p in self.parameters}
        required = [p.name for p in self.parameters if p.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        schema = {"name": self.name, "description": self.description, "parameters": parameters}
        return schema | ({"return": {"type": self.returns}} if self.returns else {})


def make_tool(random: Random, held_out: bool, beside: Tool | None = None) -> Tool:
    """A tool that is often similar to `beside`: the same verb or thing, the same parameters."""
    verb = random.choice(list(VERBS))
    noun = make_noun(random, held_out)
    if beside is not None and (alike := random.random()) < 0.5:
        verb, noun = (verb, beside.noun) if alike < 0.25 else (beside.verb, noun)
    words = [*verb.split("_"), *noun.split()]
    name = "_".join(words)
    if (style := random.random()) < 0.12:
        name = words[0] + "".join(word.capitalize() for word in words[1:])
    elif style < 0.16:
        name = "_".join(noun.split() + verb.split("_"))
    parameters = make_parameters(random, held_out, 3, beside.parameters if beside else ())
    if random.random() < 0.05:
        parameters = ()
    if len(parameters) > 1 and random.random() < 0.3:
        parameters = (*parameters[:-1], replace(parameters[-1], required=False))
    said = verb.replace("_", " ")
    by = ""
    if parameters:
        by = (
            f" {random.choice(('for', 'by', 'with'))} {random.choice(('a', 'the', 'the given'))} "
            f"{parameters[0].words}"
        )
    form = random.choice(
        (
            "{V} the {n}{by}.",
            "{V} {n}{by}",
            "{V} the {n}.",
            "{V} a {n}.",
            "Use this to {v} the {n}{by}.",
        )
    )
    description = form.format(V=said.capitalize(), v=said, n=noun, by=by)
    returns = random.choice((None, None, None, "string", "object", "number"))
    return Tool(name, verb, noun, description, parameters, returns)


def make_tools(random: Random, held_out: bool, most: int = 3, least: int = 1) -> list[Tool]:
    """`least` to `most` tools of different names, in any order."""
    tools = [make_tool(random, held_out)]
    number = random.randint(least, most)
    while len(tools) < number:
        other = make_tool(random, held_out, beside=random.choice(tools))
        if other.name not in {tool.name for tool in tools}:
            tools.append(other)
    random.shuffle(tools)
    return tools


def say_all(
    random: Random, parameters: Sequence[Parameter], arguments: dict[str, Any]
) -> list[str]:
    """A phrase for each argument, in words that fit none of the other parameters."""
    counts = Counter(cue for parameter in parameters for cue in parameter.cues)
    said = []
    for parameter in parameters:
        if parameter.name in arguments:
            clear = [cue for cue in parameter.cues if "{w}" in str(cue) or counts[cue] == 1] or [
                "with {w} {v}"
            ]
            said.append(parameter.say(random.choice(clear), arguments[parameter.name]))
    return said


def request(random: Random, tool: Tool, arguments: dict[str, Any]) -> str:
    """A sentence that asks for the tool with these arguments."""
    verb = random.choice(VERBS[tool.verb])
    cues = say_all(random, tool.parameters, arguments)
    if random.random() < 0.3:
        random.shuffle(cues)
    joined = cues[0] if cues else ""
    for cue in cues[1:]:
        joined += random.choice((" ", ", ", " and ")) + cue
    article = "an " if tool.noun[0] in "aeiou" else "a "
    thing = random.choice(("the ", "the ", article, "my ", "")) + tool.noun
    if verb == "what is":
        return f"What is the {tool.noun} {joined}?".replace(" ?", "?")
    if verb in ("turn on", "turn off", "switch on", "switch off") and random.random() < 0.3:
        verb, particle = verb.split()
        thing = f"{thing} {particle}"
    opening = random.choice(
        (
            "",
            "",
            "",
            "please ",
            "can you ",
            "could you ",
            "I want you to ",
            "I need you to ",
            "now ",
            "hi, ",
        )
    )
    question = opening.startswith(("can", "could"))
    sentence = f"{opening}{verb} {thing} {joined}".strip()
    if joined and random.random() < 0.04:
        sentence = f"{joined}: {verb} {thing}"
        question = False
    sentence = sentence[0].upper() + sentence[1:] if random.random() < 0.9 else sentence
    return sentence + ("?" if question else random.choice((".", ".", ".", "", "!")))
