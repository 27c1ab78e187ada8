"""Makes up dialogues: functions and their results, JSON, short talk about this project.

Everything comes from a seeded generator. Dialogues for testing are made of words that those for
training never use.
"""

import json
import re
from random import Random
from typing import Any, Literal, NamedTuple

from demo.everyday import EVERYDAY, Round
from demo.inventions import Tool, make_tool, make_tools, request, say_all
from demo.parameters import make_noun, make_parameter, make_parameters, make_value
from demo.talk import SYSTEMS, TALK
from demo.words import NOUNS, split
from mistral.chat.formats.prompts import (
    json_prompt,
    to_json,
    tool_prompt,
    write_call,
    write_error,
    write_result,
)
from mistral.chat.tools.feedback import not_executed, not_readable, not_valid

_STYLES = ("json",) * 14 + ("card", "card", "eval", "eval", "eval_2024_07", "tool_use")
# How far a training is. What it reads becomes longer from stage to stage, so that there is time for
# most calls in the early ones: a call costs about 140 tokens with signatures, 175 with schemas and
# 340 with whole prompts.
#   words       mostly words to repeat, and tools to choose from; else as the next
#   signatures  tools are listed as `name(parameter: type)`, and mostly called without a result
#   schemas     they are listed by JSON schemas, without the prompt around them
#   prompts     everything is as the driver sends it
Stage = Literal["words", "signatures", "schemas", "prompts"]


class Turn(NamedTuple):
    """One turn of a dialogue, as it is encoded."""

    role: str
    content: str
    learn: bool = True  # False: an assistant's turn that shows a mistake


class Call(NamedTuple):
    """A call that the model is expected to make."""

    name: str
    arguments: dict[str, Any]


def dialogue(random: Random, stage: Stage = "prompts") -> list[Turn]:
    """A dialogue to train on."""
    shares = {"words": (0.25, 0.55), "prompts": (0.02, 0.05)}
    echo, choose = shares.get(stage, (0.03, 0.2))
    kind = random.random()
    if kind < echo:
        return echo_dialogue(random)
    if kind < echo + choose:
        return choice_dialogue(random)
    kind = random.random()
    if kind < 0.66:
        return tool_dialogue(random, stage)
    if kind < 0.84:
        return _json_dialogue(random)
    return _talk_dialogue(random)


def tool_dialogue(random: Random, stage: Stage = "prompts") -> list[Turn]:
    """Functions in the system prompt, and some rounds of requests, calls, results and answers."""
    # Where a saved conversation is gone on with, its calls stand as the driver writes them.
    learn = random.random() < 0.95
    # To tell a result takes as long as a call, and is learned sooner.
    told = random.random() < (0.6 if stage == "prompts" else 0.25)
    tools = make_tools(random, held_out=False)
    everyday = {
        tool["name"]: (tool, make) for tool, make in random.sample(EVERYDAY, random.randint(1, 3))
    }
    if random.random() < 0.8:
        everyday = {}
    elif random.random() < 0.7:
        tools = []
    schemas = [tool.schema() for tool in tools] + [tool for tool, _ in everyday.values()]
    random.shuffle(schemas)
    turns = [Turn("system", _list_tools(random, schemas, stage))]
    if random.random() < 0.1:
        turns.append(Turn("system", random.choice(SYSTEMS)))
    fewest = 1 if told else {"signatures": 4, "schemas": 3}.get(stage, 2)
    for i in reversed(range(random.randint(fewest, fewest + 2))):
        kind = random.random()
        if kind < 0.1:
            turns += _talk_round(random)
        elif kind < 0.13:
            turns += [
                Turn("user", _other_request(random, tools)),
                Turn("assistant", "I have no function for that."),
            ]
        elif everyday and (not tools or random.random() < 0.7):
            tool, make = random.choice(list(everyday.values()))
            turns += _everyday_turns(tool["name"], make(random), learn or i == 0, told)
        else:
            turns += _tool_turns(random, tools, learn or i == 0, told)
    return turns


def unseen_request(
    random: Random, num_tools: int | None = None
) -> tuple[list[dict[str, Any]], str, list[Call]]:
    """Tools, a request and the calls that answer it, all of words that training never uses."""
    tools = make_tools(random, held_out=True, most=num_tools or 3, least=num_tools or 1)
    text, calls, _ = _requests(random, tools, held_out=True)
    return [tool.schema() for tool in tools], text, calls


def _json_dialogue(random: Random) -> list[Turn]:
    """A schema in the system prompt, and requests whose values go into it."""
    schema, text, answer = record(random, held_out=False)
    if random.random() < 0.12:  # nothing is said: any value of the right type will do
        text = f"{random.choice(('Make up', 'Give me', 'Write'))} an example."
    return [
        Turn("system", json_prompt(schema)),
        Turn("user", text),
        Turn("assistant", to_json(answer)),
    ]


def echo_dialogue(random: Random) -> list[Turn]:
    """Words to be repeated.

    Copying is what calls and JSON are made of, and it is learned here first.
    """
    turns = []
    for _ in range(random.randint(1, 3)):
        parameters = [make_parameter(random, held_out=False) for _ in range(random.randint(1, 8))]
        values = [
            make_value(random, p, False) if random.random() < 0.5 else p.name for p in parameters
        ]
        text = " ".join(map(str, values))
        turns += [
            Turn("user", random.choice(("Repeat: {}", "Say {}", "{}", "Write {}")).format(text))
        ]
        turns += [Turn("assistant", text)]
    return turns


def choice_dialogue(random: Random) -> list[Turn]:
    """Tools, requests, and which tool each is for, or which arguments it gives.

    In a call the choice is one piece of fifty: a demo that was trained on calls alone learned to
    write them and chose at random.
    """
    tools = make_tools(random, held_out=False, most=4, least=2)
    form = random.random()
    if form < 0.3:
        lines = [tool.name for tool in tools]
    elif form < 0.65:
        lines = [f"{tool.name}: {tool.description}" for tool in tools]
    elif form < 0.85:
        lines = [f"{tool.name}({', '.join(p.name for p in tool.parameters)})" for tool in tools]
    else:
        lines = [to_json(tool.schema()) for tool in tools]
    of_arguments = form >= 0.65 and random.random() < 0.4
    turns = [
        Turn(
            "system", "\n".join(["Which arguments?" if of_arguments else "Which function?", *lines])
        )
    ]
    for _ in range(4):
        tool = random.choice(tools)
        given = tool.parameters if of_arguments or random.random() < 0.4 else ()
        arguments = {p.name: make_value(random, p, held_out=False) for p in given}
        answer = ", ".join(arguments) or "none" if of_arguments else tool.name
        turns += [Turn("user", request(random, tool, arguments)), Turn("assistant", answer)]
    return turns


def _talk_dialogue(random: Random) -> list[Turn]:
    """Short talk, now and then longer than the window."""
    turns = [Turn("system", random.choice(SYSTEMS))] if random.random() < 0.6 else []
    for _ in range(random.choice((1, 2, 3, 4)) if random.random() < 0.97 else 30):
        turns += _talk_round(random)
    return turns


def _talk_round(random: Random) -> list[Turn]:
    """A question about this project, and its answer."""
    questions, answers = random.choice(TALK)
    question = random.choice(questions)
    if random.random() < 0.2:
        question = random.choice((question.lower(), question.rstrip("?.!"), f"Please: {question}"))
    return [Turn("user", question), Turn("assistant", random.choice(answers))]


def plain_text(random: Random) -> str:
    """Sentences about this project without any dialogue, for the model to continue."""
    answers = [answer for _, answers in TALK[3:-2] for answer in answers]
    return " ".join(random.sample(answers, 8))


def record(random: Random, held_out: bool) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A schema, a request, and the object that answers it."""
    title = make_noun(random, held_out)
    parameters = make_parameters(random, held_out, 3)
    answer: dict[str, Any] = {p.name: make_value(random, p, held_out) for p in parameters}
    said = say_all(random, parameters, answer)
    properties = {p.name: p.schema() for p in parameters}
    if random.random() < 0.25:  # an object inside of the object
        inner = [p for p in make_parameters(random, held_out, 2) if p.name not in properties]
        if inner and (key := make_noun(random, held_out).replace(" ", "_")) not in properties:
            values = {p.name: make_value(random, p, held_out) for p in inner}
            schema = {
                "type": "object",
                "properties": {p.name: p.schema() for p in inner},
                "required": list(values),
            }
            properties = properties | {key: schema}
            answer = answer | {key: values}
            said.append(f"{key.replace('_', ' ')} {', '.join(say_all(random, inner, values))}")
    name = "".join(word.capitalize() for word in title.split())
    schema = {
        "title": name,
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }
    if random.random() < 0.3:  # pydantic's order of keys
        schema = {key: schema[key] for key in ("properties", "required", "title", "type")}
    text = (
        f"{random.choice(('Make', 'Give me', 'Create', 'Write', 'I need', 'Return'))} a {title} "
        f"{', '.join(said)}"
    )
    return schema, text + random.choice((".", ".", "", "!")), answer


def _list_tools(random: Random, schemas: list[dict[str, Any]], stage: Stage) -> str:
    if stage == "prompts":
        return tool_prompt(schemas, random.choice(_STYLES))
    return "\n".join(map(to_json if stage == "schemas" else _signature, schemas))


def _signature(schema: dict[str, Any]) -> str:
    properties = schema["parameters"]["properties"]
    required = schema["parameters"]["required"]
    types = {key: "/".join(value.get("enum", [value["type"]])) for key, value in properties.items()}
    listed = ", ".join(
        f"{key}{'' if key in required else '?'}: {type}" for key, type in types.items()
    )
    return f"{schema['name']}({listed})"


def _write_calls(calls: list[Call], learn: bool) -> Turn:
    """Calls as the demo learns to write them: the function's name before its arguments.

    The prompt's example may have another order. The arguments follow from the name. Before it they
    have to be chosen together with a function that is not said yet: of a demo that learned to write
    them first every eighth call was of another function, even under a grammar.
    """
    return Turn(
        "assistant",
        "\n".join(write_call(*call, "tool_use" if learn else "json") for call in calls),
        learn,
    )


def _tool_turns(random: Random, tools: list[Tool], learn: bool, told: bool) -> list[Turn]:
    text, calls, results = _requests(random, tools, held_out=False)
    contents = [content for content, _ in results]
    mistaken = _mistaken_turns(random, calls[0]) if random.random() < 0.04 else []
    turns = [Turn("user", text), *mistaken, _write_calls(calls, learn)]
    if not told:
        return turns
    return [
        *turns,
        Turn(
            "tool",
            "".join(
                _write_result(random, call.name, content) for call, content in zip(calls, contents)
            ),
        ),
        Turn("assistant", " ".join(answer for _, answer in results)),
    ]


def _mistaken_turns(random: Random, call: Call) -> list[Turn]:
    """A call that went wrong, and what the driver says then; the right one follows."""
    kind = random.random()
    name, arguments = call
    if kind < 0.3:
        name = f"{name}_{random.choice(split(NOUNS, held_out=False))}"
        problem = not_valid(name, f"No matching function signature found for function: {name}")
    elif kind < 0.6 and arguments:
        missing, *others = arguments
        arguments = {key: arguments[key] for key in others}
        problem = not_valid(name, f"{missing!r} is a required property")
    elif kind < 0.8:
        problem = not_readable("Expecting ',' delimiter: line 1 column 24 (char 23)")
    else:
        problem = not_executed(
            name, random.choice(("TimeoutError: no answer", "ValueError: try again"))
        )
    mistake = _write_calls([Call(name, arguments)], random.random() < 0.8)
    return [mistake._replace(learn=False), Turn("tool", write_error(problem))]


def _everyday_turns(name: str, made: Round, learn: bool, told: bool) -> list[Turn]:
    turns = [Turn("user", made.request), _write_calls([Call(name, made.arguments)], learn)]
    if not told:
        return turns
    return [*turns, Turn("tool", write_result(name, made.result)), Turn("assistant", made.answer)]


def _requests(
    random: Random, tools: list[Tool], held_out: bool
) -> tuple[str, list[Call], list[tuple[Any, str]]]:
    """What the user says, one or two calls, and for each its result with the words that tell it."""
    # training has more of what is hard
    number = random.choice((1, 1, 1, 1, 1, 2) if held_out else (1, 1, 2))
    chosen = [random.choice(tools) for _ in range(number)]
    texts = []
    calls = []
    results = []
    for tool in chosen:
        given = [p for p in tool.parameters if p.required or random.random() < 0.5]
        arguments = {p.name: make_value(random, p, held_out) for p in given}
        texts.append(request(random, tool, arguments))
        calls.append(Call(tool.name, arguments))
        results.append(_result(random, tool))
    text = texts[0]
    if len(texts) > 1:
        then = random.choice((" Then ", " Also, ", " And ", " Next, "))
        second = re.sub("^(?!I )[A-Z]", lambda first: first[0].lower(), texts[1])
        text = text.rstrip(".!") + ("" if text.endswith("?") else ".") + then + second
    return text, calls, results


def _result(random: Random, tool: Tool) -> tuple[Any, str]:
    """What a function returns, and how the assistant tells it."""
    kind = random.random()
    if kind < 0.06:
        problem = f"{random.choice(('unknown', 'no such', 'invalid'))} {make_noun(random, False)}"
        return {"error": problem}, f"Sorry, {tool.name} failed: {problem}."
    fields = make_parameters(random, False, 3)
    values = {
        p.name: make_value(random, p, False) for p in fields if p.kind not in ("boolean", "list")
    }
    if kind < 0.4 or not values:
        value = random.choice(
            (random.randint(0, 9999), round(random.uniform(0, 500), 2), "ok", "done")
        )
        value = next(iter(values.values()), value) if random.random() < 0.5 else value
        return value, random.choice(
            (f"The {tool.noun}: {value}.", f"The result for {tool.noun} is {value}.")
        )
    told = [f"{name.replace('_', ' ')} {value}" for name, value in values.items()]
    return values, random.choice(("Here is the {n}: {t}.", "The {n}: {t}.")).format(
        n=tool.noun, t=", ".join(told)
    )


def _write_result(random: Random, name: str, content: Any) -> str:
    """As the driver writes it, and sometimes bare, as the chat template `tool_use` does."""
    if random.random() < 0.9:
        return write_result(name, content)
    bare = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"<tool_response>\n{bare}\n</tool_response>\n"


def _other_request(random: Random, tools: list[Tool]) -> str:
    """A request for a function that is not there."""
    other = make_tool(random, held_out=False)
    while other.noun in {tool.noun for tool in tools}:
        other = make_tool(random, held_out=False)
    return request(random, other, {p.name: make_value(random, p, False) for p in other.parameters})
