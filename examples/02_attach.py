"""A transformers pipeline shares KV, with no change to it or to the code that calls it.

Run it: python examples/02_attach.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from kvcomm import KVComm
from kvcomm.tiny import FOLDER

REPORTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup ."
)
ROLE = "you are the {} , a careful agent of the team . your style is {} . use only what is said below ."
ASK = "questions : {} now write the final answer in the style of your role only ."


def main() -> None:
    # Code as it stands in many programs: a model, a pipeline, calls.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    settings = GenerationConfig(max_new_tokens=32, do_sample=False)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, generation_config=settings)

    def ask(role: str, style: str, question: str) -> str:
        system = {"role": "system", "content": ROLE.format(role, style)}
        user = {"role": "user", "content": f"{REPORTS} {ASK.format(question)}"}
        found = pipe([system, user])
        return str(found[0]["generated_text"][-1]["content"]).strip()

    # What is new: the block around it.
    comm = KVComm.from_model(model, tokenizer)
    with comm.attach(model):
        for role, style, question in (("scout", "plain", "city of bob ?"), ("critic", "loud", "food of dan ?")):
            with comm.acting(role):  # says who asks; without it everything is shared just the same
                answer = ask(role, style, question)
            report = comm.reports[-1]
            print(f"{role}: {answer}  ({report.reused_tokens} of {report.prompt_tokens} prompt tokens reused)")

    before = len(comm.reports)
    print(f"after the block: {ask('judge', 'plain', 'pet of bob ?')}  ({len(comm.reports) - before} requests seen)")


if __name__ == "__main__":
    main()
