"""Hermes-2-Pro's own chat template `tool_use`, byte for byte, for comparisons.

Source: the template of https://huggingface.co/NousResearch/Hermes-2-Pro-Llama-3-8B, the same as
Hermes 3's; it was not compared with the copy in the Mistral model's repository. Its tools are not
valid JSON, its results do not name their function, and a result can close its own tag. The end of
a turn of results depends on whether another turn follows, so those ids change when it does.
"""

from collections.abc import Sequence

from mistral.chat.formats.chatml import ChatML, between_control_tokens, encode_turn
from mistral.chat.formats.messages import CheckedMessage, FunctionCall, Message, Tools
from mistral.chat.formats.prompts import to_json
from mistral.tokenizer import Tokenizer


class HermesToolUse(ChatML):
    """The format of that template.

    Without tools the template fails; here the system turn that describes them is left out.
    """

    tool_style = "tool_use"

    def can_extend(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """False after the answer to a result: the end of the result's turn changes."""
        return not history or history[-1].get("role") != "tool"

    def _encode_turns(self, tokenizer: Tokenizer, messages: Sequence[CheckedMessage]) -> list[int]:
        ids: list[int] = []
        results: list[str] = []
        for message, following in zip(messages, [*messages[1:], None]):
            if message.role == "tool":
                content = message.content if message.error is None else message.error
                results.append(f"<tool_response>\n{content}\n</tool_response>")
                if following is None or following.role != "tool":
                    end = "" if following is None else "\n"
                    # Unlike other turns, this one has no newline after it.
                    ids += between_control_tokens(tokenizer, "tool\n" + "\n".join(results) + end)
                    results = []
            elif message.calls is None:
                ids += encode_turn(tokenizer, message.role, message.content)
            else:
                # The template drops the text next to the calls. Without any call it drops the
                # newline after the role, too.
                calls = "".join("\n" + _call(call) for call in message.calls)
                ids += between_control_tokens(tokenizer, "assistant" + calls)
                ids += tokenizer.encode_after_control("\n")
        return ids


def _call(call: FunctionCall) -> str:
    arguments = call.arguments if isinstance(call.arguments, str) else to_json(call.arguments)
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>'
