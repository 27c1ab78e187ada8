"""Every field of the official clients is done, differs, is ignored or is refused, and the page says it."""

import endpoints_page
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from mistral.server.protocol.chat_completions import ChatBody
from mistral.server.protocol.completions import CompletionBody
from mistral.server.protocol.fields import STATUSES
from mistral.server.protocol.messages import CountBody, MessagesBody
from mistral.server.protocol.responses import ResponsesBody

OFFICIAL = {
    ChatBody: chat_params.CompletionCreateParamsBase,
    CompletionBody: text_params.CompletionCreateParamsBase,
    ResponsesBody: response_create_params.ResponseCreateParamsBase,
    MessagesBody: message_create_params.MessageCreateParamsBase,
    CountBody: message_count_tokens_params.MessageCountTokensParams,
}


@pytest.mark.parametrize("body", OFFICIAL, ids=lambda body: body.__name__)
def test_every_field_of_the_official_client_is_declared(body):
    assert not set(OFFICIAL[body].__annotations__) - set(body.model_fields)


def test_every_field_says_what_is_done_with_it():
    for path, body in endpoints_page.BODIES.items():
        statuses = {}
        for name, status, what in endpoints_page.rows_of(body, ""):
            statuses[name] = status
            assert status in STATUSES and (what or status == "done"), (path, name)
        assert set(body.model_fields) <= set(statuses), path


def test_the_page_is_made_of_the_models():
    assert endpoints_page.PAGE.read_text() == endpoints_page.page()
