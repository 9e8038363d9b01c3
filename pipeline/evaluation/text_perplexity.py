"""Running text as windows whose perplexity `completion_perplexity` takes.

Windows of `seq_len` tokens start `stride` tokens apart. Each scores its last `stride` tokens and
reads the others as context; the first, which has nothing before it, scores all but its first token.
So every token of the text but the first is scored once, and from the second window on with at
least `seq_len - stride` tokens before it. The last window ends with the text and may be shorter.

With `stride` = `seq_len` the windows stand side by side, as in the published figures of GPTQ,
SparseGPT and Wanda (arXiv 2210.17323, 2301.00774, 2306.11695): each scores all but its first token,
and what does not fill a last window is left out. WikiText-2 there is the test split of
Salesforce/wikitext, wikitext-2-raw-v1, its lines joined by blank ones. The window matters: Llama-2
7B has 5.47 in windows of 2048 and 5.12 in windows of 4096.

A smaller stride costs seq_len / stride passes over the text and gives a lower figure, so neither
number may differ between models that are compared. A begin token, where the tokenizer adds one,
stands in the first window only.
"""

from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.evaluation.completions import TokenPair


def text_windows(
    token_ids: Sequence[int], *, seq_len: int, stride: int, key: str = "evaluate.text_path"
) -> list[TokenPair]:
    """Cut a text into pairs of context and scored tokens.

    Args:
        token_ids: The whole text.
        seq_len: Tokens of a window.
        stride: Tokens from one window's start to the next one's, at most `seq_len`.
        key: The config key the text came from, with its value or without, for messages.

    Returns:
        Context as prompt, scored tokens as completion, in the order of the text.

    Raises:
        UserError: The text does not fill one window.
    """
    assert 0 < stride <= seq_len, "the config checks this"
    if len(token_ids) < seq_len:
        raise UserError(
            f"{key}: its text has {len(token_ids)} tokens and does not fill one window of "
            f"{seq_len}. Set a longer text or a shorter window."
        )
    if stride == seq_len:
        starts = range(0, len(token_ids) - seq_len + 1, seq_len)
        return [(token_ids[s : s + 1], token_ids[s + 1 : s + seq_len]) for s in starts]
    windows = [(token_ids[:1], token_ids[1:seq_len])]
    for start in range(stride, len(token_ids) - seq_len + stride, stride):
        scored = start + seq_len - stride
        windows.append((token_ids[start:scored], token_ids[scored : start + seq_len]))
    return windows
