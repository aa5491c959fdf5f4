"""A LangGraph of two agents and a supervisor on one vLLM; the framework knows nothing of kvcomm but a base_url.

Start the server:  kvcomm vllm --model "$(python -c 'from kvcomm.tiny import FOLDER; print(FOLDER)')" --served-model-name tiny
Run it:            OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/vllm/langgraph_supervisor.py
"""

import operator
from collections.abc import Callable
from typing import Annotated, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

DOCUMENTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
    "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
)
ROLE = "you are the {} , a careful agent of the team . your style is plain . use only what is said below ."
CLOSING = "now write the final answer in the style of your role only ."
QUESTIONS = {"scout": "note a : city of bob ?", "critic": "note b : food of dan ?", "judge": "note a ? color of erin ?"}
ORDER = ("scout", "critic", "judge")


class State(TypedDict):
    said: Annotated[list[str], operator.add]


def agent(name: str) -> Callable[[State], State]:
    model = ChatOpenAI(
        model="tiny", temperature=0, max_tokens=32, extra_body={"kv_transfer_params": {"kvcomm": {"agent": name}}}
    )

    def node(state: State) -> State:
        text = " ".join([DOCUMENTS, *state["said"], f"questions : {QUESTIONS[name]}", CLOSING])
        answer = model.invoke(
            [
                ("system", ROLE.format(name)),
                ("human", text),
            ]
        )
        details = answer.usage_metadata["input_token_details"] if answer.usage_metadata else {}
        print(f"{name:8} {answer.content}   ({details.get('cache_read', 0)} prompt tokens cached)")
        return {"said": [f"{name} says : {answer.content}"]}

    return node


def main() -> None:
    graph = StateGraph(State)
    graph.add_node("supervisor", lambda state: {"said": []})
    for name in ORDER:
        graph.add_node(name, agent(name))
        graph.add_edge(name, END if name == ORDER[-1] else "supervisor")
    graph.add_edge(START, "supervisor")
    graph.add_conditional_edges("supervisor", lambda state: ORDER[len(state["said"])], list(ORDER))
    print("the judge's answer:", graph.compile().invoke({"said": []})["said"][-1])


if __name__ == "__main__":
    main()
