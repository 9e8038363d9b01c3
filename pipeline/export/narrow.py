"""Narrow: an ordinary dense Llama without the channels and heads that the mask has emptied.

Smaller and faster in any software, because nothing in it is sparse any more. What can be cut, and
that the widest layer decides, is told in `models/narrow.py`.
"""

import logging

from transformers import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.narrow import narrow_llama, needed_sizes

logger = logging.getLogger(__name__)


def prepare(model: LlamaForCausalLM, *, width_multiple: int) -> LlamaForCausalLM:
    """The narrower model; says which sizes it has and which layer decided them.

    Raises:
        UserError: Nothing can be cut.
    """
    sizes = needed_sizes(model, width_multiple=width_multiple)
    config = model.config
    decided = (
        f"MLP width {sizes.intermediate_size} of {config.intermediate_size}, decided by layer "
        f"{sizes.widest_mlp}; {sizes.num_attention_heads} of {config.num_attention_heads} heads "
        f"over {sizes.num_key_value_heads} of {config.num_key_value_heads} key-value heads, "
        f"decided by layer {sizes.widest_attention}"
    )
    if sizes.are_those_of(model):
        raise UserError(
            f"export.formats: narrow: nothing can be cut, since all layers have the sizes of the "
            f"widest ({decided}); prune with prune.method sdmprune, or leave narrow out"
        )
    logger.info("export: narrow: %s", decided)
    return narrow_llama(model, width_multiple=width_multiple)
