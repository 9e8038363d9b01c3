"""Loading a Llama and its tokenizer from the bundled folder, a local folder or the Hub.

A local path wins over a Hub id. Architectures other than Llama are refused before weights load.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.paths import resolve_model

SUPPORTED_MODEL_TYPES = ("llama",)


def load_model(
    path: str,
    *,
    key: str = "student.path",
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> LlamaForCausalLM:
    """Loads a Llama in evaluation mode on the CPU.

    Args:
        path: `bundled`, a local folder or a Hub id.
        key: The config key the path came from, for messages.
        revision: Hub revision.
        dtype: `float32` or `bfloat16`.
        trust_remote_code: Whether code from the Hub may run.

    Raises:
        UserError: Missing, gated or unreachable model, or one that is not a Llama.
    """
    source = resolve_model(path, key)
    arguments = {"revision": revision, "trust_remote_code": trust_remote_code}
    load_architecture(path, key=key, **arguments)
    with _explained(key, path):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, **arguments
        )
    return model.eval()


def load_architecture(
    path: str,
    *,
    key: str = "student.path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Loads a Llama's config.json.

    Raises:
        UserError: Missing, gated or unreachable model, or one that is not a Llama.
    """
    with _explained(key, path):
        config = AutoConfig.from_pretrained(
            resolve_model(path, key), revision=revision, trust_remote_code=trust_remote_code
        )
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"{key}: {path!r} is a {config.model_type!r} model; supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Set a Llama"
        )
    return config


def check_model(
    path: str,
    *,
    key: str = "student.path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Looks at a model's config, and at the headers of its weights where they are local.

    Raises:
        UserError: As `load_model`; what only the weights themselves would show is left to it.
    """
    load_architecture(path, key=key, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(resolve_model(path, key))
    if not folder.is_dir():
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{key}: {path!r} holds no weights (model*.safetensors); set the folder that "
            "save_pretrained() wrote, of an export that of hf or narrow"
        )
    for file in files:
        with _explained(key, path), safe_open(file, framework="pt"):
            pass


def load_tokenizer(
    path: str,
    *,
    key: str = "student.path",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads on the left with a token that never ends a sequence.

    Raises:
        UserError: No tokenizer there, or it has no end-of-sequence token.
    """
    with _explained(key, path):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(path, key), revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer of {path!r} has no eos_token; set one and save it")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _reserved_token(tokenizer, key, path)
    return tokenizer


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Token-level distillation needs one vocabulary.

    Raises:
        UserError: The vocabularies differ; names the first difference.
    """
    if student.get_vocab() == teacher.get_vocab() and student.eos_token_id == teacher.eos_token_id:
        return
    student_tokens, teacher_tokens = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student, teacher)
    )
    indices = sorted(student_tokens.keys() | teacher_tokens.keys())
    first = next((i for i in indices if student_tokens.get(i) != teacher_tokens.get(i)), None)
    difference = (
        f"eos_token is {student.eos_token!r} and {teacher.eos_token!r}"
        if first is None
        else f"token {first} is {student_tokens.get(first)!r} and {teacher_tokens.get(first)!r}"
    )
    raise UserError(
        f"teacher.path: student and teacher have different tokenizers (first difference: "
        f"{difference}); set a teacher with the student's tokenizer"
    )


def _reserved_token(tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> str:
    """A padding token that is in the vocabulary but ends nothing (Llama 3 has one for this)."""
    vocabulary = tokenizer.get_vocab()
    for token in ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<unk>"):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    raise UserError(
        f"{key}: the tokenizer of {path!r} has no padding token of its own; add one (pad_token "
        "different from eos_token) and save the tokenizer"
    )


class _explained:
    """Turns the Hub's and the file system's exceptions into one sentence with a remedy."""

    def __init__(self, key: str, path: str):
        self.key, self.path = key, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> bool:
        text = str(error)
        is_file = isinstance(error, (OSError, ValueError, TypeError, SafetensorError))
        is_shape = isinstance(error, RuntimeError) and "mismatched" in text
        if not (is_file or is_shape) or isinstance(error, UserError):
            return False
        is_on_hub = not Path(resolve_model(self.path, self.key)).is_dir()
        if "custom code" in text:
            remedy = "it needs Python code that comes with it, which is not run; set one without"
            if self.key.startswith("student."):
                remedy += ", or student.trust_remote_code: true if you trust it"
        elif is_on_hub and ("gated" in text or "401" in text or "403" in text):
            remedy = "it is gated: accept its licence on the Hub, then set HF_TOKEN"
        elif is_on_hub and isinstance(error, OSError):
            remedy = (
                "it is not on this machine and the Hub did not give it; check the spelling and the "
                "network, unset HF_HUB_OFFLINE, or set the path of a local model folder"
            )
        else:
            remedy = f"transformers could not load it ({text.splitlines()[0]})"
        raise UserError(f"{self.key}: {self.path!r}: {remedy}") from error
