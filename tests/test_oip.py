"""The Open Inference Protocol, asked by a client that was not written here."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tritonclient.http as tritonclient
from fastapi.testclient import TestClient

from recsys_moe.predictor import Predictor
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from tests.test_serving import listening, save

COLOURS, PRICES = ["red", "green", "", "unseen"], [1.0, 2.5, float("nan"), 3.0]
ROWS = pa.table({"colour": ["red", "green", None, "unseen"], "price": [1.0, 2.5, None, 3.0]})
NAME = "shop@champion"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("oip") / NAME)


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[Any]:
    """The client, talking to a real server."""
    with listening(build_api(bundle, ServeConfig())) as port:
        client = tritonclient.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60, connection_timeout=60)
        yield client
        client.close()


def tensors(binary: bool, column: bool = False) -> list[Any]:
    shape = [4, 1] if column else [4]
    colour, price = tritonclient.InferInput("colour", shape, "BYTES"), tritonclient.InferInput("price", shape, "FP64")
    prices = np.nan_to_num(PRICES, nan=0.0) if not binary else np.array(PRICES)  # JSON has no NaN
    colour.set_data_from_numpy(np.array(COLOURS, object).reshape(shape), binary_data=binary)
    price.set_data_from_numpy(prices.reshape(shape), binary_data=binary)
    return [colour, price]


def test_server_and_models_tell_of_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "local")
    assert not client.is_model_ready(NAME, "7")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    about = client.get_model_metadata(NAME)
    assert [(each["name"], each["datatype"]) for each in about["inputs"]] == [("colour", "BYTES"), ("price", "FP64")]
    assert [(each["name"], each["datatype"]) for each in about["outputs"]] == [("click", "FP32"), ("buy", "FP32")]


@pytest.mark.parametrize("column", [False, True], ids=["N", "Nx1"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("answer", [True, False], ids=["binary answer", "json answer"])
def test_scores_are_the_predictors_bits(client: Any, bundle: Path, binary: bool, answer: bool, column: bool) -> None:
    outputs = [tritonclient.InferRequestedOutput(name, binary_data=answer) for name in ("buy", "click")]
    result = client.infer(NAME, tensors(binary, column), request_id="r7", outputs=outputs)
    rows = ROWS if binary else ROWS.set_column(1, "price", pa.array([1.0, 2.5, 0.0, 3.0]))
    click, buy = Predictor(bundle).score(rows)
    np.testing.assert_array_equal(result.as_numpy("click"), click)
    np.testing.assert_array_equal(result.as_numpy("buy"), buy)
    assert result.get_response()["id"] == "r7"
    assert result.get_response()["model_version"] == "local"


def test_all_scores_unless_said(client: Any, bundle: Path) -> None:
    result = client.infer(NAME, tensors(True))
    np.testing.assert_array_equal([result.as_numpy(name) for name in ("click", "buy")], Predictor(bundle).score(ROWS))


def test_a_mistake_reaches_the_client_as_a_sentence(client: Any) -> None:
    with pytest.raises(Exception, match="inputs has no tensor 'price'"):
        client.infer(NAME, tensors(True)[:1])
    with pytest.raises(Exception, match="model 'nobody' is not served here"):
        client.infer("nobody", tensors(True))


GOOD = {"name": "price", "shape": [1], "datatype": "FP64", "data": [1.0]}
COLOUR = {"name": "colour", "shape": [1], "datatype": "BYTES", "data": ["red"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": [2]}, "has 2 rows and 'colour' 1"),
        ({"shape": [1, 2]}, "has 1 values where its shape"),
        ({"shape": []}, "at least 1 item"),
        ({"shape": [-1]}, "greater than or equal to 1"),
        ({"shape": [1, 0], "data": []}, "greater than or equal to 1"),
        ({"shape": [1, 10**12], "data": []}, "has 0 values where its shape"),
        ({"datatype": "FP128"}, "send one of BYTES"),
        ({"data": ["x"]}, "is not a number"),
        ({"data": [{"a": 1}]}, "where its shape"),
        ({"data": None}, "neither data nor a binary_data_size"),
        ({"name": "colour"}, "twice"),
        ({"parameters": {"binary_data_size": 8}}, "has 8 bytes, of which 0 are there"),
    ],
)
def test_a_bad_tensor_is_told(bundle: Path, change: dict[str, Any], told: str) -> None:
    with TestClient(build_api(bundle, ServeConfig()), raise_server_exceptions=False) as client:
        answer = client.post(f"/v2/models/{NAME}/infer", json={"inputs": [COLOUR, GOOD | change]})
    assert answer.status_code == 422
    assert told in answer.json()["error"]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (struct.pack("<I", 3) + b"re", "cut short"),
        (b"\x01", "is not BYTES"),
        (struct.pack("<I", 1) + b"\xff", "is not BYTES"),
        (struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b", "has 2 texts"),
        (struct.pack("<I", 2**32 - 1), "cut short"),
    ],
)
def test_bad_bytes_are_told(bundle: Path, raw: bytes, told: str) -> None:
    head = {"inputs": [COLOUR | {"data": None, "parameters": {"binary_data_size": len(raw)}}, GOOD]}
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    with TestClient(build_api(bundle, ServeConfig()), raise_server_exceptions=False) as client:
        answer = client.post(f"/v2/models/{NAME}/infer", content=text + raw, headers=headers)
        assert answer.status_code == 422
        assert told in answer.json()["error"]
        more = client.post(f"/v2/models/{NAME}/infer", content=text + raw + b"x", headers=headers)
        assert more.status_code == 422
        for length in ("-1", "x", "999999", "9" * 5000):
            changed = headers | {"Inference-Header-Content-Length": length}
            wrong = client.post(f"/v2/models/{NAME}/infer", content=text, headers=changed)
            assert "how many bytes of the body are JSON" in wrong.json()["error"]


def test_an_output_is_answered_once(bundle: Path) -> None:
    """Thousands of names in a short request would else be gigabytes of scores."""
    with TestClient(build_api(bundle, ServeConfig()), raise_server_exceptions=False) as client:
        outputs = [{"name": "click"}, {"name": "buy"}, {"name": "click"}]
        answer = client.post(f"/v2/models/{NAME}/infer", json={"inputs": [COLOUR, GOOD], "outputs": outputs})
    assert (answer.status_code, answer.json()["error"]) == (422, "outputs names 'click' twice; send it once")
