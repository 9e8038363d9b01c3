"""From a task's prompt to the tokens a model sees: chat template where there is one, else the text.

One template for student and teacher. Llama's templates may print today's date; it is fixed here,
or two runs of one config would differ.
"""

from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}

Prompt = str | list[dict[str, str]]


def format_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, instruction: str = "") -> Prompt:
    """A prompt as TRL takes it: chat messages where the tokenizer has a template, else text.

    Args:
        tokenizer: The student's tokenizer.
        prompt: The task row's prompt.
        instruction: Appended after a blank line; empty adds nothing.
    """
    text = f"{prompt}\n\n{instruction}" if instruction else prompt
    return [{"role": "user", "content": text}] if tokenizer.chat_template else text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a formatted prompt, ready for the model to continue."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, **CHAT_TEMPLATE_ARGUMENTS
    )["input_ids"]


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of a reference answer as a completion, the end token included."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]
