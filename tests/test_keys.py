"""Keys and rates: who may ask, and how often; none on loopback, and no other address without."""

import hashlib
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from recsys_moe.errors import UserError
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.keys import Bucket, read_keys
from recsys_moe.typed import parse
from tests.test_serving import save


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_key_opens_and_its_rate_closes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.yaml"
    keys = {"web": {"sha256": digest("right"), "per_second": 3}, "batch": {"sha256": digest("other"), "per_second": 1e6}}
    file.write_text(yaml.safe_dump(keys))
    caplog.set_level("INFO", "recsys_moe")
    with TestClient(build_api(save(tmp_path / "bundle"), ServeConfig(keys_file=str(file)))) as client:

        def ask(header: str | None, path: str = "/v1/models") -> int:
            return client.get(path, headers={} if header is None else {"Authorization": header}).status_code

        for wrong in (None, "", "Bearer wrong", "Bearer", "Basic right", "right", "Bearer " + digest("right")):
            assert ask(wrong) == 401
            assert ask(wrong, "/docs") == 401
        refused = client.get("/v1/models")
        assert refused.json() == {"error": "the request has no key that is known here; send Authorization: Bearer KEY"}
        assert refused.headers["www-authenticate"] == "Bearer"
        assert ask(None, "/healthz") == 200
        answers = [client.get("/v1/models", headers={"Authorization": "Bearer right"}) for _ in range(6)]
        assert [answer.status_code for answer in answers[:3]] == [200] * 3
        assert answers[-1].status_code == 429
        assert answers[-1].headers["retry-after"] == "1"
        assert {ask("Bearer other") for _ in range(6)} == {200}
    assert "web" in {record.__dict__.get("told", {}).get("key") for record in caplog.records}
    assert "right" not in caplog.text


def test_tokens_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("recsys_moe.serving.keys.time.monotonic", lambda: now[0])
    bucket = Bucket(2)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.5]
    now[0] += 0.5
    assert [bucket.take() for _ in range(2)] == [0, 0.5]
    now[0] += 60
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "can't be read"),
        ("a: [", "can't be read"),
        ("", "names no key"),
        ("a: {sha256: secret, per_second: 1}", "sha256"),
        (f"a: {{sha256: {digest('x')}, per_second: 0}}", "per_second"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_keys(tmp_path / "keys.yaml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "rank.example.org"])
def test_other_addresses_need_keys(host: str) -> None:
    with pytest.raises(UserError, match=r"can be reached from elsewhere; set serve.keys_file"):
        parse(ServeConfig, {"host": host}, "serve")
    assert parse(ServeConfig, {"host": host, "keys_file": "keys.yaml"}, "serve").host == host
