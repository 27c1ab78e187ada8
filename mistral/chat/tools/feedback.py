"""What the model is told when a call or an answer in JSON went wrong, in the words of
Hermes-Function-Calling.

`prompts.write_error` puts a tag around them, which is left open there in places. Source:
https://github.com/NousResearch/Hermes-Function-Calling
"""

AGAIN = "Please call this function again with correct arguments"
IN_TAGS = " within XML tags <tool_call></tool_call>"


def not_readable(problem: str) -> str:
    """The model wrote a call that cannot be read."""
    return (
        f"There was an error parsing function calls\nHere's the error stack trace: {problem}\n"
        "Please call the function again with correct syntax"
    )


def not_valid(name: str, problem: str, tags: bool = True) -> str:
    """The function does not exist, or its schema does not allow the arguments.

    tags  the format has calls in tags
    """
    return (
        f"There was an error validating function call against function signature: {name}\n"
        f"Here's the error traceback: {problem}\n{AGAIN}{IN_TAGS * tags}"
    )


def not_executed(name: str, problem: str, tags: bool = True) -> str:
    """The function failed, gave back what JSON cannot hold, or took too long."""
    return (
        f"There was an error when executing the function: {name}\n"
        f"Here's the error traceback: {problem}\n{AGAIN}{IN_TAGS * tags}"
    )


def not_json(attempt: int, problem: str) -> str:
    """An answer in JSON mode is not valid.

    The source shows the model the error alone; here its answer stays, too.
    """
    return (
        f"Agent iteration {attempt} to assist with user query\nJson schema validation failed\n"
        f"Here's the error stacktrace: {problem}\nPlease return correct json object"
    )
