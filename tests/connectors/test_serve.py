"""The command line that `kvcomm vllm` becomes."""

from __future__ import annotations

import json

import pytest

from kvcomm.connectors.serve import command
from kvcomm.errors import InputError


def test_options_reach_vllm_as_they_are() -> None:
    made = command('{"boundary": 4}', ["--model", "m", "--port", "1"])
    assert made[1:8] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "m",
        "--port",
        "1",
        "--enable-prompt-tokens-details",
    ]
    given = json.loads(made[made.index("--kv-transfer-config") + 1])
    assert given["kv_connector_extra_config"] == {"boundary": 4}
    assert given["kv_load_failure_policy"] == "recompute"
    assert made[made.index("--worker-extension-cls") + 1] == "kvcomm.connectors.vllm.RunnerHandle"


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ("{", [], "not JSON"),
        ("[]", [], "must be an object"),
        ('{"closing": 0}', [], "closing is 0"),
        ("{}", ["--kv-transfer-config={}"], "--kv-transfer-config is set by kvcomm"),
        ("{}", ["--worker-extension-cls", "x"], "--worker-extension-cls is set by kvcomm"),
    ],
)
def test_unusable(config: str, options: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        command(config, options)
