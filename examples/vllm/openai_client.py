"""Two agents ask one vLLM about the same documents, through the openai client; the second finds them known.

Start the server:  kvcomm vllm --model "$(python -c 'from kvcomm.tiny import FOLDER; print(FOLDER)')" --served-model-name tiny
Run it:            OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/vllm/openai_client.py
"""

from openai import OpenAI

DOCUMENTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
    "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
)
ROLE = "you are the {} , a careful agent of the team . your style is plain . use only what is said below ."
CLOSING = "now write the final answer in the style of your role only ."
QUESTIONS = {"scout": "note a : city of bob ?", "critic": "food of dan ? color of erin ?"}


def main() -> None:
    client = OpenAI()  # base_url and key from the environment
    for agent, question in QUESTIONS.items():
        text = f"{DOCUMENTS} questions : {question} {CLOSING}"
        answer = client.chat.completions.create(
            model="tiny",
            temperature=0,
            max_tokens=32,
            messages=[{"role": "system", "content": ROLE.format(agent)}, {"role": "user", "content": text}],
            extra_body={"kv_transfer_params": {"kvcomm": {"agent": agent}}},  # optional: who asks
        )
        said = answer.model_dump()["kv_transfer_params"]["kvcomm"]
        print(f"{agent:8} {answer.choices[0].message.content}")
        print(f"         {said['reused_tokens']} of {said['prompt_tokens']} prompt tokens reused {said['fallback'] or ''}")


if __name__ == "__main__":
    main()
