"""The window's files, what it tells about the server, and who may use it."""

import pytest
from scripted_server import Client

from mistral.server.app import Settings
from mistral.server.window import files

OWN = "http://127.0.0.1:8000"


def window(*answers, **options):
    """A client that opens the page at an address."""
    client = Client(*answers, **options)
    client.base_url = OWN
    return client


def error(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.fixture
def page(tmp_path, monkeypatch):
    folder = tmp_path / "page"
    (folder / "vendor").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><p>é")
    (folder / "app.js").write_text("export default 1")
    (folder / "vendor/marked.js").write_text("export default 2")
    (folder / "notes.py").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.setattr(files, "FOLDER", folder)
    return folder


def test_the_files_of_the_page(page):
    with window(settings=Settings(api_key="secret")) as client:
        first = client.get("/")
        assert first.status_code == 200 and "é" in first.text
        assert first.headers["content-type"] == "text/html; charset=utf-8"
        script = client.get("/page/app.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert client.get("/page/vendor/marked.js").text == "export default 2"
        tag = {"If-None-Match": script.headers["etag"]}
        assert client.get("/page/app.js", headers=tag).status_code == 304
        (page / "app.js").write_text("export default 3")
        assert client.get("/page/app.js", headers=tag).text == "export default 3"


@pytest.mark.parametrize(
    "path",
    [
        "/page/other.js",
        "/page/notes.py",
        "/page/",
        "/page/vendor",
        "/page/..%2fsecret.txt",
        "/page/%2e%2e/secret.txt",
        "/page/vendor/%2e%2e/%2e%2e/secret.txt",
        "/page//etc/passwd",
        "/page/%00",
    ],
)
def test_no_path_leads_out_of_the_page(page, path):
    with window() as client:
        assert "secret" not in error(client.get(path), 404)["message"]


def test_the_page_is_there_while_the_model_loads(page):
    client = window()
    client.served.service = None  # no lifespan: nothing is loaded
    assert client.get("/").status_code == 200
    assert error(client.get("/page/about"), 503)["message"] == "the model is loading"


def test_about():
    with window() as client:
        about = client.get("/page/about").json()
        assert about["name"] == "tiny" and about["format"] == "chatml"
        assert about["limit"] == 4096 and about["slots"] == 1
        assert about["chat"] == {"has_tools": True} and about["needs_key"] is False
        assert about["sampling"]["temperature"] == 1.0
        assert about["questions"] == []
        assert len(about["token"]) > 30
    with window(settings=Settings(api_key="secret")) as client:
        assert error(client.get("/page/about"), 401)
        key = {"Authorization": "Bearer secret"}
        assert client.get("/page/about", headers=key).json()["needs_key"] is True


def test_every_response_of_the_window_forbids_what_it_does_not_need(page):
    with window() as client:
        responses = [
            client.get("/"),
            client.get("/page/app.js"),
            client.get("/page/about"),
            client.get("/page/other.js"),
            client.post("/page/app.js"),
            client.get("/", headers={"Host": "evil.example"}),
        ]
    assert [one.status_code for one in responses] == [200, 200, 200, 404, 405, 403]
    for response in responses:
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "[::1", "a@b"])
def test_a_name_that_was_made_to_point_here_is_refused(page, host):
    with window() as client:
        for path in ("/", "/page/about"):
            assert "token" not in error(client.get(path, headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.7:80"])
def test_addresses_and_named_hosts_are_accepted(page, host):
    with window(settings=Settings(host_names=("box.example",))) as client:
        for name in (host, "box.example", "BOX.example:443"):
            assert client.get("/page/about", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://127.0.0.1:8000.evil.example"},
        {"Origin": "file://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_are_refused(page, headers):
    # Even if they may call the API.
    with window(settings=Settings(cors_origins=("*",))) as client:
        assert error(client.get("/page/about", headers=headers), 403)["code"] == "forbidden"
        # They may link to the page, whose files are no secret.
        assert client.get("/", headers=headers).status_code == 200
        own = {"Origin": OWN, "Sec-Fetch-Site": "same-origin"}
        assert client.get("/page/about", headers=own).status_code == 200
