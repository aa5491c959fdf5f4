"""The OpenAI Agents SDK on one vLLM: a planner hands off to a judge, and the judge asks a clerk, who is an agent as a tool.

All three read the documents; the framework knows nothing of kvcomm but a base_url. `--mode off` computes all of it, to compare.

The embedded model speaks of reports and questions, not of tools: `tool_choice` names them, and vLLM's structured outputs see to
the form of the call. That of a handoff has no arguments, that of the clerk one of three questions, which the model chooses.

Start the server:  kvcomm vllm --model "$(python -c 'from kvcomm.tiny import FOLDER; print(FOLDER)')" \\
                     --served-model-name tiny --enable-auto-tool-choice --tool-call-parser xlam \\
                     --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
Run it:            OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/vllm/openai_agents.py
"""

import argparse
import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from agents import (
    Agent,
    AgentHooks,
    ModelResponse,
    ModelSettings,
    Runner,
    RunResult,
    RunResultStreaming,
    handoff,
    set_default_openai_api,
    set_tracing_disabled,
)
from agents.extensions.handoff_filters import remove_all_tools

DOCUMENTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
    "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
)
ROLE = "you are the {} , a careful agent of the team . your style is plain . use only what is said below ."
CLOSING = "now write the final answer in the style of your role only ."
TASK = f"questions : note a ? color of erin ? {CLOSING}"  # what note a is, only the clerk's answer says


@dataclass
class Asked:
    question: Literal[" note a : city of bob ?", " note b : boss of dan ?", " note c : food of bob ?"]


class Shown(AgentHooks[None]):
    """Prints every answer of the model, and how much of its prompt was there already."""

    async def on_llm_end(self, context: Any, agent: Agent[None], response: ModelResponse) -> None:
        usage = response.usage
        for item in response.output:
            said = f"{item.name} {item.arguments}" if item.type == "function_call" else item.content[0].text.strip()
            print(f"{agent.name:8} {said}   ({usage.input_tokens_details.cached_tokens} of {usage.input_tokens} cached)")


def agent(name: str, args: argparse.Namespace, tool_choice: str | None = None, **parts: Any) -> Agent[None]:
    said = {"agent": name, "mode": args.mode}  # optional: who asks, and how
    body = {"cache_salt": args.tenant, "kv_transfer_params": {"kvcomm": said}}
    settings = ModelSettings(temperature=0, max_tokens=48, tool_choice=tool_choice, extra_body=body)
    return Agent(name, instructions=ROLE.format(name), model="tiny", model_settings=settings, hooks=Shown(), **parts)


async def note(run: RunResult | RunResultStreaming) -> str:
    return f"clerk says : {run.final_output.strip()} {TASK}"  # the model answers what it reads last


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--api", choices=["responses", "chat_completions"], default="responses")
    parser.add_argument("--mode", choices=["on", "off"], default="on")
    parser.add_argument("--tenant", default="team", help="nothing is shared with requests of another one")
    args = parser.parse_args()
    set_default_openai_api(args.api)
    set_tracing_disabled(True)

    clerk = agent("clerk", args)
    ask = clerk.as_tool(
        "ask_clerk",
        "looks one thing up",
        parameters=Asked,
        input_builder=lambda given: f"{DOCUMENTS} questions :{given['params']['question']} {CLOSING}",
        custom_output_extractor=note,
    )
    judge = agent("judge", args, "ask_clerk", tools=[ask])
    planner = agent("planner", args, "transfer_to_judge", handoffs=[handoff(judge, input_filter=remove_all_tools)])
    done = await Runner.run(planner, f"{DOCUMENTS} {TASK}")
    print(f"the {done.last_agent.name}'s answer: {done.final_output.strip()}")


if __name__ == "__main__":
    asyncio.run(main())
