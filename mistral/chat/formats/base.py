"""The interface of a chat format."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from mistral.chat.formats.messages import Message, Tools
from mistral.tokenizer import Tokenizer


class ChatFormat(ABC):
    """How a conversation becomes ids. Subclass it and override what differs.

    Every method raises ValueError, naming the message, for what the format cannot express.

    has_tools            whether functions, calls and results can be expressed
    call_token           the control token that begins an answer that is a list of calls; None:
                         calls are in the text, in `<tool_call>`
    spelled_ends         strings that end the assistant's turn like its stop tokens: some
                         fine-tunes spell the end
    strip_leading_space  the assistant's content is encoded as a text of its own, so the model's
                         first token has a leading space that is not part of the content: decode
                         with `tokenizer.stream(strip_leading_space=True)`
    """

    has_tools: bool = False
    call_token: str | None = None
    spelled_ends: tuple[str, ...] = ()
    strip_leading_space: bool = False

    @abstractmethod
    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation.

        generate  end where the assistant's next content begins
        """

    @abstractmethod
    def extend(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids that follow the assistant's content, without the stop token that ended it.

        They end the assistant's turn, add the new messages, and begin its next turn.
        """

    def can_extend(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """Whether `begin` would return the same ids as `extend`; by default it does.

        history  the messages before the assistant's
        new      the messages after it

        True:  begin(history + [assistant's] + new) == begin(history) + ids of its content +
               extend(new).
        False: `extend` keeps the earlier turns as they are, but the format would now write them
               in another way.
        """
        return True

    @abstractmethod
    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end the assistant's turn."""


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """The begin token, if a conversation begins with one.

    It does if the checkpoint's chat template writes it: as `bos_token`, or spelled. Without a
    template it does if the checkpoint wants it before every text.
    """
    template = tokenizer.chat_templates.get("default")
    if template is None:
        return tokenizer.encode("")
    begin = None if tokenizer.bos_id is None else tokenizer.control_text(tokenizer.bos_id)
    # <|im_start|> in a template begins a turn, even if it is the begin token as well.
    is_spelled = begin is not None and begin != "<|im_start|>" and begin in template
    writes_it = begin is not None and ("bos_token" in template or is_spelled)
    return [tokenizer.bos_id] if writes_it else []
