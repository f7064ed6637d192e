"""The text side: a tokenizer for words, with a fallback to letters, and a random UMT5 that is not trained.

The encoder learns nothing. But words of one meaning, in upper or lower case, get nearly the same vector, and words that mean
nothing in the toy world get nearly the vector of all filler.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config
from transformers import UMT5EncoderModel as TextEncoder

from builder.demo.captions import FILLER, MEANINGS
from pipelines.catalog import MAX_TOKENS

WIDTH = 64
TRAINED_TOKENS = 32
TRIGGER = "sks"


def cases(word: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((word, word.capitalize(), word.upper())))


def vocabulary() -> list[tuple[str, float]]:
    """Return unigram pieces: special tokens, letters, and whole words, which are always preferred."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [("▁", -10.0), *((c, -10.0) for c in string.printable if c.isprintable() and c != " ")]
    words = [*FILLER, *(word for words in MEANINGS.values() for word in words), TRIGGER]
    pieces = dict.fromkeys(f"▁{case}" for word in words for case in cases(word))
    return [*special, *letters, *((piece, -1.0) for piece in pieces)]


def new_tokenizer() -> T5TokenizerFast:
    core = Tokenizer(models.Unigram(vocabulary(), unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    core.decoder = decoders.Metaspace()
    return T5TokenizerFast(
        tokenizer_object=core, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def new_encoder(seed: int) -> TextEncoder:
    torch.manual_seed(seed)
    pieces = vocabulary()
    config = UMT5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def vector() -> Tensor:
        return torch.randn(WIDTH, generator=generator)

    filler = vector()
    vectors = {"</s>": vector()}
    for words in [*MEANINGS.values(), (TRIGGER,)]:
        meaning = vector()
        vectors |= {f"▁{case}": meaning + 0.15 * vector() for word in words for case in cases(word)}
    table = [vectors.get(piece, filler + 0.3 * vector()) for piece, _ in pieces]
    encoder.shared.weight.data.copy_(torch.stack(table))
    return encoder


@torch.no_grad()
def embed(tokenizer: T5TokenizerFast, encoder: TextEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the embeddings [n, TRAINED_TOKENS + 1, WIDTH] and what to add to attention's logits [n, 1, 1, TRAINED_TOKENS + 1].

    The pipelines pad with zeros to MAX_TOKENS, and the transformer attends to them. Here one zero token stands for all of them:
    adding the logarithm of their number to its logit gives the same attention, at a tenth of the work.
    """
    tokens = tokenizer(texts, padding="max_length", max_length=TRAINED_TOKENS, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask
    hidden = encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
    hidden = torch.cat([hidden, torch.zeros(len(texts), 1, hidden.shape[-1])], dim=1)
    pads = torch.log(MAX_TOKENS - mask.sum(1, keepdim=True).float())
    bias = torch.cat([torch.where(mask > 0, 0.0, -1e4), pads], dim=1)
    return hidden, bias[:, None, None, :]
