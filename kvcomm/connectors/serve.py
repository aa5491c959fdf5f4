"""`kvcomm vllm`: vLLM's OpenAI server with the connector configured. Every option that is not ours goes to vLLM as it is.

The process becomes vLLM's: signals, exit codes and logs are its own. It is started as a module because the `vllm` script of
the CPU wheel looks for the metadata of another package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from kvcomm.connectors.local import need_vllm
from kvcomm.connectors.settings import Settings
from kvcomm.errors import InputError

__all__ = ["add_arguments", "command", "run"]

OURS = ("--kv-transfer-config", "--worker-extension-cls")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The one flag of `kvcomm vllm`."""
    parser.add_argument(
        "--kvcomm-config",
        default="{}",
        metavar="JSON",
        help='settings of the connector, for example \'{"boundary": 4, "agents": {"judge": {"rule": "exact"}}}\'',
    )


def command(config: str, options: Sequence[str]) -> list[str]:
    """The command line that serves with `options` of vLLM's. Raises InputError for settings or options that cannot be used."""
    try:
        extra = json.loads(config)
    except json.JSONDecodeError as error:
        raise InputError(f"--kvcomm-config is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise InputError(f"--kvcomm-config is {config}; it must be an object")
    Settings.from_extra(extra)
    if taken := [flag for flag in OURS if any(o == flag or o.startswith(f"{flag}=") for o in options)]:
        raise InputError(f"{taken[0]} is set by kvcomm vllm; to set it yourself start vLLM's own command")
    transfer = {
        "kv_connector": "KVCommConnector",
        "kv_connector_module_path": "kvcomm.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, "--enable-prompt-tokens-details"]
    return [*server, OURS[1], "kvcomm.connectors.vllm.RunnerHandle", OURS[0], json.dumps(transfer)]


def run(args: argparse.Namespace) -> int:
    """Does not return."""
    arguments = command(args.kvcomm_config, args.rest)
    need_vllm()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the connector knows the other one
    sys.stdout.flush()
    os.execv(arguments[0], arguments)
