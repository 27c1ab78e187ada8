"""The chat page in a browser: every feature, with the answers of a script."""

import json
import re

import pytest
import vendor_page
from page_server import ABOUT, TOOLS, Said
from page_window import IS_IDLE, needs_chromium

from mistral.chat.saved import read_lines
from mistral.server.window.files import FOLDER

pytestmark = needs_chromium
OWN_FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())


ANSWER = """# Title

A **bold** word and `code`.

| a | b |
|--:|---|
| 1 | 2 |

```python
def f(): return "x"
```

- [x] done"""


def test_the_files_are_small_and_those_of_npm():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    contents = {path.name: path.read_bytes() for path in vendor_page.vendored()}
    assert vendor_page.problems(contents) == {}
    assert vendor_page.problems(contents | {"marked.esm.js": b"changed"}) == {
        "marked.esm.js": "differs from the version in the table of hashes"
    }
    assert len([name for name in contents if name.startswith("LICENSE")]) == 3


def test_no_file_parses_html_or_runs_text():
    doors = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    )
    for path in OWN_FILES:
        assert not doors.search(path.read_text()), path
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|style=|https?:", html)


def test_an_answer_in_markdown(page):
    page.server.answers = [ANSWER]
    page.ask("Hi")
    assert page.texts("article.question .bubble") == ["Hi"]
    assert page.texts(".prose h3") == ["Title"]
    assert page.js("getComputedStyle(document.querySelector('.prose td')).textAlign") == "right"
    page.wait("document.querySelector('.code .hljs-keyword')")  # its grammar has come
    assert page.text(".code pre") == 'def f(): return "x"'
    assert page.text(".code .language") == "python"
    assert page.text(".prose li") == "☑ done"
    facts = page.text(".facts")
    assert (
        "41.7 tokens/s" in facts
        and "first token after" in facts
        and "12 of 40 prompt tokens" in facts
    )
    assert "/ 4,096 tokens" in page.text("#room")
    assert page.text("#model strong") == ABOUT["name"]
    assert page.texts(".model-facts span") == ["chatml", "compiled", "Q4_K_M", "window 4,096"]
    body = page.server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert body["stream"] is True and "details" not in body and body["temperature"] == 0.7
    # Read aloud once, when it is whole
    assert page.js("document.getElementById('live').textContent") == ANSWER


def test_copies(page):
    page.js("navigator.clipboard.writeText = async text => { window.copied = text }")
    page.server.answers = [ANSWER]
    page.ask("Hi")
    page.click(".code figcaption button")
    page.wait("window.copied === 'def f(): return \"x\"'")
    page.click("article.answer .actions button", "Copy")
    page.wait(f"window.copied === {json.dumps(ANSWER)}")
    # A page that came over plain http from another machine has no clipboard
    page.js("navigator.clipboard.writeText = () => { throw new Error('no') }")
    page.js("document.execCommand = name => { window.copied = name; return true }")
    page.click(".code figcaption button")
    page.wait("window.copied === 'copy'")


def test_stop_keeps_what_was_written(page):
    page.server.answers = [Said(["One ", "two ", "three"], hold=2)]
    page.ask("Count", wait=False)
    page.wait("document.querySelector('.prose').innerText.trim() === 'One two'")
    assert page.js("document.getElementById('send').ariaLabel") == "Stop"
    assert page.js("document.querySelector('article.answer').ariaBusy") == "true"
    page.browser.key("Escape")
    page.idle()
    assert page.text(".prose") == "One two" and "Stopped" in page.text(".notice")
    page.ask("And now?")
    assert page.server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "One two "}


def test_a_text_that_grows_replaces_its_last_block(page):
    page.js(
        "import('/page/markdown.js').then(({ show }) => { const place = document.createElement('div');"
        "for (const text of ['One', 'One *two*\\n\\nth', 'One *two*\\n\\nthree']) show(place, text);"
        "const long = document.createElement('div'); show(long, '*a* '.repeat(1300));"
        "window.texts = [...place.children].map(e => e.innerHTML.trim());"
        "window.emphasis = [place, long].map(e => e.querySelectorAll('em').length) })"
    )
    page.wait("window.emphasis")
    assert page.js("window.texts") == ["<p>One <em>two</em></p>", "<p>three</p>"]
    assert page.js("window.emphasis") == [1, 0]  # in a long paragraph it would take too long


def test_retry_and_edit_are_branches(page):
    page.server.answers = ["First", "Second", "Third"]
    page.ask("Hi")
    page.click("article.answer button", "Another answer")
    page.idle(1)
    assert page.text(".prose") == "Second" and page.text("article.answer .branches") == "2 / 2"
    page.click(".branches button", "Branch before")
    page.wait("document.querySelector('.prose').innerText.trim() === 'First'")
    assert page.js("document.activeElement.title") == "Next branch"
    page.focus()
    page.browser.key("ArrowUp")  # edits the last question
    page.wait("document.activeElement.closest('.editor')")
    page.browser.write(" there")
    page.browser.enter()
    page.idle(2)
    assert page.texts(".bubble") == ["Hi there"] and page.text(".prose") == "Third"
    assert page.server.bodies[2]["messages"] == [{"role": "user", "content": "Hi there"}]
    page.click("article.question .branches button", "Branch before")
    page.wait("document.querySelector('.bubble').innerText === 'Hi'")
    page.reopen()  # all of it is kept
    assert page.texts(".bubble") == ["Hi"] and page.text("article.answer .branches") == "2 / 2"


def test_an_answer_is_edited_as_a_branch(page):
    page.server.answers = ["Frist", "Fine"]
    page.ask("Hi")
    page.click("article.answer button", "Edit")
    page.wait("document.activeElement.ariaLabel === 'Edit the answer'")
    page.browser.key("Escape")
    page.wait("document.querySelector('.prose')?.innerText === 'Frist'")
    page.click("article.answer button", "Edit")
    page.type(".editor textarea", "First")
    page.click(".editor button", "Keep as a new branch")
    page.wait("document.querySelector('.prose')?.innerText === 'First'")
    assert page.text("article.answer .branches") == "2 / 2" and page.text(".facts") == "edited"
    page.ask("And?")
    assert page.server.bodies[1]["messages"][1] == {"role": "assistant", "content": "First"}
    page.click(".branches button", "Branch before")
    page.wait("document.querySelector('.prose').innerText === 'Frist'")


def test_settings_are_sent_with_the_fields_own_names(page):
    page.click("#settings")
    page.type("#system-prompt", "Be brief.")
    for name, value in (
        ("temperature", "0.5"),
        ("top_k", "40"),
        ("seed", "7"),
        ("max_tokens", "9"),
    ):
        page.type(f"#field-{name}", value)
    page.type("#field-top_p", "7")  # out of range: not sent
    page.type("#field-min_p", "")
    page.type("#field-stop", "END\n\\n\\nUser:")
    assert page.js("document.querySelector('#field-top_p').ariaInvalid") == "true"
    assert page.js("document.querySelector('#field-temperature').placeholder") == "0.7"
    page.close_dialog()
    page.ask("Hi")
    body = page.server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {name: body.get(name) for name in ("temperature", "top_k", "seed", "max_tokens")}
    assert sent == {"temperature": 0.5, "top_k": 40, "seed": 7, "max_tokens": 9}
    assert "top_p" not in body and "min_p" not in body
    assert body["stop"] == ["END", "\n\nUser:"]
    page.click("article.answer button", "Another answer")
    page.idle(1)
    assert page.server.bodies.pop(1)["seed"] == 8  # the same seed would give the same answer
    page.open()
    page.ask("Hi")  # settings stay, a system prompt belongs to its conversation
    assert page.server.bodies[1]["temperature"] == 0.5
    assert [message["role"] for message in page.server.bodies[1]["messages"]] == ["user"]


def test_json_mode(page):
    page.click("#json")
    page.click(".examples button", "Person")
    assert page.js("document.querySelector('.switch input').checked")
    page.type("textarea.code", '{"type": ')
    assert "not valid JSON" in page.text(".problem")
    assert not page.js("document.querySelector('#json').classList.contains('on')")
    page.type("textarea.code", "[1]")
    assert page.text(".problem") == "A schema is a JSON object."
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    page.type("textarea.code", json.dumps(schema))
    page.click(".switch input")
    if not page.js("document.querySelector('.switch input').checked"):
        page.click(".switch input")
    page.close_dialog()
    page.server.answers = ['{"n": 1}']
    page.ask("A number")
    body = page.server.bodies[0]
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    assert "tools" not in body
    assert page.text(".prose pre") == '{"n": 1}'
    assert page.js("document.querySelector('#json').ariaPressed") == "true"


CALL = ("stock_price", '{"symbol": "TSLA"}')


def test_a_call_runs_once_it_is_allowed(page):
    page.server.answers = [Said("I look.", calls=[CALL, CALL]), "It is 251."]
    page.server.results["stock_price"] = {"result": '{"price": 251.30}'}
    page.ask("How much is Tesla?", wait=False)
    page.wait("document.querySelector('.call.asking')")
    assert page.server.called == []
    assert page.texts(".call .state") == ["asks to run", "waits"]
    page.wait("document.activeElement.className === 'choices'")  # not one of its buttons
    assert "my_tools.py" in page.text(".call .question")
    page.click(".choices button", "Run once")
    page.wait("document.querySelectorAll('.call')[1].classList.contains('asking')")
    page.click(".choices button", "Not now")
    page.idle(1)
    assert page.server.called == [{"name": "stock_price", "arguments": {"symbol": "TSLA"}}]
    assert page.texts(".call .state")[1] == "not allowed"
    assert "251.30" in page.texts(".call.done .part")[1]  # its digits as they are
    first, second = page.server.bodies
    assert first["tools"][0]["function"]["name"] == "stock_price"
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]
    assert second["messages"][2]["content"] == '{"price": 251.30}'
    assert second["messages"][2]["tool_call_id"] == second["messages"][1]["tool_calls"][0]["id"]
    assert "did not allow" in second["messages"][3]["content"]
    assert page.text(".prose") == "It is 251."


@pytest.mark.parametrize(
    "choice, calls",
    [
        ("Always for this tool", 2),
        pytest.param("Never for this tool", 0, marks=pytest.mark.slow),
    ],
)
def test_a_permission_is_for_the_tool(page, choice, calls):
    page.server.answers = [Said(calls=[CALL]), "Done", Said(calls=[CALL]), "Done again"]
    page.ask("One", wait=False)
    page.click(".choices button", choice)
    page.idle(1)
    page.ask("Two", wait=False)
    page.wait("[...document.querySelectorAll('.prose')].some(e => e.innerText.includes('again'))")
    assert len(page.server.called) == calls
    # The same name with other parameters is another tool
    page.server.about["tools"] = [TOOLS[0] | {"parameters": {"type": "object"}}]
    page.server.answers = [Said(calls=[CALL]), "Done"]
    page.open()
    page.ask("Three", wait=False)
    page.wait("document.querySelector('.call.asking')")
    page.browser.key("Escape")
    page.idle()
    assert len(page.server.called) == calls and page.text(".call .state") == "stopped"


def test_calls_that_cannot_run_are_told_to_the_model(page):
    name = "stock_price"
    calls = [(name, '{"symbol": '), (name, "[1]"), ("other", "{}")]
    page.server.answers = [Said(calls=calls), "Sorry"]
    page.ask("Call")
    page.wait("document.querySelectorAll('article.answer').length === 2")
    page.idle()
    assert page.server.called == []
    told = page.server.bodies[1]["messages"][2:]
    shown = page.texts(".call")
    errors = ("not valid JSON", "not an object", "There is no tool other")
    for result, card, error in zip(told, shown, errors, strict=True):
        assert error in result["content"] and error in card


def test_an_error_of_a_tool_and_a_server_with_a_new_token(page):
    page.server.answers = [Said(calls=[CALL]), "Sorry"]
    page.server.results["stock_price"] = {"error": "there is no symbol TSLA"}
    page.server.about["token"] = "that of a server that was started anew"
    page.ask("Call", wait=False)
    page.click(".choices button", "Run once")
    page.idle(1)
    assert len(page.server.called) == 1
    assert "there is no symbol TSLA" in page.server.bodies[1]["messages"][2]["content"]
    assert "there is no symbol TSLA" in page.text(".call.failed")
    (complaint,) = page.browser.complaints  # Chromium tells about the refused token
    assert "403" in complaint
    page.browser.complaints.clear()


def test_tools_can_be_switched_off(page):
    page.click("#tools")
    page.click("ul.tools input")
    page.close_dialog()
    assert page.text("#tools") == "Tools 0"
    page.ask("Hi")
    assert "tools" not in page.server.bodies[0]
    page.js("localStorage.clear()")
    page.server.about["chat"] = {"has_tools": False}  # the model's format has none
    page.open()
    assert page.js("document.getElementById('tools').hidden")
    page.ask("Hi")
    assert "tools" not in page.server.bodies[1]


def test_conversations_are_kept_found_renamed_and_deleted(page):
    page.ask("First question")
    page.click("#new-chat")
    page.ask("Second question")
    assert page.texts("#conversations .title") == ["Second question", "First question"]
    assert page.text("#conversations [aria-current]") == "Second question"
    page.browser.key("k", code=75, modifiers=2)
    page.wait("document.activeElement.type === 'search'")
    assert page.texts(".option") == ["New chat", "Second question", "First question"]
    page.type("dialog input", "hello")
    page.wait("document.querySelectorAll('.option').length === 3")
    assert page.texts(".option")[2].split("\n") == ["First question", "Hello!"]
    page.type("dialog input", "first")
    page.browser.enter()
    page.wait("document.querySelector('.bubble').innerText === 'First question'")
    page.click("#conversations button", "Rename First question")
    page.type("dialog input", "Renamed")
    page.click("dialog button", "Rename")
    page.wait(
        "[...document.querySelectorAll('#conversations .title')].some(e => e.innerText === 'Renamed')"
    )
    page.click("#conversations button", "Delete Second question")
    page.click("dialog button", "Delete")
    page.wait("document.querySelectorAll('#conversations .title').length === 1")
    page.open()
    assert (
        page.texts("#conversations .title") == ["Renamed"]
        and page.js("document.body.className") == "blank"
    )


def test_export_is_what_chat_py_reads_and_import_reads_it_back(page, tmp_path):
    page.js("URL.createObjectURL = blob => { window.saved = blob; return 'about:blank#' }")
    page.js("HTMLAnchorElement.prototype.click = function () { window.file = this.download }")
    page.click("#settings")
    page.type("#system-prompt", "Be brief.")
    page.close_dialog()
    page.server.answers = [
        Said("I look.", calls=[CALL]),
        "It is 251. é\u2028\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ]
    page.ask("How much?\nTell me.", wait=False)
    page.click(".choices button", "Run once")
    page.idle(1)
    page.click("#export")
    page.wait("window.file === 'how-much.jsonl'")
    text = page.js("window.saved.text()")
    file = tmp_path / "how-much.jsonl"
    file.write_text(text)
    head, *messages = read_lines(file)
    assert head["format"] == "chatml" and head["tools"][0]["function"]["name"] == "stock_price"
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert messages[4]["content"] == "It is 251. é\u2028😀"
    import_file(page, "a.jsonl", text)
    page.wait("document.querySelectorAll('#conversations .title').length === 2")
    page.wait("document.querySelectorAll('article').length === 3")
    assert page.texts(".bubble") == ["How much?\nTell me."]
    page.js("window.file = null")
    page.click("#export")
    page.wait("window.file")
    assert page.js("window.saved.text()") == text
    import_file(page, "bad.jsonl", '{"format": "chatml"}\n{}\n')
    page.wait("document.querySelector('#banner').innerText.includes('bad.jsonl, line 2')")


def test_all_branches_are_exported_and_come_back(page, tmp_path):
    page.js("URL.createObjectURL = blob => { window.saved = blob; return 'about:blank#' }")
    page.js("HTMLAnchorElement.prototype.click = function () { window.file = this.download }")
    page.server.answers = [
        "First",
        Said("", error="broken"),
        Said("I look.", calls=[CALL]),
        "Third",
    ]
    page.ask("Hi")
    page.click("article.answer button", "Another answer")  # never begins
    page.idle(1)
    page.click("article.answer button", "Another answer")
    page.click(".choices button", "Run once")
    page.idle(3)
    page.server.answers = ["Fourth"]
    page.focus()
    page.browser.key("ArrowUp")
    page.wait("document.activeElement.closest('.editor')")
    page.browser.write(" there")
    page.browser.enter()
    page.idle(4)
    page.click("#export")
    page.wait("window.file")
    text = page.js("window.saved.text()")
    (tmp_path / "hi.jsonl").write_text(text)
    head, *messages = read_lines(tmp_path / "hi.jsonl")
    assert [message["content"] for message in messages] == ["Hi there", "Fourth"]
    contents = [other["message"]["content"] for other in head["branches"]["others"]]
    assert contents == ["Hi", "First", "I look.", "1", "Third"]
    assert [other["parent"] for other in head["branches"]["others"]] == [0, 3, 3, 5, 6]
    page.js("window.file = null")
    import_file(page, "hi.jsonl", text)
    page.wait("document.querySelectorAll('#conversations .title').length === 2")
    assert page.text("article.question .branches") == "2 / 2"
    page.click("#export")
    page.wait("window.file")
    assert page.js("window.saved.text()") == text
    page.click("article.question .branches button", "Branch before")
    page.wait("document.querySelector('.bubble').innerText === 'Hi'")
    assert page.texts(".prose")[1] == "Third" and page.texts(".branches")[1] == "2 / 2"
    for number in (-1, 9, "0"):
        head["branches"]["others"][0]["parent"] = number
        import_file(page, "bad.jsonl", json.dumps(head))
        page.wait("document.querySelector('#banner').innerText.includes('bad.jsonl, line 1')")
        page.click("#banner button")


def import_file(page, name, text):
    """As if the person had chosen this file."""
    page.js(
        "(file => { const list = new DataTransfer(); list.items.add(file); const input = "
        "document.getElementById('import-file'); input.files = list.files; input.dispatchEvent("
        f"new Event('change')) }})(new File([{json.dumps(text)}], {json.dumps(name)}))"
    )


def test_a_file_of_chat_py_continues_and_tools_that_are_missing_are_named(page):
    lines = [
        {"format": "chatml", "tools": [{"type": "function", "function": {"name": "add"}}]},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "name": "add", "error": "b is missing"},
        {"role": "assistant", "content": "No."},
    ]
    import_file(page, "talk.jsonl", "\n".join(map(json.dumps, lines)))
    page.wait("document.querySelector('#banner').innerText.includes('does not have: add')")
    page.ask("Why?")
    # The server refuses fields that OpenAI's interface does not have.
    sent = page.server.bodies[0]["messages"][2]
    assert sent == {"role": "tool", "name": "add", "content": '{"error":"b is missing"}'}


def test_the_run_is_asked_for_only_while_the_panel_is_open(page):
    page.server.about["window"] = 6
    page.open()
    slot = {"id": 0, "state": "running", "held_tokens": 43, "capacity": 40}
    slot |= {"window": 6, "prompt_tokens": 20, "cached_tokens": 8, "generated": 20}
    page.server.run = {
        "slots": [slot, slot | {"id": 1, "state": "free", "held_tokens": 10}],
        "waiting": 2,
        "turn": {"ms": 12.34, "kind": "step", "rows": 2, "tokens": 2},
    }
    page.ask("One two three four")
    assert page.server.runs == 0 and "details" not in page.server.bodies[0]
    page.click("#run-toggle")
    page.server.answers = ["a b c d e f g h"]
    page.ask("five six")
    assert page.server.bodies[1]["details"] is True
    page.wait("document.querySelectorAll('.token.generated').length === 8")
    prompt = 4 + 1 + 2
    assert page.js("document.querySelectorAll('.token.prompt').length") == prompt
    assert page.js("document.querySelectorAll('.token.cached[data-at]').length") == prompt // 2
    assert page.js("document.querySelectorAll('.token.rolled[data-at]').length") == prompt + 8 - 6
    assert page.js("document.querySelectorAll('.tokens .forced').length") == 1
    assert page.js("document.querySelectorAll('.tokens .drafted').length") == 1
    assert page.js("document.querySelectorAll('.bars i').length") == 9
    assert page.js("document.querySelectorAll('.bars .verify').length") == 1
    page.js("document.querySelectorAll('.token.generated')[1].focus()")
    told = page.text("#popover")
    assert '"b "' in told and "62.0%" in told and '" other"' in told and "forward pass 2" in told
    page.browser.key("ArrowRight")
    page.wait("document.querySelector('#popover').innerText.includes('\"c \"')")
    page.js("document.querySelector('#run').dispatchEvent(new Event('scroll'))")
    assert page.js("!document.querySelector('#popover').hidden")  # it stays with the keyboard
    page.wait("document.querySelectorAll('.slot').length === 2")
    assert "the last 40 of 43" in page.text(".slot:first-child")
    kinds = page.js(
        "['reused','rolled','prompt','generated'].map(k => document.querySelectorAll('.strip .' + k).length)"
    )
    assert kinds == [5, 3, 12, 20]
    assert page.js("document.querySelectorAll('.strip .kept').length") == 10
    assert "2 requests wait" in page.texts("#run section:last-child p")[0]
    page.click("#run-toggle")
    page.ask("seven")
    assert "details" not in page.server.bodies[2]
    assert page.server.runs == 1 and page.js("document.querySelector('#run').hidden")


def test_what_was_recorded_is_there_after_a_reload(page):
    page.click("#run-toggle")
    page.server.answers = ["a b c d e f", "g h i", "j k"]
    page.ask("one")
    page.ask("two")
    page.click("#run-toggle")
    page.ask("three")  # not recorded
    page.reopen()
    assert page.texts(".actions button[title^=The]") == []
    page.click("#run-toggle")
    page.wait("document.querySelectorAll('.token.generated').length === 3")  # the last one recorded
    page.click(".actions button", "The run of this answer")
    page.wait("document.querySelectorAll('.token.generated').length === 6")
    assert page.js("document.querySelectorAll('.bars i').length") == 7
    assert page.js("document.querySelector('.actions [aria-pressed=true]').title").startswith("The")
    page.ask("four")  # a new answer is shown while it grows
    page.wait("document.querySelectorAll('.token.generated').length === 1")
    page.js(
        "import('/page/state.js').then(({ state }) => { window.details = state.details; "
        "for (let i = 0; i < 60; i++) state.details.set(`x${i}`, {}) })"
    )
    page.ask("five")
    assert page.js("window.details.size") == 50
    # The last 50 are kept, and none that is too long
    page.js(
        "import('/page/store.js').then(async store => { const none = { conversation: 'x', tokens: [] };"
        "for (let at = 1; at < 60; at++) await store.putDetails({ ...none, id: `x${at}`, at });"
        "await store.putDetails({ ...none, id: 'long', at: 99, tokens: Array(20_001) });"
        "window.kept = await store.detailsOf('x'); await store.remove('x');"
        "window.left = await store.detailsOf('x') })"
    )
    page.wait("window.left")
    ids = [record["id"] for record in page.js("window.kept")]
    assert ids == sorted(f"x{at}" for at in range(14, 60)) and page.js("window.left") == []


FIRST_VERSION = """
new Promise(done => { indexedDB.deleteDatabase('mistral').onsuccess = () => {
  const request = indexedDB.open('mistral', 1);
  request.onupgradeneeded = () => {
    const stores = ['conversations', 'nodes'].map(name =>
      request.result.createObjectStore(name, { keyPath: 'id' }));
    stores[1].createIndex('conversation', 'conversation');
    stores[0].put({ id: 'a', title: 'Old', system: '', head: 'b', created: 1, updated: 1 });
    stores[1].put({ id: 'b', conversation: 'a', parent: null, created: 1, status: 'done', info: {},
      message: { role: 'user', content: 'Hi' } });
  };
  request.onsuccess = () => { request.result.close(); done() };
} })
"""


def test_conversations_of_an_earlier_version_stay(page):
    page.browser.open(page.server.url + "page/icon.svg")  # the page itself has the database open
    page.js(FIRST_VERSION)
    page.open("#a")
    assert page.texts("#conversations .title") == ["Old"] and page.texts(".bubble") == ["Hi"]
    complaints = page.browser.complaints  # a picture alone makes Chromium ask for /favicon.ico
    complaints[:] = [one for one in complaints if "favicon.ico" not in one]


def test_look_inside_opens_the_servers_page(page):
    assert not page.js("document.querySelector('button[title^=\"Look inside\"]')")
    page.server.about["inside"] = True
    page.open()
    page.ask("Hi")
    page.js("window.open = (...args) => { window.opened_with = args }")
    page.server.about["token"] = "that of a server that was started anew"
    page.click("article.answer button", "Look inside this answer")
    page.wait("window.opened_with")
    assert (
        page.js("String(window.opened_with)") == f"{page.server.url}page/icon.svg,_blank,noopener"
    )
    (complaint,) = page.browser.complaints  # Chromium tells about the refused token
    assert "403" in complaint
    page.browser.complaints.clear()
    assert [message["role"] for message in page.server.called[0]["messages"]] == [
        "user",
        "assistant",
    ]
    page.js("window.opened_with = null")
    page.server.inside = "https://elsewhere.test/"
    page.click("article.answer button", "Look inside this answer")
    page.wait("!document.querySelector('.working')")
    assert page.js("window.opened_with") is None


def test_keys_of_the_message_box(page):
    page.focus()
    page.browser.write("a")
    page.browser.enter(modifiers=8)  # Shift: a new line
    page.browser.write("b")
    assert page.js("document.getElementById('composer-text').value") == "a\nb"
    page.browser.enter()
    page.idle(0)
    assert page.server.bodies[0]["messages"][0]["content"] == "a\nb"
    page.js("document.activeElement.blur()")
    page.browser.key("/", "/", 191)
    page.wait("document.activeElement.id === 'composer-text'")
    page.browser.key("O", code=79, modifiers=2 + 8)  # Ctrl+Shift+O: a new conversation
    page.wait("document.body.classList.contains('blank')")
    page.browser.enter()  # nothing to send
    assert len(page.server.bodies) == 1


def test_the_questions_to_begin_with_are_for_the_model(page):
    general = page.texts(".card strong")
    assert general == ["Explain", "Write", "Use a tool"] and "stock_price" in page.text(".card")
    page.server.about |= {"tools": [], "parameters": 135_000_000}
    page.open()
    assert page.texts(".card strong") == ["Explain", "Write", "List"]
    page.server.about["questions"] = [
        ["Ask", "What is a sliding window?"],
        ["Tell", "Who are you?"],
    ]
    page.open()
    assert page.texts(".card strong") == ["Explain", "Ask", "Tell"]
    page.click(".card", "TellWho are you?")
    page.idle(0)
    assert page.server.bodies[0]["messages"] == [{"role": "user", "content": "Who are you?"}]


def test_an_api_key_is_asked_for_and_sent(page):
    page.server.key = "secret"
    page.browser.open("about:blank")
    page.browser.open(page.server.url)
    page.wait("document.querySelector('dialog input[type=password]')")
    page.type("dialog input", "secret")
    page.click("dialog button", "Continue")
    page.wait("document.body.dataset.ready === 'yes'")
    assert page.text("#model strong") == ABOUT["name"]
    assert page.js("localStorage.length") == 0 or "secret" not in page.js(
        "JSON.stringify({...localStorage})"
    )
    assert all("401" in complaint for complaint in page.browser.complaints)
    page.browser.complaints.clear()
    page.js("sessionStorage.clear()")


EVERY_STATE = """
(() => {
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1) && !e.closest('.table, pre, #sidebar, .tokens, .strip, .unseen, .model-facts, #model');
  });
  return wide.map(e => e.tagName + '.' + e.className);
})()
"""
NAMELESS = """
[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.hidden &&
  !(e.ariaLabel || e.textContent.trim() || e.title || e.labels?.length || e.placeholder)).map(e => e.id || e.className)
"""


# What a finger cannot hit: less than 40 px wide or high. A label is pressed with what is in it.
TOO_SMALL = """
[...document.querySelectorAll('button, select, input, textarea, summary, [role=option]')]
  .map(e => e.closest('label') ?? e)
  .filter(e => e.checkVisibility({visibilityProperty: true}))
  .map(e => [e, e.getBoundingClientRect()])
  .filter(([, b]) => b.width && (b.height < 39.9 || b.width < 39.9))
  .map(([e, b]) => `${e.outerHTML.slice(0, 80)} ${b.width} ${b.height}`)
"""


@pytest.mark.parametrize(
    "width, height, dark",
    [(390, 844, True), pytest.param(1400, 900, False, marks=pytest.mark.slow)],
)
def test_nothing_is_cut_and_everything_has_a_name(page, width, height, dark):
    page.browser.show(width, height, dark)
    page.server.about["name"] = "A-model-with-a-very-long-name-that-does-not-fit-anywhere-" * 3
    page.open()

    def check():
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js(EVERY_STATE) == []
        assert page.js(NAMELESS) == []
        assert width > 800 or page.js(TOO_SMALL) == []

    check()
    page.server.answers = [
        ANSWER + "\n\n" + "w" * 300,
        Said("I look.", calls=[("stock_price", json.dumps({"symbol": "T" * 300}))]),
    ]
    page.ask("x" * 300)
    page.ask("call", wait=False)
    page.wait("document.querySelector('.call.asking')")
    check()
    page.click("#run-toggle")
    check()
    for wide in (width, 1000):  # the message box stays in reach
        page.browser.show(wide, height, dark)
        box = "document.getElementById('send').getBoundingClientRect()"
        assert page.js(
            f"document.elementFromPoint({box}.x + 9, {box}.y + 9).closest('#send') !== null"
        )
    page.browser.show(width, height, dark)
    page.click("#run .bar button")
    page.browser.key("Escape")
    page.idle()
    for opener in ("#settings", "#json", "#tools", "#search", "#help"):
        page.click(opener)
        page.wait("document.querySelector('dialog')")
        check()
        page.close_dialog()
    assert page.js("getComputedStyle(document.body).backgroundColor") == (
        "rgb(14, 17, 22)" if dark else "rgb(251, 251, 252)"
    )


def test_the_list_on_a_phone_and_the_colours(page):
    page.browser.show(390, 844)
    visible = "document.elementFromPoint(40, 60).closest('#sidebar') !== null"
    page.wait(f"!({visible})")
    page.click("#sidebar-open")
    page.wait(visible)
    page.browser.key("Escape")
    page.wait(f"!({visible})")
    page.click("#theme")
    page.click("#theme")
    assert page.js("document.documentElement.dataset.theme") == "dark"
    page.open()
    assert page.js("document.documentElement.dataset.theme") == "dark"
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 22)"


def test_reduced_motion_stops_every_animation(page):
    page.browser.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
    )
    page.server.answers = [Said("a b", hold=0)]
    page.ask("Hi", wait=False)
    page.wait("document.querySelector('.pending')")
    assert page.js("document.getAnimations().length") == 0
    page.server.release.set()
    page.wait(IS_IDLE)
